"""How pairs become streams, written out."""

from test_fast_engine import PAIRS

from smoldpo.engine.packing import by_length, pack, pair_length
from smoldpo.types import TokenizedPair


def test_the_mask_drawn():
    drawn = str(
        pack([TokenizedPair("a", (1, 2), (3,), (4, 5)), TokenizedPair("b", (6,), (7,), (8,))])
    )
    assert drawn.splitlines() == [
        "#....",
        "##...",
        "###..",
        "##.#.",
        "##.##",
        "     #..",
        "     ##.",
        "     #.#",
    ]


def test_the_mask_drawn_where_pairs_share_a_beginning():
    pairs = [TokenizedPair("a", (1, 2, 3), (4,), (5,)), TokenizedPair("b", (1, 2, 6), (7,), (8, 9))]
    assert str(pack(pairs, shared=(1, 2))).splitlines() == [
        "#.",
        "##",
        "###..",
        "####.",
        "###.#",
        "##   #...",
        "##   ##..",
        "##   #.#.",
        "##   #.##",
    ]


def test_packing_with_a_beginning_in_common_written_out():
    pairs = [TokenizedPair("a", (1, 2, 3), (4,), (5,)), TokenizedPair("b", (6,), (7,), (8, 9))]
    batch = pack(pairs, multiple_of=10, shared=(1, 2))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 0, 1, 1, 2, 0]]
    assert batch.rows.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert batch.rows[batch.predictors].tolist() == [2, 2, 5, 5, 7]
    assert batch.layout.spread[batch.layout.gather].tolist() == list(range(9))


def test_packing_written_out():
    batch = pack([TokenizedPair("a", (1, 2), (3, 4), (5,)), TokenizedPair("b", (6,), (7,), (8, 9))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert batch.rows.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.rows[batch.predictors].tolist() == [1, 2, 1, 5, 5, 7]
    assert batch.targets.tolist() == [3, 4, 5, 7, 8, 9]
    assert batch.sides.tolist() == [0, 0, 2, 1, 3, 3]


def test_batches_hold_every_pair_once_within_the_budget():
    batches = by_length(PAIRS, 24)
    assert sorted(index for batch in batches for index in batch) == list(range(len(PAIRS)))
    for batch in batches:
        assert len(batch) == 1 or sum(pair_length(PAIRS[index]) for index in batch) <= 24

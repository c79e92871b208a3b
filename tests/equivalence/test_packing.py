"""How pairs become streams, written out."""

from test_fast_engine import PAIRS

from smoldpo.engine.packing import batch_by_length, pack, pair_length
from smoldpo.types import NO_NUMBERS, TokenizedPair


def drawn(batch):
    """The attention mask: a row a query, a column a key, # where it looks."""
    lines = []
    for slot in batch.layout.slots:
        visible = slot.segment.mask()
        before, own = slot.segment.tokens
        columns = [*before, *own]
        for query in range(len(before), len(columns)):
            row = [" "] * (columns[-1] + 1)
            for key, column in enumerate(columns):
                row[column] = "#" if visible[query, key] else "."
            lines.append("".join(row))
    return lines


def test_the_mask_drawn():
    pairs = [TokenizedPair("a", (1, 2), (3,), (4, 5)), TokenizedPair("b", (6,), (7,), (8,))]
    assert drawn(pack(pairs)) == [
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
    assert drawn(pack(pairs, prefix=(1, 2))) == [
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
    batch = pack(pairs, multiple_of=10, prefix=(1, 2))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 0, 1, 1, 2, 0]]
    assert batch.rows.tolist() == [2, 4, 5, 7, 8]
    assert batch.rows[batch.predictors].tolist() == [2, 2, 5, 5, 7]
    assert batch.layout.token_of_row[batch.layout.row_of_token].tolist() == list(range(9))


def test_packing_written_out():
    batch = pack([TokenizedPair("a", (1, 2), (3, 4), (5,)), TokenizedPair("b", (6,), (7,), (8, 9))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert batch.rows.tolist() == [1, 2, 4, 5, 7, 8]
    assert batch.rows[batch.predictors].tolist() == [1, 2, 1, 5, 5, 7]
    assert batch.targets.tolist() == [3, 4, 5, 7, 8, 9]
    assert batch.sides.tolist() == [0, 0, 2, 1, 3, 3]


def test_packing_with_tokens_that_are_not_scored_written_out():
    pair = TokenizedPair(
        "a", (1, 2), (3, 4, 5, 6), (7, 8), (), NO_NUMBERS, (False, True, False, True), (False, True)
    )
    batch = pack([pair, TokenizedPair("b", (1,), (9,), (10,))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 0, 1, 1]]
    assert batch.rows.tolist() == [2, 4, 6, 7, 8, 10], "before a scored token, or last"
    assert batch.rows[batch.predictors].tolist() == [2, 4, 6, 8, 8]
    assert batch.targets.tolist() == [4, 6, 8, 9, 10]
    assert batch.sides.tolist() == [0, 0, 2, 1, 3]
    assert batch.tail.tolist() == [False, True, False, False, False]


def test_batches_hold_every_pair_once_within_the_budget():
    batches = batch_by_length(PAIRS, 24)
    assert sorted(index for batch in batches for index in batch) == list(range(len(PAIRS)))
    for batch in batches:
        assert len(batch) == 1 or sum(pair_length(PAIRS[index]) for index in batch) <= 24

"""Completions of which some tokens are not scored: the values themselves, and who counts them."""

import json
from dataclasses import replace

import pytest
import torch

from smoldpo.engine.cache.keys import pair_key
from smoldpo.evaluation.metrics import pair_scores
from smoldpo.evaluation.side_by_side import token_ratios
from smoldpo.losses.inputs import LossInput
from smoldpo.training.fingerprint import tokens_sha256
from smoldpo.training.run_folder import write_not_finite
from smoldpo.types import PairLogps, TokenizedPair

PAIR = TokenizedPair(
    "dialogue",
    (1, 2),
    (3, 4, 5, 6),
    (7, 8, 9),
    chosen_scored=(True, False, False, True),
    rejected_scored=(False, False, True),
)


def test_counts_are_of_scored_tokens():
    assert (PAIR.chosen_tokens, PAIR.rejected_tokens, PAIR.scored_tokens) == (2, 1, 3)
    assert PAIR.shorter == 1, "of scored tokens"
    assert PAIR.longest == 2 + 4, "of all tokens"
    assert PAIR.completions[0] == ((3, 4, 5, 6), (True, False, False, True))


def test_without_a_mask_all_are_scored():
    whole = TokenizedPair("whole", (1, 2), (3, 4, 5, 6), (7, 8, 9))
    assert (whole.chosen_tokens, whole.rejected_tokens, whole.shorter) == (4, 3, 3)
    said = TokenizedPair("whole", (1, 2), (3, 4, 5, 6), (7, 8, 9), chosen_scored=(True,) * 4)
    assert said == whole and hash(said) == hash(whole)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "mask, says", [((True,), "1 entries for 2 tokens"), ((False, False), "leaves no token")]
)
def test_a_mask_that_cannot_be(side, mask, says):
    with pytest.raises(ValueError, match=f"pair x: {side}_scored .*{says}"):
        TokenizedPair("x", (1,), (2, 3), (4, 5), **{f"{side}_scored": mask})


def test_the_stored_and_the_resumed_know_masks_and_keep_their_names_without():
    bare = replace(PAIR, chosen_scored=None, rejected_scored=None)
    other = replace(PAIR, chosen_scored=(True, False, True, True))
    swapped = TokenizedPair("x", (1,), (2, 3), (2, 3), chosen_scored=(True, False))
    back = replace(swapped, chosen_scored=None, rejected_scored=(True, False))
    assert len({pair_key(pair, 0) for pair in (bare, PAIR, other)}) == 3
    assert len({tokens_sha256([pair]) for pair in (bare, PAIR, other)}) == 3
    assert pair_key(swapped, 0) != pair_key(back, 0)
    # As they were before there were masks.
    assert pair_key(bare, 0) == "55e031f01fa1cae6af0a4f81e8f3e3de"
    assert (
        tokens_sha256([bare]) == "417a8fd4d4fc8fd475a418d60b1bd05172b3bc6ed882de6f1f270600313d2108"
    )


def test_losses_and_evaluation_count_scored_tokens():
    logps = PairLogps(torch.tensor([-6.0]), torch.tensor([-2.0]))
    found = LossInput.of(logps, None, [PAIR], [PAIR, replace(PAIR, chosen_scored=None)], 0.1)
    assert found.chosen_tokens.tolist() == [2] and found.rejected_tokens.tolist() == [1]
    assert found.mean_chosen_tokens == (2 + 4) / 2
    (score,) = pair_scores([PAIR], logps, None)
    assert (score.chosen_tokens, score.rejected_tokens) == (2, 1)
    assert score.margins["logp_per_token"] == -6 / 2 + 2 / 1


def test_texts_of_tokens_with_values_where_they_are_scored(tiny_tokenizer):
    ids = tuple(tiny_tokenizer("fox \u00e9", add_special_tokens=False)["input_ids"])
    assert len(ids) == 5, "fo, x, a space, and the two bytes of a letter"
    pair = TokenizedPair("x", (1,), ids, ids, chosen_scored=(False, False, True, True, True))
    chosen, rejected = pair.completions
    found = token_ratios(tiny_tokenizer, chosen, [0.25, 0.5, 1.0])
    assert found == [("fo", None), ("x", None), (" ", 0.25), ("\u00e9", 1.5)]
    inside = replace(pair, chosen_scored=(False, False, True, True, False)).completions[0]
    found = token_ratios(tiny_tokenizer, inside, [0.25, 0.5])
    assert found[3:] == [("\ufffd", 0.5), ("\ufffd", None)], "a mask that parts a letter"
    assert token_ratios(tiny_tokenizer, rejected, [3.0, 2.0, 0.25, 0.5, 1.0])[1] == ("x", 2.0)


def test_a_step_that_is_not_finite_is_written_with_what_was_scored(tmp_path, tiny_tokenizer):
    written = json.loads(write_not_finite(tmp_path, {}, [PAIR], tiny_tokenizer).read_text())
    assert written["pairs"][0]["rejected_scored"] == [False, False, True]

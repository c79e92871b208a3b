"""Completions of which some tokens are not scored: the values themselves."""

import pytest

from smoldpo.types import TokenizedPair

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

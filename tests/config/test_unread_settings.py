"""Which settings a choice leaves unread."""

import pytest

from smoldpo.config.checks import listed, unread

READERS = {"a": ("tau", "rate"), "b": ("tau",), "c": (), "d": ("tau", "alpha")}


@pytest.mark.parametrize(
    "changed, chosen, said",
    [
        ({"tau"}, ["c"], ["tau is read by a, b and d, not by c"]),
        ({"rate"}, ["c", "b"], ["rate is read by a, not by c and b"]),
        ({"rate", "tau"}, ["c"], ["tau is read by a, b and d, not by c",
         "rate is read by a, not by c"]),
        ({"tau"}, ["c", "b"], []),
        ({"alpha", "rate"}, ["d", "a"], []),
        ({"rate"}, ["d"], ["rate is read by a, not by d"]),
        ({"seed"}, ["c"], []),
        (set(), ["c"], []),
    ],
)  # fmt: skip
def test_what_none_of_the_chosen_reads(changed, chosen, said):
    assert unread(changed, READERS, chosen) == said


@pytest.mark.parametrize("names, said", [("a", "a"), ("ab", "a and b"), ("abc", "a, b and c")])
def test_lists_in_words(names, said):
    assert listed(names) == said

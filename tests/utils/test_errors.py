"""Other libraries' errors, told in one line of ours."""

import pytest

from smoldpo.utils.errors import LONGEST_REASON, whole_reason


def test_the_cause_may_stand_in_a_later_line():
    error = RuntimeError("Error(s) in loading state_dict:\n\tsize mismatch for head:\n  (3, 4).\n")
    assert whole_reason(error) == "Error(s) in loading state_dict: size mismatch for head: (3, 4)"
    assert whole_reason(RuntimeError(" \n")) == whole_reason(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("words", [130, 10_000])
def test_of_a_long_reason_beginning_and_end_are_kept(words):
    middle = " ".join(f"line{n}\n" for n in range(words))
    text = whole_reason(RuntimeError(f"Compilation failed:\n{middle}\ncause: no such header"))
    assert text.startswith("Compilation failed: line0 line1 ")
    assert text.endswith(" cause: no such header") and " ... " in text
    assert LONGEST_REASON * 0.9 < len(text) <= LONGEST_REASON + len(" ... ")


def test_a_reason_without_spaces_is_cut_too():
    assert len(whole_reason(RuntimeError("x" * 5000))) <= LONGEST_REASON + len(" ... ")


def test_what_an_error_was_raised_from_is_told_on_request():
    try:
        try:
            raise OSError("disk quota exceeded")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error
    except RuntimeError as error:
        assert whole_reason(error) == "An error occurred while generating the dataset"
        told = whole_reason(error, causes=True)
    assert told == "An error occurred while generating the dataset; disk quota exceeded"
    repeating = RuntimeError("failed: disk full")
    repeating.__cause__ = OSError("disk full")
    assert whole_reason(repeating, causes=True) == "failed: disk full"

"""Errors for people: what is wrong, where, and what to do. The command line prints them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SmoldpoError(Exception):
    """Something a user can act on. Its text is the whole message; `exit_code` is the process's."""

    exit_code = 1


class UsageError(SmoldpoError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """Everything that is wrong with a configuration, reported at once."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        if len(problems) == 1:
            super().__init__(f"configuration: {problems[0]}")
        else:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            super().__init__(f"configuration: {len(problems)} problems\n{lines}")


class DataError(SmoldpoError):
    """A source that cannot be read, or a row in it, named by file and row (counted from 1)."""

    def __init__(self, problem: str, file: str | None = None, row: int | None = None):
        where = file or ""
        if row is not None:
            where += f", row {row}" if where else f"row {row}"
        super().__init__(f"{where}: {problem}" if where else problem)


class ModelError(SmoldpoError):
    """A model or tokenizer that cannot be loaded, frozen or saved as asked."""


class OutOfMemoryError(SmoldpoError):
    """The machine's memory, or the GPU's, does not suffice."""


class DiskError(SmoldpoError):
    """No room on the disk: whatever comes next would fail as well."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" suffix for `name`, or an empty string when nothing known is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def named_few(names: Sequence[str], few: int = 3) -> str:
    """The first few names, and how many more there are: "a, b, c and 4 more"."""
    more = len(names) - few
    return ", ".join(names[:few]) + (f" and {more:,} more" if more > 0 else "")


LONGEST_REASON = 600
"""Characters of another library's error that are shown."""


def whole_reason(error: BaseException, causes: bool = False) -> str:
    """What a foreign error says, on one line and without its last colon or full stop.

    Its later lines often hold the cause, so nothing but the middle of a long text is left out.

    Args:
        causes: with the errors that it was raised from, where it does not repeat them itself.
    """
    parts = [_one_line(error)]
    while causes and (cause := error.__cause__) is not None:
        if (text := _one_line(cause)) not in parts[-1]:
            parts.append(text)
        error = cause
    text = "; ".join(parts)
    if len(text) <= LONGEST_REASON:
        return text
    end = text[-LONGEST_REASON // 2 :].split(" ", 1)[-1]
    return f"{text[: LONGEST_REASON - len(end)].rsplit(' ', 1)[0]} ... {end}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".: ") or type(error).__name__

"""The table that a comparison prints, and how its commands are run."""

from __future__ import annotations

import sys
from pathlib import Path

from build_comparison.builds import Build, Outcome
from build_comparison.differences import folder_differences


class Report:
    """A Markdown table, printed row by row; `differences` counts the rows that are not equal."""

    def __init__(self) -> None:
        self.differences = 0
        print("| command | compared | before and after |\n| --- | --- | --- |")

    def row(self, command: str, what: str, difference: str | None) -> None:
        """One thing compared."""
        self.differences += difference is not None
        shown = "equal" if difference is None else f"**differ**: {difference}"
        print(f"| {command} | {what} | {shown.replace('|', chr(92) + '|')} |", flush=True)


def run(built: Build, command: str, code: int = 0) -> Outcome:
    """Run a command of a build.

    Raises:
        SystemExit: it ended with another exit code.
    """
    outcome = built.smoldpo(command.split())
    if outcome.code != code:
        sys.exit(f"{built.name}: smoldpo {command}\nexit code {outcome.code}\n{outcome.stderr}")
    return outcome


def compare(report: Report, command: str, before: Path, after: Path) -> None:
    """A row for each file of two run folders."""
    for what, difference in folder_differences(before, after):
        report.row(command, what, difference)

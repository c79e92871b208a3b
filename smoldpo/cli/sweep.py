"""`smoldpo sweep`: many trainings over the same pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smoldpo.cli.support import fail_sweep, verb
from smoldpo.utils.errors import UsageError

if TYPE_CHECKING:
    from smoldpo.sweep.run import SweepResult

HELP = "[SWEEP.yaml | SWEEPFOLDER] [--key value ...] [--json]"


@verb
def sweep(settings: Annotated[list[str] | None, typer.Argument(metavar=HELP)] = None) -> None:
    """Try many settings, and say which are worth taking. See sweep --help."""
    arguments = list(settings or [])
    if "--help" in arguments or "-h" in arguments:
        _print_help()
        return
    as_json = "--json" in arguments
    arguments = [word for word in arguments if word != "--json"]
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.sweep.run import is_sweep, resume_sweep, run_sweep
        from smoldpo.sweep.spec import spec_from_arguments

    if arguments and is_sweep(Path(arguments[0])):
        if len(arguments) > 1:
            raise UsageError(
                f"{arguments[0]}: goes on as it began; settings are for a sweep that is made from "
                "a file"
            )
        finish(resume_sweep(Path(arguments[0])), as_json)
        return
    finish(run_sweep(spec_from_arguments(arguments)), as_json)


def finish(result: SweepResult, as_json: bool = False) -> None:
    """Print what a sweep found; exit code 1 where a trial failed or the winner misses a gate."""
    if as_json:
        print(json.dumps(result.results.as_json(), indent=2, ensure_ascii=False))
    else:
        from smoldpo.cli.output import print_sweep

        print_sweep(result)
    fail_sweep(result.failed, result.results.planned, result.failed_gates)


def _print_help() -> None:
    from smoldpo.config.load import describe_options
    from smoldpo.sweep.spec import describe_sweep

    print(f"Usage: smoldpo sweep {HELP}\n")
    print("Try many settings on the same pairs, and say which are worth taking (docs/sweep.md).")
    print("A sweep that was interrupted goes on when it is given again; --overwrite begins anew.\n")
    describe_sweep(print)
    print("\nEvery setting of train holds for all trials, or is tried:\n")
    describe_options(print)

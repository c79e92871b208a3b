"""`smoldpo plan`: what a run will take, before it is started."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

WHAT = (
    "Forecast a run's time, memory and disk from a few real steps of it, at every freeze depth. "
    "Takes the settings of train; --json prints one JSON object."
)


def plan_run(arguments: Sequence[str]) -> None:
    """Parse, plan, print."""
    as_json = "--json" in arguments
    from smoldpo.arguments import config_from_arguments

    config = config_from_arguments([word for word in arguments if word != "--json"])

    from smoldpo.progress import spinner

    with spinner("starting"):
        from smoldpo.plan.pick import pick_and_say
        from smoldpo.plan.planner import make_plan
        from smoldpo.plan.table import as_dict, print_plan

    plan, picked = make_plan(config, seconds_since_start()), None
    if config.budget is not None:
        # The run will plan, too, before it begins.
        picked = pick_and_say(plan, config.budget, plan.seconds)
    if as_json:
        print(json.dumps(as_dict(plan, picked), indent=2))
    else:
        print_plan(plan, picked)


def seconds_since_start() -> float:
    """How long this process has run."""
    import psutil

    return time.time() - psutil.Process().create_time()

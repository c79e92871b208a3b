"""The command line: parse, call, print. Heavy imports are inside the verbs: --help is quick."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from smoldpo._version import __version__
from smoldpo.cli.cache import app as cache_app
from smoldpo.cli.data import app as data_app
from smoldpo.cli.evaluate import evaluate, report, show
from smoldpo.cli.export import export
from smoldpo.cli.iterate import iterate
from smoldpo.cli.launch import Nproc, run_on_ranks, take_nproc, take_option
from smoldpo.cli.pairs import app as pairs_app
from smoldpo.cli.support import fail_gates, number, one_of, verb, writable
from smoldpo.cli.sweep import finish, sweep
from smoldpo.cli.template_options import takes_template_options
from smoldpo.cli.web import web
from smoldpo.utils.distributed import own_rank, require_one_rank
from smoldpo.utils.errors import UsageError

app = typer.Typer(
    name="smoldpo",
    help="Tune small language models on preferences (DPO), on the machine you have, with proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(pairs_app, name="pairs")
app.add_typer(cache_app, name="cache")
config_app = typer.Typer(
    help="Look at the configuration, or read another trainer's.", no_args_is_help=True
)
app.add_typer(config_app, name="config")

app.command()(evaluate)
app.command()(show)
app.command()(report)
app.command()(export)
app.command()(web)

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
SETTINGS_HELP = "[CONFIG.yaml] [--key value ...]"
Settings = Annotated[list[str] | None, typer.Argument(metavar=SETTINGS_HELP)]
PLAN_HELP = (
    "Forecast a run's time, memory and disk from a few real steps of it, at every freeze depth. "
    "Takes the settings of train; --json prints one JSON object. With --nproc N it is a run on N "
    "ranks, each like this machine's process, between which --network-gbit G bits are sent in a "
    "nanosecond (10 by default)."
)
app.command(context_settings=SETTINGS)(sweep)
app.command(context_settings={"ignore_unknown_options": True})(iterate)


def main() -> None:
    """The `smoldpo` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Where torch does spread an operation over threads, they sleep until they are needed, and do
    # not spin on a core that another program could use. OpenMP asks once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"smoldpo {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=SETTINGS)
@verb
def train(settings: Settings = None) -> None:
    """Tune a policy on preference pairs; without arguments, the demo. See train --help."""
    arguments = settings or []
    what = (
        "Tune a policy on preference pairs; without arguments, the demo. --nproc N computes as N "
        "processes on this machine (docs/scale.md)."
    )
    if _prints_help(arguments, "train", what):
        return
    from smoldpo.config.load import config_from_arguments

    arguments, ranks = take_nproc(arguments)
    config = config_from_arguments(arguments)
    if ranks is not None:
        run_on_ranks(ranks, ["train", *arguments])
        return

    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.api.train import train_settled
    from smoldpo.cli.output import print_result
    from smoldpo.training.run_folder import command_line

    result = train_settled(config, command=command_line(), started=seconds_since_start())
    if own_rank() == 0:
        print_result(result)
    fail_gates(result.failed_gates)


@app.command(context_settings=SETTINGS)
@verb
def plan(settings: Settings = None) -> None:
    """Forecast a run's time, memory and disk from a few real steps of it. See plan --help."""
    arguments = settings or []
    if _prints_help(arguments, "plan", PLAN_HELP):
        return
    as_json = "--json" in arguments
    from smoldpo.config.load import config_from_arguments

    arguments, count = take_nproc(arguments)
    arguments, network = take_option(arguments, "--network-gbit")
    config = config_from_arguments([word for word in arguments if word != "--json"])

    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.plan.planner import choose_depth, make_plan
        from smoldpo.plan.ranks import planned_ranks
        from smoldpo.plan.table import as_dict, print_plan

    ranks = planned_ranks(count, None if network is None else number("--network-gbit", network))
    plan, chosen = make_plan(config, seconds_since_start(), ranks), None
    if config.budget is not None:
        # The run will plan, too, before it begins.
        chosen = choose_depth(plan.depths, config.budget, plan.seconds)
    if as_json:
        print(json.dumps(as_dict(plan, chosen), indent=2))
    else:
        print_plan(plan, chosen)


@app.command()
@verb
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of a sweep.")],
    extend: Annotated[
        float | None, typer.Option(metavar="EPOCHS", help="Add so many epochs to the run.")
    ] = None,
    nproc: Nproc = None,
) -> None:
    """Go on with an interrupted run (or sweep), exactly as if it had not been interrupted."""
    if nproc is not None:
        run_on_ranks(nproc, take_nproc(sys.argv[1:])[0])
        return
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.sweep.run import is_sweep, resume_sweep
        from smoldpo.training.resume import check_epochs, resume_training

    from smoldpo.cli.output import print_result

    check_epochs(extend)
    if is_sweep(run):
        require_one_rank("a sweep")
        if extend is not None:
            raise UsageError(
                "--extend adds epochs to a run, and this is a sweep; to train its best settings "
                f"for longer: smoldpo train {shlex.quote(str(run / 'best' / 'config.yaml'))} "
                "--output-dir FOLDER, with more --num-train-epochs (or --max-steps, where they "
                "have it)"
            )
        finish(resume_sweep(run))
        return
    result = resume_training(run, extend)
    if own_rank() == 0:
        print_result(result)
    fail_gates(result.failed_gates)


@app.command()
@verb
def doctor(
    prove_resume: Annotated[
        bool,
        typer.Option(
            "--prove-resume",
            help="Train a small model whole, and killed and resumed, and compare bit for bit.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at machine, versions, precision, compiler, disk and cache; or prove exact resumes."""
    from smoldpo.utils.progress import say, spinner

    if prove_resume:
        from smoldpo.training.prove_resume import prove_resume as prove

        found = prove(say)
        print(json.dumps(found.as_dict(), indent=2) if as_json else found.as_text())
        raise typer.Exit(0 if found.proven else 1)
    with spinner("looking"):
        from smoldpo.cli.doctor import as_text, examine

        report = examine()
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    raise typer.Exit(1 if report["problems"] else 0)


@config_app.command("show", context_settings=SETTINGS)
@verb
def config_show(settings: Settings = None) -> None:
    """Print the complete effective configuration as YAML."""
    arguments = settings or []
    what = "Print the complete effective configuration as YAML."
    if _prints_help(arguments, "config show", what):
        return
    from smoldpo.config.load import config_from_arguments, to_yaml

    print(to_yaml(config_from_arguments(arguments)), end="")


@config_app.command("schema")
@verb
def config_schema() -> None:
    """Print the configuration's JSON schema."""
    from smoldpo.config.schema import TrainConfig

    print(json.dumps(TrainConfig.model_json_schema(), indent=2))


@config_app.command("import")
@verb
def config_import(
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe of another trainer (DPO, ORPO, CPO, SimPO), in YAML."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the configuration here; without, it is printed.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that --out names.")] = False,
    dialect: Annotated[
        str | None,
        typer.Option(
            "--from", help="trl, alignment-handbook, axolotl or llama-factory; seen by its keys."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn a recipe of TRL, alignment-handbook, axolotl or LLaMA-Factory into a configuration."""
    from smoldpo.config.importers import DIALECTS, import_recipe

    if dialect is not None:
        one_of("from", dialect, tuple(DIALECTS))
    writable("--out", out, ".yaml")
    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"--out {out}: exists; give another name, or --overwrite")
    imported = import_recipe(recipe, dialect)
    if out is not None:
        from smoldpo.utils.files import write_text

        write_text(out, imported.as_yaml())
    if as_json:
        print(json.dumps(imported.as_dict(), indent=2, ensure_ascii=False))
        return
    from smoldpo.cli.output import print_imported

    print_imported(imported, out)


@app.command()
@verb
@takes_template_options("tools", "documents", "truncation", "score")
def chat(
    model: Annotated[
        str, typer.Argument(help="builtin, a folder, a run, a .gguf file, or a hub id.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest token each time; above: sampled.")
    ] = 0.0,
    *,
    template: dict[str, Any],
) -> None:
    """Talk to a model; with --prompt, get one answer."""
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty")
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.cli.chat import Chat

    talk = Chat(model, system, max_new_tokens, temperature, template)
    if prompt is not None:
        talk.answer(prompt)
    else:
        talk.converse()


def _prints_help(arguments: list[str], name: str, what: str) -> bool:
    """Print the help of a command that takes settings, if asked for; whether it was."""
    if not {"--help", "-h"} & set(arguments):
        return False
    from smoldpo.config.load import describe_options

    print(f"Usage: smoldpo {name} {SETTINGS_HELP}\n\n{what}\n")
    print("Hyphens and underscores are alike. Settings given here win over the file's.\n")
    describe_options(print)
    return True


def seconds_since_start() -> float:
    """How long this process has run."""
    import psutil

    return time.time() - psutil.Process().create_time()

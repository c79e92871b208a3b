"""`smoldpo iterate`: make pairs, train on them, and again from the tuned policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from smoldpo.cli.pairs import (
    PROMPTS_HELP,
    Check,
    Judge,
    MaxNewTokens,
    NumAnswers,
    Temperature,
    TopP,
    Weights,
    numbers,
)
from smoldpo.cli.support import one_of, verb
from smoldpo.utils.errors import ConfigError


@verb
def iterate(
    prompts: Annotated[str, typer.Argument(help=PROMPTS_HELP, show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [--key value ...]", help="Settings of train."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at the most.")] = 3,
    output_dir: Annotated[Path, typer.Option(help="The folder of all rounds.")] = Path(
        "runs/iterated"
    ),
    eval_prompts: Annotated[
        str | None, typer.Option(help="Prompts to measure with; by default a share of PROMPTS.")
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="That share, chosen by hash.")
    ] = 0.2,
    reference_of_round: Annotated[
        str,
        typer.Option(
            help="last: each round's reference is the policy that it begins with; "
            "start: the model of the first round."
        ),
    ] = "last",
    model: Annotated[str, typer.Option(help="Policy of the start.")] = "builtin",
    num_answers: NumAnswers = 4,
    judge: Judge = None,
    check: Check = None,
    weights: Weights = None,
    pairs: Annotated[
        str, typer.Option(help="best-worst: one pair a prompt; all: every two above the margin.")
    ] = "best-worst",
    margin: Annotated[float, typer.Option(min=0, max=1, help="Between scores of 0 to 1.")] = 0.0,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 128,
    system: Annotated[
        str | None, typer.Option(help="System message of prompts that have none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of answers and training.")] = 42,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float64, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Batches computed at once.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make pairs, train, and make pairs anew of the tuned policy, as long as rounds gain something.

    Settings of train stand beside these options, or in a file. An interrupted iteration goes on
    with the same command.
    """
    one_of("reference-of-round", reference_of_round, ("last", "start"))
    one_of("pairs", pairs, ("best-worst", "all"))
    one_of("dtype", dtype, ("auto", "float32", "bfloat16", "float64"))
    one_of("device", device, ("auto", "cpu", "cuda", "mps"))
    from smoldpo.config.load import load_yaml, parse_arguments

    path, given, problems = parse_arguments(settings or [])
    if problems:
        raise ConfigError(problems)
    of_file = load_yaml(path) if path is not None else {}
    merged = {str(key).replace("-", "_"): value for key, value in of_file.items()} | given
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.pairs.iterate import Iteration, split_prompts
        from smoldpo.pairs.iterate import iterate as run
        from smoldpo.pairs.make import PairChoice
        from smoldpo.pairs.prompts import read_prompts
        from smoldpo.pairs.rank import Ranking
        from smoldpo.pairs.sample import SamplingSettings

    ranking = Ranking.of(judge or [], check or [], numbers(weights))
    train, held_out = split_prompts(
        read_prompts(prompts, system=system),
        None if eval_prompts is None else read_prompts(eval_prompts, system=system),
        eval_fraction,
    )
    template = {
        name: merged[name]
        for name in ("chat_template", "chat_template_kwargs", "tools", "documents", "template_date")
        if merged.get(name) is not None
    }
    sampling = SamplingSettings(
        [model], num_answers, max_new_tokens, temperature, top_p, seed,
        dtype=dtype, device=device, template=template,
    )  # fmt: skip
    shared = {"seed": seed, "dtype": dtype, "device": device, "threads": threads}
    asked = Iteration(
        rounds, reference_of_round, sampling, PairChoice(pairs, margin), merged | shared, threads
    )
    result = run(asked, train, held_out, ranking, output_dir)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
    else:
        print((result.folder / "report.md").read_text(encoding="utf-8"), end="")

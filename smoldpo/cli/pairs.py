"""`smoldpo pairs`: preference pairs made from prompts, and pairs of several origins merged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoldpo.cli.data import Columns, Format, Subset, parse_columns
from smoldpo.cli.support import names, one_of, verb, writable
from smoldpo.cli.template_options import takes_template_options

if TYPE_CHECKING:
    from smoldpo.pairs.make import MadePairs

app = typer.Typer(
    help="Make preference pairs from prompts, and merge pairs of several origins.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PROMPTS_HELP = (
    "A text file with a prompt a line, rows with a prompt (text or messages, system, tools), or "
    "pairs, whose prompts are taken."
)
JUDGE_HELP = (
    "Who says which answer is better: length, reward:MODEL, implicit:MODEL[,REFERENCE], or an "
    "endpoint's URL."
)
CHECK_HELP = (
    "What an answer must be: json, max_words=50, min_words=5, contains=TEXT, regex=PATTERN, ends, "
    "no_repetition, or module:function."
)
WEIGHTS_HELP = "Weights of judges and then checks, in the order given: 1,1,2. By default 1 each."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Judge = Annotated[list[str] | None, typer.Option(help=JUDGE_HELP)]
Check = Annotated[list[str] | None, typer.Option(help=CHECK_HELP)]
Weights = Annotated[str | None, typer.Option(help=WEIGHTS_HELP)]
NumAnswers = Annotated[int, typer.Option(min=1, help="Answers of each model to each prompt.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="1: the model's own distribution.")]
TopP = Annotated[
    float, typer.Option(min=1e-6, max=1, help="Sample from the likeliest tokens of this share.")
]


@app.command()
@verb
@takes_template_options("truncation", "score")
def make(
    prompts: Annotated[str, typer.Argument(help=PROMPTS_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="The .jsonl file of the pairs.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Who answers; several are ranked together. By default builtin."),
    ] = None,
    num_answers: NumAnswers = 4,
    judge: Judge = None,
    check: Check = None,
    weights: Weights = None,
    pairs: Annotated[
        str, typer.Option(help="best-worst: one pair a prompt; all: every two above the margin.")
    ] = "best-worst",
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="By how much scores (0 to 1) must differ.")
    ] = 0.0,
    near_identical: Annotated[
        float, typer.Option(min=0, max=1, help="Likeness from which two answers make no pair.")
    ] = 0.95,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the answers.")] = 42,
    system: Annotated[
        str | None, typer.Option(help="System message of prompts that have none.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="The first N prompts.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The pairs' source; by default made:MODELS.")
    ] = None,
    subset: Subset = None,
    split: Annotated[str | None, typer.Option(help="By default train, or the only one.")] = None,
    format: Format = None,
    columns: Columns = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers side by side in a thread.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float64, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Batches answered at once.")] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the output, and answers that were drawn otherwise.")
    ] = False,
    as_json: Json = False,
    *,
    template: dict[str, Any],
) -> None:
    """Answer prompts several times, rank the answers, and write the pairs.

    Interrupted, it goes on with the same command. Answers stay beside the output: another judge or
    check needs no new ones (--overwrite replaces the pairs alone, where the rest is as before).
    """
    writable("--output", output, ".jsonl")
    one_of("pairs", pairs, ("best-worst", "all"))
    one_of("dtype", dtype, ("auto", "float32", "bfloat16", "float64"))
    one_of("device", device, ("auto", "cpu", "cuda", "mps"))
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.config.evaluate_options import evaluate_options
        from smoldpo.pairs.make import PairChoice, make_pairs
        from smoldpo.pairs.prompts import read_prompts
        from smoldpo.pairs.rank import Ranking
        from smoldpo.pairs.sample import SamplingSettings

    evaluate_options(template)  # checks them
    ranking = Ranking.of(judge or [], check or [], numbers(weights))
    read = read_prompts(
        prompts,
        system=system,
        subset=subset,
        split=split,
        format=format,
        columns=parse_columns(columns),
        limit=max_prompts,
    )
    sampling = SamplingSettings(
        model or ["builtin"],
        num_answers,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        batch_size,
        dtype,
        device,
        template,
    )
    made = make_pairs(
        read,
        output,
        sampling,
        ranking,
        PairChoice(pairs, margin, near_identical),
        source=source,
        overwrite=overwrite,
        threads=threads,
    )
    if as_json:
        print(json.dumps(made.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(as_text(made))


@app.command()
@verb
@takes_template_options("truncation", "score")
def compare(
    before: Annotated[str, typer.Argument(help="A model; builtin, say.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Another; a run, say.", show_default=False)],
    prompts: Annotated[str, typer.Argument(help=PROMPTS_HELP, show_default=False)],
    judge: Judge = None,
    check: Check = None,
    weights: Weights = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the answers.")] = 42,
    system: Annotated[
        str | None, typer.Option(help="System message of prompts that have none.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="The first N prompts.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float64, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Batches answered at once.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the figures to this .json file; answers beside it.")
    ] = None,
    as_json: Json = False,
    *,
    template: dict[str, Any],
) -> None:
    """Let two models answer the same prompts, and say which does better, and how sure that is.

    With --output the answers stay, and an interrupted comparison goes on with the same command.
    """
    writable("--output", output, ".json")
    one_of("dtype", dtype, ("auto", "float32", "bfloat16", "float64"))
    one_of("device", device, ("auto", "cpu", "cuda", "mps"))
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.config.evaluate_options import evaluate_options
        from smoldpo.pairs.compare import compare_models
        from smoldpo.pairs.prompts import read_prompts
        from smoldpo.pairs.rank import Ranking
        from smoldpo.pairs.rounds import comparison_text
        from smoldpo.pairs.sample import SamplingSettings

    evaluate_options(template)
    ranking = Ranking.of(judge or [], check or [], numbers(weights))
    read = read_prompts(prompts, system=system, limit=max_prompts)
    sampling = SamplingSettings(
        [before, after], 1, max_new_tokens, temperature, top_p, seed,
        dtype=dtype, device=device, template=template,
    )  # fmt: skip
    found, answered = compare_models(read, sampling, ranking, output, threads)
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        print(comparison_text(found, before, after, answered))


@app.command()
@verb
def merge(
    data: Annotated[
        list[str], typer.Argument(help="Pairs or votes: files, folders, builtin, or hub ids.")
    ],
    output: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    source: Annotated[
        list[str] | None,
        typer.Option(help="A source for each of DATA, a,b; by default their names."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output.")] = False,
    as_json: Json = False,
) -> None:
    """Write the pairs of several origins to one file, once each, each with its source."""
    writable("--output", output, ".jsonl")
    from smoldpo.pairs.merge import merge_pairs

    merged = merge_pairs(data, output, names(source), overwrite)
    if as_json:
        print(json.dumps(merged.as_dict(), indent=2, ensure_ascii=False))
        return
    print(f"{merged.output}: {merged.pairs:,} pairs")
    for part in merged.parts:
        counts = {"repeated": part.repeated, "say the opposite of an earlier pair": part.opposite}
        counted = _counted(counts | part.left_out)
        print(
            f"  {part.source}: {part.pairs:,} pairs of {part.rows:,} rows of {part.name}"
            + (f" ({counted})" if counted else "")
        )


def as_text(made: MadePairs) -> str:
    """What was made, in a few lines."""
    lines = [f"{made.output}: {made.pairs:,} pairs of {made.prompts:,} prompts"]
    counts = {"repeated": made.repeated_prompts} | made.prompts_left_out
    if any(counts.values()):
        lines.append("prompts left out: " + _counted(counts))
    if made.dropped:
        lines.append("without a pair: " + _counted(made.dropped))
    lines.append(f"answers: {made.answers:,}, of which {made.passing:.0%} pass all checks")
    lines += [f"  {name}: {value:.0%}" for name, value in made.means.items()]
    lines += [
        f"judge {name} disagreed with itself in swapped order: {share:.0%}"
        for name, share in made.disagreement.items()
    ]
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in counts.items() if n)


def numbers(given: str | None) -> list[float]:
    """1,0.5 as numbers.

    Raises:
        UsageError: they are none.
    """
    from smoldpo.utils.errors import UsageError

    try:
        return [float(part) for part in (given or "").split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--weights {given}: must be numbers, such as 1,0.5") from None

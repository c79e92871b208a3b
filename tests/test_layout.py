"""Imports point inward: types and losses know nobody, statistics know no torch, one door to transformers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "smoldpo"
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = [
    {"types", "losses", "loss_facts", "loss_settings", "errors", "files", "progress", "reach"}
    | {
        "redact",
        "cache",
        "pages",
        "plots",
        "loggers",
        "optim_settings",
        "durations",
        "unread_settings",
    },
    {"interrupts", "checkpoint", "rng", "early_stopping"},
    {
        "config",
        "config_values",
        "evaluate_options",
        "config_checks",
        "training_checks",
        "layer_choice",
        "arguments",
    },
    {"data", "models", "recipes"},
    {"engine"},
    {"optim", "schedules", "learning_rates", "averaging"}
    | {"tracking", "state", "trainer", "evaluation", "export", "saving", "runfolder"},
    {
        "materials",
        "fingerprint",
        "keeper",
        "not_finite",
        "phases",
        "live_view",
        "answering",
        "proof",
        "evaluating",
        "preflight",
    }
    | {
        "run",
        "plan",
        "resume",
        "chat",
        "summary",
        "runfiles",
        "report",
        "report_plots",
        "report_texts",
    },
    {"compare_runs", "prove_resume", "doctor", "library", "sweep", "__init__"},
    {
        "cli",
        "cli_cache",
        "cli_data",
        "cli_evaluate",
        "cli_plan",
        "cli_support",
        "cli_sweep",
        "__main__",
    },
]
"""Each part may import from its own level and those above it in this list."""


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(part: str) -> int:
    return next(index for index, parts in enumerate(LEVELS) if part in parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_inward(path):
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("smoldpo.")}
    known = {part for parts in LEVELS for part in parts}
    for part in ours & known:
        assert level(part) <= level(part_of(path)), f"{path.name} imports {part}"
    assert part_of(path) in known, "say in LEVELS where this part stands"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_transformers_has_few_doors(path):
    inside = path.relative_to(PACKAGE).as_posix()
    uses = any(name.split(".")[0] == "transformers" for name in imports(path))
    allowed = inside.startswith("models/") or inside in {
        "data/tokenize.py",
        # Type annotations of models that are passed through:
        "engine/plain.py",
        "engine/fast.py",
        "engine/frozen.py",
        "engine/moving.py",
        "engine/scorer.py",
        "engine/tokens.py",
        "engine/work.py",
        "engine/trunk.py",
        "engine/build.py",
        "answering.py",
        "evaluating.py",
        "export.py",
        "learning_rates.py",
        # transformers' own Adafactor:
        "optim.py",
        "library/logps.py",
        "materials.py",
        "plan/ends.py",
        "saving.py",
    }
    assert allowed or not uses


@pytest.mark.parametrize(
    "name",
    [
        "evaluation/metrics.py",
        "evaluation/statistics.py",
        "evaluation/analysis.py",
        "evaluation/answers.py",
        "evaluation/drift.py",
        "evaluation/gate.py",
        "evaluation/headline.py",
        "evaluation/judges.py",
        "evaluation/slices.py",
        "data/sources.py",
        "config.py",
        "config_values.py",
        "loss_facts.py",
        "tracking.py",
        "loss_settings.py",
        "optim_settings.py",
        "unread_settings.py",
        "schedules.py",
        "layer_choice.py",
        "training_checks.py",
        "cli.py",
        "recipes/importing.py",
        "report.py",
        "runfiles.py",
        "summary.py",
        "plan/forecast.py",
        "plan/memory.py",
        "plan/rates.py",
        "plan/table.py",
        "plan/work.py",
        *(
            f"sweep/{name}.py"
            for name in ("space", "methods", "winner", "results", "words", "page", "figures")
        ),
    ],
)
def test_free_of_torch(name):
    assert not {n for n in imports(PACKAGE / name) if n.split(".")[0] in ("torch", "transformers")}


def test_no_pickle_is_ever_loaded():
    for path in FILES:
        text = path.read_text()
        assert "torch.load" not in text and "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['smoldpo', '--help']\n"
        "import smoldpo.cli\n"
        "try: smoldpo.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_training_loop_loads_no_peft():
    """Nor what else transformers' optimizers bring along; who uses these loads them."""
    said = (
        "import sys, smoldpo.trainer; print(*sorted({'peft', 'accelerate'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []

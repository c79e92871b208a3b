"""What the import contracts in pyproject.toml cannot say: doors to transformers, light starts, no
pickle.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "smoldpo"
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = ("models/", "engine/kernels/", "evaluation/judges/", "export/")


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_transformers_has_few_doors(path):
    inside = path.relative_to(PACKAGE).as_posix()
    uses = any(name.split(".")[0] == "transformers" for name in imports(path))
    allowed = inside.startswith(DOORS) or inside in {
        "data/template_sandbox.py",
        "data/tokenize.py",
        # transformers' own Adafactor:
        "training/optim.py",
        # Type annotations of models that are passed through:
        "api/logps.py",
        "engine/base.py",
        "engine/build.py",
        "engine/compile.py",
        "engine/fast.py",
        "engine/logprobs.py",
        "engine/plain.py",
        "engine/precision.py",
        "engine/ref_sync.py",
        "engine/trunk.py",
        "data/chat_template.py",
        "data/template_settings.py",
        "data/text_encoder.py",
        "evaluation/evaluate.py",
        "evaluation/side_by_side.py",
        "plan/measure.py",
        "training/policy_and_reference.py",
        "training/prove_resume.py",
        "training/setup.py",
    }
    assert allowed or not uses


@pytest.mark.parametrize(
    "name",
    [
        "cli/main.py",
        "cli/output.py",
        "evaluation/judges/base.py",
        "plan/table.py",
        "sweep/report.py",
        "sweep/results.py",
        "sweep/space.py",
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
        "import smoldpo.cli.main\n"
        "try: smoldpo.cli.main.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'pyarrow'} & "
        "set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_training_loop_loads_no_peft():
    """Nor what else transformers' optimizers bring along; who uses these loads them."""
    said = (
        "import sys, smoldpo.training.loop; "
        "print(*sorted({'peft', 'accelerate'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "AGENTS.md"])
def test_what_contributors_are_pointed_to_is_there(page):
    """Every path; and every name in capitals that is said to be in a file, in that file."""
    text = (ROOT / page).read_text()
    paths = set(re.findall(r"\b(?:smoldpo|tests|docs|examples)/[\w./-]*\w/?", text)) - {
        "tests/WING"
    }
    assert len(paths) >= 3
    assert not [path for path in paths if not (ROOT / path).exists()]
    for name, path in re.findall(r"`([A-Z_]+)` \(`([\w./]+\.py)`", text):
        assert re.search(rf"^{name}\b", (ROOT / path).read_text(), re.M), (name, path)


def test_no_two_test_files_have_one_name():
    """Their folders are no packages (but for faults), so the second one would not be imported."""
    names = [
        path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "faults"
    ]
    assert sorted(names) == sorted(set(names))

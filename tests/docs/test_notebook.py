"""The notebook that does DPO by hand: it runs, its numbers agree, and what is stored is what it
said.
"""

import itertools
import json
import os
import re

import pytest

from conftest import ROOT

PATH = ROOT / "examples" / "dpo_by_hand.ipynb"


def outputs(cell):
    """What a code cell printed."""
    return "".join(text for out in cell["outputs"] for text in out.get("text", ""))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_what_is_stored_is_a_whole_run_and_names_no_machine():
    text = PATH.read_text()
    notebook = json.loads(text)
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(out["output_type"] == "stream" for cell in cells for out in cell["outputs"])
    assert all(out["name"] == "stdout" for cell in cells for out in cell["outputs"]), "no warnings"
    said = "".join(map(outputs, cells))
    assert "8 pairs to train on, 4 held out" in said and "They agree" in said
    losses = re.findall(r"^ +\d+  (\d\.\d{6})  (\d\.\d{6}) ", said, re.MULTILINE)
    assert len(losses) == 4 and losses[0] == ("0.693147", "0.693147")
    assert not re.search(r"/(tmp|home|root|work|Users|var|opt)\b|[A-Z]:\\\\", text)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_every_step_is_explained():
    kinds = [cell["cell_type"] for cell in json.loads(PATH.read_text())["cells"]]
    assert kinds[0] == "markdown" and kinds[-1] == "markdown"
    assert all("code" not in pair or "markdown" in pair for pair in itertools.pairwise(kinds))


@pytest.mark.real
def test_it_runs_with_a_few_pairs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SMOLDPO_NOTEBOOK_PAIRS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    notebook = nbformat.read(PATH, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    said = "".join(map(outputs, code(notebook)))
    assert "2 pairs to train on, 2 held out" in said and "They agree" in said
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"

"""The notebook that does DPO by hand: it runs, its numbers agree, and what is stored is what it
said.
"""

import itertools
import json
import re
import shutil
from pathlib import Path

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


def test_it_runs_on_a_small_model(tmp_path, monkeypatch, capsys, tiny_folder):
    """Cell by cell; a tiny random model stands for the built-in one, which the demo's test runs."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2048  # its tokens are short: the pairs have many
    (folder / "config.json").write_text(json.dumps(config))
    source = "\n".join("".join(cell["source"]) for cell in code(json.loads(PATH.read_text())))
    for real, small in (
        ('find_model("builtin").location', f"{str(folder)!r}"),
        ('model="builtin"', f"model={str(folder)!r}"),
        ("FROZEN_LAYERS = 25", "FROZEN_LAYERS = 2"),
        ("RATE, BATCH, EPOCHS, SEED = 0.1, 2e-5,", "RATE, BATCH, EPOCHS, SEED = 0.1, 3e-4,"),
    ):
        assert source.count(real) == 1, real
        source = source.replace(real, small)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    exec(source, {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert "8 pairs to train on, 4 held out" in said and "They agree" in said
    losses = re.findall(r"^ +\d+  (\d\.\d{6})  (\d\.\d{6}) ", said, re.MULTILINE)
    assert len({ours for ours, _ in losses}) == 4, "the steps differ"
    assert list(work.iterdir()) == [], "nothing is left behind"

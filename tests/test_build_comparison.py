"""benchmarks/build_comparison/differences.py: what counts as a difference between two builds'
outputs.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from build_comparison.differences import (
    file_difference,
    first_difference,
    folder_differences,
    text_difference,
)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({"loss": 0.5, "seconds": 1.0}, {"loss": 0.5, "seconds": 2.0}, None),
        ({"loss": 0.5}, {"loss": 0.5000000000000001}, "loss: 0.5 and 0.5000000000000001"),
        ({"n": 1}, {"n": 1.0}, "n: 1 and 1.0"),
        ({"n": 1}, {"n": True}, "n: 1 and True"),
        ({"n": None}, {}, "n: only before"),
        ({}, {"seconds": 1.0}, "seconds: only after"),
        ({"bins": [{"n": 1}, {"n": 2}]}, {"bins": [{"n": 1}, {"n": 3}]}, "bins[1].n: 2 and 3"),
        ([1, 2], [1], ": 2 and 1 items"),
    ],
)
def test_first_difference(before, after, found):
    assert first_difference(before, after) == found


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ('{"p": NaN}', '{"p": NaN}', None),
        ('{"p": NaN}', '{"p": 1}', "p: 'NaN' and 1"),
        ("smoldpo 0.1.0\nβ 0.1", "smoldpo 0.2.0\nβ 0.1", None),
        ("smoldpo 0.1.0\nβ 0.1", "smoldpo 0.2.0\nβ 0.2", "line 2: 'β 0.1' and 'β 0.2'"),
        ("one", "one\ntwo", "line 2: None and 'two'"),
    ],
)
def test_text_difference(before, after, found):
    assert text_difference(before, after) == found


def test_one_bit_of_one_tensor(tmp_path):
    weights = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    save_file(weights, tmp_path / "before.safetensors")
    weights["b"][1] = np.nextafter(np.float32(0), np.float32(1))
    save_file(weights, tmp_path / "after.safetensors")
    found = file_difference(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    assert found == "1 of 2 tensors, the first b"


def test_folders(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, loss, beta in ((before, 0.5, 0.1), (after, 0.25, 0.2)):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / f"{loss}.json").write_text("{}")
        (folder / "metrics.jsonl").write_text(json.dumps({"loss": loss, "seconds": loss}) + "\n")
        (folder / "config.yaml").write_text(f"beta: {beta}\n")
        (folder / "results.csv").write_text("trial,seconds\n1,2.0\n")
        (folder / "report.html").write_text(str(loss))
        (folder / "timings.json").write_text(str(loss))
    assert dict(folder_differences(before, after)) == {
        "names of files": None,
        "config.yaml": "beta: 0.1 and 0.2",
        "metrics.jsonl": "[0].loss: 0.5 and 0.25",
        "results.csv": None,
    }
    (after / "report.html").unlink()
    (after / "results.csv").write_text("trial,seconds\n2,2.0\n")
    found = dict(folder_differences(before, after))
    assert found["names of files"] == "['report.html']: on one side only"
    assert found["results.csv"] == "[0].trial: '1' and '2'"


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found = dict(folder_differences(tmp_path / "rows.jsonl", tmp_path / "other.jsonl"))
    assert found == {"rows.jsonl": "not there after"}

"""A pair's own weight, margin and β: from the row's columns to the loss, and only where asked
for.
"""

import json

import pytest
from pydantic import ValidationError

from conftest import rows
from smoldpo.config.schema import TrainConfig
from smoldpo.data.schemas import SCHEMAS, PairReader
from smoldpo.data.sources import Row
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.types import NO_NUMBERS, PairNumbers
from smoldpo.utils.errors import DataError, UsageError

VALUES = {"prompt": "How are you?", "chosen": "Well.", "rejected": "No."}
OWN = {"weight": 2, "margin": "0.5", "b": 0.3}


def read(columns, values=VALUES | OWN):
    reader = PairReader(None, columns)
    (pair,) = reader.read(Row("pairs.jsonl", 3, values))
    return pair, reader


def test_columns_of_these_names_mean_nothing_unless_asked_for():
    pair, reader = read({})
    assert pair.numbers == NO_NUMBERS and reader.unused == ("weight", "margin", "b")


def test_columns_that_are_asked_for(tiny_tokenizer):
    pair, reader = read({"weight": "weight", "margin": "margin", "beta": "b"})
    assert pair.numbers == PairNumbers(2.0, 0.5, 0.3) and reader.unused == ()
    assert PairTokenizer(tiny_tokenizer, 64).tokenize(pair).numbers == pair.numbers
    assert read({"beta": "b"})[0].numbers == PairNumbers(beta=0.3)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("weight", None, "weight must be a number"),
        ("weight", "much", "weight must be a number"),
        ("weight", -1, "weight must be 0 or more, and is -1"),
        ("margin", float("nan"), "margin must be a number"),
        ("beta", 0, "beta must be from 0.000001 to 1000, and is 0"),
        ("beta", 1e-7, "beta must be from 0.000001 to 1000, and is 1e-07"),
        ("beta", "5000", "beta must be from 0.000001 to 1000, and is 5000"),
    ],
)
def test_what_is_no_such_number_names_its_row(name, value, says):
    with pytest.raises(DataError, match=says) as error:
        read({name: "own"}, VALUES | {"own": value})
    assert "pairs.jsonl" in str(error.value) and "3" in str(error.value)


def test_the_bounds_of_a_row_are_those_of_the_setting():
    for value in (1e-6, 1000):
        pair, _ = read({"beta": "own"}, VALUES | {"own": value})
        assert TrainConfig(beta=value).beta == pair.numbers.beta == value
    for value in (0.99e-6, 1001):
        with pytest.raises(ValidationError, match=r"from 0\.000001 to 1000"):
            TrainConfig(beta=value)
        with pytest.raises(DataError, match=r"from 0\.000001 to 1000"):
            read({"beta": "own"}, VALUES | {"own": value})


def test_where_a_pair_is_made_of_several_rows_there_is_no_such_column():
    several = next(name for name, schema in SCHEMAS.items() if schema.read is None)
    with pytest.raises(UsageError, match="'weight' is no column of the schema"):
        PairReader(several, {"weight": "w"})


def test_a_run_with_weights(cli, tiny_folder, write_rows, tmp_path):
    """A pair of weight 0 takes no part: the losses are those of a step that counts it as
    nothing.
    """
    own = [row | {"w": index % 2, "b": 0.1 + index % 3} for index, row in enumerate(rows(40))]
    file = write_rows(own)
    found = []
    for columns in ([], ["--columns", "weight=w,beta=b"]):
        run = tmp_path / f"run{len(found)}"
        result = cli(
            "train", "--model", tiny_folder, "--data", file, "--output-dir", run, "--dtype",
            "float32", "--max-steps", 1, "--generate-prompts", 0, "--warmup-ratio", 0,
            "--sample-prompt", "none", *columns,
        )  # fmt: skip
        assert result.code == 0, result.err
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found.append(next(row for row in map(json.loads, lines) if "loss" in row))
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    # ln 2 for each pair of weight 1, nothing for the others: a multiple of ln 2 / 8
    eighths = found[1]["loss"] / 0.693147 * 8
    assert eighths == pytest.approx(round(eighths), abs=1e-3) and 0 < eighths < 8
    assert found[1]["grad_norm"] != pytest.approx(found[0]["grad_norm"], rel=0.01)
    began = [
        json.loads((tmp_path / f"run{n}" / "resume.json").read_text())["began"] for n in (0, 1)
    ]
    assert began[0]["contents"]["data"] != began[1]["contents"]["data"], "no resume with others"
    assert began[0]["contents"]["tokens"] == began[1]["contents"]["tokens"]

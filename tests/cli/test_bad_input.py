"""Bad input: a message that says what, where and what to do; exit 1 or 2; never a traceback."""

import json
import os

import pytest

from conftest import rows
from smoldpo.training.claim import claimed


@pytest.fixture
def train(cli, tiny_folder, tmp_path):
    def run(*arguments, model=tiny_folder):
        result = cli("train", "--model", model, "--output-dir", tmp_path / "run", *arguments)
        assert not (tmp_path / "run").exists(), "bad input must leave no run folder"
        return result

    return run


def check(result, code, *words):
    assert result.code == code, result.err
    for word in words:
        assert word in result.err


def test_missing_file(train):
    check(train("--data", "nowhere.jsonl"), 2, "nowhere.jsonl", "no such file", "builtin")


def test_empty_file(train, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    check(train("--data", "empty.jsonl"), 1, "empty.jsonl", "holds no rows")


def test_broken_json_on_row_17(train, tmp_path):
    lines = [json.dumps(row) for row in rows(30)]
    lines[16] = lines[16][:-9]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    check(train("--data", "d.jsonl"), 1, "d.jsonl", "row 17", "broken JSON", "mend or remove")


def test_csv_without_the_columns(train, tmp_path):
    (tmp_path / "d.csv").write_text("question,good,bad\na,b,c\n")
    check(train("--data", "d.csv"), 1, "d.csv", "'question'", "'good'", "--columns")


def test_a_number_for_an_answer(train, write_rows):
    items = rows(10)
    items[6]["chosen"] = 42
    check(train("--data", write_rows(items)), 1, "row 7", "'chosen'", "42")


def test_a_model_folder_without_config(train, tmp_path, pairs_file):
    (tmp_path / "m").mkdir()
    result = train("--data", pairs_file, model=tmp_path / "m")
    check(result, 1, "config.json", str(tmp_path / "m"))


def test_a_model_that_is_not_there(train, pairs_file):
    result = train("--data", pairs_file, model="no/such/model/folder")
    check(result, 2, "no such folder", "builtin")


def test_a_hub_model_without_network(train, pairs_file):
    result = train("--data", pairs_file, model="someone/some-model")
    check(result, 1, "someone/some-model", "hub", "network")


def test_a_hub_dataset_without_network(train):
    check(train("--data", "someone/some-pairs"), 1, "someone/some-pairs", "hub", "network")


def test_pickled_weights_are_never_read(train, tmp_path, pairs_file, tiny_folder):
    import shutil

    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    check(train("--data", pairs_file, model=folder), 1, str(folder), "safetensors")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--beta", "0"], ["beta is '0'", "greater than 0"]),
        (["--beta", "1e30"], ["beta is '1e30'", "from 0.000001 to 1000"]),
        (["--beta-end", "1e-9"], ["beta_end", "from 0.000001 to 1000"]),
        (["--columns", "prompt"], ["'prompt' is not name=column"]),
        (["--columns", "prompt=a,b"], ["has no column 'a,b'", "it has: 'prompt'"]),
        (["--per-device-train-batch-size", "0"], ["per_device_train_batch_size is '0'"]),
        (["--learning-rte", "1"], ["'learning_rte'", "did you mean learning_rate?"]),
        (["--freeze-layers", "9"], ["freeze_layers is 9", "4 layers"]),
        (["--freeze-layers", "4", "--freeze", "norms"], ["everything is frozen"]),
        (["nothere.yaml"], ["nothere.yaml", "no such configuration file"]),
        (["--data-split", "nope"], ["no split 'nope'", "train"]),
    ],
)
def test_settings_that_cannot_be(train, pairs_file, arguments, words):
    check(train("--data", pairs_file, *arguments), 2, *words)


@pytest.mark.parametrize("folder", ["there.txt/run", "there.txt/deep/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_is_said_before_anything_is_read(cli, tmp_path, folder):
    (tmp_path / "there.txt").write_text("")
    result = cli("train", "--data", "nowhere.jsonl", "--output-dir", folder)
    check(result, 2, f"output_dir {folder}: cannot be written")


@pytest.mark.parametrize("setting", ["output-dir", "model", "eval-data"])
def test_names_that_no_file_of_a_run_could_hold(cli, pairs_file, setting):
    odd = os.fsdecode(b"sw\xe4lbe")
    result = cli("train", "--data", pairs_file, f"--{setting}", odd)
    check(result, 2, setting.replace("-", "_"), "not UTF-8")
    assert "Traceback" not in result.err


def test_two_runs_into_one_folder(train, pairs_file, tmp_path):
    with claimed(tmp_path / "run"):
        check(train("--data", pairs_file), 2, "another run is being written there")
    with claimed(tmp_path / "run"), claimed(tmp_path / "other"):
        pass


def test_nothing_left_after_cleaning(train, write_rows):
    items = [{"prompt": "a", "chosen": "same", "rejected": "same"}] * 5
    check(train("--data", write_rows(items)), 1, "no pair is left of 5 rows", "5 identical")


@pytest.mark.parametrize("verb", ["evaluate", "chat"])
def test_other_verbs_too(cli, verb, tmp_path):
    arguments = [tmp_path / "nothing", "builtin"] if verb == "evaluate" else [tmp_path / "nothing"]
    check(cli(verb, *arguments), 2, "nothing", "no such folder")


def test_evaluate_refuses_a_dtype_it_does_not_know(cli, tiny_folder, pairs_file):
    result = cli("evaluate", tiny_folder, pairs_file, "--dtype", "flaot32")
    check(result, 2, "did you mean float32?")


def test_unknown_verb(cli):
    assert cli("trian").code == 2


def test_a_device_that_is_not_there(train, pairs_file):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    check(train("--data", pairs_file, "--device", "cuda"), 2, "device cuda")


def test_pairs_longer_than_the_model(train, write_rows):
    items = rows(10)
    items[3]["prompt"] = "word " * 2000
    result = train("--data", write_rows(items), "--max-length", "2000")
    check(result, 2, "512 positions", "--max-length 512")


def test_a_reference_with_another_vocabulary(cli, tiny_folder, pairs_file, tmp_path):
    from conftest import make_tiny

    make_tiny(tmp_path / "other")
    for verb in (["evaluate", tiny_folder, pairs_file], ["train", "--data", pairs_file]):
        words = [*verb, "--reference", tmp_path / "other"]
        result = cli(*words, *(["--model", tiny_folder] if verb[0] == "train" else []))
        check(result, 2, "vocabulary", str(tmp_path / "other"))


def test_an_output_folder_that_is_somebody_elses(cli, tiny_folder, pairs_file, tmp_path):
    mine = tmp_path / "project"
    (mine / "model").mkdir(parents=True)
    (mine / "config.yaml").write_text("beta: 0.1\n")
    (mine / "model" / "precious").write_text("data")
    result = cli(
        "train", mine / "config.yaml", "--model", tiny_folder, "--data", pairs_file,
        "--output-dir", mine, "--overwrite",
    )  # fmt: skip
    check(result, 2, str(mine), "not a run's")
    assert (mine / "model" / "precious").read_text() == "data"


def test_a_run_is_not_replaced_by_one_that_starts_from_it(cli, tiny_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    quick = ["--max-steps", "1", "--max-new-tokens", "2", "--data", pairs_file]
    assert cli("train", "--model", tiny_folder, "--output-dir", run, *quick).code == 0
    result = cli("train", "--model", run, "--output-dir", run, "--overwrite", *quick)
    check(result, 2, "lies in output_dir")
    assert (run / "model" / "model.safetensors").exists()


def test_a_sample_prompt_that_is_empty_costs_no_training(train, pairs_file):
    check(train("--data", pairs_file, "--sample-prompt", ""), 2, "sample_prompt")


def test_a_prompt_that_is_not_text(cli, tiny_folder):
    result = cli("chat", tiny_folder, "--prompt", "\udcff", "--max-new-tokens", 2)
    assert result.code == 0, result.err


def test_a_prompt_too_long_for_the_model(cli, tiny_folder):
    result = cli("chat", tiny_folder, "--prompt", "word " * 2000, "--max-new-tokens", 2)
    check(result, 2, "the model room for")

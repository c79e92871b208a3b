"""Where a recipe's pairs come from: sources, splits, weights, columns."""

import json

from recipe_texts import FOLDER, FULL, TRL, fates, reasons
from smoldpo.config.importers import import_recipe


def test_a_test_split_that_the_recipe_joins_to_its_training_data_is_not_trained_on():
    imported = import_recipe(FOLDER / "handbook-mixture.yaml")
    assert imported.settings["data"] == ["someone/feedback_binarized"], "once, and not test_prefs"
    assert imported.settings["data_split"] == "train_prefs"
    assert "data_subset" not in imported.settings, "default is no subset's name to smoldpo"
    assert "eval_fraction" not in imported.settings, "the published test split judges"
    assert "test_prefs" in reasons(imported)["dataset_mixture.datasets"]
    assert sum(line.count("at random") for line in imported.differences) == 1
    assert imported.settings["save_steps"] == 20


def test_splits_of_their_own_go_through_files():
    imported = import_recipe(FOLDER / "handbook-apo.yaml")
    files = [
        "talk-Preference-mixture_no_think.jsonl",
        "talk-Preference-mixture_think.jsonl",
    ]
    assert imported.settings["data"] == files
    assert imported.settings["data_weights"] == [0.5, 0.25]
    assert imported.commands == tuple(
        f"smoldpo data convert someone/talk {file} --subset Preference --split {split}"
        for file, split in zip(files, ["mixture_no_think", "mixture_think"], strict=True)
    )
    assert "data_split" not in imported.settings
    assert imported.settings["max_grad_norm"] == 0.2
    seen = fates(imported)
    assert seen["save_steps"] == seen["model_revision"] == "unsupported"
    assert all(command in imported.as_yaml() for command in imported.commands), (
        "whole, to be copied"
    )
    assert any("evaluates on nothing" in note for note in imported.notes)


def test_data_convert_takes_what_the_commands_say(cli, write_rows):
    from conftest import rows

    write_rows(rows(8))
    result = cli("data", "convert", "pairs.jsonl", "out.jsonl", "--split", "train")
    assert result.code == 0, result.err


def test_a_test_split_beside_files_is_a_file_too(write):
    imported = write(
        "model_name_or_path: a/m\nbeta: 0.1\ndataset_mixture:\n  datasets:\n"
        "  - {id: a/one, split: train_prefs}\n  - {id: a/one, split: test_prefs}\n"
        "  - {id: a/two, config: big, split: train}\n"
    )
    assert imported.settings["data"] == ["one-train_prefs.jsonl", "two-big.jsonl"]
    assert imported.settings["eval_data"] == "one-test_prefs.jsonl"
    assert len(imported.commands) == 3


def test_a_recipe_without_data_does_not_silently_train_on_the_built_in_pairs(write):
    imported = write("beta: 0.1\nmax_prompt_length: 5\n", "trl")
    assert sum("give --model" in note or "give --data" in note for note in imported.notes) == 2
    assert not any("built-in" in note for note in write(TRL).notes)
    assert write(TRL, "alignment-handbook").settings["data"] == ["a/pairs"], (
        "it takes TRL's key too"
    )


def test_llama_factorys_dataset_info_is_read_where_it_lies(write, tmp_path):
    (tmp_path / "data").mkdir()
    info = {
        "mine": {"file_name": "mine.json", "ranking": True},
        "theirs": {"hf_hub_url": "a/pairs", "subset": "en"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    imported = write(FULL + "dataset: mine\neval_dataset: theirs\n")
    assert imported.settings["data"] == [str(tmp_path / "data" / "mine.json")]
    assert imported.settings["eval_data"] == "a/pairs"
    mixed = write(FULL + "dataset: mine,theirs\n")
    assert mixed.settings["data"][1] == "pairs-en.jsonl"
    assert mixed.commands == ("smoldpo data convert a/pairs pairs-en.jsonl --subset en",)


def test_columns_from_axolotl_are_read(cli, write_rows):
    columns = import_recipe(FOLDER / "axolotl.yaml").settings["columns"]
    turns = [{"role": "user", "content": "Is this read?"}]
    answer = {"role": "assistant", "content": "Yes, under its other name."}
    no = {"role": "assistant", "content": "No."}
    write_rows([{"conversation": turns, "chosen": answer, "rejected": no}], "talk.jsonl")
    result = cli("data", "convert", "talk.jsonl", "out.jsonl", "--columns", ",".join(columns))
    assert result.code == 0 and "1 pairs" in result.err, result.err


def test_weights_in_the_two_senses(write):
    shares = "model_name_or_path: a/m\nbeta: 0.1\ndataset_mixer:\n  a/one: {}\n  b/two: {}\n"
    whole = write(shares.format("1.0", "1.0"))
    assert "data_weights" not in whole.settings, "all of both is no mix by weight"
    assert not any("weight" in line for line in whole.differences)
    parts = write(shares.format("0.5", "0.25"))
    assert parts.settings["data_weights"] == [0.5, 0.25]
    assert any("shares of the mix" in line for line in parts.differences)
    left = write(shares.format("0", "0.25"))
    assert left.settings["data"] == ["b/two"]
    assert any("max_train_samples" in line for line in left.differences)
    mixture = "datasets:\n  - {path: a/one, fraction: 0.5}\n  - {path: b/two, fraction: 0.5}\n"
    exact = write("model_name_or_path: a/m\nbeta: 0.1\n" + mixture)
    assert exact.settings["data_weights"] == [0.5, 0.5]
    assert not any("shares of the mix" in line for line in exact.differences), "TRL's are ours"

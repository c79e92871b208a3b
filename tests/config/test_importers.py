"""Recipes of others: each key accounted for, what is none refused, and the command that imports
them.
"""

import json
import re

import pytest
import yaml

from conftest import ROOT
from recipe_texts import AXOLOTL, FOLDER, FULL, TRL, fates, reasons
from smoldpo.config.importers import import_recipe
from smoldpo.config.importers.mapping import STATUSES
from smoldpo.config.load import config_from_arguments
from smoldpo.config.schema import TrainConfig
from smoldpo.utils.errors import ConfigError, UsageError

RECIPES = sorted((ROOT / "tests" / "recipes").glob("*.yaml"))


OF = {
    "handbook-mixer": "alignment-handbook",
    "handbook-mixture": "alignment-handbook",
    "handbook-apo": "alignment-handbook",
    "handbook-orpo": "alignment-handbook",
    "handbook-simpo": "alignment-handbook",
    "trl-cpo": "trl",
    "axolotl-simpo": "axolotl",
    "llama-factory-orpo": "llama-factory",
    "trl": "trl",
    "axolotl": "axolotl",
    "llama-factory": "llama-factory",
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_accounted_for(path):
    imported = import_recipe(path)
    assert imported.dialect == OF[path.stem]
    seen = fates(imported)
    for key, value in yaml.safe_load(path.read_text()).items():
        inner = {name for name in seen if name.startswith(f"{key}.")}
        assert key in seen or inner, key
        if key not in seen and isinstance(value, dict):
            assert {name.removeprefix(f"{key}.").split(".")[0] for name in inner} == set(value)
    for entry in imported.entries:
        assert entry.status in STATUSES
        assert entry.becomes or entry.reason, f"{entry.key}: neither used nor explained"
    assert "no key that is known" not in str(reasons(imported)), "these recipes are common ones"


def test_what_a_step_takes_is_said_for_one_gpu(write):
    """A recipe names the batch of one device; what the run took in all it does not say."""
    imported = write(f"{TRL}per_device_train_batch_size: 3\ngradient_accumulation_steps: 4\n")
    assert any("3 x 4 = 12 pairs go to an optimizer step" in note for note in imported.notes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_written_config_is_read_back_to_the_same_values(path, cli, tmp_path):
    result = cli("config", "import", path, "--out", "mine.yaml")
    assert result.code == 0, result.err
    assert path.name in (tmp_path / "mine.yaml").read_text().splitlines()[0]
    shown = cli("config", "show", "mine.yaml")
    assert shown.code == 0, shown.err
    assert TrainConfig(**yaml.safe_load(shown.out)) == import_recipe(path).config


@pytest.mark.parametrize(
    "text, says",
    [
        ("stage: sft\nmodel_name_or_path: a/m\n", "supervised fine-tuning, not for DPO"),
        ("stage: kto\nmodel_name_or_path: a/m\n", "stage is kto: a recipe for KTO"),
        ("finetuning_type: lora\ncutoff_len: 5\n", "stage is not set: a recipe for supervised"),
        ("base_model: a/m\nmicro_batch_size: 1\n", "rl is not set"),
        ("base_model: a/m\nrl: grpo\n", "GRPO"),
        ("model_name_or_path: a/m\nbeta: 0.1\nnum_generations: 8\n", "GRPO.*num_generations"),
        ("model_name_or_path: a/m\ndataset_splits: [a]\npacking: true\n", "supervised"),
        ("model_name_or_path: a/m\nbeta: 0.1\noutput_dir: out/m-kto\n", "KTO"),
        ("model_name_or_path: a/m\ndataset_name: imdb\n", "--from trl"),
        ("lr: 3\n", "--from"),
        ("model: builtin\nbeta: 0.2\n", "a smoldpo configuration already"),
        ("", "is empty"),
        ("- 1\n", "holds list"),
        ("a: [1\nb: 2\n", "row 2: not valid YAML"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("a: " + "[" * 500 + "]" * 500 + "\n", "not valid YAML: maximum recursion depth"),
        ("--- 1\n--- 2\n", "not valid YAML"),
        ("a: &a [x]\nb: *a\n", "uses YAML aliases"),
        ("a: &a {x: 1}\nb: {<<: *a}\n", "uses YAML aliases"),
    ],
)  # fmt: skip
def test_what_is_something_else_is_refused(write, text, says, cli, tmp_path):
    with pytest.raises(UsageError, match=says):
        write(text)
    result = cli("config", "import", "recipe.yaml", "--out", "mine.yaml")
    assert result.code == 2 and "recipe.yaml" in result.err
    assert not (tmp_path / "mine.yaml").exists()


def test_from_settles_what_the_keys_leave_open(write):
    text = "model_name_or_path: a/m\ndataset_name: a/pairs\n"
    assert write(text, "trl").dialect == "trl"
    assert write(text, name="trl-dpo.yaml").dialect == "trl", "its own name says it"
    with pytest.raises(UsageError, match="GRPO"):
        write(text + "num_generations: 4\n", "trl")


@pytest.mark.parametrize(
    "text, says",
    [
        (FULL + "dataset: a/b\npref_beta: -1\n", r"pref_beta \(beta is -1: "),
        (AXOLOTL + "num_epochs: many\n", r"num_epochs \(num_train_epochs is 'many': "),
        (TRL + "seed: -3\n", "seed is -3"),
        (TRL + "max_length: 1\n", "max_length is 1"),
    ],
)
def test_impossible_values_are_named_by_the_recipes_key(write, text, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as caught:
        write(text)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


def test_values_cannot_leave_the_comment_or_the_line(write):
    imported = write(TRL + 'frobnicate: "a\\nbeta: 9"\nloss_type: "x\\nbeta: 8"\n')
    text = imported.as_yaml()
    assert yaml.safe_load(text)["beta"] == 0.1
    assert "x\\nbeta" in text
    odd = write(TRL, name="a\nbeta: 7 #.yaml")
    assert yaml.safe_load(odd.as_yaml())["beta"] == 0.1
    mixture = 'datasets: [{path: "a\\nbeta: 6 #", split: x}, {path: b/c, split: y}]\n'
    files = write(TRL + mixture)
    assert len(files.commands) == 2 and yaml.safe_load(files.as_yaml())["beta"] == 0.1


def test_values_cannot_move_the_cursor(cli, tmp_path):
    text = TRL + 'frob: "\\e[2J"\n"k\\e[2J": 1\noutput_dir: "\\e[2J"\n'
    (tmp_path / "recipe.yaml").write_text(text)
    result = cli("config", "import", "recipe.yaml", "--out", "mine.yaml")
    assert result.code == 0 and "frob" in result.out
    assert "\x1b" not in result.out + (tmp_path / "mine.yaml").read_text()


def test_the_command_prints_the_account(cli):
    result = cli("config", "import", FOLDER / "axolotl.yaml")
    assert result.code == 0
    assert yaml.safe_load(result.out)["beta"] == 0.25, "the configuration alone, for > mine.yaml"
    assert "What differs from the recipe's run:" in result.err
    assert re.search(r"micro_batch_size .* renamed .* per_device_train_batch_size: 2", result.err)
    result = cli("config", "import", FOLDER / "handbook-apo.yaml", "--out", "mine.yaml")
    assert "smoldpo train mine.yaml" in result.out and "Run first:" in result.out
    assert (
        "talk-Preference-mixture_think.jsonl --subset Preference --split mixture_think\n"
        in result.out
    )


def test_json(cli):
    result = cli("config", "import", FOLDER / "trl.yaml", "--json")
    said = json.loads(result.out)
    assert said["from"] == "trl" and said["config"]["beta"] == 0.2
    assert sum(said["counts"].values()) == len(said["keys"])
    assert {"key", "value", "status", "becomes", "reason", "matters"} == set(said["keys"][0])


def test_files_are_not_lost(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    result = cli("config", "import", FOLDER / "trl.yaml", "--out", "mine.yaml")
    assert result.code == 2 and "--overwrite" in result.err
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert (
        cli("config", "import", FOLDER / "trl.yaml", "--out", "mine.yaml", "--overwrite").code == 0
    )
    result = cli("config", "import", FOLDER / "trl.yaml", "--from", "axolotle")
    assert result.code == 2 and "did you mean axolotl" in result.err
    assert cli("config", "import", "none.yaml").code == 2


def test_an_imported_recipe_trains(cli, pairs_file, tiny_folder, tmp_path):
    """Its data and model replaced, as whoever has neither the hub nor a large GPU would do."""
    text = (FOLDER / "handbook-mixer.yaml").read_text()
    (tmp_path / "small.yaml").write_text(text)
    assert cli("config", "import", "small.yaml", "--out", "mine.yaml").code == 0
    result = cli(
        "train", "mine.yaml", "--model", tiny_folder, "--data", pairs_file, "--data-split", "none",
        "--max-steps", 2, "--max-new-tokens", 2, "--output-dir", "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert max(line.get("step", 0) for line in steps) == 2
    assert config_from_arguments(["run/config.yaml"]).beta == 0.3

"""Which method a recipe is for, and the losses of ORPO, CPO and SimPO."""

import dataclasses

import pytest

from recipe_texts import AXOLOTL, FOLDER, FULL, TRL, fates, reasons
from smoldpo.config.importers import import_recipe
from smoldpo.config.load import config_from_arguments
from smoldpo.config.schema import TrainConfig
from smoldpo.utils.errors import UsageError


def loss_of(imported) -> dict:
    names = ("loss_type", "loss_weights", "beta", "simpo_gamma", "cpo_alpha", "label_smoothing")
    return {name: imported.settings[name] for name in names if name in imported.settings}


@pytest.mark.parametrize(
    "name, expected, differs",
    [
        ("handbook-orpo", {"loss_type": ["orpo"], "beta": 0.05}, "prompt's tokens"),
        ("handbook-simpo", {"loss_type": ["simpo"], "beta": 2.5, "simpo_gamma": 1.0}, None),
        (
            "trl-cpo",
            {"loss_type": ["cpo"], "beta": 0.15, "cpo_alpha": 0.8, "label_smoothing": 0.1},
            None,
        ),
        (
            "axolotl-simpo",
            {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.05], "beta": 2.2}
            | {"simpo_gamma": 1.1},
            None,
        ),
        ("llama-factory-orpo", {"loss_type": ["orpo"], "beta": 0.2}, "LLaMA-Factory's ORPO weighs"),
    ],
)
def test_losses_without_a_reference(name, expected, differs):
    imported = import_recipe(FOLDER / f"{name}.yaml")
    assert loss_of(imported) == expected
    told = [line for line in imported.differences if "likelihood" in line or "ORPO" in line]
    assert [differs in line for line in told] == [True] if differs else told == []
    assert "reference" not in imported.settings


CPO = "model_name_or_path: a/m\ndataset_name: a/p\ncpo_alpha: {}\n"


@pytest.mark.parametrize(
    "text, dialect, expected",
    [
        (CPO.format("0.0") + "loss_type: simpo\nsimpo_gamma: 0.9\n", None,
         {"loss_type": ["simpo"], "simpo_gamma": 0.9}),
        (CPO.format("0.3") + "loss_type: [simpo]\n", None,
         {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.3]}),
        # TRL's own default adds the likelihood with weight 1.
        (TRL + "loss_type: simpo\n", None,
         {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 1.0], "beta": 0.1}),
        (CPO.format("0.3"), None, {"loss_type": ["cpo"], "cpo_alpha": 0.3}),
        (CPO.format("0.3") + "simpo_gamma: 2\n", None, {"loss_type": ["cpo"], "cpo_alpha": 0.3}),
        (TRL + "output_dir: out/tiny-orpo\n", "trl", {"loss_type": ["orpo"], "beta": 0.1}),
        (TRL + "output_dir: out/tiny-orpo-then-dpo\n", None, {"beta": 0.1}),
        (TRL + "gamma_beta_ratio:\nsft_weight: 0.2\n", None,
         {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.1}),
        ("model_name_or_path: a/m\ndataset_name: a/p\nsft_weight: 0\n", None,
         {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 0.5}),
        (AXOLOTL.replace("dpo", "orpo") + "orpo_alpha: 0.3\n", None,
         {"loss_type": ["orpo"], "beta": 0.3}),
        (AXOLOTL.replace("dpo", "orpo") + "orpo_alpha: 0.3\nrl_beta: 0.4\n", None,
         {"loss_type": ["orpo"], "beta": 0.4}),
        (AXOLOTL.replace("dpo", "cpo") + "cpo_alpha: 0.5\n", None,
         {"loss_type": ["cpo"], "cpo_alpha": 0.5}),
        (AXOLOTL.replace("dpo", "ipo") + "cpo_alpha:\n", None, {"loss_type": ["ipo"]}),
        (FULL + "dataset: a/b\npref_loss: simpo\nsimpo_gamma: 1.2\npref_beta: 2\n", None,
         {"loss_type": ["simpo"], "simpo_gamma": 1.2, "beta": 2.0}),
        (FULL + "dataset: a/b\npref_loss: simpo\npref_ftx: 0.1\n", None, {"loss_type": ["simpo"]}),
    ],
)  # fmt: skip
def test_how_they_are_said(write, text, dialect, expected):
    assert loss_of(write(text, dialect)) == expected


@pytest.mark.parametrize(
    "text, key, says",
    [
        (CPO.format("1.0") + "loss_type: hinge\n", "loss_type", "CPO with the loss hinge"),
        (CPO.format("1.0") + "alpha: 0.5\n", "alpha", "AlphaPO"),
        (TRL + "gamma_beta_ratio: 0.3\nloss_type: hinge\n", "loss_type",
         "SimPO with the loss hinge"),
        (FULL + "dataset: a/b\npref_loss: orpo\npref_ftx: 0.5\n", "pref_ftx", "already"),
        (AXOLOTL.replace("dpo", "orpo") + "rpo_alpha: 1.0\n", "rpo_alpha", "this trainer has not"),
        (FULL + "dataset: a/b\npref_loss: simpo\nld_alpha: 0.5\n", "ld_alpha", "longer answers"),
    ],
)  # fmt: skip
def test_what_they_ask_for_in_vain(write, text, key, says):
    imported = write(text)
    entry = next(entry for entry in imported.entries if entry.key == key)
    assert entry.status == "unsupported" and says in entry.reason
    assert set(imported.settings["loss_type"]) & {"cpo", "simpo", "orpo"}


@pytest.fixture
def place(tmp_path):
    """Import a recipe that lies in a folder of that name."""

    def run(folder: str, text: str, dialect: str | None = None):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "recipe.yaml").write_text(text)
        return import_recipe(tmp_path / folder / "recipe.yaml", dialect)

    return run


@pytest.mark.parametrize("dialect", [None, "trl", "alignment-handbook"])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("loss_type: ipo\nprecompute_ref_log_probs: true\n", {"loss_type": ["ipo"], "beta": 0.1}),
        ("loss_type: robust\nlabel_smoothing: 0.1\n",
         {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1}),
        ("loss_type: [sigmoid, hinge]\n", {"loss_type": ["sigmoid", "hinge"], "beta": 0.1}),
        ("rpo_alpha: 0.5\noutput_dir: out/orpo-data\n", {"beta": 0.1}),
        ("precompute_ref_log_probs: true\noutput_dir: out/m-orpo\n", {"beta": 0.1}),
        ("ld_alpha: 0.5\n", {"beta": 0.1}),
        ("f_divergence_type: forward_kl\n", {"beta": 0.1}),
        ("sync_ref_model: true\n", {"beta": 0.1}),
        ("use_weighting: true\n", {"beta": 0.1}),
        ("reference_free: true\n", {"beta": 0.1}),
        ("", {"loss_type": ["orpo"], "beta": 0.1}),
        ("precompute_ref_log_probs:\n", {"loss_type": ["orpo"], "beta": 0.1}),
        ("output_dir: out/dpo\n", {"beta": 0.1}),
        ("loss_type: []\n", {"loss_type": ["orpo"], "beta": 0.1}),
    ],
)  # fmt: skip
def test_keys_of_a_reference_win_over_a_folders_name(place, text, expected, dialect):
    assert loss_of(place("orpo", TRL + text, dialect)) == expected


@pytest.mark.parametrize("key", ["precompute_ref_log_probs: true", "sync_ref_model: true"])
def test_names_win_over_keys_that_ktos_trainer_has_too(place, key):
    with pytest.raises(UsageError, match="KTO"):
        place("plain", TRL + f"{key}\noutput_dir: out/m-kto\n")


def test_orpo_has_no_other_loss(place):
    imported = place("orpo", TRL + "loss_type: ipo\n")
    assert fates(imported)["loss_type"] == "unsupported"
    assert "ORPO with the loss ipo" in reasons(imported)["loss_type"]
    assert imported.settings["loss_type"] == ["orpo"]
    assert any("prompt's tokens" in line for line in imported.differences)
    assert fates(place("mine", TRL + "loss_type: orpo\n"))["loss_type"] == "kept"


def test_keys_of_a_reference_that_moves_do_not_fail_a_loss_without_one(write):
    orpo = AXOLOTL.replace("dpo", "orpo") + "sync_ref_model: true\nref_model_mixup_alpha: 0.9\n"
    seen = fates(write(orpo))
    assert seen["sync_ref_model"] == seen["ref_model_mixup_alpha"] == "dropped"


def test_lengths_do_not_fail_simpo_by_cpos_trainer(write):
    imported = write(CPO.format("0.0") + "loss_type: simpo\nld_alpha: 0.5\n")
    assert fates(imported)["ld_alpha"] == "unsupported"
    assert loss_of(imported) == {"loss_type": ["simpo"]}
    assert write(CPO.format("0.5") + "ld_alpha: 0.5\n").config.ld_alpha == 0.5


def test_lengths_and_weights_are_kept(write):
    imported = write(TRL + "ld_alpha: 0.4\nuse_weighting: true\n")
    assert imported.config.ld_alpha == 0.4 and imported.config.use_weighting
    assert {fates(imported)[key] for key in ("ld_alpha", "use_weighting")} == {"kept"}
    off = write(TRL + "ld_alpha: 1.0\nuse_weighting: false\n")
    assert not {"ld_alpha", "use_weighting"} & set(off.settings)
    assert write(AXOLOTL + "dpo_use_weighting: true\n").config.use_weighting
    factory = write(FULL + "dataset: a/b\nld_alpha: 0.4\n")
    assert factory.config.ld_alpha == 0.4
    assert any("policy alone" in line for line in factory.differences)
    assert not write(FULL + "dataset: a/b\nld_alpha: 1.0\n").settings.get("ld_alpha")


def test_every_option_of_orpos_and_cpos_configs_is_known(write):
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    for kind, word in ((CPOConfig, "cpo"), (ORPOConfig, "orpo")):
        names = sorted(field.name for field in dataclasses.fields(kind))
        text = TRL + "".join(f"{name}:\n" for name in names if f"{name}:" not in TRL)
        imported = write(text.replace("output_dir:\n", f"output_dir: a-{word}\n"), "trl")
        assert imported.settings["loss_type"] == [word]
        unknown = [key for key, why in reasons(imported).items() if "no key that is known" in why]
        assert not unknown, kind


def test_defaults_of_cpo_and_orpo_are_ours_or_written():
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    ours = {name: field.default for name, field in TrainConfig.model_fields.items()}
    real = CPOConfig(output_dir="none", bf16=False)
    for name in ("beta", "label_smoothing", "cpo_alpha", "simpo_gamma"):
        assert getattr(real, name) == ours[name], name
    assert ORPOConfig(output_dir="none", bf16=False).beta == ours["beta"]


def test_an_imported_recipe_without_a_reference_trains(cli, pairs_file, tiny_folder, tmp_path):
    (tmp_path / "r.yaml").write_text((FOLDER / "axolotl-simpo.yaml").read_text())
    assert cli("config", "import", "r.yaml", "--out", "mine.yaml").code == 0
    result = cli(
        "train", "mine.yaml", "--model", tiny_folder, "--data", pairs_file, "--max-steps", 1,
        "--max-new-tokens", 2, "--data-split", "none", "--output-dir", "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert config_from_arguments(["run/config.yaml"]).loss_weights == [1.0, 0.05]

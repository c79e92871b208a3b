"""What a recipe trains: adapters of each dialect, and some of the layers."""

import pytest

from recipe_texts import AXOLOTL, FULL, TRL, fates, reasons


def test_llama_factory_trains_adapters_without_being_told(write):
    for said in ("", "finetuning_type:\n"):
        imported = write(f"stage: dpo\nmodel_name_or_path: a/m\ndataset: a/b\nlora_rank: 4\n{said}")
        assert "freeze_layers" not in imported.settings
        assert imported.config.use_peft and imported.config.lora_r == 4
        assert imported.config.lora_alpha == 8, "twice the rank"
        assert fates(imported)["lora_rank"] == "renamed"


ADAPTERS = {
    "trl": TRL + "use_peft: true\n",
    "axolotl": AXOLOTL + "adapter: lora\n",
    "llama-factory": FULL.replace("full", "lora") + "dataset: a/b\n",
}


@pytest.mark.parametrize(
    "dialect, text, settings",
    [
        ("trl", "", {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 16, "lora_alpha": 32}),
        ("trl", "lora_target_modules: all-linear\n", {"lora_target_modules": []}),
        ("trl", "lora_target_modules: [q_proj, up_proj]\n",
         {"lora_target_modules": ["q_proj", "up_proj"]}),
        ("trl", "lora_r: 8\nlora_alpha: 64\nuse_rslora: true\n",
         {"lora_r": 8, "lora_alpha": 64, "use_rslora": True}),
        ("trl", "use_dora: true\nlora_dropout: 0.05\n", {"use_dora": True, "lora_dropout": 0}),
        ("axolotl", "lora_r: 8\npeft_use_dora: true\nlora_layers_to_transform: [1, 3]\n",
         {"lora_r": 8, "use_dora": True, "train_layers": ["1", "3"]}),
        ("axolotl", "peft_use_rslora: true\nlora_target_modules:\n- q_proj\n",
         {"use_rslora": True, "lora_target_modules": ["q_proj"]}),
        ("llama-factory", "", {"lora_r": 8, "lora_alpha": 16, "lora_target_modules": []}),
        ("llama-factory", "lora_rank: 32\nlora_target: all\nuse_dora: true\n",
         {"lora_r": 32, "lora_alpha": 64, "lora_target_modules": [], "use_dora": True}),
        ("llama-factory", "lora_alpha: 10\nlora_target: q_proj,v_proj\n",
         {"lora_r": 8, "lora_alpha": 10, "lora_target_modules": ["q_proj", "v_proj"]}),
    ],
)  # fmt: skip
def test_adapters_of_each_dialect(write, dialect, text, settings):
    imported = write(ADAPTERS[dialect] + text)
    assert imported.dialect == dialect
    for name, value in {"use_peft": True, "freeze_layers": None, **settings}.items():
        assert getattr(imported.config, name) == value, name


@pytest.mark.parametrize(
    "text, fate, says",
    [
        ("lora_modules_to_save: [lm_head]\n", "unsupported", "adapters alone train"),
        ("lora_model_dir: ./mine\n", "unsupported", "set model to that adapter's folder"),
        ("loraplus_lr_ratio: 16\n", "unsupported", "set learning_rates"),
        ("lora_mlp_kernel: true\n", "dropped", "own exact kernels"),
        ("lora_modules_to_save:\n", "dropped", "empty"),
    ],
)
def test_what_adapters_cannot_do(write, text, fate, says):
    imported = write(ADAPTERS["axolotl"] + text)
    key = text.partition(":")[0]
    assert fates(imported)[key] == fate and says in reasons(imported)[key]


def test_quantised_adapters_are_adapters_and_others_are_not(write):
    imported = write(AXOLOTL + "adapter: qlora\nlora_r: 4\n")
    assert imported.config.use_peft and imported.config.lora_r == 4
    assert any("not quantised" in line for line in imported.differences)
    imported = write(FULL.replace("full", "oft") + "dataset: a/b\noft_rank: 4\n")
    assert not imported.config.use_peft and fates(imported)["finetuning_type"] == "unsupported"
    assert any("OFT adapters" in note and "ten times" in note for note in imported.notes)


@pytest.mark.parametrize(
    "text, settings",
    [
        ("", {"train_layers": ["last:2"], "train": []}),
        ("freeze_trainable_layers: 4\n", {"train_layers": ["last:4"]}),
        ("freeze_trainable_layers: -3\n", {"train_layers": ["first:3"]}),
        ("freeze_trainable_modules: all\n", {"train": []}),
        ("freeze_trainable_modules: mlp,self_attn\n", {"train": ["*.mlp.*", "*.self_attn.*"]}),
        ("freeze_trainable_layers: no\n", {"train_layers": []}),
    ],
)
def test_llama_factory_trains_some_layers(write, text, settings):
    imported = write(FULL.replace("full", "freeze") + "dataset: a/b\n" + text)
    for name, value in {"use_peft": False, "freeze_layers": None, **settings}.items():
        assert getattr(imported.config, name) == value, name
    if text == "freeze_trainable_layers: no\n":
        assert fates(imported)["finetuning_type"] == "unsupported"

"""Recipes of Hugging Face's alignment handbook: TRL's keys, with mixtures of datasets of its own."""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers import hf_trainer, trl
from smoldpo.config.importers.datasets import RecipeSource, set_held_out_share, set_sources
from smoldpo.config.importers.mapping import Draft, Rules, drop, number, unsupported

RULES: Rules = {
    **trl.RULES,
    "auto_insert_empty_system_msg": unsupported(
        "no empty system message is put before a prompt; the model's own template may add one"
    ),
    "text_column": drop("the schema is found by looking at the rows"),
    "dataset_kwargs": drop(hf_trainer.LOADING),
}
DEFAULTS = trl.DEFAULTS


def groups(draft: Draft) -> None:
    """The keys that hang together."""
    if "dataset_mixer" in draft.recipe:
        held_out = _mixer(draft)
    elif "dataset_mixture" in draft.recipe:
        held_out = _mixture(draft)
    else:
        held_out = trl.data(draft)
    trl.common(draft, held_out)


def _mixer(draft: Draft) -> bool:
    """The older form: a mapping of names to shares, and the splits that all of them have."""
    recipe = draft.recipe
    mixer = recipe["dataset_mixer"]
    names = list(mixer) if isinstance(mixer, dict) else []
    splits = [str(split) for split in _listed(recipe.get("dataset_splits"))] or ["train", "test"]
    configs = _listed(recipe.get("dataset_configs")) or [None] * len(names)
    sources = [
        RecipeSource(str(name), _config(config), split, number(mixer[name]))
        for name, config in zip(names, configs, strict=False)
        for split in splits
        if "train" in split
    ]
    set_sources(draft, "dataset_mixer", sources, "share of the source")
    for key in draft.without("dataset_splits"):
        draft.same(key, "data_split has the train split; the data's own test split judges")
    for key in draft.without("dataset_configs"):
        draft.same(key, "in data_subset")
    return any("test" in split for split in splits)


def _mixture(draft: Draft) -> bool:
    """The newer form: a list of datasets with split and share, and how much of the whole is held out."""
    mixture = draft.recipe.get("dataset_mixture")
    if not isinstance(mixture, dict):
        return False
    listed = [entry for entry in _listed(mixture.get("datasets")) if isinstance(entry, dict)]
    sources = [trl.source_of(entry, "id", "config", "weight") for entry in listed]
    key = "dataset_mixture.datasets"
    set_sources(draft, key, sources, "share of the source")
    trl.inner_keys(draft, key, listed, {"id", "config", "split", "weight"})
    held = [source for source in sources if source.is_held_out]
    for name in (name for name in mixture if name != "datasets"):
        _of_mixture(draft, f"dataset_mixture.{name}", str(name), mixture[name], bool(held))
    return bool(held) or "eval_fraction" in draft.settings


def _of_mixture(draft: Draft, key: str, name: str, value: Any, held: bool) -> None:
    if name == "seed":
        draft.drop(key, "of the shuffle before the split; smoldpo splits by prompts")
    elif name == "test_split_size" and held:
        draft.drop(key, "pairs are held out by the data's own test split, not at random")
    elif name == "test_split_size" and value is not None:
        set_held_out_share(draft, key, value)
    else:
        draft.refuse(key, "not known of a mixture") if value is not None else draft.drop(
            key, "empty"
        )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _config(value: Any) -> str | None:
    return None if value in (None, "", "default") else str(value)

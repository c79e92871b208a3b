"""Recipes of the alignment handbook: TRL's keys, with mixtures of datasets of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from smoldpo.config.importers import hf_trainer as hf
from smoldpo.config.importers import trl
from smoldpo.config.importers.datasets import (
    RecipeSource,
    held_out_share,
    inner_keys,
    items,
    set_sources,
    sources_of,
    text,
)
from smoldpo.config.importers.mapping import Draft, drop, listed, number, refuse, same, unsupported


def _data(draft: Draft) -> None:
    if "dataset_mixer" in draft.recipe:
        _mixer(draft)
    elif "dataset_mixture" in draft.recipe:
        _mixture(draft)
    else:
        trl.data(draft)


def _mixer(draft: Draft) -> None:
    """The older form: a mapping of names to shares, and the splits that all of them have."""
    recipe = draft.recipe
    mixer = recipe["dataset_mixer"]
    names = list(mixer) if isinstance(mixer, dict) else []
    splits = [str(split) for split in listed(recipe.get("dataset_splits"))] or ["train", "test"]
    configs = listed(recipe.get("dataset_configs")) or [None] * len(names)
    sources = [
        RecipeSource(str(name), text(config), split, number(mixer[name]))
        for name, config in zip(names, configs, strict=False)
        for split in splits
        if "train" in split
    ]
    set_sources(draft, "dataset_mixer", sources, of_source=True)
    why = "data_split has the train split; the data's own test split judges"
    draft.apply({"dataset_splits": same(why, ()), "dataset_configs": same("in data_subset", ())})
    draft.held_out = any("test" in split for split in splits)


def _mixture(draft: Draft) -> None:
    """The newer form: a list of datasets with split and share, and the share that is held out."""
    mixture: Any = draft.recipe["dataset_mixture"]
    if not isinstance(mixture, dict):
        return
    listed_sources = items(mixture.get("datasets"))
    sources = sources_of(listed_sources, "id", "config", "weight")
    key = "dataset_mixture.datasets"
    set_sources(draft, key, sources, of_source=True)
    inner_keys(draft, key, listed_sources, "id config weight")
    held = any(source.is_held_out for source in sources)
    for name, value in mixture.items():
        if name == "seed":
            rule = drop("of the shuffle before the split; smoldpo splits by prompts")
        elif name == "test_split_size" and held:
            rule = drop("pairs are held out by the data's own test split, not at random")
        elif value is None:
            rule = drop("empty")
        elif name == "test_split_size":
            rule = held_out_share(draft, key, value)
        else:
            rule = refuse("not known of a mixture")
        if name != "datasets":
            draft.decide(f"dataset_mixture.{name}", rule)
    draft.held_out = held or "eval_fraction" in draft.settings


DIALECT = replace(
    trl.DIALECT,
    title="the alignment handbook",
    signs="dataset_mixer dataset_splits dataset_configs dataset_mixture",
    steps=(_data, *trl.DIALECT.steps[1:]),
    rules={
        **trl.RULES,
        "auto_insert_empty_system_msg": unsupported(
            "no empty system message is put before a prompt; the model's own template may add one"
        ),
        "text_column": drop(hf.SCHEMA),
        "dataset_kwargs": drop(hf.LOADING),
    },
)

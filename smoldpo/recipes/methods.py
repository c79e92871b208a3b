"""Whether a recipe is one for DPO, told by what its trainer calls the method, or by its keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smoldpo.errors import UsageError
from smoldpo.recipes.account import short
from smoldpo.recipes.rules import is_off

NAMES = {
    "sft": "supervised fine-tuning",
    "pt": "pre-training",
    "rm": "a reward model",
    "reward": "a reward model",
    "ppo": "PPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "cpo": "CPO",
    "grpo": "GRPO",
    "gdpo": "GDPO",
    "simpo": "SimPO",
    "rloo": "RLOO",
}
KEYS = {
    "grpo": {"num_generations", "reward_funcs", "reward_weights", "use_vllm", "vllm_mode"},
    "kto": {"desirable_weight", "undesirable_weight"},
    "reward": {"center_rewards_coefficient"},
    "orpo": {"orpo_alpha"},
    "cpo": {"cpo_alpha", "simpo_gamma"},
    "sft": {
        *("packing", "eval_packing", "dataset_text_field", "max_seq_length", "assistant_only_loss"),
        *("completion_only_loss", "packing_strategy"),
    },
}
"""Keys of TRL that only one trainer has."""
DPO_KEYS = {
    *("beta", "loss_type", "label_smoothing", "max_prompt_length", "precompute_ref_log_probs"),
    *(
        "rpo_alpha",
        "ld_alpha",
        "f_divergence_type",
        "sync_ref_model",
        "use_weighting",
        "reference_free",
    ),
}

SAYING = {"dpo", "apo"}
"""Words of a name that say it."""


def require_dpo(recipe: dict[str, Any], path: Path, dialect: str, *, told: bool) -> None:
    """Let recipes for DPO pass; `told` (--from) settles it where the keys leave it open.

    Raises:
        UsageError: naming what the recipe is for instead.
    """
    if dialect == "llama-factory":
        _named(path, "stage", recipe.get("stage"), "sft", ("dpo",))
    elif dialect == "axolotl":
        _named(path, "rl", recipe.get("rl"), "sft", ("dpo", "ipo"))
    else:
        _by_keys(recipe, path, told)


def _named(path: Path, key: str, value: Any, default: str, fine: tuple[str, ...]) -> None:
    method = default if is_off(value) else str(value).lower()
    if method in fine:
        return
    said = f"{key} is {short(value)}" if not is_off(value) else f"{key} is not set"
    raise UsageError(
        f"{path}: {said}: a recipe for {NAMES.get(method, short(method))}, not for DPO"
    )


def _by_keys(recipe: dict[str, Any], path: Path, told: bool) -> None:
    for method, keys in KEYS.items():
        found = [key for key in recipe if key in keys]
        if found:
            raise UsageError(
                f"{path}: a recipe for {NAMES[method]}, not for DPO: it has {', '.join(found[:3])}"
            )
    if told:
        return
    words = _words(
        *(str(recipe.get(key, "")) for key in ("output_dir", "hub_model_id", "run_name"))
    )
    place = _words(path.stem, path.absolute().parent.name)
    others = [word for word in NAMES if word in words]
    if others and not SAYING & words:
        raise UsageError(
            f"{path}: a recipe for {NAMES[others[0]]}, not for DPO, by the names that it gives to its output"
        )
    if not SAYING & (words | place) and not DPO_KEYS & set(recipe):
        raise UsageError(
            f"{path}: no key says for which method it is; if it is for DPO, say so with --from trl"
        )


def _words(*names: str) -> set[str]:
    return {word for name in names for word in re.split(r"[^a-z]+", name.lower())}

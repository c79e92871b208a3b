"""What a recipe is for, told by what its trainer calls the method, or by its keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smoldpo.errors import UsageError
from smoldpo.recipes.account import short
from smoldpo.recipes.reference_free import METHODS as FREE
from smoldpo.recipes.rules import alone, is_off

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
    "simpo": {"gamma_beta_ratio", "sft_weight"},
    "cpo": {"cpo_alpha", "simpo_gamma"},
    "sft": {
        *("packing", "eval_packing", "dataset_text_field", "max_seq_length", "assistant_only_loss"),
        *("completion_only_loss", "packing_strategy"),
    },
}
"""Keys that only one trainer has: TRL's, or that of SimPO's authors."""
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

DPO_ALONE = {"rpo_alpha", "ld_alpha", "f_divergence_type", "use_weighting", "reference_free"}
"""Of these, keys that no other trainer's recipe has."""
WITH_REFERENCE = {"precompute_ref_log_probs", "sync_ref_model"}
"""Keys that trainers with a reference have: not those of FREE, but KTO's and GRPO's."""
CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
"""What CPO's loss_type may be, besides DPO's."""

SAYING = {"dpo", "apo"}
"""Words of a name that say it."""


def method_of(recipe: dict[str, Any], path: Path, dialect: str, *, told: bool) -> str:
    """What a recipe is for: "dpo", "orpo", "cpo" or "simpo".

    TRL's and the handbook's recipes say it by keys, else by names, of their output first and then of file and
    folder. `told` (--from) names the dialect; that it is DPO, it settles only where nothing else says it, or
    where the output has the name of a method that smoldpo has not.

    Raises:
        UsageError: naming what the recipe is for instead.
    """
    if dialect == "llama-factory":
        _named(path, "stage", recipe.get("stage"), "sft", ("dpo",))
        loss = str(recipe.get("pref_loss")).lower()
        return loss if loss in ("orpo", "simpo") else "dpo"
    if dialect == "axolotl":
        said = _named(path, "rl", recipe.get("rl"), "sft", ("dpo", "ipo", *FREE))
        # axolotl's SimPO is TRL's CPOTrainer with the loss simpo.
        return {"ipo": "dpo", "simpo": "cpo"}.get(said, said)
    return _by_keys(recipe, path) or _by_names(recipe, path, told)


def _named(path: Path, key: str, value: Any, default: str, fine: tuple[str, ...]) -> str:
    method = default if is_off(value) else str(value).lower()
    if method in fine:
        return method
    said = f"{key} is {short(value)}" if not is_off(value) else f"{key} is not set"
    raise UsageError(
        f"{path}: {said}: a recipe for {NAMES.get(method, short(method))}, not for DPO"
    )


def _by_keys(recipe: dict[str, Any], path: Path) -> str | None:
    """What keys say that one trainer alone has; None where there are none."""
    for method, keys in KEYS.items():
        found = [key for key in recipe if key in keys]
        if found and method in FREE:
            return method
        if found:
            raise UsageError(
                f"{path}: a recipe for {NAMES[method]}, not for DPO: it has {', '.join(found[:3])}"
            )
    loss = _loss(recipe)
    if loss in FREE:
        return "cpo" if loss == "simpo" else str(loss)  # TRL has simpo in its CPOTrainer alone
    return "dpo" if _given(recipe, DPO_ALONE) else None


def _by_names(recipe: dict[str, Any], path: Path, told: bool) -> str:
    loss = _loss(recipe)
    compares = bool(_given(recipe, WITH_REFERENCE)) or not (is_off(loss) or loss in CPO_LOSSES)
    free = () if compares else FREE
    words = _words(
        *(str(recipe.get(key, "")) for key in ("output_dir", "hub_model_id", "run_name"))
    )
    place = _words(path.stem, path.absolute().parent.name)
    others = [word for word in NAMES if word in words and (word in free or word not in FREE)]
    if others and not SAYING & words:
        return _other(path, others, told)
    if compares or SAYING & (words | place):
        return "dpo"
    found = [word for word in free if word in place]
    if found:
        return found[0]
    if not told and not DPO_KEYS & set(recipe):
        raise UsageError(
            f"{path}: no key says for which method it is; if it is for DPO, say so with --from trl"
        )
    return "dpo"


def _loss(recipe: dict[str, Any]) -> Any:
    """loss_type, hashable."""
    said = alone(recipe.get("loss_type"))
    return tuple(map(str, said)) or None if isinstance(said, list) else said


def _given(recipe: dict[str, Any], keys: set[str]) -> set[str]:
    """Those of `keys` that the recipe has a value for."""
    return {key for key in keys if recipe.get(key) is not None}


def _other(path: Path, words: list[str], told: bool) -> str:
    """The method that the names of a recipe's output say."""
    free = [word for word in words if word in FREE]
    if free:
        return free[0]
    if told:
        return "dpo"
    raise UsageError(
        f"{path}: a recipe for {NAMES[words[0]]}, not for DPO, by the names that it gives to its output"
    )


def _words(*names: str) -> set[str]:
    return {word for name in names for word in re.split(r"[^a-z]+", name.lower())}

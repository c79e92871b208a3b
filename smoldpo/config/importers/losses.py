"""What a recipe is for (DPO, ORPO, CPO or SimPO), and its keys of the loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smoldpo.config.importers.mapping import (
    Draft,
    alone,
    drop,
    is_off,
    keep,
    number,
    refuse,
    same,
    short,
    unsupported,
)
from smoldpo.config.losses import FACTS
from smoldpo.utils.errors import UsageError

METHODS = ("orpo", "cpo", "simpo")
"""Besides DPO: those without a reference."""
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
    "grpo": "num_generations reward_funcs reward_weights use_vllm vllm_mode",
    "kto": "desirable_weight undesirable_weight",
    "reward": "center_rewards_coefficient",
    "simpo": "gamma_beta_ratio sft_weight",
    "cpo": "cpo_alpha simpo_gamma",
    "sft": "packing eval_packing dataset_text_field max_seq_length assistant_only_loss "
    "completion_only_loss packing_strategy",
}
"""Keys that only one trainer has: TRL's, or that of SimPO's authors."""
DPO_ALONE = {"rpo_alpha", "ld_alpha", "f_divergence_type", "use_weighting", "reference_free"}
"""Keys that no other trainer's recipe has."""
WITH_REFERENCE = {"precompute_ref_log_probs", "sync_ref_model"}
"""Keys that trainers with a reference have: not those of METHODS, but KTO's and GRPO's."""
DPO_KEYS = (
    {"beta", "loss_type", "label_smoothing", "max_prompt_length"} | DPO_ALONE | WITH_REFERENCE
)
CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
"""What CPO's loss_type may be, besides DPO's."""
DPO_WORDS = {"dpo", "apo"}
"""Words in names of files and outputs that stand for DPO."""


def method_of(recipe: dict[str, Any], path: Path, dialect: str, *, named: bool) -> str:
    """What a recipe is for: "dpo", "orpo", "cpo" or "simpo".

    TRL's and the handbook's recipes say it by keys, else by names, of their output first and then
    of file and folder. `told` (--from) names the dialect; that it is DPO, it settles only where
    nothing else says it, or where the output has the name of a method that smoldpo has not.

    Raises:
        UsageError: naming what the recipe is for instead.
    """
    if dialect == "llama-factory":
        _named(path, "stage", recipe.get("stage"), "sft", ("dpo",))
        loss = str(recipe.get("pref_loss")).lower()
        return loss if loss in ("orpo", "simpo") else "dpo"
    if dialect == "axolotl":
        method = _named(path, "rl", recipe.get("rl"), "sft", ("dpo", "ipo", *METHODS))
        # axolotl's SimPO is TRL's CPOTrainer with the loss simpo.
        return {"ipo": "dpo", "simpo": "cpo"}.get(method, method)
    return _by_keys(recipe, path) or _by_names(recipe, path, named)


def _named(path: Path, key: str, value: Any, default: str, fine: tuple[str, ...]) -> str:
    method = default if is_off(value) else str(value).lower()
    if method in fine:
        return method
    setting = f"{key} is {short(value)}" if not is_off(value) else f"{key} is not set"
    raise UsageError(
        f"{path}: {setting}: a recipe for {NAMES.get(method, short(method))}, not for DPO"
    )


def _by_keys(recipe: dict[str, Any], path: Path) -> str | None:
    """What keys say that one trainer alone has; None where there are none."""
    for method, keys in KEYS.items():
        found = [key for key in recipe if key in keys.split()]
        if found and method in METHODS:
            return method
        if found:
            raise UsageError(
                f"{path}: a recipe for {NAMES[method]}, not for DPO: it has {', '.join(found[:3])}"
            )
    loss = _loss(recipe)
    if loss in METHODS:
        return "cpo" if loss == "simpo" else str(loss)  # TRL has simpo in its CPOTrainer alone
    return "dpo" if any(recipe.get(key) is not None for key in DPO_ALONE) else None


def _by_names(recipe: dict[str, Any], path: Path, named: bool) -> str:
    loss = _loss(recipe)
    compares = any(recipe.get(key) is not None for key in WITH_REFERENCE)
    compares = compares or not (is_off(loss) or loss in CPO_LOSSES)
    free = () if compares else METHODS
    words = _words(
        *(str(recipe.get(key, "")) for key in ("output_dir", "hub_model_id", "run_name"))
    )
    path_words = _words(path.stem, path.absolute().parent.name)
    others = [word for word in NAMES if word in words and (word in free or word not in METHODS)]
    if others and not DPO_WORDS & words:
        ours = [word for word in others if word in METHODS]
        if not ours and not named:
            raise UsageError(
                f"{path}: a recipe for {NAMES[others[0]]}, not for DPO, by the names that it gives "
                "to its output"
            )
        return ours[0] if ours else "dpo"
    if compares or DPO_WORDS & (words | path_words):
        return "dpo"
    found = [word for word in free if word in path_words]
    if not found and not named and not DPO_KEYS & set(recipe):
        raise UsageError(
            f"{path}: no key says for which method it is; if it is for DPO, say so with --from trl"
        )
    return found[0] if found else "dpo"


def _loss(recipe: dict[str, Any]) -> Any:
    """loss_type, hashable."""
    loss = alone(recipe.get("loss_type"))
    return tuple(map(str, loss)) or None if isinstance(loss, list) else loss


def _words(*names: str) -> set[str]:
    return {word for name in names for word in re.split(r"[^a-z]+", name.lower())}


NO_REFERENCE = "no reference takes part in this loss"
REFERENCE_KEYS = (
    "ref_model ref_model_name_or_path ref_model_init_kwargs ref_model_adapters "
    "precompute_ref_log_probs precompute_ref_batch_size sync_ref_model reference_free"
)
PROMPT_TOKENS = (
    "TRL's ORPO counts the prompt's tokens too in its likelihood term; here the answer's alone"
)
ANSWERS_ALIKE = (
    "LLaMA-Factory's ORPO weighs each answer's likelihood per token alike; here all chosen tokens "
    "of a step weigh alike"
)
ALSO_LIKELIHOOD = (
    "TRL's CPOTrainer adds the likelihood of the chosen answers, by cpo_alpha (1 untold), to "
    "SimPO too: that term is sft. SimPO as in its paper is loss_type: simpo"
)
LENGTHS = (
    "an average per token without a reference would find longer answers likelier for it: leave it "
    "out"
)
NO_TERM = "DPO's likelihood term, which this trainer has not: leave it out"
HAS_TERM = "orpo has a likelihood term of weight 1 already: leave it out"
OTHER = "{name} with the loss {said} is not one of smoldpo's: the written config has {ours}"
METHOD_KEYS = {"axolotl": "rl", "llama-factory": "pref_loss"}


def set_loss(draft: Draft, dialect: str) -> None:
    """Decide about the keys of the loss, of a recipe whose `draft.method` is one of METHODS.

    orpo: TRL's ORPOTrainer, axolotl's rl: orpo, LLaMA-Factory's pref_loss: orpo. cpo: TRL's
    CPOTrainer; with its loss_type simpo, and as axolotl's rl: simpo, SimPO plus CPO's likelihood
    term. simpo: the trainer of SimPO's authors (gamma_beta_ratio), LLaMA-Factory's pref_loss:
    simpo.
    """
    {"orpo": _orpo, "cpo": _cpo, "simpo": _simpo}[draft.method](draft, dialect)
    per_token = any(
        FACTS[name].beta and not FACTS[name].ld_alpha for name in draft.settings["loss_type"]
    )
    draft.apply({REFERENCE_KEYS: drop(NO_REFERENCE), "rpo_alpha": unsupported(NO_TERM)})
    if per_token:
        draft.apply({"ld_alpha": unsupported(LENGTHS, (None, 1, 1.0))})


def _orpo(draft: Draft, dialect: str) -> None:
    differs = ANSWERS_ALIKE if dialect == "llama-factory" else PROMPT_TOKENS
    _write(draft, dialect, ["orpo"], differs, matters=True)
    loss = alone(draft.recipe.get("loss_type") or "orpo")
    if dialect not in METHOD_KEYS and loss != "orpo":  # ORPO's trainer itself has no such key
        draft.notes.append(differs)
        _refuse_loss(draft, "ORPO", loss, "orpo")
    beta = drop("beta says it") if draft.undecided("trl.beta", "rl_beta", "beta") else keep("beta")
    draft.apply(
        {
            "orpo_alpha": beta,
            "pref_ftx": unsupported(HAS_TERM),
            "cpo_alpha simpo_gamma": drop("of CPO and SimPO"),
        }
    )


def _cpo(draft: Draft, dialect: str) -> None:
    loss = alone(draft.recipe.get("rl" if dialect == "axolotl" else "loss_type") or "sigmoid")
    if loss == "simpo":
        weight = number(draft.recipe.get("cpo_alpha", 1.0))
        _with_likelihood(draft, dialect, "cpo_alpha", 1.0 if weight is None else weight)
    else:
        _write(draft, dialect, ["cpo"])
        if loss not in ("sigmoid", "cpo"):
            _refuse_loss(draft, "CPO", loss, "cpo")
        draft.apply({"simpo_gamma": drop("of the loss simpo")})
    draft.apply({"alpha": unsupported("AlphaPO is not one of smoldpo's losses: leave it out")})


def _simpo(draft: Draft, dialect: str) -> None:
    if dialect == "llama-factory":
        _write(draft, dialect, ["simpo"])
        return
    weight = number(draft.recipe.get("sft_weight", 0.0))
    _with_likelihood(draft, dialect, "sft_weight", weight or 0.0)
    loss = alone(draft.recipe.get("loss_type") or "sigmoid")
    if loss not in ("sigmoid", "simpo"):
        _refuse_loss(draft, "SimPO", loss, "simpo")
    beta = number(draft.recipe.get("beta", 2.0))
    ratio = number(draft.recipe.get("gamma_beta_ratio", 0.25))
    if "beta" not in draft.recipe:
        draft.default("(beta)", "beta", 2.0, "what SimPO's trainer does without being told")
    if beta is None or ratio is None:
        return  # named where the configuration is checked, or by the rule of an empty key
    gamma = round(ratio * beta, 12)
    if "gamma_beta_ratio" in draft.recipe:
        draft.decide("gamma_beta_ratio", keep("simpo_gamma", gamma, "times beta"))
    else:
        why = "a quarter of beta, as SimPO's trainer has it without being told"
        draft.default("(gamma_beta_ratio)", "simpo_gamma", gamma, why)


def _refuse_loss(draft: Draft, name: str, said: Any, ours: str) -> None:
    draft.decide("loss_type", refuse(OTHER.format(name=name, said=short(said), ours=ours)))


def _with_likelihood(draft: Draft, dialect: str, key: str, weight: float) -> None:
    """SimPO, and with a weight the likelihood of the chosen answers beside it."""
    if not weight:
        _write(draft, dialect, ["simpo"])
        draft.apply({key: drop("0: no likelihood term")})
        return
    weights = [1.0, weight]
    reason = ALSO_LIKELIHOOD if key == "cpo_alpha" else ""
    _write(draft, dialect, ["simpo", "sft"], reason, more={"loss_weights": weights})
    draft.apply({key: keep("loss_weights", weights, "the weight of sft")})


def _write(
    draft: Draft,
    dialect: str,
    names: list[str],
    reason: str = "",
    *,
    matters: bool = False,
    more: dict[str, Any] | None = None,
) -> None:
    """The loss, under the key that names the method, or under none where names of the output do."""
    keys = draft.undecided(METHOD_KEYS.get(dialect, "loss_type"), "trainer_type")
    if keys:
        draft.decide(keys[0], keep("loss_type", names, reason, matters=matters, more=more))
        draft.apply({" ".join(keys[1:]): same("loss_type says it", ())})
        return
    draft.settings |= more or {}
    why = f"a recipe for {names[0]}, by its other keys or names"
    draft.default("(method)", "loss_type", names, why)
    if matters:
        draft.notes.append(reason)

"""Which loss a recipe for ORPO, CPO or SimPO asks for, with what weights, and what differs.

orpo     TRL's ORPOTrainer, axolotl's rl: orpo, LLaMA-Factory's pref_loss: orpo
cpo      TRL's CPOTrainer; with its loss_type simpo, and as axolotl's rl: simpo, it is SimPO plus CPO's
         likelihood term
simpo    the trainer of SimPO's authors (gamma_beta_ratio), LLaMA-Factory's pref_loss: simpo
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smoldpo.loss_facts import FACTS
from smoldpo.recipes.account import Draft, number, short
from smoldpo.recipes.rules import Rule, alone, unsupported

METHODS = ("orpo", "cpo", "simpo")

NO_REFERENCE = "no reference takes part in this loss"
REFERENCE_KEYS = (
    *("ref_model", "ref_model_name_or_path", "ref_model_init_kwargs", "ref_model_adapters"),
    *("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model", "reference_free"),
)
PROMPT_TOKENS = (
    "TRL's ORPO counts the prompt's tokens too in its likelihood term; here the answer's alone"
)
ANSWERS_ALIKE = (
    "LLaMA-Factory's ORPO weighs each answer's likelihood per token alike; here all chosen tokens of a step "
    "weigh alike"
)
ALSO_LIKELIHOOD = (
    "TRL's CPOTrainer adds the likelihood of the chosen answers, by cpo_alpha (1 untold), to SimPO too: that "
    "term is sft. SimPO as in its paper is loss_type: simpo"
)
LENGTHS = "an average per token without a reference would find longer answers likelier for it: leave it out"
NO_TERM = "DPO's likelihood term, which this trainer has not: leave it out"
HAS_TERM = "orpo has a likelihood term of weight 1 already: leave it out"
_KEYS = {"axolotl": "rl", "llama-factory": "pref_loss"}


def set_loss(draft: Draft, dialect: str) -> None:
    """Decide about the keys of the loss, of a recipe whose `draft.method` is one of METHODS."""
    ways: dict[str, Callable[[Draft, str], None]] = {"orpo": _orpo, "cpo": _cpo, "simpo": _simpo}
    ways[draft.method](draft, dialect)
    for key in draft.without(*REFERENCE_KEYS):
        draft.drop(key, NO_REFERENCE)
    unfit = any(
        not FACTS[name].ld_alpha and FACTS[name].beta for name in draft.settings["loss_type"]
    )
    rules = {"rpo_alpha": unsupported(NO_TERM)}
    if unfit:
        rules["ld_alpha"] = unsupported(LENGTHS, (None, 1, 1.0))
    _decide(draft, rules)


def _decide(draft: Draft, rules: dict[str, Rule]) -> None:
    for key in draft.without(*rules):
        rules[key](draft, key, draft.recipe[key])


def _orpo(draft: Draft, dialect: str) -> None:
    differs = ANSWERS_ALIKE if dialect == "llama-factory" else PROMPT_TOKENS
    _write(draft, dialect, ["orpo"], differs, matters=True)
    said = _loss_type(draft, "orpo")
    if dialect not in _KEYS and said != "orpo":  # ORPO's trainer itself has no such key
        draft.notes.append(differs)
        draft.refuse(
            "loss_type",
            f"ORPO with the loss {short(said)} is not one of smoldpo's: the written config has orpo",
        )
    for key in draft.without("orpo_alpha"):
        if draft.without("trl.beta", "rl_beta", "beta"):
            draft.drop(key, "beta says it")
        elif draft.recipe[key] is None:
            draft.drop(key, "empty")
        else:
            draft.keep(key, "beta", draft.recipe[key])
    _decide(draft, {"pref_ftx": unsupported(HAS_TERM)})
    for key in draft.without("cpo_alpha", "simpo_gamma"):
        draft.drop(key, "of CPO and SimPO")


def _cpo(draft: Draft, dialect: str) -> None:
    said = _loss_type(draft, key="rl" if dialect == "axolotl" else "loss_type")
    if said == "simpo":
        weight = number(draft.recipe.get("cpo_alpha", 1.0))
        _with_likelihood(draft, dialect, "cpo_alpha", 1.0 if weight is None else weight)
    else:
        _write(draft, dialect, ["cpo"])
        if said not in ("sigmoid", "cpo"):
            draft.refuse(
                "loss_type",
                f"CPO with the loss {short(said)} is not one of smoldpo's: the written config has cpo",
            )
        for key in draft.without("simpo_gamma"):
            draft.drop(key, "of the loss simpo")
    _decide(draft, {"alpha": unsupported("AlphaPO is not one of smoldpo's losses: leave it out")})


def _simpo(draft: Draft, dialect: str) -> None:
    if dialect == "llama-factory":
        _write(draft, dialect, ["simpo"])
        return
    weight = number(draft.recipe.get("sft_weight", 0.0))
    _with_likelihood(draft, dialect, "sft_weight", weight or 0.0)
    said = _loss_type(draft)
    if said not in ("sigmoid", "simpo"):
        draft.refuse(
            "loss_type",
            f"SimPO with the loss {short(said)} is not one of smoldpo's: the written config has simpo",
        )
    beta = number(draft.recipe.get("beta", 2.0))
    ratio = number(draft.recipe.get("gamma_beta_ratio", 0.25))
    if "beta" not in draft.recipe:
        draft.default("(beta)", "beta", 2.0, "what SimPO's trainer does without being told")
    if beta is None or ratio is None:
        return  # named where the configuration is checked, or by the rule of an empty key
    gamma = round(ratio * beta, 12)
    if "gamma_beta_ratio" in draft.recipe:
        draft.keep("gamma_beta_ratio", "simpo_gamma", gamma, "times beta")
    else:
        why = "a quarter of beta, as SimPO's trainer has it without being told"
        draft.default("(gamma_beta_ratio)", "simpo_gamma", gamma, why)


def _loss_type(draft: Draft, untold: str = "sigmoid", key: str = "loss_type") -> Any:
    return alone(draft.recipe.get(key) or untold)


def _with_likelihood(draft: Draft, dialect: str, key: str, weight: float) -> None:
    """SimPO, and with a weight the likelihood of the chosen answers beside it."""
    if not weight:
        _write(draft, dialect, ["simpo"])
        for _ in draft.without(key):
            draft.drop(key, "0: no likelihood term")
        return
    more = {"loss_weights": [1.0, weight]}
    _write(draft, dialect, ["simpo", "sft"], ALSO_LIKELIHOOD if key == "cpo_alpha" else "", more)
    for _ in draft.without(key):
        draft.keep(key, "loss_weights", more["loss_weights"], "the weight of sft")


def _write(
    draft: Draft,
    dialect: str,
    names: list[str],
    reason: str = "",
    more: dict[str, Any] | None = None,
    *,
    matters: bool = False,
) -> None:
    """The loss, under the key that names the method, or under none where names of the output do."""
    keys = [_KEYS.get(dialect, "loss_type"), "trainer_type"]
    said = draft.without(*keys)
    if said:
        draft.keep(said[0], "loss_type", names, reason, matters=matters, more=more)
        for key in said[1:]:
            draft.same(key, "loss_type says it")
        return
    draft.settings |= more or {}
    draft.default(
        "(method)", "loss_type", names, f"a recipe for {names[0]}, by its other keys or names"
    )
    if matters:
        draft.notes.append(reason)

"""TRL's own loss code on given log-probabilities: no model, no trainer, nothing of ours."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch

PROMPT = 3
"""Tokens of every prompt in the oracle's batches."""


def dpo(tokens, reference, loss_type, squares=None, **settings):
    """DPOTrainer._compute_loss of per-token log-probabilities.

    Args:
        tokens: for each side, a list of one tensor [tokens of the answer] a pair.
        reference: for each side, log π_ref of its answers, summed, [pairs].
        squares: like `tokens`, log Σ p² where each token stands, for `use_weighting`.
    """
    from trl import DPOTrainer

    rows = [*tokens[0], *tokens[1]]
    longest = max(len(row) for row in rows)
    logps = torch.zeros(len(rows), PROMPT - 1 + longest, dtype=rows[0].dtype)
    log_squares = torch.zeros_like(logps)
    mask = torch.zeros(len(rows), PROMPT + longest, dtype=torch.long)
    for index, row in enumerate(rows):
        logps[index, PROMPT - 1 : PROMPT - 1 + len(row)] = row
        mask[index, PROMPT : PROMPT + len(row)] = 1
        if squares is not None:
            log_squares[index, PROMPT - 1 : PROMPT - 1 + len(row)] = [*squares[0], *squares[1]][
                index
            ]
    blank = torch.zeros_like(logps)
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=blank,
        mean_logits=blank,
        is_top1=blank.bool(),
        log_sum_sq_probs=log_squares,
    )
    own = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=settings.get("ld_alpha"),
        precompute_ref_logps=True,
        loss_types=loss_type,
        loss_weights=settings.get("loss_weights") or [1.0] * len(loss_type),
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        use_weighting=squares is not None,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return DPOTrainer._compute_loss(own, lambda **_: outputs, inputs, return_outputs=False)


def cpo(chosen, rejected, loss_type, **settings):
    """CPOTrainer.cpo_loss (SimPO too), without its likelihood term: one loss a pair."""
    from trl.experimental.cpo import CPOTrainer

    own = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type=loss_type,
        beta=settings["beta"],
        simpo_gamma=settings.get("simpo_gamma", 0.5),
        label_smoothing=settings.get("label_smoothing", 0.0),
    )
    return CPOTrainer.cpo_loss(own, chosen, rejected)[0]


def orpo(chosen, rejected, beta):
    """ORPOTrainer.odds_ratio_loss of averages per token: what is subtracted from the likelihood
    term.
    """
    from trl.experimental.orpo import ORPOTrainer

    own = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    return ORPOTrainer.odds_ratio_loss(own, chosen, rejected)[0]


def kto(policy, policy_kl, reference, reference_kl, liked, loss_type="kto", **settings):
    """KTOTrainer._compute_loss of summed log-probabilities [answers], one token each: the mean.

    Args:
        policy_kl, reference_kl: log-probabilities of other prompts' answers.
    """
    from trl import KTOTrainer

    def outputs(logps):
        column = logps[:, None]
        return SimpleNamespace(log_probs=column, entropy=column, mean_logits=column)

    ids = torch.zeros(len(liked), 2, dtype=torch.long)
    mask = torch.tensor([[0, 1]] * len(liked))
    own = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        loss_type=loss_type,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(own).update(settings)
    own._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(own, model, batch)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    batch |= {f"KL_{name}": value for name, value in batch.items()}
    batch["KL_input_ids"] = ids + 1
    batch |= {"label": liked, "ref_logps": reference, "ref_KL_logps": reference_kl}

    def model(input_ids, **_):
        return outputs(policy_kl if input_ids[0, 0] == 1 else policy)

    return KTOTrainer._compute_loss(own, model, batch, return_outputs=False)

"""The training loop, from top to bottom.

An optimizer step is a list of pairs, a pure function of seed, epoch and step; the engine turns it
into log-probabilities and gradients, however it cuts it into micro-batches; the optimizer moves the
policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from smoldpo.config.losses import OPTIONS
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.base import Engine, StepResult
from smoldpo.engine.batch_budget import retry_with_smaller_budget
from smoldpo.losses import Objective, betas, implicit_rewards
from smoldpo.training.metrics_file import MetricsFile
from smoldpo.training.optim import learning_rate, step_by_parts
from smoldpo.training.sampler import Schedule
from smoldpo.training.state import TrainingState
from smoldpo.training.step_metrics import kinds, thumb_metrics
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.shares import own, whole
from smoldpo.utils.threads import torch_threads

LN2 = math.log(2.0)
AfterStep = Callable[[int], bool | None]
"""Called with the number of steps finished; returns True where that is enough."""
Watch = Callable[..., None]


class NotFiniteError(SmoldpoError):
    """A loss or gradient that is not finite, before a step was taken on it; `facts` say why."""

    def __init__(self, message: str, pairs: Sequence[TokenizedPair], facts: dict[str, Any]):
        super().__init__(message)
        self.pairs, self.facts = pairs, facts


def loss_function(config: TrainConfig, beta: float) -> Objective:
    """The configured loss at one β; see engine/base.py for how it is called."""
    return Objective.of(
        config.loss_type,
        config.loss_weights,
        beta=beta,
        options={name: getattr(config, name) for name in OPTIONS},
        rpo_alpha=config.rpo_alpha,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        ld_alpha=config.ld_alpha,
        use_weighting=config.use_weighting,
    )


def beta_at(config: TrainConfig, step: int, total: int) -> float:
    """β of step `step` (from 0) of `total`: from beta to beta_end, linearly."""
    return config.beta + (config.last_beta - config.beta) * step / max(1, total - 1)


def train(
    engine: Engine,
    pairs: Sequence[TokenizedPair],
    config: TrainConfig,
    metrics: MetricsFile,
    *,
    starts_at_reference: bool,
    after_step: AfterStep,
    watch: Watch,
    state: TrainingState | None = None,
    advance: Advance = no_progress,
) -> int:
    """Train the engine's policy; returns the number of optimizer steps, earlier ones included.

    Args:
        starts_at_reference: policy and reference are equal before the first update, so that the
            first loss is known (ln 2 for DPO); this is checked.
        after_step: called after each step, for evaluation and checkpoints; training ends when it
            says so.
        watch: called as an `Advance`, with a note on loss and accuracy.
        state: where training goes on from; by default its beginning.
        advance: called within a step, between micro-batches. It may raise; weights, optimizer and
            `state.step` are then as after the last finished step.

    Raises:
        NotFiniteError: a loss or gradient that is not finite; no step is taken on it.
        SmoldpoError: a first loss that is not what it must be, or too little memory for one pair.
    """
    schedule = Schedule.of(config, len(pairs))
    state = state or TrainingState(engine, config)
    parameters, optimizer = state.parameters, state.optimizer
    asked = engine.budget
    for step in range(state.step, schedule.total_steps):
        started = time.perf_counter()
        batch = [pairs[index] for index in schedule.indices(step)]
        beta = beta_at(config, step, schedule.total_steps)
        loss = loss_function(config, beta)

        def gradients(batch: list[TokenizedPair] = batch, loss: Objective = loss) -> StepResult:
            optimizer.zero_grad(set_to_none=True)
            return engine.accumulate_gradients(batch, loss, advance)

        losses, policy, reference = retry_with_smaller_budget(
            gradients, engine, batch, f"step {step + 1}"
        )
        if step == 0 and starts_at_reference and reference is not None:
            start = policy_at_start(policy, reference)
            _check_first_loss(losses, loss(start, reference, batch, batch))
        rate = learning_rate(config, step, schedule.total_steps)
        with torch_threads(1):  # the same bits, however many threads compute
            norm = _clip(config, step, batch, losses, parameters)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]
            step_by_parts(optimizer, engine.workers)
            state.finish_step()

        reference_seen = None if reference is None else loss.logps_for_loss(reference)
        own_beta = betas(beta, batch, policy)
        row = step_metrics(losses, loss.logps_for_loss(policy), reference_seen, own_beta)
        if (liked := kinds(batch)) is not None and reference is not None:
            row = {"loss": row["loss"]} | thumb_metrics(policy, reference, beta, liked)
        if (step + 1) % config.logging_steps == 0 or step + 1 == schedule.total_steps:
            metrics.log(
                {"step": step + 1, "epoch": round((step + 1) / schedule.steps_per_epoch, 6)}
                | row
                | ({} if config.beta_end is None else {"beta": beta})
                | {"grad_norm": norm, "learning_rate": rate, "pairs": len(batch)}
                | ({} if engine.budget == asked else {engine.batching.setting: engine.budget})
                | {"seconds": round(time.perf_counter() - started, 4)}
            )
        state.figures = row | {"pairs": len(batch), "seconds": time.perf_counter() - started}
        watch(1, note=f"loss {row['loss']:.4f}  accuracy {row[accuracy_name(reference)]:.2f}")
        if after_step(step + 1):
            break
    engine.drop_gradients()
    return state.step


def _clip(
    config: TrainConfig,
    step: int,
    batch: Sequence[TokenizedPair],
    losses: torch.Tensor,
    parameters: dict[str, torch.nn.Parameter],
) -> float:
    """Clip the gradients; their norm before.

    Raises:
        NotFiniteError: a loss or gradient that is not finite.
    """
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm: float = whole(total).item()
    _check_finite(step, batch, losses, norm, parameters)
    torch.nn.utils.clip_grads_with_norm_(
        parameters.values(), config.max_grad_norm or math.inf, total
    )
    return norm


def policy_at_start(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """What the policy's log-probabilities must be while it is the reference."""
    squares = {name: vars(policy)[name] for name in ("chosen_squares", "rejected_squares")}
    return replace(reference, **squares)


def accuracy_name(reference: PairLogps | None) -> str:
    """The accuracy of a step: by implicit reward; by log-probability without a reference."""
    return "logps/accuracies" if reference is None else "rewards/accuracies"


def step_metrics(
    losses: torch.Tensor,
    policy: PairLogps,
    reference: PairLogps | None,
    beta: float | torch.Tensor,
) -> dict[str, float]:
    """Means over the pairs of one optimizer step, under TRL's names. Inputs are [pairs].

    Log-probabilities are those that the loss compares (Objective.logps_for_loss), as in TRL.
    Without a reference there is no implicit reward: accuracy and margin are of log-probabilities.
    """
    # Some devices (MPS) have no float64.
    losses, policy = losses.cpu(), policy.map(torch.Tensor.cpu)
    beta = beta.cpu() if isinstance(beta, torch.Tensor) else beta
    row = {
        "loss": losses.double().mean().item(),
        "logps/chosen": policy.chosen.double().mean().item(),
        "logps/rejected": policy.rejected.double().mean().item(),
    }
    if reference is None:
        name, (chosen, rejected) = "logps", (policy.chosen, policy.rejected)
    else:
        name = "rewards"
        chosen, rejected = implicit_rewards(policy, reference.map(torch.Tensor.cpu), beta)
        row["rewards/chosen"] = chosen.double().mean().item()
        row["rewards/rejected"] = rejected.double().mean().item()
    wins = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    row[f"{name}/accuracies"] = wins.mean().item()
    row[f"{name}/margins"] = (chosen - rejected).double().mean().item()
    return row


def _check_first_loss(losses: torch.Tensor, where_equal: torch.Tensor) -> None:
    # On a CPU log-probabilities do not depend on the batch, to the last bit; GPUs choose other
    # kernels for other sizes, so there the check is for a wrong reference, not for rounding.
    loss, expected = losses.mean().item(), where_equal.mean().item()
    allowed = 1e-6 if losses.device.type == "cpu" else 0.05
    if not abs(loss - expected) < allowed * max(1.0, abs(expected)):
        name = "ln 2 = " if abs(expected - LN2) < 1e-6 else ""
        raise SmoldpoError(
            f"the loss before the first update is {loss:.8f}, not {name}{expected:.8f}: policy and "
            "reference give different log-probabilities though their weights are the same; this is "
            "a bug in smoldpo or in a numerical library; try smoldpo cache clear, then --dtype "
            "float32, and report it"
        )


def _check_finite(
    step: int,
    batch: Sequence[TokenizedPair],
    losses: torch.Tensor,
    norm: float,
    parameters: dict[str, torch.nn.Parameter],
) -> None:
    if torch.isfinite(losses).all() and math.isfinite(norm):
        return
    ids = ", ".join(pair.id for pair in batch)
    bad = [
        name
        for name, parameter in parameters.items()
        if not torch.isfinite(own(parameter)).all()
        or (parameter.grad is not None and not torch.isfinite(own(parameter.grad)).all())
    ]
    raise NotFiniteError(
        f"step {step + 1}: the loss or its gradient is not finite (loss {losses.mean().item()}, "
        f"gradient norm {norm}); no step was taken. Try a smaller --learning-rate or --dtype "
        f"float32. Its pairs: {ids}",
        batch,
        {"step": step + 1, "grad_norm": str(norm), "losses": [str(x) for x in losses.tolist()]}
        | {"parameters_not_finite": bad},
    )

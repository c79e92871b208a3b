"""Optimizers by transformers' names, their state, the learning rate, and averaged weights.

Each optimizer is the one that transformers' Trainer takes under its name: torch's AdamW and SGD,
transformers' own Adafactor with external rates, bitsandbytes' AdamW with 8-bit moments. The
learning rate is a pure function of the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from smoldpo.config.optimizers import OPTIMIZERS, lowest_rate
from smoldpo.config.schema import TrainConfig
from smoldpo.utils.devices import pick_device
from smoldpo.utils.errors import UsageError, whole_reason
from smoldpo.utils.shares import kept_by_first, shared_out
from smoldpo.utils.threads import torch_threads
from smoldpo.utils.workers import Workers, shares

Named = Mapping[str, torch.nn.Parameter]


def make_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    config: TrainConfig,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The configured optimizer over what trains; decay on matrices only.

    A group's `rate_factor` is its peak rate over `learning_rate`; the trainer multiplies by it.

    Args:
        rates: peak rates of parameters that have one of their own, by name.
    """
    rates = rates or {}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters:
        rate = rates.get(name, config.learning_rate)
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return _build(
        [
            {"params": held, "lr": rate, "weight_decay": decay}
            | {"rate_factor": rate / config.learning_rate}
            for (rate, decay), held in groups.items()
        ],
        config,
    )


def _build(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    adam: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim == "adafactor":  # Shazeer and Stern 2018, with rates from outside
        from transformers.optimization import Adafactor  # here, for it loads peft and accelerate

        return Adafactor(
            groups, lr=config.learning_rate, scale_parameter=False, relative_step=False
        )
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.sgd_momentum)
    if config.optim == "adamw_8bit":  # Dettmers et al. 2021
        from bitsandbytes.optim import AdamW

        optimizer: torch.optim.Optimizer
        optimizer = AdamW(groups, lr=config.learning_rate, optim_bits=8, **adam)
        return optimizer
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True, **adam)


def step_by_parts(optimizer: torch.optim.Optimizer, workers: Workers) -> None:
    """`optimizer.step()`, each worker for some of the parameters.

    A parameter is always updated by one thread. bitsandbytes' optimizers, which share buffers
    between parameters, take their step whole.
    """
    if workers.count == 1 or type(optimizer).__module__.startswith("bitsandbytes"):
        with torch_threads(1):
            optimizer.step()
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = shares([parameter.numel() for parameter in parameters], workers.count)

    def step(_: int, part: list[int]) -> None:
        own = {id(parameters[index]) for index in part}
        worker = copy.copy(optimizer)  # with the same state
        worker.param_groups = [
            group | {"params": held}
            for group in optimizer.param_groups
            if (held := [parameter for parameter in group["params"] if id(parameter) in own])
        ]
        worker.step()

    workers.run(step, [part for part in parts if part])


def require_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that cannot run here, before anything is loaded; it takes a small step.

    Raises:
        UsageError: bitsandbytes is missing, or does nothing on this device.
    """
    if config.optim != "adamw_8bit":
        return
    device = pick_device(config.device)
    otherwise = "or leave optim out; adafactor takes even less memory"
    try:
        probe = torch.nn.Parameter(torch.ones(64, 64, device=device))
        probe.grad = torch.ones_like(probe)
        make_optimizer([("probe", probe)], config).step()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"optim adamw_8bit needs the package bitsandbytes ({error}): pip install bitsandbytes, "
            f"{otherwise}"
        ) from None
    except Exception as error:  # whatever a build without support for the device says
        raise UsageError(
            f"optim adamw_8bit: bitsandbytes cannot take a step on {device} here "
            f"({whole_reason(error)}); install a build of it for this machine, {otherwise}"
        ) from None
    if bool((probe == 1).all()):
        raise UsageError(
            f"optim adamw_8bit: bitsandbytes takes a step on {device} here that changes nothing; "
            f"install a build of it for this machine, {otherwise}"
        )


def optimizer_bytes(parameters: Iterable[torch.Tensor], config: TrainConfig) -> int:
    """Bytes of the optimizer's state after its first step, as a checkpoint holds it."""
    of_one = OPTIMIZERS[config.optim].state_bytes
    return sum(of_one(tuple(p.shape), p.element_size(), config) for p in parameters)


def update_bytes(parameters: Iterable[torch.Tensor], config: TrainConfig) -> int:
    """Bytes that an update needs for a moment, beside gradients and state."""
    return OPTIMIZERS[config.optim].temporaries * max(p.nbytes for p in parameters)


def capture_optimizer(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, torch.Tensor]:
    """The state as tensors named "<key>/<parameter>"; whole numbers as int64."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, int):
                value = torch.tensor(value)
            if value is None or not isinstance(value, torch.Tensor):
                raise TypeError(f"{key} of {name} is {type(value).__name__}, which is not saved")
            tensor = kept_by_first(value).cpu().contiguous()
            address = tensor.untyped_storage().data_ptr()
            # bitsandbytes' code books are one tensor for all parameters, which safetensors refuses.
            found[f"{key}/{name}"] = tensor.clone() if address in seen else tensor
            seen.add(address)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Named, saved: Mapping[str, torch.Tensor]
) -> None:
    """The state becomes what `capture_optimizer` found."""
    for name, parameter in named.items():
        keys = {key.partition("/")[0] for key in saved if key.endswith(f"/{name}")}
        state = {key: _restored(saved[f"{key}/{name}"], parameter) for key in sorted(keys)}
        if state:
            optimizer.state[parameter] = state


def _restored(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor | int:
    if value.dtype == torch.int64 and value.ndim == 0:
        return int(value)
    return shared_out(value.to(parameter.device), parameter)


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Steps that warm up: as asked, else the asked share of all steps, rounded up.

    A share never takes every step: a run of one step would have a learning rate of 0.
    """
    asked: int | None = config.warmup_steps
    return min(math.ceil(config.warmup_ratio * total), total - 1) if asked is None else asked


def decay_steps(config: TrainConfig, total: int) -> int:
    """Steps in which warmup_stable_decay decays: at most those that the warm-up leaves."""
    asked: int | None = config.lr_decay_steps
    if asked is None:
        asked = math.ceil(config.lr_decay_ratio * total)
    return min(asked, max(0, total - warmup_steps(config, total)))


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    Equal to transformers' schedules of the same names (transformers/optimization.py): linear
    warm-up, then constant, linear to 0, half a cosine to 0 or to a lowest rate, or constant until a
    decay at the end. As there, the warm-up of warmup_stable_decay begins at its lowest rate, that
    of the others at 0.
    """
    warmup, low = warmup_steps(config, total), lowest_rate(config)
    kind = config.lr_scheduler_type
    if step < warmup:
        begin = low if kind == "warmup_stable_decay" else 0.0
        return config.learning_rate * _scaled(step / max(1, warmup), begin)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        share = 1.0
    elif kind == "linear":
        share = max(0.0, 1.0 - done)
    elif kind in ("cosine", "cosine_with_min_lr"):
        share = _scaled(_half_cosine(min(done, 1.0)), low)
    else:
        share = _scaled(_decaying(config, step, total), low)
    return config.learning_rate * share


def _decaying(config: TrainConfig, step: int, total: int) -> float:
    """The rate's factor at the end of warmup_stable_decay (Hu et al. 2024, arXiv 2404.06395)."""
    decay = decay_steps(config, total)
    done = min(1.0, (step - (total - decay)) / max(1, decay))
    if done <= 0:
        return 1.0
    if config.lr_decay_type == "linear":
        return 1.0 - done
    return 1.0 - math.sqrt(done) if config.lr_decay_type == "1-sqrt" else _half_cosine(done)


def _half_cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _scaled(share: float, low: float) -> float:
    """A share of the way from `low` to 1."""
    return share * (1.0 - low) + low


class AveragedWeights:
    """An exponential moving average of the policy's weights, which is evaluated and saved.

    After each optimizer step, by torch's own function (torch.optim.swa_utils):

        average ← d · average + (1 - d) · weights,    beginning at the policy's start

    It has the weights' precision. Training goes on with the weights themselves.

    Args:
        parameters: by name, at their start.
        decay: d, between 0 and 1.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        self._parameters = parameters
        self._average = get_ema_multi_avg_fn(decay)
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self) -> None:
        """Take in the weights after a step."""
        weights = [parameter.detach() for parameter in self._parameters.values()]
        self._average(list(self.tensors.values()), weights, None)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the parameters and keep their values; twice, and all is as before.

        One parameter at a time, so that it takes no memory of the model's size.
        """
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Become what was saved."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])

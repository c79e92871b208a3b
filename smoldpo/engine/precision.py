"""Which precision to compute in, found by measuring this machine and not by a name."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from transformers import PreTrainedModel

from smoldpo.engine.kernels.layers import compute_in
from smoldpo.engine.trunk import stays_as_stored
from smoldpo.models.families import unsupported
from smoldpo.utils.memory import keep_freed_memory, letting_go


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """What trainable parameters are kept in: float32, or float64 when computing in float64."""
    return torch.float64 if compute == torch.float64 else torch.float32


WIDE = "lora_magnitude_vector"
"""DoRA's magnitudes, one number a row, scale whole results: they compute in the masters' precision."""


def cast(
    model: torch.nn.Module,
    dtype: torch.dtype,
    leaving: Collection[str] = (),
    beside: torch.nn.Module | None = None,
) -> None:
    """Bring every parameter but WIDE to `dtype`, in place; buffers (rotary frequencies) stay as they are.

    Args:
        leaving: names of parameters that may stay as they are, too: those that products convert.
        beside: a model that was cast so. Of weights that have the same values in both there is one tensor
            behind this; neither may train.
    """
    let_go = letting_go()
    there = dict(beside.named_parameters()) if beside is not None else {}
    for name, parameter in model.named_parameters():
        if name in there and there[name].data_ptr() == parameter.data_ptr():
            continue  # shared before
        before = parameter.data
        after = before if WIDE in name or name in leaving else before.to(dtype)
        if name in there and _says(there[name], after, name in leaving):
            after = there[name].data
        if after is not before:
            parameter.data = after
            let_go(before)


def _says(theirs: torch.Tensor, ours: torch.Tensor, narrower: bool) -> bool:
    """Whether the one holds the other's values, in its dtype or, if that may be, in a narrower one."""
    if theirs.shape != ours.shape or theirs.device != ours.device:
        return False
    exact = narrower and torch.promote_types(theirs.dtype, ours.dtype) == ours.dtype
    return (exact or theirs.dtype == ours.dtype) and torch.equal(theirs.to(ours.dtype), ours)


class MasterWeights:
    """What trains, in float32, beside a model that computes in a narrower dtype.

    The optimizer moves the masters; `publish` rounds them into the model. Gradients of micro-batches are
    added up in the masters' precision. Where the model computes in the masters' own dtype they are the
    model's parameters themselves, and nothing is kept twice.
    """

    def __init__(self, model: torch.nn.Module, compute: torch.dtype, leaving: Collection[str] = ()):
        """`leaving`: as `cast` takes it."""
        self._masters: list[_Master] = []
        full = master_dtype(compute)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                wide = parameter
                if compute != full and WIDE not in name:
                    wide = torch.nn.Parameter(parameter.detach().to(full, copy=True))
                self._masters.append(_Master(name, parameter, wide))
        cast(model, compute, leaving)

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and master parameters."""
        return [(master.name, master.wide) for master in self._masters]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model."""
        for master in self._masters:
            if master.narrow is not master.wide:
                master.narrow.copy_(master.wide)

    def drop_gradients(self) -> None:
        """The masters' with their places, and what an interrupted backward pass left in the model."""
        for master in self._masters:
            master.narrow.grad = master.wide.grad = master.place = None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block gradients add up in the masters' precision; behind it they are theirs."""
        for master in self._masters:
            master.begin()
        hooks = [m.narrow.register_post_accumulate_grad_hook(m.add) for m in self._masters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for master in self._masters:
                master.wide.grad = master.place if master.begun else None


class _Master:
    """A parameter that trains, as the model has it and as the optimizer moves it, and its gradient's place.

    The place stays from step to step. Gradients made anew by each backward pass would lie among what it
    keeps, and the holes between them take memory that nothing uses: 0.9 GB where all of SmolLM2-135M trains.
    """

    def __init__(self, name: str, narrow: torch.nn.Parameter, wide: torch.nn.Parameter):
        self.name, self.narrow, self.wide = name, narrow, wide
        self.place: torch.Tensor | None = None
        self.begun = False
        """Whether the place holds a gradient."""

    def begin(self) -> None:
        """A gradient that is there already is added to."""
        self.begun = self.wide.grad is not None
        if self.begun:
            self.place = self.wide.grad
        elif self.place is None:
            self.place = torch.empty_like(self.wide)
        self.wide.grad = None

    def add(self, narrow: torch.Tensor) -> None:
        """Move what a backward pass found for `narrow` into the place."""
        assert self.place is not None
        gradient, narrow.grad = narrow.grad, None
        if self.begun:
            self.place.add_(gradient)
        else:
            self.place.copy_(gradient)
        self.begun = True


# Models that do not train, such as those that answer, in as little memory as that takes.


def cast_frozen(
    model: PreTrainedModel, dtype: torch.dtype, beside: torch.nn.Module | None = None
) -> PreTrainedModel:
    """Let the whole model compute in `dtype`, in place, and train nothing.

    Matrices of its layers that are stored in a narrower dtype stay so, a part of their file, and each product
    converts what it needs: 7 to 15% of the time of answers side by side, nearly half of one alone, and twice
    that unless freed memory is kept.

    Args:
        beside: another one that is in memory: what has the same values in both is there once.
    """
    model.requires_grad_(False)
    stored = stays_as_stored(model, dtype) if unsupported(model) is None else set()
    cast(model, dtype, stored, beside)
    if compute_in(model, dtype):
        keep_freed_memory()
    return model

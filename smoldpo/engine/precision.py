"""Precisions of weights: masters of those that train, and the compute dtype of the others."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from smoldpo.engine.kernels.layers import compute_in
from smoldpo.models.families import unsupported
from smoldpo.models.mapped_weights import file_page_releaser, names_kept_as_stored
from smoldpo.utils.memory import keep_freed_memory
from smoldpo.utils.workers import AbandonedError

FULL_PRECISION = "lora_magnitude_vector"
"""DoRA's magnitudes, one number a row, scale whole results: computed in master precision."""


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """What trainable parameters are kept in: float32, or float64 when computing in float64."""
    return torch.float64 if compute == torch.float64 else torch.float32


def cast(
    model: torch.nn.Module,
    dtype: torch.dtype,
    keep_dtype: Collection[str] = (),
    share_with: torch.nn.Module | None = None,
) -> None:
    """Convert parameters to `dtype`, in place, except FULL_PRECISION; buffers are not converted.

    Args:
        keep_dtype: names of parameters that stay in their dtype, because products convert them.
        share_with: a frozen model that was cast in the same way. Parameters with equal values
            become its tensors.
    """
    release = file_page_releaser()
    others = dict(share_with.named_parameters()) if share_with is not None else {}
    for name, parameter in model.named_parameters():
        other, before = others.get(name), parameter.data
        if other is not None and other.data_ptr() == before.data_ptr():
            continue  # shared already
        after = before if FULL_PRECISION in name or name in keep_dtype else before.to(dtype)
        if other is not None and _same_values(other, after, name in keep_dtype):
            after = other.data
        if after is not before:
            parameter.data = after
            release(before)


def _same_values(theirs: torch.Tensor, ours: torch.Tensor, narrower: bool) -> bool:
    """Whether `theirs` equals `ours`, in the same dtype or, with `narrower`, in a narrower one."""
    if theirs.shape != ours.shape or theirs.device != ours.device:
        return False
    exact = narrower and torch.promote_types(theirs.dtype, ours.dtype) == ours.dtype
    return (exact or theirs.dtype == ours.dtype) and torch.equal(theirs.to(ours.dtype), ours)


class MasterWeights:
    """Trainable weights in float32 or float64, next to a model that computes in `compute`.

    The optimizer updates the masters; `copy_to_model` rounds them into the model. Gradients of
    streams are added in the masters' precision. Where the model computes in that precision the
    masters are the model's own parameters. `keep_dtype` as for `cast`.
    """

    def __init__(
        self, model: torch.nn.Module, compute: torch.dtype, keep_dtype: Collection[str] = ()
    ):
        self._masters: list[_Master] = []
        self._order = StreamOrder()
        full = master_dtype(compute)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                master = parameter
                if compute != full and FULL_PRECISION not in name:
                    master = torch.nn.Parameter(parameter.detach().to(full, copy=True))
                self._masters.append(_Master(name, parameter, master, self._order))
        cast(model, compute, keep_dtype)

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and master parameters."""
        return [(each.name, each.master) for each in self._masters]

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters into the model's parameters."""
        for each in self._masters:
            if each.compute is not each.master:
                each.compute.copy_(each.master)

    def drop_gradients(self) -> None:
        """Free all gradients and their buffers, those of an interrupted backward pass included."""
        for each in self._masters:
            each.compute.grad = each.master.grad = each.grad_buffer = None

    def leaves(self) -> Leaves:
        """Leaves for the graphs of one worker; to be called when the model has its dtype."""
        return Leaves(self._masters)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """In the block gradients go into buffers; after it the buffers are the masters' `grad`."""
        self._order.begin()
        for each in self._masters:
            each.begin()
        try:
            yield
        finally:
            for each in self._masters:
                each.end()

    def abandon(self) -> None:
        """Let streams that wait for their turn give up."""
        self._order.abandon()


class StreamOrder:
    """The order in which streams add their gradients, whoever has them first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._abandoned = False

    def begin(self) -> None:
        """A new step."""
        self._abandoned = False

    def abandon(self) -> None:
        """No stream will come to its end any more."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def wait(self, master: _Master, stream: int) -> None:
        """Until all streams before this one are done with the parameter.

        Raises:
            AbandonedError: a stream before this one will not come to its end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or master.streams >= stream)
            if self._abandoned:
                raise AbandonedError("a stream before this one was given up")

    def done(self, master: _Master, stream: int) -> None:
        """The stream adds nothing more to the parameter."""
        with self._changed:
            master.streams = stream + 1
            self._changed.notify_all()


class _Master:
    """One trainable parameter: the model's, the optimizer's, and the buffer of its gradient.

    The buffer is kept from step to step. New gradients in each backward pass would fragment the
    heap: 0.9 GB where all of SmolLM2-135M trains.
    """

    def __init__(
        self,
        name: str,
        compute: torch.nn.Parameter,
        master: torch.nn.Parameter,
        order: StreamOrder,
    ):
        self.name, self.compute, self.master, self._order = name, compute, master, order
        self.grad_buffer: torch.Tensor | None = None
        self.has_gradient = False
        self.streams = 0
        """So many streams of the step, from its first, are done with this parameter."""

    def begin(self) -> None:
        """Start with the master's present gradient, if there is one."""
        self.streams = 0
        self.has_gradient = self.master.grad is not None
        if self.has_gradient:
            self.grad_buffer = self.master.grad
        elif self.grad_buffer is None:
            self.grad_buffer = torch.empty_like(self.master)
        self.master.grad = None

    def end(self) -> None:
        """Give the buffer to the master."""
        self.master.grad = self.grad_buffer if self.has_gradient else None

    @contextlib.contextmanager
    def adding(self, stream: int) -> Iterator[tuple[torch.Tensor, bool]]:
        """The buffer when it is the stream's turn, and whether it holds what is to be added to."""
        self._order.wait(self, stream)
        assert self.grad_buffer is not None
        yield self.grad_buffer, self.has_gradient
        self.has_gradient = True
        self._order.done(self, stream)

    def add(self, stream: int, gradient: torch.Tensor) -> None:
        """Add a stream's gradient to the buffer, when it is the stream's turn."""
        with self.adding(stream) as (buffer, holds):
            buffer.add_(gradient) if holds else buffer.copy_(gradient)

    def skip(self, stream: int) -> None:
        """The stream has ended; where it added nothing, the next may."""
        if self.streams <= stream:
            self._order.wait(self, stream)
            self._order.done(self, stream)


class Leaves:
    """A worker's own leaves of the autograd graph: they share their values with the model's.

    Two streams at once that had one leaf would add their gradients to it in any order.

    Attributes:
        parameters: the leaf of each of the model's parameters, by the parameter's id. A leaf's
            `adding` is the context in which a kernel adds the stream's gradient by itself.
    """

    def __init__(self, masters: Sequence[_Master]):
        self._masters = masters
        self._stream = 0
        self.parameters: dict[int, torch.nn.Parameter] = {}
        for each in masters:
            leaf = torch.nn.Parameter(each.compute.detach())
            leaf.register_post_accumulate_grad_hook(partial(self._move, each))
            if each.master.dtype == torch.float32 and each.master.is_contiguous():
                vars(leaf)["adding"] = partial(self._adding, each)
            self.parameters[id(each.compute)] = leaf

    @contextlib.contextmanager
    def stream(self, number: int) -> Iterator[None]:
        """In the block the worker's gradients are those of the step's stream of this number."""
        self._stream = number
        try:
            yield
            for each in self._masters:
                each.skip(number)
        finally:
            for leaf in self.parameters.values():
                leaf.grad = None

    def _adding(self, master: _Master) -> contextlib.AbstractContextManager[Any]:
        return master.adding(self._stream)

    def _move(self, master: _Master, leaf: torch.Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:  # else a kernel has added it by itself
            master.add(self._stream, gradient)


def cast_frozen(
    model: PreTrainedModel, dtype: torch.dtype, share_with: torch.nn.Module | None = None
) -> PreTrainedModel:
    """Freeze the whole model and let it compute in `dtype`, in place, with little extra memory.

    Layers' matrices that are stored in a narrower dtype stay mapped from their file, and each
    product converts what it needs: 7 to 15% of the time of answers side by side, nearly half of
    one alone, and twice that unless freed memory is kept.

    Args:
        share_with: as for `cast`.
    """
    model.requires_grad_(False)
    stored = names_kept_as_stored(model, dtype) if unsupported(model) is None else set()
    cast(model, dtype, stored, share_with)
    if compute_in(model, dtype):
        keep_freed_memory()
    return model

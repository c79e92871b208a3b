"""Work of a small model's layer, by native kernels or by torch: to compare results and times."""

from __future__ import annotations

import torch

from smoldpo.engine.kernels import layers
from smoldpo.engine.kernels.attention import pair_attention
from smoldpo.engine.kernels.lm_head import completion_logps
from smoldpo.engine.kernels.native.functions import AttentionFunction, GatedMLPFunction
from smoldpo.engine.kernels.native.library import Library
from smoldpo.engine.layout import Layout, Segment

TOLERANCE = 0.03
"""Largest relative difference to torch's results: bfloat16 alone makes 0.005."""


class LayerWork:
    """Attention, MLP and LM head of SmolLM2-135M's shape on random numbers, 256 tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            drawn = torch.randn(*shape, generator=generator) * scale
            return drawn.bfloat16().requires_grad_()

        self._heads = [random(1, 256, count, 64).transpose(1, 2) for count in (9, 3, 3)]
        self._layout = Layout.of([Segment(0, 128, 64, 50)], torch.zeros(256, dtype=torch.long))
        self._states = random(256, 576)
        self._mlp = [random(1536, 576, scale=0.04) for _ in range(2)]
        self._mlp.append(random(576, 1536, scale=0.04))
        self._head = random(2048, 576, scale=0.04).detach()
        self._targets = torch.arange(256)

    def results(self, native: Library | None) -> list[torch.Tensor]:
        """Results and gradients."""
        layout = self._layout
        if native is None:
            query, key, value = self._heads
            attended = pair_attention(query, key, value, 0.125, layout, None, False, True)
            inner = layers.apply(layers.GatedMLPFunction, self._states, *self._mlp, True, 256)
        else:
            attended = layers.apply(AttentionFunction, native, *self._heads, 0.125, layout, False)
            inner = layers.apply(GatedMLPFunction, native, self._states, *self._mlp, True)
        logps = completion_logps(self._states, self._head, self._targets, True, native)
        outputs = [attended, inner, logps]
        inputs = [*self._heads, self._states, *self._mlp]
        loss = sum((output.float().square().sum() for output in outputs), torch.zeros(()))
        return [*(each.detach() for each in outputs), *torch.autograd.grad(loss, inputs)]

    def difference(self, native: Library) -> float:
        """The largest relative difference between native and torch's results; NaN counts as it."""
        pairs = zip(self.results(native), self.results(None), strict=True)
        return max(
            float(((ours - theirs).float().norm() / theirs.float().norm()).nan_to_num(torch.inf))
            for ours, theirs in pairs
        )

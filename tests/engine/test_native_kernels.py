"""The native kernels one by one: as near to float32 as torch's functions, and a row by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smoldpo.engine.kernels import attention, layers, lm_head
from smoldpo.engine.kernels.native import functions
from smoldpo.engine.kernels.native.functions import AttentionFunction
from smoldpo.engine.kernels.native.library import load, supported
from smoldpo.engine.kernels.native_layers import rotary
from smoldpo.engine.layout import Layout, Segment

SUPPORTED = supported()
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no AVX-512 with bfloat16 here")


@pytest.fixture(scope="module", params=SUPPORTED)
def native(request):
    """Compiled once on a machine, in the cache folder of its user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME", raising=False)
        return load(request.param)


def error(found, expected):
    return float((found.detach().float() - expected).norm() / expected.norm())


def assert_as_near(ours, theirs, exact):
    """Each of our results errs no more than torch's, but for luck where it is few numbers."""
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        expected = true.detach().float()
        luck = 1.03 if expected.numel() > 1000 else 1.2
        assert error(mine, expected) < luck * error(other, expected) + 1e-6


def layout_of(pairs, shared=0):
    segments, at = [], shared
    for pair in pairs:
        segments.append(Segment(at, *pair))
        at += segments[-1].length
    return Layout.of(segments, torch.zeros(-(-at // 64) * 64, dtype=torch.long)), at


STREAMS = {
    "two pairs": ([(145, 52, 48), (130, 61, 40)], 0, False),
    "short and odd": ([(1, 1, 1), (33, 31, 2), (5, 64, 64), (32, 32, 32)], 0, False),
    "rows that are read": ([(145, 52, 48), (130, 61, 40), (1, 1, 1)], 0, True),
    "a shared beginning": ([(90, 52, 48, 37), (40, 3, 5, 37), (38, 70, 1, 37)], 37, False),
    "shared and read": ([(90, 52, 48, 70), (80, 3, 5, 0), (71, 70, 1, 70)], 70, True),
    "longer than a part": ([(600, 90, 40)], 0, False),
}


@pytest.mark.parametrize("heads, width", [((9, 3), 64), ((4, 4), 32), ((4, 2), 128)])
@pytest.mark.parametrize("stream", STREAMS)
def test_attention(native, stream, heads, width):
    pairs, shared, read = STREAMS[stream]
    if width != 64 and stream == "longer than a part":
        pytest.skip("once is enough")
    layout, real = layout_of(pairs, shared)
    torch.manual_seed(0)
    tokens, (many, few) = len(layout.position), heads
    states = [torch.randn(1, tokens, n, width).bfloat16().transpose(1, 2) for n in (many, few, few)]
    grad = torch.randn(1, tokens, many, width).bfloat16()
    wanted = torch.zeros(tokens)
    wanted[: real if not read else 0] = 1
    for segment in layout.segments if read else ():
        end = segment.start + segment.length
        wanted[end - segment.chosen - segment.rejected - 1 : end] = 1
    grad *= wanted[None, :, None, None].bfloat16()

    def results(function, dtype):
        inputs = [each.to(dtype).requires_grad_() for each in states]
        result = function(*inputs)
        grads = torch.autograd.grad(result, inputs, grad.to(dtype))
        return [result * wanted[None, :, None, None], *grads]

    def theirs(*inputs):
        return attention.pair_attention(*inputs, width**-0.5, layout, None, read, False)

    def ours(*inputs):
        return AttentionFunction.apply(native, *inputs, width**-0.5, layout, read)

    found = results(ours, torch.bfloat16)
    assert_as_near(found, results(theirs, torch.bfloat16), results(theirs, torch.float32))
    assert all(not each.transpose(1, 2)[0, real:].any() for each in found[1:]), "padding"


def test_a_pairs_attention_depends_on_that_pair_alone(native):
    torch.manual_seed(0)
    pair = (45, 52, 48)
    states = [torch.randn(1, 145, n, 64).bfloat16() for n in (9, 3, 3, 9)]
    found = []
    for others in ([], [(130, 61, 40)], [(1, 2, 3), (700, 5, 5)]):
        layout, _ = layout_of([*others, pair])
        start = layout.segments[-1].start
        stream = [torch.randn(1, len(layout.position), n, 64).bfloat16() for n in (9, 3, 3, 9)]
        for all_rows, own in zip(stream, states, strict=True):
            all_rows[:, start : start + 145] = own
        inputs = [each.transpose(1, 2).requires_grad_() for each in stream[:3]]
        result = AttentionFunction.apply(native, *inputs, 0.125, layout, False)
        grads = torch.autograd.grad(result, inputs, stream[3])
        by_token = [result, *(each.transpose(1, 2) for each in grads)]
        found.append([each[0, start : start + 145].detach() for each in by_token])
    for other in found[1:]:
        assert all(torch.equal(*both) for both in zip(found[0], other, strict=True))


def random(*shape, scale=0.05, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def layer_results(native, dtype, rows, states, grad, size=(96, 160)):
    """Norm, MLP, a linear layer with a bias and rotation, and all their gradients."""
    width, inner = size
    shapes = [(width,), (inner, width), (inner, width), (width, inner), (64, width), (64,)]
    weights = [
        random(*shape, seed=seed, scale=1.0 if len(shape) == 1 else 0.1).to(dtype).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]
    norm, *mlp, linear, bias = weights
    states = states[rows].clone().requires_grad_()
    halves = (random(1, 1000, 16, scale=1.0, seed=s).float()[:, rows] for s in (7, 8))
    cos, sin = (torch.cat([half, half], -1) for half in halves)
    if native is None:
        normed = layers.RMSNormFunction.apply(states, norm, 1e-5)
        inside = layers.GatedMLPFunction.apply(normed, *mlp, True, 256)
        after = layers.LinearFunction.apply(normed, linear, bias, 256)
        turn = layers.rotary
    else:
        normed = functions.RMSNormFunction.apply(native, states, norm, 1e-5)
        inside = functions.GatedMLPFunction.apply(native, normed, *mlp, True)
        after = functions.LinearFunction.apply(native, normed, linear, bias)
        turn = lambda *angles: rotary(native, *angles)  # noqa: E731
    heads = after.view(1, len(after), 2, 32).transpose(1, 2)
    turned, _ = turn(heads, heads, cos, sin)
    outputs = [normed, inside, turned]
    grads = [grad[rows].to(dtype), grad[rows].to(dtype)]
    grads.append(grad[rows][:, :64].reshape(1, -1, 2, 32).transpose(1, 2).to(dtype))
    return outputs, torch.autograd.grad(outputs, [states, *weights], grads)


def test_a_layers_parts(native):
    states, grad = random(700, 96, scale=1.0, seed=20).float(), random(700, 96, scale=1.0, seed=21)
    rows = slice(0, 683)  # no multiple of anything
    results = [
        layer_results(*how, rows, states, grad)
        for how in ((native, torch.bfloat16), (None, torch.bfloat16), (None, torch.float32))
    ]
    assert_as_near(*([*outputs, *grads] for outputs, grads in results))


def test_a_row_depends_on_that_row_alone(native):
    states, grad = random(700, 96, scale=1.0, seed=20).float(), random(700, 96, scale=1.0, seed=21)
    found = layer_results(native, torch.bfloat16, slice(0, 700), states, grad)
    for rows in (slice(0, 1), slice(5, 300), slice(299, 699)):
        part = layer_results(native, torch.bfloat16, rows, states, grad)
        for whole, few in zip(found[0][:2], part[0][:2], strict=True):
            assert torch.equal(whole[rows], few)
        assert torch.equal(found[0][2][:, :, rows], part[0][2])
        assert torch.equal(found[1][0][rows], part[1][0]), "gradient of states"


@pytest.mark.parametrize("words, rows", [(1000, 7), (1024, 96), (33, 64)])
def test_the_head(native, words, rows):
    weight, states = random(words, 96, scale=0.5), random(rows, 96, scale=1.0, seed=1)
    targets = torch.randint(words, (rows,), generator=torch.Generator().manual_seed(2))
    targets[0] = words - 1

    def results(dtype, **how):
        inputs = states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        logps = lm_head.completion_logps(*inputs, targets, **how)
        return [logps, *torch.autograd.grad(logps, inputs, torch.linspace(0.5, 2, rows))]

    ours, theirs = (results(torch.bfloat16, **how) for how in ({"native": native}, {"fused": True}))
    assert_as_near(ours, theirs, results(torch.float64))
    alone = lm_head.completion_logps(states[3:4], weight, targets[3:4], native=native)
    assert torch.equal(alone, ours[0][3:4])


def test_the_head_where_the_target_is_nearly_impossible(native):
    """Beyond exp's range, and beside rows that are not."""
    weight, states = random(64, 32, scale=1.0), random(5, 32, scale=1.0, seed=1)
    states[:3] *= 40
    targets = (states.float() @ weight.float().T).argmin(1)
    found = {}
    for name, how in {"ours": {"native": native}, "products": {}}.items():
        inputs = states.clone().requires_grad_()
        logps = lm_head.completion_logps(inputs, weight, targets, **how)
        found[name] = logps.detach(), torch.autograd.grad(logps.sum(), inputs)[0]
    exact = torch.log_softmax(states.double() @ weight.double().T, -1)
    exact = exact.gather(1, targets[:, None])[:, 0]
    assert (exact[:3] < lm_head.FAR).all() and (exact[3:] > lm_head.FAR).all()
    assert torch.allclose(found["ours"][0].double(), exact, rtol=5e-3)
    torch.testing.assert_close(found["ours"][1], found["products"][1], rtol=0.02, atol=0.02)


def test_nothing_is_read_or_written_beyond_a_buffer():
    """In a child, which a fault ends; see native_borders.py."""
    program = Path(__file__).with_name("native_borders.py")
    environment = {name: v for name, v in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    asked = [sys.executable, str(program), SUPPORTED[0]]
    ended = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, (ended.returncode, ended.stderr[-2000:])
    assert "nothing beyond the borders" in ended.stdout

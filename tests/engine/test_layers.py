"""The parts with closed-form backwards against autograd through the textbook's formulas, in
float64.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from smoldpo.engine.batching import saved_for_backward
from smoldpo.engine.kernels import attention, layers
from smoldpo.engine.kernels.layers import rows_product

WIDTH, INSIDE = 6, 10
EPSILON = 1e-3


def norm(states, weight):
    mean = states.pow(2).mean(-1, keepdim=True)
    return states / (mean + EPSILON).sqrt() * weight


def mlp(states, gate, up, down):
    raised = states @ gate.T
    return (raised * torch.sigmoid(raised) * (states @ up.T)) @ down.T


def linear(states, weight, bias=None):
    return states @ weight.T + (0 if bias is None else bias)


def rotated(states, cos, sin):
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


def angles(tokens):
    angle = torch.outer(torch.arange(tokens).double(), torch.tensor([1.0, 0.3, 0.01]).double())
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.empty(WIDTH)), EPSILON


class Gated(nn.Module):
    def __init__(self, activation, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INSIDE, bias=bias)
        self.up_proj = nn.Linear(WIDTH, INSIDE, bias=bias)
        self.down_proj = nn.Linear(INSIDE, WIDTH, bias=bias)
        self.act_fn = activation


class Part:
    """A module's own copy, as a function of its states and weights; and the same by the
    textbook.
    """

    def __init__(self, module, textbook):
        module = layers.own_modules(module, rows=4)
        names = [name for name, _ in module.named_parameters()]
        self.weights = [tuple(parameter.shape) for parameter in module.parameters()]
        self.textbook = textbook
        self.ours = lambda states, *weights: functional_call(
            module, dict(zip(names, weights, strict=True)), states
        )


class Rotation:
    """The rotary embedding, of queries alone."""

    weights = ()

    @staticmethod
    def ours(states):
        return layers.rotary(states, states.detach(), *angles(states.shape[-2]), unsqueeze_dim=0)[0]

    @staticmethod
    def textbook(states):
        return rotated(states, *angles(states.shape[-2]))


PARTS = {
    "norm": Part(RMSNorm(), norm),
    "mlp": Part(Gated(nn.SiLU()), mlp),
    "linear": Part(nn.Linear(WIDTH, INSIDE, bias=False), linear),
    "linear with bias": Part(nn.Linear(WIDTH, INSIDE), linear),
    "rotary": Rotation,
}
CASES = [
    (name, trains)
    for name, part in PARTS.items()
    for trains in itertools.product([True, False], repeat=1 + len(part.weights))
    if any(trains)
]
SHAPES = [(1, 11, WIDTH), (1, 4, WIDTH), (2, 5, WIDTH), (1, 1, WIDTH)]
"""Rows: not a multiple of a block's, one block, several batches, one row."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, request):
    if "rows" not in request.node.name:
        monkeypatch.setattr(layers, "ROWS", 4)


def inputs(part, shape, trains=None):
    generator = torch.Generator().manual_seed(0)
    trains = trains or [True] * (1 + len(part.weights))
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_(train)
        for size, train in zip((shape, *part.weights), trains, strict=True)
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, trains", CASES)
def test_values_and_gradients_are_the_textbooks(name, trains, shape):
    part = PARTS[name]
    ours, theirs = inputs(part, shape, trains), inputs(part, shape, trains)
    found, expected = part.ours(*ours), part.textbook(*theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.cos(torch.arange(found.numel()).double()).view_as(found)
    # What autograd gets from this very part: where nothing trains, nothing is computed.
    with torch.no_grad():
        given = found.grad_fn.apply(slope)
    given = given if isinstance(given, tuple) else (given,)
    expected.backward(slope)
    for index, (gradient, leaf) in enumerate(zip(given, theirs, strict=False)):
        if leaf.requires_grad:
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)
        elif index:  # a weight; the MLP's states always have a gradient
            assert gradient is None


@pytest.mark.parametrize("name", PARTS)
def test_gradients_are_those_of_the_values(name):
    part = PARTS[name]
    assert torch.autograd.gradcheck(part.ours, inputs(part, (2, 5, WIDTH)))


@pytest.mark.parametrize("name", PARTS)
def test_values_are_equal_where_nothing_trains(name):
    part = PARTS[name]
    frozen = part.ours(*inputs(part, (1, 11, WIDTH), [False] * (1 + len(part.weights))))
    assert not frozen.requires_grad
    assert torch.equal(frozen, part.ours(*inputs(part, (1, 11, WIDTH))))
    with torch.no_grad():
        assert torch.equal(frozen, part.ours(*inputs(part, (1, 11, WIDTH))))


def test_the_norms_sum_over_squares_of_bfloat16_is_wide():
    states = torch.randn(9, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = layers.own_modules(RMSNorm())
    found = functional_call(module, {"weight": torch.ones(512).bfloat16()}, states)
    expected = norm(states.double(), torch.ones(512).double()).bfloat16()
    # One rounding to bfloat16; a sum in bfloat16 would be off in most places.
    assert (found == expected).double().mean() > 0.99


def test_a_models_own_modules_compute_the_same_function(tiny_model):
    ids = torch.arange(40).view(2, 20)
    found = []
    own = layers.own_modules(tiny_model.model)
    assert own.config._attn_implementation == attention.NAME
    own.config._attn_implementation = tiny_model.config._attn_implementation
    for base in (tiny_model.model, own):
        tiny_model.zero_grad()
        states = base(ids).last_hidden_state
        states.square().sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in tiny_model.parameters())])
    ours = {type(module).__name__ for module in own.modules()} & set(vars(layers))
    assert ours == {"Linear", "RMSNorm", "GatedMLP"}
    # transformers' norm rounds to float32 on its way.
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_weight_is_widened_and_never_narrowed():
    """A frozen one may lie in a narrower dtype; one that is wider than what goes in is a
    mistake.
    """
    torch.manual_seed(0)
    for part in (nn.Linear(WIDTH, WIDTH, bias=False), Gated(nn.SiLU())):
        part = layers.own_modules(part)
        states = torch.randn(3, WIDTH)
        with torch.no_grad():
            part.bfloat16()
            narrow = part(states)
            assert narrow.dtype == torch.float32
            part.float()
            assert torch.equal(narrow, part(states))
            with pytest.raises(RuntimeError, match="dtype"):
                part(states.bfloat16())


def test_an_mlp_of_another_kind_is_left_alone():
    base = nn.ModuleList([Gated(nn.SiLU()), Gated(nn.GELU()), Gated(nn.SiLU(), bias=True)])
    assert [type(part) for part in layers.own_modules(base)] == [layers.GatedMLP, Gated, Gated]


SHAPES = [(576, 192), (576, 1536), (1536, 576)]
BLOCKS = [(1, 512), (3, 512), (2, 1920)]


@pytest.mark.parametrize(
    "dtype, width, inside, threads, rows",
    [
        (torch.float32 if (one + other) % 2 else torch.bfloat16, *shape, *block)
        for one, shape in enumerate(SHAPES)
        for other, block in enumerate(BLOCKS)
    ],
    ids=str,
)
def test_rows_are_as_if_each_were_alone(dtype, width, inside, threads, rows):
    """In SmolLM2-135M's shapes: whatever stands beside a row, before or behind it, no bit
    changes.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2 * rows, width, generator=generator).to(dtype)
    weight = torch.randn(inside, width, generator=generator).to(dtype)
    whole = rows_product(states, weight, rows)
    torch.testing.assert_close(
        whole.float(), states.float() @ weight.float().T, rtol=0.02, atol=0.2
    )
    for count in (1, 31, 33, 500, rows - 1, rows, rows + 1, 2 * rows - 1):
        assert torch.equal(rows_product(states[:count], weight, rows), whole[:count]), count
        assert torch.equal(rows_product(states[-count:], weight, rows), whole[-count:]), count


@pytest.mark.parametrize("trains", [False, True])
def test_states_are_kept_only_for_a_gradient_of_the_weights(trains):
    linear, gated = nn.Linear(WIDTH, WIDTH, bias=False), Gated(nn.SiLU())
    for part, always in ((linear, 0), (gated, 2 * INSIDE)):
        part.double().requires_grad_(trains)
        part = layers.own_modules(part)
        states = torch.randn(1, 8, WIDTH, dtype=torch.float64, requires_grad=True)
        kept = saved_for_backward(lambda part=part, x=states: part(x), part.parameters())
        assert kept == 8 * 8 * (always + trains * WIDTH)

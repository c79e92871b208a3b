"""What a backward pass keeps, by hand; and a budget that fits."""

import gc

import pytest
import torch

from faults.test_micro_batches import PAIRS, engine_of
from smoldpo.engine.batch_budget import MARGIN, RESERVE, fit_budget
from smoldpo.engine.batching import saved_for_backward
from smoldpo.utils import memory
from smoldpo.utils.errors import OutOfMemoryError


def living_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_what_is_kept_by_hand():
    weight = torch.nn.Parameter(torch.ones(100, 100))
    given = torch.ones(10, 100, requires_grad=True)

    def work():
        product = given @ weight  # keeps `given`: 10 x 100 floats; the weight is not counted
        return product.exp().mul(product).sum()  # keeps exp's result, and the product

    assert saved_for_backward(work, [weight]) == 3 * 10 * 100 * 4
    assert saved_for_backward(work, []) == 3 * 10 * 100 * 4 + 100 * 100 * 4


@pytest.mark.parametrize("kind, size", [("plain", 8), ("fast", 4000)])
def test_nothing_stays_of_what_was_counted(tiny_model, kind, size):
    """A graph whose nodes hold what they give out is freed by nothing, the garbage collector
    included.
    """
    engine = engine_of(tiny_model, kind, size)
    engine.prepare(PAIRS)
    before = living_tensors()
    for _ in range(3):
        engine.backward_bytes(PAIRS, 8)
    assert living_tensors() <= before


@pytest.mark.parametrize("kind, size", [("plain", 8), ("fast", 4000)])
def test_one_pair_tells_of_many(tiny_model, kind, size):
    """The estimate from the longest pair is no less than what a whole step keeps, and not far from
    it.
    """
    engine = engine_of(tiny_model, kind, size)
    longest = max(PAIRS, key=lambda pair: pair.longest)
    pairs = [longest] * 8
    engine.prepare(pairs)
    _, most = engine.backward_bytes(pairs, 8)
    kept = saved_for_backward(lambda: engine._forward_policy(pairs), engine.policy.parameters())
    assert 0.7 * most < kept < MARGIN * most


@pytest.mark.parametrize("kind, size", [("plain", 8), ("fast", 4000)])
def test_the_budget_is_halved_until_a_step_fits(tiny_model, kind, size, capsys):
    engine = engine_of(tiny_model, kind, size)
    engine.prepare(PAIRS)
    one, most = engine.backward_bytes(PAIRS, 8)
    assert fit_budget(engine, PAIRS, 8, 1000, RESERVE + 1000 + int(MARGIN * most) + 1) == one
    assert engine.budget == size and "memory" not in capsys.readouterr().err
    fit_budget(engine, PAIRS, 8, 1000, RESERVE + 1000 + int(MARGIN * most) - 1)
    assert engine.budget < size and "memory" in capsys.readouterr().err
    fit_budget(engine, PAIRS, 8, 0, RESERVE + one)  # just about: one pair at once
    assert engine.backward_bytes(PAIRS, 8)[1] < 2 * one
    with pytest.raises(OutOfMemoryError, match=r"not enough memory .* 1,000 bytes"):
        fit_budget(engine, PAIRS, 8, 1000, RESERVE + 1000 + one - 1)


def test_a_container_has_a_limit_of_its_own(tmp_path):
    assert memory._left_in_container(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory._left_in_container(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_container(tmp_path) == float("inf")

"""Fault 9: however a step is cut, ragged last groups too, its gradients are the same within 1e-10
(float64).

For the fast engine see equivalence/test_fast_engine.py::test_any_cut_into_streams; for whole
trainings test_trainer.py::test_training_does_not_depend_on_the_micro_batch. Here: the plain engine,
and both engines after memory ran out.
"""

import copy

import pytest
import torch

from smoldpo.config.load import build_config
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.batch_budget import retry_with_smaller_budget, with_memory_errors
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights
from smoldpo.losses import Objective
from smoldpo.training.state import TrainingState
from smoldpo.types import TokenizedPair
from smoldpo.utils.errors import OutOfMemoryError

PAIRS = [
    TokenizedPair(f"p{n}", (5, n + 10), tuple(range(20, 22 + n)), (n + 40, 41, 2)) for n in range(8)
]
LOSS = Objective.of(beta=0.3, options={"label_smoothing": 0.1})


def engine_of(model, kind, size):
    policy = copy.deepcopy(model)
    if kind == "plain":
        return PlainEngine(
            policy,
            copy.deepcopy(model),
            EngineSettings(compute_dtype=torch.float64, train_batch_size=size, eval_batch_size=8),
        )
    engine = FastEngine(
        policy, MasterWeights(policy, torch.float64), settings=EngineSettings(stream_tokens=size)
    )
    engine.prepare(PAIRS)
    return engine


def gradients(engine):
    return {name: p.grad.clone() for name, p in engine.trainable_parameters()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = (gradient - theirs[name]).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 1e-10, name


@pytest.mark.parametrize("pairs", [8, 7, 3])
@pytest.mark.parametrize("size", [4, 3, 1])
def test_the_plain_engine(tiny_model, pairs, size):
    whole, cut = (engine_of(tiny_model, "plain", n) for n in (8, size))
    found = [engine.accumulate_gradients(PAIRS[:pairs], LOSS) for engine in (whole, cut)]
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert_same(gradients(whole), gradients(cut))


@pytest.mark.parametrize("kind, size", [("plain", 8), ("fast", 400)])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_after_memory_ran_out_in_the_middle(tiny_model, monkeypatch, kind, size, error):
    """What the failed attempt added up is not added again."""
    whole, starved = (engine_of(tiny_model, kind, size) for _ in range(2))
    whole.accumulate_gradients(PAIRS, LOSS)
    left = [3]  # attempts that fail, each after its first micro-batch

    def runs_out(units):
        if left[0]:
            left[0] -= 1
            raise error

    found = retry_with_smaller_budget(
        lambda: starved.accumulate_gradients(PAIRS, LOSS, runs_out), starved, PAIRS, "step 1"
    )
    assert not left[0] and starved.budget == size // 8 and len(found[0]) == 8
    assert_same(gradients(whole), gradients(starved))


@pytest.mark.parametrize("kind, size", [("plain", 8), ("fast", 400)])
def test_it_gives_up_below_one_pair(tiny_model, kind, size):
    engine = engine_of(tiny_model, kind, size)

    def never(units):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with pytest.raises(OutOfMemoryError, match=r"with one pair at once .*1 GiB.*--max-length"):
        retry_with_smaller_budget(
            lambda: engine.accumulate_gradients(PAIRS, LOSS, never), engine, PAIRS, "step 1"
        )


@pytest.mark.parametrize(
    "error, is_it",
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
            True,
        ),
        (
            RuntimeError("MPS backend out of memory. Tried to allocate 8 bytes on private pool."),
            True,
        ),
        (RuntimeError("the memory format is not supported"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_is_taken_for_it(error, is_it):
    def failing():
        raise error

    with pytest.raises(OutOfMemoryError if is_it else type(error)) as found:
        with_memory_errors(failing)
    if is_it:
        assert found.value.__context__ is None, "it would hold what the attempt held"
    else:
        with pytest.raises(type(error)):
            retry_with_smaller_budget(failing, None, [], "a test")


@pytest.mark.parametrize("kind, size", [("plain", 8), ("fast", 400)])
def test_a_run_that_goes_on_tries_no_more_at_once_than_fitted(tiny_model, kind, size):
    before, after = (
        TrainingState(engine_of(tiny_model, kind, size), build_config({})) for _ in range(2)
    )
    assert before.engine.halve_budget(PAIRS) and before.engine.budget == size // 2
    after.restore(before.capture())
    assert after.engine.budget == size // 2

"""However many threads compute, the bits are the same: of losses, log-probabilities, gradients and
weights, whatever trains, whichever stream is first done, and after a stream failed.
"""

import sys
import threading
import time
from collections import Counter

import pytest
import torch
from test_fast_engine import PAIRS, SHARING, build

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.batch_budget import retry_with_smaller_budget
from smoldpo.engine.build import build_engine
from smoldpo.losses import Objective
from smoldpo.models.adapters import AdapterSettings, add_adapters
from smoldpo.models.freeze import freeze
from smoldpo.models.generate import generate_answers
from smoldpo.training.optim import make_optimizer, step_by_parts
from smoldpo.utils.threads import torch_threads

THREADS = (1, 2, 3, 4, 8)
MANY = [*SHARING, *PAIRS]
"""Pairs of several lengths, some with a beginning in common: several streams."""
TRAINED = {
    "two layers": lambda model: freeze(model, LayerSelection(2)),
    "everything": lambda model: freeze(model, LayerSelection(0)),
    "LoRA": lambda model: adapt(model, use_dora=False),
    "DoRA": lambda model: adapt(model, use_dora=True),
}
LOSSES = {
    "sigmoid": Objective.of(beta=0.3),
    "whole step": Objective.of(["aot"], beta=0.3),
    "two at once": Objective.of(["sigmoid", "sft"], [1.0, 0.2], beta=0.3),
    "no reference": Objective.of(["simpo"], beta=2.0),
}


def adapt(model, use_dora):
    add_adapters(
        model,
        AdapterSettings(
            lora_r=2,
            lora_alpha=4,
            lora_target_modules=("q_proj", "up_proj", "down_proj"),
            use_dora=use_dora,
            use_rslora=False,
            layers=LayerSelection(1),
            seed=3,
        ),
        torch.float32,
    )


def engine_of(threads, trained="two layers", loss="sigmoid", dtype=torch.float32, **settings):
    """A fast engine whose pairs make up many streams."""
    model = build("llama")
    TRAINED[trained](model)
    told = {"cache": "memory", "stream_tokens": 45} | settings
    needs = LOSSES[loss].needs_reference
    with torch_threads(threads):
        return build_engine(
            model,
            None,
            EngineSettings(compute_dtype=dtype, needs_reference=needs, **told),
            reference_sha256=f"{trained} {threads}",  # nothing is found of an engine before
        ).engine


def steps(engine, loss, count=3):
    """What some optimizer steps give, and the weights after them."""
    found = (
        [] if not LOSSES[loss].needs_reference else [*engine.reference_logps(MANY).sums.values()]
    )
    optimizer = make_optimizer(engine.trainable_parameters(), build_config({}))
    for number in range(count):
        result = engine.accumulate_gradients(MANY, LOSSES[loss])
        found += [result.losses, *result.policy.sums.values()]
        found += [p.grad.clone() for _, p in engine.trainable_parameters()]
        step_by_parts(optimizer, engine.workers)
        optimizer.zero_grad()
        engine.updated()
        if engine.synced_reference is not None and number == 0:
            engine.synced_reference.sync(0.5)
    found += [*engine.policy_logps(MANY).sums.values()]
    return found + [p.detach().clone() for _, p in engine.trainable_parameters()]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number


def assert_threads_do_not_matter(threads, **how):
    loss = how.get("loss", "sigmoid")
    engine = engine_of(threads, **how)
    assert engine.workers.count == threads
    assert len(engine.batching.step_batches(MANY)) > 4
    with torch_threads(threads):
        found = steps(engine, loss)
    assert_same_bits(found, steps(engine_of(1, **how), loss))


@pytest.mark.parametrize("threads", THREADS[1:])
def test_any_number_of_threads(threads):
    assert_threads_do_not_matter(threads)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_trains(trained, dtype):
    assert_threads_do_not_matter(3, trained=trained, dtype=dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_kind_of_loss(loss):
    assert_threads_do_not_matter(4, loss=loss, trained="everything")


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_a_moving_reference(cache):
    assert_threads_do_not_matter(3, cache=cache, sync_ref_model=True)


def test_squares():
    assert_threads_do_not_matter(2, use_weighting=True)


class CountedLock:
    """A lock that notes which function of ours takes it in a worker."""

    def __init__(self, lock, taken):
        self._lock, self._taken = lock, taken

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self._lock.release()

    def acquire(self, *args, **options):
        frame = sys._getframe(1)
        while frame and not frame.f_globals["__name__"].startswith("smoldpo"):
            frame = frame.f_back
        if frame and threading.current_thread() is not threading.main_thread():
            self._taken[frame.f_code.co_qualname] += 1
        return self._lock.acquire(*args, **options)

    def __getattr__(self, name):
        return getattr(self._lock, name)


def test_a_stream_takes_no_lock_but_for_stores_and_where_its_gradients_are_added(monkeypatch):
    """However many layers it goes through: so nothing but the order of sums holds a worker up."""
    taken = Counter()
    for kind in ("Lock", "RLock"):
        made = getattr(threading, kind)
        monkeypatch.setattr(threading, kind, lambda made=made: CountedLock(made(), taken))
    engine = engine_of(2)
    engine.reference_logps(MANY)
    streams = len(engine.batching.forward_batches(MANY))
    next_stream = {"_Batch._begin": streams + 2, "_Batch._work_on": streams}
    stores = {"FastEngine._states_of": 2 * streams, "FastEngine._put_reference": streams}
    assert taken == next_stream | stores
    taken.clear()
    engine.accumulate_gradients(MANY, LOSSES["sigmoid"])
    streams = len(engine.batching.step_batches(MANY))
    sums = streams * len([*engine.trainable_parameters()])
    next_stream = {"_Batch._begin": streams + 2, "_Batch._work_on": streams}
    stores = {"FastEngine._states_of": streams}
    assert taken == next_stream | stores | {"StreamOrder.wait": sums, "StreamOrder.done": sums}


def late(engine, monkeypatch, streams):
    """Let some streams of each step come to their backward pass much later than others."""
    policy_of, seen = engine._policy_of, []

    def slow(worker, pairs):
        logps = policy_of(worker, pairs)
        number = len(seen)
        seen.append(worker)
        if torch.is_grad_enabled() and number in streams:
            time.sleep(0.15)
        return logps

    monkeypatch.setattr(engine, "_policy_of", slow)
    return seen


@pytest.mark.parametrize("streams", [(0,), (0, 1, 3)])
def test_whichever_stream_is_done_first(monkeypatch, streams):
    engine, alone = engine_of(4), engine_of(1)
    seen = late(engine, monkeypatch, streams)
    assert_same_bits(steps(engine, "sigmoid", 1), steps(alone, "sigmoid", 1))
    assert len(set(seen)) > 1, "several workers had streams"


def test_a_stream_that_fails_ends_the_step_and_names_its_pairs(monkeypatch):
    """The others, which wait for their turn behind it, end too; the next step is right."""
    engine, alone = engine_of(4), engine_of(1)
    first = engine.batching.step_batches(MANY)[0]
    with monkeypatch.context() as patch:
        policy_of = engine._policy_of

        def failing(worker, pairs):
            if list(pairs) == list(first):
                time.sleep(0.1)  # until the others wait
                raise ValueError("a kernel failed")
            return policy_of(worker, pairs)

        patch.setattr(engine, "_policy_of", failing)
        with pytest.raises(ValueError, match="a kernel failed") as caught:
            engine.accumulate_gradients(MANY, LOSSES["sigmoid"])
    assert all(pair.id in caught.value.__notes__[0] for pair in first)
    engine.drop_gradients()
    assert_same_bits(steps(engine, "sigmoid", 1), steps(alone, "sigmoid", 1))


def test_a_caller_that_stops_ends_all_streams():
    """A signal is answered between streams: whoever computes comes to an end first."""
    engine, alone = engine_of(3), engine_of(1)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.accumulate_gradients(MANY, LOSSES["sigmoid"], stop)
    assert not any(
        leaf.grad is not None for m in engine._models for leaf in m.leaves.parameters.values()
    )
    engine.drop_gradients()
    assert_same_bits(steps(engine, "sigmoid", 1), steps(alone, "sigmoid", 1))


def test_where_memory_runs_out_fewer_streams_are_computed_at_once(capsys):
    engine, alone, left = engine_of(4), engine_of(1), [2]

    def runs_out(_):
        if left[0]:
            left[0] -= 1
            raise MemoryError

    budget = engine.budget
    engine.prepare(MANY)
    retry_with_smaller_budget(
        lambda: engine.accumulate_gradients(MANY, LOSSES["sigmoid"], runs_out),
        engine,
        MANY,
        "step 1",
    )
    assert engine.workers.count == 1 and engine.budget == budget
    said = capsys.readouterr().err
    assert "streams at once: 2 instead of 4" in said and "streams at once: 1 instead of 2" in said
    engine.drop_gradients()
    assert_same_bits(steps(engine, "sigmoid", 1), steps(alone, "sigmoid", 1))


def test_answers_do_not_depend_on_threads(tiny_model, tiny_tokenizer):
    prompts = [[5, 6, 7 + n] + [9] * (n % 4) for n in range(9)]

    def answers(threads):
        with torch_threads(threads):
            return generate_answers(
                tiny_model, tiny_tokenizer, prompts, max_new_tokens=6, temperature=1.0, seed=1,
                batch_size=2,
            )  # fmt: skip

    expected = answers(1)
    assert len({answer.ids for answer in expected}) > 2
    assert answers(2) == answers(3) == expected

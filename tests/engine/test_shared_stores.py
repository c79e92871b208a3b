"""Stores that trials share: which engine gets which, and that memory is let go."""

import copy
import gc
import weakref

import pytest
import torch

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine import build
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import build_engine
from smoldpo.engine.cache import folder as cache
from smoldpo.models.freeze import freeze

SETTINGS = EngineSettings(
    compute_dtype=torch.float64,
    train_batch_size=2,
    eval_batch_size=2,
    stream_tokens=40,
    cache="memory",
    cache_bytes=0.0,
    compiled=False,
)


def engine(model, depth):
    policy = copy.deepcopy(model)
    freeze(policy, LayerSelection(depth))
    return build_engine(policy, None, SETTINGS, "weights").engine


def test_one_depth_shares_and_another_takes_the_place(tiny_model):
    with cache.sharing():
        first = engine(tiny_model, 2)
        states, logps = first._states, first._reference_logps
        again = engine(tiny_model, 2)
        assert again._states is states and again._reference_logps is logps
        other = engine(tiny_model, 3)
        assert other._states is not states
        kept = weakref.ref(states)
        del first, again, states
        gc.collect()
        assert kept() is None, "a trunk of each depth would take half of what memory is left"
        assert engine(tiny_model, 3)._states is other._states
        assert engine(tiny_model, 2)._reference_logps is logps, "these are few numbers"
    assert engine(tiny_model, 3)._states is not other._states


@pytest.mark.parametrize("depth", [0, 2])
def test_without_sharing_nothing_is_hashed(tiny_model, depth, monkeypatch):
    monkeypatch.setattr(build, "tensors_sha256", lambda _: pytest.fail("a hash of the trunk"))
    engine(tiny_model, depth)


def test_the_room_is_counted_after_the_other_is_gone(tiny_model, monkeypatch):
    counted = []

    def count(_):
        counted.append([kind for kind, _ in cache._shared])
        return 1e9

    monkeypatch.setattr(build, "free_memory", count)
    with cache.sharing():
        for depth in (1, 2, 3):
            engine(tiny_model, depth)
    assert counted == [[], ["reference"], ["reference"] * 2], "and no states"

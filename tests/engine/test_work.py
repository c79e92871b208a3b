"""The floor's count of operations, against counts by hand on a model of round numbers."""

import pytest

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine.compile import Parameters
from smoldpo.models.freeze import freeze

LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # q and o, k and v, the MLP's three


@pytest.mark.parametrize(
    "settings, below, trains",
    [
        ({"layers": 2}, 2, 2 * LAYER),
        ({"layers": 0, "names": ["embeddings"]}, 0, 4 * LAYER),
        ({"layers": None, "train_layers": ["every:3"]}, 0, 2 * LAYER),
        ({"layers": None, "train_layers": ["last:3"], "train": ["*.mlp.*"]}, 1, 3 * 3 * 32 * 64),
    ],
)
def test_operations_by_hand(tiny_model, settings, below, trains):
    layers, names = settings.pop("layers"), settings.pop("names", ())
    freeze(tiny_model, LayerSelection(layers, freeze=names, **settings))
    found = Parameters.of(tiny_model)
    above = (4 - below) * LAYER
    head = tiny_model.lm_head.weight.numel()
    assert (found.below, found.above, found.above_trains) == (below * LAYER, above, trains)
    assert found.once(7, 5) == 2 * 12 * 4 * LAYER + 2 * 5 * head
    assert found.epoch(7, 5) == 12 * (2 + 2) * above + 12 * 2 * trains + 4 * 5 * head


def test_a_head_that_trains_costs_its_gradient_too(tiny_model):
    freeze(tiny_model, LayerSelection(0))
    found = Parameters.of(tiny_model)
    assert found.epoch(0, 5) == 5 * 6 * 4 * LAYER + 6 * 5 * tiny_model.lm_head.weight.numel()

"""Which layers train, as one value."""

import pytest

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.utils.errors import UsageError


@pytest.mark.parametrize(
    "selection, below, training",
    [
        (LayerSelection(), 5, {5}),
        (LayerSelection(train=("*.mlp.*",)), 0, set(range(6))),
        (LayerSelection(4), 4, {4, 5}),
        (LayerSelection(6), 6, set()),
        (LayerSelection(0), 0, set(range(6))),
        (LayerSelection(train_layers=("0", "2-3", "last:1")), 0, {0, 2, 3, 5}),
        (LayerSelection(train_layers=("every:3",)), 0, {2, 5}),
        (LayerSelection(train_layers=("first:2",)), 0, {0, 1}),
    ],
)
def test_of_six_layers(selection, below, training):
    assert selection.frozen_layers(6) == below
    assert selection.training_layers(6) == training


@pytest.mark.parametrize(
    "selection, says",
    [
        (LayerSelection(7), "freeze_layers is 7, but the model has 6 layers"),
        (LayerSelection(train_layers=("5-6",)), "more than the model's 6 layers"),
        (LayerSelection(train_layers=("last:7",)), "more than the model's 6 layers"),
        (LayerSelection(train_layers=("some",)), "'some' is not a layer"),
    ],
)
def test_layers_that_there_are_not(selection, says):
    with pytest.raises(UsageError, match=says):
        selection.training_layers(6)

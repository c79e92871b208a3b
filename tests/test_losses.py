"""Expected values are worked by hand, from the equation and a table of exponentials."""

import math

import pytest
import torch

from smoldpo.losses import implicit_rewards, sigmoid_loss
from smoldpo.types import PairLogps


def logps(chosen, rejected):
    return PairLogps(
        torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    )


POLICY = logps([-10.0, -12.0, -5.0], [-11.0, -9.0, -5.0])
REFERENCE = logps([-12.0, -12.0, -5.0], [-11.0, -12.0, -5.0])
# logits: (1) - (-1) = 2;  (-3) - (0) = -3;  0 - 0 = 0


def test_sigmoid_by_hand():
    # beta 0.5: -log sigmoid(1), -log sigmoid(-1.5), ln 2
    expected = [math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(1.5)), math.log(2)]
    assert expected == pytest.approx([0.313262, 1.701413, 0.693147], abs=1e-6)
    assert sigmoid_loss(POLICY, REFERENCE, 0.5).tolist() == pytest.approx(expected, abs=1e-12)


def test_label_smoothing_by_hand():
    # (1 - e) * 0.313262 + e * 1.313262 = 0.313262 + e; and 1.701413 - 1.5 e; and ln 2 whatever e
    found = sigmoid_loss(POLICY, REFERENCE, 0.5, label_smoothing=0.1).tolist()
    assert found == pytest.approx([0.413262, 1.551413, 0.693147], abs=1e-6)


def test_gradient_is_the_papers():
    # Rafailov et al., section 4: d loss / d log pi(y_c) = -beta sigmoid(-beta logits)
    chosen = POLICY.chosen.clone().requires_grad_()
    sigmoid_loss(PairLogps(chosen, POLICY.rejected), REFERENCE, 0.5).sum().backward()
    expected = [-0.5 / (1 + math.exp(0.5 * logit)) for logit in (2.0, -3.0, 0.0)]
    assert chosen.grad.tolist() == pytest.approx(expected, abs=1e-12)


def test_rewards_are_detached_and_scaled():
    chosen = POLICY.chosen.clone().requires_grad_()
    ours, theirs = implicit_rewards(PairLogps(chosen, POLICY.rejected), REFERENCE, 0.5)
    assert ours.tolist() == [1.0, 0.0, 0.0]
    assert theirs.tolist() == [0.0, 1.5, 0.0]
    assert not ours.requires_grad


def test_large_logits_stay_finite():
    far = logps([-5000.0, 5000.0], [5000.0, -5000.0])
    zero = logps([0.0, 0.0], [0.0, 0.0])
    assert sigmoid_loss(far, zero, 1.0).tolist() == [10000.0, 0.0]

"""The LM head on completion tokens alone (kernels/lm_head.py), where rounding could hide what
counts.
"""

import pytest
import torch

from smoldpo.engine.kernels.lm_head import completion_logps


@pytest.mark.parametrize("trainable", [True, False])
def test_head_on_tokens_of_no_probability_and_over_several_chunks(trainable):
    """exp underflows in float32 below -103; the log-probability must not become -inf."""
    torch.manual_seed(0)
    states = (30 * torch.randn(300, 16)).requires_grad_()
    weight = torch.randn(50, 16).requires_grad_(trainable)
    targets = torch.randint(0, 50, (300,))
    slopes = torch.randn(300)
    found = completion_logps(states, weight, targets)
    found.backward(slopes)
    gradient, states.grad = states.grad, None
    expected = torch.log_softmax(states @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)
    assert expected.min() < -150
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    found_weight, weight.grad = weight.grad, None
    expected.backward(slopes)
    torch.testing.assert_close(gradient, states.grad, rtol=1e-4, atol=1e-4)
    if trainable:
        torch.testing.assert_close(found_weight, weight.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("fused, bound", [(True, 0.02), (False, 0.2)])
def test_a_heads_gradient_in_bfloat16_where_targets_are_nearly_certain(fused, bound):
    """Logits near 20 are rounded to eighths in bfloat16; 1 - p(target) must not be taken from
    them.
    """
    torch.manual_seed(0)
    weight = torch.randn(300, 32).bfloat16()
    targets = torch.arange(64)
    states = (weight[:64].float() * 0.5 + 0.3 * torch.randn(64, 32)).bfloat16()
    exact_weight = weight.double().requires_grad_()
    exact = torch.log_softmax(states.double() @ exact_weight.T, -1)
    exact.gather(1, targets[:, None]).sum().backward()
    assert exact.detach().exp().max(-1).values.median() > 0.9
    trained = weight.clone().requires_grad_()
    completion_logps(states.clone().requires_grad_(), trained, targets, fused).sum().backward()
    error = (trained.grad.double() - exact_weight.grad).norm() / exact_weight.grad.norm()
    assert error < bound, error  # by products, the forward pass has logits in eighths too

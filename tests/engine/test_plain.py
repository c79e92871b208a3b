"""The reference implementation against a single unpadded sequence at a time, in float64."""

import copy

import pytest
import torch

from smoldpo.engine.base import EngineSettings
from smoldpo.engine.plain import PlainEngine, pad_batch, sequence_logps
from smoldpo.losses import Objective
from smoldpo.types import TokenizedPair

PAIRS = [
    TokenizedPair("a", (5, 6, 7), (8, 9, 2), (10, 2)),
    TokenizedPair("b", (5,), (2,), (11, 12, 13, 14, 15, 2)),
    TokenizedPair("c", (20, 21, 22, 23, 2, 2), (2, 2), (2,)),
    TokenizedPair("d", (30, 31), (32, 33, 34), (32, 33)),
    TokenizedPair("e", (40, 2, 41), (42,), (43, 44, 45, 46)),
]
LOSS = Objective.of(beta=0.3)


def by_hand(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    logps = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    return sum(logps[len(prompt) - 1 + at, token].item() for at, token in enumerate(completion))


def make(policy, reference=None, size=2):
    return PlainEngine(
        policy,
        reference or copy.deepcopy(policy),
        EngineSettings(compute_dtype=torch.float64, train_batch_size=size, eval_batch_size=size),
    )


@torch.no_grad()
def test_logps_equal_single_unpadded_sequences(tiny_model):
    # Token 2 is end of turn and padding both: prompts and completions above are full of it.
    found = make(tiny_model).policy_logps(PAIRS)
    for index, pair in enumerate(PAIRS):
        expected = by_hand(tiny_model, pair.prompt_ids, pair.chosen_ids)
        assert found.chosen[index].item() == pytest.approx(expected, rel=1e-12)
        expected = by_hand(tiny_model, pair.prompt_ids, pair.rejected_ids)
        assert found.rejected[index].item() == pytest.approx(expected, rel=1e-12)


def test_the_batch_written_out():
    batch = pad_batch(PAIRS[:2])
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 9, 2, 0],
        [5, 2, 0, 0, 0, 0, 0],
        [5, 6, 7, 10, 2, 0, 0],
        [5, 11, 12, 13, 14, 15, 2],
    ]
    assert batch.scored.int().tolist() == [
        [0, 0, 0, 1, 1, 1, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 1],
    ]
    assert batch.attention_mask.sum(1).tolist() == [6, 2, 5, 7]


def gradients(model, pairs, size):
    engine = make(model, size=size)
    # A reference that differs, so that pairs pull with different weights.
    with torch.no_grad():
        for parameter in engine.reference.parameters():
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    model.zero_grad(set_to_none=True)
    losses, policy, _ = engine.accumulate_gradients(pairs, LOSS)
    return losses, policy, {name: p.grad.clone() for name, p in engine.trainable_parameters()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_do_not_depend_on_the_cut(tiny_model, size):
    """One micro-batch of five, against cuts with a ragged last one (FAULTS 9)."""
    losses, _, whole = gradients(tiny_model, PAIRS, 5)
    cut_losses, _, cut = gradients(tiny_model, PAIRS, size)
    torch.testing.assert_close(cut_losses, losses, rtol=1e-12, atol=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-10, atol=1e-13)


def test_gradient_is_of_the_mean_over_pairs(tiny_model):
    """Against autograd through log-probabilities of unpadded sequences, one pair after another."""
    losses, _, found = gradients(tiny_model, PAIRS, 2)
    tiny_model.zero_grad(set_to_none=True)
    engine = make(tiny_model)
    with torch.no_grad():
        for parameter in engine.reference.parameters():
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    total = 0.0
    for pair in PAIRS:
        sides = []
        for model in (engine.policy, engine.reference):
            chosen, rejected = (
                torch.log_softmax(model(torch.tensor([pair.prompt_ids + y])).logits[0], -1)[
                    len(pair.prompt_ids) - 1 : -1
                ]
                .gather(-1, torch.tensor(y)[:, None])
                .sum()
                for y in (pair.chosen_ids, pair.rejected_ids)
            )
            sides.append(chosen - rejected)
        total = total - torch.nn.functional.logsigmoid(0.3 * (sides[0] - sides[1])) / len(PAIRS)
    total.backward()
    assert losses.mean().item() == pytest.approx(total.item(), rel=1e-12)
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)


def test_first_loss_is_ln2_and_rewards_tie(tiny_model):
    losses, policy, reference = make(tiny_model).accumulate_gradients(PAIRS, LOSS)
    torch.testing.assert_close(losses, torch.full_like(losses, 0.6931471805599453))
    assert torch.equal(policy.chosen, reference.chosen)
    assert torch.equal(policy.rejected, reference.rejected)


def test_results_keep_the_given_order(tiny_model):
    engine = make(tiny_model)
    forward, backward = engine.policy_logps(PAIRS), engine.policy_logps(PAIRS[::-1])
    torch.testing.assert_close(forward.chosen, backward.chosen.flip(0))
    assert len(set(forward.chosen.tolist())) == len(PAIRS)


def test_the_reference_never_trains(tiny_model):
    engine = make(tiny_model)
    engine.accumulate_gradients(PAIRS, LOSS)
    assert all(not p.requires_grad and p.grad is None for p in engine.reference.parameters())


@torch.no_grad()
def test_logps_are_float32_even_from_bfloat16(tiny_model):
    model = tiny_model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sequence_logps(model, pad_batch(PAIRS)).dtype == torch.float32

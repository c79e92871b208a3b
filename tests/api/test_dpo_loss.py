"""dpo_loss: each loss as the trainer computes it, by hand where that is short, and every misuse by
name.
"""

import math

import pytest
import torch

import smoldpo
from smoldpo.config.losses import FACTS
from smoldpo.losses import Objective
from smoldpo.types import PairLogps, PairNumbers, TokenizedPair

LENGTHS = [(3, 5), (7, 2), (4, 4)]


@pytest.fixture
def logps():
    """Log-probabilities of three pairs, policy and reference, [3] each; the policy's want
    gradients.
    """
    generator = torch.Generator().manual_seed(0)
    draws = -20 * torch.rand(4, 3, generator=generator, dtype=torch.float64) - 1
    return [draws[0].requires_grad_(), draws[1].requires_grad_(), draws[2], draws[3]]


def lengths():
    return {
        "chosen_tokens": torch.tensor([c for c, _ in LENGTHS]),
        "rejected_tokens": torch.tensor([r for _, r in LENGTHS]),
    }


def test_dpo_by_hand():
    losses = smoldpo.dpo_loss(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -12.5)), beta=0.5)
    assert losses.shape == (1,)
    # h = (-10 + 12) - (-11 + 12.5) = 0.5; -log σ(0.25)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-0.25)), rel=1e-6)
    same = torch.tensor([-3.0, -4.0])
    torch.testing.assert_close(
        smoldpo.dpo_loss(same, same - 1, same, same - 1), torch.full((2,), math.log(2))
    )


def objective(names, **options):
    own = {k: options.pop(k) for k in list(options) if k in ("rpo_alpha", "f_divergence_type")}
    return Objective.of(names, options.pop("loss_weights", ()), beta=0.3, options=options, **own)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.2}, {"rpo_alpha": 0.5}], ids=str)
def test_every_loss_is_the_trainers_value_and_gradient(name, extra, logps):
    facts = FACTS[name]
    if "label_smoothing" in extra and "label_smoothing" not in facts.options:
        pytest.skip("does not read it")
    if "rpo_alpha" in extra and (facts.likelihood or facts.unpaired):
        pytest.skip("has a likelihood of its own, or takes no pairs")
    options = extra | ({"label_smoothing": 0.1} if name == "exo_pair" and not extra else {})
    if name == "exo_pair" and "rpo_alpha" in extra:
        options |= {"label_smoothing": 0.1}
    pairs = [TokenizedPair(str(n), (1,), (2,) * c, (3,) * r) for n, (c, r) in enumerate(LENGTHS)]
    given = logps if facts.needs_reference else logps[:2]
    beta = {"beta": 0.3} if facts.beta else {}
    ours = smoldpo.dpo_loss(*given, loss_type=name, **beta, **lengths(), **options)
    reference = PairLogps(*logps[2:]) if facts.needs_reference else None
    theirs = objective([name], **options)(PairLogps(*logps[:2]), reference, pairs, pairs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert ours.shape == (3,)
    slopes = [torch.autograd.grad(x.mean(), logps[:2], allow_unused=True) for x in (ours, theirs)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_sums_divergences_and_numbers_of_pairs(logps):
    pairs = [
        TokenizedPair(str(n), (1,), (2,) * c, (3,) * r, numbers=PairNumbers(1.0, 0.5 * n, 0.1 + n))
        for n, (c, r) in enumerate(LENGTHS)
    ]
    policy, reference = PairLogps(*logps[:2]), PairLogps(*logps[2:])
    ours = smoldpo.dpo_loss(
        *logps, torch.tensor([0.1, 1.1, 2.1]), margin=torch.tensor([0.0, 0.5, 1.0])
    )
    torch.testing.assert_close(
        ours, objective(["sigmoid"])(policy, reference, pairs, pairs).detach()
    )
    plain = [TokenizedPair("", (1,), (2,) * c, (3,) * r) for c, r in LENGTHS]
    for names, options in (
        (["sigmoid", "sft"], {"loss_weights": [1.0, 0.2]}),
        (["sigmoid"], {"f_divergence_type": "js_divergence"}),
    ):
        ours = smoldpo.dpo_loss(*logps, 0.3, names, **lengths(), **options)
        theirs = objective(names, **options)(policy, reference, plain, plain)
        torch.testing.assert_close(ours, theirs)


def test_a_sum_of_losses_is_the_sum_of_losses(logps):
    one, other = (smoldpo.dpo_loss(*logps, 0.3, name, **lengths()) for name in ("sigmoid", "ipo"))
    both = smoldpo.dpo_loss(*logps, 0.3, ("sigmoid", "ipo"), loss_weights=[2, 0.5], **lengths())
    torch.testing.assert_close(both, 2 * one + 0.5 * other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss_type": "sigmoit"}, "did you mean sigmoid"),
        ({"label_smoothign": 0.1}, "did you mean label_smoothing"),
        ({"learning_rate": 0.1}, "unknown option 'learning_rate'"),
        ({"sync_ref_model": True}, "unknown option 'sync_ref_model'"),
        ({"ld_alpha": 0.5}, "ld_alpha reads more of an answer than its log-probability"),
        ({"use_weighting": True}, "use_weighting reads more .*: train with smoldpo.train"),
        ({"beta": torch.ones(3), "loss_type": "sft", "reference_chosen_logps": None,
          "reference_rejected_logps": None}, "beta has no part in sft"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"simpo_gamma": 1.0}, "simpo_gamma is read by simpo"),
        ({"loss_type": "ipo"}, "this loss is per token: give chosen_tokens"),
        ({"loss_type": ["sigmoid", "sft"]}, "this loss is per token"),
        ({"rpo_alpha": 1.0}, "this loss is per token"),
        ({"chosen_tokens": torch.ones(3)}, "give both"),
        ({"chosen_tokens": torch.ones(2), "rejected_tokens": torch.ones(3)},
         r"chosen_tokens is \[2\]"),
        ({"margin": torch.ones(3), "loss_type": "dpop"}, "margin has no part in dpop"),
        ({"margin": torch.ones(3), "loss_type": "aot"}, "margin has no part in aot"),
        ({"beta": torch.ones(3), "loss_type": "aot"}, "sorts the pairs"),
        ({"beta": torch.tensor(0.1)}, r"beta is \[\]"),
        ({"loss_type": "orpo"}, "compares with no reference: leave"),
        ({"reference_rejected_logps": None}, "compares with a reference: give"),
        ({"reference_rejected_logps": torch.ones(3, 1)}, r"is \[3, 1\]"),
        ({"policy_rejected_logps": [1.0]}, "is list"),
        ({"policy_chosen_logps": torch.tensor(1.0)}, "must be a tensor of shape"),
        ({"policy_chosen_logps": torch.ones(0)}, "one number a pair"),
    ],
    ids=lambda value: str(list(value)[-1]) if isinstance(value, dict) else "",
)  # fmt: skip
def test_misuse_is_a_clear_error(change, said, logps):
    names = [
        f"{who}_{side}_logps" for who in ("policy", "reference") for side in ("chosen", "rejected")
    ]
    with pytest.raises(smoldpo.UsageError, match=said):
        smoldpo.dpo_loss(**dict(zip(names, logps, strict=True)) | change)

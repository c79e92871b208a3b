"""Expected values are worked by hand, from the equation and a table of exponentials."""

import math
from dataclasses import replace

import pytest
import torch

import smoldpo
import trl_oracle
from smoldpo.config.losses import FACTS, OPTIONS
from smoldpo.losses import LOSSES, LossInput, Objective, betas, implicit_rewards
from smoldpo.losses.divergences import LARGEST_EXPONENT, divergence
from smoldpo.losses.pairwise import nll_per_answer
from smoldpo.types import PairLogps, PairNumbers, TokenizedPair

LN2 = math.log(2)


def logps(chosen, rejected):
    return PairLogps(
        torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    )


POLICY = logps([-10.0, -12.0, -5.0], [-11.0, -9.0, -5.0])
REFERENCE = logps([-12.0, -12.0, -5.0], [-11.0, -12.0, -5.0])
# log-ratios of chosen: 2, 0, 0; of rejected: 0, 3, 0
# their differences, DPO's logits: (1) - (-1) = 2;  (-3) - (0) = -3;  0 - 0 = 0
TOKENS = ([4, 6, 5], [2, 3, 5])
# per token: 2/4 - 0 = 0.5;  0 - 3/3 = -1;  0
BETA = 0.5


LIKED = [True, False, True]


def pairs_of(tokens, liked=(None,) * 9):
    return [
        TokenizedPair("x", (1,), (2,) * c, (3,) * r, numbers=PairNumbers(liked=up))
        for c, r, up in zip(*tokens, liked, strict=False)
    ]


def given(policy=POLICY, reference=REFERENCE, beta=BETA, **more):
    tokens = pairs_of(more.pop("tokens", TOKENS), more.pop("liked", (None,) * 9))
    return LossInput.of(policy, reference, tokens, tokens, beta, **more)


def loss(name, *inputs, beta=BETA, **options):
    return LOSSES[name](given(*inputs, beta=beta), **options)


def s(x):
    """σ(x)."""
    return 1 / (1 + math.exp(-x))


def n(x):
    """-log σ(x): n(1) = 0.313262, n(-1.5) = 1.701413, n(0) = 0.693147, n(-1) = n(1) + 1."""
    return math.log(1 + math.exp(-x))


BY_HAND = {
    "sigmoid": ({}, [n(1), n(-1.5), LN2]),
    "sigmoid_norm": ({}, [n(0.25), n(-0.5), LN2]),
    "robust": (
        {"label_smoothing": 0.1},
        # (0.9 n(z) - 0.1 n(-z)) / 0.8, and n(-z) = n(z) + z: n(z) - z / 8
        [n(1) - 0.125, n(-1.5) + 0.1875, LN2],
    ),
    "hinge": ({}, [0.0, 2.5, 1.0]),
    # 1 / (2 beta) = 1
    "ipo": ({}, [0.25, 4.0, 1.0]),
    "ipo_sum": ({}, [1.0, 16.0, 1.0]),
    "exo_pair": (
        {"label_smoothing": 0.25},
        [
            s(z) * (math.log(s(z)) - math.log(0.75)) + s(-z) * (math.log(s(-z)) - math.log(0.25))
            for z in (1, -1.5, 0)
        ],
    ),
    "discopop": (
        {"discopop_tau": 0.5},
        [n(z) * (1 - s(2 * z)) + math.exp(-z) * s(2 * z) for z in (1, -1.5, 0)],
    ),
    # chosen never fell here; see below
    "dpop": ({"dpop_lambda": 7.0}, [n(1), n(-1.5), LN2]),
    # beta times log-ratios: chosen 1, 0, 0; rejected 0, 1.5, 0
    "nca_pair": ({}, [n(1) + n(-1) / 2 + LN2 / 2, 1.5 * LN2 + n(-1.5) / 2, 2 * LN2]),
    "bco_pair": ({}, [n(1) + LN2, LN2 + n(-1.5), 2 * LN2]),
    "sppo_hard": ({}, [1.0 + 1.0, 1.0 + 16.0, 2.0]),
    "apo_zero": ({}, [s(-1) + 0.5, 0.5 + s(1.5), 1.0]),
    # of pairs, the mean of both answers' losses
    "kto": ({}, [(s(-1) + 0.5) / 2, (0.5 + s(1.5)) / 2, 0.5]),
    "apo_zero_unpaired": ({}, [(s(-1) + 0.5) / 2, (0.5 + s(1.5)) / 2, 0.5]),
    "apo_down": ({}, [s(1) + s(-1), 0.5 + s(1.5), 1.0]),
    # policy's chosen - rejected, sorted: -3, 0, 1; reference's: -1, 0, 0
    "aot": ({}, [n(-1), LN2, n(0.5)]),
    # log-ratios, sorted: chosen 0, 0, 2; rejected 0, 0, 3
    "aot_unpaired": ({}, [LN2, LN2, n(-0.5)]),
    # 15 chosen tokens in three answers: 5 on average
    "sft": ({}, [2.0, 2.4, 1.0]),
    # per token: chosen -2.5, -2, -1; rejected -5.5, -3, -1
    "simpo": ({"simpo_gamma": 0.25}, [n(1.25), n(0.25), n(-0.25)]),
    # chosen - rejected: 1, -3, 0
    "cpo": ({"cpo_alpha": 2.0}, [n(0.5) + 4.0, n(-1.5) + 4.8, LN2 + 2.0]),
    "orpo": (
        {},
        [
            nll + 0.5 * n((c - math.log(1 - math.exp(c))) - (r - math.log(1 - math.exp(r))))
            for nll, c, r in ((2.0, -2.5, -5.5), (2.4, -2.0, -3.0), (1.0, -1.0, -1.0))
        ],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    options, expected = BY_HAND[name]
    reference = REFERENCE if FACTS[name].needs_reference else None
    found = LOSSES[name](given(reference=reference), **options)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_single_answers_by_hand():
    # z = (0 + 3 + 0) / 3 = 1; β (a - z) = 0.5, -0.5, -0.5
    found = given(liked=LIKED)
    weights = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    assert LOSSES["kto"](found, **weights).tolist() == pytest.approx(
        [2 * s(-0.5), 3 * s(-0.5), 2 * s(0.5)], abs=1e-12
    )
    assert LOSSES["apo_zero_unpaired"](found, **weights).tolist() == pytest.approx(
        [2 * s(-1), 3 * 0.5, 2 * 0.5], abs=1e-12
    )


def test_the_kl_term_is_never_below_zero_and_has_no_gradient():
    policy = logps([-10.0, -12.0, -5.0], [-11.0, -19.0, -5.0]).map(lambda x: x.requires_grad_())
    found = LOSSES["kto"](given(policy, liked=LIKED))
    assert found.tolist() == LOSSES["apo_zero_unpaired"](given(policy, liked=LIKED)).tolist()
    slopes = torch.autograd.grad(found.sum(), [policy.chosen, policy.rejected], allow_unused=True)
    assert slopes[0].abs().min() > 0 and slopes[1] is None


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_single_answers_have_trls_value_and_gradient(name, beta):
    random = torch.Generator().manual_seed(4)
    values = -20 * torch.rand(4, 12, generator=random, dtype=torch.float64)
    values[1] = values[3] + torch.rand(12, generator=random, dtype=torch.float64)  # z > 0
    liked = torch.rand(12, generator=random) < 0.4
    settings = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    found = []
    for ours in (True, False):
        chosen, kl = (values[row].clone().requires_grad_() for row in (0, 1))
        if ours:
            each = smoldpo.dpo_loss(
                chosen, kl, values[2], values[3], beta, name, liked=liked, **settings
            )
            value = each.mean()
        else:
            value = trl_oracle.kto(
                chosen, kl, values[2], values[3], liked, name, beta=beta, **settings
            )
        value.backward()
        found.append((value.detach(), chosen.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def test_the_table_of_exponentials():
    assert [n(1), n(-1.5), n(0)] == pytest.approx([0.313262, 1.701413, 0.693147], abs=1e-6)
    assert n(-1) == pytest.approx(n(1) + 1)


def test_label_smoothing_by_hand():
    # (1 - e) * 0.313262 + e * 1.313262 = 0.313262 + e; and 1.701413 - 1.5 e; and ln 2 whatever e
    found = loss("sigmoid", label_smoothing=0.1).tolist()
    assert found == pytest.approx([0.413262, 1.551413, 0.693147], abs=1e-6)


def test_smoothing_is_in_every_loss_that_says_so():
    for name, facts in FACTS.items():
        if "label_smoothing" in facts.options:
            few, many = (loss(name, label_smoothing=e).mean() for e in (0.01, 0.3))
            assert few != many, name


def test_dpop_pays_for_a_fall_of_chosen():
    fallen = logps([-14.0, -12.0, -5.0], [-14.0, -9.0, -5.0])
    # chosen -2, rejected -3: logits 1, less 7 · 2
    found = loss("dpop", fallen, dpop_lambda=7.0).tolist()
    assert found == pytest.approx([n(-6.5), n(-1.5), LN2], abs=1e-12)


def test_rpos_term_weighs_answers_alike():
    assert nll_per_answer(given()).tolist() == [2.5, 2.0, 1.0]


EQUAL = {
    "hinge": 1.0,
    "ipo": 1.0,
    "ipo_sum": 1.0,
    "exo_pair": 0.5 * (math.log(0.5 / 0.9) + math.log(0.5 / 0.1)),
    "discopop": 0.5 * LN2 + 0.5,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
}


@pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if facts.needs_reference])
def test_value_where_policy_and_reference_are_equal(name):
    """ln 2 for some; the trainer's check of the first loss computes it from the reference alone."""
    options = {"label_smoothing": 0.1} if "label_smoothing" in FACTS[name].options else {}
    found = loss(name, POLICY, POLICY, **options)
    assert found.tolist() == pytest.approx([EQUAL.get(name, LN2)] * 3, abs=1e-12)


# f-divergences: f' of ratios 2, 0, 0 and 0, 3, 0, up to a constant
DIVERGENCES = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: -math.exp(-x),
    "js_divergence": lambda x: math.log(2 * math.exp(x) / (1 + math.exp(x))),
    "alpha_divergence": lambda x: -math.exp(-x / 2) / 0.5,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_by_hand(name):
    derivative = DIVERGENCES[name]
    expected = [derivative(a) - derivative(b) for a, b in ((2, 0), (0, 3), (0, 0))]
    with_it = given(divergence=divergence(name, 0.5))
    assert with_it.difference.tolist() == pytest.approx(expected, abs=1e-12)
    found = LOSSES["sigmoid"](with_it).tolist()
    assert found == pytest.approx([n(0.5 * d) for d in expected], abs=1e-12)


def test_alpha_divergence_is_reverse_kl_at_one():
    ratio = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert torch.equal(divergence("alpha_divergence", 1.0)(ratio), ratio)
    near = divergence("alpha_divergence", 1 + 1e-5)(ratio)
    torch.testing.assert_close(near, ratio, rtol=1e-4, atol=1e-4)


# TRL's values


def random_tokens(dtype, seed=0, pairs=7):
    """Per-token log-probabilities of answers of 1 to 12 tokens, both sides, policy and
    reference.
    """
    random = torch.Generator().manual_seed(seed)

    def side(lengths):
        return [-4 * torch.rand(length, generator=random, dtype=dtype) for length in lengths]

    lengths = torch.randint(1, 13, (2, pairs), generator=random).tolist()
    policy = [side(lengths[0]), side(lengths[1])]
    reference = [
        torch.stack([row.sum() for row in rows])
        + 2 * torch.randn(pairs, generator=random, dtype=dtype)
        for rows in policy
    ]
    return lengths, policy, reference


def ours_and_trls(names, dtype, **settings):
    """Value and gradient with respect to every answer's log-probability, ours and TRL's."""
    lengths, tokens, reference = random_tokens(dtype)
    sums = [torch.stack([row.sum() for row in rows]).requires_grad_() for rows in tokens]
    options = {name: settings[name] for name in OPTIONS if name in settings}
    rest = {name: settings[name] for name in settings if name.startswith("f_")}
    weights = settings.get("loss_weights") or []
    objective = Objective.of(names, weights, beta=settings["beta"], options=options, **rest)
    pairs = pairs_of(lengths)
    ours = objective(PairLogps(*sums), PairLogps(*reference), pairs, pairs).mean()
    ours.backward()
    for row in (row for rows in tokens for row in rows):
        row.requires_grad_()
    theirs = trl_oracle.dpo(tokens, reference, names, **settings)
    theirs.backward()
    their_slopes = [
        torch.stack(
            [torch.zeros(()).to(dtype) if row.grad is None else row.grad[0] for row in rows]
        )
        for rows in tokens
    ]
    slopes = [torch.zeros_like(side) if side.grad is None else side.grad for side in sums]
    return (ours, *slopes), (theirs, *their_slopes)


TRLS = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
TRLS += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}


def close(found, expected, dtype, names=()):
    """To rounding. TRL has exo_pair's logarithms of ε in float32 whatever the log-probabilities are
    in.
    """
    exact = dtype == torch.float64
    bound = {"rtol": 1e-12, "atol": 1e-13} if exact else {"rtol": 2e-5, "atol": 1e-6}
    if exact and "exo_pair" in names:
        bound = {"rtol": 2e-7, "atol": 1e-8}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **bound)


@pytest.mark.parametrize("beta", [0.05, 0.7])
@pytest.mark.parametrize("name", TRLS)
def test_every_loss_of_trl_has_trls_value_and_gradient(name, beta):
    smoothing = {"label_smoothing": 0.05} if name in SMOOTHED else {}
    found = ours_and_trls([name], torch.float64, beta=beta, **smoothing)
    close(*found, torch.float64, [name])


def test_we_have_all_of_trls_losses():
    from trl import DPOConfig

    said = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    theirs = {word.strip("`'.,") for word in said.split() if word.startswith("`'")}
    assert theirs == set(TRLS) and theirs <= set(LOSSES)


@pytest.mark.parametrize(
    "name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
)
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_every_divergence_of_trl(name, kind):
    dtype = torch.float32 if kind == "alpha_divergence" else torch.float64  # TRL has no other there
    smoothing = {"label_smoothing": 0.05} if name in SMOOTHED else {}
    settings = {"f_divergence_type": kind, "f_alpha_divergence_coef": 0.3, **smoothing}
    close(*ours_and_trls([name], dtype, beta=0.2, **settings), dtype, [name])


@pytest.mark.parametrize(
    "names, weights",
    [
        (["sigmoid", "sft"], None),
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        (["apo_zero", "sft"], [1.0, 0.3]),
        (["aot", "ipo"], [0.5, 0.1]),
    ],
)
def test_weighted_sums_are_trls(names, weights):
    close(*ours_and_trls(names, torch.float64, beta=0.2, loss_weights=weights), torch.float64)


def test_the_reference_free_losses_are_trls():
    lengths, tokens, _ = random_tokens(torch.float32)
    sums = PairLogps(*(torch.stack([row.sum() for row in rows]) for rows in tokens))
    means = [torch.stack([row.mean() for row in rows]) for rows in tokens]
    free = given(sums, None, beta=0.3, tokens=lengths)
    nll = -torch.cat(tokens[0]).mean()
    found = {
        "simpo": LOSSES["simpo"](free, simpo_gamma=0.7, label_smoothing=0.1),
        "cpo": LOSSES["cpo"](free, cpo_alpha=0.0, label_smoothing=0.1),
        "orpo": LOSSES["orpo"](free) - LOSSES["sft"](free),
    }
    theirs = {"beta": 0.3, "simpo_gamma": 0.7, "label_smoothing": 0.1}
    expected = {
        "simpo": trl_oracle.cpo(*means, "simpo", **theirs),
        "cpo": trl_oracle.cpo(sums.chosen, sums.rejected, "sigmoid", **theirs),
        "orpo": -trl_oracle.orpo(*means, 0.3),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    with_likelihood = LOSSES["cpo"](free, cpo_alpha=0.4) - LOSSES["cpo"](free, cpo_alpha=0.0)
    torch.testing.assert_close(with_likelihood.mean(), 0.4 * nll)


# Gradients


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name):
    random = torch.Generator().manual_seed(3)
    values = -10 * torch.rand(4, 5, generator=random, dtype=torch.float64)
    chosen, rejected = (values[row].clone().requires_grad_() for row in (0, 1))
    smoothing = {"label_smoothing": 0.1} if "label_smoothing" in FACTS[name].options else {}
    tokens = ([4, 6, 5, 1, 9], [2, 3, 5, 7, 1])

    def of(chosen, rejected):
        reference = PairLogps(values[2], values[3]) if FACTS[name].needs_reference else None
        return LOSSES[name](
            given(PairLogps(chosen, rejected), reference, 0.1, tokens=tokens), **smoothing
        )

    assert torch.autograd.gradcheck(of, (chosen, rejected), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_of_divergences(kind):
    ratio = torch.linspace(-2, 2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(divergence(kind, 0.3), ratio, atol=1e-8, rtol=1e-6)


def test_gradient_is_the_papers():
    # Rafailov et al., section 4: d loss / d log pi(y_c) = -beta sigmoid(-beta logits)
    chosen = POLICY.chosen.clone().requires_grad_()
    loss("sigmoid", PairLogps(chosen, POLICY.rejected)).sum().backward()
    expected = [-0.5 / (1 + math.exp(0.5 * logit)) for logit in (2.0, -3.0, 0.0)]
    assert chosen.grad.tolist() == pytest.approx(expected, abs=1e-12)


def test_rewards_are_detached_and_scaled():
    policy = POLICY.map(lambda side: side.clone().requires_grad_())
    ours, theirs = implicit_rewards(policy, REFERENCE, 0.5)
    assert ours.tolist() == [1.0, 0.0, 0.0]
    assert theirs.tolist() == [0.0, 1.5, 0.0]
    assert not ours.requires_grad and not theirs.requires_grad


# Far out


def test_large_logits_stay_finite():
    far = logps([-5000.0, 5000.0], [5000.0, -5000.0])
    zero = logps([0.0, 0.0], [0.0, 0.0])
    inputs = given(far, zero, 1.0, tokens=([3, 4], [5, 2]))
    assert LOSSES["sigmoid"](inputs).tolist() == [10000.0, 0.0]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_overflows_in_float32(name, kind):
    """A policy far from its reference must give numbers, for values and gradients."""
    if kind != "reverse_kl" and not FACTS[name].by_difference:
        pytest.skip("no meaning with other divergences")
    if name.startswith("ipo") and kind in ("forward_kl", "alpha_divergence"):
        pytest.skip("the square of an exponential; the trainer takes no step on what is not finite")
    smoothing = {"label_smoothing": 0.1} if "label_smoothing" in FACTS[name].options else {}
    chosen = torch.tensor([-1500.0, -1e-6, -0.0, -300.0]).requires_grad_()
    rejected = torch.tensor([-1e-6, -1500.0, -2.0, -301.0]).requires_grad_()
    reference = PairLogps(torch.full((4,), -200.0), torch.full((4,), -190.0))
    tokens = ([90, 1, 3, 70], [1, 90, 2, 80])
    inputs = given(PairLogps(chosen, rejected), reference, 0.1, tokens=tokens)
    object.__setattr__(inputs, "divergence", divergence(kind, 0.3))
    found = LOSSES[name](inputs, **smoothing)
    found.sum().backward()
    for value in (found, chosen.grad, rejected.grad):
        assert value is None or value.isfinite().all()
    assert math.isfinite(torch.tensor(LARGEST_EXPONENT).exp().item())


# The sum


def test_tables_agree():
    assert list(LOSSES) == list(FACTS)
    for name, facts in FACTS.items():
        code = LOSSES[name].__code__
        assert code.co_varnames[1 : code.co_argcount] == facts.options or set(
            code.co_varnames[1 : code.co_argcount]
        ) == set(facts.options), name


def test_an_objective_adds_weighted_losses_and_rpos_term():
    objective = Objective.of(["sigmoid", "sft"], [2.0, 0.5], beta=BETA)
    pairs = pairs_of(TOKENS)
    expected = 2 * loss("sigmoid") + 0.5 * loss("sft")
    torch.testing.assert_close(objective(POLICY, REFERENCE, pairs, pairs), expected)
    rpo = Objective.of(beta=BETA, rpo_alpha=0.5)
    expected = [n(1) + 1.25, n(-1.5) + 1.0, LN2 + 0.5]
    assert rpo(POLICY, REFERENCE, pairs, pairs).tolist() == pytest.approx(expected)


def test_a_sum_over_pairs_does_not_depend_on_the_cut():
    """Every loss but those of a whole step: the parts' losses are the whole's."""
    for name, facts in FACTS.items():
        pairs = pairs_of(TOKENS, LIKED) if facts.unpaired else pairs_of(TOKENS)
        objective = Objective.of([name], beta=BETA, options={"label_smoothing": 0.1})
        reference = REFERENCE if facts.needs_reference else None
        whole = objective(POLICY, reference, pairs, pairs)
        parts = []
        for index in range(3):
            one = slice(index, index + 1)
            policy = PairLogps(POLICY.chosen[one], POLICY.rejected[one])
            other = reference and PairLogps(reference.chosen[one], reference.rejected[one])
            parts.append(objective(policy, other, pairs[one], pairs))
        assert torch.allclose(torch.cat(parts), whole) != facts.whole_step, name
        assert objective.whole_step == facts.whole_step


def test_a_loss_without_its_reference_says_so():
    for name in ("sigmoid", "aot"):
        with pytest.raises(ValueError, match="none was given"):
            loss(name, POLICY, None)


# A pair's own numbers


def own(**numbers):
    """Three pairs, the second with numbers of its own."""
    pairs = pairs_of(TOKENS)
    pairs[1] = replace(pairs[1], numbers=PairNumbers(**numbers))
    return pairs


@pytest.mark.parametrize(
    "name, numbers, expected",
    [
        # beta logits 1, -1.5, 0
        ("sigmoid", {"weight": 2.0}, [n(1), 2 * n(-1.5), LN2]),
        ("sigmoid", {"weight": 0.0}, [n(1), 0.0, LN2]),
        ("sigmoid", {"margin": 0.5}, [n(1), n(-2), LN2]),
        ("sigmoid", {"beta": 1.0}, [n(1), n(-3), LN2]),
        ("hinge", {"margin": 0.5}, [0.0, 3.0, 1.0]),
        # 1 / (2 beta): 1, 0.5, 1; per token 0.5, -1, 0
        ("ipo", {"beta": 1.0}, [0.25, 2.25, 1.0]),
        ("sppo_hard", {"beta": 1.0, "weight": 3.0}, [2.0, 3 * (0.25 + 12.25), 2.0]),
    ],
)
def test_a_pairs_own_weight_margin_and_beta(name, numbers, expected):
    pairs = own(**numbers)
    found = Objective.of([name], beta=BETA)(POLICY, REFERENCE, pairs, pairs)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_betas():
    assert betas(0.3, pairs_of(TOKENS), POLICY) == 0.3
    assert betas(0.3, own(beta=1.0), POLICY).tolist() == [0.3, 1.0, 0.3]

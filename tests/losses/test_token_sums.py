"""LD-DPO's lengths and WPO's weights: worked by hand, and TRL's own code on the same tokens."""

import json
import math

import pytest
import torch

import trl_oracle
from smoldpo.config.losses import FACTS, OPTIONS
from smoldpo.losses import Objective
from smoldpo.losses.inputs import discount_tails, pair_weights
from smoldpo.types import PairLogps, TokenizedPair

LN2 = math.log(2)
# Three pairs: chosen longer, rejected longer, both alike. Log-probabilities and log Σ p² of each
# token.
CHOSEN = [[-1.0, -2.0, -3.0, -4.0], [-2.0], [-1.0, -1.0]]
REJECTED = [[-5.0, -1.0], [-1.0, -2.0, -6.0], [-2.0, -3.0]]
REFERENCE = PairLogps(
    *(
        torch.tensor(side, dtype=torch.float64)
        for side in ([-12.0, -2.0, -2.0], [-6.0, -8.0, -5.0], [-8.0, 0, 0], [0, -6.0, 0])
    )
)
SQUARES = ([[-1.0, -1.0, -2.0, -2.0], [-1.0], [-1.0, -1.0]], [[-1.0] * 2, [-1.0] * 3, [-1.0, -2.0]])


def n(x):
    """-log σ(x)."""
    return math.log(1 + math.exp(-x))


def wide(rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def logps_of(chosen, rejected, squares=None):
    """From tokens, as the definition has it."""
    shorter = [min(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]

    def tails(rows):
        return torch.stack([row[cut:].sum() for row, cut in zip(rows, shorter, strict=True)])

    def sums(rows):
        return torch.stack([row.sum() for row in rows])

    more = () if squares is None else tuple(sums(rows) for rows in squares)
    return PairLogps(sums(chosen), sums(rejected), tails(chosen), tails(rejected), *more)


def pairs_of(chosen, rejected):
    return [
        TokenizedPair("x", (1,), (2,) * len(c), (3,) * len(r))
        for c, r in zip(chosen, rejected, strict=True)
    ]


POLICY = logps_of(wide(CHOSEN), wide(REJECTED), [wide(rows) for rows in SQUARES])
PAIRS = pairs_of(CHOSEN, REJECTED)


def losses(policy=POLICY, reference=REFERENCE, names=("sigmoid",), **settings):
    return Objective.of(names, beta=0.5, **settings)(policy, reference, PAIRS, PAIRS).tolist()


# chosen 10, 2, 2 below zero, of which 7 in the first's tail; rejected 6, 9, 5, of which 8 in the
# second's. α = 0: policy 3, 2, 2 and 6, 1, 5; reference 4, 2, 2 and 6, 2, 5: logits 1 - 0, 0 - 1,
# 0.
@pytest.mark.parametrize(
    "ld_alpha, logits",
    [
        (None, (2, 1, 0)),
        (1.0, (2, 1, 0)),
        (0.0, (1, -1, 0)),
        # policy 6.5 and 5, reference 8 and 5: half of the tails 7, 8, 8, 6
        (0.5, (1.5, 0, 0)),
    ],
)
def test_lengths_by_hand(ld_alpha, logits):
    expected = [n(0.5 * logit) for logit in logits]
    assert losses(ld_alpha=ld_alpha) == pytest.approx(expected, abs=1e-12)


def test_the_effective_log_probabilities():
    found = discount_tails(POLICY, 0.5)
    assert found.chosen.tolist() == [-6.5, -2, -2] and found.rejected.tolist() == [-6, -5, -5]
    assert discount_tails(POLICY, 0.0).chosen.tolist() == [-3, -2, -2]
    assert Objective.of(beta=1).logps_for_loss(POLICY) is POLICY
    assert Objective.of(beta=1, ld_alpha=0.5).logps_for_loss(POLICY).chosen.tolist() == [
        -6.5,
        -2,
        -2,
    ]


def test_likelihood_terms_take_whole_answers():
    # 14 nats over 7 chosen tokens, of the whole step: per pair 10, 2, 2 over 7 / 3
    nll = [3 * nats / 7 for nats in (10, 2, 2)]
    for names, settings, likelihood in (
        (["sigmoid", "sft"], {}, nll),
        (["sigmoid"], {"rpo_alpha": 1.0}, [10 / 4, 2, 2 / 2]),
    ):
        bare = losses(names=names[:1], ld_alpha=0.0)
        expected = [one + two for one, two in zip(bare, likelihood, strict=True)]
        assert losses(names=names, ld_alpha=0.0, **settings) == pytest.approx(expected)
    cpo = losses(reference=None, names=["cpo"], ld_alpha=0.0)
    # policy alone: -3 + 6, -2 + 1, -2 + 5
    compared = [n(0.5 * difference) for difference in (3, -1, 3)]
    assert cpo == pytest.approx([one + two for one, two in zip(compared, nll, strict=True)])


def test_weights_by_hand():
    # log p - log Σ p²: chosen (0 - 1 - 1 - 2) / 4, -1, 0;
    # rejected (-4 + 0) / 2, (0 - 1 - 5) / 3, (-1 - 1) / 2
    exponents = [-1 - 2, -1 - 2, 0 - 1]
    weights = [math.exp(each) for each in exponents]
    lengths = [torch.tensor([len(row) for row in rows]) for rows in (CHOSEN, REJECTED)]
    assert pair_weights(POLICY, *lengths).tolist() == pytest.approx(weights)
    expected = [w * n(0.5 * x) for w, x in zip(weights, (2, 1, 0), strict=True)]
    assert losses(use_weighting=True) == pytest.approx(expected, abs=1e-12)
    # Together: weights are of whole answers, whatever the loss compares.
    expected = [w * n(0.5 * x) for w, x in zip(weights, (1, -1, 0), strict=True)]
    assert losses(use_weighting=True, ld_alpha=0.0) == pytest.approx(expected, abs=1e-12)


def test_a_weight_may_exceed_one_as_in_trl():
    """An answer of likeliest tokens: p 0.5, 0.25, 0.25 has Σ p² 0.375 below it."""
    token, square = math.log(0.5), math.log(0.375)
    sure = PairLogps(*(torch.tensor([x]) for x in (token, token, 0.0, 0.0, square, square)))
    weight = pair_weights(sure, torch.tensor([1]), torch.tensor([1])).item()
    assert weight == pytest.approx((0.5 / 0.375) ** 2) and weight > 1


def test_weights_have_no_gradient():
    chosen = POLICY.chosen.clone().requires_grad_()
    policy = PairLogps(chosen, *list(vars(POLICY).values())[1:])
    Objective.of(beta=0.5, use_weighting=True)(policy, REFERENCE, PAIRS, PAIRS).sum().backward()
    expected = [
        -0.5 * math.exp(w) / (1 + math.exp(0.5 * x)) for w, x in ((-3, 2), (-3, 1), (-1, 0))
    ]
    assert chosen.grad.tolist() == pytest.approx(expected, abs=1e-12)


def test_what_is_missing_is_named():
    bare = PairLogps(POLICY.chosen, POLICY.rejected)
    with pytest.raises(ValueError, match="tails"):
        losses(bare, ld_alpha=0.5)
    with pytest.raises(ValueError, match="with use_weighting"):
        losses(bare, use_weighting=True)


TRLS = ["sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "apo_down"]
TRLS += ["aot_unpaired", "apo_zero", "discopop", "sigmoid_norm"]
CASES = [([name], None) for name in TRLS]
CASES += [(["sigmoid", "sft"], [0.7, 0.3]), (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])]


def random_side(lengths, random):
    return [-4 * torch.rand(size, generator=random, dtype=torch.float64) for size in lengths]


def ours_and_trls(names, weights, use_weighting=False, **settings):
    """Value and gradient with respect to every token's log-probability, ours and TRL's."""
    random = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 13, (2, 7), generator=random).tolist()
    tokens, reference, squares = ([random_side(side, random) for side in lengths] for _ in range(3))
    found = []
    pairs = pairs_of(*tokens)
    for who in ("ours", "theirs"):
        policy = [[row.clone().requires_grad_() for row in rows] for rows in tokens]
        against = logps_of(*reference)
        if who == "ours":
            options = {name: settings[name] for name in OPTIONS if name in settings}
            loss = Objective.of(
                names, weights or (), beta=0.2, options=options, use_weighting=use_weighting,
                ld_alpha=settings.get("ld_alpha"),
            )  # fmt: skip
            value = loss(logps_of(*policy, squares), against, pairs, pairs).mean()
        else:
            if settings.get("ld_alpha") is not None:
                against = discount_tails(against, settings["ld_alpha"])
            value = trl_oracle.dpo(
                policy, (against.chosen, against.rejected), names, beta=0.2, loss_weights=weights,
                squares=squares if use_weighting else None, **settings,
            )  # fmt: skip
        value.backward()
        found.append([value, *(row.grad for rows in policy for row in rows)])
    return found


def assert_trls(names, *arguments, **settings):
    if any("label_smoothing" in FACTS[name].options for name in names):
        settings["label_smoothing"] = 0.05 if "robust" in names or "aot" in names[0] else 0.0
    for ours, theirs in zip(*ours_and_trls(names, *arguments, **settings), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("names, weights", CASES, ids=lambda case: str(case))
def test_lengths_are_trls(names, weights, ld_alpha):
    assert_trls(names, weights, ld_alpha=ld_alpha)


@pytest.mark.parametrize("ld_alpha", [None, 0.35])
@pytest.mark.parametrize(
    "names, weights",
    [([name], None) for name in TRLS if name != "hinge" and not FACTS[name].whole_step]
    + [(["sigmoid", "bco_pair"], [0.8, 0.2])],
    ids=lambda case: str(case),
)
def test_weights_are_trls(names, weights, ld_alpha):
    """Without hinge: TRL 1.16 changes relu's result in place there, and its backward pass fails."""
    assert_trls(names, weights, True, ld_alpha=ld_alpha)


# From the command line


@pytest.fixture
def train(cli, tiny_folder, pairs_file, tmp_path):
    """One step; the folder, and the rows of its metrics."""

    def run(name, *more):
        result = cli(
            "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", name, "--dtype",
            "float32", "--max-steps", 2, "--generate-prompts", 0, "--warmup-ratio", 0,
            "--sample-prompt", "none", "--learning-rate", "1e-2", *more,
        )  # fmt: skip
        assert result.code == 0, result.err
        folder = tmp_path / name
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return folder, [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_a_run_with_both(train, engine):
    folder, rows = train("both", "--ld-alpha", 0, "--use-weighting", "--engine", engine)
    _, bare = train("bare", "--engine", engine)
    before, step, *_, after = rows
    assert bare[1]["loss"] == pytest.approx(LN2, abs=1e-6)
    weight = step["loss"] / LN2
    assert 0 < weight < 1, "ln 2 times the mean weight"
    assert (
        before["eval_loss"] / LN2 == pytest.approx(weight, abs=0.2) and before["eval_loss"] != LN2
    )
    # Under TRL's names what the loss compares, which is the shorter length: less of both answers.
    for name in ("eval_logps/chosen", "eval_logps/rejected"):
        assert before[name] > bare[0][name] + 1, name
    assert before["eval_accuracy/logp"] == bare[0]["eval_accuracy/logp"], "of whole answers"
    pairs = json.loads((folder / "evaluation.json").read_text())["pairs"]
    chosen = [row["after"]["chosen_logp"] for row in pairs]
    assert math.fsum(chosen) / len(chosen) < after["eval_logps/chosen"] - 1
    assert "ld_alpha 0 + use_weighting" in (folder / "README.md").read_text()
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert evaluated["calibration"] is None, "σ of whole answers' margins is no probability here"

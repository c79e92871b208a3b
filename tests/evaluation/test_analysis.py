"""What is said about scores: accuracies and their change, slices, calibration, drift, the sentence,
gates.
"""

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from smoldpo.evaluation import analysis, slices
from smoldpo.evaluation.analysis import pair_rows
from smoldpo.evaluation.gates import failures, parse_gates
from smoldpo.evaluation.headline import explanations, verdict
from smoldpo.evaluation.metrics import PairFacts, PairScore, wins
from smoldpo.evaluation.schema import Evaluation, Judgement, Names, WinRate
from smoldpo.evaluation.side_by_side import most_moved
from smoldpo.evaluation.slices import ALARM_DROP, describe
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import UsageError


def analyse(*given, **options):
    """The record as the file has it."""
    return analysis.analyse(*given, **options).as_json()


def drift(*given, **options):
    return slices.drift(*given, **options).as_json()


def score(chosen, rejected, tokens=(10, 10), reference=None, id="p"):
    reference = (None, None) if reference is None else reference
    return PairScore(id, chosen, rejected, *tokens, *reference)


def synthetic(n=300, gain=0.0, fall=0.0, prompts=None, seed=0):
    """Scores before and after: the margin moves by `gain` on average, chosen by `fall`."""
    draw = random.Random(seed)
    before, after, facts = [], [], []
    for number in range(n):
        chosen, rejected = draw.gauss(-100, 20), draw.gauss(-100, 20)
        tokens = (draw.randint(10, 50), draw.randint(10, 50))
        up, down = draw.gauss(fall, 2), draw.gauss(fall - gain, 2)
        reference = (chosen, rejected)
        before.append(score(chosen, rejected, tokens, reference, str(number)))
        after.append(score(chosen + up, rejected + down, tokens, reference, str(number)))
        facts.append(PairFacts(str(number % (prompts or n)), "abc"[number % 3], "x"))
    return before, after, facts


def test_a_change_is_found_and_no_change_is_not():
    changed = analyse(*synthetic(gain=3), beta=0.1, seed=0)
    assert changed["verdict"] == "change"
    accuracy = changed["accuracy"]["reward"]
    assert accuracy["before"] == {"value": 0.5, "low": None, "high": None}
    assert accuracy["after"]["low"] < accuracy["after"]["value"] < accuracy["after"]["high"]
    assert accuracy["change"]["low"] > 0
    assert accuracy["improved"] + accuracy["worsened"] == 300
    assert (
        f"in {accuracy['after']['value']:.1%} of 300 held-out pairs, before 50.0%"
        in (changed["headline"])
    )
    assert "very unlikely to be chance: p < 0.0001." in changed["headline"]

    same = analyse(*synthetic(gain=0), beta=0.1, seed=0)
    assert same["verdict"] == "no evidence" and "no evidence of a change" in same["headline"]
    assert any("could not be told from chance" in line for line in same["explanations"])

    worse = analyse(*synthetic(gain=-3), beta=0.1, seed=0)
    assert worse["verdict"] == "worse" and "for the worse" in worse["headline"]


def test_where_nothing_changed_no_reach_is_claimed():
    before, _, facts = synthetic()
    lines = explanations(analysis.analyse(before, before, facts, beta=0.1, seed=0))
    assert any("Too few pairs changed, or none" in line for line in lines)
    assert not any("0 points" in line for line in lines)


def test_only_a_logistic_loss_is_calibrated():
    found = analyse(*synthetic(gain=2), beta=0.1, seed=0, logistic=False)
    assert found["calibration"] is None and found["margins"] is not None


def test_comparisons_are_counted_and_corrected():
    found = analyse(*synthetic(gain=1), beta=0.1, seed=0)
    assert found["comparisons"] == 3
    raw = sorted(row["p"] for row in found["accuracy"].values())
    corrected = sorted(row["p_corrected"] for row in found["accuracy"].values())
    assert corrected[0] == pytest.approx(min(1, 3 * raw[0]))
    without = [
        [score(s.chosen_logp, s.rejected_logp, id=s.id) for s in scores]
        for scores in synthetic()[:2]
    ]
    assert analyse(*without, synthetic()[2], beta=0.1, seed=0)["comparisons"] == 2


def test_pairs_of_one_prompt_count_less():
    alone = analyse(*synthetic(gain=1), beta=0.1, seed=0)
    together = analyse(*synthetic(gain=1, prompts=30), beta=0.1, seed=0)
    assert alone["prompts"] == 300 and together["prompts"] == 30
    assert alone["accuracy"]["reward"]["test"] == "exact McNemar test"
    assert together["accuracy"]["reward"]["test"] == "exact sign-flip test by prompt"


def test_two_models_are_called_by_their_names():
    found = analyse(
        *synthetic(gain=3), 0.1, 0, kind="compare", names=Names(before="base", after="tuned")
    )
    assert found["headline"].startswith("tuned prefers") and "base 50.0%" in found["headline"]
    assert "held-out" not in found["headline"]


def test_by_length_and_baselines_by_hand():
    # chosen longer: right, wrong; shorter: right; equal: wrong
    after = [
        score(-1, -2, (20, 10)), score(-2, -1, (20, 10)), score(-1, -2, (5, 10)), score(-2, -1),
    ]  # fmt: skip
    found = describe(after, [PairFacts(str(n)) for n in range(4)]).as_json()
    assert found["baselines"] == {"longer": 0.625, "shorter": 0.375, "coin": 0.5}
    lengths = found["by_length"]
    assert lengths["metric"] == "logp"
    assert (lengths["chosen_longer"]["n"], lengths["chosen_longer"]["after"]["value"]) == (2, 0.5)
    assert lengths["chosen_shorter"]["after"]["value"] == 1
    assert lengths["equal"]["after"]["value"] == 0
    assert lengths["balanced"] == {"before": None, "after": 0.75}
    assert found["accuracy"]["reward"] is None and found["intervals"]["reward"] is None


def test_slices_by_source_add_up():
    before, after, facts = synthetic(gain=2)
    found = analyse(before, after, facts, 0.1, 0)
    sources = found["slices"]["source"]
    assert {row["name"] for row in sources} == {"a", "b", "c"}
    assert sum(row["n"] for row in sources) == 300
    whole = sum(row["n"] * row["after"]["value"] for row in sources) / 300
    assert whole == pytest.approx(found["accuracy"]["reward"]["after"]["value"])
    assert found["slices"]["category"] == []  # one alone is no slice


def test_bins_of_length_difference_hold_every_pair_once():
    before, after, facts = synthetic(gain=2)
    bins = analyse(before, after, facts, 0.1, 0)["by_length_difference"]
    assert len(bins) == 10 and sum(row["n"] for row in bins) == 300
    assert all(row["low"] <= row["high"] for row in bins)
    assert all(a["high"] <= b["low"] for a, b in pairwise(bins))


def test_calibration_of_a_calibrated_and_an_overconfident_model():
    """Labels drawn with the very probability that the margin implies are predicted without
    error.
    """
    draw = random.Random(1)
    facts = [PairFacts(str(n)) for n in range(4000)]

    def model(stretch):
        scores = []
        for _ in range(4000):
            margin = draw.gauss(0, 15)
            if draw.random() > 1 / (1 + math.exp(-0.1 * margin)):
                margin = -margin
            scores.append(score(stretch * margin, 0, reference=(0, 0)))
        return slices.calibration(scores, facts, 0.1).as_json()

    honest, loud = model(1), model(4)
    assert honest["error"] < 0.03 < 0.1 < loud["error"]
    assert [row["n"] for row in honest["bins"]] == [400] * 10
    margins = [row["margin"] for row in honest["bins"]]
    assert margins == sorted(margins) and margins[0] >= 0
    one = honest["bins"][-1]
    assert one["low"] < one["observed"] < one["high"] and one["predicted"] > 0.8


def test_margin_histograms_hold_every_pair():
    before, after, facts = synthetic(gain=2)
    margins = analyse(before, after, facts, 0.1, 0)["margins"]
    for side in ("before", "after"):
        assert sum(margins[side]["counts"]) == 300
        assert len(margins[side]["edges"]) == len(margins[side]["counts"]) + 1
    assert max(margins["before"]["counts"]) == 300  # all zero before
    assert max(margins["after"]["counts"]) < 300


def test_drift_by_hand():
    before = [score(-10, -20, (5, 10)), score(-30, -20, (15, 10))]
    after = [score(-8, -24, (5, 10)), score(-26, -30, (15, 10))]
    found = drift(before, after, [PairFacts("a"), PairFacts("b")], seed=0)
    assert found["chosen"]["before"] == -20 and found["chosen"]["after"] == -17
    assert found["chosen"]["change"]["value"] == 3
    assert found["chosen"]["per_token"]["value"] == pytest.approx(6 / 20)
    assert found["rejected"]["per_token"]["value"] == pytest.approx(-14 / 20)
    assert found["perplexity_chosen"]["before"] == pytest.approx(math.exp(40 / 20))
    assert found["perplexity_chosen"]["after"] == pytest.approx(math.exp(34 / 20))
    assert found["alarm"] is None and found["advice"] == []


def test_drift_per_token_weighs_answers_by_their_tokens():
    """A long answer that falls by 1 and a short one that rises by 1, by turns: a fall per token."""
    tokens = [(100, 1), (1, 1)] * 100
    before = [score(-50, -5, pair) for pair in tokens]
    after = [score(-51 if pair[0] == 100 else -49, -5, pair) for pair in tokens]
    found = drift(before, after, [PairFacts(str(n)) for n in range(200)], seed=0)["chosen"]
    assert found["change"]["value"] == 0 and found["change"]["low"] < 0 < found["change"]["high"]
    even = drift(before[:1] * 60, after[:1] * 60, [PairFacts(str(n)) for n in range(60)], 0)[
        "chosen"
    ]
    assert even["per_token"] == pytest.approx({"value": -0.01, "low": -0.01, "high": -0.01})


def test_falling_chosen_answers_raise_the_alarm():
    before, after, facts = synthetic(gain=3, fall=-4)
    found = analyse(before, after, facts, 0.1, 0)
    assert found["verdict"] == "change"  # the accuracy alone tells nothing of it
    assert "chosen answers became less likely" in found["drift"]["alarm"]
    assert "rejected ones fell further" in found["drift"]["alarm"]
    assert any("learning_rate" in advice for advice in found["drift"]["advice"])
    # A fall that may be chance, and one too small to matter, raise none.
    assert drift(*synthetic(n=12, fall=-1)[:2], synthetic(n=12)[2], 0)["alarm"] is None
    small = synthetic(n=3000, fall=-ALARM_DROP * 30 / 2)
    assert drift(*small, 0)["alarm"] is None


def test_the_verdict_goes_by_the_corrected_p():
    assert verdict(p_corrected=0.09, change=0.1) == "no evidence"
    assert verdict(p_corrected=0.04, change=0.1) == "change"
    found = analyse(*synthetic(n=60, gain=1, seed=15), beta=0.1, seed=0)
    reward = found["accuracy"]["reward"]
    assert reward["p"] < 0.05 <= reward["p_corrected"] and found["verdict"] == "no evidence"


def test_pairs_that_moved_furthest_come_first_whichever_way():
    before = [score(m, 0, id=str(n)) for n, m in enumerate((-1.0, 2.0))]
    after = [score(m, 0, id=str(n)) for n, m in enumerate((1.0, -9.0))]
    assert most_moved(before, after)["changed"] == [1, 0]


def test_notable_pairs():
    before = [score(m, 0, id=str(n)) for n, m in enumerate((-1.0, 2.0, 5.0, -3.0, 1.0))]
    after = [score(m, 0, id=str(n)) for n, m in enumerate((4.0, -1.0, 6.0, -9.0, 1.0))]
    found = most_moved(before, after)
    assert found["changed"] == [0, 1]  # moved by 5 and by 3
    assert found["best"] == [0, 2] and found["worst"] == [3, 1]


def test_gates():
    gates = parse_gates(["reward=0.6", " change/reward = 0.05", "balanced=0.4"])
    assert gates == {"reward": 0.6, "change/reward": 0.05, "balanced": 0.4}
    found = analysis.analyse(*synthetic(gain=3), beta=0.1, seed=0)
    assert failures(found, gates) == []
    sentences = failures(found, {"reward": 0.99, "win_rate": 0.5, "change/logp": 0.9})
    assert len(sentences) == 3 and "at least 0.99" in sentences[0]
    assert "not measured" in sentences[1]
    rate = WinRate(value=0.7)
    found.judges = [Judgement(judge="a", n=10, wins=7, losses=3, ties=0, win_rate=rate)]
    assert failures(found, {"win_rate": 0.6}) == failures(found, {"win_rate": 0.7}) == []


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("reward", "METRIC=VALUE"),
        ("rewrad=0.5", "reward"),
        ("reward=x", "0.55"),
        ("logp=60", "0.55"),
    ],
)
def test_bad_gates_are_refused(gate, says):
    with pytest.raises(UsageError, match=says):
        parse_gates([gate])


def test_facts_and_rows():
    ours = PreferencePair("Why?", "yes", "no", source="s", category="c")
    theirs = PreferencePair("Why?", "yes!", "no!", source="s")
    other = PreferencePair("Why not?", "yes", "no")
    facts = [PairFacts.of(pair) for pair in (ours, theirs, other)]
    assert facts[0].prompt == facts[1].prompt != facts[2].prompt
    assert (facts[0].source, facts[0].category) == ("s", "c")
    scores = [score(-1, -2, id="a")], [score(-3, -4, id="a")]
    rows = [row.as_json() for row in pair_rows(*scores, facts[:1])]
    assert rows[0]["id"] == "a" and rows[0]["before"]["chosen_logp"] == -1
    assert rows[0]["after"]["chosen_logp"] == -3 and rows[0]["category"] == "c"


def test_wins_need_a_reference_for_the_reward():
    with pytest.raises(ValueError, match="reference"):
        wins([score(-1, -2)], "reward")
    assert wins([score(-1, -2), score(-1, -1), score(-2, -1)], "logp") == [1, 0.5, 0]


WRITTEN = Path(__file__).with_name("evaluation.json")
"""evaluation.json of a tiny run, as version 0.1 wrote the file before it had a typed record."""


def test_the_record_reads_and_writes_the_file_as_it_was():
    text = WRITTEN.read_text(encoding="utf-8")
    record = Evaluation.model_validate_json(text)
    assert json.dumps(record.as_json(), indent=2, ensure_ascii=False) + "\n" == text


def test_the_figures_of_the_file_follow_from_its_rows():
    written = json.loads(WRITTEN.read_text(encoding="utf-8"))
    rows = Evaluation.model_validate(written).pairs
    facts = [PairFacts(row.prompt, row.source, row.category) for row in rows]
    before, after = ([getattr(row, side) for row in rows] for side in ("before", "after"))
    found = analysis.analyse(before, after, facts, written["beta"], seed=42)
    found.pairs = pair_rows(before, after, facts)
    answers = {"generation", "judges", "notable"}
    expected = {key: value for key, value in written.items() if key not in answers}
    assert _rounded(found.as_json()) == _rounded(expected)
    assert list(found.as_json()) == list(expected)


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value

"""Answers that no longer end, and answers that repeat themselves."""

import json
import random

import numpy as np
import pytest

from smoldpo.config.schema import TrainConfig
from smoldpo.evaluation.answer_alarms import ENDED_DROP, REPETITION_RISE, answer_alarms
from smoldpo.evaluation.statistics import RESAMPLES, paired_test, sign_flip_test
from smoldpo.models.generate import Answer

PROMPTS = [str(number) for number in range(64)]


def answers(ended, repeating=0, n=64):
    """So many that end, the first ones; and so many that say one thing again and again."""
    texts = ["a b c d " * 8 if number < repeating else f"w{number} x y z" for number in range(n)]
    return [Answer((1,), text, number < ended) for number, text in enumerate(texts)]


def test_answers_that_no_longer_end_raise_the_alarm():
    """As on 1,000 pairs of examples/hh-helpful.yaml: 38% before, none after."""
    ended, _, (alarm,) = answer_alarms(answers(0), answers(24), 128, seed=0)
    assert ended.change.value == -0.375 and ended.test == "exact McNemar test"
    assert ended.p == pytest.approx(2 * 0.5**24)
    assert -0.55 < ended.change.low < -0.375 < ended.change.high < -0.2
    assert "within 128 tokens: the policy 0%, the reference 38%, on 64 prompts" in alarm.text
    assert "95% interval" in alarm.text and "p < 0.0001" in alarm.text
    assert any("rpo_alpha" in line for line in alarm.advice)
    assert any("max_length" in line for line in alarm.advice)


def test_repetition_raises_the_alarm():
    _, repeats, (alarm,) = answer_alarms(answers(9, 16), answers(9), 128, seed=0)
    share = 1 - 4 / 29  # of a b c d said eight times: 29 runs of four words, 4 distinct
    assert repeats.change.value == pytest.approx(16 / 64 * share)
    assert 0.1 < repeats.change.low < repeats.change.value < repeats.change.high < 0.35
    assert "the policy 22%, the reference 0%" in alarm.text and "sign-flip test" in alarm.text


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (answers(24), answers(0)),  # more end
        (answers(24, 0), answers(24, 16)),  # less is repeated
        (answers(0, n=8), answers(3, n=8)),  # 38% before and none after, on too few prompts
        (answers(0, 5, n=8), answers(0, n=8)),
        (answers(20), answers(25)),  # five prompts: p = 0.0625
        (answers(300 - 20, n=300), answers(300, n=300)),  # sure, and small
        (answers(0, 15, n=300), answers(0, n=300)),
    ],
    ids=["more end", "less repeated", "few: ends", "few: repetition", "five", "small fall",
         "small rise"],
)  # fmt: skip
def test_no_alarm(ours, theirs):
    assert answer_alarms(ours, theirs, 128, seed=0)[2] == []


def test_small_changes_here_are_real():
    """Otherwise the test above would pass without a least size."""
    ended = answer_alarms(answers(280, n=300), answers(300, n=300), 128, 0)[0]
    repeats = answer_alarms(answers(0, 15, n=300), answers(0, n=300), 128, 0)[1]
    assert ended.p < 0.001 and -ENDED_DROP < ended.change.value < 0
    assert repeats.p < 0.001 and 0 < repeats.change.value < REPETITION_RISE


def test_the_default_number_of_prompts_shows_a_fall_by_a_fifth():
    n = TrainConfig.model_fields["generate_prompts"].default
    assert answer_alarms(answers(20 - round(0.2 * n), n=n), answers(20, n=n), 128, 0)[2]


def test_random_flips_are_near_all_flips():
    draw = random.Random(0)
    before = [float(draw.random() < 0.4) for _ in PROMPTS]
    after = [float(draw.random() < 0.6) for _ in PROMPTS]
    exact = paired_test(before, after, PROMPTS).p
    found = sign_flip_test(np.subtract(after, before), PROMPTS, seed=1)
    assert 0.001 < exact < 0.2 and found == pytest.approx(exact, abs=0.015)
    assert sign_flip_test([0.0] * 9, PROMPTS[:9], 0) == 1.0
    assert sign_flip_test([1.0] * 64, PROMPTS, 0) == 1 / (1 + RESAMPLES)


def test_no_more_false_alarms_than_said():
    """Where nothing changed: skewed values, as repetition has, most of them 0."""
    rng = np.random.default_rng(3)
    found = 0
    for seed in range(200):
        values = rng.beta(0.2, 2, (2, 64)) * (rng.random((2, 64)) < 0.3)
        found += sign_flip_test(values[1] - values[0], PROMPTS, seed) < 0.05
    assert found <= 20  # 10 on average; more than 20 in 1 of 1,000


def test_a_run_whose_answers_no_longer_end_says_so_everywhere(
    cli, tiny_folder, write_rows, tmp_path
):
    """Short rejected answers push the end of turn down, and long ones hardly lift it."""
    planted = [
        {"prompt": f"Say {n}.", "chosen": "Yes, it is a number. " * 4, "rejected": "."}
        for n in range(100)
    ]
    folder = tmp_path / "endless"
    result = cli(
        "train", "--model", tiny_folder, "--data", write_rows(planted), "--output-dir", folder,
        "--train", "embeddings", "--dtype", "float32", "--learning-rate", "2e-2",
        "--eval-fraction", 0.4, "--max-new-tokens", 120, "--sample-prompt", "none",
    )  # fmt: skip
    assert result.code == 0, result.err
    generation = json.loads((folder / "evaluation.json").read_text())["generation"]
    text = generation["alarms"][0]["text"]
    assert text.startswith("Fewer answers end by themselves within 120 tokens: the policy ")
    assert generation["ended_change"]["change"]["high"] < 0
    assert text in " ".join(result.out.split()) and "What helps:" in result.out
    card = (folder / "model" / "README.md").read_text()
    assert f"- {text}\n" in card[card.index("## Alarms") :]
    assert " ended by themselves within 120 tokens, before 3" in card
    page = (folder / "report.html").read_text()
    assert f'<div class="alarm" role="note"><b>{text}</b>' in page
    assert "Alarm about the answers" in page

"""KTO and unpaired APO from the command line: thumbs, pairs that are split, TRL's losses."""

import json
import sys
from dataclasses import replace

import pytest

from conftest import ROOT, rows
from smoldpo.config.load import build_config
from smoldpo.data.thumbs import as_pairs, as_thumbs, with_partners
from smoldpo.types import PairNumbers, PreferencePair

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_with_trl as compare

WORDS = (
    "--freeze-layers", 2, "--max-steps", 3, "--dtype", "float32", "--generate-prompts", 0,
    "--sample-prompt", "none", "--learning-rate", 3e-3, "--compile", "off",
)  # fmt: skip


def thumbs(count, up=True, down=False):
    """Prompts with one answer each."""
    return [
        {"prompt": f"Is {n} a number?", "completion": f"Yes, {n} is." if n % 3 else "A fox.",
         "label": up if n % 3 else down}
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def train(cli, write_rows, tiny_folder, tmp_path):
    def run(data, *more, loss="kto", code=0):
        write_rows(data)
        result = cli(
            "train", "--model", tiny_folder, "--data", "pairs.jsonl", "--output-dir", "run",
            "--loss-type", loss, *WORDS, *more,
        )  # fmt: skip
        assert result.code == code, result.err
        path = tmp_path / "run" / "metrics.jsonl"
        found = [json.loads(line) for line in path.open()] if path.exists() else []
        return result, found

    return run


def test_thumbs_become_a_run_and_an_auc(train, tmp_path):
    result, metrics = train(thumbs(40, "up", "down"), "--undesirable-weight", 2)
    assert "single answers to train on" in result.err
    steps = [row for row in metrics if "loss" in row]
    kinds = [row for row in steps if "rewards/margins" in row]
    assert len(steps) == 3 and kinds and steps[0]["kl"] == 0 and steps[2]["kl"] > 0
    assert steps[0]["rewards/accuracies"] == 0.5 and "logps/chosen" in kinds[0]
    said = json.loads((tmp_path / "run" / "separation.json").read_text())
    assert said["before"] == 0.5 and said["low"] <= said["after"] <= said["high"]
    assert said["liked"] > said["others"] > 0 and "liked held-out answer" in result.err
    evaluations = [row for row in metrics if "eval_loss" in row]
    assert evaluations[1]["eval_rewards/accuracies"] == said["after"]
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_pairs_are_split_and_held_out_pairs_stay_pairs(train, tmp_path):
    result, metrics = train(rows(40), loss="apo_zero_unpaired")
    account = json.loads((tmp_path / "run" / "data.json").read_text())["split"]
    pairs = account["train_pairs"]
    assert f"{2 * pairs} single answers to train on, {pairs} of them liked" in result.err
    assert f"{pairs} pairs were split into two answers each" in result.err
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["n"] == account["eval_pairs"] and "held-out pairs" in result.out
    assert metrics[0]["eval_loss"] == pytest.approx(0.5)


def test_prompts_with_answers_of_both_kinds_are_evaluated_as_pairs(train, tmp_path):
    data = [
        {"prompt": row["prompt"], "completion": row[side], "label": int(side == "chosen")}
        for row in rows(40)
        for side in ("chosen", "rejected")
    ]
    train(data)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["metric"] == "reward" and found["n"] > 3


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        (thumbs(20, True, True), [], "are of one kind"),
        (thumbs(20, "yes", "no"), [], "known: true, false, 1, 0, up, down"),
        (thumbs(20), ["--rpo-alpha", 1], "rpo_alpha is of pairs, and kto takes single answers"),
        (thumbs(20), ["--loss-type", "sigmoid"], "kto takes single answers and sigmoid pairs"),
        (
            thumbs(20),
            ["--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 1],
            "kto compares the answers of a step, which needs more than one",
        ),
    ],
)
def test_what_cannot_be(train, data, words, message):
    result, _ = train(data, *words, code=1 if "known" in message else 2)
    assert message in result.err


def test_who_trains_on_thumbs_as_on_pairs_is_told_what_takes_them(train, cli, tiny_folder):
    result, _ = train(thumbs(20), loss="sigmoid", code=1)
    assert "no pair is left of 20 rows (dropped: 20 unpaired); answers that nobody" in result.err
    assert "--loss-type kto" in result.err
    said = cli("data", "check", "pairs.jsonl", "--model", tiny_folder, "--json")
    assert "--loss-type kto takes answers by themselves" in said.out


def pair(prompt, chosen, rejected, liked=None):
    return PreferencePair(prompt, chosen, rejected, numbers=PairNumbers(liked=liked))


def test_partners_are_other_answers_of_the_group():
    given = [pair("p", "a", "b"), pair("q", "c", "", True), pair("r", "", "d", False)]
    answers = as_thumbs(given)
    assert [(a.chosen, a.rejected, a.numbers.liked) for a in answers] == [
        ("a", "", True), ("", "b", False), ("c", "", True), ("", "d", False),
    ]  # fmt: skip
    found = with_partners(answers, 2)
    assert [(a.prompt, a.chosen, a.rejected) for a in found] == [
        ("p", "a", "b"), ("p", "b", "a"), ("q", "c", "d"), ("r", "d", "c"),
    ]  # fmt: skip
    assert [a.numbers.liked for a in found] == [True, False, True, False]
    assert [a.rejected for a in with_partners(answers[:3], 2)] == ["c", "a", "b"]
    assert len({a.id for a in found}) == 4
    (both,) = as_pairs([*answers, pair("p", "late", "", True)])
    assert (both.prompt, both.chosen, both.rejected, both.numbers.liked) == ("p", "a", "b", None)


def test_three_steps_equal_trls(tiny_folder, write_rows):
    source = compare.find_model(str(tiny_folder))
    read = compare.read_pairs(str(write_rows(rows(24))), source, 24, 512)
    config = build_config(
        {"loss_type": "kto", "max_steps": 3, "warmup_steps": 0, "learning_rate": 3e-4}
        | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        | {"dtype": "float32", "desirable_weight": 1.0, "undesirable_weight": 1.5}
    )
    schedule = compare.Schedule.of(config, len(read))
    partnered = {}
    for step in range(3):  # the partners of TRL, which are of a batch
        some = schedule.indices(step)
        for place, index in enumerate(some):
            partnered[index] = replace(
                read[index],
                rejected_ids=read[some[place - 1]].chosen_ids,
                numbers=PairNumbers(liked=index % 3 != 0),
            )
    pairs = [partnered[index] for index in range(len(read))]
    ours = compare.our_losses(source, pairs, config, micro_batch=3)
    theirs = compare.trl_kto_losses(source, pairs, config)
    assert len(set(ours)) == 3
    assert ours == pytest.approx(theirs, rel=1e-5)

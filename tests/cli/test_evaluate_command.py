"""`smoldpo evaluate A [B] DATA`, `show`, gates, and what a run says at its end, on tiny random
models.
"""

import json
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoldpo.engine.autotune import KernelChoice
from smoldpo.evaluation.judges.base import LengthJudge
from smoldpo.evaluation.side_by_side import (
    Comparison,
    EvalPrompt,
    GenerationSettings,
    choose_prompts,
)
from smoldpo.models.generate import Answer
from smoldpo.types import PreferencePair, TokenizedPair

QUICK = [
    "--dtype",
    "float32",
    "--learning-rate",
    "1e-2",
    "--freeze-layers",
    "2",
    "--max-new-tokens",
    "6",
]


@pytest.fixture
def run(golden, tmp_path):
    """A finished run, with answers to four prompts."""
    told = ("--generate-prompts", 4, "--num-train-epochs", 3)
    result, folder = golden("evaluate", tmp_path, *QUICK, *told)
    return folder, result


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_ends_with_the_sentence_and_the_table(run):
    folder, result = run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    said = " ".join(result.out.split())
    assert evaluation["headline"] in said
    reward = evaluation["accuracy"]["reward"]
    assert f"{reward['after']['value']:.1%} [{100 * reward['after']['low']:.1f}" in said
    assert "3 comparisons were made" in said and "Picking the" in said
    assert evaluation["verdict"] == "change" and reward["p"] < 0.05
    assert evaluation["headline"] in (folder / "model" / "README.md").read_text()


def test_answers_and_their_log_ratios(run, tiny_folder):
    """Each token's log ratio is log π - log π_ref, by the textbook's forward pass of both
    models.
    """
    folder, _ = run
    samples = lines(folder / "samples.jsonl")
    assert [row["id"] for row in samples][-1] == "sample_prompt" and len(samples) == 5
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    models = [
        AutoModelForCausalLM.from_pretrained(where) for where in (tiny_folder, folder / "model")
    ]
    for who in ("policy", "reference"):
        told = [(row[who], "".join(text for text, _ in row[f"{who}_tokens"])) for row in samples]
        whole = [(text, tokens) for text, tokens in told if "\ufffd" not in text + tokens]
        assert whole and all(text in tokens for text, tokens in whole)
    assert any(row["policy"] != row["reference"] for row in samples)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    shown = evaluation["notable"]["best"] + evaluation["notable"]["worst"]
    assert shown and all(pair["margin_after"] != pair["margin_before"] for pair in shown)
    pair = shown[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": pair["prompt"]}], add_generation_prompt=True, return_dict=False
    )
    answer = tokenizer(pair["chosen"] + "<|im_end|>", add_special_tokens=False).input_ids
    totals = []
    for model in models:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        totals.append(logps)
    expected = (totals[1] - totals[0]).tolist()
    found = [value for _, value in pair["chosen_tokens"]]
    assert found == pytest.approx(expected, abs=2e-3)
    assert "".join(text for text, _ in pair["chosen_tokens"]) == pair["chosen"] + "<|im_end|>"


def test_generation_is_measured(run):
    folder, _ = run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    generation = evaluation["generation"]
    assert generation["prompts"] == 4 and generation["temperature"] == 1
    policy = [row for row in lines(folder / "samples.jsonl") if row["id"] != "sample_prompt"]
    ratios = [value for row in policy for _, value in row["policy_tokens"]]
    tokens = generation["policy"]["tokens"] * 4
    assert generation["kl_per_token"]["value"] == pytest.approx(sum(ratios) / tokens, abs=1e-3)
    judge = evaluation["judges"][0]
    assert judge["judge"] == "length" and judge["wins"] + judge["losses"] + judge["ties"] == 4
    longer = sum(len(row["policy"]) > len(row["reference"]) for row in policy)
    assert judge["wins"] == longer


def test_show_prints_the_same_answer_without_torch(run):
    folder, result = run
    code = (
        "import sys; from smoldpo.cli.main import app\n"
        f"try: app(['show', {str(folder)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    headline = json.loads((folder / "evaluation.json").read_text())["headline"]
    assert headline in " ".join(shown.stdout.split())
    table = [line for line in shown.stdout.splitlines() if "implicit reward" in line]
    assert table and table[0] in result.out


def test_show_json_and_its_errors(run, cli, tmp_path, tiny_folder):
    folder, _ = run
    found = json.loads(cli("show", folder, "--json").out)
    assert found["n"] > 0 and "pairs" not in found
    missing = cli("show", tiny_folder)
    assert missing.code == 2 and "holds no run" in missing.err
    (folder / "evaluation.json").write_text("{")
    damaged = cli("show", folder)
    assert damaged.code == 1 and "evaluation.json" in damaged.err
    (folder / "evaluation.json").unlink()
    unfinished = cli("show", folder)
    assert unfinished.code == 2 and "did not reach its end" in unfinished.err


def test_two_models_on_the_same_pairs(run, cli, tiny_folder, pairs_file):
    folder, _ = run
    result = cli(
        "evaluate", tiny_folder, folder, pairs_file, "--json", "--generate", 3, *QUICK[-2:]
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["kind"] == "compare" and found["n"] == 40
    assert found["names"]["after"] == "run"
    one = json.loads(cli("evaluate", folder, pairs_file, "--reference", tiny_folder, "--json").out)
    for name, value in one["accuracy"].items():
        assert found["after"]["accuracy"][name] == pytest.approx(value)
    assert found["before"]["accuracy"]["reward"] == 0.5  # A is its own reference
    assert found["generation"]["prompts"] == 3
    text = cli("evaluate", tiny_folder, folder, pairs_file).out
    assert "run prefers the human-preferred answer" in " ".join(text.split())


def test_one_model_alone_has_intervals_and_baselines(cli, tiny_folder, pairs_file):
    found = json.loads(cli("evaluate", tiny_folder, pairs_file, "--json").out)
    interval = found["intervals"]["logp"]
    assert interval["low"] < found["accuracy"]["logp"] < interval["high"]
    assert found["baselines"]["coin"] == 0.5 and found["by_length"]["chosen_longer"]["n"] > 0
    out = cli("evaluate", tiny_folder, pairs_file).out
    assert "Picking the longer answer" in out and " to " in out


def test_the_first_pairs_alone(cli, tiny_folder, pairs_file):
    assert (
        json.loads(cli("evaluate", tiny_folder, pairs_file, "--max-samples", 7, "--json").out)["n"]
        == 7
    )


def test_a_judge_is_asked_about_the_policy():
    prompts = [EvalPrompt(str(n), "Hi", (n,)) for n in range(3)]
    settings = GenerationSettings(max_new_tokens=4, temperature=1.0, seed=0)
    comparison = Comparison(
        None, None, None, torch.float32, KernelChoice(), settings, prompts, None, ()
    )
    terse, wordy = ([Answer((1,), text, True)] * 3 for text in ("Hi.", "Good morning."))
    (found,) = comparison.judge([LengthJudge()], wordy, terse, lambda: None)
    assert (found.judge, found.wins, found.losses) == ("length", 3, 0)


def test_prompts_are_spread_over_the_pairs():
    pairs = [PreferencePair(f"p{n // 2}", "c", "r", id=str(n)) for n in range(40)]
    tokenized = [TokenizedPair(pair.id, (n // 2, 1), (2,), (3,)) for n, pair in enumerate(pairs)]
    found = choose_prompts(pairs, tokenized, 4, None, 8)
    assert [prompt.prompt for prompt in found] == ["p0", "p5", "p10", "p15"]
    assert len(choose_prompts(pairs, tokenized, 99, None, 8)) == 20, "each prompt once"


def test_rows_of_two_models(run, cli, tiny_folder, pairs_file, tmp_path):
    folder, _ = run
    table = tmp_path / "rows.jsonl"
    assert cli("evaluate", tiny_folder, folder, pairs_file, "--rows", table).code == 0
    row = lines(table)[0]
    assert row["before"]["chosen_logp"] != row["after"]["chosen_logp"] and row["prompt"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fail-under", "reward=0.5"], "needs --reference"),
        (["--fail-under", "change/logp=0"], "two models"),
        (["--generate", "3"], "second one"),
        (["--judge", "length"], "--generate N"),
        (["--fail-under", "win_rate=0.5"], "needs a --judge"),
        (["--fail-under", "accuracy=0.5"], "no metric"),
        (["--judge", "lenght", "--generate", "3"], "length"),
        (["--beta", "0"], "above 0"),
    ],
)
def test_options_that_cannot_work_are_refused(cli, tiny_folder, pairs_file, arguments, says):
    result = cli("evaluate", tiny_folder, pairs_file, *arguments)
    assert result.code == 2 and says in result.err


def test_how_many_names_evaluate_takes(cli, tiny_folder):
    for names in ([tiny_folder], [tiny_folder] * 4):
        result = cli("evaluate", *names)
        assert result.code == 2 and "one or two models and then the data" in result.err


def test_a_gate_fails_with_one_and_says_why(run, cli, tiny_folder, pairs_file, tmp_path):
    folder, _ = run
    ok = cli("evaluate", folder, pairs_file, "--fail-under", "logp=0.0")
    assert ok.code == 0
    short = cli("evaluate", folder, pairs_file, "--fail-under", "logp=1", "--json")
    if json.loads(short.out)["accuracy"]["logp"] < 1:
        assert short.code == 1 and "should be at least 1" in short.err
    both = cli("evaluate", folder, tiny_folder, pairs_file, "--fail-under", "change/logp=0.9")
    assert both.code == 1 and "change/logp is" in both.err


def test_a_run_can_be_a_gate_and_loses_nothing(cli, tiny_folder, pairs_file, tmp_path):
    folder = tmp_path / "gated"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", folder, *QUICK,
        "--max-steps", 1, "--generate-prompts", 0, "--fail-under", "reward=1,change/reward=0.9",
    )  # fmt: skip
    assert result.code == 1 and "fail_under: change/reward is" in result.err
    assert (folder / "model" / "config.json").exists() and "Run folder" in result.out
    assert (folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--fail-under", "reward=0.5", "--eval-fraction", "0"], "held-out pairs"),
        (["--fail-under", "win_rate=0.5", "--generate-prompts", "0"], "needs a judge"),
        (["--judges", "reward:x", "--generate-prompts", "0"], "answers to judge"),
        (["--judges", "https://me:secret@judge.example/v1"], "SMOLDPO_JUDGE_API_KEY"),
        (["--fail-under", "reward"], "METRIC=VALUE"),
        (["--judges", "lenght"], "length"),
    ],
)
def test_a_run_that_could_not_end_well_does_not_begin(cli, tiny_folder, pairs_file, settings, says):
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", "r", *settings
    )
    assert result.code == 2 and says in result.err and "secret" not in result.err


def test_a_judge_out_of_reach_costs_its_win_rate_alone(cli, tiny_folder, pairs_file, tmp_path):
    folder = tmp_path / "judged"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", folder, *QUICK,
        "--max-steps", 1, "--generate-prompts", 2, "--judges", "length,http://127.0.0.1:9/v1",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "its win rate is missing" in result.err
    judges = json.loads((folder / "evaluation.json").read_text())["judges"]
    assert judges[0]["n"] == 2 and judges[1]["n"] == 0 and "127.0.0.1:9" in judges[1]["error"]


def test_no_prompt_leaves_room_for_an_answer(cli, tiny_folder, pairs_file, tmp_path):
    """The model has 512 positions: then there are no answers, and the run still ends well."""
    folder = tmp_path / "long"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", folder, *QUICK[:-2],
        "--max-steps", 1, "--generate-prompts", 2, "--max-new-tokens", 500, "--sample-prompt",
        "none",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert json.loads((folder / "evaluation.json").read_text())["generation"] is None
    assert "no held-out prompt leaves room" in result.err


def test_answers_at_another_temperature_estimate_no_kl(cli, tiny_folder, pairs_file, tmp_path):
    folder = tmp_path / "cold"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", folder, *QUICK,
        "--max-steps", 1, "--generate-prompts", 2, "--temperature", 0,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (
        json.loads((folder / "evaluation.json").read_text())["generation"]["kl_per_token"] is None
    )


TEXT = "quick brown fox jumps over lazy dog near river bank boil egg water eight minutes"
WORDS = TEXT.split(" ")


def words(draw, count):
    return " ".join(draw.choice(WORDS) for _ in range(count))


def test_a_planted_falling_chosen_run_raises_the_alarm(cli, tiny_folder, write_rows, tmp_path):
    """Rejected is more of the same as chosen: pushing it down takes chosen along."""
    draw = random.Random(0)
    planted = [
        {"prompt": f"Say {n}.", "chosen": words(draw, 10), "rejected": words(draw, 20)}
        for n in range(100)
    ]
    folder = tmp_path / "falling"
    result = cli(
        "train", "--model", tiny_folder, "--data", write_rows(planted), "--output-dir", folder,
        *QUICK, "--learning-rate", "1e-3", "--num-train-epochs", 4, "--generate-prompts", 0,
    )  # fmt: skip
    assert result.code == 0, result.err
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["verdict"] == "change"  # the accuracy alone says that all is well
    assert evaluation["drift"]["chosen"]["change"]["high"] < 0
    assert evaluation["drift"]["alarm"] in " ".join(result.out.split())
    assert "What helps:" in result.out


def test_labels_that_mean_nothing_are_no_evidence_of_change(cli, tiny_folder, write_rows, tmp_path):
    draw = random.Random(1)
    pairs = [
        {"prompt": f"Say {n}.", "chosen": words(draw, 12), "rejected": words(draw, 12)}
        for n in range(300)
    ]
    folder = tmp_path / "shuffled"
    result = cli(
        "train", "--model", tiny_folder, "--data", write_rows(pairs), "--output-dir", folder,
        *QUICK, "--generate-prompts", 0,
    )  # fmt: skip
    assert result.code == 0, result.err
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["n"] > 40 and evaluation["drift"]["chosen"]["change"]["value"] != 0
    assert evaluation["verdict"] == "no evidence", evaluation["headline"]
    assert "no evidence of a change" in " ".join(result.out.split())

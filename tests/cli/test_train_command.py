"""`smoldpo train` from the command line to the run folder, on a tiny random model."""

import io
import json
import resource
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import rows
from faults import child
from smoldpo.training.checkpoint import verify

QUICK = [
    "--per-device-train-batch-size", 4, "--learning-rate", "1e-2", "--num-train-epochs", 3,
    "--dtype", "float32", "--generate-prompts", 0, "--sample-prompt", "none",
]  # fmt: skip
ANSWERS = ["--generate-prompts", 3, "--max-new-tokens", 4, "--sample-prompt", "Hello"]


@pytest.fixture
def trained(golden, tmp_path):
    told = ("--freeze-layers", 2, "--save-steps", 3, "--eval-steps", 4)
    return golden("train", tmp_path, *QUICK, *ANSWERS, *told, pictures=True)


def test_a_run_from_start_to_end(trained, tiny_folder):
    result, run = trained
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "environment.json", "data.json", "metrics.jsonl", "evaluation.json",
        "samples.jsonl", "timings.json", "README.md", "report.html", "checkpoints", "model",
        "resume.json",
    }  # fmt: skip
    assert (run / "report.html").read_text().count("<path") > 100, "plots are drawn"
    evaluation = json.loads((run / "evaluation.json").read_text())
    for title in ("log-probability (sum)", "log-probability per token", "implicit reward"):
        assert title in result.out
    assert f"{evaluation['n']} held-out pairs" in result.out
    assert "Reference:" in result.out and "Policy:" in result.out and str(run) in result.out
    # Policy and reference are equal before: every implicit reward ties.
    assert evaluation["before"]["accuracy"]["reward"] == 0.5
    assert evaluation["after"]["accuracy"]["reward"] > 0.8
    assert len(evaluation["pairs"]) == evaluation["n"]

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(0.69314718, abs=1e-6)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    evaluations = [row for row in metrics if "eval_loss" in row]
    assert evaluations[0]["step"] == 0 and evaluations[0]["eval_loss"] == pytest.approx(0.69314718)
    assert evaluations[-1]["eval_rewards/accuracies"] == evaluation["after"]["accuracy"]["reward"]
    assert [row["step"] for row in evaluations[1:-1]] == list(range(4, len(steps), 4))

    data = json.loads((run / "data.json").read_text())
    assert data["split"]["train_pairs"] + data["split"]["eval_pairs"] == 40


def test_the_saved_model_loads_and_only_unfrozen_weights_moved(trained, tiny_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, run = trained
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert AutoTokenizer.from_pretrained(run / "model").chat_template
    before = load_file(tiny_folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        upper = any(word in name for word in ("layers.2.", "layers.3.", "model.norm"))
        assert torch.equal(parameter, before[name]) != upper, name
    # Checkpoints hold what trains; the newest two stay, and the last one is what was saved.
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step-12", "step-9"]
    earlier, last = (
        load_file(run / "checkpoints" / name / "weights.safetensors")
        for name in ("step-9", "step-12")
    )
    parameters = dict(model.named_parameters())
    assert set(last) == {n for n, p in parameters.items() if not torch.equal(p, before[n])}
    assert all(torch.equal(last[name], parameters[name]) for name in last)
    assert not any(torch.equal(last[name], earlier[name]) for name in last)


def test_the_card_names_base_data_and_accuracy(trained):
    _, run = trained
    card = (run / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "dpo" in head["tags"]
    assert "implicit reward" in card and "50.0%" in card


def test_the_config_runs_again_to_the_same_weights(trained, cli, tmp_path):
    _, run = trained
    again = tmp_path / "again"
    result = cli("train", run / "config.yaml", "--output-dir", again)
    assert result.code == 0, result.err
    first, second = (load_file(r / "model" / "model.safetensors") for r in (run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluate_agrees_with_the_run(trained, cli, tiny_folder, pairs_file, tmp_path):
    _, run = trained
    evaluation = json.loads((run / "evaluation.json").read_text())
    table = tmp_path / "rows.jsonl"
    result = cli("evaluate", run, pairs_file, "--reference", tiny_folder, "--json", "--rows", table)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["n"] == 40 and set(found["accuracy"]) == {"logp", "logp_per_token", "reward"}
    by_id = {row["id"]: row for row in map(json.loads, table.read_text().splitlines())}
    assert set(next(iter(by_id.values()))) == {
        "id", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens",
        "reference_chosen_logp", "reference_rejected_logp",
    }  # fmt: skip
    for pair in evaluation["pairs"]:
        for key, value in pair["after"].items():
            expected = by_id[pair["id"]][key]
            assert value == (expected if isinstance(expected, str) else pytest.approx(expected))


def test_evaluate_without_a_reference(cli, tiny_folder, pairs_file, tmp_path):
    result = cli("evaluate", tiny_folder, pairs_file, "--json", "--rows", tmp_path / "r.jsonl")
    assert json.loads(result.out)["accuracy"]["reward"] is None
    assert "reference_chosen_logp" not in (tmp_path / "r.jsonl").read_text()
    assert "needs --reference" in cli("evaluate", tiny_folder, pairs_file).out


def test_evaluate_a_model_against_itself_ties(cli, tiny_folder, pairs_file):
    result = cli("evaluate", tiny_folder, pairs_file, "--reference", tiny_folder, "--json")
    assert json.loads(result.out)["accuracy"]["reward"] == 0.5


def test_a_reference_of_its_own(cli, trained, tiny_folder, pairs_file, tmp_path):
    _, run = trained
    result = cli(
        "train", "--model", run, "--reference", tiny_folder, "--data", pairs_file,
        "--output-dir", tmp_path / "second", *QUICK, "--max-steps", 2,
    )  # fmt: skip
    assert result.code == 0, result.err
    evaluation = json.loads((tmp_path / "second" / "evaluation.json").read_text())
    assert evaluation["before"]["accuracy"]["reward"] > 0.5
    hashes = json.loads((tmp_path / "second" / "environment.json").read_text())["sha256"]
    assert hashes["policy_start"] != hashes["reference"]


def test_a_full_run_folder_is_not_overwritten_unless_asked(trained, cli, tiny_folder, pairs_file):
    _, run = trained
    before = (run / "metrics.jsonl").read_text()
    stranger = run / "notes.txt"
    stranger.write_text("mine")
    arguments = ["train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run]
    result = cli(*arguments, *QUICK)
    assert result.code == 2 and "already holds a run" in result.err and "--overwrite" in result.err
    assert (run / "metrics.jsonl").read_text() == before
    result = cli(*arguments, *QUICK, "--max-steps", 1, "--overwrite")
    assert result.code == 0, result.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert stranger.read_text() == "mine" and not (run / "checkpoints").exists()


def test_no_evaluation_if_asked(cli, tiny_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run, *QUICK,
        "--max-steps", 1, "--eval-fraction", 0,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert not (run / "evaluation.json").exists() and (run / "model" / "config.json").exists()


@pytest.mark.runs
def test_ctrl_c_keeps_what_is_finished(tiny_folder, write_rows, tmp_path):
    run = tmp_path / "run"
    child.prepare_server()
    process = child.start(
        "train", "--model", tiny_folder, "--data", write_rows(rows(40)), "--output-dir", run,
        *QUICK, "--max-steps", 100000, "--save-steps", 2, "--keep-checkpoints", 100000,
        log=tmp_path / "said.txt",
    )  # fmt: skip
    process.wait_until((run / "checkpoints" / "step-4").exists)
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    err = process.said
    assert "interrupted after" in err and str(run) in err
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) >= 4
    assert f"smoldpo resume {run}" in err
    assert load_file(run / "checkpoints" / "step-2" / "weights.safetensors")
    assert verify(run / "checkpoints" / f"step-{metrics[-1]['step']}")


@pytest.mark.runs
def test_a_full_disk_at_save_time(tiny_folder, pairs_file, tmp_path):
    """A file-size limit below the model's size stands in for a full disk (errno EFBIG, not
    ENOSPC).
    """
    run = tmp_path / "run"
    size = (tiny_folder / "model.safetensors").stat().st_size
    limit = size // 2
    child.prepare_server()
    code, err = child.run(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run,
        *QUICK, "--max-steps", 2, log=tmp_path / "said.txt",
        limits={resource.RLIMIT_FSIZE: limit},
    )  # fmt: skip
    assert code == 1
    assert "disk is full" in err and "bytes needed" in err
    # Nothing half-written stays, and what was finished does.
    assert not (run / "model").exists()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert "eval_loss" in (run / "metrics.jsonl").read_text()


def test_too_little_disk_is_refused_before_anything_is_written(
    cli, tiny_folder, pairs_file, tmp_path, monkeypatch
):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    run = tmp_path / "run"
    result = cli("train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run, *QUICK)
    assert result.code == 1 and "1,000 free" in result.err and "bytes needed" in result.err
    assert not run.exists()


def test_chat_answers_a_prompt(cli, tiny_folder):
    result = cli("chat", tiny_folder, "--prompt", "Hello", "--max-new-tokens", 5)
    assert result.code == 0 and result.out.endswith("\n")


def test_chat_holds_a_conversation(tiny_folder, monkeypatch, capsys):
    from smoldpo.cli.chat import Chat

    lines = iter(["Hello", "", "And then?", "/new", "Again", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    talk = Chat(str(tiny_folder), "Be brief.", max_new_tokens=3, temperature=0.0)
    talk.answer("Before")
    remembered = list(talk.messages)
    talk.converse()
    assert [m["role"] for m in remembered] == ["system", "user", "assistant"]
    assert [m["content"] for m in talk.messages[:2]] == ["Be brief.", "Again"]
    assert len(talk.messages) == 3 and next(lines) == "never read"


def test_chat_ends_with_the_input(cli, tiny_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    result = cli("chat", tiny_folder, "--max-new-tokens", 3)
    assert result.code == 0 and result.out


def test_sources_are_mixed_by_weight(cli, tiny_folder, write_rows, tmp_path):
    items = rows(60)
    write_rows(items[:40], "a.jsonl")
    write_rows(items[40:], "b.jsonl")
    result = cli(
        "train", "--model", tiny_folder, "--data", "a.jsonl,b.jsonl", "--data-weights", "1,1",
        "--output-dir", "run", *QUICK, "--max-steps", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    counts = [source["split"]["train_pairs"] for source in data["sources"]]
    assert [source["train"]["rows_read"] for source in data["sources"]] == [40, 20]
    # Equal weights: the smaller source is used up, and as many of the larger one.
    assert abs(data["split"]["train_pairs"] - 2 * min(counts)) <= 1
    assert data["split"]["eval_pairs"] == sum(s["split"]["eval_pairs"] for s in data["sources"])


def test_other_column_names(cli, tiny_folder, write_rows, tmp_path):
    names = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    path = write_rows([{names[key]: text for key, text in row.items()} for row in rows(30)])
    columns = "prompt=ask,chosen=good,rejected=bad"
    result = cli(
        "train", "--model", tiny_folder, "--data", path, "--columns", columns,
        "--output-dir", "run", *QUICK, "--max-steps", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    evaluated = cli("evaluate", "run", path, "--columns", columns, "--json")
    assert json.loads(evaluated.out)["n"] == 30


def test_held_out_pairs_of_their_own(cli, tiny_folder, write_rows, tmp_path):
    items = rows(30)
    write_rows(items[:24], "train.jsonl")
    write_rows(items[20:], "held.jsonl")
    result = cli(
        "train", "--model", tiny_folder, "--data", "train.jsonl", "--eval-data", "held.jsonl",
        "--output-dir", "run", *QUICK, "--max-steps", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    split = json.loads((tmp_path / "run" / "data.json").read_text())["split"]
    assert split["eval_pairs"] == 10 and split["train_pairs"] == 20
    assert split["train_pairs_dropped_for_eval_prompt"] == 4


def test_both_engines_give_the_same_losses(cli, tiny_folder, pairs_file, tmp_path):
    losses = []
    for engine in ("fast", "plain"):
        result = cli(
            "train", "--model", tiny_folder, "--data", pairs_file, "--engine", engine,
            "--output-dir", engine, *QUICK, "--dtype", "float64", "--max-steps", 7,
        )  # fmt: skip
        assert result.code == 0 and f"engine: {engine}" in result.err
        lines = (tmp_path / engine / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    # The models' norms round to float32 on the way, and training carries that on.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) > 5


def test_a_run_without_a_reference(cli, tiny_folder, pairs_file, tmp_path, monkeypatch):
    """SimPO: no reference pass, no implicit reward, and the reason why."""
    from smoldpo.engine.logprobs import LogprobModel

    runs = []
    logps = LogprobModel.logps
    monkeypatch.setattr(
        LogprobModel, "logps", lambda *given: runs.append(len(given[1].segments)) or logps(*given)
    )
    run = tmp_path / "run"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run, *QUICK,
        "--freeze-layers", 2, "--loss-type", "simpo", "--beta", 2.5, "--simpo-gamma", 0.5,
        "--engine", "fast",
    )  # fmt: skip
    assert result.code == 0, result.err
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = sum(row["pairs"] for row in rows if "loss" in row)
    # Once a pair and step, the held-out pairs before and after, and the longest pair once more,
    # to count the memory that a step takes: nothing else.
    assert sum(runs) == trained + 2 * evaluation["n"] + 1
    assert evaluation["metric"] == "logp" and "reward" not in evaluation["accuracy"]
    assert evaluation["calibration"] is None and "by log-probability" in evaluation["headline"]
    assert "there is no implicit reward" in result.out.replace("\n", " ")
    checks = [row for row in rows if "eval_loss" in row]
    assert len(checks) == 2 and checks[-1]["eval_loss"] < checks[0]["eval_loss"]
    assert checks[-1]["eval_accuracy/reward"] is None
    assert not [key for row in rows for key in row if "rewards/" in key]
    assert "trunk" in json.loads((run / "timings.json").read_text())
    page = (run / "report.html").read_text()
    assert "Loss: simpo" in page and "Log-probability accuracy" in page
    assert "Implicit-reward accuracy" not in page and "none without a reference" in page
    assert "compares with no reference" in (run / "README.md").read_text()


def test_runs_of_several_losses_side_by_side(cli, tiny_folder, pairs_file, tmp_path):
    for name, more in (
        ("orpo", []),
        ("sigmoid", ["--rpo-alpha", 1]),
        ("aot,sft", ["--loss-weights", "1,0.2"]),
    ):
        result = cli(
            "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir",
            tmp_path / name, *QUICK, "--loss-type", name, *more, "--max-steps", 2,
        )  # fmt: skip
        assert result.code == 0, result.err
    result = cli("report", tmp_path / "orpo", tmp_path / "sigmoid", tmp_path / "aot,sft")
    assert result.code == 0, result.err
    page = next(tmp_path.glob("**/*compar*.html"), None) or tmp_path / "report.html"
    text = page.read_text() if page.exists() else result.out
    assert "sigmoid + rpo" in text and "aot + sft" in text
    assert "The loss compares with no reference, so there is no implicit reward; by" in text


def test_both_engines_train_without_a_reference(cli, tiny_folder, pairs_file, tmp_path):
    losses = []
    for engine in ("plain", "fast"):
        run = tmp_path / engine
        result = cli(
            "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run, *QUICK,
            "--loss-type", "cpo", "--engine", engine, "--max-steps", 3,
        )  # fmt: skip
        assert result.code == 0, result.err
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

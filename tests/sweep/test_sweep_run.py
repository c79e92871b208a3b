"""`smoldpo sweep` through the command line, on a tiny model: what it finds and leaves."""

import csv
import json
import shutil

import pytest
import yaml

from conftest import ROOT, noisy_rows
from smoldpo.config.schema import TrainConfig
from smoldpo.data.cleaning.text import prompt_key
from smoldpo.data.load import TrainingData
from smoldpo.sweep import splits
from smoldpo.types import PairNumbers, PreferencePair
from smoldpo.utils.errors import SmoldpoError, UsageError
from sweeping import results, sides, timeless


def test_adapters_and_averages_are_tried_like_any_setting(sweep, cli, out, tmp_path):
    """And best/ holds what was measured: trained anew, it gives the same figures on the final
    pairs.
    """
    sweep({"lora_r": [2, 4]}, use_peft=True, ema_decay=0.5)
    found = results(out)
    assert found["done"] == 2
    config = yaml.safe_load((out / "best" / "config.yaml").read_text())
    config |= {
        "eval_data": str(splits.split_file(out, "final")),
        "output_dir": str(tmp_path / "again"),
    }
    (tmp_path / "final.yaml").write_text(yaml.safe_dump(config))
    run = cli("train", tmp_path / "final.yaml")
    assert run.code == 0, run.err
    ours, theirs = (
        json.loads((folder / "evaluation.json").read_text())["pairs"]
        for folder in (out / "best", tmp_path / "again")
    )
    assert ours == theirs


def test_a_trial_is_the_run_that_its_configuration_says(swept, cli, out, tmp_path):
    """Trained anew by `smoldpo train`, trial and winner come out the same, to the last bit."""
    swept({"beta": [0.1, 0.5], "learning_rate": [1e-4, 1e-2]}, pictures=True)
    found = results(out)
    for name, config in [("trial", "trials/003"), ("best", "best")]:
        run = cli("train", out / config / "config.yaml", "--output-dir", tmp_path / name)
        assert run.code == 0, run.err
    ours, theirs = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (out / "trials/003", tmp_path / "trial")
    )
    assert ours["pairs"] == theirs["pairs"] and ours["accuracy"] == theirs["accuracy"]
    weights = "model/model.safetensors"
    assert (out / "best" / weights).read_bytes() == (tmp_path / "best" / weights).read_bytes()
    winner = json.loads((out / f"trials/{found['winner']:03d}/evaluation.json").read_text())
    again = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert again["pairs"] == winner["pairs"], "the winner, on the validation pairs"


def test_what_a_sweep_leaves(swept, cli, out):
    said = swept({"beta": [0.1, 0.5], "learning_rate": [1e-4, 1e-2]}, pictures=True)
    found = results(out)
    assert found["headline"] in " ".join(said.out.split())
    assert "trial 2 of 4: beta 0.1, learning_rate 0.01 (about" in said.err
    assert said.err.count("engine: fast") == 1, "what holds for all trials is said once"
    values = [trial["accuracy"]["value"] for trial in found["trials"]]
    assert len(set(values)) > 1 and values[found["winner"] - 1] == max(values)
    assert sorted([found["winner"], *found["as_good"], *found["worse"]]) == [1, 2, 3, 4]
    for number in range(1, 5):
        kept = (out / f"trials/{number:03d}/checkpoints").exists()
        assert kept == (number == found["winner"])
        assert not (out / f"trials/{number:03d}/model").exists()
    table = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [float(row["accuracy"]) for row in table] == values
    assert [row["learning_rate"] for row in table] == ["0.0001", "0.01"] * 2
    final = found["final"]
    assert final["n"] == found["final_pairs"]["pairs"] == len(sides(out)["final"])
    assert (
        final["accuracy"]["reward"]["after"]["low"] < final["accuracy"]["reward"]["after"]["value"]
    )
    best = json.loads((out / "best" / "evaluation.json").read_text())
    assert {row["id"] for row in best["pairs"]} == {row["id"] for row in sides(out)["final"]}
    rows = [json.loads(line) for line in (out / "best/metrics.jsonl").read_text().splitlines()]
    checks = [row["eval_rewards/accuracies"] for row in rows if "eval_loss" in row]
    assert checks == [0.5, final["accuracy"]["reward"]["after"]["value"]], (
        "of the final pairs alone"
    )
    assert sum("loss" in row for row in rows) == 5
    assert (out / "best" / "report.html").stat().st_size > 20_000
    again = cli("sweep", "mine.yaml", "--json")
    assert again.code == 0 and json.loads(again.out) == found, "nothing runs a second time"
    assert "trial 1" not in again.err
    shown = cli("report", *(out / "trials").iterdir(), "--out", "all.html")
    assert shown.code == 0, "trials are run folders"


def test_no_final_prompt_is_ever_trained_on_or_ranked_by(sweep, write_rows, out):
    """Prompts have several pairs, and dialogues that open alike go together."""
    items = []
    for number, row in enumerate(noisy_rows(120)):
        asked = [{"role": "user", "content": f"Question {number // 4}: what is it?"}]
        if number % 4 == 3:
            asked += [
                {"role": "assistant", "content": "A number."},
                {"role": "user", "content": f"Which, {number}?"},
            ]
        items.append(row | {"prompt": asked})
    write_rows(items)
    sweep({"beta": [0.1, 0.5]})
    found = sides(out)
    openings = {side: {row["prompt"][0]["content"] for row in found[side]} for side in found}
    assert all(openings.values())
    for one, other in [("train", "validation"), ("train", "final"), ("validation", "final")]:
        assert not openings[one] & openings[other]
    ids = {side: {row["id"] for row in found[side]} for side in found}
    for number in (1, 2):
        evaluation = json.loads((out / f"trials/{number:03d}/evaluation.json").read_text())
        assert {row["id"] for row in evaluation["pairs"]} == ids["validation"]


def test_a_prompt_on_two_sides_stops_the_sweep():
    """The canary of the last check: were the reading to let one through, it would be seen."""
    one = PreferencePair("What?", "yes", "no")
    held = [PreferencePair(f"Question {n}", "yes", "no") for n in range(20)]
    assert splits.split_held_out(TrainingData([one], held, {}), 0.5)
    with pytest.raises(SmoldpoError, match="among the train and the"):
        splits.split_held_out(TrainingData([one, held[0]], held, {}), 0.5)


def test_the_share_of_final_prompts():
    held = [PreferencePair(f"Question {n // 2}", f"yes {n}", "no") for n in range(2000)]
    data = TrainingData([PreferencePair("What?", "yes", "no")], held, {})
    for fraction in (0.2, 0.5):
        found = splits.split_held_out(data, fraction)
        assert abs(len(found.final) / 2000 - fraction) < 0.05
        again = splits.split_held_out(TrainingData(data.train, held[::-1], {}), fraction)
        assert set(again.final) == set(found.final), "whatever the order"
    with pytest.raises(UsageError, match="too few to part"):
        splits.split_held_out(TrainingData(data.train, held[:2], {}), 0.5)


def test_pairs_come_back_from_their_files_as_they_were(tmp_path):
    """Texts with anything in them, both kinds of prompt, ids, sources, and a pair's own numbers."""
    from smoldpo.training.setup import load_data

    turns = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": 'Hi\u2028 "there"\n'},
    )
    held = [PreferencePair(f"Question {n}?", f"yes {n}", "no", id=f"h{n}") for n in range(8)]
    held += [PreferencePair(turns, "Hello é 😀", "bye", id="x", source="s", category="c")]
    own = PairNumbers(2.0, 0.5, 0.3)
    train = [
        PreferencePair("What is it?", "It is this. ", " no", numbers=own, id="a"),
        PreferencePair(
            "Which one?", "That one.", "no, that", numbers=PairNumbers(beta=0.2), id="b"
        ),
    ]
    found = splits.split_held_out(TrainingData(train, held, {}), 0.5)
    account = splits.write_splits(tmp_path, found)
    for side in ("validation", "final"):
        config = TrainConfig(**splits.data_settings(tmp_path, account, side))
        data = load_data(config)

        def plain(some):
            return [
                (p.id, p.prompt, p.chosen, p.rejected, p.source, p.category, p.numbers)
                for p in some
            ]

        ours = getattr(found, side)
        assert [row[:4] for row in plain(data.eval)] == [row[:4] for row in plain(ours)]
        assert [row[4:] for row in plain(data.eval) if row[4] == "s"] == [
            row[4:] for row in plain(ours) if row[4] == "s"
        ]
        assert [(p.id, p.content_hash(), p.numbers) for p in data.train] == [
            (p.id, p.content_hash(), p.numbers) for p in train
        ]


def test_gates_hold_for_the_winner_on_the_final_pairs(sweep, out):
    said = sweep({"beta": [0.1]}, "--fail-under", "reward=0.999", code=1)
    assert "fail_under: " in said.err and results(out)["failed"] == []


def test_a_gate_given_to_a_finished_sweep_holds(swept, sweep, out):
    swept({"beta": [0.1]})
    before = results(out)
    said = sweep({"beta": [0.1]}, "--fail-under", "reward=0.999", code=1)
    assert "fail_under: reward is" in said.err
    assert results(out) == before
    sweep({"beta": [0.1]}, "--fail-under", "reward=0.001")


def test_a_winner_that_was_removed_is_measured_again(swept, cli, out):
    swept({"beta": [0.1]})
    before = results(out)
    shutil.rmtree(out / "best")
    assert cli("resume", "out").code == 0
    assert (out / "best/model").is_dir() and results(out)["final"] == before["final"]


def test_a_sweep_is_not_extended_but_its_best_settings_can_be_trained_for_longer(
    sweep, cli, out, tmp_path
):
    sweep({"beta": [0.1]}, max_steps=None, num_train_epochs=1)
    refused = cli("resume", "out", "--extend", 1)
    assert (
        refused.code == 2
        and "smoldpo train out/best/config.yaml --output-dir FOLDER" in refused.err
    )
    longer = cli("train", "out/best/config.yaml", "--output-dir", "again", "--num-train-epochs", 2)
    assert longer.code == 0, longer.err
    steps = [
        sum(
            '"loss"' in line
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        )
        for name in ("out/best", "again")
    ]
    assert steps[1] == 2 * steps[0]


def test_answers_are_the_winners_alone(sweep, out):
    sweep({"beta": [0.1]}, generate_prompts=2, max_new_tokens=3)
    assert not (out / "trials/001/samples.jsonl").exists()
    assert len((out / "best/samples.jsonl").read_text().splitlines()) == 2


def test_the_best_evaluation_of_a_trial_is_what_is_saved(sweep, cli, out, tmp_path):
    """With load_best_model_at_end and early stopping, best/ holds the policy that was measured."""
    more = {"eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 2}
    sweep({"learning_rate": [3e-2, 1e-1]}, max_steps=9, **more)
    best = out / "best"
    found = results(out)
    assert {trial["steps"] for trial in found["trials"]} != {9}, (
        "an earlier step was the best of one"
    )
    weights = "model/model.safetensors"
    run = cli("train", best / "config.yaml", "--output-dir", tmp_path / "again")
    assert run.code == 0, run.err
    assert (best / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    trial = out / f"trials/{found['winner']:03d}/evaluation.json"
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert json.loads(trial.read_text())["pairs"] == again["pairs"]


def test_a_winner_whose_checkpoint_is_gone(swept, cli, out):
    swept({"beta": [0.1, 0.5]})
    before = timeless(out)
    winner = before["winner"]
    shutil.rmtree(out / f"trials/{winner:03d}/checkpoints")
    (out / "final.json").unlink()
    result = cli("resume", "out")
    assert result.code == 1 and "its last checkpoint is gone" in result.err
    shutil.rmtree(out / f"trials/{winner:03d}")
    assert cli("resume", "out").code == 0
    assert timeless(out) == before


def test_optuna_sweeps_go_on_alike(sweep, cli, out):
    tried = {"learning_rate": {"min": 1e-4, "max": 1e-2, "scale": "log"}, "beta": [0.1, 0.5]}
    sweep(tried, method="optuna", trials=4)
    before = timeless(out)
    for name in ("trials/003", "trials/004", "best", "final.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if before["winner"] > 2:  # its rival's checkpoint is gone, but it is made again
        assert cli("resume", "out").code == 0
        assert timeless(out) == before
    else:
        cli("resume", "out")
        shown = [json.loads((out / f"trials/{n:03d}/trial.json").read_text()) for n in (3, 4)]
        assert [t["settings"] for t in shown] == [t["settings"] for t in before["trials"][2:]]


def test_help_and_the_example(cli, pairs_file, tiny_folder, out):
    said = cli("sweep", "--help")
    assert said.code == 0
    for word in ("--method", "--final-fraction", "min: 1e-5", "--beta", "--json", "--overwrite"):
        assert word in said.out
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in noisy_rows(60)))
    text = (ROOT / "examples" / "sweep.yaml").read_text()
    path = pairs_file.with_name("sweep.yaml")
    path.write_text(text.replace("[20, 25]", "[2, 3]"))
    result = cli(
        "sweep", path, "--model", tiny_folder, "--data", pairs_file, "--trials", 2, "--max-steps",
        1, "--max-new-tokens", 2, "--output-dir", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert results(out)["done"] == 2


def test_prompt_keys_of_all_sides_differ(swept, out):
    swept({"beta": [0.1]})
    keys = {
        side: {prompt_key(str(row["prompt"])) for row in found}
        for side, found in sides(out).items()
    }
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))

"""`smoldpo sweep` through the command line, on a tiny model: what is shared, kept, refused and found."""

import csv
import gc
import importlib.util
import json
import shutil
import sys
import weakref

import pytest
import yaml

from conftest import ROOT, rows
from smoldpo import run, runfolder
from smoldpo.config import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.data.rules.prompts import prompt_key
from smoldpo.engine import build, shared_stores
from smoldpo.engine.kernels import Kernels
from smoldpo.engine.reference_store import ReferenceStore
from smoldpo.engine.scorer import Scorer
from smoldpo.errors import SmoldpoError, UsageError
from smoldpo.sweep import conduct, pairs, shared, trials
from smoldpo.types import PairNumbers, PreferencePair


def noisy_rows(count):
    """Of every third pair the sides are swapped, so that no trial gets all of them right."""
    found = rows(count)
    for row in found[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return found


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pages take longer than tiny trials: they are drawn where a test asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(run, "write_report", lambda *_: None)
        monkeypatch.setattr(conduct, "write_page", lambda *_: None)


@pytest.fixture
def drawn():
    """For tests of pages."""


@pytest.fixture
def sweep(cli, write_rows, tiny_folder, tmp_path):
    """Run a sweep in the folder out, of short trials."""
    write_rows(noisy_rows(90))
    common = {
        "model": str(tiny_folder), "data": "pairs.jsonl", "eval_fraction": 0.5, "max_steps": 5,
        "dtype": "float32", "device": "cpu", "compile": "off", "freeze_layers": 2, "warmup_ratio": 0,
        "per_device_train_batch_size": 4, "sample_prompt": "none", "generate_prompts": 0,
        "learning_rate": 3e-3, "output_dir": "out",
    }  # fmt: skip

    def run(tried, *more, code=0, **settings):
        plain = {k: v for k, v in common.items() if k not in tried} | settings | {"sweep": tried}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        result = cli("sweep", "mine.yaml", *more)
        assert result.code == code, result.err + result.out
        return result

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def timeless(folder):
    """results.json without what a clock says."""
    found = results(folder)
    for trial in found["trials"]:
        trial.pop("seconds")
    return found


def sides(folder):
    return {
        side: [json.loads(line) for line in pairs.file_of(folder, side).read_text().splitlines()]
        for side in pairs.SIDES
    }


@pytest.fixture
def work(monkeypatch):
    """What each trial computes: [streams through the trunk, pairs of the reference]; the last is best/."""
    counts: list[list[int]] = []

    def counting(owner, name, place):
        original = getattr(owner, name)

        def counted(*given, **options):
            counts[-1][place] += 1
            return original(*given, **options)

        monkeypatch.setattr(owner, name, counted)

    counting(Scorer, "trunk_states", 0)
    counting(ReferenceStore, "put", 1)
    for owner, name in ((conduct, "run_trial"), (conduct, "measure_winner")):
        original = getattr(owner, name)

        def marked(*given, original=original, **options):
            counts.append([0, 0])
            return original(*given, **options)

        monkeypatch.setattr(owner, name, marked)
    return counts


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_a_trial_costs_its_top_layers_only(sweep, work, cache, monkeypatch):
    read = []
    original = shared.load_data
    monkeypatch.setattr(shared, "load_data", lambda config: read.append(1) or original(config))
    cut = []
    tokenize = shared.tokenize
    monkeypatch.setattr(shared, "tokenize", lambda *given: cut.append(1) or tokenize(*given))
    sweep({"beta": [0.1, 0.5, 1], "seed": [1, 2]}, cache=cache)
    first, *others, last = work
    assert first[0] > 0 and first[1] > 0
    assert others == [[0, 0]] * 5, "no trunk and no reference pass after the first trial"
    assert last[0] > 0 and last[1] > 0, "the final pairs were not there before"
    assert len(read) == len(cut) == 2, "once for the trials, once for the final pairs"


DEPTHS, BETAS = {"freeze_layers": [2, 3]}, {"beta": [0.1, 0.5]}


@pytest.mark.parametrize(
    "cache, grid, trunks, references",
    [
        ("disk", BETAS | DEPTHS, "1100", "1100"),
        ("memory", DEPTHS | BETAS, "1010", "1010"),
        ("memory", BETAS | DEPTHS, "1111", "1100"),  # it holds one depth's states at a time
    ],
)
def test_another_depth_computes_once_more(sweep, work, cache, grid, trunks, references):
    sweep(grid, cache=cache)
    assert "".join("01"[bool(trunk)] for trunk, _ in work[:4]) == trunks
    assert "".join("01"[bool(pairs)] for _, pairs in work[:4]) == references


def test_without_a_cache_the_reference_is_still_computed_once(sweep, work):
    sweep({"beta": [0.1, 0.5]}, cache="off")
    assert work[0][1] > 0 and work[1][1] == 0
    assert work[1][0] > 0, "the trunk is computed anew, as was asked"


def test_every_trial_computes_as_the_first_one_did(sweep, cli, out, monkeypatch):
    """Which kernel is faster is measured once: another answer would round otherwise, and miss the cache."""
    asked = []
    monkeypatch.setattr(
        build, "choose_kernels", lambda *_: asked.append(1) or Kernels(len(asked) % 2 == 1)
    )
    sweep({"beta": [0.1, 0.5]}, dtype="auto", compile="auto", device="auto")
    assert len(asked) == 1
    machines = [
        json.loads((out / name / "environment.json").read_text())
        for name in ("trials/001", "trials/002", "best")
    ]
    assert all(m["kernels"] == machines[0]["kernels"] for m in machines)
    shutil.rmtree(out / "trials/002")
    assert cli("resume", "out").code == 0 and len(asked) == 1, "nor by a sweep that goes on"
    dtypes = {
        yaml.safe_load((out / n / "config.yaml").read_text())["dtype"]
        for n in ("trials/002", "best")
    }
    assert len(dtypes) == 1 and dtypes != {"auto"}


def test_adapters_and_averages_are_tried_like_any_setting(sweep, cli, out, tmp_path):
    """And best/ holds what was measured: trained anew, it gives the same figures on the final pairs."""
    sweep({"lora_r": [2, 4]}, use_peft=True, ema_decay=0.5)
    found = results(out)
    assert found["done"] == 2
    config = yaml.safe_load((out / "best" / "config.yaml").read_text())
    config |= {"eval_data": str(pairs.file_of(out, "final")), "output_dir": str(tmp_path / "again")}
    (tmp_path / "final.yaml").write_text(yaml.safe_dump(config))
    run = cli("train", tmp_path / "final.yaml")
    assert run.code == 0, run.err
    ours, theirs = (
        json.loads((folder / "evaluation.json").read_text())["pairs"]
        for folder in (out / "best", tmp_path / "again")
    )
    assert ours == theirs


def test_nothing_is_shared_after_a_sweep(sweep):
    sweep({"beta": [0.1]}, cache="memory")
    assert shared_stores._kept is None


def test_a_trial_is_the_run_that_its_configuration_says(sweep, cli, out, tmp_path):
    """Trained anew by `smoldpo train`, trial and winner come out the same, to the last bit."""
    sweep({"beta": [0.1, 0.5], "learning_rate": [1e-4, 1e-2]})
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


@pytest.mark.pictures
def test_what_a_sweep_leaves(sweep, cli, out, drawn):
    said = sweep({"beta": [0.1, 0.5], "learning_rate": [1e-4, 1e-2]})
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
    assert pairs.three_sides(TrainingData([one], held, {}), 0.5)
    with pytest.raises(SmoldpoError, match="among the train and the"):
        pairs.three_sides(TrainingData([one, held[0]], held, {}), 0.5)


def test_the_share_of_final_prompts():
    held = [PreferencePair(f"Question {n // 2}", f"yes {n}", "no") for n in range(2000)]
    data = TrainingData([PreferencePair("What?", "yes", "no")], held, {})
    for fraction in (0.2, 0.5):
        found = pairs.three_sides(data, fraction)
        assert abs(len(found.final) / 2000 - fraction) < 0.05
        again = pairs.three_sides(TrainingData(data.train, held[::-1], {}), fraction)
        assert set(again.final) == set(found.final), "whatever the order"
    with pytest.raises(UsageError, match="too few to part"):
        pairs.three_sides(TrainingData(data.train, held[:2], {}), 0.5)


def test_pairs_come_back_from_their_files_as_they_were(tmp_path):
    """Texts with anything in them, both kinds of prompt, ids, sources, and a pair's own numbers."""
    from smoldpo.materials import load_data

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
    found = pairs.three_sides(TrainingData(train, held, {}), 0.5)
    account = pairs.write_sides(tmp_path, found)
    for side in ("validation", "final"):
        config = TrainConfig(**pairs.settings_of(tmp_path, account, side))
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


def test_a_failed_trial_is_recorded_and_the_rest_go_on(sweep, cli, out, drawn):
    said = sweep({"learning_rate": [1e-3, 1e30], "beta": [0.1, 0.2]}, code=1)
    found = results(out)
    assert found["failed"] == [3, 4] and found["done"] == 2 and found["winner"] in (1, 2)
    assert "2 of 4 trials failed" in said.err and "not finite" in said.err
    assert (out / "trials/003/not_finite.json").exists()
    assert "not finite" in found["trials"][2]["error"] and found["trials"][2]["accuracy"] is None
    assert "not finite" in (out / "report.html").read_text()
    assert found["comparisons"] == 1, "of the two that are done"
    again = cli("resume", "out")
    assert again.code == 1 and results(out) == found, "a failed trial is not made again"


def test_where_every_trial_fails(sweep, out, drawn):
    said = sweep({"learning_rate": [1e30]}, code=1)
    found = results(out)
    assert found["winner"] is None and found["final"] is None
    assert "None of 1 trials came to its end" in said.out and (out / "report.html").exists()


def test_too_deep_a_freeze_fails_that_trial_alone(sweep, out):
    sweep({"freeze_layers": [2, 9]}, code=1)
    assert "freeze_layers is 9, but the model has 4 layers" in results(out)["trials"][1]["error"]


def test_a_full_disk_stops_the_sweep_and_fails_no_trial(sweep, cli, out, monkeypatch):
    from smoldpo.errors import DiskError

    def full(*_):
        raise DiskError("not enough disk space")

    with monkeypatch.context() as patch:
        patch.setattr(trials, "require_disk", full)
        said = sweep({"beta": [0.1, 0.5]}, code=1)
        assert "not enough disk space" in said.err
    assert json.loads((out / "trials/001/trial.json").read_text())["status"] == "running"
    assert cli("resume", "out").code == 0
    assert results(out)["done"] == 2


def test_a_changed_sweep_is_refused_by_name(sweep, out):
    sweep({"beta": [0.1, 0.5]})
    before = results(out)
    said = sweep({"beta": [0.1, 0.6]}, "--max-steps", 3, code=2)
    assert "beta" in said.err and "0.6" in said.err and "max_steps is 3, and was 5" in said.err
    assert "--overwrite" in said.err
    assert results(out) == before
    sweep({"beta": [0.1, 0.5]}, "--cache", "memory", "--logging-steps", 2)
    sweep({"beta": [0.1, 0.6]}, "--overwrite")
    assert results(out)["trials"][1]["settings"] == {"beta": 0.6}


def test_changed_pairs_or_models_are_refused(sweep, cli, out):
    sweep({"beta": [0.1, 0.5]})
    shutil.rmtree(out / "trials/002")
    path = pairs.file_of(out, "final")
    text = path.read_text()
    path.write_text(text.replace("Yes", "Yep"))
    result = cli("resume", "out")
    assert result.code == 2 and "final.jsonl: is not what the sweep began with" in result.err
    path.write_text(text)
    computing = json.loads((out / "computing.json").read_text())
    (known,) = computing["models"].values()
    known["model"] = "0" * 64
    (out / "computing.json").write_text(json.dumps(computing))
    result = cli("resume", "out")
    assert result.code == 2 and "has changed since the sweep's first trials (model)" in result.err
    assert trials.read_record(out, 2).status == "running", "which is no failure of the trial's"


def test_the_folder_is_not_taken_from_others(sweep, out, cli, tmp_path):
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    said = sweep({"beta": [0.1]}, code=2)
    assert "holds something else" in said.err and (out / "letter.txt").exists()
    said = sweep({"beta": [0.1]}, "--output-dir", tmp_path, "--overwrite", code=2)
    assert cli("sweep", out).code == 2


def test_missing_models_are_found_before_anything_runs(sweep, out):
    said = sweep({"reference": ["none", "nowhere/at/all", "neither/here/nor"]}, code=2)
    assert "nowhere/at/all" in said.err and "neither/here/nor" in said.err
    assert not out.exists()


def test_gates_hold_for_the_winner_on_the_final_pairs(sweep, out):
    said = sweep({"beta": [0.1]}, "--fail-under", "reward=0.999", code=1)
    assert "fail_under: " in said.err and results(out)["failed"] == []


def test_a_gate_given_to_a_finished_sweep_holds(sweep, out):
    sweep({"beta": [0.1]})
    before = results(out)
    said = sweep({"beta": [0.1]}, "--fail-under", "reward=0.999", code=1)
    assert "fail_under: reward is" in said.err
    assert results(out) == before
    sweep({"beta": [0.1]}, "--fail-under", "reward=0.001")


def test_a_winner_that_was_removed_is_measured_again(sweep, cli, out):
    sweep({"beta": [0.1]})
    before = results(out)
    shutil.rmtree(out / "best")
    assert cli("resume", "out").code == 0
    assert (out / "best/model").is_dir() and results(out)["final"] == before["final"]


def test_a_missed_gate_is_said_also_where_a_trial_failed(sweep):
    said = sweep({"learning_rate": [1e-3, 1e30]}, "--fail-under", "reward=0.999", code=1)
    assert "1 of 2 trials failed" in said.err and "fail_under: reward is" in said.err


@pytest.mark.parametrize(
    "settings, said",
    [
        (["--fail-under", "rewards=0.6"], "no metric 'rewards'"),
        (["--judges", "size", "--generate-prompts", 1], "judge size"),
        (["--report-to", "wandb"], "the package wandb is not installed"),
        (["--optim", "adamw_8bit"], "needs the package bitsandbytes"),
    ],
)
def test_what_cannot_be_is_refused_before_a_trial(sweep, out, monkeypatch, settings, said):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else there(n))
    assert said in sweep({"beta": [0.1, 0.5]}, *settings, code=2).err
    assert not out.exists()


def test_what_trials_found_outlasts_a_failure_on_the_final_pairs(sweep, cli, out, monkeypatch):
    def failing(*_):
        raise SmoldpoError("no final pairs today")

    with monkeypatch.context() as patch:
        patch.setattr(conduct, "measure_winner", failing)
        sweep({"beta": [0.1, 0.5]}, code=1)
    found = results(out)
    assert found["winner"] and found["done"] == 2 and found["final"] is None
    assert (out / "results.csv").exists()
    assert cli("resume", "out").code == 0
    assert results(out)["final"] is not None


def test_no_trial_keeps_its_model_in_memory(sweep, monkeypatch):
    models, alive = [], []
    original = trials._make

    def made(*given):
        alive.append(sum(model() is not None for model in models))
        trial = original(*given)
        policy = trial.models.engine.policy
        models.append(weakref.ref(policy.model.layers[3].self_attn.q_proj))
        return trial

    monkeypatch.setattr(trials, "_make", made)
    gc.disable()
    try:
        sweep({"learning_rate": [1e-3, 1e30, 1e-2]}, code=1)
    finally:
        gc.enable()
    assert alive == [0, 0, 0] and models[-1]() is None


def test_a_sweep_over_precisions(sweep, out):
    """In float64 the weights are loaded in float64, and hash otherwise."""
    sweep({"dtype": ["float32", "float64"], "beta": [0.1, 0.5]})
    assert results(out)["done"] == 4


def test_the_first_trial_of_the_fast_engine_decides_its_kernels(sweep, out, monkeypatch):
    asked = []
    monkeypatch.setattr(
        build, "choose_kernels", lambda *_: asked.append(1) or Kernels(len(asked) % 2 == 1)
    )
    sweep({"engine": ["plain", "fast"], "beta": [0.1, 0.5]}, compile="auto")
    assert len(asked) == 1
    machines = [
        json.loads((out / f"trials/00{n}/environment.json").read_text()) for n in (1, 2, 3, 4)
    ]
    assert [m["engine"] for m in machines] == ["plain", "plain", "fast", "fast"]
    assert machines[2]["kernels"] == machines[3]["kernels"] != {}


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


def test_overwrite_spares_models_that_are_tried(sweep, cli, out, tiny_folder):
    sweep({"beta": [0.1]})
    best = out / "best/model"
    said = sweep({"model": [str(tiny_folder), str(best)]}, "--overwrite", code=2)
    assert "lies in output_dir" in said.err and best.is_dir()


def test_a_replacement_stopped_half_way_can_be_done_again(sweep, out, monkeypatch):
    sweep({"beta": [0.1]})

    def stopped(path):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(runfolder.shutil, "rmtree", stopped)
        sweep({"beta": [0.5]}, "--overwrite", code=1)
    assert conduct.is_sweep(out)
    sweep({"beta": [0.5]}, "--overwrite")
    assert results(out)["trials"][0]["settings"] == {"beta": 0.5}


@pytest.mark.parametrize("writes", ["write_json", "write_text"])
def test_a_sweep_stopped_while_it_begins_goes_on(sweep, out, monkeypatch, writes):
    def stopped(path, what):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(conduct, writes, stopped)
        sweep({"beta": [0.5]}, code=1)
    sweep({"beta": [0.5]})
    assert yaml.safe_load((out / "sweep.yaml").read_text())["sweep"] == {"beta": [0.5]}


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


def test_a_winner_whose_checkpoint_is_gone(sweep, cli, out):
    sweep({"beta": [0.1, 0.5]})
    before = timeless(out)
    winner = before["winner"]
    shutil.rmtree(out / f"trials/{winner:03d}/checkpoints")
    (out / "final.json").unlink()
    result = cli("resume", "out")
    assert result.code == 1 and "its last checkpoint is gone" in result.err
    shutil.rmtree(out / f"trials/{winner:03d}")
    assert cli("resume", "out").code == 0
    assert timeless(out) == before


def test_the_final_pairs_are_measured_once(sweep, cli, monkeypatch):
    sweep({"beta": [0.1]})
    monkeypatch.setattr(conduct, "measure_winner", None)
    monkeypatch.setattr(conduct, "run_trial", None)
    assert cli("resume", "out").code == 0


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
        "sweep", path, "--model", tiny_folder, "--data", pairs_file, "--trials", 2, "--max-steps", 1,
        "--max-new-tokens", 2, "--output-dir", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert results(out)["done"] == 2


def test_prompt_keys_of_all_sides_differ(sweep, out):
    sweep({"beta": [0.1]})
    keys = {
        side: {prompt_key(str(row["prompt"])) for row in found}
        for side, found in sides(out).items()
    }
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))

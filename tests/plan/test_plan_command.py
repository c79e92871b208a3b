"""`smoldpo plan`: what it says, and that it leaves nothing behind."""

import importlib.util
import json
import mmap
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import rows
from planning import ANSWERS, QUICK, plan
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.batch_budget import RESERVE
from smoldpo.plan import dry_run, trial
from smoldpo.plan.depths import FreezeDepth
from smoldpo.plan.memory import MemoryForecast
from smoldpo.plan.ranks import PlannedRanks


@pytest.fixture
def data(write_rows):
    return write_rows(rows(45))


def listing(*folders: Path):
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("frozen", [2, 0])
def test_the_forecasts_counts_are_the_runs(cli, tiny_folder, data, tmp_path, frozen):
    told = ["--model", tiny_folder, "--data", data, "--freeze-layers", frozen, "--save-steps", 3]
    told += ANSWERS
    found = plan(cli, *told)
    result = cli("train", *QUICK, *told, "--output-dir", "run")
    assert result.code == 0, result.err
    run, counts, forecast = Path("run"), found["counts"], found["run"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    assert counts["steps"] == len(steps) == sum(row["seconds"] >= 0 for row in steps)
    assert counts["train_pairs"] * 2 == sum(row["pairs"] for row in steps)
    split = json.loads((run / "data.json").read_text())["split"]
    assert (counts["train_pairs"], counts["eval_pairs"]) == (
        split["train_pairs"], split["eval_pairs"],
    )  # fmt: skip
    newest = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    weights = load_file(newest / "weights.safetensors")
    assert forecast["trainable_parameters"] == sum(t.numel() for t in weights.values())
    tensors = [t for path in newest.glob("*.safetensors") for t in load_file(path).values()]
    bytes_each = sum(t.numel() * t.element_size() for t in tensors)
    there = list((run / "checkpoints").iterdir())
    assert forecast["disk"]["checkpoints"] == len(there) * bytes_each
    assert forecast["checkpoints_saved"] == -(-len(steps) // 3)
    model = load_file(run / "model" / "model.safetensors")
    assert forecast["disk"]["model"] == sum(t.numel() * t.element_size() for t in model.values())
    cached = Path(__import__("os").environ["XDG_CACHE_HOME"]).rglob("*.states")
    assert forecast["disk"]["store"] == sum(path.stat().st_size for path in cached)
    assert forecast["disk"]["store"] > 0 or frozen == 0
    timed = json.loads((run / "timings.json").read_text())
    names = {phase["name"] for phase in forecast["phases"]}
    assert "trunk and reference" in names & set(timed) and "evaluating after" in names & set(timed)
    optimizer = load_file(newest / "optimizer.safetensors")
    moments = sum(t.numel() * t.element_size() for t in optimizer.values())
    assert forecast["memory"]["optimizer"] == moments


@pytest.mark.skipif(sys.platform != "linux", reason="pages are let go only there")
def test_frozen_weights_count_while_training_where_each_step_runs_them(cli, tiny_folder, data):
    given = ["--model", tiny_folder, "--data", data, "--freeze-layers", 3, "--dtype", "float32"]
    kept, run_again = (plan(cli, *given, "--cache", where) for where in ("disk", "off"))
    layers = load_file(tiny_folder / "model.safetensors")
    frozen = sum(4 * w.numel() for n, w in layers.items() if n.split(".")[2] in {"0", "1", "2"})
    less = run_again["run"]["memory"]["weights"] - kept["run"]["memory"]["weights"]
    assert 0 < less <= frozen and less % mmap.PAGESIZE == 0  # whole pages, of few bytes here
    assert run_again["run"]["memory"]["weights"] == sum(4 * w.numel() for w in layers.values())


def test_nothing_is_left_behind(cli, tiny_folder, data, tmp_path, monkeypatch):
    import os

    cache = Path(os.environ["XDG_CACHE_HOME"])
    before = listing(tmp_path, cache)
    plan(cli, "--model", tiny_folder, "--data", data, "--freeze-layers", 2)
    assert listing(tmp_path, cache) == before
    assert (
        cli("train", "--model", tiny_folder, "--data", data, *QUICK, "--output-dir", "r").code == 0
    )
    before = listing(tmp_path, cache)
    found = plan(cli, "--model", tiny_folder, "--data", data, "--output-dir", "r")
    assert listing(tmp_path, cache) == before
    # And what lies in the cache costs nothing.
    phases = {phase["name"]: phase["seconds"] for phase in found["run"]["phases"]}
    assert found["run"]["freeze_layers"] == 3 and phases["trunk and reference"] == 0
    assert found["run"]["disk"]["store"] == 0


def test_the_table_for_people(cli, tiny_folder, data):
    result = cli("plan", "--model", tiny_folder, "--data", data, *QUICK, *ANSWERS)
    assert result.code == 0, result.err
    for words in (
        "of 4 layers frozen",
        "held out",
        "total",
        "libraries",
        "3*",
        "this run",
        "epoch 1",
    ):
        assert words in result.out
    assert "length" not in result.out  # the judge that takes no time
    assert result.err.count("engine: fast") == 1  # the further depths are loaded in silence


def test_the_machines_speed_is_said_with_the_forecast(cli, tiny_folder, data, monkeypatch):
    """Readings lie between the parts of the dry run; here the machine is half as fast as usual."""
    given = ["--model", tiny_folder, "--data", data, "--freeze-layers", 2, "--dtype", "float32"]
    readings = iter(range(100, 200))
    monkeypatch.setattr(trial, "matmul_rate", lambda dtype, device: float(next(readings)))
    monkeypatch.setattr(trial, "earlier_rates", lambda dtype, device: [220.0, 230.0, 5.0])
    found = plan(cli, *given)
    taken = next(readings) - 100  # the size's, then three depths: first pass, passes, steps
    assert taken == 1 + (1 + 2 + 2) + (1 + 2 + 2) + (1 + 0 + 1)
    assert found["pace"] == {
        "gflops": 106.0, "slowest": 100.0, "fastest": 112.0, "usual": 220.0, "earlier_commands": 3,
    }  # fmt: skip
    assert any("at 220 in this machine's last 3 commands" in note for note in found["notes"])
    result = cli("plan", *given, *QUICK)
    assert "at 220 in this machine's last 3 commands" in " ".join(result.out.split())


@pytest.mark.parametrize(
    "settings",
    [
        ["--engine", "plain", "--loss-type", "simpo"],
        ["--cache", "off", "--optim", "adafactor", "--ema-decay", 0.9],
        ["--cache", "memory", "--freeze-layers", 2, "--max-train-samples", 1],
        ["--loss-type", "aot", "--stream-tokens", 400, "--per-device-train-batch-size", 11],
        ["--eval-fraction", 0],
        ["--freeze", "norms", "--freeze-layers", 4],
        ["--train-layers", "1,3"],
        ["--train", "norms", "--judges", "length,http://localhost:9/v1", *ANSWERS],
    ],
    ids=str,
)
def test_every_kind_of_run_can_be_planned(cli, tiny_folder, data, settings):
    if "--freeze" in settings:  # everything frozen is refused as in a run
        result = cli("plan", "--model", tiny_folder, "--data", data, *QUICK, *settings)
        assert result.code == 2 and "everything is frozen" in result.err
        return
    result = cli("plan", "--model", tiny_folder, "--data", data, *QUICK, *settings, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert len(found["depths"]) == (1 if "--train-layers" in settings else 4)
    assert found["run"]["fits"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in found["depths"])
    if "--judges" in settings:
        assert any("localhost" in note for note in found["notes"])


def test_a_model_that_runs_on_the_plain_engine_alone(cli, tiny_tokenizer, data, tmp_path):
    """Its layers have other names and another place than those of the Llama shape."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **sizes))
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    found = plan(cli, "--model", tmp_path / "gpt2", "--data", data)
    assert found["counts"]["engine"] == "plain" and found["run"]["layers"] == 2
    assert found["run"]["seconds"] > 0 and found["run"]["trainable_parameters"] > 0


def test_a_slow_machine_tries_less_and_forecasts_the_same_run(cli, tiny_folder, data, monkeypatch):
    told = ["--model", tiny_folder, "--data", data, "--freeze-layers", 2]
    batches, train = [], dry_run.train

    def counted(engine, pairs, config, *more, **options):
        batches.append((len(pairs), config.max_steps))
        train(engine, pairs, config, *more, **options)

    monkeypatch.setattr(dry_run, "train", counted)
    usual = plan(cli, *told)
    assert batches == [(8, 2), (8, 2)] * 2 + [(8, 1)]
    batches.clear()
    monkeypatch.setattr(dry_run, "SECONDS", 0.0)
    found = plan(cli, *told)
    assert batches == [(2, 2), (2, 1)] * 2 + [(2, 1)]
    assert found["counts"].keys() == usual["counts"].keys()
    for key in ("steps", "tokens", "train_pairs"):
        assert found["counts"][key] == usual["counts"][key]
    for one, other in zip(found["depths"], usual["depths"], strict=True):
        assert one["disk"] == other["disk"] and one["seconds"] > 0
        assert [p["name"] for p in one["phases"]] == [p["name"] for p in other["phases"]]


TIMED = {
    "a trunk, one that is deeper, and everything": (
        ["--freeze-layers", 2],
        [(2, 2, 8), (0, 2, 8), (0, 2, 8), (3, 1, 17), (0, 1, 8), (0, 1, 8), (0, 4, 8)],
        [(2, True), (2, True), (1, True), (1, True), (4, False)],
    ),
    "everything first": (
        ["--freeze-layers", 0],
        [(0, 4, 8), (3, 1, 17), (0, 1, 8), (0, 1, 8)],
        [(4, True), (4, True), (1, True), (1, True)],
    ),
    "no reference": (
        ["--freeze-layers", 0, "--loss-type", "simpo"],
        [(3, 0, 17), (0, 1, 8), (0, 1, 8)],
        [(4, True), (4, True), (1, True), (1, True)],
    ),
    "a depth alone": (
        ["--train-layers", "3"],
        [(3, 1, 8), (0, 1, 8), (0, 1, 8)],
        [(1, True), (1, True)],
    ),
}


@pytest.fixture
def fitted(monkeypatch):
    """The passes and the steps from which rates were fitted."""
    found, fit = [], trial.fit_rates
    monkeypatch.setattr(trial, "fit_rates", lambda *told: found.extend(told) or fit(*told))
    return found


@pytest.mark.parametrize("kind", TIMED)
def test_what_is_timed(cli, tiny_folder, data, fitted, kind):
    """Of a pass: trunk layers, layers above, pairs; of a step: layers, whether its update
    counts.
    """
    settings, passes, steps = TIMED[kind]
    plan(cli, "--model", tiny_folder, "--data", data, *settings)
    passed, stepped = fitted
    assert [(p.below, p.top, p.counts.pairs) for p in passed] == passes
    assert all(bool(p.counts.head_rows) == bool(p.top) and p.seconds > 1e-4 for p in passed)
    assert [(s.depth.top, s.update is not None) for s in stepped] == steps


def test_a_reference_of_its_own_goes_through_all_layers(cli, tiny_folder, data, fitted):
    told = ["--model", tiny_folder, "--reference", tiny_folder, "--data", data]
    plan(cli, *told, "--freeze-layers", 2)
    prepared = [(p.below, p.top) for p in fitted[0] if p.below or p.top == 4]
    assert prepared == [(2, 4), (3, 4), (0, 4)]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["--freeze-layers", "auto"], "needs a budget"),
        (["--budget", "20m"], "budget is for freeze_layers auto"),
        (["--freeze-layers", 3, "--budget", "20m"], "budget is for freeze_layers auto"),
        (["--freeze-layers", "auto", "--budget", "20 minutes"], "1h30m"),
        (["--freeze-layers", "some"], "auto, or none"),
        (["--freeze-layers", "-1"], "0 or more"),
        (["--freeze-layers", "1.5"], "0 or more"),
    ],
)
def test_settings_that_cannot_be(cli, settings, words):
    for verb in ("plan", "train"):
        result = cli(verb, *settings)
        assert result.code == 2 and words in result.err, result.err
        assert result.err.count(words) == 1 and "1 problem" not in result.err


def test_what_would_be_forecast_wrongly_is_refused(cli, tiny_folder, data):
    told = ["--model", tiny_folder, "--data", data, *QUICK]
    told += ["--sync-ref-model", "--ref-model-sync-steps", 2]
    for more in ([], ["--freeze-layers", "auto", "--budget", "20m"]):
        result = cli("train" if more else "plan", *told, *more)
        assert result.code == 2 and "plan cannot forecast a moving reference" in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        (["--optim", "adamw_8bit"], "needs the package bitsandbytes"),
        (["--report-to", "wandb"], "the package wandb is not installed"),
        (["--judges", "size"], "judge size"),
        (["--fail-under", "rewards=0.6"], "no metric 'rewards'"),
    ],
)
def test_what_a_run_refuses_is_refused_before_anything_is_planned(
    cli, tiny_folder, data, monkeypatch, settings, words
):
    from smoldpo.plan import planner

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else there(n))
    monkeypatch.setattr(planner, "Trial", None)
    told = ["--model", tiny_folder, "--data", data, *settings]
    for verb, *more in (["plan"], ["train", "--freeze-layers", "auto", "--budget", "1h"]):
        result = cli(verb, *told, *more)
        assert result.code == 2 and words in result.err


def test_help_and_other_devices(cli, tiny_folder, data, monkeypatch):
    result = cli("plan", "--help")
    assert result.code == 0 and "--budget" in result.out and "--json" in result.out
    from smoldpo.plan import planner

    monkeypatch.setattr(planner, "pick_device", lambda _: "cuda")
    result = cli("plan", "--model", tiny_folder, "--data", data)
    assert result.code == 2 and "CPU only" in result.err


def test_too_little_memory_is_said(cli, tiny_folder, data, monkeypatch):
    """Depths for which there is no memory are not tried, and marked."""
    found = plan(cli, "--model", tiny_folder, "--data", data, "--freeze-layers", 3)
    libraries = found["run"]["memory"]["libraries"]
    least = found["run"]["peak_bytes"] - libraries
    monkeypatch.setattr(trial, "free_memory", lambda _: int(least * 1.02))
    tight = plan(cli, "--model", tiny_folder, "--data", data, "--freeze-layers", 3)
    everything = tight["depths"][0]
    assert not everything["measured"] and not everything["fits"]


@pytest.fixture
def thresholds(monkeypatch):
    """The bytes below which each dry run refuses its depth, in the order of the trial."""
    found = []
    fit_budget = dry_run.fit_budget

    def watched(engine, pairs, per_step, state_bytes, free):
        one, _ = engine.backward_bytes(pairs, per_step)
        found.append(RESERVE + state_bytes + one)
        return fit_budget(engine, pairs, per_step, state_bytes, free)

    monkeypatch.setattr(dry_run, "fit_budget", watched)
    return found


def test_a_configured_depth_without_room_leaves_the_deeper_ones(
    cli, planted, tiny_folder, data, monkeypatch, thresholds
):
    told = ["--model", tiny_folder, "--data", data, "--freeze-layers", 1]
    plan(cli, *told)
    needs = dict(zip([1, 3, 0], thresholds, strict=True))
    monkeypatch.setattr(dry_run, "free_memory", lambda _: (needs[1] + needs[3]) // 2)
    passes = []
    monkeypatch.setattr(trial, "fit_rates", lambda found, _: passes.append(found) or planted)
    tight = plan(cli, *told)
    assert any(found.below for found in passes[0]), (
        "the frozen layers are timed at the first that fits"
    )
    assert len(thresholds) == 3 + 2, "what trains more than a depth that was refused is not tried"
    depths = {row["freeze_layers"]: row for row in tight["depths"]}
    assert [depths[n]["fits"] for n in range(4)] == [False, False, True, True]
    assert [depths[n]["measured"] for n in range(4)] == [False, False, False, True]
    assert depths[1]["budget"] is None and tight["run"]["freeze_layers"] == 1
    assert all(row["seconds"] > 0 for row in depths.values())
    people = cli("plan", *told, *QUICK)
    assert people.code == 0 and people.out.count("does not fit into memory") == 2
    auto = [*told[:-1], "auto", "--budget", "9999h"]
    monkeypatch.setattr(dry_run, "free_memory", lambda _: (needs[0] + needs[1]) // 2)
    assert plan(cli, *auto)["run"]["freeze_layers"] == 1


def test_where_no_depth_has_room_that_is_the_error(cli, tiny_folder, data, monkeypatch):
    monkeypatch.setattr(dry_run, "free_memory", lambda _: RESERVE + 1000)
    result = cli("plan", "--model", tiny_folder, "--data", data, *QUICK)
    assert result.code == 1 and "not enough memory to train" in result.err


def test_every_evaluation_may_save_a_checkpoint(cli, tiny_folder, data):
    told = ["--eval-steps", 1, "--load-best-model-at-end"]
    found = plan(cli, "--model", tiny_folder, "--data", data, *told)
    assert found["run"]["checkpoints_saved"] == found["counts"]["steps"]
    assert any("load_best_model_at_end" in note for note in found["notes"])


def test_more_ranks_take_less_time_and_send_gradients(cli, tiny_folder, data):
    """The longest share of each step, and the bytes of a sum as docs/scale.md derives them."""
    settings = ("--model", tiny_folder, "--data", data, "--per-device-train-batch-size", 8)
    settings += ("--stream-tokens", 200, "--freeze-layers", 2, "--gradient-accumulation-steps", 1)
    alone, found = (
        plan(cli, *settings, *more)
        for more in ((), ("--nproc", 4, "--network-gbit", 8e3, "--ordered-sum", "false"))
    )
    run = found["run"]
    assert found["counts"]["ranks"] == 4 and alone["run"]["bytes_sent_a_step"] == 0
    assert run["bytes_sent_a_step"] == round(2 * 3 / 4 * 4 * run["trainable_parameters"])
    assert any("on 4 ranks" in note and "8000 Gbit/s" in note for note in found["notes"])
    refused = cli("plan", *settings, "--network-gbit", 10)
    assert refused.code == 2 and "--nproc" in refused.err


def test_what_ranks_send_and_keep():
    """By hand: two rounds of four ranks, 1,000 numbers that train of 5,000, four bytes each."""
    ranks, config = PlannedRanks(4, 1e6), TrainConfig()
    assert ranks.bytes_sent(config, 1000, 5000, 4, 2, 2.0) == 0.75 * 4 * 1000 * 3
    fsdp = config.model_copy(update={"fsdp": True})
    assert ranks.bytes_sent(fsdp, 1000, 5000, 4, 2, 2.0) == 0.75 * 2 * (30000 + 4000)
    assert ranks.streams_at_once(config, 2) == 4 and PlannedRanks().streams_at_once(config, 2) == 2
    parts = {"weights": 80.0, "masters": 8.0, "optimizer": 16.0, "gradients": 8.0, "other": 1.0}
    depth = FreezeDepth(0, 0, 8, 1000, False)
    kept = ranks.memory(fsdp, depth, MemoryForecast(parts, {"training": 113.0}))
    assert kept.parts["weights"] == 20 and kept.phases["training"] == 113 - 84 + 10

"""What the forecast counts is what a run of the real engine then does, stream by stream."""

import math
import sys
from dataclasses import dataclass, field

import pytest
import torch

from conftest import rows
from faults.test_micro_batches import PAIRS as TRAINED
from faults.test_micro_batches import engine_of
from smoldpo.config.load import build_config
from smoldpo.engine.batch_budget import RESERVE, fit_budget, fitting_batching
from smoldpo.engine.batching import STREAM_MULTIPLE, OpCounts, PairBatching, TokenBatching, total
from smoldpo.engine.layout import ROWS, TRUNK_ROWS
from smoldpo.engine.logprobs import LogprobModel
from smoldpo.engine.packing import pack, pair_length
from smoldpo.engine.plain import pad_batch
from smoldpo.plan import cache_lookup, workload
from smoldpo.plan.depths import FreezeDepth, TrialDepth, all_depths, depths_to_try
from smoldpo.plan.dry_run import TrialSize, choose_trial_size, trial_batches
from smoldpo.plan.planner import make_plan
from smoldpo.plan.trial import Trial
from smoldpo.training.loop import loss_function
from smoldpo.training.run import run_training
from smoldpo.training.sampler import Schedule
from smoldpo.training.state import TrainingState
from smoldpo.types import TokenizedPair
from smoldpo.utils.errors import OutOfMemoryError

QUICK = {
    "dtype": "float32", "max_new_tokens": 4, "generate_prompts": 0, "sample_prompt": None,
    "learning_rate": 1e-3, "num_train_epochs": 3, "stream_tokens": 700, "cache_limit": 1.0,
}  # fmt: skip
PAIRS = [
    TokenizedPair(str(n), (7, 8, 9, 1, 2, 3, 4, 5) + (n,) * n, (5,) * (3 * n + 1), (6,) * (40 - n))
    for n in range(1, 30)
]
SHARED = (7, 8, 9, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("shared", [(), SHARED])
def test_a_stream_is_counted_as_it_is_packed(shared):
    batching = TokenBatching(700, shared)
    for stream in batching.forward_batches(PAIRS) + batching.step_batches(PAIRS):
        batch, work = pack(stream, "cpu", STREAM_MULTIPLE, shared), batching.count(stream)
        filled = batch.input_ids.shape[1]
        assert work.rows == math.ceil(filled / ROWS) * ROWS
        assert work.trunk_rows == math.ceil(filled / TRUNK_ROWS) * TRUNK_ROWS
        assert work.scores == sum(slot.length**2 for slot in batch.layout.slots)
        assert work.head_rows == len(batch.targets) and work.pairs == len(stream)
        assert batching.saved_rows(stream) >= filled
    assert sum(len(stream) for stream in batching.forward_batches(PAIRS)) == len(PAIRS)


def test_padded_rows_are_counted_as_they_are_padded():
    batching = PairBatching(4, 8)
    for stream in batching.step_batches(PAIRS):
        padded, work = pad_batch(stream).input_ids, batching.count(stream)
        assert work.rows == work.head_rows == padded.numel()
        assert work.scores == padded.shape[0] * padded.shape[1] ** 2
    assert [len(s) for s in batching.step_batches(PAIRS)] == [4] * 7 + [1]
    assert [len(s) for s in batching.forward_batches(PAIRS)] == [8, 8, 8, 5]


@dataclass
class Spy:
    """Streams that went through the real engine."""

    trunk: list = field(default_factory=list)
    passes: list = field(default_factory=list)
    steps: list = field(default_factory=list)

    @staticmethod
    def work(batches):
        return total(
            OpCounts(
                rows=math.ceil(b.input_ids.shape[1] / ROWS) * ROWS,
                trunk_rows=math.ceil(b.input_ids.shape[1] / TRUNK_ROWS) * TRUNK_ROWS,
                scores=sum(slot.length**2 for slot in b.layout.slots),
                head_rows=len(b.targets),
                batches=1,
                pairs=len(b.segments),
            )
            for b in batches
        )


@pytest.fixture
def spy(monkeypatch):
    seen = Spy()
    trunk_states, scored = LogprobModel.trunk_states, LogprobModel.logps

    def trunk(self, batch):
        seen.trunk.append(batch)
        return trunk_states(self, batch)

    def logps(self, batch, states):
        (seen.steps if torch.is_grad_enabled() else seen.passes).append(batch)
        return scored(self, batch, states)

    monkeypatch.setattr(LogprobModel, "trunk_states", trunk)
    monkeypatch.setattr(LogprobModel, "logps", logps)
    return seen


@pytest.fixture
def here(monkeypatch, tmp_path, tmp_path_factory):
    """An empty folder and cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def counted(config):
    """What the forecast counts for this configuration, by loading as it does."""
    trial = Trial(config, 0.0)
    depth = next(d for d in trial.depths if d.frozen == trial.models.trainable.frozen_layers)
    misses = trial.misses[depth.frozen]
    return trial.counter.workload(depth, trial.batching, misses, OpCounts()), trial, depth


def same(work, other):
    names = ("rows", "trunk_rows", "scores", "head_rows", "batches", "pairs")
    assert [getattr(work, n) for n in names] == [getattr(other, n) for n in names]


@pytest.mark.parametrize(
    "settings",
    [
        {"freeze_layers": 2},
        {"freeze_layers": 0},
        {"freeze_layers": 3, "eval_steps": 3, "load_best_model_at_end": True},
        {"freeze_layers": 2, "max_steps": 7, "per_device_train_batch_size": 11},
        {"freeze_layers": 2, "loss_type": "simpo"},
        {"freeze_layers": 2, "reference": "own"},
        {"freeze_layers": 2, "eval_fraction": 0},
        {"freeze_layers": 2, "use_weighting": True},
        {"train_layers": "1,3"},
        {"train": "*.mlp.*"},
    ],
    ids=str,
)
def test_a_run_does_what_was_counted(here, spy, tiny_folder, write_rows, settings):
    path = write_rows(rows(45))
    own = {"reference": str(tiny_folder)} if "reference" in settings else {}
    given = {"model": str(tiny_folder), "data": str(path)} | QUICK | settings | own
    config = build_config(given)
    load, _, depth = counted(config)
    spy.__init__()
    result = run_training(config.model_copy(update={"output_dir": "run"}))
    assert result.steps == sum(load.steps) and len(load.epochs) == len(load.steps)
    same(Spy.work(spy.trunk), load.trunk)
    # One of the steps' streams is the pair with which the run looks how much memory a step needs.
    looked = [batch for batch in spy.steps if len(batch.segments) == 1][:1]
    steps = [batch for batch in spy.steps if batch is not looked[0]]
    same(Spy.work(steps), total(load.epochs))
    times = load.evaluations_before + len(load.phases.evaluations) + load.phases.after
    same(Spy.work(spy.passes), total([load.reference] + [load.evaluation] * times))
    assert depth.trainable == sum(
        p.numel() for n, p in _model(tiny_folder).named_parameters() if _trains(n, settings)
    )
    assert depth.below == settings.get("freeze_layers", 1 if "train_layers" in settings else 0)


def _model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def _trains(name, settings):
    if "train" in settings:
        return ".mlp." in name
    if "train_layers" in settings:
        return "layers.1." in name or "layers.3." in name
    frozen = settings["freeze_layers"]
    if "embed" in name:
        return frozen == 0
    return "layers." not in name or int(name.split("layers.")[1].split(".")[0]) >= frozen


def test_what_lies_in_the_cache_is_not_counted_again(here, tiny_folder, write_rows):
    config = build_config(
        {"model": str(tiny_folder), "data": str(write_rows(rows(45)))}
        | QUICK
        | {"freeze_layers": 2}
    )
    cold, trial, _ = counted(config)
    assert cold.trunk.pairs == cold.reference.pairs == 45 and cold.states_bytes > 0
    run_training(config.model_copy(update={"output_dir": "run"}))
    warm, trial, _ = counted(config)
    assert warm.trunk == warm.reference == OpCounts() and warm.states_bytes == 0
    # Of another depth nothing is there; and the half of other data is.
    assert len(trial.misses[1].without_states) == len(trial.misses[1].without_logps) == 45
    more = write_rows(rows(90), "more.jsonl")
    half, _, _ = counted(config.model_copy(update={"data": [str(more)]}))
    assert half.trunk.pairs == half.reference.pairs == 45
    off, _, _ = counted(config.model_copy(update={"cache": "off"}))
    assert off.trunk.pairs == 45 and off.recomputed == 1


def test_states_without_room_are_computed_again(here, tiny_folder, write_rows):
    path = write_rows(rows(45))
    given = {"model": str(tiny_folder), "data": str(path)} | QUICK | {"freeze_layers": 2}
    load, _, _ = counted(build_config(given))
    half = load.states_bytes / 2 / 1e9
    tight, _, _ = counted(build_config(given | {"cache_limit": half}))
    assert 0.5 < tight.recomputed < 1 and tight.states_bytes == pytest.approx(load.states_bytes / 2)


def test_depths_are_the_runs_own(here, tiny_folder, write_rows):
    path = write_rows(rows(45))
    given = {"model": str(tiny_folder), "data": str(path)} | QUICK
    config = build_config(given | {"freeze_layers": 2, "freeze": "*.mlp.*"})
    trial = Trial(config, 0.0)
    policy = trial.models.engine.policy
    assert all(p.requires_grad == ("layers.2" in n or "layers.3" in n or n == "model.norm.weight")
               for n, p in policy.named_parameters() if ".mlp." not in n)  # fmt: skip
    assert [d.frozen for d in trial.depths] == [0, 1, 2, 3]
    assert [d.below for d in trial.depths] == [0, 1, 2, 3]
    assert [d.head_trains for d in trial.depths] == [True, False, False, False]
    each = trial.depths[1].trainable - trial.depths[2].trainable
    layer = policy.model.layers[0]
    mlp = sum(p.numel() for p in layer.mlp.parameters())
    assert each == sum(p.numel() for p in layer.parameters()) - mlp
    assert all_depths(config.model_copy(update={"freeze": []}), trial.models)[1].trainable == (
        trial.depths[1].trainable + 3 * mlp
    )


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_what_the_optimizer_takes_is_known_at_every_depth(here, tiny_folder, write_rows, optim):
    """Adafactor's state is no fixed share of what trains: no line between depths is right."""
    given = {"model": str(tiny_folder), "data": str(write_rows(rows(45))), "optim": optim} | QUICK
    given |= {"ema_decay": 0.9}
    for depth in Trial(build_config(given), 0.0).depths:
        config = build_config(given | {"freeze_layers": depth.frozen})
        trial = Trial(config, 0.0)
        state = TrainingState(trial.models.engine, config)
        pairs = trial.data.train[:8]
        train_some(trial.models.engine, pairs, config, state)
        captured = state.capture()
        moments = captured.tensors["optimizer"].values()
        assert depth.optimizer_bytes == sum(t.numel() * t.element_size() for t in moments)
        assert depth.checkpoint_bytes == captured.bytes and depth.step_bytes == state.step_bytes


def train_some(engine, pairs, config, state):
    """A step, so that the optimizer has its state."""
    engine.prepare(pairs)
    engine.accumulate_gradients(pairs, loss_function(config, config.beta))
    state.optimizer.step()


def test_pairs_are_looked_up_and_counted_once_for_all_depths(
    here, tiny_folder, write_rows, monkeypatch
):
    keyed, grouped = [], []
    key, once = TokenBatching.key, workload._count_first_pass

    def counted_key(self, pair):
        if sys._getframe(1).f_globals["__name__"] == cache_lookup.__name__:
            keyed.append(pair)
        return key(self, pair)

    monkeypatch.setattr(TokenBatching, "key", counted_key)
    monkeypatch.setattr(
        workload, "_count_first_pass", lambda *given: grouped.append(1) or once(*given)
    )
    given = {"model": str(tiny_folder), "data": str(write_rows(rows(45)))} | QUICK
    make_plan(build_config(given | {"freeze_layers": 2}))
    assert len(keyed) == 45
    assert len(grouped) == 2, "with frozen layers, and without"


@pytest.mark.parametrize("kind, size", [("plain", 8), ("fast", 4000)])
@pytest.mark.parametrize("per_step", [3, 8])
def test_the_budget_is_the_runs_at_any_memory(tiny_model, kind, size, per_step):
    engine = engine_of(tiny_model, kind, size)
    engine.prepare(TRAINED)
    batching = engine.batching
    assert batching.budget == size
    one, most = engine.backward_bytes(TRAINED, per_step)
    longest = batching.longest(TRAINED)
    row = one / batching.saved_rows([longest])
    seen = set()
    for free in range(int(0.8 * one), int(1.7 * most), max(1, int(most / 40))):
        free += RESERVE + 1000
        engine.batching = batching
        try:
            fit_budget(engine, TRAINED, per_step, 1000, free)
            budget = engine.budget
        except OutOfMemoryError:
            budget = None
        kept = round(row * batching.saved_rows([longest]))
        found = fitting_batching(batching, kept, TRAINED, per_step, free - 1000 - RESERVE)
        assert (found and found.budget) == budget, free - RESERVE
        assert found is None or found == engine.batching
        seen.add(budget)
    assert None in seen and size in seen and len(seen) > 2


def test_which_depths_are_tried():
    depths = [FreezeDepth(n, n, 30, 100 * (30 - n), n == 0) for n in range(30)]

    def tried(configured):
        return [each.depth.frozen for each in depths_to_try(depths, configured)]

    assert tried(25) == [25, 29, 0] and tried(10) == [10, 29, 0]
    assert tried(0) == [0, 29] and tried(29) == [29, 25, 0]
    assert [each.depth.frozen for each in depths_to_try(depths[:1], 0)] == [0]
    assert [each.depth.frozen for each in depths_to_try(depths[:2], 1)] == [1, 0]


def test_the_slowest_depth_is_tried_least():
    """Once if it is not the run's own, without passes unless it is alone; all others in full."""
    depths = [FreezeDepth(n, n, 30, 100 * (30 - n), n == 0) for n in range(30)]

    def tried(configured, depths=depths):
        return [(each.one_step, each.time_passes) for each in depths_to_try(depths, configured)]

    assert tried(25) == tried(29) == [(False, True), (False, True), (True, False)]
    assert tried(0) == [(False, False), (False, True)] and tried(0, depths[:1]) == [(False, True)]


def test_the_trial_size_is_what_a_machine_can_do():
    """Of SmolLM2-135M at three depths: whole, then fewer pairs at once, and never none."""
    model = 106_000_000, 28_000_000
    tried = depths_to_try([FreezeDepth(n, n, 30, 30 - n, n == 0) for n in (0, 25, 29)], 25)

    def size_at(gigaflops, per_step=8):
        return choose_trial_size(PAIRS, per_step, *model, tried, gigaflops * 1e9)

    assert size_at(1e6) == TrialSize(8, True) and size_at(1e6, 2) == TrialSize(2, True)
    found = [size_at(rate) for rate in (2000, 300, 150, 100, 60, 1)]
    assert found[-1] == TrialSize(2, False) and size_at(1, 1) == TrialSize(1, False)
    pairs = [each.pairs for each in found]
    assert pairs == sorted(pairs, reverse=True) and len(set(pairs)) > 2
    size = sum(map(pair_length, PAIRS)) / len(PAIRS), 20.0, 300
    four, all_three = TrialSize(4, False), (*model, tried, size)
    assert four.operations(*all_three) > four.operations(*model, tried[:2], size)
    assert four.operations(*all_three) < TrialSize(4, True).operations(*all_three)


def test_the_operations_of_a_trial_by_hand():
    """Two pairs of 245 tokens, 100 scored, at one layer of thirty of a million parameters in
    all.
    """
    logits, layer, size = 2 * 100 * 1_000, 1_000_000 / 30, (245, 100, 900)
    run = TrialDepth(FreezeDepth(29, 29, 30, 50, False))
    prepared = 1920 * 1_000_000 + 2 * logits  # 2 x 2 x 245 + 900 tokens fill one block
    known = 2 * prepared + 2 * 1024 * layer
    steps = 3 * (6 * 512 * layer + 4 * logits)
    found = TrialSize(2, False).operations(1_000_000, 1_000, [run], size)
    assert found == pytest.approx(known + 2 * 2 * (512 * layer + logits) + steps)
    steps = 4 * (6 * 512 * layer + 4 * logits)
    found = TrialSize(2, True).operations(1_000_000, 1_000, [run], size)
    assert found == pytest.approx(known + 4 * 2 * (512 * layer + logits) + steps)
    longer = (500, 100, 900)  # of two batches 2,900 tokens fill two blocks
    known = 2 * (2 * 1920 * 1_000_000 + 2 * logits) + 2 * 1024 * layer
    steps = 4 * (6 * 1024 * layer + 4 * logits)
    passes = 4 * 2 * (1024 * layer + logits)
    operations = TrialSize(2, True).operations(1_000_000, 1_000, [run], longer)
    assert operations == pytest.approx(known + passes + steps)
    # One that trains more: no trunk, so no longest pair on the way through it; one batch, one step.
    slowest = TrialDepth(FreezeDepth(0, 0, 30, 100, True), one_step=True, time_passes=False)
    both = TrialSize(2, True).operations(1_000_000, 1_000, [run, slowest], size)
    prepared = 960 * 1_000_000 + logits
    step = 6 * 512 * 1_000_000 + 6 * logits
    assert both - found == pytest.approx(2 * prepared + 2 * 1024 * 1_000_000 + step)


def test_samples_are_short_and_long():
    short, long = trial_batches(PAIRS, 4)
    assert len(short) == len(long) == 4
    length = {pair.id: sum(map(len, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)))
              for pair in PAIRS}  # fmt: skip
    assert max(length[p.id] for p in short) < min(length[p.id] for p in long)
    assert trial_batches(PAIRS[:1], 8) == (PAIRS[:1], PAIRS[:1])


def test_the_busiest_worker_decides_how_long_a_pass_takes():
    """Streams of 12, 3, 3 and 9 pairs: the second of two workers has all but the first."""
    batching, (pair, *_) = TokenBatching(10_000), PAIRS
    batches = [[pair] * count for count in (12, 3, 3, 9)]
    rows = [batching.count(batch).rows for batch in batches]
    assert rows[1] + rows[2] < rows[0] < rows[1] + rows[2] + rows[3]
    found = batching.count_busiest(batches, 2)
    assert (found.pairs, found.batches) == (15, 3)
    assert batching.count_busiest(batches, 1) == batching.count_all(batches)
    assert (
        batching.count_busiest(batches, 4).pairs == batching.count_busiest(batches, 9).pairs == 12
    )


def test_a_step_of_several_streams_is_counted_as_the_workers_share_it():
    config = build_config(QUICK | {"loss_type": "aot", "per_device_train_batch_size": 8})
    counter = workload.RunCounter(config, PAIRS, PAIRS[:4])
    batching = TokenBatching(450)
    alone, two = (counter.steps(batching, workers) for workers in (1, 2))
    assert two.steps == alone.steps and two.several == alone.several > 0
    assert sum(e.rows for e in two.epochs) < sum(e.rows for e in alone.epochs)
    schedule = Schedule.of(config, len(PAIRS))
    cut = [
        batching.step_batches([PAIRS[index] for index in schedule.indices(step)])
        for step in range(schedule.total_steps)
    ]
    rows = [sorted(map(batching.saved_rows, batches)) for batches in cut]
    assert alone.longest == max(each[-1] for each in rows)
    assert two.longest == max(sum(each[-2:]) for each in rows) > sum(rows[-1][-2:])

"""The forecast's arithmetic: rates from planted times, time, memory and disk by hand."""

from dataclasses import replace

import pytest

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.batching import OpCounts, total
from smoldpo.plan.cost_model import (
    FixedCosts,
    MachineSpeed,
    Phase,
    Rates,
    TimedPass,
    TimedStep,
    Times,
    count_checkpoints,
    fit_rates,
    forecast,
)
from smoldpo.plan.depths import FreezeDepth
from smoldpo.plan.memory import (
    MemoryForecast,
    ModelSizes,
    ObservedMemory,
    forecast_memory,
    interpolate,
)
from smoldpo.plan.planner import DepthForecast, choose_depth, kept_checkpoints
from smoldpo.plan.workload import Workload
from smoldpo.training.phases import RunPhases
from smoldpo.utils.errors import UsageError

PLANTED = Rates(
    trunk_row=2e-6,
    top_row=3e-6,
    score=4e-9,
    head=5e-5,
    step_row=9e-6,
    step_score=2e-8,
    step_head=1e-4,
    gradient=2e-10,
    optimizer=3e-9,
    step=0.01,
)
SHORT = OpCounts(1024, 1920, 9e4, 300, 1, 8)
LONG = OpCounts(3584, 3840, 9e5, 1200, 2, 8)
DEEP, UPPER, ALL = (
    FreezeDepth(29, 29, 30, 3_500_000, False, optimizer_bytes=8 * 3_500_000),
    FreezeDepth(25, 25, 30, 17_000_000, False, optimizer_bytes=8 * 17_000_000),
    FreezeDepth(0, 0, 30, 134_000_000, True, optimizer_bytes=8 * 134_000_000),
)


def timed(rates=PLANTED):
    """Passes and steps that take what the rates say."""
    passes, steps = [], []
    for depth in (UPPER, DEEP, ALL):
        for counts in (SHORT, LONG):
            passes.append(TimedPass(counts, 0, depth.top, rates.top(counts, depth.top)))
            gradients = rates.gradients(counts, depth)
            steps.append(TimedStep(counts, depth, gradients, rates.update(depth.trainable)))
    for counts in (SHORT, LONG):
        seconds = rates.trunk(counts, 25) + rates.top(counts, 5)
        passes.append(TimedPass(counts, 25, 5, seconds))
    return passes, steps


def test_planted_rates_are_found():
    found = fit_rates(*timed())
    for name, value in vars(PLANTED).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name


def test_an_update_that_was_not_timed_tells_nothing():
    passes, steps = timed()
    once = [replace(s, update=None) if s.depth.head_trains else s for s in steps]
    assert fit_rates(passes, once).optimizer == pytest.approx(PLANTED.optimizer, rel=1e-6)


def test_two_depths_are_enough():
    """Whatever the two: the head's share is known, and so is a layer's."""
    passes, steps = timed()
    for left_out in (UPPER, DEEP, ALL):
        found = fit_rates(passes, [s for s in steps if s.depth != left_out])
        seconds = [rates.gradients(LONG, left_out) for rates in (found, PLANTED)]
        assert seconds[0] == pytest.approx(seconds[1], rel=1e-6)


def test_a_depth_that_was_not_measured_is_forecast():
    """Layers 1 to 24 were never tried; the rates tell of them."""
    found = fit_rates(*timed())
    depth = FreezeDepth(11, 11, 30, 67_000_000, False)
    seconds = [rates.gradients(LONG, depth) for rates in (found, PLANTED)]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-6)


def test_rates_are_never_negative():
    """A step that took less than its rows alone would say nothing against the others."""
    passes, steps = timed()
    passes[0] = replace(passes[0], seconds=passes[0].seconds / 50)
    steps[1] = replace(steps[1], gradients=steps[1].gradients / 50, update=0.0)
    assert min(vars(fit_rates(passes, steps)).values()) >= 0
    with pytest.raises(ValueError, match="nothing"):
        fit_rates([], [])


def test_a_pass_and_a_step_by_hand():
    rates = Rates(1, 2, 3, 4, 5, 6, 7, 9, 10, 11)
    counts = OpCounts(rows=1, trunk_rows=10, scores=100, head_rows=1000, batches=2, pairs=3)
    frozen, whole = (FreezeDepth(4, 4, 6, 50, head_trains) for head_trains in (False, True))
    assert rates.trunk(counts, 3) == 3 * (10 * 1 + 100 * 3)
    assert rates.top(counts, 2) == 2 * (1 * 2 + 100 * 3) + 1000 * 4
    assert rates.gradients(counts, frozen) == 2 * (5 + 600) + 7000 + 2 * 50 * 9
    assert rates.gradients(counts, whole) == 2 * (5 + 600) + 10500 + 2 * 50 * 9
    assert rates.update(50) == 511
    assert total([counts, counts]) == OpCounts(2, 20, 200, 2000, 4, 6)


RATES = Rates(trunk_row=0.01, top_row=0.02, head=0.1, step_row=0.05, step_head=0.2, step=1.0)
COUNTS = OpCounts(rows=10, trunk_rows=10, head_rows=5, batches=1, pairs=2)
DEPTH = FreezeDepth(3, 3, 4, 1000, False, checkpoint_bytes=100)
PHASES = RunPhases(
    first_pass="trunk and reference",
    reference_before=True,
    policy_before=False,
    steps=6,
    evaluations=frozenset(),
    after=True,
)
LOAD = Workload(
    PHASES,
    trunk=COUNTS,
    reference=COUNTS,
    reference_layers=1,
    epochs=(total([COUNTS] * 4), total([COUNTS] * 2)),
    steps=(4, 2),
    evaluation=COUNTS,
    evaluation_layers=1,
)
COSTS = FixedCosts(
    start=7, saving=2, answering=3, closing=1, checkpoint_byte=0.001, store_byte=0.01
)


def settings(steps=None, minutes=None, best=False):
    """A configuration that saves checkpoints in these ways."""
    saving = {"save_steps": steps, "save_minutes": minutes, "load_best_model_at_end": best}
    return TrainConfig().model_copy(update=saving)


def seconds_of(load=LOAD, steps=None):
    times = forecast(RATES, load, DEPTH, COSTS, settings(steps))
    return {phase.name: pytest.approx(phase.seconds) for phase in times.phases}, times


def test_phases_by_hand():
    step = 1 * 10 * 0.05 + 5 * 0.2 + 1.0
    scored = 1 * 10 * 0.02 + 5 * 0.1
    phases, times = seconds_of(replace(
        LOAD, states_bytes=50, evaluations_before=1, answers=COUNTS,
        phases=replace(PHASES, evaluations=frozenset({2, 4})),
    ))  # fmt: skip
    assert phases == {
        "start": 7,
        "trunk and reference": 3 * 10 * 0.01 + scored + 50 * 0.01,
        "evaluating before": scored,
        "epoch 1": 4 * step,
        "epoch 2": 2 * step,
        "evaluating in between": 2 * scored,
        "saving the model": 2,
        "evaluating after": scored,
        "answers of both models": 3 + 2 * (4 * 10 * 0.02 + 5 * 0.1),
        "statistics and report": 1,
    }
    assert times.total == pytest.approx(sum(phase.seconds for phase in times.phases))


def test_what_is_kept_costs_nothing_and_what_is_not_there_is_left_out():
    unevaluated = replace(PHASES, reference_before=False, after=False)
    warm = Workload(unevaluated, epochs=LOAD.epochs, steps=LOAD.steps)
    phases, times = seconds_of(warm)
    assert times.phases[1] == Phase("trunk and reference", 0.0)
    assert not {"evaluating before", "evaluating after", "checkpoints"} & set(phases)


def test_at_another_speed_products_alone_take_another_time():
    phases, times = seconds_of(replace(LOAD, evaluations_before=1, answers=COUNTS), steps=2)
    faster = {phase.name: phase.seconds for phase in times.at_speed(2.0).phases}
    steady = {"start", "checkpoints", "saving the model", "statistics and report"}
    assert steady < phases.keys() and faster == {
        name: seconds if name in steady else pytest.approx(seconds.expected / 2)
        for name, seconds in phases.items()
    }
    assert times.at_speed(2.0).checkpoints == times.checkpoints == 3


HOUR = Times([Phase("start", 600.0), Phase("epoch 1", 3000.0)])


@pytest.mark.parametrize(
    ("readings", "earlier", "said"),
    [
        ([100, 100, 110], [100, 105, 110], []),
        ([100, 149, 120], [], []),
        ([100, 150, 120], [], ["swung between 100 and 150 GFLOP/s"]),
        ([100], [50, 50], []),  # two are not enough to tell what is usual
        ([100], [114] * 3, []),
        ([100], [300, 200, 100, 200],
         ["at 100 GFLOP/s while planning, and at 200 in this machine's "
                                       "last 4 commands: at that speed the run takes 35 min"]),
        ([100], [50] * 3, ["at that speed the run takes 1 h 50 min"]),
        ([60, 100, 120], [200] * 3, ["swung between 60 and 120", "at 100 GFLOP/s while planning"]),
    ],
)  # fmt: skip
def test_a_forecast_says_what_minute_it_was_made_in(readings, earlier, said):
    remarks = MachineSpeed(readings, earlier).remarks(HOUR)
    assert len(remarks) == len(said)
    for remark, words in zip(remarks, said, strict=True):
        assert words in remark


def test_states_without_room_are_computed_in_every_epoch():
    half = replace(LOAD, recomputed=0.5)
    plain, again = seconds_of()[0], seconds_of(half)[0]
    trunk = 3 * 10 * 0.01
    assert again["epoch 1"] == plain["epoch 1"].expected + 4 * 0.5 * trunk
    assert again["evaluating after"] == plain["evaluating after"].expected + 0.5 * trunk


def test_a_loss_over_whole_steps_passes_twice_where_a_step_has_several_streams():
    split = replace(LOAD, epochs=(total([COUNTS] * 8),), steps=(4,))
    once, twice = (seconds_of(replace(split, two_passes=share))[0] for share in (0.0, 0.5))
    assert twice["epoch 1"] == once["epoch 1"].expected + 8 * (10 * 0.02 + 5 * 0.1) / 2


@pytest.mark.parametrize(
    "seconds, steps, save_steps, save_minutes, best, count",
    [
        (60, 100, None, 10, False, 0),  # too short for a checkpoint by the clock
        (1500, 100, None, 10, False, 3),  # at 10 and 20 minutes, and the last
        (60, 100, 30, None, False, 4),  # 30, 60, 90, and the last
        (60, 90, 30, None, False, 3),  # the last is one of them
        (60, 100, None, None, False, 0),
        (60, 100, None, None, True, 1),
    ],
)
def test_checkpoints_are_counted(seconds, steps, save_steps, save_minutes, best, count):
    config = settings(save_steps, save_minutes, best)
    assert count_checkpoints(config, replace(PHASES, steps=steps), seconds) == count


@pytest.mark.parametrize(
    "steps, save_steps, best, eval_steps, count",
    [
        (100, None, True, 30, 4),  # at 30, 60 and 90, and the last
        (90, None, True, 30, 3),
        (100, 20, True, 30, 7),  # 20, 30, 40, 60 (once), 80, 90, 100
        (100, None, False, 30, 0),
    ],
)
def test_every_evaluation_may_be_the_best_so_far(steps, save_steps, best, eval_steps, count):
    evaluations = frozenset(range(eval_steps, steps + 1, eval_steps))
    phases = replace(PHASES, steps=steps, evaluations=evaluations)
    assert count_checkpoints(settings(save_steps, None, best), phases, 60) == count


@pytest.mark.parametrize(
    "before, count",
    [
        (0, 0),
        (500, 2),  # 60 s of steps after 500 s of other passes: over 540 s soon, and the last
        (5000, 2),  # the clock begins anew with the first step's
    ],
)
def test_the_clock_of_checkpoints_starts_before_the_first_pass(before, count):
    phases = replace(PHASES, steps=100)
    assert count_checkpoints(settings(minutes=9), phases, 60, before=before) == count


def test_checkpoints_take_time():
    phases, times = seconds_of(steps=2)
    assert times.checkpoints == 3 and phases["checkpoints"] == 3 * 100 * 0.001


def test_the_checkpoints_that_stay():
    config = TrainConfig().model_copy(update={"keep_checkpoints": 2})
    best = config.model_copy(update={"load_best_model_at_end": True})
    assert [kept_checkpoints(config, saved) for saved in (0, 1, 2, 5)] == [0, 1, 2, 2]
    assert [kept_checkpoints(best, saved) for saved in (0, 1, 2, 5)] == [0, 1, 2, 3]


def observed(depth, **more):
    given = {"row": 1000.0 * depth.top, "other": 50.0, "rest": 30.0, "first_pass": 20.0}
    return ObservedMemory(depth, **(given | more))


SIZES = ModelSizes(
    libraries=4e8, loaded=5.4e8, loaded_item=4, shard=0.0, weights=2.7e8,
    compute_item=2, master=4, separate_masters=True, answering_model=2.6e8, answering=1e8,
)  # fmt: skip


def test_memory_by_hand():
    found = forecast_memory(
        SIZES, [observed(UPPER), observed(DEEP), observed(ALL)], UPPER, rows=2000
    )
    assert found.parts == {
        "libraries": 4e8,
        "weights": 2.7e8,
        "masters": 4 * 17e6,
        "optimizer": 8 * 17e6,
        "gradients": 4 * 17e6,
        "trunk states": 0,
        "backward": 2000 * 5000,
        "other": 50,
    }
    stays = 4e8 + 2.7e8 + 12 * 17e6 + 30
    assert found.phases == {
        "loading": 4e8 + 5.4e8 + 4 * 17e6,
        "first pass": 4e8 + 2.7e8 + 4 * 17e6 + 20,
        "training": sum(found.parts.values()),
        "saving": stays + 5.4e8,
        "answers": stays + 2.6e8 + 2 * 17e6 + 1e8,
    }
    assert found.peak == found.phases["saving"]
    loud = replace(SIZES, answering=4e8)
    assert (
        forecast_memory(loud, [observed(UPPER)], UPPER, 2000).peak == stays + 2.6e8 + 2 * 17e6 + 4e8
    )
    silent = forecast_memory(
        replace(SIZES, answers=False, states=1e9), [observed(UPPER)], UPPER, 2000
    )
    assert silent.peak == silent.phases["saving"] == stays + 5.4e8 + 1e9


def test_a_model_of_narrow_files_is_put_together_with_what_trained():
    """At the end of a run: its files, what trained in full precision, one shard to convert."""
    sizes = replace(SIZES, loaded=2.7e8, loaded_item=2, shard=1e8)
    found = forecast_memory(sizes, [observed(UPPER)], UPPER, 2000)
    stays = 4e8 + 2.7e8 + 12 * 17e6 + 30
    assert found.phases["loading"] == 4e8 + 2.7e8 + 4 * 17e6
    assert found.phases["saving"] == stays + 2.7e8 + 2 * 17e6 + 1e8
    merging = forecast_memory(replace(sizes, merges=True), [observed(UPPER)], UPPER, 2000)
    assert merging.phases["saving"] == stays + 2 * 2.7e8 + 1e8


def test_answers_take_one_model_and_what_trained_or_two():
    seen = [observed(UPPER)]

    def answers(**more):
        return forecast_memory(replace(SIZES, **more), seen, UPPER, 2000).phases["answers"]

    stays = 4e8 + 2.7e8 + 12 * 17e6 + 30
    # Masters that compute are read where they are.
    full = {"compute_item": 4, "separate_masters": False}
    assert answers(**full) == stays - 4 * 17e6 + 2.6e8 + 1e8
    # Of another reference nothing is shared: the policy is loaded beside it, and then cast.
    assert answers(shares=False) == stays + 2.6e8 + 5.4e8
    assert answers(shares=False, loaded=2.7e8, loaded_item=2) == stays + 2.6e8 + 2.7e8 + 1e8
    assert (
        answers(shares=False, loaded=2.7e8, loaded_item=2, answering_model=5e8)
        == stays + 5e8 + 2.7e8 + 1e8
    )


def test_weights_that_were_let_go_count_for_the_first_pass_alone():
    depth = replace(UPPER, unconverted_bytes=int(1e7), idle_bytes=int(7e7))
    sizes = replace(SIZES, released=2e7)
    whole, found = (
        forecast_memory(sizes, [observed(UPPER)], depth, 2000, gone) for gone in (0.0, 5e7)
    )
    assert found.parts["weights"] == 2.7e8 - 1e7 - 5e7
    assert found.phases["first pass"] == 4e8 + 2.6e8 + 4 * 17e6 + 20
    for phase in ("loading", "first pass"):
        assert found.phases[phase] == whole.phases[phase]
    assert found.phases["training"] == whole.phases["training"] - 5e7
    # While the engine rests all goes that can, whether a step would read it or not.
    awake = forecast_memory(SIZES, [observed(UPPER)], replace(depth, idle_bytes=0), 2000)
    for phase in ("saving", "answers"):
        assert found.phases[phase] == whole.phases[phase] == awake.phases[phase] - 9e7, phase


def test_between_depths_memory_goes_in_straight_lines():
    seen = [observed(DEEP, other=10.0), observed(UPPER, other=50.0), observed(ALL, other=100.0)]
    middle = FreezeDepth(10, 10, 30, 75_500_000, False)
    found = forecast_memory(SIZES, seen, middle, rows=1)
    assert found.parts["backward"] == pytest.approx(20_000)
    assert found.parts["other"] == pytest.approx(50 + 50 * (20 - 5) / 25)
    # Depth 0 did not fit: what the others say of a layer goes on.
    assert forecast_memory(SIZES, seen[:2], ALL, 1).parts["backward"] == pytest.approx(30_000)
    alone = [observed(UPPER)]
    assert forecast_memory(SIZES, alone, ALL, 1).parts["backward"] == pytest.approx(30_000)
    assert forecast_memory(SIZES, alone, ALL, 1).parts["other"] == 50


def test_lines_hit_the_points_and_go_on_behind_them():
    seen = [observed(DEEP, other=0.0), observed(UPPER, other=8.0), observed(ALL, other=8.0)]
    read = [interpolate(seen, replace(DEEP, below=30 - top), lambda o: o.other)
            for top in (1, 3, 5, 30, 0)]  # fmt: skip
    assert read == pytest.approx([0, 4, 8, 8, -2])


def at(frozen, seconds, peak=1e9, free=2e9, budget=3840):
    depth = FreezeDepth(frozen, frozen, 4, 1000 * (4 - frozen), frozen == 0)
    memory = MemoryForecast({"libraries": 4e8}, {"training": peak})
    times = Times([Phase("training", seconds)])
    return DepthForecast(depth, times, memory, {}, budget, free, True)


DEPTHS = [at(0, 900, peak=5e9), at(1, 500), at(2, 250), at(3, 120)]


@pytest.mark.parametrize("seconds, frozen", [(1e6, 1), (500, 1), (499, 2), (250, 2), (120, 3)])
def test_the_fewest_frozen_layers_that_fit(seconds, frozen, capsys):
    """Depth 0 would need more memory than there is."""
    budget = f"{seconds + 30:.0f}s"
    found = choose_depth(DEPTHS, budget, spent=30)
    assert found.depth.frozen == frozen
    said = " ".join(capsys.readouterr().err.split())
    assert f"{frozen} of 4 layers" in said and budget in said and "30 s" in said


def test_a_budget_too_small_names_the_shortest_forecast():
    with pytest.raises(UsageError, match=r"budget of 2m.*2 min 00 s with 3 layers frozen.*larger"):
        choose_depth(DEPTHS, "2m", spent=1)
    assert choose_depth(DEPTHS, "2m").depth.frozen == 3
    with pytest.raises(UsageError, match=r"0 layers needs 5,000,000,000 bytes"):
        choose_depth(DEPTHS[:1], "300h")
    with pytest.raises(UsageError, match="fits into memory"):
        choose_depth([at(3, 1, budget=None)], "300h")


def test_libraries_are_loaded_already():
    assert at(0, 1, peak=2.4e9).fits and not at(0, 1, peak=2.4e9 + 1).fits

"""The choice between two kernels or precisions, by a clock of the test's own, and that it lasts."""

import json

import pytest
import torch

from smoldpo.engine import autotune
from smoldpo.engine.autotune import (
    CLOSE,
    SWITCH_KERNELS,
    KernelChoice,
    choices_file,
    choose_kernels,
    forget_choices,
    rates_file,
)

FIRST_IS_FASTER, KEEP, KEEP_RATE = (
    autotune._fused_is_faster,
    autotune.store_choice,
    autotune.store_rate,
)  # as they are, before conftest fixes them


@pytest.mark.parametrize(
    ("before", "ratio", "first"),
    [
        (None, 0.5, True), (None, CLOSE - 0.01, True), (None, CLOSE + 0.01, False), (None, 3,
         False),
        (True, SWITCH_KERNELS - 0.01, True), (True, SWITCH_KERNELS + 0.01, False),
        (False, 1 / SWITCH_KERNELS + 0.01, False), (False, 1 / SWITCH_KERNELS - 0.01, True),
    ],
)  # fmt: skip
def test_the_other_is_taken_where_it_is_clearly_faster(monkeypatch, before, ratio, first):
    now = 0.0

    def way(fused: bool) -> None:
        nonlocal now
        now += ratio if fused else 1.0

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    assert FIRST_IS_FASTER(way, before) is first


def test_each_ways_best_time_counts(monkeypatch):
    """A way that another process once held up is not slower for it."""
    now, delays = 0.0, [50.0] * 5 + [0.0, 50.0, 50.0, 0.0]

    def way(fused: bool) -> None:
        nonlocal now
        now += 1.0 + (delays.pop() if fused and delays else 0.0)

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    assert FIRST_IS_FASTER(way)


def test_a_rate_is_measured_however_long_the_process_is_held_up(monkeypatch):
    """Where another process takes the whole time that was meant for it, it is not 0."""
    held_up = iter(range(0, 10**6, 100))
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: float(next(held_up)))
    turns = []
    assert autotune.fastest_turns([lambda: turns.append(1)]) == [100.0]
    assert len(turns) == 1 + autotune.LEAST_TURNS
    assert autotune.matmul_rate(torch.float32, "cpu") > 0


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache folder of its own, in which choices are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "store_choice", KEEP)
    monkeypatch.setattr(autotune, "store_rate", KEEP_RATE)


@pytest.fixture
def told(kept, monkeypatch):
    """What each measurement of a kernel was told of earlier ones; it finds the second way
    faster.
    """
    found = []

    def second(way, before):
        found.append(before)
        return False

    monkeypatch.setattr(autotune, "_fused_is_faster", second)
    return found


def test_kernels_last_from_run_to_run(told, monkeypatch):
    for _ in range(2):
        assert choose_kernels(torch.float32, "cpu") == KernelChoice(False, False)
    assert told == [None, None, False, False]
    choose_kernels(torch.bfloat16, "cpu")
    assert told[4:] == [None, None], "another precision"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    choose_kernels(torch.float32, "cpu")
    assert told[6:] == [False, False], "measured by one thread, however many compute"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": 1}', "no JSON", '{"choices": {}}'])
def test_what_cannot_be_read_is_measured_afresh(told, text):
    choices_file().parent.mkdir()
    choices_file().write_text(text)
    choose_kernels(torch.float32, "cpu")
    choose_kernels(torch.float32, "cpu")
    assert told == [None, None, False, False]


def test_a_folder_that_cannot_be_written_is_no_error(told, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose_kernels(torch.float32, "cpu") == KernelChoice(False, False)


def test_the_precision_lasts_until_another_is_clearly_better(kept, monkeypatch):
    found = []
    for speedup in (1.2, 1.9, 2.1, 1.2, 1.01, 0.99, 1.9):
        rates = {torch.float32: 1.0, torch.bfloat16: speedup}
        monkeypatch.setattr(
            autotune, "matmul_rates", lambda given, _, r=rates: [r[d] for d in given]
        )
        found.append(autotune.compute_dtype("auto", "cpu")[0])
    narrow, wide = torch.bfloat16, torch.float32
    assert found == [wide, wide, narrow, narrow, narrow, wide, wide]


def test_the_rates_of_the_last_commands_are_kept(kept, monkeypatch):
    for number in range(20):
        rates = {torch.float32: 100.0 + number, torch.bfloat16: 7.06}
        monkeypatch.setattr(
            autotune, "matmul_rates", lambda given, _, r=rates: [r[d] for d in given]
        )
        autotune.compute_dtype("auto", "cpu")
    autotune.compute_dtype("float32", "cpu")  # measures nothing
    assert autotune.earlier_rates(torch.float32, "cpu") == [104.0 + n for n in range(16)]
    assert autotune.earlier_rates(torch.bfloat16, "cpu") == [7.1] * 16
    assert autotune.earlier_rates(torch.float64, "cpu") == []
    assert autotune.earlier_rates(torch.float32, "cuda") == []
    assert rates_file().is_file() and autotune.stored_choice("float32, cpu") is None
    for spoilt in ("nothing", [True, "x", None, -1.0]):
        text = json.loads(rates_file().read_text())
        text["choices"]["float32, cpu"] = spoilt
        rates_file().write_text(json.dumps(text))
        assert autotune.earlier_rates(torch.float32, "cpu") == []
    assert forget_choices() is None and autotune.earlier_rates(torch.bfloat16, "cpu") == []


def test_clearing_the_cache_forgets_it(kept, cli):
    autotune.store_choice("x", 1)
    assert json.loads(choices_file().read_text())["choices"] == {"x": 1}
    assert cli("cache", "clear", "nothing").code == 2 and autotune.stored_choice("x") == 1
    assert cli("cache", "clear").code == 0 and autotune.stored_choice("x") is None
    assert cli("cache", "clear").code == 0

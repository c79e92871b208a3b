"""The choice between two kernels, by a clock of the test's own."""

import pytest

from smoldpo.engine import kernels
from smoldpo.engine.kernels import CLOSE, _first_is_faster  # as it is, before conftest fixes it


@pytest.mark.parametrize(
    ("ratio", "first"), [(0.5, True), (CLOSE - 0.01, True), (CLOSE + 0.01, False), (3, False)]
)
def test_the_first_is_taken_unless_the_other_is_clearly_faster(monkeypatch, ratio, first):
    now = 0.0

    def way(fused: bool) -> None:
        nonlocal now
        now += ratio if fused else 1.0

    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now)
    assert _first_is_faster(way) is first


def test_each_ways_best_time_counts(monkeypatch):
    """A way that another process once held up is not slower for it."""
    now, delays = 0.0, [50.0, 0.0, 0.0, 0.0]

    def way(fused: bool) -> None:
        nonlocal now
        now += 1.0 + (delays.pop() if fused else 0.0)

    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now)
    assert _first_is_faster(way)

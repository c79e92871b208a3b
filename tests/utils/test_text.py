"""Lengths of time, read and written."""

import pytest

from smoldpo.utils.text import format_seconds, parse_duration


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1h", 3600), ("1.5m", 90), (" 2H5S ", 7205)],
)
def test_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "20", "m", "20 min", "-5m", "0s", "5m1h", "1d", "nan", "infs"]
)
def test_refused(text):
    with pytest.raises(ValueError, match="20m"):
        parse_duration(text)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
        (200, "3 min 20 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min"), (7199, "2 h 00 min"),
    ],
)  # fmt: skip
def test_written(seconds, text):
    assert format_seconds(seconds) == text

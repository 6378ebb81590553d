"""Durations, rates, shares and ranges: what people write is read exactly, everything else is refused with its text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_kit import GIB, KIB, MIB, S

from scenarios.quantities import (
    Burst,
    Growth,
    Range,
    format_duration,
    parse_burst,
    parse_bytes,
    parse_duration,
    parse_growth,
    parse_range,
    parse_rate,
    parse_share,
)


@pytest.mark.parametrize(
    "parse, text, value",
    [
        (parse_duration, "0s", 0), (parse_duration, "1ns", 1), (parse_duration, "0.1us", 100), (parse_duration, "2 µs", 2000),
        (parse_duration, "1.5ms", 1_500_000), (parse_duration, "12s", 12 * S), (parse_duration, "10m", 600 * S),
        (parse_duration, "10min", 600 * S), (parse_duration, "3h", 10800 * S), (parse_duration, "0.000000001s", 1),
        (parse_share, "1%", 0.01), (parse_share, 0.5, 0.5), (parse_share, 1, 1.0), (parse_share, 0, 0.0), (parse_share, "2e-5", 2e-5),
        (parse_share, 1e-12, 1e-12), (parse_share, "100%", 1.0), (parse_share, "0.5 %", 0.005),
        (parse_bytes, "0", 0), (parse_bytes, 0, 0), (parse_bytes, 4096, 4096), (parse_bytes, "4KiB", 4096),
        (parse_rate, "30MB/s", 30_000_000), (parse_rate, "1 GiB/s", GIB),
        (parse_burst, "200MB", Burst(200_000_000, 0)), (parse_burst, "200MB for 5s", Burst(200_000_000, 5 * S)),
        (parse_growth, "x1.5 per 60s", Growth(1.5, 60 * S)), (parse_growth, " x 2 per 1h", Growth(2.0, 3600 * S)),
        (parse_range, "1GiB..2GiB", Range(GIB, 2 * GIB)), (parse_range, "25%..30%", Range(0.25, 0.3)),
        (parse_range, "4KiB..", Range(4096, None)), (parse_range, "0..1", Range(0, 1)), (parse_range, "512", Range(512, 512)),
        (parse_range, "10%..2GiB", Range(0.1, 2 * GIB)),
    ],
)  # fmt: skip
def test_right(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    "parse, text",
    [
        (parse_duration, "12"), (parse_duration, "s"), (parse_duration, "-1s"), (parse_duration, "1e3s"), (parse_duration, "1d"),
        (parse_duration, ""), (parse_duration, "1s 2s"), (parse_duration, "1" * 30 + "s"),
        (parse_share, "101%"), (parse_share, 1.5), (parse_share, -0.1), (parse_share, "x"), (parse_share, True),
        (parse_share, float("nan")), (parse_share, float("inf")), (parse_share, [1]),
        (parse_bytes, "4KiBx"), (parse_bytes, -1), (parse_bytes, True), (parse_bytes, 1.5), (parse_bytes, None), (parse_bytes, ""),
        (parse_rate, "30MB"), (parse_rate, "30MB/m"), (parse_rate, "/s"), (parse_rate, "x/s"),
        (parse_burst, "for 5s"), (parse_burst, "200MB for"), (parse_burst, "200MB for 5"),
        (parse_growth, "1.5 per 60s"), (parse_growth, "x0.5 per 60s"), (parse_growth, "x2 per 0s"), (parse_growth, "x2"),
        (parse_range, "2GiB..1GiB"), (parse_range, "..1GiB"), (parse_range, "1..2..3"), (parse_range, "a..b"), (parse_range, "30%..30%"),
        (parse_range, "200%.."), (parse_range, "100%.."), (parse_range, ""),
    ],
)  # fmt: skip
def test_wrong(parse, text):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert "not a" in str(caught.value) or "empty" in str(caught.value) or "longer" in str(caught.value)


def test_ranges_on_a_disk():
    assert parse_range("25%..30%").bytes_of(1000) == (250, 300)
    assert parse_range("0.1%..").bytes_of(10**15) == (10**12, 10**15)
    assert parse_range("1MiB..2MiB").bytes_of(3 * MIB // 2) == (MIB, 3 * MIB // 2)
    assert parse_range("1GiB..2GiB").bytes_of(MIB) == (MIB, MIB), "empty on a disk that is too small"
    assert parse_range("10%..20%").bytes_of(7 * KIB) == (716, 1433)


@given(st.integers(1, 10**15))
@settings(derandomize=True, database=None, max_examples=100, deadline=None)
def test_formatted_durations_are_near(duration_ns):
    assert abs(parse_duration(format_duration(duration_ns)) - duration_ns) <= duration_ns * 0.006

"""Sizes: everything people write is read exactly, everything else is refused with `BadSize` and nothing but that."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simsr.errors import BadRequest, BadSize
from simsr.units import format_size, parse_size

POWERS = {"k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


@pytest.mark.parametrize(
    "text, size_bytes",
    [
        ("1", 1), ("512", 512), ("1b", 1), ("7B", 7), ("1k", 1024), ("1K", 1024), ("1KiB", 1024), ("1kib", 1024), ("1KB", 1000),
        ("10GiB", 10 << 30), ("10G", 10 << 30), ("10g", 10 << 30), ("10GB", 10**10), ("1.5KiB", 1536), ("0.5g", 1 << 29),
        ("2TiB", 2 << 40), ("1PB", 10**15), ("1.0", 1), (" 1 GiB ", 1 << 30), ("1\tM\n", 1 << 20), ("007", 7), ("0.001KB", 1),
        (str(1 << 80), 1 << 80),
    ],
)  # fmt: skip
def test_sizes(text, size_bytes):
    found = parse_size(text)
    assert found == size_bytes and isinstance(found, int)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "0", "0.0", "0GiB", "-1", "+1", "1.5", "0.5B", "1.0001KB", "G", ".5G", "5.G", "1e3", "0x10", "1_000", "1,5G",
        "1 2", "1EiB", "1KK", "1iB", "1Ki", "inf", "nan", "1G\0", "\ud800", "1GiB/s", "x" * 10000, "1" + " " * 10000 + "x",
    ],
)  # fmt: skip
def test_refused(text):
    with pytest.raises(BadSize) as caught:
        parse_size(text)
    assert isinstance(caught.value, BadRequest)
    assert caught.value.details["size"] == text and caught.value.hint


@given(st.integers(1, 1 << 60), st.sampled_from(["", "b", "B", *(p + s for p in "kKmMgGtTpP" for s in ("", "b", "iB"))]))
@settings(derandomize=True, database=None, max_examples=200, deadline=None)
def test_whole_numbers_are_exact(number, unit):
    base = 1000 if unit[1:].lower() == "b" else 1024
    assert parse_size(f"{number}{unit}") == number * base ** POWERS.get(unit[:1].lower(), 0)


@pytest.mark.parametrize("unit, factor", [("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)])
def test_decimal_fractions_are_exact(unit, factor):
    for hundredths in range(1, 1000):
        text = f"{hundredths // 100}.{hundredths % 100:02}{unit}"
        assert parse_size(text) == Fraction(hundredths, 100) * factor


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 5000 + "GiB", "9" * 400 + ".5", "9" * 400 + ".0PiB"])
def test_absurd_numbers_are_refused(text):
    with pytest.raises(BadSize):
        parse_size(text)


@pytest.mark.parametrize(
    "size_bytes, text",
    [
        (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"), (1 << 50, "1 PiB"),
        (1 << 60, "1024 PiB"), (1 << 70, "1048576 PiB"), (1100, "1.1 KiB"),
    ],
)  # fmt: skip
def test_formatted(size_bytes, text):
    assert format_size(size_bytes) == text


@given(st.integers(1, 1 << 62))
@settings(derandomize=True, database=None, max_examples=300, deadline=None)
def test_what_is_formatted_is_close(size_bytes):
    number, unit = format_size(size_bytes).split()
    value = Fraction(number) * 1024 ** POWERS.get(unit[0].lower(), 0)
    assert abs(value - size_bytes) * 20 <= value
    if "." not in number:
        assert parse_size(f"{number} {unit}") == value

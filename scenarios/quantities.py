"""Durations, rates, shares and ranges as people write them in scenario files. All become exact integers, or floats for shares.

Every function raises ValueError with a sentence that names the text and shows a right one; who calls it adds the place.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from simsr.errors import BadSize
from simsr.units import parse_size

__all__ = [
    "NS",
    "parse_duration",
    "parse_share",
    "parse_bytes",
    "parse_rate",
    "parse_burst",
    "parse_growth",
    "parse_range",
    "format_duration",
    "Range",
    "Burst",
    "Growth",
]

NS = 1_000_000_000
_UNITS_NS = {"ns": 1, "us": 1000, "µs": 1000, "ms": 10**6, "s": NS, "m": 60 * NS, "min": 60 * NS, "h": 3600 * NS}
_NUMBER = r"\d{1,18}(?:\.\d{1,18})?"
_DURATION = re.compile(rf"\s*({_NUMBER})\s*(ns|us|µs|ms|s|min|m|h)\s*")
_SHARE = re.compile(rf"\s*({_NUMBER}(?:[eE]-?\d{{1,3}})?)\s*(%?)\s*")
_GROWTH = re.compile(rf"\s*x\s*({_NUMBER})\s+per\s+(.+)")


def parse_duration(text: str) -> int:
    """Nanoseconds.

    >>> parse_duration("1.5ms"), parse_duration("2min")
    (1500000, 120000000000)
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a duration such as 250us, 3ms, 12s or 10m")
    return round(Fraction(match[1]) * _UNITS_NS[match[2]])


def format_duration(duration_ns: float) -> str:
    """As `parse_duration` reads it, with three digits.

    >>> format_duration(1_500_000), format_duration(90 * NS)
    ('1.5ms', '90s')
    """
    for unit in ("s", "ms", "us"):
        if abs(duration_ns) >= _UNITS_NS[unit]:
            digits = f"{float(f'{duration_ns / _UNITS_NS[unit]:.3g}'):.3f}"
            return digits.rstrip("0").rstrip(".") + unit
    return f"{duration_ns:.0f}ns"


def parse_share(text: str | float) -> float:
    """A part of one, written as a fraction or in percent.

    >>> parse_share("1%"), parse_share(0.25), parse_share("2e-5")
    (0.01, 0.25, 2e-05)
    """
    match = _SHARE.fullmatch(str(text))
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if isinstance(text, bool) or not 0 <= share <= 1:
        raise ValueError(f"{text!r} is not a share between 0 and 1 such as 0.01, 1% or 2e-5")
    return share


def parse_bytes(text: str | int) -> int:
    """A number of bytes; unlike `simsr.units.parse_size` it may be 0."""
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"{text!r} is not a size such as 4KiB or 30MB")
    if str(text).strip() in ("0", "0B"):
        return 0
    try:
        return parse_size(str(text))
    except BadSize as error:
        raise ValueError(f"{text!r} is not a size such as 4KiB or 30MB ({error.details['reason']})") from None


def parse_rate(text: str) -> int:
    """Bytes in a second.

    >>> parse_rate("30MB/s")
    30000000
    """
    size, slash, unit = str(text).partition("/")
    if not slash or unit.strip() != "s":
        raise ValueError(f"{text!r} is not a rate such as 30MB/s")
    return parse_bytes(size.strip())


class Burst(NamedTuple):
    """``size_bytes`` on top of the rate, spread over no less than ``over_ns`` (0: at once)."""

    size_bytes: int
    over_ns: int


def parse_burst(text: str) -> Burst:
    """``200MB`` or ``200MB for 5s``."""
    size, _, duration = str(text).partition(" for ")
    return Burst(parse_bytes(size.strip()), parse_duration(duration) if duration else 0)


class Growth(NamedTuple):
    factor: float
    period_ns: int


def parse_growth(text: str) -> Growth:
    """``x1.5 per 60s``."""
    match = _GROWTH.fullmatch(str(text))
    if not match or float(match[1]) < 1:
        raise ValueError(f"{text!r} is not a growth such as 'x1.5 per 60s' (the factor is 1 or more)")
    period_ns = parse_duration(match[2])
    if not period_ns:
        raise ValueError(f"{text!r}: the period must be longer than nothing")
    return Growth(float(match[1]), period_ns)


class Range(NamedTuple):
    """Bytes ``start`` to ``end`` (not included), each absolute or a share of the disk; ``end`` None: to the end."""

    start: int | float
    end: int | float | None

    def bytes_of(self, size_bytes: int) -> tuple[int, int]:
        """The range on a disk of this size. Shares are exact to the byte, rounded down."""
        start, end = (
            int(Fraction(str(edge)) * size_bytes) if isinstance(edge, float) else edge for edge in (self.start, self.end)
        )
        return min(start, size_bytes), size_bytes if end is None else min(end, size_bytes)


def parse_range(text: str) -> Range:
    """``1GiB..2GiB``, ``25%..30%``, ``4KiB..`` or one value, which is then both ends."""
    first, dots, last = str(text).partition("..")
    start = _edge(first, text)
    if not dots:
        return Range(start, start)
    end = _edge(last, text) if last.strip() else None
    if end is not None and type(start) is type(end) and end <= start or isinstance(start, float) and start >= 1:
        raise ValueError(f"{text!r} is an empty range")
    return Range(start, end)


def _edge(text: str, whole: str) -> int | float:
    text = text.strip()
    try:
        return parse_share(text) if text.endswith("%") else parse_bytes(text)
    except ValueError:
        raise ValueError(f"{whole!r} is not a range such as 1GiB..2GiB or 25%..30%") from None

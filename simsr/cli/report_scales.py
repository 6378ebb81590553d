"""Axes of the figures of a report: where ticks are, how values are written, and text that is safe in a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10

from simsr.cli.output import printable

__all__ = ["Linear", "Log", "safe", "seconds", "clock", "number", "size", "nice_step", "time_ticks"]

_TIME_STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400]


def safe(value: object) -> str:
    """Text for HTML and SVG, in elements and in attributes. Names come from outside: neither markup nor control characters get through."""
    return escape(printable(value), quote=True)


def seconds(value: float | None) -> str:
    """A latency or a short time, with three digits: ``412 us`` with a proper micro sign."""
    if value is None:
        return "–"
    if value == 0:
        return "0 s"
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1, 1e3, "ms")):
        if value < limit * 0.9995:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value)} s" if value < 600 else clock(value)


def clock(value: float) -> str:
    """A moment or a long time: ``7:05`` is minutes and seconds, ``2:07:05`` with hours, ``3 d 2:07:05`` with days."""
    whole = round(value)
    days, rest = divmod(whole, 86400)
    hours, minutes, left = rest // 3600, rest // 60 % 60, rest % 60
    text = f"{hours}:{minutes:02}:{left:02}" if hours or days else f"{minutes}:{left:02}"
    return f"{days} d {text}" if days else text


def number(value: float) -> str:
    """``1 234 567`` with thin spaces."""
    return f"{value:,.0f}".replace(",", "\u2009") if value == int(value) else _digits(value)


def size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            return f"{_digits(value)} {unit}"
        value /= 1024
    return ""


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return text.rstrip("0").rstrip(".")


def nice_step(span: float, at_most: int) -> float:
    """1, 2 or 5 times a power of ten, so that there are no more ticks than that."""
    rough = span / at_most
    power = 10.0 ** floor(log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.9999)


def time_ticks(length_s: float, at_most: int = 12) -> list[tuple[float, str]]:
    """(moment, text)."""
    step = nice_step(length_s, at_most)
    if step > 1:
        step = next((one for one in _TIME_STEPS_S if length_s / one <= at_most), 86400 * ceil(length_s / 86400 / at_most))
    moments = [count * step for count in range(int(length_s / step * 1.0001) + 1)]
    if length_s < 1:
        return [(at, f"{_digits(at * 1000)} ms") for at in moments]
    return [(at, f"{_digits(at)} s" if length_s < 180 else clock(at)) for at in moments]


class Linear:
    """Maps 0 to ``top`` onto pixels ``below`` to ``above``; ``top`` is rounded up to a tick."""

    def __init__(self, top: float, below: float, above: float, write: Callable[[float], str] = number, whole: bool = False) -> None:
        step = nice_step(max(top, 1e-9), 4)
        step = max(1.0, step) if whole else step
        self._top = max(step, ceil(top / step * 0.9999) * step)
        self._below, self._above = below, above
        self.ticks = [(count * step, write(count * step)) for count in range(round(self._top / step) + 1)]

    def __call__(self, value: float) -> float:
        return self._below + (self._above - self._below) * value / self._top


class Log:
    """Maps ``low`` to ``high`` (seconds) onto pixels; at least a decade."""

    def __init__(self, low: float, high: float, below: float, above: float) -> None:
        middle = (log10(low) + log10(high)) / 2
        half = max((log10(high) - log10(low)) / 2, 0.5)
        self._low, self._high, self._below, self._above = middle - half, middle + half, below, above
        factors: Sequence[int] = (1,) if half > 1.5 else (1, 2, 5) if half > 0.55 else (1, 2, 3, 5, 7)
        values = [f * 10.0**p for p in range(floor(self._low) - 1, ceil(self._high) + 1) for f in factors]
        self.ticks = [(value, seconds(value)) for value in values if self._low - 1e-9 <= log10(value) <= self._high + 1e-9]

    def __call__(self, value: float) -> float:
        share = (log10(max(value, 1e-12)) - self._low) / (self._high - self._low)
        return self._below + (self._above - self._below) * min(max(share, 0.0), 1.0)

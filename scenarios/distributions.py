"""How long things take: the distributions of latency, and the expressions they are built from.

A `Latency` is compiled once out of a text (``latency_text.parse_latency``) and then asked for each request. It owns no
randomness: it is handed numbers 0 < u < 1, one for each distribution in the expression, and turns each into a time by
the inverse of the distribution function. So percentile q of what comes out is the value at u = q, by construction.

A part is a function (draws, request, disk) -> value; times are floats of nanoseconds. ``disk`` tells what the request
meets: ``depth`` (requests in service before it), ``head_bytes`` (where the last one ended), ``size_bytes``, ``vdis``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

from scenarios.request import Request

__all__ = [
    "DAY_NS",
    "Latency",
    "Part",
    "constant",
    "uniform",
    "normal",
    "exponential",
    "lognormal",
    "pareto",
    "quantiles",
    "mix",
    "seek",
]

Part = Callable[[Sequence[float], Request, Any], float]

DAY_NS = 86_400e9
"""Where tails end that nobody cut off: a time, however unlikely, must be one that can be waited for."""

_EXPONENT_MAX = 700.0  # of exp(), which overflows beyond it
_deviate = NormalDist().inv_cdf


class Latency(NamedTuple):
    """A compiled expression: ``sample(draws, request, disk)`` in nanoseconds, with ``draws`` numbers to be handed in."""

    text: str
    sample: Part
    draws: int
    uses_depth: bool


def constant(value: float) -> Part:
    return lambda draws, request, disk: value


def uniform(index: int, low: float, high: float) -> Part:
    if high < low:
        raise ValueError("uniform(low, high): high is below low")
    width = high - low
    return lambda draws, request, disk: low + width * draws[index]


def normal(index: int, mean: float, deviation: float) -> Part:
    """Cut off at 0: no time is negative."""
    return lambda draws, request, disk: max(0.0, mean + deviation * _deviate(draws[index]))


def exponential(index: int, mean: float, low: float = 0.0) -> Part:
    """Starts at ``low`` and has the given mean."""
    if mean <= low:
        raise ValueError("exp(mean=, min=): the mean must be above the minimum")
    scale = mean - low
    return lambda draws, request, disk: low - scale * math.log1p(-draws[index])


def lognormal(index: int, median: float, tail: tuple[float, float], low: float, high: float) -> Part:
    """Through the median and one more percentile (share, value); clamped to ``low`` and ``high``."""
    share, value = tail
    if not 0 < median < value or not 0.5 < share < 1:
        raise ValueError("lognormal: needs p50 above 0 and one higher percentile above it, such as p99")
    if not low <= median or high < value:
        raise ValueError("lognormal: min must not be above p50, nor max below the percentiles")
    mu, exp = math.log(median), math.exp
    sigma = (math.log(value) - mu) / _deviate(share)

    def sample(draws: Sequence[float], request: Request, disk: Any) -> float:
        found = exp(min(mu + sigma * _deviate(draws[index]), _EXPONENT_MAX))
        return low if found < low else high if found > high else found

    return sample


def pareto(index: int, low: float, alpha: float, high: float) -> Part:
    """Heavy tail from ``low`` on: P(t > x) = (low / x) ** alpha, cut off at ``high``."""
    if low <= 0 or alpha <= 0 or high <= low:
        raise ValueError("pareto(min=, alpha=): min and alpha must be above 0, and max above min")
    log_low = math.log(low)
    return lambda draws, request, disk: min(high, math.exp(min(log_low - math.log1p(-draws[index]) / alpha, _EXPONENT_MAX)))


def quantiles(index: int, points: Sequence[tuple[float, float]]) -> Part:
    """Through every given (share, value), straight lines in the logarithm between; flat outside."""
    points = sorted(points)
    shares = [share for share, _ in points]
    if len(points) < 2 or any(a[1] > b[1] or a[0] == b[0] for a, b in zip(points, points[1:], strict=False)):
        raise ValueError("quantiles: needs two percentiles or more, with values that do not fall")
    if points[0][1] <= 0:
        raise ValueError("quantiles: values must be above 0")
    logs = [math.log(value) for _, value in points]
    last = len(points) - 1

    def sample(draws: Sequence[float], request: Request, disk: Any) -> float:
        u = draws[index]
        at = bisect_right(shares, u) - 1
        if at < 0 or at == last:
            return points[max(at, 0)][1]
        part = (u - shares[at]) / (shares[at + 1] - shares[at])
        return math.exp(logs[at] + part * (logs[at + 1] - logs[at]))

    return sample


def mix(index: int, choices: Sequence[tuple[float, Part]]) -> Part:
    """One of several, each with its share."""
    if abs(math.fsum(share for share, _ in choices) - 1) > 1e-9:
        raise ValueError("mix: the shares must add up to 100%")
    edges, total = [], 0.0
    for share, _ in choices:
        total += share
        edges.append(total)
    parts = [part for _, part in choices]
    last = len(parts) - 1

    def sample(draws: Sequence[float], request: Request, disk: Any) -> float:
        return parts[min(bisect_right(edges, draws[index]), last)](draws, request, disk)

    return sample


def seek(index: int, low: float, half: float, high: float, rpm: float) -> Part:
    """A disk with one arm. The time to move goes through ``low`` (next track), ``half`` (half of all tracks) and ``high``.

    Between them it is a + b*sqrt(d) + c*d, which is how arms behave: they accelerate, coast and settle. Then the
    platter turns: up to one whole turn. A request that begins where the last one ended pays neither.
    """
    if not 0 <= low <= half <= high:
        raise ValueError("seek: needs min <= half <= max")
    root = ((half - low) - 0.5 * (high - low)) / (math.sqrt(0.5) - 0.5)
    straight = (high - low) - root
    if root < 0 or straight < -root / 2:
        raise ValueError("seek: half must be between the middle of min and max, and 0.91 of the way from min to max")
    turn = 60e9 / rpm if rpm else 0.0

    def sample(draws: Sequence[float], request: Request, disk: Any) -> float:
        distance = abs(request.offset - disk.head_bytes) / (disk.size_bytes or 1)
        if not distance:
            return 0.0
        return low + root * math.sqrt(distance) + straight * distance + turn * draws[index]

    return sample

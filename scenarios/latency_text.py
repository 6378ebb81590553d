"""The language of latencies: ``lognormal(p50=250us, p99=4ms) * (1 + depth/16) + per_KiB(3us)``.

    sum      =  product { "+" product }
    product  =  value { ("*" | "/") value }
    value    =  DURATION | NUMBER | "depth" | "(" sum ")" | NAME "(" arguments ")"

A value is a time or a number; times are added to times and multiplied or divided by numbers, and the whole is a time.
A delay (`parse_delay`) may begin with ``+`` (added to the disk's own latency) or ``*`` (multiplies it); otherwise it takes
its place.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

from scenarios import distributions
from scenarios.distributions import Latency, Part
from scenarios.draws import DRAWS_MAX
from scenarios.quantities import parse_duration, parse_share

__all__ = ["parse_latency", "parse_delay", "Delay", "Traces", "TraceTimes", "FUNCTIONS"]

_TOKEN = re.compile(
    r"\s*(?:(?P<duration>\d+(?:\.\d+)?(?:ns|us|µs|ms|s|min|m|h)\b)|(?P<share>\d+(?:\.\d+)?%)|(?P<number>\d+(?:\.\d+)?)"
    r"|(?P<name>[A-Za-z_]\w*)|\"(?P<string>[^\"]*)\"|(?P<mark>[-+*/():,=]))"
)
_PERCENTILE = re.compile(r"p(\d{1,2}|100)(\d*)")
_NESTING_MAX = 20
_TEXT_MAX = 1000  # a long sum is called in depth
_NUMBERS = ("alpha", "rpm")  # arguments that are not times


class TraceTimes(Protocol):
    """The service times of a trace, as `trace("file", op, size)` draws from them."""

    def sample(self, u: float, op: str, length: int) -> float: ...


Traces = Callable[[str, str | None, tuple[str, ...]], TraceTimes]
"""Opens the trace of a name and format (None: find out), grouped by "op", "size"; who loads a scenario hands it in."""


class Delay(NamedTuple):
    """``mode``: "set", "add" or "scale"."""

    mode: str
    latency: Latency


class _Value(NamedTuple):
    """``is_time``: a time and not a number. ``fixed``: its value where it is the same for every request."""

    is_time: bool
    part: Part
    fixed: float | None = None


def parse_delay(text: str, traces: Traces | None = None) -> Delay:
    """A latency that may begin with + or *. Raises ValueError."""
    stripped = text.strip()
    if stripped.startswith("+"):
        return Delay("add", parse_latency(stripped[1:], traces))
    if stripped.startswith("*"):
        return Delay("scale", parse_latency(stripped[1:], traces, is_time=False))
    return Delay("set", parse_latency(text, traces))


def parse_latency(text: str, traces: Traces | None = None, is_time: bool = True) -> Latency:
    """Compile an expression. Raises ValueError with a sentence that names the text and the reason."""
    parser = _Parser(text, traces)
    value = parser.whole()
    if value.is_time != is_time:
        wanted = "a time; write its unit, such as 3ms" if is_time else "a number such as 2.5 behind the *"
        raise ValueError(f"{text!r} is not {wanted}")
    return Latency(text, value.part, parser.draws, parser.uses_depth)


class _Parser:
    def __init__(self, text: str, traces: Traces | None) -> None:
        self._text, self._traces = text[:_TEXT_MAX], traces
        if len(text) > _TEXT_MAX:
            self._fail(f"longer than {_TEXT_MAX} characters")
        self._tokens = list(self._split())
        self._at = self._nesting = 0
        self.draws = 0
        self.uses_depth = False

    def whole(self) -> _Value:
        value = self._sum()
        if self._kind:
            self._fail(f"{self._word!r} is not expected there")
        return value

    def draw(self) -> int:
        self.draws += 1
        if self.draws > DRAWS_MAX:
            self._fail(f"more than {DRAWS_MAX} distributions in one expression")
        return self.draws - 1

    def _split(self) -> Iterator[tuple[str, str]]:
        at = 0
        text = self._text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if not match:
                self._fail(f"cannot read {text[at : at + 12].strip()!r}")
            kind = match.lastgroup or ""
            yield kind, match[kind]
            at = match.end()

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    @property
    def _word(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else "the end"

    def _next(self) -> str:
        word = self._word
        self._at += 1
        return word

    def _is(self, mark: str) -> bool:
        return self._kind == "mark" and self._word == mark

    def _expect(self, mark: str) -> None:
        if not self._is(mark):
            self._fail(f"{mark!r} is missing before {self._word!r}" if self._kind else f"{mark!r} is missing at the end")
        self._at += 1

    def _fail(self, reason: str) -> Any:
        raise ValueError(f"{self._text!r}: {reason}")

    def _sum(self) -> _Value:
        value = self._product()
        while self._is("+"):
            self._next()
            value = self._combine(value, self._product(), operator.add)
        return value

    def _product(self) -> _Value:
        value = self._value()
        while self._is("*") or self._is("/"):
            value = self._combine(
                value, operation=operator.mul if self._next() == "*" else operator.truediv, other=self._value()
            )
        return value

    def _combine(self, value: _Value, other: _Value, operation: Callable[[float, float], float]) -> _Value:
        if operation is operator.add and value.is_time != other.is_time:
            self._fail("a time and a number cannot be added; give both a unit")
        if operation is operator.mul and value.is_time and other.is_time:
            self._fail("two times cannot be multiplied")
        if operation is operator.truediv and (other.is_time or not other.fixed):
            self._fail("only a number other than 0 can be divided by")
        is_time = value.is_time or other.is_time
        a, b = value.part, other.part
        if value.fixed is not None and other.fixed is not None:
            fixed = operation(value.fixed, other.fixed)
            return _Value(is_time, distributions.constant(fixed), fixed)
        if operation is operator.add:
            return _Value(is_time, lambda draws, request, disk: a(draws, request, disk) + b(draws, request, disk))
        if operation is operator.mul:
            return _Value(is_time, lambda draws, request, disk: a(draws, request, disk) * b(draws, request, disk))
        divisor = other.fixed
        return _Value(is_time, lambda draws, request, disk: a(draws, request, disk) / divisor)

    def _value(self) -> _Value:
        kind = self._kind
        if kind == "duration":
            fixed = float(parse_duration(self._next()))
            return _Value(True, distributions.constant(fixed), fixed)
        if kind == "number":
            fixed = float(self._next())
            return _Value(False, distributions.constant(fixed), fixed)
        if self._is("("):
            return self._bracket()
        if kind != "name":
            self._fail(f"a time, a number or a distribution is missing before {self._word!r}")
        name = self._next()
        if name == "depth":
            self.uses_depth = True
            return _Value(False, lambda draws, request, disk: disk.depth)
        if name not in FUNCTIONS:
            near = get_close_matches(name, [*FUNCTIONS, "depth"], 1)
            self._fail(
                f"{name!r} is not known" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(FUNCTIONS)}")
            )
        self._expect("(")
        self._enter()
        if name == "mix":
            part = self._make(distributions.mix, self.draw(), self._choices())
        elif name == "trace":
            part = self._trace()
        else:
            part = self._call(name)
        self._nesting -= 1
        return _Value(True, part)

    def _enter(self) -> None:
        self._nesting += 1
        if self._nesting > _NESTING_MAX:
            self._fail("nested too deeply")

    def _bracket(self) -> _Value:
        self._next()
        self._enter()
        value = self._sum()
        self._expect(")")
        self._nesting -= 1
        return value

    def _choices(self) -> list[tuple[float, Part]]:
        choices = []
        while True:
            if self._kind != "share":
                self._fail(f"mix: a share such as 99% is missing before {self._word!r}")
            share = parse_share(self._next())
            self._expect(":")
            value = self._sum()
            if not value.is_time:
                self._fail("mix: every choice must be a time")
            choices.append((share, value.part))
            if not self._is(","):
                self._expect(")")
                return choices
            self._next()

    def _arguments(self) -> tuple[list[float], dict[str, float]]:
        """Plain values and NAME=value, up to the closing bracket."""
        plain: list[float] = []
        named: dict[str, float] = {}
        while not self._is(")"):
            name = None
            if self._kind == "name" and self._tokens[self._at + 1 : self._at + 2] == [("mark", "=")]:
                name = self._next()
                self._next()
            value = self._sum()
            if value.fixed is None:
                self._fail("arguments are plain times and numbers")
            if value.is_time == (name in _NUMBERS):
                self._fail(f"{name or 'an argument'} must be {'a number' if name in _NUMBERS else 'a time; write its unit'}")
            if name in named:
                self._fail(f"{name} is given twice")
            if name:
                named[name] = value.fixed
            elif named:
                self._fail("arguments without a name come first")
            else:
                plain.append(value.fixed)
            if not self._is(","):
                break
            self._next()
        self._expect(")")
        return plain, named

    def _call(self, name: str) -> Part:
        usage, make = FUNCTIONS[name]
        plain, named = self._arguments()
        try:
            return self._make(make, self, plain, named)
        except (TypeError, KeyError):
            self._fail(f"write {usage}")

    def _make(self, make: Callable[..., Part], *arguments: Any) -> Part:
        try:
            return make(*arguments)
        except ValueError as error:
            self._fail(str(error))

    def _trace(self) -> Part:
        words = []
        while self._kind in ("string", "name"):
            words.append((self._kind, self._next()))
            if not self._is(","):
                break
            self._next()
        self._expect(")")
        names = [word for kind, word in words[1:] if kind == "name"]
        if not words or words[0][0] != "string" or len(names) != len(words) - 1:
            self._fail(f"write {FUNCTIONS['trace'][0]}")
        groups = tuple(name for name in names if name in ("op", "size"))
        formats = [name for name in names if name not in ("op", "size")]
        if len(formats) > 1:
            self._fail(f"write {FUNCTIONS['trace'][0]}")
        if self._traces is None:
            self._fail("traces cannot be opened here")
        times = self._traces(words[0][1], formats[0] if formats else None, groups)
        index = self.draw()
        return lambda draws, request, disk: times.sample(draws[index], request.op, request.length)


def _percentile(name: str) -> float:
    """``p50`` is 0.5, ``p999`` 0.999, ``p100`` 1."""
    match = _PERCENTILE.fullmatch(name)
    if not match:
        raise KeyError(name)
    if name == "p100":
        return 1.0
    return float(f"{match[1]}.{match[2]}") / 100


def _uniform(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    return distributions.uniform(parser.draw(), *plain, **named)


def _normal(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    both = [*plain, *(named.pop(name) for name in ("mean", "sd")[len(plain) :])]
    return distributions.normal(parser.draw(), *both, **named)


def _exponential(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    low = named.pop("min", 0.0)
    return distributions.exponential(parser.draw(), *plain, low=low, **named)


def _lognormal(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    low, high, median = named.pop("min", 0.0), named.pop("max", distributions.DAY_NS), named.pop("p50")
    tails = [(_percentile(name), value) for name, value in named.items()]
    if plain or len(tails) != 1:
        raise KeyError("p99")
    return distributions.lognormal(parser.draw(), median, tails[0], low, high)


def _pareto(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    low, high = named.pop("min"), named.pop("max", distributions.DAY_NS)
    return distributions.pareto(parser.draw(), low, named.pop("alpha"), high, *plain, **named)


def _quantiles(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    return distributions.quantiles(parser.draw(), [(_percentile(name), value) for name, value in named.items()], *plain)


def _seek(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    low, half, high, rpm = named.pop("min"), named.pop("half"), named.pop("max"), named.pop("rpm", 0.0)
    return distributions.seek(parser.draw(), low, half, high, rpm, *plain, **named)


def _only(plain: list[float], named: dict[str, float]) -> float:
    if len(plain) != 1 or named:
        raise TypeError
    return plain[0]


def _per_kib(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    time = _only(plain, named)
    rate = time / 1024
    return lambda draws, request, disk: rate * request.length


def _per_vdi(parser: _Parser, plain: list[float], named: dict[str, float]) -> Part:
    time = _only(plain, named)
    return lambda draws, request, disk: time * disk.vdis


FUNCTIONS: dict[str, tuple[str, Callable[[_Parser, list[float], dict[str, float]], Part]]] = {
    "uniform": ("uniform(1ms, 5ms)", _uniform),
    "normal": ("normal(5ms, 1ms)", _normal),
    "exp": ("exp(mean=2ms, min=200us)", _exponential),
    "lognormal": ("lognormal(p50=250us, p99=4ms, max=2s)", _lognormal),
    "pareto": ("pareto(min=1ms, alpha=1.3, max=10s)", _pareto),
    "quantiles": ("quantiles(p0=90us, p50=200us, p99=3ms, p999=80ms)", _quantiles),
    "mix": ("mix(99%: 1ms, 1%: 1s)", _uniform),
    "seek": ("seek(min=0.5ms, half=5ms, max=9ms, rpm=7200)", _seek),
    "per_KiB": ("per_KiB(3us)", _per_kib),
    "per_vdi": ("per_vdi(80ms)", _per_vdi),
    "trace": ('trace("file.csv", op, size)', _uniform),
}
"""Name -> (how to write it, how to make it of arguments). ``mix`` and ``trace`` have a syntax of their own."""

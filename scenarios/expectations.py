"""The language of ``[[expect]]``: comparisons of what was measured, joined by and, or, not. Parsed when a scenario is loaded.

    client.errors == 0 and gap('write').max < 30s
    p99('read', 'A dies') < 20ms or not hits('latent') > 0
    group.state in ['all-old', 'all-new']

An expectation is met, broken, or not evaluated: what a daemon cannot see, or what nothing was measured of, is never "met". With ``and`` and
``or`` that is Kleene's logic of three values: an ``or`` with one side met is met whatever the other one is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scenarios.metrics import METRICS, Metric, Seen, Unknown
from scenarios.quantities import format_duration, parse_bytes, parse_duration, parse_rate
from scenarios.request import OPS
from scenarios.suggest import did_you_mean
from simsr.units import format_size

__all__ = ["Expectation", "Names", "Outcome", "BadExpectation", "parse_expectation"]

MET, BROKEN, NOT_EVALUATED = "met", "broken", "not evaluated"

_NESTED_MAX = 20
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_TOKEN = re.compile(
    r"""\s*(?:(?P<value>\d[\w.µ%]*(?:/s)?(?:(?<=e)-\d+)?)|(?P<string>'[^']*'|"[^"]*")|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<mark>==|!=|<=|>=|[<>()\[\],.]))""",
    re.ASCII,
)
_KEYWORDS = {"and", "or", "not", "in", "unchanged", "restores"}
_UNITS = {
    "time": (parse_duration, "30s or 5ms"),
    "bytes": (parse_bytes, "4KiB"),
    "rate": (parse_rate, "30MB/s"),
    "count": (int, "3"),
    "number": (float, "3 or 2.5"),
}
_OUTSIDE = "only who runs the scenario from outside can see it"


class BadExpectation(Exception):
    """``reason`` and ``hint``."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


class Names(NamedTuple):
    """What the arguments of metrics may name."""

    phase: Collection[str] = ()
    rule: Collection[str] = ()
    event: Collection[str] = ()


class Outcome(NamedTuple):
    """``verdict``: met, broken, not evaluated. ``found``: the values that were measured, as (name, value); ``reason``: why not evaluated."""

    that: str
    verdict: str
    found: list[tuple[str, str]]
    reason: str


@dataclass
class _Trace:
    seen: Seen
    found: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


_Node = Callable[[_Trace], bool | None]


class Expectation:
    """One that was parsed."""

    def __init__(self, that: str, node: _Node) -> None:
        self.that, self._node = that, node

    def evaluate(self, seen: Seen) -> Outcome:
        trace = _Trace(seen)
        value = self._node(trace)
        verdict = NOT_EVALUATED if value is None else MET if value else BROKEN
        reasons = "; ".join(dict.fromkeys(trace.unknown)) if value is None else ""
        return Outcome(self.that, verdict, list(trace.found.items()), reasons)


def parse_expectation(that: str, names: Names = Names()) -> Expectation:
    """Raises `BadExpectation`."""
    parser = _Parser(that, names)
    node = parser.either(0)
    parser.end()
    return Expectation(that, node)


class _Value(NamedTuple):
    """One side of a comparison. ``metric`` None: a constant, whose ``value`` depends on what it is compared with."""

    text: str
    metric: Metric | None = None
    args: tuple[str, ...] = ()
    is_word: bool = False

    def of(self, trace: _Trace) -> float | None:
        if self.metric is None or self.metric.find is None:
            trace.unknown.append(f"{self.text}: {_OUTSIDE}")
            return None
        try:
            value = self.metric.find(trace.seen, *self.args)
        except Unknown as error:
            trace.unknown.append(f"{self.text}: {error}")
            return None
        trace.found[self.text] = format_value(self.metric.kind, value)
        return value


def format_value(kind: str, value: float) -> str:
    if kind == "time":
        return format_duration(value) if value else "0s"
    if kind in ("bytes", "rate"):
        return format_size(round(value)) + ("/s" if kind == "rate" else "")
    return f"{value:.6g}" if kind == "number" else str(value)


class _Parser:
    def __init__(self, text: str, names: Names) -> None:
        self._names, self._tokens, self._at = names, _tokens(text), 0

    # Tokens.

    @property
    def _next(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else "end"

    def _take(self) -> str:
        text = self._next
        self._at += 1
        return text

    def _took(self, text: str) -> bool:
        found = self._kind in ("word", "mark") and self._next == text
        self._at += found
        return found

    def _must(self, text: str) -> None:
        if not self._took(text):
            raise BadExpectation(f"there must be {text!r} {self._place()}")

    def _place(self) -> str:
        return f"instead of {self._next!r}" if self._next else "at the end"

    def end(self) -> None:
        if self._kind == "end":
            return
        hint = "Join comparisons with and." if self._next in _COMPARE else "Join comparisons with and, or."
        raise BadExpectation(f"{self._next!r} is not expected there", hint)

    # Logic.

    def either(self, depth: int) -> _Node:
        sides = [self._both(depth)]
        while self._took("or"):
            sides.append(self._both(depth))
        return _joined(sides, True)

    def _both(self, depth: int) -> _Node:
        sides = [self._negated(depth)]
        while self._took("and"):
            sides.append(self._negated(depth))
        return _joined(sides, False)

    def _negated(self, depth: int) -> _Node:
        if depth > _NESTED_MAX:
            raise BadExpectation("it is nested too deeply", "Make several expectations of it.")
        if self._took("not"):
            inner = self._negated(depth + 1)
            return lambda trace: None if (value := inner(trace)) is None else not value
        if self._took("("):
            node = self.either(depth + 1)
            self._must(")")
            return node
        return self._comparison()

    def _comparison(self) -> _Node:
        left = self._value()
        if self._took("unchanged"):
            return self._elsewhere(left)
        if self._took("restores"):
            _constant(left, self._value(), "==")
            return self._elsewhere(left)
        if self._took("in"):
            return _any_of(left, self._list())
        if self._next not in _COMPARE or self._kind != "mark":
            raise BadExpectation(f"there must be a comparison such as < {self._place()}", f"Write {left.text} < ...")
        sign = self._take()
        return _compared(left, sign, self._value())

    def _elsewhere(self, left: _Value) -> _Node:
        if left.metric is None or left.metric.find is not None:
            raise BadExpectation(f"{left.text} cannot be compared like that", "Take <, <=, ==, !=, >= or >.")
        return lambda trace: left.of(trace)  # type: ignore[return-value]

    def _list(self) -> list[_Value]:
        self._must("[")
        values = [self._value()]
        while self._took(","):
            values.append(self._value())
        self._must("]")
        return values

    # Values.

    def _value(self) -> _Value:
        kind = self._kind
        if kind in ("value", "string"):
            text = self._take()
            return _Value(text if kind == "value" else text[1:-1], is_word=kind == "string")
        if kind == "word" and self._next not in _KEYWORDS:
            return self._metric()
        raise BadExpectation(f"there must be a value {self._place()}", "Give a name such as client.errors, or a number.")

    def _metric(self) -> _Value:
        name, text, args = self._take(), "", ()
        while True:
            if self._took("("):
                args = self._arguments()
                text = f"{name}({', '.join(map(repr, args))})"
                name += "()"
            elif self._took("."):
                if self._kind != "word":
                    raise BadExpectation(f"there must be a name {self._place()}")
                step = self._take()
                name, text = f"{name}.{step}", f"{text or name}.{step}"
            else:
                break
        metric = METRICS.get(name)
        if metric is None:
            if name in {word for one in METRICS.values() for word in one.words}:
                return _Value(name, is_word=True)
            raise BadExpectation(f"{name!r} is not known", _clause(did_you_mean(name, METRICS)))
        self._check(name, metric, args)
        return _Value(text or name, metric, args)

    def _arguments(self) -> tuple[str, ...]:
        args: list[str] = []
        while not self._took(")"):
            if args:
                self._must(",")
            if self._kind not in ("string", "word"):
                raise BadExpectation(f"there must be a name {self._place()}", "Names are in quotes: 'read'.")
            args.append(self._take()[1:-1] if self._kind == "string" else self._take())
        return tuple(args)

    def _check(self, name: str, metric: Metric, args: tuple[str, ...]) -> None:
        needed = [arg for arg in metric.args if not arg.startswith("[")]
        if not len(needed) <= len(args) <= len(metric.args):
            raise BadExpectation(f"{name} has {len(args)} arguments", f"It takes {', '.join(metric.args)}.")
        for kind, arg in zip(metric.args, args):
            kind = kind.strip("[]")
            known = OPS if kind == "op" else () if kind == "word" else getattr(self._names, kind)
            if kind != "word" and arg not in known:
                clause = did_you_mean(arg, known) if known else f"there is no {kind}"
                raise BadExpectation(f"no {'operation' if kind == 'op' else kind} is called {arg!r}", _clause(clause))


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise BadExpectation(f"{text[at:].strip()[:20]!r} cannot be read", "It is written like client.errors == 0.")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return tokens


def _joined(sides: list[_Node], decides: bool) -> _Node:
    """or (``decides`` True) and and (False): all sides are looked at, so that all values are shown."""
    if len(sides) == 1:
        return sides[0]

    def node(trace: _Trace) -> bool | None:
        values = [side(trace) for side in sides]
        return decides if decides in values else None if None in values else not decides

    return node


def _compared(left: _Value, sign: str, right: _Value) -> _Node:
    compare = _COMPARE[sign]
    if left.metric is None and right.metric is None:
        raise BadExpectation("nothing is measured in it", f"There are: {', '.join(METRICS)}.")
    if left.metric is not None and right.metric is not None:
        if left.metric.kind != right.metric.kind:
            raise BadExpectation(f"{left.text} is a {left.metric.kind}, {right.text} a {right.metric.kind}")
        return lambda trace: _decided(compare, left.of(trace), right.of(trace))
    if left.metric is not None:
        constant = _constant(left, right, sign)
        return lambda trace: _decided(compare, left.of(trace), constant)
    constant = _constant(right, left, sign)
    return lambda trace: _decided(compare, constant, right.of(trace))


def _any_of(left: _Value, values: list[_Value]) -> _Node:
    if left.metric is None:
        raise BadExpectation("nothing is measured in it", f"There are: {', '.join(METRICS)}.")
    constants = [_constant(left, value, "==") for value in values]
    return lambda trace: None if (found := left.of(trace)) is None else found in constants


def _decided(compare: Callable[[float, float], bool], left: Any, right: Any) -> bool | None:
    return None if left is None or right is None else compare(left, right)


def _constant(measured: _Value, constant: _Value, sign: str) -> Any:
    """What a constant means beside what it is compared with."""
    metric = measured.metric
    if constant.metric is not None or metric is None:
        raise BadExpectation(f"{constant.text} is not a value to compare {measured.text} with", "Give a number or a word.")
    if metric.kind == "word":
        if sign not in ("==", "!="):
            raise BadExpectation(f"{measured.text} is a word: it cannot be {sign} another", "Take == or !=.")
        if metric.words and constant.text not in metric.words:
            raise BadExpectation(f"{measured.text} is never {constant.text!r}", _clause(did_you_mean(constant.text, metric.words)))
        return constant.text
    parse, example = _UNITS[metric.kind]
    kind = {"count": "number", "number": "number of them a second"}.get(metric.kind, metric.kind)
    if constant.is_word:
        raise BadExpectation(f"{measured.text} is a {kind}, not {constant.text!r}", f"Write it like {example}.")
    if constant.text == "0":
        return 0
    try:
        return parse(constant.text)
    except ValueError:
        raise BadExpectation(f"{measured.text} is a {kind}, and {constant.text!r} is none", f"Write it like {example}.") from None


def _clause(clause: str) -> str:
    return clause[0].upper() + clause[1:] + ("" if clause.endswith("?") else ".")

"""The decision log: which rule fired at which request. It explains a run, and it can be run again.

One line of JSON for each decision. An engine that is given a log fires exactly the rules that it names, at the same requests of
the same disks, whatever their triggers say; delays and damage are drawn as ever, so they are the same as well.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from scenarios.rules import Hit
from simsr.errors import BadScenario

__all__ = ["Decision", "DecisionLog", "read_decisions"]

KEPT = 100_000


class Decision(NamedTuple):
    """``disk`` is the disk's key, ``number`` its request of operation ``op``; 0 for a command at the beginning of a phase."""

    at_ns: int
    rule: str
    disk: str
    op: str
    number: int
    u: float | None
    places: tuple[int, ...]
    actions: str


class DecisionLog:
    """The last decisions; older ones are forgotten and counted."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept: deque[Decision] = deque(maxlen=kept)
        self.count = 0

    def add(self, decision: Decision) -> None:
        self._kept.append(decision)
        self.count += 1

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def lines(self) -> Iterator[str]:
        """As `read_decisions` reads it."""
        return (json.dumps(decision._asdict(), separators=(",", ":")) for decision in self._kept)


def read_decisions(lines: Iterable[str], source: str = "decisions") -> dict[tuple[str, str, str, int], Hit]:
    """(rule, disk, op, number) -> hit. Raises `BadScenario`."""
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            decision = Decision(**{**fields, "places": tuple(fields["places"])})
            u = None if decision.u is None else float(decision.u)
            found[decision.rule, decision.disk, decision.op, int(decision.number)] = Hit(u, tuple(map(int, decision.places)))
        except (ValueError, TypeError, KeyError) as error:
            raise BadScenario(source=source, where=f"line {number}", reason=f"not a decision: {error}") from None
    return found

"""The phases of a scenario in time: which one it is, and when the next begins.

A phase ends after ``for``, or when the moment of ``until`` comes, whichever is first; the last may be endless. Times
are exact sums of durations: looking at the clock late does not make a phase longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scenarios.checks import moment_of
from scenarios.quantities import format_duration
from scenarios.rules import Moment
from scenarios.schema import Phase

__all__ = ["Timeline", "NEVER"]

NEVER = 1 << 63
"""A time that does not come."""


class Timeline:
    def __init__(self, phases: Sequence[Phase], now: int) -> None:
        self._phases = phases
        self._at = self._round = 0
        self.began_ns, self.ends_ns = now, NEVER
        self.moment: Moment | None = None
        self._begin(now)

    @property
    def phase(self) -> Phase | None:
        """The phase that it is, or None after the last."""
        return self._phases[self._at] if self._at < len(self._phases) else None

    def _begin(self, now: int) -> None:
        phase = self.phase
        self.began_ns = now
        self.ends_ns = NEVER if phase is None or phase.for_ is None else now + phase.for_
        spec = moment_of(phase) if phase else None
        self.moment = Moment(spec) if spec else None

    def next(self, at_ns: int) -> None:
        """The phase ended at ``at_ns``; the next one (or the same again) begins."""
        phase = self.phase
        self._round += 1
        if phase is None or not isinstance(phase.repeat, int) or self._round >= phase.repeat:
            self._at, self._round = self._at + 1, 0
        self._begin(at_ns)

    def statistics(self) -> dict[str, Any]:
        phase = self.phase
        return {
            "phase": phase.name if phase else None,
            "number": self._at + 1 if phase else None,
            "of": len(self._phases),
            "round": self._round + 1,
            "ends_ns": None if self.ends_ns == NEVER else self.ends_ns,
        }


def plan_table(phases: Sequence[Phase]) -> list[tuple[str, str, str, int]]:
    """(name, length, rules, repeats) of each phase, for people to look at before they run it."""
    rows = []
    for phase in phases:
        until = moment_of(phase)
        ways = [format_duration(phase.for_)] if phase.for_ is not None else []
        if until is not None:
            ways.append(f"until event {until.event}" if until.event else f"until {', '.join(until.op)} {until.nth}")
        rows.append(
            (
                phase.name or "",
                " or ".join(ways) or "to the end",
                ", ".join(rule.name or "" for rule in phase.rule),
                phase.repeat,
            )
        )
    return rows

"""Several ways to one disk, as multipath storage has them: optimized, non-optimized, standby, down, and flapping.

A request takes the first optimized path, else the first that is not optimized; standby paths carry nothing. Flapping is
a function of time, so nothing has to happen at its edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Paths"]


class _Flap(NamedTuple):
    began_ns: int
    up_ns: int
    down_ns: int
    state: str


class Paths:
    """The paths of the disks of one profile."""

    def __init__(self, states: Mapping[str, str]) -> None:
        self._first = dict(states)
        self._states: dict[str, str | _Flap] = dict(states)

    def __contains__(self, name: str) -> bool:
        return name in self._states

    def set(self, name: str, state: str) -> None:
        """``up`` is what the path was at the beginning (optimized if it was down)."""
        self._states[name] = self._up(name) if state == "up" else state

    def reset(self) -> None:
        """Every path is what it was at the beginning."""
        self._states = dict(self._first)

    def flap(self, name: str, up_ns: int, down_ns: int, now: int) -> None:
        self._states[name] = _Flap(now, up_ns, down_ns, self._up(name))

    def _up(self, name: str) -> str:
        first = self._first[name]
        return "optimized" if first == "down" else first

    def state(self, name: str, now: int) -> str:
        state = self._states[name]
        if isinstance(state, str):
            return state
        return state.state if (now - state.began_ns) % (state.up_ns + state.down_ns) < state.up_ns else "down"

    def route(self, wanted: str, now: int) -> tuple[str | None, int | None]:
        """(path or None, when a flapping path may be up again or None). ``wanted``: the only path to consider."""
        names = (wanted,) if wanted in self._states else tuple(self._states)
        states = {name: self.state(name, now) for name in names}
        for usable in ("optimized", "non-optimized"):
            for name, state in states.items():
                if state == usable:
                    return name, None
        edges = [self._next_up(flap, now) for name in names if isinstance(flap := self._states[name], _Flap)]
        return None, min(edges, default=None)

    @staticmethod
    def _next_up(flap: _Flap, now: int) -> int:
        whole = flap.up_ns + flap.down_ns
        return now + whole - (now - flap.began_ns) % whole

    def statistics(self) -> dict[str, Any]:
        return {name: state if isinstance(state, str) else "flapping" for name, state in self._states.items()}

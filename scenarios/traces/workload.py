"""Workload replay: when to issue which request of a trace, as a noisy neighbour does, and how far behind we are.

`Workload` keeps no clock: ask `next_due_ns`, and `take(now)` what is due; or have it read ahead (`upcoming`) and tell it how late each
request was made (`lagged`). A trace for another disk is fitted: offsets beyond ours wrap around, are scaled, or are left out. The lag, how late requests were taken, says whether the trace's pace was
kept; a replay that cannot keep it must say so.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any

from scenarios.request import Request
from scenarios.traces.records import Record
from simsr.errors import BadTrace

__all__ = ["LatestTimes", "Workload", "payload"]

_SECTOR_BYTES = 512
_TIMES_KEPT = 1 << 16
_LENGTH_MAX = 32 << 20
_CELL_BYTES = 4096


def payload(request: Request, number: int) -> bytes:
    """What the ``number``-th request of a replay writes: each 4 KiB of it say where they belong and by which request, so two
    replays of a trace leave the same behind."""
    cells = range(request.offset, request.offset + request.length, _CELL_BYTES)
    head = number.to_bytes(8, "little")
    data = b"".join(blake2b(head + at.to_bytes(8, "little")).digest() * (_CELL_BYTES // 64) for at in cells)
    return data[: request.length]


class LatestTimes:
    """Percentiles of the latest 65536 of many times, and the largest of all."""

    def __init__(self) -> None:
        self._times = array("q")
        self.count = self.max_ns = 0

    def add(self, time_ns: int) -> None:
        self.max_ns = max(self.max_ns, time_ns)
        if len(self._times) < _TIMES_KEPT:
            self._times.append(time_ns)
        else:
            self._times[self.count % _TIMES_KEPT] = time_ns
        self.count += 1

    def percentile_ns(self, share: float) -> int:
        """``percentile_ns(0.99)``; 0 of no times."""
        times = sorted(self._times)
        return times[min(len(times) - 1, int(share * len(times)))] if times else 0


class Workload:
    """``open_records`` gives the records anew, for each round of a loop. ``trace_bytes``: size of the trace's disk, for ``scale``.

    ``speed`` 2.0 is twice as fast. ``start_ns`` is where in the trace to begin.
    """

    def __init__(
        self,
        open_records: Callable[[], Iterable[Record]],
        device_bytes: int,
        began_ns: int,
        speed: float = 1.0,
        start_ns: int = 0,
        loop: bool = False,
        fit: str = "wrap",
        trace_bytes: int = 0,
    ) -> None:
        if fit == "scale" and not trace_bytes:
            raise BadTrace(source="of a workload", where="its disk", reason="scaling needs the size of the trace's disk")
        self._open, self._loop = open_records, loop
        self._device_bytes, self._trace_bytes, self._fit = device_bytes, trace_bytes, fit
        self._speed, self._start_ns, self._began_ns = speed, start_ns, began_ns
        self._records: Iterator[Record] = iter(())
        self._next: tuple[int, Request, tuple[int, int]] | None = None
        self.rounds = self.skipped = 0
        self._lags = LatestTimes()
        self.lagged = self._lags.add
        self._round_ended_ns = began_ns
        self._advance()

    @property
    def next_due_ns(self) -> int | None:
        """When the next request is due; None: that was all."""
        return self._next[0] if self._next else None

    def take(self, now: int, at_most: int = 256) -> list[Request]:
        """The requests that are due, in order."""
        due: list[Request] = []
        while self._next is not None and self._next[0] <= now and len(due) < at_most:
            self.lagged(now - self._next[0])
            due.append(self._next[1])
            self._advance()
        return due

    def upcoming(self, at_most: int) -> list[tuple[int, Request, tuple[int, int]]]:
        """The next requests with the times when they are due, whatever time it is, and ``rounds`` and ``skipped`` up to each; none: that
        was all."""
        found: list[tuple[int, Request, tuple[int, int]]] = []
        while self._next is not None and len(found) < at_most:
            found.append(self._next)
            self._advance()
        return found

    def _advance(self) -> None:
        """Find the next request that fits; begins the next round at the end."""
        while True:
            for record in self._records:
                if record.issue_ns < self._start_ns:
                    continue
                request = self._fitted(record)
                if request is None:
                    self.skipped += 1
                    continue
                due = self._began_ns + int((record.issue_ns - self._start_ns) / self._speed)
                self._round_ended_ns = due
                self._next = due, request, (self.rounds, self.skipped)
                return
            is_empty = self.rounds and self._round_ended_ns == self._began_ns and self._next is None
            if self.rounds and (not self._loop or is_empty):
                self._next = None
                return
            self._begin_round()

    def _begin_round(self) -> None:
        """The next round begins one nanosecond after the last request, so a trace of one moment does not stop time."""
        if self.rounds:
            self._began_ns = self._round_ended_ns + 1
            self._next = None
            self._round_ended_ns = self._began_ns
        self.rounds += 1
        self._records = iter(self._open())

    def _fitted(self, record: Record) -> Request | None:
        offset, length = record.offset, record.length
        size = self._device_bytes
        if length > _LENGTH_MAX and record.op in ("read", "write"):
            return None
        if record.op != "flush" and offset + length > size:
            if self._fit == "skip" or length > size or not length:
                return None
            if self._fit == "wrap":
                offset %= size
        if self._fit == "scale" and record.op != "flush":
            if length > size:
                return None
            offset = offset * size // self._trace_bytes // _SECTOR_BYTES * _SECTOR_BYTES
        if record.op != "flush":
            offset = min(offset, size - length)
        return Request(record.op, offset, length, record.fua)

    def lag_ns(self, share: float) -> int:
        """A percentile of the lag, of the last requests: ``lag_ns(0.99)``."""
        return self._lags.percentile_ns(share)

    @property
    def taken(self) -> int:
        return self._lags.count

    @property
    def lag_max_ns(self) -> int:
        return self._lags.max_ns

    def statistics(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "skipped": self.skipped,
            "rounds": self.rounds,
            "lag_p50_ns": self.lag_ns(0.5),
            "lag_p99_ns": self.lag_ns(0.99),
            "lag_max_ns": self.lag_max_ns,
        }

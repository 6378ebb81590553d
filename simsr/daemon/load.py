"""A load: the requests of a trace, issued to a disk in the trace's time or as fast as it takes them (workload replay).

The trace is read ahead in worker threads. Each request is a task of its own, so many are in flight; how many, and with how many bytes, is
bounded, and what has to wait for that comes late. Writes that overlap wait for each other, so every replay of a trace leaves the same on the
disk. How late requests were issued is the lag: it says whether the trace's pace was kept.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import trio

from nbd_export.disk import Scripted, is_answer
from scenarios.request import WRITE_OPS, Request
from scenarios.traces.workload import LatestTimes, Workload, payload
from simsr.daemon.alarm import Alarm, current_ns
from simsr.errors import SimsrError

__all__ = ["DEPTH_MAX", "Load", "ScratchDisk"]

DEPTH_MAX = 1024
_BYTES_MAX = 64 << 20
_AHEAD = 2048
_BREATHE = 32  # requests issued in a row before others get their turn

Ahead = tuple[int, Request, tuple[int, int]]
"""What `Workload.upcoming` gives: when it is due, the request, rounds and requests left out up to it."""


class Load:
    """``make`` opens the trace, with times that begin at 0; it may block. ``target`` gives what to ask for each request.

    ``is_paced``: each request in its time; otherwise as soon as fewer than ``depth`` are in flight. ``seconds``: issue no more after that. ``on_lag`` is told how late each
    request is.
    """

    def __init__(
        self, make: Callable[[], Workload], target: Callable[[], Scripted], alarm: Alarm, is_paced: bool = True, depth: int = DEPTH_MAX,
        seconds: float | None = None, on_lag: Callable[[int], None] = lambda lag_ns: None,
    ) -> None:  # fmt: skip
        self._make, self._target, self._alarm, self._is_paced, self._depth = make, target, alarm, is_paced, depth
        self._seconds, self._on_lag = seconds, on_lag
        self._workload: Workload | None = None
        self._first: list[Ahead] = []
        self._counts = 0, 0  # rounds begun and requests left out, up to the one that was issued last
        self._scope = trio.CancelScope()
        self.over = trio.Event()
        self._less = trio.Event()
        self._bytes_in_flight = 0
        self._writing: dict[int, tuple[int, int]] = {}  # number -> where writes in flight begin and end
        self._began_ns: int | None = None
        self._ended_ns: int | None = None
        self._latencies = LatestTimes()
        self._lags = LatestTimes()
        self.issued = self.in_flight = self.bytes = 0
        self.errors: Counter[str] = Counter()
        self.first_error = ""
        self.problem: SimsrError | OSError | None = None

    @property
    def is_over(self) -> bool:
        return self.over.is_set()

    def stop(self) -> None:
        """Issue no more; what is in flight is given up."""
        self._scope.cancel()

    async def prepare(self) -> None:
        """Open the trace and read its first requests. Raises `BadTrace`."""
        self._workload = await trio.to_thread.run_sync(self._make, abandon_on_cancel=True)
        self._first = await self._ahead(self._workload)

    @staticmethod
    async def _ahead(workload: Workload) -> list[Ahead]:
        return await trio.to_thread.run_sync(workload.upcoming, _AHEAD, abandon_on_cancel=True)

    async def run(self) -> None:
        """Issue everything; returns when all is answered, or after `stop`. What was wrong with the trace is in ``problem`` then."""
        try:
            with self._scope:
                if self._workload is None:
                    await self.prepare()
                self._began_ns = current_ns()
                async with trio.open_nursery() as nursery:
                    with trio.CancelScope() as issuing:
                        if self._seconds is not None:
                            issuing.deadline = trio.current_time() + self._seconds
                        await self._issue_all(nursery)
        except* (SimsrError, OSError) as group:
            found: BaseException = group
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
            self.problem = found
        finally:
            self._ended_ns = current_ns()
            self.over.set()

    async def _issue_all(self, answers: trio.Nursery) -> None:
        send, receive = trio.open_memory_channel[list[Ahead]](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_ahead, send)
            async for portion in receive:
                for due_ns, request, counts in portion:
                    await self._until(self._began_ns + due_ns, request)
                    self._counts = counts
                    self._begin(answers, request)
        self._counts = self._workload.rounds, self._workload.skipped

    async def _read_ahead(self, send: trio.MemorySendChannel[list[Ahead]]) -> None:
        portion, self._first = self._first, []
        async with send:
            while portion:
                await send.send(portion)
                portion = await self._ahead(self._workload)

    async def _until(self, due_ns: int, request: Request) -> None:
        """Wait for the time and for room, and note how late that is."""
        if self._is_paced and due_ns > current_ns():
            await self._alarm.wait(trio.Event(), due_ns)
        elif self.issued % _BREATHE == 0:
            await trio.lowlevel.checkpoint()
        while not self._has_room(request):
            self._less = trio.Event()
            await self._less.wait()
        if self._is_paced:
            lag_ns = max(0, current_ns() - due_ns)
            self._lags.add(lag_ns)
            self._on_lag(lag_ns)

    def _has_room(self, request: Request) -> bool:
        if self.in_flight >= self._depth or (self._bytes_in_flight and self._bytes_in_flight + _held(request) > _BYTES_MAX):
            return False
        if request.op not in WRITE_OPS:
            return True
        begins, ends = request.offset, request.offset + request.length
        return not any(begins < other_ends and other_begins < ends for other_begins, other_ends in self._writing.values())

    def _begin(self, nursery: trio.Nursery, request: Request) -> None:
        self.issued += 1
        self.in_flight += 1
        if request.op in WRITE_OPS:
            self._writing[self.issued] = request.offset, request.offset + request.length
        self._bytes_in_flight += _held(request)
        nursery.start_soon(self._perform, request, self.issued)

    async def _perform(self, request: Request, number: int) -> None:
        began_ns, target = current_ns(), self._target()
        try:
            if request.op == "read":
                await target.read(request.offset, request.length)
            elif request.op == "flush":
                await target.flush()
            else:
                data = payload(request, number) if request.op == "write" else None
                await target.write(request.op, request.offset, request.length, data, request.fua)
            self._latencies.add(current_ns() - began_ns)
            self.bytes += _held(request)
        except Exception as error:
            if not is_answer(error):
                raise
            self._note(error, request)
        finally:
            self.in_flight -= 1
            self._writing.pop(number, None)
            self._bytes_in_flight -= _held(request)
            self._less.set()

    def _note(self, error: Exception, request: Request) -> None:
        number = getattr(error, "nbd_errno", None) or getattr(error, "errno", None)
        self.errors[os.strerror(number) if number else str(error)] += 1
        self.first_error = self.first_error or f"{request.op} of bytes {request.offset} to {request.offset + request.length}: {error}"

    def statistics(self) -> dict[str, Any]:
        times, lags = self._latencies, self._lags
        now = current_ns() if self._ended_ns is None else self._ended_ns
        ran_ns = 0 if self._began_ns is None else now - self._began_ns
        return {
            "issued": self.issued, "answered": times.count, "in_flight": self.in_flight, "bytes": self.bytes,
            "skipped": self._counts[1], "rounds": self._counts[0],
            "errors": dict(self.errors), "first_error": self.first_error or None, "seconds": ran_ns / 1e9,
            "paced": self._is_paced, "is_over": self.is_over, "problem": str(self.problem) if self.problem else None,
            "lag_p50_ns": lags.percentile_ns(0.5), "lag_p99_ns": lags.percentile_ns(0.99), "lag_max_ns": lags.max_ns,
            "latency_p50_ns": times.percentile_ns(0.5), "latency_p99_ns": times.percentile_ns(0.99), "latency_max_ns": times.max_ns,
        }  # fmt: skip


def _held(request: Request) -> int:
    return request.length if request.op in ("read", "write") else 0


class ScratchDisk:
    """Takes everything and keeps nothing, as null_blk does: for loads that matter only for the limits that they share with others."""

    scripted = tap = None
    client_kind = "qemu"
    each_write_durable = False

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def read(self, batch: list[tuple[int, memoryview]]) -> list[int]:
        return []  # the views are zeros already

    def write(self, batch: list[tuple[int, int, memoryview | None]]) -> int:
        return len(batch)

    def is_durable(self) -> bool:
        return True

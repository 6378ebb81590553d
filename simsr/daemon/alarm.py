"""Sleeping to the microsecond. epoll counts in milliseconds, too coarse for a disk that answers after 200 us.

One timerfd (timerfd_create(2)) wakes the task that waits for it; it then wakes everybody who is due. The clock is trio's own,
``time.perf_counter`` plus a constant, so times compare with `trio.current_time`.

What waking up and the work behind it take on this machine is learned: requests begin so much before they are due that half of them end too
late and half too early (a median, so those that come very late change nothing).
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import os
import time
from itertools import count

import trio

__all__ = ["Alarm", "current_ns"]

_CLOCK_MONOTONIC = 1
_EARLY_NS = 30_000  # what waking two tasks takes
_LEAD_FIRST_NS, _LEAD_MAX_NS, _LEAD_STEP_NS = 60_000, 400_000, 2_000
_WIRE_NS = 120_000  # what receiving a request and sending its answer take, which nobody here can see


class _Itimerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


def current_ns() -> int:
    """Trio's clock in nanoseconds; what scenarios count time with."""
    return int(trio.current_time() * 1e9)


class Alarm:
    """Wakes events at their times. `run` is its task; without it, as under a mock clock, every waiter sleeps by itself."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self._due: list[tuple[int, int, trio.Event]] = []
        self._numbers = count()
        self._leads_ns: dict[str, int] = {}

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        task_status.started()
        try:
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                with contextlib.suppress(BlockingIOError):
                    os.read(self._fd, 8)
                now = current_ns() + _EARLY_NS
                while self._due and self._due[0][0] <= now:
                    heapq.heappop(self._due)[2].set()
                self._arm()
        finally:
            fd, self._fd = self._fd, -1
            for *_, event in self._due:
                event.set()
            self._due.clear()
            os.close(fd)

    def lead_ns(self, op: str) -> int:
        """How long before its answer is due a request of that operation has to go on."""
        return self._leads_ns.get(op, _LEAD_FIRST_NS) if self._fd >= 0 else 0

    def learn(self, op: str, due_ns: int) -> None:
        """A request has been carried out now whose answer was due at that time; 0: at no time."""
        if due_ns and self._fd >= 0:
            step = _LEAD_STEP_NS if current_ns() > due_ns - _WIRE_NS else -_LEAD_STEP_NS
            self._leads_ns[op] = min(max(0, self.lead_ns(op) + step), _LEAD_MAX_NS)

    def _arm(self) -> None:
        if not self._due:
            return
        left_ns = max(1, self._due[0][0] - _EARLY_NS - current_ns())
        spec = _Itimerspec(0, 0, left_ns // 1_000_000_000, left_ns % 1_000_000_000)
        if self._libc.timerfd_settime(self._fd, 0, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    async def wait(self, event: trio.Event, until_ns: int) -> None:
        """Wait until the event is set by somebody, or it is ``until_ns`` (then it is set, too)."""
        if self._fd < 0:
            with trio.move_on_at(until_ns / 1e9):
                await event.wait()
            event.set()
            return
        heapq.heappush(self._due, (until_ns, next(self._numbers), event))
        if self._due[0][2] is event:
            self._arm()
        await event.wait()
        now = time.perf_counter_ns
        began = now()
        left_ns = until_ns - current_ns()
        if 0 < left_ns <= _EARLY_NS:
            while now() - began < left_ns:
                pass

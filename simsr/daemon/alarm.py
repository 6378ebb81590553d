"""Doing things at their time, to tens of microseconds. epoll counts in milliseconds, too coarse for a disk that answers after 200 us.

A timerfd (timerfd_create(2)) wakes trio's loop, and what is due is done by the loop itself, not by a task: right after it has waited, and
between any two steps of tasks, for which the alarm is an instrument of trio's as long as it is in use. So an answer that is ready leaves at its
time even if many tasks are about to go on; what can hold it up is one step of a task.

Two times are learned, each as one that all but about one in fifty stay within (`Allowance`): what waking up takes, which the timer is set
earlier by (the rest of that time is spent spinning), and what carrying out a request takes, for each operation: requests begin so
much before they are due, and their answers are held back.

The clock is trio's own, ``time.perf_counter`` plus a constant, so times compare with `trio.current_time`.
"""

from __future__ import annotations

import ctypes
import heapq
import os
from collections.abc import Callable
from itertools import count

import trio

__all__ = ["Alarm", "Allowance", "current_ns"]

_CLOCK_MONOTONIC = 1
_WIRE_NS = 80_000
"""How much earlier than it is due an answer is sent: what receiving a request and sending its answer take at the least, which nobody
here can see. Less than the 100 us that a client may be answered early by, so that none ever is."""

_IDLE_NS = 1_000_000_000


class _Itimerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


def current_ns() -> int:
    """Trio's clock in nanoseconds; what scenarios count time with."""
    return int(trio.current_time() * 1e9)


class Allowance:
    """A time ``ns`` that about 49 of 50 of those seen stay within; between ``least_ns`` and ``most_ns``.

    It grows by an eighth with each that is longer, however much, and shrinks by 1/400 with each that is not: a single stall changes next to nothing.
    """

    __slots__ = ("ns", "_least_ns", "_most_ns")

    def __init__(self, first_ns: int, least_ns: int, most_ns: int) -> None:
        self.ns, self._least_ns, self._most_ns = first_ns, least_ns, most_ns

    def learn(self, taken_ns: int) -> None:
        ns = self.ns + self.ns // 8 if taken_ns > self.ns else self.ns - self.ns // 400
        self.ns = min(max(self._least_ns, ns), self._most_ns)


class Alarm(trio.abc.Instrument):
    """Wakes events, and calls functions, at their times. `run` is its task; without it, as under a mock clock, every waiter sleeps by itself,
    and nothing takes time. ``now``: the clock."""

    def __init__(self, now: Callable[[], int] = current_ns) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._now = now
        self._fd = -1
        self._due: list[tuple[int, int, trio.Event, Callable[[], None] | None]] = []
        self._numbers = count()
        self._leads: dict[str, Allowance] = {}
        self._waking = Allowance(40_000, 20_000, 60_000)  # the most is what is spent spinning
        self._armed_ns = self._slept_ns = self._used_ns = 0
        self._woke_ns = self._woke_before_ns = 0
        self._attends = False

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        task_status.started()
        try:
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                self.ring()
                self._arm()  # which also makes it unreadable
        finally:
            fd, self._fd = self._fd, -1
            if self._attends:
                trio.lowlevel.remove_instrument(self)
                self._attends = False
            for _, _, event, _ in self._due:
                event.set()
            self._due.clear()
            os.close(fd)

    # What takes how long.

    def came_ns(self, taken_ns: int, woken_ns: int | None) -> int:
        """When a request came that a task took at ``taken_ns``, as the first since it was woken at ``woken_ns``: if that was since the loop last
        waited, the request was there when the loop stopped waiting. None: it was not the first, and may just have come."""
        if self._attends and woken_ns is not None:
            for woke_ns in (self._woke_ns, self._woke_before_ns):
                if woke_ns <= taken_ns:
                    return woke_ns if woken_ns >= woke_ns else taken_ns
        return taken_ns

    @property
    def wire_ns(self) -> int:
        """How much earlier than it is due at the client an answer has to be sent."""
        return _WIRE_NS if self._fd >= 0 else 0

    def lead_ns(self, op: str) -> int:
        """How long before its answer is sent a request of that operation has to be carried out."""
        return self._lead(op).ns if self._fd >= 0 else 0

    def learn(self, op: str, taken_ns: int) -> None:
        """So long it was from when a request was to be carried out until that was done."""
        if self._fd >= 0:
            self._lead(op).learn(taken_ns)

    def _lead(self, op: str) -> Allowance:
        if op not in self._leads:
            self._leads[op] = Allowance(2_000_000, 2_000_000, 20_000_000)
        return self._leads[op]

    # Waiting.

    async def wait(self, event: trio.Event, until_ns: int, then: Callable[[], None] | None = None) -> None:
        """Wait until the event is set by somebody, or it is ``until_ns``: ``then`` is called then, which must not raise, and the event set."""
        if self._fd < 0:
            with trio.move_on_at(until_ns / 1e9):
                await event.wait()
            _ring(event, then)
            return
        self._attend()
        heapq.heappush(self._due, (until_ns, next(self._numbers), event, then))
        if self._due[0][2] is event:
            self._arm()
        try:
            await event.wait()
        except BaseException:
            event.set()  # so that nothing is called for who has gone
            raise

    def _arm(self) -> None:
        spec = _Itimerspec()  # all zero: never
        if self._due:
            self._armed_ns = self._due[0][0] - self._waking.ns
            left_ns = max(1, self._armed_ns - self._now())
            spec.value_s, spec.value_ns = divmod(left_ns, 1_000_000_000)
        if self._libc.timerfd_settime(self._fd, 0, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def ring(self) -> int:
        """Do what is due; returns the time."""
        due, now = self._due, self._now()
        while due and due[0][0] <= now:
            _, _, event, then = heapq.heappop(due)
            _ring(event, then)
            now = self._now()
        return now

    # As an instrument of trio's.

    def _attend(self) -> None:
        self._used_ns = now = self._now()
        if not self._attends:
            self._attends, self._woke_ns, self._woke_before_ns = True, now, now
            trio.lowlevel.add_instrument(self)

    def before_io_wait(self, timeout: float) -> None:
        self._slept_ns = now = self._now()
        if not self._due and now - self._used_ns > _IDLE_NS:
            self._attends = False
            trio.lowlevel.remove_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        self._woke_before_ns, self._woke_ns = self._woke_ns, self._now()
        now = self.ring()
        if self._slept_ns < self._armed_ns <= now:
            self._waking.learn(now - self._armed_ns)
        soon_ns = now + self._waking.ns
        if self._due and self._due[0][0] <= soon_ns and trio.lowlevel.current_statistics().tasks_runnable <= 1:  # the alarm's own
            while self._due and self._due[0][0] <= soon_ns:
                self.ring()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._due:
            self.ring()


def _ring(event: trio.Event, then: Callable[[], None] | None) -> None:
    if not event.is_set():
        if then is not None:
            then()
        event.set()

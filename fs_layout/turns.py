"""The event loop of pyfuse3, as far as it can be told what to do.

pyfuse3 takes everything that waits from a module it calls ``trio`` and lets others put another one there (its own support for
asyncio does). What stands there here is trio, but for two things:

* `wait_readable` looks whether a request has arrived before it goes to sleep. So requests that have queued up are taken
  one after the other without a turn of trio's loop for each, and at depth one the next request is awaited for a few
  microseconds, if that pays off and nobody else is busy (`nbd_export.connection` does the same). It also looks right before
  it returns: a request can be withdrawn when its process is killed, and pyfuse3 would then wait in ``read``, with the
  interpreter and all.
* The lock that says whose turn it is to read may be taken again at once by who has just given it back. Others get their turn
  when a handler says that it will wait (`pass_on`).
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import perf_counter_ns
from types import SimpleNamespace

import trio

__all__ = ["Turns"]

_TURN_MAX_NS = 500_000
_SPIN_MIN_NS = 4_000
_SPIN_MAX_NS = 60_000


class Turns:
    """Whose turn it is to read from one FUSE device, and when there is something to read.

    ``ended`` is set when the file system has been unmounted or `stop` was called.
    """

    def __init__(self, fd: int, is_busy: Callable[[], bool]) -> None:
        self._fd, self._is_busy = fd, is_busy
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()
        self._stopping = False
        self._turn_began_ns = 0
        self._spin_ns = _SPIN_MIN_NS
        self.ended = trio.Event()

    def as_module(self) -> SimpleNamespace:
        """What pyfuse3 takes for the module ``trio``."""
        lowlevel = SimpleNamespace(
            wait_readable=self.wait_readable, current_task=trio.lowlevel.current_task,
            current_trio_token=trio.lowlevel.current_trio_token, notify_closing=trio.lowlevel.notify_closing,
        )  # fmt: skip
        return SimpleNamespace(
            lowlevel=lowlevel, Lock=lambda: self, open_nursery=trio.open_nursery, ClosedResourceError=trio.ClosedResourceError
        )

    def stop(self) -> None:
        """Have pyfuse3 end."""
        self._stopping = True
        self.ended.set()
        trio.lowlevel.notify_closing(self._fd)

    # The lock.

    async def __aenter__(self) -> None:
        if self._taken:
            await self._waiting.park()  # `pass_on` takes it for us
        self._taken = True

    async def __aexit__(self, *_: object) -> None:
        self._taken = False
        if self.ended.is_set():
            self.pass_on()  # everybody has to notice

    def pass_on(self) -> None:
        """To be called by a handler before it waits: others go on reading."""
        if not self._taken and self._waiting:
            self._taken = True
            self._waiting.unpark()

    # Waiting.

    async def wait_readable(self, fd: int) -> None:
        """Return when there is a request to read. Raises trio.ClosedResourceError after `stop`."""
        now = perf_counter_ns()
        if now - self._turn_began_ns > _TURN_MAX_NS:
            await trio.lowlevel.checkpoint()
            self._turn_began_ns = now = perf_counter_ns()
        deadline = 0 if self._is_busy() else now + self._spin_ns
        while not self._stopping:
            if events := self._poll.poll(0):
                if events[0][1] & (select.POLLERR | select.POLLHUP):
                    self.ended.set()
                return
            if deadline:
                if perf_counter_ns() < deadline:
                    continue
                deadline = 0
                self._spin_ns = max(_SPIN_MIN_NS, self._spin_ns // 2)
            slept_ns = perf_counter_ns()
            await trio.lowlevel.wait_readable(fd)
            self._turn_began_ns = perf_counter_ns()
            if self._turn_began_ns - slept_ns < _SPIN_MAX_NS:
                self._spin_ns = min(_SPIN_MAX_NS, self._spin_ns * 4)
        raise trio.ClosedResourceError

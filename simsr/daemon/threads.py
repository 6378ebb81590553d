"""Where the daemon's blocking work runs: in worker threads, or where whoever started this run of trio says.

`run_sync` and `start_thread_soon` are trio's own, but for `hand_in`: the simulation (docs/simulation.md) puts threads in their place
that take turns with trio's, in an order that a seed decides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import trio
from outcome import Outcome

__all__ = ["Threads", "hand_in", "run_sync", "start_thread_soon"]

_Result = TypeVar("_Result")


class Threads(Protocol):
    """What can run blocking work."""

    async def run(self, call: Callable[[], _Result], limiter: trio.CapacityLimiter | None) -> _Result:
        """As `trio.to_thread.run_sync`: not cancelled once it has begun."""

    def start(self, call: Callable[[], object], deliver: Callable[[Outcome], object]) -> None:
        """As `trio.lowlevel.start_thread_soon`."""


class _Workers:
    """Trio's worker threads."""

    async def run(self, call: Callable[[], _Result], limiter: trio.CapacityLimiter | None) -> _Result:
        return await trio.to_thread.run_sync(call, limiter=limiter)

    def start(self, call: Callable[[], object], deliver: Callable[[Outcome], object]) -> None:
        trio.lowlevel.start_thread_soon(call, deliver)  # without a name: to give it and take it back delays every flush


_threads: trio.lowlevel.RunVar[Threads] = trio.lowlevel.RunVar("simsr threads", default=_Workers())


def hand_in(threads: Threads) -> None:
    """Have ``threads`` do all blocking work of this run of trio."""
    _threads.set(threads)


async def run_sync(call: Callable[..., _Result], *arguments: object, limiter: trio.CapacityLimiter | None = None) -> _Result:
    """``call(*arguments)`` in a worker thread. Raises what it raises."""
    return await _threads.get().run(partial(call, *arguments) if arguments else call, limiter)


def start_thread_soon(call: Callable[[], object], deliver: Callable[[Outcome], object]) -> None:
    """``deliver(outcome of call())``, both in a worker thread. No task waits for it."""
    _threads.get().start(call, deliver)

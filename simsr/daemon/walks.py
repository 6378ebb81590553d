"""Walks over the maps of a store (`simsr.store.walk`), beside the running load: what blocks in a worker thread, the rest a fraction of a
millisecond at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio

from simsr.daemon import threads
from simsr.errors import NotFound, SimsrError, StoreError
from simsr.store.walk import Walk

if TYPE_CHECKING:
    from simsr.daemon.host import Host, Mounted

__all__ = ["Walks", "run_in_host"]

_Walk = TypeVar("_Walk", bound=Walk)
_Result = TypeVar("_Result")


async def run_in_host(host: Host, mounted: Mounted, job: Callable[[], Awaitable[_Result]]) -> _Result:
    """``await job()`` in a task of the host, which closes its stores when all its tasks have ended: then nothing is held any more.

    The job is cancelled with the caller. Raises what it raises, `StoreError` for an OSError, `NotFound` if the SR goes away meanwhile.
    """
    scope, ended = trio.CancelScope(), trio.Event()
    done: list[_Result] = []
    errors: list[Exception] = []

    async def task() -> None:
        try:
            with scope:
                done.append(await job())
        except (SimsrError, OSError) as error:
            errors.append(error)
        finally:
            ended.set()

    host._nursery.start_soon(task)
    try:
        await ended.wait()
    finally:
        scope.cancel()
    if mounted.scope.cancel_called or not (done or errors):
        raise NotFound(kind="SR", name=mounted.repository.name)
    if errors and isinstance(errors[0], OSError):
        raise StoreError(path=mounted.repository.store.directory.path, reason=f"a map cannot be read: {errors[0]}") from errors[0]
    if errors:
        raise errors[0]
    return done[0]


class Walks:
    """Runs walks over the stores of a host, one after the other, so that many that are asked for do not add up."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._one = trio.Lock()
        self._threads = trio.CapacityLimiter(1)

    async def run(self, mounted: Mounted, begin: Callable[[], _Walk]) -> _Walk:
        """Carry out what ``begin`` makes. Raises what that raises, `StoreError`, `NotFound` if the SR goes away meanwhile."""
        return await run_in_host(self._host, mounted, partial(self._run, mounted, begin))

    async def _run(self, mounted: Mounted, begin: Callable[[], _Walk]) -> _Walk:
        async with self._one:
            walk = begin()
            try:
                with closing(walk.work()) as work:
                    for step in work:
                        if mounted.scope.cancel_called:  # the SR is being deleted
                            break
                        if step is None:
                            await trio.lowlevel.checkpoint()
                        else:
                            await threads.run_sync(step, limiter=self._threads)
            finally:
                mounted.engine.wake()  # what only the walk still held can be taken apart
            return walk

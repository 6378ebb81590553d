"""One mount, from `FuseMount.start` to its end: by `FuseMount.unmount`, by umount(8), or with the daemon.

pyfuse3 keeps its session in global variables, so there is one mount in a process at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import time
from functools import partial
from typing import Any

import pyfuse3
import trio

from fs_layout import mounting
from fs_layout.operations import REQUEST_BYTES_MAX, Operations
from fs_layout.source import Source
from fs_layout.turns import Turns
from simsr.errors import MountBusy, MountFailed

__all__ = ["FuseMount"]

log = logging.getLogger("simsr.fuse")

TASKS_MAX = 10_000  # requests that wait for disks at one time; more are not read
SYNC_TIMEOUT_S = 30.0
INVALIDATION_TIMEOUT_S = 10.0


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _keep_request_memory() -> None:
    """Have malloc keep a few blocks of the size of the largest request. pyfuse3 makes a new one for each write, and to get 1 MiB from the
    kernel and give it back every time costs more than what is done with it (mallopt(3); `simsr.daemon.main` set it low)."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 2 * REQUEST_BYTES_MAX)
        mallopt(_M_TRIM_THRESHOLD, 8 * REQUEST_BYTES_MAX)


class FuseMount:
    """A mount. `run` is its task: ``await nursery.start(mount.run)``."""

    def __init__(self, source: Source, path: str, *, writeback: bool, shared: bool) -> None:
        self._source = source
        self.path, self.writeback, self.shared = path, writeback, shared
        self.ended = trio.Event()
        self._threads = trio.CapacityLimiter(4)
        self._invalidations = 0  # under way
        self._ending = False
        self._turns: Turns
        self.operations: Operations
        self._nursery: trio.Nursery

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Mount, serve until unmounted. Raises `MountFailed`, `Unsupported` before it has started, and nothing afterwards."""
        await trio.to_thread.run_sync(mounting.check_directory, self.path, abandon_on_cancel=True)
        fd = await trio.to_thread.run_sync(partial(mounting.mount, self.path, shared=self.shared))
        self._turns = Turns(fd, self._source.is_busy)
        self.operations = Operations(self._source, self._turns, writeback=self.writeback, shared=self.shared)
        pyfuse3.trio = self._turns.as_module()
        _keep_request_memory()
        try:
            pyfuse3.init(self.operations, f"/dev/fd/{fd}", ())
        except RuntimeError as error:
            os.close(fd)
            raise MountFailed(path=self.path, reason=str(error)) from None
        try:
            await self._serve(task_status)
        except Exception:
            log.exception("mount %s ended by a bug in simsr", self.path)
        finally:
            with trio.CancelScope(shield=True):
                await self._end()
            self.ended.set()

    async def _serve(self, task_status: trio.TaskStatus) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._main)
            where = await trio.to_thread.run_sync(mounting.mounted_at, self.path)
            if where is not None and not mounting.raise_background_limit(where.device):
                log.info("%s: at most 12 readahead and asynchronous requests at one time, for all disks together", self.path)
            if where is not None and self.writeback and not mounting.raise_dirty_limit(where.device):
                log.info("%s: the kernel collects few writes before it has them written", self.path)
            log.info("VDIs are mounted at %s (%s)", self.path, "writeback" if self.writeback else "direct")
            task_status.started()
            await self._turns.ended.wait()
            self.operations.give_up()

    async def _main(self) -> None:
        await pyfuse3.main(1, TASKS_MAX)
        self._turns.ended.set()

    async def unmount(self, *, lazy: bool = False) -> None:
        """Unmount; ``lazy``: also if it is in use: what is cached is written, then open files fail with ENOTCONN.

        Raises `MountBusy`, `MountFailed`; then it goes on as before.
        """
        try:
            await trio.to_thread.run_sync(mounting.unmount, self.path)
        except MountBusy:
            if not lazy:
                raise
            log.warning("mount %s is in use: unmounted from its directory, and open files fail from now on", self.path)
            if self.writeback:
                await self._sync()
            await trio.to_thread.run_sync(partial(mounting.unmount, self.path, lazy=True))
            await self._finish_invalidations()
            self._turns.stop()
        await self.ended.wait()

    async def _sync(self) -> None:
        with trio.move_on_after(SYNC_TIMEOUT_S) as scope:
            try:
                await trio.to_thread.run_sync(mounting.sync, self.path, abandon_on_cancel=True)
            except OSError as error:
                log.warning("mount %s: not everything cached could be written: %s", self.path, error)
        if scope.cancelled_caught:
            log.warning("mount %s: not everything cached was written in %.0f s", self.path, SYNC_TIMEOUT_S)

    async def _finish_invalidations(self) -> None:
        """Begin no more invalidations and see those that are under way to their end, for which somebody has to answer requests."""
        self._ending = True
        with trio.move_on_after(INVALIDATION_TIMEOUT_S):
            while self._invalidations:
                self.operations.give_up()
                await trio.sleep(0.005)

    async def _end(self) -> None:
        """Put everything away; whatever still asks gets ENOTCONN."""
        self._turns.ended.set()
        with contextlib.suppress(MountFailed):
            await trio.to_thread.run_sync(partial(mounting.unmount, self.path, lazy=True))
        await self._finish_invalidations()
        pyfuse3.close(unmount=False)
        self.operations.close_all()
        log.info("%s is no longer mounted", self.path)

    # What others have changed.

    async def changed(self, uuids: list[str]) -> None:
        """The content or the size of disks was changed past this mount. Returns when no program can read what was before.

        The kernel waits for reads of it that are under way. As it would do so uninterruptibly, they are waited for here first; if
        they hang, as their disk does, the rest is done in the background when they end.
        """
        if self._turns.ended.is_set():
            return
        done = trio.Event()
        self._nursery.start_soon(self._invalidate, [number for uuid in uuids if (number := self.operations.changed(uuid))], done)
        with trio.move_on_after(INVALIDATION_TIMEOUT_S) as scope:
            await done.wait()
        if scope.cancelled_caught:
            log.warning("mount %s: requests for VDI %s hang, so programs may see what the kernel has cached", self.path, ", ".join(uuids))

    async def _invalidate(self, numbers: list[int], done: trio.Event) -> None:
        for number in numbers:
            while self.operations.is_waiting(number):
                await trio.sleep(0.01)
            if self._ending or self._turns.ended.is_set():
                break
            self._invalidations += 1
            try:
                # Not abandoned: the session must outlive the call. ENOENT: the kernel has forgotten it already.
                with contextlib.suppress(OSError), trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(pyfuse3.invalidate_inode, number, limiter=self._threads)
            finally:
                self._invalidations -= 1
        done.set()

    def describe(self) -> dict[str, Any]:
        return {
            "path": self.path, "cache": "writeback" if self.writeback else "direct", "shared": self.shared,
            **self.operations.statistics(),
        }  # fmt: skip

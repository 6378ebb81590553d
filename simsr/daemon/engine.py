"""The engine of one store: everything about it that waits.

The store itself never waits (`simsr.store`); here trio tasks run its blocking jobs in worker threads:

* `Engine.flush`: group commit. One sync serves all who asked before it began.
* `Engine.paged`: brings map nodes into memory that a call needs.
* `Engine.make_room`: waits for space.
* `Disk`: one attached volume, as the NBD server wants it; reads and writes that must wait.

Upkeep (checkpoints, cleaning, spare segments) is in `simsr.daemon.upkeep`. All changes of the store happen on trio's thread, so
between two awaits nothing moves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from time import time_ns
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import trio
from outcome import Outcome

from nbd_export.disk import Scripted
from nbd_export.limits import Terms
from simsr.daemon import threads
from simsr.daemon.gate import Gate, Gated
from simsr.daemon.kernel_sync import KernelSync
from simsr.daemon.upkeep import Upkeep
from simsr.errors import SimsrError, StoreStopped
from simsr.store.hot import HotMemory
from simsr.store.log import KEEP_FOR_WRITES, FlushJob
from simsr.store.node_table import Absent
from simsr.store.read_job import ReadJob
from simsr.store.store import SPARES_MIN, Store
from simsr.store.volume import Fetched, Volume, Write

if TYPE_CHECKING:
    from simsr.daemon.recording import Tap

__all__ = ["Engine", "Disk"]

log = logging.getLogger("simsr.engine")

_COLD_THREADS = 16
_PREFETCH_BYTES = 1 << 20
_RECORD_BYTES_PER_BLOCK = 64  # what the record of a single block takes, the worst case
_Result = TypeVar("_Result")

Changed = Callable[[str, int, int, int], Awaitable[list[tuple[int, bool]]]]
"""`nbd_export.disk.Disk.changed`"""


class Engine:
    """Runs a store under trio. `run` must be started in a nursery before anything else is awaited.

    ``replaced`` is told of volumes whose content or size a commit changed at a stroke, and waited for by the flush after it: so every
    operation that does such a thing ends when nobody has the old content any more.
    """

    def __init__(
        self, store: Store, replaced: Callable[[list[Volume]], Awaitable[None]] | None = None, hot_memory: HotMemory | None = None
    ) -> None:
        """``hot_memory``: what may be kept of what is read much; nothing without it."""
        self.store = store
        self._replaced, self._telling = replaced, trio.Lock()
        self._flush_job: FlushJob | None = None
        self._kernel_sync: KernelSync | None = None
        self._flush_waiters: list[tuple[int, Callable[[Exception | None], None]]] = []
        self.room_changed = trio.Condition()
        self._cold = trio.CapacityLimiter(_COLD_THREADS)
        self.upkeep = Upkeep(store, self.room_changed, self.page_in, hot_memory or HotMemory(0))
        self.wake = self.upkeep.wake
        self.checkpoint = self.upkeep.checkpoint
        store.log.on_roll = self.wake
        self.on_flush: Callable[[], None] | None = None
        """Called before a change is made durable, once: where a scenario has the daemon die."""
        self.disks: WeakKeyDictionary[Volume, WeakSet[Disk]] = WeakKeyDictionary()  # those that are attached now
        self.gates: dict[Volume, Gate] = {}  # those that are closed now
        self.give_up: Callable[[], bool] = lambda: False  # lets go of something that is kept while there is room; whether it did
        self.flush_waits = self.cold_reads = self.room_waits = 0

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """What goes on beside requests, until cancelled."""
        try:
            self._kernel_sync = kernel_sync = KernelSync()
        except OSError as error:
            log.debug("syncs take a thread: %s", error)
            await self.upkeep.run(task_status)
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(kernel_sync.run)
                await self.upkeep.run(task_status)
        finally:
            with trio.CancelScope(shield=True):
                await self.settle()
            self._kernel_sync = None
            kernel_sync.close()

    # Flushing.

    def is_durable(self) -> bool:
        """Whether everything written so far is durable, and the log has not stopped."""
        log_ = self.store.log
        return log_.durable_seq >= log_.flush_needed_seq and log_.failure is None

    async def flush(self) -> None:
        """Make everything written before this call durable, and have nobody see what was replaced. Raises `StoreStopped`."""
        await self.durable()
        if self.store.replaced or self._telling.locked():
            await self._tell_replaced()

    async def durable(self) -> None:
        """Make everything written before this call durable. Raises `StoreStopped`."""
        if self.on_flush is not None:
            self.on_flush()
        ended = trio.Event()
        errors: list[Exception | None] = []

        def done(error: Exception | None) -> None:
            errors.append(error)
            ended.set()

        self.flush_soon(done)
        await ended.wait()
        if errors[0] is not None:
            raise errors[0]

    async def _tell_replaced(self) -> None:
        async with self._telling:
            idents, self.store.replaced = self.store.replaced, set()
            volumes = [self.store.volumes[ident] for ident in sorted(idents) if ident in self.store.volumes]
            if volumes and self._replaced is not None:
                await self._replaced(volumes)

    def flush_soon(self, done: Callable[[Exception | None], None]) -> None:
        """Call ``done`` on trio's thread when everything written before is durable, or with the error.

        ``done`` must not raise. One sync serves all who asked before it began; the next one begins when it ends. No task is
        involved: a hand-over between tasks costs as much as a sync of a fast disk.
        """
        log_ = self.store.log
        if self.is_durable():
            done(None)
            return
        self.flush_waits += 1
        self._flush_waiters.append((log_.flush_needed_seq, done))
        if self._flush_job is None:
            self._begin_flush()

    def _begin_flush(self) -> None:
        try:
            job = self.store.begin_flush()
        except StoreStopped as error:
            self._answer_waiters(error)
            return
        if job is None:
            self._answer_waiters(None)
            return
        self._flush_job = job
        if not self._kernel_syncs(job):
            token = trio.lowlevel.current_trio_token()

            def deliver(result: Outcome) -> None:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._flush_ended, job, getattr(result, "error", None))

            threads.start_thread_soon(job.run, deliver)

    def _kernel_syncs(self, job: FlushJob) -> bool:
        """Whether the kernel carries the job out without a thread: if there is one file, as nearly always."""
        if self._kernel_sync is None or len(job.files) != 1 or job.files[0].descriptor is None:
            return False
        try:
            self._kernel_sync.begin(job.files[0].descriptor, partial(self._flush_ended, job))
        except OSError as error:
            log.info("syncs take a thread from now on: %s", error)
            self._kernel_sync = None
            return False
        return True

    def _flush_ended(self, job: FlushJob, error: BaseException | None) -> None:
        self._flush_job = None
        try:
            self.store.end_flush(job, error, self._answer_waiters)
        except StoreStopped as stopped:
            log.error("%s. %s", stopped, stopped.hint)
            self._answer_waiters(stopped)
        else:
            self._answer_waiters(None)

    def _answer_waiters(self, error: Exception | None = None) -> None:
        durable_seq = self.store.log.durable_seq
        waiters, self._flush_waiters = self._flush_waiters, []
        for waiter in waiters:
            seq, done = waiter
            if error is not None or seq <= durable_seq:
                done(error)
            else:
                self._flush_waiters.append(waiter)
        if self._flush_waiters and self._flush_job is None:
            self._begin_flush()

    async def settle(self) -> None:
        """Wait until no flush is under way; called before the store is closed."""
        while self._flush_job is not None:
            if self._kernel_sync is not None:
                self._kernel_sync.collect()
            await trio.sleep(0.001)

    # Map nodes.

    async def page_in(self, ids: Iterable[int]) -> None:
        """Bring map nodes into memory. Raises `StoreDamaged`, OSError."""
        job = self.store.page_job(ids)
        try:
            await threads.run_sync(job.run, limiter=self._cold)
        finally:
            job.finish()

    async def paged(self, call: Callable[[], _Result]) -> _Result:
        """``call()``, with the map nodes it needs brought into memory. Raises `StoreDamaged`, OSError, and what it raises."""
        while True:
            try:
                return call()
            except Absent as absent:
                await self.page_in([absent.ident])

    # Room.

    @property
    def tight(self) -> bool:
        """Whether a write has to look for room first."""
        store = self.store
        return len(store.pool.spares) < SPARES_MIN or store.too_dirty

    def has_room(self, blocks: int) -> bool:
        """Whether ``blocks`` blocks can be written without waiting for a segment file to be made."""
        room_blocks, room_bytes = self.store.log.room()
        spares = len(self.store.pool.spares) - KEEP_FOR_WRITES
        fits = room_blocks >= blocks and room_bytes >= _RECORD_BYTES_PER_BLOCK * (blocks + 8)
        return not self.store.too_dirty and (fits or spares * self.store.pool.data_blocks >= blocks)

    async def make_room(self, blocks: int) -> None:
        """Wait until `has_room`. Raises `NoSpace` when no segment file can be made or reclaimed, `StoreStopped`."""
        self.wake()
        async with self.room_changed:
            while not self.has_room(blocks):
                self.store.log.raise_if_stopped()
                if not self.upkeep.reclaiming and (reason := self.upkeep.why_no_space()):
                    if not self.give_up():
                        raise reason
                    self.wake()
                    continue
                self.room_waits += 1
                await self.room_changed.wait()

    def statistics(self) -> dict[str, int]:
        waits = {"flush_waits": self.flush_waits, "cold_reads": self.cold_reads, "room_waits": self.room_waits}
        return {**waits, **self.upkeep.hot.statistics()}


class _ColdReads:
    """Reads that wait for the disk together. `run` belongs in a worker thread; then `release`, always."""

    def __init__(self, count: int) -> None:
        self.jobs: dict[int, ReadJob] = {}
        self.errors: list[Exception | None] = [None] * count

    def run(self) -> None:
        if sum(job.parts for job in self.jobs.values()) > 1:
            for job in self.jobs.values():
                job.begin()
        for index, job in self.jobs.items():
            try:
                job.run()
            except (SimsrError, OSError) as error:
                self.errors[index] = error

    def release(self) -> None:
        for job in self.jobs.values():
            job.release()


class Disk(Gated):
    """An attached volume (`nbd_export.disk.Disk`)."""

    def __init__(
        self, engine: Engine, volume: Volume, on_detach: Callable[[], None], terms: Terms | None = None, changed: Changed | None = None,
        on_write: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """``on_write`` is called before the first write, and before the first one after a gate was closed."""
        super().__init__()
        self._engine, self._volume, self._on_detach, self._on_write = engine, volume, on_detach, on_write
        self.in_order = False
        self.terms = terms or Terms()
        self.changed = changed
        self.scripted: Scripted | None = None
        self.client_kind, self.each_write_durable = "qemu", False  # until the face knows better
        self.tap: Tap | None = None  # while the disk is recorded
        self.read, self.lend = volume.read, volume.lend
        self.flush_soon = engine.flush_soon
        self.is_durable = engine.is_durable
        if on_write is not None:
            self.write = self._first_write
        engine.disks.setdefault(volume, WeakSet()).add(self)
        if gate := engine.gates.get(volume):
            gate.close([self])

    def open_gate(self) -> None:
        super().open_gate()
        if self._on_write is not None:
            self.write = self._first_write

    @property
    def may_cache(self) -> bool:
        """Whether it belongs to a client that may go on believing what it has read: not to the daemon, nor to a reader through FUSE."""
        return self.changed is not None or self._on_write is not None

    def _first_write(self, batch: Sequence[Write]) -> int:
        self._about_to_write()
        return self.write(batch)

    def _about_to_write(self) -> None:
        if vars(self).pop("write", None) is not None:
            self._on_write()

    @property
    def size_bytes(self) -> int:
        return self._volume.size_bytes

    async def read_cold(self, batch: Sequence[tuple[int, memoryview]]) -> list[Exception | None]:
        """Fill the views, waiting for the disk; for each what went wrong, or None. One job for all of them."""
        try:
            async with self._passing():
                return await self._read_cold(batch)
        except OSError as error:  # of the gate
            return [error] * len(batch)

    async def _read_cold(self, batch: Sequence[tuple[int, memoryview]]) -> list[Exception | None]:
        self._engine.cold_reads += len(batch)
        reads = _ColdReads(len(batch))
        try:
            for index, (offset, view) in enumerate(batch):
                try:
                    reads.jobs[index] = await self._engine.paged(partial(self._volume.read_job, offset, view))
                except (SimsrError, OSError) as error:
                    reads.errors[index] = error
            await threads.run_sync(reads.run, limiter=self._engine._cold)
        finally:
            reads.release()
        return reads.errors

    def read_soon(self, batch: Sequence[tuple[int, memoryview]], done: Callable[[list[Exception | None]], None]) -> bool:
        """`read_cold` without a task. False where that would have to wait for something before it can begin."""
        limiter, reads = self._engine._cold, _ColdReads(len(batch))
        if self._gate is not None or not limiter.available_tokens:
            return False
        try:
            for index, (offset, view) in enumerate(batch):
                reads.jobs[index] = self._volume.read_job(offset, view)
        except (Absent, SimsrError, OSError):
            reads.release()
            return False
        limiter.acquire_on_behalf_of_nowait(reads)
        self._engine.cold_reads += len(batch)
        self.under_way += 1
        token = trio.lowlevel.current_trio_token()

        def ended(result: Outcome) -> None:
            limiter.release_on_behalf_of(reads)
            self.under_way -= 1
            reads.release()
            if (error := getattr(result, "error", None)) is not None:
                log.error("a read of the disk failed in a way that is not foreseen", exc_info=error)
                reads.errors = [error] * len(batch)
            done(reads.errors)

        def deliver(result: Outcome) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(ended, result)

        threads.start_thread_soon(reads.run, deliver)
        return True

    async def allocation_cold(self, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        async with self._passing():
            return await self._engine.paged(partial(self._volume.allocation, offset, length, extents_max))

    def allocation(self, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        try:
            return self._volume.allocation(offset, length, extents_max)
        except Absent:
            return []

    async def prefetch(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            part = min(_PREFETCH_BYTES, end - offset)
            (error,) = await self.read_cold([(offset, memoryview(bytearray(part)))])
            if error is not None:
                raise error
            offset += part

    def write(self, batch: Sequence[Write]) -> int:
        # Rolling to the next segment needs spares to be there: one to use, the others stay in reserve.
        if self._engine.tight and not self._engine.has_room(self._volume.blocks_needed(batch)):
            return 0
        self._volume.modified_ns = time_ns()
        return self._volume.write(batch)

    async def write_rest(self, batch: Sequence[Write], start: int) -> None:
        async with self._passing():
            self._about_to_write()
            await self._write_rest(batch, start)

    async def _write_rest(self, batch: Sequence[Write], start: int) -> None:
        fetched: Fetched = {}
        engine = self._engine
        self._volume.modified_ns = time_ns()
        while start < len(batch):
            offset, length, view = batch[start]
            await engine.make_room(self._volume.blocks_needed(batch[start : start + 1]))
            done = self._volume.write(batch[: start + 1], start, fetched)
            if done > start:
                start, fetched = done, {}
                continue
            jobs = await engine.paged(partial(self._volume.edge_jobs, offset, length, view is None))
            try:
                for block, job in jobs.items():
                    await threads.run_sync(job.run, limiter=engine._cold)
                    fetched[block] = job.fetched
            finally:
                for job in jobs.values():
                    job.release()

    def detach(self) -> None:
        self._engine.disks[self._volume].discard(self)
        self._on_detach()

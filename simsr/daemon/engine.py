"""The engine of one store: everything about it that waits.

The store itself never waits (`simsr.store`); here trio tasks run its blocking jobs in worker threads:

* `Engine.flush`: group commit. One sync serves all who asked before it began.
* `Engine.run`: upkeep. Makes spare segments before they are needed, writes checkpoints, takes apart what was dropped.
* `Disk`: one attached volume, as the NBD server wants it; reads and writes that must wait.

All changes of the store happen on trio's thread, so between two awaits nothing moves.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import trio
from outcome import Outcome

from simsr.errors import NoSpace, StoreStopped
from simsr.store.log import FlushJob
from simsr.store.store import SPARES_MIN, Store
from simsr.store.volume import Fetched, Volume, Write

__all__ = ["Engine", "Disk"]

log = logging.getLogger("simsr.engine")

UPKEEP_PERIOD_S = 30.0
_REAP_NODES = 8  # at a time: about 0.1 ms, so that a request hardly notices
_REAP_PAUSE_S = 0.001
_COLD_THREADS = 16
_PREFETCH_BYTES = 1 << 20
_NO_SPACE_PAUSE_S = 1.0
_RECORD_BYTES_PER_BLOCK = 64  # what the record of a single block takes, the worst case


class Engine:
    """Runs a store under trio. `run` must be started in a nursery before anything else is awaited."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._flush_job: FlushJob | None = None
        self._flush_waiters: list[tuple[int, Callable[[Exception | None], None]]] = []
        self._upkeep = trio.Event()
        self._spares_wanted = trio.Event()
        self._reap_wanted = trio.Event()
        self._one_checkpoint = trio.Lock()
        self._room = trio.Condition()
        self._cold = trio.CapacityLimiter(_COLD_THREADS)
        self._upkeep_threads = trio.CapacityLimiter(2)
        self._no_space: NoSpace | None = None  # why the last segment file could not be made
        self._no_checkpoint: Exception | None = None  # why the last checkpoint failed
        store.log.on_roll = self.wake
        self.flush_waits = self.cold_reads = self.room_waits = 0

    def wake(self) -> None:
        """There may be upkeep to do."""
        self._upkeep.set()
        self._spares_wanted.set()

    # Flushing.

    def is_durable(self) -> bool:
        """Whether everything written so far is durable, and the log has not stopped."""
        log_ = self.store.log
        return log_.durable_seq >= log_.flush_needed_seq and log_.failure is None

    async def flush(self) -> None:
        """Make everything written before this call durable. Raises `StoreStopped`."""
        ended = trio.Event()
        errors: list[Exception | None] = []

        def done(error: Exception | None) -> None:
            errors.append(error)
            ended.set()

        self.flush_soon(done)
        await ended.wait()
        if errors[0] is not None:
            raise errors[0]

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
        token = trio.lowlevel.current_trio_token()

        def deliver(result: Outcome) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._flush_ended, job, result)

        trio.lowlevel.start_thread_soon(job.run, deliver, "simsr flush")

    def _flush_ended(self, job: FlushJob, result: Outcome) -> None:
        self._flush_job = None
        error = getattr(result, "error", None)
        try:
            self.store.end_flush(job, error)
        except StoreStopped as stopped:
            log.error("%s. %s", stopped, stopped.hint)
            self._answer_waiters(stopped)
        else:
            self._answer_waiters(None)

    def _answer_waiters(self, error: Exception | None) -> None:
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
            await trio.sleep(0.001)

    # Upkeep.

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Upkeep until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._make_spares)
            nursery.start_soon(self._reap)
            task_status.started()
            idle_seq = -1
            while True:
                with trio.move_on_after(UPKEEP_PERIOD_S) as timeout:
                    await self._upkeep.wait()
                self._upkeep = trio.Event()
                try:
                    quiet = timeout.cancelled_caught and self.store.log.flush_needed_seq != idle_seq
                    if self.store.wants_checkpoint or (quiet and self.store.log.failure is None):
                        await self.checkpoint()
                        idle_seq = self.store.log.flush_needed_seq
                    self._reap_wanted.set()
                except NoSpace as error:
                    log.warning("%s", error)
                    await self._room_changed()
                except StoreStopped as error:
                    log.error("%s", error)
                    await self._room_changed()

    async def _reap(self) -> None:
        """Take apart what was dropped, with pauses, because nobody waits for it; without them when segments are scarce."""
        while True:
            await self._reap_wanted.wait()
            self._reap_wanted = trio.Event()
            while self.store.reap(_REAP_NODES):
                scarce = len(self.store.pool.spares) < SPARES_MIN
                await trio.sleep(0 if scarce else _REAP_PAUSE_S)
            if self.store.wants_checkpoint and self._no_checkpoint is None:
                self._upkeep.set()
            await self._room_changed()

    async def checkpoint(self) -> None:
        """Write a checkpoint beside the running load; after the one that may be under way. Raises `NoSpace`, `StoreStopped`."""
        async with self._one_checkpoint:
            await self._checkpoint()
        await self._room_changed()

    async def _checkpoint(self) -> None:
        job = self.store.begin_checkpoint()
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self.store.run_checkpoint, job, limiter=self._upkeep_threads)
            except (OSError, NoSpace) as error:
                self._no_checkpoint = error
                self.store.end_checkpoint(job, error)
            self._no_checkpoint = None
            self.store.end_checkpoint(job)

    async def _room_changed(self) -> None:
        async with self._room:
            self._room.notify_all()

    async def _make_spares(self) -> None:
        pool = self.store.pool
        while True:
            while not pool.wanted or self.store.log.failure is not None:
                await self._spares_wanted.wait()
                self._spares_wanted = trio.Event()
            slot, file = pool.next_slot(), None
            try:
                file = await trio.to_thread.run_sync(pool.make_file, slot, limiter=self._upkeep_threads)
                self._no_space = None
            except (NoSpace, OSError) as error:
                self._no_space = error if isinstance(error, NoSpace) else NoSpace(name=pool.path, reason=str(error))
                log.warning("%s", error)
            finally:
                pool.add(slot, file)
                await self._room_changed()
            if file is None:
                await trio.sleep(_NO_SPACE_PAUSE_S)

    def has_room(self, blocks: int) -> bool:
        """Whether ``blocks`` blocks can be written without waiting for a segment file to be made."""
        room_blocks, room_bytes = self.store.log.room()
        spares = len(self.store.pool.spares) - 1
        fits = room_blocks >= blocks and room_bytes >= _RECORD_BYTES_PER_BLOCK * (blocks + 8)
        return fits or spares * self.store.pool.data_blocks >= blocks

    async def make_room(self, blocks: int) -> None:
        """Wait until `has_room`. Raises `NoSpace` when no segment file can be made or reclaimed, `StoreStopped`."""
        self.wake()
        async with self._room:
            while not self.has_room(blocks):
                self.store.log.raise_if_stopped()
                reclaiming = self.store.checkpointing or (self.store.wants_checkpoint and self._no_checkpoint is None)
                if self._no_space is not None and not reclaiming and not self.store.usage.dropped_nodes:
                    raise self._no_space
                self.room_waits += 1
                await self._room.wait()

    def statistics(self) -> dict[str, int]:
        return {"flush_waits": self.flush_waits, "cold_reads": self.cold_reads, "room_waits": self.room_waits}


class Disk:
    """An attached volume (`nbd_export.disk.Disk`)."""

    def __init__(self, engine: Engine, volume: Volume, on_detach: Callable[[], None]) -> None:
        self._engine, self._volume, self._on_detach = engine, volume, on_detach
        self.read = volume.read
        self.allocation = volume.allocation
        self.flush_soon = engine.flush_soon
        self.is_durable = engine.is_durable

    async def read_cold(self, offset: int, view: memoryview) -> None:
        self._engine.cold_reads += 1
        job = self._volume.read_job(offset, view)
        try:
            await trio.to_thread.run_sync(job.run, limiter=self._engine._cold)
        finally:
            job.release()

    async def prefetch(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            part = min(_PREFETCH_BYTES, end - offset)
            await self.read_cold(offset, memoryview(bytearray(part)))
            offset += part

    def write(self, batch: Sequence[Write]) -> int:
        # Rolling to the next segment needs two spares to be there: one to use, one that stays in reserve.
        if len(self._engine.store.pool.spares) < SPARES_MIN and not self._engine.has_room(self._volume.blocks_needed(batch)):
            return 0
        return self._volume.write(batch)

    async def write_rest(self, batch: Sequence[Write], start: int) -> None:
        fetched: Fetched = {}
        while start < len(batch):
            offset, length, _ = batch[start]
            await self._engine.make_room(self._volume.blocks_needed(batch[start : start + 1]))
            done = self._volume.write(batch[: start + 1], start, fetched)
            if done > start:
                start, fetched = done, {}
                continue
            jobs = self._volume.edge_jobs(offset, length)
            try:
                for block, job in jobs.items():
                    await trio.to_thread.run_sync(job.run, limiter=self._engine._cold)
                    fetched[block] = job.fetched
            finally:
                for job in jobs.values():
                    job.release()

    def detach(self) -> None:
        self._on_detach()



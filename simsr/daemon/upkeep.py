"""Upkeep of one store beside the running load: spare segments, checkpoints, taking apart what was dropped, cleaning.

Each is a job of the store that works in slices (`simsr.store`): what blocks runs in a worker thread, the rest on trio's thread, a
fraction of a millisecond at a time, so that a request hardly notices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice

import trio

from simsr.daemon import threads
from simsr.errors import NoSpace, SimsrError, StoreStopped
from simsr.store.checkpoint import Step
from simsr.store.hot import HotMemory, HotSegments
from simsr.store.node_table import Absent
from simsr.store.store import SPARES_MIN, Store

__all__ = ["Upkeep"]

log = logging.getLogger("simsr.upkeep")

PERIOD_S = 30.0
_REAP_NODES = 8  # at a time: about 0.1 ms
_REAP_PAUSE_S = 0.001
_REAP_PAGES = 64
_SHRINK_LOOKS = 64
_NO_SPACE_PAUSE_S = 1.0
_SPARES_KEPT = 12
_PACE_S = 0.002
_PACE_BLOCKS = 1024


class Upkeep:
    """The tasks of one store. ``room_changed`` is notified whenever there may be more room than before."""

    def __init__(
        self, store: Store, room_changed: trio.Condition, page_in: Callable[[Iterable[int]], Awaitable[None]], hot_memory: HotMemory
    ) -> None:
        self.store = store
        self._hot_wanted = trio.Event()
        self.hot = HotSegments(store.pool, hot_memory, lambda: self._hot_wanted.set())
        self._room_changed = room_changed
        self._page_in = page_in
        self._wanted = trio.Event()
        self._spares_wanted = trio.Event()
        self._reap_wanted = trio.Event()
        self._one_checkpoint = trio.Lock()
        self._threads = trio.CapacityLimiter(3)
        self.no_space: NoSpace | None = None  # why the last segment file could not be made
        self._no_checkpoint: Exception | None = None  # why the last checkpoint failed
        self._no_cleaning: Exception | None = None  # why the cleaner gave up
        self._clean_wanted = trio.Event()
        self._paced_moved = self._paced_written = 0  # blocks, when the pace was last set

    def wake(self) -> None:
        """There may be something to do."""
        self._wanted.set()
        self._spares_wanted.set()
        self._clean_wanted.set()

    @property
    def reclaiming(self) -> bool:
        """Whether something is under way that may give space back."""
        store = self.store
        due = store.wants_checkpoint and self._no_checkpoint is None
        return store.checkpointing or due or bool(store.table.dropped) or self._may_clean

    @property
    def _may_clean(self) -> bool:
        cleaner = self.store.cleaner
        return self._no_cleaning is None and cleaner.wanted and cleaner.can_gain

    @property
    def _cap_segments(self) -> int:
        """How many segments there may be now. Without a size limit a store that is full of data, not of garbage, may grow."""
        pool, cleaner = self.store.pool, self.store.cleaner
        cap = cleaner.cap_segments
        if pool.cap_segments is None and pool.count >= cap and not cleaner.can_gain:
            return pool.count + 2 * SPARES_MIN
        return cap

    def why_no_space(self) -> NoSpace | None:
        """Why no segment can be had; None if one may be on its way."""
        pool = self.store.pool
        if self.no_space is None and pool.count < self._cap_segments:
            return None
        reason = f"all {pool.count} segments that it may have are full of data in use"
        return self.no_space or NoSpace(name=pool.path, reason=reason)

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Upkeep until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._make_spares)
            nursery.start_soon(self._reap)
            nursery.start_soon(self._clean)
            nursery.start_soon(self._keep_hot)
            task_status.started()
            idle_seq = -1
            while True:
                with trio.move_on_after(PERIOD_S) as timeout:
                    await self._wanted.wait()
                self._wanted = trio.Event()
                try:
                    quiet = timeout.cancelled_caught and self.store.log.flush_needed_seq != idle_seq
                    if self.store.wants_checkpoint or (quiet and self.store.log.failure is None):
                        await self.checkpoint()
                        idle_seq = self.store.log.flush_needed_seq
                    if timeout.cancelled_caught:
                        await self._give_spares_back()
                    self._reap_wanted.set()
                except NoSpace as error:
                    log.warning("%s", error)
                    await self._room()
                except StoreStopped as error:
                    log.error("%s", error)
                    await self._room()

    async def _room(self) -> None:
        async with self._room_changed:
            self._room_changed.notify_all()

    async def _carry_out(self, work: Iterator[Step]) -> None:
        """Run a job to its end: what blocks in a thread, between slices everybody else."""
        for step in work:
            if step is None:
                await trio.lowlevel.checkpoint()
            else:
                await threads.run_sync(step, limiter=self._threads)

    # Checkpoints.

    async def checkpoint(self) -> None:
        """Write a checkpoint beside the running load; after the one that may be under way. Raises `NoSpace`, `StoreStopped`."""
        async with self._one_checkpoint:
            with trio.CancelScope(shield=True):
                await self._checkpoint()
                await self._shrink()
        self._clean_wanted.set()
        await self._room()

    async def _checkpoint(self) -> None:
        job = self.store.begin_checkpoint()
        try:
            await self._carry_out(job.work())
        except (SimsrError, OSError) as error:
            if isinstance(error, NoSpace) and self.store.pool.remove_spare():
                log.warning("%s; a spare segment was given up for it", error)
                self._wanted.set()
            else:
                self._no_checkpoint = error
            self.store.end_checkpoint(job, error)
        self._no_checkpoint = self._no_cleaning = None
        self.store.end_checkpoint(job)

    async def _shrink(self) -> None:
        """Let go of map nodes beyond the memory that maps may take, now that more of them are clean."""
        memory = self.store.table.memory
        looks = 2 * len(self.store.table.resident)
        while looks > 0 and memory.shrink(_SHRINK_LOOKS):
            looks -= _SHRINK_LOOKS
            await trio.lowlevel.checkpoint()

    # What was dropped.

    async def _reap(self) -> None:
        """Take apart what was dropped, with pauses, because nobody waits for it; without them when segments are scarce."""
        while True:
            await self._reap_wanted.wait()
            self._reap_wanted = trio.Event()
            while await self._reap_some():
                scarce = len(self.store.pool.spares) < SPARES_MIN
                await trio.sleep(0 if scarce else _REAP_PAUSE_S)
            if self.store.wants_checkpoint and self._no_checkpoint is None:
                self._wanted.set()
            await self._room()

    async def _reap_some(self) -> int:
        try:
            return self.store.reap(_REAP_NODES)
        except Absent:
            table = self.store.table
            ids = [ident for ident in islice(table.dropped, _REAP_PAGES) if ident not in table.resident]
        try:
            await self._page_in(ids)
        except (SimsrError, OSError) as error:
            log.error("cannot take apart what was deleted; its space is not given back: %s", error)
            table.dropped.clear()
        return len(table.dropped)

    async def _give_spares_back(self) -> None:
        """Let the host have the files of spares that are more than this store will need soon; only when it has long been quiet."""
        pool = self.store.pool
        while len(pool.spares) > max(_SPARES_KEPT, (pool.count - len(pool.spares)) // 2):
            segment = pool.take_spare_away()
            await threads.run_sync(pool.unlink, segment, limiter=self._threads)

    # What is read much.

    async def _keep_hot(self) -> None:
        """Keep in memory what is read much, for as long as it is."""
        cool_at = math.inf
        try:
            while True:
                with trio.move_on_at(cool_at) as timeout:
                    await self._hot_wanted.wait()
                    self._hot_wanted = trio.Event()
                    await self._warm_up()
                if timeout.cancelled_caught:
                    await self._release(self.hot.cool())
                if not self.hot.kept:
                    cool_at = math.inf
                elif timeout.cancelled_caught or cool_at == math.inf:
                    cool_at = trio.current_time() + PERIOD_S
        finally:
            with trio.CancelScope(shield=True):
                await self._release(self.hot.let_go())

    async def _warm_up(self) -> None:
        while True:
            segment, released = self.hot.next()
            with trio.CancelScope(shield=True):
                await self._release(released)
                if segment is None:
                    return
                try:
                    memory = await threads.run_sync(segment.file.in_memory, limiter=self._threads)
                except OSError as error:
                    log.info(
                        "%s: segment %d is not kept in memory, nor will others be: %s (ulimit -l, CAP_IPC_LOCK)",
                        self.store.pool.path, segment.slot, error,
                    )  # fmt: skip
                    memory = None
                self.hot.keep(segment, memory)

    async def _release(self, views: list[memoryview]) -> None:
        for view in views:
            await threads.run_sync(view.release, limiter=self._threads)

    # Cleaning.

    async def _clean(self) -> None:
        """Clean while it is wanted."""
        while True:
            await self._clean_wanted.wait()
            self._clean_wanted = trio.Event()
            self._no_cleaning = None
            while self._may_clean:
                before = self.store.cleaner.segments_examined
                try:
                    await self._clean_one_round()
                except (SimsrError, OSError) as error:
                    log.warning("cleaning: %s", error)
                    self._no_cleaning = error
                stuck = self.store.cleaner.segments_examined == before
                if self.store.wants_checkpoint:
                    self._wanted.set()
                elif stuck:
                    self._no_cleaning = self._no_cleaning or NoSpace(name=self.store.pool.path, reason="nothing can be cleaned")
                self._spares_wanted.set()
                await self._room()
                if stuck:
                    break

    async def _clean_one_round(self) -> None:
        work = self.store.cleaner.work()
        try:
            for step in work:
                if step is None:
                    await self._pace()
                else:
                    await threads.run_sync(step, limiter=self._threads)
        finally:
            work.close()

    async def _pace(self) -> None:
        """A pause between two slices of cleaning: until users have written twice what was moved, which leaves them two thirds of all
        writing; none if they are about to wait for space; and not long if they write nothing."""
        await trio.lowlevel.checkpoint()
        cleaner, log_ = self.store.cleaner, self.store.log
        while not cleaner.urgent:
            moved, written = cleaner.blocks_moved - self._paced_moved, log_.blocks_appended
            if 2 * moved <= written - self._paced_written:
                break
            await trio.sleep(_PACE_S)
            if log_.blocks_appended == written:
                break
        if cleaner.blocks_moved - self._paced_moved > _PACE_BLOCKS:
            self._paced_moved, self._paced_written = cleaner.blocks_moved, log_.blocks_appended

    # Spare segments.

    async def _make_spares(self) -> None:
        pool = self.store.pool
        while True:
            while not pool.wanted(self._cap_segments) or self.store.log.failure is not None:
                await self._spares_wanted.wait()
                self._spares_wanted = trio.Event()
            slot, file = pool.next_slot(), None
            try:
                file = await threads.run_sync(pool.make_file, slot, limiter=self._threads)
                self.no_space, pool.cannot_grow = None, False
            except (NoSpace, OSError) as error:
                self.no_space = error if isinstance(error, NoSpace) else NoSpace(name=pool.path, reason=str(error))
                pool.cannot_grow = True
                log.warning("%s", error)
                self._clean_wanted.set()
            finally:
                pool.add(slot, file)
                await self._room()
            if file is None:
                await trio.sleep(_NO_SPACE_PAUSE_S)

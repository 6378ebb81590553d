"""Write amplification: how many bytes the store writes for each byte that users overwrite, by how full the SR is.

This is counting, not timing, so it runs on a `Store` in this process, without a daemon: one disk that fills the given part of the
SR is overwritten with 4 KiB writes, uniformly at random or nine in ten of them on a tenth of the blocks, until every block has been
overwritten several times; what is counted is the second half. `Host` below does what the daemon's upkeep does: checkpoints
when the store wants one, cleaning when it is wanted, at the pace at which upkeep does it.

The SR is a scale model: segments, map nodes, the map's memory and what triggers a checkpoint are all smaller by the same
factor, so there are as many segments, leaves and checkpoints as in an SR that is larger by that factor.

Counted as written: data, records, moved blocks with their summaries, map nodes and rows. The target is 1.15 / (1 - u).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.failure import BenchFailure
from bench.operations import Finding
from bench.store.scale import Scale, Tell
from simsr.errors import NoSpace
from simsr.store import store as store_module
from simsr.store.checkpoint import Step
from simsr.store.files import DiskDirectory
from simsr.store.layout import BLOCK, Geometry
from simsr.store.log import KEEP_FOR_WRITES
from simsr.store.node_table import MAP_MEMORY_BYTES, Absent, MapMemory
from simsr.store.store import SPARES_MIN, Create, Store

__all__ = ["amplification"]

TARGET = 1.15
_BATCH = 16
_HOT_BLOCKS, _HOT_WRITES = 0.1, 0.9
_PACE_BLOCKS = 1024
_STUCK_SLICES = 20_000


def amplification(directory: Path, scale: Scale, tell: Tell) -> Iterator[Finding]:
    """Yield the amplification of each part of the SR in use, uniform and skewed, and how the two compare."""
    for part in scale.model_parts:
        uniform = _measured(directory, scale, part, False, tell)
        name = f"{part:.0%} of the SR in use"
        target = TARGET / (1 - part)
        yield Finding("amplification", f"{name}, uniform", uniform.total, "x", at_most=target)
        yield Finding("amplification", f"{name}, uniform: moved blocks alone", uniform.moved, "x")
        yield Finding("amplification", f"{name}, uniform: map and records alone", uniform.metadata, "x")
        skewed = _measured(directory, scale, part, True, tell)
        yield Finding("amplification", f"{name}, 90 % of writes to 10 %", skewed.total, "x", at_most=0.9 * uniform.total)


@dataclass(frozen=True)
class Written:
    """Bytes written for each byte of the user's: ``total``, and what of it is due to moving blocks and to metadata."""

    total: float
    moved: float
    metadata: float


def _measured(directory: Path, scale: Scale, part: float, skewed: bool, tell: Tell) -> Written:
    path = directory / "amplification"
    with _small_constants(scale.model_factor):
        host = Host(path, scale)
        try:
            written = host.overwrite(part, skewed, scale.skewed_turns if skewed else scale.model_turns)
        finally:
            host.close()
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    kind = "90/10" if skewed else "uniform"
    tell(f"amplification at {part:.0%} {kind}: {written.total:.2f} (moved {written.moved:.2f}, metadata {written.metadata:.2f})")
    return written


@contextlib.contextmanager
def _small_constants(factor: int) -> Iterator[None]:
    """Scale what triggers a checkpoint. Sizes of segments and map nodes are the geometry's."""
    kept = store_module.CHECKPOINT_LOG_BYTES, store_module.CHECKPOINT_RECORDS
    store_module.CHECKPOINT_LOG_BYTES, store_module.CHECKPOINT_RECORDS = kept[0] // factor, kept[1] // factor
    try:
        yield
    finally:
        store_module.CHECKPOINT_LOG_BYTES, store_module.CHECKPOINT_RECORDS = kept


def model_geometry(factor: int) -> Geometry:
    """The default geometry, smaller by ``factor``."""
    whole = Geometry()
    bits = whole.fanout_bits - (factor.bit_length() - 1)
    return Geometry(whole.segment_blocks // factor, whole.record_blocks // factor, bits)


class Host:
    """A store with a size limit and the upkeep that the daemon gives it, one thing after the other."""

    def __init__(self, path: Path, scale: Scale) -> None:
        geometry = model_geometry(scale.model_factor)
        memory = MapMemory(MAP_MEMORY_BYTES // scale.model_factor)
        self.store = Store.create(DiskDirectory(str(path)), bytes(16), geometry, memory=memory)
        self.store.pool.cap_segments = scale.model_segments
        self._cleaning: Iterator[Step] | None = None
        self._moved = self._written = 0  # as upkeep's pace has them

    def close(self) -> None:
        if self._cleaning is not None:
            self._cleaning.close()
        self.store.abandon()

    def overwrite(self, part: float, skewed: bool, turns: float) -> Written:
        """Fill a disk that takes ``part`` of the SR, overwrite it ``turns`` times over, and return what the second half wrote."""
        store, rng = self.store, random.Random(f"amplification {part} {skewed}")
        blocks = int(part * store.pool.cap_segments * store.geometry.segment_blocks)
        ident = store.new_ident()
        store.commit([Create(ident, blocks * BLOCK, {})])
        volume = store.volumes[ident]
        for first in range(0, blocks, _BATCH):
            self._write(volume, range(first, min(blocks, first + _BATCH)))
        hot, writes = max(1, int(blocks * _HOT_BLOCKS)), int(blocks * turns)
        before = self._counters()
        for done in range(0, writes, _BATCH):
            if done <= writes // 2 < done + _BATCH:
                before = self._counters()
            if skewed:
                numbers = [
                    rng.randrange(hot) if rng.random() < _HOT_WRITES else rng.randrange(hot, blocks) for _ in range(_BATCH)
                ]
            else:
                numbers = [rng.randrange(blocks) for _ in range(_BATCH)]
            self._write(volume, numbers)
        users, moved, metadata = (now - then for now, then in zip(self._counters(), before, strict=True))
        return Written((users + moved + metadata) / users, moved / users, metadata / users)

    def _counters(self) -> tuple[int, int, int]:
        store = self.store
        cleaner, log = store.cleaner, store.log
        return log.blocks_appended * BLOCK, cleaner.blocks_moved * BLOCK, store.map_bytes_written + log.record_bytes_appended

    def _write(self, volume, numbers) -> None:
        """Write a batch, each block with content of its own, when there is room; and let upkeep have its turn."""
        batch = []
        for number in numbers:
            data = memoryview((number + 1).to_bytes(8, "little") * (BLOCK // 8))
            batch.append((number * BLOCK, BLOCK, data))
        for _ in range(_STUCK_SLICES):
            if self._has_room(len(batch)):
                break
            self._upkeep(urgent=True)
        else:
            raise BenchFailure(f"the store finds no room: {self.store.statistics()}")
        done = 0
        while done < len(batch):
            try:
                done = volume.write(batch, done)
            except Absent as absent:
                self._page_in(absent.ident)
            else:
                if done < len(batch):
                    self._page_in_for(volume, batch[done])
        self._upkeep(urgent=False)

    def _page_in(self, ident: int) -> None:
        job = self.store.page_job([ident])
        job.run()
        job.finish()

    def _page_in_for(self, volume, write) -> None:
        """`Volume.write` has stopped in front of a write whose map nodes are not in memory."""
        while True:
            try:
                volume.map.ready(write[0] // BLOCK, write[0] // BLOCK + 1)
                return
            except Absent as absent:
                self._page_in(absent.ident)

    def _has_room(self, blocks: int) -> bool:
        store = self.store
        if len(store.pool.spares) >= SPARES_MIN and not store.too_dirty:
            return True
        room_blocks, room_bytes = store.log.room()
        spares = len(store.pool.spares) - KEEP_FOR_WRITES
        fits = room_blocks >= blocks and room_bytes >= 64 * (blocks + 8)
        return not store.too_dirty and (fits or spares * store.pool.data_blocks >= blocks)

    def _upkeep(self, urgent: bool) -> None:
        """What upkeep would do now: spares, a checkpoint, some slices of cleaning."""
        store = self.store
        while store.pool.wanted(store.cleaner.cap_segments):
            store.pool.make_one()
        if store.wants_checkpoint:
            store.checkpoint()
            store.table.memory.shrink(2 * len(store.table.resident))
        while self._may_go_on() or urgent:
            if self._cleaning is None:
                if not store.cleaner.wanted:
                    break
                self._cleaning = store.cleaner.work()
            try:
                step = next(self._cleaning)
            except StopIteration:
                self._cleaning = None
                break
            except NoSpace:  # a checkpoint may give it some
                self._cleaning = None
                break
            if step is not None:
                step()
            if urgent:
                break

    def _may_go_on(self) -> bool:
        """Whether users have written twice what was moved (`simsr.daemon.upkeep`), or are about to wait."""
        cleaner, log = self.store.cleaner, self.store.log
        moved, written = cleaner.blocks_moved - self._moved, log.blocks_appended - self._written
        if 2 * moved > written and not cleaner.urgent:
            return False
        if moved > _PACE_BLOCKS:
            self._moved, self._written = cleaner.blocks_moved, log.blocks_appended
        return True

"""A volume: a range of bytes with an extent map. The data path of the store, in batches.

Reading a batch costs one system call for each run of physically contiguous blocks, and one checksum for each block; neither in hot segments (`simsr.store.hot`).
Nothing here waits for a disk: what is not in memory is left to a `ReadJob`, which a worker thread runs.

Writing a batch appends one record for all of it (more where a segment ends), then changes the map. A write that covers
only a part of a block is merged with the block's old content first; if that is not in memory, `Volume.write` stops in
front of that request and the caller fetches the block with a `ReadJob` and comes back.

Blocks of zeros are stored as holes: the checksum of a zero block is known, so finding them costs nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from crc32c import crc32c

from simsr.errors import BadRequest, BlockDamaged, NotFound
from simsr.store.extent_map import ExtentMap
from simsr.store.gather import Gather
from simsr.store.layout import BLOCK, COUNT_MASK, HOLE, START_SHIFT, ZERO_BLOCK, ZERO_CRC, block_crcs
from simsr.store.log import Log
from simsr.store.node_table import Absent, NodeTable
from simsr.store.nodes import PHYSICAL_MASK
from simsr.store.paging import PageJob
from simsr.store.read_job import ReadJob, Run
from simsr.store.segments import SegmentPool

__all__ = ["Volume", "Write", "Fetched"]

_BLOCK_SHIFT = 12
_BLOCK_MASK = BLOCK - 1
_VECTOR_MIN = 8  # from this many blocks on numpy beats a loop

Write = tuple[int, int, memoryview | None]
"""(offset in bytes, length in bytes, the data or None for zeros)"""

Fetched = dict[int, tuple[int, bytes]]
"""Block number -> (map entry, content): what `ReadJob.fetched` gives"""


class Volume:
    """One disk or snapshot of a store; made by the store, never directly.

    Reading: `read`, `lend`, `read_job`, `allocation`. Writing: `write`, `blocks_needed`.
    ``meta`` belongs to the model above; the store keeps it and looks at nothing in it.
    """

    def __init__(
        self, ident: int, size_bytes: int, meta: dict, log: Log, pool: SegmentPool, table: NodeTable,
        page_job: Callable[[Iterable[int]], PageJob], changed: set[int],
    ) -> None:  # fmt: skip
        self.ident = ident
        self.meta = meta
        self._log, self._pool, self._table, self._usage = log, pool, table, table.usage
        self._path = pool.path
        self.page_job = page_job
        self._changed = changed  # idents of volumes that differ from the last checkpoint
        self._shift = pool.geometry.segment_shift
        self._block_mask = pool.geometry.segment_blocks - 1
        self.map = ExtentMap(table, ident)
        self.size_bytes = 0
        self.modified_ns = 0  # when it was written last, as those who write tell; not kept on disk
        self.resize(size_bytes)

    def resize(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.map.grow((size_bytes + _BLOCK_MASK) >> _BLOCK_SHIFT)

    def line(self) -> dict:
        """The volume as a checkpoint lists it."""
        m = self.map
        return {
            "ident": self.ident, "size_bytes": self.size_bytes, "meta": self.meta, "family": m.family, "root": m.root,
            "height": m.height, "mapped_blocks": m.mapped_blocks,
        }  # fmt: skip

    def load(self, line: dict) -> None:
        """Take over the content that `line` describes."""
        m = self.map
        m.family, m.root, m.height, m.mapped_blocks = line["family"], line["root"], line["height"], line["mapped_blocks"]

    def retire(self) -> None:
        """The volume was deleted: let go of its content; whoever still writes to it gets `NotFound`."""
        self.map.drop()
        self.size_bytes = 0
        self._log = _NoLog(self.ident)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the log that the volume refers to, shared or not."""
        return self.map.mapped_blocks * BLOCK

    def check_range(self, offset: int, length: int) -> None:
        """Raise `BadRequest` unless the range lies inside the volume."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise BadRequest(
                what=f"range {offset}+{length}", reason=f"it does not lie within the {self.size_bytes} bytes of the disk"
            )

    # Reading.

    def read(self, batch: Sequence[tuple[int, memoryview]]) -> list[int]:
        """Fill the view of each (offset, view) from memory; returns the indices of those that would wait for the disk.

        Checksums are verified unless the SR is set not to (`SegmentPool.verify_reads`). Ranges must lie inside the volume. Raises `BlockDamaged` or OSError for the first request that fails; a caller
        that must know which one repeats them one by one.
        """
        cold = []
        cache, bits = self.map.cache, self.map.bits
        mask = self.map.fanout - 1
        read, verified, verify = self._pool.read, self._pool.verified, self._pool.verify_reads
        for index, (offset, view) in enumerate(batch):
            if len(view) != BLOCK or offset & _BLOCK_MASK:
                try:
                    there = self._read_leaf(offset, view)
                    if not (self._read_long(offset, view) if there is None else there):
                        cold.append(index)
                except Absent:
                    cold.append(index)
                continue
            block = offset >> _BLOCK_SHIFT
            number = block >> bits
            try:
                slots = cache[number] if number in cache else self.map.slots_at(number)
            except Absent:
                cold.append(index)
                continue
            entry = slots[block & mask] if slots is not None else 0
            if not entry:
                view[:] = ZERO_BLOCK
                continue
            physical = entry & PHYSICAL_MASK
            known = read(view, physical, 1)
            if known is None:
                cold.append(index)
            elif verify and not known:
                if crc32c(view) != entry >> 32:
                    raise self._damaged(offset, physical)
                verified(physical, 1)
        return cold

    def lend(self, offset: int, length: int) -> list[memoryview] | None:
        """Whole blocks of one leaf as they lie in memory, verified, if all of them are kept there; None: `read` has to see to them. What is
        lent holds until something is written: it is to be used at once."""
        block, mask = offset >> _BLOCK_SHIFT, self.map.fanout - 1
        count, index = length >> _BLOCK_SHIFT, block & mask
        if not count or (offset | length) & _BLOCK_MASK or index + count > mask + 1:
            return None
        slots = self.map.cache.get(block >> self.map.bits)
        if slots is None:
            return None
        segment = self._pool.by_slot[(slots[index] & PHYSICAL_MASK) >> self._shift]
        if segment is None or segment.memory is None:
            return None
        halves = memoryview(slots).cast("B").cast("I")[2 * index : 2 * (index + count)].tolist()
        return self._pool.lend(halves[::2], halves[1::2])

    def read_job(self, offset: int, view: memoryview) -> ReadJob:
        """A job that reads from the disk what `read` found to be cold. Raises `Absent`."""
        return ReadJob(self, offset, view)

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Read here and now. Blocks."""
        self.check_range(offset, length)
        data = bytearray(length)
        if length:
            with self._table.waiting():
                job = ReadJob(self, offset, memoryview(data))
            try:
                job.run()
            finally:
                job.release()
        return bytes(data)

    def _read_leaf(self, offset: int, view: memoryview) -> bool | None:
        """Read whole blocks of one leaf, the usual case: without numpy, whose every call costs as much as a block does. False: something is
        not in memory; None: it is another case."""
        block, mask = offset >> _BLOCK_SHIFT, self.map.fanout - 1
        count, index = len(view) >> _BLOCK_SHIFT, block & mask
        if not count or (offset | len(view)) & _BLOCK_MASK or index + count > mask + 1:
            return None
        number = block >> self.map.bits
        slots = self.map.cache.get(number) or self.map.slots_at(number)
        if slots is None:
            return None
        halves = memoryview(slots).cast("B").cast("I")[2 * index : 2 * (index + count)].tolist()
        physical, wanted = halves[::2], halves[1::2]
        read, begin = self._pool.read, 0
        unknown: list[tuple[int, int]] = []  # runs that have not been verified
        while begin < count:
            first, end = physical[begin], begin + 1
            if first and physical[-1] - first == count - 1 - begin and physical[begin:] == list(range(first, physical[-1] + 1)):
                end = count
            while end < count and physical[end] == (first and first + end - begin):
                end += 1
            part = view[begin << _BLOCK_SHIFT : end << _BLOCK_SHIFT]
            if not first:
                part[:] = bytes(len(part))
                wanted[begin:end] = [ZERO_CRC] * (end - begin)
            elif not (known := read(part, first, end - begin)):
                if known is None:
                    return False
                unknown.append((first, end - begin))
            begin = end
        if unknown and self._pool.verify_reads:
            if list(block_crcs(view)) != wanted:
                self._verify(view, np.frombuffer(slots[index : index + count], dtype=np.uint64), offset)
            for first, blocks in unknown:
                self._pool.verified(first, blocks)
        return True

    def _read_long(self, offset: int, view: memoryview) -> bool:
        start = offset & ~_BLOCK_MASK
        end = (offset + len(view) + _BLOCK_MASK) & ~_BLOCK_MASK
        head = offset - start
        whole = head == 0 and len(view) & _BLOCK_MASK == 0
        entries = self._entries(start >> _BLOCK_SHIFT, end >> _BLOCK_SHIFT)
        target = view if whole else memoryview(bytearray(end - start))
        for segment, position, at, length in self._runs(entries):
            if segment is None:
                target[at : at + length] = bytes(length)
            elif not segment.file.read_cached(target[at : at + length], position):
                return False
        if self._pool.verify_reads or not whole:  # a part of a block may be on its way into a new one, with a checksum of its own
            self._verify(target, entries, start)
        if not whole:
            view[:] = target[head : head + len(view)]
        return True

    def _entry(self, block: int) -> tuple[list[int], list[Run]]:
        """`_entries` and `_runs` of one block."""
        number, cache = block >> self.map.bits, self.map.cache
        slots = cache[number] if number in cache else self.map.slots_at(number)
        entry = slots[block & self.map.fanout - 1] if slots is not None else 0
        physical = entry & PHYSICAL_MASK
        segment = self._pool.by_slot[physical >> self._shift] if physical else None
        return [entry], [(segment, (physical & self._block_mask) << _BLOCK_SHIFT, 0, BLOCK)]

    def _entries(self, first: int, last: int) -> np.ndarray:
        """The map entries of blocks ``first`` to ``last``. The result never changes afterwards."""
        bits, mask, cache = self.map.bits, self.map.fanout - 1, self.map.cache
        parts = []
        while first < last:
            number = first >> bits
            stop = min(last, (number + 1) << bits)
            slots = cache[number] if number in cache else self.map.slots_at(number)
            if slots is None:
                parts.append(np.zeros(stop - first, dtype=np.uint64))
            else:
                low = first & mask
                parts.append(np.frombuffer(slots[low : low + stop - first], dtype=np.uint64))
            first = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)

    def _runs(self, entries: np.ndarray) -> list[Run]:
        """Group map entries into runs that one read can fetch."""
        if not len(entries):
            return []
        physical = entries.view(np.uint32)[::2].astype(np.int64)
        steps = np.diff(physical)
        breaks = np.flatnonzero(steps != 1)
        if len(breaks):  # within a hole all entries are 0, so the step is 0 there
            breaks = breaks[(steps[breaks] != 0) | (physical[breaks] != 0)]
        starts = [0, *(breaks + 1).tolist(), len(entries)]
        firsts = physical[starts[:-1]].tolist()
        by_slot, shift, mask = self._pool.by_slot, self._shift, self._block_mask
        runs: list[Run] = []
        for first, begin, end in zip(firsts, starts, starts[1:]):
            at, length = begin << _BLOCK_SHIFT, (end - begin) << _BLOCK_SHIFT
            if first:
                runs.append((by_slot[first >> shift], (first & mask) << _BLOCK_SHIFT, at, length))
            else:
                runs.append((None, 0, at, length))
        return runs

    def _verify(self, target: memoryview, entries: np.ndarray | list[int], start: int) -> None:
        if len(entries) == 1:
            entry = int(entries[0])
            if entry and crc32c(target) != entry >> 32:
                raise self._damaged(start, entry & PHYSICAL_MASK)
            return
        found = list(block_crcs(target))
        wanted = (entries >> 32).tolist()
        if found != wanted:
            physical = (entries & PHYSICAL_MASK).tolist()
            for index, (have, want) in enumerate(zip(found, wanted)):
                if have != want and physical[index]:
                    raise self._damaged(start + index * BLOCK, physical[index])

    def _damaged(self, offset: int, physical: int) -> BlockDamaged:
        return BlockDamaged(
            path=self._path, volume=self.ident, offset_bytes=offset, segment=physical >> self._shift,
            segment_offset=(physical & self._block_mask) * BLOCK,
        )  # fmt: skip

    def allocation(self, offset: int, length: int, extents_max: int = 1 << 16) -> list[tuple[int, bool]]:
        """Describe a range as [(length in bytes, is data)], alternating; may stop early, after ``extents_max`` or where a map node
        is not in memory. Raises `Absent` if that is so at the very beginning. O(leaves of the range that are mapped)."""
        extents: list[list] = []
        position, end = offset, offset + length
        span = self.map.fanout << _BLOCK_SHIFT
        try:
            while position < end and len(extents) <= extents_max:
                number = position // span
                hole_leaves = self.map.hole_at(number)
                stop = min(end, (number + (hole_leaves or 1)) * span)
                for count, data in [(stop - position, False)] if hole_leaves else self._allocation_of_leaf(position, stop):
                    if extents and extents[-1][1] == data:
                        extents[-1][0] += count
                    else:
                        extents.append([count, data])
                position = stop
        except Absent:
            if not extents:
                raise
        return [(count, data) for count, data in extents[:extents_max]]

    def _allocation_of_leaf(self, position: int, stop: int) -> list[tuple[int, bool]]:
        first = position >> _BLOCK_SHIFT
        data = self._entries(first, (stop + _BLOCK_MASK) >> _BLOCK_SHIFT) != 0
        edges = [0, *(np.flatnonzero(data[1:] != data[:-1]) + 1).tolist(), len(data)]
        pieces = []
        for begin, end in zip(edges, edges[1:]):
            low, high = max(position, (first + begin) * BLOCK), min(stop, (first + end) * BLOCK)
            pieces.append((high - low, bool(data[begin])))
        return pieces

    # Writing.

    @staticmethod
    def blocks_needed(batch: Sequence[Write]) -> int:
        """An upper bound of the data blocks that writing ``batch`` takes from the log."""
        return sum(2 if view is None else (length >> _BLOCK_SHIFT) + 2 for _, length, view in batch)

    def write(self, batch: Sequence[Write], start: int = 0, fetched: Fetched | None = None) -> int:
        """Write ``batch[start:]`` in order; returns how many requests of ``batch`` are done.

        Fewer than all: the next one needs a map node, or a block that it covers in part, that is not in memory. Run the jobs of
        `edge_jobs` for that request, and call again with that ``start`` and what they fetched. What was fetched is used only if the block is
        still the same, so others may write meanwhile. Ranges must lie inside the volume. Raises `StoreStopped`, or
        `NoSpace` (what came before in the batch may have been written then).
        """
        gather = Gather(self.ident, self.map.family, self._log, self.apply)
        owned, leaf_shift = self.map.owned, self.map.bits + _BLOCK_SHIFT
        for index in range(start, len(batch)):
            offset, length, view = batch[index]
            if length != BLOCK or offset & _BLOCK_MASK or offset >> leaf_shift not in owned:
                try:
                    self._ready(offset, length, view is None)
                except Absent:
                    gather.emit()
                    return index
            if (offset | length) & _BLOCK_MASK:
                gather.emit()
                if not self._write_edges(gather, offset, length, view, fetched):
                    return index
            elif view is None:
                gather.add_hole(offset >> _BLOCK_SHIFT, length >> _BLOCK_SHIFT)
            elif length == BLOCK:
                gather.add_block(offset >> _BLOCK_SHIFT, view)
            elif length:
                gather.add_blocks(offset >> _BLOCK_SHIFT, view)
        gather.emit()
        return len(batch)

    def _ready(self, offset: int, length: int, hole: bool) -> None:
        """Raise `Absent` unless a write of this range can be carried out without reading a map node."""
        first, last = offset >> _BLOCK_SHIFT, (offset + length + _BLOCK_MASK) >> _BLOCK_SHIFT
        if hole:
            for block in self._partial_blocks(offset, length):
                self.map.ready(block, block + 1)
            self.map.ready_to_clear((offset + _BLOCK_MASK) >> _BLOCK_SHIFT, (offset + length) >> _BLOCK_SHIFT)
        elif first < last:
            self.map.ready(first, last)

    @staticmethod
    def _partial_blocks(offset: int, length: int) -> list[int]:
        """The first and last block of a range, where it covers them only in part."""
        if not length:
            return []
        end = offset + length
        first, last = offset >> _BLOCK_SHIFT, (end - 1) >> _BLOCK_SHIFT
        partial = [first] if offset & _BLOCK_MASK or end < (first + 1) << _BLOCK_SHIFT else []
        if end & _BLOCK_MASK and last not in partial:
            partial.append(last)
        return partial

    def edge_jobs(self, offset: int, length: int, hole: bool = False) -> dict[int, ReadJob]:
        """Jobs that fetch the blocks a write of this range covers only in part, by block number. Raises `Absent`."""
        self._ready(offset, length, hole)
        jobs = {}
        for block in self._partial_blocks(offset, length):
            jobs[block] = ReadJob(self, block << _BLOCK_SHIFT, memoryview(bytearray(BLOCK)))
        return jobs

    def _write_edges(
        self, gather: Gather, offset: int, length: int, view: memoryview | None, fetched: Fetched | None
    ) -> bool:
        """Write a range that covers its first or last block in part. False: an old block is not in memory."""
        end = offset + length
        partial = self._partial_blocks(offset, length)
        merged = []
        for block in partial:
            old = bytearray(BLOCK)
            if fetched is not None and block in fetched and fetched[block][0] == self._entries(block, block + 1)[0]:
                old[:] = fetched[block][1]
            elif not self._read_long(block << _BLOCK_SHIFT, memoryview(old)):
                return False
            else:
                self._verify(memoryview(old), self._entries(block, block + 1), block << _BLOCK_SHIFT)
            low, high = max(offset, block << _BLOCK_SHIFT), min(end, (block + 1) << _BLOCK_SHIFT)
            old[low & _BLOCK_MASK : (low & _BLOCK_MASK) + high - low] = (
                bytes(high - low) if view is None else view[low - offset : high - offset]
            )
            merged.append(memoryview(old))
        for block, content in zip(partial, merged):
            gather.add_block(block, content)
        middle = (offset + _BLOCK_MASK) & ~_BLOCK_MASK
        middle_end = end & ~_BLOCK_MASK
        if middle < middle_end:
            if view is None:
                gather.add_hole(middle >> _BLOCK_SHIFT, (middle_end - middle) >> _BLOCK_SHIFT)
            else:
                gather.add_blocks(middle >> _BLOCK_SHIFT, view[middle - offset : middle_end - offset])
        return True

    def apply(self, extents: Sequence[int], crcs: array, physical: int) -> None:
        """Bring the map up to a record: data blocks lie from ``physical`` on. Also what replay does."""
        self._changed.add(self.ident)
        if crcs:
            self._usage.live[physical >> self._shift] += len(crcs)
        owned, bits, mask = self.map.owned, self.map.bits, self.map.fanout - 1
        live, shift = self._usage.live, self._shift
        taken = 0
        for extent in extents:
            block, count = extent >> START_SHIFT, extent & COUNT_MASK
            if extent & HOLE:
                self.map.clear(block, block + count)
            elif count < _VECTOR_MIN:
                for block in range(block, block + count):
                    number = block >> bits
                    leaf = owned[number] if number in owned else self.map.own(number)
                    slots = leaf.slots
                    index = block & mask
                    old = slots[index]
                    slots[index] = crcs[taken] << 32 | (physical + taken)
                    if old:
                        live[(old & PHYSICAL_MASK) >> shift] -= 1
                    else:
                        self.map.mapped_blocks += 1
                    taken += 1
            else:
                self._apply_run(block, crcs[taken : taken + count], physical + taken)
                taken += count

    def _apply_run(self, block: int, crcs: array, physical: int) -> None:
        owned, bits, mask = self.map.owned, self.map.bits, self.map.fanout - 1
        checksums, done = np.frombuffer(crcs, dtype=np.uint32), 0
        while done < len(crcs):
            number, low = (block + done) >> bits, (block + done) & mask
            count = min(len(crcs) - done, mask + 1 - low)
            leaf = owned[number] if number in owned else self.map.own(number)
            window = leaf.vector[low : low + count]
            self.map.mapped_blocks += self._usage.release_vector(window)
            halves = window.view(np.uint32)
            halves[::2] = np.arange(physical + done, physical + done + count, dtype=np.uint32)
            halves[1::2] = checksums[done : done + count]
            done += count


class _NoLog:
    """Stands where a deleted volume had its log: a record of a volume that is gone could never be replayed."""

    def __init__(self, ident: int) -> None:
        self._ident = ident

    def room(self) -> tuple[int, int]:
        raise NotFound(kind="volume", name=self._ident)

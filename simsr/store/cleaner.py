"""The cleaner: empties segments that hold more garbage than data, so that the log can use them again.

A victim's own records say whose blocks it was given. Whether a block is still in use, the maps say: every leaf that covers the block for any
volume of the family is looked at (`NodeTable.leaves_of`), so reachability decides, and the counts of `Usage` only help to choose. What is in use is
copied, once, to a segment of survivors, and every leaf that named the old place names the new one, whoever shares that leaf.

A batch of moves is one MOVED record in the log, which refers to a SUMMARY record in the segment of survivors. It is written after the
data and before the maps change, between two slices of the store's thread, so user writes never race it. Replaying it does the
same to the same leaves. The victim stays as it is until nothing names it and a checkpoint has left it behind (`SegmentPool`): a crash
at any point loses and duplicates nothing.

Which: the one with the best ratio of benefit to cost, ``(1 - u) * age / (1 + u)`` (Rosenblum and Ousterhout 1992), or the emptiest
when space is short, or plenty. Survivors go to segments of their own: they have proved to be cold, so they are not mixed with what is
written now. When: between two marks of free segments, so that it does not start and stop all the time.

The counts are upper bounds where snapshots share blocks; what looking at a victim has shown to be in use is remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from simsr.errors import StoreDamaged
from simsr.store import layout
from simsr.store.checkpoint import Step
from simsr.store.contents import Blocks, blocks_in, read_summary
from simsr.store.layout import BLOCK, MOVE_BYTES, Moves
from simsr.store.log import KEEP_FOR_CLEANING, KEEP_FOR_WRITES
from simsr.store.node_table import Absent
from simsr.store.nodes import PHYSICAL_MASK
from simsr.store.paging import PageJob
from simsr.store.segments import Segment, State

if TYPE_CHECKING:
    from simsr.store.store import Store

__all__ = ["Cleaner"]

log = logging.getLogger("simsr.cleaner")

BATCH_BLOCKS = 64
_VICTIMS = 4
_LOOK_A_SLICE = 1000
_GROUPS_A_SLICE = 64
_GAIN_MIN = 0.04  # a segment that is fuller than this leaves room is not worth it
_PLENTY = 0.6
_GARBAGE_PER_LIVE = 1.0  # without a size limit, a store takes about (1 + this) times what is in use ...
_SLACK_SEGMENTS = 16  # ... and this


_Found = tuple[int, int, int, list[int]]
"""(family, block, place in the victim, birth) of a block that is in use"""


class Cleaner:
    """Cleans one store. `wanted` says whether it should; `work` is one round of it."""

    def __init__(self, store: Store) -> None:
        self._store, self._pool, self._table = store, store.pool, store.table
        self.into: Segment | None = None  # the segment that takes survivors
        self._known: dict[int, tuple[int, int]] = {}  # segment -> (blocks found to be in use, its count of slots then)
        self._hopeless: set[int] = set()  # segments with a block that cannot be read
        self._running = False
        self.blocks_moved = self.segments_cleaned = self.segments_examined = 0

    # Whether, and which.

    def estimate(self, segment: Segment) -> int:
        """An upper bound of the blocks of a segment that are in use."""
        live = min(self._table.usage.live[segment.slot], self._pool.data_blocks)
        known = self._known.get(segment.slot)
        return live if known is None else min(live, known[0])

    @property
    def live_blocks(self) -> int:
        """An upper bound of the blocks in use. O(segments), in numpy."""
        live = np.minimum(np.array(self._table.usage.live, dtype=np.int64), self._pool.data_blocks)
        less = sum(max(0, int(live[slot]) - found) for slot, (found, _) in self._known.items())
        return int(live.sum()) - less

    @property
    def cap_segments(self) -> int:
        """How many segments the store should have at most."""
        if self._pool.cap_segments is not None:
            return self._pool.cap_segments
        in_use = -(-self.live_blocks // self._pool.data_blocks)
        return int(in_use * (1 + _GARBAGE_PER_LIVE)) + _SLACK_SEGMENTS

    def free_segments(self, cap: int) -> int:
        """Spares, and those that may still be made."""
        return len(self._pool.spares) + (0 if self._pool.cannot_grow else max(0, cap - self._pool.count))

    def _marks(self, cap: int) -> tuple[int, int]:
        low = KEEP_FOR_WRITES + 4 + cap // 64
        return low, low + 2 + cap // 64

    @property
    def wanted(self) -> bool:
        """Whether free segments are below the low mark, or cleaning has begun and they are below the high one."""
        if self._store.log.failure is not None:
            return False
        cap = self.cap_segments
        low, high = self._marks(cap)
        free = self.free_segments(cap) + len(self._pool.dead())
        self._running = free < (high if self._running else low)
        return self._running

    @property
    def urgent(self) -> bool:
        """Whether writers are about to wait for space."""
        return self.free_segments(self.cap_segments) <= KEEP_FOR_WRITES + 2

    @property
    def _has_plenty(self) -> bool:
        """Whether little more than half of what the store may take is in use. Then the emptiest segments are nearly empty, and moving old
        and fuller ones for their age's sake only costs (measured at 50 %, 90/10: 1.13 against 1.1 to 1.5 blocks for each)."""
        return self.live_blocks < _PLENTY * self.cap_segments * self._pool.data_blocks

    def _candidates(self) -> Iterator[Segment]:
        for segment in self._pool.by_slot:
            if segment is not None and segment.state is State.SEALED and segment.slot not in self._hopeless:
                yield segment

    def _is_worth_it(self, segment: Segment) -> bool:
        """Whether moving the blocks of a segment gains anything, as far as is known."""
        live = self._table.usage.live[segment.slot]
        known = self._known.get(segment.slot)
        if live > self._pool.data_blocks * (1 - _GAIN_MIN) and (known is None or known[1] != live):
            return True  # full, or shared, so that some count twice: nobody knows before looking
        return 0 < self.estimate(segment) <= self._pool.data_blocks * (1 - _GAIN_MIN)

    @property
    def can_gain(self) -> bool:
        """Whether there is anything worth cleaning. O(segments)."""
        return any(self._is_worth_it(segment) for segment in self._candidates())

    def _score(self, segment: Segment, greedy: bool) -> float:
        u = self.estimate(segment) / self._pool.data_blocks
        return 1 - u if greedy else (1 - u) * (self._store.log.seq - segment.age_seq + 1) / (1 + u)

    # The work.

    def work(self) -> Iterator[Step]:
        """One round: choose a few victims, move what is in use. Raises `NoSpace`, `StoreStopped`, OSError."""
        greedy, scored = self.urgent or self._has_plenty, []
        for looked, segment in enumerate(self._candidates()):
            if not segment.pins and self._is_worth_it(segment):
                scored.append((self._score(segment, greedy), segment.slot, segment))
            if looked % _LOOK_A_SLICE == _LOOK_A_SLICE - 1:
                yield None
        scored.sort(reverse=True)
        for _, _, victim in scored[:_VICTIMS]:
            if victim.state is State.SEALED and self.wanted and self._has_room_for(victim):
                yield from self.clean(victim)

    @property
    def _keep(self) -> int:
        """How many spares to leave. The last one too may be taken if nothing else can give one: it comes back with the first victim."""
        return KEEP_FOR_CLEANING if self._pool.dead() or len(self._pool.spares) > 1 else 0

    def _has_room_for(self, victim: Segment) -> bool:
        """Whether the survivors of a segment fit without the spares that are kept back; if not, a checkpoint must make some first."""
        room = 0 if self.into is None else self._pool.geometry.segment_blocks - self.into.used_blocks
        return room >= self.estimate(victim) or self.free_segments(self.cap_segments) > self._keep

    def clean(self, victim: Segment) -> Iterator[Step]:
        """Move what is in use of one sealed segment, unless it is too full to gain anything."""
        victim.pins += 1  # or it might die, be recycled and filled anew meanwhile
        try:
            area = memoryview(bytearray(self._pool.geometry.record_area_bytes))
            blocks: list[Blocks] = []

            def read() -> None:
                victim.file.pread(area, 0)
                blocks.append(blocks_in(area, victim))

            yield read
            wanted: list[_Found] = []
            yield from self._find(victim, blocks[0], wanted)
            self.segments_examined += 1
            capacity = self._pool.data_blocks
            if len(wanted) > capacity * (1 - _GAIN_MIN):
                self._known[victim.slot] = (len(wanted), self._table.usage.live[victim.slot])
                return
            for first in range(0, len(wanted), BATCH_BLOCKS):
                if victim.slot in self._hopeless:
                    return
                yield from self._move(victim, wanted[first : first + BATCH_BLOCKS])
            self.segments_cleaned += 1
            self._known.pop(victim.slot, None)
        except StoreDamaged as error:
            log.error("segment %d cannot be cleaned: %s", victim.slot, error)
            self._hopeless.add(victim.slot)
        finally:
            victim.pins -= 1

    def _leaves(self, family: int, number: int) -> Iterator[Step]:
        """Page in all leaves that cover leaf ``number`` of a family; yields steps."""
        table = self._table
        while absent := [ident for ident in table.leaves_of(family, number) if table.refs[ident] and ident not in table.resident]:
            job = PageJob(table, self._store.maps, absent)
            try:
                yield job.run
            finally:
                job.finish(shrink=False)

    def _find(self, victim: Segment, blocks: Blocks, wanted: list[_Found]) -> Iterator[Step]:
        """Fill ``wanted`` with what is in use of ``blocks``."""
        table, bits = self._table, self._table.bits
        base = victim.slot << self._pool.geometry.segment_shift
        order = np.lexsort((blocks.numbers, blocks.families))
        families, numbers = blocks.families[order].tolist(), blocks.numbers[order].tolist()
        places, births = blocks.places[order].tolist(), blocks.births[order].tolist()
        mask, at, groups = table.fanout - 1, 0, 0
        while at < len(numbers):
            family, number, end = families[at], numbers[at] >> bits, at
            while end < len(numbers) and numbers[end] >> bits == number and families[end] == family:
                end += 1
            yield from self._leaves(family, number)
            leaves = [table.resident[ident].slots for ident in table.leaves_of(family, number) if table.refs[ident]]
            for index in range(at, end):
                physical, slot = base | places[index], numbers[index] & mask
                for slots in leaves:
                    if slots[slot] & PHYSICAL_MASK == physical:
                        wanted.append((family, numbers[index], places[index], births[index]))
                        break
            at, groups = end, groups + 1
            if groups % _GROUPS_A_SLICE == 0:
                yield None

    def _move(self, victim: Segment, wanted: list[_Found]) -> Iterator[Step]:
        """Copy a batch of blocks and repoint whoever names them."""
        contents = [bytearray(BLOCK) for _ in wanted]

        def read() -> None:
            for (_, _, place, _), content in zip(wanted, contents):
                victim.file.pread(memoryview(content), place * BLOCK)

        yield read
        for family, block, *_ in wanted:
            yield from self._leaves(family, block >> self._table.bits)
        while True:
            try:
                self._move_now(victim, wanted, contents)
                break
            except Absent as absent:  # let go of since
                job = PageJob(self._table, self._store.maps, [absent.ident])
                try:
                    yield job.run
                finally:
                    job.finish(shrink=False)
        yield None

    def _move_now(self, victim: Segment, wanted: list[_Found], contents: list[bytearray]) -> None:
        table, bits, mask = self._table, self._table.bits, self._table.fanout - 1
        base = victim.slot << self._pool.geometry.segment_shift
        moves, data, entries = Moves.empty(), [], []
        for (family, block, place, birth), content in zip(wanted, contents):
            number, slot, physical = block >> bits, block & mask, base | place
            holders = [
                ident
                for ident in table.leaves_of(family, number)
                if table.refs[ident] and table.get(ident).slots[slot] & PHYSICAL_MASK == physical
            ]
            if not holders:
                continue  # overwritten since
            crc = table.get(holders[0]).slots[slot] >> 32
            if crc32c(content) != crc:
                log.error("block %d of segment %d is damaged; it stays where it is", place, victim.slot)
                self._hopeless.add(victim.slot)
                continue
            moves.add(family, block, physical, crc, birth)
            data.append(content)
            entries.append((slot, holders))
        done = 0
        while done < len(moves):
            done += self._append(moves, data, entries, done)

    def _append(self, moves: Moves, data: list[bytearray], entries: list[tuple[int, list[int]]], first: int) -> int:
        """Move as many blocks from ``first`` on as the segment of survivors takes; returns how many."""
        into, geometry = self.into, self._pool.geometry
        if into is not None:
            room = geometry.record_area_bytes - into.record_end - layout.RECORD_BYTES - 16
            count = min(len(moves) - first, geometry.segment_blocks - into.used_blocks, room // MOVE_BYTES)
        if into is None or count <= 0:
            self._next_segment()
            return 0
        part = moves.part(first, count)
        store_log = self._store.log
        if store_log.room(freeing=True)[1] < layout.RECORD_BYTES + 16:
            store_log.roll(keep=0)
        data_block = into.used_blocks
        try:
            into.file.pwritev(data[first : first + count], data_block * BLOCK)
            record, crc = layout.pack_record(layout.SUMMARY, store_log.seq + 1, 0, 0, into.salt, 0, data_block, part.pack())
            into.area.write(into.record_end, record)
        except OSError as error:
            raise store_log.stop(error) from error
        store_log.append(layout.MOVED, 0, layout.pack_moved(into.slot, into.record_end, crc))
        into.record_end += len(record)
        into.used_blocks += count
        store_log.covers(into)
        self.blocks_moved += count
        place = into.slot << geometry.segment_shift | data_block
        for index in range(count):
            slot, holders = entries[first + index]
            self._repoint(holders, slot, part.old[index], part.crcs[index] << 32 | (place + index))
        return count

    def _repoint(self, holders: list[int], slot: int, old: int, entry: int) -> None:
        table, live, shift = self._table, self._table.usage.live, self._pool.geometry.segment_shift
        for ident in holders:
            leaf = table.get(ident)
            table.touch(leaf)
            leaf.slots[slot] = entry
        live[old >> shift] -= len(holders)
        live[(entry & PHYSICAL_MASK) >> shift] += len(holders)

    def _next_segment(self) -> None:
        if self.into is not None:
            self._pool.seal(self.into)
            self.into = None
        store_log = self._store.log
        try:
            self.into = self._pool.activate(
                store_log.new_index(), store_log.seq + 1, store_log.durable_seq, 0, self._keep, survivors=True
            )
        except OSError as error:
            raise store_log.stop(error) from error

    # Recovery.

    def replay(self, payload: bytes) -> None:
        """Do what a MOVED record tells of. Raises `StoreDamaged`."""
        slot, offset, crc = layout.unpack_moved(payload)
        record = read_summary(self._pool.by_slot, slot, offset, crc)
        if record is None:
            reason = f"the summary at offset {offset} of segment {slot} is not valid"
            raise StoreDamaged(path=self._pool.path, reason=reason)
        moves, table = Moves.unpack(record.payload), self._table
        place = slot << self._pool.geometry.segment_shift | record.data_block
        for index, (family, block, old, sum_) in enumerate(zip(moves.families, moves.blocks, moves.old, moves.crcs)):
            at = block & (table.fanout - 1)
            holders = [
                ident
                for ident in table.leaves_of(family, block >> table.bits)
                if table.refs[ident] and table.get(ident).slots[at] & PHYSICAL_MASK == old
            ]
            self._repoint(holders, at, old, sum_ << 32 | (place + index))

    def statistics(self) -> dict[str, int]:
        return {
            "blocks_moved": self.blocks_moved,
            "segments_cleaned": self.segments_cleaned,
            "segments_examined": self.segments_examined,
        }

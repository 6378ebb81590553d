"""Map nodes that cannot be read: rebuilt where that is provably right, marked as lost where it is not. For `simsr.store.rescue`.

The node table has a CRC-32C and the length of every node. So a rebuilt node needs no argument why it should be right: made into
bytes it has that checksum, or it is not used. What is tried:

* A leaf: the records of all segments name family and blocks of everything in them. The states through which these blocks went are
  gone through, the newest first, each also with the bytes of the damaged node where a record agrees with them.
* An inner node: its kids are among the nodes of which the table counts more holders than are found.

Where nothing fits, every block that may have been mapped gets an entry that names `lost_slot`, a segment that does not exist. The log
is replayed after this, so what was written later is there again, and what is left of these entries in the end is what is lost.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from simsr.errors import StoreDamaged
from simsr.store import layout
from simsr.store.holders import Holders
from simsr.store.layout import COUNT_MASK, HOLE, START_SHIFT, Moves, Record, SegmentHeader
from simsr.store.node_table import NO_LEAF
from simsr.store.nodes import PHYSICAL_MASK, Inner, Leaf, Node, decode, encode
from simsr.store.paging import map_name
from simsr.store.recovery import Scan
from simsr.store.segments import Segment

if TYPE_CHECKING:
    from simsr.store.store import Store

__all__ = ["Repair"]

_STATES_MAX = 2000
_Key = tuple[int, int]
"""(family, number of the leaf)"""


@dataclass
class _Story:
    """What the records tell of the blocks of one leaf: [(seq, volume, first slot, entries)], [(seq, slot, old place, entry)]."""

    writes: list[tuple[int, int, int, np.ndarray]] = field(default_factory=list)
    moves: list[tuple[int, int, int, int]] = field(default_factory=list)


class Repair:
    """Looks at all nodes of a checkpoint that was just loaded, and sees to those that cannot be read."""

    def __init__(self, store: Store, seq: int, lost_slot: int, notes: list[str]) -> None:
        """``seq``: of the last record that the checkpoint includes."""
        self._store, self._table, self._maps = store, store.table, store.maps
        self._seq, self._notes = seq, notes
        self.lost_entry = 0xFFFFFFFF << 32 | lost_slot << store.geometry.segment_shift
        self._damaged: dict[int, str] = {}
        self._counted = np.zeros(store.table.rows, dtype=np.int64)

    def run(self) -> None:
        """The table must be in `NodeTable.waiting`. O(nodes); reads the records of all segments only if a leaf is damaged."""
        self._look()
        table = self._table
        leaves = [ident for ident in self._damaged if table.number[ident] != NO_LEAF]
        inner = {ident for ident in self._damaged if table.number[ident] == NO_LEAF}
        if leaves:
            stories = self._stories({(table.family[ident], table.number[ident]) for ident in leaves})
            for ident in leaves:
                self._repair_leaf(ident, stories)
        while inner:  # one may be known only when the one above it is
            holders = Holders(self._store, inner)
            for _ in holders.work():
                raise AssertionError("all nodes on the way are in memory or can be read at once")
            held = {ident: found for ident, found in holders.found.items() if found.blocks}
            if not held:
                break  # nobody's
            for ident, found in sorted(held.items(), key=lambda item: item[1].blocks):
                level = (found.blocks.bit_length() - 1) // table.bits - 1
                self._repair_inner(ident, level, found.block >> table.bits)
                inner.discard(ident)

    def _look(self) -> None:
        table, maps = self._table, self._maps
        roots = [volume.map.root for volume in self._store.volumes.values() if volume.map.root]
        np.add.at(self._counted, roots, 1)
        alive = np.flatnonzero(table.alive).tolist()
        for ident in sorted(alive, key=lambda ident: (table.file[ident], table.offset[ident])):
            try:
                node = maps.load(maps.home_of(ident), table.number[ident] != NO_LEAF)
            except (StoreDamaged, OSError) as error:
                self._damaged[ident] = str(getattr(error, "details", {}).get("reason", error))
                continue
            if node.height:
                np.add.at(self._counted, node.present, 1)
                table.adopt(node, ident)

    def _raw(self, ident: int) -> bytes:
        """The bytes of a damaged node, as far as there are any."""
        file, offset, length, _ = self._maps.home_of(ident)
        try:
            handle = self._store.directory.open(map_name(file))
        except OSError:
            return b""
        data = bytearray(length)
        handle.pread(memoryview(data), offset)
        handle.close()
        return bytes(data)

    def _hint(self, ident: int) -> Node | None:
        try:
            return decode(self._raw(ident), self._table.fanout)
        except ValueError:
            return None

    def _is_right(self, ident: int, node: Node) -> bool:
        data, _ = encode(node)
        return len(data) == self._table.length[ident] and crc32c(data) == self._table.crc[ident]

    def _put(self, ident: int, node: Node) -> None:
        """Have ``node`` in the place of a damaged one; as a change, so it stays in memory."""
        self._table.adopt(node, ident)
        self._table.touch(node)

    # Leaves.

    def _repair_leaf(self, ident: int, stories: dict[_Key, _Story]) -> None:
        table = self._table
        story = stories[table.family[ident], table.number[ident]]
        for slots in self._candidates(story, self._hint(ident), table.mapped[ident]):
            leaf = Leaf(array("Q", slots.tobytes()))
            if self._is_right(ident, leaf):
                self._notes.append(f"{self._damaged[ident]}; rebuilt from the records of the segments")
                return self._put(ident, leaf)
        self._notes.append(self._damaged[ident])
        self._put(ident, self._lost_leaf())

    def _lost_leaf(self) -> Leaf:
        return Leaf(array("Q", [self.lost_entry]) * self._table.fanout)

    def _candidates(self, story: _Story, hint: Node | None, mapped: int) -> Iterator[np.ndarray]:
        """Contents that a leaf may have had, the most probable first; ``mapped``: how many of its slots were in use."""
        fanout = self._table.fanout
        told = {(first + at, int(e)) for _, _, first, entries in story.writes for at, e in enumerate(entries)}
        told.update((slot, entry) for _, slot, _, entry in story.moves)
        seen = None
        if hint is not None and not hint.height:
            seen = np.array(hint.slots, dtype=np.uint64)
            credible = np.array([not entry or (slot, entry) in told for slot, entry in enumerate(seen.tolist())], dtype=bool)
        writers = {volume for _, volume, _, _ in story.writes}
        for only in [None, *sorted(writers)] if len(writers) > 1 else [None]:
            for slots in self._states(story, only, fanout):
                mixed = [slots]
                if seen is not None:
                    mixed += [np.where(credible, seen, slots), np.where(credible & (seen != 0), seen, slots)]
                for candidate in mixed:
                    if np.count_nonzero(candidate) == mapped:
                        yield candidate

    @staticmethod
    def _states(story: _Story, only: int | None, fanout: int) -> list[np.ndarray]:
        """The states through which the blocks went, the newest first; with ``only``, without what other volumes wrote after that
        one's first write."""
        writes = sorted(story.writes, key=lambda write: write[0])
        if only is not None:
            first = min(seq for seq, volume, _, _ in writes if volume == only)
            writes = [write for write in writes if write[1] == only or write[0] < first]
        moves = sorted(story.moves)
        known = {(first + at, int(e) & PHYSICAL_MASK) for _, _, first, entries in writes for at, e in enumerate(entries)}
        known |= {(slot, entry & PHYSICAL_MASK) for _, slot, _, entry in moves}
        slots = np.zeros(fanout, dtype=np.uint64)
        for _, slot, old, entry in reversed(moves):  # of what was moved the first record may be gone
            if (slot, old) not in known:
                slots[slot] = entry & ~PHYSICAL_MASK | old

        def moved(slots: np.ndarray) -> np.ndarray:
            slots = slots.copy()
            for _, slot, old, entry in moves:
                if int(slots[slot]) & PHYSICAL_MASK == old:
                    slots[slot] = entry
            return slots

        states = [moved(slots)]
        for _, _, first, entries in writes:
            slots[first : first + len(entries)] = entries
            states.append(moved(slots))
            del states[:-_STATES_MAX]
        return states[::-1]

    def _stories(self, wanted: set[_Key]) -> dict[_Key, _Story]:
        """What all records of all segments tell of some leaves, up to the checkpoint."""
        stories = {key: _Story() for key in wanted}
        numbers: dict[int, list[int]] = defaultdict(list)
        for family, number in sorted(wanted):
            numbers[family].append(number)
        store = self._store
        for segment in store.pool.by_slot:
            if segment is None or not segment.log_index:
                continue
            header = SegmentHeader(store.uuid.bytes, segment.log_index, 0, 0, 0)
            for record in Scan(segment, header, store.uuid.bytes, store.geometry.record_area_bytes).search(layout.HEADER_BYTES):
                if record.seq > self._seq:
                    continue
                if record.kind == layout.EXTENTS:
                    family = layout.family_of_extents(record.payload)
                    if family in numbers:
                        self._hear(segment, record, family, numbers[family], stories)
                elif record.kind == layout.SUMMARY:
                    self._hear_moves(segment, record, stories)
        return stories

    def _hear(
        self, segment: Segment, record: Record, family: int, numbers: list[int], stories: dict[_Key, _Story]
    ) -> None:
        bits, taken = self._table.bits, 0
        place = segment.slot << self._store.geometry.segment_shift | record.data_block
        extents, crcs = layout.unpack_extents(record.payload)
        for extent in extents:
            block, count = extent >> START_SHIFT, extent & COUNT_MASK
            hole = bool(extent & HOLE)
            for number in numbers[bisect_left(numbers, block >> bits) :]:
                low, high = max(block, number << bits), min(block + count, (number + 1) << bits)
                if low >= high:
                    break
                if hole:
                    entries = np.zeros(high - low, dtype=np.uint64)
                else:
                    at = taken + low - block
                    entries = np.array(crcs[at : at + high - low], dtype=np.uint64) << np.uint64(32)
                    entries |= np.arange(place + at, place + at + high - low, dtype=np.uint64)
                write = (record.seq, record.volume, low - (number << bits), entries)
                stories[family, number].writes.append(write)
            taken += 0 if hole else count

    def _hear_moves(self, segment: Segment, record: Record, stories: dict[_Key, _Story]) -> None:
        moves, bits = Moves.unpack(record.payload), self._table.bits
        place = segment.slot << self._store.geometry.segment_shift | record.data_block
        for index, (family, block, old, crc) in enumerate(zip(moves.families, moves.blocks, moves.old, moves.crcs)):
            story = stories.get((family, block >> bits))
            if story is not None:
                story.moves.append((record.seq, block & (self._table.fanout - 1), old, crc << 32 | (place + index)))

    # Inner nodes.

    def _orphans(self, family: int, level: int, base: int) -> dict[int, list[int]]:
        """Nodes that may be kids of the inner node of this level that begins at leaf ``base``: by index."""
        table, step = self._table, self._table.bits * (level - 1)
        refs = np.frombuffer(table.refs, dtype=np.uint32).astype(np.int64)[: len(self._counted)]
        families = np.frombuffer(table.family, dtype=np.uint32)[: len(self._counted)]
        found: dict[int, list[int]] = defaultdict(list)
        for ident in np.flatnonzero((families == family) & (refs > self._counted)).tolist():
            number = self._first_leaf(ident, level - 1)
            if number is not None and base <= number < base + (table.fanout << step):
                found[(number - base) >> step].append(ident)
        return found

    def _first_leaf(self, ident: int, height: int) -> int | None:
        """The number of the first leaf below a node of a certain height; None if it has another one, or cannot be read."""
        table = self._table
        if height == 0 or table.number[ident] != NO_LEAF:
            return table.number[ident] if not height and table.number[ident] != NO_LEAF else None
        node = table.resident.get(ident)
        if node is None or node.height != height or not len(node.present):
            return None
        return self._first_leaf(int(node.present[0]), height - 1)

    def _repair_inner(self, ident: int, level: int, base: int) -> None:
        table = self._table
        orphans, hint = self._orphans(table.family[ident], level, base), self._hint(ident)
        kids = np.zeros(table.fanout, dtype=np.uint32)
        for index, those in orphans.items():
            kids[index] = those[0]
        seen = np.array(hint.kids, dtype=np.uint32) if hint is not None and hint.height == level else kids
        many = [index for index, those in orphans.items() if len(those) > 1]
        mixed = kids.copy()
        mixed[many] = seen[many]
        for candidate in (kids, mixed, np.where(kids == 0, seen, mixed)):
            node = Inner(array("I", candidate.tobytes()), level)
            if self._is_right(ident, node):
                np.add.at(self._counted, node.present, 1)
                self._notes.append(f"{self._damaged[ident]}; rebuilt from the node table")
                return self._put(ident, node)
        self._notes.append(self._damaged[ident])
        family = table.family[ident]
        families, numbers = np.frombuffer(table.family, dtype=np.uint32), np.frombuffer(table.number, dtype=np.uint32)
        end = base + (1 << (table.bits * level))
        known = np.unique(numbers[(families == family) & (numbers >= base) & (numbers < end) & (numbers != NO_LEAF)])
        del families, numbers  # or the columns could not grow
        self._put(ident, self._lost_inner(family, level, base, known.tolist()))

    def _lost_inner(self, family: int, level: int, base: int, numbers: list[int]) -> Inner:
        """A node below which all of ``numbers`` are lost: no other leaf has ever been there, as far as the table goes."""
        table, step = self._table, self._table.bits * (level - 1)
        kids = array("I", bytes(4 * table.fanout))
        parts: dict[int, list[int]] = defaultdict(list)
        for number in numbers:
            parts[(number - base) >> step].append(number)
        for index, part in parts.items():
            first = base + (index << step)
            kid = self._lost_leaf() if level == 1 else self._lost_inner(family, level - 1, first, part)
            kids[index] = table.make(kid, family, first)
        return Inner(kids, level)

"""Check of a store that nobody uses: is everything there, does it have its checksum, and do the books balance?

The store is recovered in memory, as `Store.open` would, and then looked at in three ways:

* `simsr.store.scrub` reads every map node on disk and every block in use;
* everything is counted anew from the roots of the volumes: who holds each node, how many slots of each leaf and of each volume
  are in use, how many slots name a block of each segment, whether every leaf is where the table says;
* the records of each segment are held against the blocks in use there, because the cleaner finds blocks by them.

Wrong counts are not all alike. A count that is too low is corruption: something in use could be given away. One that is too high, a
node that nobody holds, and a file that nobody knows are leaks: space that does not come back, no more.

Where a map node cannot be read nothing below it can be counted; then only what is certain is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from simsr.errors import StoreDamaged
from simsr.store import layout
from simsr.store.checkpoint import Step, read_supers
from simsr.store.contents import blocks_in
from simsr.store.files import Directory
from simsr.store.node_table import NO_LEAF, MapMemory
from simsr.store.nodes import PHYSICAL_MASK, Node
from simsr.store.paging import map_files, map_name
from simsr.store.scrub import Scrub
from simsr.store.segments import segment_name
from simsr.store.store import Store
from simsr.store.table_file import table_files, table_name

__all__ = ["Check", "Problem"]

CORRUPTION, LEAK = "corruption", "leak"


@dataclass(frozen=True)
class Problem:
    """What is wrong. ``volumes``, ``offset``, ``length``: what cannot be read for it, if that is known."""

    kind: str  # CORRUPTION or LEAK
    text: str
    volumes: tuple[int, ...] = ()
    offset: int = 0
    length: int = 0


@dataclass
class _Counts:
    """What the nodes themselves say."""

    kids: dict[int, np.ndarray] = field(default_factory=dict)
    mapped: dict[int, int] = field(default_factory=dict)
    heights: dict[int, int] = field(default_factory=dict)


class Check:
    """One check. Use: ``for step in check.work(): ...`` to the end; then ``problems``. `close` lets go of the store."""

    def __init__(self, directory: Directory, memory: MapMemory | None = None) -> None:
        """Recover. Raises `StoreLocked`, `StoreFormat`, OSError: the check cannot be done. A store that cannot be recovered is a
        problem like others, the only one then."""
        self.directory = directory
        self.problems: list[Problem] = []
        self.store: Store | None = None
        self.scrub: Scrub | None = None
        try:
            self.store = Store.open_read_only(directory, memory)
        except StoreDamaged as error:
            self._found(CORRUPTION, f"the store cannot be opened: {error.details['reason']}")
            return
        self.scrub = Scrub(self.store, self._count)
        self._counts = _Counts()
        segments = len(self.store.usage.live)
        self._live = np.zeros(segments, dtype=np.int64)
        self._used: dict[int, bytearray] = {}  # segment -> which of its blocks are in use

    def close(self) -> None:
        if self.store is not None:
            self.store.abandon()

    @property
    def corruptions(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.kind == CORRUPTION]

    @property
    def leaks(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.kind == LEAK]

    def _found(self, kind: str, text: str, volumes: tuple[int, ...] = (), offset: int = 0, length: int = 0) -> None:
        self.problems.append(Problem(kind, text, volumes, offset, length))

    def work(self) -> Iterator[Step]:
        if self.store is None:
            return
        yield from self.scrub.work()
        for damage in self.scrub.damage:
            what = {"block": "blocks fail their checksum", "node": "map node cannot be read", "file": "damaged"}[damage.kind]
            self._found(CORRUPTION, f"{what}: {damage.where}", damage.volumes, damage.offset, damage.length)
        if self.scrub.untold:
            self._found(CORRUPTION, f"{self.scrub.untold} more damaged blocks or nodes are not listed")
        self._compare()
        yield None
        yield from self._records()
        self._files()

    # Counting.

    def _count(self, ident: int, node: Node) -> None:
        counts = self._counts
        counts.heights[ident] = node.height
        if node.height:
            counts.kids[ident] = np.array(node.present)
            return
        counts.mapped[ident] = int(np.count_nonzero(node.vector))
        self._count_blocks(node.vector, +1)

    def _count_blocks(self, slots: np.ndarray, sign: int) -> None:
        physical = (slots & np.uint64(PHYSICAL_MASK)).astype(np.int64)
        physical = physical[physical != 0]
        per_segment = np.bincount(physical >> self.store.geometry.segment_shift)
        if len(per_segment) > len(self._live):
            self._live = np.pad(self._live, (0, len(per_segment) - len(self._live)))
        self._live[: len(per_segment)] += sign * per_segment
        if sign < 0:
            return
        mask, shift = self.store.geometry.segment_blocks - 1, self.store.geometry.segment_shift
        for slot in np.flatnonzero(per_segment).tolist():
            used = self._used.setdefault(slot, bytearray(mask + 1))
            np.frombuffer(used, dtype=np.uint8)[physical[physical >> shift == slot] & mask] = 1

    def _compare(self) -> None:
        store, table, counts = self.store, self.store.table, self._counts
        roots = [volume.map.root for volume in store.volumes.values() if volume.map.root]
        refs = np.zeros(table.rows, dtype=np.int64)
        np.add.at(refs, roots, 1)
        reached, stack = set(), [*roots, *table.dropped]
        while stack:
            ident = stack.pop()
            if ident in reached or ident >= table.rows:
                continue
            reached.add(ident)
            kids = counts.kids.get(ident)
            if kids is not None:
                inside = kids[kids < table.rows]
                np.add.at(refs, inside, 1)
                stack.extend(inside.tolist())
                if len(inside) < len(kids):
                    self._found(CORRUPTION, f"map node {ident} names nodes that do not exist")
        unread = {ident for ident in reached if ident not in counts.heights}
        hidden = any(table.number[ident] == NO_LEAF for ident in unread)  # below those nothing was seen
        self._compare_nodes(refs, reached, hidden)
        if not unread:
            self._compare_live(reached)
        self._compare_volumes(unread)

    def _compare_nodes(self, refs: np.ndarray, reached: set[int], hidden: bool) -> None:
        table = self.store.table
        alive = set(np.flatnonzero(table.alive).tolist())
        for ident in sorted(reached - alive):
            self._found(CORRUPTION, f"map node {ident} is in use but not in the table")
        if not hidden:
            for ident in sorted(alive - reached):
                self._found(LEAK, f"map node {ident} is held by nobody")
        for ident in sorted(reached & alive):
            said, counted = table.refs[ident], int(refs[ident])
            if counted > said:
                self._found(CORRUPTION, f"map node {ident} has {counted} holders, the table says {said}")
            elif counted < said and not hidden:
                self._found(LEAK, f"map node {ident} has {counted} holders, the table says {said}")
            mapped = self._counts.mapped.get(ident)
            if mapped is not None and table.is_clean(ident) and table.mapped[ident] != mapped:
                self._found(CORRUPTION, f"leaf {ident} maps {mapped} blocks, the table says {table.mapped[ident]}")

    def _compare_live(self, reached: set[int]) -> None:
        store = self.store
        for ident in set(self._counts.mapped) - reached:  # counted, but nobody's
            node = store.table.resident.get(ident) or store.maps.load(store.maps.home_of(ident), True)
            self._count_blocks(node.vector, -1)
        said = np.zeros(max(len(self._live), len(store.usage.live)), dtype=np.int64)
        said[: len(store.usage.live)] = store.usage.live
        counted = np.pad(self._live, (0, len(said) - len(self._live)))
        for slot in np.flatnonzero(said != counted).tolist():
            kind = CORRUPTION if counted[slot] > said[slot] else LEAK
            name = segment_name(slot)
            self._found(kind, f"{counted[slot]} map entries name blocks of {name}, the table says {said[slot]}")

    def _compare_volumes(self, unread: set[int]) -> None:
        below: dict[int, int | None] = {}

        def mapped(ident: int, level: int, base: int, family: int) -> int | None:
            """Blocks mapped below a node; None if that cannot be known."""
            if ident in below:
                return below[ident]
            height = self._counts.heights.get(ident)
            if height is None or height != level:
                if ident not in unread:
                    self._found(CORRUPTION, f"map node {ident} has height {height} where one of {level} belongs")
                total = None
            elif level == 0:
                total = self._counts.mapped[ident]
                if (table.number[ident], table.family[ident]) != (base, family) or ident not in set(table.leaves_of(family, base)):
                    self._found(CORRUPTION, f"leaf {ident} is listed under another number than {base} of family {family}")
            else:
                total, node = 0, table.resident.get(ident) or maps.load(maps.home_of(ident), False)
                for index in np.flatnonzero(np.frombuffer(node.kids, dtype=np.uint32)).tolist():
                    part = mapped(node.kids[index], level - 1, (base << table.bits) | index, family)
                    total = None if part is None or total is None else total + part
            below[ident] = total
            return total

        table, maps = self.store.table, self.store.maps
        for volume in self.store.volumes.values():
            map_ = volume.map
            total = mapped(map_.root, map_.height, 0, map_.family) if map_.root else 0
            if total is not None and total != map_.mapped_blocks:
                text = f"the volume maps {total} blocks, the table says {map_.mapped_blocks}"
                self._found(CORRUPTION, text, (volume.ident,))

    # Segments and files.

    def _records(self) -> Iterator[Step]:
        """Every block in use must be named by a record of its segment, or the cleaner cannot move it."""
        geometry = self.store.geometry
        for slot, used in sorted(self._used.items()):
            segment = self.store.pool.by_slot[slot] if slot < len(self.store.pool.by_slot) else None
            if segment is None:
                continue  # every one of its blocks is reported already
            areas: list[memoryview] = []

            def read(segment=segment, areas=areas) -> None:
                areas.append(memoryview(bytearray(geometry.record_area_bytes)))
                segment.file.pread(areas[0], 0)

            yield read
            if layout.SegmentHeader.unpack(bytes(areas[0][: layout.HEADER_BYTES])) is None:
                self._found(CORRUPTION, f"{segment_name(slot)} has blocks in use and no valid header")
                continue
            unnamed = np.frombuffer(used, dtype=np.uint8).copy()
            unnamed[blocks_in(areas[0], segment).places] = 0
            if count := int(unnamed.sum()):
                text = f"a record of {segment_name(slot)} is damaged: {count} blocks in use are named by none, and cannot be cleaned"
                self._found(CORRUPTION, text)

    def _files(self) -> None:
        store, directory = self.store, self.directory
        known = {"super.0", "super.1", *(segment_name(slot) for slot, s in enumerate(store.pool.by_slot) if s is not None)}
        known.update(map(map_name, map_files(directory)), map(table_name, table_files(directory)), store.pool._unmade)
        for name in directory.names():
            if name not in known:
                self._found(LEAK, f"file {name} does not belong to the store")
        if len(read_supers(directory)) < 2 and not any("super.0" in p.text for p in self.problems):
            self._found(CORRUPTION, "one of super.0 and super.1 is missing")

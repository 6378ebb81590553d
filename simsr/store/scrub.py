"""Scrub: reads everything that is in use and compares checksums, beside the running load.

What is read: both super blocks and the table file, every map node that is on disk, and every block that a leaf names. The node
table knows all nodes, so nothing is walked and what snapshots share is read once. Nodes are taken in the order in which they lie in
the map files, some at a time; the blocks that a batch of leaves names are then read in the order in which they lie in the segments.

Blocks are read from the disk itself, past the page cache (`File.pread_disk`): what is in memory says nothing about the disk, and
reading a whole store through the cache would throw out what others need.

The store goes on meanwhile. A block that does not have its checksum is damaged only if the leaf still names it: its leaf is
looked at again, the segment pinned in the same moment, and the block read a second time. The same goes for a node that has moved
since. What was written, or moved by the cleaner (which verifies), after its batch had its turn is not read again.

`Scrub.work` yields steps as all jobs of the store do; after each ``None`` the caller may wait as long as it likes, which is how a rate
is kept. No segment is pinned then.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from simsr.errors import StoreDamaged
from simsr.store.checkpoint import Step, read_supers
from simsr.store.holders import Holders, node_at
from simsr.store.layout import BLOCK, TableEnd
from simsr.store.node_table import NO_LEAF
from simsr.store.nodes import PHYSICAL_MASK, Node
from simsr.store.segments import Segment, State, segment_name
from simsr.store.table_file import read_sections, table_name

if TYPE_CHECKING:
    from simsr.store.store import Store

__all__ = ["Scrub", "Damage", "DAMAGE_MAX"]

_NODES_A_BATCH = 64
_LEAVES_A_BATCH = 512
_STEP_BLOCKS = 128
_GAP_BLOCKS = 7  # reading so many blocks that nobody wants is cheaper than another read
_LOCATE_NODES = 256
DAMAGE_MAX = 10_000
"""So many damaged blocks, and nodes, are told one by one; more are counted only."""


@dataclass(frozen=True)
class Damage:
    """A range that cannot be read: of blocks, or of everything below a map node. ``volumes``: whose; none if nobody's any more."""

    kind: str  # "block", "node" or "file"
    volumes: tuple[int, ...]
    offset: int
    length: int
    where: str


class _Batch:
    """The blocks that some leaves name: parallel arrays in the order of their places."""

    def __init__(self, leaves: list[tuple[int, np.ndarray]], fanout: int, shift: int) -> None:
        entries = np.concatenate([slots for _, slots in leaves]) if leaves else np.zeros(0, dtype=np.uint64)
        used = np.flatnonzero(entries)
        order = used[np.argsort(entries[used] & np.uint64(PHYSICAL_MASK), kind="stable")]
        self.entries = entries[order]
        self.idents = np.array([ident for ident, _ in leaves], dtype=np.int64)[order // fanout]
        self.slots = order % fanout
        self.places = (self.entries & np.uint64(PHYSICAL_MASK)).astype(np.int64)
        first = np.ones(len(order), dtype=bool)
        first[1:] = self.entries[1:] != self.entries[:-1]
        self.distinct = np.flatnonzero(first)  # what several leaves name is read once
        places = self.places[self.distinct]
        far = (np.diff(places) > _GAP_BLOCKS + 1) | (np.diff(places >> shift) != 0)
        self._ends = np.append(np.flatnonzero(far) + 1, len(places)) if len(places) else np.zeros(0, dtype=np.int64)

    def steps(self) -> Iterator[list[np.ndarray]]:
        """Reads of up to `_STEP_BLOCKS` blocks together: positions in the arrays, for each read. O(blocks of the step) each."""
        step, room, begin = [], _STEP_BLOCKS, 0
        for end in self._ends:
            while begin < end:
                run = self.distinct[begin : min(end, begin + _STEP_BLOCKS)]
                places = self.places[run]
                run = run[: np.searchsorted(places, places[0] + _STEP_BLOCKS)]
                span = int(self.places[run[-1]] - places[0]) + 1
                if span > room:
                    yield step
                    step, room = [], _STEP_BLOCKS
                step.append(run)
                room -= span
                begin += len(run)
        if step:
            yield step


class Scrub:
    """One scrub of a store. ``damage`` is complete when `work` has come to its end; ``bytes_total`` is an estimate until then."""

    def __init__(self, store: Store, on_node: Callable[[int, Node], None] | None = None) -> None:
        """``on_node`` is told every node that could be read, in worker steps; for those who have the store for themselves."""
        self.store, self._table = store, store.table
        self._on_node = on_node
        self._shift, self._mask = store.geometry.segment_shift, store.geometry.segment_blocks - 1
        self.bytes_done = 0
        self.bytes_total = store.cleaner.live_blocks * BLOCK + sum(self._table.bytes_at_home.values())
        self.nodes = self.blocks = 0
        self.damage: list[Damage] = []
        self.damaged_nodes = self.damaged_blocks = 0
        self._bad_nodes: dict[int, str] = {}
        self._bad_blocks: list[tuple[int, int, int]] = []  # (leaf, slot, place)
        self.finished = False
        self._buffer = memoryview(mmap.mmap(-1, _STEP_BLOCKS * BLOCK))  # steps run one at a time; it begins at a page

    @property
    def untold(self) -> int:
        """How many damaged nodes and blocks there are besides those in ``damage``."""
        return max(0, self.damaged_nodes - DAMAGE_MAX) + max(0, self.damaged_blocks - DAMAGE_MAX)

    @property
    def is_clean(self) -> bool:
        return not self.damage and not self.damaged_nodes and not self.damaged_blocks

    def work(self) -> Generator[Step, None, None]:
        yield from self._files()
        ids = yield from self._in_order()
        leaves: list[tuple[int, np.ndarray]] = []
        for first in range(0, len(ids), _NODES_A_BATCH):
            leaves += yield from self._nodes(ids[first : first + _NODES_A_BATCH].tolist())
            if len(leaves) >= _LEAVES_A_BATCH:
                yield from self._blocks(leaves)
                leaves = []
            yield None
        yield from self._blocks(leaves)
        yield from self._locate()
        self.bytes_total = self.bytes_done
        self.finished = True

    def describe(self) -> dict[str, object]:
        """Counts, as JSON has them."""
        return {
            "bytes_done": self.bytes_done, "bytes_total": max(self.bytes_done, self.bytes_total), "nodes": self.nodes,
            "blocks": self.blocks, "damaged_nodes": self.damaged_nodes, "damaged_blocks": self.damaged_blocks,
        }  # fmt: skip

    # Super blocks and table file.

    def _files(self) -> Generator[Step, None, None]:
        store = self.store
        for attempt in range(3):  # one that is being written, or replaced, looks damaged
            end = TableEnd(store._table_file, store._table_bytes, 0, store._table_crc)
            found: list[str] = []

            def look() -> None:
                directory = store.directory
                if sum(name in directory.names() for name in ("super.0", "super.1")) != len(read_supers(directory)):
                    found.append("one of super.0 and super.1 is not valid")
                try:
                    for _ in read_sections(directory, end) if end.file else ():
                        pass
                except StoreDamaged as error:
                    found.append(str(error.details["reason"]))
                except OSError as error:
                    found.append(f"{table_name(end.file)}: {error}")

            yield look
            if not found:
                self.bytes_done += end.offset
                return
            yield None
        self.damage += [Damage("file", (), 0, 0, where) for where in found]

    # Nodes.

    def _in_order(self) -> Generator[Step, None, np.ndarray]:
        """All nodes, in the order in which they lie on the disk."""
        table, order = self._table, []
        alive, file, offset = table.alive, np.array(table.file, dtype=np.uint64), np.array(table.offset, dtype=np.uint64)

        def sort() -> None:
            ids = np.flatnonzero(alive)
            order.append(ids[np.argsort(file[ids] << np.uint64(40) | offset[ids], kind="stable")])

        yield sort
        return order[0]

    def _nodes(self, ids: list[int]) -> Generator[Step, None, list[tuple[int, np.ndarray]]]:
        """Verify nodes on the disk; returns what the leaves among them hold."""
        table, maps = self._table, self.store.maps
        wanted, leaves = [], []
        for ident in ids:
            if not table.family[ident]:
                continue  # gone since
            node = table.resident.get(ident)
            if node is not None and not node.height:
                leaves.append((ident, np.array(node.slots, dtype=np.uint64)))
            if node is not None or table.file[ident]:
                wanted.append((ident, maps.home_of(ident), table.number[ident] != NO_LEAF, node))
        failed: list[tuple[int, tuple, str]] = []

        def read() -> None:
            for ident, home, is_leaf, node in wanted:
                try:
                    found = maps.load(home, is_leaf) if home[0] else node
                except (StoreDamaged, OSError) as error:
                    failed.append((ident, home, str(getattr(error, "details", {}).get("reason", error))))
                    found = node
                if found is not None and node is None and not found.height:
                    leaves.append((ident, found.vector))
                if found is not None and self._on_node is not None:
                    self._on_node(ident, node or found)

        maps.readers += 1  # no file goes away
        try:
            yield read
        finally:
            maps.readers -= 1
        for ident, home, where in failed:
            if table.family[ident] and maps.home_of(ident) == home:
                self.damaged_nodes += 1
                if len(self._bad_nodes) < DAMAGE_MAX:
                    self._bad_nodes[ident] = where
        self.nodes += len(wanted)
        self.bytes_done += sum(home[2] for _, home, _, _ in wanted)
        return leaves

    # Blocks.

    def _blocks(self, leaves: list[tuple[int, np.ndarray]]) -> Generator[Step, None, None]:
        made: list[_Batch] = []
        yield lambda: made.append(_Batch(leaves, self._table.fanout, self._shift))
        batch, by_slot = made[0], self.store.pool.by_slot
        for step in batch.steps():
            reads, wrong = [], []
            for run in step:
                slot = int(batch.places[run[0]]) >> self._shift
                segment = by_slot[slot] if slot < len(by_slot) else None
                if segment is None:
                    wrong.append(run)  # missing: if a leaf still names it, that is damage
                elif segment.state in (State.ACTIVE, State.SEALED):  # else nothing names it any more
                    reads.append((segment, run))
            yield from self._read(batch, reads, wrong)
            count = sum(map(len, step))
            self.blocks += count
            self.bytes_done += count * BLOCK
            for position in np.concatenate(wrong).tolist() if wrong else ():
                yield from self._look_again(batch, position)
            yield None
        yield None

    def _read(
        self, batch: _Batch, reads: list[tuple[Segment, np.ndarray]], wrong: list[np.ndarray]
    ) -> Generator[Step, None, None]:
        """Read runs; those positions that do not have their checksums go to ``wrong``."""

        def read() -> None:
            for segment, run in reads:
                entries, first = batch.entries[run], int(batch.places[run[0]])
                within = ((batch.places[run] - first) * BLOCK).tolist()
                data = self._buffer[: within[-1] + BLOCK]
                # What was just written is in memory, and reading it from the disk would force it there.
                pread = segment.file.pread if segment.state is State.ACTIVE else segment.file.pread_disk
                try:
                    pread(data, (first & self._mask) * BLOCK)
                except OSError:
                    wrong.append(run)  # each is looked at alone then
                    continue
                sums = list(map(crc32c, [data[at : at + BLOCK] for at in within]))
                bad = (entries >> np.uint64(32)) != np.array(sums, dtype=np.uint64)
                if bad.any():
                    wrong.append(run[bad])

        for segment, _ in reads:
            segment.pins += 1
        try:
            yield read
        finally:
            for segment, _ in reads:
                segment.pins -= 1

    def _look_again(self, batch: _Batch, position: int) -> Generator[Step, None, None]:
        """Whether a block that seemed damaged is: somebody still names it, and it does not have its checksum now either."""
        entry, place = int(batch.entries[position]), int(batch.places[position])
        slot, by_slot = place >> self._shift, self.store.pool.by_slot
        naming = np.flatnonzero(batch.entries == batch.entries[position])
        for ident, index in zip(batch.idents[naming].tolist(), batch.slots[naming].tolist()):
            leaf = yield from node_at(self.store, ident)
            if leaf is None or leaf.height or leaf.slots[index] != entry or not self._table.family[ident]:
                continue
            segment = by_slot[slot] if slot < len(by_slot) else None
            wrong: list[np.ndarray] = [] if segment is not None else [naming]
            if segment is not None:
                yield from self._read(batch, [(segment, np.array([position]))], wrong)
            if wrong:
                self.damaged_blocks += 1
                if len(self._bad_blocks) < DAMAGE_MAX:
                    self._bad_blocks.append((ident, index, place))

    # The result.

    def _locate(self) -> Generator[Step, None, None]:
        """Say whose the damage is."""
        targets = sorted({*self._bad_nodes, *(ident for ident, _, _ in self._bad_blocks)})
        held = {}
        for first in range(0, len(targets), _LOCATE_NODES):
            holders = Holders(self.store, [ident for ident in targets[first : first + _LOCATE_NODES] if self._table.family[ident]])
            yield from holders.work()
            held.update(holders.found)
        for ident, where in self._bad_nodes.items():
            if ident in held:
                found = held[ident]
                self.damage.append(Damage("node", tuple(found.volumes), found.block * BLOCK, found.blocks * BLOCK, where))
        blocks = []
        for ident, index, place in self._bad_blocks:
            if ident in held and held[ident].volumes:
                where = f"{segment_name(place >> self._shift)} at offset {(place & self._mask) * BLOCK}"
                blocks.append(Damage("block", tuple(held[ident].volumes), (held[ident].block + index) * BLOCK, BLOCK, where))
        self.damage += _joined(blocks)


def _joined(blocks: list[Damage]) -> list[Damage]:
    """Blocks of the same volumes that follow each other, as one range."""
    joined: list[Damage] = []
    for block in sorted(blocks, key=lambda block: (block.volumes, block.offset)):
        last = joined[-1] if joined else None
        if last is not None and last.volumes == block.volumes and last.offset + last.length == block.offset:
            joined[-1] = Damage("block", last.volumes, last.offset, last.length + BLOCK, last.where)
        else:
            joined.append(block)
    return joined

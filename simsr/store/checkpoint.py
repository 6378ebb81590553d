"""Checkpoints: what changed in the maps and in the list of volumes, on disk, so that recovery replays only the tail of the log.

A checkpoint writes a file ``map-<generation>`` with the nodes that changed since the last one and appends a section of changes to
the table file (`simsr.store.table_file`). Its cost is what was changed. The super block that names the end of the table file is
written after all this is synced, into the slot of the two that does not hold the last one.

It never stalls I/O: `CheckpointJob.work` turns frozen nodes into bytes a few at a time on the store's thread and yields everything
that blocks for some other thread to run; in between, the store goes on as if nothing was happening (`NodeTable.freeze`).

When more than half of what the map files hold is garbage, a checkpoint also takes along the nodes of the worst of them, as bytes, so
that they can go.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from crc32c import crc32c

from simsr.errors import NoSpace, StoreDamaged
from simsr.store.files import Directory, File
from simsr.store.layout import Geometry, TableEnd, Super
from simsr.store.log import FlushJob, Position
from simsr.store.node_table import COLUMNS, NodeTable
from simsr.store.nodes import Node, encode
from simsr.store.paging import MapFiles, map_name
from simsr.store.segments import Segment
from simsr.store.table_file import SectionWriter, table_name

__all__ = ["CheckpointJob", "Step", "super_name", "read_supers", "sync_supers"]

_NODES_A_SLICE = 24
_PAGE_ROWS = 4096
_PIECE_BYTES = 1 << 20
_MOVE_MIN_BYTES = 4 << 20
_MAP_FILES_MAX = 256  # from here on small map files are merged

Step = Callable[[], None] | None
"""What a job's ``work`` yields: something that blocks and must have run before work goes on; or None, for a pause."""


def super_name(generation: int) -> str:
    return f"super.{generation & 1}"


def write_super(directory: Directory, generation: int, data: bytes) -> None:
    """Write a super block, durably, into the slot of ``generation``."""
    name = super_name(generation)
    file = directory.open(name) if name in directory.names() else directory.create(name, len(data))
    try:
        file.pwritev([data], 0)
        file.datasync()
    finally:
        file.close()
    directory.sync()


def read_supers(directory: Directory) -> list[Super | int]:
    """The valid super blocks, newest first; for one of another format, its version."""
    found: list[Super | int] = []
    for name in ("super.0", "super.1"):
        if name in directory.names():
            file = directory.open(name)
            data = bytearray(file.size_bytes)
            file.pread(memoryview(data), 0)
            file.close()
            block = Super.unpack(bytes(data))
            if block is not None:
                found.append(block)
    return sorted(found, key=lambda block: block.generation if isinstance(block, Super) else 1 << 64, reverse=True)


def sync_supers(directory: Directory) -> None:
    """Make the super blocks durable as they are. Until then nothing that an older one needs may be changed."""
    for name in ("super.0", "super.1"):
        if name in directory.names():
            file = directory.open(name)
            try:
                file.datasync()
            finally:
                file.close()
    directory.sync()


class _Homes:
    """Where the nodes of a checkpoint went: parallel arrays."""

    def __init__(self) -> None:
        self.ids, self.offsets, self.lengths = array("I"), array("Q"), array("H")
        self.crcs, self.mapped = array("I"), array("I")

    def add(self, ident: int, offset: int, length: int, crc: int, mapped: int) -> None:
        self.ids.append(ident)
        self.offsets.append(offset)
        self.lengths.append(length)
        self.crcs.append(crc)
        self.mapped.append(mapped)

    def patch(self, file: int, ids: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Set the homes in a copy of rows; ``ids`` must be sorted."""
        ours = np.frombuffer(self.ids, dtype=np.uint32)
        at = np.searchsorted(ids, ours)
        hit = at < len(ids)
        hit[hit] = ids[at[hit]] == ours[hit]
        at = at[hit]
        columns["file"][at] = file
        for name, values in (("offset", self.offsets), ("length", self.lengths), ("crc", self.crcs), ("mapped", self.mapped)):
            columns[name][at] = np.frombuffer(values, dtype=columns[name].dtype)[hit]


@dataclass
class CheckpointJob:
    """One checkpoint under way. Made by `Store.begin_checkpoint`, carried out by `work`, taken over by `Store.end_checkpoint`."""

    directory: Directory
    table: NodeTable
    files: MapFiles
    flush: FlushJob | None
    position: Position
    uuid: bytes
    generation: int
    geometry: Geometry
    volumes: dict  # what goes into the VOLUMES section
    live: tuple[np.ndarray, np.ndarray]
    table_file: int  # this generation: begin a new one, with everything
    table_offset: int
    table_crc: int
    dead: list[Segment]
    raise_if_stopped: Callable[[], None]
    garbage_maps: list[int] = field(default_factory=list)
    garbage_tables: list[int] = field(default_factory=list)
    removed_maps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.everything = self.table_file == self.generation
        self.homes, self.nodes = _Homes(), list[Node]()
        self._pending: list[bytes] = []
        self._pending_bytes = self.map_bytes = 0
        self._map: File | None = None
        self._sections = SectionWriter(self.table_crc)
        self.table_bytes = 0
        frozen = self.table.freeze()
        self.table.on_frozen = self.encode
        self.moves = self._choose_moves(frozen)
        self.rows = np.fromiter(self.table.changed.union(frozen, self.moves), dtype=np.uint32)
        self.rows.sort()
        self.table.changed = set()
        pinned = self.table.pinned  # by readers that a crash would end
        self._pinned = np.fromiter(pinned.keys(), dtype=np.uint32), np.fromiter(pinned.values(), dtype=np.uint32)
        self._early: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self._pages_left: set[int] = set()
        if self.everything:
            self._pages_left = set(range((self.table.rows + _PAGE_ROWS - 1) // _PAGE_ROWS))
            self.table.on_change = self._before_change
        else:
            self._early.append(self._copy(self.rows))

    def _choose_moves(self, frozen: dict[int, Node]) -> list[int]:
        """The nodes to take along from the map files that hold the most garbage, and from the smallest if there are very many:
        a file for every checkpoint, each with a node that nobody changes any more, is no garbage and still too much to open."""
        files, live = self.files.size_bytes, self.table.bytes_at_home
        spare = sum(files.values()) - 2 * sum(live.values()) - _MOVE_MIN_BYTES
        names = np.frombuffer(self.table.file, dtype=np.uint32)  # 0, which no file has, where there is no node
        chosen: set[int] = set()
        for number in sorted(files, key=lambda number: live[number] / (files[number] + 1)):
            if spare <= 0 or live[number] * 2 > files[number]:
                break
            spare -= files[number]
            chosen.add(number)
        too_many = max(0, len(files) - len(chosen) - _MAP_FILES_MAX)
        chosen.update(sorted(files.keys() - chosen, key=files.__getitem__)[: 2 * too_many])  # two become one
        found = np.flatnonzero(np.isin(names, np.fromiter(chosen, dtype=np.uint32))) if chosen else ()
        return [ident for ident in map(int, found) if ident not in frozen]

    # Rows.

    def _copy(self, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        table = self.table
        columns = {name: np.frombuffer(getattr(table, name), dtype=np.dtype(code))[ids] for name, code in COLUMNS}
        pinned, counts = self._pinned
        at = np.searchsorted(ids, pinned)
        hit = at < len(ids)
        hit[hit] = ids[at[hit]] == pinned[hit]
        columns["refs"][at[hit]] -= counts[hit]
        return ids, columns

    def _copy_page(self, page: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        self._pages_left.discard(page)
        first = page * _PAGE_ROWS
        family = np.frombuffer(self.table.family, dtype=np.uint32)[first : first + _PAGE_ROWS]
        return self._copy((np.flatnonzero(family) + first).astype(np.uint32))

    def _before_change(self, ids: Iterable[int]) -> None:
        """Rows are about to change: those of pages that are still to be written are copied first."""
        if self._pages_left:
            for page in {ident // _PAGE_ROWS for ident in ids} & self._pages_left:
                self._early.append(self._copy_page(page))

    # Nodes.

    def encode(self, node: Node) -> None:
        """Make a frozen node bytes, as it is now."""
        ident = node.ident
        del self.table.frozen[ident]
        self.table.encoded[ident] = node
        self.nodes.append(node)
        data, mapped = encode(node)
        self._put(ident, data, crc32c(data), mapped)

    def _put(self, ident: int, data: bytes, crc: int, mapped: int) -> None:
        self.homes.add(ident, self.map_bytes + self._pending_bytes, len(data), crc, mapped)
        self._pending.append(data)
        self._pending_bytes += len(data)

    @property
    def crc(self) -> int:
        """The running checksum at the end of the table file."""
        return self._sections.crc

    # The work.

    def work(self) -> Iterator[Step]:
        """Everything, in slices. Raises OSError, `StoreStopped`, or `NoSpace`, when nothing refers to what was written yet."""
        try:
            yield from self._slices()
        finally:  # also when a slice has failed and this generator is dropped
            if self._map is not None:
                self._map.close()

    def _slices(self) -> Iterator[Step]:
        if self.garbage_maps or self.garbage_tables:
            yield self._remove_garbage
        frozen = self.table.frozen
        while frozen:
            for _ in range(min(_NODES_A_SLICE, len(frozen))):
                self.encode(next(iter(frozen.values())))
            yield from self._write_when(_PIECE_BYTES)
            yield None
        for first in range(0, len(self.moves), _NODES_A_SLICE):
            yield self._move(self.moves[first : first + _NODES_A_SLICE])
            yield from self._write_when(_PIECE_BYTES)
        yield from self._write_when(1)
        yield self._sync_nodes
        yield from self._write_rows()
        yield self._write_table_and_super

    def _remove_garbage(self) -> None:
        kept = self.files.remove(self.garbage_maps)
        self.removed_maps = [number for number in self.garbage_maps if number not in kept]
        self.garbage_maps = kept
        while self.garbage_tables:
            self.directory.remove(table_name(self.garbage_tables.pop()))

    def _write_when(self, least_bytes: int) -> Iterator[Step]:
        if self._pending_bytes < least_bytes:
            return
        pending, offset = self._pending, self.map_bytes
        self.map_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

        def write() -> None:
            with _NoRoom(self):
                if self._map is None:
                    self._map = self.directory.create(map_name(self.generation), 0)
                self._map.pwritev([b"".join(pending)], offset)

        yield write

    def _move(self, ids: list[int]) -> Step:
        """Take nodes along as bytes. One that cannot be read stays where it is; who needs it will be told."""
        table, wanted = self.table, []
        for ident in ids:
            if table.file[ident] and table.family[ident]:
                wanted.append((ident, self.files.home_of(ident), table.mapped[ident]))

        def move() -> None:
            for ident, home, mapped in wanted:
                try:
                    data = self.files.read(home)
                except (StoreDamaged, OSError):
                    continue
                self._put(ident, bytes(data), home[3], mapped)

        return move

    def _sync_nodes(self) -> None:
        if self.flush is not None:
            self.flush.run()
        if self._map is not None:
            with _NoRoom(self):
                self._map.datasync()

    def _write_rows(self) -> Iterator[Step]:
        """Add the rows to the table file; with everything, page by page."""
        while self._early or self._pages_left:
            ids, columns = self._early.pop() if self._early else self._copy_page(min(self._pages_left))
            self.homes.patch(self.generation, ids, columns)
            if len(ids):
                self._sections.add_rows(ids, columns)
            if self._sections.size_bytes - self.table_bytes >= _PIECE_BYTES:
                yield self._write_sections
            yield None

    def _write_sections(self) -> None:
        name = table_name(self.table_file)
        with _NoRoom(self):
            if self.everything and not self.table_bytes:
                file = self.directory.create(name, 0)
            else:
                file = self.directory.open(name)
            try:
                file.pwritev([b"".join(self._sections.take())], self.table_offset + self.table_bytes)
                self.table_bytes = self._sections.size_bytes
                file.datasync()
            finally:
                file.close()

    def _write_table_and_super(self) -> None:
        slots, counts = self.live
        if len(slots):
            self._sections.add_live(slots, counts)
        p, g = self.position, self.geometry
        # What the super block says too: `simsr salvage` can do without super blocks.
        self.volumes["super"] = [
            self.uuid.hex(), self.generation, g.segment_blocks, g.record_blocks, g.fanout_bits, p.seq, p.log_index,
            p.record_offset, p.prev_crc,
        ]  # fmt: skip
        self._sections.add_volumes(self.volumes)
        self._write_sections()
        self.directory.sync()
        self.raise_if_stopped()  # if another flush has failed meanwhile, ours proves nothing
        end = TableEnd(self.table_file, self.table_offset + self.table_bytes, 0, self._sections.crc)
        block = Super(self.uuid, self.generation, self.geometry, p.seq, p.log_index, p.record_offset, p.prev_crc, end)
        write_super(self.directory, self.generation, block.pack())

    def clean_up(self) -> None:
        """Remove what a checkpoint without room has left."""
        if self._map is not None:
            self._map.close()
        names = [map_name(self.generation), *([table_name(self.table_file)] if self.everything else [])]
        for name in names:
            if name in self.directory.names():
                self.directory.remove(name)


class _NoRoom:
    """Turns "no space left" into `NoSpace`, with nothing left behind."""

    def __init__(self, job: CheckpointJob) -> None:
        self._job = job

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._job.clean_up()
            raise NoSpace(name=self._job.directory.path, reason="there is no room for a checkpoint") from error

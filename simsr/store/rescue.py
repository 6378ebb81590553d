"""Opening a damaged store as far as that is possible, for `simsr salvage`. Nothing is changed on the disk.

Where to begin is tried in this order, newest first: the checkpoints that the super blocks name, and those that are found in the table
files themselves (the last section of each checkpoint says what its super block says). The first whose table can be read counts. If
there is none, the log alone has to do: every volume that was made in the part of it that still hangs together can be rebuilt.

Then map nodes that cannot be read are repaired or replaced (`simsr.store.rebuild`), and the log is replayed as far as it can be
followed. Everything that was wrong on the way is in ``notes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from simsr.errors import StoreDamaged, StoreFormat
from simsr.store import layout
from simsr.store.checkpoint import read_supers, super_name
from simsr.store.files import Area, Directory, File
from simsr.store.layout import BLOCK, Geometry, Record, SegmentHeader, Super, TableEnd
from simsr.store.log import Log, Position
from simsr.store.node_table import MapMemory
from simsr.store.rebuild import Repair
from simsr.store.recovery import Scan, Tail, find_tail
from simsr.store.segments import Segment, State
from simsr.store.store import Create, Delete, Op, Reset, Resize, SetMeta, Store, decode_ops
from simsr.store.table_file import VOLUMES, read_sections, table_files, table_name

__all__ = ["Rescued", "rescue", "LenientDirectory"]

_PIECE = 4096


class _LenientFile:
    """A file of which what cannot be read is zeros: everything in a store has a checksum, so it does not pass for data."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.size_bytes = file.size_bytes
        self.close = file.close

    def pread(self, view: memoryview, offset: int) -> None:
        try:
            self._file.pread(view, offset)
        except OSError:
            for at in range(0, len(view), _PIECE):
                self._pread_piece(view[at : at + _PIECE], offset + at)

    def _pread_piece(self, view: memoryview, offset: int) -> None:
        count = max(0, min(len(view), self.size_bytes - offset))
        view[count:] = bytes(len(view) - count)
        try:
            if count:
                self._file.pread(view[:count], offset)
        except OSError:
            view[:] = bytes(len(view))

    def pread_disk(self, view: memoryview, offset: int) -> None:
        self.pread(view, offset)

    def read_cached(self, view: memoryview, offset: int) -> bool:
        return False

    def will_need(self, offset: int, length: int) -> None:
        self._file.will_need(offset, length)

    def pwritev(self, buffers: Sequence, offset: int) -> None:
        raise AssertionError("nothing is written to a store that is being salvaged")

    def area(self, offset: int, length: int) -> Area:
        raise AssertionError("nothing is written to a store that is being salvaged")

    def datasync(self) -> None:
        raise AssertionError("nothing is written to a store that is being salvaged")


class LenientDirectory:
    """A directory whose files are read as far as they can be."""

    def __init__(self, directory: Directory) -> None:
        self.path = directory.path
        self._directory = directory
        self.lock, self.names, self.close = directory.lock, directory.names, directory.close

    def open(self, name: str) -> File:
        return _LenientFile(self._directory.open(name))

    def free_bytes(self) -> int:
        return 0

    def create(self, name: str, size_bytes: int) -> File:
        raise AssertionError("nothing is written to a store that is being salvaged")

    def remove(self, name: str) -> None:
        raise AssertionError("nothing is written to a store that is being salvaged")

    def sync(self) -> None:
        raise AssertionError("nothing is written to a store that is being salvaged")


@dataclass
class Rescued:
    """A store as far as it could be opened. Entries that name segment ``lost_slot`` stand for what is lost."""

    store: Store
    lost_slot: int
    seq: int  # the state is the one after this record
    is_older: bool  # later records had been flushed, and cannot be followed
    notes: list[str] = field(default_factory=list)
    missing: dict[int, str] = field(default_factory=dict)  # volumes that are known to exist, and why they cannot be had


def rescue(directory: Directory, memory: MapMemory | None = None) -> Rescued:
    """Open what is there. Raises `StoreLocked`, `StoreFormat` (not a store, or of another version), OSError."""
    directory.lock()
    try:
        return _rescue(LenientDirectory(directory), memory)
    except BaseException:
        directory.close()
        raise


def _rescue(directory: LenientDirectory, memory: MapMemory | None) -> Rescued:
    notes: list[str] = []
    supers = read_supers(directory)
    if supers and not any(isinstance(block, Super) for block in supers):
        reason = f"its format is version {supers[0]}, this simsr knows version {layout.FORMAT_VERSION}"
        raise StoreFormat(path=directory.path, reason=reason)
    if not any(name.startswith(("super.", "table-", "seg-")) for name in directory.names()):
        raise StoreFormat(path=directory.path, reason="there is no store in this directory")
    supers = [block for block in supers if isinstance(block, Super)]
    good = {super_name(block.generation) for block in supers}
    notes += [f"{name} is not valid" for name in ("super.0", "super.1") if name not in good]
    known_seq = max([0, *(block.seq for block in supers)])
    from_tables = _checkpoints_in_tables(directory, notes)
    ends = {block.end for block in supers}
    candidates = supers + [block for block in from_tables if block.end not in ends]
    candidates.sort(key=lambda block: (block.seq, block.generation), reverse=True)
    for block in candidates:
        store = Store(directory, block.uuid, block.geometry, memory)
        store.log = Log(store.pool, directory.path, Position(0, 1, layout.HEADER_BYTES, 0))
        try:
            store._load(block)
        except (StoreDamaged, OSError) as error:
            notes.append(f"checkpoint {block.generation}: {getattr(error, 'details', {}).get('reason', error)}")
            store._let_go()
            continue
        return _from_checkpoint(store, block, known_seq, notes)
    notes.append("no checkpoint can be read; what follows was rebuilt from the log alone")
    return _from_log(directory, memory, supers, notes)


def _checkpoints_in_tables(directory: Directory, notes: list[str]) -> list[Super]:
    """The last checkpoint that each table file holds in one piece, as its super block has, or had, it."""
    found = []
    for number in table_files(directory):
        file = directory.open(table_name(number))
        size_bytes = file.size_bytes
        file.close()
        last = None
        try:
            for section in read_sections(directory, TableEnd(number, size_bytes, 0, 0)):
                if section.kind == VOLUMES and "super" in (table := section.volumes()):
                    uuid, generation, blocks, records, bits, seq, log_index, offset, prev_crc = table["super"]
                    geometry = Geometry(blocks, records, bits)
                    last = Super(bytes.fromhex(uuid), generation, geometry, seq, log_index, offset, prev_crc, section.end)
        except StoreDamaged:  # the end of what can be read; the checksum of the whole was not known here
            pass
        if last is not None:
            found.append(last)
    return found


def _adopt(store: Store, notes: list[str]) -> list[tuple[Segment, bytes]]:
    found = store.pool.adopt(notes)
    for segment, _ in found:
        segment.state = State.SEALED
    store.log.failure = "the store is being salvaged"
    return found


def _from_checkpoint(store: Store, block: Super, known_seq: int, notes: list[str]) -> Rescued:
    found = _adopt(store, notes)
    tail = find_tail(found, block, known_seq, store.directory.path, notes)
    store.maps.survey()
    lost_slot = len(store.pool.by_slot)
    store.usage.reserve(lost_slot)
    with store.table.waiting():
        Repair(store, block.seq, lost_slot, notes).run()
        _replay(store, tail, notes, {})
    return Rescued(store, lost_slot, tail.end.seq, tail.cut_short, notes)


# From the log alone.


def _from_log(directory: Directory, memory: MapMemory | None, supers: list[Super], notes: list[str]) -> Rescued:
    block = supers[0] if supers else _guess(directory)
    if block is None:
        raise StoreDamaged(path=directory.path, reason="there is no valid super block, table file or segment in it")
    store = Store(directory, block.uuid, block.geometry, memory)
    store.log = Log(store.pool, directory.path, Position(0, 1, layout.HEADER_BYTES, 0))
    found = _adopt(store, notes)
    start = _start_of_log(found, block)
    if start.seq:
        notes.append(f"the log does not reach back to the beginning: records up to {start.seq} are gone")
    tail = find_tail(found, start, max(known.seq for known in [start, *supers]), directory.path, notes)
    lost_slot = len(store.pool.by_slot)
    store.usage.reserve(lost_slot)
    rescued = Rescued(store, lost_slot, tail.end.seq, tail.cut_short, notes)
    with store.table.waiting():
        _replay(store, tail, notes, rescued.missing)
    return rescued


def _guess(directory: Directory) -> Super | None:
    """Uuid and geometry, by the segments: the size of the files, and the least data block that a record names."""
    best = None
    for name in directory.names():
        if not name.startswith("seg-"):
            continue
        file = directory.open(name)
        area = memoryview(bytearray(min(file.size_bytes, 1 << 24)))
        file.pread(area, 0)
        file.close()
        header = SegmentHeader.unpack(bytes(area[: layout.HEADER_BYTES])) if len(area) >= layout.HEADER_BYTES else None
        if header is None:
            continue
        salt, at = layout.salt_of(header.uuid, header.log_index), layout.HEADER_BYTES
        while record := layout.unpack_record(area, at, salt):
            at += record.size
            if record.kind in (layout.EXTENTS, layout.SUMMARY) and 0 < record.data_block:
                geometry = Geometry(file.size_bytes // BLOCK, record.data_block)
                if geometry.valid() and (best is None or record.data_block < best.geometry.record_blocks):
                    best = Super(header.uuid, 0, geometry, 0, 1, layout.HEADER_BYTES, 0, TableEnd(0, 0, 0, 0))
                break
    return best


def _start_of_log(found: list[tuple[Segment, bytes]], block: Super) -> Super:
    """A super block for the beginning of the longest part of the log that hangs together up to its end."""
    headers = []
    for segment, data in found:
        header = SegmentHeader.unpack(data)
        if header is not None and header.uuid == block.uuid and not header.survivors:
            headers.append((header.log_index, segment, header))
    headers.sort(key=lambda item: item[0], reverse=True)
    start: SegmentHeader | None = None
    for _, segment, header in headers:
        scan = Scan(segment, header, block.uuid, block.geometry.record_area_bytes)
        last = {header.first_seq - 1: header.prev_crc}
        last.update((r.seq, r.crc) for _, r in scan.follow(layout.HEADER_BYTES, header.first_seq - 1, header.prev_crc))
        if start is None or last.get(start.first_seq - 1) == start.prev_crc:
            start = header
    if start is None:
        return Super(block.uuid, 0, block.geometry, 0, 1, layout.HEADER_BYTES, 0, block.end)
    seq = start.first_seq - 1
    return Super(block.uuid, 0, block.geometry, seq, start.log_index, layout.HEADER_BYTES, start.prev_crc, block.end)


# Replay.


def _replay(store: Store, tail: Tail, notes: list[str], missing: dict[int, str]) -> None:
    """As `Store` does, leaving out what cannot be done; volumes that are not there go to ``missing``."""
    shift = store.geometry.segment_shift
    for segment, record in tail.records:
        if record.kind == layout.EXTENTS:
            if record.volume in store.volumes:
                extents, crcs = layout.unpack_extents(record.payload)
                store.usage.reserve(segment.slot)
                store.volumes[record.volume].apply(extents, crcs, segment.slot << shift | record.data_block)
            else:
                missing[record.volume] = "it was made before the part of the log that is left"
        elif record.kind == layout.COMMIT:
            _commit(store, decode_ops(record.payload), missing)
        elif record.kind == layout.MOVED:
            _move(store, record, notes)


def _move(store: Store, record: Record, notes: list[str]) -> None:
    try:
        store.cleaner.replay(record.payload)
    except StoreDamaged as error:  # the blocks may still be where they were
        notes.append(f"record {record.seq}: {error.details['reason']}")


def _commit(store: Store, ops: list[Op], missing: dict[int, str]) -> None:
    """Apply what can be: a volume whose content is not known goes, and so does what was made of it."""
    for op in ops:
        ident = op.ident
        source = op.source if isinstance(op, Create | Reset) else None
        if source is not None and source not in store.volumes:
            missing[ident] = f"it has the content of volume {source}, of which the beginning is gone"
            if ident in store.volumes:
                store._apply([Delete(ident)])
        elif isinstance(op, Create) or ident in store.volumes or (isinstance(op, SetMeta) and not ident):
            store._apply([op])
        elif isinstance(op, Delete):
            missing.pop(ident, None)
        elif isinstance(op, Resize | Reset | SetMeta):
            missing.setdefault(ident, "it was made before the part of the log that is left")

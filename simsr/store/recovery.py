"""Recovery: find the end of the log, and tell a torn tail from damage.

Starting at the position of the checkpoint, records are followed as long as they are valid: right salt, right sequence
number, checksum of the predecessor, own checksum. Where that ends, one question decides: had anything from there on been
flushed? Every valid record and segment header says how far the log was durable when it was written, so all that can still
be read behind the end is searched for the highest ``durable_seq``.

* Nothing from there on had been flushed: it is the torn tail of a crash. It is dropped, as the durability contract allows.
* Something had: the disk lost what it had promised to keep. The store refuses to open, names segment and offset, and
  changes nothing.

A segment continues the log if its header names the checksum of the record before its first one. That record need not be
the last one that can be read: a recovery that drops a torn tail goes on after the record that it kept, in a segment of its
own. This is seen again only when the super block of that recovery is lost and the one before it has to do.

Records after ``durable_seq`` count only if their data blocks are there too, by checksum: after a power cut a record may
have reached the disk without its data. The result is always a prefix of the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simsr.errors import StoreDamaged
from simsr.store import layout
from simsr.store.contents import read_summary
from simsr.store.layout import BLOCK, Record, SegmentHeader, Super, block_crcs
from simsr.store.log import Position
from simsr.store.segments import Segment, segment_name

__all__ = ["Tail", "Scan", "find_tail"]

_INDEXES_NEAR = 1024


@dataclass
class Tail:
    """The records to replay, in order, each with its segment; and what was dropped behind them."""

    records: list[tuple[Segment, Record]]
    end: Position  # where the log goes on: in a fresh segment
    dropped_records: int
    cut_short: bool  # what had been flushed is not all there, and that was tolerated


class Scan:
    """One segment of the log, read into memory."""

    def __init__(self, segment: Segment, header: SegmentHeader, uuid: bytes, area_bytes: int) -> None:
        self.segment, self.header = segment, header
        self.salt = layout.salt_of(uuid, header.log_index)
        self.area = memoryview(bytearray(area_bytes))
        segment.file.pread(self.area, 0)

    def follow(self, offset: int, seq: int, prev_crc: int) -> Iterator[tuple[int, Record]]:
        """The chain of valid records from ``offset`` on; ``seq`` and ``prev_crc`` belong to the record before it."""
        while record := layout.unpack_record(self.area, offset, self.salt):
            if record.seq != seq + 1 or record.prev_crc != prev_crc:
                return
            yield offset, record
            offset, seq, prev_crc = offset + record.size, record.seq, record.crc

    def search(self, offset: int) -> Iterator[Record]:
        """Every valid record from ``offset`` on, wherever it stands."""
        needle = self.salt.to_bytes(4, "little")
        data = self.area.obj
        position = data.find(needle, offset)
        while position >= 0:
            start = position - layout.SALT_AT
            if start >= offset and start % layout.RECORD_UNIT == 0:
                record = layout.unpack_record(self.area, start, self.salt)
                if record is not None:
                    yield record
            position = data.find(needle, position + 1)


def _headers(
    found: list[tuple[Segment, bytes]], block: Super, path: str, tolerated: list[str] | None
) -> Iterator[tuple[Segment, SegmentHeader]]:
    """The headers of the segments that are, or were, in use. One that is neither blank nor valid is damage."""
    damaged, indexes = [], set()
    for segment, data in found:
        header = SegmentHeader.unpack(data)
        if header is not None and header.uuid == block.uuid:
            indexes.add(header.log_index)
            yield segment, header
        elif any(data):
            reason = f"the header of {segment_name(segment.slot)} (offset 0) is not valid"
            if tolerated is None:
                raise StoreDamaged(path=path, reason=reason)
            damaged.append((segment, reason))
    for segment, reason in damaged:
        header = _rebuilt_header(segment, block, indexes)
        tolerated.append(reason + (", but its records tell what it was" if header else ""))
        if header is not None:
            yield segment, header


def _rebuilt_header(segment: Segment, block: Super, indexes: set[int]) -> SegmentHeader | None:
    """What the header must have been, by the first record: that has its salt, which only the right log index gives."""
    area = memoryview(bytearray(block.geometry.record_area_bytes))
    segment.file.pread(area, 0)
    at = layout.HEADER_BYTES + layout.SALT_AT
    salt = int.from_bytes(area[at : at + 4], "little")
    record = layout.unpack_record(area, layout.HEADER_BYTES, salt)
    if record is None:
        return None
    for near in sorted({block.log_index, *indexes}, reverse=True):
        for index in range(max(1, near - _INDEXES_NEAR), near + _INDEXES_NEAR):
            if layout.salt_of(block.uuid, index) == salt:
                survivors = record.kind == layout.SUMMARY
                return SegmentHeader(block.uuid, index, record.seq, 0, record.prev_crc, survivors)
    return None


def _log_segments(
    found: list[tuple[Segment, bytes]], block: Super, path: str, tolerated: list[str] | None
) -> list[tuple[Segment, SegmentHeader]]:
    """The segments from the checkpoint on, in log order."""
    segments = []
    for segment, header in _headers(found, block, path, tolerated):
        segment.log_index, segment.first_seq = header.log_index, header.first_seq
        segment.age_seq, segment.survivors = header.first_seq, header.survivors
        segment.salt = layout.salt_of(block.uuid, header.log_index)
        if header.log_index >= block.log_index and not header.survivors:
            segments.append((segment, header))
    return sorted(segments, key=lambda item: item[1].log_index)


def find_tail(
    found: list[tuple[Segment, bytes]], block: Super, durable_seq: int, path: str, tolerated: list[str] | None = None
) -> Tail:
    """Return what has to be replayed after the checkpoint of ``block``; the log was durable at least up to
    ``durable_seq``. Raises `StoreDamaged`; changes nothing.

    ``tolerated``: a list for what is wrong instead, for `simsr salvage`; the tail then ends where the log can be followed no more.
    """
    area_bytes = block.geometry.record_area_bytes
    scans = [
        Scan(segment, header, block.uuid, area_bytes) for segment, header in _log_segments(found, block, path, tolerated)
    ]
    records: list[tuple[Segment, int, Record]] = []
    crcs = {block.seq: block.prev_crc}  # of the records followed so far
    end_scan, end_offset = None, layout.HEADER_BYTES
    for scan in scans:
        last, offset = scan.header.first_seq - 1, layout.HEADER_BYTES
        if scan.header.log_index == block.log_index and block.record_offset != offset:
            last, offset = block.seq, block.record_offset
        elif crcs.get(last) != scan.header.prev_crc:
            continue
        records = [entry for entry in records if entry[2].seq <= last]
        for offset, record in scan.follow(offset, last, crcs[last]):
            records.append((scan.segment, offset, record))
            crcs[record.seq] = record.crc
            offset += record.size
        end_scan, end_offset = scan, offset
    seq = records[-1][2].seq if records else block.seq
    durable_seq = max([durable_seq, *(scan.header.durable_seq for scan in scans), *(r.durable_seq for *_, r in records)])
    dropped = 0
    behind = scans[scans.index(end_scan) :] if end_scan else scans
    for scan in behind:
        for record in scan.search(end_offset if scan is end_scan else layout.HEADER_BYTES):
            if record.seq > seq:
                dropped += 1
                durable_seq = max(durable_seq, record.durable_seq)
    if durable_seq > seq:
        last_scan = end_scan or (scans[0] if scans else None)
        where = f"{segment_name(last_scan.segment.slot)} at offset {end_offset}" if last_scan else "a segment is missing"
        reason = f"{where}: record {seq + 1} is not valid, but records up to {durable_seq} had been flushed"
        if tolerated is None:
            raise StoreDamaged(path=path, reason=reason)
        tolerated.append(reason)
    by_slot: list[Segment | None] = [None] * (1 + max([0, *(segment.slot for segment, _ in found)]))
    for segment, _ in found:
        by_slot[segment.slot] = segment
    kept = _with_data(records, durable_seq, by_slot)
    dropped += len(records) - len(kept)
    # A power cut may have taken headers and left records behind them: no log index, hence no salt, may be used twice.
    next_index = max([(block.generation + 1) << 32, *(segment.log_index + 1 for segment, _ in found)])
    last_seq, last_crc = (kept[-1][1].seq, kept[-1][1].crc) if kept else (block.seq, block.prev_crc)
    return Tail(kept, Position(last_seq, next_index, layout.HEADER_BYTES, last_crc), dropped, durable_seq > seq)


def _with_data(
    records: list[tuple[Segment, int, Record]], durable_seq: int, by_slot: list[Segment | None]
) -> list[tuple[Segment, Record]]:
    """The records up to the first one behind ``durable_seq`` whose data blocks are not on the disk."""
    kept = []
    for segment, _, record in records:
        if record.seq > durable_seq and not _has_data(segment, record, by_slot):
            break
        kept.append((segment, record))
    return kept


def _has_data(segment: Segment, record: Record, by_slot: list[Segment | None]) -> bool:
    if record.kind == layout.EXTENTS:
        _, crcs = layout.unpack_extents(record.payload)
        first = record.data_block
    elif record.kind == layout.MOVED:
        slot, offset, crc = layout.unpack_moved(record.payload)
        summary = read_summary(by_slot, slot, offset, crc)
        if summary is None:
            return False
        segment, first, crcs = by_slot[slot], summary.data_block, layout.Moves.unpack(summary.payload).crcs
    else:
        return True
    data = memoryview(bytearray(len(crcs) * BLOCK))
    if crcs:
        segment.file.pread(data, first * BLOCK)
    return list(block_crcs(data)) == crcs.tolist()

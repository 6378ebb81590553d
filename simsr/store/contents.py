"""What is in a segment: every block that its records tell of, whether anything still refers to it or not."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simsr.store import layout
from simsr.store.layout import COUNT_MASK, HOLE, START_SHIFT, Moves
from simsr.store.segments import Segment

__all__ = ["Blocks", "blocks_in", "records_in", "read_summary"]


@dataclass
class Blocks:
    """Parallel arrays, one entry for each block: family and block number of the disk, block in the segment, CRC-32C, birth (`Moves`)."""

    families: np.ndarray
    numbers: np.ndarray
    places: np.ndarray
    crcs: np.ndarray
    births: np.ndarray


def records_in(area: memoryview, salt: int) -> Iterator[tuple[int, layout.Record]]:
    """The records of a record area, in order, each with its offset, as far as they follow each other."""
    offset = layout.HEADER_BYTES
    while record := layout.unpack_record(area, offset, salt):
        yield offset, record
        offset += record.size


def blocks_in(area: memoryview, segment: Segment) -> Blocks:
    """All blocks that the records of a segment name. O(blocks)."""
    families, numbers, places, crcs, births = [], [], [], [], []
    for _, record in records_in(area, segment.salt):
        moved = array("Q")
        if record.kind == layout.EXTENTS:
            extents, sums = layout.unpack_extents(record.payload)
            spans = [(extent >> START_SHIFT, extent & COUNT_MASK) for extent in extents if not extent & HOLE]
            if not spans:
                continue
            numbers += [np.arange(first, first + count, dtype=np.uint64) for first, count in spans]
            families.append(np.full(len(sums), layout.family_of_extents(record.payload), dtype=np.uint32))
            crcs.append(np.frombuffer(sums, dtype=np.uint32))
        elif record.kind == layout.SUMMARY:
            moves = Moves.unpack(record.payload)
            sums, moved = moves.crcs, moves.births
            families.append(np.frombuffer(moves.families, dtype=np.uint32))
            numbers.append(np.frombuffer(moves.blocks, dtype=np.uint64))
            crcs.append(np.frombuffer(sums, dtype=np.uint32))
        else:
            continue
        places.append(np.arange(record.data_block, record.data_block + len(sums), dtype=np.uint32))
        births.append(np.frombuffer(moved, dtype=np.uint64).reshape(-1, 2) if moved else _born_here(segment, places[-1]))

    def joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)

    return Blocks(
        joined(families, np.uint32), joined(numbers, np.uint64), joined(places, np.uint32), joined(crcs, np.uint32),
        joined([np.zeros((0, 2), dtype=np.uint64), *births], np.uint64),
    )  # fmt: skip


def _born_here(segment: Segment, places: np.ndarray) -> np.ndarray:
    births = np.empty((len(places), 2), dtype=np.uint64)
    births[:, 0], births[:, 1] = segment.log_index, places
    return births


def read_summary(by_slot: list[Segment | None], slot: int, offset: int, crc: int) -> layout.Record | None:
    """The SUMMARY record that a MOVED record names, or None if it is not there. Blocks."""
    segment = by_slot[slot] if 0 < slot < len(by_slot) else None
    if segment is None or offset < layout.HEADER_BYTES:
        return None
    head = bytearray(layout.RECORD_BYTES)
    if offset + len(head) > segment.file.size_bytes:
        return None
    segment.file.pread(memoryview(head), offset)
    size_bytes = int.from_bytes(head[4:6], "little") * layout.RECORD_UNIT
    if not len(head) <= size_bytes <= segment.file.size_bytes - offset:
        return None
    area = bytearray(size_bytes)
    segment.file.pread(memoryview(area), offset)
    record = layout.unpack_record(memoryview(area), 0, segment.salt)
    return record if record is not None and record.crc == crc and record.kind == layout.SUMMARY else None

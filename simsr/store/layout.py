"""What the bytes on disk mean: super blocks, segment headers, records, map nodes. docs/on-disk.md has the tables.

Everything is little endian. Everything carries a CRC-32C over itself (the field ``crc`` counts as zero), and
everything that lives in a place that is used again carries a salt or a number that changes with each use, so that old
bytes are never taken for new ones. Functions here only translate; they never read or write files.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from crc32c import crc32c

__all__ = [
    "FORMAT_VERSION",
    "BLOCK",
    "ZERO_BLOCK",
    "ZERO_CRC",
    "Geometry",
    "TableEnd",
    "Super",
    "SegmentHeader",
    "Record",
    "EXTENTS",
    "COMMIT",
    "MARK",
    "MOVED",
    "SUMMARY",
    "HOLE",
    "Moves",
    "block_crcs",
    "pack_extents",
    "family_of_extents",
    "unpack_extents",
    "pack_record",
    "unpack_record",
]

if sys.byteorder != "little":
    raise ImportError("simsr's disk format is little endian, and it has not been taught to run on this machine")

FORMAT_VERSION = 2
BLOCK = 4096
ZERO_BLOCK = bytes(BLOCK)
ZERO_CRC = crc32c(ZERO_BLOCK)

SUPER_BYTES = 4096
_SUPER_MAGIC = b"SIMSRSUP"
_SUPER = struct.Struct("<8sII16sQIIIIQQIIIQII")
_HEADER_MAGIC = b"SIMSRSEG"
_HEADER = struct.Struct("<8sII16sQQQII")
HEADER_BYTES = 64

_RECORD = struct.Struct("<IHBBQQIIII")
RECORD_BYTES = _RECORD.size  # 40
SALT_AT = 28
RECORD_UNIT = 8
MAX_RECORD_BYTES = 0xFFFF * RECORD_UNIT

EXTENTS, COMMIT, MARK, MOVED, SUMMARY = 1, 2, 3, 4, 5
HOLE = 1 << 27
COUNT_MASK = HOLE - 1
START_SHIFT = 28

_SLICES = [slice(at, at + BLOCK) for at in range(0, 1 << 20, BLOCK)]


def block_crcs(view: memoryview) -> Iterator[int]:
    """The CRC-32C of each block of ``view``, which is whole blocks. Costs 0.3 µs a block, most of it for the bytes: no Python is run
    for a block, and what stands for it is gone before the next."""
    blocks = len(view) // BLOCK
    slices = _SLICES[:blocks] if blocks <= len(_SLICES) else [slice(at, at + BLOCK) for at in range(0, len(view), BLOCK)]
    return map(crc32c, map(view.__getitem__, slices))


@dataclass(frozen=True)
class Geometry:
    """Sizes fixed when a store is made. Tests make them tiny so that every edge is reached early.

    ``segment_blocks``: blocks of 4 KiB in a segment file, the record area included.
    ``record_blocks``: blocks at its start that hold the header and the records.
    ``fanout_bits``: base-two logarithm of the entries of a map node.
    """

    segment_blocks: int = 8192
    record_blocks: int = 128
    fanout_bits: int = 9

    @property
    def segment_bytes(self) -> int:
        return self.segment_blocks * BLOCK

    @property
    def record_area_bytes(self) -> int:
        return self.record_blocks * BLOCK

    @property
    def segment_shift(self) -> int:
        return (self.segment_blocks - 1).bit_length()

    def valid(self) -> bool:
        return (
            8 <= self.segment_blocks <= 1 << 20
            and self.segment_blocks & (self.segment_blocks - 1) == 0
            and 1 <= self.record_blocks < self.segment_blocks
            and 1 <= self.fanout_bits <= 12
        )


@dataclass(frozen=True)
class TableEnd:
    """Where the last checkpoint ends: table file ``file`` up to ``offset``, and the running CRC-32C there. ``length`` is 0."""

    file: int
    offset: int
    length: int
    crc: int


@dataclass(frozen=True)
class Super:
    """The root of everything: which checkpoint holds, and where in the log replay begins after it."""

    uuid: bytes
    generation: int
    geometry: Geometry
    seq: int  # the last record that the checkpoint includes
    log_index: int  # replay begins in the segment with this log index ...
    record_offset: int  # ... at this offset of its record area
    prev_crc: int  # CRC of record `seq`
    end: TableEnd

    def pack(self) -> bytes:
        g, r = self.geometry, self.end
        fields = (
            _SUPER_MAGIC, FORMAT_VERSION, BLOCK, self.uuid, self.generation, g.segment_blocks, g.record_blocks,
            g.fanout_bits, self.record_offset, self.seq, self.log_index, self.prev_crc, r.file, r.length, r.offset, r.crc,
        )  # fmt: skip
        body = _SUPER.pack(*fields, 0)[:-4]
        return (body + struct.pack("<I", crc32c(body))).ljust(SUPER_BYTES, b"\0")

    @staticmethod
    def unpack(data: bytes) -> Super | int | None:
        """Return the super block; or its format version if that is not ours; or None if it is not valid."""
        if len(data) < SUPER_BYTES or data[:8] != _SUPER_MAGIC:
            return None
        version = struct.unpack_from("<I", data, 8)[0]
        (crc,) = struct.unpack_from("<I", data, _SUPER.size - 4)
        if crc32c(data[: _SUPER.size - 4]) != crc:
            return None
        if version != FORMAT_VERSION:
            return version
        f = _SUPER.unpack_from(data)
        geometry = Geometry(f[5], f[6], f[7])
        if f[2] != BLOCK or not geometry.valid():
            return None
        return Super(f[3], f[4], geometry, f[9], f[10], f[8], f[11], TableEnd(f[12], f[14], f[13], f[15]))


def salt_of(uuid: bytes, log_index: int) -> int:
    """The salt of one life of a segment: records of an earlier life of the same file never pass for this one's."""
    return crc32c(struct.pack("<16sQ", uuid, log_index))


@dataclass(frozen=True)
class SegmentHeader:
    """The first bytes of a segment in use. ``log_index`` rises from segment to segment, by more than one where the store
    was opened anew, and is never used twice."""

    uuid: bytes
    log_index: int
    first_seq: int
    durable_seq: int
    prev_crc: int
    survivors: bool = False  # filled by the cleaner, not by the log

    def pack(self) -> bytes:
        fields = (_HEADER_MAGIC, FORMAT_VERSION, self.survivors, self.uuid, self.log_index, self.first_seq, self.durable_seq)
        body = _HEADER.pack(*fields, self.prev_crc, 0)[:-4]
        return (body + struct.pack("<I", crc32c(body))).ljust(HEADER_BYTES, b"\0")

    @staticmethod
    def unpack(data: bytes) -> SegmentHeader | None:
        f = _HEADER.unpack_from(data)
        if f[0] != _HEADER_MAGIC or f[1] != FORMAT_VERSION or crc32c(data[: _HEADER.size - 4]) != f[8]:
            return None
        return SegmentHeader(f[3], f[4], f[5], f[6], f[7], bool(f[2]))


@dataclass(frozen=True)
class Record:
    """A decoded record. ``data_block``: first block of its payload in the segment; ``size`` in bytes, padding included."""

    kind: int
    seq: int
    durable_seq: int
    prev_crc: int
    volume: int
    data_block: int
    payload: bytes
    crc: int
    size: int


def pack_record(kind: int, seq: int, durable_seq: int, prev: int, salt: int, volume: int, data_block: int, payload: bytes):
    """Return (bytes of the record, its CRC)."""
    units = (RECORD_BYTES + len(payload) + RECORD_UNIT - 1) // RECORD_UNIT
    body = _RECORD.pack(0, units, kind, 0, seq, durable_seq, prev, salt, volume, data_block) + payload
    body += bytes(units * RECORD_UNIT - len(body))
    crc = crc32c(body)
    return struct.pack("<I", crc) + body[4:], crc


def unpack_record(area: memoryview, offset: int, salt: int) -> Record | None:
    """Return the record at ``offset`` of a record area, or None if there is no valid one of this life."""
    if offset + RECORD_BYTES > len(area):
        return None
    crc, units, kind, _flags, seq, durable, prev, found_salt, volume, data_block = _RECORD.unpack_from(area, offset)
    size = units * RECORD_UNIT
    if found_salt != salt or size < RECORD_BYTES or offset + size > len(area):
        return None
    body = bytes(area[offset : offset + size])
    if crc32c(body[4:], crc32c(b"\0\0\0\0")) != crc:
        return None
    return Record(kind, seq, durable, prev, volume, data_block, body[RECORD_BYTES:], crc, size)


def pack_extents(extents: list[int], crcs: array, family: int) -> bytes:
    """The payload of an EXTENTS record: counts, extents (`START_SHIFT`, `HOLE`), one CRC-32C for each data block.

    ``family``: of the volume's map, which the cleaner needs when the volume is gone.
    """
    return struct.pack("<III4x", len(extents), len(crcs), family) + array("Q", extents).tobytes() + crcs.tobytes()


def family_of_extents(payload: bytes) -> int:
    """The family in an EXTENTS record."""
    return struct.unpack_from("<I", payload, 8)[0]


def unpack_extents(payload: bytes) -> tuple[array, array]:
    """The extents and the checksums of an EXTENTS record."""
    n_extents, n_crcs = struct.unpack_from("<II", payload)
    middle = 16 + 8 * n_extents
    return array("Q", payload[16:middle]), array("I", payload[middle : middle + 4 * n_crcs])


_MOVED = struct.Struct("<III4x")


def pack_moved(slot: int, offset: int, crc: int) -> bytes:
    """The payload of a MOVED record: the segment of survivors, the offset of the SUMMARY there, and its checksum."""
    return _MOVED.pack(slot, offset, crc)


def unpack_moved(payload: bytes) -> tuple[int, int, int]:
    """(segment, offset of the SUMMARY in its record area, checksum of the SUMMARY)"""
    return _MOVED.unpack_from(payload)


@dataclass(frozen=True)
class Moves:
    """The payload of a SUMMARY record: whose blocks were moved, from where, and the CRC-32C and the birth of each. They lie in a row.

    A birth is what tells a block from all others that were ever written to the store: the log index of the segment that it was first written
    to, and its place there. ``births`` has these two for each block; it is empty in a record that was written before there were any.
    """

    families: array
    blocks: array
    old: array
    crcs: array
    births: array

    @staticmethod
    def empty() -> Moves:
        return Moves(array("I"), array("Q"), array("I"), array("I"), array("Q"))

    def add(self, family: int, block: int, old: int, crc: int, birth: list[int]) -> None:
        self.families.append(family)
        self.blocks.append(block)
        self.old.append(old)
        self.crcs.append(crc)
        self.births.extend(birth)

    def part(self, first: int, count: int) -> Moves:
        """``count`` of them from ``first`` on."""
        columns = (self.families, self.blocks, self.old, self.crcs)
        return Moves(*(column[first : first + count] for column in columns), self.births[2 * first : 2 * (first + count)])

    def __len__(self) -> int:
        return len(self.blocks)

    def pack(self) -> bytes:
        parts = (self.blocks, self.families, self.old, self.crcs, self.births)
        return struct.pack("<I4x", len(self)) + b"".join(part.tobytes() for part in parts)

    @staticmethod
    def unpack(payload: bytes) -> Moves:
        (count,) = struct.unpack_from("<I", payload)
        at, parts = 8, []
        for code, width in (("Q", 8), ("I", 4), ("I", 4), ("I", 4), ("Q", 16)):
            whole = at + width * count <= len(payload)  # the padding of an old record is less than one birth
            parts.append(array(code, payload[at : at + width * count] if whole else b""))
            at += width * count
        return Moves(parts[1], parts[0], parts[2], parts[3], parts[4])


MOVE_BYTES = 36
"""What a block takes in a SUMMARY."""

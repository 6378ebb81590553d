"""What the bytes mean: everything comes back as it was packed, and nothing that was changed by a bit comes back at all."""

from __future__ import annotations

import random
import struct

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import TINY, UUID

from simsr.store import layout
from simsr.store.layout import EXTENTS, HOLE, Geometry, SegmentHeader, Super, TableEnd

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
uuids = st.binary(min_size=16, max_size=16)
geometries = st.builds(
    Geometry, st.integers(3, 20).map(lambda bits: 1 << bits), st.integers(1, 7), st.integers(1, 12)
).filter(Geometry.valid)
supers = st.builds(Super, uuids, u64, geometries, u64, u64, u32, u32, st.builds(TableEnd, u32, u64, u32, u32))
headers = st.builds(SegmentHeader, uuids, u64, u64, u64, u32)

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@quick
@given(supers)
def test_super_round_trip(block):
    data = block.pack()
    assert len(data) == layout.SUPER_BYTES and Super.unpack(data) == block


@quick
@given(headers)
def test_segment_header_round_trip(header):
    data = header.pack()
    assert len(data) == layout.HEADER_BYTES and SegmentHeader.unpack(data) == header


@quick
@given(st.sampled_from((1, 2, 3, 200)), u64, u64, u32, u32, u32, u32, st.binary(max_size=300), st.integers(0, 9))
def test_record_round_trip(kind, seq, durable, prev, salt, volume, data_block, payload, units_before):
    data, crc = layout.pack_record(kind, seq, durable, prev, salt, volume, data_block, payload)
    assert len(data) % layout.RECORD_UNIT == 0
    offset = units_before * layout.RECORD_UNIT
    area = memoryview(random.Random(0).randbytes(offset) + data + bytes(40))
    record = layout.unpack_record(area, offset, salt)
    assert record is not None
    assert (record.kind, record.seq, record.durable_seq, record.prev_crc) == (kind, seq, durable, prev)
    assert (record.volume, record.data_block, record.crc, record.size) == (volume, data_block, crc, len(data))
    assert record.payload[: len(payload)] == payload and not any(record.payload[len(payload) :])
    assert layout.unpack_record(area, offset, salt ^ 1) is None
    assert layout.unpack_record(area[: offset + len(data) - 1], offset, salt) is None


@quick
@given(st.lists(u64, max_size=40), st.lists(u32, max_size=40), u32)
def test_extents_round_trip(extents, crcs, family):
    payload = layout.pack_extents(extents, array("I", crcs), family)
    record, _ = layout.pack_record(EXTENTS, 1, 0, 0, 0, 1, 2, payload)
    found = layout.unpack_extents(layout.unpack_record(memoryview(record), 0, 0).payload)
    assert (list(found[0]), list(found[1])) == (extents, crcs) and layout.family_of_extents(payload) == family


def test_no_changed_bit_passes():
    block = Super(UUID, 7, TINY, 12, 3, 64, 5, TableEnd(7, 100, 20, 9))
    header = SegmentHeader(UUID, 1, 2, 3, 4)
    record, _ = layout.pack_record(EXTENTS, 5, 4, 3, 2, 1, 6, b"payload")
    for data, unpack, used in [
        (block.pack(), Super.unpack, 100),
        (header.pack(), SegmentHeader.unpack, 64),
        (record, lambda data: layout.unpack_record(memoryview(data), 0, 2), len(record)),
    ]:
        assert unpack(data) is not None
        for bit in range(used * 8):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            assert unpack(bytes(changed)) is None, f"bit {bit}"


def test_truncated_or_blank_bytes_are_nothing():
    block = Super(UUID, 7, TINY, 12, 3, 64, 5, TableEnd(7, 100, 20, 9)).pack()
    for size in (0, 1, 8, 99, 100, 512, 4095):
        assert Super.unpack(block[:size]) is None
    assert Super.unpack(bytes(4096)) is None
    assert SegmentHeader.unpack(bytes(64)) is None
    for size in range(0, 80, 8):
        assert layout.unpack_record(memoryview(bytes(size)), 0, 0) is None


def resealed(data: bytes, at: int, value: bytes) -> bytes:
    """A super block with ``value`` at ``at`` and a checksum that fits."""
    changed = bytearray(data)
    changed[at : at + len(value)] = value
    changed[96:100] = struct.pack("<I", layout.crc32c(bytes(changed[:96])))
    return bytes(changed)


def test_super_of_another_version_gives_its_version():
    block = Super(UUID, 7, TINY, 12, 3, 64, 5, TableEnd(7, 100, 20, 9)).pack()
    for version in (0, 1, 3, 2**32 - 1):
        assert Super.unpack(resealed(block, 8, struct.pack("<I", version))) == version
    assert isinstance(Super.unpack(resealed(block, 8, struct.pack("<I", 2))), Super) and layout.FORMAT_VERSION == 2


@pytest.mark.parametrize("at, value", [(12, 512), (40, 31), (40, 0), (40, 1 << 31), (44, 0), (44, 32), (48, 0), (48, 60)])
def test_super_with_an_impossible_geometry_is_nothing(at, value):
    block = Super(UUID, 7, TINY, 12, 3, 64, 5, TableEnd(7, 100, 20, 9)).pack()
    fields = {40: "segment blocks", 44: "record blocks", 48: "fan-out bits", 12: "block size"}
    assert Super.unpack(resealed(block, at, struct.pack("<I", value))) is None, fields[at]


def test_salts_differ():
    salts = {layout.salt_of(UUID, index) for index in range(2000)} | {layout.salt_of(UUID, n << 32) for n in range(2000)}
    assert len(salts) >= 3998
    assert layout.salt_of(UUID, 1) != layout.salt_of(bytes(16), 1)


def test_geometry():
    assert Geometry().valid() and Geometry().segment_bytes == 32 << 20 and Geometry().segment_shift == 13
    assert TINY.segment_shift == 5 and TINY.record_area_bytes == 8192
    for wrong in [(4, 1, 2), (33, 2, 2), (32, 0, 2), (32, 32, 2), (32, 2, 0), (32, 2, 13), (1 << 21, 2, 2)]:
        assert not Geometry(*wrong).valid(), wrong


def test_extent_fields_do_not_overlap():
    extent = (2**36 - 1) << layout.START_SHIFT | HOLE | layout.COUNT_MASK
    assert extent == 2**64 - 1
    assert extent >> layout.START_SHIFT == 2**36 - 1 and extent & layout.COUNT_MASK == 2**27 - 1 and extent & HOLE

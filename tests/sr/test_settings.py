"""Settings of an SR: its limit, and what is verified."""

from __future__ import annotations

import pytest
from sr_kit import BLOCK, World, content, put

from simsr.errors import BadRequest, BadSize, BlockDamaged
from simsr.sr.space import LIMIT_MIN_BYTES, cap_for, geometry_for
from simsr.store.segments import segment_name


def damaged_block(world: World):
    """A disk whose first block is damaged, in memory and on the disk."""
    disk = world.repository.create(4 * BLOCK)
    put(disk, 0, b"x" * BLOCK)
    put(disk, BLOCK, b"y" * BLOCK)
    physical = disk.volume._entries(0, 1)[0] & 0xFFFFFFFF
    shift, mask = disk.volume._shift, disk.volume._block_mask
    world.directory.flip(segment_name(int(physical) >> shift), (int(physical) & mask) * BLOCK + 7)
    return disk


def read(disk, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    assert not disk.volume.read([(offset, view)])
    return bytes(view)


@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK, 3 * BLOCK])
def test_reads_from_memory_are_verified_unless_the_sr_is_set_not_to(length):
    world = World()
    disk = damaged_block(world)
    assert world.repository.describe()["verify_reads"] is True
    with pytest.raises(BlockDamaged):
        read(disk, 0, length)
    world.repository.update_self(verify_reads=False)
    assert read(disk, 0, length)[7] != ord("x") and read(disk, BLOCK, BLOCK) == b"y" * BLOCK
    with pytest.raises(BlockDamaged):
        disk.volume.read_bytes(0, length)  # from the disk
    world.repository.update_self(verify_reads=True)
    with pytest.raises(BlockDamaged):
        read(disk, 0, length)


def test_a_damaged_block_is_never_merged_into_a_new_one():
    """It would get a checksum of its own, and nobody would know any more."""
    world = World()
    disk = damaged_block(world)
    world.repository.update_self(verify_reads=False)
    with pytest.raises(BlockDamaged):
        disk.volume.write([(100, 50, memoryview(b"z" * 50))])
    with pytest.raises(BlockDamaged):
        read(disk, 0, 100)


def test_settings_survive_a_kill():
    world = World()
    world.repository.update_self(verify_reads=False)
    world.repository.resize_self(64 << 20)
    with pytest.raises(BadRequest):
        world.repository.update_self(verify_writes=False)
    repository = world.open(world.directory.after_kill())
    assert repository.verify_reads is False and repository.limit_bytes == 64 << 20
    assert not repository.store.pool.verify_reads and repository.store.pool.cap_segments == cap_for(64 << 20, repository.store.geometry)


def test_a_limit_that_what_is_in_use_does_not_fit_into():
    world = World()
    disk = world.repository.create(400 * BLOCK)
    for block in range(400):
        put(disk, block * BLOCK, bytes([block % 255 + 1]) * BLOCK)
    with pytest.raises(BadSize, match="at least"):
        world.repository.resize_self(LIMIT_MIN_BYTES - 1)
    assert world.repository.limit_bytes is None and content(disk)[:1] == b"\x01"


@pytest.mark.parametrize("limit", [LIMIT_MIN_BYTES, 100 << 20, 1 << 30, 10 << 30, 1 << 40])
def test_a_small_sr_gets_small_segments(limit):
    geometry = geometry_for(limit)
    assert geometry.valid() and 1 << 20 <= geometry.segment_bytes <= 32 << 20
    cap = cap_for(limit, geometry)
    assert cap >= 31 and cap * geometry.segment_bytes <= limit
    assert geometry.segment_bytes in (1 << 20, 32 << 20) or 128 < cap <= 512
    assert geometry_for(None).segment_bytes == 32 << 20 and cap_for(None, geometry) is None

"""Segments: making spares, taking them into use, and giving them back only when nothing can need them any more."""

from __future__ import annotations

import errno

import pytest
from store_kit import TINY, UUID, content, disk, everything, make, put

from simsr.errors import NoSpace, StoreDamaged
from simsr.store.layout import BLOCK, SegmentHeader, salt_of
from simsr.store.memory import MemoryDirectory
from simsr.store.segments import SegmentPool, State, segment_name
from simsr.store.store import Delete, Store
from simsr.store.usage import Usage


def pool_over(directory: MemoryDirectory) -> SegmentPool:
    return SegmentPool(directory, TINY, UUID, Usage(TINY.segment_shift))


def test_spares_are_made_and_numbered():
    pool = pool_over(MemoryDirectory())
    first, second = pool.next_slot(), pool.next_slot()
    assert (first, second) == (1, 2) and pool.wanted(1000) == 4, "two are being made, six are wanted"
    assert [pool.wanted(cap) for cap in (0, 2, 3, 4, 5, 6, 7)] == [0, 0, 1, 2, 3, 4, 4]
    pool.add(second, pool.make_file(second))
    pool.add(first, None)
    assert [segment.slot for segment in pool.spares] == [2]
    assert pool.next_slot() == 1, "a number that was not used is free again"
    pool._check()


def test_activate_writes_the_header_and_leaves_some():
    directory = MemoryDirectory()
    pool = pool_over(directory)
    segment = pool.activate(7, first_seq=20, durable_seq=11, prev_crc=99, keep=2)
    assert len(pool.spares) == 2 and segment.state is State.ACTIVE and segment.salt == salt_of(UUID, 7)
    header = SegmentHeader.unpack(dict(directory.images())[segment_name(segment.slot)][:64])
    assert header == SegmentHeader(UUID, 7, 20, 11, 99)
    assert segment.used_blocks == TINY.record_blocks and segment.last_seq == 19
    pool.activate(8, 20, 11, 99, keep=0)
    assert len(pool.spares) == 1
    pool._check()


def test_new_spares_wait_behind_recycled_ones():
    """The most recently used segment is taken first: its pages are in memory."""
    pool = pool_over(MemoryDirectory())
    for _ in range(3):
        pool.make_one()
    used = pool.activate(1, 1, 0, 0, keep=0)
    pool.seal(used)
    pool.recycle([used])
    pool.make_one()
    assert pool.activate(2, 1, 0, 0, keep=0) is used


def test_wanted_grows_with_the_store():
    pool = pool_over(MemoryDirectory())
    assert pool.wanted(1000) == 6
    for index in range(60):
        pool.activate(index, 1, 0, 0, keep=0)
    assert pool.count == 60 and len(pool.spares) + pool.wanted(1000) == 10
    assert pool.wanted(61) == 1 and pool.wanted(60) == pool.wanted(10) == 0


@pytest.mark.parametrize("where", ["create seg", "sync directory"])
def test_no_space_for_a_segment(where):
    def on_step(what: str) -> None:
        if what.startswith(where):
            raise OSError(errno.ENOSPC, "injected")

    directory = MemoryDirectory()
    pool = pool_over(directory)
    pool.make_one()
    directory.on_step = on_step
    with pytest.raises(NoSpace, match="cannot make a segment file"):
        pool.make_one()
    assert len(pool.spares) == 1 and not pool._making
    directory.on_step = None
    pool.make_one()
    assert len(pool.spares) == 2
    pool._check()


def test_no_more_numbers(monkeypatch):
    pool = pool_over(MemoryDirectory())
    for _ in range(3):
        pool.make_one()
    monkeypatch.setattr(SegmentPool, "_slot_max", 3)
    with pytest.raises(NoSpace, match="as many segments as it can number"):
        pool.next_slot()
    assert not pool._making


def test_last_number_fits_into_a_map_entry():
    pool = pool_over(MemoryDirectory())
    assert (pool._slot_max << TINY.segment_shift) + TINY.segment_blocks - 1 <= 0xFFFFFFFF


def test_adopt_finds_segments_and_leaves_the_rest():
    directory = MemoryDirectory()
    for name, size in [
        (segment_name(3), TINY.segment_bytes), (segment_name(5), TINY.segment_bytes), (segment_name(4), 700),
        (segment_name(0), TINY.segment_bytes), ("seg-7", TINY.segment_bytes), ("notes", 1),
    ]:  # fmt: skip
        directory.create(name, size)
    pool = pool_over(directory)
    assert [segment.slot for segment, _ in pool.adopt()] == [3, 5]
    assert pool.by_slot[0] is None and pool.by_slot[4] is None
    assert segment_name(4) in directory.names(), "nothing is removed before it is known that nothing is missing"
    pool.remove_unmade()
    assert segment_name(4) not in directory.names()
    assert pool.next_slot() == 1


def fill(volume, first_tag: int, blocks: int) -> None:
    for index in range(blocks):
        put(volume, index * BLOCK, content(first_tag + index))


def dead_segment(store: Store):
    """Fill a segment, then overwrite all that is in it."""
    volume = disk(store, 40)
    first = store.log.active
    fill(volume, 0, 35)
    fill(volume, 100, 35)
    store.reap()
    assert first.state is State.SEALED and first in store.pool.dead()
    return volume, first


def test_dead_segment_becomes_a_spare_only_after_a_checkpoint():
    _, store = make()
    _, first = dead_segment(store)
    store.flush()
    assert first not in store.pool.spares
    job = store.begin_checkpoint()
    assert first not in store.pool.spares
    store.run_checkpoint(job)
    assert first not in store.pool.spares
    store.end_checkpoint(job)
    assert first in store.pool.spares and first.state is State.SPARE
    store._check()


def test_segment_that_dies_during_a_checkpoint_waits_for_the_next():
    """The checkpoint being written still names its blocks."""
    directory, store = make()
    volume = disk(store, 40)
    first = store.log.active
    fill(volume, 0, 35)
    job = store.begin_checkpoint()
    fill(volume, 100, 35)
    store.reap()
    store.run_checkpoint(job)
    store.end_checkpoint(job)
    assert first.state is State.SEALED
    old = everything(volume)
    assert everything(Store.open(directory.after_kill()).volumes[1]) == old
    store.reap()
    assert first in store.pool.dead()
    store.checkpoint()
    assert first.state is State.SPARE


def test_failed_checkpoint_recycles_nothing():
    directory, store = make()
    _, first = dead_segment(store)
    job = store.begin_checkpoint()
    with pytest.raises(Exception, match="has stopped"):
        store.end_checkpoint(job, OSError(errno.EIO, "injected"))
    assert first.state is State.SEALED


def test_pinned_segment_is_not_used_again():
    """A read job under way keeps its segment, through checkpoints and any amount of writing."""
    _, store = make()
    volume = disk(store, 40)
    first = store.log.active
    fill(volume, 0, 35)
    view = memoryview(bytearray(3 * BLOCK + 10))
    job = volume.read_job(5 * BLOCK - 5, view)
    wanted = volume.read_bytes(5 * BLOCK - 5, len(view))
    for round_ in range(4):
        fill(volume, 100 * round_, 35)
        store.reap()
        store.checkpoint()
        assert first.state in (State.SEALED, State.DEAD) and first not in store.pool.spares
        store._check()
    job.run()
    assert view == wanted
    job.release()
    job.release()  # releasing twice does no harm
    assert first.pins == 0
    store.checkpoint()
    assert first.state is State.SPARE
    store._check()


def test_footprint_is_bounded_under_overwriting():
    _, store = make()
    volume = disk(store, 40)
    for round_ in range(30):
        fill(volume, round_, 40)
        store.checkpoint()
    assert store.statistics()["segments"] <= 8


def test_segment_with_blocks_in_use_is_missed():
    directory, store = make()
    fill(disk(store, 8), 0, 8)
    slot = store.log.active.slot
    store.close()
    directory.remove(segment_name(slot))
    before = dict(directory.images())
    with pytest.raises(StoreDamaged, match=f"{segment_name(slot)} is missing, 8 blocks in use are in it"):
        Store.open(directory)
    assert dict(directory.images()) == before


def test_space_of_a_deleted_volume_comes_back_after_reaping():
    _, store = make()
    volume = disk(store, 200)
    fill(volume, 0, 150)
    store.commit([Delete(volume.ident)])
    assert store.statistics()["live_bytes"] == 150 * BLOCK
    assert store.reap(5) > 0
    store.reap()
    assert store.statistics()["live_bytes"] == 0
    store.checkpoint()
    assert store.statistics()["segments_sealed"] == 0
    store._check()

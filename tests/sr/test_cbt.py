"""Changed block tracking: what is told from which VDI to which, and that it is exactly what has changed."""

import random

import pytest
from sr_kit import BLOCK, fill, put, unchanged, zero

from simsr.errors import BadRequest, CbtSizes, NoChangedBlocks, WrongKind
from simsr.sr.repository import Repository
from simsr.store.units import UNIT_BYTES, bitmap_bytes, mark

UNIT = 16  # blocks


def bits(bitmap: bytes) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(bitmap) if byte for bit in range(8) if byte & (0x80 >> bit)]


def changed(sr: Repository, old, new) -> list[int]:
    """The units that a job finds, carried out here and now."""
    job = sr.changed_blocks(old, new)
    for step in job.work():
        if step is not None:
            step()
    assert len(job.bitmap) == bitmap_bytes(new.size_bytes)
    return bits(job.bitmap)


@pytest.fixture
def tracked(sr):
    vdi = sr.create(5 * UNIT_BYTES - 512, name="tracked")
    fill(vdi, 1)
    sr.set_cbt(vdi, True)
    return vdi


def test_mark():
    rng = random.Random(1)
    for _ in range(500):
        first = rng.randrange(70)
        last = rng.randrange(first, 80)
        bitmap = bytearray(12)
        mark(bitmap, first, last)
        assert bits(bitmap) == list(range(first, last)), (first, last)


def test_the_length_of_bitmaps():
    assert [bitmap_bytes(size) for size in (1, UNIT_BYTES * 32, UNIT_BYTES * 32 + 1)] == [4, 4, 8]


def test_what_was_written_since(sr, tracked):
    before = sr.snapshot(tracked)
    assert before.cbt_enabled and changed(sr, before, tracked) == []
    put(tracked, UNIT_BYTES - 1, b"xy")
    zero(tracked, 3 * UNIT_BYTES, BLOCK)
    assert changed(sr, before, tracked) == [0, 1, 3]
    between = sr.snapshot(tracked)
    put(tracked, 4 * UNIT_BYTES, b"end")
    after = sr.snapshot(tracked)
    assert changed(sr, before, after) == [0, 1, 3, 4] and changed(sr, between, after) == [4]
    sr.delete(between)
    assert changed(sr, before, after) == [0, 1, 3, 4]


def test_reverts_show_what_really_differs(sr, tracked):
    first = sr.snapshot(tracked)
    fill(tracked, 2, range(2 * UNIT, 3 * UNIT))
    second = sr.snapshot(tracked)
    sr.revert(first)
    assert changed(sr, first, tracked) == []
    assert changed(sr, second, tracked) == [2], "it went back there"
    sr.revert(second)
    assert (changed(sr, first, tracked), changed(sr, second, tracked)) == ([2], [])


def test_growing_counts_as_changed(sr, tracked):
    before = sr.snapshot(tracked)
    sr.resize(tracked, 7 * UNIT_BYTES)
    assert changed(sr, before, tracked) == [4, 5, 6]


def test_a_disk_that_a_revert_made_smaller(sr, tracked):
    small = sr.snapshot(tracked)
    sr.resize(tracked, 7 * UNIT_BYTES)
    large = sr.snapshot(tracked)
    sr.revert(small)
    with unchanged(sr), pytest.raises(CbtSizes):
        sr.changed_blocks(large, tracked)
    assert CbtSizes.sm_fault == 459


def test_what_is_not_told(sr, tracked, disk):
    first, second = sr.snapshot(tracked), sr.snapshot(tracked)
    plain = sr.snapshot(disk)
    clone = sr.clone(tracked)
    assert not clone.cbt_enabled
    sr.set_cbt(clone, True)
    of_clone = sr.snapshot(clone)
    wrong = [
        (first, first, "the same"), (second, first, "older"), (tracked, first, "older"), (plain, disk, "not enabled"),
        (plain, tracked, "not enabled"), (first, disk, "not enabled"), (first, clone, "belong together"), (first, of_clone, "belong"),
    ]  # fmt: skip
    with unchanged(sr):
        for old, new, reason in wrong:
            with pytest.raises(NoChangedBlocks, match=reason) as caught:
                sr.changed_blocks(old, new)
            assert caught.value.sm_fault == 460


def test_disabling_breaks_the_chain(sr, tracked):
    before = sr.snapshot(tracked)
    sr.set_cbt(tracked, False)
    assert before.cbt_enabled and not tracked.cbt_enabled and not sr.snapshot(tracked).cbt_enabled
    with pytest.raises(NoChangedBlocks, match="not enabled"):
        sr.changed_blocks(before, tracked)
    sr.set_cbt(tracked, True)
    with pytest.raises(NoChangedBlocks, match="disabled between"):
        sr.changed_blocks(before, tracked)


def test_switching_is_idempotent(sr, tracked, disk):
    snapshot = sr.snapshot(tracked)
    with unchanged(sr):
        sr.set_cbt(tracked, True)
        sr.set_cbt(disk, False)
        sr.set_cbt(snapshot, True)
        with pytest.raises(BadRequest):
            sr.update(disk, cbt="x")


def test_who_cannot_have_it(sr, disk):
    snapshot = sr.snapshot(disk)
    metadata = sr.create(BLOCK, type="metadata")
    redo_log = sr.create(BLOCK, type="redo_log")
    sr.update(disk, on_boot="reset")
    with unchanged(sr):
        for vdi in (snapshot, metadata, redo_log, disk):
            with pytest.raises(WrongKind):
                sr.set_cbt(vdi, True)


def test_it_survives_restarts(world):
    sr = world.repository
    vdi = sr.create(2 * UNIT_BYTES)
    sr.set_cbt(vdi, True)
    before = sr.snapshot(vdi)
    fill(vdi, 1, range(UNIT, UNIT + 1))
    for restart in (world.kill, world.reopen):
        sr = restart()
        assert changed(sr, sr.get(before.uuid), sr.get(vdi.uuid)) == [1]

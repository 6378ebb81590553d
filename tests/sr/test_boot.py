"""Disks with on_boot=reset: every epoch begins with the content that was there when the mode was set."""

import random

import pytest
from sr_kit import BLOCK, STYLES, World, check, content, fill, unchanged, zero

from simsr.errors import BadRequest, NotFound, VdiInUse, WrongKind
from simsr.sr.hidden import is_hidden


@pytest.fixture
def forgetful(sr, disk):
    """A disk with on_boot=reset; ``base`` is what it goes back to."""
    sr.update(disk, on_boot="reset")
    disk.base = content(disk)
    return disk


def hidden(sr):
    return [volume for volume in sr.store.volumes.values() if is_hidden(volume.meta)]


def test_an_epoch_begins_with_the_content_of_when_the_mode_was_set(sr, forgetful):
    for tag in (2, 3):
        fill(forgetful, tag)
        assert content(forgetful) != forgetful.base
        seq = sr.store.log.seq
        assert sr.begin_epoch(forgetful)
        assert sr.store.log.seq == seq + 1, "one record"
        assert content(forgetful) == forgetful.base
        check(sr)
    with unchanged(sr):
        assert not sr.begin_epoch(forgetful)


def test_a_disk_that_persists_keeps_everything(sr, disk):
    assert disk.on_boot == "persist"
    sr.attach(disk, "a", "a", True, "attach")
    with unchanged(sr):
        assert not sr.begin_epoch(disk), "nobody is refused where nothing happens"


def test_persist_keeps_what_is_there_now_and_drops_the_base(sr, forgetful):
    fill(forgetful, 2)
    now = content(forgetful)
    sr.update(forgetful, on_boot="persist", name="kept")
    assert (forgetful.on_boot, forgetful.name, content(forgetful), hidden(sr)) == ("persist", "kept", now, [])
    assert not sr.begin_epoch(forgetful)
    check(sr)


def test_setting_the_mode_twice_does_not_move_the_base(sr, forgetful):
    fill(forgetful, 2)
    with unchanged(sr):
        sr.update(forgetful, on_boot="reset")
    sr.begin_epoch(forgetful)
    assert content(forgetful) == forgetful.base


@pytest.mark.parametrize("writable", [True, False])
def test_refused_while_somebody_is_attached(sr, forgetful, writable):
    sr.attach(forgetful, "a", "host a", writable, "attach")
    fill(forgetful, 2)
    with unchanged(sr):
        with pytest.raises(VdiInUse):
            sr.begin_epoch(forgetful)
        with pytest.raises(VdiInUse):
            sr.update(forgetful, on_boot="persist")


def test_who_cannot_have_the_mode(sr, disk):
    snapshot = sr.snapshot(disk)
    sr.set_cbt(disk, True)
    fixed = sr.create(BLOCK, read_only=True)
    with unchanged(sr):
        for vdi in (snapshot, disk, fixed):
            with pytest.raises(WrongKind):
                sr.update(vdi, on_boot="reset")
        with pytest.raises(BadRequest):
            sr.update(disk, on_boot="sometimes")


def test_a_snapshot_keeps_what_is_there_and_leaves_the_base(sr, forgetful):
    fill(forgetful, 2)
    now = content(forgetful)
    snapshot, clone = sr.snapshot(forgetful), sr.clone(forgetful)
    sr.begin_epoch(forgetful)
    assert (content(forgetful), content(snapshot), content(clone)) == (forgetful.base, now, now)
    assert (snapshot.on_boot, clone.on_boot, len(hidden(sr))) == ("persist", "persist", 1)
    check(sr)


def test_growing_grows_the_base(sr, forgetful):
    sr.resize(forgetful, 9 * BLOCK)
    fill(forgetful, 2)
    sr.begin_epoch(forgetful)
    assert content(forgetful) == forgetful.base.ljust(9 * BLOCK, b"\0")
    check(sr)


def test_a_revert_moves_the_base(sr, forgetful):
    fill(forgetful, 2)
    snapshot = sr.snapshot(forgetful)
    wanted = content(snapshot)
    fill(forgetful, 3)
    seq = sr.store.log.seq
    assert sr.revert(snapshot).changed
    assert sr.store.log.seq == seq + 1
    fill(forgetful, 4)
    sr.begin_epoch(forgetful)
    assert content(forgetful) == wanted
    check(sr)


def test_a_revert_that_finds_the_disk_there_already_still_moves_the_base(sr, forgetful):
    fill(forgetful, 2)
    snapshot = sr.snapshot(forgetful)
    assert not sr.revert(snapshot).changed
    sr.begin_epoch(forgetful)
    assert content(forgetful) == content(snapshot) != forgetful.base
    with unchanged(sr):
        sr.revert(snapshot)


def test_deleting_the_disk_deletes_the_base(sr, forgetful):
    sr.delete(forgetful)
    sr.store.reap()
    assert not sr.store.volumes and not any(sr.store.usage.live)
    with pytest.raises(NotFound):
        sr.begin_epoch(forgetful)
    check(sr)


def test_damage_of_the_base_is_told_of_the_disk(sr, forgetful):
    from simsr.sr.damage import vdi_of

    assert vdi_of(hidden(sr)[0]) == {"vdi": forgetful.uuid, "name": "disk (at boot)"}


def test_mode_and_base_survive_restarts(world, forgetful):
    base, uuid = forgetful.base, forgetful.uuid
    for restart in (world.reopen, world.kill, world.reopen):
        fill(world.repository.get(uuid), 5)
        disk = restart().get(uuid)
        assert disk.on_boot == "reset" and content(disk) != base
        assert world.repository.begin_epoch(disk) and content(disk) == base
        check(world.repository)


@pytest.mark.parametrize("style", sorted(set(STYLES)))
def test_a_power_cut_leaves_all_of_it_or_nothing(style):
    """Every step of a disk's life with the mode: the disk is the old one or the new one, and the base is there if and only if the mode is."""
    steps = (
        lambda sr, disk: sr.update(disk, on_boot="reset"),
        lambda sr, disk: fill(disk, 2, range(2)),
        lambda sr, disk: sr.resize(disk, 8 * BLOCK),
        lambda sr, disk: sr.begin_epoch(disk),
        lambda sr, disk: zero(disk, 0, 3 * BLOCK),
        lambda sr, disk: sr.revert(next(vdi for vdi in sr.vdis.values() if vdi.is_a_snapshot)),
        lambda sr, disk: sr.begin_epoch(disk),
        lambda sr, disk: sr.update(disk, on_boot="persist"),
        lambda sr, disk: sr.delete(disk),
    )
    for count in range(1, len(steps) + 1):
        world = World()
        sr = world.repository
        disk = sr.create(6 * BLOCK)
        fill(disk, 1)
        sr.snapshot(disk)
        states = []

        def note(disk=disk, states=states, sr=sr):
            there = disk.uuid in sr.vdis
            base = [content_of(volume) for volume in hidden(sr)]
            states.append((there and content(disk), there and disk.on_boot, base))

        for step in steps[:count]:
            sr.store.flush()
            states.clear()
            note()
            step(sr, disk)
            note()
        sr = world.cut(random.Random(count), style)
        found = sr.vdis.get(disk.uuid)
        base = [content_of(volume) for volume in hidden(sr)]
        state = (found is not None and content(found), found is not None and found.on_boot, base)
        if count != 2:  # a write of several records may be there in part
            assert state in states, f"after step {count}"
        check(sr)


def content_of(volume):
    return volume.read_bytes(0, volume.size_bytes)


@pytest.mark.parametrize("written", [True, False])
def test_a_revert_that_keeps_the_size_keeps_that_of_the_base(sr, forgetful, written):
    """Found by the simulation: the next epoch made the disk smaller."""
    snapshot = sr.snapshot(forgetful)
    sr.resize(forgetful, forgetful.size_bytes + 8 * BLOCK)
    size_bytes = forgetful.size_bytes
    if written:
        fill(forgetful, 5)
    sr.history.carry_out([sr.wishes.one(snapshot, keep_size=True)])
    assert forgetful.size_bytes == size_bytes
    kept = content(forgetful)
    fill(forgetful, 6)
    assert sr.begin_epoch(forgetful)
    assert forgetful.size_bytes == size_bytes and content(forgetful) == kept
    check(sr)

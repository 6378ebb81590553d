"""Revert: which disk goes back to which snapshot, what is refused, and that it happens wholly or not at all.

The invariants of revert by number are in test_invariants.py.
"""

import random

import pytest
from sr_kit import BLOCK, STYLES, Kill, World, check, content, fill, photo, put, tree, unchanged, zero

from simsr.errors import NotASnapshot, NotFound, SnapshotOfOther, VdiInUse


def test_revert_brings_the_content_back(world, sr, disk):
    old = content(disk)
    snapshot = sr.snapshot(disk)
    fill(disk, 2, range(2))
    zero(disk, 3 * BLOCK, BLOCK)
    done = sr.revert(snapshot)
    assert (done.vdi, done.changed, done.size_changed) == (disk, True, False)
    assert content(disk) == old
    for sr in (world.kill(), world.reopen()):
        assert content(sr.get(disk.uuid)) == content(sr.get(snapshot.uuid)) == old


@pytest.mark.parametrize("change", ["fill", "zero all", "one byte", "sector", "grow"])
def test_every_kind_of_change_is_undone(sr, disk, change):
    old = content(disk)
    snapshot = sr.snapshot(disk)
    if change == "fill":
        fill(disk, 2)
    elif change == "zero all":
        zero(disk, 0, disk.size_bytes)
    elif change == "one byte":
        put(disk, 3 * BLOCK + 17, bytes([old[3 * BLOCK + 17] ^ 1]))
    elif change == "sector":
        zero(disk, BLOCK + 512, 512)
    else:
        sr.resize(disk, 7 * BLOCK)
    assert sr.revert(snapshot).changed
    assert content(disk) == old
    check(sr)


def test_revert_of_an_empty_disk(sr):
    disk = sr.create(1 << 40)
    snapshot = sr.snapshot(disk)
    assert not sr.revert(snapshot).changed
    put(disk, (1 << 40) - BLOCK, b"x" * BLOCK)
    assert sr.revert(snapshot).changed
    assert disk.volume.mapped_bytes == 0
    assert not sr.revert(snapshot).changed


def test_to_and_fro_between_snapshots(sr, disk):
    """The tree of research/revert_semantics.md 4.6: a, b, c, d one after the other, then back to b, then e."""
    held = {}

    def take(name, tag):
        fill(disk, tag, range(tag % 6, 6))
        held[name] = (sr.snapshot(disk, name=name), content(disk))

    for tag, name in enumerate("abcd", 10):
        take(name, tag)
    fill(disk, 50)
    assert sr.revert(held["b"][0]).changed
    take("e", 20)
    for name in "dabecebadd":
        fill(disk, 60, range(1))
        sr.revert(held[name][0])
        assert content(disk) == held[name][1]
        assert all(content(snapshot) == bytes_ for snapshot, bytes_ in held.values())
    check(sr)


def test_a_disk_follows_its_own_descendants_only_by_name(sr, disk):
    """A clone shares content with the disk, not its snapshots: reverting one leaves the other alone."""
    snapshot = sr.snapshot(disk)
    clone = sr.clone(disk)
    of_clone = sr.snapshot(clone)
    fill(disk, 2)
    fill(clone, 3)
    before = content(clone)
    sr.revert(snapshot)
    assert content(clone) == before
    before = content(disk)
    sr.revert(of_clone)
    assert content(disk) == before == content(clone)


# The explicit target.


def test_a_target_of_the_family_is_accepted(sr, disk):
    """xapi's revert by cloning moves ``snapshot_of`` to the clone; then the snapshot is reverted on the clone."""
    old = content(disk)
    snapshot = sr.snapshot(disk)
    relatives = [sr.clone(snapshot), sr.clone(sr.clone(disk)), sr.clone(sr.snapshot(sr.snapshot(snapshot)))]
    for tag, relative in enumerate(relatives):
        fill(relative, tag + 100)
        mine = content(disk)
        done = sr.revert(snapshot, relative.uuid)
        assert done.vdi is relative and done.changed and content(relative) == old and content(disk) == mine
        assert snapshot.snapshot_of == disk.uuid
    sr.delete(disk)
    fill(relatives[0], 200)
    assert sr.revert(snapshot, relatives[0].uuid).changed
    assert content(relatives[0]) == old
    with unchanged(sr), pytest.raises(NotFound):
        sr.revert(snapshot)


def test_the_origin_as_target_in_any_case(sr, disk):
    snapshot = sr.snapshot(disk)
    fill(disk, 2)
    assert sr.revert(snapshot, disk.uuid.upper()).vdi is disk
    assert content(disk) == content(snapshot)


def test_targets_that_are_refused(sr, disk):
    snapshot, sibling = sr.snapshot(disk), sr.snapshot(disk)
    stranger = sr.create(6 * BLOCK)
    fill(disk, 2)
    for target in (stranger, snapshot, sibling, sr.snapshot(stranger)):
        with unchanged(sr), pytest.raises(SnapshotOfOther) as caught:
            sr.revert(snapshot, target.uuid)
        assert caught.value.details == {"snapshot": snapshot.uuid, "origin": disk.uuid, "target": target.uuid}
    with unchanged(sr), pytest.raises(NotFound) as caught:
        sr.revert(snapshot, "99999999-0000-4000-8000-000000000000")
    assert caught.value.sm_fault == 144


def test_only_snapshots_can_be_reverted_to(sr, disk):
    clone = sr.clone(disk)
    for leaf in (disk, clone):
        for target in (None, disk.uuid, clone.uuid):
            with unchanged(sr), pytest.raises(NotASnapshot) as caught:
                sr.revert(leaf, target)
            assert caught.value.xenapi_code == "REVERT_ONLY_ALLOWED_ON_SNAPSHOT"


def test_the_origin_is_gone(world, sr, disk):
    snapshot = sr.snapshot(disk)
    sr.delete(disk)
    for sr in (sr, world.kill()):
        with unchanged(sr), pytest.raises(NotFound) as caught:
            sr.revert(sr.get(snapshot.uuid))
        assert caught.value.details["name"] == disk.uuid
    again = sr.create(512, uuid=disk.uuid)
    assert sr.revert(sr.get(snapshot.uuid)).size_changed
    assert content(again) == content(sr.get(snapshot.uuid))


# Who is attached.


@pytest.mark.parametrize("kind, writable", [("nbd", True), ("nbd", False), ("attach", True), ("attach", False)])
def test_refused_while_the_disk_is_attached(sr, disk, kind, writable):
    snapshot = sr.snapshot(disk)
    fill(disk, 2)
    sr.attach(disk, "k", "host 7", writable, kind)
    with unchanged(sr), pytest.raises(VdiInUse) as caught:
        sr.revert(snapshot)
    assert caught.value.sm_fault == 24 and caught.value.details == {"operation": "revert", "uuid": disk.uuid, "by": "host 7"}
    sr.detach(disk, "k")
    assert sr.revert(snapshot).changed


def test_refused_while_attached_even_if_there_is_nothing_to_do(sr, disk):
    snapshot = sr.snapshot(disk)
    sr.attach(disk, "k", "host", True, "attach")
    with unchanged(sr), pytest.raises(VdiInUse):
        sr.revert(snapshot)


def test_an_attached_snapshot_does_not_matter(sr, disk):
    snapshot = sr.snapshot(disk)
    fill(disk, 2)
    sr.attach(snapshot, "k", "host", False, "attach")
    assert sr.revert(snapshot).changed
    assert [a["client"] for a in snapshot.describe()["attached"]] == ["host"]


# All or nothing.


def seen(sr):
    """All there is to see; what a disk takes is left out, because a checkpoint may count it anew."""
    shown = photo(sr)
    for described, _ in shown.values():
        described.pop("physical_utilisation_bytes", None)
    return shown, tree(sr)


def one_revert(kill_after: int | None, filler: int):
    """Make a history that ends in a revert of which ``kill_after`` steps are done (None: all of them)."""
    world = World()
    sr = world.repository
    disk = sr.create(6 * BLOCK, name="disk")
    fill(disk, 1)
    snapshot = sr.snapshot(disk)
    fill(disk, 2, range(4))
    sr.resize(disk, 9 * BLOCK)
    for number in range(filler):  # so that the record of the revert comes to lie anywhere in its segment
        sr.update(disk, description=f"{number:03}" * 30)
    sr.store.flush()
    old = seen(sr)
    steps = []

    def on_step(what):
        if kill_after is not None and len(steps) == kill_after:
            raise Kill(what)
        steps.append(what)

    world.directory.on_step = on_step
    try:
        sr.revert(snapshot)
        sr.store.flush()
        sr.store.checkpoint()
    except Kill:
        pass
    world.directory.on_step = None
    return world, old, seen(sr), steps


@pytest.mark.parametrize("filler", [0, 7, 10, 11, 12, 13])
def test_killed_at_every_step(seeds, filler):
    """Wholly old or wholly new after the death of the process and of the machine, and new once the flush has returned."""
    _, _, new, every_step = one_revert(None, filler)
    syncs = [index for index, what in enumerate(every_step) if what.startswith("sync seg")]
    flushed = syncs[-1] + 1
    appended = max(index for index, what in enumerate(every_step[: syncs[0]]) if what.startswith("write seg")) + 1
    contents = {described.get("name", ""): bytes_ for described, bytes_ in new[0].values() if not described.get("is_a_snapshot")}
    assert contents["disk"] in [bytes_ for described, bytes_ in new[0].values() if described.get("snapshot_of") and not described["is_a_tip"]]
    outcomes = set()
    for kill_after in range(len(every_step) + 1):
        world, old, _, _ = one_revert(kill_after, filler)
        survivors = [("kill", world.directory.after_kill())]
        for seed in seeds(len(STYLES)):
            style = STYLES[seed % len(STYLES)]
            survivors.append((style, world.directory.after_cut(random.Random(seed), style)))
        for style, survivor in survivors:
            found = seen(world.open(survivor))
            which = "old" if found == old else "new" if found == new else "neither"
            where = f"{style} after {kill_after} of {every_step}"
            assert which != "neither", where
            assert which == "new" or kill_after < flushed, where
            assert style != "kill" or (which == "new") == (kill_after >= appended), where
            outcomes.add((style == "kill", which))
    assert outcomes == {(True, "old"), (True, "new"), (False, "old"), (False, "new")}


def test_the_fillers_reach_a_revert_that_starts_a_segment():
    assert any(sum(step.startswith("write seg") for step in one_revert(None, filler)[3]) > 2 for filler in (10, 11, 12, 13))


def test_a_revert_that_was_cut_off_is_repeated(world, sr, disk):
    """What xapi's retry sees: the first revert happened, its answer was lost; the second has nothing to do."""
    snapshot = sr.snapshot(disk)
    fill(disk, 2)
    sr.revert(snapshot)
    sr = world.kill()
    with unchanged(sr):
        assert not sr.revert(sr.get(snapshot.uuid)).changed

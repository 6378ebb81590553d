"""What reverts answer, the first time and when they are repeated; what they leave alone; and what undo meets when something has gone since."""

from __future__ import annotations

from dataclasses import replace

import pytest
from history_kit import drawn, follow, go, go_together, redo, tips, undo
from sr_kit import BLOCK, World, check, content, fill, unchanged
from test_history_invariants import OPERATIONS, branchy, group_of, operate

from simsr.errors import BadRequest, SnapshotOfOther
from simsr.sr.history import Wish


def answer(done):
    """All of it, to compare across restarts, which make another object of the disk."""
    return replace(done, vdi=done.vdi.uuid)


@pytest.mark.parametrize("kept", [{}, {"tips_max": 0}, {"tips_hours": 0}])
@pytest.mark.parametrize("mode, options", OPERATIONS)
def test_the_answer_tells_what_became_of_it_and_a_repetition_tells_the_same(mode, options, kept):
    world, sr, disk, nodes = branchy()
    if kept and mode == "follow":
        return
    sr.update_self(**kept)
    before, size_bytes, was_at = {**sr.vdis, **sr.tips}, disk.size_bytes, content(disk)
    first = operate(sr, nodes, mode, options | {"op_id": "x"})
    after = {**sr.vdis, **sr.tips}
    assert {first.tip} - {None} == after.keys() - before.keys() == (set() if mode == "commit" or kept else {tips(sr, disk)[-1].uuid})
    used_up = {uuid for uuid in before.keys() - after.keys() if before[uuid].is_a_tip and mode == "follow"}
    assert set(first.removed) == before.keys() - after.keys() - used_up and len(used_up) == (mode == "follow")
    assert first.lost == (bool(kept) and mode == "reset") and (first.size_bytes, first.size_changed) == (size_bytes, False)
    if first.tip is not None:
        assert content(sr.tips[first.tip]) == was_at
    for sr in (sr, world.kill(), world.reopen()):
        with unchanged(sr):
            again = sr.history.carry_out([Wish(sr.get(disk.uuid), mode, sr.get(disk.uuid))], op_id="x")
        assert [answer(one) for one in again] == [answer(first)]


def test_commit_and_prune():
    """S becomes what the head holds, and all that descends from it goes, snapshots and tips; undo brings back all of it."""
    _, sr, disk, nodes = branchy()
    shape, held = drawn(sr, disk), {uuid: content(vdi) for uuid, vdi in {**sr.vdis, **sr.tips}.items()}
    head, below = content(disk), {nodes["b"].uuid, nodes["c"].uuid, tips(sr, disk)[0].uuid}
    done = go(sr, nodes["a"], "commit", prune=True)
    assert set(done.removed) == below and not below & {*sr.vdis, *sr.tips}
    assert content(disk) == content(sr.get(nodes["a"].uuid)) == head
    undo(sr, disk)
    assert drawn(sr, disk) == shape and {uuid: content(vdi) for uuid, vdi in {**sr.vdis, **sr.tips}.items()} == held
    check(sr)


def test_prune_takes_what_is_the_disks_own_and_is_still_there():
    _, sr, disk, nodes = branchy()
    other = sr.snapshot(nodes["c"], name="of c")  # descends from c, and is none of the disk's
    held = content(other)
    go(sr, nodes["b"], discard=True)
    go(sr, nodes["c"])
    own = {nodes["c"].uuid, *sr.tips}
    done = go(sr, nodes["a"], prune=True)
    assert set(done.removed) == own, "b went before"
    assert content(sr.vdis[other.uuid]) == held
    undo(sr, disk)
    assert own <= {*sr.vdis, *sr.tips} and nodes["b"].uuid not in sr.vdis
    check(sr)


def test_commit_of_what_is_so_already_does_nothing():
    world = World()
    sr = world.repository
    disk = sr.create(2 * BLOCK, name="disk")
    fill(disk, 1)
    first, second = sr.snapshot(disk, name="first"), sr.snapshot(disk, name="second")
    with unchanged(sr):
        assert not go(sr, second, "commit").changed
    time = first.meta["snapshot_time"]
    assert go(sr, first, "commit").changed, "the head holds the same, but descends from another"
    now = sr.get(first.uuid)
    assert now.meta["snapshot_time"] > time and disk.parent == now.volume.ident
    check(sr)


def test_a_commit_can_be_undone_when_the_snapshot_that_it_made_was_deleted():
    _, sr, disk, nodes = branchy()
    old = content(nodes["b"])
    go(sr, nodes["b"], "commit")
    head = content(disk)
    sr.delete(sr.get(nodes["b"].uuid))
    undo(sr, disk)
    assert content(disk) == head and content(sr.get(nodes["b"].uuid)) == old
    redo(sr, disk)
    assert nodes["b"].uuid not in sr.vdis and content(disk) == head
    check(sr)


@pytest.mark.parametrize("mode, expected", [("reset", "clean"), ("commit", "crash")])
def test_a_head_that_was_left_as_by_a_crash_is_so_until_it_becomes_another(mode, expected):
    """What a reset takes the disk to was not left by anybody; a commit leaves the head what it is."""
    _, sr, disk, nodes = branchy()
    sr.attach(disk, "k", "nbd client", True, "nbd")
    sr.written(disk)
    sr.detach(disk, "k", False)
    go(sr, nodes["c"], mode)
    fill(disk, 5)
    go(sr, nodes["a"])
    assert tips(sr, disk)[-1].consistency == expected


def test_how_many_tips_are_kept_and_for_how_long_unless_told_otherwise():
    """docs/revert.md: the newest 8, and as many steps, for 24 hours."""
    world, sr, disk, nodes = branchy()
    for tag in range(10):
        fill(disk, 300 + tag)
        go(sr, nodes["b"])
    assert len(tips(sr, disk)) == len(disk.history["undo"]) == 8
    world._ticks += 24 * 3600 - 300
    assert sr.keeper.expire() == 0 and len(sr.tips) == 8
    world._ticks += 600
    assert sr.keeper.expire() == 1 and not sr.tips


@pytest.mark.parametrize("setting, most", [("tips_max", 1000), ("tips_hours", 24 * 3653)])
def test_how_much_can_be_kept(setting, most):
    """Ten years, and more tips than anybody looks through."""
    sr = World().repository
    sr.update_self(**{setting: most})
    with unchanged(sr), pytest.raises(BadRequest, match=str(most)):
        sr.update_self(**{setting: most + 1})


@pytest.mark.parametrize("keep_size", [False, True])
def test_a_group_takes_its_disks_to_their_sizes_unless_they_are_to_keep_theirs(keep_size):
    _, sr, disks, taken, held = group_of(2)
    sr.resize(disks[0], disks[0].size_bytes + BLOCK)
    results = go_together(sr, taken[0], keep_size=True) if keep_size else go_together(sr, taken[0])
    assert [result.size_changed for result in results] == [not keep_size, False]
    assert [content(disk) for disk in disks] == [held[0] + bytes(BLOCK) * keep_size, held[1]]


def test_a_tip_is_followed_by_its_own_disk_only():
    _, sr, disk, nodes = branchy()
    [tip], clone = tips(sr, disk), sr.clone(nodes["c"])
    with unchanged(sr), pytest.raises(SnapshotOfOther) as caught:
        follow(sr, tip, target=clone.uuid)
    assert caught.value.details == {"snapshot": tip.uuid, "origin": disk.uuid, "target": clone.uuid}
    assert follow(sr, tip, target=disk.uuid).changed


def test_a_snapshot_never_becomes_another():
    """A snapshot of a snapshot can be "reverted to" where that is nothing, and never committed."""
    _, sr, disk, nodes = branchy()
    second = sr.snapshot(nodes["c"])
    with unchanged(sr):
        assert not go(sr, second).changed
        with pytest.raises(SnapshotOfOther):
            go(sr, second, "commit")
        for mode in ("reset", "commit"):
            with pytest.raises(SnapshotOfOther):
                go(sr, second, mode, target=nodes["b"].uuid)

"""Groups of snapshots that are known to be of one VM: finding them, and taking back what xapi did to some of its disks."""

from __future__ import annotations

import pytest
from history_kit import go, go_together
from sr_kit import BLOCK, WIDE, World, content, fill, unchanged

from simsr.errors import AmbiguousGroup, BadRequest, NothingToUndo, NoVmSnapshots
from simsr.sr.history import REDO, UNDO

VM, OTHER = "0f8f7a50-3f25-4c26-9d3d-6d3e0a2b8e01", "0f8f7a50-3f25-4c26-9d3d-6d3e0a2b8e02"


@pytest.fixture
def world():
    return World(WIDE)


@pytest.fixture
def sr(world):
    return world.repository


def vm_of(sr, count, vm=VM):
    """Disks that were snapshotted one by one for a VM, as xapi does it, and then written."""
    disks = [sr.create(2 * BLOCK, name=f"d{number}") for number in range(count)]
    return disks, snapshot_vm(sr, disks, f"hint of {vm}", vm)


def snapshot_vm(sr, disks, stamp, vm=VM):
    taken = []
    for tag, disk in enumerate(disks):
        fill(disk, tag)
        taken.append(sr.snapshot(disk, group=stamp, vm=vm))
        fill(disk, 100 + tag)
    return taken


def take_back(sr, vm=VM, mode=UNDO):
    return sr.history.carry_out(sr.history.undo_wishes_of_vm(sr.wishes.disks_of_vm(vm), mode))


def test_the_snapshots_of_a_vm_are_found_and_reverted_in_one_record(sr):
    disks, taken = vm_of(sr, 3)
    vm_of(sr, 2, OTHER)
    held, seq = [content(snapshot) for snapshot in taken], sr.store.log.seq
    go_together(sr, sr.wishes.only_group_of_vm(VM))
    assert [content(disk) for disk in disks] == held and sr.store.log.seq == seq + 1
    assert not go(sr, taken[1]).changed, "what VM.revert does then is nothing"
    assert len(take_back(sr)) == 3


def test_of_several_groups_none_is_chosen(sr):
    disks, taken = vm_of(sr, 2)
    again = snapshot_vm(sr, disks, "hint 2")
    with pytest.raises(AmbiguousGroup) as caught:
        sr.wishes.only_group_of_vm(VM)
    assert taken[0].uuid in str(caught.value) and again[0].uuid in str(caught.value)


def test_a_vm_that_nobody_knows_is_an_error(sr):
    for ask in (sr.wishes.only_group_of_vm, sr.wishes.disks_of_vm):
        with pytest.raises(NoVmSnapshots):
            ask(VM)


def test_a_vm_needs_a_group_and_a_group_may_be_one_disk_only_if_it_is_a_vm(sr):
    disk = sr.create(BLOCK)
    with unchanged(sr), pytest.raises(BadRequest):
        sr.snapshot(disk, vm=VM)
    with unchanged(sr), pytest.raises(BadRequest):
        sr.snapshot_group([disk])
    with unchanged(sr), pytest.raises(BadRequest):
        sr.snapshot_group([], vm=VM)
    [snapshot] = sr.snapshot_group([disk], vm=VM)
    assert sr.wishes.only_group_of_vm(VM) is snapshot


@pytest.mark.parametrize("reopened", [False, True])
def test_a_half_reverted_vm_is_taken_back_whole(world, sr, reopened):
    """xapi reverted two disks and failed at the third."""
    disks, taken = vm_of(sr, 3)
    left = [content(disk) for disk in disks]
    go(sr, taken[0])
    go(sr, taken[1])
    reverted = [content(disk) for disk in disks]
    if reopened:
        sr = world.reopen()
        disks = [sr.get(disk.uuid) for disk in disks]
    seq = sr.store.log.seq
    assert {result.vdi.uuid for result in take_back(sr)} == {disk.uuid for disk in disks[:2]}
    assert [content(disk) for disk in disks] == left and sr.store.log.seq == seq + 1
    take_back(sr, mode=REDO)
    assert [content(disk) for disk in disks] == reverted
    take_back(sr)
    with pytest.raises(NothingToUndo):
        take_back(sr)


def test_an_older_revert_to_the_same_snapshots_is_another_one(world, sr):
    disks, taken = vm_of(sr, 2)
    for snapshot in taken:
        go(sr, snapshot)
    for disk in disks:
        fill(disk, 7)
    world._ticks += 700
    left = [content(disk) for disk in disks]
    go(sr, taken[1])
    assert [result.vdi for result in take_back(sr)] == [disks[1]], "xapi failed at the other disk, which is as it was"
    assert [content(disk) for disk in disks] == left


def test_a_revert_to_something_else_is_not_taken_back_with_them(sr):
    disks, taken = vm_of(sr, 2)
    own = sr.snapshot(disks[0])
    fill(disks[0], 9)
    go(sr, own)
    go(sr, taken[1])
    assert [result.vdi for result in take_back(sr)] == [disks[1]]
    assert [result.vdi for result in take_back(sr)] == [disks[0]], "which was the last thing done to the VM then"


def test_a_disk_that_was_deleted_since_is_none_of_the_vm(sr):
    disks, taken = vm_of(sr, 2)
    left = content(disks[1])
    for snapshot in taken:
        go(sr, snapshot)
    sr.delete(disks[0])
    assert sr.wishes.disks_of_vm(VM) == [disks[1]]
    assert [result.vdi for result in take_back(sr)] == [disks[1]] and content(disks[1]) == left
    sr.delete(disks[1])
    with pytest.raises(NoVmSnapshots):
        sr.wishes.disks_of_vm(VM)

"""The invariants of revert (docs/revert.md), numbered; 5, 7, 8, 11 and more of 3, 4 and 10 are in test_history_invariants.py."""

import random
import sys
from collections import Counter

import pytest
from sr_kit import BLOCK, World, check, content, fill, photo, put, unchanged, zero

from simsr.errors import NoSpace
from simsr.sr.repository import Repository
from simsr.store.extent_map import ExtentMap
from simsr.store.layout import Geometry

MEDIUM = Geometry(1024, 64, 9)
"""Map nodes as in real stores, in small segments."""


def test_inv01_identity():
    """uuid, location, name, links, sm_config and all other metadata of the disk never change by revert."""
    world = World()
    sr = world.repository
    disk = sr.create(4 * BLOCK, name="before", description="d", type="system", sm_config={"a": "1"})
    snapshot = sr.snapshot(disk)
    sr.update(disk, name="after", description="later", sm_config={"b": "2"}, managed=False, sharable=True, read_only=False)
    other = sr.snapshot(disk)
    fill(disk, 1)

    def identity(repository):
        own = ("history", "parent")  # where in its tree the disk is, which is what reverts are about
        return {uuid: {k: v for k, v in vdi.volume.meta.items() if k not in own} for uuid, vdi in repository.vdis.items()}

    before = identity(sr)
    idents = {uuid: vdi.volume.ident for uuid, vdi in sr.vdis.items()}
    for target in (snapshot, other, snapshot):
        fill(disk, 2, range(1))
        assert sr.revert(target).vdi is disk
        for now in (sr, Repository(sr.store, world.now, world.new_uuid)):
            assert identity(now) == before
            assert {uuid: vdi.volume.ident for uuid, vdi in now.vdis.items()} == idents
    assert identity(world.kill()) == before


def test_inv02_the_snapshot_is_unchanged():
    """Same uuid, time, content and map, also when the disk is written after the revert."""
    sr = World().repository
    disk = sr.create(6 * BLOCK)
    fill(disk, 1)
    snapshot = sr.snapshot(disk)
    described, old, root = snapshot.describe(), content(snapshot), snapshot.volume.map.root
    for tag in range(2, 6):
        fill(disk, tag)
        sr.revert(snapshot)
        zero(disk, 0, BLOCK)
        assert (snapshot.describe(), content(snapshot)) == (described, old)
        assert snapshot.volume.map.root is root
    check(sr)


def test_inv03_no_other_snapshot_goes_or_changes():
    """Snapshots older and newer than the one reverted to, those of the branch that is left, those of other disks."""
    sr = World().repository
    disk, other = sr.create(6 * BLOCK), sr.create(3 * BLOCK)
    snapshots = []
    for tag in range(6):
        fill(disk, tag, range(tag, 6))
        fill(other, 50 + tag)
        snapshots += [sr.snapshot(disk), sr.snapshot(other), sr.snapshot(sr.clone(disk))]
    before = {snapshot.uuid: (snapshot.describe(), content(snapshot)) for snapshot in snapshots}
    for snapshot in snapshots[::-2]:
        if snapshot.snapshot_of == disk.uuid:
            fill(disk, 99)
            sr.revert(snapshot)
            assert {s.uuid: (s.describe(), content(s)) for s in sr.vdis.values() if s.is_a_snapshot} == before


@pytest.mark.parametrize("between", ["nothing", "checkpoint", "reopen", "kill", "cut"])
def test_inv04_a_clean_disk_is_left_alone(between):
    """Reverting a disk that is at the snapshot appends no record, before and after the state was on disk."""
    world = World()
    sr = world.repository
    disk = sr.create(6 * BLOCK)
    fill(disk, 1)
    snapshot = sr.snapshot(disk)
    fill(disk, 2)
    assert sr.revert(snapshot).changed
    sr.store.flush()
    if between == "checkpoint":
        sr.store.checkpoint()
    elif between != "nothing":
        sr = world.cut(random.Random(4)) if between == "cut" else getattr(world, between)()
    for _ in range(3):
        with unchanged(sr):
            done = sr.revert(sr.get(snapshot.uuid))
        assert (done.vdi.uuid, done.changed, done.size_changed) == (disk.uuid, False, False)
    disk = sr.get(disk.uuid)
    put(disk, 0, content(disk)[:BLOCK])  # the same bytes are a change all the same
    assert sr.revert(sr.get(snapshot.uuid)).changed


def test_inv06_every_read_sees_the_snapshot():
    """At once, through the fast path and the slow one, block by block and across blocks, until the next write."""
    sr = World().repository
    disk = sr.create(40 * BLOCK + 512)
    fill(disk, 1, range(0, 40, 2))
    snapshot = sr.snapshot(disk)
    old = content(disk)
    fill(disk, 2)
    content(disk)  # so that what is remembered of the map is of the state to be left
    sr.revert(snapshot)
    view = memoryview(bytearray(BLOCK))
    for block in range(40):
        assert disk.volume.read([(block * BLOCK, view)]) == []
        assert view == old[block * BLOCK : (block + 1) * BLOCK]
    assert disk.volume.read_bytes(BLOCK // 2, 39 * BLOCK) == old[BLOCK // 2 : 39 * BLOCK + BLOCK // 2]
    assert disk.volume.allocation(0, 40 * BLOCK) == [(BLOCK, not block % 2) for block in range(40)]
    put(disk, BLOCK, b"x" * BLOCK)
    assert content(disk) == old[:BLOCK] + b"x" * BLOCK + old[2 * BLOCK :]


def test_inv06_a_read_under_way_gets_the_content_of_its_time():
    """The daemon lets nobody attach while it reverts; but a read that outlives its connection must not see a mixture."""
    sr = World().repository
    disk = sr.create(6 * BLOCK)
    fill(disk, 1)
    snapshot = sr.snapshot(disk)
    fill(disk, 2)
    left = content(disk)
    view = memoryview(bytearray(6 * BLOCK))
    job = disk.volume.read_job(0, view)
    sr.revert(snapshot)
    sr.store.reap()
    sr.store.checkpoint()
    fill(disk, 3)
    job.run()
    job.release()
    assert view == left


# 9: cost.


def sparse(size_bytes: int, snapshots: int, blocks: int = 64):
    """A disk with ``blocks`` blocks spread evenly over its size, one snapshot to go back to among ``snapshots``, and writes
    since."""
    world = World(MEDIUM)
    sr = world.repository
    disk = sr.create(size_bytes)
    step = size_bytes // blocks
    for number in range(blocks):
        put(disk, number * step, bytes([number + 1]) * BLOCK)
    taken = [sr.snapshot(disk) for _ in range(snapshots + 1)]
    for number in range(0, blocks, 2):
        put(disk, number * step, b"\xff" * BLOCK)
    return world, disk, taken[snapshots // 2]


def cost(world: World, act) -> dict[str, object]:
    """What ``act`` does, counted: calls of our functions, records, blocks, file operations, map nodes made."""
    log, calls, steps = world.log, Counter(), []
    before = (log.records_appended, log.blocks_appended)
    world.directory.on_step = steps.append

    def profile(frame, event, _):
        if event == "call" and frame.f_globals["__name__"].startswith("simsr."):  # not what a garbage collection calls
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(None)
        world.directory.on_step = None
    return {
        "calls": calls,
        "records": log.records_appended - before[0],
        "blocks": log.blocks_appended - before[1],
        "steps": len(steps),
        "nodes": calls["Leaf.__init__"] + calls["Inner.__init__"] + calls["ExtentMap._own_node"],
    }


GIB, TIB = 1 << 30, 1 << 40
MANY = 10_000


@pytest.fixture(scope="module")
def costs():
    """{(size in bytes, number of snapshots): {operation: its cost}}, one after the other on the same disk."""
    found = {}
    for size_bytes, snapshots in ((GIB, 1), (2 * TIB, 1), (GIB, MANY), (2 * TIB, MANY)):
        world, disk, snapshot = sparse(size_bytes, snapshots)
        sr = world.repository
        found[size_bytes, snapshots] = {
            "revert": cost(world, lambda: sr.revert(snapshot)), "snapshot": cost(world, lambda: sr.snapshot(disk)),
            "clone": cost(world, lambda: sr.clone(snapshot)), "delete": cost(world, lambda: sr.delete(disk)),
        }  # fmt: skip
    return found


@pytest.mark.parametrize("operation", ["revert", "snapshot", "clone", "delete"])
def test_inv09_cost(costs, operation):
    """One record, no data, no map node, and the very same calls for 1 GiB and 2 TiB, for 1 snapshot and 10 000."""
    assert len(costs) == 4
    first = costs[GIB, 1][operation]["calls"]
    for what, each in costs.items():
        found = each[operation]
        assert (found["records"], found["blocks"], found["nodes"], found["steps"]) == (1, 0, 0, 1)
        calls = found["calls"]
        heights = {"ExtentMap.grow", "ExtentMap.forget", "ExtentMap.forget_owned", "NodeTable.empty_later"}  # one for each level
        differing = {name: (first[name], calls[name]) for name in calls | first if first[name] != calls[name]}
        assert differing.keys() <= heights, f"{what}: {differing}"
        assert all(calls[name] - first[name] <= 4 for name in heights)


def test_inv09_reading_after_a_revert_costs_the_same_with_a_thousand_snapshots():
    costs = {}
    for snapshots in (1, 1000):
        world, disk, snapshot = sparse(GIB, snapshots)
        world.repository.revert(snapshot)
        view = memoryview(bytearray(BLOCK))
        costs[snapshots] = cost(world, lambda: disk.volume.read([(number * (GIB // 64), view) for number in range(64)]))
    assert costs[1] == costs[1000]


# 10: space.


def full(disks: int):
    """A store without room for another segment file, filled by ``disks`` disks with a snapshot each until it refuses."""
    world = World()
    sr = world.repository
    vdis = [sr.create(10 * BLOCK) for _ in range(disks)]
    for tag, vdi in enumerate(vdis):
        fill(vdi, tag)
    snapshots = [sr.snapshot(vdi) for vdi in vdis]
    for vdi in vdis:
        fill(vdi, 99)
    sr.store.checkpoint()
    world.directory.room_bytes = 0
    stuff(vdis)
    return world, vdis, snapshots


def stuff(vdis) -> None:
    """Write until there is no room."""
    for tag in range(1000, 100000):
        try:
            fill(vdis[tag % len(vdis)], tag)
        except NoSpace:
            return
    raise AssertionError("the store never got full")


def test_inv10_a_full_store_reverts():
    world, disks, snapshots = full(4)
    sr = world.repository
    wanted = [content(snapshot) for snapshot in snapshots]
    for snapshot in snapshots:
        assert sr.revert(snapshot).changed
    sr.store.flush()
    assert [content(disk) for disk in disks] == wanted
    check(sr)
    sr = world.kill()
    assert [content(sr.get(disk.uuid)) for disk in disks] == wanted


def test_inv10_a_full_store_deletes_and_then_has_room():
    world, disks, snapshots = full(4)
    sr = world.repository
    for vdi in (*snapshots[1:], *disks[1:]):
        sr.delete(vdi)
    sr.store.flush()
    sr.store.reap()
    sr.store.checkpoint()
    fill(disks[0], 1)
    sr.revert(snapshots[0])
    assert content(disks[0]) == content(snapshots[0])
    check(sr)


def test_inv10_again_and_again():
    """Filling up, going back, making room by a checkpoint, without any new file."""
    world, disks, snapshots = full(3)
    sr = world.repository
    wanted = [content(snapshot) for snapshot in snapshots]
    for _ in range(25):
        for snapshot in snapshots:
            sr.revert(snapshot)
        assert [content(disk) for disk in disks] == wanted
        sr.store.reap()
        sr.store.checkpoint()
        stuff(disks)
    check(sr)


def test_inv10_refused_writes_do_not_use_up_what_is_reserved():
    world, disks, snapshots = full(3)
    sr = world.repository
    for turn in range(100):
        with pytest.raises(NoSpace):
            fill(disks[turn % 3], turn)
    for disk, snapshot in zip(disks, snapshots):
        assert sr.revert(snapshot).changed
        assert content(disk) == content(snapshot)


def test_inv10_other_changes_leave_the_reserve_alone():
    """Metadata is refused before the last room is gone, so that there is some for the changes that free space."""
    world, disks, snapshots = full(3)
    sr = world.repository
    first, second = snapshots[0], sr.snapshot(disks[0])
    with pytest.raises(NoSpace):
        for number in range(10000):
            sr.update(disks[0], name=str(number))
    for _ in range(15):
        assert sr.revert(first).changed and sr.revert(second).changed


def test_inv10_writes_leave_the_reserve_alone():
    """A revert that had to begin the reserve does not open it to the writes that follow."""
    world, disks, snapshots = full(3)
    sr = world.repository
    first, second = snapshots[0], sr.snapshot(disks[0])
    while sr.store.pool.spares:
        sr.revert(first)
        sr.revert(second)
    with pytest.raises(NoSpace):
        for number in range(10000):
            zero(disks[number % 3], number % 10 * BLOCK, BLOCK)
    for snapshot in snapshots:
        sr.revert(snapshot)


# 12: size.


def test_inv12_the_disk_takes_the_size_of_the_snapshot():
    world = World()
    sr = world.repository
    disk = sr.create(5 * BLOCK - 512)
    fill(disk, 1)
    small, old = sr.snapshot(disk), content(disk)
    sr.resize(disk, 1 << 40)
    put(disk, (1 << 40) - BLOCK, b"x" * BLOCK)
    put(disk, 4 * BLOCK, b"y" * BLOCK)
    large = sr.snapshot(disk)
    done = sr.revert(small)
    assert (done.changed, done.size_changed, disk.size_bytes) == (True, True, 5 * BLOCK - 512)
    assert content(disk) == old
    sr.resize(disk, 6 * BLOCK)
    assert content(disk) == old + bytes(BLOCK + 512)  # nothing of the larger life comes back
    done = sr.revert(large)
    assert done.size_changed and disk.size_bytes == 1 << 40
    assert disk.volume.read_bytes((1 << 40) - BLOCK, BLOCK) == b"x" * BLOCK
    assert disk.volume.read_bytes(4 * BLOCK, BLOCK) == b"y" * BLOCK
    sr = world.kill()
    assert sr.revert(sr.get(small.uuid)).size_changed
    assert content(sr.get(disk.uuid)) == old
    check(sr)


def test_inv12_growing_alone_is_a_change():
    sr = World().repository
    disk = sr.create(BLOCK)
    snapshot = sr.snapshot(disk)
    sr.resize(disk, BLOCK + 512)
    before = photo(sr)[disk.uuid]
    done = sr.revert(snapshot)
    assert (done.changed, done.size_changed) == (True, True)
    assert photo(sr)[disk.uuid][0] == {**before[0], "size_bytes": BLOCK}
    with unchanged(sr):
        assert not sr.revert(snapshot).changed


def test_the_map_is_as_high_as_the_snapshot_needs():
    """A disk that was 2 TiB for a while is not slower for ever."""
    sr = World().repository
    disk = sr.create(BLOCK)
    height = disk.volume.map.height
    snapshot = sr.snapshot(disk)
    sr.resize(disk, 2 * TIB)
    assert isinstance(disk.volume.map, ExtentMap) and disk.volume.map.height > height
    sr.revert(snapshot)
    assert disk.volume.map.height == height

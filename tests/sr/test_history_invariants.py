"""The invariants of revert (docs/revert.md) that are about more than mode reset of one disk; the numbers are those of the page."""

import random

import pytest
from history_kit import drawn, follow, go, go_together, redo, tips, undo
from sr_kit import BLOCK, WIDE, World, check, content, fill, put, tree, unchanged, zero

from simsr.errors import BadRequest, GroupChanged, NoSpace, NothingToUndo, ShrinkRefused, TipExpired, VdiExists, VdiInUse
from simsr.sr.history import Wish
from simsr.sr.tips import TIPS_MAX

OPERATIONS = [("reset", {}), ("reset", {"discard": True}), ("reset", {"prune": True}), ("commit", {}), ("commit", {"discard": True}),
              ("follow", {}), ("follow", {"discard": True})]  # fmt: skip


def branchy():
    """A disk with snapshots a, b, c in a row, left for a with something unsaved behind c, and something unsaved now."""
    world = World()
    sr = world.repository
    disk = sr.create(6 * BLOCK, name="disk")
    nodes = {}
    for tag, name in enumerate("abc", 1):
        fill(disk, tag)
        nodes[name] = sr.snapshot(disk, name=name)
    fill(disk, 9, range(2))
    go(sr, nodes["a"])
    fill(disk, 10, range(3))
    return world, sr, disk, nodes


def operate(sr, nodes, mode, options, name="b"):
    return go(sr, nodes["c"] if mode == "follow" else nodes[name], mode, **options)


@pytest.mark.parametrize("mode, options", OPERATIONS)
def test_inv01_identity_in_every_mode(mode, options):
    _, sr, disk, nodes = branchy()
    sr.update(disk, name="renamed", sm_config={"a": "b"}, sharable=True)
    before = disk.describe()
    for act in (lambda: operate(sr, nodes, mode, options), lambda: undo(sr, disk), lambda: redo(sr, disk)):
        act()
        now = disk.describe()
        assert {**now, "physical_utilisation_bytes": 0} == {**before, "physical_utilisation_bytes": 0}
        assert sr.vdis[disk.uuid] is disk and disk.volume.ident in sr.store.volumes


@pytest.mark.parametrize("mode", ["reset", "follow"])
def test_inv02_only_commit_changes_the_snapshot(mode):
    _, sr, disk, nodes = branchy()
    node = nodes["c"]
    before = (node.describe(), content(node), node.volume.ident)
    go(sr, node, mode)
    assert (node.describe(), content(node), node.volume.ident) == before
    went = content(disk)
    done = go(sr, nodes["b"], "commit")
    b = sr.get(nodes["b"].uuid)
    assert done.changed and content(b) == content(disk) == went
    assert b.describe()["snapshot_time"] > nodes["b"].describe()["snapshot_time"] and b.name == "b"


@pytest.mark.parametrize("mode, options", OPERATIONS)
def test_inv03_no_other_snapshot_goes_or_changes(mode, options):
    _, sr, disk, nodes = branchy()
    other = sr.snapshot(sr.clone(nodes["c"]))
    before = {vdi.uuid: (vdi.describe(), content(vdi)) for vdi in sr.vdis.values() if vdi.is_a_snapshot}
    meant = {nodes["c" if mode == "follow" else "b"].uuid} if options.get("discard") or mode == "commit" else set()
    if options.get("prune"):
        meant = {nodes["c"].uuid}
    done = operate(sr, nodes, mode, options)
    after = {vdi.uuid: (vdi.describe(), content(vdi)) for vdi in sr.vdis.values() if vdi.is_a_snapshot}
    assert {uuid: seen for uuid, seen in before.items() if uuid not in meant} == {u: seen for u, seen in after.items() if u not in meant}
    assert other.uuid in after
    if options.get("discard") or options.get("prune"):
        assert meant <= set(done.removed) and not meant & after.keys()


def test_inv04_the_same_op_id_is_the_same_operation():
    world, sr, disk, nodes = branchy()
    first = go(sr, nodes["b"], op_id="x")
    fill(disk, 50)
    for sr in (sr, world.kill(), world.reopen()):
        with unchanged(sr):
            again = go(sr, sr.get(nodes["b"].uuid), op_id="x")
        assert (again.changed, again.tip, again.mode) == (first.changed, first.tip, "reset")
    with unchanged(sr), pytest.raises(BadRequest):
        go(sr, sr.get(nodes["b"].uuid), "commit", op_id="x")
    disk = sr.get(disk.uuid)
    taken_back = undo(sr, disk, op_id="y")
    with unchanged(sr):
        assert sr.history.carry_out([Wish(disk, "undo")], op_id="y")[0].tip == taken_back.tip


def test_inv04_an_op_id_that_changed_nothing_goes_on_changing_nothing():
    _, sr, disk, nodes = branchy()
    go(sr, nodes["b"])
    assert not go(sr, nodes["b"], op_id="noop").changed
    fill(disk, 60)
    with unchanged(sr):
        assert not go(sr, nodes["b"], op_id="noop").changed


def group_of(count):
    world = World(WIDE)
    sr = world.repository
    disks = [sr.create((2 + number) * BLOCK, name=f"d{number}") for number in range(count)]
    for tag, disk in enumerate(disks):
        fill(disk, tag)
    taken = sr.snapshot_group(disks, name="group")
    held = [content(disk) for disk in disks]
    for tag, disk in enumerate(disks):
        fill(disk, 100 + tag)
    return world, sr, disks, taken, held


def test_inv05_a_group_is_one_record_or_nothing():
    world, sr, disks, taken, held = group_of(5)
    assert len({snapshot.meta["group"]["id"] for snapshot in taken}) == 1
    left = [content(disk) for disk in disks]
    seq, gens = sr.store.log.seq, [disk.gen for disk in disks]
    results = go_together(sr, taken[2])
    assert sr.store.log.seq == seq + 1 and [content(disk) for disk in disks] == held
    assert [result.vdi.uuid for result in results] == [disk.uuid for disk in disks]
    assert [disk.gen for disk in disks] == [gen + 1 for gen in gens]
    undo(sr, disks[4], group=True)
    assert [content(disk) for disk in disks] == left and sr.store.log.seq == seq + 2
    redo(sr, disks[0], group=True)
    assert [content(disk) for disk in disks] == held
    for sr in (world.kill(), world.reopen()):
        assert [content(sr.get(disk.uuid)) for disk in disks] == held


def test_inv05_one_member_that_cannot_stops_all():
    _, sr, disks, taken, _ = group_of(3)
    sr.attach(disks[1], "k", "host", True, "attach")
    with unchanged(sr), pytest.raises(VdiInUse):
        go_together(sr, taken[0])
    sr.detach(disks[1], "k")
    sr.delete(taken[2])
    with unchanged(sr), pytest.raises(GroupChanged):
        go_together(sr, taken[0])


def test_inv05_who_looked_before_says_so():
    _, sr, disks, taken, _ = group_of(2)
    seen = {disk.uuid: disk.gen for disk in disks}
    sr.snapshot(disks[1])
    with unchanged(sr), pytest.raises(GroupChanged):
        go_together(sr, taken[0], expected=seen)
    assert go_together(sr, taken[0], expected={disk.uuid: disk.gen for disk in disks})[0].changed


def test_inv05_a_group_is_undone_together_or_not():
    _, sr, disks, taken, held = group_of(2)
    go_together(sr, taken[0])
    fill(disks[1], 7)
    go(sr, taken[1])
    with unchanged(sr), pytest.raises(GroupChanged):
        undo(sr, disks[0], group=True)
    undo(sr, disks[1])
    undo(sr, disks[0], group=True)
    assert all(content(disk) != old for disk, old in zip(disks, held))


@pytest.mark.parametrize("bad", ["same twice", "one", "a snapshot"])
def test_inv05_what_is_no_group(bad):
    _, sr, disks, taken, _ = group_of(2)
    chosen = {"same twice": [disks[0], disks[0]], "one": [disks[0]], "a snapshot": [disks[0], taken[0]]}[bad]
    with unchanged(sr), pytest.raises(BadRequest):
        sr.snapshot_group(chosen)
    lone = sr.snapshot(disks[0])
    with unchanged(sr), pytest.raises(GroupChanged):
        go_together(sr, lone)
    with unchanged(sr), pytest.raises(BadRequest):
        sr.wishes.group(taken[0], "follow")


def test_inv05_stamps_of_others_make_groups_too():
    """xapi snapshots the disks of a VM one by one; a common stamp joins them."""
    sr = World().repository
    disks = [sr.create(BLOCK), sr.create(BLOCK)]
    first, _ = [sr.snapshot(disk, group="vm 7") for disk in disks]
    for disk in disks:
        fill(disk, 3)
    assert [result.changed for result in go_together(sr, first)] == [True, True]
    again = sr.snapshot(disks[0], group="vm 7")
    with unchanged(sr), pytest.raises(GroupChanged):
        go_together(sr, again)


def test_inv07_nothing_that_was_written_is_lost():
    """Whatever the head held when it was left is in a snapshot or in a tip, as long as tips are kept."""
    rng = random.Random(7)
    world, sr, disk, nodes = branchy()
    written = {content(disk)}
    for tag in range(TIPS_MAX - 2):
        go(sr, nodes[rng.choice("abc")])
        fill(disk, 200 + tag, range(rng.randrange(5), 6))
        written.add(content(disk))
    for sr in (sr, world.kill(), world.reopen()):
        there = {content(vdi) for vdi in (*sr.vdis.values(), *sr.tips.values())}
        assert written <= there
        assert all(tip.consistency == "clean" for tip in sr.tips.values())


def test_inv07_without_tips_what_is_not_snapshotted_goes_and_its_space_comes_back():
    sr = World().repository
    sr.update_self(tips_max=0)
    disk = sr.create(6 * BLOCK)
    fill(disk, 1)
    snapshot = sr.snapshot(disk)
    fill(disk, 2, range(3))
    kept, left = sr.snapshot(disk), content(disk)
    fill(disk, 3, range(2))
    assert sr.revert(snapshot).lost and not sr.tips
    assert content(kept) == left
    sr.store.reap()
    leaves = [sr.store.table.get(ident) for vdi in sr.vdis.values() for _, ident in vdi.volume.map.leaves()]
    assert len({entry for leaf in leaves for entry in leaf.slots if entry}) == 9
    assert len(sr.vdis) == 3 and len(sr.store.volumes) == 3
    with unchanged(sr), pytest.raises(NothingToUndo):
        undo(sr, disk)
    sr.revert(kept)
    assert content(disk) == left
    check(sr)


@pytest.mark.parametrize("mode, options", OPERATIONS)
@pytest.mark.parametrize("between", ["nothing", "writes", "a snapshot", "kill", "checkpoint"])
def test_inv08_undo_and_redo(mode, options, between):
    world, sr, disk, nodes = branchy()
    before, shape = content(disk), drawn(sr, disk)
    operate(sr, nodes, mode, options)
    after, new_shape = content(disk), drawn(sr, disk)
    if between == "writes":
        fill(disk, 77, range(1, 4))
    elif between == "a snapshot":
        sr.snapshot(disk, name="later")
    elif between == "checkpoint":
        sr.store.checkpoint()
    elif between == "kill":
        sr = world.kill()
        disk = sr.get(disk.uuid)
    went = content(disk)
    undo(sr, disk)
    assert content(disk) == (went if mode == "commit" else before)  # a commit leaves the head alone, and so does taking it back
    if between in ("nothing", "kill", "checkpoint"):
        assert drawn(sr, disk) == shape
    assert went in {content(vdi) for vdi in (*sr.vdis.values(), *sr.tips.values(), disk)}
    check(sr)
    redo(sr, disk)
    assert content(disk) == went
    if between in ("nothing", "kill", "checkpoint"):
        assert (went, drawn(sr, disk)) == (after, new_shape)
    check(sr)


def test_inv08_a_commit_is_undone_although_what_the_head_came_from_is_gone():
    """The disk then named a parent that was not there, and could never be reverted again (found by the simulation)."""
    world = World()
    sr = world.repository
    disk = sr.create(8 * BLOCK, name="disk")
    fill(disk, 1)
    first = sr.snapshot(disk, name="first")
    old = content(first)
    fill(disk, 2)
    between = sr.snapshot(disk, name="between")
    fill(disk, 3)
    head = content(disk)
    go(sr, first, "commit")
    sr.delete(between)
    undo(sr, disk)
    assert (content(disk), content(sr.get(first.uuid))) == (head, old)
    check(sr)
    go(sr, sr.get(first.uuid))
    assert content(disk) == old
    check(sr)


def test_the_metadata_of_a_tip_are_not_changed():
    _, sr, disk, nodes = branchy()
    fill(disk, 70)
    go(sr, nodes["b"])
    (tip, *_) = tips(sr, disk)
    with unchanged(sr), pytest.raises(BadRequest, match="pin it"):
        sr.update(tip, name="another")


def test_inv08_a_new_operation_ends_redo_and_keeps_the_tip():
    _, sr, disk, nodes = branchy()
    go(sr, nodes["b"])
    fill(disk, 70)
    written = content(disk)
    undo(sr, disk)
    go(sr, nodes["c"])
    with unchanged(sr), pytest.raises(NothingToUndo):
        redo(sr, disk)
    assert written in [content(tip) for tip in tips(sr, disk)]


def test_inv08_what_is_not_kept_any_more_is_not_undone():
    _, sr, disk, nodes = branchy()
    go(sr, nodes["b"])
    for tip in tips(sr, disk):
        sr.delete(tip)
    with unchanged(sr), pytest.raises(TipExpired):
        undo(sr, disk)
    assert not disk.history.get("undo")


def test_inv08_undo_gives_way_to_a_vdi_that_has_the_uuid_now():
    _, sr, disk, nodes = branchy()
    go(sr, nodes["b"], discard=True)
    sr.create(512, uuid=nodes["b"].uuid)
    with unchanged(sr), pytest.raises(VdiExists):
        undo(sr, disk)


def test_inv10_tips_give_way_to_writes():
    """A full store lets go of tips, the oldest first, before it has to refuse; then of what undo holds; never of a snapshot."""
    _, sr, disk, nodes = branchy()
    go(sr, nodes["b"], discard=True)
    fill(disk, 80)
    go(sr, nodes["c"])
    times = [tip.meta["snapshot_time"] for tip in tips(sr, disk)]
    assert len(times) == 3 and any("role" in meta for meta in tree(sr).values())
    pinned = tips(sr, disk)[0]
    sr.pin(pinned, name="pinned")
    held = {vdi.uuid: content(vdi) for vdi in sr.vdis.values()}
    given = []
    while sr.keeper.give_up_oldest():
        given.append(len(sr.tips))
        check(sr)
    assert not sr.tips and not any("role" in meta for meta in tree(sr).values() if meta["role" if "role" in meta else "uuid"] == "kept")
    assert {vdi.uuid: content(vdi) for vdi in sr.vdis.values()} == held and pinned.uuid in held and len(given) >= 3
    with unchanged(sr), pytest.raises(TipExpired):
        undo(sr, disk)


def test_inv10_a_full_store_reverts_in_every_mode():
    for mode, options in OPERATIONS:
        world, sr, disk, nodes = branchy()
        world.directory.room_bytes = 0
        with pytest.raises(NoSpace):
            for tag in range(100000):
                fill(disk, tag)
        assert operate(sr, nodes, mode, options).changed
        undo(sr, disk)
        sr.store.flush()
        check(world.kill())


def test_inv11_the_difference_after_a_revert_is_exact():
    """As CBT and diff see it: what differs between the content before and after, and nothing else."""
    _, sr, disk, nodes = branchy()
    go(sr, nodes["c"])
    zero(disk, BLOCK, BLOCK)
    put(disk, 4 * BLOCK, b"x" * BLOCK)
    go(sr, nodes["c"])
    left = tips(sr, disk)[-1]

    def differing(old, new):
        diff = sr.diff(old, new)
        for step in diff.work():
            if step is not None:
                step()
        return [(offset // BLOCK, length // BLOCK) for offset, length, _ in diff.ranges]

    assert differing(nodes["c"], disk) == [] and differing(left, disk) == [(1, 1), (4, 1)]
    for _ in range(2):
        undo(sr, disk)
        assert differing(nodes["c"], disk) == [(1, 1), (4, 1)]
        redo(sr, disk)
        assert differing(nodes["c"], disk) == []


def test_inv12_keep_size():
    _, sr, disk, nodes = branchy()
    sr.resize(disk, 9 * BLOCK)
    fill(disk, 5)
    done = go(sr, nodes["a"], keep_size=True)
    assert not done.size_changed and disk.size_bytes == 9 * BLOCK
    assert content(disk) == content(nodes["a"]) + bytes(3 * BLOCK)
    with unchanged(sr):
        assert not go(sr, nodes["a"], keep_size=True).changed
    large = sr.snapshot(disk)
    assert go(sr, nodes["a"]).size_changed and disk.size_bytes == 6 * BLOCK
    with unchanged(sr), pytest.raises(ShrinkRefused):
        go(sr, large, keep_size=True)
    assert undo(sr, disk).size_changed and disk.size_bytes == 9 * BLOCK


def test_inv12_a_disk_in_use_does_not_shrink():
    _, sr, disk, nodes = branchy()
    sr.resize(disk, 9 * BLOCK)
    sr.attach(disk, "k", "host", True, "nbd")
    with unchanged(sr), pytest.raises(ShrinkRefused):
        go(sr, nodes["a"], live=True)
    assert go(sr, nodes["a"], live=True, keep_size=True).changed


# Tips.


def test_tips_are_crash_consistent_until_everybody_has_left_in_order():
    world, sr, disk, nodes = branchy()

    def left_as():
        sr_now.revert(sr_now.get(nodes["b"].uuid))
        fill(sr_now.get(disk.uuid), random.randrange(1 << 30))
        return tips(sr_now, disk)[-1].consistency

    sr_now = sr
    go(sr, nodes["c"])
    for in_order, expected in ((True, "clean"), (False, "crash"), (True, "clean")):
        sr.attach(disk, "k", "nbd client", True, "nbd")
        sr.written(disk)
        fill(disk, 5)
        sr.detach(disk, "k", in_order)
        go(sr, nodes["b"])
        assert tips(sr, disk)[-1].consistency == expected
    sr.attach(disk, "k", "nbd client", True, "nbd")
    sr.written(disk)
    fill(disk, 6)
    sr = world.kill()
    disk = sr.get(disk.uuid)
    go(sr, sr.get(nodes["b"].uuid))
    assert tips(sr, disk)[-1].consistency == "crash"
    follow(sr, tips(sr, disk)[-1])
    go(sr, sr.get(nodes["a"].uuid))
    assert tips(sr, disk)[-1].consistency == "crash", "following it does not make it clean"


def test_the_newest_tips_stay():
    world, sr, disk, nodes = branchy()
    sr.update_self(tips_max=3)
    held = []
    for tag in range(6):
        fill(disk, 300 + tag)
        held.append(content(disk))
        go(sr, nodes["b"])
    assert [content(tip) for tip in tips(sr, disk)] == held[-3:]
    for expected in held[:-4:-1]:
        undo(sr, disk)
        assert content(disk) == expected
    with unchanged(sr), pytest.raises(TipExpired):
        undo(sr, disk)
    sr.update_self(tips_max=0)
    assert not sr.tips and not disk.history.get("redo")
    check(sr)


def test_old_tips_go():
    world, sr, disk, nodes = branchy()
    go(sr, nodes["b"], discard=True)
    assert sr.keeper.expire() == 0 and len(sr.tips) == 2
    world._ticks += 24 * 3600
    assert sr.keeper.expire() == 1
    assert not sr.tips and sr.keeper.expire() == 0
    assert {meta.get("role") for meta in tree(sr).values()} <= {None, "ghost"}
    check(sr)


def test_a_pinned_tip_is_a_snapshot_with_the_same_uuid():
    world, sr, disk, nodes = branchy()
    tip = tips(sr, disk)[0]
    held = content(tip)
    sr.attach(tip, "reader", "nbd client", False, "nbd")
    pinned = sr.pin(tip, name="kept")
    assert pinned.uuid == tip.uuid and pinned.is_a_snapshot and not pinned.is_a_tip and pinned.name == "kept" and not sr.tips
    assert pinned.describe()["attached"] == [{"client": "nbd client", "writable": False, "kind": "nbd"}]
    with unchanged(sr), pytest.raises(BadRequest):
        sr.pin(pinned)
    world._ticks += 48 * 3600
    sr.keeper.expire()
    for sr in (sr, world.kill()):
        assert content(sr.get(pinned.uuid)) == held
        assert go(sr, sr.get(pinned.uuid)).changed


def test_a_tip_to_which_somebody_is_connected_stays():
    _, sr, disk, nodes = branchy()
    tip = tips(sr, disk)[0]
    sr.attach(tip, "k", "reader", False, "nbd")
    sr.update_self(tips_max=0)
    assert list(sr.tips) == [tip.uuid] and not sr.keeper.give_up_oldest()
    for act in (lambda: sr.delete(disk), lambda: follow(sr, tip), lambda: go(sr, nodes["a"], prune=True)):
        with unchanged(sr), pytest.raises(VdiInUse):
            act()
    sr.detach(tip, "k")
    sr.keeper.expire()
    assert not sr.tips


def test_a_disk_takes_its_tips_along():
    world, sr, disk, nodes = branchy()
    go(sr, nodes["b"], discard=True)
    sr.delete(disk)
    assert not sr.tips and not any(meta.get("role") == "kept" for meta in tree(sr).values())
    for node in ("a", "c"):
        sr.delete(nodes[node])
    assert not sr.store.volumes
    check(world.kill())


def test_what_cannot_be_wished():
    _, sr, disk, nodes = branchy()
    tip = tips(sr, disk)[0]
    for act in (
        lambda: go(sr, tip), lambda: go(sr, tip, "commit"), lambda: go(sr, nodes["a"], "sideways"), lambda: sr.snapshot(tip),
        lambda: go(sr, nodes["a"], "commit", keep_size=True), lambda: sr.update_self(tips_max=-1), lambda: sr.update_self(tips_hours=1 << 40),
    ):  # fmt: skip
        with unchanged(sr), pytest.raises(BadRequest):
            act()


def test_clones_of_tips_are_disks():
    _, sr, disk, _ = branchy()
    tip = tips(sr, disk)[0]
    clone = sr.clone(tip)
    assert content(clone) == content(tip) and not clone.is_a_snapshot and clone.family == disk.family
    fill(clone, 1)
    check(sr)


def test_deleting_any_snapshot_keeps_the_tree_a_tree():
    rng = random.Random("deleting")
    for _ in range(30):
        world, sr, disk, nodes = branchy()
        for step in range(12):
            snapshots = [vdi for vdi in sr.vdis.values() if vdi.is_a_snapshot]
            if snapshots and rng.random() < 0.5:
                go(sr, rng.choice(snapshots))
            fill(disk, step)
            sr.snapshot(disk) if rng.random() < 0.6 else None
        snapshots = [vdi for vdi in sr.vdis.values() if vdi.is_a_snapshot]
        rng.shuffle(snapshots)
        for snapshot in snapshots:
            sr.delete(snapshot)
            check(sr)
        assert len([line for line in drawn(sr, disk) if "HEAD" in line]) == 1
        sr.delete(disk)
        assert not sr.store.volumes
        assert not world.kill().store.volumes


def test_inv08_a_group_of_which_one_disk_was_unchanged_can_be_undone():
    _, sr, disks, taken, held = group_of(3)
    go(sr, taken[1])
    left = [content(disk) for disk in disks]
    results = go_together(sr, taken[0])
    assert [result.changed for result in results] == [True, False, True]
    undo(sr, disks[2], group=True)
    assert [content(disk) for disk in disks] == left
    redo(sr, disks[0], group=True)
    assert [content(disk) for disk in disks] == held

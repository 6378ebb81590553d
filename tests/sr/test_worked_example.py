"""The worked example of docs/revert.md, step by step: a, b, c, d are taken, the disk goes back to b, then e is taken."""

import pytest
from history_kit import drawn, follow, go, go_together, redo, tips, undo
from sr_kit import BLOCK, STYLES, Kill, World, check, content, fill, tree

from simsr.errors import AmbiguousTip, NothingToUndo


class Example:
    """The disk, its snapshots by name, and what everything held."""

    def __init__(self) -> None:
        self.world = World()
        self.sr = self.world.repository
        self.disk = self.sr.create(6 * BLOCK, name="disk")
        self.held: dict[str, bytes] = {}
        for tag, name in enumerate("abcd", 1):
            self.take(name, tag)
        self.w1 = self.write(10)
        go(self.sr, self["b"])
        self.take("e", 20)
        self.w3 = self.write(30)

    def __getitem__(self, name: str):
        (found,) = [vdi for vdi in self.sr.vdis.values() if vdi.name == name]
        return found

    def write(self, tag: int) -> bytes:
        fill(self.disk, tag, range(tag % 3, 6))
        return content(self.disk)

    def take(self, name: str, tag: int) -> None:
        self.held[name] = self.write(tag)
        self.sr.snapshot(self.disk, name=name)

    def holds(self, expected: bytes, lines: list[str]) -> None:
        """The head holds ``expected``, the tree is as drawn, and every snapshot that is there is as it was."""
        assert content(self.disk) == expected
        assert drawn(self.sr, self.disk) == lines
        for vdi in self.sr.vdis.values():
            if vdi.is_a_snapshot:
                assert content(vdi) == self.held[vdi.name], vdi.name
        check(self.sr)


def test_step_by_step():
    ex = Example()
    sr, disk, held = ex.sr, ex.disk, ex.held
    # The tree to begin with: what was written after d, and left by going to b, hangs from d.
    ex.holds(ex.w3, ["a", ".b", "..c", "...d", "....tip", "..e", "...HEAD*"])
    (left,) = tips(sr, disk)
    assert content(left) == ex.w1 and left.consistency == "clean"

    # 1: revert d. What was written after e is saved.
    go(sr, ex["d"])
    ex.holds(held["d"], ["a", ".b", "..c", "...d", "....tip", "....HEAD", "..e", "...tip"])
    second = tips(sr, disk)[1]
    assert content(second) == ex.w3

    # 2: revert --follow with base d: back to the end of that branch. The tip is used up, nothing is lost.
    follow(sr, disk)
    ex.holds(ex.w1, ["a", ".b", "..c", "...d", "....HEAD*", "..e", "...tip"])

    # 3: undo: plain d again, and the end of the branch is a tip again, the same one.
    undo(sr, disk)
    ex.holds(held["d"], ["a", ".b", "..c", "...d", "....tip", "....HEAD", "..e", "...tip"])
    assert [tip.uuid for tip in tips(sr, disk)] == [left.uuid, second.uuid] and tips(sr, disk)[0].name == left.name
    redo(sr, disk)
    ex.holds(ex.w1, ["a", ".b", "..c", "...d", "....HEAD*", "..e", "...tip"])
    undo(sr, disk)

    # 4: revert b --discard: b is gone; c, e and the head hang from a.
    go(sr, ex["b"], discard=True)
    ex.holds(held["b"], ["a", ".c", "..d", "...tip", ".e", "..tip", ".HEAD*"])

    # 5: undo brings b back, too.
    undo(sr, disk)
    ex.holds(held["d"], ["a", ".b", "..c", "...d", "....tip", "....HEAD", "..e", "...tip"])

    # 6: revert --follow TIP: the end of the other branch.
    follow(sr, tips(sr, disk)[1])
    ex.holds(ex.w3, ["a", ".b", "..c", "...d", "....tip", "..e", "...HEAD*"])

    # 7: commit e: e is what the head is; the old e is kept for undo only.
    held["e"] = ex.w3
    go(sr, ex["e"], "commit")
    ex.holds(ex.w3, ["a", ".b", "..c", "...d", "....tip", "..e", "...HEAD"])

    # 8: commit b: the old b stays as a ghost, because c and e hang from it.
    old_b, held["b"] = held["b"], ex.w3
    go(sr, ex["b"], "commit")
    ex.holds(ex.w3, ["a", ".(b)", "..c", "...d", "....tip", "..e", "..b", "...HEAD"])
    undo(sr, disk)
    held["b"] = old_b
    ex.holds(ex.w3, ["a", ".b", "..c", "...d", "....tip", "..e", "...HEAD"])
    redo(sr, disk)
    held["b"] = ex.w3

    # 9: revert c --prune says what goes; then it goes.
    wish = sr.wishes.one(ex["c"], prune=True)
    (plan,) = sr.history.plan([wish])
    assert set(plan.removed) == {ex["d"].uuid, left.uuid} and plan.changed
    ex.holds(ex.w3, ["a", ".(b)", "..c", "...d", "....tip", "..e", "..b", "...HEAD"])
    done = go(sr, ex["c"], prune=True, op_id="nine")
    assert done.removed == plan.removed
    ex.holds(held["c"], ["a", ".(b)", "..c", "...HEAD", "..e", "..b"])

    # 10: the process dies before its answer; the client asks again, and gets the same answer.
    ex.sr = ex.world.kill()
    ex.disk = ex.sr.get(disk.uuid)
    seq, before = ex.sr.store.log.seq, tree(ex.sr)
    again = go(ex.sr, ex["c"], prune=True, op_id="nine")
    assert (again.removed, again.changed, again.size_changed, again.tip) == (done.removed, True, False, done.tip)
    assert ex.sr.store.log.seq == seq and tree(ex.sr) == before
    ex.holds(held["c"], ["a", ".(b)", "..c", "...HEAD", "..e", "..b"])


def test_two_tips_below_d_are_ambiguous():
    ex = Example()
    go(ex.sr, ex["d"])
    ex.write(40)
    go(ex.sr, ex["b"])
    with pytest.raises(AmbiguousTip) as caught:
        follow(ex.sr, ex["d"])
    assert all(tip.uuid in str(caught.value) for tip in tips(ex.sr, ex.disk) if tip.parent == ex["d"].volume.ident)


def test_undo_to_the_beginning_and_redo_to_the_end():
    """Everything of the example taken back step by step, and done again: byte for byte, and the same trees."""
    ex = Example()
    sr, disk = ex.sr, ex.disk
    states = [(content(disk), drawn(sr, disk))]
    for act in (
        lambda: go(sr, ex["d"]), lambda: follow(sr, disk), lambda: go(sr, ex["b"], discard=True), lambda: go(sr, ex["e"], "commit"),
        lambda: go(sr, ex["c"], prune=True), lambda: go(sr, ex["a"], "commit", discard=True),
    ):  # fmt: skip
        act()
        states.append((content(disk), drawn(sr, disk)))
    for _ in range(2):
        for state in states[-2::-1]:
            undo(sr, disk)
            assert (content(disk), drawn(sr, disk)) == state
        for state in states[1:]:
            redo(sr, disk)
            assert (content(disk), drawn(sr, disk)) == state
            check(sr)
    with pytest.raises(NothingToUndo):
        redo(sr, disk)


# Two disks, one record.


def two(kill_after: int | None, mode: str, filler: int):
    """Two disks with a group snapshot, changed since, reverted together; ``kill_after`` steps of that are done."""
    world = World()
    sr = world.repository
    disks = [sr.create(4 * BLOCK, name=name) for name in "xy"]
    for tag, disk in enumerate(disks, 1):
        fill(disk, tag)
    x, _ = sr.snapshot_group(disks, name="b")
    for tag, disk in enumerate(disks, 11):
        fill(disk, tag, range(3))
    for number in range(filler):
        sr.update(disks[0], description=f"{number:03}" * 30)
    sr.store.flush()
    old, steps = [content(disk) for disk in disks], []

    def on_step(what):
        if kill_after is not None and len(steps) == kill_after:
            raise Kill(what)
        steps.append(what)

    world.directory.on_step = on_step
    try:
        go_together(sr, x, mode)
        sr.store.flush()
    except Kill:
        pass
    world.directory.on_step = None
    return world, [disk.uuid for disk in disks], old, steps


@pytest.mark.parametrize("mode", ["reset", "commit"])
@pytest.mark.parametrize("filler", [0, 7, 8, 9])
def test_a_group_is_killed_at_every_step(seeds, mode, filler):
    """(x old, y old) or (x b, y b), whatever was killed when, and the trees agree with that."""
    import random

    world, uuids, old, every_step = two(None, mode, filler)
    new_trees, flushed = tree(world.repository), len(every_step) - 1
    new = [content(world.repository.get(uuid)) for uuid in uuids]
    assert mode == "commit" or all(a != b for a, b in zip(old, new))
    outcomes = set()
    for kill_after in range(len(every_step) + 1):
        world, *_ = two(kill_after, mode, filler)
        survivors = [("kill", world.directory.after_kill())]
        for seed in seeds(len(STYLES)):
            survivors.append((STYLES[seed], world.directory.after_cut(random.Random(seed), STYLES[seed])))
        for style, survivor in survivors:
            sr = world.open(survivor)
            found = [content(sr.get(uuid)) for uuid in uuids]
            is_new = tree(sr) == new_trees
            assert found == (new if is_new else old), f"{style} after {kill_after}"
            assert is_new or all(not sr.get(uuid).history.get("undo") for uuid in uuids)
            assert is_new or kill_after < flushed
            outcomes.add(is_new)
    assert outcomes == {True, False}

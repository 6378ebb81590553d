"""Destroying data and composing: exact for ever after, wholly done or not at all, and nothing is left behind.

`History` is the property: random histories against a model of dicts, in which every write makes a version of its own. Whatever was destroyed,
deleted, reverted, cleaned, restarted or killed, the changed blocks between any two VDIs of a chain are those whose versions differ.
"""

import random

import pytest
from sr_kit import BLOCK, STYLES, TINY, World, check, content, fill, put, unchanged, zero
from test_cbt import UNIT, changed

from simsr.errors import BadSize, NoCbt, NotFound, NothingToUndo, SimsrError, TipExpired, VdiInUse, VdiReadOnly, WrongKind
from simsr.sr.drafts import Destruction, Graft
from simsr.sr.hidden import BOOT_BASE, DRAFT
from simsr.store.births import WINDOW_UNITS, table_bytes
from simsr.store.check import Check
from simsr.store.memory import MemoryDirectory
from simsr.store.segments import State
from simsr.store.units import UNIT_BYTES


def run(work, between=lambda: None):
    for step in work:
        if step is not None:
            step()
        between()


def build(draft: Destruction, between=lambda: None) -> None:
    """Fill the draft as the daemon does."""
    window = 0
    while window is not None:
        walk = draft.fingerprint(window)
        run(walk.work(), between)
        for offset, data in walk.parts:
            put_at(draft.volume, offset, data)
        window = walk.next_window


def destroy(sr, vdi, between=lambda: None) -> None:
    draft = Destruction(sr, vdi)
    try:
        build(draft, between)
        draft.finish()
    finally:
        draft.abandon()


def compose(sr, vdi, parent, ranges_max=3) -> None:
    draft = Graft(sr, vdi, parent)
    try:
        start = 0
        while start is not None:
            diff = draft.difference(start, ranges_max)
            run(diff.work())
            for offset, length, has_data in diff.ranges:
                if has_data:
                    put_at(draft.volume, offset, vdi.volume.read_bytes(offset, length))
            start = diff.next_offset
        draft.finish()
    finally:
        draft.abandon()


def put_at(volume, offset, data):
    with volume._table.waiting():
        assert volume.write([(offset, len(data), memoryview(data))]) == 1


def hidden(sr):
    return [volume for volume in sr.store.volumes.values() if volume.meta.get("role") in (DRAFT, BOOT_BASE)]


def clean_some(store, rng):
    """Have the cleaner move what is in use of a few segments."""
    sealed = [segment for segment in store.pool.by_slot if segment is not None and segment.state is State.SEALED]
    for segment in rng.sample(sealed, min(3, len(sealed))):
        if segment.state is State.SEALED:
            run(store.cleaner.clean(segment))


@pytest.fixture
def tracked(sr):
    vdi = sr.create(3 * UNIT_BYTES, name="tracked")
    fill(vdi, 1)
    sr.set_cbt(vdi, True)
    return vdi


class History:
    """One disk with CBT, its snapshots, and for each the version of each block: a number for every write, 0 for a hole."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.world = World()
        self.blocks = self.rng.choice((40, 70, 100))
        disk = self.sr.create(self.blocks * BLOCK)
        self.sr.set_cbt(disk, True)
        self.disk, self.versions, self.tag = disk.uuid, {disk.uuid: [0] * self.blocks}, 0
        self.destroyed: set[str] = set()
        self.moved = 0

    @property
    def sr(self):
        return self.world.repository

    def snapshots(self, with_data=False):
        return [uuid for uuid in self.versions if uuid != self.disk and not (with_data and uuid in self.destroyed)]

    def write(self):
        with self.sr.store.table.waiting():
            self.write_some(self.versions[self.disk])

    def write_some(self, versions):
        for _ in range(self.rng.choice((1, 3, 10))):
            block, disk = self.rng.randrange(len(versions)), self.sr.get(self.disk)
            if self.rng.random() < 0.15:
                zero(disk, block * BLOCK, BLOCK)
                versions[block] = 0
            else:
                # Often what was there before, and before that: another version all the same.
                put(disk, block * BLOCK, random.Random(self.rng.randrange(3)).randbytes(BLOCK))
                self.tag += 1
                versions[block] = self.tag

    def snapshot(self):
        if len(self.versions) < 7:
            snapshot = self.sr.snapshot(self.sr.get(self.disk))
            self.versions[snapshot.uuid] = list(self.versions[self.disk])

    def destroy(self):
        if snapshots := self.snapshots(with_data=True):
            uuid = self.rng.choice(snapshots)
            destroy(self.sr, self.sr.get(uuid), lambda: self.rng.random() < 0.1 and self.upkeep())
            self.destroyed.add(uuid)

    def delete(self):
        if snapshots := self.snapshots():
            uuid = self.rng.choice(snapshots)
            self.sr.delete(self.sr.get(uuid))
            del self.versions[uuid]
            self.destroyed.discard(uuid)

    def revert(self):
        if snapshots := self.snapshots(with_data=True):
            uuid = self.rng.choice(snapshots)
            self.sr.revert(self.sr.get(uuid))
            self.versions[self.disk] = list(self.versions[uuid])

    def grow(self):
        if self.rng.random() < 0.3 and len(self.versions[self.disk]) < 3 * self.blocks:
            more = self.rng.choice((1, 7, 20))
            self.versions[self.disk] += [0] * more
            self.sr.resize(self.sr.get(self.disk), len(self.versions[self.disk]) * BLOCK)

    def upkeep(self):
        store, before = self.sr.store, self.sr.store.cleaner.blocks_moved
        with store.table.waiting():
            clean = lambda: clean_some(store, self.rng)
            self.rng.choice((store.reap, store.flush, store.checkpoint, clean, clean))()
        self.moved += store.cleaner.blocks_moved - before

    def restart(self):
        self.sr.store.flush()
        if self.rng.random() < 0.5:
            self.world.cut(self.rng, self.rng.choice(STYLES))
        else:
            self.rng.choice((self.world.reopen, self.world.kill))()

    def squeeze(self):
        for _ in range(2):
            self.sr.store.table.evict(1 << 30, -1)

    def step(self):
        actions = [(10, self.write), (3, self.snapshot), (3, self.destroy), (2, self.delete), (2, self.revert), (1, self.grow),
                   (4, self.upkeep), (1, self.restart), (1, self.squeeze)]  # fmt: skip
        weights, choices = zip(*actions)
        self.rng.choices(choices, weights)[0]()

    def compare(self):
        order = sorted(self.snapshots(), key=lambda uuid: self.sr.get(uuid).volume.ident) + [self.disk]
        for at, old in enumerate(order):
            assert self.sr.get(old).has_data == (old not in self.destroyed)
            for new in order[at + 1 :]:
                ours, theirs = self.versions[old], self.versions[new]
                if len(theirs) < len(ours):
                    continue
                wanted = {block // UNIT for block, version in enumerate(theirs) if block >= len(ours) or version != ours[block]}
                found = changed(self.sr, self.sr.get(old), self.sr.get(new))
                assert set(found) == wanted, f"{old in self.destroyed}, {new in self.destroyed}"


def test_random_histories(seeds):
    moved = destroyed = 0
    for seed in seeds(25):
        history = History(seed)
        try:
            for _ in range(40):
                history.step()
                if history.rng.random() < 0.25:
                    history.compare()
            history.compare()
            check(history.sr)
            assert not hidden(history.sr)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        moved, destroyed = moved + history.moved, destroyed + len(history.destroyed)
    assert moved > 100 and destroyed > 10, "or nothing was tested"


def test_moved_blocks_keep_their_births(world, tracked):
    """The place of a block changes, and another one gets its place: the fingerprint is not impressed."""
    sr, rng = world.repository, random.Random(1)
    snapshot = sr.snapshot(tracked)
    uuids = snapshot.uuid, tracked.uuid
    destroy(sr, snapshot)
    places = set(tracked.volume._entries(0, 3 * UNIT).tolist())
    for turn in range(4):
        other = sr.create(40 * BLOCK)
        fill(other, turn)
        for _ in range(5):
            clean_some(sr.store, rng)
        sr.delete(other)
        sr.store.reap()
        sr.store.checkpoint()
        if turn == 1:
            sr = world.kill()
        snapshot, tracked = (sr.get(uuid) for uuid in uuids)
        assert changed(sr, snapshot, tracked) == []
    assert sr.store.cleaner.blocks_moved or not places & set(tracked.volume._entries(0, 3 * UNIT).tolist())
    put(tracked, UNIT_BYTES, b"x")
    assert changed(sr, snapshot, tracked) == [1]


def test_the_same_content_at_the_same_place_is_another_write(sr, tracked):
    snapshot = sr.snapshot(tracked)
    same = content(tracked)[:BLOCK]
    destroy(sr, snapshot)
    put(tracked, 0, same)
    assert changed(sr, snapshot, tracked) == [0]


def test_the_space_comes_back(sr, tracked):
    snapshot = sr.snapshot(tracked)
    zero(tracked, 0, 3 * UNIT_BYTES)
    sr.store.reap()
    assert sum(sr.store.usage.live) == 3 * UNIT
    destroy(sr, snapshot)
    sr.store.reap()
    assert sum(sr.store.usage.live) == 1, "the table: one block for up to 16 MiB"
    assert snapshot.describe()["type"] == "cbt_metadata" and snapshot.size_bytes == 3 * UNIT_BYTES
    check(sr)


@pytest.mark.parametrize("size_bytes", [512, UNIT_BYTES - 512, UNIT_BYTES, 17 << 20, 2 << 40])
def test_sizes(sr, size_bytes):
    """Sparse disks of any size cost what is in them: 2 TiB is walked by its few leaves."""
    disk = sr.create(size_bytes)
    sr.set_cbt(disk, True)
    offsets = sorted({0, size_bytes // 2 & -512, size_bytes - 512})
    for offset in offsets:
        put(disk, offset, b"x" * 512)
    first = sr.snapshot(disk)
    steps = []
    destroy(sr, first, lambda: steps.append(1))
    assert len(steps) < 200 and table_bytes(size_bytes) <= size_bytes
    assert changed(sr, first, disk) == []
    put(disk, offsets[-1], b"y" * 512)
    second = sr.snapshot(disk)
    destroy(sr, second)
    assert changed(sr, first, disk) == changed(sr, first, second) == [offsets[-1] // UNIT_BYTES]
    assert WINDOW_UNITS * UNIT_BYTES == 16 << 20


def test_while_it_lasts_nobody_else_uses_the_snapshot(sr, tracked):
    snapshot = sr.snapshot(tracked)
    before = content(snapshot)
    draft = Destruction(sr, snapshot)
    for act in (
        lambda: sr.delete(snapshot), lambda: sr.attach(snapshot, "a", "a", False, "attach"), lambda: sr.attach(snapshot, "a", "a", False, "nbd"),
        lambda: Destruction(sr, snapshot),
    ):  # fmt: skip
        with pytest.raises(VdiInUse, match="simsrd"):
            act()
    build(draft)
    assert content(snapshot) == before and snapshot.has_data
    sr.revert(snapshot)
    draft.abandon()
    draft.abandon()
    assert snapshot.has_data and not hidden(sr) and not snapshot.attachments
    check(sr)


def test_whose_data_is_not_destroyed(sr, tracked, disk):
    plain, snapshot = sr.snapshot(disk), sr.snapshot(tracked)
    sr.attach(snapshot, "a", "host", False, "attach")
    gone = sr.snapshot(tracked)
    sr.delete(gone)
    with unchanged(sr):
        for vdi, error in ((tracked, WrongKind), (plain, NoCbt), (snapshot, VdiInUse), (gone, NotFound)):
            with pytest.raises(error):
                Destruction(sr, vdi)


def test_nothing_is_reverted_to_a_snapshot_without_data(sr, tracked):
    snapshot = sr.snapshot(tracked)
    put(tracked, 0, b"later")
    destroy(sr, snapshot)
    for mode in ("reset", "commit"):
        with unchanged(sr), pytest.raises(WrongKind, match=snapshot.uuid):
            sr.wishes.one(snapshot, mode)


def test_a_volume_that_goes_while_it_is_compared(sr, tracked):
    """A walk shows the moment when it began, also of the table of a snapshot that is deleted meanwhile."""
    snapshot = sr.snapshot(tracked)
    destroy(sr, snapshot)
    put(tracked, UNIT_BYTES, b"x")
    job = sr.changed_blocks(snapshot, tracked)
    work = job.work()
    step = next(work)
    sr.delete(snapshot)
    fill(tracked, 9)
    sr.store.reap()
    sr.store.checkpoint()
    step()
    run(work)
    assert job.bitmap[0] == 0b01000000
    sr.store.reap()
    check(sr)


class Killed(BaseException):
    """Not an `Exception`, so nothing in between takes it for an I/O error."""


@pytest.mark.parametrize("operation", ["destroy", "compose"])
def test_killed_at_every_step(operation):
    """The process dies, or the machine loses power, in front of the n-th change of the directory: all of it, or nothing."""
    step, finished, outcomes = 0, False, set()
    while not finished:
        world = World(TINY)
        sr = world.repository
        parent, vdi = sr.create(2 * UNIT_BYTES), sr.create(2 * UNIT_BYTES, name="it")
        fill(parent, 1)
        sr.set_cbt(vdi, True)
        fill(vdi, 2, range(3, 20))
        snapshot = sr.snapshot(vdi)
        fill(vdi, 3, range(5))
        sr.store.flush()
        was = content(vdi)
        both = bytearray(content(parent))
        for block in range(20):
            both[block * BLOCK : (block + 1) * BLOCK] = was[block * BLOCK : (block + 1) * BLOCK]
        countdown = [step]

        def on_step(*_, countdown=countdown):
            countdown[0] -= 1
            if countdown[0] < 0:
                raise Killed

        world.directory.on_step = on_step
        try:
            destroy(sr, snapshot) if operation == "destroy" else compose(sr, vdi, parent)
            sr.store.flush()
            finished = True
        except Killed:
            pass
        world.directory.on_step = None
        for survivor in (world.directory.after_kill(), *(world.directory.after_cut(random.Random(step), style) for style in set(STYLES))):
            found = World.__new__(World)
            found._ticks, found._uuids = 0, random.Random(0)
            reopened = found.open(survivor)
            assert not hidden(reopened), "drafts of the dead are taken away"
            again, kept = reopened.get(vdi.uuid), reopened.get(snapshot.uuid)
            assert changed(reopened, kept, again) == ([0] if kept.family == again.family and content(again) == was else [0, 1])
            if operation == "destroy":
                assert content(again) == was
                assert kept.has_data if step < 2 else not (finished and kept.has_data)
                outcomes.add(kept.has_data)
            else:
                assert content(again) in ([bytes(both)] if finished else [was, bytes(both)])
                assert (again.family == parent.family) == (content(again) == bytes(both))
                outcomes.add(content(again) == was)
            reopened.store.close()
            checked(survivor)
        step += 1 if step < 8 else 3
    assert step > 3 and outcomes == {True, False}, "or it was never killed"


def checked(directory: MemoryDirectory) -> None:
    """`simsr check` finds nothing."""
    found = Check(directory)
    try:
        run(found.work())
        assert not found.problems, found.problems
    finally:
        found.close()


def test_a_draft_of_a_store_that_stopped(sr, tracked):
    snapshot = sr.snapshot(tracked)
    draft = Destruction(sr, snapshot)
    sr.store.log.stop(OSError(5, "broken"))
    with pytest.raises(SimsrError):
        draft.finish()
    draft.abandon()
    assert not snapshot.attachments


# Composing.


def test_blocks_that_were_never_written_show_the_parent(sr, disk):
    child = sr.create(8 * BLOCK, name="child", sm_config={"x": "y"})
    put(child, BLOCK, b"c" * BLOCK)
    put(child, 7 * BLOCK, b"d" * BLOCK)
    wanted = bytearray(content(disk).ljust(8 * BLOCK, b"\0"))
    wanted[BLOCK : 2 * BLOCK], wanted[7 * BLOCK :] = b"c" * BLOCK, b"d" * BLOCK
    before = child.describe()
    compose(sr, child, disk, ranges_max=1)
    assert content(child) == bytes(wanted)
    after = child.describe()
    assert {key for key in before if before[key] != after[key]} == {"family", "physical_utilisation_bytes"}
    assert (child.family, sr.diff(disk, child) is not None) == (disk.family, True)
    sr.delete(disk)
    sr.store.reap()
    assert content(child) == bytes(wanted)
    check(sr)


def test_a_clone_is_not_copied(sr, disk):
    clone = sr.clone(disk)
    put(clone, 0, b"x" * BLOCK)
    wanted, live = content(clone), sr.store.log.blocks_appended
    compose(sr, clone, disk)
    assert content(clone) == wanted and sr.store.log.blocks_appended - live == 1
    check(sr)


def test_composing_a_disk_that_forgets_moves_its_base(sr, disk):
    child = sr.create(6 * BLOCK)
    sr.update(child, on_boot="reset")
    put(child, 0, b"x" * BLOCK)
    compose(sr, child, disk)
    wanted = content(child)
    fill(child, 5)
    sr.begin_epoch(child)
    assert content(child) == wanted
    check(sr)


def test_a_disk_that_grows_while_it_is_composed(sr, disk):
    child = sr.create(6 * BLOCK)
    draft = Graft(sr, child, disk)
    sr.resize(child, 9 * BLOCK)
    draft.finish()
    draft.abandon()
    assert content(child) == content(disk).ljust(9 * BLOCK, b"\0")
    check(sr)


def test_what_is_not_composed(sr, disk):
    small, other = sr.create(BLOCK), sr.create(6 * BLOCK)
    snapshot = sr.snapshot(disk)
    sr.attach(other, "a", "host", True, "attach")
    free = sr.create(6 * BLOCK)
    with unchanged(sr):
        for vdi, parent, error in (
            (small, disk, BadSize), (disk, disk, WrongKind), (snapshot, disk, VdiReadOnly), (other, disk, VdiInUse), (free, other, VdiInUse),
        ):  # fmt: skip
            with pytest.raises(error):
                Graft(sr, vdi, parent)


# What can be undone.


def test_what_would_bring_destroyed_data_back_cannot_be_undone(sr, tracked):
    first = sr.snapshot(tracked)
    fill(tracked, 2, range(2))
    second = sr.snapshot(tracked)
    sr.revert(first)
    sr.revert(second)  # the disk was at the first one: going back needs that one's data
    destroy(sr, first)
    with unchanged(sr), pytest.raises(TipExpired):
        sr.history.carry_out(sr.history.undo_wishes(tracked))
    check(sr)


def test_tips_are_not_destroyed_but_compared(sr, tracked):
    first = sr.snapshot(tracked)
    fill(tracked, 2, range(2))
    sr.revert(first)
    (tip,) = sr.tips.values()
    assert changed(sr, first, tip) == [0]
    with unchanged(sr), pytest.raises(WrongKind):
        Destruction(sr, tip)
    destroy(sr, first)
    assert changed(sr, first, tip) == [0]


def test_what_was_before_it_was_composed_cannot_be_brought_back(sr, disk):
    child = sr.create(6 * BLOCK)
    snapshot = sr.snapshot(child)
    fill(child, 3, range(2))
    sr.revert(snapshot)
    gen = child.gen
    compose(sr, child, disk)
    assert content(child) == content(disk) and child.gen > gen
    with pytest.raises(NothingToUndo):
        sr.history.undo_wishes(child)
    check(sr)

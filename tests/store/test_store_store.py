"""The store as a whole: opening and refusing to, commits, full disks."""

from __future__ import annotations

import errno
import random
import struct

import pytest
from store_kit import TINY, UUID, Driver, Kill, Witness, content, cut, disk, everything, make, put

from simsr.errors import BadRequest, NoSpace, SimsrError, StoreDamaged, StoreError, StoreFormat, StoreLocked
from simsr.store.layout import BLOCK, Geometry, crc32c
from simsr.store.log import KEEP_FOR_WRITES
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import MapMemory
from simsr.store.store import Create, Delete, Reset, Resize, SetMeta, Store

# Opening.


def test_a_store_is_locked_until_it_is_closed():
    directory, store = make()
    for action in (lambda: Store.open(directory), lambda: make(directory)):
        with pytest.raises(StoreLocked, match="in use by another process"):
            action()
    store.close()
    store = Store.open(directory)
    store.abandon()
    Store.open(directory)


def test_a_failed_open_leaves_no_lock():
    directory = MemoryDirectory()
    directory.create("something", 1)
    for action in (lambda: Store.open(directory), lambda: make(directory)):
        for _ in range(2):
            with pytest.raises(StoreError):
                action()


def test_create_refuses_a_directory_that_is_not_empty():
    directory = MemoryDirectory()
    directory.create("notes", 3)
    before = dict(directory.images())
    with pytest.raises(StoreError, match="the directory is not empty"):
        make(directory)
    assert dict(directory.images()) == before
    directory, store = make()
    store.close()
    with pytest.raises(StoreError, match="the directory is not empty"):
        make(directory)
    assert Store.open(directory).volumes == {}


def test_create_refuses_an_impossible_geometry():
    directory = MemoryDirectory()
    with pytest.raises(StoreError, match="not a valid geometry"):
        Store.create(directory, UUID, Geometry(33, 2, 2))
    assert directory.names() == [] and not directory._locked


def test_identity_and_meta_come_back():
    directory = MemoryDirectory()
    store = Store.create(directory, UUID, TINY, meta={"name": "ä\n\"\\ 名"})
    assert store.uuid.bytes == UUID and store.geometry == TINY
    store.close()
    for _ in range(2):
        store = Store.open(directory)
        assert store.uuid.bytes == UUID and store.geometry == TINY and store.meta == {"name": "ä\n\"\\ 名"}
        store.abandon()


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("which", [["super.1"], ["super.0"], ["super.0", "super.1"]])
def test_another_format_version_is_refused(which, version):
    directory, store = make()
    disk(store, 4)
    store.close()
    for name in which:
        for side in (directory._files[name].now, directory._files[name].durable):
            side[8:12] = struct.pack("<I", version)
            side[96:100] = struct.pack("<I", crc32c(bytes(side[:96])))
    before = dict(directory.images())
    with pytest.raises(StoreFormat, match=f"its format is version {version}, this simsr knows version 2"):
        Store.open(directory)
    assert dict(directory.images()) == before and not directory._locked


@pytest.mark.parametrize("damaged", [None, "super.0", "super.1"])
def test_only_a_super_block_that_is_damaged_is_blamed(damaged):
    directory, store = make()
    disk(store, 4)
    store.close()
    for name in directory.names():
        if name.startswith("table-") or name == damaged:
            directory.flip(name, 40)
    with pytest.raises(StoreDamaged) as caught:
        Store.open(directory)
    assert [name for name in ("super.0", "super.1") if name in str(caught.value)] == ([damaged] if damaged else [])
    assert "table-" in str(caught.value)


def test_unreadable_files_are_a_store_error():
    directory, store = make()
    store.close()

    class Broken(MemoryDirectory):
        def open(self, name: str):
            raise OSError(errno.EIO, "injected", name)

    broken = Broken()
    broken._files = directory._files
    with pytest.raises(StoreError, match="cannot be read: .*injected"):
        Store.open(broken)


@pytest.mark.parametrize("step", ["sync seg", "create map", "write table", "sync table", "write super", "sync directory"])
def test_an_io_error_while_recovering_can_be_repeated(step):
    directory, store = make()
    put(disk(store, 4), 0, content(1))
    directory = directory.after_kill()

    def on_step(what: str) -> None:
        if what.startswith(step):
            raise OSError(errno.EIO, "injected")

    directory.on_step = on_step
    for _ in range(2):
        with pytest.raises(StoreError, match="injected"):
            Store.open(directory)
    directory.on_step = None
    assert everything(Store.open(directory).volumes[1])[:BLOCK] == content(1)


@pytest.mark.parametrize("step", ["create map", "write map", "sync map", "create table", "write table", "sync table"])
def test_opening_without_room_for_a_checkpoint(step):
    """What is on a full disk must be readable. The checkpoint waits, and nothing that was there is lost, however often."""
    directory, store = make()
    volume = disk(store, 4)
    for tag in range(70):  # of most segments only the records are needed
        put(volume, 0, content(tag))
    assert store.pool.dead()
    directory = directory.after_kill()

    def on_step(what: str) -> None:
        if what.startswith(step):
            raise OSError(errno.ENOSPC, "injected")

    directory.on_step = on_step
    held = everything(volume)
    for turn in range(3):
        store = Store.open(directory)
        volume = store.volumes[1]
        assert everything(volume) == held
        put(volume, (turn + 1) * BLOCK, content(turn + 10))
        held = everything(volume)
        store._check()
        store.flush()
        for survivor in (directory.after_kill(), cut(directory)):
            assert everything(Store.open(survivor).volumes[1]) == held
        store.abandon()
    directory.on_step = None
    assert everything(Store.open(directory).volumes[1]) == held


def test_opening_many_times_needs_no_more_room():
    directory, store = make()
    volume = disk(store, 100)
    put(volume, 0, b"".join(content(tag) for tag in range(100)))
    names = None
    for turn in range(30):
        if turn % 3:
            directory = directory.after_kill()
        else:
            store.close()
        store = Store.open(directory)
        if turn == 5:
            names = len(directory.names())
    assert len(directory.names()) <= names + 1
    store._check()


# Commits.


@pytest.mark.parametrize("ops", [
    [Delete(9)], [Reset(1, 9)], [Reset(9, 1)], [Resize(9, BLOCK)], [SetMeta(9, {})], [Create(1, BLOCK, {})],
    [Create(5, BLOCK, {}, 9)], [Create(0, BLOCK, {})], [Create(-1, BLOCK, {})], [Create(5, -1, {})],
    [Create(5, (BLOCK << 36) + 1, {})], [Resize(1, (BLOCK << 36) + 1)], [Resize(1, 3 * BLOCK)], [Create(5, BLOCK, {}, 1)],
    [Delete(1), Resize(1, BLOCK)], [Delete(1), Delete(1)], [Create(5, BLOCK, {}), Create(5, BLOCK, {})],
    [Create(5, 8 * BLOCK, {}), Reset(1, 5), Resize(1, 5 * BLOCK)], [SetMeta(0, {"x": 1}), Delete(9)],
])  # fmt: skip
def test_a_commit_that_makes_no_sense_changes_nothing(ops):
    """It must not reach the log either: replay would fail, and the store would never open again."""
    directory, store = make()
    volume = disk(store, 4)
    put(volume, 0, content(1))
    seq, before = store.log.seq, dict(directory.images())
    with pytest.raises(BadRequest, match="no such volume, one too many, or a size out of range"):
        store.commit(ops)
    assert store.log.seq == seq and dict(directory.images()) == before and store.meta == {}
    assert set(store.volumes) == {1} and everything(volume)[:BLOCK] == content(1)


def test_a_commit_is_one_record():
    """Any set of changes, in order, all or nothing."""
    directory, store = make()
    volume = disk(store, 4)
    put(volume, 0, content(1))
    store.flush()
    tip, extra = store.new_ident(), store.new_ident()
    ops = [
        Create(tip, 4 * BLOCK, {"tip": 1}, 1), Create(extra, 6 * BLOCK, {}, 1), Reset(1, extra), Delete(extra),
        Resize(1, 9 * BLOCK), SetMeta(1, {"a": [1, None, "x"]}), SetMeta(0, {"b": {}}),
    ]  # fmt: skip
    seq = store.log.seq
    store.commit(ops)
    assert store.log.seq == seq + 1
    for after in (store, Store.open(directory.after_kill()), Store.open(cut(directory, "all"))):
        assert set(after.volumes) == {1, tip} and after.meta == {"b": {}}
        assert after.volumes[1].size_bytes == 9 * BLOCK and after.volumes[1].meta == {"a": [1, None, "x"]}
        assert after.volumes[tip].size_bytes == 4 * BLOCK
        for found in after.volumes.values():
            assert everything(found) == content(1).ljust(found.size_bytes, b"\0")
    after = Store.open(cut(directory, "none"))
    assert set(after.volumes) == {1} and after.meta == {} and after.volumes[1].size_bytes == 4 * BLOCK


def test_who_keeps_copies_learns_what_has_other_content_or_another_size():
    _, store = make()
    for _ in range(3):
        disk(store, 4)
    store.commit([SetMeta(1, {"a": 1}), SetMeta(0, {"a": 1}), Delete(3)])
    assert store.replaced == set()
    store.commit([SetMeta(1, {"a": 2}), Reset(2, 1)])
    assert store.replaced == {2}
    store.commit([Resize(1, 8 * BLOCK)])
    assert store.replaced == {1, 2}


def test_a_commit_is_durable_after_a_flush():
    directory, store = make()
    disk(store, 4)
    store.flush()
    store.commit([SetMeta(0, {"n": 1})])
    assert Store.open(cut(directory)).meta == {}
    store.flush()
    assert Store.open(cut(directory)).meta == {"n": 1}


def test_a_commit_that_does_not_fit_into_a_record_is_refused():
    _, store = make()
    for size in range(7900, 8400):
        seq = store.log.seq
        try:
            store.commit([SetMeta(0, {"t": "x" * size})])
        except NoSpace as error:
            assert "do not fit into one record" in str(error)
            assert store.log.seq == seq and size > 7990
            break
        assert store.meta == {"t": "x" * size}
    else:
        pytest.fail("anything fits")


def test_commits_of_any_size_come_back():
    """Those that just fill the record area, too."""
    directory, store = make()
    witness = Witness()
    witness.attach(store)
    for size in [*range(0, 60), *range(7950, 8045, 3)]:
        try:
            store.commit([SetMeta(0, {"t": "x" * size})])
        except NoSpace:
            continue
        witness.compare(Store.open(directory.after_kill()))


@pytest.mark.parametrize("blocks", [4, 5, 16, 17, 300])
def test_a_clone_may_be_larger_than_its_source(blocks):
    directory, store = make()
    origin = disk(store, 4)
    put(origin, 0, content(1) * 4)
    clone = disk(store, blocks, origin.ident)
    put(clone, (blocks - 1) * BLOCK, content(2))
    wanted = ((content(1) * 4).ljust(blocks * BLOCK, b"\0"))[: (blocks - 1) * BLOCK] + content(2)
    assert everything(clone) == wanted and everything(origin) == content(1) * 4
    store._check()
    assert everything(Store.open(directory.after_kill()).volumes[clone.ident]) == wanted


def test_snapshots_in_any_tree(seeds):
    """Clones of snapshots of clones; deleting an origin leaves its descendants alone."""
    for seed in seeds(5):
        rng = random.Random(seed)
        directory, store = make()
        held = {disk(store, 12).ident: bytearray(12 * BLOCK)}
        for _ in range(120):
            ident = rng.choice(sorted(held))
            if rng.random() < 0.3 and len(held) < 40:
                held[disk(store, 12, ident).ident] = bytearray(held[ident])
            elif rng.random() < 0.15 and len(held) > 1:
                store.commit([Delete(ident)])
                del held[ident]
            else:
                data, at = rng.randbytes(BLOCK), rng.randrange(12) * BLOCK
                put(store.volumes[ident], at, data)
                held[ident][at : at + BLOCK] = data
        for after in (store, Store.open(directory.after_kill())):
            assert {ident: everything(volume) for ident, volume in after.volumes.items()} == held
            after.reap()
            after._check()


def test_cost_of_commits_does_not_depend_on_what_is_mapped():
    """Counted, not timed: nodes made by a snapshot, a revert and a deletion."""
    _, store = make()
    volume = disk(store, 1000)
    put(volume, 0, b"".join(content(tag) for tag in range(1000)))
    appended, records = store.log.blocks_appended, store.log.records_appended
    snapshot = disk(store, 1000, 1)
    assert snapshot.map.root == volume.map.root
    put(volume, 0, content(5000))
    store.commit([Reset(1, snapshot.ident)])
    assert volume.map.root == snapshot.map.root
    store.commit([Delete(snapshot.ident)])
    assert store.log.blocks_appended == appended + 1 and store.log.records_appended == records + 4
    assert store.reap(1000) == 0


# A full disk.


def fill_up(directory: MemoryDirectory, store: Store) -> bytes:
    """Write until there is no space; returns what volume 1 holds then."""
    directory.room_bytes = 3 * TINY.segment_bytes
    volume = disk(store, 1000)
    with pytest.raises(NoSpace, match="cannot make a segment file"):
        for index in range(1000):
            put(volume, index * BLOCK, content(index + 1))
    assert index > 60
    store._check()
    return content_upto(index)


def content_upto(count: int) -> bytes:
    return b"".join(content(tag + 1) for tag in range(count)).ljust(1000 * BLOCK, b"\0")


def test_full_disk_refuses_writes_and_keeps_what_is_there():
    directory, store = make()
    held = fill_up(directory, store)
    volume = store.volumes[1]
    assert everything(volume) == held
    for _ in range(3):
        with pytest.raises(NoSpace):
            put(volume, 0, content(7))
    assert everything(volume) == held and store.log.failure is None
    store.flush()
    assert everything(Store.open(cut(directory)).volumes[1]) == held


def test_full_disk_can_still_snapshot_revert_and_delete_and_gets_its_space_back():
    directory, store = make()
    held = fill_up(directory, store)
    volume = store.volumes[1]
    snapshot = disk(store, 1000, 1)
    empty = disk(store, 1000)
    store.commit([Reset(1, empty.ident)])
    assert everything(volume) == bytes(1000 * BLOCK) and everything(snapshot) == held
    with pytest.raises(NoSpace):
        put(volume, 0, b"".join(content(tag) for tag in range(40)))
    store.commit([Delete(snapshot.ident)])
    store.reap()
    store.checkpoint()
    put(volume, 0, b"".join(content(tag) for tag in range(60)))
    store._check()
    store.flush()
    after = Store.open(cut(directory))
    assert everything(after.volumes[1]) == b"".join(content(tag) for tag in range(60)).ljust(1000 * BLOCK, b"\0")


def test_the_last_segment_is_for_deleting_and_reverting():
    """On a full disk only records that delete or revert take the segments in reserve; other commits and data never do."""
    directory, store = make()
    held = fill_up(directory, store)
    reserve = list(store.pool.spares)
    assert len(reserve) == KEEP_FOR_WRITES
    text = "x" * 5000
    store.commit([SetMeta(0, {"t": text})])
    with pytest.raises(NoSpace):
        store.commit([SetMeta(0, {"t": text + "y"})])
    assert store.meta == {"t": text} and store.log.active not in reserve
    while store.log.active is not reserve[0]:
        store.commit([Reset(1, 1)])
    assert not store.pool.spares
    with pytest.raises(NoSpace):
        store.commit([SetMeta(0, {"t": "z"})])
    store.commit([Delete(1)])
    store.reap()
    store.checkpoint()
    store.commit([SetMeta(0, {"t": text + "z"})])
    after = Store.open(directory.after_kill())
    assert after.meta == {"t": text + "z"} and after.volumes == {} and any(held)


def test_writes_go_on_when_there_is_room_again():
    directory, store = make()
    fill_up(directory, store)
    directory.room_bytes = None
    volume = store.volumes[1]
    put(volume, 500 * BLOCK, content(9))
    assert volume.read_bytes(500 * BLOCK, BLOCK) == content(9)
    store._check()


@pytest.mark.parametrize("times", [1, 2, 5])
def test_full_disk_can_be_opened_after_a_crash(times):
    """Recovery makes do with the segments that are there: what is on a full disk must be readable, and deletable."""
    directory, store = make()
    held = fill_up(directory, store)
    for _ in range(times):
        directory = directory.after_kill()
        directory.room_bytes = 0
        store = Store.open(directory)
        assert everything(store.volumes[1]) == held
    assert len(store.pool.spares) == KEEP_FOR_WRITES, "crashes used up the reserve"
    store.commit([Delete(1)])
    store.reap()
    store.checkpoint()
    put(disk(store, 100), 0, content_upto(60)[: 60 * BLOCK])
    store._check()


@pytest.mark.parametrize("step", ["create map", "write map", "sync map", "write table", "sync table"])
def test_checkpoint_on_a_full_disk_is_no_io_error(step):
    """No room for a map or table file is a reason to try later, not to stop: nothing was lost."""
    directory, store = make()
    volume = disk(store, 10)
    put(volume, 0, content(1))

    def on_step(what: str) -> None:
        if what.startswith(step):
            raise OSError(errno.ENOSPC, "injected")

    directory.on_step = on_step
    for _ in range(2):
        with pytest.raises(NoSpace, match="no room for a checkpoint"):
            store.checkpoint()
        store._check()
    directory.on_step = None
    put(volume, 0, content(2))
    store.checkpoint()
    assert everything(Store.open(directory.after_kill()).volumes[1])[:BLOCK] == content(2)


# Everything at once, with refusals.


def test_random_histories_on_a_disk_that_fills_up(seeds, note):
    """No space at any moment: nothing is half done, and the log stays good."""
    for seed in seeds(25):
        rng = random.Random(seed)
        directory, store = make()
        witness, driver = Witness(), Driver(rng, blocks_max=60)
        witness.attach(store)
        driver.begin(store)
        with note(seed=seed):
            for step in range(150):
                if step % 20 == 0:
                    directory.room_bytes = rng.choice((0, 0, TINY.segment_bytes, None))
                driver.step()
                if step % 10 == 0:
                    witness.compare(store)
                    store._check()
            driver.end_jobs()
            witness.compare(Store.open(directory.after_kill()))


def test_errors_at_any_step_never_break_a_store(seeds, note):
    """An I/O error at a random step: a clear error, the store stops or goes on, and what was flushed is there."""
    for seed in seeds(120):
        rng = random.Random(seed)
        directory, store = make()
        witness, driver = Witness(), Driver(rng)
        witness.attach(store)
        driver.begin(store)
        left = rng.randint(1, 250)

        def on_step(what: str) -> None:
            nonlocal left
            left -= 1
            if left < 0 and not fired:
                fired.append(what)
                raise OSError(rng.choice((errno.EIO, errno.ENOSPC)), "injected")

        fired: list[str] = []
        directory.on_step = on_step
        with note(seed=seed, fired=fired):
            try:
                for _ in range(100):
                    driver.step()
            except SimsrError:
                pass
            except OSError:  # a job that the driver runs as a worker thread would
                pass
            directory.on_step = None
            durable, last = store.log.durable_seq, store.log.seq
            for survivor in (directory.after_kill(), cut(directory, "none"), cut(directory, "some")):
                after = Store.open(survivor)
                assert durable <= after.log.seq <= last + 1
                witness.compare(after)
                after._check()


def test_create_that_was_killed_is_no_store_or_an_empty_one():
    steps: list[MemoryDirectory] = []
    directory = MemoryDirectory(on_step=lambda what: steps.append(directory.after_kill()))
    store = Store.create(directory, UUID, TINY)
    assert len(steps) > 8
    outcomes = set()
    for survivor in steps:
        try:
            outcomes.add(len(Store.open(survivor).volumes))
        except StoreError as error:
            outcomes.add(type(error).__name__)
    assert outcomes == {0, "StoreDamaged"}
    assert Store.open(cut(directory)).volumes == {} and store.volumes == {}


def test_kill_is_not_mistaken_for_an_error():
    directory, store = make()

    def on_step(what: str) -> None:
        raise Kill

    volume = disk(store, 4)
    directory.on_step = on_step
    with pytest.raises(Kill):
        put(volume, 0, content(1))
    assert store.log.failure is None


def test_files_with_numbers_beyond_ours_are_left_alone():
    directory, store = make()
    volume = disk(store, 4)
    put(volume, 0, content(1))
    store.close()
    for name in ("map-999999999999", "table-999999999999"):
        directory.create(name, 0)
    again = Store.open(directory)
    assert everything(again.volumes[volume.ident])[:BLOCK] == content(1)
    again.close()
    assert {"map-999999999999", "table-999999999999"} <= set(directory.names())


def test_a_store_that_could_not_be_made_lets_go_of_everything():
    directory, memory = MemoryDirectory(), MapMemory()

    def on_step(what: str) -> None:
        raise OSError(5, "injected")

    directory.on_step = on_step
    with pytest.raises((OSError, StoreError)):
        Store.create(directory, UUID, TINY, memory=memory)
    directory.lock()
    assert not memory.tables

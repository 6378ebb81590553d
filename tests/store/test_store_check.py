"""`simsr check`: a store that it calls clean is, and everything that can be wrong is found; nothing on the disk changes."""

from __future__ import annotations

import random

import pytest
from store_kit import TINY, UUID, Driver, Witness, content, disk, everything, make, put

from simsr.errors import BlockDamaged, SimsrError, StoreDamaged, StoreFormat, StoreLocked
from simsr.store.check import CORRUPTION, LEAK, Check
from simsr.store.layout import BLOCK
from simsr.store.memory import MemoryDirectory
from simsr.store.segments import segment_name
from simsr.store.store import Store


def checked(directory: MemoryDirectory) -> Check:
    """The check of ``directory``, which must stay as it is."""
    before = dict(directory.images())

    def refuse(what: str) -> None:
        raise AssertionError(f"a check must not {what}")

    directory.on_step = refuse
    check = Check(directory)
    try:
        for step in check.work():
            if step is not None:
                step()
    finally:
        check.close()
        directory.on_step = None
    assert dict(directory.images()) == before and not directory._locked
    return check


def kinds(check: Check) -> set[str]:
    return {problem.kind for problem in check.problems}


def driven(seed: int, steps: int = 60) -> tuple[MemoryDirectory, Store, Witness]:
    rng, witness = random.Random(seed), Witness()
    directory, store = make()
    driver = Driver(rng)
    witness.attach(store)
    driver.begin(store)
    for _ in range(steps):
        driver.step()
    driver.end_jobs()
    store.flush()
    if seed % 2:
        store.close()
    return directory.after_kill(), store, witness


def test_stores_are_clean_after_every_end(seeds):
    for seed in seeds(30):
        directory, _, _ = driven(seed)
        check = checked(directory)
        assert not check.problems, check.problems
        if seed % 3:
            assert not checked(directory.after_cut(random.Random(seed))).problems


def test_what_is_called_clean_can_be_read(seeds, note):
    """Flip bytes anywhere: either the check says so, or the store is opened and shows exactly what it must."""
    found = {True: 0, False: 0}
    for seed in seeds(12):
        rng = random.Random(seed)
        image, store, witness = driven(seed)
        for _ in range(25):
            directory = image.after_kill()
            name = rng.choice(directory.names())
            size = len(directory._files[name].now)
            if not size:
                continue
            used = [at for at in range(size) if directory._files[name].now[at]] or [0]
            offset = rng.choice(used)
            directory.flip(name, offset, 1 << rng.randrange(8))
            with note(file=name, offset=offset):
                check = checked(directory)
                found[not check.problems] += 1
                if not check.problems:
                    opened = Store.open(directory)
                    assert store.log.durable_seq <= opened.log.seq
                    witness.compare(opened)
                    opened._check()
                assert LEAK not in kinds(check) or CORRUPTION in kinds(check), check.problems
    assert found[True] > 10 and found[False] > 50


def test_damage_is_named_by_volume_and_range(seeds):
    """What the check lists is what cannot be read, no more and no less."""
    found = 0
    for seed in seeds(10):
        rng = random.Random(seed)
        image, _, _ = driven(seed)
        directory = image.after_kill()
        for name in [name for name in directory.names() if name.startswith("seg-")]:
            for block in range(TINY.record_blocks, TINY.segment_blocks):
                if rng.random() < 0.2:
                    directory.flip(name, block * BLOCK + rng.randrange(BLOCK))
        try:
            check = checked(directory)
            reader = Store.open(directory.after_kill())
        except SimsrError:
            continue
        listed = set()
        for problem in check.problems:
            for ident in problem.volumes:
                listed.update((ident, block) for block in range(problem.offset // BLOCK, (problem.offset + problem.length) // BLOCK))
        unreadable = set()
        for ident, volume in reader.volumes.items():
            for block in range(-(-volume.size_bytes // BLOCK)):
                try:
                    volume.read_bytes(block * BLOCK, min(BLOCK, volume.size_bytes - block * BLOCK))
                except BlockDamaged:
                    unreadable.add((ident, block))
        assert listed == unreadable
        found += len(listed)
    assert found


def a_store() -> tuple[MemoryDirectory, Store]:
    directory, store = make()
    volume = disk(store, 80)
    put(volume, 0, b"".join(content(tag) for tag in range(80)))
    disk(store, 80, source=volume.ident)
    put(volume, 0, content(200))
    store.checkpoint()
    return directory, store


def rewritten(directory: MemoryDirectory, store: Store) -> Check:
    """Of a store whose table was changed in memory, after a checkpoint of all of it."""
    store._table_file = 0
    put(store.volumes[1], BLOCK, content(201))
    store.checkpoint()
    return checked(directory.after_kill())


@pytest.mark.parametrize("change", [+1, -1])
def test_wrong_counts(change):
    wanted = LEAK if change > 0 else CORRUPTION
    directory, store = a_store()
    store.table.refs[store.volumes[2].map.root] += change
    if change < 0:
        store.table.refs[store.volumes[2].map.root] = 1
        with store.table.waiting():
            kid = int(store.table.get(store.volumes[2].map.root).present[-1])
        store.table.refs[kid] = 1
    check = rewritten(directory, store)
    assert kinds(check) == {wanted}, check.problems
    directory, store = a_store()
    used = store.volumes[1]._entries(5, 6)[0] & 0xFFFFFFFF
    store.usage.live[int(used) >> store.geometry.segment_shift] += change
    check = rewritten(directory, store)
    assert kinds(check) == {wanted} and segment_name(int(used) >> store.geometry.segment_shift) in check.problems[0].text


def test_other_wrong_numbers():
    directory, store = a_store()
    store.volumes[1].map.mapped_blocks += 3
    check = rewritten(directory, store)
    assert [problem.volumes for problem in check.problems] == [(1,)] and kinds(check) == {CORRUPTION}
    directory, store = a_store()
    leaf = dict(store.volumes[2].map.leaves())[10]
    store.table._unlink(leaf)
    store.table.number[leaf] = 11
    store.table._link(leaf)
    check = rewritten(directory, store)
    assert kinds(check) == {CORRUPTION} and any("listed under another number" in p.text for p in check.problems)


def test_leaked_nodes_and_files():
    directory, store = a_store()
    store.table.hold(store.volumes[2].map.root)  # and nobody ever lets go of it
    store.volumes[2].map.drop()
    del store.volumes[2]
    store._deleted.append(2)
    check = rewritten(directory, store)
    assert kinds(check) == {LEAK} and any("held by nobody" in problem.text for problem in check.problems)
    directory, store = a_store()
    store.close()
    directory.create("notes.txt", 5)
    check = checked(directory)
    assert [problem.text for problem in check.problems] == ["file notes.txt does not belong to the store"] and check.leaks


def test_a_damaged_record_of_a_segment_in_use():
    """Recovery does not need it any more, but the cleaner does."""
    directory, store = a_store()
    store.close()
    store = Store.open(directory)
    with store.table.waiting():
        slot = int(store.volumes[1]._entries(7, 8)[0] & 0xFFFFFFFF) >> store.geometry.segment_shift
    store.close()
    directory.flip(segment_name(slot), 64 + 10)
    check = checked(directory)
    assert kinds(check) == {CORRUPTION} and segment_name(slot) in check.problems[0].text


def test_what_cannot_be_checked():
    with pytest.raises(StoreFormat, match="no store"):
        Check(MemoryDirectory())
    directory, store = a_store()
    with pytest.raises(StoreLocked):
        Check(directory)
    store.close()
    directory.flip("super.0", 40)
    check = checked(directory)
    assert kinds(check) == {CORRUPTION} and "super.0" in check.problems[0].text
    directory.flip("super.1", 40)
    check = checked(directory)
    assert "cannot be opened" in check.problems[0].text and check.store is None


def test_a_store_that_was_opened_for_reading_cannot_be_changed():
    directory, store = a_store()
    store.abandon()
    before = dict(directory.images())
    store = Store.open_read_only(directory)
    assert everything(store.volumes[1])[:BLOCK] == content(200)
    for change in (lambda: put(store.volumes[1], 0, content(1)), lambda: disk(store, 4), store.checkpoint):
        with pytest.raises(SimsrError, match="reading only"):
            change()
    store.close()
    assert dict(directory.images()) == before
    with pytest.raises((StoreDamaged, StoreFormat)):
        Store.open_read_only(MemoryDirectory())
    assert UUID == store.uuid.bytes

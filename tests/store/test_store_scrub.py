"""The scrub finds what is damaged, all of it and nothing else, whatever happens beside it."""

from __future__ import annotations

import random

import pytest
from store_kit import TINY, UUID, Driver, content, disk, everything, make, put, some_memory, squeeze

from simsr.errors import BlockDamaged
from simsr.store.layout import BLOCK, Geometry
from simsr.store.memory import MemoryDirectory, MemoryFile
from simsr.store.node_table import NO_LEAF
from simsr.store.nodes import PHYSICAL_MASK
from simsr.store.paging import map_name
from simsr.store.scrub import Damage, Scrub
from simsr.store.segments import State, segment_name
from simsr.store.store import Store


def scrubbed(store: Store) -> Scrub:
    scrub = Scrub(store)
    for step in scrub.work():
        if step is not None:
            step()
    assert scrub.finished and not pins(store)
    return scrub


def pins(store: Store) -> int:
    return sum(segment.pins for segment in store.pool.by_slot if segment is not None) + store.maps.readers


def place_of(store: Store, ident: int, block: int) -> tuple[str, int]:
    """(file, offset) of a block of a volume."""
    with store.table.waiting():
        entry = int(store.volumes[ident]._entries(block, block + 1)[0])
    physical, blocks = entry & PHYSICAL_MASK, store.geometry.segment_blocks
    return segment_name(physical // blocks), physical % blocks * BLOCK


def damage_node(directory: MemoryDirectory, store: Store, ident: int) -> None:
    directory.flip(map_name(store.table.file[ident]), store.table.offset[ident] + store.table.length[ident] - 1)


def test_nothing_is_damaged_whatever_happens_meanwhile(seeds):
    for seed in seeds(40):
        rng = random.Random(seed)
        store = Store.create(MemoryDirectory(), UUID, TINY, memory=some_memory(rng))
        driver = Driver(rng)
        driver.begin(store)
        for _ in range(60):
            driver.step()
        scrub = Scrub(store)
        for step in scrub.work():
            if step is not None:
                step()
            elif rng.random() < 0.5:
                driver.step()
        assert scrub.is_clean and scrub.finished, scrub.damage
        driver.end_jobs()
        assert scrub.bytes_total == scrub.bytes_done and scrub.nodes and not pins(store)
        driver.compare()
        store._check()


def test_the_cleaner_may_move_what_is_being_read(seeds):
    for seed in seeds(10):
        rng = random.Random(seed)
        _, store = make(geometry=Geometry(16, 2, 2))
        volume = disk(store, 60)
        for tag in range(300):
            put(volume, rng.randrange(60) * BLOCK, content(tag))
        held = everything(volume)
        scrub, victims = Scrub(store), [s for s in store.pool.by_slot if s is not None and s.state is State.SEALED]
        for step in scrub.work():
            if step is not None:
                step()
            elif victims:
                for cleaning in store.cleaner.clean(victims.pop()):
                    if cleaning is not None:
                        cleaning()
                store.checkpoint()  # what is empty now is used again
                put(volume, 0, content(rng.randrange(1000)))
        assert scrub.is_clean, scrub.damage
        assert store.cleaner.blocks_moved and everything(volume)[BLOCK:] == held[BLOCK:]


def test_damaged_blocks_are_found_and_named():
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, b"".join(content(tag) for tag in range(40)))
    snapshot = disk(store, 40, source=volume.ident)
    put(volume, 20 * BLOCK, content(100))
    store.checkpoint()
    for block in (3, 4, 20):
        directory.flip(*place_of(store, volume.ident, block))
    scrub = scrubbed(store)
    both = (volume.ident, snapshot.ident)
    found = {(one.kind, one.volumes, one.offset, one.length) for one in scrub.damage}
    assert found == {("block", both, 3 * BLOCK, 2 * BLOCK), ("block", (volume.ident,), 20 * BLOCK, BLOCK)}
    assert (scrub.damaged_blocks, scrub.damaged_nodes) == (3, 0) and not scrub.is_clean
    for one in scrub.damage:
        with pytest.raises(BlockDamaged):
            volume.read_bytes(one.offset, one.length)


def test_shared_blocks_are_read_once():
    _, store = make()
    volume = disk(store, 40)
    put(volume, 0, b"".join(content(tag) for tag in range(40)))
    for _ in range(20):
        disk(store, 40, source=volume.ident)
    assert scrubbed(store).blocks == 40


@pytest.mark.parametrize("cold", [False, True])
def test_damaged_nodes_are_found_and_named(cold):
    directory, store = make()
    volume, other = disk(store, 300), disk(store, 30)
    for block in range(0, 300, 2):
        put(volume, block * BLOCK, content(block))
    put(other, 0, content(1))
    snapshot = disk(store, 300, source=volume.ident)
    store.checkpoint()
    if cold:
        squeeze(store)
    with store.table.waiting():
        leaves = dict(volume.map.leaves())
        inner = next(i for i in range(1, store.table.rows) if store.table.number[i] == NO_LEAF and store.table.get(i).height == 2)
    both = (volume.ident, snapshot.ident)
    leaf = leaves[70]
    if cold:
        squeeze(store)
    damage_node(directory, store, leaf)
    scrub = scrubbed(store)
    assert [(d.kind, d.volumes, d.offset, d.length) for d in scrub.damage] == [("node", both, 280 * BLOCK, 4 * BLOCK)]
    assert map_name(store.table.file[leaf]) in scrub.damage[0].where
    if cold:
        squeeze(store)
    damage_node(directory, store, inner)
    kinds = {(d.kind, d.volumes, d.length) for d in scrubbed(store).damage}
    assert ("node", both, 64 * BLOCK) in kinds


def test_a_damaged_block_that_is_overwritten_meanwhile_is_none():
    directory, store = make()
    volume = disk(store, 8)
    put(volume, 0, b"".join(content(tag) for tag in range(8)))
    store.checkpoint()
    directory.flip(*place_of(store, volume.ident, 5))
    scrub, steps = Scrub(store), 0
    for step in scrub.work():
        if step is not None:
            step()
            steps += 1
            if scrub.nodes and steps == 5:  # the leaves have been read, and with them where the block was
                put(volume, 5 * BLOCK, content(50))
    assert scrub.is_clean, scrub.damage
    assert scrub.blocks >= 8


def test_files_that_cannot_be_read(monkeypatch):
    directory, store = make()
    volume = disk(store, 8)
    put(volume, 0, b"".join(content(tag) for tag in range(8)))
    store.checkpoint()
    name, offset = place_of(store, volume.ident, 2)
    pread = MemoryFile.pread

    def failing(file, view, at):
        if file._name == name and at <= offset < at + len(view):
            raise OSError(5, "bad sector")
        pread(file, view, at)

    monkeypatch.setattr(MemoryFile, "pread", failing)
    assert [(d.volumes, d.offset, d.length) for d in scrubbed(store).damage] == [((volume.ident,), 2 * BLOCK, BLOCK)]


@pytest.mark.parametrize("name", ["super.0", "super.1", "table-"])
def test_super_blocks_and_table_file(name):
    directory, store = make()
    put(disk(store, 8), 0, content(1))
    store.checkpoint()
    (name,) = [found for found in directory.names() if found.startswith(name)]
    assert scrubbed(store).is_clean
    directory.flip(name, 50)
    (damage,) = scrubbed(store).damage
    assert isinstance(damage, Damage) and damage.kind == "file" and damage.volumes == () and name[:6] in damage.where

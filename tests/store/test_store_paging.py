"""Map nodes that come and go: the data path with next to no memory for maps, and the jobs that read nodes."""

from __future__ import annotations

import errno
import random

import pytest
from store_kit import (
    Driver, Slices, Witness, allocated, compare_allocation, content, disk, everything, make, paged, put, read, squeeze, write, zero,
)  # fmt: skip

from simsr.errors import StoreDamaged
from simsr.store.layout import BLOCK
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import Absent, MapMemory
from simsr.store.paging import MapFiles, map_name
from simsr.store.store import Delete, Reset, Store
from simsr.store.volume import Volume

LEAF = 4 * BLOCK


def filled(blocks: int = 64, memory: MapMemory | None = None) -> tuple[MemoryDirectory, Store, Volume, bytearray]:
    """A volume of which no map node is in memory, and what it holds."""
    directory, store = make(memory=memory or MapMemory(0))
    volume = disk(store, blocks)
    put(volume, 0, b"".join(content(tag + 1) for tag in range(blocks)))
    held = bytearray(everything(volume))
    store.checkpoint()
    squeeze(store)
    assert not store.table.resident
    return directory, store, volume, held


def let_go_of_inner_nodes(store: Store) -> None:
    """Of those alone: readers know leaves that they remember without them."""
    for ident, node in list(store.table.resident.items()):
        if node.height and store.table.is_clean(ident):
            del store.table.resident[ident], store.table._clock[ident]
            store.table.resident_bytes -= node.size_bytes


# The data path.


def test_reads_that_would_wait_for_nodes_are_cold():
    _, store, volume, held = filled()
    for offset, length in [(0, BLOCK), (LEAF, LEAF), (100, 5), (3 * BLOCK, 9 * BLOCK), (BLOCK - 1, 2)]:
        view = memoryview(bytearray(length))
        assert volume.read([(offset, view)]) == [0] and not any(view)
        with pytest.raises(Absent):
            volume.read_job(offset, view)
        assert read(volume, offset, length) == held[offset : offset + length]
        assert volume.read([(offset, view)]) == [] and view == held[offset : offset + length]
        squeeze(store)
    assert store.table.paged_in > 10


def test_a_write_stops_in_front_of_what_needs_a_node_and_has_changed_nothing_of_it():
    _, store, volume, held = filled()
    paged(volume, lambda: volume.map.ready(0, 4))
    batch = [(0, BLOCK, memoryview(content(100))), (9 * LEAF, BLOCK, memoryview(content(101))), (BLOCK, BLOCK, None)]
    assert volume.write(batch) == 1
    held[:BLOCK] = content(100)
    root = volume.map.root
    for what in [(9 * LEAF, 5 * LEAF, None), (9 * LEAF + 3, 100, memoryview(bytes(100))), (7 * LEAF - 3, 6, None)]:
        seq = store.log.seq
        assert volume.write([what]) == 0
        assert store.log.seq == seq and volume.map.root == root
    assert everything(volume) == held
    write(volume, batch)
    assert read(volume, 9 * LEAF, BLOCK) == content(101) and read(volume, 0, 2 * BLOCK) == content(100) + bytes(BLOCK)
    store._check()


@pytest.mark.parametrize("what", ["zeros", "hole", "edge", "long"])
def test_an_owned_leaf_is_written_to_although_the_nodes_above_it_are_gone(what):
    """When the record is in the log it is too late for finding that a node is missing."""
    directory, store, volume, held = filled()
    put(volume, LEAF, content(100))
    held[LEAF : LEAF + BLOCK] = content(100)
    squeeze(store)
    assert len(store.table.resident) == 1
    match what:
        case "zeros":
            request = (LEAF, BLOCK, memoryview(bytes(BLOCK)))
        case "hole":
            request = (LEAF + BLOCK, BLOCK, None)
        case "edge":
            request = (LEAF + 7, BLOCK - 7, memoryview(bytes(BLOCK - 7)))
        case "long":
            request = (LEAF, 3 * BLOCK, memoryview(content(7) + bytes(BLOCK) + content(8)))
    offset, length, view = request
    assert volume.write([request]) == 1
    held[offset : offset + length] = bytes(length) if view is None else view
    assert everything(volume) == held == everything(Store.open(directory.after_kill()).volumes[1])
    store._check()


def test_a_block_across_two_leaves_of_which_one_is_owned():
    """The other one is remembered by readers, so its content is known, but not how to get there."""
    directory, store, volume, held = filled()
    put(volume, 0, content(100))
    held[:BLOCK] = content(100)
    squeeze(store)
    read(volume, LEAF, BLOCK)
    let_go_of_inner_nodes(store)
    request = (LEAF - 100, BLOCK, memoryview(content(9)))
    assert volume.write([request]) == 0
    write(volume, [request])
    held[LEAF - 100 : LEAF - 100 + BLOCK] = content(9)
    assert everything(volume) == held == everything(Store.open(directory.after_kill()).volumes[1])


def test_one_batch_clears_here_and_writes_to_an_owned_leaf_there():
    directory, store, volume, held = filled(256)
    put(volume, 50 * LEAF, content(100))
    squeeze(store)
    paged(volume, lambda: volume.map.ready_to_clear(0, 64))
    let_go = (0, 16 * LEAF, None), (50 * LEAF, BLOCK, memoryview(content(101)))
    assert volume.write(let_go) == 2
    held[: 16 * LEAF] = bytes(16 * LEAF)
    held[50 * LEAF : 50 * LEAF + BLOCK] = content(101)
    assert everything(volume) == held == everything(Store.open(directory.after_kill()).volumes[1])
    store._check()


def test_any_batch_with_no_memory_at_all(seeds, note):
    """Against bytes; everything goes between any two calls."""
    for seed in seeds(25):
        rng = random.Random(seed)
        directory, store, volume, held = filled()
        twin = disk(store, 64, volume.ident)
        kept = bytes(held)
        for step in range(25):
            batch = []
            for _ in range(rng.randint(1, 4)):
                offset = rng.randrange(len(held))
                length = min(len(held) - offset, rng.choice((1, 700, BLOCK, BLOCK, LEAF, 3 * LEAF, 20 * LEAF)))
                if rng.random() < 0.5:
                    offset, length = offset & -BLOCK, max(BLOCK, length & -BLOCK)
                data = rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
                batch.append((offset, length, None if not any(data) and rng.random() < 0.7 else memoryview(data)))
                held[offset : offset + length] = data
            with note(step=step, batch=[(offset, length, view is None) for offset, length, view in batch]):
                write(volume, batch)
                rng.choice((squeeze, let_go_of_inner_nodes, lambda store: None))(store)
                offset = rng.randrange(len(held))
                assert read(volume, offset, len(held) - offset) == held[offset:]
                compare_allocation(volume, held, offset, len(held) - offset, rng.choice((1, 2, 99)))
                if rng.random() < 0.2:
                    store.checkpoint()
                squeeze(store)
        assert everything(twin) == kept
        store._check()
        assert everything(Store.open(directory.after_kill(), MapMemory(0)).volumes[volume.ident]) == held


def test_allocation_gives_what_it_knows_and_says_when_it_knows_nothing():
    _, store, volume, _ = filled()
    zero(volume, 8 * LEAF, LEAF)
    store.checkpoint()
    squeeze(store)
    with pytest.raises(Absent):
        volume.allocation(0, 64 * BLOCK)
    paged(volume, lambda: volume.map.ready(0, 8))
    assert volume.allocation(0, 64 * BLOCK) == [(2 * LEAF, True)]
    assert allocated(volume, 0, 64 * BLOCK) == [(2 * LEAF, True), *allocated(volume, 2 * LEAF, 14 * LEAF)]
    whole = [(8 * LEAF, True), (LEAF, False), (7 * LEAF, True)]
    with store.table.waiting():
        assert volume.allocation(0, 64 * BLOCK) == whole


@pytest.mark.parametrize("part", [0.3, 0.5, 0.65, 0.8])
def test_memory_stays_within_its_limit(part):
    """Apart from what is dirty, or was needed by one call. Also when most of what is read is there, and so always in use."""
    rng = random.Random(1)
    _, store, volume, held = filled(256, MapMemory(1 << 30))
    everything(volume)
    memory = store.table.memory
    memory.limit_bytes = int(part * memory.used_bytes)
    squeeze(store)
    most = 0
    for _ in range(1500):
        block = rng.randrange(256)
        assert read(volume, block * BLOCK, BLOCK) == held[block * BLOCK : (block + 1) * BLOCK]
        most = max(most, memory.used_bytes)
    assert most < 1.1 * memory.limit_bytes and store.table.evicted > 50


def test_writing_should_wait_when_half_of_the_map_memory_is_dirty():
    _, store, volume, _ = filled(256, MapMemory(1 << 30))
    store.checkpoint()
    whole = store.table.memory.limit_bytes = 100_000
    for block in range(0, 256, 4):
        assert store.too_dirty == (2 * store.table.dirty_bytes > whole)
        put(volume, block * BLOCK, content(block))
    assert store.too_dirty and store.table.dirty_bytes < whole - 10_000
    store.checkpoint()
    assert not store.too_dirty


# The jobs.


def job_for(store: Store, ids: list[int]):
    job = store.page_job(ids)
    job.run()
    return job


def test_a_node_that_moved_on_while_it_was_read_is_not_taken_in():
    _, store, volume, held = filled()
    leaf = paged(volume, lambda: volume.map.leaf_at(0).ident)
    squeeze(store)
    late = [job_for(store, [leaf]) for _ in range(3)]
    put(volume, 0, content(100))  # reads the leaf itself and changes it
    held[:BLOCK] = content(100)
    late[0].finish()
    assert everything(volume) == held
    store.checkpoint()
    squeeze(store)
    late[1].finish()
    assert leaf not in store.table.resident, "it has another place now"
    volume_two = disk(store, 64)
    store.commit([Reset(volume.ident, volume_two.ident)])
    paged(store, store.reap)
    late[2].finish()
    assert leaf not in store.table.resident and store.maps.readers == 0
    assert everything(volume) == bytes(len(held))
    store._check()


def test_files_wait_for_their_readers():
    directory, store, volume, _ = filled()
    leaf = paged(volume, lambda: volume.map.leaf_at(0).ident)
    squeeze(store)
    file = store.table.file[leaf]
    job = store.page_job([leaf])
    store.commit([Delete(volume.ident)])
    with store.table.waiting():
        store.reap()
    for _ in range(4):
        disk(store, 4)
        store.checkpoint()
        assert map_name(file) in directory.names()
    job.run()
    job.finish()
    for _ in range(2):
        store.checkpoint()
    assert map_name(file) not in directory.names() and file not in store.maps.size_bytes
    assert leaf not in store.table.resident
    store._check()


def test_a_job_that_fails_hands_over_what_it_has_and_counts_as_over():
    directory, store, volume, held = filled()
    leaves = [paged(volume, lambda: volume.map.leaf_at(number).ident) for number in (2, 5, 9)]
    squeeze(store)
    table = store.table
    leaves.sort(key=lambda ident: table.offset[ident])
    directory.flip(map_name(table.file[leaves[1]]), table.offset[leaves[1]] + 2)
    job = store.page_job(leaves)
    with pytest.raises(StoreDamaged, match=f"map node at offset {table.offset[leaves[1]]} of .* the checksum does not fit") as caught:
        job.run()
    job.finish()
    assert caught.value.nbd_errno == errno.EIO and store.maps.readers == 0
    assert leaves[0] in table.resident and leaves[1] not in table.resident
    again = store.page_job(leaves)
    with pytest.raises(StoreDamaged):
        again.run()
    again.finish()


def test_nodes_in_the_wrong_place_are_damage(monkeypatch):
    """Bytes that are whole, and mean something else."""
    _, store, volume, _ = filled()
    table, maps = store.table, store.maps
    leaf = paged(volume, lambda: volume.map.leaf_at(0).ident)
    home, root = maps.home_of(leaf), maps.home_of(volume.map.root)
    with pytest.raises(StoreDamaged, match="a node of height 2 is in the wrong place"):
        maps.load(root, is_leaf=True)
    with pytest.raises(StoreDamaged, match="a node of height 0 is in the wrong place"):
        maps.load(home, is_leaf=False)
    with pytest.raises(StoreDamaged, match="the file is missing"):
        maps.load((999, *home[1:]), is_leaf=True)
    with pytest.raises(StoreDamaged, match="the file is too short"):
        maps.load((home[0], 1 << 40, *home[2:]), is_leaf=True)
    monkeypatch.setattr(MapFiles, "read", lambda self, home: bytearray(b"what is this?"))
    with pytest.raises(StoreDamaged, match="cannot be used: kind"):
        maps.load(home, is_leaf=True)
    assert table.paged_in


def test_reaping_tells_of_a_damaged_node_and_the_rest_goes_on():
    directory, store, volume, _ = filled()
    other = disk(store, 8)
    put(other, 0, content(100))
    directory.flip(map_name(store.table.file[volume.map.root]), store.table.offset[volume.map.root])
    store.commit([Delete(volume.ident)])
    live = sum(store.usage.live)
    for _ in range(2):
        with pytest.raises(StoreDamaged):
            paged(store, store.reap)
    assert sum(store.usage.live) == live == 65, "its space is not given back, and nothing of it is taken for free"
    store.checkpoint()
    after = Store.open(directory.after_kill())
    assert everything(after.volumes[other.ident])[:BLOCK] == content(100)


def test_histories_with_little_memory(seeds, note):
    """Every checkpoint in slices, every process with no memory for maps to speak of."""
    for seed in seeds(12):
        rng = random.Random(seed)
        directory, store = make(memory=MapMemory(0))
        witness, driver = Witness(), Driver(rng, blocks_max=100)
        with note(seed=seed):
            for _ in range(3):
                witness.attach(store)
                driver.begin(store)
                for _ in range(60):
                    driver.step()
                    if rng.random() < 0.3:
                        squeeze(store)
                driver.compare()
                store._check()
                if not any(kind == "checkpoint" for kind, _ in driver.jobs):
                    slices = Slices(store)
                    while not slices.advance():
                        squeeze(store)
                directory = directory.after_kill()
                store = Store.open(directory, MapMemory(0))
                witness.compare(store)
                driver.compare(store)


def test_a_store_without_map_memory_comes_to_rest():
    """A checkpoint of it leaves nothing to be written, so no other one is due (found by the simulation: there was one after the other)."""
    _, store, volume, _ = filled()
    assert not store.table.dirty_bytes and not store.wants_checkpoint
    put(volume, 0, content(9))
    assert store.wants_checkpoint

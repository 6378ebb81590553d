"""Checkpoints: what they write, what they keep, and that the log and every other change goes on beside them."""

from __future__ import annotations

import errno
import random

import pytest
from checkpoint_kit import fill, map_files, newest, nodes_of, supers, table_sizes
from store_kit import (
    TINY,
    Driver,
    Kill,
    Slices,
    Witness,
    content,
    cut,
    disk,
    everything,
    kill_at,
    make,
    put,
    some_memory,
    zero,
)  # fmt: skip

from simsr.errors import NoSpace, StoreDamaged
from simsr.store import checkpoint as ckpt
from simsr.store import store as store_module
from simsr.store.layout import BLOCK
from simsr.store.memory import MemoryDirectory
from simsr.store.paging import map_name
from simsr.store.store import Create, Delete, Reset, Store
from simsr.store.table_file import table_name


def test_sharing_survives_reloading():
    directory, store = make()
    origin = disk(store, 64)
    fill(origin, 1)
    copies = [disk(store, 64, origin.ident) for _ in range(5)]
    for index, copy in enumerate(copies):
        put(copy, index * 9 * BLOCK, content(1000 + index))
    held = {ident: everything(volume) for ident, volume in store.volumes.items()}
    nodes, live = len(nodes_of(store)), store.statistics()["live_bytes"]
    store.close()
    store = Store.open(directory)
    assert store.recovered == {"records_replayed": 0, "records_dropped": 0}
    assert len(nodes_of(store)) == nodes < 6 * 21 and store.statistics()["live_bytes"] == live
    assert live == (64 + 5 * 4) * BLOCK, "each leaf counts what it names, whatever else names it"
    assert {ident: everything(volume) for ident, volume in store.volumes.items()} == held
    store._check()
    put(store.volumes[origin.ident], 0, content(2000))
    del held[origin.ident]
    assert {ident: everything(store.volumes[ident]) for ident in held} == held, "a write shows in a copy"


def test_second_checkpoint_writes_only_what_changed():
    directory, store = make()
    volume = disk(store, 1024)
    fill(volume, 1, 1024)
    store.checkpoint()
    g = newest(store)
    first = map_files(directory)[g]
    put(volume, 500 * BLOCK, content(5))
    store.checkpoint()
    sizes = map_files(directory)
    assert sizes[g] == first and sizes[g + 1] < first / 100
    written = [ident for ident in nodes_of(store) if store.table.file[ident] == g + 1]
    assert written == [volume.map.leaf_at(500 >> 2).ident], "exactly the leaf with the changed block"
    (table,) = table_sizes(directory).values()
    store.checkpoint()
    assert set(map_files(directory)) == set(sizes), "nothing changed: no node is written"
    assert sum(table_sizes(directory).values()) < table + 200
    put(volume, 500 * BLOCK, content(6))
    store.checkpoint()
    assert sum(table_sizes(directory).values()) < table + 600, "a row, two counts, one volume"
    assert everything(Store.open(directory.after_kill()).volumes[1]) == everything(volume)


def test_checkpoint_of_a_shared_tree_writes_each_node_once():
    directory, store = make()
    origin = disk(store, 256)
    fill(origin, 1, 256)
    store.checkpoint()
    size, table = map_files(directory)[newest(store)], sum(table_sizes(directory).values())
    for _ in range(20):
        disk(store, 256, origin.ident)
    fill(origin, 1000, 256)
    store.checkpoint()
    assert map_files(directory)[newest(store)] < size + 100
    assert sum(table_sizes(directory).values()) < table + 2 * 85 * 38 + 20 * 130 + 1000


def test_super_blocks_alternate_and_the_newest_is_never_written_over():
    directory, store = make()
    witness: list[tuple[str, int]] = []
    current = {name: block.generation for name, block in supers(directory).items()}

    def on_step(what: str) -> None:
        if what.startswith("write super"):
            name = what.split()[1]
            newest = max(current, key=current.__getitem__)
            assert name != newest, f"{what}: generations {current}"
            witness.append((name, current.get(name, 0)))
        found = supers(directory)
        current.update({name: block.generation for name, block in found.items() if block is not None})

    directory.on_step = on_step
    volume = disk(store, 8)
    for tag in range(5):
        put(volume, 0, content(tag))
        store.checkpoint()
    assert len(witness) == 5
    store.close()


@pytest.mark.parametrize("step", ["create map", "write map", "sync map", "write table", "sync table"])
def test_a_checkpoint_without_room_does_not_send_the_next_one_over_the_newest_super_block(step):
    directory, store = make()
    volume = disk(store, 8)
    put(volume, 0, content(1))
    store.checkpoint()
    found = {name: block.generation for name, block in supers(directory).items()}
    newest_name = max(found, key=found.__getitem__)
    written: list[str] = []

    def on_step(what: str) -> None:
        if what.startswith(step):
            raise OSError(errno.ENOSPC, "injected")
        if what.startswith("write super"):
            written.append(what.split()[1])

    put(volume, 0, content(3))
    for _ in range(3):
        directory.on_step = on_step
        with pytest.raises(NoSpace, match="no room for a checkpoint"):
            store.checkpoint()
    directory.on_step = lambda what: on_step(what) if what.startswith("write super") else None
    put(volume, 0, content(2))
    store.checkpoint()
    assert written and newest_name not in written
    assert len(map_files(directory)) <= 2 and len(table_sizes(directory)) <= 2
    store._check()
    assert everything(Store.open(directory.after_kill()).volumes[1])[:BLOCK] == content(2)


@pytest.mark.parametrize("step", ["create map", "sync map", "write table", "sync table"])
def test_a_checkpoint_without_room_forgets_nothing_and_leaves_nothing(step, monkeypatch):
    """The next one has all that they have to tell, also what has not changed since: volumes, counts, nodes."""
    monkeypatch.setattr(ckpt, "_NODES_A_SLICE", 1)
    monkeypatch.setattr(ckpt, "_PIECE_BYTES", 1)
    directory, store = make()
    for first_tag in (1, 100, 200):
        fill(disk(store, 64), first_tag)
    store.checkpoint()
    store.commit([Delete(2), Reset(3, 1), Create(4, 64 * BLOCK, {"a": 1}, 3)])
    put(store.volumes[1], 0, content(300))
    store.reap()

    def on_step(what: str) -> None:
        if what.startswith(step):
            raise OSError(errno.ENOSPC, "injected")

    directory.on_step, names = on_step, set(directory.names())
    for _ in range(2):
        with pytest.raises(NoSpace):
            store.checkpoint()
        assert set(directory.names()) <= names
    directory.on_step = None
    store.checkpoint()
    held = {ident: (everything(volume), volume.meta) for ident, volume in store.volumes.items()}
    again = Store.open(cut(directory))
    assert again.recovered["records_replayed"] == 0
    assert {ident: (everything(volume), volume.meta) for ident, volume in again.volumes.items()} == held
    assert again.statistics()["live_bytes"] == store.statistics()["live_bytes"]
    again._check()


@pytest.mark.parametrize(
    "stop_at", ["create map", "write map", "sync map", "write table", "sync table", "write super", "sync super"]
)
def test_checkpoint_that_was_killed_leaves_the_newest_super_block_alone(stop_at):
    """Also when the next process, which finds a map file without a super block, writes its own."""
    directory, store = make()
    put(disk(store, 8), 0, content(1))
    store.checkpoint()

    kill_at(directory, stop_at)
    put(store.volumes[1], 0, content(2))
    with pytest.raises(Kill):
        store.checkpoint()
    directory = directory.after_kill()
    found = {name: block.generation for name, block in supers(directory).items() if block is not None}
    newest = max(found, key=found.__getitem__)
    written: list[str] = []
    directory.on_step = lambda what: written.append(what.split()[1]) if what.startswith("write super") else None
    store = Store.open(directory)
    assert len(written) == 1 and written[0] != newest
    assert everything(store.volumes[1])[:BLOCK] == content(2)


def test_recovery_keeps_every_file_of_the_checkpoint_it_started_from():
    """Replay changes every node of the checkpoint; its files are still what a crash before the next one goes back to."""
    directory, store = make()
    volume = disk(store, 64)
    fill(volume, 1)
    store.checkpoint()
    fill(volume, 100)
    held = everything(volume)
    directory = directory.after_kill()
    removed: list[str] = []
    super_written = False

    def on_step(what: str) -> None:
        nonlocal super_written
        super_written |= what.startswith("sync super")
        if what.startswith("remove"):
            removed.append(what)
        if what.startswith("write super"):
            assert everything(Store.open(directory.after_kill()).volumes[1]) == held
            assert everything(Store.open(cut(directory, "all")).volumes[1]) == held

    directory.on_step = on_step
    Store.open(directory)
    assert super_written


def test_super_block_of_a_killed_process_is_made_durable_before_it_is_relied_on():
    """It was written, not synced; the power may still fail after the next process removed what the older one needs."""
    directory, store = make()
    volume = disk(store, 64)
    fill(volume, 1)
    store.checkpoint()
    fill(volume, 100)
    store.reap()

    kill_at(directory, "sync super")
    with pytest.raises(Kill):
        store.checkpoint()
    directory = directory.after_kill()
    held = everything(volume)

    def on_recovery(what: str) -> None:
        for style in ("none", "all", "some"):
            assert everything(Store.open(cut(directory, style)).volumes[1]) == held, what

    directory.on_step = on_recovery
    Store.open(directory)


@pytest.mark.parametrize("between", ["begin and run", "run and end", "slices", "slices of tiny pages"])
def test_everything_goes_on_beside_a_checkpoint(between, seeds, note, monkeypatch):
    """Writes, snapshots, reverts, deletions, reaping and flushes between its parts; killed and cut at once afterwards.

    With nodes let go of all the time, in slices of two nodes, with a new table file, page by page, every other time.
    """
    monkeypatch.setattr(ckpt, "_NODES_A_SLICE", 2)
    monkeypatch.setattr(ckpt, "_MOVE_MIN_BYTES", -1 << 30)
    monkeypatch.setattr(ckpt, "_MAP_FILES_MAX", 3)
    monkeypatch.setattr(store_module, "TABLE_SLACK_BYTES", -400)
    if between == "slices of tiny pages":
        monkeypatch.setattr(ckpt, "_PAGE_ROWS", 4)
        monkeypatch.setattr(ckpt, "_PIECE_BYTES", 100)
    moved = everythings = 0
    for runs, seed in enumerate(seeds(20), 1):
        rng = random.Random(seed)
        directory, store = make(memory=some_memory(rng))
        witness = Witness()
        witness.states[0] = {}
        witness.attach(store)
        driver = Driver(rng)
        driver.begin(store)
        driver.begin_job = driver.checkpoint = lambda: None
        for _ in range(15):
            driver.step()
        with note(seed=seed):
            for _ in range(4):
                slices = Slices(store)
                moved += len(slices.job.moves)
                everythings += slices.job.everything
                if between == "run and end":
                    store.run_checkpoint(slices.job)
                over = False
                for _ in range(8):
                    driver.step()
                    if rng.random() < 0.3:
                        store._check()
                    if between.startswith("slices"):
                        over = over or slices.advance(at_once=rng.random() < 0.5)
                if between == "run and end":
                    look_at_survivors(directory, store, witness)
                    store.end_checkpoint(slices.job)
                    over = True
                while not over:
                    over = slices.advance()
                store._check()
                look_at_survivors(directory, store, witness)
            driver.end_jobs()
            driver.compare()
    assert moved >= runs - 3 and everythings >= 2 * runs, "about two nodes a run; some runs have none to move"


def look_at_survivors(directory: MemoryDirectory, store: Store, witness: Witness) -> None:
    after = Store.open(directory.after_kill())
    assert after.log.seq == store.log.seq
    witness.compare(after)
    after._check()
    for style in ("none", "some"):
        after = Store.open(cut(directory, style))
        assert store.log.durable_seq <= after.log.seq <= store.log.seq
        witness.compare(after)
        after._check()


@pytest.mark.parametrize("everything_anew", [False, True])
def test_what_a_reader_held_during_a_checkpoint_is_free_after_a_crash(everything_anew, monkeypatch):
    """The reader ends with the process; a count that outlived it would keep the blocks of a deleted disk for ever."""
    monkeypatch.setattr(store_module, "TABLE_SLACK_BYTES", -1 << 30 if everything_anew else 1 << 20)
    directory, store = make()
    for first_tag in (1, 100, 200):
        fill(disk(store, 64), first_tag)
    store.checkpoint()
    for volume in store.volumes.values():
        put(volume, 0, content(300))
    with store.table.waiting():
        store.table.pin(store.volumes[2].map.root)
        store.table.pin(store.volumes[3].map.root)
        job = store.begin_checkpoint()
        assert job.everything == everything_anew
        store.run_checkpoint(job)
        store.end_checkpoint(job)
    store = Store.open(directory.after_kill())
    store._check()
    store.commit([Delete(2)])
    with store.table.waiting():
        store.reap()
    assert store.statistics()["live_bytes"] == 2 * 64 * BLOCK


def test_only_one_checkpoint_at_a_time():
    _, store = make()
    job = store.begin_checkpoint()
    with pytest.raises(AssertionError, match="under way already"):
        store.begin_checkpoint()
    store.run_checkpoint(job)
    store.end_checkpoint(job)
    store.checkpoint()


def test_checkpoint_counts_as_a_flush():
    directory, store = make()
    volume = disk(store, 8)
    put(volume, 0, content(1))
    store.checkpoint()
    assert store.log.durable_seq >= store.log.flush_needed_seq
    assert everything(Store.open(cut(directory)).volumes[1]) == everything(volume)


def test_all_kinds_of_nodes():
    """Dense and sparse leaves, empty ones, inner nodes with few kids: at every fan-out."""
    for bits in (1, 2, 5, 9):
        directory, store = make(geometry=type(TINY)(256, 8, bits))
        volume = disk(store, 3000)
        fill(volume, 1, 700)
        put(volume, 1500 * BLOCK, content(1))
        put(volume, 2999 * BLOCK, content(2))
        put(volume, 2000 * BLOCK, content(3))
        zero(volume, 2000 * BLOCK, BLOCK)
        disk(store, 10)
        held = everything(volume)
        store.close()
        store = Store.open(directory)
        assert everything(store.volumes[1]) == held and store.volumes[1].mapped_bytes == 702 * BLOCK
        store._check()


def test_recovery_replays_only_what_came_after():
    directory, store = make()
    volume = disk(store, 64)
    fill(volume, 1)
    store.checkpoint()
    store.flush()
    for tag in range(5):
        put(volume, 0, content(tag))
    assert Store.open(directory.after_kill()).recovered == {"records_replayed": 5, "records_dropped": 0}
    store.close()
    assert Store.open(directory).recovered == {"records_replayed": 0, "records_dropped": 0}


def test_deleted_and_reverted_trees_leave_the_map_files():
    directory, store = make()
    origin = disk(store, 256)
    fill(origin, 1, 256)
    other = disk(store, 256)
    fill(other, 1000, 256)
    store.checkpoint()
    g = newest(store)
    store.commit([Reset(other.ident, origin.ident)])
    store.commit([Delete(origin.ident)])
    store.reap()
    store.checkpoint()
    store.checkpoint()
    assert store.table.bytes_at_home[g] < map_files(directory)[g] * 0.6
    held = everything(other)
    store = Store.open(directory.after_kill())
    assert everything(store.volumes[other.ident]) == held and set(store.volumes) == {other.ident}
    store._check()


def test_clean_store_is_not_checkpointed_again():
    directory, store = make()
    disk(store, 8)
    store.close()
    store = Store.open(directory)
    steps: list[str] = []
    directory.on_step = steps.append
    store.close()
    assert steps == []


def test_wants_checkpoint(monkeypatch):
    from simsr.store import store as module

    monkeypatch.setattr(module, "CHECKPOINT_LOG_BYTES", 20 * BLOCK)
    monkeypatch.setattr(module, "CHECKPOINT_RECORDS", 10)
    _, store = make()
    volume = disk(store, 64)
    assert not store.wants_checkpoint
    fill(volume, 1, 20)
    assert store.wants_checkpoint
    store.checkpoint()
    assert not store.wants_checkpoint
    for _ in range(9):
        zero(volume, 0, BLOCK)
    assert store.wants_checkpoint


def test_damaged_node_names_file_and_offset():
    """Everything else is still there: other leaves, other volumes; and the bad one can be written over, and deleted."""
    directory, store = make()
    volume = disk(store, 64)
    fill(volume, 1)
    put(disk(store, 8), 0, content(500))
    store.flush()
    leaf = volume.map.leaf_at(5).ident
    store.close()
    file, offset = store.table.file[leaf], store.table.offset[leaf]
    held = everything(volume)
    directory.flip(map_name(file), offset + 3)
    for _ in range(2):
        store = Store.open(directory)
        volume = store.volumes[1]
        assert volume.read_bytes(0, 20 * BLOCK) == held[: 20 * BLOCK]
        assert volume.read_bytes(24 * BLOCK, 40 * BLOCK) == held[24 * BLOCK :]
        assert everything(store.volumes[2])[:BLOCK] == content(500)
        for _ in range(2):
            with pytest.raises(StoreDamaged, match=f"map node at offset {offset} of {map_name(file)} cannot be used: the checksum"):
                volume.read_bytes(19 * BLOCK, 2 * BLOCK)
            with pytest.raises(StoreDamaged, match=f"offset {offset} of {map_name(file)}"):
                put(volume, 20 * BLOCK, content(1))
        put(volume, 30 * BLOCK, content(30))
        held = held[: 30 * BLOCK] + content(30) + held[31 * BLOCK :]
        store.close()
    store = Store.open(directory)
    zero(store.volumes[1], 16 * BLOCK, 12 * BLOCK)
    wanted = held[: 16 * BLOCK] + bytes(12 * BLOCK) + held[28 * BLOCK :]
    assert everything(store.volumes[1]) == wanted and store.volumes[1].mapped_bytes == 52 * BLOCK
    store.close()
    assert everything(Store.open(directory).volumes[1]) == wanted


def test_replay_that_needs_a_damaged_node_goes_back_to_the_older_super_block():
    directory, store = make()
    volume = disk(store, 64)
    fill(volume, 1, 20)
    store.checkpoint()
    put(volume, 0, content(100))
    store.checkpoint()
    put(volume, BLOCK, content(101))
    held = everything(volume)
    home = store.table.file[volume.map.leaf_at(0).ident]
    assert home == newest(store)
    directory = directory.after_kill()
    directory.flip(map_name(home), 5)
    assert everything(Store.open(directory.after_kill()).volumes[1]) == held
    for name, block in supers(directory).items():
        if block.generation < home:
            directory.flip(name, 20)
    with pytest.raises(StoreDamaged, match=f"super.*without it: map node at offset 0 of {map_name(home)} cannot be used"):
        Store.open(directory)


def test_damaged_table_is_found_and_the_older_super_block_makes_up_for_it():
    """What the last checkpoint appended may be lost; what the one before it needs, too, may not."""
    directory, store = make()
    volume = disk(store, 64)
    fill(volume, 1, 20)
    store.checkpoint()
    middle = store._table_bytes
    put(volume, 0, content(100))
    store.checkpoint()
    held, end, name = everything(volume), store._table_bytes, table_name(store._table_file)
    assert sum(table_sizes(directory).values()) == end > middle
    for at in range(0, end, 5):
        damaged = directory.after_kill()
        damaged.flip(name, at)
        if at < middle:
            with pytest.raises(StoreDamaged, match=f"{name} cannot be used"):
                Store.open(damaged)
        else:
            assert everything(Store.open(damaged).volumes[1]) == held


def test_ident_of_a_deleted_volume_is_not_given_again():
    directory, store = make()
    volume = disk(store, 8)
    ident = disk(store, 8, volume.ident).ident
    store.commit([Delete(ident)])
    store.close()
    store = Store.open(directory)
    assert store.new_ident() > ident
    store.commit([Create(store.new_ident(), BLOCK, {})])
    last = max(store.volumes)
    assert Store.open(directory.after_kill()).new_ident() > last

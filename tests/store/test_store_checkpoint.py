"""Checkpoints: what they write, what they keep, and that the log and every other change goes on beside them."""

from __future__ import annotations

import errno
import random

import pytest
from store_kit import (
    TINY, Driver, Kill, Slices, Witness, content, cut, disk, everything, make, put, some_memory, squeeze, zero,
)  # fmt: skip

from simsr.errors import NoSpace, StoreDamaged
from simsr.store import checkpoint as ckpt
from simsr.store import store as store_module
from simsr.store.layout import BLOCK, Super
from simsr.store.memory import MemoryDirectory
from simsr.store.nodes import Node
from simsr.store.paging import map_name
from simsr.store.store import Create, Delete, Reset, Store
from simsr.store.table_file import table_name


def nodes_of(store: Store) -> dict[int, Node]:
    found, stack = {}, [volume.map.root for volume in store.volumes.values() if volume.map.root]
    with store.table.waiting():
        while stack:
            ident = stack.pop()
            if ident not in found:
                node = found[ident] = store.table.get(ident)
                if node.height:
                    stack.extend(node.present.tolist())
    return found


def map_files(directory: MemoryDirectory) -> dict[int, int]:
    """Generation -> size of each map file."""
    return {int(name[4:]): len(data) for name, data in directory.images() if name.startswith("map-")}


def table_sizes(directory: MemoryDirectory) -> dict[int, int]:
    return {int(name[6:]): len(data) for name, data in directory.images() if name.startswith("table-")}


def supers(directory: MemoryDirectory) -> dict[str, Super]:
    return {name: Super.unpack(data) for name, data in directory.images() if name.startswith("super")}


def newest(store: Store) -> int:
    return store.statistics()["checkpoint_generation"]


def fill(volume, first_tag: int, blocks: int = 64) -> None:
    put(volume, 0, b"".join(content(first_tag + index) for index in range(blocks)))


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


def test_map_files_without_live_nodes_are_removed():
    directory, store = make()
    volume = disk(store, 64)
    for round_ in range(6):
        fill(volume, 100 * round_)
        store.reap()
        store.checkpoint()
    homes = {store.table.file[ident] for ident in nodes_of(store)}
    generations = sorted(map_files(directory))
    assert set(generations) == homes | {generations[-2]}, "and the last one until the next checkpoint is durable"
    assert len(generations) == 3, "the inner nodes have not changed since the first one"
    assert generations[-1] == store.statistics()["checkpoint_generation"]
    assert store.statistics()["map_bytes"] == sum(map_files(directory).values()) + sum(table_sizes(directory).values())


def test_the_map_file_of_the_last_checkpoint_stays_until_the_next_is_durable():
    """Even if all its nodes were given up before it ended: it is what a crash goes back to."""
    directory, store = make()
    for turn in range(3):  # so that the older super block is of no help: its segments were used again
        volume = disk(store, 64)
        fill(volume, 100 * turn)
        job = store.begin_checkpoint()
        for step in job.work():
            if step is not None:
                step()
        put(volume, BLOCK, content(turn + 1))
        store.commit([Delete(volume.ident)])
        store.reap()
        store.end_checkpoint(job)
        needed = map_name(job.generation)
        durable: list[bool] = []

        def on_step(what: str) -> None:
            if not durable:
                assert needed in directory.names()
            if what.startswith("sync super"):
                durable.append(True)

        volume = disk(store, 8)
        directory.on_step = on_step
        store.checkpoint()
        directory.on_step = None
        assert durable
        store.checkpoint()
        assert needed not in directory.names()


def test_garbage_is_rewritten(monkeypatch):
    monkeypatch.setattr(ckpt, "_MOVE_MIN_BYTES", 0)
    directory, store = make()
    volume = disk(store, 256)
    fill(volume, 1, 256)
    store.checkpoint()
    for round_ in range(60):
        for leaf in range(round_ % 3, 64, 3):
            if leaf % 8:  # the others never change
                put(volume, leaf * 4 * BLOCK, content(1000 + round_))
        store.checkpoint()
        store.reap()
        assert sum(map_files(directory).values()) < 3 * sum(store.table.bytes_at_home.values()) + 3000
    assert 3 in map_files(directory)
    for leaf in range(64):
        if leaf % 8:
            zero(volume, leaf * 4 * BLOCK, 4 * BLOCK)
    store.reap()
    for _ in range(3):
        store.checkpoint()
    assert sum(map_files(directory).values()) < 3 * sum(store.table.bytes_at_home.values())
    assert min(map_files(directory)) > 60, "the first map file is never given up"
    held = everything(volume)
    store._check()
    store = Store.open(directory.after_kill())
    assert everything(store.volumes[1]) == held
    store._check()


def test_many_small_map_files_are_merged(monkeypatch):
    """One for each checkpoint, with a node that does not change any more: no garbage, but too many files to open."""
    monkeypatch.setattr(ckpt, "_MAP_FILES_MAX", 5)
    directory, store = make()
    volume = disk(store, 256)
    written = 0
    for leaf in range(64):
        put(volume, leaf * 4 * BLOCK, content(leaf + 1))
        store.checkpoint()
        written += map_files(directory).get(newest(store), 0)
        assert len(map_files(directory)) <= 5 + 4
    assert written < 10 * sum(store.table.bytes_at_home.values()), "small ones with small ones"
    held = everything(volume)
    for after in (Store.open(directory.after_kill()), Store.open(cut(directory))):
        assert everything(after.volumes[1]) == held
        after._check()


def littered(store: Store, volumes: int = 1) -> None:
    """Volumes of 64 blocks; the one map file is mostly garbage by now."""
    for _ in range(volumes):
        fill(disk(store, 64), 1)
    doomed = disk(store, 300)
    fill(doomed, 100, 300)
    store.checkpoint()
    store.commit([Delete(doomed.ident)])
    store.reap()


@pytest.mark.parametrize("slices", [0, 1, 2, 3, 5, 9, 100])
def test_moving_keeps_what_changes_meanwhile(slices, monkeypatch):
    """Nodes taken along as bytes may be changed, given up or shared before, while and after they are read."""
    monkeypatch.setattr(ckpt, "_MOVE_MIN_BYTES", 0)
    monkeypatch.setattr(ckpt, "_NODES_A_SLICE", 2)
    directory, store = make()
    littered(store, 2)
    volume, doomed = store.volumes.values()
    snapshot = disk(store, 64, volume.ident)
    squeeze(store)
    checkpoint = Slices(store)
    assert len(checkpoint.job.moves) > 4
    files = {store.table.file[ident] for ident in checkpoint.job.moves}
    for _ in range(slices):
        if checkpoint.advance():
            break
    else:
        fill(volume, 500, 50)
        store.commit([Delete(doomed.ident)])
        with store.table.waiting():
            store.reap()
        store._check()
        while not checkpoint.advance():
            pass
    store._check()
    assert not files & {number for number, nodes in store.table.nodes_at_home.items() if nodes}
    fill(volume, 700, 10)
    held = everything(volume), everything(snapshot)
    for _ in range(2):  # the next one removes what the last one did not need, but for nodes given up while it was made
        store.checkpoint()
    store.checkpoint()
    assert not files & set(map_files(directory))
    fill(volume, 701, 5)
    held = everything(volume), everything(snapshot)
    store._check()
    for _ in range(2):
        store = Store.open(directory.after_kill())
        assert (everything(store.volumes[volume.ident]), everything(store.volumes[snapshot.ident])) == held
        store._check()
        store.checkpoint()
        store.close()


def test_a_damaged_node_is_not_moved_and_keeps_its_file(monkeypatch):
    monkeypatch.setattr(ckpt, "_MOVE_MIN_BYTES", 0)
    directory, store = make()
    littered(store)
    volume = store.volumes[1]
    bad = volume.map.leaf_at(15).ident
    squeeze(store)
    file, offset = store.table.file[bad], store.table.offset[bad]
    directory.flip(map_name(file), offset)
    for turn in range(3):
        job = store.begin_checkpoint()
        assert bad in job.moves and len(job.moves) == (21, 1, 1)[turn]
        store.run_checkpoint(job)
        store.end_checkpoint(job)
        assert store.table.file[bad] == file and file in map_files(directory)
        assert volume.read_bytes(0, 60 * BLOCK)
        with pytest.raises(StoreDamaged, match=f"map node at offset {offset} of {map_name(file)} cannot be used"):
            volume.read_bytes(60 * BLOCK, BLOCK)
        squeeze(store)


def test_a_table_that_outgrew_its_beginning_is_begun_anew(monkeypatch):
    """Opening reads at most about twice what there is; the old table file goes when the new one is durable."""
    monkeypatch.setattr(store_module, "TABLE_SLACK_BYTES", 0)
    directory, store = make()
    witness = Witness()
    witness.attach(store)
    volume = disk(store, 64)
    fill(volume, 1)
    first, seen = min(table_sizes(directory)), set()
    for turn in range(40):
        put(volume, turn * BLOCK, content(100 + turn))
        store.checkpoint()
        sizes = table_sizes(directory)
        seen |= set(sizes)
        current = sizes[store._table_file]
        assert current <= 3 * store._table_bytes_first + 1000 and len(sizes) <= 2
        witness.compare(Store.open(cut(directory)))
    assert first not in sizes and 3 < len(seen) < 30


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


@pytest.mark.parametrize(
    "stop_at", ["create map", "write map", "sync map", "write table", "sync table", "write super", "sync super"]
)
def test_checkpoint_that_was_killed_leaves_the_newest_super_block_alone(stop_at):
    """Also when the next process, which finds a map file without a super block, writes its own."""
    directory, store = make()
    put(disk(store, 8), 0, content(1))
    store.checkpoint()

    def on_step(what: str) -> None:
        if what.startswith(stop_at):
            raise Kill

    directory.on_step = on_step
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

    def on_step(what: str) -> None:
        if what.startswith("sync super"):
            raise Kill

    directory.on_step = on_step
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
    for seed in seeds(20):
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
    assert moved > 20 and everythings > 10


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

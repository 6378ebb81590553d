"""The files of checkpoints: which stay, which go, what is taken along, when a table is begun anew."""

from __future__ import annotations

import pytest
from checkpoint_kit import fill, map_files, newest, nodes_of, table_sizes
from store_kit import (
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
    squeeze,
    zero,
)  # fmt: skip

from simsr.errors import StoreDamaged
from simsr.store import checkpoint as ckpt
from simsr.store import store as store_module
from simsr.store.layout import BLOCK
from simsr.store.paging import map_name
from simsr.store.store import Delete, Store


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


def test_map_files_of_earlier_lives_are_removed():
    """Also those of a checkpoint that was cut short: they belong to nobody."""
    directory, store = make()
    fill(disk(store, 64), 1)
    store.close()
    store = Store.open(directory)
    fill(store.volumes[1], 100)

    kill_at(directory, "write super")
    with pytest.raises(Kill):
        store.checkpoint()
    directory = directory.after_kill()
    before = set(map_files(directory))
    store = Store.open(directory)
    fill(disk(store, 64), 200)
    store.commit([Delete(1)])
    with store.table.waiting():
        store.reap()
    for _ in range(2):
        store.checkpoint()
    assert len(before) == 2 and not before & set(map_files(directory))
    assert store.statistics()["map_bytes"] == sum(map_files(directory).values()) + sum(table_sizes(directory).values())


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

"""`simsr salvage` against an oracle: what it says is readable is the truth, what it says is lost is zeros, nothing is unmentioned.

The truth is the state after exactly the record that the salvage claims to have reached (`Witness`).
"""

from __future__ import annotations

import os
import random

import pytest
from store_kit import TINY, UUID, Driver, State, Witness, content, disk, everything, make, put, write

from simsr.errors import SimsrError, StoreDamaged, StoreFormat, StoreLocked
from simsr.store import layout
from simsr.store.files import DiskDirectory
from simsr.store.layout import BLOCK, Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import NO_LEAF
from simsr.store.nodes import PHYSICAL_MASK
from simsr.store.paging import map_name
from simsr.store.readonly import ReadOnlyDirectory
from simsr.store.salvage import Salvage, Saved
from simsr.store.segments import segment_name
from simsr.store.store import Create, Delete, Reset, Store

Files = dict[int, tuple[bytes, Saved]]


def salvaged(directory) -> tuple[Salvage, Files]:
    """Everything from ``directory``, which must stay as it is."""
    in_memory = isinstance(directory, MemoryDirectory)
    before = dict(directory.images()) if in_memory else None
    salvage, files = Salvage(directory), {}
    for ident, volume in salvage.store.volumes.items():
        file = bytearray(volume.size_bytes)
        end = 0

        def put(offset: int, data: memoryview) -> None:
            nonlocal end
            assert end <= offset and offset + len(data) <= len(file)
            file[offset : offset + len(data)], end = data, offset + len(data)

        saved = salvage.save(volume, put)
        files[ident] = (bytes(file), saved)
    salvage.close()
    if in_memory:
        assert dict(directory.images()) == before and not directory._locked
    return salvage, files


def judge(salvage: Salvage, files: Files, state: State) -> int:
    """Hold what was saved against the truth; returns how many bytes are said to be lost."""
    wanted, lost = set(state) - {0}, 0
    assert set(files) <= wanted <= set(files) | set(salvage.rescued.missing)
    for ident, (data, saved) in files.items():
        truth = state[ident].all()
        assert len(data) == len(truth) and saved.volume.meta == state[ident].meta
        assert all(sum(one) < two[0] for one, two in zip(saved.lost, saved.lost[1:])), saved.lost
        at = 0
        for offset, length in [*saved.lost, [len(data), 0]]:
            assert 0 <= offset and offset + length <= len(data)
            assert data[at:offset] == truth[at:offset], f"volume {ident} has wrong data between {at} and {offset}"
            assert not any(data[offset : offset + length])
            at = offset + length
        lost += saved.lost_bytes
    return lost


def driven(seed: int, clean: bool = False) -> tuple[MemoryDirectory, Store, Witness]:
    rng, witness = random.Random(seed), Witness()
    directory, store = make(geometry=Geometry(16, 2, 2) if clean else TINY)
    driver = Driver(rng)
    witness.attach(store)
    driver.begin(store)
    for _ in range(rng.choice((20, 80))):
        driver.step()
        if clean and rng.random() < 0.1:
            clean_some(store, rng)
    driver.end_jobs()
    store.flush()
    if seed % 2:
        store.close()
    return directory.after_kill(), store, witness


def clean_some(store: Store, rng: random.Random) -> None:
    sealed = [s for s in store.pool.by_slot if s is not None and s.state.value == "sealed" and not s.pins]
    for victim in rng.sample(sealed, min(2, len(sealed))):
        try:
            for step in store.cleaner.clean(victim):
                if step is not None:
                    step()
        except SimsrError:
            return


def ruin(directory: MemoryDirectory, rng: random.Random) -> str:
    """Flip a byte, or lose a sector, a page or a whole file; what the maps are in more often than the rest."""
    names = directory.names()
    name = rng.choice([*names, *[name for name in names if name[:3] != "seg"] * 2])
    data = directory._files[name].now
    used = [at for at in range(len(data)) if data[at]]
    if not used or rng.random() < 0.02:
        directory.remove(name)
        return f"{name} is gone"
    at, length = rng.choice(used), rng.choice((1, 1, 1, 512, BLOCK))
    for offset in range(at, min(len(data), at + length)):
        directory.flip(name, offset)
    return f"{name} {at}+{length}"


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "cleaned"])
def test_damage_of_every_kind(clean, seeds, note):
    """One to three places of a store that may have been closed, killed, cleaned."""
    outcomes = {"nothing lost": 0, "lost": 0, "rebuilt": 0}
    for runs, seed in enumerate(seeds(10), 1):
        image, store, witness = driven(seed, clean)
        rng = random.Random(seed)
        for _ in range(15):
            directory = image.after_kill()
            damage = [ruin(directory, rng) for _ in range(rng.choice((1, 1, 3)))]
            with note(damage=damage):
                salvage, files = salvaged(directory)
                seq = salvage.rescued.seq
                lost = judge(salvage, files, witness.states[seq])
                gone = any("gone" in what for what in damage)  # of a file that is missing nobody knows what was in it
                assert seq >= store.log.durable_seq or salvage.rescued.is_older or gone
                outcomes["lost" if lost else "nothing lost"] += 1
                outcomes["rebuilt"] += any("rebuilt from" in text for text in salvage.notes)
    assert all(count >= runs // 3 for count in outcomes.values()), outcomes


def test_a_whole_store_is_salvaged_whole(seeds):
    for seed in seeds(20):
        image, store, witness = driven(seed, bool(seed % 3))
        salvage, files = salvaged(image)
        assert salvage.rescued.seq >= store.log.durable_seq and not salvage.notes and not salvage.rescued.is_older
        assert judge(salvage, files, witness.states[salvage.rescued.seq]) == 0 and not salvage.rescued.missing


def a_store(blocks: int = 40) -> tuple[MemoryDirectory, Store]:
    """Volume 1, its snapshot 2, and what volume 1 has become since; checkpointed."""
    directory, store = make()
    volume = disk(store, blocks, uuid="one")
    put(volume, 0, b"".join(content(tag) for tag in range(blocks)))
    disk(store, blocks, source=volume.ident, uuid="two")
    put(volume, BLOCK, content(100))
    store.checkpoint()
    return directory, store


def truth(store: Store) -> dict[int, bytes]:
    return {ident: everything(volume) for ident, volume in store.volumes.items()}


def place_of(volume, block: int) -> tuple[str, int]:
    with volume._table.waiting():
        physical = int(volume._entries(block, block + 1)[0]) & PHYSICAL_MASK
    blocks = volume._pool.geometry.segment_blocks
    return segment_name(physical // blocks), physical % blocks * BLOCK


def test_damaged_blocks_are_lost_and_no_others():
    directory, store = a_store()
    held = truth(store)
    for block in (0, 1, 5):
        directory.flip(*place_of(store.volumes[1], block), 0x40)
    _, files = salvaged(directory.after_kill())
    assert files[1][1].lost == [[0, 2 * BLOCK], [5 * BLOCK, BLOCK]]
    assert files[2][1].lost == [[0, BLOCK], [5 * BLOCK, BLOCK]], "its own block 1 is another one"
    assert files[1][0] == bytes(2 * BLOCK) + held[1][2 * BLOCK : 5 * BLOCK] + bytes(BLOCK) + held[1][6 * BLOCK :]


@pytest.mark.parametrize("count", [1, 8, 10_000])
def test_damaged_leaves_are_rebuilt_from_the_records(count):
    directory, store = a_store()
    held, table = truth(store), store.table
    with table.waiting():
        leaves = {ident for volume in store.volumes.values() for _, ident in volume.map.leaves()}
    for ident in leaves:
        for offset in range(min(count, table.length[ident])):
            directory.flip(map_name(table.file[ident]), table.offset[ident] + table.length[ident] - 1 - offset)
    salvage, files = salvaged(directory.after_kill())
    assert {ident: data for ident, (data, _) in files.items()} == held and not any(saved.lost for _, saved in files.values())
    assert sum("rebuilt from the records" in note for note in salvage.notes) == len(leaves) > 5


def test_all_inner_nodes_are_rebuilt_from_the_table():
    directory, store = a_store(200)
    held, table = truth(store), store.table
    inner = [ident for ident in range(1, table.rows) if table.family[ident] and table.number[ident] == NO_LEAF]
    for victim in inner:
        damaged = directory.after_kill()
        damaged.flip(map_name(table.file[victim]), table.offset[victim] + 9)
        salvage, files = salvaged(damaged)
        assert {ident: data for ident, (data, _) in files.items()} == held, salvage.notes
        assert any("rebuilt from the node table" in note for note in salvage.notes)


def test_a_leaf_of_which_the_records_are_gone_is_lost_until_it_is_written_again():
    directory, store = a_store()
    table = store.table
    put(store.volumes[1], 5 * BLOCK, content(300))  # behind the checkpoint
    store.flush()
    directory = directory.after_kill()
    with table.waiting():
        leaf = dict(store.volumes[2].map.leaves())[1]
    directory.flip(map_name(table.file[leaf]), table.offset[leaf])
    name, _ = place_of(store.volumes[2], 4)
    for offset in range(layout.HEADER_BYTES, TINY.record_area_bytes):
        directory.flip(name, offset)
    _, files = salvaged(directory)
    assert files[2][1].lost == [[4 * BLOCK, 4 * BLOCK]]
    if files[1][1].lost == [[4 * BLOCK, BLOCK], [6 * BLOCK, 2 * BLOCK]]:  # the log was in another segment
        assert files[1][0][5 * BLOCK : 6 * BLOCK] == content(300)
    else:
        assert files[1][1].lost == [[4 * BLOCK, 4 * BLOCK]]


def test_without_super_blocks():
    directory, store = a_store()
    put(store.volumes[1], 7 * BLOCK, content(301))
    store.flush()
    held, directory = truth(store), directory.after_kill()
    directory.flip("super.0", 40)
    directory.remove("super.1")
    salvage, files = salvaged(directory)
    assert {ident: data for ident, (data, _) in files.items()} == held
    assert [note for note in salvage.notes if "super" in note] == ["super.0 is not valid", "super.1 is not valid"]
    assert salvage.store.geometry == store.geometry and salvage.store.uuid.bytes == UUID


@pytest.mark.parametrize("supers", [True, False])
def test_from_the_log_alone(supers):
    """No table file: every record is still there, because nothing was used twice."""
    directory, store = a_store()
    held, directory = truth(store), directory.after_kill()
    for name in directory.names():
        if name.startswith("table-") or (not supers and name.startswith("super.")):
            directory.flip(name, 30)
    salvage, files = salvaged(directory)
    assert {ident: data for ident, (data, _) in files.items()} == held
    assert {ident: saved.volume.meta["uuid"] for ident, (_, saved) in files.items()} == {1: "one", 2: "two"}
    assert any("log alone" in note for note in salvage.notes) and salvage.rescued.seq == store.log.seq


def test_from_a_log_that_does_not_reach_back():
    """What was made in the part that is left is whole; the rest is named."""
    directory, store = make()
    witness = Witness()
    witness.attach(store)
    old = disk(store, 20)
    for tag in range(400):
        put(old, tag % 20 * BLOCK, content(tag))
        if tag % 50 == 0:
            store.checkpoint()
    store.checkpoint()
    new = disk(store, 30)
    put(new, 0, b"".join(content(500 + tag) for tag in range(25)))
    child, wrong = disk(store, 30, source=new.ident), disk(store, 20, source=old.ident)
    put(child, BLOCK, content(600))
    store.commit([Create(9, 20 * BLOCK, {}, None), Reset(9, old.ident), Create(10, BLOCK, {}, None), Delete(10)])
    store.flush()
    directory = directory.after_kill()
    first = min(segment.first_seq for segment in store.pool.by_slot if segment is not None and segment.log_index)
    assert first > 1, "the beginning of the log must have been written over"
    for name in directory.names():
        if name.startswith(("table-", "super.")):
            directory.flip(name, 30)
    salvage, files = salvaged(directory)
    assert set(files) == {new.ident, child.ident} and set(salvage.rescued.missing) == {old.ident, wrong.ident, 9}
    assert judge(salvage, files, witness.states[salvage.rescued.seq]) == 0
    assert any("does not reach back" in note for note in salvage.notes)


def test_a_damaged_record_in_the_middle_of_the_log():
    directory, store = make()
    witness = Witness()
    witness.attach(store)
    volume = disk(store, 16)
    places = []
    for tag in range(6):
        places.append((segment_name(store.log.active.slot), store.log.active.record_end))
        put(volume, tag * BLOCK, content(tag))
        store.flush()
    directory = directory.after_kill()
    name, offset = places[3]
    directory.flip(name, offset + 41)
    salvage, files = salvaged(directory)
    assert salvage.rescued.is_older and any(f"{name} at offset {offset}" in note for note in salvage.notes)
    assert judge(salvage, files, witness.states[salvage.rescued.seq]) == 0
    assert files[1][0] == b"".join(content(tag) for tag in range(3)).ljust(16 * BLOCK, b"\0")


def test_a_damaged_header_in_the_tail_costs_nothing():
    directory, store = make()
    volume = disk(store, 100)
    for tag in range(90):
        put(volume, tag * BLOCK, content(tag))
    store.flush()
    held, directory = truth(store), directory.after_kill()
    for segment in store.pool.by_slot:
        if segment is not None and segment.log_index:
            for offset in (9, 33, 60):
                damaged = directory.after_kill()
                damaged.flip(segment_name(segment.slot), offset)
                salvage, files = salvaged(damaged)
                assert files[1][0] == held[1] and not salvage.rescued.is_older
                assert any("its records tell" in note for note in salvage.notes)


def test_a_damaged_header_of_an_earlier_life_is_told_by_its_neighbours():
    """Log indexes make a leap at every opening; what was written before it is as good to rebuild from as what came after."""
    directory, store = a_store(90)
    store.close()
    store = Store.open(directory)
    put(store.volumes[1], 0, content(300))
    store.checkpoint()
    held, table = truth(store), store.table
    name, _ = place_of(store.volumes[2], 4)
    with table.waiting():
        leaf = dict(store.volumes[2].map.leaves())[1]
    directory = directory.after_kill()
    directory.flip(map_name(table.file[leaf]), table.offset[leaf])
    directory.flip(name, 33)
    salvage, files = salvaged(directory)
    assert {ident: data for ident, (data, _) in files.items()} == held
    assert any("its records tell" in note for note in salvage.notes)
    assert any("rebuilt from the records" in note for note in salvage.notes)


def test_a_block_that_was_moved_has_a_second_copy():
    rng = random.Random(3)
    directory, store = make(geometry=Geometry(16, 2, 2))
    volume = disk(store, 40)
    for tag in range(90):
        put(volume, rng.randrange(40) * BLOCK, content(tag))
    places = [place_of(volume, block) for block in range(40)]
    while all(place_of(volume, block) == places[block] for block in range(40)):
        clean_some(store, rng)
    block = next(block for block in range(40) if place_of(volume, block) != places[block])
    before, after = places[block], place_of(volume, block)
    store.flush()
    held, directory = everything(volume), directory.after_kill()
    directory.flip(*after)
    salvage, files = salvaged(directory)
    assert files[1][0] == held and not files[1][1].lost and salvage.second_copies == 1
    directory.flip(*before)
    assert salvaged(directory)[1][1][1].lost == [[block * BLOCK, BLOCK]]


def test_files_that_are_too_short_or_gone():
    directory, store = a_store()
    held, directory = truth(store), directory.after_kill()
    for name, data in list(directory.images()):
        for size in (None, 0, 100, len(data) // 2):
            damaged = directory.after_kill()
            damaged.remove(name)
            if size is not None:
                damaged.create(name, size).pwritev([data[:size]], 0)
            _, files = salvaged(damaged)
            for ident, (found, saved) in files.items():
                lost = bytearray(len(found))
                for offset, length in saved.lost:
                    lost[offset : offset + length] = b"x" * length
                assert all(lost[at] or found[at : at + BLOCK] == held[ident][at : at + BLOCK] for at in range(0, len(found), BLOCK))


def test_what_is_no_store(tmp_path):
    with pytest.raises(StoreFormat):
        Salvage(MemoryDirectory())
    directory = MemoryDirectory()
    directory.create("super.0", 4096)
    with pytest.raises(StoreDamaged, match="no valid super block, table file or segment"):
        Salvage(directory)
    assert not directory._locked
    directory, _ = a_store()
    with pytest.raises(StoreLocked):
        Salvage(directory)


def test_real_files(tmp_path):
    """Read-only from the first to the last: names, bytes and times stay, and a store in use is refused."""
    path = str(tmp_path / "sr")
    store = Store.create(DiskDirectory(path), UUID, TINY)
    volume = disk(store, 30)
    put(volume, 0, b"".join(content(tag) for tag in range(30)))
    write(volume, [(3 * BLOCK, 2 * BLOCK, None)])
    with pytest.raises(StoreLocked):
        Salvage(ReadOnlyDirectory(path))
    name, offset = place_of(volume, 7)
    held = everything(volume)
    store.close()
    with open(tmp_path / "sr" / name, "r+b") as file:
        file.seek(offset)
        file.write(b"damaged")
    os.truncate(tmp_path / "sr" / "super.0", 10)
    before = {entry.name: (entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(path)}
    salvage, files = salvaged(ReadOnlyDirectory(path))
    assert files[1][1].lost == [[7 * BLOCK, BLOCK]] and files[1][0] == held[: 7 * BLOCK] + bytes(BLOCK) + held[8 * BLOCK :]
    assert {entry.name: (entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(path)} == before
    directory = ReadOnlyDirectory(path)
    for change in (lambda: directory.create("x", 1), lambda: directory.remove(name), directory.sync):
        with pytest.raises(OSError, match="reading only"):
            change()
    file = directory.open(name)
    for change in (lambda: file.pwritev([b"x"], 0), lambda: file.area(0, 4096), file.datasync):
        with pytest.raises(OSError, match="reading only"):
            change()
    file.close()
    directory.close()

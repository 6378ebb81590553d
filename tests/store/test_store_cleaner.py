"""The cleaner: what it moves, whom it mends, what a crash in the middle leaves, and how much it writes."""

from __future__ import annotations

import random

import pytest
import store_kit
import test_store_crash
from store_kit import TINY, Driver, Witness, content, cut, disk, everything, make, paged, put, squeeze, write

from simsr.errors import NoSpace, StoreDamaged
from simsr.store import cleaner, layout
from simsr.store.contents import records_in
from simsr.store.layout import BLOCK, Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.segments import Segment, State, segment_name
from simsr.store.store import Create, Delete, Reset, Store


def finish(work) -> None:
    for step in work:
        if step is not None:
            step()


def sealed(store: Store) -> list[Segment]:
    return [s for s in store.pool.by_slot if s is not None and s.state is State.SEALED and store.usage.live[s.slot]]


def clean_all(store: Store) -> None:
    for segment in sealed(store):
        finish(store.cleaner.clean(segment))


def clean_while_wanted(store: Store) -> None:
    """What the daemon's upkeep does."""
    if store.wants_checkpoint:
        store.checkpoint()
    while store.cleaner.wanted and store.cleaner.can_gain:
        before = store.cleaner.segments_examined
        finish(store.cleaner.work())
        if store.wants_checkpoint:
            store.checkpoint()
        if store.cleaner.segments_examined == before:
            break


def aged(blocks: int = 40, geometry: Geometry = TINY, seed: int = 1) -> tuple[MemoryDirectory, Store, bytearray]:
    """A store with one disk whose segments hold about as much garbage as data, and what the disk holds."""
    directory, store = make(geometry=geometry)
    volume, rng = disk(store, blocks), random.Random(seed)
    held = bytearray(blocks * BLOCK)
    for step in range(3 * blocks):
        block = step if step < blocks else rng.randrange(blocks)
        put(volume, block * BLOCK, content(1000 + step))
        held[block * BLOCK : (block + 1) * BLOCK] = content(1000 + step)
    return directory, store, held


def the_disk(store: Store):
    return store.volumes[min(store.volumes)]


def test_what_is_in_use_is_moved_and_the_segment_dies():
    _, store, held = aged()
    victims = sealed(store)
    assert victims
    for victim in victims:
        before = store.usage.live[victim.slot]
        moved = store.cleaner.blocks_moved
        finish(store.cleaner.clean(victim))
        full = before > store.pool.data_blocks * 0.96
        assert store.usage.live[victim.slot] == (before if full else 0)
        assert store.cleaner.blocks_moved - moved == (0 if full else before)
        assert not victim.pins
    store._check()
    assert everything(the_disk(store)) == held
    store.checkpoint()
    assert any(victim.state is State.SPARE for victim in victims)
    assert everything(the_disk(store)) == held


def test_a_block_is_moved_once_for_all_who_share_it():
    """A snapshot, a clone of it and a head that has written since: three leaves may name the same block, or one leaf three times."""
    _, store, held = aged()
    head = the_disk(store)
    snapshot = disk(store, 40, head.ident)
    clone = disk(store, 40, snapshot.ident)
    for block in range(0, 40, 5):
        put(head, block * BLOCK, content(block))
        put(clone, (block + 1) * BLOCK, content(block + 1))
    wanted = [everything(volume) for volume in (head, snapshot, clone)]
    distinct = set()
    for volume in (head, snapshot, clone):
        for _, ident in volume.map.leaves():
            distinct |= {entry & 0xFFFFFFFF for entry in store.table.get(ident).slots if entry}
    in_sealed = {physical for physical in distinct if any(physical >> 5 == segment.slot for segment in sealed(store))}
    shared = [leaf for leaf in range(10) if snapshot.map.leaf_at(leaf) is clone.map.leaf_at(leaf)]
    clean_all(store)
    assert 0 < store.cleaner.blocks_moved <= len(in_sealed)
    assert shared and all(snapshot.map.leaf_at(leaf) is clone.map.leaf_at(leaf) for leaf in shared), "a shared leaf was copied"
    assert [everything(volume) for volume in (head, snapshot, clone)] == wanted
    store._check()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_moves_survive_a_kill_and_a_clean_stop(checkpoint: bool):
    directory, store, held = aged()
    other = disk(store, 40, the_disk(store).ident)
    put(the_disk(store), 0, content(1))
    held_now = everything(the_disk(store))
    clean_all(store)
    if checkpoint:
        store.checkpoint()
    for survivor in (directory.after_kill(), *([cut(directory)] if checkpoint else [])):
        again = Store.open(survivor)
        again._check()
        assert everything(again.volumes[other.ident]) == held
        assert everything(the_disk(again)) == held_now
        again.abandon()
    store.close()
    again = Store.open(directory)
    assert again.recovered["records_replayed"] == 0
    assert everything(the_disk(again)) == held_now


def test_moves_made_during_a_flush_are_synced_by_the_next_one():
    directory, store, held = aged()
    job = store.begin_flush()
    job.run()
    finish(store.cleaner.clean(sealed(store)[0]))
    store.end_flush(job)
    moved = store.log.seq
    store.flush()
    again = Store.open(cut(directory))
    assert store.cleaner.blocks_moved and again.log.seq >= moved and everything(the_disk(again)) == held


def test_every_step_of_cleaning_can_be_the_last(seeds):
    """Kill and power cut before every operation on the disk, through cleaning and the checkpoint that recycles the victims."""
    for seed in seeds(6):
        rng = random.Random(seed)
        directory, store, held = aged(seed=seed, geometry=rng.choice((TINY, Geometry(16, 2, 3))))
        snapshot = disk(store, 40, the_disk(store).ident)
        put(the_disk(store), 5 * BLOCK, content(7))
        now = everything(the_disk(store))
        store.flush()
        survivors = []

        def on_step(what: str) -> None:
            survivors.append((what, directory.after_kill()))
            survivors.append((what, directory.after_cut(rng, rng.choice(("none", "all", "some", "some")))))

        directory.on_step = on_step
        clean_all(store)
        store.checkpoint()
        clean_all(store)
        store.checkpoint()
        directory.on_step = None
        assert len(survivors) > 40
        for what, survivor in survivors:
            try:
                again = Store.open(survivor)
                again._check()
                assert everything(again.volumes[snapshot.ident]) == held
                assert everything(the_disk(again)) == now
                clean_all(again)
                assert everything(again.volumes[snapshot.ident]) == held
            except BaseException as error:
                error.add_note(f"seed {seed}, stopped before {what}")
                raise


def test_writes_between_the_slices_are_never_lost(seeds):
    for seed in seeds(20):
        rng = random.Random(seed)
        directory, store, held = aged(seed=seed)
        volume = the_disk(store)
        checkpoint = None
        for victim in sealed(store):
            for step in store.cleaner.clean(victim):
                for _ in range(rng.choice((0, 1, 3))):
                    block, tag = rng.randrange(40), rng.randrange(500)
                    put(volume, block * BLOCK, content(tag))
                    held[block * BLOCK : (block + 1) * BLOCK] = content(tag)
                if rng.random() < 0.2:
                    squeeze(store)
                if checkpoint is None and rng.random() < 0.2:
                    checkpoint = store_kit.Slices(store)
                elif checkpoint is not None and checkpoint.advance():
                    checkpoint = None
                if step is not None:
                    step()
        while checkpoint is not None and not checkpoint.advance():
            pass
        store._check()
        assert everything(volume) == held, f"seed {seed}"
        assert everything(the_disk(Store.open(directory.after_kill()))) == held, f"seed {seed}"


def test_a_disk_that_is_deleted_or_reverted_while_its_blocks_are_moved():
    _, store, held = aged()
    head = the_disk(store)
    snapshot = disk(store, 40, head.ident)
    for block in range(40):
        put(head, block * BLOCK, content(block))
    waiting = [store.cleaner.clean(victim) for victim in sealed(store)]
    for work in waiting:
        next(work)()
    store.commit([Reset(head.ident, snapshot.ident)])
    store.commit([Delete(snapshot.ident)])
    store.reap(3)
    for work in waiting:
        finish(work)
    assert everything(head) == held
    store.reap()
    store._check()
    assert everything(head) == held


def test_a_damaged_block_stays_where_it_is_and_the_others_move():
    directory, store, held = aged()
    volume = the_disk(store)
    victim = min(sealed(store), key=lambda segment: store.usage.live[segment.slot])
    places = [
        (number * 4 + index, entry & 31)
        for number, ident in volume.map.leaves()
        for index, entry in enumerate(store.table.get(ident).slots)
        if entry and (entry & 0xFFFFFFFF) >> 5 == victim.slot
    ]
    block, place = places[0]
    directory.flip(segment_name(victim.slot), place * BLOCK + 100)
    finish(store.cleaner.clean(victim))
    assert store.usage.live[victim.slot] >= 1 and not victim.pins
    assert victim not in list(store.cleaner._candidates()), "it would be chosen again and again"
    for other in range(40):
        if other != block:
            assert paged(volume, lambda: volume.read_bytes(other * BLOCK, BLOCK)) == held[other * BLOCK : (other + 1) * BLOCK]
    store._check()


def test_a_damaged_summary_is_a_torn_tail_or_damage():
    directory, store, held = aged()
    store.flush()
    finish(store.cleaner.clean(min(sealed(store), key=lambda segment: store.usage.live[segment.slot])))
    into = store.cleaner.into
    place = layout.HEADER_BYTES + layout.RECORD_BYTES + 9
    unflushed = directory.after_kill()
    unflushed.flip(segment_name(into.slot), place)
    again = Store.open(unflushed)
    assert everything(the_disk(again)) == held and again.recovered["records_dropped"]
    store.flush()
    directory.flip(segment_name(into.slot), place)
    with pytest.raises(StoreDamaged, match="summary"):
        Store.open(directory.after_kill())


@pytest.mark.parametrize("geometry", [TINY, Geometry(64, 1, 2)], ids=["by its blocks", "by its records"])
def test_a_segment_of_survivors_may_be_full_in_two_ways(geometry: Geometry, monkeypatch):
    """With batches of one block the record area may be the first to be full. The next segment goes on, and no record is wasted."""
    monkeypatch.setattr(cleaner, "BATCH_BLOCKS", 1)
    directory, store, held = aged(blocks=120, geometry=geometry)
    clean_all(store)
    found = []
    for segment in store.pool.by_slot:
        if segment is not None and segment.survivors and segment is not store.cleaner.into:
            area = memoryview(bytearray(geometry.record_area_bytes))
            segment.file.pread(area, 0)
            found.append([len(layout.Moves.unpack(record.payload)) for _, record in records_in(area, segment.salt)])
    record = len(layout.pack_record(layout.SUMMARY, 1, 0, 0, 0, 0, 0, bytes(8 + layout.MOVE_BYTES))[0])
    capacity = min(store.pool.data_blocks, (geometry.record_area_bytes - layout.HEADER_BYTES) // record)
    assert found and all(set(counts) == {1} and len(counts) == capacity for counts in found), found
    store._check()
    assert everything(the_disk(store)) == held == everything(the_disk(Store.open(directory.after_kill())))


def test_a_full_segment_is_looked_at_once():
    _, store = make()
    volume = disk(store, 90)
    for block in range(90):
        put(volume, block * BLOCK, content(block))
    copy = disk(store, 90, volume.ident)
    for block in range(0, 90, 4):  # every leaf becomes two: the counts say twice as many blocks as there are
        put(copy, block * BLOCK, content(500 + block))
    full = sealed(store)[0]
    assert store.cleaner._is_worth_it(full), "its count says nothing, so it has to be looked at"
    finish(store.cleaner.clean(full))
    assert not store.cleaner.blocks_moved and not store.cleaner._is_worth_it(full)
    assert store.cleaner.segments_examined == 1, "upkeep would think that cleaning is stuck"
    assert store.cleaner.estimate(full) == store.pool.data_blocks
    for block in range(0, 90, 2):
        put(volume, block * BLOCK, content(700 + block))
    assert store.cleaner._is_worth_it(full), "it has changed since"


def test_a_segment_whose_count_is_full_by_chance_is_looked_at():
    """Half of it is garbage, and the other half counts twice."""
    _, store = make()
    volume = disk(store, 40)
    for block in range(31):
        put(volume, block * BLOCK, content(block))
    (full,) = sealed(store)
    write(volume, [(17 * BLOCK, 14 * BLOCK, None)])
    store.reap()
    snapshot = disk(store, 40, volume.ident)
    for block in range(0, 17, 4):
        put(volume, block * BLOCK, content(500 + block))
    assert store.usage.live[full.slot] == 17 + 4 * 3 == store.pool.data_blocks - 1
    assert store.cleaner._is_worth_it(full)
    finish(store.cleaner.clean(full))
    assert store.cleaner.blocks_moved == 17 and not store.usage.live[full.slot]
    assert everything(snapshot)[: 17 * BLOCK] == b"".join(content(block) for block in range(17))


def test_an_sr_with_a_limit_goes_on_for_ever_and_says_when_it_is_full():
    """70 % of it in use: endless overwrites never find it full. All of it in use: refused, and again possible after a deletion."""
    directory, store = make()
    store.pool.cap_segments = 30
    volume, rng = disk(store, 30 * 30 * 7 // 10), random.Random(4)
    blocks = volume.size_bytes // BLOCK
    held = {}
    for step in range(6 * blocks):
        block = step if step < blocks else rng.randrange(blocks)
        put(volume, block * BLOCK, content(step % 700))
        held[block] = step % 700
        if len(store.pool.spares) < 6 or store.wants_checkpoint:
            clean_while_wanted(store)
    assert store.pool.count <= 30
    for block, tag in held.items():
        assert volume.read_bytes(block * BLOCK, BLOCK) == content(tag)
    other, written = disk(store, 30 * 30), 0
    with pytest.raises(NoSpace, match="full"):
        while True:
            put(other, written * BLOCK, content(written % 700))
            written += 1
            if len(store.pool.spares) < 6:
                clean_while_wanted(store)
    assert written + blocks > 30 * 30 * 0.75
    store._check()
    store.commit([Delete(other.ident)])
    store.reap()
    store.checkpoint()
    for block in range(blocks):
        put(volume, block * BLOCK, content(block % 700))
        if len(store.pool.spares) < 6:
            clean_while_wanted(store)
    store._check()
    again = Store.open(directory.after_kill())
    assert all(again.volumes[volume.ident].read_bytes(b * BLOCK, BLOCK) == content(b % 700) for b in range(blocks))


def test_cleaning_begins_at_the_low_mark_and_ends_at_the_high_one():
    _, store = make()
    store.pool.cap_segments = 64
    cleaner, pool = store.cleaner, store.pool
    low, high = cleaner._marks(64)
    while cleaner.free_segments(64) >= low:
        assert not cleaner.wanted
        pool.make_one()
        segment = pool.spares.pop()
        segment.state = State.SEALED
        store.usage.live[segment.slot] = 5
    assert cleaner.wanted
    freed = [s for s in pool.by_slot if s is not None and s.state is State.SEALED][: high - low]
    for segment in freed[:-1]:
        segment.state = State.SPARE
        pool.spares.append(segment)
        assert cleaner.wanted, "once begun it goes on"
    freed[-1].state = State.SPARE
    pool.spares.append(freed[-1])
    assert cleaner.free_segments(64) >= high - 1 and (cleaner.free_segments(64) < high or not cleaner.wanted)


def leave_one_spare(directory: MemoryDirectory, store: Store) -> None:
    directory.room_bytes = 0
    while store.pool.remove_spare():
        pass


def by_live(store: Store) -> list[Segment]:
    return sorted(sealed(store), key=lambda segment: store.usage.live[segment.slot])


def test_the_last_spare_is_for_deleting_while_a_checkpoint_can_give_others():
    directory, store, held = aged(blocks=120)
    victims = by_live(store)
    finish(store.cleaner.clean(victims[0]))
    leave_one_spare(directory, store)
    assert store.pool.dead() == [victims[0]]
    with pytest.raises(NoSpace):
        for victim in victims[1:]:
            finish(store.cleaner.clean(victim))
    assert len(store.pool.spares) == 1 and not any(victim.pins for victim in victims)
    for _ in range(2):
        store.checkpoint()
        finish(store.cleaner.clean(by_live(store)[0]))
    store._check()
    assert everything(the_disk(store)) == held == everything(the_disk(Store.open(directory.after_kill())))


@pytest.mark.parametrize("log_is_full", [False, True])
def test_the_last_spare_is_for_the_cleaner_if_nothing_else_gives_one(log_is_full: bool):
    """For survivors, or for the log when there is no room in it for the record that tells of them."""
    directory, store, held = aged(blocks=120)
    if log_is_full:
        finish(store.cleaner.clean(by_live(store)[0]))
        store.checkpoint()
    leave_one_spare(directory, store)
    assert not store.pool.dead()
    if log_is_full:
        while store.log.room(freeing=True)[1] >= layout.RECORD_BYTES + 16:
            store.log.append(layout.MARK, 0, b"")
    (spare,) = store.pool.spares
    victim = by_live(store)[0]
    finish(store.cleaner.clean(victim))
    assert store.pool.dead() == [victim] and not store.pool.spares
    assert spare is (store.log.active if log_is_full else store.cleaner.into)
    store.checkpoint()
    assert store.pool.spares == [victim]
    store._check()
    assert everything(the_disk(store)) == held == everything(the_disk(Store.open(directory.after_kill())))


def test_without_a_limit_a_store_takes_twice_what_is_in_use_and_16_segments():
    _, store = make()
    volume = disk(store, 900)
    assert store.cleaner.cap_segments == 16
    put(volume, 0, b"".join(content(tag) for tag in range(900)))
    assert store.cleaner.cap_segments == 2 * 30 + 16
    write(volume, [(0, 599 * BLOCK, None)])
    store.reap()
    assert store.cleaner.cap_segments == 2 * 11 + 16, "the eleventh is begun"


@pytest.mark.parametrize("used", [0.5, 0.7])
def test_write_amplification_of_uniform_overwrites(used: float):
    """At most 1.15 / (1 - u), counting everything that is written: data, records, moves, maps."""
    directory, store = make(geometry=Geometry(64, 4, 4))
    cap = store.pool.cap_segments = 120
    blocks, rng = int(used * cap * 64), random.Random(9)
    volume = disk(store, blocks)
    batch = [memoryview(content(tag)) for tag in range(50)]

    def run(order) -> None:
        order = list(order)
        for first in range(0, len(order), 16):
            write(volume, [(block * BLOCK, BLOCK, batch[(block + first) % 50]) for block in order[first : first + 16]])
            if len(store.pool.spares) < 6 or store.wants_checkpoint:
                clean_while_wanted(store)

    run(range(blocks))
    run(rng.randrange(blocks) for _ in range(blocks))
    written, moved = store.log.blocks_appended, store.cleaner.blocks_moved
    run(rng.randrange(blocks) for _ in range(blocks))
    amplification = 1 + (store.cleaner.blocks_moved - moved) / (store.log.blocks_appended - written)
    assert 1.02 < amplification <= 1.15 / (1 - used)
    assert store.pool.count <= cap


class CleaningDriver(Driver):
    """Cleans segments chosen at random, a slice at a time, between everything else."""

    work = None

    def begin(self, store: Store) -> None:
        super().begin(store)
        self.work = None

    def step(self) -> None:
        if self.rng.random() < 0.25:
            try:
                self.clean()
            except NoSpace:
                self.refused += 1
                self.work = None
        else:
            super().step()

    def clean(self) -> None:
        if self.work is None:
            victims = sealed(self.store)
            if not victims:
                return
            self.work = self.store.cleaner.clean(self.rng.choice(victims))
        for _ in range(self.rng.choice((1, 2, 5, 100))):
            try:
                step = next(self.work)
                if step is not None:
                    step()
            except StopIteration:
                self.work = None
                return

    def end_jobs(self) -> None:
        super().end_jobs()
        if self.work is not None:
            self.work.close()
            self.work = None


def test_random_histories_with_cleaning(monkeypatch, seeds):
    """The crash enumeration of `test_store_crash`, with the cleaner at work all the time."""
    monkeypatch.setattr(test_store_crash, "Driver", CleaningDriver)
    moved = 0
    for seed in seeds(60):
        crash = test_store_crash.Crash(seed)
        try:
            crash.run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        moved += crash.store.cleaner.blocks_moved if crash.store is not None else 0


def test_the_witness_sees_moves_as_nothing():
    """Cleaning changes no state of the fold: what the crash tests compare with is the state without it."""
    directory, store, held = aged()
    witness = Witness({store.log.seq: {}})
    seen = []
    store.log.append, append = (lambda kind, *rest, **more: (seen.append(kind), append(kind, *rest, **more))[1]), store.log.append
    clean_all(store)
    assert seen and set(seen) <= {layout.MOVED, layout.MARK} and witness.states
    store.commit([Create(store.new_ident(), BLOCK, {})])
    assert layout.COMMIT in seen

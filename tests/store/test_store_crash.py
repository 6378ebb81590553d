"""Crash enumeration: random histories, stopped at many of their steps, every survivor reopened and judged.

What is judged (docs/durability.md): after the death of the process the store holds every record that was appended, no
more; after a power cut the records up to some point, which is not before the last completed flush. Recovery is stopped
at its steps as well, and a store that has recovered is used and stopped again. Much of this happens with so little memory for
maps that nodes come and go all the time, and with a checkpoint under way, slice by slice.
"""

from __future__ import annotations

import random

from store_kit import TINY, UUID, Driver, Kill, Witness, content, cut, disk, everything, make, put, some_memory

from simsr.errors import StoreDamaged, StoreFormat
from simsr.store.layout import BLOCK, Geometry
from simsr.store.memory import SECTOR_BYTES, MemoryDirectory
from simsr.store.segments import segment_name
from simsr.store.store import Store

HISTORIES = 90
STEPS_MAX = 45
CHECKS_A_HISTORY = 18
GEOMETRIES = (TINY, Geometry(8, 1, 1), Geometry(16, 2, 3))
STYLES = ("none", "all", "some", "some", "some")


class Crash:
    """Runs one history and judges the survivors of its crashes, at some of its steps or at all."""

    def __init__(self, seed: int, every_step: bool = False) -> None:
        self.every_step = every_step
        self.rng = random.Random(f"history {seed}")
        self.sampler = random.Random(f"samples {seed}")
        self.witness = Witness()
        self.directory = MemoryDirectory()
        self.store: Store | None = None
        self.bounds = (0, 0, 0)  # last record: surely there after another cut, after another kill, ever appended
        self.created = False  # a crash before `Store.create` returned may leave something that is no store yet
        self.checks = 0
        self.steps_to_kill = -1

    def run(self) -> None:
        self.directory.on_step = self.on_step
        self.memory = some_memory(self.sampler)
        self.store = Store.create(self.directory, UUID, self.sampler.choice(GEOMETRIES), memory=self.memory)
        self.created = True
        self.witness.attach(self.store)
        driver = Driver(self.rng)
        for life in range(self.rng.randint(1, 4)):
            if life:
                self.store = Store.open(self.directory, self.memory)
                self.witness.compare(self.store)
                self.witness.attach(self.store)
            driver.begin(self.store)
            try:
                for _ in range(self.rng.randint(3, STEPS_MAX)):
                    driver.step()
                driver.compare()
                self.end_of_life(driver)
            except Kill:
                self.crash()

    def end_of_life(self, driver: Driver) -> None:
        """Close cleanly, or go on until some step does not return."""
        if self.rng.random() < 0.3:
            driver.end_jobs()
            self.store.close()
            self.bounds = self.bounds_now()
            self.store = None
        else:
            self.steps_to_kill = self.rng.randint(1, 12)
            while True:
                driver.step()

    def crash(self) -> None:
        """Find what the next process finds."""
        durable, _, last = self.bounds_now()
        self.steps_to_kill = -1
        if self.rng.random() < 0.5:
            self.directory, self.bounds = self.directory.after_kill(), (durable, last, last)
        else:
            self.directory = self.directory.after_cut(self.rng, self.rng.choice(STYLES))
            self.bounds = (durable, durable, last)
        self.directory.on_step = self.on_step
        self.memory.tables.clear()  # which a process would not survive either
        self.store = None

    def bounds_now(self) -> tuple[int, int, int]:
        if self.store is None:
            return self.bounds
        log = self.store.log
        return log.durable_seq, log.seq, log.seq

    def on_step(self, what: str) -> None:
        if self.steps_to_kill >= 0:
            self.steps_to_kill -= 1
            if self.steps_to_kill < 0:
                raise Kill(what)
        rare = not what.startswith("write seg")
        sampled = self.sampler.random() < (0.25 if rare else 0.08) and self.checks < CHECKS_A_HISTORY
        if sampled or self.every_step:
            self.checks += 1
            self.judge(what)

    def judge(self, what: str) -> None:
        durable, known, last = self.bounds_now()
        for style in ("kill", self.sampler.choice(STYLES)):
            survivor = self.directory.after_kill() if style == "kill" else self.directory.after_cut(self.sampler, style)
            try:
                self.judge_survivor(survivor, known if style == "kill" else durable, last)
            except BaseException as error:
                error.add_note(f"stopped before step {what!r}, style {style}, durable {durable}, appended {last}")
                raise

    def judge_survivor(self, survivor: MemoryDirectory, least: int, most: int) -> None:
        again = survivor.after_kill()
        try:
            store = Store.open(survivor, some_memory(self.sampler))
        except (StoreDamaged, StoreFormat):
            if self.created:
                raise
            return
        seq = store.log.seq
        assert least <= seq <= most, f"recovered up to record {seq}, not {least} to {most}"
        self.witness.compare(store)
        store._check()
        if self.created and self.sampler.random() < 0.4:
            self.crash_in_recovery(again, seq)
        if self.sampler.random() < 0.3:
            self.use(survivor, store)

    def crash_in_recovery(self, directory: MemoryDirectory, seq: int) -> None:
        """Recovery that was stopped anywhere gives the same as recovery that was not, or, after a cut, a shorter prefix."""
        survivors: list[tuple[str, MemoryDirectory]] = []

        def on_step(what: str) -> None:
            if self.sampler.random() < 0.4:
                survivors.append((what, directory.after_kill()))
                survivors.append((what, directory.after_cut(self.sampler, self.sampler.choice(STYLES))))

        directory.on_step = on_step
        Store.open(directory, some_memory(self.sampler))
        found: dict[int, int] = {}  # by the content of all files: the last record; every other survivor is like an earlier one
        for index, (what, survivor) in enumerate(survivors):
            try:
                content = hash(tuple(survivor.images()))
                if content not in found:
                    store = Store.open(survivor)
                    found[content] = store.log.seq
                    self.witness.compare(store)
                    store._check()
                assert found[content] == seq or (index % 2 and found[content] < seq)
            except BaseException as error:
                error.add_note(f"second crash, before step {what!r} of recovery, {'cut' if index % 2 else 'kill'}")
                raise

    def use(self, directory: MemoryDirectory, store: Store) -> None:
        """A recovered store works on: what is flushed now stays, through another cut."""
        witness = self.witness.fork()
        witness.attach(store)
        rng = random.Random(self.sampler.random())
        driver = Driver(rng)
        driver.begin(store)
        for _ in range(6):
            driver.step()
        store.flush()
        flushed = store.log.seq
        for _ in range(3):
            driver.step()
        after = Store.open(directory.after_cut(rng, rng.choice(STYLES)))
        assert flushed - 1 <= after.log.seq <= store.log.seq  # less 1: the MARK that a flush leaves is not flushed itself
        witness.compare(after)
        after._check()


def test_histories(seeds) -> None:
    checks = 0
    for seed in seeds(HISTORIES):
        crash = Crash(seed)
        crash.run()
        checks += crash.checks
    assert checks


def test_every_step_of_a_history(seeds) -> None:
    for seed in seeds(1):
        Crash(1000 + seed, every_step=True).run()


def test_every_style_of_cut_at_every_step_of_a_revert() -> None:
    """A revert with its automatic snapshot, then a deletion, each flushed: before or after, never in between."""
    directory, store = make()
    witness = Witness()
    witness.attach(store)
    disk(store, 8)
    put(store.volumes[1], 0, content(1) * 3)
    disk(store, 8, 1)
    put(store.volumes[1], BLOCK, content(2) * 3)
    store.flush()
    driver = Driver(random.Random(0))
    driver.begin(store)
    seen: set[frozenset] = set()

    def on_step(what: str) -> None:
        survivors = [directory.after_kill(), cut(directory, "none"), cut(directory, "all")]
        survivors += [directory.after_cut(random.Random(seed), "some") for seed in range(8)]
        for survivor in survivors:
            after = Store.open(survivor)
            assert store.log.durable_seq <= after.log.seq <= store.log.seq
            witness.compare(after)
            seen.add(frozenset((ident, everything(volume)) for ident, volume in after.volumes.items()))

    states = [frozenset((ident, everything(volume)) for ident, volume in store.volumes.items())]
    directory.on_step = on_step
    driver.rng = random.Random(3)
    for action in (driver.reset, store.flush, driver.delete, store.flush, store.checkpoint, driver.create, store.flush):
        action()
        states.append(frozenset((ident, everything(volume)) for ident, volume in store.volumes.items()))
    assert seen <= set(states) and len(seen) >= 3


def test_record_that_was_being_written_when_the_process_died() -> None:
    """The record area is a shared mapping: death in the middle of a copy leaves any first part of a record."""
    directory, store = make()
    volume = disk(store, 8)
    put(volume, 0, content(1))
    begin = store.log.active.record_end
    put(volume, BLOCK, content(2))
    end = store.log.active.record_end
    name = segment_name(store.log.active.slot)
    record = bytes(directory._files[name].now[begin:end])
    for length in range(len(record)):
        torn = directory.after_kill()
        torn._files[name].now[begin:end] = record[:length].ljust(len(record), b"\0")
        after = Store.open(torn)
        whole = not any(record[length:])
        assert after.log.seq == store.log.seq - (not whole), length
        assert everything(after.volumes[1]) == (content(1) + content(2) * whole).ljust(8 * BLOCK, b"\0")


def test_records_of_a_life_whose_header_was_lost_never_come_back() -> None:
    """A cut may take the first sector of a segment and leave records behind it. The next life takes the same segment and
    writes the same things; what stood behind them was never written by it, and must not look as if it was."""
    directory, store = make()
    disk(store, 16)
    store.close()

    def live(count: int) -> Store:
        store = Store.open(directory)
        for tag in range(count):
            put(store.volumes[1], tag * BLOCK, content(tag + 1))
        return store

    first = live(16)
    name = segment_name(first.log.active.slot)
    header = bytes(directory._files[name].durable[:SECTOR_BYTES])
    directory = cut(directory, "all")
    for side in (directory._files[name].now, directory._files[name].durable):
        side[:SECTOR_BYTES] = header
    second = live(7)
    assert segment_name(second.log.active.slot) == name
    directory = directory.after_kill()
    after = Store.open(directory)
    assert after.log.seq == second.log.seq
    assert everything(after.volumes[1]) == everything(second.volumes[1])


def test_dropped_data_drops_all_records_behind_it() -> None:
    """A record may reach the disk without its data. It and what follows are gone; the log goes on in another segment."""
    directory, store = make()
    volume = disk(store, 16)
    store.flush()
    slot, block = store.log.active.slot, store.log.active.used_blocks
    for tag in range(5):
        put(volume, tag * BLOCK, content(tag + 1))
    directory = cut(directory, "all")
    for side in (directory._files[segment_name(slot)].now, directory._files[segment_name(slot)].durable):
        side[(block + 2) * BLOCK : (block + 2) * BLOCK + SECTOR_BYTES] = bytes(SECTOR_BYTES)
    for _ in range(3):
        store = Store.open(directory)
        held = (content(1) + content(2)).ljust(16 * BLOCK, b"\0")
        assert everything(store.volumes[1]) == held
        assert store.log.active.slot != slot
        store.abandon()
    store = Store.open(directory)
    put(store.volumes[1], 0, content(9))
    assert everything(Store.open(directory.after_kill()).volumes[1]) == content(9) + held[BLOCK:]

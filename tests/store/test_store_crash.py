"""Crash enumeration: random histories, stopped at many of their steps, every survivor reopened and judged.

What is judged (docs/durability.md): after the death of the process the store holds every record that was appended, no
more; after a power cut the records up to some point, which is not before the last completed flush. Recovery is stopped
at its steps as well, and a store that has recovered is used and stopped again.
"""

from __future__ import annotations

import random

from store_kit import Driver, Kill, UUID, Witness, content, disk, make, put, TINY

from simsr.errors import StoreDamaged, StoreFormat
from simsr.store.memory import MemoryDirectory
from simsr.store.store import Store

HISTORIES = 220
STEPS_MAX = 45
CHECKS_A_HISTORY = 24
STYLES = ("none", "all", "some", "some", "some")


class Crash:
    """Runs one history and judges the survivors of its crashes."""

    def __init__(self, seed: int) -> None:
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
        self.store = Store.create(self.directory, UUID, TINY)
        self.created = True
        self.witness.attach(self.store)
        driver = Driver(self.rng)
        for life in range(self.rng.randint(1, 4)):
            if life:
                self.store = Store.open(self.directory)
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
        if self.sampler.random() < (0.25 if rare else 0.08) and self.checks < CHECKS_A_HISTORY:
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
            store = Store.open(survivor)
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
        Store.open(directory)
        for index, (what, survivor) in enumerate(survivors):
            try:
                store = Store.open(survivor)
                assert store.log.seq == seq or (index % 2 and store.log.seq < seq)
                self.witness.compare(store)
                store._check()
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

"""Walks while the volumes change and the cleaner moves blocks: exact whatever goes on meanwhile.

What a walk must say is computed when it begins. Then it goes on step by step, and between its steps a random history
does: writes, reverts, deletions, checkpoints, moves, memory that is too small for anything to stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_kit import TINY, Driver, content, disk, make, put, some_memory, zero
from walk_kit import SECTOR, census, check_walks, difference, told

from simsr.errors import NoSpace
from simsr.store.layout import BLOCK, Geometry
from simsr.store.node_table import MapMemory
from simsr.store.segments import State
from simsr.store.store import Create, Delete, Reset, Resize, Store
from simsr.store.walk import Diff, Survey


class Steps:
    """A walk under way, and what it must find; what it gives to another thread runs at once or after other things were done."""

    def __init__(self, driver: Driver, rng: random.Random) -> None:
        self.store, self.rng = driver.store, rng
        self.survey = not driver.bytes or rng.random() < 0.4
        if self.survey:
            self.wanted, self.job = census(self.store), Survey(self.store)
        else:
            old, new = (self.store.volumes[driver.pick()] for _ in range(2))
            self.wanted, self.job = difference(self.store, old, new), Diff(self.store, old, new)
        self.work = self.job.work()
        self.step = None
        self.ended = self.advance()

    def advance(self) -> bool:
        if self.step is not None:
            self.step()
            self.step = None
        try:
            self.step = next(self.work)
        except StopIteration:
            found = told(self.job) if self.survey else self.job.ranges
            assert found == self.wanted
            assert self.job.done
            return True
        if self.step is not None and self.rng.random() < 0.5:
            self.step()
            self.step = None
        return False


class Cleaning:
    """The cleaner at any full segment, whether it is worth it or not."""

    def __init__(self, store: Store, rng: random.Random) -> None:
        self.store, self.rng = store, rng
        self.work: Iterator | None = None

    def advance(self) -> None:
        if self.work is None:
            sealed = [s for s in self.store.pool.by_slot if s is not None and s.state is State.SEALED and not s.pins]
            if not sealed or len(self.store.pool.spares) < 3:
                return
            self.work = self.store.cleaner.clean(self.rng.choice(sealed))
        try:
            step = next(self.work)
            if step is not None:
                step()
        except (StopIteration, NoSpace):
            self.work = None

    def close(self) -> None:
        if self.work is not None:
            self.work.close()
            self.work = None


def random_life(seed: int, geometry: Geometry, turns: int = 250) -> tuple[int, int]:
    """(walks that ended, blocks that were moved in the middle of one)"""
    rng = random.Random(seed)
    directory, store = make(geometry=geometry, memory=some_memory(rng))
    driver = Driver(rng, blocks_max=rng.choice((6, 40, 90)), volumes_max=rng.choice((2, 4, 9)))
    driver.begin(store)
    for _ in range(rng.randrange(5, 60)):
        driver.step()
    cleaning, walks = Cleaning(store, rng), []
    ended = moved = 0
    for _ in range(turns):
        before = store.cleaner.blocks_moved
        what = rng.random()
        if what < 0.3:
            driver.step()
        elif what < 0.6:
            cleaning.advance()
        elif what < 0.95 and walks:
            one = rng.choice(walks)
            if one.advance():
                walks.remove(one)
                ended += 1
        elif what > 0.97 and walks:
            walks.pop().work.close()
        elif len(walks) < 3:
            new = Steps(driver, rng)
            if not new.ended:
                walks.append(new)
        if walks:
            moved += store.cleaner.blocks_moved - before
    for one in walks:
        while not one.advance():
            if rng.random() < 0.3:
                driver.step()
            if rng.random() < 0.5:
                cleaning.advance()
        ended += 1
    cleaning.close()
    driver.end_jobs()
    driver.compare()
    store._check()  # nothing is held any more
    store.checkpoint()
    after = Store.open(directory.after_kill())
    driver.compare(after)
    after._check()
    return ended, moved


@pytest.mark.parametrize("part", range(6))
def test_random_lives(small_slices, part):
    """The heart: exact whatever goes on meanwhile."""
    ended = moved = 0
    for seed in range(part * 100, part * 100 + 20):
        small_slices(random.Random(seed))
        some, blocks = random_life(seed, random.Random(seed).choice((TINY, Geometry(32, 2, 1), Geometry(64, 3, 3))))
        ended, moved = ended + some, moved + blocks
    assert ended > 200 and moved > 50, (ended, moved)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "zero", "snapshot", "delete", "revert", "resize", "new"]), *[st.integers(0, 99)] * 3),
        max_size=40,
    )
)
def test_any_family_tree(small_slices, changes):
    """Whatever volumes were made of each other, cold and warm."""
    small_slices(random.Random(len(changes)))
    _, store = make(memory=MapMemory(0))
    disk(store, 9)
    for tag, (what, which, a, b) in enumerate(changes):
        volumes = list(store.volumes.values())
        one, other = volumes[which % len(volumes)], volumes[a % len(volumes)]
        blocks = one.size_bytes // BLOCK
        first = a % max(1, blocks)
        count = min(1 + b % 6, blocks - first)
        if what == "write":
            put(one, first * BLOCK, b"".join(content(tag * 10 + n) for n in range(count)))
        elif what == "zero":
            zero(one, first * BLOCK, count * BLOCK)
        elif what == "snapshot" and len(volumes) < 6:
            store.commit([Create(store.new_ident(), one.size_bytes, {}, one.ident)])
        elif what == "delete" and len(volumes) > 1:
            store.commit([Delete(one.ident)])
        elif what == "revert":
            store.commit([Reset(one.ident, other.ident)])
        elif what == "resize" and one.size_bytes < 300 * BLOCK:
            store.commit([Resize(one.ident, one.size_bytes + b * SECTOR)])
        elif what == "new" and len(volumes) < 6:
            store.commit([Create(store.new_ident(), (1 + b) * SECTOR, {})])
        if b % 7 == 0:
            store.checkpoint()
    check_walks(store, *list(store.volumes.values())[:3])

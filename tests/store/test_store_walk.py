"""Differences and surveys, held against counting everything by hand, while the volumes change and the cleaner moves blocks.

What a walk must say is computed when it begins, from the leaves alone. Then it goes on step by step, and between its steps a random history
does: writes, reverts, deletions, checkpoints, moves, memory that is too small for anything to stay.
"""

from __future__ import annotations

import gc
import random
import time
from array import array
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_kit import TINY, Driver, content, disk, make, put, some_memory, squeeze, zero

from simsr.errors import NoSpace, StoreDamaged
from simsr.store import cleaner, walk
from simsr.store.layout import BLOCK, START_SHIFT, Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import MapMemory
from simsr.store.segments import State
from simsr.store.store import Create, Delete, Reset, Resize, Store
from simsr.store.volume import Volume
from simsr.store.walk import Diff, Survey, Walk

SECTOR = 512

# By hand.


def entries_of(store: Store, volume: Volume) -> dict[int, int]:
    found = {}
    with store.table.waiting():
        for number, ident in volume.map.leaves():
            for index, entry in enumerate(store.table.get(ident).slots):
                if entry:
                    found[number << store.table.bits | index] = entry
    return found


def difference(store: Store, old: Volume, new: Volume) -> list[tuple[int, int, bool]]:
    before, after = entries_of(store, old), entries_of(store, new)
    smaller, larger = sorted((old.size_bytes, new.size_bytes))
    kinds: list[bool | None] = []
    for offset in range(0, larger, SECTOR):
        block = offset // BLOCK
        changed = offset >= smaller or before.get(block) != after.get(block)
        kinds.append(offset < new.size_bytes and block in after if changed else None)
    ranges: list[tuple[int, int, bool]] = []
    for index, kind in enumerate(kinds):
        if kind is not None:
            if index and kinds[index - 1] is kind:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + SECTOR, kind)
            else:
                ranges.append((index * SECTOR, SECTOR, kind))
    return ranges


def census(store: Store) -> tuple[dict[int, tuple[int, int, int]], int, int]:
    """({volume: (size, referenced, exclusive)}, distinct, shared)"""
    held = {ident: set(entries_of(store, volume).items()) for ident, volume in store.volumes.items()}
    holders = Counter((entry & 0xFFFFFFFF) for blocks in held.values() for _, entry in blocks)
    return (
        {
            ident: (store.volumes[ident].size_bytes, len(blocks), sum(holders[entry & 0xFFFFFFFF] == 1 for _, entry in blocks))
            for ident, blocks in held.items()
        },
        len(holders),
        sum(count > 1 for count in holders.values()),
    )


def told(survey: Survey) -> tuple[dict[int, tuple[int, int, int]], int, int]:
    found = {space.ident: (space.size_bytes, space.referenced_blocks, space.exclusive_blocks) for space in survey.volumes}
    return found, survey.distinct_blocks, survey.shared_blocks


# Carrying out.


def run(job: Walk) -> Walk:
    steps = 0
    for step in job.work():
        steps += 1
        if step is not None:
            step()
    assert job.done
    return job


def check_walks(store: Store, *volumes: Volume) -> None:
    """Every walk there is over ``volumes``, at once and warm or cold."""
    for cold in (False, True):
        for old in volumes:
            for new in volumes:
                wanted = difference(store, old, new)
                if cold:
                    squeeze(store)
                assert run(Diff(store, old, new)).ranges == wanted, f"{old.ident} to {new.ident}"
                check_windows(store, old, new, wanted)
        wanted = census(store)
        if cold:
            squeeze(store)
        assert told(run(Survey(store))) == wanted
    store._check()


def check_windows(store: Store, old: Volume, new: Volume, wanted: list[tuple[int, int, bool]]) -> None:
    """Parts of a diff, in bytes that are no borders of anything."""
    size = max(old.size_bytes, new.size_bytes)
    for start, end in ((0, size // 2), (size // 3, size // 3 + 5000), (size // 2 + 1, size - 1), (size - 1, size), (0, size + 5)):
        clipped = [(max(at, start), min(at + length, end), data) for at, length, data in wanted]
        clipped = [(begin, stop - begin, data) for begin, stop, data in clipped if begin < stop]
        assert run(Diff(store, old, new, start, end=end)).ranges == clipped, f"{old.ident} to {new.ident}, {start} to {end}"
        some = run(Diff(store, old, new, start, 2, end))
        assert some.ranges == clipped[:2]
        assert some.next_offset == (clipped[2][0] if len(clipped) > 2 else None)


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


@pytest.fixture
def small_slices(monkeypatch):
    """Walks pause wherever they may, look few nodes ahead, and take many nodes and columns in several pieces."""

    def shrink(rng: random.Random) -> None:
        monkeypatch.setattr(walk, "_SLICE_COST", rng.choice((1, 1, 30, 250)))
        monkeypatch.setattr(walk, "_PAGES", rng.choice((1, 2, 64)))
        monkeypatch.setattr(walk, "_LEAVES_A_SLICE", rng.choice((1, 2, 1000)))
        monkeypatch.setattr(walk, "_INNERS_A_SLICE", rng.choice((1, 2, 16)))
        monkeypatch.setattr(walk, "_VALUES_A_SLICE", rng.choice((1, 4, 9, 8000)))
        monkeypatch.setattr(cleaner, "_GAIN_MIN", 0.0)
        monkeypatch.setattr(cleaner, "BATCH_BLOCKS", rng.choice((1, 5, 64)))

    return shrink


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


# One by one.


def chain(blocks: int = 64, snapshots: int = 3) -> tuple[MemoryDirectory, Store, list[Volume]]:
    """A disk that is full, and snapshots of it; one more block was written before each."""
    directory, store = make(memory=MapMemory(0))
    base = disk(store, blocks)
    put(base, 0, b"".join(content(n) for n in range(blocks)))
    volumes = [base]
    for number in range(snapshots):
        volumes.append(disk(store, blocks, base.ident))
        put(base, number * 5 * BLOCK, content(1000 + number))
    return directory, store, volumes


def test_what_was_written_is_what_changed():
    _, store, (base, first, second, third) = chain()
    assert run(Diff(store, first, second)).ranges == [(0, BLOCK, True)]
    assert run(Diff(store, first, third)).ranges == [(0, BLOCK, True), (5 * BLOCK, BLOCK, True)]
    assert run(Diff(store, third, first)).ranges == [(0, BLOCK, True), (5 * BLOCK, BLOCK, True)]
    assert run(Diff(store, first, first)).ranges == []
    zero(base, 3 * BLOCK, 2 * BLOCK)
    assert run(Diff(store, third, base)).ranges == [(3 * BLOCK, 2 * BLOCK, False), (10 * BLOCK, BLOCK, True)]
    assert run(Diff(store, base, third)).ranges == [(3 * BLOCK, 2 * BLOCK, True), (10 * BLOCK, BLOCK, True)]
    check_walks(store, base, first, second, third)


def test_ranges_that_touch_are_one_across_leaves_unless_they_differ_in_kind():
    _, store, (base, snapshot) = chain(64, 1)
    put(base, 6 * BLOCK, b"".join(content(500 + n) for n in range(20)))
    zero(base, 26 * BLOCK, 9 * BLOCK)
    assert run(Diff(store, snapshot, base)).ranges == [
        (0, BLOCK, True), (6 * BLOCK, 20 * BLOCK, True), (26 * BLOCK, 9 * BLOCK, False),
    ]  # fmt: skip
    check_walks(store, base, snapshot)


def test_the_same_bytes_written_again_are_a_change():
    """Different entries are: nobody compares contents."""
    _, store, (base, snapshot) = chain(8, 1)
    put(base, 5 * BLOCK, content(5))
    assert run(Diff(store, snapshot, base)).ranges == [(0, BLOCK, True), (5 * BLOCK, BLOCK, True)]


@pytest.mark.parametrize("old_sectors", [1, 7, 8, 9, 32, 33, 130])
@pytest.mark.parametrize("new_sectors", [1, 7, 8, 15, 32, 100, 1111])
@pytest.mark.parametrize("filled", [False, True])
def test_a_tail_that_only_one_has_is_a_change(old_sectors, new_sectors, filled):
    _, store = make()
    volumes = []
    for sectors in (old_sectors, new_sectors):
        ident = store.new_ident()
        store.commit([Create(ident, sectors * SECTOR, {})])
        volumes.append(store.volumes[ident])
        if filled:
            put(volumes[-1], 0, b"x" * volumes[-1].size_bytes)
    check_walks(store, *volumes)


@pytest.mark.parametrize("sectors", [1, 4, 8, 60, 63])
@pytest.mark.parametrize("more", [1, 4, 8, 100])
def test_a_disk_that_grew(sectors, more):
    """The block in which the old one ended is the same, but a part of it is new."""
    for filled in (False, True):
        _, store = make()
        ident = store.new_ident()
        store.commit([Create(ident, sectors * SECTOR, {})])
        old = store.volumes[ident]
        if filled:
            put(old, 0, b"y" * old.size_bytes)
        ident = store.new_ident()
        store.commit([Create(ident, sectors * SECTOR, {}, old.ident)])
        new = store.volumes[ident]
        store.commit([Resize(ident, (sectors + more) * SECTOR)])
        (only,) = run(Diff(store, old, new)).ranges[:1]
        assert only[0] == sectors * SECTOR
        check_walks(store, old, new)
        put(new, new.size_bytes - 100, b"end")
        check_walks(store, old, new)


def test_trees_of_different_heights_share_their_left_edge():
    _, store, (base, snapshot) = chain(4, 1)
    tall = disk(store, 4, snapshot.ident)
    taller = disk(store, 4, snapshot.ident)
    store.commit([Resize(tall.ident, 60 * BLOCK), Resize(taller.ident, 4000 * BLOCK)])
    assert (snapshot.map.height, tall.map.height, taller.map.height) == (0, 2, 5)
    assert run(Diff(store, snapshot, taller)).ranges == [(4 * BLOCK, 3996 * BLOCK, False)]
    check_walks(store, base, snapshot, tall, taller)
    put(taller, 3900 * BLOCK, content(1))
    put(tall, 2 * BLOCK, content(2))
    check_walks(store, base, snapshot, tall, taller)
    zero(taller, 0, 4 * BLOCK)
    check_walks(store, base, snapshot, tall, taller)


def test_volumes_of_different_families_differ_wherever_one_is_mapped():
    _, store = make()
    one, other = disk(store, 40), disk(store, 40)
    for volume in (one, other):
        put(volume, 0, content(1) * 3)
    put(one, 20 * BLOCK, content(2))
    assert run(Diff(store, one, other)).ranges == [(0, 3 * BLOCK, True), (20 * BLOCK, BLOCK, False)]
    check_walks(store, one, other)


def test_empty_ones():
    _, store = make()
    assert told(run(Survey(store))) == ({}, 0, 0)
    one, other = disk(store, 40), disk(store, 40)
    assert run(Diff(store, one, other)).ranges == []
    check_walks(store, one, other)


def test_in_pages():
    """However few ranges a page has, all together are the difference; the last page says so."""
    _, store, (base, snapshot) = chain(64, 1)
    for block in range(0, 64, 3):
        zero(base, block * BLOCK, BLOCK) if block % 2 else put(base, block * BLOCK, content(block + 200))
    store.commit([Resize(base.ident, 70 * BLOCK + SECTOR)])
    whole = run(Diff(store, snapshot, base)).ranges
    assert len(whole) > 20
    for most in (1, 2, 7, len(whole) - 1, len(whole), 1000):
        found, start, pages = [], 0, 0
        while start is not None:
            page = run(Diff(store, snapshot, base, start, most))
            assert 0 < len(page.ranges) <= most
            found += page.ranges
            start, pages = page.next_offset, pages + 1
        assert found == whole and pages == -(-len(whole) // most)


def test_from_somewhere_in_the_middle():
    _, store, (base, snapshot) = chain(64, 1)
    put(base, 10 * BLOCK, b"".join(content(300 + n) for n in range(20)))
    store.commit([Resize(base.ident, 70 * BLOCK + SECTOR)])
    whole = run(Diff(store, snapshot, base)).ranges
    for start in range(0, base.size_bytes, SECTOR):
        clipped = [(max(at, start), at + length - max(at, start), data) for at, length, data in whole if at + length > start]
        assert run(Diff(store, snapshot, base, start)).ranges == clipped


def test_deleting_frees_what_the_survey_says():
    _, store, volumes = chain(64, 3)
    while volumes:
        before = run(Survey(store))
        victim = volumes.pop(len(volumes) // 2)
        freed = next(space.exclusive_blocks for space in before.volumes if space.ident == victim.ident)
        store.commit([Delete(victim.ident)])
        assert run(Survey(store)).distinct_blocks == before.distinct_blocks - freed
    assert before.distinct_blocks == freed


def test_a_leaf_that_nobody_changed_is_not_read():
    directory, store, (base, *snapshots) = chain(64, 3)
    store.checkpoint()
    squeeze(store)
    before = store.table.paged_in
    run(Diff(store, snapshots[0], snapshots[1]))
    assert store.table.paged_in - before <= 2 * (store.table.bits + 1) + 2, "two paths of a tree"
    squeeze(store)
    before = store.table.paged_in
    run(Survey(store))
    # Four volumes and three places that were written to: blocks 0, 5 and 10, three leaves. The other 13 leaves are shared by all.
    leaves = {ident for ident in store.table.resident if store.table.number[ident] != 0xFFFFFFFF}
    assert {store.table.number[ident] for ident in leaves} <= {0, 1, 2}
    check_walks(store, base, *snapshots)


def test_a_walk_sees_one_moment(small_slices):
    small_slices(random.Random(5))
    _, store, (base, first, second, _) = chain(64, 3)
    wanted, shares = difference(store, first, second), census(store)
    jobs = [Diff(store, first, second), Survey(store)]
    works = [job.work() for job in jobs]
    for work in works:
        assert next(work) is None
    put(first, 0, b"".join(content(2000 + n) for n in range(64)))
    zero(second, 0, second.size_bytes)
    store.commit([Reset(base.ident, first.ident), Delete(first.ident), Delete(second.ident)])
    store.reap()
    store.checkpoint()
    for job, work in zip(jobs, works):
        for step in work:
            if step is not None:
                step()
    assert jobs[0].ranges == wanted and told(jobs[1]) == shares
    store.reap()
    store._check()


def test_a_walk_that_is_closed_holds_nothing(small_slices):
    small_slices(random.Random(1))
    _, store, (base, first, second, _) = chain(64, 3)
    for job in (Diff(store, first, second), Survey(store)):
        work = job.work()
        next(work)
        with pytest.raises(AssertionError, match="refs"):
            store._check()
        work.close()
        assert not job.done
        store._check()
    job.work().close()
    store._check()


def test_blocks_that_move_between_two_leaves_are_the_same(small_slices, monkeypatch):
    """Every block of the store moves at every step, and nothing else changes."""
    small_slices(random.Random(2))
    monkeypatch.setattr(walk, "_SLICE_COST", 1)
    directory, store, (base, first, second, third) = chain(64, 3)
    while len(store.pool.spares) < 60:
        store.pool.make_one()
    for job, wanted in (
        (Diff(store, first, third), difference(store, first, third)),
        (Survey(store), census(store)),
    ):
        before = store.cleaner.blocks_moved
        for step in job.work():
            if step is not None:
                step()
            if store.cleaner.into is not None:  # what has moved moves again
                store.pool.seal(store.cleaner.into)
                store.cleaner.into = None
            for segment in [s for s in store.pool.by_slot if s is not None and s.state is State.SEALED]:
                for other in store.cleaner.clean(segment):
                    if other is not None:
                        other()
            if len(store.pool.spares) < 20:
                store.checkpoint()
        assert store.cleaner.blocks_moved - before > 100
        assert (told(job) if isinstance(job, Survey) else job.ranges) == wanted
    check_walks(store, base, first, second, third)


def test_a_map_node_that_cannot_be_read():
    directory, store, (base, first, second, _) = chain(64, 3)
    store.checkpoint()
    squeeze(store)
    for name in [name for name in directory.names() if name.startswith("map-")]:
        for offset in range(0, store.maps.size_bytes[int(name[4:])], 64):
            directory.flip(name, offset)
    for job in (Diff(store, first, second), Survey(store)):
        work = job.work()
        with pytest.raises(StoreDamaged, match="checksum"):
            for step in work:
                if step is not None:
                    step()
        work.close()
        assert not job.done and store.maps.readers == 0


def test_slices_are_short():
    """By what they do, not by the clock: pauses come often enough that no slice looks at many nodes."""
    _, store = make(geometry=Geometry(1024, 64, 3))
    base = disk(store, 2000)
    put(base, 0, b"".join(content(n) for n in range(500)) * 4)
    snapshot = disk(store, 2000, base.ident)
    for block in range(0, 2000, 8):
        put(base, block * BLOCK, content(block))
    for job in (Diff(store, snapshot, base), Survey(store)):
        got, most = 0, 0
        get = store.table.get

        def counted(ident, get=get):
            nonlocal got
            got += 1
            return get(ident)

        store.table.get = counted
        for _ in job.work():
            most, got = max(most, got), 0
        store.table.get = get
        assert 2 <= most <= 64
    check_walks(store, base, snapshot)


# How long it takes. Not a test: ``python -m pytest`` does not collect it; run this file as a script.


def sparse_pair(blocks: int, mapped_every: int, changed: int) -> tuple[Store, Volume, Volume]:
    """Two snapshots of a disk of so many blocks, with one block mapped in every so many, and so many changed between them.

    Records are made, not data: entries point to blocks that were never written, which no walk looks at.
    """
    store = Store.create(MemoryDirectory(), bytes(range(16)), Geometry(record_blocks=16, segment_blocks=8192), memory=MapMemory(1 << 34))
    volume = disk(store, blocks)
    rng = random.Random(1)
    store.usage.reserve(1 << 12)

    def touch(numbers: list[int]) -> None:
        for physical, block in enumerate(numbers, 8192):
            volume.apply([block << START_SHIFT | 1], array("I", [rng.randrange(1 << 32)]), physical)

    touch(list(range(0, blocks, mapped_every)))
    first = disk(store, blocks, volume.ident)
    touch(rng.sample(range(blocks), changed))
    second = disk(store, blocks, volume.ident)
    return store, first, second


def measure(job: Walk) -> str:
    began = time.perf_counter()
    longest, slices, last = 0.0, 0, time.thread_time()
    for step in job.work():
        longest, slices = max(longest, time.thread_time() - last), slices + 1
        if step is not None:
            step()
        last = time.thread_time()
    longest = max(longest, time.thread_time() - last)
    return f"{(time.perf_counter() - began) * 1000:.1f} ms, {slices} slices, the longest {longest * 1000:.2f} ms of CPU"


def bench() -> None:
    blocks = (4 << 40) // BLOCK
    for every in (1 << 12, 1 << 17):
        store, first, second = sparse_pair(blocks, every, 1000)
        gc.collect()
        gc.freeze()
        print(f"4 TiB, one block mapped in every {every * BLOCK >> 20} MiB, 1000 changed:")
        for memory in ("dirty", "clean", "cold"):
            if memory == "clean":
                store.checkpoint()
            for _ in range(3):
                if memory == "cold":
                    squeeze(store)
                print(f"  diff of two snapshots, maps {memory}:", measure(job := Diff(store, first, second)))
                assert sum(length for _, length, _ in job.ranges) == 1000 * BLOCK
            if memory == "cold":
                squeeze(store)
            print(f"  survey of 3 volumes, maps {memory}:", measure(Survey(store)))
    for _ in range(1000):
        volume = disk(store, blocks, max(store.volumes))
        with store.table.waiting():
            volume.apply([random.randrange(blocks) << START_SHIFT | 1], array("I", [1]), 8192)
    print("  survey of 1003 volumes:", measure(Survey(store)))


if __name__ == "__main__":
    bench()

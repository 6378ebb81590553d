"""Differences and surveys one by one, held against counting everything by hand."""

from __future__ import annotations

import random

import pytest
from store_kit import content, disk, make, put, squeeze, zero
from walk_kit import SECTOR, census, chain, check_walks, difference, run, told

from simsr.errors import StoreDamaged
from simsr.store import walk
from simsr.store.layout import BLOCK, Geometry
from simsr.store.segments import State
from simsr.store.store import Create, Delete, Reset, Resize
from simsr.store.walk import Diff, Survey


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

"""Differences and surveys counted by hand, from the leaves alone, to hold walks against; and walks that are carried out in one go."""

from __future__ import annotations

from collections import Counter

from store_kit import content, disk, make, put, squeeze

from simsr.store.layout import BLOCK
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import MapMemory
from simsr.store.store import Store
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

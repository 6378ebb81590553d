"""How long walks take. Not a test, and pytest does not collect it: run this file as a script."""

from __future__ import annotations

import gc
import random
import time
from array import array

from store_kit import disk, squeeze

from simsr.daemon.main import GC_THRESHOLDS
from simsr.store.layout import BLOCK, START_SHIFT, Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import MapMemory
from simsr.store.store import Store
from simsr.store.volume import Volume
from simsr.store.walk import Diff, Survey, Walk


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
        gc.set_threshold(*GC_THRESHOLDS)
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

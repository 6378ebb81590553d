"""Hot segments: what is read much is mapped and kept in memory (mlock(2)), so that reading it costs no system call.

A reader otherwise asks the kernel for every run of blocks, because only the kernel knows what is in memory. What is kept there cannot go, so it
can be used as it lies; and once the checksum of a block has been verified there, it holds until the segment is filled anew (`Segment.verified`):
as in file systems, damage is looked for where it comes about, between the disk and memory.

A segment becomes hot when a quarter as much of it was read as it holds. When memory is short, one that is read more drives out the one that is
read least; those that nobody reads go by themselves (`HotSegments.cool`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from simsr.store.segments import Segment, SegmentPool

__all__ = ["HOT_MEMORY_BYTES", "HotMemory", "HotSegments", "memory_bytes"]


def memory_bytes(proc: str = "/proc", sys: str = "/sys") -> int:
    """What this process may take: all of the machine's memory, or what its control groups allow (cgroups(7), both versions)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):
        for line in Path(proc, "self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                top, name = Path(sys, "fs/cgroup"), "memory.max"
            elif "memory" in controllers.split(","):
                top, name = Path(sys, "fs/cgroup/memory"), "memory.limit_in_bytes"
            else:
                continue
            groups = [top, *(top / part for part in accumulate(Path(group).relative_to("/").parts, os.path.join))]
            texts = [(one / name).read_text().strip() for one in groups if (one / name).exists()]
            limits += [int(text) for text in texts if text != "max"]
    return min(limits)


HOT_MEMORY_BYTES = memory_bytes() // 8


class HotMemory:
    """The memory that the hot segments of all stores of a process share."""

    def __init__(self, limit_bytes: int = HOT_MEMORY_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0


class HotSegments:
    """Decides which segments of one store are kept in memory. To keep one takes time: `next`, `Segment.file.in_memory` in a worker thread,
    `keep`. What is let go of is returned as a list of views, whose release takes a moment, too."""

    def __init__(self, pool: SegmentPool, memory: HotMemory, wake: Callable[[], None]) -> None:
        """``wake`` is called when there is something to do."""
        self._pool, self._memory, self._wake = pool, memory, wake
        self._blocks, self._bytes = pool.geometry.segment_blocks, pool.geometry.segment_bytes
        self._wanted: dict[Segment, None] = {}
        self.kept: dict[Segment, None] = {}
        pool.on_gone = self._forget
        if memory.limit_bytes >= self._bytes:
            pool.on_warm, pool.warm_at = self._warm, self._blocks // 4

    def _warm(self, segment: Segment) -> None:
        segment.reads = 0
        self._wanted[segment] = None
        self._wake()

    def next(self) -> tuple[Segment | None, list[memoryview]]:
        """The segment to keep next, if there is one and there is memory for it; and what had to go for it. O(kept)."""
        released: list[memoryview] = []
        while self._wanted:
            segment = next(iter(self._wanted))
            del self._wanted[segment]
            if segment.memory is not None or self._pool.by_slot[segment.slot] is not segment:
                continue
            while self._memory.used_bytes + self._bytes > self._memory.limit_bytes:
                coldest = min(self.kept, key=lambda kept: kept.reads, default=None)
                if coldest is None or 8 * coldest.reads > self._blocks:
                    for kept in self.kept:
                        kept.reads >>= 1
                    return None, released
                released.append(self._let_go(coldest))
            self._memory.used_bytes += self._bytes
            return segment, released
        return None, released

    def keep(self, segment: Segment, memory: memoryview | None) -> None:
        """What `File.in_memory` has given for the segment of `next`. None: nothing, and no more are asked for than are kept now."""
        if memory is None:
            self._memory.used_bytes -= self._bytes
            self._memory.limit_bytes = self._memory.used_bytes
        elif self._pool.by_slot[segment.slot] is not segment:  # its file was removed meanwhile
            self._memory.used_bytes -= self._bytes
            memory.release()
        else:
            segment.memory, segment.verified, segment.reads = memory, bytearray(self._blocks), self._blocks // 4
            self.kept[segment] = None

    def cool(self) -> list[memoryview]:
        """Let go of what was not read since the last call; called every half a minute or so. O(kept)."""
        gone = [segment for segment in self.kept if not segment.reads]
        for segment in self.kept:
            segment.reads = 0
        return [self._let_go(segment) for segment in gone]

    def let_go(self) -> list[memoryview]:
        """Let go of all."""
        return [self._let_go(segment) for segment in list(self.kept)]

    def _let_go(self, segment: Segment) -> memoryview:
        memory, segment.memory, segment.reads = segment.memory, None, 0
        self._forget(segment)
        return memory

    def _forget(self, segment: Segment) -> None:
        del self.kept[segment]
        self._memory.used_bytes -= self._bytes

    def statistics(self) -> dict[str, int]:
        return {"hot_segments": len(self.kept), "hot_bytes": len(self.kept) * self._bytes}

"""Segments: files of one size that the log fills one after the other, again and again.

A segment file starts with its record area (header, then records) and goes on with blocks of data. Its life:

    absent -> spare -> active -> sealed -> dead (no slot of any map names it) -> spare -> active ...

Files are written through once when they are made and then used again and again: never truncated, and unlinked only when the store has
long been quiet and has many more than it needs. First touch of fresh memory and of unwritten extents is what makes a growing log
slow (research/performance.md 5), so a dead segment is preferred to a new file, and the most recently used of them first, because its
pages are in memory.

A dead segment may be used again only after a checkpoint that was begun after it died is durable (until then replay may
need its records, and a power cut may bring its blocks back to life) and when no reader holds a pin on it.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from enum import Enum
from itertools import pairwise

import numpy as np

from simsr.errors import NoSpace, StoreDamaged
from simsr.store.files import Area, Directory, File
from simsr.store.layout import BLOCK, HEADER_BYTES, Geometry, SegmentHeader, block_crcs, salt_of
from simsr.store.nodes import PHYSICAL_MASK
from simsr.store.usage import Usage

__all__ = ["State", "Segment", "SegmentPool", "segment_name"]

_ONE = b"\1"
_NAME = re.compile(r"seg-(\d{8})")


def segment_name(slot: int) -> str:
    return f"seg-{slot:08d}"


class State(Enum):
    SPARE = "spare"
    ACTIVE = "active"
    SEALED = "sealed"
    DEAD = "dead"


class Segment:
    """One segment file and, while it is in use, its place in the log."""

    __slots__ = (
        "slot", "file", "state", "area", "log_index", "salt", "first_seq", "last_seq", "used_blocks", "record_end", "pins", "reserve",
        "age_seq", "survivors", "reads", "memory", "verified",
    )  # fmt: skip

    def __init__(self, slot: int, file: File) -> None:
        self.slot = slot
        self.file = file
        self.state = State.SPARE
        self.area: Area | None = None
        self.log_index = self.salt = self.first_seq = self.last_seq = 0
        self.used_blocks = self.record_end = 0
        self.age_seq = 0  # about when what is in it was written
        self.survivors = False
        self.reserve = False  # taken into use when it was the last one
        self.pins = 0  # reads under way in worker threads
        self.reads = 0  # blocks that were read, of late (`simsr.store.hot`)
        self.memory: memoryview | None = None  # all of the file, while it is kept in memory
        self.verified = b""  # then for each block whether it was found there as it should be

    def __repr__(self) -> str:
        return f"<segment {self.slot} {self.state.value} log index {self.log_index} seq {self.first_seq}-{self.last_seq}>"


class SegmentPool:
    """All segments of a store. ``by_slot[0]`` stays None: physical block 0 means a hole."""

    def __init__(self, directory: Directory, geometry: Geometry, uuid: bytes, usage: Usage) -> None:
        self._directory = directory
        self.geometry = geometry
        self._shift, self._mask = geometry.segment_shift, geometry.segment_blocks - 1
        self._uuid = uuid
        self._usage = usage
        self.by_slot: list[Segment | None] = [None]
        self.spares: list[Segment] = []
        self._condemned: list[Segment] = []  # dead and past their checkpoint, but pinned
        self._making: set[int] = set()
        self._unmade: list[str] = []
        self.cap_segments: int | None = None  # the size limit of the SR
        self.verify_reads = True  # hold what is read from memory against its checksum; what comes from the disk always is
        self.cannot_grow = False  # the last attempt to make a segment file found no room
        self.warm_at = sys.maxsize  # a segment of which more blocks were read, and that is not kept in memory, is told to `on_warm`
        self.on_warm: Callable[[Segment], None] = lambda segment: None
        self.on_gone: Callable[[Segment], None] = lambda segment: None  # told of one that is kept in memory and will be removed

    @property
    def count(self) -> int:
        """How many segments there are, or will be."""
        return len(self.by_slot) - 1 - self.by_slot[1:].count(None) + len(self._making)

    def adopt(self, tolerated: list[str] | None = None) -> list[tuple[Segment, bytes]]:
        """Open the segment files that are there; returns each with its header bytes. Used once, by recovery.

        Raises `StoreDamaged` if one in use has a wrong size (or adds it to ``tolerated``, and takes it as it is); one whose making was
        cut short waits for `remove_unmade`.
        """
        found = []
        for name in self._directory.names():
            match = _NAME.fullmatch(name)
            slot = int(match[1]) if match else 0
            if not slot or slot > self._slot_max:
                continue
            file = self._directory.open(name)
            header = bytearray(HEADER_BYTES)
            file.pread(memoryview(header)[: min(HEADER_BYTES, file.size_bytes)], 0)
            if file.size_bytes != self.geometry.segment_bytes:
                reason = f"{name} has {file.size_bytes} bytes, not {self.geometry.segment_bytes}"
                if not any(header) or tolerated is None:
                    file.close()
                if any(header) and tolerated is None:
                    raise StoreDamaged(path=self._directory.path, reason=reason)
                if not any(header):
                    self._unmade.append(name)
                    continue
                tolerated.append(reason)
            while len(self.by_slot) <= slot:
                self.by_slot.append(None)
            self._usage.reserve(slot)
            segment = self.by_slot[slot] = Segment(slot, file)
            found.append((segment, bytes(header)))
        return found

    def remove_unmade(self) -> None:
        """Remove the files whose making was cut short, once it is known that nothing is in them."""
        for name in self._unmade:
            self._directory.remove(name)
        self._unmade = []

    # Reading what is in memory.

    def read(self, view: memoryview, physical: int, count: int) -> bool | None:
        """Fill ``view`` with ``count`` blocks of one segment: whether they are known to be what was written. None: they are not in memory."""
        segment, block = self.by_slot[physical >> self._shift], physical & self._mask
        segment.reads += count
        memory = segment.memory
        if memory is not None:
            view[:] = memory[block * BLOCK : (block + count) * BLOCK]
            return segment.verified.find(0, block, block + count) < 0
        if not segment.file.read_cached(view, block * BLOCK):
            return None
        if segment.reads > self.warm_at:
            self.on_warm(segment)
        return False

    def lend(self, physical: list[int], crcs: list[int]) -> list[memoryview] | None:
        """These blocks as they lie in memory, verified, to be looked at before anything is written. None unless all are kept there and have
        the checksums ``crcs``."""
        by_slot, shift, mask, verify = self.by_slot, self._shift, self._mask, self.verify_reads
        breaks = [at for at, (before, after) in enumerate(pairwise(physical), 1) if after - before != 1]
        parts, begin, segment = [], 0, None
        for end in (*breaks, len(physical)):
            first, count = physical[begin], end - begin
            segment = by_slot[first >> shift]
            if segment is None or (memory := segment.memory) is None:
                return None
            block = first & mask
            part = memory[block * BLOCK : (block + count) * BLOCK]
            verified = segment.verified
            if verify and not (verified[block] if count == 1 else verified.find(0, block, block + count) < 0):
                if list(block_crcs(part)) != crcs[begin:end]:
                    return None
                verified[block : block + count] = _ONE * count
            parts.append(part)
            begin = end
        segment.reads += len(physical)  # which of them is as good as any
        return parts

    def verified(self, physical: int, count: int) -> None:
        """These blocks of one segment, just read, were found to be what was written."""
        segment, block = self.by_slot[physical >> self._shift], physical & self._mask
        if segment.memory is not None:
            segment.verified[block : block + count] = _ONE * count

    # Spares: made in a worker thread (`make_file`), handed over on the store's thread (`add`).

    @property
    def _slot_max(self) -> int:
        """The last segment whose blocks a map entry can name."""
        return (PHYSICAL_MASK >> self.geometry.segment_shift) - 1

    @property
    def path(self) -> str:
        return self._directory.path

    @property
    def data_blocks(self) -> int:
        """Blocks of data that fit into a segment."""
        return self.geometry.segment_blocks - self.geometry.record_blocks

    def next_slot(self) -> int:
        """Reserve the number of a segment that is about to be made."""
        free = (slot for slot, s in enumerate(self.by_slot) if slot and s is None and slot not in self._making)
        slot = next(free, len(self.by_slot))
        if slot == len(self.by_slot):
            self.by_slot.append(None)
        if slot > self._slot_max:
            raise NoSpace(name=self._directory.path, reason="the store has as many segments as it can number")
        if self.cap_segments is not None and self.count >= self.cap_segments:
            raise NoSpace(name=self._directory.path, reason=f"the SR is full: all its {self.cap_segments} segments are in use")
        self._making.add(slot)
        return slot

    def make_file(self, slot: int) -> File:
        """Create and write through the file of segment ``slot``. Blocks; touches nothing but the file."""
        try:
            file = self._directory.create(segment_name(slot), self.geometry.segment_bytes)
            self._directory.sync()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(name=self._directory.path, reason=f"cannot make a segment file: {error.strerror}") from error
            raise
        return file

    def add(self, slot: int, file: File | None) -> None:
        """Take over what `make_file` made (None: it failed, the number is free again)."""
        self._making.remove(slot)
        if file is not None:
            self._usage.reserve(slot)
            segment = self.by_slot[slot] = Segment(slot, file)
            self.spares.insert(0, segment)

    def wanted(self, cap: int) -> int:
        """How many spares should be made now, if the store is to have at most ``cap`` segments."""
        in_use = self.count - len(self.spares) - len(self._making)
        target = min(10, 6 + in_use // 8)
        return max(0, min(target - len(self.spares) - len(self._making), cap - self.count))

    def take_spare_away(self) -> Segment:
        """Forget the spare that was used longest ago; its file is to be removed (`unlink`)."""
        segment = self.spares.pop(0)
        if segment.memory is not None:
            self.on_gone(segment)
        self.by_slot[segment.slot] = None
        self._making.add(segment.slot)  # until the file is gone, its name is taken
        return segment

    def unlink(self, segment: Segment) -> None:
        """Remove the file of a segment that `take_spare_away` gave. Blocks."""
        if segment.memory is not None:
            segment.memory.release()  # or the file would keep its space
        segment.file.close()
        self._directory.remove(segment_name(segment.slot))
        self._making.discard(segment.slot)

    def remove_spare(self) -> bool:
        """Give the file of one spare back to the host, if there is one to spare; whether there was. Blocks, briefly."""
        if len(self.spares) <= 1:
            return False
        self.unlink(self.take_spare_away())
        return True

    # The log.

    def make_one(self) -> None:
        """Make a spare here and now. Blocks."""
        slot = self.next_slot()
        file = None
        try:
            file = self.make_file(slot)
        finally:
            self.add(slot, file)

    def activate(
        self, log_index: int, first_seq: int, durable_seq: int, prev_crc: int, keep: int, survivors: bool = False
    ) -> Segment:
        """Turn a spare into the active segment of the log, or of the cleaner; ``keep`` more must be left. Makes them on the spot if
        they are missing. Raises `NoSpace`, OSError."""
        while len(self.spares) <= keep:
            self.make_one()
        segment = self.spares.pop()
        header = SegmentHeader(self._uuid, log_index, first_seq, durable_seq, prev_crc, survivors).pack()
        segment.state = State.ACTIVE
        segment.log_index, segment.salt = log_index, salt_of(self._uuid, log_index)
        segment.first_seq, segment.last_seq = first_seq, first_seq - 1
        segment.age_seq, segment.survivors = first_seq, survivors
        if segment.memory is not None:
            segment.verified = bytearray(len(segment.verified))
        segment.used_blocks = self.geometry.record_blocks
        segment.area = segment.file.area(0, self.geometry.record_area_bytes)
        segment.area.write(0, header)
        segment.record_end = len(header)
        return segment

    def seal(self, segment: Segment) -> None:
        segment.state = State.SEALED
        segment.area.close()
        segment.area = None

    def dead(self) -> list[Segment]:
        """The sealed segments that no map names. O(segments)."""
        live = np.array(self._usage.live, dtype=np.int64)[: len(self.by_slot)]
        found = (self.by_slot[slot] for slot in np.flatnonzero(live == 0).tolist())
        return [segment for segment in found if segment is not None and segment.state is State.SEALED]

    def recycle(self, dead: list[Segment]) -> None:
        """Make spares of ``dead``, which a durable checkpoint has left behind; those with readers follow later."""
        waiting = self._condemned + dead
        self._condemned = [segment for segment in waiting if segment.pins]
        for segment in waiting:
            segment.state = State.DEAD if segment.pins else State.SPARE
            if not segment.pins:
                self.spares.append(segment)

    def statistics(self) -> dict[str, int]:
        segments = [segment for segment in self.by_slot if segment is not None]
        return {
            "segments": len(segments),
            "segments_spare": len(self.spares),
            "segments_sealed": sum(segment.state is State.SEALED for segment in segments),
            "segment_bytes": self.geometry.segment_bytes,
        }

    def close(self) -> None:
        for segment in self.by_slot:
            if segment is not None:
                if segment.area is not None:
                    segment.area.close()
                    segment.area = None
                segment.file.close()

    def _check(self) -> None:
        live = self._usage.live
        assert len({s.slot for s in self.spares}) == len(self.spares), "a spare is listed twice"
        for segment in self.by_slot:
            if segment is not None:
                spare = segment in self.spares
                assert spare == (segment.state is State.SPARE), f"{segment} and the list of spares disagree"
                assert not (spare and live[segment.slot]), f"{segment} is a spare with {live[segment.slot]} live blocks"

    def damaged_if_missing(self) -> None:
        """Raise `StoreDamaged` if a map names a segment whose file is gone."""
        for slot, live in enumerate(self._usage.live):
            if live and (slot >= len(self.by_slot) or self.by_slot[slot] is None):
                raise StoreDamaged(
                    path=self._directory.path, reason=f"{segment_name(slot)} is missing, {live} blocks in use are in it"
                )

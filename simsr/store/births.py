"""Which write made each block of a volume: births, and what they are good for.

A map entry says where a block is. That is enough to tell two blocks from each other while both exist, but places are used again. A *birth*
is not: it is the log index of the segment that the block was first written to, which is never given twice, and the place there. The
cleaner moves blocks without writing them anew, so it notes the birth of each in its SUMMARY, and blocks that it moved before there were births
are taken to be born where it put them. Two entries have the same birth if and only if they name the same block of the log, now or at
different times.

So the births of a volume are a fingerprint of its content that stays true when its data has gone. They are kept as a digest for each unit of
64 KiB: 16 bytes of BLAKE2b over the births of its 16 blocks, zeros for a unit of holes. That two different units have the same digest is
as improbable as a broken disk that passes every checksum here by chance (2^-128).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from simsr.errors import BlockDamaged
from simsr.store.checkpoint import Step
from simsr.store.contents import blocks_in
from simsr.store.layout import BLOCK
from simsr.store.nodes import PHYSICAL_MASK
from simsr.store.segments import Segment, SegmentPool, State
from simsr.store.units import UNIT_BLOCKS, UNIT_BYTES, bitmap_bytes, mark
from simsr.store.volume import Volume
from simsr.store.walk import Walk

if TYPE_CHECKING:
    from simsr.store.store import Store

__all__ = ["Births", "Fingerprint", "FingerprintDiff", "DIGEST_BYTES", "WINDOW_UNITS", "table_bytes"]

DIGEST_BYTES = 16
WINDOW_UNITS = BLOCK // DIGEST_BYTES
"""Units whose digests fill a block: they are made, and compared, together."""

_SEGMENTS_KNOWN = 128  # 128 KiB each
_SEGMENTS_AT_ONCE = 16
_AHEAD = 64  # nodes that are read together
_LEAF_COST, _DIGEST_COST = 100, 1


def table_bytes(size_bytes: int) -> int:
    """The length of the table of digests of a volume of ``size_bytes``: never more than that."""
    return -(-size_bytes // UNIT_BYTES) * DIGEST_BYTES


class Births:
    """The births of blocks in the segments of one store. What the cleaner moved is read from the segment's records, and remembered."""

    def __init__(self, pool: SegmentPool) -> None:
        self._pool = pool
        self._shift, self._mask = pool.geometry.segment_shift, pool.geometry.segment_blocks - 1
        self._known: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()  # log index of a segment -> (blocks then in use, births)

    def resolve(self, entries: np.ndarray) -> tuple[np.ndarray, list[Segment]]:
        """(births of ``entries``, two numbers each, 0 for those not known yet; segments to be loaded for these). O(entries)."""
        physical = (entries & np.uint64(PHYSICAL_MASK)).astype(np.int64)
        places = (physical & self._mask).astype(np.uint64)
        slots, which = np.unique(physical >> self._shift, return_inverse=True)
        segments = [self._pool.by_slot[slot] for slot in slots.tolist()]
        lives = np.array([0 if one is None or one.survivors else one.log_index for one in segments], dtype=np.uint64)[which]
        births = np.stack((lives, np.where(lives != 0, places, np.uint64(0))), axis=1)
        missing = []
        for index, segment in enumerate(segments):
            if segment is not None and segment.survivors:
                here = np.flatnonzero(which == index)
                found = self._of_survivors(segment, places[here])
                births[here] = found
                if not found[:, 0].all():
                    missing.append(segment)
        return births, missing

    def _of_survivors(self, segment: Segment, places: np.ndarray) -> np.ndarray:
        known = self._known.get(segment.log_index)
        if known is None:
            return np.zeros((len(places), 2), dtype=np.uint64)
        self._known.move_to_end(segment.log_index)
        used, births = known
        found = births[places.astype(np.int64)]
        # A block that no record names has lost its record (`simsr check` tells of it): it counts as born here, at worst as changed.
        lost = (found[:, 0] == 0) & (places < used)
        found[lost, 0], found[lost, 1] = segment.log_index, places[lost]
        return found

    def load(self, segments: list[Segment]) -> Iterator[Step]:
        """Have the births of blocks in ``segments``, or some of them, known; yields a step that reads."""
        segments = segments[:_SEGMENTS_AT_ONCE]
        for segment in segments:
            segment.pins += 1
        whole = self._pool.geometry.segment_blocks
        used = [segment.used_blocks if segment.state is State.ACTIVE else whole for segment in segments]
        loaded: list[np.ndarray] = []

        def read() -> None:
            for segment in segments:
                area = memoryview(bytearray(self._pool.geometry.record_area_bytes))
                segment.file.pread(area, 0)
                blocks, births = blocks_in(area, segment), np.zeros((whole, 2), dtype=np.uint64)
                births[blocks.places] = blocks.births
                loaded.append(births)

        try:
            yield read
        finally:
            for segment in segments:
                segment.pins -= 1
        for segment, count, births in zip(segments, used, loaded):
            self._known[segment.log_index] = (count, births)
            self._known.move_to_end(segment.log_index)
        while len(self._known) > _SEGMENTS_KNOWN:
            self._known.popitem(last=False)


class _Content:
    """A volume as it was when a walk began: whose map the walk holds."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.root, self.height, self.size_bytes = volume.map.root, volume.map.height, volume.size_bytes


class _Windows(Walk):
    """Walks over digests, window by window."""

    def __init__(self, store: Store, births: Births) -> None:
        super().__init__(store)
        self._births = births

    def _leaf(self, content: _Content, number: int) -> Generator[Step, None, tuple[int, int]]:
        """(the leaf ``number`` of a map or 0, the number of the first leaf behind it that there may be). O(height)."""
        ident, bits = content.root, self._bits
        if number >> (bits * content.height):
            return 0, 1 << 62
        ahead: list[int] = []
        for level in range(content.height, -1, -1):
            if not ident:
                step = bits * level
                return 0, (number >> step) + 1 << step
            yield from self._page_in([ident], ahead)
            if level:
                kids, index = self._table.get(ident).kids, (number >> (bits * (level - 1))) & (self._fanout - 1)
                ident, ahead = kids[index], kids[index + 1 : index + _AHEAD]
        return ident, number + 1

    def _digests(self, content: _Content, window: int) -> Generator[Step, None, tuple[bytes, int]]:
        """(digests of a window of a volume that has its data, the next window that may not be empty)"""
        first, count = window * WINDOW_UNITS * UNIT_BLOCKS, WINDOW_UNITS * UNIT_BLOCKS
        births = np.zeros((count, 2), dtype=np.uint64)
        number = first >> self._bits
        while number << self._bits < first + count:
            ident, behind = yield from self._leaf(content, number)
            if ident:
                base = (number << self._bits) - first
                low, high = max(0, -base), min(self._fanout, count - base)
                births[base + low : base + high] = yield from self._births_of(ident, low, high)
                yield from self._spend(_LEAF_COST)
            number = behind
        used = births[:, 0].reshape(WINDOW_UNITS, UNIT_BLOCKS).any(axis=1)
        if not used.any():
            return bytes(BLOCK), max(window + 1, (number << self._bits) // count)
        yield None  # digests take about as long as a slice may
        self._spent = 0
        data, size, parts = births.tobytes(), 16 * UNIT_BLOCKS, []
        for unit, is_used in enumerate(used.tolist()):
            digest = blake2b(data[unit * size : (unit + 1) * size], digest_size=DIGEST_BYTES).digest() if is_used else bytes(DIGEST_BYTES)
            parts.append(digest)
        yield from self._spend(_DIGEST_COST * WINDOW_UNITS)
        return b"".join(parts), max(window + 1, (number << self._bits) // count)

    def _births_of(self, ident: int, low: int, high: int) -> Generator[Step, None, np.ndarray]:
        """The births of some entries of a held leaf. The cleaner may move blocks between two looks: births stay."""
        births = np.zeros((high - low, 2), dtype=np.uint64)
        while True:
            yield from self._page_in([ident])
            entries = self._table.get(ident).vector[low:high]
            open_ = np.flatnonzero((births[:, 0] == 0) & (entries != 0))
            if not len(open_):
                return births
            births[open_], missing = self._births.resolve(entries[open_])
            if not missing:
                return births
            yield from self._births.load(missing)
            self._spent = 0

    def _from_table(self, content: _Content, window: int) -> Generator[Step, None, tuple[bytes, int]]:
        """As `_digests`, of a volume whose content is its table of digests."""
        ident, behind = yield from self._leaf(content, window >> self._bits)
        if not ident:
            return bytes(BLOCK), behind << self._bits
        entry = self._table.get(ident).slots[window & (self._fanout - 1)]
        if not entry:
            return bytes(BLOCK), window + 1
        physical, data = entry & PHYSICAL_MASK, bytearray(BLOCK)
        pool = self._store.pool
        segment, place = pool.by_slot[physical >> pool.geometry.segment_shift], physical & (pool.geometry.segment_blocks - 1)
        segment.pins += 1
        try:
            yield lambda: segment.file.pread(memoryview(data), place * BLOCK)
        finally:
            segment.pins -= 1
        self._spent = 0
        if crc32c(data) != entry >> 32:
            raise BlockDamaged(
                path=pool.path, volume=content.volume.ident, offset_bytes=window * BLOCK, segment=segment.slot, segment_offset=place * BLOCK
            )
        return bytes(data), window + 1


class Fingerprint(_Windows):
    """The table of digests of a volume that does not change, a part at a time: from ``window`` on, at most ``windows_max`` that hold anything.

    ``parts`` then is [(offset in the table, digests)], ``next_window`` where to go on, or None. O(leaves).
    """

    def __init__(self, store: Store, births: Births, volume: Volume, window: int = 0, windows_max: int = 64) -> None:
        super().__init__(store, births)
        self._volume, self._window, self._windows_max = volume, window, windows_max
        self.parts: list[tuple[int, bytes]] = []
        self.next_window: int | None = None

    def _choose(self) -> list[Volume]:
        return [self._volume]

    def _walk(self, volumes: list[Volume]) -> Iterator[Step]:
        content, window = _Content(self._volume), self._window
        length = table_bytes(content.size_bytes)
        while window * BLOCK < length:
            if len(self.parts) == self._windows_max:
                self.next_window = window
                return
            digests, behind = yield from self._digests(content, window)
            if any(digests):
                self.parts.append((window * BLOCK, digests[: length - window * BLOCK]))
            window = behind
            yield from self._spend(10)


class FingerprintDiff(_Windows):
    """What changed from ``old`` to ``new``, which is not smaller, if one of them, or both, has only its table of digests left: ``bitmap``.

    Exact, as `UnitDiff` is. O(leaves of both); memory: the bitmap.
    """

    def __init__(self, store: Store, births: Births, old: Volume, new: Volume, destroyed: tuple[bool, bool]) -> None:
        super().__init__(store, births)
        self._volumes, self._destroyed = [old, new], destroyed
        self.bitmap = bytearray(bitmap_bytes(new.size_bytes))
        self.new_size_bytes = 0

    def _choose(self) -> list[Volume]:
        return self._volumes

    def _walk(self, volumes: list[Volume]) -> Iterator[Step]:
        contents = [_Content(volume) for volume in volumes]
        old_size, new_size = (content.size_bytes for content in contents)
        self.new_size_bytes = new_size
        windows, window = -(-old_size // (UNIT_BYTES * WINDOW_UNITS)), 0
        width = WINDOW_UNITS // 8
        while window < windows:
            found, behinds = [], []
            for content, destroyed in zip(contents, self._destroyed):
                digests, behind = yield from (self._from_table if destroyed else self._digests)(content, window)
                found.append(np.frombuffer(digests, dtype=np.uint64).reshape(WINDOW_UNITS, 2))
                behinds.append(behind)
            differ = (found[0] != found[1]).any(axis=1)
            if differ.any():
                bits = np.packbits(differ).tobytes()
                self.bitmap[window * width : (window + 1) * width] = bits[: len(self.bitmap) - window * width]
            window = min(behinds)
            yield from self._spend(20)
        if old_size < new_size:
            mark(self.bitmap, old_size // UNIT_BYTES, -(-new_size // UNIT_BYTES))

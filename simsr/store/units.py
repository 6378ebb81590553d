"""What changed, in units of 64 KiB: the bitmaps of changed block tracking.

A bitmap has one bit for each unit of the newer volume, the most significant bit of a byte first, and is padded with zeros to a multiple of
four bytes, because readers take it four bytes at a time (datapath.md 8).
"""

from __future__ import annotations

from simsr.store.layout import BLOCK
from simsr.store.store import Store
from simsr.store.volume import Volume
from simsr.store.walk import Diff

__all__ = ["UnitDiff", "UNIT_BYTES", "UNIT_BLOCKS", "bitmap_bytes", "mark"]

UNIT_BYTES = 64 << 10
UNIT_BLOCKS = UNIT_BYTES // BLOCK


def bitmap_bytes(size_bytes: int) -> int:
    """The length of the bitmap of a volume of ``size_bytes``."""
    return -(-size_bytes // (UNIT_BYTES * 32)) * 4


def mark(bitmap: bytearray, first: int, last: int) -> None:
    """Set the bits ``first`` to ``last`` (not included)."""
    low, high = first >> 3, last >> 3
    if low == high:
        bitmap[low] |= (0xFF >> (first & 7)) & ~(0xFF >> (last & 7)) if first < last else 0
        return
    bitmap[low] |= 0xFF >> (first & 7)
    bitmap[low + 1 : high] = b"\xff" * (high - low - 1)
    if last & 7:
        bitmap[high] |= 0xFF & ~(0xFF >> (last & 7))


class UnitDiff(Diff):
    """What changed from ``old`` to ``new``, which is not smaller: ``bitmap``. O(nodes that differ); memory: the bitmap."""

    def __init__(self, store: Store, old: Volume, new: Volume) -> None:
        super().__init__(store, old, new)
        self.bitmap = bytearray(bitmap_bytes(new.size_bytes))
        self._marked = 0

    @property
    def _covered(self) -> int:
        return self._marked

    def _append(self, begin: int, end: int, has_data: bool) -> None:
        if begin < end:
            mark(self.bitmap, begin // UNIT_BYTES, -(-end // UNIT_BYTES))
            self._marked = end

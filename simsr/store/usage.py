"""Who uses what: how many slots of all leaves name a block of each segment.

The counts are exact (every change of a leaf goes through here), and they count *slots*: a block that two different leaves name
counts twice. So 0 means that nothing in a segment is used any more, and anything else is an upper bound for the blocks in use.
"""

from __future__ import annotations

from array import array

import numpy as np

from simsr.store.nodes import PHYSICAL_MASK, Leaf

__all__ = ["Usage"]


class Usage:
    """``live[s]``: slots, over all leaves, that name a block of segment ``s``."""

    def __init__(self, segment_shift: int) -> None:
        self.segment_shift = segment_shift
        self.live = array("q", bytes(8 * 64))
        self._saved = np.zeros(64, dtype=np.int64)

    def reserve(self, slot: int) -> None:
        """Make room for counting segment ``slot``."""
        if slot >= len(self.live):
            self.live.extend([0] * (slot + 1))

    def _count(self, entries: np.ndarray, sign: int) -> int:
        """Count slots; returns how many of them are holes."""
        counts = np.bincount(((entries & PHYSICAL_MASK) >> self.segment_shift).astype(np.intp))
        live = self.live
        for slot in np.flatnonzero(counts[1:]).tolist():
            live[slot + 1] += sign * int(counts[slot + 1])
        return int(counts[0])

    def count_leaf(self, leaf: Leaf, sign: int) -> None:
        """Count the slots of a leaf that came into being (+1) or goes (-1). O(fan-out)."""
        self._count(leaf.vector, sign)

    def release_vector(self, old: np.ndarray) -> int:
        """Uncount overwritten slots; returns how many of them were holes."""
        physical = old.view(np.uint32)[::2]
        slot = int(np.minimum.reduce(physical)) >> self.segment_shift
        if slot != int(np.maximum.reduce(physical)) >> self.segment_shift:
            return self._count(old, -1)
        if not slot:
            return len(old)
        self.live[slot] -= len(old)
        return 0

    # Checkpoints.

    def changes(self, everything: bool) -> tuple[np.ndarray, np.ndarray]:
        """(segments, counts) that changed since the last call; with ``everything`` all that are not 0. O(segments)."""
        now = np.array(self.live, dtype=np.int64)
        before = np.zeros_like(now)
        if not everything:
            before[: len(self._saved)] = self._saved
        self._saved = now
        slots = np.flatnonzero(now != before)
        return slots, now[slots]

    def load(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """Take over what `changes` gave when the checkpoint was made."""
        if len(slots):
            self.reserve(int(slots.max()))
        for slot, count in zip(slots.tolist(), counts.tolist()):
            self.live[slot] = count

    def loaded(self) -> None:
        """All that a checkpoint has was loaded."""
        self._saved = np.array(self.live, dtype=np.int64)

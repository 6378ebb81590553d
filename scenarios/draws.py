"""Random numbers without a generator: a keyed hash of who asks and which request it is.

A generator that is shared gives other numbers whenever tasks run in another order. Here a number depends only on the
seed, the rule, the disk and the request's own number (or the number of a block), so the same seed gives the same faults
whatever else is going on, and a single decision can be recomputed on its own.

`Draws` gives up to eight independent numbers for each request; `BlockHash` gives one for each block of a disk, for faults that
belong to a place.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np

__all__ = ["Draws", "BlockHash", "DRAWS_MAX"]

DRAWS_MAX = 8
"""Numbers to be had for one request."""

_SCALE = 2.0**-52
_MASK = (1 << 64) - 1
_FEW_BLOCKS = 12  # up to here integers of Python are faster than numpy


def _key(*parts: object) -> bytes:
    return blake2b("\0".join(map(str, parts)).encode(), digest_size=32).digest()


class Draws:
    """The numbers of one rule on one disk: ``draws(n)`` is a tuple of ``count`` floats, 0 < u < 1."""

    __slots__ = ("_copy", "_words")

    def __init__(self, *who: object, count: int = DRAWS_MAX) -> None:
        self._copy = blake2b(digest_size=8 * count, key=_key(*who)).copy
        self._words = struct.Struct(f"<{count}Q").unpack

    def __call__(self, number: int) -> tuple[float, ...]:
        state = self._copy()
        state.update(number.to_bytes(8, "little"))
        return tuple([((word >> 12) + 0.5) * _SCALE for word in self._words(state.digest())])


class BlockHash:
    """One number, 0 <= u < 1, for each block. A block is hit when its number is below a rate, so a growing rate only adds.

    splitmix64 over the block number, keyed: a range of blocks is one numpy expression.
    """

    __slots__ = ("_key",)

    def __init__(self, *who: object) -> None:
        self._key = int.from_bytes(_key(*who)[:8], "little")

    def below(self, first: int, count: int, rate: float) -> list[int]:
        """The blocks of a range whose number is below ``rate``, in order."""
        if rate <= 0:
            return []
        if rate >= 1:
            return list(range(first, first + count))
        limit = int(rate * 2.0**64)
        if count <= _FEW_BLOCKS:
            return [block for block in range(first, first + count) if self.word(block) < limit]
        words = np.arange(first, first + count, dtype=np.uint64)
        words += np.uint64(self._key)
        words *= np.uint64(0x9E3779B97F4A7C15)
        words ^= words >> np.uint64(30)
        words *= np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(27)
        words *= np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
        return (np.flatnonzero(words < np.uint64(limit)) + first).tolist()

    def word(self, block: int) -> int:
        """64 bits for one block."""
        word = ((block + self._key) & _MASK) * 0x9E3779B97F4A7C15 & _MASK
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
        return word ^ word >> 31

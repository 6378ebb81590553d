"""Faults that belong to a place: bad blocks and rotten bits. Nothing is stored for them but where they have healed.

Each block has a number drawn by a keyed hash; it is bad while that number is below the rate. So bad blocks are at the same
places whatever the order of requests, and a rate that grows only adds some. A block that was rewritten is healed for
good; ``heal`` heals everything that is bad at that time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scenarios.draws import BlockHash
from scenarios.overlay import Layer
from scenarios.quantities import Growth

__all__ = ["Media"]

_ROT_BLOCK_BYTES = 4096
_SCAN_BLOCKS = 1 << 16
_EXPONENT_MAX = 700.0  # beyond it exp() overflows; by then everything is bad, whatever the rate was


class Media:
    """The bad blocks, or rotten bits, of one rule on one disk, in the range ``start`` to ``end``.

    ``rate`` is the share of blocks, or of bytes if ``flips``; or the block numbers themselves.
    """

    def __init__(
        self,
        rule: str,
        seed: int,
        layer: Layer,
        rate: float | frozenset[int],
        area: tuple[int, int],
        began_ns: int = 0,
        block_bytes: int = _ROT_BLOCK_BYTES,
        grows: Growth | None = None,
        flips: int = 0,
        heals: bool = True,
    ) -> None:
        self.rule, self.layer, self.flips, self.heals = rule, layer, flips, heals
        self.block_bytes = block_bytes
        self._listed = rate if isinstance(rate, frozenset) else None
        self._rate = 0.0 if isinstance(rate, frozenset) else min(1.0, rate * block_bytes) if flips else rate
        self._grows, self._began_ns = grows, began_ns
        self._start, self._end = area
        self._seed, self._key = seed, None
        self._rehash()

    def _rehash(self) -> None:
        """Places follow the layer: data that were cloned are rotten where they were."""
        self._key = self.layer.key
        self._hash = BlockHash(self._seed, self.rule, self._key, "block")
        self._bit_hash = BlockHash(self._seed, self.rule, self._key, "bit")

    def rate(self, now: int) -> float:
        """The share of blocks that are bad."""
        if self._grows is None:
            return self._rate
        periods = (now - self._began_ns) / self._grows.period_ns
        return min(1.0, self._rate * math.exp(min(periods * math.log(self._grows.factor), _EXPONENT_MAX)))

    def blocks(self, offset: int, length: int, now: int) -> list[int]:
        """The bad blocks that a range of bytes touches."""
        start, end = max(offset, self._start), min(offset + length, self._end)
        if start >= end:
            return []
        first, count = start // self.block_bytes, (end - 1) // self.block_bytes - start // self.block_bytes + 1
        if self._listed is not None:
            found = sorted(block for block in self._listed if first <= block < first + count)
        else:
            if self._key != self.layer.key:
                self._rehash()
            found = self._hash.below(first, count, self.rate(now))
        return self._unhealed(found) if found else found

    def _unhealed(self, blocks: list[int]) -> list[int]:
        healed = self.layer.healed.get(self.rule, ())
        below = self.layer.healed_rate.get(self.rule, -1.0)
        if below >= 0:
            if self._listed is not None:
                return []
            blocks = [block for block in blocks if self._hash.word(block) >= int(below * 2.0**64)]
        return [block for block in blocks if block not in healed]

    def bits(self, offset: int, length: int, now: int) -> list[int]:
        """The rotten bits in a range of bytes, counted from the beginning of the disk."""
        block_bits = 8 * self.block_bytes
        found = {
            block * block_bits + self._bit_hash.word(block * 4096 + number) % block_bits
            for block in self.blocks(offset, length, now)
            for number in range(self.flips)
        }
        low, high = 8 * max(offset, self._start), 8 * min(offset + length, self._end)
        return sorted(bit for bit in found if low <= bit < high)

    def wrote(self, offset: int, length: int, now: int) -> None:
        """Heal what a write has made good."""
        if not self.heals:
            return
        blocks = self.blocks(offset, length, now)
        if self.flips:
            rewritten = {bit // (8 * self.block_bytes) for bit in self.bits(offset, length, now)}
            blocks = [block for block in blocks if block in rewritten]
        if blocks:
            self.layer.healed.setdefault(self.rule, set()).update(blocks)

    def heal(self, now: int) -> None:
        """Heal all that is bad now."""
        self.layer.healed_rate[self.rule] = self.rate(now)

    def everything(self, now: int) -> Iterator[int]:
        """All rotten bits of the disk, in order. It goes through every block: about a second for a terabyte."""
        step = _SCAN_BLOCKS * self.block_bytes
        for offset in range(self._start - self._start % self.block_bytes, self._end, step):
            yield from self.bits(offset, step, now)

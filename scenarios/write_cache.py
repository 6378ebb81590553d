"""A volatile write cache, as a power cut sees it: which of the writes since the last flush are there afterwards.

The store keeps every write that it acknowledged. This remembers what each write since the last flush replaced; a cut
then chooses a legal subset of them to be kept and says what to write so that the disk looks as if the others had never reached the medium.
A flush makes stable what was written before it was asked for; a FUA write is stable when it is answered, as all are for a client
that takes answered writes for stable (``each_write``), like tapdisk. So much for what may be lost: nothing stable ever is.

Sectors (512 bytes) are written whole or not at all, in the order of completion (``order="completion"``: what is kept is as if written one
after the other) or in any order. Research: ``faults.md`` section 5, dm-log-writes, ALICE (Pillai et al., OSDI 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from scenarios.draws import Draws
from scenarios.patches import Patches
from scenarios.promises import Promises

__all__ = ["WriteCache", "WriteLog", "CACHE_BYTES_MAX"]

CACHE_BYTES_MAX = 256 << 20
"""Writes beyond it are taken for destaged, oldest first, as a cache of that size would have to."""


class _Write(NamedTuple):
    number: int
    offset: int
    data: bytes
    old: bytes


class WriteLog(Protocol):
    """Who wants to hear of every write, with its data, and of every flush, in the order in which they are answered."""

    def wrote(self, offset: int, data: bytes | memoryview | None, length: int, stable: bool) -> None:
        """A write, of zeros if there are no ``data``; begins and ends at sectors."""

    def mark(self) -> int:
        """What a flush that is asked for now covers; give it to `flushed` when it is done."""

    def flushed(self, mark: int) -> None:
        """A flush was answered."""


class WriteCache:
    """``keeps``: whether anybody wants to know; then call `before` and `wrote` around each write, one at a time. ``log`` is told, too."""

    def __init__(self, each_write: bool = False) -> None:
        self.keeps = False
        self.log: WriteLog | None = None
        self.each_write = each_write
        self._writes: list[_Write] = []
        self._old: tuple[int, bytes] = (0, b"")
        self._bytes = 0
        self.number = self.destaged = 0
        self.promises = Promises()

    def before(self, offset: int, old: bytes) -> None:
        """What is about to be replaced."""
        self._old = offset, old

    def wrote(self, offset: int, data: bytes, stable: bool = False) -> None:
        """A write was done. A stable one cannot be lost; it also ends the doubt about what lay below it."""
        self.number += 1
        if stable:
            self._settle(offset, len(data))
            return
        self._writes.append(_Write(self.number, offset, data, self._old[1]))
        self._bytes += len(data)
        while self._bytes > CACHE_BYTES_MAX:
            self._bytes -= len(self._writes.pop(0).data)
            self.destaged += 1

    def _settle(self, offset: int, length: int) -> None:
        """Cut a range out of all writes: it was overwritten by what is stable."""
        end, rest = offset + length, []
        for write in self._writes:
            for start, stop in ((write.offset, offset), (end, write.offset + len(write.data))):
                low, high = max(start, write.offset), min(stop, write.offset + len(write.data))
                if low < high:
                    part = slice(low - write.offset, high - write.offset)
                    rest.append(_Write(write.number, low, write.data[part], write.old[part]))
        self._writes = rest
        self._bytes = sum(len(write.data) for write in rest)

    def mark(self) -> int:
        """What a flush that is asked for now covers; give it to `flushed` when it is done."""
        return self.number

    def flushed(self, mark: int) -> None:
        self._writes = [write for write in self._writes if write.number > mark]
        self._bytes = sum(len(write.data) for write in self._writes)

    def clear(self) -> None:
        self._writes.clear()
        self._bytes = 0

    @property
    def unstable(self) -> list[int]:
        """The numbers of the writes that a cut may lose."""
        return sorted({write.number for write in self._writes})

    # A cut.

    def cut(
        self, keep: Any, draws: Draws, torn_bytes: int | None = None, order: str = "completion"
    ) -> list[tuple[int, bytes]]:
        """What to write, as (offset, bytes), so that only a subset of the writes is there. The cache is empty then.

        ``keep``: none, all, prefix, a probability, or the numbers (1 is the first since the last flush) of those to keep. With ``order``
        "completion" and a probability, a prefix is not required, but what is kept lies over each other in order; with "any" in an order drawn.
        ``torn_bytes``: of the last write that is kept a part of its sectors may be missing: those from one on, or, in any order, some.
        """
        writes, numbers = self._writes, self.unstable
        kept = _chosen(keep, numbers, draws)
        sequence = [write for write in writes if write.number in kept]
        if order == "any":
            sequence.sort(key=lambda write: draws(write.number)[1])
        self.promises.cut(set(numbers) - kept)
        image = Patches()
        for write in reversed(writes):  # the medium before all of them: the oldest content goes on top
            image.put(write.offset, write.old, "old")
        for at, write in enumerate(sequence):
            is_torn = torn_bytes and at == len(sequence) - 1
            for start, end in _torn(write, torn_bytes, draws, order == "any") if is_torn else [(0, len(write.data))]:
                image.put(write.offset + start, write.data[start:end], "new")
        self.clear()
        return [(start, bytes(piece.data)) for start, piece in image.all()]

    def statistics(self) -> dict[str, int]:
        return {"writes": len(self.unstable), "bytes": self._bytes, "destaged": self.destaged}


def _chosen(keep: Any, numbers: Sequence[int], draws: Draws) -> set[int]:
    if keep == "none":
        return set()
    if keep == "all":
        return set(numbers)
    if keep == "prefix":
        return set(numbers[: int(draws(0)[0] * (len(numbers) + 1))])
    if isinstance(keep, float):
        return {number for number in numbers if draws(number)[0] < keep}
    return {numbers[place - 1] for place in keep if 0 < place <= len(numbers)}


def _torn(write: _Write, sector: int, draws: Draws, in_any_order: bool) -> list[tuple[int, int]]:
    """The parts of a write that are there, as bytes from its beginning; ``sector`` bytes of the disk are whole or missing."""
    offset, length = write.offset, len(write.data)
    first, count = offset // sector, (offset + length - 1) // sector - offset // sector + 1
    u = draws(write.number)
    kept: Sequence[int] = range(int(u[2] * (count + 1)))
    if in_any_order:
        words = Draws(*map(str, u[2:4]))
        kept = [place for place in range(count) if words(place // 8)[place % 8] < 0.5]
    return [(max(0, (first + place) * sector - offset), min(length, (first + place + 1) * sector - offset)) for place in kept]

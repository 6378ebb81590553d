"""Whether a disk kept what it promised: of the writes that a client was told are stable, how many has a fault lost?

A write is promised when a flush that was asked for after it is answered, or when it was answered itself as stable (FUA). It is lost when its
data were torn, lost or misdirected, whatever was answered, or when a power cut takes it: that happens where the flush was a lie.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Promises"]

SPOILING = {"lose", "torn", "misdirect"}


class _Mark(NamedTuple):
    written: int
    spoiled: int
    number: int  # the write cache's own


class Promises:
    """Of one disk."""

    def __init__(self) -> None:
        self._written = self._spoiled = 0
        self._stable = self._stable_spoiled = self._cut = 0
        self._flushed = _Mark(0, 0, 0)

    def wrote(self, kinds: set[str], stable: bool) -> None:
        """A write was answered; ``kinds`` of effects it met."""
        spoiled = bool(kinds & SPOILING)
        if stable:
            self._stable += 1
            self._stable_spoiled += spoiled
        else:
            self._written += 1
            self._spoiled += spoiled

    def mark(self, number: int) -> _Mark:
        """What a flush that is asked for now covers; ``number``: of the last write in the write cache."""
        return _Mark(self._written, self._spoiled, number)

    def flushed(self, mark: _Mark) -> None:
        """That flush was answered, whether it was done or not."""
        self._flushed = max(self._flushed, mark)

    def cut(self, missing: set[int]) -> None:
        """A power cut has taken these writes of the write cache."""
        self._cut += sum(number <= self._flushed.number for number in missing)

    @property
    def promised(self) -> int:
        return self._flushed.written + self._stable

    @property
    def lost(self) -> int:
        return self._flushed.spoiled + self._stable_spoiled + self._cut

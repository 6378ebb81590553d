"""Reads that may wait for the disk, as jobs for worker threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simsr.store.layout import BLOCK
from simsr.store.segments import Segment

if TYPE_CHECKING:
    from simsr.store.volume import Volume

__all__ = ["ReadJob", "Run"]

_BLOCK_MASK = BLOCK - 1
_BLOCK_SHIFT = 12

Run = tuple[Segment | None, int, int, int]
"""(segment or None for a hole, byte offset in its file, byte offset in the request, length in bytes)"""


class ReadJob:
    """Reads of one request that may wait for the disk. `run` belongs in a worker thread; then `release`, always.

    The segments it reads are pinned meanwhile, so they are not used for anything else, and the job returns the content
    as it was when the job was made, whatever is written later.
    """

    def __init__(self, volume: Volume, offset: int, view: memoryview) -> None:
        self._volume = volume
        self._offset = offset
        self._view = view
        self._start = offset & ~_BLOCK_MASK
        end = (offset + len(view) + _BLOCK_MASK) & ~_BLOCK_MASK
        if end - self._start == BLOCK:  # the usual case without numpy
            self._entries, self._runs = volume._entry(self._start >> _BLOCK_SHIFT)
        else:
            self._entries = volume._entries(self._start >> _BLOCK_SHIFT, end >> _BLOCK_SHIFT)
            self._runs = volume._runs(self._entries)
        self.parts = len(self._runs)  # how many reads of the disk there are in it, at most
        for segment, *_ in self._runs:
            if segment is not None:
                segment.pins += 1

    def begin(self) -> None:
        """Have the disk begin with what `run` will wait for. Optional; for when several jobs run one after the other."""
        for segment, position, _, length in self._runs:
            if segment is not None:
                segment.file.will_need(position, length)

    def run(self) -> None:
        """Fill the view. Raises OSError, or `BlockDamaged` when a checksum does not fit."""
        head = self._offset - self._start
        whole = head == 0 and len(self._view) & _BLOCK_MASK == 0
        target = self._view if whole else memoryview(bytearray(len(self._entries) * BLOCK))
        for segment, position, at, length in self._runs:
            if segment is None:
                target[at : at + length] = bytes(length)
            else:
                segment.file.pread(target[at : at + length], position)
        self._volume._verify(target, self._entries, self._start)
        if not whole:
            self._view[:] = target[head : head + len(self._view)]

    @property
    def fetched(self) -> tuple[int, bytes]:
        """For a job of one whole block that has run: its map entry and content."""
        return int(self._entries[0]), bytes(self._view)

    def release(self) -> None:
        for segment, *_ in self._runs:
            if segment is not None:
                segment.pins -= 1
        self._runs = []

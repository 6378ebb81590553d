"""The records of a write: blocks with their checksums and holes are gathered until a record is full, then appended to the log and applied."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from crc32c import crc32c

from simsr.store import layout
from simsr.store.layout import BLOCK, COUNT_MASK, HOLE, START_SHIFT, ZERO_BLOCK, ZERO_CRC, block_crcs
from simsr.store.log import Log

__all__ = ["Gather"]

_ZERO_CRC_BYTES = ZERO_CRC.to_bytes(4, "little")


class Gather:
    """Collects what one record will hold, and emits it."""

    __slots__ = ("_volume", "_family", "_log", "_apply", "_extents", "_crcs", "_views", "_blocks_left", "_bytes_left")

    def __init__(self, volume: int, family: int, log: Log, apply: Callable[[list[int], array, int], None]) -> None:
        """``volume``: its ident; ``apply`` is called with each record's extents, checksums and first physical block when it is in the log."""
        self._volume, self._family, self._log, self._apply = volume, family, log, apply
        self._reset()

    def _reset(self) -> None:
        self._extents: list[int] = []
        self._crcs = array("I")
        self._views: list[memoryview] = []
        self._blocks_left, record_bytes = self._log.room()
        self._bytes_left = min(record_bytes, layout.MAX_RECORD_BYTES) - layout.RECORD_BYTES - 24

    def _make_room(self, blocks: int) -> None:
        """Have room for one extent and at least one of ``blocks`` blocks, by emitting and rolling if need be."""
        if self._bytes_left < 12 or (blocks and not self._blocks_left):
            self.emit()
            if self._bytes_left < 12 or (blocks and not self._blocks_left):
                self._log.roll()
                self._reset()

    def add_hole(self, block: int, count: int) -> None:
        while count:
            self._make_room(0)
            part = min(count, COUNT_MASK)
            self._extents.append(block << START_SHIFT | HOLE | part)
            self._bytes_left -= 8
            block, count = block + part, count - part

    def add_block(self, block: int, view: memoryview) -> None:
        crc = crc32c(view)
        if crc == ZERO_CRC and bytes(view) == ZERO_BLOCK:
            self.add_hole(block, 1)
            return
        if self._bytes_left < 12 or not self._blocks_left:
            self._make_room(1)
        self._extents.append(block << START_SHIFT | 1)
        self._crcs.append(crc)
        self._views.append(view)
        self._blocks_left -= 1
        self._bytes_left -= 12

    def add_blocks(self, block: int, view: memoryview) -> None:
        crcs = array("I", block_crcs(view))
        if _ZERO_CRC_BYTES not in crcs.tobytes():
            self._add_run(block, crcs, view)
            return
        begin = 0
        for index, crc in enumerate(crcs):
            if crc == ZERO_CRC:
                self._add_run(block + begin, crcs[begin:index], view[begin * BLOCK : index * BLOCK])
                self.add_block(block + index, view[index * BLOCK : (index + 1) * BLOCK])
                begin = index + 1
        self._add_run(block + begin, crcs[begin:], view[begin * BLOCK :])

    def _add_run(self, block: int, crcs: array, view: memoryview) -> None:
        done = 0
        while done < len(crcs):
            self._make_room(1)
            count = min(len(crcs) - done, self._blocks_left, (self._bytes_left - 8) // 4, COUNT_MASK)
            self._extents.append(block + done << START_SHIFT | count)
            self._crcs += crcs[done : done + count]
            self._views.append(view[done * BLOCK : (done + count) * BLOCK])
            self._blocks_left -= count
            self._bytes_left -= 8 + 4 * count
            done += count

    def emit(self) -> None:
        if self._extents:
            payload = layout.pack_extents(self._extents, self._crcs, self._family)
            physical = self._log.append(layout.EXTENTS, self._volume, payload, self._views, len(self._crcs))
            self._apply(self._extents, self._crcs, physical)
        self._reset()

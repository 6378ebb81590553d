"""Salvage: everything of a damaged store that can still be read, volume by volume, and what is lost of each.

`simsr.store.rescue` opens the store as far as it can be. Here the volumes are read out: every block is verified with the checksum
that the map has for it, and what does not fit is lost, never guessed. A block that is damaged may have a second copy, where it was before the
cleaner moved it or where it was moved to and a damaged record hid that; one that has the same checksum, and that a record names as
the same block, is as good.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from crc32c import crc32c

from simsr.errors import StoreDamaged
from simsr.store.contents import blocks_in
from simsr.store.files import Directory
from simsr.store.layout import BLOCK, ZERO_BLOCK
from simsr.store.node_table import MapMemory
from simsr.store.nodes import PHYSICAL_MASK
from simsr.store.rescue import Rescued, rescue
from simsr.store.volume import Volume

__all__ = ["Salvage", "Saved"]

_RUN_BLOCKS = 256


@dataclass
class Saved:
    """What became of one volume. ``lost``: [(offset, length)] in bytes, in order, not touching."""

    volume: Volume
    data_bytes: int = 0
    lost: list[list[int]] = field(default_factory=list)

    def lose(self, offset: int, length: int) -> None:
        length = min(length, self.volume.size_bytes - offset)
        if length <= 0:
            return
        if self.lost and sum(self.lost[-1]) == offset:
            self.lost[-1][1] += length
        else:
            self.lost.append([offset, length])

    @property
    def lost_bytes(self) -> int:
        return sum(length for _, length in self.lost)


class Salvage:
    """Reads out one store. `close` lets go of it."""

    def __init__(self, directory: Directory, memory: MapMemory | None = None) -> None:
        """Raises `StoreLocked`, `StoreFormat`, `StoreDamaged` (nothing at all is left), OSError."""
        self._directory = directory
        self.rescued: Rescued = rescue(directory, memory)
        self.store = self.rescued.store
        self.notes = self.rescued.notes
        self._shift, self._mask = self.store.geometry.segment_shift, self.store.geometry.segment_blocks - 1
        self._copies: dict[tuple[int, int, int], list[int]] | None = None
        self.second_copies = 0

    def close(self) -> None:
        self.store._let_go()
        self._directory.close()

    def save(self, volume: Volume, put: Callable[[int, memoryview], None]) -> Saved:
        """Hand everything that can be read of a volume to ``put(offset, data)``, in order; what is not handed over is zeros."""
        saved, table = Saved(volume), self.store.table
        map_, span = volume.map, table.fanout * BLOCK
        leaves = map_.leaves()
        while True:
            with table.waiting():
                number, ident = next(leaves, (0, 0))
                if not ident:
                    break
                try:
                    entries = np.array(table.get(ident).slots, dtype=np.uint64)
                except (StoreDamaged, OSError) as error:
                    self.notes.append(str(error))
                    saved.lose(number * span, span)
                    continue
            self._save_leaf(saved, number * span, entries, put)
            table.memory.shrink(64)
        return saved

    def _save_leaf(self, saved: Saved, offset: int, entries: np.ndarray, put: Callable[[int, memoryview], None]) -> None:
        places = (entries & np.uint64(PHYSICAL_MASK)).astype(np.int64)
        sums = (entries >> np.uint64(32)).tolist()
        for first, count in _runs(places, self._shift):
            at, data = offset + first * BLOCK, self._read(int(places[first]), count)
            begin = 0  # of what is good and was not handed over yet
            for index in range(count):
                block = data[index * BLOCK : (index + 1) * BLOCK]
                if crc32c(block) == sums[first + index] and int(places[first]) >> self._shift != self.rescued.lost_slot:
                    continue
                self._put(saved, at + begin * BLOCK, data[begin * BLOCK : index * BLOCK], put)
                begin = index + 1
                entry = int(entries[first + index])
                copy = self._copy(saved.volume.map.family, at // BLOCK + index, entry)
                if copy is None:
                    saved.lose(at + index * BLOCK, BLOCK)
                else:
                    self._put(saved, at + index * BLOCK, copy, put)
            self._put(saved, at + begin * BLOCK, data[begin * BLOCK :], put)

    @staticmethod
    def _put(saved: Saved, offset: int, data: memoryview, put: Callable[[int, memoryview], None]) -> None:
        data = data[: max(0, saved.volume.size_bytes - offset)]
        if data:
            saved.data_bytes += len(data)
            put(offset, data)

    def _read(self, place: int, count: int) -> memoryview:
        """Blocks from one segment; zeros where that cannot be read, which have no block's checksum."""
        data, by_slot = memoryview(bytearray(count * BLOCK)), self.store.pool.by_slot
        segment = by_slot[place >> self._shift] if place >> self._shift < len(by_slot) else None
        if segment is not None:
            segment.file.pread(data, (place & self._mask) * BLOCK)
        return data

    # Second copies.

    def _copy(self, family: int, block: int, entry: int) -> memoryview | None:
        """The content of a damaged block, from another place where a record says that it is, too."""
        if (entry & PHYSICAL_MASK) >> self._shift == self.rescued.lost_slot:
            return None
        if self._copies is None:
            self._copies = self._all_copies()
        for place in self._copies.get((family, block, entry >> 32), ()):
            data = self._read(place, 1)
            if crc32c(data) == entry >> 32 and data != ZERO_BLOCK:
                self.second_copies += 1
                return data
        return None

    def _all_copies(self) -> dict[tuple[int, int, int], list[int]]:
        """(family, block, checksum) -> places, for everything that is in more than one place. O(blocks that records name)."""
        parts = []
        for segment in self.store.pool.by_slot:
            if segment is not None and segment.log_index:
                area = memoryview(bytearray(self.store.geometry.record_area_bytes))
                segment.file.pread(area, 0)
                blocks = blocks_in(area, segment)
                places = blocks.places.astype(np.uint64) | np.uint64(segment.slot << self._shift)
                parts.append((blocks.families.astype(np.uint64), blocks.numbers, blocks.crcs.astype(np.uint64), places))
        copies: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        if not parts:
            return copies
        families, numbers, crcs, places = (np.concatenate(column) for column in zip(*parts))
        order = np.lexsort((crcs, numbers, families))
        families, numbers, crcs, places = families[order], numbers[order], crcs[order], places[order]
        same = (families[1:] == families[:-1]) & (numbers[1:] == numbers[:-1]) & (crcs[1:] == crcs[:-1])
        several = np.zeros(len(order), dtype=bool)
        several[1:] |= same
        several[:-1] |= same
        for at in np.flatnonzero(several).tolist():
            copies[int(families[at]), int(numbers[at]), int(crcs[at])].append(int(places[at]))
        return copies


def _runs(places: np.ndarray, shift: int) -> Iterator[tuple[int, int]]:
    """(first slot, count) of blocks that one read can fetch."""
    used = np.flatnonzero(places)
    if not len(used):
        return
    breaks = (np.diff(used) != 1) | (np.diff(places[used]) != 1) | (np.diff(places[used] >> shift) != 0)
    for run in np.split(used, np.flatnonzero(breaks) + 1):
        for at in range(0, len(run), _RUN_BLOCKS):
            yield int(run[at]), min(_RUN_BLOCKS, len(run) - at)

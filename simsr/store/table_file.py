"""The table file: the node table, the counts of the segments and the list of volumes, as checkpoints leave them.

A table file is a sequence of sections. The first checkpoint written to it puts everything there, the ones after it only what has
changed; when the changes outweigh the beginning, the next checkpoint starts another file. So a checkpoint costs what was changed
and opening a store reads at most about twice what there is. Every section carries the checksum of itself and all before it, and
the super block names the last one, so a file counts up to there and in one piece, or not at all.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from simsr.errors import StoreDamaged
from simsr.store.files import Directory
from simsr.store.layout import TableEnd
from simsr.store.node_table import COLUMNS
from simsr.store.paging import NUMBER_MAX

__all__ = ["SectionWriter", "Section", "read_sections", "table_name", "table_files", "ROWS", "LIVE", "VOLUMES", "END"]

ROWS, LIVE, VOLUMES, END = 1, 2, 3, 4
_HEAD = struct.Struct("<4sBxHIII")
_MAGIC = b"SIMT"
_NAME = re.compile(r"table-(\d{12})")
_SECTION_MAX_BYTES = 1 << 28


def table_name(number: int) -> str:
    return f"table-{number:012d}"


def table_files(directory: Directory) -> list[int]:
    """The numbers of the table files that are there."""
    numbers = (int(match[1]) for name in directory.names() if (match := _NAME.fullmatch(name)))
    return [number for number in numbers if number <= NUMBER_MAX]


@dataclass
class Section:
    """One section as it was read. ``rows``/``live``: arrays by column; ``volumes``: decoded JSON. ``end``: where it ends."""

    kind: int
    count: int
    body: memoryview
    end: TableEnd

    def rows(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(numbers of the nodes, their columns)"""
        ids = np.frombuffer(self.body[: 4 * self.count], dtype=np.uint32)
        at, columns = 4 * self.count, {}
        for name, code in COLUMNS:
            kind = np.dtype(code)
            columns[name] = np.frombuffer(self.body[at : at + kind.itemsize * self.count], dtype=kind)
            at += kind.itemsize * self.count
        return ids, columns

    def live(self) -> tuple[np.ndarray, np.ndarray]:
        """(segments, their live slots)"""
        middle = 4 * self.count
        return np.frombuffer(self.body[:middle], dtype=np.uint32), np.frombuffer(self.body[middle:], dtype=np.int64)

    def volumes(self) -> dict:
        return json.loads(bytes(self.body))


class SectionWriter:
    """Makes sections; each continues the checksum of the one before it."""

    def __init__(self, crc: int = 0) -> None:
        self.crc = crc
        self.size_bytes = 0
        self._parts: list[bytes] = []

    def add(self, kind: int, count: int, body: bytes) -> None:
        head = _HEAD.pack(_MAGIC, kind, 0, count, len(body), 0)[:-4]
        self.crc = crc32c(body, crc32c(head, self.crc))
        self._parts += (head, struct.pack("<I", self.crc), body)
        self.size_bytes += _HEAD.size + len(body)

    def add_rows(self, ids: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        body = [ids.astype(np.uint32).tobytes(), *(columns[name].tobytes() for name, _ in COLUMNS)]
        self.add(ROWS, len(ids), b"".join(body))

    def add_live(self, slots: np.ndarray, counts: np.ndarray) -> None:
        self.add(LIVE, len(slots), slots.astype(np.uint32).tobytes() + counts.astype(np.int64).tobytes())

    def add_volumes(self, table: dict) -> None:
        self.add(VOLUMES, len(table["set"]), json.dumps(table, sort_keys=True, separators=(",", ":")).encode())

    def take(self) -> list[bytes]:
        """What was added since the last call."""
        parts, self._parts = self._parts, []
        return parts


def read_sections(directory: Directory, ref: TableEnd) -> Iterator[Section]:
    """The sections of the table file that ``ref`` of a super block names, in order. Raises `StoreDamaged`."""
    name = table_name(ref.file)

    def damage(reason: str) -> StoreDamaged:
        return StoreDamaged(path=directory.path, reason=f"{name} cannot be used: {reason}")

    try:
        file = directory.open(name)
    except FileNotFoundError:
        raise damage("the file is missing") from None
    try:
        if file.size_bytes < ref.offset:
            raise damage(f"it has {file.size_bytes} bytes, not {ref.offset}")
        at, crc = 0, 0
        while at < ref.offset:
            head = memoryview(bytearray(min(_HEAD.size, ref.offset - at)))
            file.pread(head, at)
            if len(head) < _HEAD.size:
                raise damage(f"the section at offset {at} is cut short")
            magic, kind, _, count, length, wanted = _HEAD.unpack(head)
            if magic != _MAGIC or length > min(_SECTION_MAX_BYTES, ref.offset - at - _HEAD.size):
                raise damage(f"no section at offset {at}")
            body = memoryview(bytearray(length))
            file.pread(body, at + _HEAD.size)
            crc = crc32c(body, crc32c(head[:-4], crc))
            if crc != wanted:
                raise damage(f"the checksum of the section at offset {at} does not fit")
            at += _HEAD.size + length
            yield Section(kind, count, body, TableEnd(ref.file, at, 0, crc))
        if crc != ref.crc:
            raise damage("it is not the one that the super block means")
    finally:
        file.close()

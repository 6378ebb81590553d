"""Map files, and reading nodes out of them.

A map file holds the nodes that one checkpoint wrote, one behind the other; where each is, the node table knows, with its checksum.
Reading is a job: made on the store's thread, ``run`` wherever waiting is allowed, ``finish`` on the store's thread again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from crc32c import crc32c

from simsr.errors import StoreDamaged
from simsr.store.files import Directory, File
from simsr.store.node_table import NO_LEAF, NodeTable
from simsr.store.nodes import Node, decode

__all__ = ["MapFiles", "PageJob", "map_name", "map_files"]

_HANDLES_MAX = 128
_LOOKS = 16  # at nodes that might go, for each that comes; with few, nodes that are read again and again would keep all others
NUMBER_MAX = (1 << 32) - 2  # of a map or table file; other names are not ours
_NAME = re.compile(r"map-(\d{12})")
_Home = tuple[int, int, int, int]
"""(map file, offset, length, crc32c)"""


def map_name(number: int) -> str:
    return f"map-{number:012d}"


def map_files(directory: Directory) -> list[int]:
    """The numbers of the map files that are there."""
    numbers = (int(match[1]) for name in directory.names() if (match := _NAME.fullmatch(name)))
    return [number for number in numbers if number <= NUMBER_MAX]


class MapFiles:
    """The map files of a store: their sizes, and open handles of those that were read (of some, if there are very many)."""

    def __init__(self, directory: Directory, table: NodeTable) -> None:
        self._directory, self._table = directory, table
        self._handles: dict[int, File] = {}
        self.size_bytes: dict[int, int] = {}
        self.readers = 0  # jobs under way: no file is removed then

    def survey(self) -> None:
        """See what is there."""
        for number in map_files(self._directory):
            file = self._directory.open(map_name(number))
            self.size_bytes[number] = file.size_bytes
            file.close()

    def home_of(self, ident: int) -> _Home:
        table = self._table
        return table.file[ident], table.offset[ident], table.length[ident], table.crc[ident]

    def read(self, home: _Home) -> bytearray:
        """The bytes at ``home``, verified. Blocks. Raises `StoreDamaged`, OSError."""
        number, offset, length, crc = home
        known = self._handles.get(number)
        try:
            file = known or self._directory.open(map_name(number))
        except FileNotFoundError:
            raise self.damage(home, "the file is missing") from None
        data = bytearray(length)
        try:
            if offset + length > file.size_bytes:
                raise self.damage(home, "the file is too short")
            file.pread(memoryview(data), offset)
        finally:  # another thread may have been faster, or enough files are open
            if known is None and (len(self._handles) >= _HANDLES_MAX or self._handles.setdefault(number, file) is not file):
                file.close()
        if crc32c(data) != crc:
            raise self.damage(home, "the checksum does not fit")
        return data

    def load(self, home: _Home, is_leaf: bool) -> Node:
        """Read and decode a node. Blocks. Raises `StoreDamaged`, OSError."""
        try:
            node = decode(self.read(home), self._table.fanout)
        except ValueError as error:
            raise self.damage(home, str(error)) from None
        if is_leaf != (not node.height):
            raise self.damage(home, f"a node of height {node.height} is in the wrong place")
        return node

    def fetch_now(self, ident: int) -> None:
        """Page in one node here and now. Blocks."""
        self._table.adopt(self.load(self.home_of(ident), self._table.number[ident] != NO_LEAF), ident)

    def remove(self, numbers: Iterable[int]) -> list[int]:
        """Remove files, if nobody is reading; returns those that have to wait."""
        if self.readers:
            return list(numbers)
        for number in numbers:
            self.close(number)
            self._directory.remove(map_name(number))
        return []

    def close(self, number: int | None = None) -> None:
        """Close the handle of one file, or all."""
        for key in [number] if number is not None else list(self._handles):
            handle = self._handles.pop(key, None)
            if handle is not None:
                handle.close()

    def damage(self, home: _Home, reason: str) -> StoreDamaged:
        return StoreDamaged(
            path=self._directory.path, reason=f"map node at offset {home[1]} of {map_name(home[0])} cannot be used: {reason}"
        )


class PageJob:
    """Brings nodes into memory. ``run`` blocks; then `finish`, always, on the store's thread."""

    def __init__(self, table: NodeTable, files: MapFiles, ids: Iterable[int]) -> None:
        self._table, self._files = table, files
        self._wanted = [
            (ident, files.home_of(ident), table.number[ident] != NO_LEAF) for ident in ids if ident not in table.resident
        ]
        self._found: list[tuple[int, _Home, Node]] = []
        files.readers += 1

    def run(self) -> None:
        """Raises `StoreDamaged`, OSError."""
        for ident, home, is_leaf in sorted(self._wanted, key=lambda item: item[1]):
            self._found.append((ident, home, self._files.load(home, is_leaf)))

    def finish(self, shrink: bool = True) -> None:
        """Hand over what was read, unless somebody else was faster or the node has moved on; then, with ``shrink``, let go of others
        if there is too much."""
        self._files.readers -= 1
        table = self._table
        for ident, home, node in self._found:
            if ident not in table.resident and table.file[ident] and self._files.home_of(ident) == home:
                table.adopt(node, ident)
        if shrink:
            table.memory.shrink(_LOOKS * len(self._found))

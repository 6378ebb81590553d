"""Pieces of bytes laid over a disk: what a reader sees instead of what is stored. Newer pieces cut older ones.

Pieces never overlap. All operations are O(log n) and the pieces touched; a piece is never copied to be cut, views are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sortedcontainers import SortedDict

__all__ = ["Patches", "Piece"]


class Piece(NamedTuple):
    """``until_ns``: gone from then on; None: stays."""

    data: memoryview
    until_ns: int | None
    rule: str


class Patches:
    """An interval map from byte offsets to pieces."""

    def __init__(self) -> None:
        self._pieces: SortedDict = SortedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def copy(self) -> Patches:
        other = Patches()
        other._pieces, other.size_bytes = self._pieces.copy(), self.size_bytes
        return other

    def clear(self) -> None:
        self._pieces.clear()
        self.size_bytes = 0

    def put(self, offset: int, data: bytes, rule: str, until_ns: int | None = None) -> None:
        """Lay ``data`` over whatever is there."""
        self.cut(offset, len(data))
        if data:
            self._pieces[offset] = Piece(memoryview(data), until_ns, rule)
            self.size_bytes += len(data)

    def cut(self, offset: int, length: int) -> None:
        """Take away what lies on a range."""
        end = offset + length
        for start, piece in list(self.over(offset, length)):
            del self._pieces[start]
            self.size_bytes -= len(piece.data)
            for first, last in ((start, min(offset, start + len(piece.data))), (max(end, start), start + len(piece.data))):
                if first < last:
                    self._pieces[first] = piece._replace(data=piece.data[first - start : last - start])
                    self.size_bytes += last - first

    def over(self, offset: int, length: int) -> Iterator[tuple[int, Piece]]:
        """(start, piece) of everything that lies on a range, whole, in order."""
        pieces = self._pieces
        end = offset + length
        at = pieces.bisect_right(offset) - 1
        keys = pieces.keys()
        if at < 0 or keys[at] + len(pieces[keys[at]].data) <= offset:
            at += 1
        while at < len(keys) and keys[at] < end and length > 0:
            yield keys[at], pieces[keys[at]]
            at += 1

    def show(self, offset: int, view: memoryview, now: int) -> bool:
        """Copy what lies on [offset, offset + len(view)) into the view; returns whether there was anything."""
        end = offset + len(view)
        shown, gone = False, []
        for start, piece in self.over(offset, len(view)):
            if piece.until_ns is not None and piece.until_ns <= now:
                gone.append((start, len(piece.data)))
                continue
            first, last = max(start, offset), min(start + len(piece.data), end)
            view[first - offset : last - offset] = piece.data[first - start : last - start]
            shown = True
        for start, length in gone:
            self.cut(start, length)
        return shown

    def all(self) -> Iterator[tuple[int, Piece]]:
        return iter(self._pieces.items())

    def _check(self) -> None:
        end = 0
        for start, piece in self._pieces.items():
            assert start >= end and len(piece.data), (start, end)
            end = start + len(piece.data)
        assert self.size_bytes == sum(len(piece.data) for piece in self._pieces.values())

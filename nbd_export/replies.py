"""Replies of the transmission phase, in the three styles that the protocol has grown.

Which one a connection speaks is settled by its handshake: `SimpleReplies`, `StructuredReplies` (READ and BLOCK_STATUS are answered in
chunks, everything else by the shorter simple reply, as the protocol allows), or `ExtendedReplies` (64-bit headers, chunks only).
Nothing else in this package knows the difference.

A request's ``cookie`` is whatever its style of reply repeats: 8 bytes as a number, or for extended headers 16 bytes, the cookie and the offset,
which lie side by side in the request and in the reply.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from nbd_export import constants as c
from nbd_export.transmission import Request

__all__ = ["Piece", "Replies", "SimpleReplies", "StructuredReplies", "ExtendedReplies", "Statuses"]

_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_DATA_CHUNK = struct.Struct(">IHHQIQ")  # a chunk with the offset that OFFSET_DATA begins with
_EXTENDED = struct.Struct(">IHH16sQ")
_EXTENDED_DATA = struct.Struct(">IHH16sQQ")

Piece = tuple[Request, int, int, bool]
"""(request, offset in bytes, length in bytes, whether it is the last of its request)"""

Statuses = list[tuple[int, list[tuple[int, int]]]]
"""[(context id, [(length in bytes, flags)])]"""


class SimpleReplies:
    """One header of 16 bytes for each request, and the data of a READ behind it."""

    in_pieces = False
    """Whether the answer to a READ may come in pieces."""
    header_bytes = _SIMPLE.size
    """What stands in front of the data of a READ."""

    def done(self, requests: Sequence[Request]) -> list[bytes]:
        """Success, for requests that are answered without data."""
        pack, magic = _SIMPLE.pack, c.NBD_SIMPLE_REPLY_MAGIC
        return [pack(magic, 0, request.cookie) for request in requests]

    def error(self, request: Request, error: int, text: str) -> bytes:
        return _SIMPLE.pack(c.NBD_SIMPLE_REPLY_MAGIC, error, request.cookie)

    def nothing(self, request: Request) -> bytes:
        """The answer to a READ of no bytes."""
        return _SIMPLE.pack(c.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def lay_out(self, out: memoryview, pieces: Sequence[Piece]) -> list[tuple[int, memoryview]]:
        """Write the headers of ``pieces`` one behind the other into ``out``; returns (offset, where its data go) of each."""
        at, batch = 0, []
        pack_into, magic = _SIMPLE.pack_into, c.NBD_SIMPLE_REPLY_MAGIC
        for request, offset, length, _ in pieces:
            pack_into(out, at, magic, 0, request.cookie)
            at += 16
            batch.append((offset, out[at : at + length]))
            at += length
        return batch

    def block_status(self, request: Request, statuses: Statuses) -> bytes:
        raise AssertionError("BLOCK_STATUS needs structured replies")


class StructuredReplies(SimpleReplies):
    """Chunks for READ and BLOCK_STATUS."""

    in_pieces = True
    header_bytes = _DATA_CHUNK.size

    def error(self, request: Request, error: int, text: str) -> bytes:
        if request.command not in (c.NBD_CMD_READ, c.NBD_CMD_BLOCK_STATUS):
            return super().error(request, error, text)
        return self._chunk(request, True, c.NBD_REPLY_TYPE_ERROR, _error_payload(error, text))

    def nothing(self, request: Request) -> bytes:
        """A chunk of data must not be empty."""
        return self._chunk(request, True, c.NBD_REPLY_TYPE_NONE, b"")

    def lay_out(self, out: memoryview, pieces: Sequence[Piece]) -> list[tuple[int, memoryview]]:
        at, batch = 0, []
        pack_into, magic = _DATA_CHUNK.pack_into, c.NBD_STRUCTURED_REPLY_MAGIC
        for request, offset, length, last in pieces:
            pack_into(out, at, magic, last, c.NBD_REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + length, offset)
            at += 28
            batch.append((offset, out[at : at + length]))
            at += length
        return batch

    def block_status(self, request: Request, statuses: Statuses) -> bytes:
        """One chunk for each context."""
        parts = []
        for index, (context, extents) in enumerate(statuses, 1):
            numbers = [number for extent in extents for number in extent]
            body = struct.pack(f">I{len(numbers)}I", context, *numbers)
            parts.append(self._chunk(request, index == len(statuses), c.NBD_REPLY_TYPE_BLOCK_STATUS, body))
        return b"".join(parts)

    @staticmethod
    def _chunk(request: Request, last: bool, kind: int, payload: bytes) -> bytes:
        return _CHUNK.pack(c.NBD_STRUCTURED_REPLY_MAGIC, last, kind, request.cookie, len(payload)) + payload


class ExtendedReplies(StructuredReplies):
    """A header of 32 bytes in front of everything."""

    header_bytes = _EXTENDED_DATA.size

    def done(self, requests: Sequence[Request]) -> list[bytes]:
        pack, magic, flag, none = _EXTENDED.pack, c.NBD_EXTENDED_REPLY_MAGIC, c.NBD_REPLY_FLAG_DONE, c.NBD_REPLY_TYPE_NONE
        return [pack(magic, flag, none, request.cookie, 0) for request in requests]

    def error(self, request: Request, error: int, text: str) -> bytes:
        return self._chunk(request, True, c.NBD_REPLY_TYPE_ERROR, _error_payload(error, text))

    def lay_out(self, out: memoryview, pieces: Sequence[Piece]) -> list[tuple[int, memoryview]]:
        at, batch = 0, []
        pack_into, magic = _EXTENDED_DATA.pack_into, c.NBD_EXTENDED_REPLY_MAGIC
        for request, offset, length, last in pieces:
            pack_into(out, at, magic, last, c.NBD_REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + length, offset)
            at += 40
            batch.append((offset, out[at : at + length]))
            at += length
        return batch

    def block_status(self, request: Request, statuses: Statuses) -> bytes:
        parts = []
        for index, (context, extents) in enumerate(statuses, 1):
            numbers = [number for extent in extents for number in extent]
            body = struct.pack(f">II{len(numbers)}Q", context, len(extents), *numbers)
            parts.append(self._chunk(request, index == len(statuses), c.NBD_REPLY_TYPE_BLOCK_STATUS_EXT, body))
        return b"".join(parts)

    @staticmethod
    def _chunk(request: Request, last: bool, kind: int, payload: bytes) -> bytes:
        return _EXTENDED.pack(c.NBD_EXTENDED_REPLY_MAGIC, last, kind, request.cookie, len(payload)) + payload


Replies = SimpleReplies


def _error_payload(error: int, text: str) -> bytes:
    message = text.encode(errors="replace")[: c.MAX_NAME_BYTES].decode(errors="ignore").encode()
    return struct.pack(">IH", error, len(message)) + message

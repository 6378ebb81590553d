"""The transmission phase without I/O: requests out of a byte stream, replies into a buffer.

`RequestParser` owns the receive buffer. A connection asks it for `space`, receives straight into that, and gets all
complete requests at once; payloads are views into the buffer, never copies. They stay valid until the next `space`.

A payload is never moved once it has begun to arrive, unless the buffer ends before it does; so the buffer is larger than
most requests, and what it takes depends on what the client sends, up to one request of `MAX_REQUEST_BYTES`.

The functions at the end pack replies. Where the client negotiated structured replies, READ and BLOCK_STATUS use them, and
everything else is answered by the shorter simple reply, as the protocol allows.
"""

from __future__ import annotations

import mmap
import struct
from typing import NamedTuple

from nbd_export import constants as c

__all__ = [
    "Request",
    "RequestParser",
    "ProtocolError",
    "lazy_buffer",
    "SIMPLE_REPLY",
    "CHUNK",
    "DATA_CHUNK",
    "pack_error_chunk",
    "pack_block_status",
]

_REQUEST = struct.Struct(">IHHQQI")
_SMALL_BYTES = 256 << 10
_USUAL_BYTES = 8 << 20
_WHOLE_BYTES = c.MAX_REQUEST_BYTES + _SMALL_BYTES
_MOVE_MAX_BYTES = 64 << 10
_BATCH_MAX = 256  # requests handled before anything else gets its turn

SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
DATA_CHUNK = struct.Struct(">IHHQIQ")  # a CHUNK with the offset that OFFSET_DATA begins with


class ProtocolError(Exception):
    """The client sent something after which the stream cannot be followed."""


class Request(NamedTuple):
    """One request. ``payload`` only for WRITE."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: memoryview | None


def lazy_buffer(size_bytes: int) -> memoryview:
    """A buffer whose pages cost memory only when they are touched."""
    return memoryview(mmap.mmap(-1, size_bytes))


class RequestParser:
    """Turns received bytes into batches of requests. Raises `ProtocolError` where there is no way on."""

    def __init__(self) -> None:
        self._buffer = lazy_buffer(_SMALL_BYTES)
        self._start = self._end = 0
        self._missing = 0  # bytes that the request at _start still lacks, as far as known

    @property
    def buffered_bytes(self) -> int:
        return self._end - self._start

    def feed(self, data: bytes) -> None:
        """Take bytes that were received elsewhere."""
        while data:
            space = self.space()
            count = min(len(space), len(data))
            space[:count] = data[:count]
            self.received(count)
            data = data[count:]

    def space(self) -> memoryview:
        """Where the next bytes go. Invalidates the payloads of the last batch."""
        held = self._end - self._start
        if not held:
            self._start = self._end = 0
        room = len(self._buffer) - self._end
        if self._start and (room < self._missing or room < _SMALL_BYTES // 2):
            if room < self._missing or held <= _MOVE_MAX_BYTES:
                self._move_to(self._buffer)
                room = len(self._buffer) - self._end
        if room < self._missing or not room:
            needed = self._end - self._start + self._missing
            self._move_to(lazy_buffer(_USUAL_BYTES if needed <= _USUAL_BYTES else _WHOLE_BYTES))
        return self._buffer[self._end :]

    def _move_to(self, target: memoryview) -> None:
        held = self._end - self._start
        target[:held] = bytes(self._buffer[self._start : self._end])
        self._buffer, self._start, self._end = target, 0, held

    def received(self, count: int) -> None:
        """Say that ``count`` bytes of `space` were filled."""
        self._end += count

    def requests(self) -> list[Request]:
        """All complete requests that are in the buffer (at most a batch)."""
        batch: list[Request] = []
        buffer, start, end = self._buffer, self._start, self._end
        unpack, make, header_bytes = _REQUEST.unpack_from, tuple.__new__, _REQUEST.size
        missing = 0
        while end - start >= header_bytes and len(batch) < _BATCH_MAX:
            magic, flags, command, cookie, offset, length = unpack(buffer, start)
            if magic != c.NBD_REQUEST_MAGIC:
                raise ProtocolError(f"request magic {magic:#x} is not {c.NBD_REQUEST_MAGIC:#x}")
            payload = None
            if command == c.NBD_CMD_WRITE:
                if length > c.MAX_REQUEST_BYTES:
                    raise ProtocolError(f"a write of {length} bytes exceeds the limit of {c.MAX_REQUEST_BYTES}")
                missing = start + header_bytes + length - end
                if missing > 0:
                    break
                payload = buffer[start + header_bytes : start + header_bytes + length]
                start += length
            start += header_bytes
            batch.append(make(Request, (command, flags, cookie, offset, length, payload)))
        self._start, self._missing = start, max(0, missing)
        return batch

    @property
    def has_request(self) -> bool:
        """Whether a batch was cut short, so `requests` may give more without receiving."""
        return self._end - self._start >= _REQUEST.size and not self._missing


def pack_error_chunk(cookie: int, error: int, text: str = "") -> bytes:
    """The final chunk of a structured reply that failed."""
    message = text.encode()[: c.MAX_NAME_BYTES]
    body = struct.pack(">IH", error, len(message)) + message
    header = CHUNK.pack(
        c.NBD_STRUCTURED_REPLY_MAGIC, c.NBD_REPLY_FLAG_DONE, c.NBD_REPLY_TYPE_ERROR, cookie, len(body)
    )  # fmt: skip
    return header + body


def pack_block_status(cookie: int, contexts: list[tuple[int, list[tuple[int, int]]]]) -> bytes:
    """One BLOCK_STATUS chunk for each (context id, [(length in bytes, flags)]); the last one ends the reply."""
    parts = []
    for index, (context, extents) in enumerate(contexts):
        done = c.NBD_REPLY_FLAG_DONE if index == len(contexts) - 1 else 0
        numbers = [number for extent in extents for number in extent]
        body = struct.pack(f">I{len(numbers)}I", context, *numbers)
        parts.append(
            CHUNK.pack(c.NBD_STRUCTURED_REPLY_MAGIC, done, c.NBD_REPLY_TYPE_BLOCK_STATUS, cookie, len(body)) + body
        )
    return b"".join(parts)

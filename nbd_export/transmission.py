"""The transmission phase without I/O: requests out of a byte stream, replies into a buffer.

`RequestParser` owns the receive buffer. A connection asks it for `space`, receives straight into that, and gets all
complete requests at once; payloads are views into the buffer, never copies. They stay valid until the next `space`.

The buffer is small and its beginning is used again at once, so that what was received is still in the CPU's cache when it is
written. A large WRITE is therefore handed on in pieces as it arrives (NBD does not promise that a write is atomic), unless
it is one that will be refused: that is received whole, up to `MAX_REQUEST_BYTES`, and refused at its end.

Clients that negotiated extended headers are read by `ExtendedRequestParser`. Replies are in `nbd_export.replies`.
"""

from __future__ import annotations

import mmap
import struct
from typing import NamedTuple

from nbd_export import constants as c

__all__ = [
    "Request",
    "RequestParser",
    "ExtendedRequestParser",
    "NO_PAYLOAD",
    "ProtocolError",
    "PIECE_BYTES",
    "lazy_buffer",
]

_REQUEST = struct.Struct(">IHHQQI")
_EXTENDED = struct.Struct(">IHH16sQ")
_U64 = struct.Struct(">Q")
PIECE_BYTES = 512 << 10
"""A write larger than this is handed on in pieces of about this size, and structured replies to reads are sent in such pieces, so that
what was received or read is still in the CPU's cache when it moves on."""

_BUFFER_BYTES = PIECE_BYTES + (128 << 10)
_WHOLE_BYTES = c.MAX_REQUEST_BYTES + _EXTENDED.size
_MOVE_MAX_BYTES = 8192
_BLOCK_BYTES = 4096
_BATCH_MAX = 256  # requests handled before anything else gets its turn

NO_PAYLOAD = 1 << 16
"""A flag that no client can send: this WRITE has extended headers and says that it has no payload."""


class ProtocolError(Exception):
    """The client sent something after which the stream cannot be followed."""


class Request(NamedTuple):
    """One request. ``payload`` only for WRITE; ``final`` is False for all pieces of a WRITE but its last. ``cookie`` is what the reply repeats
    (`nbd_export.replies`)."""

    command: int
    flags: int
    cookie: int | bytes
    offset: int
    length: int
    payload: memoryview | None
    final: bool


def lazy_buffer(size_bytes: int) -> memoryview:
    """A buffer whose pages cost memory only when they are touched."""
    return memoryview(mmap.mmap(-1, size_bytes))


class RequestParser:
    """Turns received bytes into batches of requests. Raises `ProtocolError` where there is no way on.

    ``writable_bytes``: writes that end within so many bytes may be handed on in pieces.
    """

    _header_bytes = _REQUEST.size

    def __init__(self, writable_bytes: int = 0) -> None:
        self.writable_bytes = writable_bytes
        self._buffer = lazy_buffer(_BUFFER_BYTES)
        self._start = self._end = 0
        self._missing = 0  # bytes that the request at _start still lacks, as far as known
        self._open: tuple[int, int | bytes, int, int] | None = None  # flags, cookie, offset, length left of a write in pieces

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
        if self._start and (held <= _MOVE_MAX_BYTES or self._start + held + self._missing > len(self._buffer)):
            self._buffer[:held] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, held
        if held + self._missing > len(self._buffer) or held == len(self._buffer):
            larger = lazy_buffer(_WHOLE_BYTES)
            larger[:held] = self._buffer[self._start : self._end]
            self._buffer, self._start, self._end = larger, 0, held
        elif not held and len(self._buffer) > _BUFFER_BYTES:
            self._buffer = lazy_buffer(_BUFFER_BYTES)
        if self._missing > _MOVE_MAX_BYTES:  # no more than ends this payload and shows the next header
            return self._buffer[self._end : self._end + self._missing + self._header_bytes]
        return self._buffer[self._end :]

    def received(self, count: int) -> None:
        """Say that ``count`` bytes of `space` were filled."""
        self._end += count

    def requests(self) -> list[Request]:
        """All complete requests that are in the buffer (at most a batch)."""
        batch: list[Request] = []
        if self._open is not None and not self._continue(batch):
            return batch
        buffer, start, end = self._buffer, self._start, self._end
        unpack, make, header_bytes = _REQUEST.unpack_from, tuple.__new__, _REQUEST.size
        self._missing = 0
        while end - start >= header_bytes and len(batch) < _BATCH_MAX:
            magic, flags, command, cookie, offset, length = unpack(buffer, start)
            if magic != c.NBD_REQUEST_MAGIC:
                raise ProtocolError(f"request magic {magic:#x} is not {c.NBD_REQUEST_MAGIC:#x}")
            payload = None
            if command == c.NBD_CMD_WRITE:
                if length > c.MAX_REQUEST_BYTES:
                    raise ProtocolError(f"a write of {length} bytes exceeds the limit of {c.MAX_REQUEST_BYTES}")
                if length > PIECE_BYTES and offset + length <= self.writable_bytes:
                    self._start, self._open = start + header_bytes, (flags, cookie, offset, length)
                    if not self._continue(batch):
                        return batch
                    start = self._start
                    continue
                missing = start + header_bytes + length - end
                if missing > 0:
                    self._missing = missing
                    break
                payload = buffer[start + header_bytes : start + header_bytes + length]
                start += length
            start += header_bytes
            batch.append(make(Request, (command, flags, cookie, offset, length, payload, True)))
        self._start = start
        return batch

    def _continue(self, batch: list[Request]) -> bool:
        """Hand on the next piece of the open write, if enough of it is there; True when the write is complete."""
        flags, cookie, offset, left = self._open
        count = min(self._end - self._start, left)
        if count < left:
            if count < PIECE_BYTES:
                self._missing = min(left, PIECE_BYTES + _BLOCK_BYTES) - count
                return False
            count -= (offset + count) % _BLOCK_BYTES
        payload = self._buffer[self._start : self._start + count]
        batch.append(Request(c.NBD_CMD_WRITE, flags, cookie, offset, count, payload, count == left))
        self._start += count
        if count == left:
            self._open = None
            return True
        self._open = flags, cookie, offset + count, left - count
        self._missing = max(0, min(left - count, PIECE_BYTES + _BLOCK_BYTES) - (self._end - self._start))
        return False

    @property
    def has_request(self) -> bool:
        """Whether a batch was cut short, so `requests` may give more without receiving."""
        return self._open is None and not self._missing and self._end - self._start >= self._header_bytes


class ExtendedRequestParser(RequestParser):
    """Requests with extended headers: 64-bit lengths, and any command may bring a payload.

    The payload of a BLOCK_STATUS (8 bytes that are its real length, then the ids of the contexts it is about) is handed on as such; that of any
    other command but WRITE is skipped, and the flag left for the connection to refuse.
    """

    _header_bytes = _EXTENDED.size

    def requests(self) -> list[Request]:
        batch: list[Request] = []
        if self._open is not None and not self._continue(batch):
            return batch
        buffer, start, end = self._buffer, self._start, self._end
        unpack, header_bytes, has_payload = _EXTENDED.unpack_from, _EXTENDED.size, c.NBD_CMD_FLAG_PAYLOAD_LEN
        self._missing = 0
        while end - start >= header_bytes and len(batch) < _BATCH_MAX:
            magic, flags, command, cookie, length = unpack(buffer, start)
            if magic != c.NBD_EXTENDED_REQUEST_MAGIC:
                raise ProtocolError(f"request magic {magic:#x} is not {c.NBD_EXTENDED_REQUEST_MAGIC:#x}")
            (offset,) = _U64.unpack_from(cookie, 8)
            payload = None
            if flags & has_payload:
                if length > c.MAX_REQUEST_BYTES:
                    raise ProtocolError(f"a payload of {length} bytes exceeds the limit of {c.MAX_REQUEST_BYTES}")
                if command == c.NBD_CMD_WRITE:
                    flags &= ~has_payload
                    if length > PIECE_BYTES and offset + length <= self.writable_bytes:
                        self._start, self._open = start + header_bytes, (flags, cookie, offset, length)
                        if not self._continue(batch):
                            return batch
                        start = self._start
                        continue
                missing = start + header_bytes + length - end
                if missing > 0:
                    self._missing = missing
                    break
                payload = buffer[start + header_bytes : start + header_bytes + length]
                start += length
            elif command == c.NBD_CMD_WRITE:
                flags |= NO_PAYLOAD
            start += header_bytes
            batch.append(Request(command, flags, cookie, offset, length, payload, True))
        self._start = start
        return batch

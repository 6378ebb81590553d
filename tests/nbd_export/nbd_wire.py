"""An NBD client made of bytes: what tests need to say things that well-behaved libraries refuse to say.

`ReplyReader` turns received bytes into `Reply` objects and is strict about all that the protocol promises: magics, chunks of
one reply that never touch the same byte twice, exactly one DONE, nothing after it. `WireClient` puts a blocking socket
around it; the in-process tests have a trio one of their own (conftest.py).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from nbd_export import constants as c

READ, WRITE, FLUSH, TRIM = c.NBD_CMD_READ, c.NBD_CMD_WRITE, c.NBD_CMD_FLUSH, c.NBD_CMD_TRIM
CACHE, ZEROES, STATUS, DISC = c.NBD_CMD_CACHE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_BLOCK_STATUS, c.NBD_CMD_DISC
FUA, NO_HOLE, DF, REQ_ONE = c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_NO_HOLE, c.NBD_CMD_FLAG_DF, c.NBD_CMD_FLAG_REQ_ONE
FAST_ZERO = c.NBD_CMD_FLAG_FAST_ZERO
KIB, MIB = 1 << 10, 1 << 20

PAYLOAD_LEN = c.NBD_CMD_FLAG_PAYLOAD_LEN

REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
MODERN = struct.pack(">I", c.NBD_FLAG_C_FIXED_NEWSTYLE | c.NBD_FLAG_C_NO_ZEROES)


def request(command: int, cookie: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    """The bytes of a request; the length is the payload's where none is given."""
    return REQUEST.pack(c.NBD_REQUEST_MAGIC, flags, command, cookie, offset, length or len(payload)) + payload


def extended_request(
    command: int, cookie: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
) -> bytes:
    """The same with extended headers; the flag that says that there is a payload is set where there is one."""
    if payload:
        length, flags = len(payload), flags | PAYLOAD_LEN
    return EXTENDED_REQUEST.pack(c.NBD_EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def go(name: str) -> bytes:
    encoded = name.encode()
    return option(c.NBD_OPT_GO, struct.pack(">I", len(encoded)) + encoded + struct.pack(">H", 0))


def export_name(name: bytes) -> bytes:
    return option(c.NBD_OPT_EXPORT_NAME, name)


def set_meta_context(name: str, *queries: str) -> bytes:
    parts = [struct.pack(">I", len(name)), name.encode(), struct.pack(">I", len(queries))]
    for query in queries:
        parts += [struct.pack(">I", len(query)), query.encode()]
    return option(c.NBD_OPT_SET_META_CONTEXT, b"".join(parts))


def shake_hands_bytes(name: str, *, structured: bool = False, extended: bool = False, meta: tuple[str, ...] = ()) -> bytes:
    """All that a client says before transmission, in one go."""
    parts = [MODERN]
    if extended:
        parts.append(option(c.NBD_OPT_EXTENDED_HEADERS))
    elif structured:
        parts.append(option(c.NBD_OPT_STRUCTURED_REPLY))
    if meta:
        parts.append(set_meta_context(name, *meta))
    parts.append(go(name))
    return b"".join(parts)


class Chunk(NamedTuple):
    """One chunk of a structured reply."""

    kind: int
    done: bool
    payload: bytes


@dataclass
class Reply:
    """One complete reply. ``data`` is what a READ without error gave."""

    cookie: int
    error: int
    data: bytes = b""
    text: str = ""
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def extents(self) -> dict[int, list[tuple[int, int]]]:
        """Of a BLOCK_STATUS: context id -> [(length, flags)]."""
        found = {}
        for chunk in self.chunks:
            if chunk.kind == c.NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
                ident, count, *rest = struct.unpack(f">II{len(chunk.payload) // 8 - 1}Q", chunk.payload)
                assert count == len(rest) // 2
                numbers = (ident, *rest)
            else:
                assert chunk.kind == c.NBD_REPLY_TYPE_BLOCK_STATUS
                numbers = struct.unpack(f">{len(chunk.payload) // 4}I", chunk.payload)
            assert numbers[0] not in found, "two chunks for one context"
            found[numbers[0]] = list(zip(numbers[1::2], numbers[2::2], strict=True))
        return found


class _Pending(NamedTuple):
    command: int
    offset: int
    length: int


class ReplyReader:
    """Replies out of a byte stream. Tell it of every request with `expect`; then `feed` what arrives."""

    def __init__(self, structured: bool, extended: bool = False) -> None:
        self.structured, self.extended = structured, extended
        self.replies: dict[int, Reply] = {}
        self.order: list[int] = []  # cookies in the order in which their replies were completed
        self._pending: dict[int, _Pending] = {}
        self._partial: dict[int, tuple[bytearray, bytearray, list[Chunk]]] = {}
        self._buffer = bytearray()

    def expect(self, command: int, cookie: int, offset: int, length: int) -> None:
        assert cookie not in self._pending
        self._pending[cookie] = _Pending(command, offset, length)

    @property
    def waiting(self) -> int:
        """How many replies are still to come."""
        return len(self._pending)

    def feed(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while used := self._one(memoryview(self._buffer)[at:]):
            at += used
        del self._buffer[:at]

    def _one(self, view: memoryview) -> int:
        with view:
            if len(view) < 16:
                return 0
            (magic,) = struct.unpack_from(">I", view)
            if self.extended:
                assert magic == c.NBD_EXTENDED_REPLY_MAGIC, f"the reply begins with {bytes(view[:16]).hex()}"
                return self._extended(view)
            if magic == c.NBD_SIMPLE_REPLY_MAGIC:
                return self._simple(view)
            assert magic == c.NBD_STRUCTURED_REPLY_MAGIC, f"the reply begins with {bytes(view[:16]).hex()}"
            return self._structured(view)

    def _simple(self, view: memoryview) -> int:
        _, error, cookie = struct.unpack_from(">IIQ", view)
        assert cookie in self._pending, f"a reply with cookie {cookie}, which nobody waits for"
        pending = self._pending[cookie]
        is_read = pending.command == c.NBD_CMD_READ
        assert not (is_read and self.structured), "a READ was answered by a simple reply after STRUCTURED_REPLY"
        length = pending.length if is_read and not error else 0
        if len(view) < 16 + length:
            return 0
        self._complete(Reply(cookie, error, bytes(view[16 : 16 + length])))
        return 16 + length

    def _structured(self, view: memoryview) -> int:
        if len(view) < 20:
            return 0
        _, flags, kind, cookie, length = struct.unpack_from(">IHHQI", view)
        assert self.structured, "a structured reply that was not negotiated"
        assert cookie in self._pending, f"a chunk with cookie {cookie}, which nobody waits for"
        assert not flags & ~c.NBD_REPLY_FLAG_DONE
        if len(view) < 20 + length:
            return 0
        chunk = Chunk(kind, bool(flags & c.NBD_REPLY_FLAG_DONE), bytes(view[20 : 20 + length]))
        self._take(cookie, self._pending[cookie], chunk)
        return 20 + length

    def _extended(self, view: memoryview) -> int:
        if len(view) < 32:
            return 0
        _, flags, kind, cookie, offset, length = struct.unpack_from(">IHHQQQ", view)
        assert cookie in self._pending, f"a chunk with cookie {cookie}, which nobody waits for"
        assert offset == self._pending[cookie].offset, "the reply does not repeat the offset of the request"
        assert not flags & ~c.NBD_REPLY_FLAG_DONE
        assert kind != c.NBD_REPLY_TYPE_BLOCK_STATUS, "32-bit extents in an extended reply"
        if len(view) < 32 + length:
            return 0
        chunk = Chunk(kind, bool(flags & c.NBD_REPLY_FLAG_DONE), bytes(view[32 : 32 + length]))
        self._take(cookie, self._pending[cookie], chunk)
        return 32 + length

    def _take(self, cookie: int, pending: _Pending, chunk: Chunk) -> None:
        size = pending.length if pending.command == c.NBD_CMD_READ else 0
        if cookie not in self._partial:
            room = size if chunk.kind == c.NBD_REPLY_TYPE_OFFSET_DATA else 0
            self._partial[cookie] = bytearray(room), bytearray(room), []
        data, seen, chunks = self._partial[cookie]
        chunks.append(chunk)
        error, text = 0, ""
        if chunk.kind == c.NBD_REPLY_TYPE_OFFSET_DATA:
            (offset,) = struct.unpack_from(">Q", chunk.payload)
            begin, end = offset - pending.offset, offset - pending.offset + len(chunk.payload) - 8
            assert 0 <= begin < end <= size, f"a chunk for {offset}+{end - begin}, outside of the request"
            assert seen.find(1, begin, end) < 0, "two chunks for the same bytes"
            data[begin:end] = chunk.payload[8:]
            seen[begin:end] = b"\1" * (end - begin)
        elif chunk.kind == c.NBD_REPLY_TYPE_ERROR:
            error, length = struct.unpack_from(">IH", chunk.payload)
            assert error and length == len(chunk.payload) - 6
            text = chunk.payload[6:].decode()
        elif chunk.kind == c.NBD_REPLY_TYPE_NONE:
            assert chunk.done and not chunk.payload
        else:
            assert chunk.kind in (c.NBD_REPLY_TYPE_BLOCK_STATUS, c.NBD_REPLY_TYPE_BLOCK_STATUS_EXT) and pending.command == c.NBD_CMD_BLOCK_STATUS
        if chunk.done:
            del self._partial[cookie]
            assert error or (len(seen) == size and 0 not in seen), "the reply ended before all bytes were there"
            self._complete(Reply(cookie, error, b"" if error else bytes(data), text, chunks))

    def _complete(self, reply: Reply) -> None:
        del self._pending[reply.cookie]
        self.replies[reply.cookie] = reply
        self.order.append(reply.cookie)


class WireClient:
    """A blocking client on ``sock``. Use `WireClient.connect` to get to the transmission phase."""

    def __init__(self, sock: socket.socket, structured: bool = False, extended: bool = False) -> None:
        self.sock = sock
        self.reader = ReplyReader(structured or extended, extended)
        self._request = extended_request if extended else request
        self._cookie = 0

    @classmethod
    def connect(
        cls, path: str, name: str = "", *, structured: bool = False, extended: bool = False, timeout_s: float = 120
    ) -> WireClient:
        """Connect to a unix socket and shake hands for export ``name``."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.connect(path)
            assert cls._exactly(sock, 18)[:16] == b"NBDMAGICIHAVEOPT"
            sock.sendall(shake_hands_bytes(name, structured=structured, extended=extended))
            replies = 0
            while replies < (2 if structured or extended else 1):
                _, number, kind, length = struct.unpack(">QIII", cls._exactly(sock, 20))
                text = cls._exactly(sock, length)
                assert not kind & c.NBD_REP_FLAG_ERROR, f"option {number} of {name!r}: {kind:#x} {text!r}"
                replies += kind == c.NBD_REP_ACK
        except BaseException:
            sock.close()
            raise
        return cls(sock, structured, extended)

    @staticmethod
    def _exactly(sock: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = sock.recv(count - len(data))
            if not piece:
                raise ConnectionError("the server closed the connection")
            data += piece
        return data

    def __enter__(self) -> WireClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0) -> int:
        """Send one request and return its cookie."""
        self._cookie += 1
        self.reader.expect(command, self._cookie, offset, length or len(payload))
        self.sock.sendall(self._request(command, self._cookie, offset, length or len(payload), payload, flags))
        return self._cookie

    def receive(self) -> None:
        """Wait for some bytes. Raises ConnectionError when the server has closed."""
        data = self.sock.recv(1 << 20)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.reader.feed(data)

    def reply(self, cookie: int) -> Reply:
        while cookie not in self.reader.replies:
            self.receive()
        return self.reader.replies.pop(cookie)

    def call(self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0) -> Reply:
        return self.reply(self.send(command, offset, length, payload, flags))

    def read(self, offset: int, length: int) -> bytes:
        reply = self.call(c.NBD_CMD_READ, offset, length)
        assert not reply.error, f"read of {offset}+{length}: error {reply.error} {reply.text}"
        return reply.data

    def write(self, offset: int, payload: bytes, flags: int = 0) -> None:
        reply = self.call(c.NBD_CMD_WRITE, offset, payload=payload, flags=flags)
        assert not reply.error, f"write of {offset}+{len(payload)}: error {reply.error}"

    def flush(self) -> None:
        assert not self.call(c.NBD_CMD_FLUSH).error

    def disconnect(self) -> None:
        """Say DISC and wait until the server has closed."""
        self.sock.sendall(self._request(c.NBD_CMD_DISC, 0))
        while data := self.sock.recv(1 << 20):
            self.reader.feed(data)
        self.sock.close()

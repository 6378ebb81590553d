"""The parser of requests: however the bytes are cut, the same requests come out, and memory stays bounded."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_wire import extended_request, request

from nbd_export import constants as c
from nbd_export.transmission import PIECE_BYTES, ExtendedRequestParser, ProtocolError, Request, RequestParser

DISK_BYTES = 1 << 40
KIB, MIB = 1 << 10, 1 << 20
BUFFER_MAX_BYTES = c.MAX_REQUEST_BYTES + MIB

Whole = tuple[int, int, int, int, int, bytes | None]
"""(command, flags, cookie, offset, length, payload) of a request whose pieces were put together"""


class Collector:
    """Drives a parser as a connection does, puts pieces together and checks them on the way."""

    def __init__(self, writable_bytes: int = DISK_BYTES) -> None:
        self.parser = RequestParser(writable_bytes)
        self.whole: list[Whole] = []
        self.pieces = 0
        self.batches: list[int] = []
        self._open: list[tuple[Request, bytes]] = []

    def feed(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            space = self.parser.space()
            assert len(space), "no space for the next bytes"
            count = min(len(space), len(view))
            space[:count] = view[:count]
            self.parser.received(count)
            view = view[count:]
            self._drain()

    def _drain(self) -> None:
        while batch := self.parser.requests():
            self.batches.append(len(batch))
            for one in batch:
                self._take(one)
            if not self.parser.has_request:
                break
        assert not self.parser.has_request or self.parser.requests() == []

    def _take(self, one: Request) -> None:
        assert one.payload is None or len(one.payload) == one.length
        assert (one.payload is None) == (one.command != c.NBD_CMD_WRITE)
        if self._open:
            first, _ = self._open[0]
            last, _ = self._open[-1]
            assert one[:3] == first[:3] and one.offset == last.offset + last.length, "a piece that does not continue the last"
        payload = None if one.payload is None else bytes(one.payload)
        if not one.final:
            self.pieces += 1
            assert one.command == c.NBD_CMD_WRITE and (one.offset + one.length) % 4096 == 0, "a piece ends within a block"
            self._open.append((one, payload))
            return
        offset = self._open[0][0].offset if self._open else one.offset
        if self._open:
            payload = b"".join(part for _, part in self._open) + payload
        length = one.length if payload is None else len(payload)
        self.whole.append((one.command, one.flags, one.cookie, offset, length, payload))
        self._open = []


def whole(data: bytes) -> list[Whole]:
    """What `data` means, found by reading it as the protocol document says."""
    found, at = [], 0
    while at < len(data):
        magic, flags, command, cookie, offset, length = struct.unpack_from(">IHHQQI", data, at)
        assert magic == c.NBD_REQUEST_MAGIC
        at += 28
        payload = None
        if command == c.NBD_CMD_WRITE:
            payload = data[at : at + length]
            at += length
        found.append((command, flags, cookie, offset, length, payload))
    return found


def cut(data: bytes, *places: int) -> list[bytes]:
    edges = [0, *sorted(places), len(data)]
    return [data[begin:end] for begin, end in zip(edges, edges[1:])]


def parsed(pieces: list[bytes], writable_bytes: int = DISK_BYTES) -> list[Whole]:
    collector = Collector(writable_bytes)
    for piece in pieces:
        collector.feed(piece)
    return collector.whole


def random_bytes(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


MIXED = b"".join(
    [
        request(c.NBD_CMD_READ, 1, 0, 4096),
        request(c.NBD_CMD_WRITE, 2, 8192, payload=b"abc" * 5, flags=c.NBD_CMD_FLAG_FUA),
        request(c.NBD_CMD_WRITE, 3, 5),
        request(c.NBD_CMD_FLUSH, 4),
        request(77, 5, 2**64 - 1, 2**32 - 1, flags=0xFFFF),
        request(c.NBD_CMD_WRITE, 2**64 - 1, 2**64 - 1, payload=b"\x25\x60\x95\x13" * 8),
        request(c.NBD_CMD_WRITE_ZEROES, 7, 1, 2**32 - 1),
        request(c.NBD_CMD_DISC, 8),
    ]
)
"""Every shape of request, and a payload that looks like headers."""


def test_requests_come_out_as_they_went_in():
    assert parsed([MIXED]) == whole(MIXED)


def test_one_byte_at_a_time():
    assert parsed([MIXED[at : at + 1] for at in range(len(MIXED))]) == whole(MIXED)


def test_every_cut_in_two():
    for place in range(1, len(MIXED)):
        assert parsed(cut(MIXED, place)) == whole(MIXED), f"cut at {place}"


def test_every_cut_in_three_of_two_requests():
    data = request(c.NBD_CMD_WRITE, 1, 0, payload=b"payload") + request(c.NBD_CMD_READ, 2, 0, 1)
    for first in range(1, len(data)):
        for second in range(first, len(data)):
            assert parsed(cut(data, first, second)) == whole(data), f"cut at {first} and {second}"


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([c.NBD_CMD_READ, c.NBD_CMD_WRITE, c.NBD_CMD_FLUSH, c.NBD_CMD_TRIM, c.NBD_CMD_BLOCK_STATUS, 99]),
        st.integers(0, 2**64 - 1),
        st.one_of(st.integers(0, DISK_BYTES + 10), st.integers(0, 2**64 - 1)),
        st.one_of(st.integers(0, 100), st.integers(0, 20_000), st.integers(PIECE_BYTES - 2, 4 * PIECE_BYTES)),
        st.integers(0, 0xFFFF),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, data=st.data())
def test_any_requests_in_any_pieces(requests, data):
    stream = b"".join(
        request(command, cookie, offset, length, bytes([cookie % 251 + 1]) * length, flags)
        if command == c.NBD_CMD_WRITE
        else request(command, cookie, offset, length, flags=flags)
        for command, cookie, offset, length, flags in requests
    )
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=20))
    assert parsed(cut(stream, *places)) == whole(stream)


@pytest.mark.parametrize("piece_bytes", [28, 4095, 4096, 65536, 100_003, MIB, 64 * MIB])
def test_large_payloads_in_pieces_of_any_size(piece_bytes):
    stream = b"".join(
        [
            request(c.NBD_CMD_WRITE, 1, 4096 * 7 + 512, payload=random_bytes(1, MIB)),
            request(c.NBD_CMD_READ, 2, 0, 4096),
            request(c.NBD_CMD_WRITE, 3, 0, payload=random_bytes(2, 3 * MIB + 1)),
            request(c.NBD_CMD_WRITE, 4, 123, payload=random_bytes(3, PIECE_BYTES + 1)),
            request(c.NBD_CMD_WRITE, 5, 123, payload=random_bytes(4, PIECE_BYTES)),
            request(c.NBD_CMD_FLUSH, 6),
        ]
    )
    assert parsed(cut(stream, *range(piece_bytes, len(stream), piece_bytes))) == whole(stream)


@pytest.mark.parametrize("writable_bytes", [DISK_BYTES, 0], ids=["to be written", "to be refused"])
def test_the_largest_payload(writable_bytes):
    payload = random_bytes(5, c.MAX_REQUEST_BYTES)
    stream = request(c.NBD_CMD_WRITE, 1, 8192, payload=payload, flags=c.NBD_CMD_FLAG_FUA) + MIXED
    collector = Collector(writable_bytes)
    collector.feed(stream)
    assert collector.whole == whole(stream)
    assert bool(collector.pieces) == bool(writable_bytes), "what will be refused must be refused once, so it comes whole"


def test_a_write_that_ends_beyond_the_disk_comes_whole():
    stream = request(c.NBD_CMD_WRITE, 1, DISK_BYTES - MIB, payload=random_bytes(6, MIB + 1))
    collector = Collector()
    collector.feed(stream + MIXED)
    assert collector.whole == whole(stream + MIXED) and not collector.pieces


def test_a_write_with_extended_headers_that_ends_beyond_the_disk_comes_whole():
    parser = ExtendedRequestParser(DISK_BYTES)
    for offset, is_whole in ((DISK_BYTES - MIB, False), (DISK_BYTES - MIB + 512, True)):
        payload = random_bytes(7, MIB)
        view, taken = memoryview(extended_request(c.NBD_CMD_WRITE, 1, offset, payload=payload)), []
        while view:
            space = parser.space()
            count = min(len(space), len(view))
            space[:count] = view[:count]
            parser.received(count)
            view = view[count:]
            taken += [(one.offset, bytes(one.payload), one.final) for one in parser.requests()]
        assert b"".join(piece for _, piece, _ in taken) == payload and (len(taken) == 1) == is_whole
        assert taken[0][0] == offset and [final for *_, final in taken] == [False] * (len(taken) - 1) + [True]


def test_a_write_up_to_the_very_end_may_come_in_pieces():
    stream = request(c.NBD_CMD_WRITE, 1, DISK_BYTES - MIB, payload=random_bytes(6, MIB))
    collector = Collector()
    collector.feed(stream)
    assert collector.whole == whole(stream) and collector.pieces


def test_payloads_are_views_and_stay_until_more_space_is_asked_for():
    parser = RequestParser(DISK_BYTES)
    parser.feed(b"".join(request(c.NBD_CMD_WRITE, n, 0, payload=bytes([n]) * 4096) for n in range(1, 9)))
    batch = parser.requests()
    assert [bytes(one.payload) for one in batch] == [bytes([n]) * 4096 for n in range(1, 9)]
    assert all(isinstance(one.payload, memoryview) for one in batch)
    assert len({id(one.payload.obj) for one in batch}) == 1, "payloads were copied"


def test_a_batch_has_a_limit_and_the_rest_comes_without_receiving():
    parser = RequestParser(DISK_BYTES)
    parser.feed(b"".join(request(c.NBD_CMD_READ, n, 0, 1) for n in range(1000)))
    sizes, cookies = [], []
    while batch := parser.requests():
        sizes.append(len(batch))
        cookies += [one.cookie for one in batch]
        assert parser.has_request == (len(cookies) < 1000)
    assert cookies == list(range(1000)) and max(sizes) <= 256
    assert parser.buffered_bytes == 0


def test_the_limit_of_a_batch_falls_on_an_incomplete_request():
    for extra in (1, 27, 28, 29):
        stream = b"".join(request(c.NBD_CMD_READ, n, 0, 1) for n in range(256))
        tail = request(c.NBD_CMD_WRITE, 999, 0, payload=b"tail")
        collector = Collector()
        collector.feed(stream + tail[:extra])
        collector.feed(tail[extra:])
        assert collector.whole == whole(stream + tail)


def test_bytes_that_no_request_begins_with():
    parser = RequestParser(DISK_BYTES)
    parser.feed(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with pytest.raises(ProtocolError, match="magic"):
        parser.requests()


def test_a_bad_magic_is_found_as_soon_as_a_header_is_there():
    parser = RequestParser(DISK_BYTES)
    parser.feed(request(c.NBD_CMD_FLUSH, 1) + bytes(27))
    assert len(parser.requests()) == 1
    parser.feed(bytes(1))
    with pytest.raises(ProtocolError, match="magic"):
        parser.requests()


@pytest.mark.parametrize("length", [c.MAX_REQUEST_BYTES + 1, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("writable_bytes", [0, DISK_BYTES])
def test_a_write_that_is_too_long_ends_it_before_its_payload_is_received(length, writable_bytes):
    parser = RequestParser(writable_bytes)
    parser.feed(request(c.NBD_CMD_WRITE, 1, 0, length))
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        parser.requests()


@pytest.mark.parametrize("writable_bytes", [0, DISK_BYTES])
def test_the_buffer_stays_bounded_and_shrinks_again(writable_bytes):
    collector = Collector(writable_bytes)
    payload = random_bytes(7, c.MAX_REQUEST_BYTES)
    small = request(c.NBD_CMD_WRITE, 2, 0, payload=bytes(4096)) * 64
    for _ in range(2):
        data = request(c.NBD_CMD_WRITE, 1, 0, payload=payload)
        for piece in cut(data, *range(300_007, len(data), 300_007)):
            collector.feed(piece)
            assert len(collector.parser._buffer) <= BUFFER_MAX_BYTES
            assert collector.parser.buffered_bytes <= len(collector.parser._buffer)
        collector.whole.clear()
        collector.feed(small)
        collector.parser.space()
        assert len(collector.parser._buffer) <= MIB, "a connection keeps the memory of its largest request"


@pytest.mark.parametrize("length", [c.MAX_REQUEST_BYTES - 1, c.MAX_REQUEST_BYTES, 5 * MIB])
def test_many_requests_after_one_that_filled_the_buffer(length):
    """The large buffer is full to its last byte, or ends within the next request."""
    stream = request(c.NBD_CMD_WRITE, 1, 0, payload=random_bytes(8, length)) + MIXED * 200
    for writable_bytes in (0, DISK_BYTES):
        for piece_bytes in (MIB + 13, 8 * MIB):
            pieces = cut(stream, *range(piece_bytes, len(stream), piece_bytes))
            assert parsed(pieces, writable_bytes) == whole(stream)

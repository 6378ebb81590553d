"""tapdisk's NBD client byte for byte (spec: datapath 6.2), against a real daemon."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time

import pytest
from interop_tools import qemu_io
from nbd_wire import KIB, MIB, WireClient

from nbd_export import constants as c

RING = 32  # requests of a guest
SEGMENTS = 11  # of 4 KiB, that each has at most
REQUEST = struct.Struct(">IIQQI")


class Tapdisk:
    """What block-nbd.c does, read by read: each item of the negotiation is taken with one recv of its exact length, and a short one
    would not be noticed; it waits 10 s for each. Client flags do not depend on what was offered. A request is sent as its header, then its data.
    Replies are read as 16 bytes, whose magic is not looked at, then the data of a read. An error ends it for good."""

    def __init__(self, path: str) -> None:
        assert len(os.fsencode(path)) <= 107
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(120)
        self.sock.connect(path)
        assert self._item(8) == b"NBDMAGIC"
        assert self._item(8) == b"IHAVEOPT"
        assert self._item(2) == struct.pack(">H", c.NBD_FLAG_FIXED_NEWSTYLE | c.NBD_FLAG_NO_ZEROES)
        self.sock.send(struct.pack(">I", 3))
        self.sock.send(b"IHAVEOPT")
        self.sock.send(struct.pack(">I", c.NBD_OPT_EXPORT_NAME))
        self.sock.send(struct.pack(">I", 15))
        self.sock.send(b"tapdisk_client\0")
        size_bytes, self.flags = struct.unpack(">QH", self._item(10))
        self.size_bytes = size_bytes // 512 * 512
        self.in_flight: dict[int, int] = {}  # cookie -> length of a read, or 0

    def _item(self, length: int) -> bytes:
        data = self.sock.recv(length)
        assert len(data) == length, "a short read is not noticed by tapdisk"
        return data

    def ask(self, command: int, cookie: int, offset: int, data: bytes | int) -> None:
        length = data if isinstance(data, int) else len(data)
        self.in_flight[cookie] = length if command == c.NBD_CMD_READ else 0
        self.sock.sendall(REQUEST.pack(c.NBD_REQUEST_MAGIC, command, cookie, offset, length))
        if not isinstance(data, int):
            self.sock.sendall(data)

    def answer(self) -> tuple[int, int, bytes]:
        """(error, cookie, data)"""
        _, error, cookie = struct.unpack(">IIQ", self.sock.recv(16, socket.MSG_WAITALL))
        length = self.in_flight.pop(cookie)
        return error, cookie, self.sock.recv(length, socket.MSG_WAITALL) if length and not error else b""

    def answers(self) -> dict[int, bytes]:
        """All that are outstanding; none may be an error."""
        found = {}
        while self.in_flight:
            error, cookie, data = self.answer()
            assert not error, f"request {cookie} failed: the guest has no disk any more"
            found[cookie] = data
        return found

    def close(self) -> None:
        self.ask(c.NBD_CMD_DISC, 0, 0, 0)
        self.sock.close()

    def crash(self) -> None:
        self.sock.close()


@pytest.fixture
def tapdisk(disk):
    client = Tapdisk(disk["nbd_socket"])
    yield client
    client.sock.close()


def test_352_in_flight(tapdisk):
    assert tapdisk.size_bytes == 32 * MIB and tapdisk.flags & c.NBD_FLAG_HAS_FLAGS
    for n in range(RING * SEGMENTS):
        tapdisk.ask(c.NBD_CMD_WRITE, n, n * 4096, bytes([n % 255 + 1]) * 4096)
    assert sorted(tapdisk.answers()) == list(range(352))
    for n in range(RING * SEGMENTS):
        tapdisk.ask(c.NBD_CMD_READ, n, n * 4096, 4096)
    assert tapdisk.answers() == {n: bytes([n % 255 + 1]) * 4096 for n in range(352)}
    tapdisk.ask(c.NBD_CMD_DISC, 5, 0, 0)
    assert tapdisk.sock.recv(1) == b""


def test_requests_of_44_kib_and_of_single_sectors(tapdisk):
    """A guest's requests: up to 11 segments each, reads and writes mixed, against a model."""
    rng, model = random.Random(44), bytearray(32 * MIB)
    for _ in range(12):
        wanted = {}
        for cookie in range(RING):
            length = rng.choice([512, 4096, 44 * KIB, 44 * KIB, 7 * 512])
            place = cookie * MIB + rng.randrange(0, MIB - 44 * KIB, 512)  # a guest does not race with itself
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                tapdisk.ask(c.NBD_CMD_WRITE, cookie, place, data)
                model[place : place + length] = data
                wanted[cookie] = b""
            else:
                tapdisk.ask(c.NBD_CMD_READ, cookie, place, length)
                wanted[cookie] = bytes(model[place : place + length])
        assert tapdisk.answers() == wanted


def test_a_tapdisk_that_dies_and_the_next_one(shared, disk):
    """Silent close with everything in flight; what was acknowledged is there for the next one, at once."""
    rng, sure = random.Random(9), {}
    for turn in range(4):
        tapdisk = Tapdisk(disk["nbd_socket"])
        for cookie in range(RING * SEGMENTS):
            data = rng.randbytes(4096)
            tapdisk.ask(c.NBD_CMD_WRITE, cookie, cookie * 4096, data)
            sure[cookie] = [data, *sure.get(cookie, [])[:1]]
        for _ in range(100):
            error, cookie, _ = tapdisk.answer()
            assert not error
            del sure[cookie][1:]  # it is this, and nothing older
        tapdisk.crash()
        again = Tapdisk(disk["nbd_socket"])
        assert again.size_bytes == 32 * MIB
        for cookie in range(RING * SEGMENTS):
            again.ask(c.NBD_CMD_READ, cookie, cookie * 4096, 4096)
        for cookie, data in again.answers().items():
            assert data in sure[cookie] or (len(sure[cookie]) < 2 and turn == 0 and data == bytes(4096)), (turn, cookie)
        again.close()
        shared.wait_for_connections(0)
        with WireClient.connect(disk["nbd_socket"]) as reader:  # whatever was still on its way has settled
            sure = {cookie: [reader.read(cookie * 4096, 4096)] for cookie in sure}


def test_a_tapdisk_that_stops_reading_delays_nobody(shared, disk, tapdisk):
    for cookie in range(120):  # more than all buffers hold
        tapdisk.ask(c.NBD_CMD_READ, cookie, 0, 44 * KIB)
    with WireClient.connect(shared.nbd_socket, disk["uuid"]) as other:
        other.write(0, b"x" * 4096)
        assert other.read(0, 4096) == b"x" * 4096
    assert len(tapdisk.answers()) == 120


def test_the_greeting_and_the_answer_to_the_name_come_in_one_piece_each(disk):
    """Watched from outside: after each is announced as readable, all of it is there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(120)
        sock.connect(disk["nbd_socket"])
        assert select.select([sock], [], [], 120)[0] and len(sock.recv(1000)) == 18
        for piece in (b"\0\0\0\3", b"IHAVEOPT", b"\0\0\0\1", b"\0\0\0\x0f", b"tapdisk_", b"client\0"):
            time.sleep(0.01)
            sock.sendall(piece)
        assert select.select([sock], [], [], 120)[0] and len(sock.recv(1000)) == 10, "and no 124 zeros behind it"


def test_pauses_and_comes_back_while_others_are_connected(shared, disk):
    for turn in range(5):
        tapdisk = Tapdisk(disk["nbd_socket"])
        assert tapdisk.size_bytes == 32 * MIB
        tapdisk.ask(c.NBD_CMD_WRITE, turn, 0, bytes([turn + 1]) * 512)
        assert tapdisk.answer() == (0, turn, b"")
        with WireClient.connect(shared.nbd_socket, disk["uuid"]) as other:
            assert other.read(0, 512) == bytes([turn + 1]) * 512
        tapdisk.close()


def test_gets_einval_for_an_unknown_command_and_lives(tapdisk):
    tapdisk.ask(99, 1, 0, 0)
    assert tapdisk.answer() == (c.NBD_EINVAL, 1, b"")
    tapdisk.ask(c.NBD_CMD_READ, 2, 0, 512)
    assert tapdisk.answer() == (0, 2, bytes(512))


def test_the_size_is_in_sectors_and_stays(shared, make_vdi):
    disk = make_vdi(MIB + 512)
    tapdisk = Tapdisk(disk["nbd_socket"])
    assert tapdisk.size_bytes == MIB + 512
    shared.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=2 * MIB)
    tapdisk.ask(c.NBD_CMD_WRITE, 1, MIB, b"l" * 512)
    assert tapdisk.answer() == (0, 1, b"")
    tapdisk.close()
    again = Tapdisk(disk["nbd_socket"])
    assert again.size_bytes == 2 * MIB
    again.close()


def test_opens_an_attached_snapshot(shared, disk):
    qemu_io(disk["nbd_uri"], "write -P 0x77 0 4k")
    snapshot = shared.post(f"/v1/vdis/{disk['uuid']}/snapshot")
    assert not os.path.exists(snapshot["nbd_socket"]), "snapshots get their socket when they are attached"
    attached = shared.post(f"/v1/vdis/{snapshot['uuid']}/attach", client="host", writable=False)
    tapdisk = Tapdisk(attached["nbd_socket"])
    assert tapdisk.flags & c.NBD_FLAG_READ_ONLY
    tapdisk.ask(c.NBD_CMD_READ, 1, 0, 4096)
    assert tapdisk.answer() == (0, 1, b"\x77" * 4096)
    tapdisk.ask(c.NBD_CMD_WRITE, 2, 0, b"x" * 512)
    assert tapdisk.answer() == (c.NBD_EPERM, 2, b"")
    tapdisk.sock.close()
    shared.wait_for_connections(0)
    shared.post(f"/v1/vdis/{snapshot['uuid']}/detach", client="host")
    assert not os.path.exists(snapshot["nbd_socket"])

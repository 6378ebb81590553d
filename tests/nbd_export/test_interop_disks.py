"""tapdisk's conversation byte for byte, and disks of every kind in the eyes of other people's clients."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import struct
from pathlib import Path

import nbd
import pytest
from daemon_tools import Simsrd
from interop_tools import qemu_io, run
from nbd_wire import MIB, WireClient

from nbd_export import constants as c

# --- tapdisk -----------------------------------------------------------------------------------------------------


class Tapdisk:
    """What block-nbd.c does, read by read (spec: datapath 6.2): each item is taken with one recv of its exact length."""

    def __init__(self, path: str) -> None:
        assert len(os.fsencode(path)) <= 107
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(path)
        assert self.sock.recv(8) == b"NBDMAGIC"
        assert self.sock.recv(8) == b"IHAVEOPT"
        assert self.sock.recv(2) == struct.pack(">H", c.NBD_FLAG_FIXED_NEWSTYLE | c.NBD_FLAG_NO_ZEROES)
        self.sock.send(struct.pack(">I", 3))
        self.sock.send(b"IHAVEOPT" + struct.pack(">II", c.NBD_OPT_EXPORT_NAME, 15) + b"tapdisk_client\0")
        info = self.sock.recv(10)
        assert len(info) == 10, "a short read is not noticed by tapdisk"
        self.size_bytes, self.flags = struct.unpack(">QH", info)

    def ask(self, command: int, cookie: int, offset: int, data: bytes | int) -> None:
        length = data if isinstance(data, int) else len(data)
        header = struct.pack(">IIQQI", c.NBD_REQUEST_MAGIC, command, cookie, offset, length)
        self.sock.sendall(header if isinstance(data, int) else header + data)

    def answer(self, length: int = 0) -> tuple[int, int, bytes]:
        """(error, cookie, data)"""
        magic, error, cookie = struct.unpack(">IIQ", self.sock.recv(16, socket.MSG_WAITALL))
        assert magic == c.NBD_SIMPLE_REPLY_MAGIC
        return error, cookie, self.sock.recv(length, socket.MSG_WAITALL) if length else b""


def test_tapdisk(disk):
    tapdisk = Tapdisk(disk["nbd_socket"])
    assert tapdisk.size_bytes == 32 * MIB and tapdisk.flags & c.NBD_FLAG_HAS_FLAGS
    for n in range(352):  # 32 ring entries of 11 segments
        tapdisk.ask(c.NBD_CMD_WRITE, n, n * 4096, bytes([n % 255 + 1]) * 4096)
    assert sorted(tapdisk.answer()[1] for _ in range(352)) == list(range(352))
    for n in range(32):
        tapdisk.ask(c.NBD_CMD_READ, 1000 + n, n * 11 * 4096, 11 * 4096)
    answers = [tapdisk.answer(11 * 4096) for _ in range(32)]
    assert [cookie for _, cookie, _ in answers] == list(range(1000, 1032))
    for error, cookie, data in answers:
        first = (cookie - 1000) * 11
        assert not error and data == b"".join(bytes([n % 255 + 1]) * 4096 for n in range(first, first + 11))
    tapdisk.ask(c.NBD_CMD_DISC, 5, 0, 0)
    assert tapdisk.sock.recv(1) == b""
    tapdisk.sock.close()


def test_tapdisk_pauses_and_comes_back_while_others_are_connected(shared, disk):
    for turn in range(5):
        tapdisk = Tapdisk(disk["nbd_socket"])
        assert tapdisk.size_bytes == 32 * MIB
        tapdisk.ask(c.NBD_CMD_WRITE, turn, 0, bytes([turn + 1]) * 512)
        assert tapdisk.answer() == (0, turn, b"")
        with WireClient.connect(shared.nbd_socket, disk["uuid"]) as other:
            assert other.read(0, 512) == bytes([turn + 1]) * 512
        tapdisk.ask(c.NBD_CMD_DISC, 9, 0, 0)
        tapdisk.sock.close()


def test_tapdisk_gets_einval_for_an_unknown_command_and_lives(disk):
    tapdisk = Tapdisk(disk["nbd_socket"])
    tapdisk.ask(99, 1, 0, 0)
    assert tapdisk.answer() == (c.NBD_EINVAL, 1, b"")
    tapdisk.ask(c.NBD_CMD_READ, 2, 0, 512)
    assert tapdisk.answer(512) == (0, 2, bytes(512))
    tapdisk.sock.close()


def test_tapdisk_opens_an_attached_snapshot(shared, disk):
    qemu_io(disk["nbd_uri"], "write -P 0x77 0 4k")
    snapshot = shared.post(f"/v1/vdis/{disk['uuid']}/snapshot")
    assert not os.path.exists(snapshot["nbd_socket"]), "snapshots get their socket when they are attached"
    attached = shared.post(f"/v1/vdis/{snapshot['uuid']}/attach", client="host", writable=False)
    tapdisk = Tapdisk(attached["nbd_socket"])
    assert tapdisk.flags & c.NBD_FLAG_READ_ONLY
    tapdisk.ask(c.NBD_CMD_READ, 1, 0, 4096)
    assert tapdisk.answer(4096) == (0, 1, b"\x77" * 4096)
    tapdisk.ask(c.NBD_CMD_WRITE, 2, 0, b"x" * 512)
    assert tapdisk.answer() == (c.NBD_EPERM, 2, b"")
    tapdisk.sock.close()
    shared.wait_for_connections(0)
    shared.post(f"/v1/vdis/{snapshot['uuid']}/detach", client="host")
    assert not os.path.exists(snapshot["nbd_socket"])


# --- What the daemon makes of disks ------------------------------------------------------------------------------


def test_a_snapshot_is_exported_read_only_and_keeps_its_content(shared, disk):
    qemu_io(disk["nbd_uri"], "write -P 0x12 0 1M", "flush")
    snapshot = shared.post(f"/v1/vdis/{disk['uuid']}/snapshot")
    qemu_io(disk["nbd_uri"], "write -P 0x34 0 2M", "flush")
    (export,) = json.loads(run("nbdinfo", "--json", snapshot["nbd_uri"]))["exports"]
    assert export["is_read_only"] is True and not export["can_trim"] and not export["can_zero"] and not export["can_fua"]
    qemu_io(snapshot["nbd_uri"], "read -P 0x12 0 1M", "read -P 0 1M 31M", read_only=True)
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(snapshot["nbd_uri"])
    for wrong in (lambda: handle.pwrite(b"x" * 512, 0), lambda: handle.zero(512, 0), lambda: handle.trim(512, 0)):
        with pytest.raises(nbd.Error) as failure:
            wrong()
        assert failure.value.errno == "EPERM"
    handle.shutdown()
    qemu_io(snapshot["nbd_uri"], "read -P 0x12 0 1M", read_only=True)


@pytest.mark.parametrize("kind", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"])
def test_a_connection_may_use_what_its_disk_has_grown_by(shared, disk, kind):
    with WireClient.connect(disk["nbd_socket"], **kind) as connected:
        connected.write(32 * MIB - 512, b"e" * 512)
        assert connected.call(c.NBD_CMD_READ, 32 * MIB, 512).error == c.NBD_EINVAL
        assert connected.call(c.NBD_CMD_WRITE, 32 * MIB - 512, payload=b"e" * 1024).error == c.NBD_ENOSPC
        assert shared.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=48 * MIB)["size_bytes"] == 48 * MIB
        assert connected.read(32 * MIB - 512, 1024) == b"e" * 512 + bytes(512)
        connected.write(46 * MIB, b"n" * (2 * MIB))
        assert connected.read(46 * MIB, 2 * MIB) == b"n" * (2 * MIB)
        assert connected.call(c.NBD_CMD_READ, 48 * MIB - 512, 1024).error == c.NBD_EINVAL
        assert connected.call(c.NBD_CMD_WRITE_ZEROES, 48 * MIB, 512).error == c.NBD_ENOSPC
    assert run("nbdinfo", "--size", disk["nbd_uri"]).strip() == str(48 * MIB)
    qemu_io(disk["nbd_uri"], "read -P 0 32M 14M", "write -P 9 47M 1M", "read -P 9 47M 1M")


def test_a_disk_that_is_very_large(make_vdi):
    disk = make_vdi(64 << 40)
    qemu_io(disk["nbd_uri"], f"write -P 5 {(64 << 40) - 65536} 64k", f"read -P 5 {(64 << 40) - 65536} 64k", "read -P 0 32T 1M")
    assert run("nbdinfo", "--size", disk["nbd_uri"]).strip() == str(64 << 40)


def test_the_map_of_a_large_disk(make_vdi):
    disk = make_vdi(1 << 40)
    qemu_io(disk["nbd_uri"], f"write -P 5 {(1 << 40) - 65536} 64k", "write -P 6 512G 4k")
    extents = json.loads(run("nbdinfo", "--map", "--totals", "--json", disk["nbd_uri"]))
    assert {extent["type"]: extent["size"] for extent in extents} == {0: 65536 + 4096, 3: (1 << 40) - 65536 - 4096}


def test_a_disk_whose_size_is_no_multiple_of_a_block(make_vdi, folder):
    disk = make_vdi(4096 * 3 + 512)
    assert disk["size_bytes"] == 4096 * 3 + 512
    data = random.Random(3).randbytes(4096 * 3 + 512)
    Path(folder, "odd").write_bytes(data)
    run("nbdcopy", f"{folder}/odd", disk["nbd_uri"])
    run("nbdcopy", disk["nbd_uri"], f"{folder}/back")
    assert Path(folder, "back").read_bytes() == data
    qemu_io(disk["nbd_uri"], "write -z 8k 4608", "read -P 0 8k 4608")


def test_tcp_on_loopback(folder):
    simsrd = Simsrd(f"{folder}/r", "--nbd-tcp", "127.0.0.1:0")
    try:
        simsrd.start().create_sr()
        disk = simsrd.create_vdi(8 * MIB)
        address = simsrd.get("/v1/daemon")["nbd_tcp"]
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        uri = f"nbd://{address}/{disk['uuid']}"
        assert run("nbdinfo", "--size", uri).strip() == str(8 * MIB)
        qemu_io(uri, "write -P 0x21 0 1M", "read -P 0x21 0 1M")
        qemu_io(disk["nbd_uri"], "read -P 0x21 0 1M")
        simsrd.stop_cleanly()
    finally:
        simsrd.end()

"""Everybody else's NBD clients against a real daemon, and tapdisk's conversation byte for byte."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import nbd
import pytest
from daemon_tools import Simsrd
from nbd_wire import WireClient

from nbd_export import constants as c

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TIMEOUT_S = 120


def run(*command: str, status: int = 0, **options) -> str:
    """Run a tool; returns its output."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, **options
    )
    assert done.returncode == status, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(uri: str, *commands: str, read_only: bool = False) -> str:
    arguments = [part for command in commands for part in ("-c", command)]
    said = run("qemu-io", *["-r"] * read_only, "-f", "raw", *arguments, uri)
    assert "failed" not in said.lower(), said
    return said


@pytest.fixture
def disk(make_vdi) -> dict:
    return make_vdi(32 * MIB, "interop disk")


@pytest.fixture
def handle(disk):
    """libnbd, connected to the disk."""
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(disk["nbd_uri"])
    yield handle
    handle.shutdown()


@pytest.fixture
def image(folder) -> Path:
    """A file of 32 MiB with data, zeros and holes."""
    path = Path(folder, "image")
    rng = random.Random(32)
    with open(path, "wb") as file:
        for at in range(0, 32 * MIB, MIB):
            if at // MIB % 3 == 0:
                file.seek(at)
                file.write(rng.randbytes(700 * KIB))
        file.truncate(32 * MIB)
    return path


# --- nbdinfo -----------------------------------------------------------------------------------------------------


def test_nbdinfo_describes_a_disk(disk):
    (export,) = json.loads(run("nbdinfo", "--json", disk["nbd_uri"]))["exports"]
    assert export["export-size"] == 32 * MIB and export["export-name"] == disk["uuid"]
    assert export["description"] == "interop disk"
    assert "base:allocation" in export["contexts"]
    for can in ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_cache", "can_df", "can_fast_zero"):
        assert export[can] is True, can
    assert export["is_read_only"] is False and export["is_rotational"] is False
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MIB]


def test_nbdinfo_describes_the_protocol(disk):
    said = json.loads(run("nbdinfo", "--json", disk["nbd_uri"]))
    assert said["protocol"] == "newstyle-fixed" and said["structured"] is True


def test_nbdinfo_lists_all_disks(shared, disk, make_vdi):
    other = make_vdi(MIB)
    snapshot = shared.post(f"/v1/vdis/{disk['uuid']}/snapshot", name="snap")
    said = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={shared.nbd_socket}"))
    assert {disk["uuid"], other["uuid"], snapshot["uuid"]} <= {export["export-name"] for export in said["exports"]}


def test_nbdinfo_size_can_and_is(disk):
    assert run("nbdinfo", "--size", disk["nbd_uri"]).strip() == str(32 * MIB)
    for question in ("connect", "flush", "fua", "trim", "zero", "fast-zero", "multi-conn", "cache", "df", "structured-reply"):
        run("nbdinfo", "--can", question, disk["nbd_uri"])
    run("nbdinfo", "--is", "read-only", disk["nbd_uri"], status=2)
    run("nbdinfo", "--is", "tls", disk["nbd_uri"], status=2)


def test_nbdinfo_map(disk, handle):
    handle.pwrite(b"x" * MIB, 4 * MIB)
    handle.pwrite(b"y" * 4096, 31 * MIB)
    extents = json.loads(run("nbdinfo", "--map", "--json", disk["nbd_uri"]))
    found = [(extent["offset"], extent["length"], extent["type"]) for extent in extents]
    assert found == [
        (0, 4 * MIB, 3), (4 * MIB, MIB, 0), (5 * MIB, 26 * MIB, 3), (31 * MIB, 4096, 0), (31 * MIB + 4096, MIB - 4096, 3),
    ]  # fmt: skip


def test_a_disk_goes_by_its_unique_name_and_by_nothing_else(shared, disk):
    socket_part = f"?socket={shared.nbd_socket}"
    assert run("nbdinfo", "--size", f"nbd+unix:///interop%20disk{socket_part}").strip() == str(32 * MIB)
    run("nbdinfo", "--size", f"nbd+unix:///nobody{socket_part}", status=1)


# --- nbdcopy -----------------------------------------------------------------------------------------------------


def test_nbdcopy_in_and_out(disk, image, folder):
    run("nbdcopy", str(image), disk["nbd_uri"])
    run("nbdcopy", disk["nbd_uri"], f"{folder}/back")
    run("cmp", str(image), f"{folder}/back")
    assert os.stat(f"{folder}/back").st_blocks * 512 < 16 * MIB, "holes came back as data"


@pytest.mark.parametrize("options", [["--connections=4", "--requests=64"], ["--synchronous"], ["--flush", "--destination-is-zero"]])
def test_nbdcopy_with_options(make_vdi, image, folder, options):
    uri = make_vdi(32 * MIB)["nbd_uri"]
    run("nbdcopy", *options, str(image), uri)
    run("nbdcopy", *options[:1], uri, f"{folder}/back")
    run("cmp", str(image), f"{folder}/back")


def test_nbdcopy_from_disk_to_disk(make_vdi, image):
    first, second = make_vdi(32 * MIB), make_vdi(32 * MIB)
    run("nbdcopy", str(image), first["nbd_uri"])
    run("nbdcopy", first["nbd_uri"], second["nbd_uri"])
    said = run("qemu-img", "compare", "-f", "raw", "-F", "raw", first["nbd_uri"], second["nbd_uri"])
    assert "identical" in said


# --- libnbd ------------------------------------------------------------------------------------------------------


def test_libnbd_reads_and_writes(handle):
    assert handle.get_size() == 32 * MIB and handle.get_structured_replies_negotiated()
    rng = random.Random(7)
    model = bytearray(32 * MIB)
    for _ in range(200):
        offset = rng.randrange(32 * MIB - 200_000)
        length = rng.choice([1, 511, 4096, 65536, 200_000])
        what = rng.choice(["write", "write", "fua", "zero", "no hole", "fast", "read", "read", "cache", "flush"])
        if what in ("write", "fua"):
            data = rng.randbytes(length)
            handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if what == "fua" else 0)
            model[offset : offset + length] = data
        elif what in ("zero", "no hole", "fast"):
            flags = {"zero": 0, "no hole": nbd.CMD_FLAG_NO_HOLE, "fast": nbd.CMD_FLAG_FAST_ZERO}[what]
            handle.zero(length, offset, flags)
            model[offset : offset + length] = bytes(length)
        elif what == "read":
            assert handle.pread(length, offset) == model[offset : offset + length]
        elif what == "cache":
            handle.cache(length, offset)
        else:
            handle.flush()
    assert handle.pread(16 * MIB, 0) == model[: 16 * MIB]
    assert handle.pread(16 * MIB, 16 * MIB) == model[16 * MIB :]


def test_libnbd_block_status(handle):
    handle.pwrite(b"d" * 8192, 8192)
    handle.trim(4096, 8192)
    found = []

    def extents(context: str, offset: int, entries: list[int], error: object) -> None:
        found.append((context, offset, entries))

    handle.block_status(32 * KIB, 0, extents)
    assert found == [("base:allocation", 0, [12288, 3, 4096, 0, 32 * KIB - 16384, 3])]
    found.clear()
    handle.block_status(32 * KIB, 4096, extents, nbd.CMD_FLAG_REQ_ONE)
    assert found == [("base:allocation", 4096, [8192, 3])]


def test_libnbd_structured_read_in_chunks(handle):
    handle.pwrite(b"s" * (2 * MIB), 0)
    chunks = []

    def chunk(buffer: bytes, offset: int, status: int, error: object) -> None:
        chunks.append((offset, len(buffer)))
        assert status == nbd.READ_DATA

    assert handle.pread_structured(2 * MIB, 0, chunk) == b"s" * (2 * MIB)
    chunks.sort()
    assert chunks[0][0] == 0 and sum(length for _, length in chunks) == 2 * MIB
    chunks.clear()
    assert handle.pread_structured(2 * MIB, 0, chunk, nbd.CMD_FLAG_DF) == b"s" * (2 * MIB)
    assert chunks == [(0, 2 * MIB)]


def test_libnbd_with_many_requests_in_flight_on_several_connections(disk):
    handles = [nbd.NBD() for _ in range(4)]
    blocks = 32 * MIB // 4096
    for handle in handles:
        handle.connect_uri(disk["nbd_uri"])
        assert handle.can_multi_conn()
    written = []
    for number, handle in enumerate(handles):
        for block in range(number, blocks, 4 * 16):
            buffer = nbd.Buffer.from_bytearray(bytearray(struct.pack(">Q", block + 1) * 512))
            written.append((handle, handle.aio_pwrite(buffer, block * 4096), buffer))
    for handle, cookie, _ in written:
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
    handles[0].flush()
    for block in range(0, 4 * 16, 1):
        expected = struct.pack(">Q", block + 1) * 512 if block < 4 else bytes(4096)
        assert handles[3].pread(4096, block * 4096) == expected
    for handle in handles:
        handle.shutdown()


def test_libnbd_gets_errors_and_goes_on(handle):
    handle.set_strict_mode(0)
    for wrong in (
        lambda: handle.pread(512, 32 * MIB), lambda: handle.pwrite(b"x" * 512, 32 * MIB - 1), lambda: handle.zero(512, 1 << 62),
        lambda: handle.trim(512, 32 * MIB), lambda: handle.cache(1, 32 * MIB), lambda: handle.pwrite(b"x", 0, 1 << 9),
    ):  # fmt: skip
        with pytest.raises(nbd.Error) as failure:
            wrong()
        assert failure.value.errno in ("EINVAL", "ENOSPC")
    assert handle.pread(0, 4096) == b""
    handle.pwrite(b"fine", 0)
    assert handle.pread(4, 0) == b"fine"


def test_libnbd_without_structured_replies(disk):
    handle = nbd.NBD()
    handle.set_request_structured_replies(False)
    handle.connect_uri(disk["nbd_uri"])
    assert not handle.get_structured_replies_negotiated() and not handle.can_df()
    handle.pwrite(b"simple" * 1000, 100)
    assert handle.pread(6000, 100) == b"simple" * 1000
    handle.shutdown()


def test_libnbd_with_option_export_name_only(disk):
    """Old clients: no fixed newstyle, so no GO."""
    handle = nbd.NBD()
    handle.set_handshake_flags(0)
    handle.connect_uri(disk["nbd_uri"])
    assert handle.get_protocol() == "newstyle" and handle.get_size() == 32 * MIB
    handle.pwrite(b"old", 0)
    assert handle.pread(3, 0) == b"old"
    handle.shutdown()


def test_nbdsh(disk):
    script = "h.pwrite(b'from nbdsh', 4096)\nh.flush()\nprint(h.pread(10, 4096).decode(), h.get_size())"
    # nbdsh takes the first python3 on PATH, but its module belongs to the one of the distribution.
    environment = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    assert run("nbdsh", "-u", disk["nbd_uri"], "-c", script, env=environment).strip() == f"from nbdsh {32 * MIB}"


# --- qemu --------------------------------------------------------------------------------------------------------


def test_qemu_img_info(disk):
    said = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", disk["nbd_uri"]))
    assert said["virtual-size"] == 32 * MIB


def test_qemu_img_converts_in_and_out(disk, image, folder):
    qcow = f"{folder}/image.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image), qcow)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, disk["nbd_uri"])
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, disk["nbd_uri"])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk["nbd_uri"], f"{folder}/back.qcow2")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", f"{folder}/back.qcow2", f"{folder}/back")
    run("cmp", str(image), f"{folder}/back")


def test_qemu_img_compare_finds_one_byte(disk, image):
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", str(image), disk["nbd_uri"])
    qemu_io(disk["nbd_uri"], "write -P 0x7 20001k 512")
    said = run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), disk["nbd_uri"], status=1)
    assert f"offset {20001 * KIB}" in said


def test_qemu_img_map(disk):
    qemu_io(disk["nbd_uri"], "write -P 1 1M 64k", "write -P 2 31M 1M")
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", disk["nbd_uri"]))
    data = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
    assert data == [(MIB, 64 * KIB), (31 * MIB, MIB)]
    assert all(extent["zero"] for extent in extents if not extent["data"])


@pytest.mark.parametrize("options", [["-w"], [], ["-w", "--flush-interval=32"]])
def test_qemu_img_bench(disk, options):
    said = run("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", "-S", "12288", *options, disk["nbd_uri"])
    assert "Run completed" in said


def test_qemu_io(disk):
    uri = disk["nbd_uri"]
    qemu_io(
        uri, "write -P 0x11 0 1M", "write -P 0x22 4000 200", "flush", "read -P 0x11 0 4000", "read -P 0x22 4000 200",
        "read -P 0x11 4200 100k", "discard 512k 64k", "read -P 0 512k 64k", "write -z 600k 4k", "read -P 0 600k 4k",
        "write -z -u 700k 9k", "read -P 0 700k 9k", "read -P 0x11 709k 1k", "write -f -P 0x33 31M 1M", "read -P 0x33 31M 1M",
        "aio_write -P 0x44 2M 3M", "aio_read -P 0x44 2M 1M", "aio_flush", "writev -P 0x55 8M 1k 2k 3k", "read -P 0x55 8M 6k",
        "alloc 0 1M",
    )  # fmt: skip
    qemu_io(uri, "read -P 0x11 0 4000", "read -P 0x44 2M 3M", "read -P 0 16M 8M")


def test_qemu_nbd_lists_the_exports(shared, disk):
    qemu_nbd = shutil.which("qemu-nbd")
    said = run(qemu_nbd, "--list", "-k", shared.nbd_socket)
    assert disk["uuid"] in said and str(32 * MIB) in said and "base:allocation" in said


# --- fio ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [["--rw=randwrite", "--bs=4k", "--iodepth=32"], ["--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned", "--iodepth=16"],
     ["--rw=randrw", "--bs=4k", "--iodepth=8", "--fsync=32"], ["--rw=write", "--bs=1M", "--iodepth=4"]],
    ids=["4k random", "mixed sizes", "read and write with flushes", "1 MiB sequential"],
)  # fmt: skip
def test_fio_verifies(disk, folder, job):
    said = run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={disk['nbd_uri']}", "--size=32M", "--verify=crc32c",
        "--verify_fatal=1", "--do_verify=1", "--serialize_overlap=1", "--output-format=json", "--randseed=11", *job, cwd=folder,
    )  # fmt: skip
    (result,) = json.loads(said[said.index("{") :])["jobs"]
    assert not result["error"] and result["write"]["total_ios"] and result["read"]["total_ios"]


# --- nbdkit in front ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [[], ["--filter=cow"], ["--filter=blocksize"]], ids=["plain", "cow", "blocksize"])
def test_nbdkit_as_a_proxy(disk, image, folder, filters):
    through = f"{folder}/proxy"
    command = ["nbdkit", "--exit-with-parent", "-f", "-U", through, *filters, "nbd", f"uri={disk['nbd_uri']}"]
    run("nbdcopy", str(image), disk["nbd_uri"])
    with subprocess.Popen([*command, "shared=true"]) as proxy:
        try:
            for _ in range(600):
                if os.path.exists(through):
                    break
                proxy.poll()
                assert proxy.returncode is None, "nbdkit did not start"
                time.sleep(0.02)
            uri = f"nbd+unix:///?socket={through}"
            (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
            assert export["export-size"] == 32 * MIB and export["can_trim"]
            run("nbdcopy", uri, f"{folder}/back")
            run("cmp", str(image), f"{folder}/back")
            qemu_io(uri, "write -P 0x66 5M 100k", "flush", "read -P 0x66 5M 100k", "discard 0 64k", "read -P 0 0 64k")
        finally:
            proxy.terminate()
    kept = filters == ["--filter=cow"]
    qemu_io(disk["nbd_uri"], f"read -P {0x66 if not kept else 0} 5M 100k")


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


def test_resize_is_seen_after_reconnecting(shared, disk):
    with WireClient.connect(disk["nbd_socket"]) as connected:
        connected.write(32 * MIB - 512, b"e" * 512)
        assert shared.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=48 * MIB)["size_bytes"] == 48 * MIB
        assert connected.call(c.NBD_CMD_READ, 32 * MIB, 512).error == c.NBD_EINVAL, "the size must not change under a client"
        assert connected.read(32 * MIB - 512, 512) == b"e" * 512
    assert run("nbdinfo", "--size", disk["nbd_uri"]).strip() == str(48 * MIB)
    qemu_io(disk["nbd_uri"], "read -P 0 32M 16M", "write -P 9 47M 1M", "read -P 9 47M 1M")


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


def test_a_client_in_another_language_than_python_is_what_counts():
    """The tools above are C programs from the distribution; say so if one of them is missing, and skip nothing."""
    missing = [tool for tool in ("nbdinfo", "nbdcopy", "nbdsh", "qemu-img", "qemu-io", "qemu-nbd", "fio", "nbdkit") if not shutil.which(tool)]
    assert not missing, f"not installed: {', '.join(missing)} (script/setup installs them); this is {sys.executable}"

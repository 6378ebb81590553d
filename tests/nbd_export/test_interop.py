"""libnbd and its tools against a real daemon."""

from __future__ import annotations

import json
import os
import random
import struct

import nbd
import pytest
from interop_tools import run
from nbd_wire import KIB, MIB


@pytest.fixture
def handle(disk):
    """libnbd, connected to the disk."""
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(disk["nbd_uri"])
    yield handle
    handle.shutdown()


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


@pytest.mark.parametrize("options", [["--connections=4", "--requests=64"], ["--synchronous"], ["--destination-is-zero"]])
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

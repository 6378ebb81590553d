"""Disks of every kind in the eyes of other people's clients."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import nbd
import pytest
from daemon_tools import running_simsrd
from interop_tools import qemu_io, run
from nbd_wire import MIB, WireClient

from nbd_export import constants as c

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


def test_tcp_on_loopback():
    with running_simsrd("--nbd-tcp", "127.0.0.1:0") as simsrd:
        simsrd.create_sr()
        disk = simsrd.create_vdi(8 * MIB)
        address = simsrd.get("/v1/daemon")["nbd_tcp"]
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        uri = f"nbd://{address}/{disk['uuid']}"
        assert run("nbdinfo", "--size", uri).strip() == str(8 * MIB)
        qemu_io(uri, "write -P 0x21 0 1M", "read -P 0x21 0 1M")
        qemu_io(disk["nbd_uri"], "read -P 0x21 0 1M")

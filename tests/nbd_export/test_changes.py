"""What has changed since a snapshot, told to other people's clients as metadata contexts."""

from __future__ import annotations

import json
import os
import random
import socket
import struct

import nbd
import pytest
from interop_tools import qemu_io, run
from nbd_wire import KIB, MIB, REQ_ONE, STATUS, WireClient, go, option, set_meta_context

from nbd_export import constants as c

BLOCK = 4096


def snapshot_of(shared, disk: dict, name: str = "") -> dict:
    return shared.post(f"/v1/vdis/{disk['uuid']}/snapshot", name=name)


def changed(uri: str, context: str) -> list[tuple[int, int]]:
    """[(offset, length)] of what nbdinfo says has changed."""
    extents = json.loads(run("nbdinfo", f"--map={context}", "--json", uri))
    assert extents[0]["offset"] == 0
    for one, other in zip(extents, extents[1:]):
        assert one["offset"] + one["length"] == other["offset"]
    return [(extent["offset"], extent["length"]) for extent in extents if extent["type"] & 1]


def test_nbdinfo_tells_what_changed(shared, disk):
    qemu_io(disk["nbd_uri"], "write -P 1 0 8M")
    before = snapshot_of(shared, disk, "before")
    context = f"simsr:changed/{before['uuid']}"
    assert changed(disk["nbd_uri"], context) == []
    qemu_io(disk["nbd_uri"], "write -P 2 1M 64k", "discard 2M 1M", "write -P 3 20M 4k", "write -P 4 31M 512")
    wanted = [(MIB, 64 * KIB), (2 * MIB, MIB), (20 * MIB, 4096), (31 * MIB, 4096)]
    for name in (context, f"qemu:dirty-bitmap:{before['uuid']}", "qemu:dirty-bitmap:before"):
        assert changed(disk["nbd_uri"], name) == wanted
    text = run("nbdinfo", "--map=qemu:dirty-bitmap:before", disk["nbd_uri"])
    assert [line.split()[-1] for line in text.splitlines()] == ["clean", "dirty"] * 4 + ["clean"]
    after = snapshot_of(shared, disk, "after")
    qemu_io(disk["nbd_uri"], "write -P 5 0 4M")
    assert changed(after["nbd_uri"], context) == wanted, "an incremental backup reads the snapshot, not the disk"
    assert changed(before["nbd_uri"], f"simsr:changed/{after['uuid']}") == wanted, "either way"


def test_they_are_listed(shared, disk):
    snapshots = [snapshot_of(shared, disk), snapshot_of(shared, disk)]
    (export,) = json.loads(run("nbdinfo", "--json", disk["nbd_uri"]))["exports"]
    listed = [f"{kind}{one['uuid']}" for one in snapshots for kind in ("simsr:changed/", "qemu:dirty-bitmap:")]
    assert sorted(export["contexts"]) == sorted(["base:allocation", "qemu:allocation-depth", *listed])
    (export,) = json.loads(run("nbdinfo", "--json", snapshots[0]["nbd_uri"]))["exports"]
    assert sorted(export["contexts"]) == sorted(["base:allocation", "qemu:allocation-depth", *listed[2:]])


def test_qemu_understands_them(shared, disk):
    qemu_io(disk["nbd_uri"], "write -P 1 0 8M")
    before = snapshot_of(shared, disk)
    qemu_io(disk["nbd_uri"], "write -P 2 1M 64k", "discard 2M 1M")
    options = f"driver=nbd,server.type=unix,server.path={shared.nbd_socket},export={disk['uuid']},x-dirty-bitmap="
    said = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", f"{options}qemu:dirty-bitmap:{before['uuid']}"))
    # qemu shows the lowest bit of any context as "no data".
    assert [(one["start"], one["length"]) for one in said if not one["data"]] == [(MIB, 64 * KIB), (2 * MIB, MIB)]
    said = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", f"{options}qemu:allocation-depth"))
    assert [(one["start"], one["length"]) for one in said if not one["data"]] == [(0, 2 * MIB), (3 * MIB, 5 * MIB)]


def test_allocation_depth(disk):
    qemu_io(disk["nbd_uri"], "write -P 1 1M 1M")
    lines = run("nbdinfo", "--map=qemu:allocation-depth", disk["nbd_uri"]).splitlines()
    assert [line.split() for line in lines] == [
        ["0", str(MIB), "0", "absent"], [str(MIB), str(MIB), "1", "local"], [str(2 * MIB), str(30 * MIB), "0", "absent"],
    ]  # fmt: skip


def test_they_are_exact_whatever_happened(shared, make_vdi):
    """Random writes, zeros, snapshots, reverts and growth against a model of versions of blocks."""
    rng = random.Random(77)
    size, clock = 4 * MIB, 0
    disk = make_vdi(size)
    model = [0] * (size // BLOCK)  # version of each block; 0: a hole
    snapshots: list[tuple[dict, list[int]]] = []
    for _ in range(6):
        with WireClient.connect(disk["nbd_socket"]) as client:
            for _ in range(rng.randrange(1, 30)):
                first = rng.randrange(len(model))
                count = min(rng.choice([1, 1, 2, 30]), len(model) - first)
                clock += 1
                if rng.random() < 0.3:
                    assert not client.call(c.NBD_CMD_WRITE_ZEROES, first * BLOCK, count * BLOCK).error
                    model[first : first + count] = [0] * count
                else:
                    client.write(first * BLOCK, rng.randbytes(count * BLOCK))
                    model[first : first + count] = [clock << 20 | n for n in range(1, count + 1)]
            client.disconnect()
        snapshots.append((snapshot_of(shared, disk), model.copy()))
        if rng.random() < 0.4:
            chosen, kept = rng.choice(snapshots)
            shared.wait_for_connections(0)
            shared.post(f"/v1/vdis/{chosen['uuid']}/revert")
            model = kept.copy()
    for snapshot, old in snapshots:
        found = changed(disk["nbd_uri"], f"simsr:changed/{snapshot['uuid']}")
        wanted = {n for n, (was, now) in enumerate(zip(old, model)) if was != now}
        told = [at // BLOCK + n for at, length in found for n in range(length // BLOCK)]
        assert len(told) == len(set(told)) and set(told) == wanted


def test_a_disk_that_has_grown(shared, disk):
    before = snapshot_of(shared, disk)
    shared.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=40 * MIB)
    qemu_io(disk["nbd_uri"], "write -P 1 4M 4k")
    assert changed(disk["nbd_uri"], f"simsr:changed/{before['uuid']}") == [(4 * MIB, 4096), (32 * MIB, 8 * MIB)]


def test_parts_of_a_large_map_with_many_changes(shared, make_vdi):
    """More extents than one answer has; each answer is about its range alone, and bounded."""
    disk = make_vdi(1 << 40)
    before = snapshot_of(shared, disk)
    with WireClient.connect(disk["nbd_socket"]) as client:
        for n in range(64):
            client.write((n << 34) + 8192, b"c" * 4096)
    context = f"simsr:changed/{before['uuid']}"
    assert changed(disk["nbd_uri"], context) == [((n << 34) + 8192, 4096) for n in range(64)]
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_uri(disk["nbd_uri"])
    found = []
    handle.block_status(16 * KIB, (5 << 34) + 4096, lambda *told: found.append(told[1:3]))
    handle.block_status(16 * KIB, (5 << 34) + 4096, lambda *told: found.append(told[1:3]), nbd.CMD_FLAG_REQ_ONE)
    handle.block_status(100, (5 << 34) + 8200, lambda *told: found.append(told[1:3]))
    handle.shutdown()
    assert found == [((5 << 34) + 4096, [4096, 0, 4096, 1, 8192, 0]), ((5 << 34) + 4096, [4096, 0]), ((5 << 34) + 8200, [100, 1])]


@pytest.mark.parametrize("context", ["simsr:changed/", "simsr:changed/nobody", "simsr:changed/{disk}", "simsr:changed/{other}",
                                     "simsr:changed/before", "qemu:dirty-bitmap:", "qemu:dirty-bitmap:twice", "simsr:", "simsr:other/{before}"])  # fmt: skip
def test_contexts_that_there_are_not(shared, disk, make_vdi, context):
    other = snapshot_of(shared, make_vdi(MIB), "stranger")
    before = snapshot_of(shared, disk, "before")
    for _ in range(2):
        snapshot_of(shared, disk, "twice")
    query = context.format(disk=disk["uuid"], other=other["uuid"], before=before["uuid"])
    handle = nbd.NBD()
    handle.add_meta_context(query)
    handle.connect_uri(disk["nbd_uri"])
    assert not handle.can_meta_context(query)
    handle.shutdown()


def test_a_snapshot_that_goes_meanwhile(shared, disk):
    before = snapshot_of(shared, disk)
    context = f"simsr:changed/{before['uuid']}"
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_uri(disk["nbd_uri"])
    shared.delete(f"/v1/vdis/{before['uuid']}")
    with pytest.raises(nbd.Error) as failure:
        handle.block_status(MIB, 0, lambda *_: None)
    assert failure.value.errno == "EIO"
    handle.pwrite(b"goes on", 0)
    handle.shutdown()


def test_snapshots_that_are_not_for_the_client_are_no_contexts(shared, disk):
    before = snapshot_of(shared, disk, "before")
    answer = shared.api.patch(f"/v1/vdis/{before['uuid']}/nbd", json={"allow": [f"uid:{os.getuid() + 1}"]})
    assert answer.is_success
    (export,) = json.loads(run("nbdinfo", "--json", disk["nbd_uri"]))["exports"]
    assert export["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    for context in (f"simsr:changed/{before['uuid']}", "qemu:dirty-bitmap:before"):
        run("nbdinfo", f"--map={context}", disk["nbd_uri"], status=1)


def test_extents_of_several_contexts_need_not_be_alike(shared, disk):
    qemu_io(disk["nbd_uri"], "write -P 1 0 1M")
    before = snapshot_of(shared, disk)
    qemu_io(disk["nbd_uri"], "write -P 1 512k 1M")
    with WireClient.connect(shared.nbd_socket, disk["uuid"], extended=True) as client:
        assert client.call(STATUS, 0, MIB).error == c.NBD_EINVAL, "no context was asked for"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(120)
        sock.connect(shared.nbd_socket)
        names = (c.BASE_ALLOCATION, f"simsr:changed/{before['uuid']}")
        sock.sendall(struct.pack(">I", 3) + option(c.NBD_OPT_EXTENDED_HEADERS) + set_meta_context(disk["uuid"], *names) + go(disk["uuid"]))
        said = b""
        while not said.endswith(struct.pack(">III", c.NBD_OPT_GO, c.NBD_REP_ACK, 0)):
            said += sock.recv(4096)
        client = WireClient(sock, extended=True)
        extents = list(client.call(STATUS, 0, 2 * MIB).extents.values())
        assert extents == [[(MIB + 512 * KIB, 0), (512 * KIB, 3)], [(512 * KIB, 0), (MIB, 1), (512 * KIB, 0)]]
        one = list(client.call(STATUS, 256 * KIB, 2 * MIB, flags=REQ_ONE).extents.values())
        assert one == [[(MIB + 256 * KIB, 0)], [(256 * KIB, 0)]]

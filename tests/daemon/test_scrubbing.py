"""Scrubs of a running daemon, and what the daemon's log says about damage that a client meets."""

from __future__ import annotations

import errno
import glob
import os
import random
import struct
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import trio
from api_daemon import Api, Nbd
from daemon_tools import Simsrd
from trio.testing import MockClock

from simsr.daemon.scrubbing import Scrubbing
from simsr.daemon.threads import hand_in
from simsr.store.layout import Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.store import Create, Store

MIB = 1 << 20
LIMIT_BYTES = 64 * MIB  # small segments are made quickly
BLOCK = 4096
STEP_BYTES = 128 * BLOCK


@pytest.fixture
def daemon(root: str):
    """As everywhere, but damage is logged as an error, and has to be."""
    simsrd = Simsrd(root)
    try:
        yield simsrd.start()
        assert simsrd.stop() == 0 and "Traceback" not in simsrd.log, simsrd.log
    finally:
        simsrd.end()


@pytest.fixture
def api(daemon: Simsrd):
    with closing(Api(daemon)) as api:
        yield api


def filled(api: Api, daemon: Simsrd, mib: int, name: str = "disk") -> dict:
    """A VDI of random bytes, without two blocks that are the same."""
    vdi = api.vdi(mib * MIB, name=name)
    with Nbd(daemon.nbd_socket, vdi["uuid"]) as nbd:
        for at in range(mib):
            nbd.write(at * MIB, random.Random(at).randbytes(MIB))
        nbd.flush()
        nbd.close()
    daemon.wait_for_connections(0)
    return vdi


def flip(daemon: Simsrd, content: bytes) -> None:
    """Damage the block that begins with ``content``, wherever it is."""
    for path in glob.glob(f"{daemon.root}/sr/*/seg-*"):
        with open(path, "r+b") as file:
            at = file.read().find(content)
            if at >= 0:
                file.seek(at + 100)
                old = file.read(1)
                file.seek(at + 100)
                file.write(bytes([old[0] ^ 1]))
                return
    raise AssertionError("no segment has that block")


def ended(api: Api, sr: str = "sr", timeout_s: float = 120) -> dict:
    give_up = time.monotonic() + timeout_s
    while (status := api.ok("GET", f"/v1/srs/{sr}/scrub"))["state"] == "running":
        assert time.monotonic() < give_up, status
        assert 0 <= status["bytes_done"] <= status["bytes_total"]
        time.sleep(0.02)
    return status


def start(api: Api, **body: object) -> dict:
    return api.ok("POST", "/v1/srs/sr/scrub", body or None, 202)


def test_a_clean_sr(daemon, api):
    api.sr(limit_bytes=LIMIT_BYTES)
    assert api.ok("GET", "/v1/srs/sr/scrub")["state"] == "never"
    vdi = filled(api, daemon, 3)
    api.snapshot(vdi)
    assert start(api)["state"] == "running"
    status = ended(api)
    assert (status["state"], status["clean"], status["damage"]) == ("done", True, [])
    assert status["blocks"] == 3 * MIB // BLOCK and status["bytes_done"] == status["bytes_total"] >= 3 * MIB
    assert status["began_time"] <= status["ended_time"]


def test_damage_is_named_and_logged(daemon, api):
    api.sr(limit_bytes=LIMIT_BYTES)
    vdi = filled(api, daemon, 2, "root")
    snapshot = api.snapshot(vdi, name="before")
    flip(daemon, random.Random(1).randbytes(MIB)[8 * BLOCK : 8 * BLOCK + 64])
    start(api, rate_bytes_s=1 << 30)
    status = ended(api)
    assert status["state"] == "done" and not status["clean"] and status["damaged_blocks"] == 1
    found = {(line["vdi"], line["name"], line["offset"], line["length"]) for line in status["damage"]}
    at = MIB + 8 * BLOCK
    assert found == {(vdi["uuid"], "root", at, BLOCK), (snapshot["uuid"], "before", at, BLOCK)}
    for one in (vdi, snapshot):
        assert f"VDI {one['uuid']} ({one['name']}): bytes {at} to {at + BLOCK} are damaged" in daemon.log
    with Nbd(daemon.nbd_socket, vdi["uuid"]) as nbd:  # writing anew mends it
        nbd.write(at, bytes([7]) * BLOCK)
        nbd.flush()
        nbd.close()
    api.delete(snapshot)
    start(api)
    assert ended(api)["clean"]


def test_one_at_a_time_until_it_is_stopped(daemon, api):
    api.sr(limit_bytes=LIMIT_BYTES)
    filled(api, daemon, 4)
    start(api, rate_bytes_s=1 << 16)  # it would take a minute
    error = api.send("POST", "/v1/srs/sr/scrub").json()["error"]
    assert error["code"] == "ScrubUnderWay" and "being scrubbed already" in error["message"]
    assert api.send("POST", "/v1/srs/sr/scrub").status_code == 409
    assert api.ok("GET", "/v1/srs/sr/scrub")["state"] == "running"
    assert api.ok("DELETE", "/v1/srs/sr/scrub")["state"] == "stopped"
    assert api.ok("DELETE", "/v1/srs/sr/scrub")["state"] == "stopped"
    start(api)
    assert ended(api)["state"] == "done"


class AtOnce:
    """Blocking work is done where it is asked for, so that a mock clock stands still meanwhile."""

    async def run(self, call, limiter):
        return call()


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


@pytest.mark.parametrize("rate_bytes_s", [10_000, 1 << 20])
async def test_the_rate_is_kept(autojump_clock, rate_bytes_s):
    hand_in(AtOnce())
    store = Store.create(MemoryDirectory(), bytes(range(16)), Geometry(512, 32, 3))
    store.commit([Create(1, 1000 * BLOCK, {})])
    store.volumes[1].write([(at * BLOCK, BLOCK, memoryview(bytes([at % 255 + 1]) * BLOCK)) for at in range(1000)])
    mounted = SimpleNamespace(scope=trio.CancelScope(), repository=SimpleNamespace(uuid="u", name="sr", store=store))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        scrubbing = Scrubbing(SimpleNamespace(_nursery=nursery, mounted={"u": mounted}))
        await scrubbing.start(mounted, rate_bytes_s)
        while scrubbing.status(mounted)["state"] == "running":
            await trio.sleep(0.05)
            assert scrubbing.status(mounted)["bytes_done"] <= rate_bytes_s * (trio.current_time() - began) + STEP_BYTES
    status = scrubbing.status(mounted)
    assert status["state"] == "done" and status["clean"] and status["bytes_done"] >= 1000 * BLOCK
    assert trio.current_time() - began < status["bytes_done"] / rate_bytes_s + 0.1, "it waits no longer than it has to"
    store.abandon()


def test_the_sr_may_be_deleted_and_the_daemon_may_stop_meanwhile(daemon, api):
    api.sr(limit_bytes=LIMIT_BYTES)
    api.sr("other")
    vdi = api.vdi(4 * MIB, sr="sr")
    with Nbd(daemon.nbd_socket, vdi["uuid"]) as nbd:
        nbd.write(0, random.Random(1).randbytes(MIB))
        nbd.close()
    daemon.wait_for_connections(0)
    start(api, rate_bytes_s=1 << 16)
    api.delete(vdi)
    api.ok("DELETE", "/v1/srs/sr", status=204)
    api.error("NotFound", "GET", "/v1/srs/sr/scrub")
    api.sr(limit_bytes=LIMIT_BYTES)
    assert api.ok("GET", "/v1/srs/sr/scrub")["state"] == "never", "it is another SR"
    api.vdi(4 * MIB, sr="sr")
    start(api, rate_bytes_s=1 << 16)  # the fixture stops the daemon, which must end well


def test_bad_requests(daemon, api):
    api.sr(limit_bytes=LIMIT_BYTES)
    for body in ({"rate_bytes_s": 0}, {"rate_bytes_s": "1"}, {"speed": 1}):
        api.error("BadRequest", "POST", "/v1/srs/sr/scrub", body)
    for method in ("GET", "POST", "DELETE"):
        api.error("NotFound", method, "/v1/srs/nowhere/scrub")


def read_fails(daemon: Simsrd, vdi: dict, offset: int, length: int) -> None:
    with Nbd(daemon.nbd_socket, vdi["uuid"]) as nbd:
        nbd.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 77, offset, length))
        assert struct.unpack(">IIQ", nbd._receive(16)) == (0x67446698, errno.EIO, 77)
        nbd.close()


@pytest.mark.parametrize("cold", [False, True])
def test_a_read_of_a_damaged_block_names_vdi_and_range(daemon, api, cold):
    api.sr(limit_bytes=LIMIT_BYTES)
    vdi = filled(api, daemon, 1)
    flip(daemon, random.Random(0).randbytes(MIB)[5 * BLOCK : 5 * BLOCK + 64])
    if cold:
        api.close()
        daemon.stop()
        daemon.start()
    read_fails(daemon, vdi, 4 * BLOCK, 4 * BLOCK)
    lines = [line for line in daemon.log.splitlines() if "failed" in line]
    assert any(vdi["uuid"] in line and f"bytes {4 * BLOCK} to {8 * BLOCK}" in line and f"byte {5 * BLOCK} " in line for line in lines)


def test_a_read_below_a_damaged_map_node_names_vdi_and_range(daemon, api):
    api.sr(limit_bytes=LIMIT_BYTES)
    vdi = filled(api, daemon, 3)
    api.close()
    daemon.stop()
    (path,) = [path for path in glob.glob(f"{daemon.root}/sr/*/map-*") if os.path.getsize(path)]
    size = os.path.getsize(path)
    for at in range(0, size, 50):
        with open(path, "r+b") as file:
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ 1]))
    daemon.start()
    read_fails(daemon, vdi, 3 * BLOCK, BLOCK)
    (line,) = [line for line in daemon.log.splitlines() if "failed" in line]
    assert vdi["uuid"] in line and f"bytes {3 * BLOCK} to {4 * BLOCK}" in line and os.path.basename(path) in line

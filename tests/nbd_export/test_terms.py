"""Terms of an export: who may connect, how many, how fast, and when a write is durable."""

from __future__ import annotations

import os
import socket
import time

import pytest
import trio
from daemon_tools import Simsrd, running_simsrd
from fake_disks import SIZE_BYTES, Client, pattern, until
from interop_tools import run
from nbd_wire import DISC, FLUSH, KIB, MIB, READ, TRIM, WRITE, ZEROES, WireClient

from nbd_export.limits import BURST_NS, Rate, Terms
from nbd_export.server import NbdServer, listen_unix
from nbd_export.transmission import Request

MS = 1_000_000
MINE = f"uid:{os.getuid()}"
OTHERS = "uid:4242"


def requests(*kinds: tuple[int, int]) -> list[Request]:
    return [Request(command, 0, n, 0, length, None, True) for n, (command, length) in enumerate(kinds)]


# --- The rate, in its own time -----------------------------------------------------------------------------------


def test_a_rate_lets_a_burst_pass_and_holds_back_what_is_more():
    rate, now = Rate(bytes_s=1000), 10_000 * MS
    assert rate.take(requests((READ, 100)), now) == 0, "what 100 ms allow is there at once"
    assert rate.take(requests((WRITE, 50)), now) == 50 * MS
    assert rate.take(requests((READ, 50)), now) == 100 * MS, "one after the other"
    assert rate.take(requests((READ, 1)), now + 101 * MS) == 0
    assert rate.take(requests((READ, 100)), now + 10_000 * MS) == 0, "what was not used is not saved up"
    assert rate.take(requests((READ, 1)), now + 10_000 * MS) == 1 * MS


def test_requests_and_bytes_are_counted_apart():
    rate, now = Rate(bytes_s=1 << 20, requests_s=100), 10_000 * MS
    assert rate.take(requests(*[(FLUSH, 0)] * 10), now) == 0
    assert rate.take(requests((TRIM, 1 << 30), (ZEROES, 1 << 30)), now) == 20 * MS, "they move no bytes"
    assert Rate(bytes_s=1000).take(requests(*[(FLUSH, 0)] * 1000), now) == 0
    assert Rate(requests_s=1).take(requests((DISC, 0)), now) == 0
    piece = Request(WRITE, 0, 1, 0, 500, None, False)
    assert Rate(requests_s=10, bytes_s=0).take([piece] * 50, now) == 0, "pieces of one write are one request"


@pytest.mark.parametrize("batch", [[(READ, 4096)] * 256, [(READ, 32 * MIB)] * 5, [(WRITE, 100), (READ, MIB)] * 9, [(FLUSH, 0)]])
def test_batches_are_cut_so_that_the_first_need_not_wait_for_the_last(batch):
    rate, made = Rate(bytes_s=1 << 20), requests(*batch)
    portions = list(rate.portions(made))
    assert [request for portion in portions for request in portion] == made
    for portion in portions:
        cost_ns = sum(request.length for request in portion if request.command != FLUSH) * 1_000_000_000 >> 20
        assert len(portion) == 1 or cost_ns <= BURST_NS


def test_over_time_it_is_the_rate():
    began = 10_000 * MS
    rate, now, moved = Rate(bytes_s=10_000_000), began, 0
    for n in range(5000):
        for portion in rate.portions(requests(*[(READ, 4096)] * (n % 30 + 1))):
            now += rate.take(portion, now)
            moved += sum(request.length for request in portion)
    assert moved == pytest.approx(10_000_000 * (now - began + BURST_NS) / 1e9, rel=1e-6)


def test_terms_that_are_set_again_forget_nothing():
    terms = Terms()
    terms.set_rate(1000, 0)
    first = terms.rate
    terms.set_rate(1000, 0)
    assert terms.rate is first
    terms.set_rate(0, 0)
    assert terms.rate is None


# --- A server ----------------------------------------------------------------------------------------------------


async def test_a_limited_export_is_slow_and_right(rig):
    rig.disk.terms.set_rate(8 * MIB, 0)
    clients = [await rig.connect(), await rig.connect(structured=True)]
    began = time.monotonic()
    for client in clients:
        for n in range(4):
            assert (await client.call(READ, n * 512 * KIB, 512 * KIB)).data == pattern(n * 512 * KIB, 512 * KIB)
    assert time.monotonic() - began > (4 - 0.8) / 8, "both together read 4 MiB at 8 MiB/s"
    rig.disk.terms.set_rate(0, 0)
    assert (await clients[0].call(READ, 0, SIZE_BYTES)).data == pattern(0, SIZE_BYTES)


async def test_a_limited_export_answers_all_of_a_batch_and_disc(rig):
    rig.disk.terms.set_rate(0, 5000)
    client = await rig.connect()
    cookies = await client.send_batch(*[(WRITE, n * 8, 0, b"12345678") for n in range(600)], (FLUSH,))
    assert not any(reply.error for reply in await client.replies(cookies))
    await client.send(DISC)
    assert await client.at_end()
    assert bytes(rig.disk.content[:4800]) == b"12345678" * 600


async def test_further_connections_are_closed(rig, nursery, folder, caplog):
    server = NbdServer(rig.disks, connections_max=2)
    with listen_unix(f"{folder}/few") as listener:
        nursery.start_soon(server.serve, listener)
        clients = [await Client.connect(f"{folder}/few", "disk") for _ in range(2)]
        for _ in range(3):
            stream = await trio.open_unix_socket(f"{folder}/few")
            assert await stream.receive_some(1) == b""
            await stream.aclose()
        assert server.statistics()["refused_total"] == 3 and server.connections == 2
        clients.pop().close()
        await until(lambda: server.connections == 1)
        clients.append(await Client.connect(f"{folder}/few", "disk"))
        assert (await clients[1].call(READ, 0, 512)).data == pattern(0, 512)
        for client in clients:
            client.close()


async def test_hanging_up_ends_a_connection_whatever_it_does(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(0, SIZE_BYTES)], trio.Event(), trio.Event()
    client = await rig.connect()
    await client.send_batch((WRITE, 0, 0, b"x"), (FLUSH,), (READ, 0, 512))
    await until(lambda: disk.cold_now and disk.flushes)
    rig.disks.hang_ups["disk"]("a test says so")
    assert await client.at_end()
    await until(lambda: disk.detached == 1)
    disk.flush_gate.set()


async def test_each_write_is_durable_when_it_is_answered(rig):
    disk = rig.disk
    disk.terms.each_write_durable = True
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    cookies = await client.send_batch(*[(WRITE, n * 4096, 0, b"d" * 4096) for n in range(100)], (TRIM, MIB, 4096), (READ, 0, 4096))
    assert (await client.reply(cookies[-1])).data == b"d" * 4096, "a read waits for nothing"
    assert await client.silent(), "a write was acknowledged that a power cut could undo"
    disk.flush_gate.set()
    assert not any(reply.error for reply in await client.replies(cookies[:-1]))
    assert disk.flushes <= 3, "they were not committed together"
    disk.flush_failure = OSError(5, "the disk is gone")
    assert (await client.call(WRITE, 0, payload=b"x")).error == 5
    disk.terms.each_write_durable = False
    disk.flush_gate = trio.Event()
    assert not (await client.call(WRITE, 0, payload=b"x")).error, "changed terms hold for connections that are open"
    disk.flush_gate.set()


# --- A daemon ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    """A daemon that serves TCP, too, and that may be restarted."""
    with running_simsrd("--nbd-tcp", "127.0.0.1:0") as simsrd:
        simsrd.create_sr()
        yield simsrd


def terms(shared: Simsrd, vdi: dict, **changes: object) -> dict:
    answer = shared.api.patch(f"/v1/vdis/{vdi['uuid']}/nbd", json=changes)
    assert answer.is_success, answer.text
    return answer.json()


def listed(uri: str) -> str:
    return run("nbdinfo", "--list", uri)


def test_only_the_users_that_are_allowed(shared, disk, make_vdi):
    common = f"nbd+unix:///?socket={shared.nbd_socket}"
    snapshot = shared.post(f"/v1/vdis/{disk['uuid']}/snapshot")
    assert terms(shared, disk, allow=[OTHERS])["allow"] == [OTHERS]
    run("nbdinfo", disk["nbd_uri"], status=1)
    with pytest.raises(AssertionError, match=r"0x80000002 .*not for user 0.*simsr vdi set"):  # NBD_REP_ERR_POLICY
        WireClient.connect(shared.nbd_socket, disk["uuid"])
    with pytest.raises((AssertionError, ConnectionError)):  # nor on its own socket
        WireClient.connect(disk["nbd_socket"])
    said = listed(common)
    assert disk["uuid"] not in said and snapshot["uuid"] in said, "taken before, the snapshot is for everybody"
    terms(shared, disk, allow=[OTHERS, MINE])
    assert run("nbdinfo", "--size", disk["nbd_uri"]).strip() == str(32 * MIB)
    assert disk["uuid"] in listed(common)


def test_only_the_addresses_that_are_allowed(shared, disk):
    host, port = shared.get("/v1/daemon")["nbd_tcp"].split(":")
    uri = f"nbd://{host}:{port}/{disk['uuid']}"
    terms(shared, disk, allow=["addr:127.0.0.0/8"])
    run("nbdinfo", "--size", uri)
    run("nbdinfo", "--size", disk["nbd_uri"], status=1)
    terms(shared, disk, allow=["addr:10.0.0.0/8", MINE])
    run("nbdinfo", "--size", uri, status=1)
    run("nbdinfo", "--size", disk["nbd_uri"])


def test_who_is_not_allowed_any_more_is_cut_off(shared, disk):
    with WireClient.connect(disk["nbd_socket"]) as client:
        terms(shared, disk, allow=[MINE])
        client.write(0, b"still here")
        terms(shared, disk, allow=[OTHERS])
        with pytest.raises(ConnectionError):
            client.read(0, 512)
    shared.wait_for_connections(0)


def test_connections_of_one_disk(shared, disk):
    terms(shared, disk, connections_max=2)
    first, second = WireClient.connect(disk["nbd_socket"]), WireClient.connect(shared.nbd_socket, disk["uuid"])
    with pytest.raises(AssertionError, match="0x80000002 .*2 connections"):
        WireClient.connect(shared.nbd_socket, disk["uuid"])
    second.disconnect()
    shared.wait_for_connections(1)
    second = WireClient.connect(shared.nbd_socket, disk["uuid"])
    for client in (first, second):
        client.disconnect()


def test_terms_survive_a_restart(shared, make_vdi):
    disk = make_vdi(MIB)
    wanted = terms(shared, disk, allow=[OTHERS], bytes_s=123456, requests_s=7, connections_max=3, durability="each-write")
    shared.stop_cleanly()
    shared.start()
    assert shared.get(f"/v1/vdis/{disk['uuid']}/nbd") == wanted
    assert wanted == {"allow": [OTHERS], "bytes_s": 123456, "requests_s": 7, "connections_max": 3, "durability": "each-write"}


@pytest.mark.parametrize(
    "wrong", [{"allow": ["root"]}, {"allow": "uid:0"}, {"bytes_s": -1}, {"durability": "perhaps"}, {"speed": 3}, {"requests_s": "5"}]
)
def test_terms_that_make_no_sense(shared, disk, wrong):
    before = shared.get(f"/v1/vdis/{disk['uuid']}/nbd")
    answer = shared.api.patch(f"/v1/vdis/{disk['uuid']}/nbd", json=wrong)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "BadRequest"
    assert shared.get(f"/v1/vdis/{disk['uuid']}/nbd") == before


def test_the_command(shared, disk):
    simsr = ["simsr", "--socket", shared.socket, "vdi", "set", disk["uuid"]]
    environment = {**os.environ, "PATH": f"{os.path.dirname(os.sys.executable)}:{os.environ['PATH']}"}
    said = run(*simsr, "--allow", MINE, "--allow", "cn:alice", "--rate", "100MiB", "--requests", "500", "--connections", "9",
               "--durability", "each-write", env=environment)  # fmt: skip
    assert said.split("\n")[:5] == [
        f"allowed:      {MINE} cn:alice", "connections:  9", "rate:         100 MiB/s", "requests:     500/s", "durability:   each-write",
    ]  # fmt: skip
    said = run(*simsr, "--allow-everybody", "--rate", "0", env=environment)
    assert "everybody" in said and "rate:         no limit" in said and "500/s" in said
    run(*simsr, "--allow", "alice", env=environment, status=2)


def test_writes_of_tapdisk_are_durable_and_those_of_others_not(shared, disk):
    """By default: tapdisk is known never to flush, and to be what stands between a guest's barriers and us."""
    def flushes() -> int:
        (engine,) = shared.get("/v1/daemon")["statistics"]["srs"].values()
        return engine["flush_waits"]

    for name, durable in ((b"tapdisk_client\0", True), (b"somebody", False)):
        before = flushes()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(120)
            sock.connect(disk["nbd_socket"])
            sock.recv(18, socket.MSG_WAITALL)
            sock.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1" + len(name).to_bytes(4, "big") + name)
            assert len(sock.recv(10, socket.MSG_WAITALL)) == 10
            client = WireClient(sock)
            for n in range(5):
                client.write(n * 4096, b"z" * 4096)
        assert (flushes() - before == 5) is durable and (flushes() == before) is not durable

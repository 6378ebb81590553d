"""Histories over the API: what is asked and answered, the live modes below connected clients, groups killed with SIGKILL."""

from __future__ import annotations

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from api_daemon import BLOCK, MIB, Nbd, Unchanged, api  # noqa: F401
from daemon_tools import Simsrd, running_simsrd
from nbd_wire import FLUSH, READ, WRITE, WireClient

EIO = 5


def written(api, name, value: bytes, disk=None, sr="sr"):  # noqa: F811
    """A disk whose first block holds ``value``."""
    disk = disk or api.vdi(name=name, sr=sr)
    with Nbd(disk["nbd_socket"]) as nbd:
        nbd.write(0, value * BLOCK)
        nbd.flush()
        nbd.close()
    return disk


def first(api, disk) -> bytes:  # noqa: F811
    with Nbd(disk["nbd_socket"]) as nbd:
        return nbd.read(0, BLOCK)[:1]


def test_modes_over_the_api(api):  # noqa: F811
    disk = written(api, "modes", b"1")
    snapshot = api.snapshot(disk, name="modes-a")
    written(api, "", b"2", disk)
    path = f"/v1/vdis/{snapshot['uuid']}/revert"
    with Unchanged(api):
        plan = api.ok("POST", path, {"dry_run": True})
        (member,) = plan["members"]
        assert plan["changed"] and plan["dry_run"] and member["unsaved_bytes"] == BLOCK and member["tip"] is None and not member["going"]
    answer = api.ok("POST", path, {"op_id": "first"})
    tip = answer["members"][0]["tip"]
    assert api.ok("POST", path, {"op_id": "first"})["members"][0]["tip"] == tip
    listed = {vdi["uuid"] for vdi in api.ok("GET", "/v1/vdis?sr=sr")}
    assert tip not in listed and tip in {vdi["uuid"] for vdi in api.ok("GET", "/v1/vdis?tips=true")}
    assert api.show(tip)["is_a_tip"] and api.show(tip)["snapshot_of"] == disk["uuid"]
    assert first(api, disk) == b"1"
    assert api.act(disk, "undo")["changed"] and first(api, disk) == b"2"
    assert api.act(disk, "redo")["changed"] and first(api, disk) == b"1"
    assert api.error("WouldLose", "POST", path, {"discard": True, "may_lose": False})["exit_code"] == 59
    (going,) = api.ok("POST", path, {"discard": True, "dry_run": True})["members"][0]["going"]
    assert (going["uuid"], going["kind"], going["name"]) == (snapshot["uuid"], "snapshot", "modes-a")
    done = api.ok("POST", path, {"discard": True, "op_id": "gone"})
    assert done["members"][0]["removed"] == [snapshot["uuid"]]
    assert api.ok("POST", path, {"discard": True, "op_id": "gone"})["members"] == done["members"], "the snapshot is gone, the answer is not"
    api.ok("POST", "/v1/faults", {"rule": {"match": {"op": "resize"}, "action": {"error": "EIO"}}, "name": "elsewhere"}, 201)
    again = api.ok("POST", path, {"discard": True, "op_id": "gone"})
    assert again["members"] == done["members"], "nor while a scenario is in force (found by the simulation)"
    api.ok("DELETE", "/v1/faults/elsewhere")
    api.act(disk, "undo")
    tree = api.ok("GET", f"/v1/vdis/{snapshot['uuid']}/tree")
    assert [node["kind"] for node in tree["nodes"]] == ["snapshot", "tip", "head"] and tree["undo"][0]["mode"] == "reset"
    api.error("GroupChanged", "POST", path, {"expected": {disk["uuid"]: tree["gen"] - 1}})
    (shown,) = api.ok("GET", f"/v1/vdis/{disk['uuid']}/tips")
    pinned = api.ok("POST", f"/v1/vdis/{shown['uuid']}/pin", {"name": "modes-pinned"})
    assert pinned["uuid"] == shown["uuid"] and not pinned["is_a_tip"]


def test_expose_tips(api):  # noqa: F811
    sr = api.sr("exposed")
    disk = written(api, "e", b"1", sr="exposed")
    snapshot = api.snapshot(disk)
    written(api, "", b"2", disk)
    api.act(snapshot, "revert")
    assert len(api.ok("GET", "/v1/vdis?sr=exposed")) == 2
    assert api.ok("PATCH", f"/v1/srs/{sr['uuid']}", {"expose_tips": True})["tip_count"] == 1
    assert len(api.ok("GET", "/v1/vdis?sr=exposed")) == 3 and len(api.ok("GET", "/v1/vdis?sr=exposed&tips=false")) == 2


def test_a_client_that_hangs_up_leaves_a_crash(api):  # noqa: F811
    disk = api.vdi(name="crash", sr="sr")
    snapshot = api.snapshot(disk)
    seen = []
    for politely in (True, False):
        with Nbd(disk["nbd_socket"]) as nbd:
            nbd.write(0, bytes([len(seen) + 1]) * BLOCK)
            nbd.close(politely)
        api.act(snapshot, "revert")
        tree = api.ok("GET", f"/v1/vdis/{disk['uuid']}/tree")
        seen.append([node["consistency"] for node in tree["nodes"] if node["kind"] == "tip"][-1])
    assert seen == ["clean", "crash"]


# Live.


def test_live_is_refused_unless_asked_for(api):  # noqa: F811
    disk = written(api, "in use", b"1")
    snapshot = api.snapshot(disk)
    with Nbd(disk["nbd_socket"]) as nbd:
        nbd.write(0, b"2" * BLOCK)
        api.error("VdiInUse", "POST", f"/v1/vdis/{snapshot['uuid']}/revert")
        assert nbd.read(0, 1) == b"2"


def answers_meanwhile(client, revert):
    """What reads of the first block answer until the revert is done: (errno, first byte)."""
    answers = []
    while not revert.done():
        reply = client.reply(client.send(READ, 0, BLOCK))
        answers.append((reply.error, reply.data[:1]))
    return answers


def test_live_hang(api):  # noqa: F811
    """Requests wait, and then the same connection sees the new content, and only that."""
    disk = written(api, "live hang", b"1")
    snapshot = api.snapshot(disk)
    with WireClient.connect(disk["nbd_socket"]) as client, ThreadPoolExecutor(1) as pool:
        client.write(0, b"2" * BLOCK)
        began = time.monotonic()
        revert = pool.submit(api.act, snapshot, "revert", live="hang", live_ms=200)
        answers = answers_meanwhile(client, revert)
        assert revert.result()["changed"] and time.monotonic() - began >= 0.2
        assert not any(error for error, _ in answers)
        values = [value for _, value in answers]
        assert values == sorted(values, reverse=True), "the old content came back"
        assert client.read(0, BLOCK) == b"1" * BLOCK
        client.write(0, b"3" * BLOCK)
        assert client.read(0, BLOCK) == b"3" * BLOCK
        tree = api.ok("GET", f"/v1/vdis/{disk['uuid']}/tree")
        assert {node["consistency"] for node in tree["nodes"] if node["kind"] == "tip"} == {"crash"}
        client.disconnect()
    api.act(disk, "undo")
    assert first(api, disk) == b"2"


def test_live_error(api):  # noqa: F811
    """What is connected gets EIO from then on, for it believes what it has cached; who connects anew sees the new content."""
    disk = written(api, "live error", b"1")
    snapshot = api.snapshot(disk)
    with WireClient.connect(disk["nbd_socket"]) as client, ThreadPoolExecutor(1) as pool:
        client.write(0, b"2" * BLOCK)
        revert = pool.submit(api.act, snapshot, "revert", live="error", live_ms=200)
        answers = answers_meanwhile(client, revert)
        assert revert.result()["changed"]
        assert set(answers) <= {(0, b"2"), (EIO, b"")} and answers == sorted(answers), "first the old content, then errors"
        for _ in range(2):
            for request in (client.send(READ, 0, BLOCK), client.send(WRITE, 0, payload=b"3" * BLOCK), client.send(FLUSH)):
                assert client.reply(request).error == EIO
            api.error("VdiInUse", "POST", f"/v1/vdis/{disk['uuid']}/undo")
            with WireClient.connect(disk["nbd_socket"]) as fresh:
                assert fresh.read(0, BLOCK) == b"1" * BLOCK
                fresh.disconnect()
            assert api.act(disk, "undo", live="hang")["changed"] and api.act(disk, "redo", live="error")["changed"]
        client.disconnect()
    assert first(api, disk) == b"1"


def test_live_disconnect(api):  # noqa: F811
    disk = written(api, "live disconnect", b"1")
    snapshot = api.snapshot(disk)
    api.act(disk, "resize", size_bytes=2 * MIB)
    with Nbd(disk["nbd_socket"]) as nbd:
        nbd.write(0, b"2" * BLOCK)
        assert api.act(snapshot, "revert", live="disconnect")["size_changed"]
        with pytest.raises(OSError):
            nbd.read(0, BLOCK)
    with Nbd(disk["nbd_socket"]) as nbd:
        assert nbd.size_bytes == MIB and nbd.read(0, 1) == b"1"


def test_live_does_not_shrink_below_a_client(api):  # noqa: F811
    disk = written(api, "live shrink", b"1")
    snapshot = api.snapshot(disk)
    api.act(disk, "resize", size_bytes=2 * MIB)
    with Nbd(disk["nbd_socket"]) as nbd:
        api.error("ShrinkRefused", "POST", f"/v1/vdis/{snapshot['uuid']}/revert", {"live": "hang"})
        assert nbd.read(0, 1) == b"1", "the gate is open again"
        api.act(snapshot, "revert", live="hang", keep_size=True)


# Groups.


def test_groups_over_the_api(api):  # noqa: F811
    disks = [written(api, f"group {number}", b"1") for number in range(3)]
    uuids = [disk["uuid"] for disk in disks]
    taken = api.ok("POST", "/v1/snapshots", {"vdis": uuids, "name": "together"}, 201)
    assert [one["snapshot_of"] for one in taken["snapshots"]] == uuids
    for disk in disks:
        written(api, "", b"2", disk)
    answer = api.act(taken["snapshots"][1], "revert", group=True)
    assert [member["vdi"] for member in answer["members"]] == uuids and answer["vdi"]["uuid"] == uuids[1]
    assert [first(api, disk) for disk in disks] == [b"1"] * 3
    assert len(api.act(disks[2], "undo", group=True)["members"]) == 3
    assert [first(api, disk) for disk in disks] == [b"2"] * 3
    other = api.sr("other")
    api.error("BadRequest", "POST", "/v1/snapshots", {"vdis": [uuids[0], api.vdi(sr=other["uuid"])["uuid"]]})
    api.delete(taken["snapshots"][0])
    with Unchanged(api):
        api.error("GroupChanged", "POST", f"/v1/vdis/{taken['snapshots'][1]['uuid']}/revert", {"group": True})


def test_a_group_killed_is_all_old_or_all_new(request):
    """SIGKILL at random moments of a group revert: all disks or none, whatever was answered; what was answered stays."""
    kills = max(1, round(6 * request.config.getoption("--effort")))
    with running_simsrd() as simsrd:
        simsrd.create_sr()
        disks = [simsrd.create_vdi(MIB, f"d{number}")["uuid"] for number in range(3)]
        fill_all(simsrd, disks, 1)
        group = simsrd.post("/v1/snapshots", vdis=disks)["snapshots"][0]["uuid"]
        for number in range(kills):
            fill_all(simsrd, disks, 2 + number)
            answered = killed_while(simsrd, group, 0.0005 * number)
            simsrd.start()
            found = {read_first(simsrd, disk) for disk in disks}
            assert found == {1} or (found == {2 + number} and not answered), f"kill {number}: {found}"


def fill_all(simsrd: Simsrd, disks: list[str], value: int) -> None:
    for disk in disks:
        with WireClient.connect(simsrd.nbd_socket, disk) as client:
            assert not client.reply(client.send(WRITE, 0, BLOCK, bytes([value]) * BLOCK, 1)).error
            client.disconnect()


def read_first(simsrd: Simsrd, disk: str) -> int:
    with WireClient.connect(simsrd.nbd_socket, disk) as client:
        value = client.read(0, BLOCK)[0]
        client.disconnect()
    return value


def killed_while(simsrd: Simsrd, snapshot: str, delay_s: float) -> bool:
    """Kill the daemon ``delay_s`` after a group revert was sent; whether it was answered before."""
    answered = []

    def revert() -> None:
        try:
            answered.append(simsrd.post(f"/v1/vdis/{snapshot}/revert", group=True))
        except (httpx.TransportError, AssertionError):
            pass

    thread = threading.Thread(target=revert)
    thread.start()
    time.sleep(delay_s)
    simsrd.process.kill()
    thread.join(120)
    simsrd.kill()
    return bool(answered)


# Space.


def test_a_full_sr_lets_go_of_tips_before_it_refuses_a_write(api):  # noqa: F811
    """Invariant 10 in the daemon: tips fill an SR of 64 MiB, and writing goes on over them; snapshots stay."""
    sr = api.sr("full", limit_bytes=64 * MIB)
    disk = api.vdi(8 * MIB, name="full", sr="full")
    payload = [bytes([value]) * MIB for value in range(1, 200)]

    def fill(value: int) -> None:
        with WireClient.connect(disk["nbd_socket"]) as client:
            for at in range(8):
                client.write(at * MIB, payload[value])
            client.disconnect()

    fill(1)
    snapshot = api.snapshot(disk)
    given_up = 0
    for turn in range(12):
        before = {tip["uuid"] for tip in api.ok("GET", f"/v1/vdis/{disk['uuid']}/tips")}
        fill(2 + turn)
        given_up += len(before - {tip["uuid"] for tip in api.ok("GET", f"/v1/vdis/{disk['uuid']}/tips")})
        assert api.act(snapshot, "revert")["changed"]
        assert first(api, disk) == payload[1][:1]
    assert given_up >= 3, "the SR never got tight"
    assert api.ok("GET", f"/v1/srs/{sr['uuid']}")["limit_bytes"] == 64 * MIB
    assert first(api, disk) == payload[1][:1] and api.show(snapshot)["is_a_snapshot"]
    api.act(disk, "undo")
    assert first(api, disk) == payload[13][:1]

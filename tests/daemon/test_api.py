"""The control API of a real simsrd, route by route: what it answers, what it refuses, and that refusing changes nothing."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from api_daemon import BLOCK, MIB, Nbd, Unchanged, alone, api, check_error  # noqa: F401 (two of them are fixtures)

NOWHERE = "99999999-0000-4000-8000-000000000000"
VDI_KEYS = {
    "uuid", "location", "sr", "name", "description", "type", "size_bytes", "physical_utilisation_bytes", "is_a_snapshot", "is_a_tip",
    "snapshot_of", "family", "snapshot_time", "created_time", "read_only", "sharable", "managed", "on_boot", "cbt_enabled", "sm_config",
    "attached", "nbd_uri", "nbd_socket",
}  # fmt: skip
SR_KEYS = {
    "uuid", "name", "description", "path", "sm_config", "physical_size_bytes", "physical_utilisation_bytes",
    "virtual_allocation_bytes", "vdi_count", "snapshot_count", "statistics", "limit_bytes", "space", "verify_reads", "personality",
    "tips_max", "tips_hours", "expose_tips", "tip_count",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


# What is there.


def test_daemon(api):
    found = api.ok("GET", "/v1/daemon")
    assert {"version", "pid", "root", "control_socket", "nbd_socket", "nbd_tcp", "uptime_s", "sr_count"} <= found.keys()
    assert found["pid"] == api.simsrd.pid and found["root"] == api.simsrd.root and found["sr_count"] == 1
    assert found["control_socket"] == api.simsrd.socket and found["nbd_socket"] == api.simsrd.nbd_socket
    assert found["nbd_tcp"] is None and found["failed_srs"] == {} and 0 < found["uptime_s"] < 3600
    assert found["vdi_count"] == len(api.ok("GET", "/v1/vdis"))
    assert set(found["statistics"]) == {"nbd", "srs"}


def test_openapi_is_served(api):
    document = api.ok("GET", "/openapi.json")
    assert "/v1/vdis/{vdi}/revert" in document["paths"]


# SRs.


def test_an_sr_from_beginning_to_end(alone):
    api = alone
    uuid = "AAAABBBB-1111-4222-8333-444455556666"
    made = api.sr("first", uuid=uuid, description="d", sm_config={"a": "b"})
    assert made.keys() == SR_KEYS
    assert (made["uuid"], made["name"], made["description"], made["sm_config"]) == (uuid.lower(), "first", "d", {"a": "b"})
    assert made["path"] == f"{api.simsrd.root}/sr/{uuid.lower()}" and os.path.isdir(made["path"])
    assert (made["vdi_count"], made["snapshot_count"], made["virtual_allocation_bytes"]) == (0, 0, 0)
    for reference in (uuid, "aaaa", "AAAABB", "first"):
        assert api.ok("GET", f"/v1/srs/{reference}")["uuid"] == made["uuid"]
    for name, given in (("first", None), ("other", uuid)):
        api.error("SrExists", "POST", "/v1/srs", {"name": name, "uuid": given})
    second = api.sr("second")
    assert UUID.fullmatch(second["uuid"]) and [sr["name"] for sr in api.ok("GET", "/v1/srs")] == ["first", "second"]

    api.error("WhichSr", "POST", "/v1/vdis", {"size_bytes": 512})
    disk = api.vdi(sr="first", name="x")
    other = api.vdi(sr=second["uuid"][:8], name="y")
    assert (disk["sr"], other["sr"]) == (made["uuid"], second["uuid"])
    assert [vdi["name"] for vdi in api.ok("GET", "/v1/vdis?sr=first")] == ["x"]
    assert [vdi["name"] for vdi in api.ok("GET", "/v1/vdis", params={"sr": second["uuid"]})] == ["y"]
    assert [vdi["name"] for vdi in api.ok("GET", "/v1/vdis")] == ["x", "y"]
    for sr in ("nothing", "", "x"):
        api.error("NotFound", "GET", "/v1/vdis", params={"sr": sr})
        api.error("NotFound", "POST", "/v1/vdis", {"size_bytes": 512, "sr": sr})

    # A uuid names one VDI in the whole daemon: the export and the socket are called by it.
    for path in ("/v1/vdis", f"/v1/vdis/{other['uuid']}/snapshot", f"/v1/vdis/{other['uuid']}/clone"):
        body = {"uuid": disk["uuid"].upper()} | ({"size_bytes": 512, "sr": "second"} if path == "/v1/vdis" else {})
        with Unchanged(api):
            api.error("VdiExists", "POST", path, body)
    snapshot = api.snapshot(disk)
    with Unchanged(api):
        assert api.error("NotFound", "POST", f"/v1/vdis/{snapshot['uuid']}/revert", {"target": other["uuid"]})["sm_fault"] == 144

    assert api.error("SrNotEmpty", "DELETE", "/v1/srs/first")["sm_fault"] == 39
    api.act(disk, "attach", client="host", writable=True)
    assert "host" in api.error("SrInUse", "DELETE", "/v1/srs/first")["message"]
    api.act(disk, "detach", 204, client="host")
    api.delete(snapshot)
    api.delete(disk)
    api.ok("DELETE", "/v1/srs/first", status=204)
    api.error("NotFound", "GET", "/v1/srs/first")
    api.error("NotFound", "DELETE", "/v1/srs/first")
    assert os.listdir(f"{api.simsrd.root}/sr") == [second["uuid"]]
    assert [sr["name"] for sr in api.ok("GET", "/v1/srs")] == ["second"]


def test_without_any_sr(alone):
    assert alone.everything() == ([], [])
    assert "simsr sr create" in alone.error("BadRequest", "POST", "/v1/vdis", {"size_bytes": 512})["message"]
    alone.error("NotFound", "GET", "/v1/vdis/x")


def test_update_of_an_sr(alone):
    api = alone
    api.sr("one"), api.sr("two")
    changed = api.ok("PATCH", "/v1/srs/one", {"name": "ä/🙂", "description": "new", "sm_config": {"k": "v"}})
    assert (changed["name"], changed["description"], changed["sm_config"]) == ("ä/🙂", "new", {"k": "v"})
    path = "/v1/srs/" + quote("ä/🙂", safe="")
    with Unchanged(api):
        assert api.ok("PATCH", path, {})["uuid"] == api.ok("GET", path)["uuid"] == changed["uuid"]
        api.error("BadRequest", "PATCH", path, {"name": ""})
        api.error("SrExists", "PATCH", "/v1/srs/two", {"name": "ä/🙂"})
        assert api.ok("PATCH", "/v1/srs/two", {"name": "two"})["name"] == "two"
    assert api.ok("PATCH", path, {"name": "one", "description": None})["description"] == "new"


def test_creating_and_deleting_srs_leaves_no_files(alone):
    folder = f"{alone.simsrd.root}/sr"
    for _ in range(6):
        alone.sr("short")
        assert len(os.listdir(folder)) == 1
        alone.ok("DELETE", "/v1/srs/short", status=204)
        assert os.listdir(folder) == [] and os.listdir(f"{alone.simsrd.root}/nbd") == []


def test_creating_and_deleting_srs_leaves_no_descriptors(alone):
    """Its spare segments are still being made when an SR goes."""
    for _ in range(8):
        alone.sr("short")
        alone.ok("DELETE", "/v1/srs/short", status=204)
    folder = f"/proc/{alone.simsrd.pid}/fd"
    links = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
    assert [link for link in links if "(deleted)" in link] == []


# VDIs.


def test_create_and_show(api):
    made = api.vdi(1000, name="create", description="d", type="system", sharable=True, sm_config={"a": "b"}, sr="sr")
    assert made.keys() == VDI_KEYS
    assert UUID.fullmatch(made["uuid"]) and made["location"] == made["uuid"] and TIME.fullmatch(made["created_time"])
    expected = {
        "name": "create", "description": "d", "type": "system", "size_bytes": 1024, "physical_utilisation_bytes": 0,
        "is_a_snapshot": False, "is_a_tip": False, "snapshot_of": None, "snapshot_time": None, "read_only": False, "sharable": True, "managed": True,
        "on_boot": "persist", "cbt_enabled": False,
        "sm_config": {"a": "b"}, "attached": [], "nbd_uri": f"nbd+unix:///{made['uuid']}?socket={api.simsrd.nbd_socket}",
        "nbd_socket": f"{api.simsrd.root}/nbd/{made['uuid']}.sock",
    }  # fmt: skip
    assert expected.items() <= made.items()
    assert api.show(made) == made and made in api.ok("GET", "/v1/vdis")
    assert os.path.exists(made["nbd_socket"])
    api.delete(made)
    assert not os.path.exists(made["nbd_socket"])
    for method in ("GET", "DELETE"):
        api.error("NotFound", method, f"/v1/vdis/{made['uuid']}")


def test_create_refuses(api):
    taken = api.vdi(uuid="12345678-aaaa-4bbb-8ccc-dddddddddddd")["uuid"]
    for code, fields in (
        ("BadRequest", {"type": "disk"}), ("BadRequest", {"uuid": "x"}), ("BadRequest", {"uuid": ""}),
        ("BadRequest", {"uuid": taken + "\0"}), ("VdiExists", {"uuid": taken}), ("VdiExists", {"uuid": taken.upper()}),
        ("BadSize", {"size_bytes": 1 << 49}), ("BadSize", {"size_bytes": 10**300}), ("BadRequest", {"name": "a\0"}),
        ("BadRequest", {"name": "x" * (1 << 17) + "x"}), ("BadRequest", {"description": "ä" * (1 << 17)}),
        ("BadRequest", {"sm_config": {"a": "\0"}}),
        ("BadRequest", {"sm_config": {"a": "x" * 65536}}),
    ):  # fmt: skip
        with Unchanged(api):
            api.error(code, "POST", "/v1/vdis", {"size_bytes": 512, **fields})


def test_update(api):
    vdi = api.vdi(name="update", sm_config={"a": "b"})
    path = f"/v1/vdis/{vdi['uuid']}"
    for changes in (
        {"name": "updated"}, {"description": "ü\n"}, {"sm_config": {}}, {"managed": False}, {"sharable": True},
        {"read_only": True},
        {"name": "again", "read_only": False, "sm_config": {"c": "d"}}, {}, {"name": ""},
    ):  # fmt: skip
        vdi.update(changes)
        assert api.ok("PATCH", path, changes) == vdi == api.show(vdi)
    assert api.ok("PATCH", path, {"name": None, "read_only": None}) == vdi
    for field in ("uuid", "size_bytes", "snapshot_of", "family", "type"):
        with Unchanged(api):
            assert field in api.error("BadRequest", "PATCH", path, {"name": "x", field: "y"})["message"]


def test_resize(api):
    vdi = api.vdi(MIB)
    assert api.act(vdi, "resize", size_bytes=3 * MIB - 1)["size_bytes"] == 3 * MIB
    with Unchanged(api):
        assert api.error("ShrinkRefused", "POST", f"/v1/vdis/{vdi['uuid']}/resize", {"size_bytes": MIB})["sm_fault"] == 79
        api.error("BadSize", "POST", f"/v1/vdis/{vdi['uuid']}/resize", {"size_bytes": 1 << 49})
        snapshot = api.snapshot(vdi)
        api.error("VdiReadOnly", "POST", f"/v1/vdis/{snapshot['uuid']}/resize", {"size_bytes": 9 * MIB})
        api.delete(snapshot)
    with Nbd(vdi["nbd_socket"]) as client:
        assert client.size_bytes == 3 * MIB


def test_snapshot_and_clone(api):
    disk = api.vdi(name="s&c", description="d", sm_config={"a": "b"}, sharable=True)
    plain = api.snapshot(disk)
    assert (plain["is_a_snapshot"], plain["snapshot_of"], plain["read_only"]) == (True, disk["uuid"], True)
    assert TIME.fullmatch(plain["snapshot_time"]) and plain["sm_config"] == {"a": "b"} and plain["name"] == "s&c"
    told = {"name": "n", "description": "", "uuid": "eeeeeeee-aaaa-4bbb-8ccc-dddddddddd01", "sm_config": {}}
    assert told.items() <= api.snapshot(disk, **told).items()
    for source in (disk, plain):
        clone = api.act(source, "clone", 201, name="clone")
        assert clone["snapshot_of"] is None and not (clone["is_a_snapshot"] or clone["read_only"] or clone["sharable"])
        assert os.path.exists(clone["nbd_socket"])
    for operation in ("snapshot", "clone"):
        path = f"/v1/vdis/{disk['uuid']}/{operation}"
        for body in ({}, None):
            api.ok("POST", path, body, status=201)
        api.ok("POST", path, content=b"null", headers={"content-type": "application/json"}, status=201)
        with Unchanged(api):
            api.error("VdiExists", "POST", path, {"uuid": told["uuid"]})
            api.error("NotFound", "POST", f"/v1/vdis/{NOWHERE}/{operation}")
    api.delete(disk)
    assert api.show(plain) == plain


def test_attach_and_detach(api):
    disk = api.vdi()
    attached = api.act(disk, "attach", client="host", writable=True)
    assert attached == {
        "nbd_uri": disk["nbd_uri"], "nbd_socket": disk["nbd_socket"], "export_name": disk["uuid"], "size_bytes": MIB,
    }  # fmt: skip
    assert api.act(disk, "attach", client="host", writable=True) == attached
    assert api.show(disk)["attached"] == [{"client": "host", "writable": True, "kind": "attach"}]
    with Unchanged(api):
        path = f"/v1/vdis/{disk['uuid']}"
        for writable in (True, False):
            found = api.error("VdiInUse", "POST", f"{path}/attach", {"client": "other", "writable": writable})
            assert found["sm_fault"] == 24 and found["details"]["by"] == "host"
        api.error("VdiInUse", "DELETE", path)
        api.error("VdiInUse", "PATCH", path, {"read_only": True})
        for client in ("", "x" * 257):
            api.error("BadRequest", "POST", f"{path}/attach", {"client": client, "writable": False})
        api.error("BadRequest", "POST", f"{path}/attach", {"client": "host"})
    for client in ("stranger", "host", "host"):
        api.act(disk, "detach", 204, client=client)
    assert api.show(disk)["attached"] == []


def test_a_snapshot_has_a_socket_of_its_own_while_attached(api):
    snapshot = api.snapshot(api.vdi())
    assert not os.path.exists(snapshot["nbd_socket"])
    with Unchanged(api):
        api.error("VdiReadOnly", "POST", f"/v1/vdis/{snapshot['uuid']}/attach", {"client": "a", "writable": True})
    assert not os.path.exists(snapshot["nbd_socket"])
    for client in "ab":
        api.act(snapshot, "attach", client=client, writable=False)
    with Nbd(snapshot["nbd_socket"]) as nbd:
        assert nbd.flags & 2 and nbd.read(0, 512) == bytes(512)  # read-only
    api.act(snapshot, "detach", 204, client="a")
    assert os.path.exists(snapshot["nbd_socket"])
    api.act(snapshot, "detach", 204, client="b")
    assert not os.path.exists(snapshot["nbd_socket"])
    with Nbd(api.simsrd.nbd_socket, snapshot["uuid"]) as nbd:
        assert nbd.size_bytes == MIB


# Revert.


def test_revert(api):
    disk = api.vdi(name="revert")
    with Nbd(disk["nbd_socket"]) as nbd:
        nbd.write(0, b"1" * BLOCK)
        snapshot = api.snapshot(disk)
        nbd.write(0, b"2" * BLOCK)
    api.act(disk, "resize", size_bytes=2 * MIB)
    before = api.show(disk)
    answer = api.act(snapshot, "revert")
    assert answer.keys() == {"vdi", "changed", "size_changed", "dry_run", "members"} and answer["changed"] and answer["size_changed"]
    assert answer["vdi"] == {**before, "size_bytes": MIB, "attached": []} == api.show(disk)
    for path in (disk["nbd_socket"], api.simsrd.nbd_socket):
        with Nbd(path, disk["uuid"]) as nbd:
            assert nbd.size_bytes == MIB and nbd.read(0, BLOCK) == b"1" * BLOCK and nbd.read(BLOCK, BLOCK) == bytes(BLOCK)
    for body in ({}, {"target": disk["uuid"]}, {"target": disk["uuid"].upper()}, {"target": None}):
        answer = api.act(snapshot, "revert", **body)
        assert (answer["changed"], answer["size_changed"]) == (False, False)
    assert api.show(snapshot) == snapshot


def test_revert_refuses(api):
    disk, stranger = api.vdi(), api.vdi()
    snapshot = api.snapshot(disk)
    clone = api.act(snapshot, "clone", 201)
    path = f"/v1/vdis/{snapshot['uuid']}/revert"
    with Unchanged(api):
        api.error("NotASnapshot", "POST", f"/v1/vdis/{disk['uuid']}/revert")
        for target in (stranger, snapshot):
            api.error("SnapshotOfOther", "POST", path, {"target": target["uuid"]})
        assert api.error("NotFound", "POST", path, {"target": NOWHERE})["sm_fault"] == 144
        for target in ("", "x", disk["uuid"][:8], disk["uuid"] + " "):
            api.error("BadRequest", "POST", path, {"target": target})
        api.error("NotFound", "POST", f"/v1/vdis/{NOWHERE}/revert")
        api.act(disk, "attach", client="host", writable=True)
        assert api.error("VdiInUse", "POST", path)["sm_fault"] == 24
        api.act(disk, "detach", 204, client="host")
    api.delete(disk)
    api.error("NotFound", "POST", path)
    assert api.act(snapshot, "revert", target=clone["uuid"])["vdi"]["uuid"] == clone["uuid"]


# Attached over NBD.


def test_an_nbd_client_is_shown_and_excludes(api):
    disk = api.vdi()
    snapshot = api.snapshot(disk)
    with Nbd(disk["nbd_socket"]) as nbd:
        (attached,) = api.show(disk)["attached"]
        assert attached["writable"] and attached["kind"] == "nbd" and attached["client"].startswith("nbd client")
        with Unchanged(api):
            for method, path in (("DELETE", disk["uuid"]), ("POST", snapshot["uuid"] + "/revert")):
                found = api.error("VdiInUse", method, "/v1/vdis/" + path)
                assert found["details"]["by"] == attached["client"]
            api.error("VdiInUse", "PATCH", f"/v1/vdis/{disk['uuid']}", {"read_only": True})
        assert api.ok("PATCH", f"/v1/vdis/{disk['uuid']}", {"name": "renamed"})["name"] == "renamed"
        assert nbd.read(0, 512) == bytes(512)
    api.delete(disk)


@pytest.mark.parametrize("politely", [True, False])
def test_right_after_a_client_has_gone(api, politely):
    """Whoever closes its connection and then reverts, deletes or locks the disk is not told that it is still attached."""
    for turn in range(5):
        disk = api.vdi()
        snapshot = api.snapshot(disk)
        with Nbd(disk["nbd_socket"]) as nbd:
            nbd.write(0, bytes([turn + 1]) * BLOCK)
            nbd.close(politely)
        assert api.act(snapshot, "revert")["changed"]
        with Nbd(disk["nbd_socket"]) as nbd:
            assert nbd.read(0, BLOCK) == bytes(BLOCK)
            nbd.close(politely)
        assert api.ok("PATCH", f"/v1/vdis/{disk['uuid']}", {"read_only": True})["read_only"]
        with Nbd(disk["nbd_socket"]) as nbd:
            nbd.close(politely)
        api.delete(disk)


def test_waiting_for_a_client_to_leave(api):
    """Several requests wait for the same client; who comes too late is told that the VDI is gone, and nothing breaks."""
    for _ in range(20):
        disk = api.vdi()
        snapshot = api.snapshot(disk)
        requests = [("DELETE", f"/v1/vdis/{disk['uuid']}", None)] * 3 + [
            ("POST", f"/v1/vdis/{snapshot['uuid']}/revert", None), ("PATCH", f"/v1/vdis/{disk['uuid']}", {"read_only": True}),
        ]  # fmt: skip
        with Nbd(disk["nbd_socket"]) as nbd, ThreadPoolExecutor(len(requests)) as pool:
            nbd.write(0, b"x" * BLOCK)
            answers = [pool.submit(api.send, *request) for request in requests]
            time.sleep(0.1)
            nbd.close()
            answers = [answer.result() for answer in answers]
        if not any(answer.status_code == 409 for answer in answers):
            break  # else the client was not run in time to leave while they waited
    assert sorted(answer.status_code for answer in answers[:3]) == [204, 404, 404]
    for answer in answers:
        if answer.status_code >= 400:
            check_error(answer, "NotFound")
    api.error("NotFound", "GET", f"/v1/vdis/{disk['uuid']}")

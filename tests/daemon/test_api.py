"""The control API of a real simsrd, route by route: what it answers, what it refuses, and that refusing changes nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import pytest
from api_daemon import BLOCK, MIB, Api, Nbd, alone, api, check_error  # noqa: F401: two of them are fixtures

NOWHERE = "99999999-0000-4000-8000-000000000000"
VDI_KEYS = {
    "uuid", "location", "sr", "name", "description", "type", "size_bytes", "physical_utilisation_bytes", "is_a_snapshot",
    "snapshot_of", "snapshot_time", "created_time", "read_only", "sharable", "managed", "sm_config", "attached", "nbd_uri",
    "nbd_socket",
}  # fmt: skip
SR_KEYS = {
    "uuid", "name", "description", "path", "sm_config", "physical_size_bytes", "physical_utilisation_bytes",
    "virtual_allocation_bytes", "vdi_count", "snapshot_count", "statistics",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Unchanged:
    """``with Unchanged(api):`` all SRs and VDIs are the same afterwards."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def __enter__(self) -> None:
        self.before = self.api.everything()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            assert self.api.everything() == self.before


# What is there.


def test_daemon(api):
    found = api.ok("GET", "/v1/daemon")
    assert {"version", "pid", "root", "control_socket", "nbd_socket", "nbd_tcp", "uptime_s", "sr_count", "vdi_count"} <= found.keys()
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

    api.error("Ambiguous", "POST", "/v1/vdis", {"size_bytes": 512})
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
    for turn in range(6):
        alone.sr("short")
        assert len(os.listdir(folder)) == 1
        alone.ok("DELETE", "/v1/srs/short", status=204)
        assert os.listdir(folder) == [] and os.listdir(f"{alone.simsrd.root}/nbd") == []


def test_creating_and_deleting_srs_leaves_no_descriptors(alone):
    """Its spare segments are still being made when an SR goes."""
    for turn in range(8):
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
        "is_a_snapshot": False, "snapshot_of": None, "snapshot_time": None, "read_only": False, "sharable": True, "managed": True,
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
        ("BadRequest", {"name": "x" * 4097}), ("BadRequest", {"description": "ä" * 4096}), ("BadRequest", {"sm_config": {"a": "\0"}}),
        ("BadRequest", {"sm_config": {"a": "x" * 32768}}),
    ):  # fmt: skip
        with Unchanged(api):
            api.error(code, "POST", "/v1/vdis", {"size_bytes": 512, **fields})


def test_update(api):
    vdi = api.vdi(name="update", sm_config={"a": "b"})
    path = f"/v1/vdis/{vdi['uuid']}"
    for changes in (
        {"name": "updated"}, {"description": "ü\n"}, {"sm_config": {}}, {"managed": False}, {"sharable": True}, {"read_only": True},
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
        assert (clone["is_a_snapshot"], clone["snapshot_of"], clone["read_only"], clone["sharable"]) == (False, None, False, False)
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
    assert answer.keys() == {"vdi", "changed", "size_changed"} and answer["changed"] and answer["size_changed"]
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
        assert api.error("NotASnapshot", "POST", f"/v1/vdis/{disk['uuid']}/revert")["xenapi_code"] == "REVERT_ONLY_ALLOWED_ON_SNAPSHOT"
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
        nbd = Nbd(disk["nbd_socket"])
        snapshot = api.snapshot(disk)
        nbd.write(0, bytes([turn + 1]) * BLOCK)
        nbd.close(politely)
        assert api.act(snapshot, "revert")["changed"]
        nbd = Nbd(disk["nbd_socket"])
        assert nbd.read(0, BLOCK) == bytes(BLOCK)
        nbd.close(politely)
        assert api.ok("PATCH", f"/v1/vdis/{disk['uuid']}", {"read_only": True})["read_only"]
        nbd = Nbd(disk["nbd_socket"])
        nbd.close(politely)
        api.delete(disk)


def test_waiting_for_a_client_to_leave(api):
    """Several requests wait for the same client; who comes too late is told that the VDI is gone, and nothing breaks."""
    disk = api.vdi()
    snapshot = api.snapshot(disk)
    nbd = Nbd(disk["nbd_socket"])
    nbd.write(0, b"x" * BLOCK)
    requests = [("DELETE", f"/v1/vdis/{disk['uuid']}", None)] * 3 + [
        ("POST", f"/v1/vdis/{snapshot['uuid']}/revert", None), ("PATCH", f"/v1/vdis/{disk['uuid']}", {"read_only": True}),
    ]  # fmt: skip
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [pool.submit(api.send, *request) for request in requests]
        threading.Timer(0.2, nbd.close).run()
        answers = [answer.result() for answer in answers]
    assert sorted(answer.status_code for answer in answers[:3]) == [204, 404, 404]
    for answer in answers:
        if answer.status_code >= 400:
            check_error(answer, "NotFound")
    api.error("NotFound", "GET", f"/v1/vdis/{disk['uuid']}")


# Names in paths.

NAMES = [
    "with space", "a/b", "/", "//x//", "../../etc/passwd", "a/snapshot", "ä漢字🙂", "100%", "%2F", "%2e", "a?b=c", "a#b", "a&b+c", "'\"\\", "{vdi}",
    "\n\t\x7f", "x" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_percent_encoded(api, name):
    made = api.vdi(name=name)
    path = "/v1/vdis/" + quote(name, safe="")
    assert api.ok("GET", path) == made
    assert api.ok("POST", path + "/resize", {"size_bytes": 2 * MIB})["uuid"] == made["uuid"]
    assert api.ok("POST", path + "/snapshot", {"name": name + " snapshot"}, status=201)["snapshot_of"] == made["uuid"]
    assert api.ok("POST", "/v1/vdis/" + quote(name + " snapshot", safe="") + "/revert")["vdi"]["uuid"] == made["uuid"]
    assert api.ok("PATCH", path, {"description": "found"})["description"] == "found"
    api.ok("DELETE", path, status=204)
    api.error("NotFound", "GET", path)


def test_prefixes_and_ambiguous_names(api):
    one = api.vdi(uuid="abcd1111-0000-4000-8000-000000000001", name="twin")
    two = api.vdi(uuid="abcd2222-0000-4000-8000-000000000002", name="twin")
    for reference, meant in (("abcd1", one), ("ABCD2222-0", two), (one["uuid"].upper(), one)):
        assert api.show(reference)["uuid"] == meant["uuid"]
    for reference in ("abcd", "twin"):
        found = api.error("Ambiguous", "GET", f"/v1/vdis/{reference}")
        assert one["uuid"] in found["message"] and two["uuid"] in found["details"]["candidates"]
        api.error("Ambiguous", "DELETE", f"/v1/vdis/{reference}")
    for reference in ("abc", "abcd3", "tw"):
        api.error("NotFound", "GET", f"/v1/vdis/{reference}")
    called = api.vdi(name="abcd")
    assert api.show("abcd")["uuid"] == called["uuid"]
    for vdi in (one, two, called):
        api.delete(vdi)


# Requests that are wrong.


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/vdis", "/v1/vdi", "/v1/daemon/", "/v1/daemon/x", "//v1/daemon", "/docs", "/v1/vdis/x/y", "/v1/vdis/", "/v1/srs/"])
def test_paths_that_do_not_exist(api, path):
    assert api.error("NotFound", "GET", path)["details"]["kind"] == "API path"


@pytest.mark.parametrize("path", ["/v1/vdis/%00", "/v1/vdis/%FF", "/v1/vdis/sr", "/v1/srs/" + "x" * 5000])
def test_things_that_do_not_exist(api, path):
    assert api.error("NotFound", "GET", path)["details"]["kind"] in ("SR", "VDI")


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("PUT", "/v1/srs", {"GET", "POST"}), ("DELETE", "/v1/vdis", {"GET", "POST"}), ("POST", "/v1/daemon", {"GET"}),
        ("HEAD", "/v1/daemon", {"GET"}), ("OPTIONS", "/v1/srs", {"GET", "POST"}), ("POST", "/v1/vdis/x", {"GET", "PATCH", "DELETE"}),
        ("PUT", "/v1/vdis/x/revert", {"POST"}), ("TRACE", "/v1/srs/x", {"GET", "PATCH", "DELETE"}),
    ],
)  # fmt: skip
def test_methods_that_a_path_does_not_have(api, method, path, allowed):
    response = api.send(method, path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) & allowed
    if method != "HEAD":
        check_error(response, "BadRequest", 405)


JSON = {"content-type": "application/json"}
NOT_JSON = [b"{", b"", b"size_bytes=512", b"\xff\xfe{}", b'{"size_bytes": 512', b"{'size_bytes': 512}", b"[" * 100000, b"{}{}", b"\0"]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_bodies_that_are_no_json(api, content):
    with Unchanged(api):
        assert "body" in api.error("BadRequest", "POST", "/v1/vdis", content=content, headers=JSON)["message"]


@pytest.mark.parametrize("content", [b"[]", b"1", b"true", b'"x"', b'[{"size_bytes": 512}]', b"null"])
def test_bodies_that_are_no_objects(api, content):
    with Unchanged(api):
        api.error("BadRequest", "POST", "/v1/vdis", content=content, headers=JSON)


def test_a_form_is_no_json(api):
    with Unchanged(api):
        api.error("BadRequest", "POST", "/v1/vdis", data={"size_bytes": "512"})
        api.error("BadRequest", "POST", "/v1/vdis", content=b'{"size_bytes": 512}', headers={"content-type": "text/plain"})


def test_a_huge_body(api):
    content = b'{"size_bytes": 512, "name": "' + b"x" * 10_000_000 + b'"}'
    with Unchanged(api):
        response = api.send("POST", "/v1/vdis", content=content, headers=JSON)
        assert response.status_code in (400, 413) and len(response.content) < 1000
        check_error(response, "BadRequest", response.status_code)


WRONG = {
    "string": ["5", "[]", "{}", "true", "1.5", r'"\ud800"'],
    "integer": ['"512"', "512.0", "5.12e2", "NaN", "Infinity", "-Infinity", "true", "0", "-1", "[]", "9" * 5000, "9" * 400, "-" + "9" * 400],
    "boolean": ["1", "0", '"true"', "[]", "NaN"],
    "object": ["[]", '"a"', '{"a": 1}', '{"a": null}', '{"a": {}}', r'{"\ud800": "b"}', r'{"a": "\udfff"}'],
}  # as JSON, because Python's own types cannot say all of it


def test_every_field_of_every_body_is_checked(api):
    """All wrong values of all fields of all routes, from the OpenAPI document: a clear refusal, and nothing happens."""
    document = api.ok("GET", "/openapi.json")
    disk = api.vdi(name="fields")
    snapshot = api.snapshot(disk)
    good = {"name": "x", "size_bytes": 4 * MIB, "client": "c", "writable": False}
    tried = 0
    with Unchanged(api):
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if "requestBody" not in operation:
                    continue
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                schema = [choice for choice in schema.get("anyOf", [schema]) if "$ref" in choice][0]
                schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
                where = path.replace("{sr}", "sr").replace("{vdi}", (snapshot if "revert" in path else disk)["uuid"])
                given = {field: json.dumps(good[field]) for field in schema.get("required", ())}
                for field in [*schema.get("required", ()), "colour", "Name", ""]:
                    body = {**given, field: '"x"'}
                    if field in given:
                        del body[field]
                    tried += refused(api, method, where, body, field)
                for field, kind in schema["properties"].items():
                    kinds = [kind["type"]] if "type" in kind else [choice["type"] for choice in kind["anyOf"]]
                    for wrong in [*WRONG[kinds[0]], *([] if "null" in kinds else ["null"])]:
                        tried += refused(api, method, where, {**given, field: wrong}, field)
    assert tried > 250


def refused(api: Api, method: str, path: str, body: dict[str, str], field: str) -> bool:
    content = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in body.items()) + "}"
    response = api.send(method.upper(), path, content=content.encode(), headers=JSON)
    assert response.status_code == 400, f"{method} {path} {content[:200]}: {response.status_code} {response.text[:300]}"
    error = response.json()["error"]
    assert error["code"] in ("BadRequest", "BadSize")
    if "9" * 400 not in content:
        assert field in error["message"] or "uuid" in error["message"], f"{content}: {error['message']}"
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"\r\n", b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET /v1/vdis/\xc3\xa4 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET " + b"/x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/daemon HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000,
    ],
    ids=["nothing", "empty line", "garbage", "tls", "raw utf-8", "long path", "half a body", "length", "headers"],
)  # fmt: skip
def test_what_is_no_http_harms_nobody(api, sent):
    with Unchanged(api), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(api.simsrd.socket)
        sock.settimeout(0.3)
        try:
            sock.sendall(sent)
            answer = sock.recv(100)
        except (TimeoutError, ConnectionError):
            answer = b""
        assert not answer or re.match(rb"HTTP/1.1 4\d\d", answer), answer


# Changes are durable, timed, and many at once.


def test_every_change_is_durable_when_answered_and_says_how_long_it_took(api):
    def changed(method, path, body=None, timed=True):
        response = api.send(method, path, body)
        assert response.is_success, response.text
        own = api.ok("GET", "/v1/srs/sr")["statistics"]
        assert own["seq"] - own["durable_seq"] <= 1  # the mark that a flush leaves
        assert not timed or re.fullmatch(r"store;dur=\d+\.\d{3}", response.headers["server-timing"])
        return response.json() if response.content else None

    disk = changed("POST", "/v1/vdis", {"size_bytes": MIB, "name": "durable"})["uuid"]
    path = f"/v1/vdis/{disk}"
    with Nbd(f"{api.simsrd.root}/nbd/{disk}.sock") as nbd:
        nbd.write(0, b"x" * BLOCK)
    snapshot = changed("POST", f"{path}/snapshot", {"name": "durable snapshot"})["uuid"]
    clone = changed("POST", f"{path}/clone", {})["uuid"]
    changed("PATCH", path, {"description": "d"})
    changed("POST", f"{path}/resize", {"size_bytes": 2 * MIB})
    changed("POST", f"/v1/vdis/{snapshot}/revert")
    changed("PATCH", "/v1/srs/sr", {"description": "d"})
    for vdi in (disk, snapshot, clone):
        changed("DELETE", f"/v1/vdis/{vdi}")


def test_creating_and_deleting_an_sr_is_timed(alone):
    for method, path, body in (("POST", "/v1/srs", {"name": "x"}), ("DELETE", "/v1/srs/x", None)):
        assert alone.send(method, path, body).headers["server-timing"].startswith("store;dur=")


def test_every_answered_change_survives_sigkill(alone):
    """The daemon is killed right after each answer; the next one shows exactly what was answered."""
    api, simsrd = alone, alone.simsrd

    def check() -> None:
        wanted = api.everything()
        simsrd.kill()
        simsrd.start()
        assert api.everything() == wanted

    api.sr("survivor", sm_config={"a": "b"})
    check()
    disk = api.vdi(name="ä/b", description="d", sm_config={"x": "y"}, sharable=True)
    check()
    with Nbd(disk["nbd_socket"]) as nbd:
        nbd.write(BLOCK, b"1" * BLOCK)
        snapshot = api.snapshot(disk, name="kept")
        nbd.write(BLOCK, b"2" * 2 * BLOCK)
    api.act(disk, "resize", size_bytes=3 * MIB)
    api.ok("PATCH", f"/v1/vdis/{disk['uuid']}", {"name": "renamed", "managed": False})
    check()
    with Nbd(disk["nbd_socket"]) as nbd:
        assert nbd.read(0, 4 * BLOCK) == bytes(BLOCK) + b"2" * 2 * BLOCK + bytes(BLOCK)
    clone = api.act(snapshot, "clone", 201)
    assert api.act(snapshot, "revert")["changed"]
    check()
    for vdi in (disk, clone):
        with Nbd(vdi["nbd_socket"]) as nbd:
            assert nbd.size_bytes == MIB and nbd.read(0, 3 * BLOCK) == bytes(BLOCK) + b"1" * BLOCK + bytes(BLOCK)
    api.delete(disk)
    api.ok("PATCH", "/v1/srs/survivor", {"description": "new"})
    check()
    assert api.error("NotFound", "POST", f"/v1/vdis/{snapshot['uuid']}/revert")["details"]["name"] == disk["uuid"]
    for vdi in (snapshot, clone):
        api.delete(vdi)
    api.ok("DELETE", "/v1/srs/survivor", status=204)
    check()


def test_many_requests_at_once(api):
    """20 clients make, snapshot, revert and delete at the same time; each sees its own, nothing is lost or doubled."""
    before = {vdi["uuid"] for vdi in api.ok("GET", "/v1/vdis")}

    def life(number: int) -> list[str]:
        with httpx.Client(transport=httpx.HTTPTransport(uds=api.simsrd.socket), base_url="http://simsrd", timeout=60) as client:

            def post(path: str, body: dict) -> dict:
                response = client.post(path, json=body)
                assert response.is_success, response.text
                return response.json()

            disk = post("/v1/vdis", {"size_bytes": MIB * (number + 1), "name": f"life {number}"})["uuid"]
            snapshots = [post(f"/v1/vdis/life%20{number}/snapshot", {"name": f"{number}.{turn}"})["uuid"] for turn in range(4)]
            reverted = post(f"/v1/vdis/{number}.2/revert", {})
            assert reverted["vdi"]["uuid"] == disk and reverted["vdi"]["size_bytes"] == MIB * (number + 1)
            clone = post(f"/v1/vdis/{snapshots[0]}/clone", {"name": f"clone {number}"})["uuid"]
            assert client.delete(f"/v1/vdis/{snapshots.pop()}").status_code == 204
            return [disk, *snapshots, clone]

    with ThreadPoolExecutor(20) as pool:
        made = [uuid for uuids in pool.map(life, range(20)) for uuid in uuids]
    assert len(set(made)) == len(made) == 100
    assert {vdi["uuid"] for vdi in api.ok("GET", "/v1/vdis")} == before | set(made)
    assert all(os.path.exists(api.show(uuid)["nbd_socket"]) != api.show(uuid)["is_a_snapshot"] for uuid in made[::5])
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(lambda uuid: api.send("DELETE", f"/v1/vdis/{uuid}").status_code, made)) == {204}
    assert {vdi["uuid"] for vdi in api.ok("GET", "/v1/vdis")} == before


def test_one_uuid_asked_for_by_many(api):
    """One of them gets it, the others are told so; created and deleted over and over, its socket comes and goes."""
    uuid = "77777777-0000-4000-8000-000000000000"

    def make(_: int) -> int:
        return api.send("POST", "/v1/vdis", {"size_bytes": MIB, "uuid": uuid}).status_code

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(make, range(8))) == [201] + [409] * 7
        with Nbd(f"{api.simsrd.root}/nbd/{uuid}.sock") as nbd:
            assert nbd.size_bytes == MIB
        api.ok("DELETE", f"/v1/vdis/{uuid}", status=204)

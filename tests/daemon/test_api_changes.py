"""Changes through the control API: durable when answered, timed, and many at once."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
from api_daemon import BLOCK, MIB, Nbd, Unchanged, alone, api  # noqa: F401 (two of them are fixtures)


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
        with httpx.Client(transport=httpx.HTTPTransport(uds=api.simsrd.socket), base_url="http://simsrd", timeout=120) as client:

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


def test_single_keys_of_sm_config(api):
    disk = api.vdi(sm_config={"a": "1", "b": "2"})
    path = f"/v1/vdis/{disk['uuid']}"
    assert api.ok("PATCH", path, {"sm_config_merge": {"b": None, "c": "", "gone": None}})["sm_config"] == {"a": "1", "c": ""}
    assert api.ok("PATCH", path, {"sm_config": {"x": "y"}, "sm_config_merge": {"z": "0"}})["sm_config"] == {"x": "y", "z": "0"}
    assert api.ok("PATCH", path, {"sm_config_merge": {}})["sm_config"] == {"x": "y", "z": "0"}
    with Unchanged(api):
        api.error("BadRequest", "PATCH", path, {"sm_config_merge": {"large": "x" * 50_000}})
        api.error("BadRequest", "PATCH", path, {"sm_config_merge": {"k": 5}})


def test_family(api):
    disk = api.vdi()
    snapshot = api.snapshot(disk)
    clone = api.act(snapshot, "clone", 201)
    assert disk["family"] == snapshot["family"] == clone["family"] == disk["uuid"]

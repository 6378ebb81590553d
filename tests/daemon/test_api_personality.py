"""SRs that are like another type, through the daemon: what is told, what is refused, what survives a restart."""

from __future__ import annotations

import pytest
from api_daemon import MIB, Nbd, Unchanged, alone, api  # noqa: F401 - fixtures
from daemon_tools import Simsrd

from simsr.personalities import find_personality, personality_names
from simsr.store.files import DiskDirectory
from simsr.store.store import SetMeta, Store


def test_list_and_show(api):  # noqa: F811
    listed = api.ok("GET", "/v1/personalities")
    assert [entry["name"] for entry in listed] == personality_names()
    assert api.ok("GET", "/v1/personalities/lvmoiscsi%2Brevert") == find_personality("lvmoiscsi+revert").describe()
    assert api.ok("GET", "/v1/srs/sr")["personality"] == "sim"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_ones(api, method):  # noqa: F811
    with Unchanged(api):
        if method == "GET":
            answer = api.send("GET", "/v1/personalities/lvmoiscs")
        else:
            answer = api.send("POST", "/v1/srs", {"name": "other", "personality": "lvmoiscs"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["exit_code"], error["sm_fault"]) == (400, "UnknownPersonality", 44, 91)
    assert "Did you mean lvmoiscsi?" in error["hint"]


def test_what_is_refused_and_deleted_with_something(api):  # noqa: F811
    api.sr("nfs", personality="nfs+revert")
    disk = api.vdi(sr="nfs", sm_config={"image-format": "qcow2"})
    snapshot = api.snapshot(disk)
    with Unchanged(api):
        error = api.error("Unsupported", "POST", f"/v1/vdis/{snapshot['uuid']}/revert")
    assert error["sm_fault"] == 38 and "format qcow2" in error["message"]
    api.sr("array", personality="array")
    disk = api.vdi(sr="array")
    snapshot = api.snapshot(disk)
    api.delete(disk)
    api.error("NotFound", "GET", f"/v1/vdis/{snapshot['uuid']}")
    api.sr("lvm", personality="lvm", limit_bytes=64 * MIB)
    disk = api.vdi(60 * MIB, sr="lvm")
    assert disk["physical_utilisation_bytes"] == api.ok("GET", "/v1/srs/lvm")["physical_utilisation_bytes"] == 60 * MIB
    with Unchanged(api):
        api.error("NoSpace", "POST", "/v1/vdis", {"size_bytes": 8 * MIB, "sr": "lvm"})


def test_library_is_filled_by_connections_and_read_by_hosts(api):  # noqa: F811
    api.sr("iso", personality="iso")
    image = api.vdi(sr="iso")
    assert image["read_only"] and image["sharable"]
    with Nbd(image["nbd_socket"]) as nbd:
        nbd.write(0, b"A" * 4096)
    with Unchanged(api):
        api.error("VdiReadOnly", "POST", f"/v1/vdis/{image['uuid']}/attach", {"client": "host", "writable": True})
    for host in ("one", "two"):
        api.act(image, "attach", client=host, writable=False)
    with Nbd(image["nbd_socket"]) as nbd:
        assert nbd.read(0, 4096) == b"A" * 4096
        with pytest.raises(AssertionError):
            nbd.write(0, b"B" * 4096)
    for host in ("one", "two"):
        api.act(image, "detach", 204, client=host)
    with Nbd(image["nbd_socket"]) as nbd:
        nbd.write(0, b"C" * 4096)


def test_personality_and_chains_survive_a_restart(alone):  # noqa: F811
    api = alone  # noqa: F811
    sr = api.sr("ext", personality="ext")
    disk = api.vdi(sr="ext")
    for _ in range(29):
        api.snapshot(disk)
    with Unchanged(api):
        api.simsrd.stop()
        api.simsrd.start()
        assert api.ok("GET", f"/v1/srs/{sr['uuid']}")["personality"] == "ext"
        api.error("SnapshotChainTooLong", "POST", f"/v1/vdis/{disk['uuid']}/snapshot")


def test_an_sr_of_a_type_that_is_not_known_is_left_as_it_is(folder):
    """A newer simsr may know more types."""
    simsrd = Simsrd(f"{folder}/r")
    try:
        simsrd.start()
        path = simsrd.create_sr("sr")["path"]
        simsrd.stop()
        store = Store.open(DiskDirectory(path))
        store.commit([SetMeta(0, {**store.meta, "personality": "exr"})])
        store.flush()
        store.close()
        simsrd.start()
        assert simsrd.get("/v1/srs") == []
        assert simsrd.get("/v1/daemon")["failed_srs"] == {path: "there is no personality 'exr' of SRs"}
        assert "Did you mean ext?" in simsrd.log and simsrd.stop() == 0
    finally:
        simsrd.end()

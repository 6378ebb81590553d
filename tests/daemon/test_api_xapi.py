"""What only xapi asks for, over HTTP and with data over NBD: epochs, CBT, changed blocks."""

import random
import subprocess
import sys
import threading
from base64 import b64decode
from contextlib import closing

import pytest
from api_daemon import MIB, Api, Nbd, Unchanged, alone, api  # noqa: F401 (two of them are fixtures)
from daemon_tools import Simsrd

UNIT = 64 << 10


def write(vdi, offset, data):
    with Nbd(vdi["nbd_socket"]) as nbd:
        nbd.write(offset, data)
        nbd.flush()
        nbd.close()


def read(vdi, offset, length):
    with Nbd(vdi["nbd_socket"]) as nbd:
        data = nbd.read(offset, length)
        nbd.close()
        return data


def changed(api, old, new):
    answer = api.ok("GET", f"/v1/vdis/{old['uuid']}/changed_blocks/{new['uuid']}")
    assert answer.keys() == {"granularity_bytes", "size_bytes", "bitmap"} and answer["granularity_bytes"] == UNIT
    assert answer["size_bytes"] == api.show(new)["size_bytes"]
    bitmap = b64decode(answer["bitmap"], validate=True)
    assert len(bitmap) == -(-answer["size_bytes"] // (32 * UNIT)) * 4
    return [index for index in range(len(bitmap) * 8) if bitmap[index >> 3] & (0x80 >> (index & 7))]


def test_epochs(api):
    disk = api.vdi()
    write(disk, 0, b"first")
    disk = api.ok("PATCH", f"/v1/vdis/{disk['uuid']}", {"on_boot": "reset"})
    assert disk["on_boot"] == "reset"
    write(disk, 0, b"later")
    assert api.act(disk, "epoch", phase="end")["on_boot"] == "reset"
    assert read(disk, 0, 5) == b"later", "the end changes nothing"
    shown = api.act(disk, "epoch", phase="begin")
    assert shown == api.show(disk)
    assert read(disk, 0, 5) == b"first"
    write(disk, 0, b"third")
    api.ok("PATCH", f"/v1/vdis/{disk['uuid']}", {"on_boot": "persist"})
    api.act(disk, "epoch", phase="begin")
    assert read(disk, 0, 5) == b"third"
    api.delete(disk)


def test_an_epoch_does_not_begin_under_a_writer(api):
    disk = api.vdi()
    path = f"/v1/vdis/{disk['uuid']}"
    api.ok("PATCH", path, {"on_boot": "reset"})
    with Nbd(disk["nbd_socket"]):
        api.error("VdiInUse", "POST", f"{path}/epoch", {"phase": "begin"})
        api.error("VdiInUse", "PATCH", path, {"on_boot": "persist"})
        api.act(disk, "epoch", phase="end")
    assert api.act(disk, "epoch", phase="begin")["on_boot"] == "reset", "who has just gone is waited for"
    api.delete(disk)


def test_hidden_volumes_are_counted_nowhere(api):
    disk = api.vdi(name="hides")
    api.ok("PATCH", f"/v1/vdis/{disk['uuid']}", {"on_boot": "reset"})
    space = api.ok("GET", "/v1/srs/sr/space")
    assert [one["uuid"] for one in space["vdis"]].count(disk["uuid"]) == 1
    assert all(one["uuid"] for one in space["vdis"])
    api.delete(disk)


@pytest.mark.parametrize("body", [{}, {"phase": "middle"}, {"phase": 1}, {"phase": "begin", "x": 1}])
def test_bad_epochs(api, body):
    disk = api.vdi()
    api.error("BadRequest", "POST", f"/v1/vdis/{disk['uuid']}/epoch", body)
    api.delete(disk)


@pytest.mark.parametrize("mode", ["", "RESET", "sometimes"])
def test_bad_modes(api, mode):
    disk = api.vdi()
    api.error("BadRequest", "PATCH", f"/v1/vdis/{disk['uuid']}", {"on_boot": mode})
    api.delete(disk)


def test_changed_blocks(api):
    disk = api.vdi(4 * MIB)
    assert not disk["cbt_enabled"]
    for _ in range(2):
        assert api.act(disk, "cbt", enabled=True)["cbt_enabled"]
    write(disk, 0, b"a")
    first = api.snapshot(disk)
    assert first["cbt_enabled"] and not api.act(disk, "clone", 201)["cbt_enabled"]
    write(disk, UNIT, b"b")
    write(disk, 4 * MIB - 1, b"c")
    assert changed(api, first, disk) == [1, 63]
    second = api.snapshot(disk)
    api.act(first, "revert")
    assert (changed(api, first, disk), changed(api, second, disk), changed(api, first, second)) == ([], [1, 63], [1, 63])


def test_changed_blocks_that_are_not_told(api):
    disk, other = api.vdi(), api.vdi()
    plain = api.snapshot(disk)
    for one in (disk, other):
        api.act(one, "cbt", enabled=True)
    snapshot = api.snapshot(disk)
    for old, new in ((plain, disk), (disk, snapshot), (snapshot, snapshot), (snapshot, other)):
        error = api.error("NoChangedBlocks", "GET", f"/v1/vdis/{old['uuid']}/changed_blocks/{new['uuid']}")
        assert error["sm_fault"] == 460 and old["uuid"] in error["message"]
    api.error("NotFound", "GET", f"/v1/vdis/{disk['uuid']}/changed_blocks/nothing")
    with Unchanged(api):
        api.error("WrongKind", "POST", f"/v1/vdis/{plain['uuid']}/cbt", {"enabled": True})
        api.error("WrongKind", "PATCH", f"/v1/vdis/{disk['uuid']}", {"on_boot": "reset"})


def test_changed_blocks_in_two_srs(alone):
    alone.sr("one")
    alone.sr("two")
    disk, other = alone.vdi(sr="one"), alone.vdi(sr="two")
    alone.act(disk, "cbt", enabled=True)
    snapshot = alone.snapshot(disk)
    alone.error("NoChangedBlocks", "GET", f"/v1/vdis/{snapshot['uuid']}/changed_blocks/{other['uuid']}")


# Destroying data.


def tracked(api, size_bytes=4 * MIB):
    disk = api.vdi(size_bytes)
    return api.act(disk, "cbt", enabled=True)


def test_data_destroy(api):
    disk = tracked(api)
    write(disk, 0, b"a" * MIB)
    first = api.snapshot(disk)
    write(disk, UNIT, b"b")
    second = api.snapshot(disk)
    write(disk, 3 * MIB, b"c" * UNIT)
    for _ in range(2):
        gone = api.act(first, "data_destroy")
        assert (gone["type"], gone["cbt_enabled"], gone["size_bytes"], gone["snapshot_of"]) == ("cbt_metadata", True, 4 * MIB, disk["uuid"])
    assert gone["physical_utilisation_bytes"] <= 4096 and gone["attached"] == []
    assert (changed(api, first, second), changed(api, first, disk)) == ([1], [1, 48])
    api.act(second, "data_destroy")
    assert (changed(api, first, second), changed(api, second, disk)) == ([1], [48])
    api.delete(second)
    assert changed(api, first, disk) == [1, 48]
    api.delete(first)


def test_what_cannot_be_done_without_data(api):
    disk = tracked(api)
    snapshot = api.snapshot(disk)
    api.act(snapshot, "data_destroy")
    path = f"/v1/vdis/{snapshot['uuid']}"
    with Unchanged(api):
        for operation, body in (
            ("snapshot", {}), ("clone", {}), ("revert", None), ("resize", {"size_bytes": 8 * MIB}), ("compose", {"parent": disk["uuid"]}),
            ("attach", {"client": "a", "writable": False}), ("cbt", {"enabled": False}),
        ):  # fmt: skip
            assert api.error("WrongKind", "POST", f"{path}/{operation}", body)["xenapi_code"] == "VDI_INCOMPATIBLE_TYPE"
        api.error("WrongKind", "PATCH", path, {"on_boot": "reset"})
        api.error("WrongKind", "GET", f"{path}/diff/{disk['uuid']}")
    with pytest.raises(ConnectionResetError):
        Nbd(api.simsrd.nbd_socket, snapshot["uuid"])
    assert api.ok("PATCH", path, {"name": "only a name"})["name"] == "only a name"


def test_whose_data_is_not_destroyed(api):
    disk = tracked(api)
    plain = api.snapshot(api.vdi())
    snapshot = api.snapshot(disk)
    api.act(snapshot, "attach", client="a", writable=False)
    with Unchanged(api):
        api.error("WrongKind", "POST", f"/v1/vdis/{disk['uuid']}/data_destroy")
        api.error("NoCbt", "POST", f"/v1/vdis/{plain['uuid']}/data_destroy")
        api.error("VdiInUse", "POST", f"/v1/vdis/{snapshot['uuid']}/data_destroy")
    api.act(snapshot, "detach", 204, client="a")
    api.act(snapshot, "data_destroy")


# Composing.


def test_compose(api):
    parent, child = api.vdi(), api.vdi(name="child")
    write(parent, 0, b"p" * MIB)
    write(child, 4096, b"c" * 8192)
    write(child, MIB - 4096, b"e" * 4096)
    done = api.act(child, "compose", parent=parent["uuid"])
    assert done == api.show(child) and (done["uuid"], done["name"]) == (child["uuid"], "child")
    assert read(child, 0, MIB) == b"p" * 4096 + b"c" * 8192 + b"p" * (MIB - 16384) + b"e" * 4096
    assert read(parent, 0, MIB) == b"p" * MIB
    api.delete(parent)
    write(child, 0, b"x")
    assert read(child, 0, 3) == b"xpp"
    api.delete(child)


def test_what_is_not_composed(api):
    small, large = api.vdi(), api.vdi(2 * MIB)
    snapshot = api.snapshot(large)
    path = f"/v1/vdis/{small['uuid']}/compose"
    with Unchanged(api):
        api.error("BadSize", "POST", path, {"parent": large["uuid"]})
        api.error("WrongKind", "POST", path, {"parent": small["uuid"]})
        api.error("NotFound", "POST", path, {"parent": "nothing"})
        api.error("VdiReadOnly", "POST", f"/v1/vdis/{snapshot['uuid']}/compose", {"parent": small["uuid"]})
        api.error("BadRequest", "POST", path, {})
    for used, other in ((small, large), (large, small)):
        with Nbd(used["nbd_socket"]):
            api.error("VdiInUse", "POST", f"/v1/vdis/{large['uuid']}/compose", {"parent": small["uuid"]})
    with Unchanged(api):
        pass
    for vdi in (snapshot, small, large):
        api.delete(vdi)


# Beside a load, and across restarts.


def test_everything_at_once_and_a_kill(folder):
    """Clients write while data is destroyed, changed blocks are listed and disks composed; then the daemon is killed, and all of it holds."""
    simsrd = Simsrd(f"{folder}/r")
    try:
        with closing(Api(simsrd.start())) as api:
            api.sr()
            disk, parent, child = tracked(api, 64 * MIB), api.vdi(8 * MIB), api.vdi(8 * MIB)
            write(parent, 0, b"p" * 8 * MIB)
            for at in range(0, 8 * MIB, 2 * MIB):
                write(child, at, b"c" * 4096)
            write(disk, 0, b"0" * 32 * MIB)
            first = api.snapshot(disk)
            stop, written, failures = threading.Event(), set(), []

            def load():
                try:
                    with Nbd(disk["nbd_socket"]) as nbd:
                        rng = random.Random(1)
                        while not stop.is_set():
                            unit = rng.randrange(512, 1024)
                            written.add(unit)
                            nbd.write(unit * UNIT, b"x" * 4096)
                        nbd.flush()
                except Exception as error:
                    failures.append(error)

            writer = threading.Thread(target=load)
            writer.start()
            api.act(first, "data_destroy")
            api.act(child, "compose", parent=parent["uuid"])
            assert all(unit >= 512 for unit in changed(api, first, disk))
            stop.set()
            writer.join()
            assert not failures and changed(api, first, disk) == sorted(written)
            api.ok("PATCH", f"/v1/vdis/{parent['uuid']}", {"on_boot": "reset"})
            write(parent, 0, b"later")
            simsrd.kill()
        with closing(Api(simsrd.start())) as api:
            assert api.show(first)["type"] == "cbt_metadata" and changed(api, first, disk) == sorted(written)
            assert read(child, 2 * MIB, 8192) == b"c" * 4096 + b"p" * 4096
            assert api.act(parent, "epoch", phase="begin")["on_boot"] == "reset" and read(parent, 0, 5) == b"ppppp"
        simsrd.stop_cleanly()
        done = subprocess.run([sys.executable, "-m", "simsr.cli.main", "check", f"{folder}/r"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    finally:
        simsrd.end()

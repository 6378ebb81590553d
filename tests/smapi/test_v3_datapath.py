"""The datapath scripts of the SMAPIv3 plug-in against a real simsrd."""

import socket as sockets

import pytest

from daemon_tools import Simsrd, running_simsrd
from v3_kit import DATAPATH, SCHEME, ScriptError, Volumes, call, nbd_io, qemu_io

MIB = 1 << 20
VM, OTHER_VM, DOM0 = "5", "6", "u0-OpaqueRef_1f6b0c55_0d4b"


@pytest.fixture(scope="module")
def daemon():
    with running_simsrd() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def volumes(daemon):
    return Volumes(daemon.socket)


@pytest.fixture
def disk(volumes):
    return volumes.create(MIB)


def at(method, volume, **parameters):
    return call("Datapath." + method, uri=volume["uri"][0], **parameters)


def refused(number, method, volume, **parameters):
    with pytest.raises(ScriptError) as caught:
        at(method, volume, **parameters)
    assert caught.value.code == f"SR_BACKEND_FAILURE_{number}", caught.value
    return caught.value.text


def address(volume, domain=VM):
    """(path, export name) of the attach answer, which must be one that guests and dom0 can use."""
    answer = at("attach", volume, domain=domain)
    assert answer.keys() == {"implementations"}
    (guest, xendisk), (dom0, nbd) = answer["implementations"]
    assert (guest, dom0) == ("XenDisk", "Nbd") and nbd.keys() == {"uri"}
    assert xendisk.keys() == {"params", "extra", "backend_type"} and xendisk["backend_type"] == "qdisk" and xendisk["extra"] == {}
    scheme, transport, path, export = nbd["uri"].split(":")
    assert (scheme, transport) == ("nbd", "unix") and export == "exportname=" + volume["key"]
    assert xendisk["params"].split(" ") == [path, volume["key"]]
    return path, volume["key"]


def test_volumes_name_this_datapath(disk):
    answer = call("Plugin.Query", tree=DATAPATH)
    assert answer["required_api_version"] == "5.0" and answer["plugin"] == DATAPATH.name == SCHEME
    assert answer["features"] == ["NONPERSISTENT"]
    (uri,) = disk["uri"]
    assert uri.startswith(f"{SCHEME}:///") and disk["key"] in uri


def test_life_of_a_vm_and_its_replay(disk):
    for method, parameters in [("open", {"persistent": True}), ("attach", {"domain": VM}), ("activate", {"domain": VM}),
                               ("deactivate", {"domain": VM}), ("detach", {"domain": VM}), ("close", {})]:
        first = at(method, disk, **parameters)
        assert at(method, disk, **parameters) == first, method


def test_what_a_guest_wrote_is_there_for_the_next(disk, volumes):
    qemu_io(disk, "write -P 0x11 0 64k", "flush", domain=VM)
    qemu_io(disk, "read -P 0x11 0 64k", domain=DOM0)
    snapshot = volumes.snapshot(disk)
    qemu_io(disk, "write -P 0x22 0 64k", domain=VM)
    path, export = address(snapshot)
    assert at("activate_readonly", snapshot, domain=VM) is None
    with sockets.socket(sockets.AF_UNIX) as connection:
        connection.connect(path)
    assert at("deactivate", snapshot, domain=VM) is None
    refused(46, "activate", snapshot, domain=VM)


def test_what_is_written_in_a_session_that_is_not_to_last(disk, volumes):
    nbd_io(disk, "write -P 0x11 0 64k")
    for _ in range(2):
        at("open", disk, persistent=False)
        nbd_io(disk, "read -P 0x11 0 64k", "write -P 0x22 0 64k")
        nbd_io(disk, "read -P 0x22 0 64k")
        assert at("close", disk) is None
        assert at("close", disk) is None
    at("open", disk, persistent=False)
    nbd_io(disk, "write -P 0x33 0 64k")
    at("open", disk, persistent=False)  # the host crashed
    nbd_io(disk, "read -P 0x11 0 64k", "write -P 0x44 0 64k")
    at("open", disk, persistent=True)  # the host crashed again
    nbd_io(disk, "read -P 0x11 0 64k", "write -P 0x55 0 64k")
    at("close", disk)
    nbd_io(disk, "read -P 0x55 0 64k")
    assert at("open", volumes.snapshot(disk), persistent=False) is None


def test_attached_on_two_hosts_but_active_for_writing_on_one(disk):
    assert address(disk, VM) == address(disk, OTHER_VM)
    assert at("activate", disk, domain=VM) is None
    assert VM in refused(24, "activate", disk, domain=OTHER_VM)
    refused(24, "activate_readonly", disk, domain=OTHER_VM)
    assert at("deactivate", disk, domain=OTHER_VM) is None
    assert at("deactivate", disk, domain=VM) is None
    assert at("activate", disk, domain=OTHER_VM) is None
    assert at("detach", disk, domain=OTHER_VM) is None
    for domain in (VM, OTHER_VM):
        assert at("activate_readonly", disk, domain=domain) is None
    for domain in (VM, OTHER_VM):
        assert at("detach", disk, domain=domain) is None


def test_sr_detach_releases_what_was_left_but_not_under_a_connection(disk, volumes):
    path, _ = address(disk)
    at("activate", disk, domain=VM)
    with sockets.socket(sockets.AF_UNIX) as connection:
        connection.connect(path)
        connection.recv(18)
        connection.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0")
        connection.recv(10, sockets.MSG_WAITALL)
        with pytest.raises(ScriptError) as caught:
            volumes.call("SR.detach")
        assert caught.value.code == "SR_BACKEND_FAILURE_16" and disk["key"] in caught.value.text
    at("deactivate", disk, domain=VM)
    at("activate", disk, domain=OTHER_VM)
    assert volumes.call("SR.detach") is None
    assert volumes.call("Volume.destroy", key=disk["key"]) is None


def test_a_disk_that_is_gone(disk, volumes):
    volumes.call("Volume.destroy", key=disk["key"])
    for method in ("attach", "activate", "activate_readonly"):
        refused(144, method, disk, domain=VM)
    refused(144, "open", disk, persistent=True)
    for method in ("deactivate", "detach"):
        assert at(method, disk, domain=VM) is None
    assert at("close", disk) is None


@pytest.mark.parametrize("uri", [
    "", "nbd+simsr:", "nbd+simsr:///x/y", "nbd+simsr:///{sr}", "file:///{sr}/{sr}", "nbd+simsr://host/{sr}/{sr}",
    "nbd+simsr:///{sr}/{sr}/{sr}", "nbd+simsr:///{sr}/../{sr}", "nbd+simsr://[/", "nbd+simsr:///{sr}/{sr}?a"])
def test_uris_that_name_no_volume(uri):
    with pytest.raises(ScriptError) as caught:
        call("Datapath.attach", uri=uri.format(sr="5b4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404"), domain=VM)
    assert caught.value.code == "SR_BACKEND_FAILURE_1" and "nbd+simsr:///UUID/UUID" in caught.value.text


def test_what_happens_when_simsrd_dies_and_comes_back(folder):
    with Simsrd(folder / "root") as daemon:
        volumes = Volumes(daemon.socket)
        disk = volumes.create()
        nbd_io(disk, "write -P 0x11 0 64k")
        volumes.call("Volume.set", key=disk["key"], k="vdi-type", v="system")
        snapshot = volumes.snapshot(disk)
        nbd_io(disk, "write -P 0x22 0 64k")
        volumes.call("Volume.revert", snapshot=snapshot["key"], key=disk["key"])
        at("activate", disk, domain=VM)
        listed = volumes.ls()
        daemon.kill()
    assert "cannot be reached" in refused(47, "activate", disk, domain=VM)
    refused(47, "deactivate", disk, domain=VM)
    assert at("detach", disk, domain=VM) is None
    with daemon:
        assert volumes.call("SR.stat")["health"] == ["Healthy", ""]
        assert volumes.ls() == listed
        nbd_io(disk, "read -P 0x11 0 64k")

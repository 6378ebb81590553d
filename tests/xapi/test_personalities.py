"""A test bed for xapi: SRs that xapi takes for ext, nfs, lvmoiscsi and others, with drivers of their real names, as the installer puts them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import httpx
import pytest
from xapi_kit import MIB, NULL, World, failure, short_directory

from simsr.personalities import find_personality
from simsr.xapi.plugin_check import check_plugin
from simsr.xapi.plugin_points import POINTS
from simsr.xapi.smapiv1 import KNOWN_FEATURES

TYPES = {"ext": "ext", "nfs": "nfs+revert", "lvmoiscsi": "lvmoiscsi+revert", "iso": "iso", "udev": "udev", "simarray": "array"}


def install(root, *words: str) -> None:
    command = [sys.executable, "-m", "simsr.cli.main", "smapi", "install", "--root", str(root), *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def bed():
    """xapi with nothing but what the installer put below a root."""
    root = short_directory()
    install(root, "--personality", "array")
    real = [name for kind, name in TYPES.items() if kind != "simarray"]
    # The drivers of the first installation are ours, and no reason to take this for a real dom0.
    install(root, "--personality", ",".join(real), "--real-names")
    fragment = (root / "etc/xapi.conf.d/zz-simsr.conf").read_text()
    plugins = re.search(r"^sm-plugins=(.*)$", fragment, re.MULTILINE)[1]
    assert set(plugins.split()) == {"sim", *TYPES}
    world = World("--sm-dir", str(root / "opt/xensource/sm"), "--sm-plugins", plugins)
    world.sm = root / "opt/xensource/sm"
    yield world
    world.close()
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def srs(bed) -> dict[str, str]:
    """An SR of each type."""
    return {kind: bed.sr(kind, kind) for kind in TYPES}


def api(bed) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=bed.simsrd.socket), base_url="http://simsrd", timeout=120)


def test_xapi_sees_the_types_with_their_capabilities(bed):
    found = {record["type"]: record for record in bed.x.SM.get_all_records().values()}
    assert found.keys() == {"sim", *TYPES}
    for kind, name in TYPES.items():
        wanted = {capability.partition("/")[0] for capability in find_personality(name).capabilities}
        assert set(found[kind]["features"]) == wanted & KNOWN_FEATURES, kind
    assert found["ext"]["driver_filename"].endswith("/EXTSR") and found["lvmoiscsi"]["driver_filename"].endswith("/LVMoISCSISR")
    assert found["ext"]["features"]["VDI_RESET_ON_BOOT"] == "2"


def test_srs_are_like_their_type(bed, srs):
    with api(bed) as client:
        like = {sr["uuid"]: sr["personality"] for sr in client.get("/v1/srs").json()}
    assert {kind: like[bed.x.SR.get_uuid(sr)] for kind, sr in srs.items()} == TYPES
    reverting = {kind for kind, sr in srs.items() if "vdi_revert" in bed.x.SR.get_allowed_operations(sr)}
    assert reverting == {"nfs", "lvmoiscsi", "simarray"}


def revert(bed, *disks: str) -> list[str]:
    """Snapshot a VM with these disks, write, revert; the disks that it has then."""
    for disk in disks:
        bed.fill(disk, 1, "64k")
    vm = bed.vm("vm", disks)
    snapshot = bed.x.VM.snapshot(vm, "before")
    for disk in disks:
        bed.fill(disk, 2, "64k")
    bed.x.VM.revert(snapshot)
    vbds = bed.vbds(vm)
    now = [vbds[str(number)]["VDI"] for number in range(len(disks))]
    for disk in now:
        bed.holds(disk, 1, "64k")
    return now


def test_vm_revert_of_disks_in_three_types(bed, srs):
    """On nfs and lvmoiscsi VDI_REVERT is there, on ext it is not: one VM, both ways at once."""
    disks = [bed.vdi(srs[kind], name=kind) for kind in ("ext", "nfs", "lvmoiscsi")]
    uuids = [bed.uuid(disk) for disk in disks]
    now = revert(bed, *disks)
    assert now[1:] == disks[1:] and now[0] != disks[0]
    assert [bed.uuid(disk) for disk in now][1:] == uuids[1:] and bed.x.VDI.get_name_label(now[0]) == "ext"


def test_vm_revert_of_a_format_that_is_not_reverted(bed, srs):
    """nfs reverts VHD only: for QCOW2 the driver says 38, and the VM gets a clone."""
    vhd, qcow2 = bed.vdi(srs["nfs"]), bed.vdi(srs["nfs"], sm_config={"image-format": "qcow2"})
    now = revert(bed, vhd, qcow2)
    assert now[0] == vhd and now[1] != qcow2
    disk = bed.vdi(srs["nfs"], sm_config={"image-format": "qcow2"})
    snapshot = bed.x.VDI.snapshot(disk, {})
    assert failure(bed.x.VDI.revert, snapshot) == ["UNIMPLEMENTED_IN_SM_BACKEND", srs["nfs"]]
    raw = bed.vdi(srs["nfs"], sm_config={"type": "raw"})
    assert failure(bed.x.VDI.snapshot, raw, {}) == ["UNIMPLEMENTED_IN_SM_BACKEND", srs["nfs"]]


def test_errors_of_the_real_types(bed, srs):
    assert failure(bed.vdi, srs["ext"], 2041 * 2**30)[0] == "SR_BACKEND_FAILURE_79"
    small = bed.x.SR.create(bed.host, bed.device_config(), str(64 * MIB), "small", "", "lvmoiscsi", "user", False, {})
    disk = bed.vdi(small, 60 * MIB)
    bed.x.SR.update(small)
    assert bed.x.SR.get_physical_utilisation(small) == bed.x.VDI.get_physical_utilisation(disk) == str(60 * MIB)
    assert failure(bed.vdi, small, 8 * MIB)[0] == "SR_BACKEND_FAILURE_44"
    disk = bed.vdi(srs["ext"], 3 * MIB)
    assert bed.x.VDI.get_virtual_size(disk) == str(4 * MIB)
    with api(bed) as client:
        for _ in range(29):
            assert client.post(f"/v1/vdis/{bed.uuid(disk)}/snapshot", json={}).status_code == 201
    vm = bed.vm("long chain", (disk,))
    assert failure(bed.x.VM.snapshot, vm, "one too many")[0] == "SR_BACKEND_FAILURE_109"


def test_array_takes_the_snapshots_of_a_disk_with_it(bed, srs):
    disk = bed.vdi(srs["simarray"])
    snapshots = [bed.x.VDI.snapshot(disk, {}) for _ in range(2)]
    clone = bed.x.VDI.clone(snapshots[0], {})
    bed.x.VDI.destroy(disk)
    there = bed.x.VDI.get_all()
    assert clone in there and not {disk, *snapshots} & set(there)


def found_by_scan(bed, sr: str, name: str) -> str:
    """A VDI that came to be without xapi, after SR.scan."""
    with api(bed) as client:
        made = client.post("/v1/vdis", json={"sr": bed.x.SR.get_uuid(sr), "size_bytes": MIB, "name": name}).json()
    bed.x.SR.scan(sr)
    found = bed.x.VDI.get_by_uuid(made["uuid"])
    assert bed.x.VDI.get_name_label(found) == name and bed.x.VDI.get_snapshot_of(found) == NULL
    return found


def test_library(bed, srs):
    assert "vdi_snapshot" not in bed.x.SR.get_allowed_operations(srs["iso"])
    image = found_by_scan(bed, srs["iso"], "installer.iso")
    assert (bed.x.VDI.get_read_only(image), bed.x.VDI.get_sharable(image)) == (True, True)
    bed.fill(image, 7, "64k")
    readers = [bed.vm(name, (image,), mode="RO") for name in ("one", "two")]
    for vm in readers:
        bed.x.VM.start(vm, False, False)
    bed.holds(image, 7, "64k")
    with pytest.raises(AssertionError, match="Permission denied"):
        bed.fill(image, 8, "64k")
    for vm in readers:
        bed.x.VM.hard_shutdown(vm)


def test_devices_are_plugged_in_and_not_made(bed, srs):
    udev = srs["udev"]
    assert failure(bed.vdi, udev) == ["SR_OPERATION_NOT_SUPPORTED", udev]
    stick = found_by_scan(bed, udev, "stick")
    bed.fill(stick, 7, "64k")
    bed.x.VM.start(bed.vm("uses it", (stick,)), False, False)


def test_personality_by_device_config(bed):
    sr = bed.sr("by config", "sim", personality="nfs")
    disk = bed.vdi(sr)
    snapshot = bed.x.VDI.snapshot(disk, {})
    assert failure(bed.x.VDI.revert, snapshot) == ["UNIMPLEMENTED_IN_SM_BACKEND", sr]
    error = failure(lambda: bed.sr("wrong", "sim", personality="nsf"))
    assert error[0] == "SR_BACKEND_FAILURE_91" and "Did you mean nfs?" in error[2]
    error = failure(lambda: bed.sr("other", "ext", personality="nfs"))
    assert error[0] == "SR_BACKEND_FAILURE_91" and "this driver is for SRs like ext" in error[2]


def test_sr_of_another_type_is_not_attached(bed, srs):
    """The driver's capabilities would not be those of the SR."""
    uuid = bed.x.SR.get_uuid(bed.sr("moved", "ext"))
    [sr] = [ref for ref, row in bed.x.SR.get_all_records().items() if row["uuid"] == uuid]
    bed.x.PBD.unplug(bed.x.SR.get_PBDs(sr)[0])
    bed.x.SR.forget(sr)
    again = bed.x.SR.introduce(uuid, "moved", "", "nfs", "", False, {})
    pbd = bed.x.PBD.create({"host": bed.host, "SR": again, "device_config": bed.device_config()})
    error = failure(bed.x.PBD.plug, pbd)
    assert error[0] == "SR_BACKEND_FAILURE_91" and "is like ext, not like nfs+revert" in error[2]


def test_a_driver_keeps_the_checklist(bed):
    """EXTSR: no revert, so 38 and a clone."""
    names = {"found", "python", "make_sr", "create", "not_advertised", "attach", "snapshot", "no_revert", "processes"}
    points = [point for point in POINTS if point.check.__name__ in names]
    found = check_plugin(str(bed.sm / "EXTSR"), bed.simsrd.socket, points=points)
    assert {finding.ok for finding in found} <= {True, None} and sum(finding.ok is True for finding in found) >= 8, found


def test_a_description_that_is_damaged(bed, tmp_path):
    """The driver is not used; xapi's log says why."""
    for text in ("{", "[]", '{"name": 1, "capabilities": []}', '{"name": "ext", "capabilities": [1]}'):
        shutil.copy(bed.sm / "SimSR", tmp_path / "BadSR")
        (tmp_path / "BadSR.personality").write_text(text)
        [finding] = check_plugin(str(tmp_path / "BadSR"), bed.simsrd.socket, points=POINTS[:1])
        assert finding.ok is False and "SR_BACKEND_FAILURE_91" in finding.reason and "BadSR.personality" in finding.reason

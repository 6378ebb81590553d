"""vdi_revert.md 13.3: the other quicktests, against real storage."""

from __future__ import annotations

import calendar
import time

import pytest
import XenAPI
from xapi_kit import MIB, NULL, failure


def seconds(stamp) -> int:
    return calendar.timegm(time.strptime(stamp.value, "%Y%m%dT%H:%M:%SZ"))


# SRs.


def test_scan_update_probe_and_names(upstream, native_sr):
    x = upstream.x
    x.SR.scan(native_sr)  # finds what tests before this one have lost on purpose
    before = set(x.SR.get_VDIs(native_sr))
    x.SR.scan(native_sr)
    x.SR.update(native_sr)
    assert set(x.SR.get_VDIs(native_sr)) == before
    assert f"<UUID>{x.SR.get_uuid(native_sr)}</UUID>" in x.SR.probe(upstream.host, upstream.device_config(), "sim", {})
    x.SR.set_name_label(native_sr, "Grüße <&>")
    x.SR.set_name_description(native_sr, "")
    assert (x.SR.get_name_label(native_sr), x.SR.get_name_description(native_sr)) == ("Grüße <&>", "")


def test_scan_repairs_a_lost_database(upstream):
    x = upstream.x
    sr = upstream.sr("lost")
    disk = upstream.vdi(sr, name="kept")
    snapshot = x.VDI.snapshot(disk, {})
    uuids = {upstream.uuid(disk), upstream.uuid(snapshot)}
    x.VDI.forget(disk)
    x.VDI.forget(snapshot)
    assert x.SR.get_VDIs(sr) == []
    x.SR.scan(sr)
    found = {record["uuid"]: record for record in x.VDI.get_all_records_where(f'field "SR" = "{sr}"').values()}
    assert set(found) == uuids
    [copy] = [record for record in found.values() if record["is_a_snapshot"]]
    assert x.VDI.get_uuid(copy["snapshot_of"]) in uuids - {copy["uuid"]}
    assert x.SR.get_virtual_allocation(sr) == str(8 * MIB)


def test_sr_from_create_to_destroy(upstream):
    x = upstream.x
    sr = upstream.sr("short-lived")
    [pbd] = x.SR.get_PBDs(sr)
    assert failure(x.SR.destroy, sr) == ["SR_HAS_PBD", sr] == failure(x.SR.forget, sr)
    assert failure(x.PBD.create, {"host": upstream.host, "SR": sr, "device_config": {}})[0] == "SR_NOT_SHARABLE"
    disk = upstream.vdi(sr)
    x.PBD.unplug(pbd)
    assert failure(upstream.vdi, sr) == ["SR_HAS_NO_PBDS", sr]
    assert failure(x.SR.destroy, sr) == ["SR_NOT_EMPTY"]
    x.PBD.plug(pbd)
    x.VDI.destroy(disk)
    x.PBD.unplug(pbd)
    x.SR.destroy(sr)
    assert failure(x.SR.get_record, sr) == ["HANDLE_INVALID", "SR", sr] and failure(x.PBD.get_uuid, pbd)[0] == "HANDLE_INVALID"


def test_forget_and_introduce_keep_the_disks(upstream):
    x = upstream.x
    sr = upstream.sr("moving")
    uuid, disk = x.SR.get_uuid(sr), upstream.uuid(upstream.vdi(sr))
    x.PBD.unplug(x.SR.get_PBDs(sr)[0])
    x.SR.forget(sr)
    again = x.SR.introduce(uuid, "moving", "", "sim", "user", False, {})
    assert failure(x.SR.destroy, again) == ["SR_HAS_NO_PBDS", again]
    x.PBD.plug(x.PBD.create({"host": upstream.host, "SR": again, "device_config": upstream.device_config(), "other_config": {}}))
    assert x.VDI.get_SR(x.VDI.get_by_uuid(disk)) == again


def test_sr_that_cannot_be_made_leaves_no_rows(upstream):
    x = upstream.x
    before = set(x.SR.get_all()), set(x.PBD.get_all())
    assert failure(upstream.sr, "x", "nonsense") == ["SR_UNKNOWN_DRIVER", "nonsense"]
    description = failure(
        x.SR.create,
        upstream.host,
        {"socket": "/nowhere", "xapi_socket": upstream.xapi.socket},
        "0",
        "x",
        "",
        "sim",
        "",
        False,
        {},
    )
    assert description[0] == "SR_BACKEND_FAILURE_47"
    assert (set(x.SR.get_all()), set(x.PBD.get_all())) == before


# VDIs.


@pytest.mark.parametrize("size", [4 * MIB, 4 * MIB + 1, 5 * MIB - 1, 8 * MIB])
def test_create_and_destroy(upstream, native_sr, size):
    x = upstream.x
    disk = upstream.vdi(native_sr, size, tags=["a"], other_config={"k": "v"}, name_description="d")
    record = x.VDI.get_record(disk)
    assert int(record["virtual_size"]) >= size and record["location"] == record["uuid"] and record["managed"] is True
    assert (record["tags"], record["other_config"], record["name_description"]) == (["a"], {"k": "v"}, "d")
    x.VDI.destroy(disk)
    assert failure(x.VDI.get_record, disk) == ["HANDLE_INVALID", "VDI", disk]


def test_resize_grows(upstream, native_sr):
    disk = upstream.vdi(native_sr)
    upstream.x.VDI.resize(disk, str(5 * MIB))
    assert upstream.x.VDI.get_virtual_size(disk) == str(5 * MIB)
    assert failure(upstream.x.VDI.resize, disk, str(4 * MIB))[0] == "SR_BACKEND_FAILURE_79"


def test_introducing_nonsense_fails(upstream, native_sr):
    x = upstream.x
    uuid = "11111111-2222-4333-8444-555555555555"
    given = [uuid, "n", "", native_sr, "user", False, False, {}, uuid, {}, {}]
    assert failure(x.VDI.introduce, *given)[0] == "VDI_MISSING"
    assert failure(
        x.VDI.db_introduce, *given, True, "1", "1", NULL, False, XenAPI.xmlrpclib.DateTime("19700101T00:00:00Z"), NULL, False
    ) == ["PERMISSION_DENIED", ""]


def test_database_calls_are_for_plugins_only(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    for call, *arguments in [(x.VDI.db_forget, disk), (x.VDI.set_virtual_size, disk, "1"), (x.VDI.set_is_a_snapshot, disk, True),
                             (x.SR.set_physical_size, native_sr, "1")]:  # fmt: skip
        assert failure(call, *arguments) == ["PERMISSION_DENIED", ""]


@pytest.mark.parametrize("operation", ["clone", "snapshot"])
def test_clone_and_snapshot(upstream, native_sr, operation):
    x = upstream.x
    disk = upstream.vdi(native_sr, tags=["tag"], other_config={"k": "v"})
    upstream.fill(disk, 0x11)
    begin = int(time.time())
    copy = getattr(x.VDI, operation)(disk, {})
    end = int(time.time())
    source, record = x.VDI.get_record(disk), x.VDI.get_record(copy)
    for field in ("virtual_size", "name_label", "name_description", "type", "tags", "other_config", "sharable", "on_boot"):
        assert record[field] == source[field], field
    assert record["location"] != source["location"]
    is_snapshot = operation == "snapshot"
    assert record["is_a_snapshot"] is is_snapshot and record["snapshot_of"] == (disk if is_snapshot else NULL)
    assert source["snapshots"] == ([copy] if is_snapshot else [])
    if is_snapshot:
        assert begin <= seconds(record["snapshot_time"]) <= end
    x.VDI.update(copy)
    after = x.VDI.get_record(copy)
    assert {**after, "snapshot_time": 0} == {**record, "snapshot_time": 0}
    upstream.holds(copy, 0x11)


def test_snapshot_while_plugged_into_dom0(upstream, native_sr):
    x = upstream.x
    dom0 = x.host.get_control_domain(upstream.host)
    disk = upstream.vdi(native_sr)
    vbd = upstream.vbd(dom0, disk)
    x.VBD.plug(vbd)
    snapshot = x.VDI.snapshot(disk, {})
    assert failure(x.VDI.destroy, disk) == ["VDI_IN_USE", disk, "destroy"]
    x.VBD.unplug(vbd)
    x.VBD.destroy(vbd)
    x.VDI.destroy(snapshot)
    x.VDI.destroy(disk)


def test_twenty_readers_in_dom0(upstream, native_sr):
    x = upstream.x
    dom0 = x.host.get_control_domain(upstream.host)
    disk = upstream.vdi(native_sr)
    vbds = []
    for _ in range(20):
        vbds.append(upstream.vbd(dom0, disk, mode="RO"))
        x.VBD.plug(vbds[-1])
    writer = upstream.vbd(dom0, disk, mode="RW")
    assert failure(x.VBD.plug, writer) == ["VDI_IN_USE", disk, "attach"]
    for vbd in vbds:
        assert x.VDI.get_nbd_info(disk)
        x.VBD.unplug(vbd)
        x.VBD.destroy(vbd)
    x.VBD.plug(writer)
    x.VBD.unplug(writer)
    x.VBD.destroy(writer)


def test_data_integrity(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    upstream.fill(disk, 0x5A)
    other_sr = upstream.sr("the other")
    copies = [
        x.VDI.snapshot(disk, {}),
        x.VDI.clone(disk, {}),
        x.VDI.copy(disk, other_sr),
        x.VDI.copy(disk, native_sr, NULL, NULL),
    ]
    into = upstream.vdi(native_sr)
    assert x.VDI.copy(disk, NULL, NULL, into) == into
    upstream.fill(disk, 0xA5)
    for copy in [*copies, into]:
        upstream.holds(copy, 0x5A)
    assert x.VDI.get_SR(copies[2]) == other_sr
    assert x.VDI.get_VBDs(disk) == [] and x.VDI.get_VBDs(copies[2]) == []


def test_copy_that_fails_leaves_nothing_behind(wrapped_world, plan):
    world = wrapped_world
    sr = world.sr("copy fails", "odd")
    disk = world.vdi(sr)
    plan.set(vdi_attach=[None, 46])
    assert failure(world.x.VDI.copy, disk, sr)[0] == "SR_BACKEND_FAILURE_46"
    assert world.x.SR.get_VDIs(sr) == [disk] and world.x.VDI.get_VBDs(disk) == []
    world.x.VDI.destroy(disk)


def test_clone_without_the_feature_is_a_full_copy(wrapped_world, plan):
    world = wrapped_world
    disk = world.vdi(world.shared_sr("noclone"))
    world.fill(disk, 0x5A)
    world.holds(world.x.VDI.clone(disk, {}), 0x5A)
    assert "vdi_clone" not in plan.commands()
    plan.set(vdi_clone=[38])
    other = world.vdi(world.shared_sr("odd"))
    world.fill(other, 0x5A)
    world.holds(world.x.VDI.clone(other, {}), 0x5A)


def test_changed_block_tracking(wrapped_world, plan):
    """The driver's part is played: SimSR behind the wrapper knows no CBT, so its answers are planned."""
    world, x = wrapped_world, wrapped_world.x
    disk = world.vdi(world.shared_sr("cbt"))
    nil = "<value><nil/></value>"
    plan.set(vdi_enable_cbt=[nil], vdi_disable_cbt=[nil], vdi_data_destroy=[nil], vdi_list_changed_blocks=["<value>AAE=</value>"])
    x.VDI.enable_cbt(disk)
    x.VDI.enable_cbt(disk)
    snapshot = x.VDI.snapshot(disk, {})
    assert x.VDI.get_cbt_enabled(disk) is True is x.VDI.get_cbt_enabled(snapshot)
    assert x.VDI.get_cbt_enabled(x.VDI.clone(disk, {})) is False
    assert x.VDI.list_changed_blocks(snapshot, disk) == "AAE="
    x.VDI.data_destroy(snapshot)
    record = x.VDI.get_record(snapshot)
    assert record["type"] == "cbt_metadata" and record["other_config"]["content_id"].startswith("no content")
    assert failure(x.VDI.revert, snapshot) == ["VDI_INCOMPATIBLE_TYPE", snapshot, "cbt_metadata"]
    x.VDI.disable_cbt(disk)
    assert x.VDI.get_cbt_enabled(disk) is False
    assert plan.commands().count("vdi_enable_cbt") == 1


# VMs.


def test_power_states(upstream, native_sr):
    x = upstream.x
    vm = upstream.vm("power", (upstream.vdi(native_sr),))
    assert failure(x.VM.clean_shutdown, vm) == ["VM_BAD_POWER_STATE", vm, "running", "halted"]
    assert failure(x.VM.resume, vm, False, False) == ["VM_BAD_POWER_STATE", vm, "suspended", "halted"]
    x.VM.start(vm, True, False)
    assert x.VM.get_power_state(vm) == "Paused"
    x.VM.unpause(vm)
    assert failure(x.VM.start, vm, False, False) == ["VM_BAD_POWER_STATE", vm, "halted", "running"]
    assert failure(x.VM.destroy, vm) == ["VM_BAD_POWER_STATE", vm, "halted, suspended", "running"]
    x.pool.set_suspend_image_SR(x.pool.get_all()[0], native_sr)
    x.VM.suspend(vm)
    image = x.VM.get_suspend_VDI(vm)
    assert x.VDI.get_type(image) == "suspend"
    x.VM.resume(vm, False, False)
    assert failure(x.VDI.get_uuid, image)[0] == "HANDLE_INVALID" and x.VM.get_suspend_VDI(vm) == NULL
    x.VM.suspend(vm)
    x.VM.hard_shutdown(vm)
    assert x.VM.get_power_state(vm) == "Halted" and x.VM.get_suspend_VDI(vm) == NULL


def test_start_that_fails_half_way_attaches_nothing(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    sr = world.shared_sr("odd")
    vm = world.vm("start fails", (world.vdi(sr), world.vdi(sr)))
    plan.set(vdi_activate=[None, 46])
    assert failure(x.VM.start, vm, False, False)[0] == "SR_BACKEND_FAILURE_46"
    assert x.VM.get_power_state(vm) == "Halted"
    assert not any(vbd["currently_attached"] or vbd["storage_lock"] for vbd in world.vbds(vm).values())
    assert plan.commands().count("vdi_detach") == 2
    x.VM.start(vm, False, False)
    x.VM.hard_shutdown(vm)


def test_suspend_that_fails_half_way_leaves_the_vm_running(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    sr = world.sr("suspend fails", "odd")
    disks = (world.vdi(sr), world.vdi(sr))
    vm = world.vm("suspend fails", disks)
    x.pool.set_suspend_image_SR(x.pool.get_all()[0], sr)
    x.VM.start(vm, False, False)
    plan.set(vdi_detach=[None, 46])
    assert failure(x.VM.checkpoint, vm, "c")[0] == "SR_BACKEND_FAILURE_46"
    assert x.VM.get_power_state(vm) == "Running" and set(x.SR.get_VDIs(sr)) == set(disks)
    assert all(vbd["currently_attached"] and vbd["storage_lock"] for vbd in world.vbds(vm).values())
    x.VM.hard_shutdown(vm)


def test_snapshots_cannot_run_and_outlive_their_vm(upstream, native_sr):
    x = upstream.x
    vm = upstream.vm("tree", (upstream.vdi(native_sr),))
    first, second = x.VM.snapshot(vm, "1"), x.VM.snapshot(vm, "2")
    record = x.VM.get_record(second)
    assert record["is_a_snapshot"] and record["is_a_template"] and record["power_state"] == "Halted"
    assert record["snapshot_info"] == {"power-state-at-snapshot": "Halted", "disk-snapshot-type": "crash_consistent"}
    assert (record["parent"], x.VM.get_parent(vm), x.VM.get_children(first)) == (first, second, [second])
    assert set(x.VM.get_snapshots(vm)) == {first, second}
    assert upstream.vbds(second)["0"]["other_config"] == {"owner": ""}
    assert failure(x.VM.start, first, False, False) == ["VM_IS_SNAPSHOT", first, "start"]
    assert failure(x.VM.start, upstream.template, False, False) == ["VM_IS_TEMPLATE", upstream.template, "start"]
    x.VM.destroy(first)
    assert x.VM.get_parent(second) == NULL
    x.VM.destroy(vm)
    assert x.VM.get_snapshot_of(second) == vm


def test_clone_of_a_snapshot_has_disks_of_its_own(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    upstream.fill(disk, 0x11)
    vm = upstream.vm("original", (disk,))
    snapshot = x.VM.snapshot(vm, "s")
    upstream.fill(disk, 0x22)
    clone, copy = x.VM.clone(snapshot, "clone"), x.VM.copy(vm, "copy", NULL)
    for other, pattern in ((clone, 0x11), (copy, 0x22)):
        new = upstream.vbds(other)["0"]["VDI"]
        assert new not in (disk, upstream.vbds(snapshot)["0"]["VDI"])
        assert x.VM.get_is_a_snapshot(other) is False and x.VDI.get_is_a_snapshot(new) is False
        upstream.holds(new, pattern)


def test_failed_snapshot_leaves_nothing_behind(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    sr = world.sr("snapshot fails", "odd")
    disks = {world.vdi(sr), world.vdi(sr)}
    vm = world.vm("snapshot fails", tuple(disks))
    plan.set(vdi_snapshot=[None, 44])
    assert failure(x.VM.snapshot, vm, "s")[0] == "SR_BACKEND_FAILURE_44"
    assert set(x.SR.get_VDIs(sr)) == disks and x.VM.get_snapshots(vm) == []


def test_drives(upstream, native_sr):
    x = upstream.x
    vm = upstream.vm("drive")
    medium = upstream.vdi(native_sr)
    drive = upstream.vbd(vm, NULL, "3", type="CD", mode="RO")
    assert failure(x.VBD.insert, drive, medium)[0] == "VM_BAD_POWER_STATE"
    x.VM.start(vm, False, False)
    assert failure(x.VBD.eject, drive) == ["VBD_IS_EMPTY", drive]
    x.VBD.insert(drive, medium)
    assert x.VBD.get_VDI(drive) == medium and x.VDI.get_nbd_info(medium)
    assert failure(x.VBD.insert, drive, medium) == ["VBD_NOT_EMPTY", drive]
    x.VBD.eject(drive)
    assert x.VBD.get_VDI(drive) == NULL and x.VBD.get_empty(drive) is True
    assert "3" not in x.VM.get_allowed_VBD_devices(vm) and "0" in x.VM.get_allowed_VBD_devices(vm)
    assert failure(upstream.vbd, vm, medium, "3") == ["DEVICE_ALREADY_EXISTS", "3"]
    x.VM.hard_shutdown(vm)


def test_no_vdi_is_left_over_at_the_end(upstream):
    x = upstream.x
    sr = upstream.sr("leak")
    disk = upstream.vdi(sr)
    vm = upstream.vm("leak", (disk,))
    snapshot = x.VM.snapshot(vm, "s")
    x.VM.revert(snapshot)
    for other in (snapshot, vm):
        disks = [vbd["VDI"] for vbd in upstream.vbds(other).values()]
        x.VM.destroy(other)
        for left in disks:
            x.VDI.destroy(left)
    x.SR.scan(sr)
    assert x.SR.get_VDIs(sr) == []

"""vdi_revert.md 13.4 and sections 5 and 6: VM.revert and VDI.revert with real disks, and drivers that fail when told to."""

from __future__ import annotations

import hashlib
import random
import subprocess
import threading
import time

import pytest
import XenAPI
from xapi_kit import MIB, NULL, SIMSR_PLUGIN, failure

from simsr.xapi import smapiv1


def checksum(world, vdi: str) -> str:
    uri = f"nbd+unix:///{world.uuid(vdi)}?socket={world.simsrd.root}/nbd.sock"
    done = subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, "/dev/stdout"], capture_output=True)
    if done.returncode or not done.stdout:  # this qemu-img cannot write to a pipe
        done = subprocess.run(["nbdcopy", uri, "-"], capture_output=True, check=True)
    return hashlib.sha256(done.stdout).hexdigest()


# 13.4


def test_revert_twice_in_a_row_gives_the_same_content(upstream, native_sr):
    disk = upstream.vdi(native_sr)
    upstream.fill(disk, 0x11)
    snapshot = upstream.x.VDI.snapshot(disk, {})
    before = checksum(upstream, snapshot)
    for pattern in (0x22, 0x33):
        upstream.fill(disk, pattern)
        upstream.x.VDI.revert(snapshot)
        upstream.x.VDI.revert(snapshot)
        upstream.holds(disk, 0x11)
        assert checksum(upstream, snapshot) == before == checksum(upstream, disk)


def test_write_snap_grow_write_revert_takes_the_size_back(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    snapshot = x.VDI.snapshot(disk, {})
    x.VDI.resize(disk, str(8 * MIB))
    upstream.fill(disk, 0x22, "8M")
    assert x.VDI.get_virtual_size(disk) == str(8 * MIB)
    x.VDI.revert(snapshot)
    assert x.VDI.get_virtual_size(disk) == str(4 * MIB)


@pytest.mark.parametrize(("moment", "held"), [("kill", 0x22), ("kill_after", 0x11)])
def test_daemon_killed_during_revert_leaves_old_or_new_content(wrapped_world, plan, moment, held):
    """Before the plug-in reaches it, and right after it was asked. test_faults.py has each request and the moments of it, the tests of
    the store have each step of its journal."""
    world, x = wrapped_world, wrapped_world.x
    disk = world.vdi(world.shared_sr("odd"))
    world.fill(disk, 0x11)
    snapshot = x.VDI.snapshot(disk, {})
    world.fill(disk, 0x22)
    plan.set(vdi_revert=[{moment: "simsrd"}])
    if moment == "kill":
        assert failure(x.VDI.revert, snapshot)[0] == "SR_BACKEND_FAILURE_47"
    else:
        x.VDI.revert(snapshot)
    world.simsrd.kill()
    world.start_simsrd()
    world.holds(disk, held)
    world.holds(snapshot, 0x11)


def test_fault_38_falls_back_to_clone_and_repoints_the_siblings(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    sr = world.shared_sr("odd")
    disk = world.vdi(sr)
    vm = world.vm("falls back", (disk,))
    world.fill(disk, 0x11)
    snapshots = [x.VM.snapshot(vm, name) for name in ("a", "b")]
    world.fill(disk, 0x22)
    uuid = world.uuid(disk)
    plan.set(vdi_revert=[38])
    x.VM.revert(snapshots[0])
    new = world.vbds(vm)["0"]["VDI"]
    assert world.uuid(new) != uuid and failure(x.VDI.get_record, disk)[0] == "HANDLE_INVALID"
    for snapshot in snapshots:
        assert x.VDI.get_snapshot_of(world.vbds(snapshot)["0"]["VDI"]) == new
    world.holds(new, 0x11)


def test_only_the_two_codes_fall_back(wrapped_world, plan):
    """UNIMPLEMENTED_IN_SM_BACKEND (38) above; SR_OPERATION_NOT_SUPPORTED with a driver without VDI_CLONE; nothing else."""
    world, x = wrapped_world, wrapped_world.x
    sr = world.shared_sr("noclone")
    disk = world.vdi(sr)
    vm = world.vm("no clone", (disk,))
    world.fill(disk, 0x11)
    snapshot = x.VM.snapshot(vm, "s")
    world.fill(disk, 0x22)
    snapshot_disk = world.vbds(snapshot)["0"]["VDI"]
    assert failure(x.VDI.revert, snapshot_disk) == ["SR_OPERATION_NOT_SUPPORTED", sr]
    x.VM.revert(snapshot)
    new = world.vbds(vm)["0"]["VDI"]
    assert new != disk
    world.holds(new, 0x11)
    assert "vdi_revert" not in plan.commands() and "vdi_clone" not in plan.commands()


@pytest.mark.parametrize("number", [1, 24, 47, 143, 144, 200, 202, 1200])
def test_other_faults_abort_and_touch_nothing(wrapped_world, plan, number):
    world, x = wrapped_world, wrapped_world.x
    disk = world.vdi(world.shared_sr("odd"))
    vm = world.vm("aborts", (disk,))
    world.fill(disk, 0x11)
    snapshot = x.VM.snapshot(vm, "s")
    plan.set(vdi_revert=[number])
    assert failure(x.VM.revert, snapshot) == ["VM_REVERT_FAILED", snapshot, vm]
    assert {device: vbd["VDI"] for device, vbd in world.vbds(vm).items()} == {"0": disk}
    world.holds(disk, 0x11)
    assert not {"vdi_delete", "vdi_clone"} & set(plan.commands())
    x.VM.revert(snapshot)


@pytest.mark.parametrize("number", [44, 109])
def test_no_space_and_chain_too_long_pass_through(wrapped_world, plan, number):
    world, x = wrapped_world, wrapped_world.x
    vm = world.vm("passes", (world.vdi(world.shared_sr("odd")),))
    snapshot = x.VM.snapshot(vm, "s")
    plan.set(vdi_revert=[number])
    assert failure(x.VM.revert, snapshot) == [f"SR_BACKEND_FAILURE_{number}", "", "as planned", ""]


@pytest.mark.parametrize("fidelity", ["wrapped_world", "fixed"])
def test_fault_47_on_the_second_of_three_disks(request, plan_for, fidelity):
    """5.1, in both fidelities: disk 1 new, 2 and 3 old, the VM Halted with the fields of the snapshot and its VBDs, nothing destroyed or
    cloned, the links as they were, nothing under way any more; a retry works."""
    world = request.getfixturevalue(fidelity)
    x, plan = world.x, plan_for(world)
    sr = world.shared_sr("odd")
    disks = tuple(world.vdi(sr, name=f"disk {number}") for number in range(3))
    vm = world.vm("three", disks)
    x.VM.set_name_description(vm, "at the snapshot")
    for disk in disks:
        world.fill(disk, 0x11)
    snapshot = x.VM.snapshot(vm, "s")
    copies = sorted(vbd["VDI"] for vbd in world.vbds(snapshot).values())
    in_order = [x.VDI.get_snapshot_of(copy) for copy in copies]  # the loop goes in the order of references
    for disk in disks:
        world.fill(disk, 0x22)
    x.VM.set_name_description(vm, "later")
    x.VM.start(vm, False, False)
    vbds = {device: (vbd["uuid"], vbd["VDI"]) for device, vbd in world.vbds(vm).items()}
    records = {vdi: x.VDI.get_record(vdi) for vdi in (*disks, *copies)}
    plan.set(vdi_revert=[None, 47])
    plan.forget_calls()
    assert failure(x.VM.revert, snapshot) == ["VM_REVERT_FAILED", snapshot, vm]
    assert plan.commands().count("vdi_revert") == 2
    assert not {"vdi_delete", "vdi_clone", "vdi_snapshot"} & set(plan.commands())
    assert (x.VM.get_power_state(vm), x.VM.get_name_description(vm)) == ("Halted", "at the snapshot")
    assert {device: (vbd["uuid"], vbd["VDI"]) for device, vbd in world.vbds(vm).items()} == vbds
    for vdi, record in records.items():
        kept = ("uuid", "location", "name_label", "virtual_size", "is_a_snapshot", "snapshot_of", "managed", "VBDs")
        assert {name: x.VDI.get_record(vdi)[name] for name in kept} == {name: record[name] for name in kept}
        assert x.VDI.get_current_operations(vdi) == {}
    assert x.VM.get_current_operations(vm) == {} == x.VM.get_current_operations(snapshot) == x.SR.get_current_operations(sr)
    assert not [m for m in x.message.get_all_records().values() if m["obj_uuid"] == x.VM.get_uuid(vm)], "it was not reverted"
    world.holds(in_order[0], 0x11)
    world.holds(in_order[1], 0x22)
    world.holds(in_order[2], 0x22)
    x.VM.revert(snapshot)
    for disk in disks:
        world.holds(disk, 0x11)


def test_the_target_is_named_by_reference_and_the_snapshot_by_ref_uuid_and_location(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    disk = world.vdi(world.shared_sr("odd"))
    snapshot = x.VDI.snapshot(disk, {})
    plan.forget_calls()
    x.VDI.revert(snapshot)
    [call] = [call for call in plan.calls() if call["command"] == "vdi_revert"]
    uuid = world.uuid(snapshot)
    assert f"<name>args</name><value><array><data><value>{disk}</value></data></array></value>" in call["request"]
    for name, value in (("vdi_ref", snapshot), ("vdi_uuid", uuid), ("vdi_location", uuid), ("vdi_on_boot", "persist")):
        assert f"<member><name>{name}</name><value>{value}</value></member>" in call["request"]
    assert "driver_params" not in call["request"]


@pytest.mark.parametrize("form", ["ref", "uuid"])
def test_target_as_ref_and_as_uuid_has_the_same_effect(wrapped_world, plan, form):
    """What an older xapi would have sent: the request that was sent, with the uuid in the place of the reference."""
    world, x = wrapped_world, wrapped_world.x
    disk = world.vdi(world.shared_sr("odd"))
    world.fill(disk, 0x11)
    snapshot = x.VDI.snapshot(disk, {})
    plan.forget_calls()
    x.VDI.revert(snapshot)
    [call] = [call for call in plan.calls() if call["command"] == "vdi_revert"]
    world.fill(disk, 0x22)
    request = call["request"] if form == "ref" else call["request"].replace(disk, world.uuid(disk))
    done = subprocess.run(
        [str(SIMSR_PLUGIN), request], env=smapiv1.ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
    smapiv1.unit(smapiv1.read_answer(done.stdout))
    world.holds(disk, 0x11)


@pytest.mark.parametrize("compat", ["none", "cloudstack"])
def test_stock_cloudstack_script(upstream, compat):
    """Section 9: the script destroys the VM, reverts, and destroys the old disks by uuid.

    With revert-compat=cloudstack SimSR answers 38 because the disk has no VBD, and xapi clones as it always did.
    script/cloudstack.py has the whole sequence, the demonstration runs it.
    """
    x = upstream.x
    disk = upstream.vdi(upstream.sr(f"cloudstack {compat}", **{"revert-compat": compat}))
    vm = upstream.vm(f"i-2-3-VM {compat}", (disk,))
    upstream.fill(disk, 0x11)
    snapshot = x.VM.snapshot(vm, "cs snapshot")
    snapshot_disk = upstream.vbds(snapshot)["0"]["VDI"]
    upstream.fill(disk, 0x22)
    old_uuid, old_disks = x.VM.get_uuid(vm), [upstream.uuid(vbd["VDI"]) for vbd in upstream.vbds(vm).values()]
    x.VM.destroy(vm)
    assert x.VM.get_snapshot_of(snapshot) == vm and failure(x.VM.get_record, vm) == ["HANDLE_INVALID", "VM", vm]
    x.VM.revert(snapshot)
    again = x.VM.get_by_uuid(old_uuid)
    assert again != vm and x.VM.get_snapshot_of(snapshot) == again
    for uuid in old_disks:
        try:
            x.VDI.destroy(x.VDI.get_by_uuid(uuid))
        except XenAPI.Failure as error:  # the script ignores errors
            assert error.details[0] == "UUID_INVALID"
    if compat == "cloudstack":
        new = upstream.vbds(again)["0"]["VDI"]
        assert x.VDI.get_snapshot_of(snapshot_disk) == new
        upstream.holds(new, 0x11)
    else:
        assert x.VM.get_VBDs(again) == []
        assert failure(x.VDI.get_by_uuid, old_disks[0])[0] == "UUID_INVALID"
        upstream.holds(snapshot_disk, 0x11)


def test_valves_stay_out_of_the_way(upstream):
    """With both valves on, the disk of a halted VM is reverted in place: identity and content as the contract says."""
    x = upstream.x
    disk = upstream.vdi(upstream.sr("both valves", **{"revert-compat": "cloudstack,checkpoint"}))
    vm = upstream.vm("both valves", (disk,))
    upstream.fill(disk, 0x11)
    snapshot = x.VM.snapshot(vm, "s")
    upstream.fill(disk, 0x22)
    x.VM.revert(snapshot)
    assert upstream.vbds(vm)["0"]["VDI"] == disk
    upstream.holds(disk, 0x11)


def test_checkpoint_valve(upstream):
    """6.4, consequence 4, does not come about: the disk is cloned, and the resumed VM has it."""
    x = upstream.x
    sr = upstream.sr("checkpoint valve", **{"revert-compat": "checkpoint"})
    x.pool.set_suspend_image_SR(x.pool.get_all()[0], sr)
    disk = upstream.vdi(sr)
    vm = upstream.vm("checkpoint valve", (disk,))
    x.VM.start(vm, False, False)
    upstream.fill(disk, 0x11)
    checkpoint = x.VM.checkpoint(vm, "with memory")
    upstream.fill(disk, 0x22)
    x.VM.revert(checkpoint)
    vbd = upstream.vbds(vm)["0"]
    assert vbd["VDI"] != disk and vbd["currently_attached"] is True and x.VM.get_power_state(vm) == "Suspended"
    x.VM.resume(vm, False, False)
    assert x.VDI.get_nbd_info(vbd["VDI"])
    upstream.holds(vbd["VDI"], 0x11)
    x.VM.hard_shutdown(vm)


def test_concurrent_revert_and_scan_are_serialised(upstream):
    """Nobody sees OTHER_OPERATION_IN_PROGRESS, no VDI is forgotten, and no two operations of the SR run at once."""
    x = upstream.x
    sr = upstream.shared_sr()
    disk = upstream.vdi(sr)
    upstream.fill(disk, 0x11)
    snapshot = x.VDI.snapshot(disk, {})
    known = set(x.SR.get_VDIs(sr))
    together, done = 0, threading.Event()

    def watch():
        nonlocal together
        session = upstream.xapi.session()
        while not done.is_set():
            together = max(together, len(session.xenapi.SR.get_current_operations(sr)))
        session.logout()
        session("close")()

    watcher = threading.Thread(target=watch)
    watcher.start()
    tasks = [call(argument) for _ in range(4) for call, argument in ((x.Async.VDI.revert, snapshot), (x.Async.SR.scan, sr))]
    records = [upstream.wait_task(task) for task in tasks]
    done.set()
    watcher.join()
    assert [record["status"] for record in records] == ["success"] * 8, records
    assert together == 1
    assert set(x.SR.get_VDIs(sr)) == known
    upstream.holds(disk, 0x11)


def test_operations_under_way_are_shown_where_clients_look(wrapped_world, plan):
    """Section 2: in current_operations of snapshot, disk and SR; never in VDI.allowed_operations."""
    world, x = wrapped_world, wrapped_world.x
    sr = world.shared_sr("odd")
    disk = world.vdi(sr)
    snapshot = x.VDI.snapshot(disk, {})
    plan.set(vdi_revert=[{"hold": True}])
    task = x.Async.VDI.revert(snapshot)
    while "vdi_revert" not in plan.commands():
        time.sleep(0.01)
    assert [list(x.VDI.get_current_operations(vdi).values()) for vdi in (snapshot, disk)] == [["revert_to"], ["revert_from"]]
    assert x.SR.get_current_operations(sr) == {task: "vdi_revert"}
    assert x.SR.get_allowed_operations(sr) == ["plug"]
    plan.release()
    assert world.wait_task(task)["status"] == "success"
    for cls, ref in (("VDI", snapshot), ("VDI", disk), ("SR", sr)):
        assert getattr(x, cls).get_current_operations(ref) == {}
    assert not {"revert_to", "revert_from"} & set(x.VDI.get_allowed_operations(snapshot))
    assert "vdi_revert" in x.SR.get_allowed_operations(sr)


def test_memory_out_of_reach(upstream):
    """6.1, step 3: the SR of a checkpoint's suspend image must be plugged."""
    x = upstream.x
    sr, memory_sr = upstream.shared_sr(), upstream.sr("memory")
    vm = upstream.vm("memory", (upstream.vdi(sr),))
    x.VM.set_suspend_SR(vm, memory_sr)
    x.VM.start(vm, False, False)
    checkpoint = x.VM.checkpoint(vm, "c")
    x.PBD.unplug(x.SR.get_PBDs(memory_sr)[0])
    assert failure(x.VM.revert, checkpoint) == ["HOST_NOT_LIVE", upstream.host]
    assert x.VM.get_power_state(vm) == "Running", "nothing was done yet"
    x.VM.hard_shutdown(vm)


@pytest.mark.parametrize("fidelity", ["upstream", "fixed"])
def test_checkpoint_revert_under_both_fidelities(request, fidelity):
    world = request.getfixturevalue(fidelity)
    x = world.x
    sr = world.shared_sr()
    x.pool.set_suspend_image_SR(x.pool.get_all()[0], sr)
    disk = world.vdi(sr)
    vm = world.vm(f"checkpoint {fidelity}", (disk,))
    x.VM.start(vm, False, False)
    world.fill(disk, 0x11)
    checkpoint = x.VM.checkpoint(vm, "with memory")
    assert (x.VM.get_power_state(vm), x.VM.get_power_state(checkpoint)) == ("Running", "Suspended")
    assert world.vbds(checkpoint)["0"]["currently_attached"] is True
    assert x.VM.get_snapshot_info(checkpoint)["power-state-at-snapshot"] == "Running"
    assert x.VDI.get_type(x.VM.get_suspend_VDI(checkpoint)) == "suspend"
    world.fill(disk, 0x22)
    x.VM.revert(checkpoint)
    assert x.VM.get_power_state(vm) == "Suspended" and x.VM.get_suspend_VDI(vm) != NULL
    assert world.vbds(vm)["0"]["VDI"] == disk
    assert world.vbds(vm)["0"]["currently_attached"] is (fidelity == "fixed")
    x.VM.resume(vm, False, False)
    nbd = x.VDI.get_nbd_info(disk)
    assert bool(nbd) is (fidelity == "fixed"), "the resumed VM has its disk only under fixed"
    world.holds(disk, 0x11)
    x.VM.hard_shutdown(vm)


def test_attached_target_is_in_use(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    vm = upstream.vm("attached", (disk,))
    snapshot = x.VDI.snapshot(disk, {})
    x.VM.start(vm, False, False)
    assert failure(x.VDI.revert, snapshot) == ["VDI_IN_USE", disk, "revert_from"]
    x.VM.hard_shutdown(vm)
    x.VDI.revert(snapshot)


def test_writer_that_xapi_knows_nothing_of_is_fault_24(upstream, native_sr):
    disk = upstream.vdi(native_sr)
    snapshot = upstream.x.VDI.snapshot(disk, {})
    uri = f"nbd+unix:///{upstream.uuid(disk)}?socket={upstream.simsrd.root}/nbd.sock"
    with subprocess.Popen(["qemu-io", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdin.write(b"write -P 1 0 4k\n")
        writer.stdin.flush()
        writer.stdout.readline()
        assert failure(upstream.x.VDI.revert, snapshot) == ["VDI_IN_USE"]
        writer.stdin.close()
    upstream.x.VDI.revert(snapshot)


# Sections 5.3 and 6.


@pytest.mark.parametrize("fidelity", ["upstream", "fixed"])
def test_disk_deleted_before_the_revert(request, fidelity):
    """5.3: xapi gives up although the driver could clone; fixed clones."""
    world = request.getfixturevalue(fidelity)
    disk = world.vdi(world.shared_sr())
    vm = world.vm("dangling", (disk,))
    world.fill(disk, 0x11)
    snapshot = world.x.VM.snapshot(vm, "s")
    copy = world.vbds(snapshot)["0"]["VDI"]
    world.x.VDI.destroy(disk)
    assert failure(world.x.VDI.revert, copy) == ["HANDLE_INVALID", "VDI", disk]
    if fidelity == "upstream":
        assert failure(world.x.VM.revert, snapshot) == ["VM_REVERT_FAILED", snapshot, vm]
        assert world.x.VM.get_VBDs(vm) == []
    else:
        world.x.VM.revert(snapshot)
        world.holds(world.vbds(vm)["0"]["VDI"], 0x11)


@pytest.mark.parametrize("fidelity", ["upstream", "fixed"])
def test_vbds_after_a_native_revert(request, fidelity):
    """6.4, consequences 1 and 2: changed attributes and a detached disk come back under fixed only."""
    world = request.getfixturevalue(fidelity)
    x = world.x
    sr = world.shared_sr()
    disks = (world.vdi(sr), world.vdi(sr))
    vm = world.vm("vbds", disks)
    snapshot = x.VM.snapshot(vm, "s")
    first, second = (x.VM.get_VBDs(vm)[number] for number in (0, 1))
    x.VBD.set_bootable(first, True)
    x.VBD.destroy(second)
    x.VM.revert(snapshot)
    after = {vbd["VDI"]: vbd for vbd in world.vbds(vm).values()}
    assert x.VBD.get_uuid(first) == after[disks[0]]["uuid"]
    if fidelity == "upstream":
        assert set(after) == {disks[0]} and after[disks[0]]["bootable"] is True
    else:
        assert set(after) == set(disks) and after[disks[0]]["bootable"] is False
        assert after[disks[1]]["userdevice"] == "1"


@pytest.mark.parametrize("feature", ["on", "off"])
def test_the_worked_example(upstream, feature):
    """6.6: disks a (0), b (1, added later), an ISO in a drive."""
    x = upstream.x
    sr = upstream.sr(f"worked example {feature}", revert=feature)
    a, b, iso = upstream.vdi(sr, name="a"), upstream.vdi(sr, name="b"), upstream.vdi(sr, name="iso")
    vm = upstream.vm("worked example", (a,))
    upstream.vbd(vm, iso, "3", type="CD", mode="RO")
    snapshot = x.VM.snapshot(vm, "s")
    vbd_0 = upstream.vbds(vm)["0"]["uuid"]
    cd = upstream.vbds(vm)["3"]["uuid"]
    upstream.vbd(vm, b, "1")
    x.VM.revert(snapshot)
    after = upstream.vbds(vm)
    assert set(after) == {"0", "3"} and after["3"]["VDI"] == iso and after["3"]["uuid"] != cd
    native = feature == "on"
    assert (after["0"]["VDI"] == a) is native and (after["0"]["uuid"] == vbd_0) is native
    assert x.VDI.get_VBDs(b) == [] and x.VDI.get_uuid(b)
    assert x.VDI.get_snapshot_of(upstream.vbds(snapshot)["0"]["VDI"]) == after["0"]["VDI"]
    if not native:
        assert failure(x.VDI.get_uuid, a) == ["HANDLE_INVALID", "VDI", a]


def test_fields_of_the_vm_go_back(upstream, native_sr):
    x = upstream.x
    vm = upstream.vm("fields", (upstream.vdi(native_sr),))
    x.VM.add_to_other_config(vm, "key", "old")
    x.VM.set_VCPUs_max(vm, "2")
    snapshot = x.VM.snapshot(vm, "s")
    uuid = x.VM.get_uuid(vm)
    x.VM.set_name_label(vm, "renamed")
    x.VM.set_tags(vm, ["kept"])
    x.VM.set_VCPUs_max(vm, "4")
    x.VM.set_other_config(vm, {"key": "new"})
    x.VM.start(vm, False, False)
    x.VM.revert(snapshot)
    record = x.VM.get_record(vm)
    assert (record["name_label"], record["VCPUs_max"], record["other_config"]["key"]) == ("fields", "2", "old")
    assert (record["tags"], record["uuid"], record["parent"], record["power_state"]) == (["kept"], uuid, snapshot, "Halted")
    assert record["is_a_snapshot"] is False and record["is_a_template"] is False


def test_revert_of_a_vm_that_is_no_snapshot(upstream, native_sr):
    vm = upstream.vm("no snapshot", ())
    assert failure(upstream.x.VM.revert, vm) == ["REVERT_ONLY_ALLOWED_ON_SNAPSHOT"]
    disk = upstream.vdi(native_sr)
    assert failure(upstream.x.VDI.revert, disk) in (["REVERT_ONLY_ALLOWED_ON_SNAPSHOT"], ["HANDLE_INVALID", "VDI", NULL])


def test_clone_that_fails_leaves_nothing_behind(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    sr = world.sr("odd clones", "norevert")
    disks = (world.vdi(sr), world.vdi(sr))
    vm = world.vm("clones", disks)
    snapshot = x.VM.snapshot(vm, "s")
    before = set(x.SR.get_VDIs(sr))
    plan.set(vdi_clone=[None, 44])
    assert failure(x.VM.revert, snapshot)[0] == "SR_BACKEND_FAILURE_44"
    assert x.VM.get_power_state(vm) == "Halted"
    assert set(x.SR.get_VDIs(sr)) == before - set(disks), "the first clone is destroyed; the old disks were destroyed before"


def test_random_histories_keep_identity(upstream, native_sr, seeds):
    """Whatever is snapshotted, written and reverted: the disk stays itself and holds what the snapshot held."""
    x = upstream.x
    for seed in seeds(2):
        dice = random.Random(seed)
        disk = upstream.vdi(native_sr, MIB)
        vm = upstream.vm(f"history {seed}", (disk,))
        uuid, snapshots, held = upstream.uuid(disk), [], 0
        for _ in range(8):
            action = dice.choice(["write", "write", "snapshot", "revert"])
            if action == "write":
                held = dice.randrange(1, 255)
                upstream.fill(disk, held, "1M")
            elif action == "snapshot":
                snapshots.append((x.VM.snapshot(vm, "s"), held))
            elif snapshots:
                snapshot, held = dice.choice(snapshots)
                x.VM.revert(snapshot)
            upstream.holds(disk, held, "1M")
        assert [vbd["VDI"] for vbd in upstream.vbds(vm).values()] == [disk] and upstream.uuid(disk) == uuid


def test_vm_that_was_destroyed_comes_back_with_its_disks_under_fixed(fixed):
    """6.5: the same uuid; upstream, seen above with CloudStack's script, gives it no VBDs."""
    x = fixed.x
    disk = fixed.vdi(fixed.shared_sr())
    vm = fixed.vm("destroyed", (disk,))
    fixed.fill(disk, 0x11)
    snapshots = [x.VM.snapshot(vm, name) for name in "ab"]
    fixed.fill(disk, 0x22)
    uuid = x.VM.get_uuid(vm)
    x.VM.destroy(vm)
    x.VM.revert(snapshots[0])
    again = x.VM.get_by_uuid(uuid)
    record = x.VM.get_record(again)
    assert (record["name_label"], record["is_a_template"], record["is_a_snapshot"]) == ("destroyed", False, False)
    assert set(record["snapshots"]) == set(snapshots) and record["parent"] == snapshots[0]
    assert {device: vbd["VDI"] for device, vbd in fixed.vbds(again).items()} == {"0": disk}
    fixed.holds(disk, 0x11)
    x.VM.start(again, False, False)
    x.VM.hard_shutdown(again)


def test_sr_that_is_not_plugged(upstream):
    x = upstream.x
    sr = upstream.sr("unplugged")
    disk = upstream.vdi(sr)
    vm = upstream.vm("unplugged", (disk,))
    snapshot = x.VM.snapshot(vm, "s")
    copy = upstream.vbds(snapshot)["0"]["VDI"]
    [pbd] = x.SR.get_PBDs(sr)
    x.PBD.unplug(pbd)
    assert failure(x.VDI.revert, copy) == ["SR_HAS_NO_PBDS", sr]
    assert failure(x.VM.revert, snapshot) == ["VM_REVERT_FAILED", snapshot, vm]
    x.PBD.plug(pbd)
    x.VM.revert(snapshot)

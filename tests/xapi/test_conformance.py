"""xenapi_model.md section 14, the conformance list: the stock client, real plug-in processes, a real simsrd and real data.

1 login, records, events   `test_login_records_and_event_loop`
2 a VM from nothing        `test_a_vm_from_nothing_to_running`
3 old data is back         `test_old_data_is_back_after_a_revert`
4 with the feature or not  `test_what_the_feature_changes`, `test_clients_see_the_feature`
5 CloudStack's sequence    ``test_demo_cloudstack.py`` the whole of it, ``test_revert_behaviours.py::test_stock_cloudstack_script``
6 revert and scan at once  `test_concurrent_revert_and_scan`
"""

from __future__ import annotations

import pytest


def test_login_records_and_event_loop(upstream):
    x = upstream.x
    assert upstream.session.API_version.startswith("2.")
    records = x.VM.get_all_records()
    assert any(record["is_default_template"] for record in records.values())
    first = x.event_from(["*"], "", 10.0)
    assert {"pool", "host", "vm", "sm"} <= {event["class"] for event in first["events"]}
    pool = x.pool.get_all()[0]
    x.pool.set_name_label(pool, "renamed")
    then = x.event_from(["pool"], first["token"], 10.0)
    [event] = then["events"]
    assert (event["operation"], event["ref"], event["snapshot"]["name_label"]) == ("mod", pool, "renamed")
    assert then["valid_ref_counts"] == {"pool": 1}
    assert x.event_from(["pool"], then["token"], 0.05)["events"] == []


def test_a_vm_from_nothing_to_running(upstream):
    x = upstream.x
    sr = upstream.sr("first")
    assert x.SR.get_type(sr) == "sim" and int(x.SR.get_physical_size(sr)) > 0
    disks = tuple(upstream.vdi(sr, name=f"disk {number}") for number in range(3))
    vm = upstream.vm("three disks", disks)
    assert x.VM.get_power_state(vm) == "Halted"
    x.VM.start(vm, False, False)
    assert (x.VM.get_power_state(vm), x.VM.get_resident_on(vm)) == ("Running", upstream.host)
    assert all(vbd["currently_attached"] for vbd in upstream.vbds(vm).values())
    [info] = x.VDI.get_nbd_info(disks[0])
    assert upstream.uuid(disks[0]) in info["uri"]
    x.VM.hard_shutdown(vm)
    assert not any(vbd["currently_attached"] for vbd in upstream.vbds(vm).values())


def test_old_data_is_back_after_a_revert(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    vm = upstream.vm("data", (disk,))
    x.VM.start(vm, False, False)
    upstream.fill(disk, 0x11)
    snapshot = x.VM.snapshot(vm, "before")
    upstream.fill(disk, 0x22)
    x.VM.clean_shutdown(vm)
    x.VM.revert(snapshot)
    x.VM.start(vm, False, False)
    upstream.holds(disk, 0x11)
    x.VM.clean_shutdown(vm)


@pytest.mark.parametrize("feature", ["on", "off"])
def test_what_the_feature_changes(upstream, feature):
    x = upstream.x
    sr = upstream.sr(f"revert {feature}", revert=feature)
    disk = upstream.vdi(sr)
    vm = upstream.vm("feature", (disk,))
    upstream.fill(disk, 0x11)
    snapshot, sibling = x.VM.snapshot(vm, "one"), x.VM.snapshot(vm, "two")
    upstream.fill(disk, 0x22)
    uuid = upstream.uuid(disk)
    x.VM.revert(snapshot)
    [vbd] = upstream.vbds(vm).values()
    upstream.holds(vbd["VDI"], 0x11)
    kept = feature == "on"
    assert (upstream.uuid(vbd["VDI"]) == uuid) is kept and (vbd["VDI"] == disk) is kept
    for each in (snapshot, sibling):
        [copy] = upstream.vbds(each).values()
        assert x.VDI.get_snapshot_of(copy["VDI"]) == vbd["VDI"]
    messages = [message["body"] for message in x.message.get_all_records().values() if message["obj_uuid"] == x.VM.get_uuid(vm)]
    assert messages == [f"VM 'feature' (uuid: {x.VM.get_uuid(vm)}) reverted to snapshot: one (uuid {x.VM.get_uuid(snapshot)})"]


def test_clients_see_the_feature(wrapped_world):
    """In SR.allowed_operations and SM.features, with a driver that has it and one that has not."""
    x = wrapped_world.x
    for kind, there in (("odd", True), ("norevert", False)):
        [sm] = [record for record in x.SM.get_all_records().values() if record["type"] == kind]
        assert ("VDI_REVERT" in sm["features"]) is there is ("VDI_REVERT" in sm["capabilities"])
        assert ("vdi_revert" in x.SR.get_allowed_operations(wrapped_world.shared_sr(kind))) is there


def test_concurrent_revert_and_scan(upstream):
    x = upstream.x
    sr = upstream.sr("scanned")
    disks = (upstream.vdi(sr), upstream.vdi(sr))
    vm = upstream.vm("scanned", disks)
    snapshot = x.VM.snapshot(vm, "s")
    known = set(x.SR.get_VDIs(sr))
    tasks = [call(argument) for _ in range(3) for call, argument in ((x.Async.VM.revert, snapshot), (x.Async.SR.scan, sr))]
    assert [upstream.wait_task(task)["error_info"] for task in tasks] == [[]] * 6
    assert set(x.SR.get_VDIs(sr)) == known and {vbd["VDI"] for vbd in upstream.vbds(vm).values()} == set(disks)

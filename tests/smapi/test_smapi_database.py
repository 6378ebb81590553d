"""What each command tells xapi's database, and what happens when xapi is away, says no, or breaks off."""

import uuid

import pytest

from smapi_fake_xapi import NULL_REF, new_ref
from smapi_kit import SR_UUID, TASK_REF
from smapi_wire import NIL, Fault, check_vdi_info

CREATE = ["10737418240", "root disk", "", "", "false", "19700101T00:00:00Z", "", "false"]
SR_SIZES = ["SR.set_virtual_allocation", "SR.set_physical_size", "SR.set_physical_utilisation"]


class Known(str):
    """The uuid of a VDI that both sides know; `ref` is its row in xapi's database."""

    ref = ""


@pytest.fixture
def disk(daemon, xapi):
    vdi = Known(daemon.add_vdi(SR_UUID))
    vdi.ref = xapi.add_vdi(xapi.sr_ref, str(vdi))
    return vdi


@pytest.fixture
def snapshot(daemon, xapi, disk):
    vdi = Known(daemon.add_snapshot(str(disk)))
    vdi.ref = xapi.add_vdi(xapi.sr_ref, str(vdi), is_a_snapshot=True, snapshot_of=disk.ref)
    return vdi


def row_of(xapi, vdi):
    return next(row for row in xapi.tables["VDI"].values() if row["uuid"] == vdi)


def check_sr_sizes(xapi, daemon):
    sr, row = daemon.sr_view(daemon.srs[SR_UUID]), xapi.tables["SR"][xapi.sr_ref]
    assert row["virtual_allocation"] == str(sr["virtual_allocation_bytes"])
    assert row["physical_size"] == str(sr["physical_size_bytes"])
    assert row["physical_utilisation"] == str(sr["physical_utilisation_bytes"])


# --- Each command's duties ---

def test_create_introduces_with_the_fields_of_the_worked_example(pool, xapi, daemon):
    vdi = check_vdi_info(pool.call("vdi_create", CREATE, vdi_type="user", vdi_sm_config={}))
    introduced = [values for method, values in xapi.calls if method == "VDI.db_introduce"]
    expected = (vdi, "root disk", "", xapi.sr_ref, "user", False, False, {}, vdi, {}, {}, True, "10737418240", "4096",
                NULL_REF, False, "19700101T00:00:00Z", NULL_REF, False)
    assert introduced == [expected]
    assert xapi.writes() == ["VDI.db_introduce", *SR_SIZES]
    check_sr_sizes(xapi, daemon)


def test_create_passes_on_what_xapi_says(pool, xapi):
    pool_ref, origin_ref = new_ref(), new_ref()
    args = ["512", "Grüße <&>", "d", pool_ref, "true", "20261121T03:40:20Z", origin_ref, "true"]
    vdi = pool.call("vdi_create", args, vdi_type="metadata", vdi_sm_config={"base_mirror": "x"})["uuid"]
    row = row_of(xapi, vdi)
    assert (row["name_label"], row["name_description"], row["type"]) == ("Grüße <&>", "d", "metadata")
    assert (row["metadata_of_pool"], row["snapshot_of"]) == (pool_ref, origin_ref)
    assert (row["is_a_snapshot"], row["read_only"], row["sm_config"]) == (True, True, {"base_mirror": "x"})
    assert row["snapshot_time"].value == "20261121T03:40:20Z"


def test_requests_to_xapi_run_under_the_task(pool, xapi):
    pool.call("sr_update")
    assert xapi.headers
    for headers in xapi.headers:
        assert headers["Subtask-of"] == TASK_REF and headers["originator"] == "SM"


@pytest.mark.parametrize("task", ["x\r\nInjected: yes", "ü世", ""])
def test_odd_task_is_not_sent(pool, xapi, task):
    pool.call("sr_update", subtask_of=task)
    assert xapi.headers and not any("Subtask-of" in headers or "Injected" in headers for headers in xapi.headers)


def test_introduce(pool, xapi, daemon):
    vdi = daemon.add_vdi(SR_UUID, name="found", managed=False, sm_config={"a": "b"})
    pool.call("vdi_introduce", vdi_location=vdi, new_uuid=vdi, vdi_sm_config={"c": "d"})
    row = row_of(xapi, vdi)
    assert (row["location"], row["name_label"], row["managed"], row["sm_config"]) == (
        vdi, "found", False, {"a": "b", "c": "d"})


def test_delete_forgets(pool, xapi, daemon, disk):
    pool.call("vdi_delete", vdi=disk, vdi_ref=disk.ref)
    assert xapi.writes() == ["VDI.db_forget", *SR_SIZES]
    assert xapi.tables["VDI"] == {}
    check_sr_sizes(xapi, daemon)


def test_delete_of_a_row_that_went_meanwhile(pool, xapi, disk):
    xapi.before["VDI.db_forget"] = lambda: xapi.tables["VDI"].clear()
    assert pool.call("vdi_delete", vdi=disk, vdi_ref=disk.ref) is NIL


def test_snapshot(pool, xapi, daemon, disk):
    vdi = check_vdi_info(pool.call("vdi_snapshot", vdi=disk, vdi_ref=disk.ref, driver_params={"epochhint": "x"}))
    row = row_of(xapi, vdi)
    assert (row["is_a_snapshot"], row["snapshot_of"], row["location"]) == (True, disk.ref, vdi)
    assert row["snapshot_time"].value == "20261121T03:40:20Z"
    assert row["read_only"] is False
    assert xapi.tables["VDI"][disk.ref]["physical_utilisation"] == "512"
    check_sr_sizes(xapi, daemon)


def stamp_sent(pool, daemon, disk, **driver_params):
    """What a snapshot told the daemon to stamp it with."""
    pool.call("vdi_snapshot", vdi=disk, vdi_ref=disk.ref, driver_params=driver_params)
    [body] = [document for method, target, document in daemon.writes() if target.endswith("/snapshot")][-1:]
    return body


def test_snapshots_of_one_vm_snapshot_carry_its_hint_and_the_vm(pool, xapi, daemon, disk):
    hint = str(uuid.uuid4())
    assert stamp_sent(pool, daemon, disk) == {}
    assert stamp_sent(pool, daemon, disk, epochhint="x") == {}, "only what can be a stamp"
    assert stamp_sent(pool, daemon, disk, epochhint=hint) == {"group": hint}
    vm = xapi.add_vbd(disk.ref)
    xapi.add_vbd(disk.ref, is_control_domain=True)
    assert stamp_sent(pool, daemon, disk, epochhint=hint.upper()) == {"group": hint, "vm": xapi.tables["VM"][vm]["uuid"]}
    xapi.failures["VBD.get_VM"] = ["HANDLE_INVALID", "VBD", "gone"]
    assert stamp_sent(pool, daemon, disk, epochhint=hint) == {"group": hint}, "a snapshot can do without"
    del xapi.failures["VBD.get_VM"]
    xapi.add_vbd(disk.ref)
    assert stamp_sent(pool, daemon, disk, epochhint=hint) == {"group": hint}, "a disk that VMs share is of none"


@pytest.mark.parametrize("command", ["vdi_snapshot", "vdi_clone"])
def test_copy_tells_what_was_written_before_it(pool, xapi, daemon, disk, command):
    """The copy itself changes nothing of the disk's utilisation, but xapi's row of it is from before the writes."""
    xapi.tables["VDI"][disk.ref]["physical_utilisation"] = "0"
    pool.call(command, vdi=disk, vdi_ref=disk.ref)
    assert xapi.tables["VDI"][disk.ref]["physical_utilisation"] == str(daemon.vdis[disk]["physical_utilisation_bytes"])


def test_clone(pool, xapi, daemon, snapshot):
    row = row_of(xapi, pool.call("vdi_clone", vdi=snapshot, vdi_ref=snapshot.ref)["uuid"])
    assert (row["is_a_snapshot"], row["snapshot_of"], row["snapshot_time"].value) == (
        False, NULL_REF, "19700101T00:00:00Z")
    check_sr_sizes(xapi, daemon)


def test_resize(pool, xapi, daemon, disk):
    pool.call("vdi_resize", ["4294967296"], vdi=disk, vdi_ref=disk.ref)
    assert xapi.tables["VDI"][disk.ref]["virtual_size"] == "4294967296"
    check_sr_sizes(xapi, daemon)


def test_update_takes_names_over_and_writes_only_what_changed(pool, xapi, daemon, disk):
    xapi.tables["VDI"][disk.ref].update(name_label="new ☃", name_description="text")
    for _ in range(2):
        assert pool.call("vdi_update", vdi=disk, vdi_ref=disk.ref) is NIL
    assert daemon.writes() == [("PATCH", f"/v1/vdis/{disk}", {"name": "new ☃", "description": "text"})]


def test_commands_that_have_nothing_to_tell_do_not_need_xapi(pool, folder, disk):
    pool.device_config["xapi_socket"] = str(folder / "nobody")
    for command, args in [("vdi_epoch_begin", []), ("vdi_attach", ["true"]), ("vdi_deactivate", []), ("vdi_detach", []),
                          ("vdi_epoch_end", []), ("sr_detach", []), ("sr_content_type", []), ("vdi_enable_cbt", []),
                          ("vdi_disable_cbt", []), ("vdi_generate_config", [])]:
        pool.call(command, args, vdi=disk, vdi_ref=disk.ref)


def test_ref_is_looked_up_when_it_is_not_given(pool, xapi, disk):
    pool.call("vdi_resize", ["4294967296"], vdi=disk)
    assert xapi.tables["VDI"][disk.ref]["virtual_size"] == "4294967296"


# --- sr_create, sr_attach, sr_update ---

def test_sr_create_takes_the_name_from_xapi(pool, daemon):
    daemon.srs.clear()
    pool.call("sr_create", ["0"])
    assert (daemon.srs[SR_UUID]["name"], daemon.srs[SR_UUID]["description"]) == ("my SR", "of tests")


def test_sr_create_with_a_name_that_is_taken(pool, daemon):
    daemon.srs.clear()
    daemon.add_sr(str(uuid.uuid4()), name="my SR")
    pool.call("sr_create", ["0"])
    assert daemon.srs[SR_UUID]["name"] == "my SR (5b4d1f0e)"


def test_sr_create_without_a_name(pool, xapi, daemon):
    daemon.srs.clear()
    xapi.tables["SR"][xapi.sr_ref]["name_label"] = ""
    pool.call("sr_create", ["0"])
    assert daemon.srs[SR_UUID]["name"] == "sr-" + SR_UUID


def test_sr_attach_scans_on_the_master_only(pool, xapi, daemon):
    vdi = daemon.add_vdi(SR_UUID)
    pool.device_config["SRmaster"] = "false"
    pool.call("sr_attach")
    assert xapi.writes() == [] and len(xapi.tables["VDI"]) == 0
    pool.device_config["SRmaster"] = "true"
    pool.call("sr_attach")
    assert row_of(xapi, vdi)


def test_sr_attach_survives_a_failing_scan_and_reports_it(pool, xapi):
    xapi.failures["VDI.get_all_records_where"] = ["INTERNAL_ERROR", "x"]
    assert pool.call("sr_attach") is NIL
    message = next(values for method, values in xapi.calls if method == "message.create")
    assert message[:4] == ("POST_ATTACH_SCAN_FAILED", "2", "SR", SR_UUID) and "INTERNAL_ERROR" in message[4]


def test_sr_update(pool, xapi, daemon, disk):
    assert pool.call("sr_update") is NIL
    assert xapi.writes() == SR_SIZES
    check_sr_sizes(xapi, daemon)


# --- sr_scan ---

def test_scan_of_a_healthy_sr_writes_nothing_but_sizes(pool, xapi, disk, snapshot):
    assert pool.call("sr_scan") is NIL
    assert xapi.writes() == SR_SIZES


def test_scan_introduces_with_all_fields_and_links_in_a_second_pass(pool, xapi, daemon):
    # The snapshot's uuid sorts before its parent's, so it is introduced first.
    parent = daemon.add_vdi(SR_UUID, uuid="bbbbbbbb-0000-4000-8000-000000000000", name="parent\x01", type="system",
                            sharable=True, sm_config={"k": "v"}, description="d", read_only=True)
    child = daemon.add_snapshot(parent, uuid="aaaaaaaa-0000-4000-8000-000000000000")
    orphan = daemon.add_snapshot(parent, uuid="cccccccc-0000-4000-8000-000000000000", snapshot_of=str(uuid.uuid4()))
    pool.call("sr_scan")
    row = row_of(xapi, parent)
    assert (row["name_label"], row["type"], row["sharable"], row["sm_config"], row["name_description"]) == (
        "parent?", "system", True, {"k": "v"}, "d")
    assert row["read_only"] is True and row_of(xapi, child)["read_only"] is False
    parent_ref = next(ref for ref, row in xapi.tables["VDI"].items() if row["uuid"] == parent)
    assert row_of(xapi, child)["snapshot_of"] == parent_ref
    assert row_of(xapi, orphan)["snapshot_of"] == NULL_REF
    daemon.requests.clear()
    xapi.calls.clear()
    pool.call("sr_scan")
    assert xapi.writes() == SR_SIZES and daemon.writes() == []


def test_scan_forgets_what_is_gone(pool, xapi, daemon, disk, snapshot):
    del daemon.vdis[snapshot]
    pool.call("sr_scan")
    assert list(xapi.tables["VDI"]) == [disk.ref]


def test_scan_leaves_rows_of_other_srs(pool, xapi):
    xapi.add_vdi(new_ref(), str(uuid.uuid4()))
    pool.call("sr_scan")
    assert len(xapi.tables["VDI"]) == 1


@pytest.mark.parametrize("code", ["HANDLE_INVALID", "UUID_INVALID"])
def test_scan_that_loses_a_race_to_forget(pool, xapi, code):
    xapi.add_vdi(xapi.sr_ref, str(uuid.uuid4()))
    xapi.failures["VDI.db_forget"] = [code, "VDI", "x"]
    assert pool.call("sr_scan") is NIL


def test_scan_that_loses_a_race_to_introduce(pool, xapi, daemon):
    """A vdi_create between the reading of the rows and that of the VDIs."""
    vdi = daemon.add_vdi(SR_UUID)
    xapi.before["VDI.db_introduce"] = lambda: xapi.add_vdi(xapi.sr_ref, vdi)
    assert pool.call("sr_scan") is NIL
    assert [row["uuid"] for row in xapi.tables["VDI"].values()] == [vdi]


def test_scan_never_forgets_a_vdi_made_meanwhile(pool, xapi, daemon):
    def create():
        made.append(daemon.add_vdi(SR_UUID))
        xapi.add_vdi(xapi.sr_ref, made[0])
    made = []
    daemon.before["GET", "/v1/vdis"] = create
    pool.call("sr_scan")
    assert [row["uuid"] for row in xapi.tables["VDI"].values()] == made


def test_scan_updates_what_differs_and_leaves_the_rest(pool, xapi, daemon, disk):
    daemon.vdis[disk].update(size_bytes=2**21, physical_utilisation_bytes=8192, read_only=True, name="not mine",
                             type="system", sm_config={"k": "new", "n": "1", "host_x": "RO", "paused": "true"})
    row = xapi.tables["VDI"][disk.ref]
    row.update(sm_config={"k": "old", "host_OpaqueRef:1": "RW", "activating": "True"}, name_label="xapi's")
    pool.call("sr_scan")
    assert (row["virtual_size"], row["physical_utilisation"], row["read_only"]) == ("2097152", "8192", True)
    assert row["sm_config"] == {"k": "new", "n": "1", "host_OpaqueRef:1": "RW", "activating": "True"}
    assert row["name_label"] == "xapi's"
    assert "VDI.set_sm_config" not in xapi.methods()


def test_scan_respects_links_that_xapi_has_changed(pool, xapi, daemon, snapshot):
    """A clone-style VM.revert re-parents all snapshots to the new disk."""
    elsewhere = xapi.add_vdi(new_ref(), "moved to another SR")
    xapi.tables["VDI"][snapshot.ref]["snapshot_of"] = elsewhere
    pool.call("sr_scan")
    assert xapi.tables["VDI"][snapshot.ref]["snapshot_of"] == elsewhere


@pytest.mark.parametrize("link", [NULL_REF, "", "OpaqueRef:of-a-row-that-is-gone"])
def test_scan_repairs_a_link_that_leads_nowhere(pool, xapi, disk, snapshot, link):
    xapi.tables["VDI"][snapshot.ref]["snapshot_of"] = link
    pool.call("sr_scan")
    assert xapi.tables["VDI"][snapshot.ref]["snapshot_of"] == disk.ref


# --- vdi_revert ---

@pytest.mark.parametrize("by", ["ref", "uuid"])
def test_revert(pool, xapi, daemon, disk, snapshot, by):
    daemon.vdis[disk]["size_bytes"] = 2**21
    row = xapi.tables["VDI"][disk.ref]
    row.update(virtual_size=str(2**21), other_config={"content_id": "x", "keep": "y"}, name_label="mine")
    for _ in range(2):
        assert pool.call("vdi_revert", [disk.ref if by == "ref" else disk], vdi=snapshot, vdi_ref=snapshot.ref) is NIL
        assert (row["virtual_size"], row["physical_utilisation"]) == (str(2**20), "1024")
        assert row["other_config"] == {"keep": "y"}
    assert (row["uuid"], row["location"], row["name_label"], row["is_a_snapshot"]) == (disk, disk, "mine", False)
    assert xapi.tables["VDI"][snapshot.ref]["snapshot_of"] == disk.ref
    assert xapi.methods().count("VDI.set_virtual_size") == 1
    check_sr_sizes(xapi, daemon)


def test_revert_repeated_after_xapi_broke_off_brings_the_size_in_step(pool, xapi, daemon, disk, snapshot):
    daemon.vdis[disk]["size_bytes"] = 2**21
    xapi.tables["VDI"][disk.ref]["virtual_size"] = str(2**21)
    xapi.garbage["VDI.set_virtual_size"] = (200, b"<nonsense>")
    assert pool.fault("vdi_revert", [disk.ref], vdi=snapshot).number == 154
    xapi.garbage.clear()
    pool.call("vdi_revert", [disk.ref], vdi=snapshot)
    assert xapi.tables["VDI"][disk.ref]["virtual_size"] == str(2**20)


@pytest.mark.parametrize("target, number", [
    ("OpaqueRef:3f1c9f44-0b1c-4c53-8ac8-1f2f6a4ccf0e", 144), ("3f1c9f44-0b1c-4c53-8ac8-1f2f6a4ccf0e", 144), (NULL_REF, 1), ("", 1)])
def test_revert_of_an_unknown_target_changes_nothing(pool, daemon, snapshot, target, number):
    assert pool.fault("vdi_revert", [target], vdi=snapshot, vdi_ref=snapshot.ref).number == number
    assert daemon.writes() == []


def test_revert_switched_off_asks_nobody(pool, xapi, daemon, disk, snapshot):
    pool.device_config["revert"] = "off"
    assert pool.fault("vdi_revert", [disk.ref], vdi=snapshot).number == 38
    assert xapi.calls == [] and daemon.requests == []


@pytest.mark.parametrize("method", ["VDI.get_uuid", "VDI.get_record", "VDI.set_physical_utilisation",
                                    "VDI.remove_from_other_config"])
def test_revert_never_answers_38_for_trouble_with_xapi(pool, xapi, disk, snapshot, method):
    xapi.failures[method] = ["SR_OPERATION_NOT_SUPPORTED", "x"]
    assert pool.fault("vdi_revert", [disk.ref], vdi=snapshot).number == 202


def test_revert_tells_whether_changed_blocks_are_still_tracked(pool, xapi, daemon, disk, snapshot):
    xapi.tables["VDI"][disk.ref]["cbt_enabled"] = True
    pool.call("vdi_revert", [disk.ref], vdi=snapshot)
    assert xapi.tables["VDI"][disk.ref]["cbt_enabled"] is False


@pytest.mark.parametrize(("wish", "sent"), [
    ("commit", {"mode": "commit"}), ("discard", {"discard": True}), ("follow:{tip}", {"mode": "follow"}),
])
def test_revert_does_what_other_config_wants_once(pool, xapi, daemon, disk, snapshot, wish, sent):
    tip = daemon.add_snapshot(str(disk))
    xapi.tables["VDI"][disk.ref]["other_config"] = {"simsr-revert": wish.format(tip=tip), "mine": "1"}
    for expected, node in ((sent, tip if "follow" in wish else snapshot), ({}, snapshot)):
        pool.call("vdi_revert", [disk.ref], vdi=snapshot)
        assert daemon.writes()[-1] == ("POST", f"/v1/vdis/{node}/revert", dict(expected, target=str(disk)))
        assert xapi.tables["VDI"][disk.ref]["other_config"] == {"mine": "1"}


@pytest.mark.parametrize("wish", ["", "reset ", "follow", "follow:", "follow:../x"])
def test_revert_refuses_a_wish_that_it_does_not_know(pool, xapi, daemon, disk, snapshot, wish):
    xapi.tables["VDI"][disk.ref]["other_config"] = {"simsr-revert": wish}
    fault = pool.fault("vdi_revert", [disk.ref], vdi=snapshot)
    assert fault.number == 1 and "simsr-revert" in fault.text
    assert not daemon.writes() and xapi.tables["VDI"][disk.ref]["other_config"] == {"simsr-revert": wish}


# --- vdi_revert: the safety valves ---

@pytest.fixture
def revert(pool, xapi, daemon, disk, snapshot):
    """Whether a revert is done in place; if not it must be 38, and nothing touched."""
    def revert():
        daemon.requests.clear()
        xapi.calls.clear()
        try:
            pool.call("vdi_revert", [disk.ref], vdi=snapshot, vdi_ref=snapshot.ref)
        except Fault as fault:
            assert fault.number == 38 and "revert-compat" in fault.text
            assert daemon.writes() == [] and xapi.writes() == []
            return False
        return True
    return revert


@pytest.mark.parametrize("text, clones", [("cloudstack", True), ("checkpoint", False), ("none", False),
                                          ("checkpoint,cloudstack", True), ("cloudstack, checkpoint", True)])
@pytest.mark.parametrize("where", ["device_config", "other_config"])
def test_disk_without_vbd_is_cloned_for_cloudstack(pool, xapi, disk, revert, text, clones, where):
    if where == "device_config":
        pool.device_config["revert-compat"] = text
    else:
        xapi.tables["SR"][xapi.sr_ref]["other_config"]["revert-compat"] = text
    assert revert() is not clones
    xapi.add_vbd(disk.ref)
    assert revert()


@pytest.mark.parametrize("text, clones", [("checkpoint", True), ("cloudstack", False), ("none", False),
                                          ("cloudstack,checkpoint", True)])
def test_snapshot_with_memory_is_cloned_for_checkpoints(pool, xapi, disk, snapshot, revert, text, clones):
    pool.device_config["revert-compat"] = text
    xapi.add_vbd(disk.ref)
    xapi.add_vbd(snapshot.ref, "Halted")
    assert revert()
    xapi.tables["VDI"][snapshot.ref]["VBDs"].insert(0, new_ref())  # one that went meanwhile
    xapi.add_vbd(snapshot.ref, "Suspended")
    assert revert() is not clones


def test_device_config_decides_before_other_config(pool, xapi, revert):
    xapi.tables["SR"][xapi.sr_ref]["other_config"]["revert-compat"] = "cloudstack"
    pool.device_config["revert-compat"] = "none"
    assert revert()


def test_valve_misspelt_in_other_config_does_not_pass_for_none(pool, xapi, daemon, disk, snapshot):
    xapi.tables["SR"][xapi.sr_ref]["other_config"]["revert-compat"] = "cloudstak"
    fault = pool.fault("vdi_revert", [disk.ref], vdi=snapshot)
    assert fault.number == 91 and "cloudstak" in fault.text
    assert daemon.writes() == []


def test_valves_mean_nothing_without_xapi(alone, daemon, disk, snapshot):
    alone.device_config["revert-compat"] = "cloudstack,checkpoint"
    assert alone.call("vdi_revert", [disk], vdi=snapshot) is NIL


@pytest.mark.parametrize("method", ["SR.get_other_config", "VDI.get_VBDs", "VM.get_power_state"])
def test_valve_that_cannot_be_asked_is_not_38(pool, xapi, daemon, disk, snapshot, method):
    """38 would make xapi destroy the disk."""
    if method != "SR.get_other_config":
        pool.device_config["revert-compat"] = "checkpoint"
    xapi.add_vbd(snapshot.ref)
    xapi.failures[method] = ["SR_OPERATION_NOT_SUPPORTED", "x"]
    assert pool.fault("vdi_revert", [disk.ref], vdi=snapshot, vdi_ref=snapshot.ref).number == 202
    assert daemon.writes() == []


# --- CBT, compose ---

def test_data_destroy_tells_the_space(pool, xapi, daemon, snapshot):
    daemon.vdis[snapshot]["cbt_enabled"] = True
    assert pool.call("vdi_data_destroy", vdi=snapshot, vdi_ref=snapshot.ref) is NIL
    assert xapi.tables["VDI"][snapshot.ref]["physical_utilisation"] == "0"
    check_sr_sizes(xapi, daemon)


@pytest.mark.parametrize("by", ["ref", "uuid"])
def test_compose(pool, xapi, daemon, disk, by):
    parent = daemon.add_vdi(SR_UUID)
    parent_ref = xapi.add_vdi(xapi.sr_ref, parent)
    pool.call("vdi_compose", [parent_ref if by == "ref" else parent], vdi=disk, vdi_ref=disk.ref)
    assert daemon.writes() == [("POST", f"/v1/vdis/{disk}/compose", {"parent": parent})]
    assert xapi.tables["VDI"][disk.ref]["physical_utilisation"] == "8192"


@pytest.mark.parametrize("by", ["ref", "uuid"])
def test_list_changed_blocks(pool, disk, snapshot, by):
    assert pool.call("vdi_list_changed_blocks", [disk.ref if by == "ref" else disk], vdi=snapshot) == "gAAAAA=="


def test_scan_brings_cbt_enabled_in_step(pool, xapi, daemon, disk):
    daemon.vdis[disk]["cbt_enabled"] = True
    pool.call("sr_scan")
    assert xapi.tables["VDI"][disk.ref]["cbt_enabled"] is True


# --- xapi away, refusing, breaking off ---

WRITERS = [("sr_create", ["0"]), ("sr_attach", []), ("sr_scan", []), ("sr_update", []), ("vdi_create", CREATE),
           ("vdi_delete", []), ("vdi_snapshot", []), ("vdi_clone", []), ("vdi_resize", ["2097152"]),
           ("vdi_update", []), ("vdi_revert", ["disk"]), ("vdi_activate", ["true"]), ("vdi_data_destroy", []),
           ("vdi_compose", ["disk"]), ("vdi_list_changed_blocks", ["disk"])]


def send(caller, command, args, disk, snapshot):
    """The fault of `command` on the snapshot if it is about two VDIs, else on the disk."""
    vdi = snapshot if args == ["disk"] else disk
    if command.startswith("sr_") or command == "vdi_create":
        return caller.fault(command, args)
    return caller.fault(command, [disk.ref] if args == ["disk"] else args, vdi=vdi, vdi_ref=vdi.ref)


@pytest.mark.parametrize("command, args", WRITERS)
def test_xapi_away_is_found_before_anything_changes(pool, folder, daemon, disk, snapshot, command, args):
    pool.device_config["xapi_socket"] = str(folder / "nobody")
    assert send(pool, command, args, disk, snapshot).number == 150
    assert daemon.writes() == []


@pytest.mark.parametrize("command, args", WRITERS)
def test_invalid_session_is_found_before_anything_changes(pool, daemon, disk, snapshot, command, args):
    pool.members["session_ref"] = old = new_ref()
    fault = send(pool, command, args, disk, snapshot)
    assert fault.number == 150 and "SESSION_INVALID" in fault.text
    assert old not in fault.text
    assert daemon.writes() == []


@pytest.mark.parametrize("command, args, method, number", [
    ("sr_scan", [], "VDI.get_all_records_where", 40), ("vdi_create", CREATE, "VDI.db_introduce", 78),
    ("vdi_delete", [], "VDI.db_forget", 80), ("vdi_resize", ["2097152"], "VDI.set_virtual_size", 110),
    ("vdi_snapshot", [], "VDI.db_introduce", 82), ("vdi_clone", [], "VDI.db_introduce", 81),
    ("vdi_update", [], "VDI.get_name_label", 202), ("sr_update", [], "SR.set_physical_size", 202),
    ("sr_create", ["0"], "SR.get_name_label", 202), ("vdi_revert", ["disk"], "VDI.set_physical_utilisation", 202),
    ("vdi_activate", ["true"], "VDI.add_to_sm_config", 46), ("vdi_resize_online", ["2097152"], "VDI.set_virtual_size", 110)])
def test_numbers_for_what_xapi_refuses(pool, xapi, disk, snapshot, command, args, method, number):
    xapi.failures[method] = ["PERMISSION_DENIED", "x"]
    fault = send(pool, command, args, disk, snapshot)
    assert fault.number == number and "PERMISSION_DENIED" in fault.text and method in fault.text


@pytest.mark.parametrize("garbage", [
    (200, b""), (200, b"hello"), (500, b""), (200, b"\xff\xfe"),
    (200, b"<methodResponse><params><param><value>x</value></param></params></methodResponse>"),
    (200, b"<methodResponse><params><param><value><struct/></value></param></params></methodResponse>"),
    (200, b"<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>1</int></value></member>"
          b"<member><name>faultString</name><value>x</value></member></struct></value></fault></methodResponse>"),
    (200, b'<!DOCTYPE x [<!ENTITY e "y">]><methodResponse/>'),
    None,
])
def test_what_is_no_xenapi_answer(pool, xapi, garbage):
    xapi.garbage["VDI.db_introduce"] = garbage
    assert pool.fault("vdi_create", CREATE).number == 154


def test_session_that_ends_in_the_middle(pool, xapi, daemon):
    def restart():
        xapi.session_ref = new_ref()
    xapi.before["VDI.db_introduce"] = restart
    assert pool.fault("vdi_create", CREATE).number == 153
    assert daemon.vdis == {}


@pytest.mark.parametrize("command", ["vdi_create", "vdi_snapshot", "vdi_clone"])
def test_what_xapi_will_not_have_is_unmade(pool, xapi, daemon, disk, snapshot, command):
    xapi.failures["VDI.db_introduce"] = ["INTERNAL_ERROR", "x"]
    before = set(daemon.vdis)
    send(pool, command, CREATE if command == "vdi_create" else [], disk, snapshot)
    assert set(daemon.vdis) == before


def test_what_xapi_may_have_is_kept_for_the_scan(pool, xapi, daemon):
    """When xapi breaks off, the row may be there; then the disk must be too. A scan settles it."""
    xapi.garbage["VDI.db_introduce"] = None
    assert pool.fault("vdi_create", CREATE).number == 154
    assert len(daemon.vdis) == 1
    xapi.garbage.clear()
    pool.call("sr_scan")
    assert {row["uuid"] for row in xapi.tables["VDI"].values()} == set(daemon.vdis)


def test_sizes_of_the_sr_that_cannot_be_set_fail_nothing_that_is_done(pool, xapi):
    xapi.failures["SR.set_physical_size"] = ["INTERNAL_ERROR", "x"]
    check_vdi_info(pool.call("vdi_create", CREATE))
    assert "SR.set_physical_utilisation" in xapi.methods()


def test_standalone_wins_over_a_session(pool, xapi):
    pool.device_config["standalone"] = "true"
    check_vdi_info(pool.call("vdi_create", CREATE))
    assert xapi.calls == []


def test_without_a_session_there_is_nobody_to_tell(pool, xapi):
    check_vdi_info(pool.call("vdi_create", CREATE, session_ref=None))
    assert xapi.calls == []

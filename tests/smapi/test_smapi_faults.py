"""Partners that fail at each step of each command: the fault is the right one, nothing is half done, sr_scan repairs the database.

A partner fails from its n-th request on, for every n until the command is through: the daemon or xapi has gone before it did
what was asked, or after; or xapi has been restarted and the session with it.
"""

import itertools

import pytest

from smapi_fake_daemon import daemon_error
from smapi_fake_xapi import new_ref
from smapi_kit import HOST_REF, SR_UUID
from smapi_wire import Fault

CREATE = ["10737418240", "root disk", "", "", "false", "19700101T00:00:00Z", "", "false"]
CHANGING = [  # command, arguments, about the disk or the snapshot
    ("sr_update", [], None), ("sr_scan", [], None), ("sr_attach", [], None), ("sr_detach", [], None),
    ("vdi_create", CREATE, None), ("vdi_introduce", [], "found"), ("vdi_delete", [], "disk"), ("vdi_snapshot", [], "disk"),
    ("vdi_clone", [], "snapshot"), ("vdi_resize", ["2097152"], "disk"), ("vdi_resize_online", ["2097152"], "disk"),
    ("vdi_update", [], "disk"), ("vdi_revert", ["disk"], "snapshot"), ("vdi_compose", ["parent"], "disk"),
    ("vdi_attach", ["true"], "disk"), ("vdi_detach", [], "disk"), ("vdi_activate", ["true"], "disk"),
    ("vdi_deactivate", [], "disk"), ("vdi_epoch_begin", [], "disk"), ("vdi_epoch_end", [], "disk"), ("vdi_enable_cbt", [], "disk"),
    ("vdi_disable_cbt", [], "disk"), ("vdi_data_destroy", [], "snapshot"), ("vdi_list_changed_blocks", ["disk"], "snapshot"),
    ("vdi_generate_config", [], "disk")]
MAKING = ("vdi_create", "vdi_snapshot", "vdi_clone")


class World:
    """Both partners with a disk, its snapshot, a disk that the database does not know, and a parent for it."""

    def __init__(self, daemon, xapi):
        self.daemon, self.xapi = daemon, xapi
        daemon.vdis.clear()
        xapi.tables["VDI"].clear()
        daemon.requests.clear()
        xapi.calls.clear()
        self.uuids = {name: daemon.add_vdi(SR_UUID, cbt_enabled=True) for name in ("disk", "parent", "found")}
        self.uuids["snapshot"] = daemon.add_snapshot(self.uuids["disk"], cbt_enabled=True)
        self.refs = {name: xapi.add_vdi(xapi.sr_ref, self.uuids[name], cbt_enabled=True) for name in ("disk", "parent")}
        self.refs["snapshot"] = xapi.add_vdi(xapi.sr_ref, self.uuids["snapshot"], is_a_snapshot=True, snapshot_of=self.refs["disk"],
                                             cbt_enabled=True)
        xapi.tables["VDI"][self.refs["disk"]]["sm_config"]["host_" + HOST_REF] = "RW"

    def send(self, caller, command, args, about):
        """Return the fault of the command, None if it succeeds."""
        args = [self.refs.get(arg, arg) for arg in args]
        members = {}
        if about == "found":
            members = {"vdi_location": self.uuids["found"], "new_uuid": self.uuids["found"], "vdi_sm_config": {}}
        elif about:
            members = {"vdi": self.uuids[about], "vdi_ref": self.refs[about]}
        try:
            caller.call(command, args, **members)
        except Fault as fault:
            return fault
        return None

    def check_in_step(self):
        """The database says what the daemon has."""
        rows = {row["location"]: row for row in self.xapi.tables["VDI"].values()}
        assert set(rows) == set(self.daemon.vdis)
        ref_of = {row["uuid"]: ref for ref, row in self.xapi.tables["VDI"].items()}
        for uuid, vdi in self.daemon.vdis.items():
            row = rows[uuid]
            assert (row["uuid"], row["virtual_size"], row["physical_utilisation"], row["cbt_enabled"]) == (
                uuid, str(vdi["size_bytes"]), str(vdi["physical_utilisation_bytes"]), vdi["cbt_enabled"])
            if vdi["snapshot_of"] in ref_of:
                assert row["snapshot_of"] == ref_of[vdi["snapshot_of"]]
        sr, row = self.daemon.sr_view(self.daemon.srs[SR_UUID]), self.xapi.tables["SR"][self.xapi.sr_ref]
        assert row["virtual_allocation"] == str(sr["virtual_allocation_bytes"])


def begun(daemon):
    """The requests that changed something or tried to."""
    return [entry for entry in daemon.writes() if not entry[1].endswith("/detach")]


@pytest.mark.parametrize("how", ["invalid", "gone", "done"])
@pytest.mark.parametrize("command, args, about", CHANGING, ids=lambda item: item if isinstance(item, str) else "")
def test_xapi_fails_at_each_call(pool, xapi, daemon, command, args, about, how):
    for step in itertools.count():
        world = World(daemon, xapi)
        before = set(daemon.vdis)
        xapi.fail_from(step, how)
        fault = world.send(pool, command, args, about)
        reached = xapi.steps > step
        xapi.work()
        if fault:
            assert fault.number == (150 if step == 0 and how == "invalid" else 153 if how == "invalid" else 154)
            assert xapi.session_ref not in fault.text
            if step == 0:
                assert begun(daemon) == [] and xapi.writes() == []
            if command in MAKING and how == "invalid":
                assert set(daemon.vdis) == before, "what nobody knows of was left"
        assert pool.call("sr_scan") is not None
        world.check_in_step()
        if not reached:
            assert fault is None
            break
    assert step < 20


@pytest.mark.parametrize("how", ["gone", "done"])
@pytest.mark.parametrize("command, args, about", CHANGING, ids=lambda item: item if isinstance(item, str) else "")
def test_daemon_fails_at_each_request(pool, xapi, daemon, command, args, about, how):
    for step in itertools.count():
        world = World(daemon, xapi)
        rows = {ref: dict(row) for ref, row in xapi.tables["VDI"].items()}
        daemon.fail_from(step, how)
        fault = world.send(pool, command, args, about)
        reached = daemon.steps > step
        daemon.work()
        if fault:
            assert fault.number == 47 and "simsrd" in fault.text
            if how == "gone" and begun(daemon) == [] and command not in ("sr_scan", "vdi_activate"):
                assert {ref: dict(row) for ref, row in xapi.tables["VDI"].items()} == rows
        assert pool.call("sr_scan") is not None
        world.check_in_step()
        if not reached:
            assert fault is None
            break
    assert step < 20


WRITING = [entry for entry in CHANGING if entry[0] in (*MAKING, "vdi_resize", "vdi_resize_online", "vdi_revert", "vdi_compose",
                                                       "vdi_enable_cbt", "vdi_disable_cbt", "vdi_data_destroy")]
SLOTS = {"vdi_create": "/v1/vdis", "vdi_enable_cbt": "/v1/vdis/{vdi}/cbt", "vdi_disable_cbt": "/v1/vdis/{vdi}/cbt",
         "vdi_resize_online": "/v1/vdis/{vdi}/resize"}


@pytest.mark.parametrize("command, args, about", WRITING, ids=lambda item: item if isinstance(item, str) else "")
def test_disk_is_full(pool, xapi, daemon, command, args, about):
    world = World(daemon, xapi)
    rows = {ref: dict(row) for ref, row in xapi.tables["VDI"].items()}
    vdis = {uuid: dict(vdi) for uuid, vdi in daemon.vdis.items()}
    path = SLOTS.get(command, "/v1/vdis/{vdi}/" + command[len("vdi_"):])
    daemon.failures["POST", path] = daemon_error(507, "NoSpace", 44, "the SR is full", "Delete something.")
    fault = world.send(pool, command, args, about)
    assert fault.number == 44 and fault.text == "There is not enough space [opterr=the SR is full. Delete something.]"
    assert {ref: dict(row) for ref, row in xapi.tables["VDI"].items()} == rows and daemon.vdis == vdis


def test_every_changing_command_is_here(script):
    unchanging = {"sr_get_driver_info", "sr_probe", "sr_content_type", "sr_create", "sr_delete", "vdi_attach_from_config",
                  "vdi_detach_from_config"}
    assert {command for command, _, _ in CHANGING} == set(script.COMMANDS) - unchanging


def test_sr_is_created_or_not(pool, xapi, daemon):
    """Neither partner's failure leaves more than an empty SR, which the next sr_create takes."""
    for partner, how in itertools.product((xapi, daemon), ("gone", "done")):
        for step in itertools.count():
            daemon.srs.clear()
            partner.fail_from(step, how)
            try:
                pool.call("sr_create", ["0"])
            except Fault as fault:
                assert fault.number in ((150, 154) if partner is xapi else (47,))
            reached = partner.steps > step
            partner.work()
            pool.call("sr_create", ["0"])
            assert list(daemon.srs) == [SR_UUID]
            if not reached:
                break


def test_session_of_another_name_is_never_sent_on(pool, xapi, daemon):
    """What xapi says about a session that has ended holds its ref, which is as good as a password."""
    pool.members["session_ref"] = secret = new_ref()
    for command in ("sr_scan", "vdi_create"):
        assert secret not in pool.fault(command, CREATE if command == "vdi_create" else []).text

"""How xapi runs plug-ins: discovery, argv and environment, order of calls, processes that misbehave."""

from __future__ import annotations

import shutil
import signal
import sqlite3

import pytest
from wrapped_driver import wrapped
from xapi_kit import SIMSR_PLUGIN, Server, World, failure, short_directory


def test_argv_environment_and_members(wrapped_world, plan):
    world = wrapped_world
    sr = world.sr("environment", "odd")
    disk = world.vdi(sr, name="named", sm_config={"a": "b"})
    for call in plan.calls():
        assert call["argc"] == 2 and call["stdin"] == ""
        # What the interpreter and the shell add by themselves is not xapi's.
        given = {key: value for key, value in call["environment"].items() if key not in ("LC_CTYPE", "PWD", "SHLVL", "_")}
        assert given == {"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "ORIGINATOR": "SM"}
    [request] = [call["request"] for call in plan.calls() if call["command"] == "vdi_create"]
    names = "host_ref command args device_config session_ref sr_ref vdi_type sr_uuid vdi_sm_config subtask_of"
    places = [request.index(f"<member><name>{name}</name>") for name in names.split()]
    assert places == sorted(places), "the members come in xapi's order"
    assert (
        "<value>4194304</value><value>named</value><value/><value/><value>false</value><value>19700101T00:00:00Z</value><value/><value>false</value>"
        in request
    )
    assert "<name>SRmaster</name><value>true</value>" in request and "<name>vdi_type</name><value>user</value>" in request
    assert "SRmaster" not in world.x.PBD.get_device_config(world.x.SR.get_PBDs(sr)[0])
    assert world.x.VDI.get_location(disk) == world.uuid(disk)


def test_order_of_calls_over_the_life_of_a_vm(wrapped_world, plan):
    """smapiv1.md section 11."""
    world, x = wrapped_world, wrapped_world.x
    sr = world.sr("order", "odd")
    assert plan.commands() == ["sr_create", "sr_attach"]
    disk = world.vdi(sr)
    vm = world.vm("order", (disk,))

    def commands(action, *arguments) -> list[str]:
        plan.forget_calls()
        action(*arguments)
        return plan.commands()

    assert commands(x.VM.start, vm, False, False) == ["vdi_epoch_begin", "vdi_attach", "vdi_activate"]
    assert commands(x.VM.snapshot, vm, "s") == ["vdi_snapshot", "vdi_update"]
    assert "<name>epochhint</name>" in plan.calls()[0]["request"]
    assert commands(x.VM.clean_shutdown, vm) == ["vdi_deactivate", "vdi_detach", "vdi_epoch_end"]
    [snapshot] = x.VM.get_snapshots(vm)
    assert commands(x.VM.revert, snapshot) == ["vdi_revert"]
    plan.set(vdi_revert=[38])
    assert commands(x.VM.revert, snapshot) == ["vdi_revert", "vdi_delete", "vdi_clone", "vdi_update"]
    assert commands(x.SR.scan, sr) == ["sr_scan", "sr_update"]
    assert commands(x.PBD.unplug, x.SR.get_PBDs(sr)[0]) == ["sr_detach"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"exit": 3}, ["SR_BACKEND_FAILURE", "non-zero exit", "said before", "complained before"]),
        ({"signal": signal.SIGKILL}, ["SR_BACKEND_FAILURE", "received signal: SIGKILL", "said before", "complained before"]),
        ({"raw": "Traceback"}, ["SR_BACKEND_FAILURE"]),
        ({"raw": ""}, ["SR_BACKEND_FAILURE"]),
        ("<value/>", ["INTERNAL_ERROR", "Unexpected response from SM plugin"]),
        (38, ["SR_OPERATION_NOT_SUPPORTED"]),
        (47, ["SR_BACKEND_FAILURE_47", "", "as planned", ""]),
    ],
)
def test_processes_that_misbehave(wrapped_world, plan, step, expected):
    world = wrapped_world
    sr = world.shared_sr("odd")
    plan.set(sr_update=[step])
    assert failure(world.x.SR.update, sr)[: len(expected)] == expected
    world.x.SR.update(sr)


@pytest.mark.parametrize(
    ("command", "call", "expected"),
    [
        ("vdi_create", lambda world, sr, disk: world.vdi(sr), "UNIMPLEMENTED_IN_SM_BACKEND"),
        ("vdi_snapshot", lambda world, sr, disk: world.x.VDI.snapshot(disk), "UNIMPLEMENTED_IN_SM_BACKEND"),
        ("vdi_resize", lambda world, sr, disk: world.x.VDI.resize(disk, "8388608"), "UNIMPLEMENTED_IN_SM_BACKEND"),
        ("vdi_revert", lambda world, sr, disk: world.x.VDI.revert(world.x.VDI.snapshot(disk)), "UNIMPLEMENTED_IN_SM_BACKEND"),
        ("sr_scan", lambda world, sr, disk: world.x.SR.scan(sr), "SR_OPERATION_NOT_SUPPORTED"),
    ],
)
def test_not_implemented(wrapped_world, plan, command, call, expected):
    """smapiv1.md 3.3."""
    world = wrapped_world
    sr = world.shared_sr("odd")
    disk = world.vdi(sr)
    plan.set(**{command: [38]})
    assert failure(call, world, sr, disk) == [expected, sr]


def test_epoch_begin_that_is_not_implemented(wrapped_world, plan):
    world = wrapped_world
    vm = world.vm("epoch", (world.vdi(world.shared_sr("odd")),))
    plan.set(vdi_epoch_begin=[38])
    assert failure(world.x.VM.start, vm, False, False)[0] == "INTERNAL_ERROR"
    assert world.x.VM.get_power_state(vm) == "Halted"


def test_row_that_the_driver_did_not_introduce(wrapped_world, plan):
    world = wrapped_world
    sr = world.shared_sr("odd")
    uuid = "11111111-2222-4333-8444-555555555555"
    info = f"<value><struct><member><name>uuid</name><value>{uuid}</value></member><member><name>location</name><value>{uuid}</value></member></struct></value>"
    plan.set(vdi_create=[info], vdi_snapshot=[info])
    assert failure(world.vdi, sr) == ["UUID_INVALID", "VDI", uuid]
    disk = world.vdi(sr)
    assert failure(world.x.VDI.snapshot, disk)[0] == "INTERNAL_ERROR"


def test_location_that_is_no_uuid_stops_a_revert(wrapped_world, plan):
    """The hidden pre-condition: xapi looks for the target by location and is given its uuid."""
    world, x = wrapped_world, wrapped_world.x
    disk = world.vdi(world.shared_sr("odd"))
    snapshot = x.VDI.snapshot(disk, {})
    world.session("close")()
    world.xapi.stop()
    with sqlite3.connect(world.folder / "xapi" / "xapi.db") as sql:
        sql.execute("UPDATE object SET fields = json_set(fields, '$.location', 'elsewhere') WHERE ref = ?", (disk,))
    sql.close()
    world.start_xapi()
    plan.forget_calls()
    assert failure(world.x.VDI.revert, snapshot)[0] == "INTERNAL_ERROR" and "vdi_revert" not in plan.commands()


def test_many_plugins_at_once_and_the_server_answers_meanwhile(wrapped_world, plan):
    x = wrapped_world.x
    srs = [wrapped_world.shared_sr(kind) for kind in ("odd", "noclone", "norevert", "cbt")]
    plan.set(sr_update=[{"together": 4}] * 4)
    tasks = [x.Async.SR.update(sr) for sr in srs]
    asked = 0
    while any(x.task.get_status(task) == "pending" for task in tasks):
        asked += len(x.VM.get_all())
    assert asked
    assert [wrapped_world.wait_task(task)["error_info"] for task in tasks] == [[]] * 4


def test_discovery():
    folder = short_directory()
    sm = folder / "sm"
    sm.mkdir()
    for name, text, mode in [
        ("SimSR", f'#!/bin/sh\nexec {SIMSR_PLUGIN} "$1"\n', 0o755),
        ("PlainSR", wrapped(), 0o644),
        ("BrokenSR", "#!/bin/sh\nexit 1\n", 0o755),
        ("UnwantedSR", wrapped(), 0o755),
        ("FileSR.py", wrapped(), 0o755),
        ("NoInterpreterSR", "#!/nonexistent\n", 0o755),
    ]:
        (sm / name).write_text(text)
        (sm / name).chmod(mode)
    server = Server(folder / "xapi", "--sm-dir", str(sm), "--sm-plugins", "sim PLAIN broken nointerpreter")
    try:
        session = server.session()
        [record] = session.xenapi.SM.get_all_records().values()
        assert (record["type"], record["driver_filename"]) == ("sim", str(sm / "SimSR"))
        assert record["features"]["VDI_REVERT"] == "1" and "VDI_REVERT" in record["capabilities"]
        log = server.log_text()
        assert "BrokenSR is not used" in log and "PlainSR is not used" in log and "NoInterpreterSR is not used" in log
        session.logout()
        session("close")()
    finally:
        assert server.stop() == 0
        shutil.rmtree(folder)


def test_features_follow_the_driver_at_the_next_start():
    world = World(drivers={"ChangingSR": wrapped(without=("VDI_REVERT",))})
    try:
        sr = world.sr("changing", "changing")
        assert "vdi_revert" not in world.x.SR.get_allowed_operations(sr)
        world.write_driver("ChangingSR", wrapped())
        assert "vdi_revert" not in world.x.SR.get_allowed_operations(sr)
        world.restart_xapi()
        assert "vdi_revert" in world.x.SR.get_allowed_operations(sr)
        (world.folder / "sm" / "ChangingSR").unlink()
        world.restart_xapi()
        assert [record["type"] for record in world.x.SM.get_all_records().values()] == ["changing"], "an SR still needs it"
        assert failure(world.x.SR.update, sr) == ["SR_UNKNOWN_DRIVER", "changing"]
    finally:
        world.close()

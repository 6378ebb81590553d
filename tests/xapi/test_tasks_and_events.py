"""Async calls, tasks, both event interfaces, messages, and plug-ins of the host."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio
from xapi_kit import failure

from simsr.xapi import locks
from simsr.xapi.model import Call, Model, Settings

# Tasks.


def test_result_is_the_value_in_xml(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    record = upstream.wait_task(x.Async.VDI.snapshot(disk, {}))
    assert (record["status"], record["progress"], record["error_info"], record["name_label"]) == (
        "success",
        1.0,
        [],
        "Async.VDI.snapshot",
    )
    snapshot = record["result"].removeprefix("<value>").removesuffix("</value>")
    assert record["result"] == f"<value>{snapshot}</value>" and x.VDI.get_snapshot_of(snapshot) == disk
    assert record["resident_on"] == upstream.host
    record = upstream.wait_task(x.Async.VDI.revert(snapshot))
    assert (record["status"], record["result"]) == ("success", "")


def test_failed_task(upstream):
    x = upstream.x
    task = x.Async.VM.start("OpaqueRef:x", False, False)
    record = upstream.wait_task(task)
    assert (record["status"], record["result"], record["error_info"]) == ("failure", "", ["HANDLE_INVALID", "VM", "OpaqueRef:x"])
    x.task.destroy(task)
    assert failure(x.task.get_status, task) == ["HANDLE_INVALID", "task", task]


def test_wrong_arguments_are_told_at_once(upstream):
    assert failure(upstream.x.Async.VM.start, "OpaqueRef:x")[0] == "MESSAGE_PARAMETER_COUNT_MISMATCH"


def test_every_call_is_there_as_async(upstream):
    x = upstream.x
    record = upstream.wait_task(x.Async.VM.clone(upstream.template, "async"))
    vm = record["result"][7:-8]
    assert x.VM.get_name_label(vm) == "async"
    upstream.wait_task(x.Async.VM.set_name_label(vm, "again"))
    assert x.VM.get_name_label(vm) == "again"


def test_notes_on_a_task(upstream):
    """How CloudStack finds its task again."""
    x = upstream.x
    vm = x.VM.clone(upstream.template, "noted")
    task = x.Async.VM.snapshot(vm, "cs")
    x.task.add_to_other_config(task, "CS_VM_SNAPSHOT_KEY", "cs")
    upstream.wait_task(task)
    found = [
        t for t in x.task.get_by_name_label("Async.VM.snapshot") if x.task.get_other_config(t).get("CS_VM_SNAPSHOT_KEY") == "cs"
    ]
    assert found == [task]


def test_tasks_of_clients(upstream):
    x = upstream.x
    task = x.task.create("mine", "described")
    x.task.set_progress(task, 0.5)
    record = x.task.get_record(task)
    assert (record["status"], record["progress"], record["name_description"]) == ("pending", 0.5, "described")
    x.task.set_status(task, "success")
    assert x.task.get_status(task) == "success"


def test_cancelling_what_waits_for_its_turn(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    sr = world.shared_sr("odd")
    plan.set(sr_scan=[{"hold": True}])
    first = x.Async.SR.scan(sr)
    while "sr_scan" not in plan.commands():
        time.sleep(0.01)
    second = x.Async.SR.scan(sr)
    x.task.cancel(second)
    assert world.wait_task(second)["error_info"] == ["TASK_CANCELLED", second]
    assert x.task.get_status(second) == "cancelled"
    x.task.cancel(first)
    plan.release()
    assert world.wait_task(first)["status"] == "success", "one that works finishes"
    assert plan.commands().count("sr_scan") == 1


def test_cancelled_snapshot_leaves_nothing_behind(wrapped_world, plan):
    world, x = wrapped_world, wrapped_world.x
    sr = world.sr("cancelled", "odd")
    disks = {world.vdi(sr), world.vdi(sr)}
    vm = world.vm("cancelled", tuple(disks))
    plan.set(vdi_snapshot=[{"hold": True}])
    task = x.Async.VM.snapshot(vm, "s")
    while "vdi_snapshot" not in plan.commands():
        time.sleep(0.01)
    x.task.cancel(task)
    plan.release()
    assert world.wait_task(task)["error_info"] == ["TASK_CANCELLED", task]
    assert set(x.SR.get_VDIs(sr)) == disks and x.VM.get_snapshots(vm) == []


async def test_waiting_is_given_up_in_the_end(autojump_clock, tmp_path):
    """After two hours of OTHER_OPERATION_IN_PROGRESS the client sees it."""
    model = Model(Settings(database=":memory:", sm_directory=str(tmp_path)))
    async with trio.open_nursery() as nursery:
        await nursery.start(model.run)
        sr = model.db.create("SR", type="x", current_operations={"OpaqueRef:op": "scan"})
        call = Call(model, "", "OpaqueRef:task", is_local=True)
        begin = trio.current_time()
        with pytest.raises(Exception, match="OTHER_OPERATION_IN_PROGRESS"):
            async with locks.operations(call, ("SR", sr, "destroy")):
                pass
        assert trio.current_time() - begin == pytest.approx(locks.GIVE_UP_S, abs=1)
        nursery.cancel_scope.cancel()


async def test_sessions_end_after_an_idle_day(autojump_clock, tmp_path):
    model = Model(Settings(database=":memory:", sm_directory=str(tmp_path)))
    async with trio.open_nursery() as nursery:
        await nursery.start(model.run)
        used, idle = [await model.answer("session.login_with_password", ["root", ""], is_local=True) for _ in range(2)]
        plugins = model.sessions.for_sr("OpaqueRef:sr")
        for _ in range(3):
            await trio.sleep(12 * 3600)
            await model.answer("VM.get_all", [used])
        with pytest.raises(Exception, match="SESSION_INVALID"):
            await model.answer("VM.get_all", [idle])
        await model.answer("VM.get_all", [plugins])
        nursery.cancel_scope.cancel()


# Events.


def test_classes_objects_and_deletions(upstream):
    x = upstream.x
    token = x.event_from(["*"], "", 0.0)["token"]
    vm, other = (x.VM.clone(upstream.template, name) for name in ("one", "two"))
    mine = x.event_from([f"VM/{vm}"], token, 5.0)["events"]
    assert [(event["class"], event["ref"], event["operation"]) for event in mine] == [("vm", vm, "add")]
    both = x.event_from(["vm"], token, 5.0)
    assert {event["ref"] for event in both["events"] if event["operation"] == "add"} == {vm, other}
    x.VM.destroy(vm)
    gone = x.event_from(["vm"], both["token"], 5.0)["events"]
    assert [(event["operation"], event["ref"]) for event in gone] == [("del", vm)] and "snapshot" not in gone[0]
    assert not [event for event in x.event_from(["vm"], token, 5.0)["events"] if event["ref"] == vm], "added and deleted since"


def test_a_change_of_a_vbd_is_one_of_its_vm_and_vdi(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    vm = upstream.vm("derived")
    token = x.event_from(["*"], "", 0.0)["token"]
    vbd = upstream.vbd(vm, disk)
    events = {event["ref"]: event for event in x.event_from(["vm", "vdi"], token, 5.0)["events"]}
    assert events[vm]["snapshot"]["VBDs"] == [vbd] == events[disk]["snapshot"]["VBDs"]


def test_waiting_for_an_event(upstream):
    x = upstream.x
    token = x.event_from(["pool"], "", 0.0)["token"]
    other, pool = upstream.xapi.session(), x.pool.get_all()[0]
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(x.event_from, ["pool"], token, 600.0)
        time.sleep(0.2)
        assert not waiting.done()
        other.xenapi.pool.set_name_label(pool, "awake")
        [event] = waiting.result(timeout=120)["events"]
    assert event["snapshot"]["name_label"] == "awake"
    other.logout()
    other("close")()


@pytest.mark.parametrize("token", ["nonsense", "1,2", "0" * 20, "x" * 20 + "," + "0" * 20])
def test_tokens_that_are_none(upstream, token):
    assert failure(upstream.x.event_from, ["*"], token, 0.0) == ["EVENT_FROM_TOKEN_PARSE_FAILURE", token]


@pytest.mark.parametrize("number", ["0" * 20, "9" * 20])
def test_tokens_of_another_time(upstream, number):
    assert failure(upstream.x.event_from, ["*"], f"{number},{number}", 0.0) == ["EVENTS_LOST"]


def test_the_old_interface(upstream):
    x = upstream.x
    assert failure(x.event.next)[0] == "SESSION_NOT_REGISTERED"
    x.event.register(["vm"])
    before = int(x.event.get_current_id())
    vm = x.VM.clone(upstream.template, "old events")
    [event] = [event for event in x.event.next() if event["ref"] == vm]
    assert event["operation"] == "add" and event["obj_uuid"] == x.VM.get_uuid(vm) and int(event["id"]) > before
    assert event["timestamp"] == "0.0" and event["snapshot"]["name_label"] == "old events"
    x.event.inject("VM", vm)
    assert [event["operation"] for event in x.event.next()] == ["mod"]
    x.event.unregister(["vm"])
    assert failure(x.event.next)[0] == "SESSION_NOT_REGISTERED"


# Messages and plug-ins of the host.


def test_messages(upstream):
    x = upstream.x
    uuid = x.VM.get_uuid(x.VM.clone(upstream.template, "told"))
    message = x.message.create("TOLD", "3", "VM", uuid, "what happened")
    record = x.message.get_record(message)
    assert (record["cls"], record["priority"], record["body"]) == ("VM", "3", "what happened")
    assert message in x.message.get_since("20200101T00:00:00Z") and message not in x.message.get_since("2200-01-01T00:00:00Z")
    assert set(x.message.get("VM", uuid, "19700101T00:00:00Z")) == {message}
    x.message.destroy(message)
    assert failure(x.message.create, "TOLD", "3", "VM", "no-uuid", "") == ["UUID_INVALID", "VM", "no-uuid"]


def test_plugin_that_nobody_registered(upstream):
    assert failure(upstream.x.host.call_plugin, upstream.host, "nonsense", "f", {}) == ["XENAPI_MISSING_PLUGIN", "nonsense"]


async def test_plugins_of_the_host(tmp_path):
    model = Model(Settings(database=":memory:", sm_directory=str(tmp_path)))

    def fails(session: str, arguments: dict[str, str]) -> str:
        raise ValueError("as planned")

    model.register_plugin("vmopsSnapshot", {"echo": lambda session, arguments: f"{arguments['a']} {session}", "fails": fails})
    async with trio.open_nursery() as nursery:
        await nursery.start(model.run)
        session = await model.answer("session.login_with_password", ["root", ""], is_local=True)
        [host] = model.db.all("host")
        assert await model.answer("host.call_plugin", [session, host, "vmopsSnapshot", "echo", {"a": "b"}]) == f"b {session}"
        with pytest.raises(Exception, match="XENAPI_PLUGIN_FAILURE: fails, ValueError, as planned"):
            await model.answer("host.call_plugin", [session, host, "vmopsSnapshot", "fails", {}])
        with pytest.raises(Exception, match="UNKNOWN_XENAPI_PLUGIN_FUNCTION"):
            await model.answer("host.call_plugin", [session, host, "vmopsSnapshot", "absent", {}])
        nursery.cancel_scope.cancel()

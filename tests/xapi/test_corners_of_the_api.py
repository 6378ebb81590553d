"""What clients do now and then: odd devices, second PBDs, local logins, subtasks, numbers out of range."""

from __future__ import annotations

import re
import xmlrpc.client
from functools import partial

import httpx
import pytest
import XenAPI
from xapi_kit import NULL, failure


def test_what_vbd_create_refuses(upstream, native_sr):
    vm, disk = upstream.vm("devices"), upstream.vdi(native_sr)
    assert failure(partial(upstream.vbd, vm, NULL, "1", type="CD")) == ["VBD_CDS_MUST_BE_READONLY"]
    assert failure(partial(upstream.vbd, vm, disk, "1", type="CD")) == ["VBD_CDS_MUST_BE_READONLY"]
    for kind in ("Disk", "Floppy"):
        assert failure(partial(upstream.vbd, vm, NULL, "1", type=kind)) == ["VBD_NOT_REMOVABLE_MEDIA", "in constructor"]
    for device in ("sda1", "256", "-1", "01"):
        assert failure(upstream.vbd, vm, disk, device) == ["INVALID_DEVICE", device]
    assert upstream.x.VM.get_VBDs(vm) == []


def test_only_drives_have_a_medium_to_change(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    vm = upstream.vm("no drive", (disk,))
    [vbd] = x.VM.get_VBDs(vm)
    x.VM.start(vm, False, False)
    assert failure(x.VBD.insert, vbd, disk) == ["VBD_NOT_REMOVABLE_MEDIA", vbd] == failure(x.VBD.eject, vbd)
    x.VM.hard_shutdown(vm)


def test_an_sr_that_is_not_shared_has_one_pbd(upstream, native_sr):
    x = upstream.x
    record = {"host": upstream.host, "SR": native_sr, "device_config": {}}
    assert failure(x.PBD.create, record) == ["SR_NOT_SHARABLE", native_sr, upstream.host]
    x.SR.set_shared(native_sr, True)
    assert failure(x.PBD.create, record) == ["PBD_EXISTS", native_sr, upstream.host, *x.SR.get_PBDs(native_sr)]
    x.SR.set_shared(native_sr, False)


def test_an_sr_that_cannot_be_plugged_leaves_nothing_behind(wrapped_world, plan):
    plan.set(sr_attach=[47])
    assert failure(wrapped_world.sr, "half made", "odd")[0] == "SR_BACKEND_FAILURE_47"
    assert plan.commands() == ["sr_create", "sr_attach", "sr_delete"]
    assert wrapped_world.x.SR.get_by_name_label("half made") == []


def test_domid_and_generation_id(upstream, native_sr):
    x = upstream.x
    vm = upstream.vm("identity", (upstream.vdi(native_sr),))
    assert x.VM.get_domid(vm) == "-1"
    x.VM.start(vm, False, False)
    assert int(x.VM.get_domid(vm)) > 0
    snapshot = x.VM.snapshot(vm, "s")
    seen = {x.VM.get_generation_id(vm)}
    for _ in range(2):
        x.VM.revert(snapshot)
        seen.add(x.VM.get_generation_id(vm))
    assert x.VM.get_domid(vm) == "-1"
    assert len(seen) == 3 and all(re.fullmatch(r"\d+:\d+", text) for text in seen), seen


def test_the_stock_client_logs_in_locally_and_out(upstream):
    session = XenAPI.Session("http://" + upstream.xapi.socket.replace("/", "_") + "/", transport=XenAPI.UDSTransport())
    session.slave_local_login_with_password("root", "")
    assert session.xenapi.host.get_all() == [upstream.host]
    ref = session.handle
    session.logout()
    session("close")()
    assert upstream.session.VM.get_all(ref)["ErrorDescription"] == ["SESSION_INVALID", ref]


def test_a_session_keeps_notes_about_itself_only(upstream):
    x, own = upstream.x, upstream.session.handle
    x.session.add_to_other_config(own, "key", "value")
    assert failure(x.session.add_to_other_config, own, "key", "other") == ["MAP_DUPLICATE_KEY", "session", "other_config", own, "key"]
    assert x.session.get_other_config(own) == {"key": "value"}
    x.session.remove_from_other_config(own, "key")
    assert x.session.get_other_config(own) == {}
    x.session.set_other_config(own, {"a": "b"})
    assert x.session.get_record(own)["other_config"] == {"a": "b"}
    other = upstream.xapi.session()
    for method, more in (("get_record", ()), ("set_other_config", ({},)), ("add_to_other_config", ("a", "b"))):
        assert failure(getattr(x.session, method), other.handle, *more) == ["HANDLE_INVALID", "session", other.handle]
    other.logout()
    other("close")()


def test_the_task_of_a_call_is_part_of_the_one_named_in_the_header(upstream):
    x = upstream.x
    parent = x.task.create("parent", "")
    tasks = []
    request = xmlrpc.client.dumps((upstream.session.handle,), "Async.pool.get_all")
    with httpx.Client(transport=httpx.HTTPTransport(uds=upstream.xapi.socket), timeout=60) as client:
        for named in (parent, "OpaqueRef:nonsense"):
            answer = client.post("http://x/", content=request, headers={"Subtask-of": named})
            tasks.append(xmlrpc.client.loads(answer.content)[0][0]["Value"])
    assert [upstream.wait_task(task)["subtask_of"] for task in tasks] == [parent, NULL]
    assert x.task.get_subtasks(parent) == tasks[:1]


@pytest.mark.parametrize("size", ["9223372036854775808", "-9223372036854775809", "9999999999999999999"])
def test_integers_have_64_bits_also_as_text(upstream, size):
    vm = upstream.template
    assert failure(upstream.x.VM.set_user_version, vm, size) == ["FIELD_TYPE_ERROR", "user_version"]


def test_vbds_are_gone_before_the_driver_destroys_the_data(wrapped_world, plan):
    x = wrapped_world.x
    disk = wrapped_world.vdi(wrapped_world.shared_sr("cbt"))
    plan.set(vdi_enable_cbt=["<value><nil/></value>"], vdi_data_destroy=[200])
    x.VDI.enable_cbt(disk)
    snapshot = x.VDI.snapshot(disk, {})
    vbd = wrapped_world.vbd(wrapped_world.vm("reader"), snapshot)
    assert failure(x.VDI.data_destroy, snapshot)[0] == "SR_BACKEND_FAILURE_200"
    assert failure(x.VBD.get_record, vbd) == ["HANDLE_INVALID", "VBD", vbd]
    assert x.VDI.get_type(snapshot) == "user"

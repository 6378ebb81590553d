"""Activation keys: which host has a VDI activated, as xapi's database says it (sm_config:host_REF)."""

import pytest

from smapi_fake_xapi import new_ref
from smapi_host import Host
from smapi_kit import HOST_REF, SR_UUID
from smapi_wire import NIL

OWN = "host_" + HOST_REF


@pytest.fixture
def disk(daemon):
    return daemon.add_vdi(SR_UUID)


@pytest.fixture
def ref(xapi, disk):
    return xapi.add_vdi(xapi.sr_ref, disk, sm_config={"keep": "this"})


@pytest.fixture
def keys(xapi, ref):
    """A function that returns the activation keys of the VDI."""
    def keys():
        sm_config = dict(xapi.tables["VDI"][ref]["sm_config"])
        assert sm_config.pop("keep") == "this"
        return sm_config
    return keys


@pytest.fixture
def impatient(pool):
    pool.device_config["activate_wait_s"] = "0.05"
    return pool


def hold(xapi, daemon, ref, disk, mode="RW", live=True, attached=True):
    """Another host has the VDI; returns its key."""
    host = xapi.add_host(live)
    xapi.tables["VDI"][ref]["sm_config"]["host_" + host] = mode
    if attached:
        daemon.vdis[disk]["attached"].append({"client": "sm:" + host, "writable": mode == "RW", "kind": "attach"})
    return "host_" + host


@pytest.mark.parametrize("writable, mode", [("true", "RW"), ("false", "RO")])
def test_key_is_set_and_removed(pool, xapi, disk, ref, keys, writable, mode):
    for _ in range(2):
        assert pool.call("vdi_activate", [writable], vdi=disk, vdi_ref=ref) is NIL
        assert keys() == {OWN: mode}
    assert xapi.methods().count("VDI.add_to_sm_config") == 1
    for _ in range(2):
        assert pool.call("vdi_deactivate", vdi=disk, vdi_ref=ref) is NIL
        assert keys() == {}
    assert "VDI.set_sm_config" not in xapi.methods()


def test_mode_is_changed_in_place(pool, disk, ref, keys):
    for writable, mode in (("false", "RO"), ("true", "RW")):
        pool.call("vdi_activate", [writable], vdi=disk, vdi_ref=ref)
        assert keys() == {OWN: mode}


@pytest.mark.parametrize("held, writable", [("RW", "true"), ("RW", "false"), ("RO", "true")])
def test_other_host_excludes(impatient, xapi, daemon, disk, ref, keys, held, writable):
    other = hold(xapi, daemon, ref, disk, held)
    fault = impatient.fault("vdi_activate", [writable], vdi=disk, vdi_ref=ref)
    assert fault.number == 46 and other in fault.text and disk in fault.text
    assert keys() == {other: held}


def test_readers_share(impatient, xapi, daemon, disk, ref, keys):
    other = hold(xapi, daemon, ref, disk, "RO")
    impatient.call("vdi_activate", ["false"], vdi=disk, vdi_ref=ref)
    assert keys() == {other: "RO", OWN: "RO"}


def test_sharable_vdi_excludes_nobody(impatient, xapi, daemon, disk, ref, keys):
    other = hold(xapi, daemon, ref, disk)
    daemon.vdis[disk]["sharable"] = True
    impatient.call("vdi_activate", ["true"], vdi=disk, vdi_ref=ref)
    assert keys() == {other: "RW", OWN: "RW"}


def test_key_of_a_host_that_does_not_use_the_vdi_is_removed(impatient, xapi, daemon, disk, ref, keys):
    hold(xapi, daemon, ref, disk, attached=False)
    impatient.call("vdi_activate", ["true"], vdi=disk, vdi_ref=ref)
    assert keys() == {OWN: "RW"}


def test_key_stays_while_a_connection_is_open_that_could_be_its_hosts(impatient, xapi, daemon, disk, ref, keys):
    other = hold(xapi, daemon, ref, disk, attached=False, live=False)
    daemon.vdis[disk]["attached"].append({"client": "nbd client 7", "writable": True, "kind": "nbd"})
    assert impatient.fault("vdi_activate", ["true"], vdi=disk, vdi_ref=ref).number == 46
    assert keys() == {other: "RW"}


@pytest.mark.parametrize("known", [True, False])
def test_host_that_is_gone_is_detached(impatient, xapi, daemon, disk, ref, keys, known):
    """One that xapi calls dead, or does not know any more."""
    hold(xapi, daemon, ref, disk, live=False)
    if not known:
        xapi.tables["host"].clear()
    assert impatient.call("vdi_activate", ["true"], vdi=disk, vdi_ref=ref) is NIL
    assert keys() == {OWN: "RW"} and daemon.vdis[disk]["attached"] == []


@pytest.mark.parametrize("live", [True, False])
def test_attach_is_not_refused_for_a_host_that_is_gone(pool, xapi, daemon, disk, ref, live):
    hold(xapi, daemon, ref, disk, live=live)
    daemon.exclusive = True
    if live:
        assert pool.fault("vdi_attach", ["true"], vdi=disk, vdi_ref=ref).number == 24
    else:
        pool.call("vdi_attach", ["true"], vdi=disk, vdi_ref=ref)
        assert [entry["client"] for entry in daemon.vdis[disk]["attached"]] == ["sm:" + HOST_REF]


def test_other_host_is_waited_for(pool, xapi, daemon, disk, ref, keys):
    pool.device_config["activate_wait_s"] = "20"
    other = hold(xapi, daemon, ref, disk)

    def let_go():
        del xapi.tables["VDI"][ref]["sm_config"][other]
    # It is looked at, found in force, and looked at again: only the second look finds it gone.
    xapi.before["VDI.get_sm_config"] = lambda: xapi.before.update({"VDI.get_sm_config": let_go})
    assert pool.call("vdi_activate", ["true"], vdi=disk, vdi_ref=ref) is NIL
    assert keys() == {OWN: "RW"}


def test_of_two_hosts_at_the_same_moment_not_both_get_it(impatient, xapi, daemon, disk, ref, keys):
    """The other one sets its key between our look and our key."""
    others = []
    xapi.before["VDI.add_to_sm_config"] = lambda: others.append(hold(xapi, daemon, ref, disk))
    assert impatient.fault("vdi_activate", ["true"], vdi=disk, vdi_ref=ref).number == 46
    assert keys() == {others[0]: "RW"}


def test_another_process_of_this_host_sets_the_key(pool, xapi, disk, ref, keys):
    xapi.before["VDI.add_to_sm_config"] = lambda: xapi.tables["VDI"][ref]["sm_config"].update({OWN: "RW"})
    assert pool.call("vdi_activate", ["true"], vdi=disk, vdi_ref=ref) is NIL
    assert keys() == {OWN: "RW"}


def test_activation_that_fails_takes_its_key_back(pool, disk, ref, keys, folder):
    host = Host(folder / "host")
    pool.device_config.update(host.device_config, attach="tapdisk")
    host.plan(allocate=True)
    assert pool.fault("vdi_activate", ["true"], vdi=disk, vdi_ref=ref).number == 453
    assert keys() == {}


def test_deactivation_does_not_fail_for_xapi(pool, xapi, disk, ref):
    xapi.failures["VDI.remove_from_sm_config"] = ["INTERNAL_ERROR", "x"]
    assert pool.call("vdi_deactivate", vdi=disk, vdi_ref=ref) is NIL


@pytest.mark.parametrize("master", ["true", "false"])
def test_sr_attach_removes_this_hosts_old_keys_only(pool, xapi, daemon, disk, ref, keys, master):
    other = hold(xapi, daemon, ref, disk, attached=False)
    used = daemon.add_vdi(SR_UUID)
    used_ref = xapi.add_vdi(xapi.sr_ref, used, sm_config={OWN: "RW"})
    daemon.vdis[used]["attached"].append({"client": "sm:" + HOST_REF, "writable": True, "kind": "attach"})
    xapi.tables["VDI"][ref]["sm_config"][OWN] = "RW"
    pool.device_config["SRmaster"] = master
    assert pool.call("sr_attach") is NIL
    assert keys() == {other: "RW"}
    assert xapi.tables["VDI"][used_ref]["sm_config"] == {OWN: "RW"}


def test_scan_leaves_keys_alone(pool, xapi, daemon, disk, ref, keys):
    other = hold(xapi, daemon, ref, disk, attached=False)
    assert pool.call("sr_scan") is NIL
    assert keys() == {other: "RW"}


def test_vdi_is_loaded_with_a_ref_that_xapi_does_not_know(pool, disk):
    assert pool.fault("vdi_activate", ["true"], vdi=disk, vdi_ref=new_ref()).number == 46

"""Servers that die, sessions that end: at each request that each command makes, and the three moments of it.

What must hold: the fault has the right number; what simsrd has is what it had before or what the whole command makes, never anything
between; the next sr_scan makes the database agree.
"""

from __future__ import annotations

import subprocess
import uuid as uuid_module
import xmlrpc.client
from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_lab import ASK_NOBODY, CASES, CREATE_ARGS, DO_WITHOUT_XAPI, WHOLE_SR, Lab
from fault_proxy import MOMENTS
from wrapped_driver import Plan
from xapi_kit import MIB

RELABELLED = {40, 46, 65, 78, 80, 81, 82, 110, 202}
"""What a refused XenAPI call is called, by the command."""


@pytest.fixture(scope="module")
def lab(wrapped_world):
    plan = Plan(wrapped_world)
    plan.set()
    lab = Lab(wrapped_world, plan)
    yield lab
    lab.close()


@pytest.fixture
def prepare(lab):
    """``prepare(command)`` makes what the command needs and returns its arguments and members."""

    def prepared(command: str):
        lab.clear()
        return CASES[command](lab)

    yield prepared
    lab.clear()


def clean_run(lab: Lab, prepare, command: str) -> tuple[list, list, list[str], list[str]]:
    """Return the state before and after an undisturbed run, and what it asked of simsrd and of xapi."""
    args, members = prepare(command)
    before = lab.state()
    assert lab.run(command, args, **members) == 0
    return before, lab.state(), list(lab.daemon.steps), list(lab.xapi.steps)


def settle(lab: Lab, states: tuple[list, list], what: str) -> None:
    """Nothing is half done, and the next scan makes the database agree."""
    lab.daemon.revive()
    lab.xapi.revive()
    found = lab.state()
    assert found in states, f"{what}: half done: {found}"
    assert lab.run("sr_scan") == 0
    lab.database_agrees()


def test_every_command_is_in_the_table(lab):
    assert set(lab.plugin.COMMANDS) - set(CASES) == ASK_NOBODY | WHOLE_SR


@pytest.mark.parametrize("command", CASES)
def test_simsrd_dies(lab, prepare, command):
    """47, unless all that was left to do is what a scan repairs (sizes, utilisation): then the command has succeeded."""
    before, after, steps, _ = clean_run(lab, prepare, command)
    for number, step in enumerate(steps):
        for moment in MOMENTS if not step.startswith("GET") else ("before", "middle"):
            args, members = prepare(command)
            lab.daemon.die_at(number, moment)
            fault = lab.run(command, args, **members)
            what = f"{command}, {moment} {step}"
            assert fault in (0, 47), what
            if fault == 0 and command != "sr_attach":  # whose scan may fail
                assert lab.state() == after, what
            settle(lab, (before, after), what)


@pytest.mark.parametrize("command", CASES)
def test_xapi_dies(lab, prepare, command):
    """150 and nothing touched if it is the first call; 154 later, unless a scan repairs what was left to be told."""
    before, after, _, steps = clean_run(lab, prepare, command)
    for number, step in enumerate(steps):
        for moment in ("before", "after") if ".get_" not in step else ("before",):
            args, members = prepare(command)
            lab.xapi.die_at(number, moment)
            fault = lab.run(command, args, **members)
            what = f"{command}, {moment} {step}: {fault}"
            assert fault in (0, 150, 154), what
            if number == 0 and command not in DO_WITHOUT_XAPI:
                assert fault in (150, 154) and lab.state() == before, what
            settle(lab, (before, after), what)


@pytest.mark.parametrize("command", CASES)
def test_session_ends_in_the_middle(lab, prepare, command):
    """150 at the first call, 153 at a later one."""
    answer = {"Status": "Failure", "ErrorDescription": ["SESSION_INVALID", lab.session]}
    document = xmlrpc.client.dumps((answer,), methodresponse=True).encode()
    before, after, _, steps = clean_run(lab, prepare, command)
    for number, step in enumerate(steps):
        args, members = prepare(command)
        lab.xapi.answer_from(number, document)
        fault = lab.run(command, args, **members)
        what = f"{command}, {step}: {fault}"
        assert fault in ((150,) if number == 0 and command not in DO_WITHOUT_XAPI else (0, 153)), what
        if fault == 150:
            assert lab.state() == before, what
        settle(lab, (before, after), what)


@pytest.mark.parametrize("command", CASES)
def test_xapi_refuses(lab, prepare, command):
    """Any other failure of a call is called what the command calls it; the first calls of each command."""
    answer = {"Status": "Failure", "ErrorDescription": ["INTERNAL_ERROR", "as planned"]}
    document = xmlrpc.client.dumps((answer,), methodresponse=True).encode()
    before, after, _, steps = clean_run(lab, prepare, command)
    for number, step in list(enumerate(steps))[:4]:
        args, members = prepare(command)
        lab.xapi.answer_from(number, document)
        fault = lab.run(command, args, **members)
        what = f"{command}, {step}: {fault}"
        assert fault in ((150,) if number == 0 and command not in DO_WITHOUT_XAPI else {0} | RELABELLED), what
        settle(lab, (before, after), what)


@pytest.mark.parametrize(
    ("command", "moment"),
    [
        ("vdi_create", "after"),
        ("vdi_snapshot", "middle"),
        ("vdi_clone", "before"),
        ("vdi_revert", "before"),
        ("vdi_revert", "after"),
        ("vdi_revert", "middle"),
        ("vdi_resize", "after"),
        ("vdi_delete", "after"),
        ("vdi_update", "middle"),
        ("vdi_attach", "after"),
        ("sr_scan", "before"),
    ],
)
def test_simsrd_is_killed(lab, prepare, command, moment):
    """The same with processes and SIGKILL, at the request that changes something (at the second one of a scan)."""
    before, after, steps, _ = clean_run(lab, prepare, command)
    number = next((number for number, step in enumerate(steps) if not step.startswith("GET")), 1)
    args, members = prepare(command)
    lab.daemon.die_at(number, moment, lab.world.simsrd.kill)
    assert lab.run_process(command, args, **members) == 47
    lab.world.start_simsrd()
    whole = [(*entry[:-1], 0) for entry in after]  # nothing is attached after a restart
    settle(lab, (before,) if moment == "before" else (whole,), f"{command}, {moment} {steps[number]}")


@pytest.mark.parametrize("command", sorted(WHOLE_SR))
def test_whole_srs(lab, command):
    """However sr_create or sr_delete is broken off, the SR is there or not, and the command can be repeated."""
    lab.clear()

    def there() -> bool:
        return any(sr["uuid"] == uuid for sr in lab.http.get("/v1/srs").json())

    number, cut = 0, True
    while cut:
        for moment in MOMENTS:
            uuid = str(uuid_module.uuid4())
            row = lab.x.SR.introduce(uuid, f"{command} {uuid}", "", "odd", "user", False, {})
            members = {"sr_uuid": uuid, "sr_ref": row}
            args = [str(32 * MIB)] if command == "sr_create" else []
            if command == "sr_delete":
                assert lab.run("sr_create", [str(32 * MIB)], **members) == 0 and there()
            lab.daemon.revive()
            lab.daemon.die_at(number, moment)
            fault = lab.run(command, args, **members)
            cut = len(lab.daemon.steps) > number
            lost = cut and not (moment == "middle" and lab.daemon.steps[number].startswith("DELETE"))  # whose answer is a status only
            assert fault == (47 if lost else 0), (number, moment)
            lab.daemon.revive()
            assert lab.run(command, args, **members) == 0 and there() is (command == "sr_create")
            assert lab.run("sr_delete", **members) == 0 and not there()
            lab.x.SR.forget(row)
        number += 1
    assert number > 2


def test_forty_processes_at_once(lab, prepare):
    """Of all kinds, on one SR: all of them succeed, nothing is lost, and a scan finds nothing to mend but what raced with it."""
    lab.clear()
    busy, grown = lab.vdi("busy"), lab.vdi("grown")
    snapshot = lab.post(busy, "snapshot", {"name": "snapshot"})
    victims, attached = [lab.vdi(f"victim {number}") for number in range(5)], [lab.vdi(f"attached {number}") for number in range(4)]
    direct = {"device_config": {**lab.world.device_config(), "SRmaster": "true"}}
    work = [("vdi_create", CREATE_ARGS, {"vdi_type": "user", "vdi_sm_config": {}})] * 8
    work += [("vdi_snapshot", [], {"vdi": busy, "driver_params": {}}), ("vdi_clone", [], {"vdi": snapshot, "driver_params": {}})] * 5
    work += [("vdi_delete", [], {"vdi": victim}) for victim in victims]
    work += [("vdi_attach", ["true"], {"vdi": vdi}) for vdi in attached]
    work += [("vdi_revert", [lab.ref(busy)], {"vdi": snapshot}), ("sr_scan", [], {}), ("sr_update", [], {})] * 3
    work += [("vdi_resize", [str(2 * MIB)], {"vdi": grown}), ("vdi_update", [], {"vdi": grown})] * 2
    assert len(work) == 40
    requests = [lab.request(command, args, **members, **direct) for command, args, members in work]
    with ThreadPoolExecutor(40) as pool:
        faults = list(pool.map(lab.run_request, requests))
    assert [(work[number][0], fault) for number, fault in enumerate(faults) if fault] == []
    assert lab.run("sr_scan") == 0
    lab.database_agrees()
    names = [entry[7] for entry in lab.state()]
    assert names.count("made") == 8 and not any(name.startswith("victim") for name in names)
    assert len(names) == 2 + 1 + 4 + 8 + 5 + 5


def test_full_disk(lab):
    """Whatever does not fit is fault 44 and leaves nothing; what fits, fits; reverting takes the space back."""
    world = lab.world
    sr = world.sr("full", "odd", size=32 * MIB)
    disk = world.vdi(sr, 64 * MIB)
    snapshot = world.x.VDI.snapshot(disk, {})
    uri = f"nbd+unix:///{world.uuid(disk)}?socket={world.simsrd.root}/nbd.sock"
    said = subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 1 0 60M", uri], capture_output=True, text=True)
    assert "No space left" in said.stdout + said.stderr
    here = {"sr_uuid": world.x.SR.get_uuid(sr), "sr_ref": sr}
    uuid, count = world.uuid(disk), len(world.x.SR.get_VDIs(sr))
    for command, args, members in (
        ("vdi_create", CREATE_ARGS, {"vdi_type": "user", "vdi_sm_config": {}}),
        ("vdi_snapshot", [], {"vdi": uuid, "driver_params": {}}),
        ("vdi_clone", [], {"vdi": uuid, "driver_params": {}}),
        ("vdi_resize", [str(65 * MIB)], {"vdi": uuid}),
        ("sr_scan", [], {}),
    ):
        fault = lab.run(command, args, **members, **here)
        assert fault in (0, 44), command
        count += fault == 0 and command in ("vdi_create", "vdi_snapshot", "vdi_clone")
        assert len(world.x.SR.get_VDIs(sr)) == count == len(lab.http.get(f"/v1/vdis?sr={here['sr_uuid']}").json()), command
    assert lab.run("vdi_revert", [disk], vdi=world.uuid(snapshot), **here) == 0
    world.holds(disk, 0, "60M")

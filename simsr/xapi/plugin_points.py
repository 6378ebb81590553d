"""The checklist for a SMAPIv1 plug-in, point by point: those of every plug-in, and those of one that says it can revert.

A point is a function that raises `Wrong`, or what the plug-in's answer meant to xapi, when the plug-in does not keep it; it returns a sentence when there
was nothing to check. Points build on each other's SR, disk and snapshot in `Subjects`, in this order; one that finds its subject
missing was not checked. What a plug-in does not advertise it must answer with 38, and touch nothing.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from simsr.xapi import smapiv1
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.plugin_source import source_problem
from simsr.xapi.plugin_trial import Members, Trial, Wrong, fault_number
from simsr.xapi.schema import NULL
from simsr.xapi.xml_tree import Element, parse

__all__ = ["POINTS", "Point", "Subjects", "NotChecked"]

MIB = 2**20
SIZE = 8 * MIB
NOBODY = "00000000-1111-4222-8333-444444444444"
BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;">]><methodCall><methodName>&c;</methodName></methodCall>'
OLD, NEW = "0x11", "0x22"
KEPT_IN_A_REVERT = (
    "uuid", "location", "name_label", "name_description", "type", "sharable", "read_only", "managed", "is_a_snapshot", "snapshot_of",
    "SR", "on_boot", "sm_config", "tags",
)  # fmt: skip


class NotChecked(Exception):
    """The point needs something that is not there; the argument says what."""


class Subjects:
    """What the points have made so far."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._made: dict[str, str] = {}

    def keep(self, name: str, ref: str) -> None:
        self._made[name] = ref

    def __getattr__(self, name: str) -> str:
        if name.startswith("_") or name not in self._made:
            raise NotChecked(f"there is no {name}, see above")
        return self._made[name]


Check = Callable[[Subjects], Awaitable[str | None]]


@dataclass(frozen=True)
class Point:
    """``number`` as in the checklist; those with an R are about revert."""

    number: str
    text: str
    needs: tuple[str, ...]
    check: Check


POINTS: list[Point] = []


def point(number: str, text: str, *needs: str) -> Callable[[Check], Check]:
    """Enter a check; it is left out unless the plug-in has all the capabilities it ``needs``."""

    def enter(check: Check) -> Check:
        POINTS.append(Point(number, text, needs, check))
        return check

    return enter


def _require(true: object, reason: str) -> None:
    if not true:
        raise Wrong(reason)


def _without(*names: str) -> Callable[[Members], Members]:
    return lambda members: {name: value for name, value in members.items() if name not in names}


def _with(**more: Any) -> Callable[[Members], Members]:
    return lambda members: members | more


def _info(value: Element, what: str) -> str:
    uuid, location = smapiv1.vdi_info(value)
    _require(uuid == location, f"{what} answers uuid {uuid} but location {location}")
    return uuid


def _create_args(size: int, name: str = "checked", read_only: str = "false") -> list[str]:
    return [str(size), name, "", "", "false", "19700101T00:00:00Z", "", read_only]


async def _create(trial: Trial, size: int = SIZE, **members: Any) -> str:
    value = await trial.send("vdi_create", _create_args(size), **{"vdi_type": "user", "vdi_sm_config": {}} | members)
    return trial.vdi_called(_info(value, "vdi_create"), "vdi_create")


# The process.


@point("1", "is found: the name ends in SR, the file can be executed, sr_get_driver_info answers without session and SR")
async def found(s: Subjects) -> None:
    trial = s.trial
    name = os.path.basename(trial.plugin.path)
    _require(name.endswith("SR") and len(name) > 2, f"the file is called {name}; xapi looks for names that end in SR")
    _require(os.access(trial.plugin.path, os.X_OK), "the file cannot be executed")
    host = trial.call.host
    info = smapiv1.driver_info(
        await trial.plugin.run("sr_get_driver_info", {"host_ref": host, "command": "sr_get_driver_info", "args": [], "device_config": {}})
    )
    trial.capabilities = info.features
    trial.model.drivers.add(name.removesuffix("SR").lower(), trial.plugin, info)
    version = re.match(r"[0-9]+", info.required_api_version)
    _require(version and int(version[0]) < 2, f"required_api_version is {info.required_api_version!r}; SMAPIv1 is below 2.0")
    s.keep("driver", name.removesuffix("SR").lower())


@point("1", "what is no request gets a fault, exit status 0 and nothing else on standard output")
async def garbage(s: Subjects) -> None:
    plugin = s.trial.plugin
    for what, arguments in {
        "no argument": (), "an empty argument": ("",), "text": ("sr_scan",), "half a document": ("<methodCall><methodName>sr_sc",),
        "declared entities": (BOMB,), "deep nesting": ("<a>" * 20000,), "no struct": (_no_struct(),),
    }.items():  # fmt: skip
        done = await plugin.watched(f"a request that is {what}", *arguments)
        try:
            plugin.read(what, done)
        except Unimplemented:
            raise Wrong(f"a request that is {what} gets fault 38; that means 'not supported', use 143") from None
        except XenError as error:
            _require(fault_number(error) is not None, f"a request that is {what}: {error}")
        else:
            raise Wrong(f"a request that is {what} gets an answer and no fault")


def _no_struct() -> str:
    return "<methodCall><methodName>sr_scan</methodName><params><param><value>x</value></param></params></methodCall>"


@point("1", "the request is the last argument, whatever stands before it")
async def last_argument(s: Subjects) -> None:
    command = "sr_get_driver_info"
    members: Members = {"host_ref": s.trial.call.host, "command": command, "args": [], "device_config": {}}
    done = await s.trial.plugin.watched("two arguments", "observed", smapiv1.write_request(command, members))
    smapiv1.driver_info(s.trial.plugin.read("two arguments", done))


@point("1", "runs as an argument of Python as well, as xapi's observer runs it")
async def observed(s: Subjects) -> str | None:
    trial, command = s.trial, "sr_get_driver_info"
    if not source_problem(trial.plugin.path)[1]:
        return "it is no Python script"
    start = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    members: Members = {"host_ref": trial.call.host, "command": command, "args": [], "device_config": {}}
    python = replace(trial.plugin, path="/usr/bin/python3")
    done = await python.watched("a run below Python", "-c", start, trial.plugin.path, smapiv1.write_request(command, members))
    smapiv1.driver_info(python.read("a run below Python", done))
    return None


@point("9", "runs on Python 3.6 and later with nothing but the standard library and XenAPI")
async def python(s: Subjects) -> str | None:
    problem, is_python = source_problem(s.trial.plugin.path)
    _require(not problem, problem)
    return None if is_python else "it is no Python script; xapi's observer can run Python only"


# SRs.


@point("3", "sr_create and sr_attach answer nil")
async def make_sr(s: Subjects) -> None:
    trial = s.trial
    trial.sr = await trial.xenapi("SR.create", trial.call.host, trial.device_config, "0", "checked", "", s.driver, "", False, {})
    s.keep("sr", trial.sr)
    smapiv1.unit(await trial.send("sr_attach"))


@point("2", "a command that it does not know is fault 38")
async def unknown(s: Subjects) -> None:
    _require(s.sr and (number := await s.trial.fault("vdi_frobnicate")) == 38, f"it is fault {number}")


@point("3", "sr_update answers nil and tells the three sizes of the SR", "SR_UPDATE")
async def sr_update(s: Subjects) -> None:
    s.trial.calls.clear()
    smapiv1.unit(await s.trial.send("sr_update", change=_with(sr_ref=s.sr)))
    told = {name for name, _ in s.trial.calls}
    for field in ("virtual_allocation", "physical_size", "physical_utilisation"):
        _require(f"SR.set_{field}" in told, f"SR.set_{field} was not called")


@point("3", "sr_probe answers a string that holds SRlist, and the SR in it", "SR_PROBE")
async def probe(s: Subjects) -> None:
    document = parse((await s.trial.xenapi("SR.probe", s.trial.call.host, s.trial.device_config, s.driver, {})).encode())
    uuid = s.trial.db.get("SR", s.sr)["uuid"]
    _require(document.tag == "SRlist", f"the document is a {document.tag}")
    listed = [part.text.strip() for sr in document.children for part in sr.children if part.tag == "UUID"]
    _require(uuid in listed, f"SR {uuid} is not in the list")


# VDIs.


@point("5", "vdi_create introduces the disk before it answers, at least as large as asked for", "VDI_CREATE")
async def create(s: Subjects) -> None:
    for size in (SIZE, SIZE + 1):
        disk = await _create(s.trial, size)
        row = s.trial.row(disk)
        _require(int(row["virtual_size"]) >= size, f"{size} bytes were asked for and virtual_size is {row['virtual_size']}")
        _require(row["SR"] == s.sr and row["name_label"] == "checked", "the row is of another SR, or without its name")
        s.keep("disk" if size == SIZE else "other", disk)


@point("3", "commands behind capabilities that it does not advertise are fault 38")
async def not_advertised(s: Subjects) -> str | None:
    trial, checked = s.trial, 0
    if not trial.can("VDI_CREATE"):
        number = await trial.fault("vdi_create", _create_args(SIZE), change=_with(sr_ref=s.sr), vdi_type="user", vdi_sm_config={})
        _require(number == 38, f"vdi_create is fault {number}")
        checked += 1
    for capability, command, args in (
        ("VDI_SNAPSHOT", "vdi_snapshot", []), ("VDI_CLONE", "vdi_clone", []), ("VDI_RESIZE", "vdi_resize", [str(2 * SIZE)]),
        ("VDI_CONFIG_CBT", "vdi_enable_cbt", []),
    ):  # fmt: skip
        if trial.can("VDI_CREATE") and not trial.can(capability):
            number = await trial.fault(command, args, s.disk)
            _require(number == 38, f"{command} is fault {number}")
            checked += 1
    return None if checked else "it advertises them all"


@point("4", "location is uuid, in the answers and in the database")
async def location(s: Subjects) -> None:
    row = s.trial.row(s.disk)
    _require(row["location"] == row["uuid"], f"the row has uuid {row['uuid']} and location {row['location']}")


@point("7", "members that are optional may be missing, those that are unknown may be there", "VDI_CREATE")
async def optional(s: Subjects) -> None:
    trial = s.trial
    uuid = _info(
        await trial.send("vdi_create", _create_args(SIZE), change=_without("vdi_sm_config", "subtask_of", "vdi_type")), "vdi_create"
    )
    smapiv1.unit(await trial.send("vdi_delete", [], trial.vdi_called(uuid, "vdi_create"), change=_without("vdi_on_boot", "vdi_allow_caching")))
    smapiv1.unit(await trial.send("sr_update", change=_with(invented="x", invented_struct={"a": "b"}, local_cache_sr=NOBODY)))


@point("3", "vdi_attach has params_nbd; it, activate, deactivate, detach and the epochs can be repeated")
async def attach(s: Subjects) -> None:
    trial, disk = s.trial, s.disk
    smapiv1.unit(await trial.send("vdi_epoch_begin", [], disk))
    writable = "true" if trial.can("VDI_SNAPSHOT") else "false"
    for _ in range(2):
        info = smapiv1.attach_info(await trial.send("vdi_attach", [writable], disk))
        form = re.fullmatch(r"nbd:unix:[^:]+:exportname=[^:]+|", info.params_nbd)
        _require(form, f"params_nbd is {info.params_nbd!r}, which xapi cannot read")
        if trial.can("VDI_ACTIVATE"):
            smapiv1.unit(await trial.send("vdi_activate", [writable], disk))
    for _ in range(2):
        if trial.can("VDI_DEACTIVATE"):
            smapiv1.unit(await trial.send("vdi_deactivate", [], disk))
        smapiv1.unit(await trial.send("vdi_detach", [], disk))
    smapiv1.unit(await trial.send("vdi_epoch_end", [], disk))
    s.keep("attachable", disk)


@point("5", "vdi_snapshot introduces the snapshot, as large as its disk", "VDI_SNAPSHOT", "VDI_CREATE")
async def snapshot(s: Subjects) -> None:
    trial, disk = s.trial, s.disk
    await trial.use(s.attachable, f"write -P {OLD} 0 64k", "flush")
    made = await _snapshot(trial, disk)
    size = trial.row(disk)["virtual_size"]
    _require(trial.row(made)["virtual_size"] == size, f"it has {trial.row(made)['virtual_size']} bytes, its disk {size}")
    s.keep("snapshot", made)


@point("5", "vdi_clone makes a disk of its own with the same data", "VDI_CLONE", "VDI_SNAPSHOT", "VDI_CREATE")
async def clone(s: Subjects) -> None:
    trial = s.trial
    made = trial.vdi_called(_info(await trial.send("vdi_clone", [], s.snapshot, driver_params={}), "vdi_clone"), "vdi_clone")
    await trial.use(made, f"read -P {OLD} 0 64k", f"write -P {NEW} 0 64k")
    await trial.use(s.disk, f"read -P {OLD} 0 64k")
    smapiv1.unit(await trial.send("vdi_delete", [], made))


# What it may advertise besides.


@point("3", "with on_boot=reset vdi_epoch_begin takes back what the last VM wrote", "VDI_RESET_ON_BOOT", "VDI_CREATE")
async def reset_on_boot(s: Subjects) -> None:
    trial = s.trial
    disk = await _create(trial)
    await trial.use(disk, f"write -P {OLD} 0 64k", "flush")
    trial.db.set("VDI", disk, on_boot="reset")
    for _ in range(2):
        smapiv1.unit(await trial.send("vdi_epoch_begin", [], disk))
        await trial.use(disk, f"read -P {OLD} 0 64k", f"write -P {NEW} 0 64k")
        smapiv1.unit(await trial.send("vdi_epoch_end", [], disk))
    smapiv1.unit(await trial.send("vdi_delete", [], disk))


async def _changed_blocks(s: Subjects, old: str, new: str) -> bytes:
    """The bitmap between two VDIs, ``new`` by reference or uuid."""
    text = smapiv1.text(await s.trial.send("vdi_list_changed_blocks", [new], old))
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise Wrong(f"the answer is not base64: {text[:60]!r}") from None


@point("6", "changed blocks: 64 KiB to a bit, the first one the highest; the other VDI by reference or uuid", "VDI_CONFIG_CBT", "VDI_SNAPSHOT")
async def changed_blocks(s: Subjects) -> None:
    trial = s.trial
    disk = await _create(trial)
    smapiv1.unit(await trial.send("vdi_enable_cbt", [], disk))
    trial.db.set("VDI", disk, cbt_enabled=True)
    old = await _snapshot(trial, disk)
    await trial.use(disk, f"write -P {NEW} 64k 64k", f"write -P {NEW} 1M 4k")
    expected = bytearray(SIZE // 65536 // 8)
    expected[0], expected[2] = 0x40, 0x80
    for name in (disk, trial.row(disk)["uuid"]):
        found = await _changed_blocks(s, old, name)
        _require(found == expected, f"blocks 1 and 16 of {SIZE // 65536} changed, and the bitmap is {found.hex()}")
    s.keep("tracked", disk)
    s.keep("tracked_snapshot", old)


async def _snapshot(trial: Trial, disk: str) -> str:
    """Take a snapshot, and do to its row what xapi does."""
    uuid = _info(await trial.send("vdi_snapshot", [], disk, driver_params={"epochhint": NOBODY}), "vdi_snapshot")
    made = trial.vdi_called(uuid, "vdi_snapshot")
    trial.db.set("VDI", made, is_a_snapshot=True, snapshot_of=disk)
    smapiv1.unit(await trial.send("vdi_update", [], made))
    return made


@point("R8", "after a revert changed blocks are told from the newer snapshot, or CBT is off", "VDI_REVERT", "VDI_CONFIG_CBT")
async def revert_and_cbt(s: Subjects) -> str | None:
    trial, disk = s.trial, s.tracked
    newer = await _snapshot(trial, disk)
    smapiv1.unit(await trial.send("vdi_revert", [disk], s.tracked_snapshot))
    if not trial.row(disk)["cbt_enabled"]:
        return "it ends CBT"
    found = await _changed_blocks(s, newer, disk)
    _require(len(found) > 2 and found[0] & 0x40 and found[2] & 0x80, f"blocks 1 and 16 went back, and the bitmap is {found.hex()}")
    return None


# Revert.


async def _unharmed(s: Subjects, before: dict[str, Any]) -> None:
    """The disk has its new data and its row."""
    now = s.trial.row(s.disk)
    changed = [name for name in (*KEPT_IN_A_REVERT, "virtual_size") if now[name] != before[name]]
    _require(not changed, f"the disk's {', '.join(changed)} changed all the same")
    try:
        await s.trial.use(s.disk, f"read -P {NEW} 0 64k")
    except Wrong:
        raise Wrong("the disk's data changed all the same") from None


async def _write_new(s: Subjects) -> dict[str, Any]:
    await s.trial.use(s.disk, f"write -P {NEW} 0 64k", "flush")
    return s.trial.row(s.disk)


@point("R1", "without VDI_REVERT vdi_revert is fault 38, and nothing is touched")
async def no_revert(s: Subjects) -> str | None:
    if s.trial.can("VDI_REVERT"):
        return "it advertises VDI_REVERT"
    before = await _write_new(s) if s.trial.can("VDI_SNAPSHOT") else s.trial.row(s.disk)
    number = await s.trial.fault("vdi_revert", [s.disk], s.snapshot if s.trial.can("VDI_SNAPSHOT") else s.disk)
    _require(number == 38, f"it is fault {number}")
    if s.trial.can("VDI_SNAPSHOT"):
        await _unharmed(s, before)
    return None


@point("R1", "VDI_REVERT goes with VDI_CLONE, without which xapi never asks for it", "VDI_REVERT")
async def revert_and_clone(s: Subjects) -> None:
    _require(s.trial.can("VDI_CLONE", "VDI_SNAPSHOT"), "VDI_CLONE or VDI_SNAPSHOT is missing")


@point("R2", "vdi_revert brings data and size back, and keeps everything else of the disk", "VDI_REVERT")
async def revert(s: Subjects) -> None:
    trial, disk = s.trial, s.disk
    size = trial.row(disk)["virtual_size"]
    if trial.can("VDI_RESIZE"):
        _info(await trial.send("vdi_resize", [str(2 * SIZE)], disk), "vdi_resize")
        _require(int(trial.row(disk)["virtual_size"]) >= 2 * SIZE, "vdi_resize did not tell the new virtual_size")
    trial.db.set("VDI", disk, other_config={"content_id": NOBODY, "mine": "1"})
    before, of_snapshot = await _write_new(s), trial.row(s.snapshot)
    smapiv1.unit(await trial.send("vdi_revert", [disk], s.snapshot))
    now = trial.row(disk)
    changed = [name for name in KEPT_IN_A_REVERT if now[name] != before[name]]
    _require(not changed, f"{', '.join(changed)} of the disk changed")
    _require(now["virtual_size"] == size, f"virtual_size is {now['virtual_size']}; the snapshot has {size}")
    await trial.use(disk, f"read -P {OLD} 0 64k", "read -P 0 64k 64k")
    changed = [name for name, value in trial.row(s.snapshot).items() if value != of_snapshot[name] and name != "physical_utilisation"]
    _require(not changed, f"{', '.join(changed)} of the snapshot changed")
    s.keep("reverted", disk)


@point("R3", "vdi_revert removes content_id, which is no longer true, and nothing else from other_config", "VDI_REVERT")
async def content_id(s: Subjects) -> None:
    other = s.trial.row(s.reverted)["other_config"]
    _require("content_id" not in other, "content_id is still there")
    _require(other.get("mine") == "1", "other keys of other_config are gone")


@point("6", "vdi_revert takes the disk as a uuid as well as by reference, and can be repeated", "VDI_REVERT")
async def revert_by_uuid(s: Subjects) -> None:
    for name in (s.trial.row(s.reverted)["uuid"], s.disk):
        await _write_new(s)
        smapiv1.unit(await s.trial.send("vdi_revert", [name], s.snapshot))
        await s.trial.use(s.disk, f"read -P {OLD} 0 64k")
    await s.trial.use(s.snapshot, f"read -P {OLD} 0 64k", writable=False)


@point("R4", "what cannot be reverted is a fault other than 38, and nothing is touched", "VDI_REVERT")
async def revert_refusals(s: Subjects) -> None:
    trial, disk, snapshot = s.trial, s.disk, s.snapshot
    before = await _write_new(s)
    for what, args, vdi, change in (
        ("a disk that is not there", [NOBODY], snapshot, None), ("a reference that is not there", ["OpaqueRef:" + NOBODY], snapshot, None),
        ("no disk", [NULL], snapshot, None), ("the snapshot itself", [snapshot], snapshot, None), ("a disk of its own", [s.other], disk, None),
        ("no argument", [], snapshot, None),
        ("a snapshot that is not there", [disk], snapshot, _with(vdi_uuid=NOBODY, vdi_location=NOBODY)),
        ("a session that has ended", [disk], snapshot, _with(session_ref="OpaqueRef:" + NOBODY)),
    ):  # fmt: skip
        number = await trial.fault("vdi_revert", args, vdi, change)
        _require(number != 38, f"{what}: fault 38, for which xapi destroys the disk and clones the snapshot")
    await _unharmed(s, before)


@point("R5", "a disk that is attached for writing is not reverted: fault 24", "VDI_REVERT")
async def revert_attached(s: Subjects) -> None:
    trial = s.trial
    before = await _write_new(s)
    smapiv1.attach_info(await trial.send("vdi_attach", ["true"], s.disk))
    try:
        number = await trial.fault("vdi_revert", [s.disk], s.snapshot)
    finally:
        smapiv1.unit(await trial.send("vdi_detach", [], s.disk))
    _require(number == 24, f"it is fault {number}")
    await _unharmed(s, before)


@point("R6", "while its storage cannot be reached, vdi_revert is fault 47 at once", "VDI_REVERT")
async def revert_unreachable(s: Subjects) -> None:
    config = s.trial.device_config | {"socket": "/nonexistent/control.sock", "SRmaster": "true"}
    number = await s.trial.fault("vdi_revert", [s.disk], s.snapshot, _with(device_config=config))
    _require(number == 47, f"it is fault {number}")


@point("R7", "VM.revert keeps the disk if VDI_REVERT is there, and clones it if not", "VDI_SNAPSHOT", "VDI_CLONE", "VDI_CREATE")
async def vm_revert(s: Subjects) -> None:
    trial = s.trial
    template = next(ref for ref, row in trial.db.all("VM").items() if row["name_label"] == "Other install media")
    vm = await trial.xenapi("VM.clone", template, "checked")
    await trial.xenapi("VM.set_is_a_template", vm, False)
    await trial.xenapi("VBD.create", {"VM": vm, "VDI": s.other, "userdevice": "0", "bootable": False, "mode": "RW", "type": "Disk",
                                      "empty": False, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {}})  # fmt: skip
    await trial.use(s.other, f"write -P {OLD} 0 64k")
    taken = await trial.xenapi("VM.snapshot", vm, "before")
    await trial.use(s.other, f"write -P {NEW} 0 64k")
    await trial.xenapi("VM.revert", taken)
    [vbd] = [trial.db.get("VBD", ref) for ref in trial.db.pointing("VM", "VBDs", vm)]
    await trial.use(vbd["VDI"], f"read -P {OLD} 0 64k")
    native = trial.can("VDI_REVERT")
    _require((vbd["VDI"] == s.other) == native, f"the VM has {'another' if native else 'the same'} disk")


# The database, in the end.


@point("5", "sr_scan introduces what is not in the database, forgets what is gone, and does nothing a second time")
async def scan(s: Subjects) -> str | None:
    trial = s.trial
    gone = trial.db.create("VDI", SR=s.sr, location=NOBODY, virtual_size=SIZE)
    lost = trial.row(s.disk)["uuid"] if trial.can("VDI_CREATE") else ""
    if lost:
        trial.db.delete("VDI", s.disk)
    smapiv1.unit(await trial.send("sr_scan", change=_with(sr_ref=s.sr)))
    _require(not trial.db.has("VDI", gone), "a row without a VDI is still there")
    if lost:
        s.keep("disk", trial.vdi_called(lost, "sr_scan"))
    trial.calls.clear()
    smapiv1.unit(await trial.send("sr_scan"))
    writes = sorted({name for name, _ in trial.calls if name.startswith("VDI.") and not re.match(r"VDI\.get", name)})
    _require(not writes, f"a second scan calls {', '.join(writes)}")
    s.keep("scanned", s.sr)
    return None


@point("8", "host keys in sm_config are left alone; set_sm_config is never called")
async def sm_config(s: Subjects) -> None:
    trial, disk = s.trial, s.disk
    keys = {f"host_OpaqueRef:{NOBODY}": "RW", "paused": "true", "activating": "True"}
    config = trial.row(disk)["sm_config"]
    trial.db.set("VDI", disk, sm_config=config | keys)
    trial.calls.clear()
    smapiv1.unit(await trial.send("sr_scan", change=_with(sr_ref=s.scanned)))
    smapiv1.unit(await trial.send("vdi_update", [], disk))
    now = trial.row(disk)["sm_config"]
    trial.db.set("VDI", disk, sm_config=config)
    lost = [key for key in keys if now.get(key) != keys[key]]
    _require(not lost, f"{', '.join(lost)} changed or went")
    _require("VDI.set_sm_config" not in {name for name, _ in trial.calls}, "VDI.set_sm_config was called")


@point("5", "an SR that holds disks is not deleted: fault 39", "VDI_CREATE")
async def not_empty(s: Subjects) -> None:
    _require((s.disk and (number := await s.trial.fault("sr_delete")) == 39), f"it is fault {number}")


@point("5", "vdi_delete forgets the row; the disk that is gone is fault 144", "VDI_DELETE", "VDI_CREATE")
async def delete(s: Subjects) -> None:
    trial, disk = s.trial, s.disk
    row = trial.row(disk)
    smapiv1.unit(await trial.send("vdi_delete", [], disk))
    _require(not trial.db.has("VDI", disk), "its row is still there")
    disk = trial.db.create("VDI", SR=s.sr, uuid=row["uuid"], location=row["location"])
    number = await trial.fault("vdi_delete", [], disk)
    trial.db.delete("VDI", disk)
    _require(number == 144, f"it is fault {number}")


@point("3", "sr_detach answers nil, and can be repeated")
async def detach(s: Subjects) -> None:
    for _ in range(2):
        smapiv1.unit(await s.trial.send("sr_detach", change=_with(sr_ref=s.sr)))


@point("1", "in all these commands the exit status was 0, and standard output one document")
async def processes(s: Subjects) -> None:
    breaches = s.trial.plugin.breaches
    more = f" (and {len(breaches) - 1} more)" if len(breaches) > 1 else ""
    _require(not breaches, f"{breaches[0] if breaches else ''}{more}")

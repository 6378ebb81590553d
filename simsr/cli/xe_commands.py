"""The commands of ``simsr xe``, in one table: name to function."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from simsr.cli.output import printable
from simsr.cli.xe import Arguments, Command, find
from simsr.cli.xe_client import XenApi
from simsr.cli.xe_listing import CLASSES, list_objects, param_add, param_get, param_list, param_remove, param_set
from simsr.errors import BadRequest
from simsr.units import parse_size

__all__ = ["COMMANDS", "find_command"]

NULL = "OpaqueRef:NULL"

COMMANDS: dict[str, Command] = {}


def command(name: str) -> Callable[[Command], Command]:
    """Enter the decorated function as ``name``."""

    def enter(function: Command) -> Command:
        COMMANDS[name] = function
        return function

    return enter


def find_command(name: str) -> Command:
    """Return the function of a command; complain with a suggestion if there is none."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise BadRequest(
            what=f"xe command {name or repr(name)}", reason=f"did you mean {near[0]}?" if near else "'simsr xe help' lists what there is"
        )
    return COMMANDS[name]


for _noun in CLASSES:
    COMMANDS[f"{_noun}-list"] = partial(list_objects, _noun)
    COMMANDS[f"{_noun}-param-get"] = partial(param_get, _noun)
    COMMANDS[f"{_noun}-param-list"] = partial(param_list, _noun)
    COMMANDS[f"{_noun}-param-set"] = partial(param_set, _noun)
    COMMANDS[f"{_noun}-param-add"] = partial(param_add, _noun)
    COMMANDS[f"{_noun}-param-remove"] = partial(param_remove, _noun)


# Commands that are one call on one object.


def _simple(api: XenApi, arguments: Arguments, cls: str, method: str, keys: tuple[str, ...], *more: Any) -> list[str]:
    ref = find(api, cls, arguments, *keys)
    arguments.flag("force")
    arguments.finish()
    api(method, ref, *more)
    return []


_SIMPLE: dict[str, tuple[Any, ...]] = {
    "vm-destroy": ("VM", "VM.destroy", ("vm",)),
    "vm-suspend": ("VM", "VM.suspend", ("vm",)),
    "vm-pause": ("VM", "VM.pause", ("vm",)),
    "vm-unpause": ("VM", "VM.unpause", ("vm",)),
    "snapshot-revert": ("VM", "VM.revert", ("snapshot-uuid",)),
    "snapshot-destroy": ("VM", "VM.destroy", ("snapshot-uuid",)),
    "vdi-destroy": ("VDI", "VDI.destroy", ()),
    "vdi-forget": ("VDI", "VDI.forget", ()),
    "vdi-update": ("VDI", "VDI.update", ()),
    "vdi-revert": ("VDI", "VDI.revert", ("snapshot-uuid",)),
    "vdi-enable-cbt": ("VDI", "VDI.enable_cbt", ()),
    "vdi-disable-cbt": ("VDI", "VDI.disable_cbt", ()),
    "vdi-data-destroy": ("VDI", "VDI.data_destroy", ()),
    "vbd-plug": ("VBD", "VBD.plug", ()),
    "vbd-unplug": ("VBD", "VBD.unplug", ()),
    "vbd-destroy": ("VBD", "VBD.destroy", ()),
    "vbd-eject": ("VBD", "VBD.eject", ()),
    "pbd-plug": ("PBD", "PBD.plug", ()),
    "pbd-unplug": ("PBD", "PBD.unplug", ()),
    "pbd-destroy": ("PBD", "PBD.destroy", ()),
    "sr-scan": ("SR", "SR.scan", ("sr",)),
    "sr-update": ("SR", "SR.update", ("sr",)),
    "sr-forget": ("SR", "SR.forget", ("sr",)),
    "sr-destroy": ("SR", "SR.destroy", ("sr",)),
    "task-cancel": ("task", "task.cancel", ()),
}
for _name, (_cls, _method, _keys) in _SIMPLE.items():
    COMMANDS[_name] = partial(_simple, cls=_cls, method=_method, keys=_keys)


# Commands with arguments of their own.


def _uuid(api: XenApi, cls: str, ref: str) -> list[str]:
    return [api(f"{cls}.get_uuid", ref)]


@command("vm-start")
def vm_start(api: XenApi, arguments: Arguments) -> list[str]:
    vm, paused = find(api, "VM", arguments, "vm"), arguments.truth("paused")
    arguments.finish()
    api("VM.start", vm, paused, False)
    return []


@command("vm-resume")
def vm_resume(api: XenApi, arguments: Arguments) -> list[str]:
    vm, on = find(api, "VM", arguments, "vm"), arguments.get("on")
    arguments.finish()
    if on is None:
        api("VM.resume", vm, False, False)
    else:
        api("VM.resume_on", vm, api("host.get_by_uuid", on), False, False)
    return []


@command("vm-shutdown")
def vm_shutdown(api: XenApi, arguments: Arguments) -> list[str]:
    vm, force = find(api, "VM", arguments, "vm"), arguments.truth("force") or arguments.flag("force")
    arguments.finish()
    api("VM.hard_shutdown" if force else "VM.clean_shutdown", vm)
    return []


@command("vm-install")
def vm_install(api: XenApi, arguments: Arguments) -> list[str]:
    template, name = find(api, "VM", arguments, "template", "template-uuid"), arguments.need("new-name-label")
    arguments.finish()
    vm = api("VM.clone", template, name)
    api("VM.provision", vm)
    return _uuid(api, "VM", vm)


def _vm_copying(method: str, api: XenApi, arguments: Arguments) -> list[str]:
    vm, name = find(api, "VM", arguments, "vm", "snapshot-uuid"), arguments.need("new-name-label")
    more: list[Any] = []
    if method == "VM.snapshot" and (ignored := arguments.get("ignore-vdi-uuids")):
        more = [[api("VDI.get_by_uuid", uuid.strip()) for uuid in ignored.split(",")]]
    if method == "VM.copy":
        more = [find(api, "SR", arguments, "sr-uuid") if "sr-uuid" in arguments.values else NULL]
    arguments.finish()
    return _uuid(api, "VM", api(method, vm, name, *more))


for _name in ("clone", "copy", "snapshot", "checkpoint"):
    COMMANDS[f"vm-{_name}"] = partial(_vm_copying, f"VM.{_name}")
COMMANDS["snapshot-clone"] = COMMANDS["vm-clone"]


@command("snapshot-uninstall")
def snapshot_uninstall(api: XenApi, arguments: Arguments) -> list[str]:
    """Destroy a snapshot and its disks."""
    vm = find(api, "VM", arguments, "snapshot-uuid")
    arguments.flag("force")
    arguments.truth("force")
    arguments.finish()
    vbds = [api("VBD.get_record", vbd) for vbd in api("VM.get_VBDs", vm)]
    disks = {vbd["VDI"] for vbd in vbds if vbd["type"] == "Disk"} | {api("VM.get_suspend_VDI", vm)}
    api("VM.destroy", vm)
    for disk in sorted(disks - {NULL}):
        api("VDI.destroy", disk)
    return []


@command("vdi-create")
def vdi_create(api: XenApi, arguments: Arguments) -> list[str]:
    sr = find(api, "SR", arguments, "sr-uuid")
    record = {
        "SR": sr,
        "name_label": arguments.need("name-label"),
        "name_description": arguments.get("name-description") or "",
        "virtual_size": str(parse_size(arguments.need("virtual-size"))),
        "type": arguments.get("type") or "user",
        "sharable": arguments.truth("sharable"),
        "read_only": arguments.truth("read-only"),
        "other_config": arguments.mapping("other-config"),
        "sm_config": arguments.mapping("sm-config"),
        "tags": [],
        "xenstore_data": {},
    }
    arguments.finish()
    return _uuid(api, "VDI", api("VDI.create", record))


def _vdi_copying(method: str, api: XenApi, arguments: Arguments) -> list[str]:
    vdi = find(api, "VDI", arguments)
    driver_params, name = arguments.mapping("driver-params"), arguments.get("new-name-label")
    arguments.finish()
    new = api(method, vdi, driver_params)
    if name is not None:
        api("VDI.set_name_label", new, name)
    return _uuid(api, "VDI", new)


COMMANDS["vdi-snapshot"] = partial(_vdi_copying, "VDI.snapshot")
COMMANDS["vdi-clone"] = partial(_vdi_copying, "VDI.clone")


@command("vdi-copy")
def vdi_copy(api: XenApi, arguments: Arguments) -> list[str]:
    vdi = find(api, "VDI", arguments)
    sr = api("SR.get_by_uuid", arguments.need("sr-uuid"))
    arguments.finish()
    return _uuid(api, "VDI", api("VDI.copy", vdi, sr, NULL, NULL))


@command("vdi-resize")
def vdi_resize(api: XenApi, arguments: Arguments) -> list[str]:
    vdi, size, online = find(api, "VDI", arguments), parse_size(arguments.need("disk-size")), arguments.truth("online")
    arguments.finish()
    api("VDI.resize_online" if online else "VDI.resize", vdi, str(size))
    return []


@command("vbd-create")
def vbd_create(api: XenApi, arguments: Arguments) -> list[str]:
    vm, vdi = api("VM.get_by_uuid", arguments.need("vm-uuid")), arguments.get("vdi-uuid")
    record = {
        "VM": vm,
        "VDI": api("VDI.get_by_uuid", vdi) if vdi else NULL,
        "userdevice": arguments.need("device"),
        "bootable": arguments.truth("bootable"),
        "mode": (arguments.get("mode") or "RW").upper(),
        "type": arguments.get("type") or "Disk",
        "unpluggable": arguments.truth("unpluggable", default=True),
        "empty": vdi is None,
        "other_config": arguments.mapping("other-config"),
        "qos_algorithm_type": "",
        "qos_algorithm_params": {},
    }
    arguments.finish()
    return _uuid(api, "VBD", api("VBD.create", record))


@command("vbd-insert")
def vbd_insert(api: XenApi, arguments: Arguments) -> list[str]:
    vbd, vdi = find(api, "VBD", arguments), api("VDI.get_by_uuid", arguments.need("vdi-uuid"))
    arguments.finish()
    api("VBD.insert", vbd, vdi)
    return []


def _host(api: XenApi, arguments: Arguments) -> str:
    uuid = arguments.get("host-uuid")
    return str(api("host.get_by_uuid", uuid) if uuid else api("host.get_all")[0])


def _described(arguments: Arguments) -> tuple[Any, ...]:
    """Return what both ways to make an SR are told about it: name, description, type, content type, shared."""
    return (
        arguments.need("name-label"),
        arguments.get("name-description") or "",
        arguments.need("type"),
        arguments.get("content-type") or "",
        arguments.truth("shared"),
    )


@command("sr-create")
def sr_create(api: XenApi, arguments: Arguments) -> list[str]:
    host, device_config, sm_config = _host(api, arguments), arguments.mapping("device-config"), arguments.mapping("sm-config")
    size = arguments.get("physical-size") or "0"
    given = ("0" if size == "0" else str(parse_size(size)), *_described(arguments))
    arguments.finish()
    return _uuid(api, "SR", api("SR.create", host, device_config, *given, sm_config))


@command("sr-introduce")
def sr_introduce(api: XenApi, arguments: Arguments) -> list[str]:
    given = (arguments.need("uuid"), *_described(arguments))
    arguments.finish()
    return _uuid(api, "SR", api("SR.introduce", *given, {}))


@command("sr-probe")
def sr_probe(api: XenApi, arguments: Arguments) -> list[str]:
    host, device_config, kind = _host(api, arguments), arguments.mapping("device-config"), arguments.need("type")
    arguments.finish()
    return [printable(api("SR.probe", host, device_config, kind, {}))]


@command("pbd-create")
def pbd_create(api: XenApi, arguments: Arguments) -> list[str]:
    record = {
        "host": _host(api, arguments),
        "SR": api("SR.get_by_uuid", arguments.need("sr-uuid")),
        "device_config": arguments.mapping("device-config"),
        "other_config": {},
    }
    arguments.finish()
    return _uuid(api, "PBD", api("PBD.create", record))

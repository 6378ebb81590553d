"""Calls about VBDs, which connect a VM to a VDI or are a drive without medium."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simsr.xapi import attachment
from simsr.xapi.database import Row
from simsr.xapi.failure import XenError
from simsr.xapi.locks import operations
from simsr.xapi.pbd import constructor_values
from simsr.xapi.registry import method
from simsr.xapi.schema import NULL
from simsr.xapi.vm_checks import require_power_state

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["copy_vbd", "COPIED"]

DEVICES_MAX = 255
_DEVICES = [str(number) for number in range(DEVICES_MAX + 1)]
COPIED = (
    "userdevice", "device", "bootable", "mode", "type", "unpluggable", "empty", "other_config", "qos_algorithm_type",
    "qos_algorithm_params", "qos_supported_algorithms", "currently_attached",
)  # fmt: skip
"""What a copy of a VBD has in common with it; everything but identity, VM and VDI."""


def copy_vbd(call: Call, row: Row, vm: str, vdi: str, **changes: Any) -> str:
    """Make a VBD like ``row`` between ``vm`` and ``vdi``."""
    return call.db.create("VBD", **{**{name: row[name] for name in COPIED}, "VM": vm, "VDI": vdi, **changes})


def _free_devices(call: Call, vm: str) -> list[str]:
    taken = {call.db.get("VBD", vbd)["userdevice"] for vbd in call.db.pointing("VM", "VBDs", vm)}
    return [device for device in _DEVICES if device not in taken]


@method("VM.get_allowed_VBD_devices", "vm VM ref")
def get_allowed_vbd_devices(call: Call, vm: str) -> list[str]:
    call.db.get("VM", vm)
    return _free_devices(call, vm)


@method("VBD.create", "record record")
def create(call: Call, record: dict[str, Any]) -> str:
    db = call.db
    values = constructor_values("VBD", record)
    vm, vdi = values.get("VM", ""), values.get("VDI", NULL)
    db.get("VM", vm)
    values.pop("currently_attached", None)  # that is for plugging to say
    values["empty"] = values.get("empty", False) or vdi == NULL and values.get("type") == "CD"
    if values["empty"]:
        values["VDI"] = NULL
    else:
        db.get("VDI", vdi)
    _require_fitting(call, values["VDI"], values.get("mode", "RW"), values.get("type", "Disk"))
    return db.create("VBD", **{**values, "userdevice": _device(call, vm, values.get("userdevice", ""))})


def _require_fitting(call: Call, vdi: str, mode: str, kind: str) -> None:
    if kind == "CD" and mode == "RW":
        raise XenError("VBD_CDS_MUST_BE_READONLY")
    if vdi == NULL and kind != "CD":
        raise XenError("VBD_NOT_REMOVABLE_MEDIA", "in constructor")
    if mode == "RW" and call.db.get("VDI", vdi)["read_only"]:
        raise XenError("VDI_READONLY", vdi)


def _device(call: Call, vm: str, wanted: str) -> str:
    """Return the device number of a new VBD, chosen here if the client leaves it open."""
    free = _free_devices(call, vm)
    if wanted in ("autodetect", ""):
        if not free:
            raise XenError("INVALID_DEVICE", wanted)
        return free[0]
    if wanted not in _DEVICES:
        raise XenError("INVALID_DEVICE", wanted[:200])
    if wanted not in free:
        raise XenError("DEVICE_ALREADY_EXISTS", wanted)
    return wanted


@method("VBD.destroy", "self VBD ref")
def destroy(call: Call, vbd: str) -> None:
    row = call.db.get("VBD", vbd)
    if row["currently_attached"] or row["storage_lock"]:
        raise XenError("OPERATION_NOT_ALLOWED", f"VBD {row['uuid']} is still attached to its VM")
    call.db.delete("VBD", vbd)


@method("VBD.plug", "self VBD ref")
async def plug(call: Call, vbd: str) -> None:
    require_power_state(call.db, call.db.get("VBD", vbd)["VM"], "Running")
    async with operations(call, ("VBD", vbd, "plug")):
        if call.db.get("VBD", vbd)["currently_attached"]:
            raise XenError("DEVICE_ALREADY_ATTACHED", vbd)
        await attachment.attach(call, vbd)


@method("VBD.unplug", "self VBD ref")
async def unplug(call: Call, vbd: str) -> None:
    require_power_state(call.db, call.db.get("VBD", vbd)["VM"], "Running")
    async with operations(call, ("VBD", vbd, "unplug")):
        if not call.db.get("VBD", vbd)["currently_attached"]:
            raise XenError("DEVICE_ALREADY_DETACHED", vbd)
        await attachment.detach(call, vbd)


@method("VBD.unplug_force", "self VBD ref")
async def unplug_force(call: Call, vbd: str) -> None:
    await unplug(call, vbd)


def _require_drive(call: Call, vbd: str) -> None:
    if call.db.get("VBD", vbd)["type"] != "CD":
        raise XenError("VBD_NOT_REMOVABLE_MEDIA", vbd)


@method("VBD.insert", "vbd VBD ref; vdi VDI ref")
async def insert(call: Call, vbd: str, vdi: str) -> None:
    db = call.db
    require_power_state(db, db.get("VBD", vbd)["VM"], "Running")
    db.get("VDI", vdi)
    async with operations(call, ("VBD", vbd, "insert")):
        _require_drive(call, vbd)
        if not db.get("VBD", vbd)["empty"]:
            raise XenError("VBD_NOT_EMPTY", vbd)
        db.set("VBD", vbd, VDI=vdi, empty=False)
        try:
            await attachment.attach(call, vbd)
        except BaseException:
            db.set("VBD", vbd, VDI=NULL, empty=True)
            raise


@method("VBD.eject", "vbd VBD ref")
async def eject(call: Call, vbd: str) -> None:
    db = call.db
    require_power_state(db, db.get("VBD", vbd)["VM"], "Running")
    async with operations(call, ("VBD", vbd, "eject")):
        _require_drive(call, vbd)
        if db.get("VBD", vbd)["empty"]:
            raise XenError("VBD_IS_EMPTY", vbd)
        await attachment.detach(call, vbd, keep_flag=True)
        db.set("VBD", vbd, VDI=NULL, empty=True)

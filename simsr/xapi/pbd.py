"""Calls about PBDs, which connect the host to an SR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simsr.xapi import smapiv1
from simsr.xapi.failure import XenError
from simsr.xapi.locks import operations
from simsr.xapi.registry import method
from simsr.xapi.schema import CLASSES
from simsr.xapi.storage import sr_command

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["plug", "constructor_values"]


def constructor_values(cls: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return what a client may give at creation, typed; fields that only xapi sets are left out, as are unknown ones."""
    fields = CLASSES[cls]
    return {
        name: fields[name].type.read(value, name)
        for name, value in record.items()
        if name in fields and fields[name].qualifier in ("c", "rw")
    }


@method("PBD.create", "record record")
def create(call: Call, record: dict[str, Any]) -> str:
    db = call.db
    values = constructor_values("PBD", record)
    for name, cls in (("host", "host"), ("SR", "SR")):
        db.get(cls, values.get(name, ""))
    others = db.pointing("SR", "PBDs", values["SR"])
    if others and not db.get("SR", values["SR"])["shared"]:
        raise XenError("SR_NOT_SHARABLE", values["SR"], values["host"])
    same_host = [pbd for pbd in others if db.get("PBD", pbd)["host"] == values["host"]]
    if same_host:
        raise XenError("PBD_EXISTS", values["SR"], values["host"], same_host[0])
    return db.create("PBD", **values)


@method("PBD.destroy", "self PBD ref")
def destroy(call: Call, pbd: str) -> None:
    row = call.db.get("PBD", pbd)
    if row["currently_attached"]:
        raise XenError("OPERATION_NOT_ALLOWED", "the PBD is plugged")
    call.db.delete("PBD", pbd)


@method("PBD.plug", "self PBD ref")
async def plug(call: Call, pbd: str) -> None:
    row = call.db.get("PBD", pbd)
    if row["currently_attached"]:
        return
    async with operations(call, ("SR", row["SR"], "plug")):
        smapiv1.unit(await sr_command(call, row["SR"], "sr_attach", device_config=row["device_config"]))
        call.db.set("PBD", pbd, currently_attached=True)


@method("PBD.unplug", "self PBD ref")
async def unplug(call: Call, pbd: str) -> None:
    db = call.db
    row = db.get("PBD", pbd)
    if not row["currently_attached"]:
        return
    async with operations(call, ("SR", row["SR"], "unplug")):
        for vdi in db.pointing("SR", "VDIs", row["SR"]):
            if any(db.get("VBD", vbd)["currently_attached"] and _is_live(call, vbd) for vbd in db.pointing("VDI", "VBDs", vdi)):
                raise XenError("VDI_IN_USE", vdi, "destroy")
        smapiv1.unit(await sr_command(call, row["SR"], "sr_detach", device_config=row["device_config"]))
        db.set("PBD", pbd, currently_attached=False)


def _is_live(call: Call, vbd: str) -> bool:
    vm = call.db.get("VBD", vbd)["VM"]
    return call.db.has("VM", vm) and call.db.get("VM", vm)["power_state"] in ("Running", "Paused")

"""VM.clone and VM.copy, and what they share with snapshots: copying the disks of a VM, all or none."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from simsr.xapi import vdi
from simsr.xapi.database import Row
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.locks import operations
from simsr.xapi.registry import method
from simsr.xapi.schema import NO_TIME, NULL
from simsr.xapi.vbd import copy_vbd
from simsr.xapi.vdi_copy import copy as copy_vdi
from simsr.xapi.vm import copy_vm
from simsr.xapi.vm_power import vbds_in_order

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["copy_disks", "destroy_disks", "vbd_rows"]

log = logging.getLogger("simsr.xapi")


def vbd_rows(call: Call, vm: str) -> list[Row]:
    """Return the VBDs of the VM in the order of their devices."""
    return [call.db.get("VBD", vbd) for vbd in vbds_in_order(call.db, vm)]


async def copy_disks(call: Call, disks: list[str], copy: Callable[[str], Awaitable[Any]]) -> dict[str, Any]:
    """Copy each VDI with ``copy`` and return what became of what. If one fails, the copies made so far are destroyed."""
    made: dict[str, str] = {}
    try:
        for disk in disks:
            made[disk] = await copy(disk)
    except (XenError, Unimplemented, trio.Cancelled):
        with trio.CancelScope(shield=True):
            await destroy_disks(call, list(made.values()))
        raise
    return made


async def destroy_disks(call: Call, disks: list[str]) -> None:
    """Destroy VDIs that were made in vain; one that cannot be is logged and stays."""
    for disk in disks:
        try:
            await vdi.destroy(call.for_clearing_up(), disk)
        except (XenError, Unimplemented) as error:
            log.error("VDI %s is left over: %s", disk, error)


async def _copy_whole(call: Call, vm: str, name: str, copy: Callable[[str], Awaitable[Any]]) -> str:
    db = call.db
    rows = vbd_rows(call, vm)
    disks = list(dict.fromkeys(row["VDI"] for row in rows if row["type"] == "Disk" and not row["empty"]))
    made = await copy_disks(call, disks, copy)
    with db.transaction():
        new = copy_vm(
            call, db.get("VM", vm), name_label=name, power_state="Halted", is_default_template=False, is_a_snapshot=False,
            snapshot_of=NULL, snapshot_time=NO_TIME, snapshot_info={}, parent=NULL, is_control_domain=False,
        )  # fmt: skip
        for row in rows:
            copy_vbd(call, row, new, made.get(row["VDI"], row["VDI"]), currently_attached=False)
    return new


@method("VM.clone", "vm VM ref; new_name string")
async def clone(call: Call, vm: str, new_name: str) -> str:
    async with operations(call, ("VM", vm, "clone")):
        return await _copy_whole(call, vm, new_name, lambda disk: vdi.clone(call, disk, {}))


@method("VM.copy", "vm VM ref; new_name string; sr SR ref =")
async def copy(call: Call, vm: str, new_name: str, sr: str) -> str:
    if sr != NULL:
        call.db.get("SR", sr)
    async with operations(call, ("VM", vm, "copy")):
        return await _copy_whole(call, vm, new_name, lambda disk: copy_vdi(call, disk, sr, NULL, NULL))

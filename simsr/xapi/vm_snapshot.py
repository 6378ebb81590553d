"""VM.snapshot and VM.checkpoint.

A snapshot is a VM record that cannot run, with a snapshot of each disk. A checkpoint also has the memory: the VM is
suspended, its disks and its suspend image are copied, and it goes on; the copy keeps its VBDs marked as attached for a later
resume.
"""

from __future__ import annotations

import uuid as uuid_module
from collections.abc import Set
from typing import TYPE_CHECKING

from simsr.xapi import vdi
from simsr.xapi.checks import features_of
from simsr.xapi.failure import XenError
from simsr.xapi.locks import operations
from simsr.xapi.registry import method
from simsr.xapi.schema import NULL, now
from simsr.xapi.vbd import copy_vbd
from simsr.xapi.vm import copy_vm, serialise
from simsr.xapi.vm_clone import copy_disks, vbd_rows
from simsr.xapi.vm_power import resume_vm, suspend_vm

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__: list[str] = []


@method("VM.snapshot", "vm VM ref; new_name string; ignore_vdis VDI refs =")
async def snapshot(call: Call, vm: str, new_name: str, ignore_vdis: list[str]) -> str:
    async with operations(call, ("VM", vm, "snapshot")):
        return await _snapshot(call, vm, new_name, call.db.get("VM", vm)["power_state"], set(ignore_vdis))


@method("VM.snapshot_with_quiesce", "vm VM ref; new_name string")
async def snapshot_with_quiesce(call: Call, vm: str, new_name: str) -> str:
    call.db.get("VM", vm)
    raise XenError("VM_SNAPSHOT_WITH_QUIESCE_NOT_SUPPORTED", vm, "there is no guest that could be quiesced")


async def _snapshot(
    call: Call, vm: str, new_name: str, power_state: str, ignored: Set[str] = frozenset(), *, with_memory: bool = False
) -> str:
    """Copy disks (and memory) of the VM and make the record. ``power_state`` is that of the VM when the caller was asked."""
    db = call.db
    driver_params = {"epochhint": str(uuid_module.uuid4())}
    rows = [row for row in vbd_rows(call, vm) if row["VDI"] not in ignored]
    disks = [row["VDI"] for row in rows if row["type"] == "Disk" and not row["empty"]]
    image = db.get("VM", vm)["suspend_VDI"] if with_memory else NULL
    if image != NULL:
        disks.append(image)
    taken = now()
    made = await copy_disks(call, list(dict.fromkeys(disks)), lambda disk: vdi.snapshot(call, disk, driver_params))
    with db.transaction():
        row = db.get("VM", vm)
        new = copy_vm(
            call, row, name_label=new_name, is_a_snapshot=True, is_a_template=True, is_default_template=False, snapshot_of=vm,
            snapshot_time=taken, transportable_snapshot_id="", power_state="Suspended" if with_memory else "Halted",
            snapshot_info={"power-state-at-snapshot": power_state, "disk-snapshot-type": "crash_consistent"},
            snapshot_metadata=serialise({**row, "power_state": power_state}), suspend_VDI=made.get(image, NULL),
        )  # fmt: skip
        for vbd in rows:
            is_disk = vbd["type"] == "Disk"
            other_config = {"owner": "", **vbd["other_config"]} if is_disk else vbd["other_config"]
            attached = with_memory and vbd["currently_attached"]
            copied = made.get(vbd["VDI"], vbd["VDI"]) if is_disk else vbd["VDI"]
            copy_vbd(call, vbd, new, copied, other_config=other_config, currently_attached=attached)
        db.set("VM", vm, parent=new)
    return new


@method("VM.checkpoint", "vm VM ref; new_name string")
async def checkpoint(call: Call, vm: str, new_name: str) -> str:
    db = call.db
    async with operations(call, ("VM", vm, "checkpoint")):
        state = db.get("VM", vm)["power_state"]
        if state == "Suspended":
            return await _snapshot(call, vm, new_name, state, with_memory=True)
        for row in vbd_rows(call, vm):
            if row["type"] != "CD" and not row["empty"] and "VDI_SNAPSHOT" not in features_of(db, db.get("VDI", row["VDI"])["SR"]):
                raise XenError("SR_OPERATION_NOT_SUPPORTED", vm)  # xapi really names the VM here
        await suspend_vm(call, vm)
        try:
            return await _snapshot(call, vm, new_name, state, with_memory=True)
        finally:
            await resume_vm(call.for_clearing_up(), vm, paused=state == "Paused")

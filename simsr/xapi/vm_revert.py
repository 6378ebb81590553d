"""VM.revert: take a VM back to a snapshot, each disk by VDI.revert where the driver can, by destroy and clone where it cannot.

Theory. Only two errors of VDI.revert promise that nothing was touched (`_NOTHING_TOUCHED`); a disk that fails with one of
them is cloned. Any other error stops the revert: disks reverted before stay reverted, nothing has been destroyed, the VM is
Halted. The sets have the names of the specification: S the snapshot's disks, R those of them that were reverted natively, D
the VM's disks.

``fidelity = upstream`` does as xapi does, with its consequences: a reverted disk keeps its current VBD, or stays without one.
``fixed`` gives every reverted disk the VBD of the snapshot, and clones a disk whose original is gone instead of failing.
"""

from __future__ import annotations

import json
import logging
import secrets
import uuid as uuid_module
from typing import TYPE_CHECKING, Any

from simsr.xapi import vdi
from simsr.xapi.database import Row
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.locks import operations
from simsr.xapi.messages import post
from simsr.xapi.registry import method
from simsr.xapi.schema import CLASSES, NULL
from simsr.xapi.storage import plugged_pbd
from simsr.xapi.vbd import COPIED, copy_vbd
from simsr.xapi.vm import copy_vm
from simsr.xapi.vm_clone import copy_disks, destroy_disks, vbd_rows
from simsr.xapi.vm_power import halt

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["FIELDS_KEPT"]

log = logging.getLogger("simsr.xapi")

_NOTHING_TOUCHED = {"SR_OPERATION_NOT_SUPPORTED", "UNIMPLEMENTED_IN_SM_BACKEND"}
_PASSED_THROUGH = {"SR_BACKEND_FAILURE_44", "SR_BACKEND_FAILURE_109", "VDI_INCOMPATIBLE_TYPE"}

FIELDS_KEPT = {
    "uuid", "suspend_VDI", "power_state", "parent", "current_operations", "allowed_operations", "metrics", "guest_metrics",
    "resident_on", "domid", "protection_policy", "snapshot_schedule", "scheduled_to_be_resident_on", "snapshots", "tags",
    "affinity", "consoles", "VBDs", "VIFs", "VGPUs", "VUSBs", "VTPMs", "attached_PCIs", "is_snapshot_from_vmpp", "children",
    "snapshot_metadata", "ha_always_run",
}  # fmt: skip
"""What a revert leaves as it is in the record of the VM."""


@method("VM.revert", "snapshot VM ref")
async def revert(call: Call, snapshot: str) -> None:
    db = call.db
    row = db.get("VM", snapshot)
    if not row["is_a_snapshot"]:
        raise XenError("REVERT_ONLY_ALLOWED_ON_SNAPSHOT")
    vm = row["snapshot_of"] if db.has("VM", row["snapshot_of"]) else _create_again(call, snapshot)
    async with operations(call, ("VM", snapshot, "revert"), ("VM", vm, "reverting")):
        _require_suspend_image(call, row)
        if db.get("VM", vm)["power_state"] != "Halted":
            await halt(call, vm)
        _take_back_fields(call, vm, row)
        call.progress(0.1)
        call.not_cancellable()
        try:
            await _revert_devices(call, vm, snapshot)
        except (XenError, Unimplemented) as error:
            db.set("VM", vm, power_state="Halted")
            log.error("VM %s could not be reverted to snapshot %s: %s", db.get("VM", vm)["uuid"], row["uuid"], error)
            if isinstance(error, XenError) and error.xenapi_code in _PASSED_THROUGH:
                raise
            raise XenError("VM_REVERT_FAILED", snapshot, vm) from error
        name, uuid = db.get("VM", vm)["name_label"], db.get("VM", vm)["uuid"]
        text = f"VM '{name}' (uuid: {uuid}) reverted to snapshot: {row['name_label']} (uuid {row['uuid']})"
        post(db, "VM_SNAPSHOT_REVERTED", 5, "VM", uuid, text)


def _create_again(call: Call, snapshot: str) -> str:
    """Make the VM that a snapshot was taken of, and that is gone, again: same uuid, new reference, no VBDs."""
    db = call.db
    row = db.get("VM", snapshot)
    uuid = json.loads(row["snapshot_metadata"] or "{}").get("uuid") or str(uuid_module.uuid4())
    with db.transaction():
        vm = copy_vm(
            call, row, uuid=uuid, power_state="Halted", is_a_snapshot=False, is_a_template=False, snapshot_of=NULL, parent=NULL,
            snapshot_info={},
        )  # fmt: skip
        for sibling in db.pointing("VM", "snapshots", row["snapshot_of"]):
            db.set("VM", sibling, snapshot_of=vm)
    return vm


def _require_suspend_image(call: Call, snapshot: Row) -> None:
    """The memory of a checkpoint must be within reach."""
    if snapshot["power_state"] != "Suspended" or not call.db.has("VDI", snapshot["suspend_VDI"]):
        return
    try:
        plugged_pbd(call.db, call.db.get("VDI", snapshot["suspend_VDI"])["SR"])
    except XenError:
        raise XenError("HOST_NOT_LIVE", call.host) from None


def _take_back_fields(call: Call, vm: str, snapshot: Row) -> None:
    saved: dict[str, Any] = json.loads(snapshot["snapshot_metadata"] or "{}")
    fields = CLASSES["VM"]
    values = {
        name: fields[name].type.read(value, name) for name, value in saved.items() if name in fields and name not in FIELDS_KEPT
    }
    call.db.set("VM", vm, **values, ha_always_run=False)


async def _revert_devices(call: Call, vm: str, snapshot: str) -> None:
    db = call.db
    row = db.get("VM", snapshot)
    if db.get("VM", vm)["generation_id"]:  # empty: a VM that has none and gets none
        db.set("VM", vm, generation_id=f"{secrets.randbits(63)}:{secrets.randbits(63)}")
    await _revert_disks(call, vm, snapshot)
    call.progress(0.7)
    with db.transaction():
        for cls, name in (("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")):
            _copy_metrics(call, vm, row, cls, name)
        db.set("VM", vm, parent=snapshot, power_state=row["power_state"])
    call.progress(1.0)


def _copy_metrics(call: Call, vm: str, snapshot: Row, cls: str, name: str) -> None:
    db = call.db
    old = db.get("VM", vm)[name]
    new = NULL
    if db.has(cls, snapshot[name]):
        new = db.create(cls, **{field: value for field, value in db.get(cls, snapshot[name]).items() if field != "uuid"})
    db.set("VM", vm, **{name: new})
    if db.has(cls, old):
        db.delete(cls, old)


# Disks.


async def _revert_disks(call: Call, vm: str, snapshot: str) -> None:
    db = call.db
    rows = vbd_rows(call, snapshot)
    snapshot_disks = sorted({row["VDI"] for row in rows if row["type"] == "Disk" and not row["empty"]})
    original = {disk: db.get("VDI", disk)["snapshot_of"] for disk in snapshot_disks}
    reverted = await _revert_natively(call, snapshot_disks)
    kept = {original[disk] for disk in reverted}
    image = db.get("VM", vm)["suspend_VDI"]
    current = {db.get("VBD", vbd)["VDI"] for vbd in db.pointing("VM", "VBDs", vm) if db.get("VBD", vbd)["type"] == "Disk"}
    to_destroy = (current & set(original.values())) - kept
    with db.transaction():
        for vbd in db.pointing("VM", "VBDs", vm):
            if db.get("VBD", vbd)["VDI"] not in kept or db.get("VBD", vbd)["type"] == "CD":
                db.delete("VBD", vbd)
    for disk in [*sorted(to_destroy - {NULL}), image]:
        if db.has("VDI", disk) and db.get("SR", db.get("VDI", disk)["SR"])["content_type"] != "iso":
            await vdi.destroy(call, disk)
    db.set("VM", vm, suspend_VDI=NULL)
    call.progress(0.2)
    await _clone_the_rest(call, vm, snapshot, [row for row in rows if row["VDI"] not in reverted], original)
    if call.model.settings.fidelity == "fixed":
        with db.transaction():
            for row in rows:
                if row["VDI"] in reverted:
                    _restore_vbd(call, vm, row, original[row["VDI"]])


async def _revert_natively(call: Call, disks: list[str]) -> set[str]:
    """Return the disks for which VDI.revert succeeded; the others were not touched. Any other failure goes up at once."""
    reverted = set()
    for disk in disks:
        try:
            await vdi.revert(call, disk)
        except XenError as error:
            gone = error.description == ["HANDLE_INVALID", "VDI", call.db.get("VDI", disk)["snapshot_of"]]
            if error.xenapi_code in _NOTHING_TOUCHED or gone and call.model.settings.fidelity == "fixed":
                log.info("VDI %s is not reverted but cloned, its uuid will change: %s", disk, error)
                continue
            raise
        reverted.add(disk)
    return reverted


async def _clone_the_rest(call: Call, vm: str, snapshot: str, rows: list[Row], original: dict[str, str]) -> None:
    """Give the VM clones of the disks that were not reverted, the CDs, and a copy of the snapshot's memory."""
    db = call.db
    driver_params = {"epochhint": str(uuid_module.uuid4())}
    image = db.get("VM", snapshot)["suspend_VDI"]
    disks = list(dict.fromkeys(row["VDI"] for row in rows if row["type"] == "Disk" and not row["empty"]))
    made = await copy_disks(call, disks, lambda disk: vdi.clone(call, disk, driver_params))
    call.progress(0.5)
    try:
        memory = await copy_disks(call, [image] if db.has("VDI", image) else [], lambda disk: vdi.clone(call, disk, driver_params))
        call.progress(0.6)
        with db.transaction():
            for disk, new in made.items():
                if original[disk] != NULL:
                    for sibling in db.pointing("VDI", "snapshots", original[disk]):
                        db.set("VDI", sibling, snapshot_of=new)
            for row in rows:
                copy_vbd(call, row, vm, made.get(row["VDI"], row["VDI"]))
            db.set("VM", vm, suspend_VDI=memory.get(image, NULL))
    except (XenError, Unimplemented):
        await destroy_disks(call, list(made.values()))
        raise


def _restore_vbd(call: Call, vm: str, row: Row, disk: str) -> None:
    """Make the VM's VBD of a reverted disk like the snapshot's ``row``; the one that is there keeps its identity."""
    db = call.db
    present = [vbd for vbd in db.pointing("VDI", "VBDs", disk) if db.get("VBD", vbd)["VM"] == vm]
    if present:
        db.set("VBD", present[0], **{name: row[name] for name in COPIED})
    else:
        copy_vbd(call, row, vm, disk)

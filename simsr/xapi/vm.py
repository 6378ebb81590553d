"""Calls about VMs that touch no storage: create, destroy, provision, memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from simsr.xapi.database import Row
from simsr.xapi.failure import XenError
from simsr.xapi.locks import operations
from simsr.xapi.pbd import constructor_values
from simsr.xapi.registry import method
from simsr.xapi.schema import CLASSES, now
from simsr.xapi.vm_checks import require_power_state

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["copy_vm", "destroy_rows", "serialise"]

_OWN_TO_EACH = {
    "uuid", "current_operations", "allowed_operations", "metrics", "guest_metrics", "resident_on", "domid", "suspend_VDI",
    "consoles", "snapshot_metadata",
}  # fmt: skip
"""Fields that a copy of a VM does not take over."""


def copy_vm(call: Call, row: Row, **changes: Any) -> str:
    """Make a VM like ``row``, without VBDs."""
    with call.db.transaction():
        metrics = call.db.create("VM_metrics", install_time=now())
        taken_over = {name: value for name, value in row.items() if name not in _OWN_TO_EACH}
        return call.db.create("VM", **{**taken_over, "metrics": metrics, **changes})


def destroy_rows(call: Call, vm: str) -> None:
    """Remove the VM with what belongs to it alone; its disks and suspend image stay."""
    db = call.db
    with db.transaction():
        row = db.get("VM", vm)
        for vbd in db.pointing("VM", "VBDs", vm):
            db.delete("VBD", vbd)
        for child in db.pointing("VM", "children", vm):
            db.set("VM", child, parent=row["parent"])
        for cls, name in (("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")):
            if db.has(cls, row[name]):
                db.delete(cls, row[name])
        db.delete("VM", vm)


def serialise(row: Row) -> str:
    """Return the record of a VM as text, for ``snapshot_metadata``."""
    return json.dumps({name: value for name, value in row.items() if name != "snapshot_metadata"}, sort_keys=True)


@method("VM.create", "record record")
def create(call: Call, record: dict[str, Any]) -> str:
    values = constructor_values("VM", record)
    values.pop("suspend_VDI", None)
    if values.get("power_state", "Halted") != "Halted":
        raise XenError("VALUE_NOT_SUPPORTED", "power_state", values["power_state"], "a new VM is Halted")
    defaults = {name: field.default for name, field in CLASSES["VM"].items()}
    return copy_vm(call, {**defaults, **values})


@method("VM.destroy", "self VM ref")
async def destroy(call: Call, vm: str) -> None:
    async with operations(call, ("VM", vm, "destroy")):
        for vbd in call.db.pointing("VM", "VBDs", vm):
            row = call.db.get("VBD", vbd)
            if row["storage_lock"]:
                raise XenError("OPERATION_NOT_ALLOWED", f"VBD {row['uuid']} is still attached")
        destroy_rows(call, vm)


@method("VM.provision", "vm VM ref")
async def provision(call: Call, vm: str) -> None:
    async with operations(call, ("VM", vm, "provision")):
        call.db.set("VM", vm, is_a_template=False)


@method("VM.set_is_a_template", "self VM ref; value bool")
def set_is_a_template(call: Call, vm: str, value: bool) -> None:
    row = call.db.get("VM", vm)
    if row["is_a_snapshot"] and not value:
        raise XenError("VM_IS_SNAPSHOT", vm, "make_into_template")
    if value:
        require_power_state(call.db, vm, "Halted")
    call.db.set("VM", vm, is_a_template=value)


@method("VM.set_memory_limits", "self VM ref; static_min int; static_max int; dynamic_min int; dynamic_max int")
def set_memory_limits(call: Call, vm: str, static_min: int, static_max: int, dynamic_min: int, dynamic_max: int) -> None:
    if not 0 <= static_min <= dynamic_min <= dynamic_max <= static_max:
        raise XenError("MEMORY_CONSTRAINT_VIOLATION", "static_min <= dynamic_min <= dynamic_max <= static_max")
    require_power_state(call.db, vm, "Halted")
    call.db.set(
        "VM", vm, memory_static_min=static_min, memory_static_max=static_max, memory_dynamic_min=dynamic_min,
        memory_dynamic_max=dynamic_max,
    )  # fmt: skip

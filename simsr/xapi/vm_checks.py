"""Which operation on a VM is allowed now: power state, snapshots, templates, operations under way."""

from __future__ import annotations

from simsr.xapi.database import Database
from simsr.xapi.failure import XenError

__all__ = ["vm_error", "require_power_state"]

_STATES = {
    "clone": "Halted", "copy": "Halted", "provision": "Halted", "start": "Halted", "start_on": "Halted",
    "checkpoint": "Paused Suspended Running", "destroy": "Halted Suspended", "export": "Halted Suspended",
    "pause": "Running", "unpause": "Paused", "clean_shutdown": "Running", "hard_shutdown": "Running Paused Suspended",
    "suspend": "Running", "resume": "Suspended", "resume_on": "Suspended",
}  # fmt: skip
"""Operations that are not here are allowed in any state: snapshot, revert, reverting."""
_ON_SNAPSHOTS = {"revert", "clone", "copy", "export", "destroy", "hard_shutdown", "metadata_export"}
_NOT_ON_TEMPLATES = {"start", "start_on", "pause", "unpause", "clean_shutdown", "suspend", "resume", "resume_on", "checkpoint"}


def require_power_state(db: Database, vm: str, *expected: str) -> None:
    """Raise VM_BAD_POWER_STATE unless the VM is in one of the states."""
    actual = db.get("VM", vm)["power_state"]
    if actual not in expected:
        raise XenError("VM_BAD_POWER_STATE", vm, ", ".join(state.lower() for state in expected), actual.lower())


def vm_error(db: Database, ref: str, operation: str) -> XenError | None:
    """Why ``operation`` cannot run on the VM now."""
    vm = db.get("VM", ref)
    if operation == "revert" and not vm["is_a_snapshot"]:
        return XenError("REVERT_ONLY_ALLOWED_ON_SNAPSHOT")
    if vm["is_a_snapshot"] and operation not in _ON_SNAPSHOTS:
        return XenError("VM_IS_SNAPSHOT", ref, operation)
    if vm["is_a_template"] and operation in _NOT_ON_TEMPLATES:
        return XenError("VM_IS_TEMPLATE", ref, operation)
    if vm["is_control_domain"] and operation not in ("export", "metadata_export"):
        return XenError("OPERATION_NOT_ALLOWED", "this is the control domain")
    states = _STATES.get(operation, "").split()
    if vm["is_a_snapshot"] and operation in ("clone", "copy"):
        states.append("Suspended")
    if states and vm["power_state"] not in states:
        return XenError("VM_BAD_POWER_STATE", ref, ", ".join(states).lower(), vm["power_state"].lower())
    for opref, other in vm["current_operations"].items():
        return XenError("OTHER_OPERATION_IN_PROGRESS", "VM", ref, other, opref)
    return None

"""Which operation is allowed now: the rules of xapi for VDIs and SRs, in the order in which it asks them.

Theory. A check looks at the database only and returns the error of the first rule that fails, None if there is none. The same
functions serve the calls themselves, and the fields ``allowed_operations``, so that these can never disagree.
"""

from __future__ import annotations

from simsr.xapi.database import Database, Row
from simsr.xapi.failure import XenError
from simsr.xapi.fields import ENUMS
from simsr.xapi.vm_checks import vm_error

__all__ = ["vdi_error", "sr_error", "vbd_error", "allowed", "features_of", "OLD_VDI_OPERATIONS"]

OLD_VDI_OPERATIONS = ("snapshot", "clone", "copy", "resize", "destroy", "forget", "update", "generate_config")
"""What ``VDI.allowed_operations`` may show: records must be readable for pools of older versions."""

_NOT_IN_UPGRADE = {
    "mirror", "enable_cbt", "disable_cbt", "data_destroy", "list_changed_blocks", "set_on_boot", "revert_to", "revert_from",
    "vdi_mirror", "vdi_enable_cbt", "vdi_disable_cbt", "vdi_data_destroy", "vdi_list_changed_blocks", "vdi_set_on_boot",
    "vdi_revert",
}  # fmt: skip
_WHILE_ATTACHED = {
    "snapshot",
    "clone",
    "resize_online",
    "mirror",
    "blocked",
    "enable_cbt",
    "disable_cbt",
    "data_destroy",
    "revert_to",
}
_VDI_FEATURES = {
    "snapshot": "VDI_SNAPSHOT", "resize": "VDI_RESIZE", "resize_online": "VDI_RESIZE_ONLINE", "destroy": "VDI_DELETE",
    "update": "VDI_UPDATE", "mirror": "VDI_MIRROR", "generate_config": "VDI_GENERATE_CONFIG", "enable_cbt": "VDI_CONFIG_CBT",
    "disable_cbt": "VDI_CONFIG_CBT", "data_destroy": "VDI_CONFIG_CBT", "list_changed_blocks": "VDI_CONFIG_CBT",
    "set_on_boot": "VDI_RESET_ON_BOOT", "revert_to": "VDI_CLONE", "revert_from": "VDI_CLONE",
}  # fmt: skip
"""``clone`` is missing on purpose: without VDI_CLONE it is a full copy."""
_SR_FEATURES = {
    "update": "SR_UPDATE", "vdi_create": "VDI_CREATE", "vdi_introduce": "VDI_INTRODUCE", "vdi_destroy": "VDI_DELETE",
    "vdi_resize": "VDI_RESIZE", "vdi_snapshot": "VDI_SNAPSHOT", "vdi_revert": "VDI_REVERT", "vdi_mirror": "VDI_MIRROR",
    "vdi_enable_cbt": "VDI_CONFIG_CBT", "vdi_disable_cbt": "VDI_CONFIG_CBT", "vdi_data_destroy": "VDI_CONFIG_CBT",
    "vdi_list_changed_blocks": "VDI_CONFIG_CBT", "vdi_set_on_boot": "VDI_RESET_ON_BOOT",
}  # fmt: skip
_NOT_ON_CBT_METADATA = {"snapshot", "clone", "resize", "resize_online", "copy", "set_on_boot", "revert_to", "revert_from"}
_NOT_WITH_CBT = {"mirror", "set_on_boot"}


def features_of(db: Database, sr: str) -> set[str]:
    """Return the features of the driver of an SR; none if the SR or its driver is gone."""
    if not db.has("SR", sr):
        return set()
    sr_type = db.get("SR", sr)["type"]
    for row in db.all("SM").values():
        if row["type"] == sr_type:
            return set(row["features"])
    return set()


def _upgrading(db: Database) -> bool:
    return any("rolling_upgrade_in_progress" in pool["other_config"] for pool in db.all("pool").values())


def _busy(cls: str, ref: str, opref: str, operation: str) -> XenError:
    return XenError("OTHER_OPERATION_IN_PROGRESS", cls, ref, operation, opref)


def sr_error(db: Database, ref: str, operation: str) -> XenError | None:
    """Why ``operation`` cannot run on the SR now."""
    row = db.get("SR", ref)
    if operation in _NOT_IN_UPGRADE and _upgrading(db):
        return XenError("NOT_SUPPORTED_DURING_UPGRADE")
    if operation in _SR_FEATURES and _SR_FEATURES[operation] not in features_of(db, ref):
        return XenError("SR_OPERATION_NOT_SUPPORTED", ref)
    if operation != "plug":
        for opref, other in row["current_operations"].items():
            if other != "plug":
                return _busy("SR", ref, opref, other)
    return None


def vdi_error(db: Database, ref: str, operation: str) -> XenError | None:
    """Why ``operation`` cannot run on the VDI now."""
    vdi = db.get("VDI", ref)
    if operation in _NOT_IN_UPGRADE and _upgrading(db):
        return XenError("NOT_SUPPORTED_DURING_UPGRADE")
    for opref, other in vdi["current_operations"].items():
        if other != "copy":
            return _busy("VDI", ref, opref, other)
    return (
        _attachment_error(db, ref, operation)
        or _feature_error(db, ref, vdi, operation)
        or _special_error(db, ref, vdi, operation)
    )


def _is_active(vbd: Row) -> bool:
    # ``storage_lock`` is what the API shows of a VBD that is reserved for an attachment under way.
    return vbd["currently_attached"] or vbd["storage_lock"]


def _attachment_error(db: Database, ref: str, operation: str) -> XenError | None:
    vbds = [db.get("VBD", vbd) for vbd in db.pointing("VDI", "VBDs", ref)]
    active = [vbd for vbd in vbds if _is_active(vbd)]
    if operation == "list_changed_blocks":
        active = [vbd for vbd in active if not _belongs_to_snapshot(db, vbd)]
    elif operation in _WHILE_ATTACHED or operation == "copy" and all(vbd["mode"] == "RO" for vbd in active):
        active = []
    if active:
        return XenError("VDI_IN_USE", ref, operation)
    for vbd in vbds:
        for opref, other in vbd["current_operations"].items():
            return _busy("VDI", ref, opref, other)
    return None


def _belongs_to_snapshot(db: Database, vbd: Row) -> bool:
    return db.has("VM", vbd["VM"]) and db.get("VM", vbd["VM"])["is_a_snapshot"]


def _feature_error(db: Database, ref: str, vdi: Row, operation: str) -> XenError | None:
    if operation in _VDI_FEATURES and _VDI_FEATURES[operation] not in features_of(db, vdi["SR"]):
        return XenError("SR_OPERATION_NOT_SUPPORTED", vdi["SR"])
    if vdi["type"] == "cbt_metadata" and operation in _NOT_ON_CBT_METADATA:
        return XenError("VDI_INCOMPATIBLE_TYPE", ref, "cbt_metadata")
    if vdi["cbt_enabled"] and operation in _NOT_WITH_CBT:
        return XenError("VDI_CBT_ENABLED", ref)
    return None


def _special_error(db: Database, ref: str, vdi: Row, operation: str) -> XenError | None:
    if operation in ("destroy", "revert_from"):
        return _destroy_error(db, ref, vdi)
    if operation == "revert_to" and not vdi["is_a_snapshot"]:
        return XenError("REVERT_ONLY_ALLOWED_ON_SNAPSHOT")
    if operation == "snapshot" and "copy" in vdi["current_operations"].values():
        return XenError("OPERATION_NOT_ALLOWED", "a copy of the VDI is being made")
    if operation in ("copy", "clone") and vdi["type"] in ("ha_statefile", "redo_log"):
        return XenError("OPERATION_NOT_ALLOWED", f"a VDI of type {vdi['type']} cannot be copied")
    if operation in ("enable_cbt", "disable_cbt"):
        return _cbt_error(ref, vdi)
    if operation == "data_destroy":
        return _data_destroy_error(db, ref, vdi)
    return None


def _destroy_error(db: Database, ref: str, vdi: Row) -> XenError | None:
    sr = db.get("SR", vdi["SR"]) if db.has("SR", vdi["SR"]) else None
    if sr and sr["type"] == "udev":
        return XenError("VDI_IS_A_PHYSICAL_DEVICE", ref)
    if sr and sr["is_tools_sr"]:
        return XenError("SR_OPERATION_NOT_SUPPORTED", vdi["SR"])
    if vdi["type"] == "rrd":
        return XenError("VDI_HAS_RRDS", ref)
    if vdi["type"] in ("ha_statefile", "redo_log") and any(pool["ha_enabled"] for pool in db.all("pool").values()):
        return XenError("HA_IS_ENABLED")
    return None


def _cbt_error(ref: str, vdi: Row) -> XenError | None:
    if vdi["is_a_snapshot"]:
        return XenError("OPERATION_NOT_ALLOWED", "changed blocks are tracked for disks, not for snapshots")
    if vdi["type"] not in ("user", "system"):
        return XenError("VDI_INCOMPATIBLE_TYPE", ref, vdi["type"])
    if vdi["on_boot"] == "reset":
        return XenError("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")
    return None


def _data_destroy_error(db: Database, ref: str, vdi: Row) -> XenError | None:
    if not vdi["is_a_snapshot"]:
        return XenError("OPERATION_NOT_ALLOWED", "only the data of a snapshot can be destroyed")
    if db.has("SR", vdi["SR"]) and db.get("SR", vdi["SR"])["is_tools_sr"]:
        return XenError("SR_OPERATION_NOT_SUPPORTED", vdi["SR"])
    if vdi["type"] != "cbt_metadata" and not vdi["cbt_enabled"]:
        return XenError("VDI_NO_CBT_METADATA", ref)
    return None


def vbd_error(db: Database, ref: str, operation: str) -> XenError | None:
    """Why ``operation`` cannot run on the VBD now."""
    vbd = db.get("VBD", ref)
    for opref, other in vbd["current_operations"].items():
        return _busy("VBD", ref, opref, other)
    if operation in ("plug", "attach") and db.has("VDI", vbd["VDI"]):
        for opref, other in db.get("VDI", vbd["VDI"])["current_operations"].items():
            if not (other == "copy" and vbd["mode"] == "RO"):
                return _busy("VDI", vbd["VDI"], opref, other)
    return None


def allowed(db: Database, cls: str, ref: str) -> list[str]:
    """Return the value of the field ``allowed_operations``."""
    if cls == "VDI":
        return [name for name in OLD_VDI_OPERATIONS if vdi_error(db, ref, name) is None]
    if cls == "SR":
        return [name for name in ENUMS["storage_operations"].split() if sr_error(db, ref, name) is None]
    if cls == "VBD":
        return _allowed_vbd(db, ref)
    if cls == "VM":
        names = set(ENUMS["vm_operations"].split()) - {"reverting", "snapshot_with_quiesce"}
        return [name for name in sorted(names) if vm_error(db, ref, name) is None]
    return []


def _allowed_vbd(db: Database, ref: str) -> list[str]:
    vbd = db.get("VBD", ref)
    running = db.has("VM", vbd["VM"]) and db.get("VM", vbd["VM"])["power_state"] == "Running"
    if vbd["current_operations"] or not running:
        return ["attach"] if not vbd["current_operations"] else []
    if vbd["type"] == "CD":
        return ["attach", "insert" if vbd["empty"] else "eject"]
    return ["attach", "unplug", "unplug_force"] if vbd["currently_attached"] else ["attach", "plug"]

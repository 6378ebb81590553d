"""Calls about VDIs: create, destroy, snapshot, clone, revert, resize, changed blocks.

Snapshots and clones are rows that the plug-in has introduced by the time it answers; what xapi knows better (names, links, tags)
is set here afterwards. After a revert nothing is set: the plug-in has told what changed.
"""

from __future__ import annotations

import uuid as uuid_module
from typing import TYPE_CHECKING, Any

from simsr.xapi import smapiv1
from simsr.xapi.checks import features_of
from simsr.xapi.failure import XenError
from simsr.xapi.locks import operations
from simsr.xapi.pbd import constructor_values
from simsr.xapi.registry import method
from simsr.xapi.schema import NO_TIME, NULL, now
from simsr.xapi.storage import plugged_pbd, sr_command, vdi_at, vdi_command

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["create_vdi", "destroy", "snapshot", "clone", "revert", "require_managed"]

CBT_METADATA_CONTENT_ID = "no content: only the changed blocks are kept"

_DB_INTRODUCE = (
    "uuid string; name_label string; name_description string; SR SR ref; type vdi_type; sharable bool; read_only bool;"
    " other_config map; location string; xenstore_data map; sm_config map; managed bool; virtual_size int;"
    " physical_utilisation int; metadata_of_pool pool ref; is_a_snapshot bool; snapshot_time datetime; snapshot_of VDI ref"
)


def require_managed(call: Call, vdi: str) -> None:
    """Raise VDI_NOT_MANAGED if the VDI is one that only the driver uses."""
    if not call.db.get("VDI", vdi)["managed"]:
        raise XenError("VDI_NOT_MANAGED", vdi)


# Rows.


@method("VDI.db_introduce", f"{_DB_INTRODUCE}; cbt_enabled bool =", sm_only=True)
def db_introduce(call: Call, *values: Any) -> str:
    names = [part.split()[0] for part in _DB_INTRODUCE.split(";")] + ["cbt_enabled"]
    row = dict(zip(names, values, strict=True))
    db = call.db
    db.get("SR", row["SR"])
    for other in db.pointing("SR", "VDIs", row["SR"]):
        if db.get("VDI", other)["location"] == row["location"]:
            raise XenError("LOCATION_NOT_UNIQUE", row["SR"], row["location"])
    return db.create("VDI", **row)


@method("VDI.db_forget", "vdi VDI ref", sm_only=True)
def db_forget(call: Call, vdi: str) -> None:
    _remove_row(call, vdi)


def _remove_row(call: Call, vdi: str) -> None:
    with call.db.transaction():
        for vbd in call.db.pointing("VDI", "VBDs", vdi):
            call.db.delete("VBD", vbd)
        if call.db.has("VDI", vdi):
            call.db.delete("VDI", vdi)


@method("VDI.forget", "vdi VDI ref")
async def forget(call: Call, vdi: str) -> None:
    async with operations(call, ("VDI", vdi, "forget")):
        _remove_row(call, vdi)


@method(
    "VDI.introduce",
    "uuid string; name_label string; name_description string; SR SR ref; type vdi_type; sharable bool; read_only bool;"
    " other_config map; location string; xenstore_data map =; sm_config map =; managed bool =; virtual_size int =;"
    " physical_utilisation int =; metadata_of_pool pool ref =; is_a_snapshot bool =; snapshot_time datetime =;"
    " snapshot_of VDI ref =",
)
async def introduce(
    call: Call, uuid: str, label: str, description: str, sr: str, vdi_type: str, sharable: bool, read_only: bool,
    other_config: dict[str, str], location: str, xenstore_data: dict[str, str], sm_config: dict[str, str], *_: Any,
) -> str:  # fmt: skip
    async with operations(call, ("SR", sr, "vdi_introduce")):
        new_uuid = uuid or str(uuid_module.uuid4())
        answer = await sr_command(call, sr, "vdi_introduce", vdi_location=location, vdi_sm_config=sm_config, new_uuid=new_uuid)
        vdi = call.db.by_uuid("VDI", smapiv1.vdi_info(answer)[0])
        call.db.set(
            "VDI", vdi, name_label=label, name_description=description, type=vdi_type, sharable=sharable, read_only=read_only,
            other_config=other_config, xenstore_data=xenstore_data,
        )  # fmt: skip
        return vdi


# Making and destroying.


@method("VDI.create", "record record")
async def create(call: Call, record: dict[str, Any]) -> str:
    values = constructor_values("VDI", record)
    if "SR" not in values or "virtual_size" not in values:
        raise XenError("FIELD_TYPE_ERROR", "SR" if "SR" not in values else "virtual_size")
    return await create_vdi(call, **values)


async def create_vdi(call: Call, SR: str, virtual_size: int, **values: Any) -> str:  # noqa: N803 - the field's name
    """Make a VDI with these fields and return it."""
    db = call.db
    async with operations(call, ("SR", SR, "vdi_create")):
        read_only = values.get("read_only", False)
        args = [
            str(virtual_size), values.get("name_label", ""), values.get("name_description", ""), "", "false", NO_TIME, "",
            "true" if read_only else "false",
        ]  # fmt: skip
        answer = await sr_command(
            call, SR, "vdi_create", args, vdi_type=values.get("type", "user"), vdi_sm_config=values.get("sm_config", {})
        )
        vdi = db.by_uuid("VDI", smapiv1.vdi_info(answer)[0])
        actual = db.get("VDI", vdi)["virtual_size"]
        if actual < virtual_size:
            raise XenError("SR_BACKEND_FAILURE", "Disk too small", str(virtual_size), str(actual))
        names = ("name_label", "name_description", "type", "sharable", "read_only", "other_config", "tags", "xenstore_data")
        db.set("VDI", vdi, **{name: values[name] for name in names if name in values})
        return vdi


@method("VDI.destroy", "vdi VDI ref")
async def destroy(call: Call, vdi: str) -> None:
    sr = call.db.get("VDI", vdi)["SR"]
    async with operations(call, ("SR", sr, "vdi_destroy"), ("VDI", vdi, "destroy")):
        require_managed(call, vdi)
        smapiv1.unit(await vdi_command(call, vdi, "vdi_delete"))
        _remove_row(call, vdi)


# Copies.


async def _snapshot_or_clone(call: Call, vdi: str, command: str, driver_params: dict[str, str]) -> str:
    db = call.db
    require_managed(call, vdi)
    started = now()
    _, location = smapiv1.vdi_info(await vdi_command(call, vdi, command, driver_params=driver_params))
    source = db.get("VDI", vdi)
    new = vdi_at(db, source["SR"], location)
    is_snapshot = command == "vdi_snapshot"
    copied = (
        "name_label name_description type sharable other_config xenstore_data on_boot allow_caching tags virtual_size".split()
    )
    db.set(
        "VDI", new, **{name: source[name] for name in copied}, read_only=False, managed=True, is_a_snapshot=is_snapshot,
        snapshot_of=vdi if is_snapshot else NULL, snapshot_time=started if is_snapshot else NO_TIME,
        cbt_enabled=source["cbt_enabled"] and is_snapshot,
    )  # fmt: skip
    try:
        smapiv1.unit(await vdi_command(call, new, "vdi_update"))
    except XenError as error:
        if error.xenapi_code != "UNIMPLEMENTED_IN_SM_BACKEND":
            raise
    return new


@method("VDI.snapshot", "vdi VDI ref; driver_params map =")
async def snapshot(call: Call, vdi: str, driver_params: dict[str, str]) -> str:
    sr = call.db.get("VDI", vdi)["SR"]
    async with operations(call, ("SR", sr, "vdi_snapshot"), ("VDI", vdi, "snapshot")):
        return await _snapshot_or_clone(call, vdi, "vdi_snapshot", driver_params)


@method("VDI.clone", "vdi VDI ref; driver_params map =")
async def clone(call: Call, vdi: str, driver_params: dict[str, str]) -> str:
    sr = call.db.get("VDI", vdi)["SR"]
    if "VDI_CLONE" in features_of(call.db, sr):
        async with operations(call, ("SR", sr, "vdi_clone"), ("VDI", vdi, "clone")):
            try:
                return await _snapshot_or_clone(call, vdi, "vdi_clone", driver_params)
            except XenError as error:
                if error.xenapi_code != "UNIMPLEMENTED_IN_SM_BACKEND":
                    raise
    from simsr.xapi.vdi_copy import copy

    return await copy(call, vdi, sr, NULL, NULL)


@method("VDI.revert", "snapshot VDI ref")
async def revert(call: Call, snapshot: str) -> None:
    """Give the disk that the snapshot was taken of the content of the snapshot."""
    db = call.db
    row = db.get("VDI", snapshot)
    sr, target = row["SR"], row["snapshot_of"]
    async with operations(call, ("SR", sr, "vdi_revert"), ("VDI", snapshot, "revert_to")):
        async with operations(call, ("VDI", target, "revert_from")):
            plugged_pbd(db, sr)
            require_managed(call, snapshot)
            # xapi's storage layer looks the target up by location and is given the uuid, so both must be the same.
            vdi_at(db, sr, db.get("VDI", target)["uuid"])
            smapiv1.unit(await vdi_command(call, snapshot, "vdi_revert", [target]))


# Changing.


async def _resize(call: Call, vdi: str, size: int, operation: str) -> None:
    row = call.db.get("VDI", vdi)
    async with operations(call, ("SR", row["SR"], "vdi_resize"), ("VDI", vdi, operation)):
        require_managed(call, vdi)
        smapiv1.vdi_info(await vdi_command(call, vdi, "vdi_resize", [str(size)]))


@method("VDI.resize", "vdi VDI ref; size int")
async def resize(call: Call, vdi: str, size: int) -> None:
    await _resize(call, vdi, size, "resize")


@method("VDI.resize_online", "vdi VDI ref; size int")
async def resize_online(call: Call, vdi: str, size: int) -> None:
    await _resize(call, vdi, size, "resize_online")


@method("VDI.update", "vdi VDI ref")
async def update(call: Call, vdi: str) -> None:
    async with operations(call, ("VDI", vdi, "update")):
        smapiv1.unit(await vdi_command(call, vdi, "vdi_update"))


async def _rename(call: Call, vdi: str, **names: str) -> None:
    call.db.set("VDI", vdi, **names)
    sr = call.db.get("VDI", vdi)["SR"]
    if "VDI_UPDATE" in features_of(call.db, sr):
        smapiv1.unit(await vdi_command(call, vdi, "vdi_update"))


@method("VDI.set_name_label", "self VDI ref; value string")
async def set_name_label(call: Call, vdi: str, value: str) -> None:
    await _rename(call, vdi, name_label=value)


@method("VDI.set_name_description", "self VDI ref; value string")
async def set_name_description(call: Call, vdi: str, value: str) -> None:
    await _rename(call, vdi, name_description=value)


@method("VDI.set_on_boot", "self VDI ref; value on_boot")
async def set_on_boot(call: Call, vdi: str, value: str) -> None:
    async with operations(call, ("SR", call.db.get("VDI", vdi)["SR"], "vdi_set_on_boot"), ("VDI", vdi, "set_on_boot")):
        call.db.set("VDI", vdi, on_boot=value)


@method("VDI.get_nbd_info", "self VDI ref")
def get_nbd_info(call: Call, vdi: str) -> list[dict[str, Any]]:
    """Where an attached VDI is served over NBD. xapi answers for networks with TLS only; here it is the unix socket."""
    call.db.get("VDI", vdi)
    found = []
    for vbd in call.db.pointing("VDI", "VBDs", vdi):
        place = call.db.get("VBD", vbd)["runtime_properties"].get("params_nbd", "")
        path, _, export = place.removeprefix("nbd:unix:").partition(":exportname=")
        if place:
            found.append(
                {
                    "uri": f"nbd+unix:///{export}?socket={path}",
                    "exportname": export,
                    "address": path,
                    "port": 0,
                    "cert": "",
                    "subject": "",
                }
            )
    return found


# Changed block tracking.


async def _cbt(call: Call, vdi: str, operation: str) -> None:
    row = call.db.get("VDI", vdi)
    async with operations(call, ("SR", row["SR"], f"vdi_{operation}"), ("VDI", vdi, operation)):
        if row["cbt_enabled"] == (operation == "enable_cbt"):
            return
        smapiv1.unit(await vdi_command(call, vdi, f"vdi_{operation}"))
        call.db.set("VDI", vdi, cbt_enabled=operation == "enable_cbt")


@method("VDI.enable_cbt", "self VDI ref")
async def enable_cbt(call: Call, vdi: str) -> None:
    await _cbt(call, vdi, "enable_cbt")


@method("VDI.disable_cbt", "self VDI ref")
async def disable_cbt(call: Call, vdi: str) -> None:
    await _cbt(call, vdi, "disable_cbt")


@method("VDI.data_destroy", "self VDI ref")
async def data_destroy(call: Call, vdi: str) -> None:
    db = call.db
    row = db.get("VDI", vdi)
    async with operations(call, ("SR", row["SR"], "vdi_data_destroy"), ("VDI", vdi, "data_destroy")):
        if row["type"] == "cbt_metadata":
            return
        if any(db.get("VBD", vbd)["currently_attached"] for vbd in db.pointing("VDI", "VBDs", vdi)):
            raise XenError("VDI_IN_USE", vdi, "data_destroy")
        with db.transaction():
            for vbd in db.pointing("VDI", "VBDs", vdi):
                db.delete("VBD", vbd)
        smapiv1.unit(await vdi_command(call, vdi, "vdi_data_destroy"))
        other_config = {**db.get("VDI", vdi)["other_config"], "content_id": CBT_METADATA_CONTENT_ID}
        db.set("VDI", vdi, type="cbt_metadata", other_config=other_config)


@method("VDI.list_changed_blocks", "vdi_from VDI ref; vdi_to VDI ref")
async def list_changed_blocks(call: Call, vdi_from: str, vdi_to: str) -> str:
    row = call.db.get("VDI", vdi_from)
    call.db.get("VDI", vdi_to)
    async with operations(call, ("SR", row["SR"], "vdi_list_changed_blocks"), ("VDI", vdi_from, "list_changed_blocks")):
        return smapiv1.text(await vdi_command(call, vdi_from, "vdi_list_changed_blocks", [vdi_to]))

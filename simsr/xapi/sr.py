"""Calls about SRs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from simsr.xapi import pbd, smapiv1
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.locks import operations
from simsr.xapi.registry import method
from simsr.xapi.storage import plugged_pbd, probe, sr_command

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["scan", "scan_automatically"]

log = logging.getLogger("simsr.xapi")


@method(
    "SR.create",
    "host host ref; device_config map; physical_size int; name_label string; name_description string; type string;"
    " content_type string; shared bool; sm_config map =",
)
async def create(
    call: Call, host: str, device_config: dict[str, str], physical_size: int, label: str, description: str, sr_type: str,
    content_type: str, shared: bool, sm_config: dict[str, str],
) -> str:  # fmt: skip
    db = call.db
    db.get("host", host)
    call.model.drivers.plugin(sr_type)
    with db.transaction():
        sr = db.create(
            "SR", name_label=label, name_description=description, type=sr_type.lower(), content_type=content_type,
            shared=shared, sm_config=sm_config, physical_size=physical_size,
        )  # fmt: skip
        connection = db.create("PBD", host=host, SR=sr, device_config=device_config)
    try:
        smapiv1.unit(await sr_command(call, sr, "sr_create", [str(physical_size)], device_config=device_config))
        await _plug_or_delete(call, sr, connection)
    except (XenError, Unimplemented):
        _remove_rows(call, sr)
        raise
    return sr


async def _plug_or_delete(call: Call, sr: str, connection: str) -> None:
    """Plug the PBD of an SR just made; if that fails, what sr_create has made goes as well."""
    try:
        await pbd.plug(call, connection)
    except (XenError, Unimplemented):
        try:
            await sr_command(call, sr, "sr_delete", device_config=call.db.get("PBD", connection)["device_config"])
        except (XenError, Unimplemented) as error:
            log.error("SR %s was made, could not be plugged, and its storage is left over: %s", sr, error)
        raise


def _remove_rows(call: Call, sr: str) -> None:
    db = call.db
    with db.transaction():
        for connection in db.pointing("SR", "PBDs", sr):
            db.delete("PBD", connection)
        for vdi in db.pointing("SR", "VDIs", sr):
            for vbd in db.pointing("VDI", "VBDs", vdi):
                db.delete("VBD", vbd)
            db.delete("VDI", vdi)
        db.delete("SR", sr)
    call.model.sessions.forget_sr(sr)


@method(
    "SR.introduce",
    "uuid string; name_label string; name_description string; type string; content_type string; shared bool; sm_config map =",
)
def introduce(
    call: Call, uuid: str, label: str, description: str, sr_type: str, content_type: str, shared: bool, sm_config: dict[str, str]
) -> str:
    call.model.drivers.plugin(sr_type)
    values: dict[str, Any] = {"uuid": uuid} if uuid else {}
    return call.db.create(
        "SR", name_label=label, name_description=description, type=sr_type.lower(), content_type=content_type, shared=shared,
        sm_config=sm_config, **values,
    )  # fmt: skip


@method("SR.probe", "host host ref; device_config map; type string; sm_config map =")
async def probe_srs(call: Call, host: str, device_config: dict[str, str], sr_type: str, sm_config: dict[str, str]) -> str:
    call.db.get("host", host)
    return await probe(call, sr_type, device_config, sm_config)


def _require_unplugged(call: Call, sr: str) -> None:
    if any(call.db.get("PBD", connection)["currently_attached"] for connection in call.db.pointing("SR", "PBDs", sr)):
        raise XenError("SR_HAS_PBD", sr)


@method("SR.forget", "sr SR ref")
async def forget(call: Call, sr: str) -> None:
    _require_unplugged(call, sr)
    async with operations(call, ("SR", sr, "forget")):
        _require_unplugged(call, sr)
        _remove_rows(call, sr)


@method("SR.destroy", "sr SR ref")
async def destroy(call: Call, sr: str) -> None:
    db = call.db
    _require_unplugged(call, sr)
    connections = db.pointing("SR", "PBDs", sr)
    if not connections:
        raise XenError("SR_HAS_NO_PBDS", sr)
    if any(db.get("VDI", vdi)["managed"] for vdi in db.pointing("SR", "VDIs", sr)):
        raise XenError("SR_NOT_EMPTY")
    device_config = db.get("PBD", connections[0])["device_config"]
    async with operations(call, ("SR", sr, "destroy")):
        smapiv1.unit(await sr_command(call, sr, "sr_attach", device_config=device_config))
        try:
            smapiv1.unit(await sr_command(call, sr, "sr_delete", device_config=device_config))
        except XenError:
            await sr_command(call, sr, "sr_detach", device_config=device_config)
            raise
        _remove_rows(call, sr)


@method("SR.scan", "sr SR ref")
async def scan(call: Call, sr: str) -> None:
    async with operations(call, ("SR", sr, "scan")):
        smapiv1.unit(await sr_command(call, sr, "sr_scan"))
        await _stat(call, sr)
        db = call.db
        other_config = {key: value for key, value in db.get("SR", sr)["other_config"].items() if key != "dirty"}
        allocation = sum(db.get("VDI", vdi)["virtual_size"] for vdi in db.pointing("SR", "VDIs", sr))
        db.set("SR", sr, virtual_allocation=allocation, other_config=other_config)


async def _stat(call: Call, sr: str) -> None:
    try:
        smapiv1.unit(await sr_command(call, sr, "sr_update"))
    except XenError as error:
        if error.xenapi_code != "SR_OPERATION_NOT_SUPPORTED":
            raise


@method("SR.update", "sr SR ref")
async def update(call: Call, sr: str) -> None:
    async with operations(call, ("SR", sr, "update")):
        smapiv1.unit(await sr_command(call, sr, "sr_update"))


@method("SR.set_shared", "sr SR ref; value bool")
def set_shared(call: Call, sr: str, value: bool) -> None:
    if not value and len(call.db.pointing("SR", "PBDs", sr)) > 1:
        raise XenError("SR_HAS_MULTIPLE_PBDS", sr)
    call.db.set("SR", sr, shared=value)


@method("SR.get_live_hosts", "sr SR ref")
def get_live_hosts(call: Call, sr: str) -> list[str]:
    call.db.get("SR", sr)
    try:
        return [call.db.get("PBD", plugged_pbd(call.db, sr))["host"]]
    except XenError:
        return []


async def scan_automatically(call: Call) -> None:
    """Scan the plugged SRs that ask for it; a failure is logged and tried again."""
    for sr, row in call.db.all("SR").items():
        wanted = row["other_config"].get("auto-scan") == "true" or "dirty" in row["other_config"]
        if wanted and get_live_hosts(call, sr):
            try:
                await scan(call, sr)
            except (XenError, Unimplemented) as error:
                log.warning("SR %s could not be scanned: %s", row["uuid"], error)

"""How the model reaches storage: the drivers that are installed, and their commands about an SR or a VDI.

Each command carries what xapi sends with it: the PBD's device_config with SRmaster, the session of the SR, the task, and the
VDI's reference, location and uuid. What 38 means depends on the command.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trio

from simsr.errors import SimsrError
from simsr.xapi import smapiv1
from simsr.xapi.database import Database
from simsr.xapi.failure import Unimplemented, XenError, internal_error
from simsr.xapi.schema import NULL
from simsr.xapi.xml_tree import Element

if TYPE_CHECKING:
    from simsr.xapi.model import Call, Model

__all__ = ["Drivers", "driver_directory", "sr_command", "vdi_command", "probe", "plugged_pbd", "vdi_at"]

log = logging.getLogger("simsr.xapi")

_SR_UNSUPPORTED = {"sr_create", "sr_delete", "sr_scan", "sr_update"}
_VDI_UNSUPPORTED = {
    "vdi_create", "vdi_delete", "vdi_introduce", "vdi_resize", "vdi_snapshot", "vdi_clone", "vdi_compose", "vdi_revert",
    "vdi_update", "vdi_enable_cbt", "vdi_disable_cbt", "vdi_data_destroy", "vdi_list_changed_blocks",
}  # fmt: skip
_ONE_AT_A_TIME = {"sr_attach", "sr_detach", "sr_probe"}


def driver_directory() -> str:
    """Return the directory of simsr's own plug-in."""
    import simsr

    return os.path.join(os.path.dirname(os.path.abspath(simsr.__file__)), "smapi")


class Drivers:
    """The SM plug-ins in one directory, asked once at the start as xapi does."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._plugins: dict[str, smapiv1.Plugin] = {}
        self.mount_lock = trio.Lock()

    def plugin(self, sr_type: str) -> smapiv1.Plugin:
        """Return the plug-in for SRs of this type. Raises SR_UNKNOWN_DRIVER."""
        try:
            return self._plugins[sr_type.lower()]
        except KeyError:
            raise XenError("SR_UNKNOWN_DRIVER", sr_type) from None

    async def query_all(self) -> None:
        """Ask every accepted plug-in what it can do, and bring the SM objects in step."""
        for name, path in self._accepted():
            plugin = smapiv1.Plugin(path)
            command = "sr_get_driver_info"
            members = {"host_ref": self._model.internal_call().host, "command": command, "args": [], "device_config": {}}
            try:
                info = smapiv1.driver_info(await plugin.run(command, members))
            except (SimsrError, Unimplemented) as error:
                log.error("plug-in %s is not used: %s", path, error)
                continue
            self.add(name.lower(), plugin, info)
        self._forget_unused()

    def add(self, sr_type: str, plugin: smapiv1.Plugin, info: smapiv1.DriverInfo) -> None:
        """Use ``plugin`` for SRs of this type."""
        self._plugins[sr_type] = plugin
        self._record(sr_type, plugin.path, info)

    def _accepted(self) -> list[tuple[str, str]]:
        directory = self._model.settings.sm_directory
        wanted = self._model.settings.sm_plugins.lower().split()
        found = []
        for entry in sorted(os.listdir(directory)):
            path = os.path.join(directory, entry)
            if not entry.endswith("SR") or entry == "SR" or not os.path.isfile(path):
                continue
            name = entry.removesuffix("SR")
            if "*" not in wanted and name.lower() not in wanted:
                log.info("plug-in %s is not in the list of those wanted", path)
            elif not os.access(path, os.X_OK):
                log.error("plug-in %s is not used: it cannot be executed", path)
            else:
                found.append((name, path))
        return found

    def _record(self, sr_type: str, path: str, info: smapiv1.DriverInfo) -> None:
        db = self._model.db
        values: dict[str, Any] = {
            "name_label": info.name, "name_description": info.description, "vendor": info.vendor, "copyright": info.copyright,
            "version": info.driver_version, "required_api_version": info.required_api_version, "driver_filename": path,
            "features": info.features, "capabilities": list(info.features), "configuration": info.configuration,
        }  # fmt: skip
        for ref, row in db.all("SM").items():
            if row["type"] == sr_type:
                return db.set("SM", ref, **values)
        db.create("SM", type=sr_type, **values)

    def _forget_unused(self) -> None:
        db = self._model.db
        used = {row["type"] for row in db.all("SR").values()}
        for ref, row in db.all("SM").items():
            if row["type"] not in self._plugins and row["type"] not in used:
                db.delete("SM", ref)


def plugged_pbd(db: Database, sr: str) -> str:
    """Return the plugged PBD of the SR. Raises SR_HAS_NO_PBDS."""
    for pbd in db.pointing("SR", "PBDs", sr):
        if db.get("PBD", pbd)["currently_attached"]:
            return pbd
    raise XenError("SR_HAS_NO_PBDS", sr)


def vdi_at(db: Database, sr: str, location: str) -> str:
    """Return the VDI at ``location`` of the SR, which must be there."""
    for vdi in db.pointing("SR", "VDIs", sr):
        if db.get("VDI", vdi)["location"] == location:
            return vdi
    raise internal_error(f"there is no VDI with location {location} in SR {sr}")


async def sr_command(
    call: Call, sr: str, command: str, args: Sequence[str] = (), *, device_config: dict[str, str] | None = None, **members: Any
) -> Element:
    """Run a command about an SR. ``device_config`` defaults to that of the plugged PBD."""
    db = call.db
    row = db.get("SR", sr)
    if device_config is None:
        device_config = db.get("PBD", plugged_pbd(db, sr))["device_config"]
    # The order in which xapi sends the members. What is None is left out.
    sent: dict[str, Any] = {
        "host_ref": call.host,
        "command": command,
        "args": list(args),
        "device_config": {**device_config, "SRmaster": "true"},
        "session_ref": call.model.sessions.for_sr(sr),
        "sr_ref": sr,
        "vdi_type": members.get("vdi_type"),
        "sr_uuid": row["uuid"],
        **{
            name: members.get(name)
            for name in ("vdi_ref", "vdi_location", "vdi_uuid", "driver_params", "vdi_sm_config", "new_uuid")
        },
        "subtask_of": call.task,
        "vdi_on_boot": members.get("vdi_on_boot"),
        "vdi_allow_caching": members.get("vdi_allow_caching"),
    }
    plugin = call.model.drivers.plugin(row["type"])
    sent = {name: value for name, value in sent.items() if value is not None}
    try:
        if command in _ONE_AT_A_TIME:
            async with call.model.drivers.mount_lock:
                return await plugin.run(command, sent)
        return await plugin.run(command, sent)
    except Unimplemented:
        if command in _SR_UNSUPPORTED:
            raise XenError("SR_OPERATION_NOT_SUPPORTED", sr) from None
        if command in _VDI_UNSUPPORTED:
            raise XenError("UNIMPLEMENTED_IN_SM_BACKEND", sr) from None
        raise


async def vdi_command(call: Call, vdi: str, command: str, args: Sequence[str] = (), **members: Any) -> Element:
    """Run a command about a VDI that exists."""
    row = call.db.get("VDI", vdi)
    return await sr_command(
        call,
        row["SR"],
        command,
        args,
        vdi_ref=vdi,
        vdi_location=row["location"],
        vdi_uuid=row["uuid"],
        vdi_on_boot=row["on_boot"],
        vdi_allow_caching="true" if row["allow_caching"] else "false",
        **members,
    )


async def probe(call: Call, sr_type: str, device_config: dict[str, str], sm_config: dict[str, str]) -> str:
    """Return the document that a driver's sr_probe answers with."""
    plugin = call.model.drivers.plugin(sr_type)
    features: dict[str, int] = next((row["features"] for row in call.db.all("SM").values() if row["type"] == sr_type.lower()), {})
    if "SR_PROBE" not in features:
        raise XenError("SR_BACKEND_FAILURE", "sr_probe", f"driver {sr_type} does not support it", "")
    sent = {
        "host_ref": call.host, "command": "sr_probe", "args": [], "device_config": {**device_config, "SRmaster": "true"},
        "session_ref": call.model.sessions.for_sr(NULL), "sr_sm_config": sm_config, "subtask_of": call.task,
    }  # fmt: skip
    async with call.model.drivers.mount_lock:
        return smapiv1.text(await plugin.run("sr_probe", sent))

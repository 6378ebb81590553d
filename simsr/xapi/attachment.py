"""Attaching and detaching: what happens below a VBD, for VM.start, VBD.plug and their opposites.

Theory. A VDI is attached to the host once, however many VBDs use it; the first one attaches and activates, the last one
deactivates and detaches. ``currently_attached`` does not say that there is an attachment: a suspended VM keeps it set for its
resume, and the VBDs of a checkpoint for theirs. ``storage_lock`` says it here: set before the plug-in is asked to attach,
cleared when it has detached. So after a crash `settle` finds every attachment that should not be.
"""

from __future__ import annotations

import logging
import uuid as uuid_module
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from simsr.xapi import smapiv1
from simsr.xapi.checks import features_of
from simsr.xapi.database import Database
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.schema import NULL
from simsr.xapi.storage import vdi_command

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["attach", "detach", "borrowed", "settle", "users", "epoch"]

log = logging.getLogger("simsr.xapi")

_BORROWED = {"borrowed": "for a copy"}


def users(db: Database, vdi: str, *, but: str = "") -> list[str]:
    """Return the VBDs other than ``but`` through which the VDI is attached."""
    return [vbd for vbd in db.pointing("VDI", "VBDs", vdi) if vbd != but and db.get("VBD", vbd)["storage_lock"]]


async def epoch(call: Call, vdi: str, which: str) -> None:
    """Tell the driver that a VM begins or ends using the VDI: ``which`` is begin or end."""
    smapiv1.unit(await vdi_command(call, vdi, f"vdi_epoch_{which}"))


async def attach(call: Call, vbd: str) -> None:
    """Make the VBD's VDI usable on the host. Raises VDI_IN_USE if somebody else's use excludes it."""
    db = call.db
    row = db.get("VBD", vbd)
    vdi = row["VDI"]
    if row["empty"] or vdi == NULL:
        db.set("VBD", vbd, currently_attached=True)
        return
    async with call.model.attach_locks[vdi]:
        await _attach_first_or_join(call, vbd, vdi)


async def _attach_first_or_join(call: Call, vbd: str, vdi: str) -> None:
    db = call.db
    row = db.get("VBD", vbd)
    others = users(db, vdi, but=vbd)
    writes = row["mode"] == "RW" or any(db.get("VBD", other)["mode"] == "RW" for other in others)
    if others and writes and not db.get("VDI", vdi)["sharable"]:
        raise XenError("VDI_IN_USE", vdi, "attach")
    # Set before the plug-in runs: from now on the VBD is reserved, and the checks of other operations see it.
    db.set("VBD", vbd, storage_lock=True)
    try:
        if others:
            properties = db.get("VBD", others[0])["runtime_properties"]
        else:
            info = await _attach_vdi(call, vdi, writable=row["mode"] == "RW")
            properties = {"params_nbd": info.params_nbd} | ({"params": info.params} if info.params else {})
    except BaseException:
        if db.has("VBD", vbd):
            db.set("VBD", vbd, storage_lock=False)
        raise
    db.set("VBD", vbd, currently_attached=True, runtime_properties=properties)


async def detach(call: Call, vbd: str, *, keep_flag: bool = False) -> None:
    """Undo `attach`. ``keep_flag``: the VM is suspended and its resume must find the VBD again."""
    db = call.db
    row = db.get("VBD", vbd)
    async with call.model.attach_locks[row["VDI"]]:
        if row["storage_lock"] and row["VDI"] != NULL and not users(db, row["VDI"], but=vbd):
            await _detach_vdi(call, row["VDI"], wrote=row["mode"] == "RW")
        if db.has("VBD", vbd):
            db.set("VBD", vbd, currently_attached=keep_flag, storage_lock=False, runtime_properties={})


@asynccontextmanager
async def borrowed(call: Call, vdi: str, *, writable: bool) -> AsyncIterator[str]:
    """Attach the VDI to the control domain for a while, through a VBD as xapi does; yields where its data is."""
    db = call.db
    domain = db.get("host", call.host)["control_domain"]
    vbd = db.create("VBD", VM=domain, VDI=vdi, mode="RW" if writable else "RO", userdevice="autodetect", other_config=_BORROWED)
    try:
        await attach(call, vbd)
        try:
            yield _place(db.get("VBD", vbd)["runtime_properties"])
        finally:
            await detach(call, vbd)
    finally:
        if db.has("VBD", vbd):
            db.delete("VBD", vbd)


async def settle(call: Call) -> None:
    """Set right what a killed server left half attached.

    What was begun, is borrowed, or is of a VM that does not run is detached. A VM that runs gets back what a suspend let go of.
    """
    db = call.db
    for vbd, row in db.all("VBD").items():
        vm = db.get("VM", row["VM"]) if db.has("VM", row["VM"]) else None
        state = vm["power_state"] if vm else "Halted"
        is_borrowed = row["other_config"] == _BORROWED
        is_wanted = row["currently_attached"] and state in ("Running", "Paused") and row["VDI"] != NULL and not is_borrowed
        if row["storage_lock"] == is_wanted:
            continue
        try:
            if is_wanted:
                await attach(call, vbd)
            else:
                await detach(call, vbd, keep_flag=state == "Suspended")
        except (XenError, Unimplemented) as error:
            log.error("VBD %s was left half attached and stays so: %s", row["uuid"], error)
        else:
            if is_borrowed:
                db.delete("VBD", vbd)


def _place(properties: dict[str, str]) -> str:
    nbd = properties.get("params_nbd", "")
    if not nbd:
        return properties.get("params", "")
    path, _, export = nbd.removeprefix("nbd:unix:").partition(":exportname=")
    return f"nbd+unix:///{export}?socket={path}"


async def _attach_vdi(call: Call, vdi: str, *, writable: bool) -> smapiv1.AttachInfo:
    db = call.db
    word = "true" if writable else "false"
    info = smapiv1.attach_info(await vdi_command(call, vdi, "vdi_attach", [word]))
    host = db.get("host", call.host)["uuid"]
    caching = {f"read-caching-enabled-on-{host}": "false" if info.o_direct else "true"}
    if info.o_direct and info.o_direct_reason:
        caching[f"read-caching-reason-{host}"] = info.o_direct_reason
    db.set("VDI", vdi, sm_config={**db.get("VDI", vdi)["sm_config"], **caching})
    if "VDI_ACTIVATE" in features_of(db, db.get("VDI", vdi)["SR"]):
        try:
            smapiv1.unit(await vdi_command(call, vdi, "vdi_activate", [word]))
        except (XenError, Unimplemented):
            await vdi_command(call, vdi, "vdi_detach")
            raise
    if writable:
        other_config = {key: value for key, value in db.get("VDI", vdi)["other_config"].items() if key != "content_id"}
        db.set("VDI", vdi, other_config=other_config)
    return info


async def _detach_vdi(call: Call, vdi: str, *, wrote: bool) -> None:
    db = call.db
    if "VDI_DEACTIVATE" in features_of(db, db.get("VDI", vdi)["SR"]):
        smapiv1.unit(await vdi_command(call, vdi, "vdi_deactivate"))
    smapiv1.unit(await vdi_command(call, vdi, "vdi_detach"))
    row = db.get("VDI", vdi)
    sm_config = {key: value for key, value in row["sm_config"].items() if not key.startswith("read-caching-")}
    other_config = dict(row["other_config"])
    if wrote:
        other_config.setdefault("content_id", str(uuid_module.uuid4()))
    db.set("VDI", vdi, sm_config=sm_config, other_config=other_config)

"""Calls that change the power state of a VM, and with it which VDIs are attached.

No guest runs: a VM that is Running is a VM whose disks are attached. A state is written when the storage has followed; what fails
half-way is undone, so a VM is never half started.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from simsr.xapi import attachment
from simsr.xapi.database import Database
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.locks import operations
from simsr.xapi.registry import method
from simsr.xapi.schema import NULL, now
from simsr.xapi.vdi import create_vdi, destroy

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["halt", "suspend_vm", "resume_vm", "vbds_in_order"]

log = logging.getLogger("simsr.xapi")
SUSPEND_IMAGE_MIN_BYTES = 64 * 2**20


def vbds_in_order(db: Database, vm: str) -> list[str]:
    """Return the VBDs of the VM in the order of their devices."""

    def place(vbd: str) -> tuple[int, str]:
        device = db.get("VBD", vbd)["userdevice"]
        return (int(device) if device.isascii() and device.isdigit() else 1000, device)

    return sorted(db.pointing("VM", "VBDs", vm), key=place)


def _disks(db: Database, vbds: list[str]) -> list[str]:
    return [db.get("VBD", vbd)["VDI"] for vbd in vbds if db.get("VBD", vbd)["type"] == "Disk" and not db.get("VBD", vbd)["empty"]]


async def _attach_all(call: Call, vm: str, vbds: list[str], *, begin_epoch: bool) -> None:
    """Attach these VBDs, all or none."""
    db = call.db
    done: list[str] = []
    try:
        if begin_epoch:
            for vdi in _disks(db, vbds):
                await attachment.epoch(call, vdi, "begin")
        for vbd in vbds:
            async with operations(call, ("VBD", vbd, "attach")):
                await attachment.attach(call, vbd)
            done.append(vbd)
    except (XenError, Unimplemented):
        for vbd in reversed(done):
            await _detach_quietly(call, vbd, keep_flag=db.get("VM", vm)["power_state"] == "Suspended")
        raise


async def _detach_quietly(call: Call, vbd: str, *, keep_flag: bool) -> None:
    try:
        await attachment.detach(call, vbd, keep_flag=keep_flag)
    except (XenError, Unimplemented) as error:
        log.error("VBD %s stays attached: %s", vbd, error)


def _now_live(call: Call, vm: str, *, paused: bool) -> None:
    db = call.db
    domid = max((row["domid"] for row in db.all("VM").values()), default=0) + 1
    with db.transaction():
        db.set("VM", vm, power_state="Paused" if paused else "Running", resident_on=call.host, domid=domid)
        metrics = db.get("VM", vm)["metrics"]
        if db.has("VM_metrics", metrics):
            db.set("VM_metrics", metrics, start_time=now(), last_updated=now(), state=["paused" if paused else "running"])


@method("VM.start", "vm VM ref; start_paused bool; force bool")
async def start(call: Call, vm: str, paused: bool, force: bool) -> None:
    async with operations(call, ("VM", vm, "start")):
        await _attach_all(call, vm, vbds_in_order(call.db, vm), begin_epoch=True)
        _now_live(call, vm, paused=paused)


@method("VM.start_on", "vm VM ref; host host ref; start_paused bool; force bool")
async def start_on(call: Call, vm: str, host: str, paused: bool, force: bool) -> None:
    call.db.get("host", host)
    await start(call, vm, paused, force)


async def halt(call: Call, vm: str) -> None:
    """Bring a VM to Halted from wherever it is; a suspend image is destroyed."""
    db = call.db
    row = db.get("VM", vm)
    vbds = vbds_in_order(db, vm)
    if row["power_state"] != "Suspended":
        for vbd in vbds:
            await attachment.detach(call, vbd)
        for vdi in _disks(db, vbds):
            await attachment.epoch(call, vdi, "end")
    image = row["suspend_VDI"]
    with db.transaction():
        for vbd in vbds:
            db.set("VBD", vbd, currently_attached=False)
        db.set("VM", vm, power_state="Halted", resident_on=NULL, domid=-1, suspend_VDI=NULL)
    if db.has("VDI", image):
        await destroy(call, image)


@method("VM.clean_shutdown", "vm VM ref")
async def clean_shutdown(call: Call, vm: str) -> None:
    async with operations(call, ("VM", vm, "clean_shutdown")):
        await halt(call, vm)


@method("VM.hard_shutdown", "vm VM ref")
async def hard_shutdown(call: Call, vm: str) -> None:
    async with operations(call, ("VM", vm, "hard_shutdown")):
        await halt(call, vm)


@method("VM.shutdown", "vm VM ref")
async def shutdown(call: Call, vm: str) -> None:
    await clean_shutdown(call, vm)


@method("VM.pause", "vm VM ref")
async def pause(call: Call, vm: str) -> None:
    async with operations(call, ("VM", vm, "pause")):
        call.db.set("VM", vm, power_state="Paused")


@method("VM.unpause", "vm VM ref")
async def unpause(call: Call, vm: str) -> None:
    async with operations(call, ("VM", vm, "unpause")):
        call.db.set("VM", vm, power_state="Running")


def _suspend_sr(call: Call, vm: str) -> str:
    db = call.db
    pool = next(iter(db.all("pool").values()))
    wanted = (
        db.get("VM", vm)["suspend_SR"],
        pool["suspend_image_SR"],
        db.get("host", call.host)["suspend_image_sr"],
        pool["default_SR"],
    )
    for sr in wanted:
        if db.has("SR", sr):
            return sr
    raise XenError("VM_NO_SUSPEND_SR", vm)


async def suspend_vm(call: Call, vm: str) -> None:
    """Make the suspend image, let go of the disks; their VBDs stay marked for the resume."""
    db = call.db
    row = db.get("VM", vm)
    size = max(row["memory_static_max"], SUSPEND_IMAGE_MIN_BYTES)
    image = await create_vdi(
        call, SR=_suspend_sr(call, vm), virtual_size=size, type="suspend", name_label="Suspend image",
        name_description=f"Suspend image of VM {row['uuid']}",
    )  # fmt: skip
    vbds = [vbd for vbd in vbds_in_order(db, vm) if db.get("VBD", vbd)["currently_attached"]]
    try:
        for vbd in vbds:
            await attachment.detach(call, vbd, keep_flag=True)
    except (XenError, Unimplemented):
        await _attach_again(call, vbds, image)
        raise
    db.set("VM", vm, power_state="Suspended", suspend_VDI=image, resident_on=NULL, domid=-1)


async def _attach_again(call: Call, vbds: list[str], image: str) -> None:
    """Undo a suspend that failed, as far as the storage lets us."""
    try:
        for vbd in vbds:
            if not call.db.get("VBD", vbd)["storage_lock"]:
                await attachment.attach(call, vbd)
        await destroy(call.for_clearing_up(), image)
    except (XenError, Unimplemented) as error:
        log.error("a suspend that failed could not be undone: %s", error)


async def resume_vm(call: Call, vm: str, *, paused: bool) -> None:
    """Attach the VBDs that are marked, and only these; destroy the suspend image."""
    db = call.db
    image = db.get("VM", vm)["suspend_VDI"]
    vbds = [vbd for vbd in vbds_in_order(db, vm) if db.get("VBD", vbd)["currently_attached"]]
    await _attach_all(call, vm, vbds, begin_epoch=False)
    with db.transaction():
        _now_live(call, vm, paused=paused)
        db.set("VM", vm, suspend_VDI=NULL)
    if db.has("VDI", image):
        await destroy(call, image)


@method("VM.suspend", "vm VM ref")
async def suspend(call: Call, vm: str) -> None:
    async with operations(call, ("VM", vm, "suspend")):
        await suspend_vm(call, vm)


@method("VM.resume", "vm VM ref; start_paused bool; force bool")
async def resume(call: Call, vm: str, paused: bool, force: bool) -> None:
    async with operations(call, ("VM", vm, "resume")):
        await resume_vm(call, vm, paused=paused)


@method("VM.resume_on", "vm VM ref; host host ref; start_paused bool; force bool")
async def resume_on(call: Call, vm: str, host: str, paused: bool, force: bool) -> None:
    call.db.get("host", host)
    await resume(call, vm, paused, force)

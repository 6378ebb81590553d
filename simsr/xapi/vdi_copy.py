"""VDI.copy: a full copy, also into another SR. The one place where the model moves data itself.

Both VDIs are attached through their plug-ins and qemu-img copies from what one attach answer names to what the other names.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from simsr.xapi import attachment
from simsr.xapi.failure import XenError, internal_error
from simsr.xapi.locks import operations
from simsr.xapi.registry import method
from simsr.xapi.schema import NULL
from simsr.xapi.vdi import create_vdi, destroy

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["copy"]


@method("VDI.copy", "vdi VDI ref; sr SR ref =; base_vdi VDI ref =; into_vdi VDI ref =")
async def copy(call: Call, vdi: str, sr: str, base_vdi: str, into_vdi: str) -> str:
    db = call.db
    source = db.get("VDI", vdi)
    if base_vdi != NULL:
        raise XenError("VALUE_NOT_SUPPORTED", "base_vdi", base_vdi, "differences only are not copied; leave it null")
    if into_vdi != NULL and db.get("VDI", into_vdi)["virtual_size"] < source["virtual_size"]:
        raise XenError("VALUE_NOT_SUPPORTED", "into_vdi", into_vdi, "it is smaller than the VDI to be copied")
    async with operations(call, ("VDI", vdi, "copy")):
        target = into_vdi
        if into_vdi == NULL:
            names = ("name_label", "name_description", "type", "other_config", "xenstore_data", "tags", "virtual_size")
            target = await create_vdi(call, SR=source["SR"] if sr == NULL else sr, **{name: source[name] for name in names})
        try:
            async with _open(call, vdi, writable=False) as from_place, _open(call, target, writable=True) as to_place:
                await _copy_data(from_place, to_place)
        except BaseException:
            if into_vdi == NULL:
                with trio.CancelScope(shield=True):
                    await destroy(call.for_clearing_up(), target)
            raise
    call.progress(1.0)
    return target


@asynccontextmanager
async def _open(call: Call, vdi: str, *, writable: bool) -> AsyncIterator[str]:
    """Yield a name of the VDI's data that qemu-img understands, attached for us if nobody has it attached."""
    async with attachment.borrowed(call, vdi, writable=writable) as place:
        yield place


async def _copy_data(from_place: str, to_place: str) -> None:
    command = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", from_place, to_place]
    try:
        done = await trio.run_process(command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False)
    except FileNotFoundError:
        raise internal_error("qemu-img is not installed, and copying needs it") from None
    if done.returncode:
        raise internal_error(f"the data could not be copied: {done.stderr.decode(errors='replace').strip()[-500:]}")

"""Carrying out reverts while clients come and go: waiting for those that leave, or, for tests, taking a disk back below them.

A disk that is attached is not reverted, unless one of the live modes is asked for. Then its gate is closed, what was under way ends, the log is
flushed, the content is swapped, and the gate opens:

    hang         requests wait, and go on with the new content
    disconnect   connections are closed; who connects anew gets the new content
    error        requests fail with EIO until the client opens the disk anew; files that only read go on with the new content

No guest expects any of this: what it has cached is wrong afterwards. It is for tests of what does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from simsr.daemon.gate import Gate
from simsr.daemon.host import Host, Mounted
from simsr.errors import VdiInUse, WouldLose
from simsr.sr.history import Reverted, Wish

__all__ = ["Reverting", "HANG", "DISCONNECT", "ERROR", "LIVE_MODES"]

HANG, DISCONNECT, ERROR = LIVE_MODES = ("hang", "disconnect", "error")
_LEAVE_TIMEOUT_S = 30.0

log = logging.getLogger("simsr.revert")


class Reverting:
    """Carries out wishes on the disks of a host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def carry_out(
        self, mounted: Mounted, wishes: Sequence[Wish], *, live: str | None = None, live_ms: int = 0, op_id: str | None = None,
        expected: Mapping[str, int] | None = None, may_lose: bool = True,
    ) -> list[Reverted]:  # fmt: skip
        """Do it and make it durable. ``live_ms``: for how long requests wait or fail at least. Raises what `History.carry_out` does,
        and `WouldLose` unless ``may_lose``."""
        history, disks = mounted.repository.history, [wish.disk for wish in wishes]

        def act(is_live: bool = False) -> list[Reverted]:
            if not may_lose:
                refuse_loss(history.plan(wishes))
            return history.carry_out(wishes, live=is_live, op_id=op_id, expected=expected)

        if live is None:
            results = await self._host.when_unused(disks[0], act, *disks[1:])
        else:
            history.plan(wishes)  # what cannot be is refused before anybody is disturbed
            async with self._held(mounted, wishes, live):
                await mounted.engine.durable()
                results = act(True)
                await mounted.engine.durable()
                await trio.sleep(live_ms / 1000)
        await mounted.engine.flush()  # and mounts let go of what was before; with the gate closed they would wait for ever
        mounted.engine.wake()
        return results

    @asynccontextmanager
    async def _held(self, mounted: Mounted, wishes: Sequence[Wish], live: str) -> AsyncIterator[None]:
        """Keep everybody from the disks. Raises `VdiInUse` if that takes too long, with everything as before."""
        engine, vdis = mounted.engine, [wish.disk for wish in wishes]
        for vdi in vdis:
            if vdi.volume in engine.gates:
                raise VdiInUse(operation="revert", uuid=vdi.uuid, by="another revert")
            if vdi.attachments:
                log.warning("VDI %s is being reverted below %s, who do not know", vdi.uuid, vdi.used_by)
        gate = Gate(failing=live == ERROR, barred=live == DISCONNECT)
        for vdi in vdis:
            engine.gates[vdi.volume] = gate
        try:
            disks = [disk for vdi in vdis for disk in engine.disks.get(vdi.volume, ()) if not disk.is_spoiled]
            gate.close(disks)
            with trio.move_on_after(_LEAVE_TIMEOUT_S) as scope:
                if live == DISCONNECT:
                    for vdi in vdis:
                        self._host.nbd_exports.hang_up(vdi, "the disk is being reverted")
                        while any(attachment.kind == "nbd" for attachment in vdi.attachments.values()):
                            await trio.sleep(0.001)
                await gate.emptied()
            if scope.cancelled_caught:
                raise VdiInUse(operation="revert", uuid=vdis[0].uuid, by=", ".join(vdi.used_by for vdi in vdis))
            yield
            if live == ERROR:
                gate.spoil(disk for disk in disks if disk.may_cache)
        finally:
            for vdi in vdis:
                del engine.gates[vdi.volume]
            gate.open()


def refuse_loss(plans: Sequence[Reverted]) -> None:
    """Raise `WouldLose` if a plan has nodes go, or what a head is."""
    for plan in plans:
        if plan.removed or plan.lost:
            nodes = f"{len(plan.removed)} of its snapshots and tips" if plan.removed else ""
            head = "what the disk holds and no snapshot does" if plan.lost else ""
            raise WouldLose(operation=plan.mode, uuid=plan.vdi.uuid, what=" and ".join(filter(None, (nodes, head))))

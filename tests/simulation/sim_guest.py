"""The guests of the simulation: each uses one disk or snapshot after the other, over NBD or as a file."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from sim_client import Gone, NbdSession
from sim_fuse import FuseSession
from sim_machine import Failure

if TYPE_CHECKING:
    from sim_world import World

__all__ = ["guest"]


async def guest(world: World, rng: random.Random, name: str) -> None:
    """Connects to one disk after the other, for ever."""
    number = 0
    while True:
        await world.think(rng.choice((0.001, 0.1, 2.0)) * rng.random())
        known = [disk for disk in world.disks.values() if not disk.is_tip and not disk.is_destroyed]
        if not known:
            await world.think(1)
            continue
        disk = rng.choice(known)
        number += 1
        session = (FuseSession if rng.random() < 0.2 else NbdSession)(world, disk, rng, f"{name}.{number}")
        world.sessions[session] = None
        issue = world.tick()
        try:
            await session.open()
            world.note(f"{session.name} connected to {disk.uuid[:8]} ({session.style}, {session.sectors} sectors)")
            await session.work()
            await session.close(in_order=rng.random() < 0.7)
        except Gone as gone:
            session.lost()
            if session.sectors == 0 and not world.may_be_refused(disk, issue):
                raise Failure(f"{name}: a use of {disk.uuid} ({session.style}) was refused without a reason: {gone}") from None
        finally:
            session.abandon()
            world.sessions.pop(session, None)

"""The administrator of the simulation: which of all actions is taken next, and the program that backs disks up."""

from __future__ import annotations

from sim_model import Disk
from sim_xapi import Xapi

__all__ = ["Administrator"]

DISKS_MAX = 7


class Administrator(Xapi):
    """`run` does one thing after the other, for ever; `back_up` as well."""

    async def run(self) -> None:
        rng, world = self._rng, self.world
        while True:
            await world.think(rng.choice((0, 0.01, 0.5, 5)) * rng.random())
            disks = [disk for disk in world.disks.values() if disk.of is None]
            if not disks or len(disks) < DISKS_MAX and rng.random() < 0.08:
                await self._create()
            elif rng.random() < 0.3:
                await rng.choice((self._snapshot_together, self._revert_together, self._take_back_together))()
            else:
                disk = rng.choice(list(world.disks.values()))
                async with world.locked(disk.family):
                    if disk.uuid in world.disks:
                        await self._one(disk)

    async def back_up(self, period_s: float) -> None:
        """One disk after the other, once in a while."""
        world = self.world
        while True:
            await world.think(period_s * self._rng.random())
            disks = [disk for disk in world.disks.values() if disk.of is None]
            if disks:
                disk = self._rng.choice(disks)
                async with world.locked(disk.family):
                    if disk.uuid in world.disks:
                        await self._back_up(disk)

    async def _one(self, disk: Disk) -> None:
        rng = self._rng
        crowded = len(self.world.disks) > self.world.crowd
        if disk.is_tip:
            choices = [(4, self._follow), (1, self._pin), (2, self._delete), (2, self._clone)]
        elif disk.of is not None:
            choices = [
                (8, self._reset), (4, self._commit), (2, self._clone), (6 if crowded else 1, self._delete), (1 if disk.chain else 0.1, self._destroy),
                (6 if disk.hosts else 0.3, self._detach if disk.hosts else self._attach),
            ]  # fmt: skip
        else:
            choices = [
                (0 if crowded else 8, self._snapshot), (0 if crowded else 2, self._clone), (4, self._undo), (3, self._redo), (2, self._resize),
                (3 if crowded else 0.5, self._delete), (1, self._compose), (1, self._walk), (12 if disk.hosts else 0, self._detach),
                (1, self._attach), (1 if disk.base is None else 0.5, self._set_on_boot), (0 if disk.base is None else 5, self._begin_epoch),
                (1.5 if disk.chain is None else 0.3, self._set_cbt), (2, self._list_changed),
            ]  # fmt: skip
        weights, methods = zip(*choices)
        await rng.choices(methods, weights)[0](disk)

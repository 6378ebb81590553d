"""Judgement: after each start everything is read, what became of what was under way is found out, and all of it is held against the model."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
from sim_client import NbdSession
from sim_machine import Failure
from sim_model import Content, Disk

if TYPE_CHECKING:
    from sim_world import World

    from simsr.sr.repository import Repository
    from simsr.sr.vdi import Vdi

__all__ = ["Judge"]

EXPIRY_S = 130
"""Tips that are too old are looked for once a minute."""


class Judge:
    """Of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._tips_since_s: dict[str, dict[str, float]] = {}  # SR -> its tips -> since when each has been there, this time

    async def examine(self) -> None:
        """Read everything, decide what became of what was under way, and hold all of it against the model. Raises `Failure`."""
        found = await self._read_all()
        for mounted in self.world.host.mounted.values():
            mounted.repository.store._check()
        self._resolve()
        self.check_list()
        for sr in self.world.srs:
            self._judge(sr, {uuid: values for uuid, values in found.items() if uuid in self.world.disks and self.world.disks[uuid].sr == sr})
        self.world.note(f"examined: {len(found)} VDIs")

    async def _read_all(self) -> dict[str, list[int | None]]:
        found: dict[str, list[int | None]] = {}
        for sr in self.world.srs:
            vdis = self._vdis(self._repository(sr))
            for uuid in sorted(uuid for uuid, vdi in vdis.items() if vdi.has_data):
                disk = self.world.disks.get(uuid) or Disk(uuid, Content([]), "", sr=sr)
                session = NbdSession(self.world, disk, random.Random(self.world.seed), "examiner")
                await session.open()
                if uuid not in self.world.disks:
                    session.sectors = vdis[uuid].size_bytes // 512
                try:
                    found[uuid] = await session.read_all()
                except OSError as error:
                    raise Failure(f"after the start {error}") from error
                await session.close(in_order=True)
        return found

    def _repository(self, sr: str) -> Repository:
        return self.world.mounted(sr).repository

    @staticmethod
    def _vdis(repository: Repository) -> dict[str, Vdi]:
        return {**repository.vdis, **repository.tips}

    def _resolve(self) -> None:
        """Find out which operations happened that were never answered."""
        world = self.world
        for op in world.ops:
            happened = op.happened()
            world.note(f"{op}, issued {op.issue}: {('happened' if op.is_evident else 'may have happened') if happened else 'did not happen'}")
            if happened:
                op.apply(op.issue, None)
                if op.is_evident:
                    world.is_durable(op.sr, op.issue)
        world.ops.clear()

    # What there is.

    def may_go(self, tip: Disk) -> bool:
        """Whether a tip may go by itself: for space, because it is old, or because there are too many; or has gone."""
        world = self.world
        if tip.uuid not in world.disks:
            return True
        sr = world.srs[tip.sr]
        tips = [one.uuid for one in world.disks.values() if one.is_tip and one.of == tip.of]  # in the order in which they were made
        younger = sum(world.born_s[one] >= world.born_s[tip.uuid] for one in tips)
        too_many = max(younger, len(tips) - tips.index(tip.uuid)) > sr.tips_max
        return sr.is_limited or trio.current_time() - world.born_s[tip.uuid] >= sr.tips_hours * 3600 - 1 or too_many

    def check_list(self) -> None:
        """What is there is what must be."""
        for sr in self.world.srs:
            self._check_sr(sr, self._repository(sr))

    def _check_sr(self, sr: str, there: Repository) -> None:
        there._check()
        world = self.world
        for disk in there.vdis.values():
            if disk.parent is not None and disk.parent not in there.store.volumes:
                raise Failure(f"{disk.uuid} descends from volume {disk.parent}, which is not there")
        mine = {uuid: disk for uuid, disk in world.disks.items() if disk.sr == sr}
        wanted = {uuid for uuid, disk in mine.items() if not disk.is_tip}
        if wanted != set(there.vdis):
            gone, new = sorted(wanted - set(there.vdis)), sorted(set(there.vdis) - wanted)
            raise Failure(f"VDIs that are gone: {gone}; that nobody made, or that were deleted: {new}")
        self._check_tips(mine, there)
        for uuid, vdi in self._vdis(there).items():
            disk = mine[uuid]
            if vdi.size_bytes != disk.sectors * 512:
                raise Failure(f"{uuid} has {vdi.size_bytes} bytes, not {disk.sectors * 512}")
            if (vdi.on_boot == "reset") != (disk.base is not None):
                raise Failure(f"{uuid} has on_boot={vdi.on_boot}")
            if vdi.has_data == disk.is_destroyed or vdi.cbt_enabled != (disk.chain is not None):
                raise Failure(f"{uuid} has data: {vdi.has_data}; its changed blocks are tracked: {vdi.cbt_enabled}")

    def _check_tips(self, mine: dict[str, Disk], there: Repository) -> None:
        world = self.world
        gone = [disk for uuid, disk in mine.items() if disk.is_tip and uuid not in there.tips]
        if lost := [disk.uuid for disk in gone if not self.may_go(disk)]:
            raise Failure(f"tips that had no reason to go: {lost}")
        for disk in gone:
            del world.disks[disk.uuid], mine[disk.uuid]
        if strange := set(there.tips) - set(mine):
            raise Failure(f"tips of nothing: {sorted(strange)}")
        now_s, sr = trio.current_time(), world.srs[there.uuid]
        since_s = self._tips_since_s[sr.uuid] = {uuid: self._tips_since_s.get(sr.uuid, {}).get(uuid, now_s) for uuid in there.tips}
        oldest_s = now_s - sr.tips_hours * 3600 - EXPIRY_S
        if now_s - world.life_began_s > EXPIRY_S and not (sr.is_limited or sr.is_broken):
            late = [uuid for uuid in there.tips if since_s[uuid] < now_s - EXPIRY_S]  # an undo brings them back as old as they were
            if stale := [uuid for uuid in late if world.born_s[uuid] < oldest_s]:
                raise Failure(f"tips that are too old: {stale}")

    # What is in it.

    def _judge(self, uuid: str, found: dict[str, list[int | None]]) -> None:
        world, sr = self.world, self.world.srs[uuid]
        read = [(world.disks[uuid], values) for uuid, values in sorted(found.items())]
        for disk, values in read:
            disk.content.held = sr.horizon
            if wrong := disk.content.wrong(values, sr.horizon + 1):
                raise Failure(f"after the start {disk.uuid}{' (a node)' if disk.of else ''}, horizon {sr.horizon}: {wrong}")
        evident = max([sr.horizon, *(d.content.newest(values, sr.horizon + 1) for d, values in read if d.of is None)])
        for disk, values in read:
            if wrong := disk.content.wrong(values, evident):
                raise Failure(f"not a prefix: {disk.uuid} against what was there at {evident} (durable: {sr.horizon}): {wrong}")
        now = sr.horizon = world.tick()
        for disk, values in read:
            disk.content = disk.content.found(values, evident, now)
            disk.reverting, disk.excused, disk.unsure, disk.coming = None, -1, -1, None
            disk.hosts.clear()
            world.sectors_read += len(values)

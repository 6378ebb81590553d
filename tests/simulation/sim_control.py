"""What an administrator of the simulation can do to a disk: make, snapshot, clone, resize, delete, pin, compose, walk over maps.

Every operation goes through the HTTP API (`sim_api`), knows what it does to the model, and how one can tell afterwards whether it happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio
from sim_api import Refused
from sim_machine import Failure
from sim_model import NEVER, Content, Disk, Version

from simsr.errors import InjectedFault, NoSpace, NotFound, SimsrError, StoreStopped, VdiInUse, WrongKind
from simsr.sr.vdi import Vdi

if TYPE_CHECKING:
    from sim_world import World

__all__ = ["Actions", "Op"]

SECTORS_MAX = 640


class Op:
    """One operation on the VDIs ``uuids`` of one SR: ``happened`` asks the daemon; ``apply(op, end, result)`` does it to the model, with ``result``
    None if it was never answered. ``is_evident``: whether `happened` is sure; if not, `apply` makes it possible only;
    ``flushes``: whether all that was answered before is durable when it is answered."""

    def __init__(
        self, world: World, kind: str, sr: str, uuids: list[str], happened: Callable[[], bool], apply: Callable[[Op, int, Any], None],
        is_evident: bool = True, flushes: bool = True,
    ) -> None:  # fmt: skip
        self.flushes = flushes
        self.world, self.kind, self.sr, self.uuids = world, kind, sr, uuids
        self.happened, self._apply, self.is_evident = happened, apply, is_evident
        self.error: Refused | None = None  # with which it was refused
        self.unsure: list[Disk] = []  # whose content may be the old or the new one, as long as there is no answer
        self.families = {world.disks[uuid].family if uuid in world.disks else uuid for uuid in uuids}
        self.needs = [world.disks[uuid] for uuid in uuids if uuid in world.disks]  # without them it cannot be done
        self.issue = world.tick()
        self.at_s = trio.current_time()

    def apply(self, end: int, result: Any) -> None:
        self._apply(self, end, result)

    def __str__(self) -> str:
        return f"{self.kind} of {', '.join(uuid[:8] for uuid in self.uuids)}"


class Actions:
    """Whoever calls one of these holds the lock of the family (`World.locked`)."""

    def __init__(self, world: World, rng: random.Random, name: str) -> None:
        self.world, self._rng, self._name = world, rng, name

    async def _perform(
        self, op: Op, method: str, path: str, body: dict[str, Any] | None = None, expected: tuple[type[SimsrError], ...] = (),
        must_fail: bool = False, repeat: bool = False,
    ) -> Any:  # fmt: skip
        """Carry it out; returns what was answered, None if it was refused. ``expected``: with what it may be refused, besides what always may
        be; ``repeat``: ask again, which must change nothing."""
        world = self.world
        world.ops.append(op)
        world.begun(op.issue)
        for disk in op.unsure:
            disk.unsure = NEVER
        world.operations += 1
        world.note(f"{self._name}: {op} begins at {op.issue}")
        result, error = None, None
        try:
            result = await world.call(method, path, body) or {}
        except Refused as raised:
            op.error = error = raised
        if error is not None and error.kind is StoreStopped:
            world.stopped(op.sr)  # it may have happened: what is in the log decides
            await trio.sleep_forever()
        end = world.tick()
        world.note(f"{self._name}: {op}: {'done' if error is None else error}")
        world.ops.remove(op)
        for family in op.families:
            world.changed[family] = end
        world.ended(op.issue)
        for disk in op.unsure:
            disk.unsure = end
        if error is None:
            if must_fail:
                raise Failure(f"{op} was done, and should have been refused")
            op.apply(end, result)
            if op.flushes:
                world.is_durable(op.sr, op.issue)
            if repeat:
                await self._repeat(op, method, path, body, result)
        else:
            self._accept(op, error, expected)
        if not world.ops:
            world.judge.check_list()
        return result

    async def _repeat(self, op: Op, method: str, path: str, body: dict[str, Any] | None, first: Any) -> None:
        """With the same op_id nothing happens, and the answer is the same."""
        issue = self.world.tick()
        try:
            again = await self.world.call(method, path, body)
        except Refused as error:
            if error.kind is not InjectedFault or not self.world.is_faulty(issue):
                raise Failure(f"{op} was repeated, and refused: {error}") from error
            return
        members = {one["vdi"]: one for one in again["members"]}
        for one in first["members"]:
            other = members.pop(one["vdi"], None)
            if other is None or any(one[key] != other[key] for key in ("gen", "tip", "removed", "changed")):
                raise Failure(f"{op} was repeated, and answered with {other}; the first time with {one}")
        if members:
            raise Failure(f"{op} was repeated, and answered for {sorted(members)} besides")

    def _accept(self, op: Op, error: Refused, expected: tuple[type[SimsrError], ...]) -> None:
        """An operation that failed must have had a reason, and changed nothing."""
        world = self.world
        is_gone = any(disk.is_tip and world.judge.may_go(disk) for disk in op.needs)  # by itself, while it was asked for
        allowed = (VdiInUse, *expected, *((InjectedFault,) if world.is_faulty(op.issue) else ()), *((NotFound,) if is_gone else ()))
        if not issubclass(error.kind, (*allowed, *((NoSpace,) if world.srs[op.sr].is_limited else ()))):
            raise Failure(f"{op} failed without a reason: {error}") from error
        if op.is_evident and op.happened():
            raise Failure(f"{op} was refused ({error}), and has happened all the same")

    def _vdi(self, disk: Disk) -> Vdi:
        return self.world.mounted(disk.sr).repository.get(disk.uuid)

    def _exists(self, disk: Disk, uuid: str | None = None) -> bool:
        return self.world.mounted(disk.sr).repository.catalogue.get(uuid or disk.uuid) is not None

    # Making.

    async def _create(self) -> None:
        world, uuid = self.world, self.world.new_uuid()
        sectors, sr = self._rng.choice((8, 64, 200, 256, 511)), self._rng.choice(list(world.srs))
        disk = Disk(uuid, Content([]), uuid, sr=sr)

        def apply(op: Op, end: int, result: object) -> None:
            disk.content = Content.of([0] * sectors, op.issue)
            world.add(disk)

        async with world.locked(uuid):
            op = Op(world, "create", sr, [uuid], lambda: self._exists(disk), apply)
            await self._perform(op, "POST", "/v1/vdis", {"size_bytes": sectors * 512, "uuid": uuid, "sr": sr})

    async def _snapshot(self, disk: Disk) -> Disk | None:
        return await self._descend(disk, "snapshot", disk.uuid)

    async def _clone(self, disk: Disk) -> Disk | None:
        return await self._descend(disk, "clone", None)

    async def _descend(self, disk: Disk, kind: str, of: str | None) -> Disk | None:
        world, uuid = self.world, self.world.new_uuid()
        must_fail = disk.is_destroyed

        def apply(op: Op, end: int, result: object) -> None:
            content = disk.content.seen(op.issue).made(op.issue if result is None else end)
            world.add(Disk(uuid, content, disk.family, of, sr=disk.sr, chain=disk.chain if of else None))

        op = Op(world, kind, disk.sr, [disk.uuid, uuid], lambda: self._exists(disk, uuid), apply)
        await self._perform(op, "POST", f"/v1/vdis/{disk.uuid}/{kind}", {"uuid": uuid}, (WrongKind,) * must_fail, must_fail)
        return world.disks.get(uuid)

    async def _resize(self, disk: Disk) -> None:
        world = self.world
        sectors = disk.sectors + self._rng.choice((1, 8, 77))
        if sectors > SECTORS_MAX:
            return

        def apply(op: Op, end: int, result: object) -> None:
            disk.content.grow(sectors, op.issue)
            if disk.base is not None:
                disk.base.grow(sectors, op.issue)

        op = Op(world, "resize", disk.sr, [disk.uuid], lambda: self._vdi(disk).size_bytes == sectors * 512, apply)
        await self._perform(op, "POST", f"/v1/vdis/{disk.uuid}/resize", {"size_bytes": sectors * 512})

    async def _delete(self, disk: Disk) -> None:
        world = self.world

        def apply(op: Op, end: int, result: object) -> None:
            world.disks.pop(disk.uuid, None)
            for tip in [one.uuid for one in world.disks.values() if one.is_tip and one.of == disk.uuid]:
                del world.disks[tip]

        op = Op(world, "delete", disk.sr, [disk.uuid], lambda: not self._exists(disk), apply)
        await self._perform(op, "DELETE", f"/v1/vdis/{disk.uuid}", must_fail=bool(disk.hosts))

    async def _pin(self, tip: Disk) -> None:
        def apply(op: Op, end: int, result: object) -> None:
            tip.is_tip = False

        world = self.world
        op = Op(world, "pin", tip.sr, [tip.uuid], lambda: tip.uuid in world.mounted(tip.sr).repository.vdis, apply)
        await self._perform(op, "POST", f"/v1/vdis/{tip.uuid}/pin", {"name": "pinned"})

    async def _compose(self, disk: Disk) -> None:
        """Lay a disk over a snapshot of its own family; blocks that hold only zeros show the parent's."""
        world = self.world
        parents = [
            one for one in world.disks.values()
            if one.of and not one.is_tip and one.family == disk.family and one.sectors <= disk.sectors and not one.is_destroyed
        ]  # fmt: skip
        if not parents:
            return
        parent, vdi = self._rng.choice(parents), self._vdi(disk)
        gen = vdi.gen

        def apply(op: Op, end: int, result: object) -> None:
            self._lay_over(disk, parent, op)
            disk.undo, disk.redo = [], []
            if disk.base is not None:
                disk.base = disk.content.copy()

        op = Op(world, "compose", disk.sr, [disk.uuid, parent.uuid], lambda: self._vdi(disk).gen != gen, apply)
        op.unsure = [disk]
        await self._perform(
            op, "POST", f"/v1/vdis/{disk.uuid}/compose", {"parent": parent.uuid}, must_fail=bool(disk.hosts or parent.hosts)
        )

    @staticmethod
    def _lay_over(disk: Disk, parent: Disk, op: Op) -> None:
        """Nobody else is at the disk meanwhile. A block of which it is not known whether it is all zeros may be either."""
        top, below = disk.content, parent.content
        for first in range(0, len(top), 8):
            block = range(first, min(first + 8, len(top)))
            values = [{one.value for one in top.allowed(sector, op.issue)} for sector in block]
            shown = not any(0 not in one for one in values)
            surely = all(one == {0} for one in values)
            for sector, new in zip(block, values):
                if shown:
                    new = {one.value for one in below.allowed(sector, op.issue)} if sector < len(below) else {0}
                    if not surely:
                        new |= {one.value for one in top.allowed(sector, op.issue)}
                top.versions[sector] = [Version(op.issue, op.issue, value, True) for value in sorted(new)]

    async def _walk(self, disk: Disk) -> None:
        """Where a disk differs from a node of its family: what is not named must be the same. And who holds how much."""
        world = self.world
        nodes = [one for one in world.disks.values() if one.of and one.family == disk.family and not one.is_destroyed]
        if not nodes:
            return
        node = self._rng.choice(nodes)
        issue = world.tick()
        world.begun(issue)
        try:
            found = await world.call("GET", f"/v1/vdis/{node.uuid}/diff/{disk.uuid}")
            self._judge_diff(node, disk, found["ranges"], issue)
            await world.call("GET", f"/v1/srs/{disk.sr}/space")
            await world.call("GET", f"/v1/vdis/{disk.uuid}/tree")
        except Refused as error:
            if error.kind is not NotFound or self._exists(node) and self._exists(disk):
                raise Failure(f"a walk over {node.uuid} and {disk.uuid}: {error}") from error
        world.ended(issue)

    @staticmethod
    def _judge_diff(old: Disk, new: Disk, ranges: list[dict[str, Any]], issue: int) -> None:
        told = set()
        for one in ranges:
            told.update(range(one["offset"] // 512, (one["offset"] + one["length"]) // 512))
        for sector in range(min(old.sectors, new.sectors)):
            if sector not in told:
                mine = {one.value for one in new.content.allowed(sector, issue)}
                if not mine & {one.value for one in old.content.versions[sector]}:
                    raise Failure(f"a diff of {old.uuid} and {new.uuid} does not name sector {sector}, which differs")

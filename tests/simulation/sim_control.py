"""The administrator of the simulation: makes, snapshots, clones, reverts (all modes, live and not), undoes, resizes and deletes disks.

It calls what the HTTP API calls. Each operation knows what it does to the model, and how one can tell afterwards whether it happened.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio
from sim_machine import Failure
from sim_model import NEVER, Content, Disk, Step, Version

from simsr.daemon.drafting import compose
from simsr.daemon.reverting import ERROR, LIVE_MODES, Reverting
from simsr.daemon.walks import Walks
from simsr.errors import AmbiguousTip, InjectedFault, NoSpace, NotFound, NothingToUndo, ShrinkRefused, SimsrError
from simsr.errors import StoreStopped, TipExpired, VdiInUse
from simsr.sr.history import COMMIT, FOLLOW, REDO, RESET, UNDO, Reverted
from simsr.sr.vdi import Vdi

if TYPE_CHECKING:
    from sim_world import World

__all__ = ["Administrator", "Op"]

DISKS_MAX, NODES_MAX = 7, 10
SECTORS_MAX = 640


class Op:
    """One operation: ``name`` as scenarios know it; ``uuids``: of the VDIs that it is about; ``happened`` asks the daemon;
    ``apply(end, result)`` does it to the model, with ``result`` None if it was never answered."""

    def __init__(
        self, world: World, kind: str, name: str, uuids: list[str], happened: Callable[[], bool],
        apply: Callable[[Op, int, object], None],
    ) -> None:  # fmt: skip
        self.world, self.kind, self.name, self.uuids = world, kind, name, uuids
        self.happened, self._apply = happened, apply
        self.unsure: list[Disk] = []  # whose content may be the old or the new one, as long as there is no answer
        self.family = world.disks[uuids[0]].family if uuids[0] in world.disks else uuids[0]
        self.issue = world.tick()
        self.at_s = trio.current_time()

    def apply(self, end: int, result: object) -> None:
        self._apply(self, end, result)

    def __str__(self) -> str:
        return f"{self.kind} of {', '.join(uuid[:8] for uuid in self.uuids)}"


class Administrator:
    """`run` does one thing after the other, for ever."""

    def __init__(self, world: World, rng: random.Random, name: str) -> None:
        self.world, self._rng, self._name = world, rng, name
        self._reverting, self._walks = Reverting(world.host), Walks(world.host)

    async def run(self) -> None:
        rng, world = self._rng, self.world
        while True:
            await trio.sleep(rng.choice((0, 0.01, 0.5, 5)) * rng.random())
            disks = [disk for disk in world.disks.values() if disk.of is None]
            if not disks or len(disks) < DISKS_MAX and rng.random() < 0.08:
                await self._create()
                continue
            disk = rng.choice(list(world.disks.values()))
            async with world.lock_of(disk.family):
                if disk.uuid in world.disks:
                    await self._one(disk)

    async def _one(self, disk: Disk) -> None:
        rng = self._rng
        crowded = len(self.world.disks) > NODES_MAX
        if disk.is_tip:
            choices = [(4, self._follow), (1, self._pin), (2, self._delete), (2, self._clone)]
        elif disk.of is not None:
            choices = [(8, self._reset), (4, self._commit), (2, self._clone), (6 if crowded else 1, self._delete)]
        else:
            choices = [
                (0 if crowded else 8, self._snapshot), (0 if crowded else 2, self._clone), (4, self._undo), (3, self._redo), (2, self._resize),
                (3 if crowded else 0.5, self._delete), (1, self._compose), (1, self._walk),
            ]  # fmt: skip
        weights, methods = zip(*choices)
        await rng.choices(methods, weights)[0](disk)

    # Carrying out.

    async def _perform(self, op: Op, call: Callable[[], Awaitable[object]], expected: tuple[type[SimsrError], ...] = ()) -> None:
        world = self.world
        world.ops.append(op)
        world.begun(op.issue)
        for disk in op.unsure:
            disk.unsure = NEVER
        world.operations += 1
        world.note(f"{self._name}: {op} begins at {op.issue}")
        result, error = None, None
        try:
            answer = await self._met(op)
            result = await call()
            answer()
        except SimsrError as raised:
            error = raised
        await world.if_up()
        end = world.tick()
        world.note(f"{self._name}: {op}: {'done' if error is None else f'{type(error).__name__}: {error}'}")
        if isinstance(error, StoreStopped):
            world.stopped()  # it may have happened: what is in the log decides
            await trio.sleep_forever()
        world.ops.remove(op)
        world.changed[op.family] = end
        world.ended(op.issue)
        for disk in op.unsure:
            disk.unsure = end
        if error is None:
            op.apply(end, result)
            world.is_durable(op.issue)
        else:
            self._accept(op, error, expected)
        if not world.ops:
            world._check_list()

    async def _met(self, op: Op) -> Callable[[], None]:
        vdi = self.world.mounted.repository.catalogue.get(op.uuids[0])
        return await self.world.host.theatre.before(op.name, vdi)

    def _accept(self, op: Op, error: SimsrError, expected: tuple[type[SimsrError], ...]) -> None:
        """An operation that failed must have had a reason, and changed nothing."""
        allowed = (VdiInUse, *expected, *((InjectedFault,) if self.world.faulty or self.world.faulty_until >= op.issue else ()))
        if not isinstance(error, (*allowed, *((NoSpace,) if self.world.is_limited else ()))):
            raise Failure(f"{op} failed without a reason: {type(error).__name__}: {error}") from error
        if op.happened():
            raise Failure(f"{op} was refused ({error}), and has happened all the same")

    def _vdi(self, disk: Disk) -> Vdi:
        return self.world.mounted.repository.get(disk.uuid)

    def _exists(self, uuid: str) -> bool:
        return self.world.mounted.repository.catalogue.get(uuid) is not None

    async def _durable(self) -> None:
        await self.world.mounted.engine.flush()

    # Making.

    async def _create(self) -> None:
        world, uuid = self.world, self.world.new_uuid()
        sectors = self._rng.choice((8, 64, 200, 256, 511))

        def apply(op: Op, end: int, result: object) -> None:
            world.add(Disk(uuid, Content.of([0] * sectors, op.issue), uuid))

        async def call() -> None:
            vdi = world.mounted.repository.create(sectors * 512, uuid=uuid)
            world.host.added(vdi)
            await self._durable()

        async with world.lock_of(uuid):
            await self._perform(Op(world, "create", "create", [uuid], lambda: self._exists(uuid), apply), call)

    async def _snapshot(self, disk: Disk) -> None:
        await self._descend(disk, "snapshot", disk.uuid)

    async def _clone(self, disk: Disk) -> None:
        await self._descend(disk, "clone", None)

    async def _descend(self, disk: Disk, kind: str, of: str | None) -> None:
        world, uuid = self.world, self.world.new_uuid()

        def apply(op: Op, end: int, result: object) -> None:
            content = disk.content.seen(op.issue).made(op.issue if result is None else end)
            world.add(Disk(uuid, content, disk.family, of))

        async def call() -> object:
            repository = world.mounted.repository
            new = getattr(repository, kind)(self._vdi(disk), uuid=uuid)
            world.host.added(new)
            await self._durable()
            return new

        await self._perform(Op(world, kind, kind, [disk.uuid, uuid], lambda: self._exists(uuid), apply), call)

    async def _resize(self, disk: Disk) -> None:
        world, vdi = self.world, self._vdi(disk)
        sectors = disk.sectors + self._rng.choice((1, 8, 77))
        if sectors > SECTORS_MAX:
            return

        def apply(op: Op, end: int, result: object) -> None:
            disk.content.grow(sectors, op.issue)

        async def call() -> None:
            world.mounted.repository.resize(vdi, sectors * 512)
            await self._durable()

        def happened() -> bool:
            return self._vdi(disk).size_bytes == sectors * 512

        await self._perform(Op(world, "resize", "resize", [disk.uuid], happened, apply), call)

    async def _delete(self, disk: Disk) -> None:
        world, vdi = self.world, self._vdi(disk)

        def apply(op: Op, end: int, result: object) -> None:
            world.disks.pop(disk.uuid, None)
            for tip in [one.uuid for one in world.disks.values() if one.is_tip and one.of == disk.uuid]:
                del world.disks[tip]

        op = Op(world, "delete", "delete", [disk.uuid], lambda: not self._exists(disk.uuid), apply)
        await self._perform(op, lambda: world.host.delete_vdi(world.mounted, vdi))

    async def _pin(self, tip: Disk) -> None:
        world = self.world

        def apply(op: Op, end: int, result: object) -> None:
            tip.is_tip = False

        async def call() -> None:
            world.mounted.repository.pin(self._vdi(tip), "pinned")
            await self._durable()

        op = Op(world, "pin", "pin", [tip.uuid], lambda: tip.uuid in world.mounted.repository.vdis, apply)
        await self._perform(op, call)

    async def _compose(self, disk: Disk) -> None:
        """Lay a disk over a snapshot of its own family; blocks that hold only zeros show the parent's."""
        world = self.world
        parents = [one for one in world.disks.values() if one.of and not one.is_tip and one.family == disk.family and one.sectors <= disk.sectors]
        if not parents:
            return
        parent, vdi = self._rng.choice(parents), self._vdi(disk)
        gen = vdi.gen

        def apply(op: Op, end: int, result: object) -> None:
            self._lay_over(disk, parent, op)
            disk.undo, disk.redo = [], []

        async def call() -> None:
            await compose(world.host, self._walks, world.mounted, vdi, self._vdi(parent))

        op = Op(world, "compose", "compose", [disk.uuid, parent.uuid], lambda: self._vdi(disk).gen != gen, apply)
        op.unsure = [disk]
        await self._perform(op, call)

    @staticmethod
    def _lay_over(disk: Disk, parent: Disk, op: Op) -> None:
        """Nobody else is at the disk meanwhile. A block of which it is not known whether it is all zeros may be either."""
        top, below = disk.content, parent.content
        for first in range(0, len(top), 8):
            block = range(first, min(first + 8, len(top)))
            values = [{one.value for one in top.allowed(sector, op.issue)} for sector in block]
            if any(0 not in one for one in values):
                continue
            surely = all(one == {0} for one in values)
            for sector in block:
                new = {one.value for one in below.allowed(sector, op.issue)} if sector < len(below) else {0}
                if not surely:
                    new |= {one.value for one in top.allowed(sector, op.issue)}
                top.versions[sector] = [Version(op.issue, op.issue, value, True) for value in sorted(new)]

    async def _walk(self, disk: Disk) -> None:
        """Where a disk differs from a node of its family: what is not named must be the same."""
        world = self.world
        nodes = [one for one in world.disks.values() if one.of and one.family == disk.family]
        if nodes:
            repository, node = world.mounted.repository, self._rng.choice(nodes)
            old, new = self._vdi(node), self._vdi(disk)
            try:
                await self._walks.run(world.mounted, lambda: repository.diff(old, new))
                await self._walks.run(world.mounted, repository.survey)
            except NotFound:
                if self._exists(node.uuid) and self._exists(disk.uuid):
                    raise

    # Going back.

    async def _reset(self, node: Disk) -> None:
        await self._revert(node, RESET)

    async def _commit(self, node: Disk) -> None:
        await self._revert(node, COMMIT)

    async def _follow(self, tip: Disk) -> None:
        await self._revert(tip, FOLLOW)

    async def _undo(self, disk: Disk) -> None:
        await self._take_back(disk, UNDO)

    async def _redo(self, disk: Disk) -> None:
        await self._take_back(disk, REDO)

    async def _revert(self, node: Disk, mode: str) -> None:
        world, rng, disk = self.world, self._rng, self.world.disks.get(node.of)
        if disk is None:
            return
        more = {"discard": rng.random() < 0.15, "prune": rng.random() < 0.1, "keep_size": mode == RESET and rng.random() < 0.2}

        def wishes():
            return [world.mounted.repository.wishes.one(self._vdi(node), mode, **more)]

        def apply(op: Op, end: int, result: list[Reverted] | None) -> None:
            if result is not None and not result[0].changed:
                return
            at = op.issue if result is None else end
            old = disk.content.seen(op.issue).made(at)
            gone = self._gone(disk, result)
            step = Step(None if mode == COMMIT else old, gone)
            if mode == COMMIT and not more["discard"]:
                step.show[node.uuid], step.hide = node.as_it_is(), {node.uuid}
                node.content = old
            elif mode != COMMIT:
                target = node.content.copy()
                if more["keep_size"]:
                    target.grow(disk.sectors, op.issue)
                disk.content.take_over(target, op.issue, at)
            if mode == FOLLOW:
                world.disks.pop(node.uuid, None)
            disk.undo, disk.redo = [*disk.undo, step], []
            self._note_tips(disk, old, result)

        kind = f"revert ({mode}, {node.uuid[:8]}, {[key for key, on in more.items() if on]})"
        coming = node.content if mode != COMMIT else None
        await self._change(disk, kind, wishes, apply, (ShrinkRefused, AmbiguousTip, *((NotFound,) if more["discard"] or more["prune"] else ())), coming=coming, unsure=[node] if mode == COMMIT else [])

    async def _take_back(self, disk: Disk, mode: str) -> None:
        world = self.world
        stack, other = (disk.undo, "redo") if mode == UNDO else (disk.redo, "undo")

        def wishes():
            return world.mounted.repository.history.undo_wishes(self._vdi(disk), mode)

        def apply(op: Op, end: int, result: list[Reverted] | None) -> None:
            if not stack:
                raise Failure(f"{op} happened, and there was nothing to {mode}")
            at = op.issue if result is None else end
            step, old = stack.pop(), disk.content.seen(op.issue).made(at)
            inverse = Step(None if step.head is None else old, {}, set(step.show))
            for uuid in step.hide & set(world.disks):
                inverse.show[uuid] = world.disks[uuid].as_it_is()
                if uuid not in step.show:
                    del world.disks[uuid]
            for uuid, gone in step.show.items():
                node = world.disks.get(uuid) or world.add(gone.as_it_is())
                node.content = gone.content
            if step.head is not None:
                disk.content.take_over(step.head, op.issue, at)
            getattr(disk, other).append(inverse)
            self._note_tips(disk, old, result)

        def refused() -> None:
            stack.clear()

        names = {*stack[-1].show, *stack[-1].hide} if stack else ()
        nodes = [world.disks[uuid] for uuid in sorted(names) if uuid in world.disks]
        expected = (TipExpired, NothingToUndo, ShrinkRefused)
        await self._change(disk, mode, wishes, apply, expected, refused, stack[-1].head if stack else None, nodes)

    async def _change(
        self, disk: Disk, kind: str, wishes: Callable, apply: Callable, expected: tuple[type[SimsrError], ...],
        refused: Callable[[], None] = lambda: None, coming: Content | None = None, unsure: Sequence[Disk] = (),
    ) -> None:  # fmt: skip
        world, rng, gen = self.world, self._rng, self._vdi(disk).gen
        live = rng.choice(LIVE_MODES) if rng.random() < 0.4 else None
        live_ms = rng.choice((0, 0, 50, 3000)) if live else 0

        async def call() -> list[Reverted]:
            disk.reverting = live
            try:
                results = await self._reverting.carry_out(world.mounted, wishes(), live=live, live_ms=live_ms)
                if live == ERROR:
                    disk.spoiled = world.moment
                return results
            except (TipExpired, NothingToUndo):
                refused()
                raise

        op = Op(world, f"{kind}{f', live={live}' if live else ''}", "revert", [disk.uuid], lambda: self._vdi(disk).gen != gen, apply)
        op.unsure, disk.coming = list(unsure), coming
        await self._perform(op, call, expected)
        disk.coming, disk.reverting, disk.excused = None, None, world.moment

    def _gone(self, disk: Disk, result: list[Reverted] | None) -> dict[str, Disk]:
        """The nodes that went with a revert, which the model now forgets; what undo brings back."""
        if result is not None:
            names = list(result[0].removed)
        else:
            names = sorted(uuid for uuid, one in self.world.disks.items() if one.of == disk.uuid and not self._exists(uuid))
        gone = {}
        for uuid in names:
            if (one := self.world.disks.pop(uuid, None)) is not None:
                gone[uuid] = one.as_it_is()
        return gone

    def _note_tips(self, disk: Disk, old: Content, result: list[Reverted] | None) -> None:
        """The tip that holds what the head was."""
        tips = self.world.mounted.repository.catalogue.tips_of.get(disk.uuid, {})
        names = [result[0].tip] if result is not None else [tip.uuid for tip in tips.values() if tip.uuid not in self.world.disks]
        for uuid in filter(None, names):
            self.world.add(Disk(uuid, old.copy(), disk.family, disk.uuid, is_tip=True))


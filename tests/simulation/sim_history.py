"""Going back, in the simulation: reverts in all modes, undo, redo, of one disk or of a group, below clients that stay or not; group snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sim_control import Actions, Op
from sim_machine import Failure
from sim_model import Content, Disk, Step, Together

from simsr.daemon.reverting import ERROR, LIVE_MODES
from simsr.errors import AmbiguousTip, GroupChanged, NotFound, NothingToUndo, ShrinkRefused, TipExpired, VdiExists, WrongKind
from simsr.sr.history import COMMIT, FOLLOW, REDO, RESET, UNDO

__all__ = ["Reverts"]

_Member = dict[str, Any]


class Reverts(Actions):
    """Actions that concern what disks were."""

    # Group snapshots.

    async def _snapshot_together(self) -> None:
        world, rng = self.world, self._rng
        sr = rng.choice(list(world.srs))
        disks = [disk for disk in world.disks.values() if disk.of is None and disk.sr == sr]
        if len(disks) < 2 or len(world.disks) > world.crowd:
            return
        disks = rng.sample(disks, rng.randint(2, min(4, len(disks))))
        async with world.locked(*(disk.family for disk in disks)):
            disks = [disk for disk in disks if disk.uuid in world.disks]
            if len(disks) > 1:
                await self._snapshot_all(sr, disks)

    async def _snapshot_all(self, sr: str, disks: list[Disk]) -> None:
        world = self.world
        known = {*world.disks, *(uuid for op in world.ops for uuid in op.uuids)}

        def made() -> dict[str, str]:
            """disk -> the snapshot that was made of it, as the daemon has it."""
            vdis = world.mounted(sr).repository.vdis.values()
            members = {disk.uuid for disk in disks}
            return {vdi.snapshot_of: vdi.uuid for vdi in vdis if vdi.uuid not in known and vdi.snapshot_of in members and vdi.meta.get("group")}

        def happened() -> bool:
            found = made()
            if found and len(found) != len(disks):
                raise Failure(f"of {len(disks)} disks that were snapshotted together {len(found)} were")
            return bool(found)

        def apply(op: Op, end: int, result: Any) -> None:
            pairs = made() if result is None else {one["snapshot_of"]: one["uuid"] for one in result["snapshots"]}
            group = Together(len(disks))
            for disk in disks:
                content = disk.content.seen(op.issue).made(op.issue if result is None else end)
                world.add(Disk(pairs[disk.uuid], content, disk.family, disk.uuid, sr=sr, group=group, chain=disk.chain))

        op = Op(world, "group snapshot", sr, [disk.uuid for disk in disks], happened, apply)
        await self._perform(op, "POST", "/v1/snapshots", {"vdis": op.uuids, "name": "together"})

    # Reverts.

    async def _reset(self, node: Disk) -> None:
        await self._revert([node], RESET)

    async def _commit(self, node: Disk) -> None:
        await self._revert([node], COMMIT)

    async def _follow(self, tip: Disk) -> None:
        await self._revert([tip], FOLLOW)

    async def _undo(self, disk: Disk) -> None:
        await self._take_back([disk], UNDO)

    async def _redo(self, disk: Disk) -> None:
        await self._take_back([disk], REDO)

    async def _revert_together(self) -> None:
        """A group goes back; all or none of it."""
        world, rng = self.world, self._rng
        nodes = [disk for disk in world.disks.values() if disk.group is not None and not disk.is_tip]
        if not nodes:
            return
        node = rng.choice(nodes)
        members = [one for one in nodes if one.group is node.group]
        async with world.locked(*(one.family for one in members)):
            members = [one for one in world.disks.values() if one.group is node.group is not None and not one.is_tip]
            if node in members:
                await self._revert([node, *(one for one in members if one is not node)], rng.choice((RESET, RESET, COMMIT)), is_group=True)

    async def _take_back_together(self) -> None:
        world, rng = self.world, self._rng
        mode = rng.choice((UNDO, UNDO, REDO))
        disks = [disk for disk in world.disks.values() if (stack := getattr(disk, mode)) and stack[-1].together]
        if not disks:
            return
        disk = rng.choice(disks)
        step = getattr(disk, mode)[-1]

        def members() -> list[Disk]:
            others = [one for one in world.disks.values() if (stack := getattr(one, mode)) and stack[-1].together is step.together]
            return [disk, *(one for one in others if one is not disk)]

        async with world.locked(*(one.family for one in members())):
            stack = getattr(disk, mode)
            if disk.uuid in world.disks and stack and stack[-1].together is step.together:
                await self._take_back(members(), mode, is_group=True)

    async def _revert(self, nodes: list[Disk], mode: str, is_group: bool = False) -> None:
        world, rng, node = self.world, self._rng, nodes[0]
        disks = [world.disks.get(one.of) for one in nodes]
        if any(disk is None for disk in disks):
            return
        more = {"discard": rng.random() < 0.15, "prune": rng.random() < 0.1, "keep_size": mode == RESET and rng.random() < 0.2}
        together = Together(len(nodes)) if len(nodes) > 1 else None
        pairs = {disk.uuid: one for disk, one in zip(disks, nodes)}

        def apply_one(op: Op, end: int, disk: Disk, member: _Member | None, is_changed: bool) -> None:
            self._go_back(op, op.issue if member is None else end, disk, pairs[disk.uuid], mode, more, member, is_changed, together)

        incomplete = is_group and len(nodes) != node.group.count
        destroyed = any(one.is_destroyed for one in nodes)
        expected = [ShrinkRefused, AmbiguousTip, *([NotFound] if more["discard"] or more["prune"] else [])]
        expected += [GroupChanged] * incomplete + [WrongKind] * destroyed
        kind = f"{'group ' if is_group else ''}revert ({mode}, {node.uuid[:8]}, {[key for key, on in more.items() if on]})"
        await self._change(
            disks, kind, f"{node.uuid}/revert", {"mode": mode, "group": is_group, **more}, apply_one, tuple(expected),
            coming=[one.content if mode != COMMIT else None for one in nodes], unsure=nodes if mode == COMMIT else [],
            must_fail=incomplete or destroyed, needs=nodes,
        )  # fmt: skip

    def _go_back(
        self, op: Op, at: int, disk: Disk, node: Disk, mode: str, more: dict[str, bool], member: _Member | None, is_changed: bool,
        together: Together | None,
    ) -> None:  # fmt: skip
        world = self.world
        target = node.content.copy()
        if more["keep_size"]:
            target.grow(disk.sectors, op.issue)
        if disk.base is not None and mode != COMMIT:
            disk.base = target.copy()
        if not is_changed:
            if together is not None:  # it has nothing to undo, and the others go without it
                together.count -= 1
            return
        old = disk.content.seen(op.issue).made(at)
        step = Step(None if mode == COMMIT else old, self._gone(disk, member), together=together)
        if mode == COMMIT and not more["discard"]:
            step.show[node.uuid], step.hide = node.as_it_is(), {node.uuid}
            node.content, node.group, node.chain = old, node.group if together else None, disk.chain or node.chain
            world.backups.pop(disk.uuid, None)  # the last one may be of what the node held
        elif mode != COMMIT:
            disk.content.take_over(target, op.issue, at)
        if mode == FOLLOW:
            world.disks.pop(node.uuid, None)
        disk.undo, disk.redo = [*disk.undo, step], []
        step.tip = self._note_tips(disk, old, member)

    async def _take_back(self, disks: list[Disk], mode: str, is_group: bool = False) -> None:
        world = self.world
        steps = [getattr(disk, mode)[-1] if getattr(disk, mode) else None for disk in disks]

        def apply_one(op: Op, end: int, disk: Disk, member: _Member | None, is_changed: bool) -> None:
            if is_changed:
                self._go_forth(op, op.issue if member is None else end, disk, mode, member)

        def refused() -> None:
            if not is_group:
                getattr(disks[0], mode).clear()

        incomplete = bool(is_group and len(disks) != steps[0].together.count)
        names = {uuid for step in steps if step for uuid in (*step.show, *step.hide)}
        nodes = [world.disks[uuid] for uuid in sorted(names) if uuid in world.disks]
        await self._change(
            disks, f"{'group ' if is_group else ''}{mode}", f"{disks[0].uuid}/{mode}", {"group": is_group}, apply_one,
            (TipExpired, NothingToUndo, ShrinkRefused, VdiExists, *([GroupChanged] if is_group else [])), refused,
            coming=[step.head if step else None for step in steps], unsure=nodes, must_fail=incomplete,
        )  # fmt: skip

    def _go_forth(self, op: Op, at: int, disk: Disk, mode: str, member: _Member | None) -> None:
        world, stack = self.world, getattr(disk, mode)
        if not stack:
            raise Failure(f"{op} happened, and there was nothing to {mode}")
        step, old = stack.pop(), disk.content.seen(op.issue).made(at)
        inverse = Step(None if step.head is None else old, {}, set(step.show), step.together)
        for uuid in step.hide & set(world.disks):
            inverse.show[uuid] = world.disks[uuid].as_it_is()
            if uuid not in step.show:
                del world.disks[uuid]
        for uuid, gone in step.show.items():
            node = world.disks.get(uuid) or world.add(gone.as_it_is())
            node.content, node.group, node.chain, node.is_destroyed = gone.content, gone.group, gone.chain, gone.is_destroyed
            world.backups.pop(disk.uuid, None)
        if step.head is not None:
            disk.content.take_over(step.head, op.issue, at)
            if disk.base is not None:
                disk.base = step.head.copy()
        getattr(disk, REDO if mode == UNDO else UNDO).append(inverse)
        if step.tip in world.disks and world.disks[step.tip].is_tip:  # it is used up
            del world.disks[step.tip]
        inverse.tip = self._note_tips(disk, old, member)

    async def _change(
        self, disks: list[Disk], kind: str, path: str, body: dict[str, Any], apply_one: Callable, expected: tuple,
        refused: Callable[[], None] = lambda: None, *, coming: Sequence[Content | None], unsure: Sequence[Disk], must_fail: bool, needs: Sequence[Disk] = (),
    ) -> None:  # fmt: skip
        world, rng = self.world, self._rng
        gens = {disk.uuid: self._vdi(disk).gen for disk in disks}
        live = rng.choice(LIVE_MODES) if rng.random() < 0.4 else None
        live_ms = rng.choice((0, 0, 50, 3000)) if live else 0
        op_id = f"op {world.tick()}" if rng.random() < 0.2 else None

        def has_changed(disk: Disk) -> bool:
            return self._exists(disk) and self._vdi(disk).gen != gens[disk.uuid]

        def apply(op: Op, end: int, result: Any) -> None:
            members = {} if result is None else {one["vdi"]: one for one in result["members"]}
            for disk in disks if live == ERROR else ():
                disk.spoiled = world.moment
            if result is not None and members.keys() != gens.keys():
                raise Failure(f"{op} was answered for {sorted(members)}")
            for disk in disks:
                member = members.get(disk.uuid)
                apply_one(op, end, disk, member, member["changed"] if member else has_changed(disk))

        held = any(disk.hosts for disk in disks) and live is None and body.get("mode") in (RESET, FOLLOW)
        name = f"{kind}{f', live={live}' if live else ''}"
        op = Op(world, name, disks[0].sr, list(gens), lambda: any(map(has_changed, disks)), apply)
        op.unsure, op.needs = list(unsure), [*op.needs, *needs]
        for disk, content in zip(disks, coming):
            disk.coming, disk.reverting = content, live
        more = {"live": live, "live_ms": live_ms, **({"op_id": op_id} if op_id else {})}
        await self._perform(
            op, "POST", f"/v1/vdis/{path}", {**body, **more}, expected, must_fail or held, repeat=op_id is not None
        )
        if op.error is not None and issubclass(op.error.kind, (TipExpired, NothingToUndo)):
            refused()
        for disk in disks:
            disk.coming, disk.reverting, disk.excused = None, None, world.moment

    def _gone(self, disk: Disk, member: _Member | None) -> dict[str, Disk]:
        """The nodes that went with a revert, which the model now forgets; what undo brings back."""
        if member is not None:
            names = list(member["removed"])
        else:
            names = sorted(uuid for uuid, one in self.world.disks.items() if one.of == disk.uuid and not self._exists(disk, uuid))
        gone = {}
        for uuid in names:
            if (one := self.world.disks.pop(uuid, None)) is not None:
                gone[uuid] = one.as_it_is()
        return gone

    def _note_tips(self, disk: Disk, old: Content, member: _Member | None) -> str | None:
        """The uuid of the tip that holds what the head was, if there is one."""
        tips = self.world.mounted(disk.sr).repository.catalogue.tips_of.get(disk.uuid, {})
        names = [member["tip"]] if member is not None else [tip.uuid for tip in tips.values() if tip.uuid not in self.world.disks]
        for uuid in filter(None, names):
            self.world.add(Disk(uuid, old.copy(), disk.family, disk.uuid, is_tip=True, sr=disk.sr, chain=disk.chain))
            return uuid
        return None

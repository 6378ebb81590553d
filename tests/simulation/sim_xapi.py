"""What xapi and backup programs do to a disk, in the simulation: hosts attach, VMs start on disks that forget, changed blocks are tracked and backed up."""

from __future__ import annotations

import random
from base64 import b64decode

from sim_api import Refused
from sim_client import Gone, NbdSession
from sim_control import Op
from sim_history import Reverts
from sim_machine import Failure
from sim_model import UNIT, Disk

from simsr.errors import CbtSizes, NoCbt, NoChangedBlocks, NotFound, WrongKind

__all__ = ["Xapi"]

_HOSTS = ("host A", "host B")


class Xapi(Reverts):
    """Actions that xapi asks for."""

    # Hosts.

    async def _attach(self, disk: Disk) -> None:
        """A disk is one host's that writes, or that of several that read."""
        world, host, writable = self.world, self._rng.choice(_HOSTS), disk.of is None and self._rng.random() < 0.6
        others = [for_writing for other, for_writing in disk.hosts.items() if other != host]
        must_fail = disk.is_destroyed or bool(others) and (writable or any(others))

        def apply(op: Op, end: int, result: object) -> None:
            if result is not None:  # what was attached is not any more after a crash
                disk.hosts[host] = writable

        def happened() -> bool:
            return any(one.client == host and one.writable == writable for one in self._vdi(disk).attachments.values())

        op = Op(world, f"attach by {host}", disk.sr, [disk.uuid], happened, apply, is_evident=host not in disk.hosts, flushes=False)
        body = {"client": host, "writable": writable}
        await self._perform(op, "POST", f"/v1/vdis/{disk.uuid}/attach", body, (WrongKind,) * disk.is_destroyed, must_fail)

    async def _detach(self, disk: Disk) -> None:
        if not disk.hosts:
            return
        host = self._rng.choice(sorted(disk.hosts))

        def apply(op: Op, end: int, result: object) -> None:
            disk.hosts.pop(host, None)

        def happened() -> bool:
            return not any(one.client == host for one in self._vdi(disk).attachments.values())

        op = Op(self.world, f"detach by {host}", disk.sr, [disk.uuid], happened, apply, flushes=False)
        await self._perform(op, "POST", f"/v1/vdis/{disk.uuid}/detach", {"client": host})

    # Disks that forget.

    async def _set_on_boot(self, disk: Disk) -> None:
        mode = "reset" if disk.base is None else "persist"

        def apply(op: Op, end: int, result: object) -> None:
            at = op.issue if result is None else end
            disk.base = disk.content.seen(op.issue).made(at) if mode == "reset" else None

        op = Op(self.world, f"on_boot={mode}", disk.sr, [disk.uuid], lambda: self._vdi(disk).on_boot == mode, apply)
        is_tracked = disk.chain is not None
        await self._perform(
            op, "PATCH", f"/v1/vdis/{disk.uuid}", {"on_boot": mode}, (WrongKind,) * is_tracked, is_tracked or bool(disk.hosts)
        )

    async def _begin_epoch(self, disk: Disk) -> None:
        """A VM starts: the disk is what it was when it was told to forget. Without an answer it may be either."""
        if disk.base is None:
            return

        def apply(op: Op, end: int, result: object) -> None:
            at, is_sure = op.issue if result is None else end, result is not None
            disk.content.take_over(disk.base, op.issue, at, certain=is_sure, stable=False)  # a crash may take it back

        op = Op(self.world, "epoch", disk.sr, [disk.uuid], lambda: True, apply, is_evident=False, flushes=False)
        disk.coming = disk.base
        await self._perform(op, "POST", f"/v1/vdis/{disk.uuid}/epoch", {"phase": "begin"}, must_fail=bool(disk.hosts))
        disk.coming = None

    # Changed blocks.

    async def _set_cbt(self, disk: Disk) -> None:
        enabled = disk.chain is None
        forgets = disk.base is not None

        def apply(op: Op, end: int, result: object) -> None:
            disk.chain = object() if enabled else None

        op = Op(self.world, f"cbt {enabled}", disk.sr, [disk.uuid], lambda: self._vdi(disk).cbt_enabled == enabled, apply)
        await self._perform(op, "POST", f"/v1/vdis/{disk.uuid}/cbt", {"enabled": enabled}, (WrongKind,) * forgets, forgets)

    async def _list_changed(self, disk: Disk) -> None:
        nodes = [one for one in self.world.disks.values() if one.of and not one.is_tip and one.family == disk.family]
        if nodes:
            node = self._rng.choice(nodes)
            await self._changed(node, self._rng.choice([disk, *nodes]))

    async def _changed(self, old: Disk, new: Disk) -> bytes | None:
        """The bitmap, held against the model; None if it was refused, which must have had a reason."""
        world = self.world
        issue = world.tick()
        world.begun(issue)
        related = old is not new and old.chain is not None and old.chain is new.chain
        shrunk = new.sectors < old.sectors
        try:
            answer = await world.call("GET", f"/v1/vdis/{old.uuid}/changed_blocks/{new.uuid}")
        except Refused as error:
            reasons = [*([NoChangedBlocks] if not related or new.of else []), *([CbtSizes] if related and shrunk else [])]
            if not issubclass(error.kind, tuple(reasons)) and (error.kind is not NotFound or self._exists(old) and self._exists(new)):
                raise Failure(f"changed blocks of {old.uuid} and {new.uuid}: {error}") from error
            world.note(f"{self._name}: changed blocks refused: {error.kind.__name__}")
            return None
        finally:
            world.ended(issue)
        if not related or shrunk:
            raise Failure(f"changed blocks of {old.uuid} and {new.uuid}, which cannot be told, were told")
        bits = b64decode(answer["bitmap"])
        if answer["size_bytes"] == new.sectors * 512 and (wrong := new.content.wrong_changes(bits, old.content, issue)):
            raise Failure(f"changed blocks of {old.uuid} and {new.uuid}: {wrong}")
        world.note(f"{self._name}: changed blocks of {old.uuid[:8]} and {new.uuid[:8]}: {bits.hex()}")
        world.compared += 1
        return bits

    async def _destroy(self, node: Disk) -> None:
        def apply(op: Op, end: int, result: object) -> None:
            node.is_destroyed = True

        untracked = node.chain is None and not node.is_destroyed
        is_new = not node.is_destroyed
        op = Op(self.world, "data_destroy", node.sr, [node.uuid], lambda: not self._vdi(node).has_data, apply, is_new, is_new)
        await self._perform(
            op, "POST", f"/v1/vdis/{node.uuid}/data_destroy", None, (NoCbt,) * untracked, untracked or bool(node.hosts and not node.is_destroyed)
        )

    # Backups.

    async def _back_up(self, disk: Disk) -> None:
        """As a backup program: a snapshot, what changed since the last one, and only that is copied. The copy must be the snapshot."""
        world = self.world
        if disk.base is not None or len(world.disks) > world.crowd + 4:
            return
        if disk.chain is None:
            await self._set_cbt(disk)
        node = await self._snapshot(disk)
        if node is None:
            return
        before, image = world.backups.pop(disk.uuid, (None, []))
        found = await self._read(node)
        bits = None
        if before is not None and world.disks.get(before.uuid) is before and before.chain is not None:
            bits = await self._changed(before, node)
        if found is None:
            return
        if bits is not None:
            copied = [
                found[sector] if bits[sector // UNIT >> 3] >> (7 - (sector // UNIT & 7)) & 1 or sector >= len(image) else image[sector]
                for sector in range(len(found))
            ]
            if copied != found:
                raise Failure(f"a backup of {disk.uuid} by changed blocks is not what its snapshot {node.uuid} holds")
        world.backups[disk.uuid] = node, found
        if before is not None and world.disks.get(before.uuid) is before:
            await (self._destroy if self._rng.random() < 0.5 and before.chain is not None else self._delete)(before)
        if self._rng.random() < 0.5 and node.chain is not None:
            await self._destroy(node)

    async def _read(self, node: Disk) -> list[int | None] | None:
        """All of a snapshot; None if something was in the way."""
        world = self.world
        issue = world.tick()
        session = NbdSession(world, node, random.Random(self._rng.random()), f"{self._name}'s backup")
        world.sessions[session] = None
        try:
            await session.open()
            found = await session.read_all()
            await session.close(in_order=True)
        except (Gone, OSError) as error:
            session.lost()
            if not world.is_excused(node, issue):
                raise Failure(f"a backup of {node.uuid}: {error}") from error
            return None
        finally:
            session.abandon()
            world.sessions.pop(session, None)
        if world.is_damaged(issue):
            return None
        if wrong := node.content.wrong(found, issue):
            raise Failure(f"a backup of {node.uuid}: {wrong}")
        return found

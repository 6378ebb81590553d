"""Which disks and nodes somebody means who says "revert this": one disk, or all that were snapshotted together.

A group is snapshots that one operation took, or that carry the same stamp because whoever took them one by one said so (xapi's
VM.snapshot). The stamp is in the metadata of each: ``{"id": text, "n": how many, "vm": uuid}``, the latter two where they are known.
"""

from __future__ import annotations

from collections.abc import Sequence

from simsr.errors import AmbiguousGroup, AmbiguousTip, BadRequest, GroupChanged, NotASnapshot, NotFound, NoTip, NoVmSnapshots, SnapshotOfOther
from simsr.sr import cbt
from simsr.sr.catalogue import Catalogue
from simsr.sr.history import COMMIT, FOLLOW, MODES, RESET, Wish
from simsr.sr.vdi import Tip, Vdi

__all__ = ["Wishes", "stamp_of"]


def stamp_of(group: str, vm: str | None = None, count: int | None = None) -> dict[str, object]:
    """The stamp of ``count`` snapshots of VM ``vm``; None: not known."""
    return {"id": group, **({} if vm is None else {"vm": vm}), **({} if count is None else {"n": count})}


class Wishes:
    """Makes the wishes that `simsr.sr.history` carries out: `one`, `group`."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def one(
        self, node: Vdi, mode: str = RESET, *, target: str | None = None, discard: bool = False, prune: bool = False, keep_size: bool = False
    ) -> Wish:
        """What ``mode`` to ``node`` means. ``target``: the uuid of the disk, if not the one that the snapshot was taken of.

        xapi moves ``snapshot_of`` when it reverts by cloning; so any disk of the same family is accepted, and no other. ``follow`` takes
        a tip, or a snapshot or disk below which there is just one.

        Raises `BadRequest`, `NotASnapshot`, `SnapshotOfOther`, `NotFound` (the disk is gone, or there is no tip), `AmbiguousTip`.
        """
        if mode not in MODES:
            raise BadRequest(what=f"mode {mode!r}", reason=f"it is none of {', '.join(MODES)}")
        if keep_size and mode != RESET:
            raise BadRequest(what="keep_size", reason=f"it means nothing with {mode}")
        if mode == FOLLOW:
            tip = node if isinstance(node, Tip) else self._tip_below(node)
            disk = self._disk(tip.snapshot_of)
            if target is not None and target != disk.uuid:
                raise SnapshotOfOther(snapshot=tip.uuid, origin=disk.uuid, target=target)
            return Wish(disk, mode, tip, discard, prune)
        if node.is_a_tip:
            raise BadRequest(what=f"{mode} to the tip {node.uuid}", reason="a tip can be followed, or pinned, which makes a snapshot of it")
        if not node.is_a_snapshot:
            raise NotASnapshot(uuid=node.uuid)
        cbt.refuse_without_data(node, "revert to")
        disk = self._disk(node.snapshot_of if target is None else target)
        if disk.uuid != node.snapshot_of and (disk.family != node.family or disk.is_a_snapshot):
            raise SnapshotOfOther(snapshot=node.uuid, origin=node.snapshot_of, target=disk.uuid)
        if disk.is_a_snapshot and (mode == COMMIT or disk.volume.map.root != node.volume.map.root):
            raise SnapshotOfOther(snapshot=node.uuid, origin=node.snapshot_of, target=disk.uuid)  # it must not change
        return Wish(disk, mode, node, discard, prune, keep_size)

    def _disk(self, uuid: str) -> Vdi:
        if uuid not in self._catalogue.vdis:
            raise NotFound(kind="VDI", name=uuid)
        return self._catalogue.vdis[uuid]

    def _tip_below(self, node: Vdi) -> Tip:
        disk = self._disk(node.snapshot_of) if node.is_a_snapshot else node
        base = node.volume.ident if node.is_a_snapshot else node.parent
        tips = [tip for tip in self._catalogue.tips_of.get(disk.uuid, {}).values() if tip.parent == base]
        if not tips:
            raise NoTip(name=f"{'snapshot' if node.is_a_snapshot else 'the node above the head of VDI'} {node.uuid}")
        if len(tips) > 1:
            candidates = ", ".join(f"{tip.uuid} ({tip.name})" for tip in tips)
            raise AmbiguousTip(name=f"{node.uuid} ({node.name})", kind="tip", candidates=candidates)
        return tips[0]

    def group(self, node: Vdi, mode: str = RESET, *, discard: bool = False, prune: bool = False, keep_size: bool = False) -> list[Wish]:
        """The wishes for all snapshots that were taken together with ``node``.

        Raises `BadRequest` for ``follow``, `GroupChanged` if one of them is gone or there are none, and what `one` raises.
        """
        if mode == FOLLOW:
            raise BadRequest(what="follow of a group", reason="tips are left one disk at a time; follow them one by one")
        stamp = node.meta.get("group") or {}
        members = self.members(stamp.get("id"))
        if node.volume.ident not in {member.volume.ident for member in members}:
            raise GroupChanged(reason=f"snapshot {node.uuid} was not taken together with others")
        wanted = stamp.get("n")
        if wanted is not None and wanted != len(members):
            raise GroupChanged(reason=f"of the {wanted} snapshots taken together, {len(members)} are left")
        wishes = [self.one(member, mode, discard=discard, prune=prune, keep_size=keep_size) for member in members]
        if len({wish.disk.uuid for wish in wishes}) != len(wishes):
            raise GroupChanged(reason=f"two snapshots of one disk carry the stamp {stamp['id']}")
        return wishes

    def members(self, stamp: str | None) -> Sequence[Vdi]:
        """The snapshots with that stamp."""
        return list(self._catalogue.groups.get(stamp, {}).values())

    def of_vm(self, vm: str) -> list[list[Vdi]]:
        """The groups of snapshots that were taken of a VM, the oldest first. O(groups)."""
        groups = [list(members.values()) for members in self._catalogue.groups.values()]
        found = [members for members in groups if members[0].meta["group"].get("vm") == vm]
        return sorted(found, key=lambda members: (members[0].meta["snapshot_time"], members[0].volume.ident))

    def only_group_of_vm(self, vm: str) -> Vdi:
        """One of the only group of snapshots of a VM, for `group`. Raises `NoVmSnapshots`, `AmbiguousGroup`."""
        found = self.of_vm(vm)
        if not found:
            raise NoVmSnapshots(name=vm)
        if len(found) > 1:
            each = ", ".join(f"that of {members[0].uuid} ({members[0].meta['snapshot_time']})" for members in found)
            raise AmbiguousGroup(name=vm, candidates=each)
        return found[0][0]

    def disks_of_vm(self, vm: str) -> list[Vdi]:
        """The disks that snapshots were taken of for a VM and that are there still. Raises `NoVmSnapshots`."""
        uuids = dict.fromkeys(member.snapshot_of for members in self.of_vm(vm) for member in members)
        disks = [self._catalogue.vdis[uuid] for uuid in uuids if uuid in self._catalogue.vdis]
        if not disks:
            raise NoVmSnapshots(name=vm)
        return disks

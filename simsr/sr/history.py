"""Going back and forth: revert in its modes, undo and redo, of one disk or of several at once. Each is one record, whatever the size.

What a disk held, and the snapshots taken of it, are a tree of nodes; the disk's head descends from one of them, its base. Of a node S:

* ``reset``: the head becomes what S holds, and descends from S.
* ``follow``: the head becomes what a tip holds, descends from what the tip did, and the tip is used up.
* ``commit``: S becomes what the head holds; the head stays as it is, and descends from S.
* ``discard`` besides: S goes. With commit nothing becomes of the head's content either: S just goes.
* ``prune`` besides: the snapshots and tips of the disk that descend from S go.

A head that is left although no node holds its content becomes a tip, hanging from its base, unless tips are off. What goes is hidden
first and lets go of its content only when it cannot be undone any more (`simsr.sr.tips`).

``undo`` takes back the last of these, whatever was written or snapshotted since: the head becomes what it was (the present one
becomes a tip if no node holds it), and nodes come back or go. `redo` takes back the undo. Taking back a commit leaves the head alone, as the commit did.

Besides, the disk's ``gen`` goes up with everything here, and when it is snapshotted; who looked at a disk and then acts on what was seen
says which gen that was (``expected``). With an ``op_id`` a request that is repeated gets the first answer, and nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from simsr.errors import BadRequest, GroupChanged, NotFound, NothingToUndo, ShrinkRefused, TipExpired, VdiExists, VdiInUse
from simsr.sr import boot, cbt
from simsr.sr.catalogue import Catalogue
from simsr.sr.change import Change
from simsr.sr.hidden import is_hidden
from simsr.sr.imitation import Imitation
from simsr.sr.tips import Keeper
from simsr.sr.vdi import CLEAN, CRASH, Vdi

__all__ = ["History", "Wish", "Reverted", "MODES", "RESET", "FOLLOW", "COMMIT", "UNDO", "REDO"]

RESET, FOLLOW, COMMIT = MODES = ("reset", "follow", "commit")
UNDO, REDO = "undo", "redo"
_OTHER = {UNDO: REDO, REDO: UNDO}
_ANSWERS_KEPT = 4
_NOTHING_KEPT = 256
_PAUSE_MOST_S = 600.0
"""Between the reverts of two disks by one VM.revert of xapi, which waits for plug-ins for minutes at most."""


@dataclass(frozen=True)
class Wish:
    """What is to become of one disk. ``node``: the snapshot; for ``follow`` the tip; for undo and redo nothing."""

    disk: Vdi
    mode: str
    node: Vdi | None = None
    discard: bool = False
    prune: bool = False
    keep_size: bool = False


@dataclass(frozen=True)
class Reverted:
    """What became of a disk. ``changed``: its content or its tree are not what they were."""

    vdi: Vdi
    changed: bool
    size_changed: bool
    mode: str = RESET
    tip: str | None = None  # uuid of the tip that holds what the head was
    removed: tuple[str, ...] = ()  # uuids of the nodes that went
    lost: bool = False  # what the head was is gone, because tips are off
    size_bytes: int = 0


class History:
    """See the file. `revert`, `undo`; `plan` says what they would do."""

    def __init__(self, catalogue: Catalogue, keeper: Keeper, new_uuid: Callable[[], str], imitation: Imitation) -> None:
        self._catalogue, self._keeper, self._new_uuid, self._imitation = catalogue, keeper, new_uuid, imitation
        self._nothing: dict[tuple[str, str], Reverted] = {}  # answers to requests that changed nothing, which leave no record

    def plan(self, wishes: Sequence[Wish]) -> list[Reverted]:
        """What `carry_out` would answer, with nothing changed, and whoever is attached. Raises what it raises."""
        return self._prepare(wishes, None, None, self._keeper.begin())

    def carry_out(
        self, wishes: Sequence[Wish], *, live: bool = False, op_id: str | None = None, expected: Mapping[str, int] | None = None
    ) -> list[Reverted]:
        """Do what is wished for all disks, or nothing. O(nodes that go), and not more if there are others.

        ``live``: the disks may be attached; whoever calls has seen to it that nobody reads or writes. ``expected``: uuid -> gen.
        Raises `VdiInUse`, `ShrinkRefused`, `GroupChanged`, `NothingToUndo`, `TipExpired`, `NoSpace`, with nothing changed.
        """
        if answers := self.answers_to(op_id, wishes[0].mode):
            return answers
        for wish in wishes:
            if expected and expected.get(wish.disk.uuid, wish.disk.gen) != wish.disk.gen:
                raise GroupChanged(reason=f"VDI {wish.disk.uuid} was snapshotted or reverted since it was looked at")
        change = self._keeper.begin()
        results = self._prepare(wishes, live, op_id, change)
        if change:
            change.commit(urgent=True)
        if op_id is not None:
            for result in results:
                if not result.changed:
                    self._nothing[result.vdi.uuid, op_id] = result
            while len(self._nothing) > _NOTHING_KEPT:
                del self._nothing[next(iter(self._nothing))]
        return results

    def _prepare(self, wishes: Sequence[Wish], live: bool | None, op_id: str | None, change: Change) -> list[Reverted]:
        together = {"g": self._new_uuid(), "n": len(wishes)} if len(wishes) > 1 else {}
        results = []
        for wish in wishes:
            for vdi in filter(None, (wish.disk, wish.node)):  # who made the wish may have waited since
                if self._catalogue.get(vdi.uuid) is not vdi:
                    raise NotFound(kind="VDI", name=vdi.uuid)
            if wish.mode != COMMIT:
                self._refuse_if_used(wish.disk, live)
            if wish.node is not None:
                self._imitation.admit_revert(wish.node, wish.disk)
            step = _Step(self._keeper, self._catalogue, change, wish, together, self._new_uuid, live)
            results.append(step.done(op_id))
        changed = [result.vdi for result in results if result.changed]
        if 0 < len(changed) < len(wishes):
            self._count_only(changed, change)
        return results

    @staticmethod
    def _count_only(disks: Sequence[Vdi], change: Change) -> None:
        """The others of a group were as they should be, and have nothing to undo."""
        for disk in disks:
            history = change.meta(disk.volume.ident)["history"]
            if entries := history.get(UNDO):
                change.set(disk.volume.ident, history={**history, UNDO: [*entries[:-1], {**entries[-1], "n": len(disks)}]})

    @staticmethod
    def _refuse_if_used(disk: Vdi, live: bool | None) -> None:
        if live is False and not all(attachment.sees_changes for attachment in disk.attachments.values()):
            raise VdiInUse(operation="revert", uuid=disk.uuid, by=disk.used_by)

    def answers_to(self, op_id: str | None, mode: str) -> list[Reverted]:
        """What was answered to ``op_id`` the first time; nothing if this is the first time. O(disks). Raises `BadRequest` if that was not ``mode``."""
        found = []
        for disk in self._catalogue.vdis.values() if op_id is not None else ():
            for line in disk.history.get("done", ()):
                if line["op"] == op_id:
                    gone, lost = tuple(line.get("gone", ())), line.get("lost", False)
                    found.append(Reverted(disk, True, line["size"], line["m"], line.get("tip"), gone, lost, disk.size_bytes))
            if known := self._nothing.get((disk.uuid, op_id)):
                found.append(known)
        for known in found:
            if known.mode != mode:
                raise BadRequest(what=f"op_id {op_id!r}", reason=f"it was used for another operation, {known.mode}, before")
        return found

    def undo_wishes(self, disk: Vdi, mode: str = UNDO, group: bool = False) -> list[Wish]:
        """The wishes for `carry_out` to undo, or redo, the last operation; with ``group`` on all disks that it was done to at once.

        Raises `NothingToUndo`, `TipExpired`, `GroupChanged` if one of the others has been reverted since.
        """
        entry = _last(disk, mode)
        if not group or "g" not in entry:
            return [Wish(disk, mode)]
        others = self._catalogue.historic.values()
        members = [one for one in others if one.history.get(mode) and one.history[mode][-1].get("g") == entry["g"]]
        if len(members) != entry["n"]:
            reason = f"of {entry['n']} disks that were reverted together, {len(members)} are as that left them"
            raise GroupChanged(reason=reason)
        return [Wish(one, mode) for one in members]

    def undo_wishes_of_vm(self, disks: Collection[Vdi], mode: str = UNDO) -> list[Wish]:
        """The wishes to undo, or redo, what was last done to a VM with ``disks``.

        xapi reverts the disks of a VM one by one, and stops at the first that fails. So what counts as one are last steps to snapshots of
        one group with no long pause between them; disks that were not reverted this time stay as they are.

        Raises `NothingToUndo`, `TipExpired`, `GroupChanged`.
        """
        steps = sorted(((disk.history[mode][-1], disk) for disk in disks if disk.history.get(mode)), key=lambda step: step[0]["t"])
        if not steps:
            for disk in disks:
                _last(disk, mode)
        last, disk = steps.pop()
        if "g" in last or "s" not in last:
            return self.undo_wishes(disk, mode, group=True)
        wishes, time = [Wish(disk, mode)], _seconds(last["t"])
        for entry, disk in reversed(steps):
            if time - _seconds(entry["t"]) > _PAUSE_MOST_S:
                break
            if entry.get("s") == last["s"] and "g" not in entry:
                wishes.append(Wish(disk, mode))
                time = _seconds(entry["t"])
        return wishes


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _last(disk: Vdi, mode: str) -> dict:
    entries = disk.history.get(mode)
    if entries:
        return entries[-1]
    if disk.history.get("expired"):
        raise TipExpired(operation=mode, uuid=disk.uuid)
    raise NothingToUndo(operation=mode, uuid=disk.uuid)


class _Step:
    """One wish, being put into a change."""

    def __init__(
        self, keeper: Keeper, catalogue: Catalogue, change: Change, wish: Wish, together: dict, new_uuid: Callable[[], str],
        live: bool | None,
    ) -> None:
        self._keeper, self._catalogue, self._change, self._wish = keeper, catalogue, change, wish
        self._together, self._new_uuid, self._live = together, new_uuid, live
        self._disk, self._ident = wish.disk, wish.disk.volume.ident
        self._size_bytes = wish.disk.size_bytes
        self._now = keeper.now()
        self._tip: str | None = None
        self._gone: list[str] = []
        self._lost = False
        self._changed = True

    def done(self, op_id: str | None) -> Reverted:
        """Put it into the change, and say what will have become of the disk."""
        mode = self._wish.mode
        {RESET: self._reset, FOLLOW: self._follow, COMMIT: self._commit, UNDO: self._take_back, REDO: self._take_back}[mode]()
        size_changed = self._size_bytes != self._disk.size_bytes
        if self._changed:
            if op_id is not None:
                line = {"op": op_id, "m": mode, "size": size_changed, "tip": self._tip, "gone": self._gone, "lost": self._lost}
                history = self._change.meta(self._ident)["history"]
                done = [*history.get("done", ()), {key: value for key, value in line.items() if value or key == "size"}]
                self._change.set(self._ident, history={**history, "done": done[-_ANSWERS_KEPT:]})
            self._keeper.limit(self._change, self._disk)
        return Reverted(
            self._disk, self._changed, size_changed, mode, self._tip, tuple(self._gone), self._lost, self._size_bytes
        )

    # The modes.

    def _reset(self) -> None:
        wish, change, node = self._wish, self._change, self._wish.node.volume
        size_bytes = self._disk.size_bytes if wish.keep_size else node.size_bytes
        if size_bytes < node.size_bytes:
            raise ShrinkRefused(uuid=self._disk.uuid, old_bytes=node.size_bytes, size=size_bytes)
        moves = self._disk.volume.map.root != node.map.root or size_bytes != self._disk.size_bytes
        going = self._going(node.ident)
        if not moves:
            self._give_to_boot_base(node.ident, size_bytes)
        if not moves and not going:
            self._changed = False
            return
        head = self._leave(going) if moves or size_bytes != node.size_bytes else node.ident
        if moves:
            self._take_over(node.ident, size_bytes)
        self._note({"head": head, "show": going}, node.ident if moves else self._disk.parent)
        self._let_go(going)

    def _follow(self) -> None:
        tip, change = self._wish.node.volume, self._change
        self._refuse_if_attached(tip.ident)
        base = change.parent(tip.ident)
        going = [ident for ident in self._going(base) if ident != tip.ident]
        head = self._leave(going)
        self._take_over(tip.ident, tip.size_bytes)
        meta = change.meta(tip.ident)
        self._note({"head": head, "show": going}, base, origin=[meta["uuid"], meta["snapshot_time"]], is_open=meta["tip"] == CRASH)
        self._keeper.remove_node(change, tip.ident)
        self._let_go(going)

    def _commit(self) -> None:
        change, old = self._change, self._wish.node.volume.ident
        going = [ident for ident in self._going(old) if ident != old]
        if self._wish.discard:
            self._note({"head": None, "show": [old, *going]}, self._disk.parent)
            self._let_go([old, *going])
            return
        if self._disk.parent == old and change.same_content(self._ident, old) and not going:
            self._changed = False
            return
        self._refuse_if_attached(old)
        others = change.kid_count(old) - (self._disk.parent == old)
        meta = {**change.meta(old), **self._inherited(), "snapshot_time": self._now, "parent": old if others else change.parent(old)}
        if not self._together:  # it is of another moment now than those it was taken with
            meta.pop("group", None)
        new = change.create(self._disk.size_bytes, meta, self._ident)
        self._note({"head": None, "show": [old, *going], "hide": [meta["uuid"]]}, new)
        self._let_go(going)
        if self._keeper.on:
            change.hide(old, replaced=True)
        else:
            change.set(old, replaced=True)
            self._keeper.remove_node(change, old)

    def _take_back(self) -> None:
        change, mode = self._change, self._wish.mode
        entry = _last(self._disk, mode)
        show = [ident for ident in entry.get("show", ()) if change.exists(ident) and change.is_hidden(ident)]
        there = [self._catalogue.get(uuid) for uuid in entry.get("hide", ())]
        hide = [node.volume.ident for node in there if node is not None and node.snapshot_of == self._disk.uuid]
        self._refuse_if_taken(show, hide)
        head, node = None, entry["head"]
        for ident in show:
            change.show(ident)
        is_open, origin = False, None
        if node is not None:
            if not change.exists(node) or not change.has_content(node):
                raise TipExpired(operation=mode, uuid=self._disk.uuid)
            head = self._leave(hide, self._disk.history.get("origin"))
            self._take_over(node, change.size_bytes(node))
            if change.is_tip(node):
                meta = change.meta(node)
                is_open, origin = meta["tip"] == CRASH, [meta["uuid"], meta["snapshot_time"]]
        if node is None:
            base, stays = entry["base"], self._disk.parent != entry["from"]
            if stays or base is not None and not change.exists(base):
                base = self._disk.parent
        else:
            base = entry["base"] if change.exists(entry["base"]) else change.parent(node) if change.is_tip(node) else node
        back = [change.meta(ident)["uuid"] for ident in show]
        inverse = {"m": entry["m"], "head": head, "show": hide, "hide": back, **{k: entry[k] for k in "gns" if k in entry}}
        self._move_entry(mode, inverse, base, origin, is_open)
        if node is not None and change.is_tip(node) and not self._attached(node):
            self._keeper.remove_node(change, node)
        for ident in hide:
            self._refuse_if_attached(ident)
            uuid = change.meta(ident)["uuid"]
            self._gone.append(uuid)
            change.hide(ident, **({"replaced": True} if any(change.meta(other)["uuid"] == uuid for other in show) else {}))

    # Their parts.

    def _going(self, base: int | None) -> list[int]:
        """The nodes that ``discard`` and ``prune`` mean."""
        change, going = self._change, []
        if base is None or not change.exists(base):
            if self._wish.discard or self._wish.prune:
                raise NotFound(kind="snapshot", name="that the tip descends from")
            return going
        if self._wish.discard and not change.is_hidden(base):
            going.append(base)
        stack = [base] if self._wish.prune else []
        while stack:
            for kid in change.kids(stack.pop()):
                meta = change.meta(kid)
                stack.append(kid)
                if not is_hidden(meta) and meta["snapshot_of"] == self._disk.uuid:
                    going.append(kid)
        for ident in going:
            self._refuse_if_attached(ident)
        return going

    def _attached(self, ident: int) -> Vdi | None:
        """The node, if somebody is attached to it."""
        node = self._catalogue.node(ident)
        return node if node is not None and node.attachments else None

    def _refuse_if_attached(self, ident: int) -> None:
        if node := self._attached(ident):
            raise VdiInUse(operation="discard", uuid=node.uuid, by=node.used_by)

    def _refuse_if_taken(self, show: Iterable[int], hide: Collection[int]) -> None:
        """A uuid of what is to come back may be another's meanwhile. Raises `VdiExists`."""
        for ident in show:
            other = self._catalogue.get(self._change.meta(ident)["uuid"])
            if other is not None and other.volume.ident not in hide:
                raise VdiExists(uuid=other.uuid)

    def _leave(self, kept: Collection[int], origin: Sequence[str] | None = None) -> int | None:
        """The volume that holds what the head is, from now on: its base, if that is so and it stays or is ``kept``, else a new tip."""
        change, base = self._change, self._disk.parent
        if base is not None and change.has_content(base) and change.same_content(self._ident, base):
            if base in kept or not change.is_hidden(base):
                return base
        if not self._keeper.on:
            self._lost = True
            return None
        uuid, time = origin or (self._new_uuid(), self._now)
        meta = {
            "uuid": uuid, "name": f"tip@{time[11:19]}", "family": self._disk.family, "snapshot_of": self._disk.uuid, "snapshot_time": time,
            "type": self._disk.meta["type"], "parent": base, **self._inherited(), "tip": CRASH if self._disk.attachments or self._disk.history.get("open") else CLEAN,
        }  # fmt: skip
        self._tip = uuid
        return change.create(self._disk.size_bytes, meta, self._ident)

    def _inherited(self) -> dict[str, object]:
        """What is known about the content of the disk, and belongs to every copy of it."""
        meta = self._disk.meta
        return {**cbt.inherited(self._disk), **{key: meta[key] for key in ("chain", "image_format", "nbd") if key in meta}}

    def _take_over(self, node: int, size_bytes: int) -> None:
        held = not all(attachment.sees_changes for attachment in self._disk.attachments.values())
        if held and size_bytes < self._disk.size_bytes and self._live is not None:
            raise ShrinkRefused(uuid=self._disk.uuid, old_bytes=self._disk.size_bytes, size=size_bytes)
        self._change.reset(self._ident, node)
        self._give_to_boot_base(node, size_bytes)
        if "chain" in self._disk.meta or "chain" in self._change.meta(node):
            self._change.set(self._ident, chain=self._change.meta(node).get("chain"))
        if size_bytes != self._change.size_bytes(node):
            self._change.resize(self._ident, size_bytes)
        self._size_bytes = size_bytes

    def _give_to_boot_base(self, node: int, size_bytes: int) -> None:
        """A disk that forgets is taken back for good only if its base is, too; and a size that it keeps is its base's."""
        keeps_size = size_bytes != self._change.size_bytes(node)
        for base in boot.bases(self._disk):
            if keeps_size or not self._change.same_content(base, node):
                self._change.reset(base, node)
            if keeps_size:
                self._change.resize(base, size_bytes)

    def _let_go(self, going: Iterable[int]) -> None:
        """Hide nodes, or remove them if nothing is kept."""
        for ident in going:
            self._gone.append(self._change.meta(ident)["uuid"])
            if self._keeper.on:
                self._change.hide(ident)
            else:
                self._keeper.remove_node(self._change, ident)

    def _note(self, entry: dict, base: int | None, origin: list[str] | None = None, is_open: bool = False) -> None:
        """A new operation: there is one more to undo, and nothing to redo."""
        self._keeper.drop_entries(self._change, self._ident, REDO, len(self._disk.history.get(REDO, ())))
        if base is not None and not self._change.exists(base):  # a ghost that only what was dropped has needed: its kid has moved up
            base = self._change.parent(self._wish.node.volume.ident if self._wish.mode == FOLLOW else self._ident)
        self._set(base, origin, is_open or entry["head"] is None and bool(self._disk.history.get("open")))
        if self._keeper.on:
            history = self._change.meta(self._ident)["history"]
            line = {"m": self._wish.mode, "t": self._now, "base": self._disk.parent, "from": base, **entry, **self._together}
            stamp = self._wish.node.meta.get("group") or {}
            line |= {"s": stamp["id"]} if "vm" in stamp else {}
            history = {key: value for key, value in history.items() if key != "expired"}
            self._change.set(self._ident, history={**history, UNDO: [*history.get(UNDO, ()), _tidy(line)]})

    def _move_entry(self, stack: str, inverse: dict, base: int | None, origin: list[str] | None, is_open: bool) -> None:
        """The last entry of ``stack`` is being carried out; ``inverse`` takes that back."""
        self._set(base, origin, is_open)
        history = self._change.meta(self._ident)["history"]
        line = _tidy({**inverse, "t": self._now, "base": self._disk.parent, "from": base})
        other = [*history.get(_OTHER[stack], ()), line]
        self._change.set(self._ident, history={**history, stack: history[stack][:-1], _OTHER[stack]: other})

    def _set(self, base: int | None, origin: list[str] | None, is_open: bool) -> None:
        history = dict(self._change.meta(self._ident).get("history", {}))
        history |= {"gen": self._disk.gen + 1, "origin": origin, "open": is_open}
        self._change.set(self._ident, parent=base, history={key: value for key, value in history.items() if value})


def _tidy(entry: dict) -> dict:
    """``entry`` without what says nothing, to keep records small."""
    silent = {"from"} if entry["head"] is not None else set()
    return {key: value for key, value in entry.items() if (value or key in ("head", "base", "from")) and key not in silent}

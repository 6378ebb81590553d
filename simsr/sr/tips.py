"""Tips and what can be undone: how long they are kept, and who lets go of them first.

A disk keeps its newest ``tips_max`` tips and as many steps to undo, for ``tips_hours``; 0 of either means that neither is kept. Under
space pressure the oldest go early, one at a time, before any write is refused (`Keeper.give_up_oldest`). A tip to which somebody is
connected stays until they leave.

A step to undo, or to redo, is an entry in the metadata of the disk, the last one first to go back to:

    m, t        what was done (a mode), and when
    head        the volume whose content the disk gets; None: its content stays
    base        the node that the disk descends from then
    from        where head is None: the node that it descends from now, or, if it does not any more, base does not count; nor if base is gone
    show, hide  nodes that come back (volumes), and nodes that go (uuids: a tip that was used up comes back in another volume)
    g, n        the operation that it was a part of, and on how many disks
    s           the stamp of the VM's snapshots that the disk was taken back to one of

What ``show`` names is hidden, kept for this entry alone, and goes with it. Going back to an entry means passing all that are newer, so
when something goes that an entry needs, the older ones go, too.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from simsr.errors import BadRequest, NoSpace, StoreStopped, VdiInUse
from simsr.sr import boot
from simsr.sr.catalogue import Catalogue
from simsr.sr.change import Change
from simsr.sr.vdi import Tip, Vdi
from simsr.store.store import Store

__all__ = ["Keeper", "TIPS_MAX", "TIPS_HOURS", "check_tip_settings"]

TIPS_MAX, TIPS_HOURS = 8, 24
_TIPS_MOST, _HOURS_MOST = 1000, 24 * 3653
STACKS = ("undo", "redo")


def check_tip_settings(changes: dict) -> None:
    """Raise `BadRequest` if ``tips_max`` or ``tips_hours`` among ``changes`` is out of range."""
    for key, most in (("tips_max", _TIPS_MOST), ("tips_hours", _HOURS_MOST)):
        if key in changes and not 0 <= changes[key] <= most:
            raise BadRequest(what=f"{key} {changes[key]}", reason=f"it must be 0 to {most}; 0 keeps no tips")


class Keeper:
    """Keeps tips and entries within their limits. `limit` does so in a change that is under way, `expire` when time has passed."""

    def __init__(self, store: Store, catalogue: Catalogue, now: Callable[[], str]) -> None:
        self._store, self._catalogue, self.now = store, catalogue, now

    @property
    def tips_max(self) -> int:
        """How many tips a disk keeps."""
        return self._store.meta.get("tips_max", TIPS_MAX)

    @property
    def tips_hours(self) -> int:
        return self._store.meta.get("tips_hours", TIPS_HOURS)

    @property
    def on(self) -> bool:
        """Whether tips are kept at all."""
        return bool(self.tips_max and self.tips_hours)

    def begin(self) -> Change:
        return Change(self._store, self._catalogue)

    # Letting go, as a part of a change.

    def drop_entries(self, change: Change, disk: int, stack: str, count: int) -> None:
        """Let go of the oldest ``count`` entries of a stack, and of what was kept for them."""
        if not count:
            return
        history = change.meta(disk)["history"]
        gone, rest = history[stack][:count], history[stack][count:]
        change.set(disk, history={**history, stack: rest, "expired": True})
        for entry in gone:
            for ident in entry.get("show", ()):
                if change.exists(ident) and change.is_hidden(ident):
                    change.remove(ident)

    def forget(self, change: Change, node: int) -> None:
        """Snapshot or tip ``node`` is about to go: so do the entries that need it."""
        disk = self._catalogue.vdis.get(change.meta(node)["snapshot_of"])
        if disk is None or not change.exists(disk.volume.ident):
            return
        for stack in STACKS:
            entries = change.meta(disk.volume.ident).get("history", {}).get(stack, ())
            needed = [index for index, entry in enumerate(entries) if entry.get("head") == node]
            if needed:
                self.drop_entries(change, disk.volume.ident, stack, needed[-1] + 1)

    def remove_node(self, change: Change, node: int) -> None:
        """Let go of a snapshot or tip for good."""
        self.forget(change, node)
        change.remove(node)

    def remove_disk(self, change: Change, disk: Vdi) -> None:
        """Let go of a disk, of its tips, and of what can be undone; its snapshots stay. Raises `VdiInUse` if a tip is attached."""
        ident = disk.volume.ident
        for tip in self._catalogue.tips_of.get(disk.uuid, {}).values():
            if tip.attachments:
                raise VdiInUse(operation="delete the tip of", uuid=disk.uuid, by=tip.used_by)
        for stack in STACKS:
            self.drop_entries(change, ident, stack, len(disk.history.get(stack, ())))
        for tip in change.tips(disk.uuid):
            change.remove(tip)
        for base in boot.bases(disk):
            change.delete(base)
        change.remove(ident)

    def limit(self, change: Change, disk: Vdi) -> None:
        """Keep a disk within the limits. A tip that this change makes is not touched."""
        ident, oldest = disk.volume.ident, self._oldest_time()
        tips = [tip for tip in change.tips(disk.uuid) if not change.is_new(tip) and not self._is_attached(tip)]
        too_many = len(change.tips(disk.uuid)) - (self.tips_max if self.on else 0)
        for index, tip in enumerate(tips):
            if index < too_many or change.meta(tip)["snapshot_time"] < oldest:
                self.remove_node(change, tip)
        for stack in STACKS:
            entries = change.meta(ident).get("history", {}).get(stack, ())
            late = sum(entry["t"] < oldest for entry in entries)
            self.drop_entries(change, ident, stack, max(late, len(entries) - (self.tips_max if self.on else 0), 0))

    def _oldest_time(self) -> str:
        """What is older has expired; times of one form, which are in order as texts."""
        form = "%Y-%m-%dT%H:%M:%SZ"
        return (datetime.strptime(self.now(), form) - timedelta(hours=self.tips_hours)).strftime(form)

    def _is_attached(self, tip: int) -> bool:
        node = self._catalogue.node(tip)
        return node is not None and bool(node.attachments)

    # Letting go, as a change of its own.

    def expire(self) -> int:
        """Let go of what is beyond the limits; returns how many disks that changed. O(disks that keep anything)."""
        changed = 0
        for disk in self._disks():
            change = self.begin()
            self.limit(change, disk)
            if change:
                change.commit(urgent=True)
                changed += 1
        return changed

    def _disks(self) -> list[Vdi]:
        with_tips = (self._catalogue.vdis.get(uuid) for uuid in self._catalogue.tips_of)
        return list({disk.uuid: disk for disk in (*self._catalogue.historic.values(), *with_tips) if disk is not None}.values())

    def give_up_oldest(self) -> bool:
        """Let go of the oldest thing that takes space and that only a revert could want back; False if there is none.

        For when a write would be refused otherwise. Pinned tips are snapshots, and are not touched.
        """
        found: list[tuple[str, int, str, Vdi | Tip]] = []
        for tip in self._catalogue.tips.values():
            if not tip.attachments:
                found.append((tip.meta["snapshot_time"], tip.volume.ident, "", tip))
        for disk in self._catalogue.historic.values():
            for stack in STACKS:
                times = [entry["t"] for entry in disk.history.get(stack, ()) if entry.get("show")]
                found += [(time, disk.volume.ident, stack, disk) for time in times[:1]]
        if not found:
            return False
        _, ident, stack, vdi = min(found, key=lambda one: one[:3])
        change = self.begin()
        if stack:
            entries = vdi.history[stack]
            count = next(index for index, entry in enumerate(entries) if entry.get("show")) + 1
            self.drop_entries(change, ident, stack, count)
        else:
            self.remove_node(change, ident)
        try:
            change.commit(urgent=True)
        except (NoSpace, StoreStopped):
            return False
        return True

    def pin(self, tip: Tip, name: str, description: str) -> None:
        """Make a snapshot of a tip: it is never let go of by itself, and everybody sees it. It keeps its uuid."""
        origin = self._catalogue.vdis[tip.snapshot_of].meta
        old = tip.volume.meta
        change = self.begin()
        change.become(tip.volume.ident, {
            **{key: value for key, value in old.items() if key != "tip"},
            "name": name, "description": description, "created_time": old["snapshot_time"], "managed": True, "type": origin["type"],
            "sharable": False, "read_only": False, "sm_config": dict(origin["sm_config"]),
        })  # fmt: skip
        change.commit()

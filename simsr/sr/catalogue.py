"""The catalogue: what the volumes of a store are, and the tree that they form. All of it follows from the volumes' metadata.

A volume is one of

* a disk (``snapshot_of`` is None), a snapshot, or a tip (it has ``tip``): what people and programs see;
* hidden (it has a ``role``, see `simsr.sr.hidden`): a snapshot or tip that was discarded and is kept for undo (`KEPT`), or the trace of one
  that is gone (`GHOST`): it has no content, and is there because two or more others descend from it. Other roles are nodes of no tree.

``parent`` names the volume of the node that the content of a volume descends from. Volume numbers are never used twice.

Invariants (`_check`): whatever a volume's parent names is there; ghosts have two kids at least; the indices agree with the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from simsr.sr.hidden import GHOST, KEPT, is_hidden
from simsr.sr.vdi import Tip, Vdi
from simsr.store.store import Store
from simsr.store.volume import Volume

__all__ = ["Catalogue"]


@dataclass(frozen=True)
class _Filed:
    """Under which keys a volume was entered, so that it is found there again when its metadata have changed."""

    uuid: str
    vdi: Vdi | None  # None: hidden
    parent: int | None
    tip_of: str | None
    group: str | None


class Catalogue:
    """The volumes of a store by what they are. Made of all of them once; `refresh` says that some have changed: O(those)."""

    def __init__(self, store: Store, sr: str, shown: Callable[[Vdi], dict[str, object]] = lambda _: {}) -> None:
        self._store, self._sr, self._shown = store, sr, shown
        self.vdis: dict[str, Vdi] = {}  # disks and snapshots
        self.tips: dict[str, Tip] = {}
        self.tips_of: dict[str, dict[int, Tip]] = {}  # uuid of the disk -> volume -> tip
        self.hidden: dict[int, Volume] = {}
        self.groups: dict[str, dict[int, Vdi]] = {}  # snapshots that were taken together
        self.historic: dict[int, Vdi] = {}  # disks with something to undo or redo
        self.kids: dict[int, set[int]] = {}
        self._filed: dict[int, _Filed] = {}
        self.refresh(store.volumes)

    def get(self, uuid: str) -> Vdi | None:
        """The disk, snapshot or tip of that uuid."""
        return self.vdis.get(uuid) or self.tips.get(uuid)

    def node(self, ident: int | None) -> Vdi | None:
        """The VDI that volume ``ident`` is, unless it is hidden or gone."""
        filed = self._filed.get(ident)
        return filed.vdi if filed else None

    def refresh(self, idents: Iterable[int]) -> None:
        """Volumes ``idents`` were made, changed or removed."""
        before = {ident: self._take_out(ident) for ident in idents}
        for ident, filed in before.items():
            if ident in self._store.volumes:
                self._enter(self._store.volumes[ident], filed.vdi if filed else None)
        for ident, filed in before.items():  # only now, so that the order of what stays does not change
            if filed is not None and filed.vdi is not None:
                held = self.tips if filed.tip_of else self.vdis
                if held.get(filed.uuid) is filed.vdi is not self.node(ident):
                    del held[filed.uuid]

    def _take_out(self, ident: int) -> _Filed | None:
        filed = self._filed.pop(ident, None)
        if filed is None:
            return None
        self.hidden.pop(ident, None)
        self.historic.pop(ident, None)
        for index, key in ((self.kids, filed.parent), (self.tips_of, filed.tip_of), (self.groups, filed.group)):
            if key is not None:
                index[key].discard(ident) if index is self.kids else index[key].pop(ident)
                if not index[key]:
                    del index[key]
        return filed

    def _enter(self, volume: Volume, old: Vdi | None) -> None:
        """``old``: what it was until now; whoever holds that goes on with it if it is still of the same kind."""
        ident, meta = volume.ident, volume.meta
        if meta.get("role", KEPT) not in (KEPT, GHOST):
            return
        uuid, parent, vdi, tip_of, group = meta["uuid"], meta.get("parent"), None, None, None
        if parent is not None:
            self.kids.setdefault(parent, set()).add(ident)
        if is_hidden(meta):
            self.hidden[ident] = volume
        elif "tip" in meta:
            tip_of = meta["snapshot_of"]
            vdi = self.tips[uuid] = old if isinstance(old, Tip) else Tip(volume, self._sr, self._shown)
            self.tips_of.setdefault(tip_of, {})[ident] = vdi
        else:
            vdi = self.vdis[uuid] = old if old is not None and not old.is_a_tip else Vdi(volume, self._sr, self._shown)
            if group := (meta.get("group") or {}).get("id"):
                self.groups.setdefault(group, {})[ident] = vdi
            if old is not None and old is not vdi:  # a tip that was pinned: whoever is connected to it stays
                vdi.attachments = old.attachments
            history = meta.get("history")
            if history and (history.get("undo") or history.get("redo")):
                self.historic[ident] = vdi
        self._filed[ident] = _Filed(uuid, vdi, parent, tip_of, group)

    def _check(self) -> None:
        """Verify the invariants; for tests."""
        volumes = {ident: one for ident, one in self._store.volumes.items() if one.meta.get("role", KEPT) in (KEPT, GHOST)}
        shown = [*self.vdis.values(), *self.tips.values()]
        assert {vdi.volume.ident for vdi in shown} | set(self.hidden) == set(volumes), "VDIs and volumes differ"
        for uuid, vdi in (*self.vdis.items(), *self.tips.items()):
            assert vdi.uuid == uuid and volumes[vdi.volume.ident] is vdi.volume and not is_hidden(vdi.volume.meta)
            assert vdi.is_a_tip == (uuid in self.tips) == ("tip" in vdi.volume.meta)
        for ident, volume in volumes.items():
            parent = volume.meta.get("parent")
            assert parent is None or parent in volumes and ident in self.kids[parent], f"volume {ident} descends from nothing"
        for ident, kids in self.kids.items():
            assert kids and all(volumes[kid].meta["parent"] == ident for kid in kids)
        for ident, volume in self.hidden.items():
            if volume.meta["role"] == GHOST:
                assert len(self.kids.get(ident, ())) >= 2, f"ghost {ident} is of no use"
                assert not volume.map.root and not volume.size_bytes
        fresh = Catalogue(self._store, self._sr)
        for index in ("tips_of", "groups"):
            assert {key: set(held) for key, held in getattr(self, index).items()} == {
                key: set(held) for key, held in getattr(fresh, index).items()
            }
        assert self.historic.keys() == fresh.historic.keys()

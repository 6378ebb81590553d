"""A change of several volumes that becomes one record: it is put together first, with the tree kept in order, and happens at the end.

What `Change` answers (`meta`, `parent`, `kid_count`, ...) is how things will be. Nothing happens before `commit`, so a change that is not
committed is a plan.
"""

from __future__ import annotations

from collections.abc import Iterator

from simsr.sr.catalogue import Catalogue
from simsr.sr.hidden import GHOST, KEPT, is_hidden
from simsr.store.store import Create, Delete, Op, Reset, Resize, SetMeta, Store

__all__ = ["Change"]


class Change:
    """See the file. Content: `create`, `reset`, `resize`. Nodes: `set`, `hide`, `show`, `remove`. At the end: `commit`.

    The operations on content happen in the order of the calls, and before anything is removed.
    """

    def __init__(self, store: Store, catalogue: Catalogue) -> None:
        self._store, self._catalogue = store, catalogue
        self._ops: list[Op] = []
        self._created: dict[int, Create] = {}
        self._metas: dict[int, dict] = {}
        self._moved: dict[int, int | None] = {}  # volume -> its new parent
        self._gone: dict[int, None] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self._ops or self._metas or self._gone)

    # How things will be.

    def exists(self, ident: int | None) -> bool:
        return ident is not None and ident not in self._gone and (ident in self._created or ident in self._store.volumes)

    def is_new(self, ident: int) -> bool:
        return ident in self._created

    def meta(self, ident: int) -> dict:
        """Its metadata; to be changed by `set` only."""
        if ident in self._created:
            return self._created[ident].meta
        return self._metas.get(ident) or self._store.volumes[ident].meta

    def parent(self, ident: int) -> int | None:
        return self.meta(ident).get("parent")

    def is_hidden(self, ident: int) -> bool:
        return is_hidden(self.meta(ident))

    def is_tip(self, ident: int) -> bool:
        return "tip" in self.meta(ident)

    def has_content(self, ident: int) -> bool:
        return self.meta(ident).get("role") != GHOST

    def size_bytes(self, ident: int) -> int:
        """The size of a volume that this change does not change."""
        return self._store.volumes[ident].size_bytes

    def same_content(self, ident: int, other: int) -> bool:
        """Whether two volumes, neither of them made by this change, hold the same map now."""
        a, b = self._store.volumes[ident], self._store.volumes[other]
        return a.map.root == b.map.root and a.size_bytes == b.size_bytes

    def tips(self, disk: str) -> list[int]:
        """The tips of a disk, the oldest first."""
        found = [*self._catalogue.tips_of.get(disk, ()), *self._created]
        tips = [ident for ident in found if ident not in self._gone and self.is_tip(ident) and not self.is_hidden(ident)]
        return sorted((i for i in tips if self.meta(i)["snapshot_of"] == disk), key=lambda i: (self.meta(i)["snapshot_time"], i))

    def kid_count(self, ident: int) -> int:
        """How many descend from ``ident`` directly. O(what the change touches)."""
        now = self._catalogue.kids.get(ident, ())
        left = sum(kid in now for kid in self._moved.keys() | self._gone.keys())
        return len(now) - left + sum(parent == ident for kid, parent in self._moved.items() if kid not in self._gone)

    def kids(self, ident: int) -> Iterator[int]:
        """Those that do."""
        for kid in sorted(self._catalogue.kids.get(ident, ())):
            if kid not in self._moved and kid not in self._gone:
                yield kid
        for kid, parent in self._moved.items():
            if parent == ident and kid not in self._gone:
                yield kid

    # Content.

    def create(self, size_bytes: int, meta: dict, source: int | None) -> int:
        ident = self._store.new_ident()
        self._created[ident] = Create(ident, size_bytes, meta, source)
        self._ops.append(self._created[ident])
        if meta.get("parent") is not None:
            self._moved[ident] = meta["parent"]
        return ident

    def reset(self, ident: int, source: int) -> None:
        self._ops.append(Reset(ident, source))

    def resize(self, ident: int, size_bytes: int) -> None:
        self._ops.append(Resize(ident, size_bytes))

    # Nodes.

    def set(self, ident: int, **fields: object) -> None:
        """Change some of the metadata of a volume; ``parent`` moves it in the tree."""
        old = self.meta(ident)
        if ident in self._created:
            old.update(fields)
            parent = None
        else:
            self._metas[ident] = {**old, **fields}
            parent = old.get("parent")
        if "parent" in fields and fields["parent"] != parent:
            self._moved[ident] = fields["parent"]
            self._settle(parent)

    def hide(self, ident: int, **fields: object) -> None:
        """Take a node away from everybody's sight, and keep it."""
        self.set(ident, role=KEPT, **fields)

    def show(self, ident: int) -> None:
        """Bring back what was hidden."""
        self._metas[ident] = {key: value for key, value in self.meta(ident).items() if key not in ("role", "replaced")}

    def become(self, ident: int, meta: dict) -> None:
        """Give a volume other metadata, with its place in the tree unchanged."""
        self._metas[ident] = {**meta, "parent": self.parent(ident)}

    def remove(self, ident: int) -> None:
        """Let go of a node and its content. Its only kid moves up in the tree; for two or more it stays as a ghost."""
        if ident in self._gone:
            return
        kids = self.kid_count(ident)
        if kids > 1:
            if self.has_content(ident):
                self._make_ghost(ident)
            return
        parent = self.parent(ident)
        kid = next(self.kids(ident), None)
        self._gone[ident] = None
        if kid is not None:
            self.set(kid, parent=parent)
        self._settle(parent)

    def delete(self, ident: int) -> None:
        """Delete a volume that is no node of the tree."""
        self._gone[ident] = None

    def _make_ghost(self, ident: int) -> None:
        empty = self._store.new_ident()
        self._ops += [Create(empty, 0, {}), Reset(ident, empty), Delete(empty)]
        meta = self.meta(ident)
        kept = {key: meta[key] for key in ("uuid", "name", "snapshot_of", "snapshot_time", "parent", "replaced") if key in meta}
        self._metas[ident] = {**kept, "role": GHOST}

    def _settle(self, ident: int | None) -> None:
        """A ghost that has lost a kid may be of no use any more."""
        if ident is not None and ident not in self._gone and not self.has_content(ident) and self.kid_count(ident) < 2:
            self.remove(ident)

    # The end.

    def commit(self, urgent: bool = False) -> None:
        """Make it happen: one record; ``urgent``: it may use the store's reserve. Raises `NoSpace`, `StoreStopped`, with nothing changed."""
        metas = [SetMeta(ident, meta) for ident, meta in self._metas.items() if ident not in self._gone]
        self._store.commit([*self._ops, *metas, *map(Delete, self._gone)], urgent)
        self._catalogue.refresh({*self._created, *self._metas, *self._moved, *self._gone})

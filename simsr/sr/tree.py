"""The tree of a disk, to be shown: its snapshots and tips, what they hang from, and where its head is."""

from __future__ import annotations

from collections.abc import Iterator

from simsr.sr.catalogue import Catalogue
from simsr.sr.hidden import is_hidden
from simsr.sr.vdi import Tip, Vdi
from simsr.store.store import Store
from simsr.store.volume import Volume

__all__ = ["describe_tree", "describe_steps"]


def describe_tree(store: Store, catalogue: Catalogue, disk: Vdi) -> dict:
    """Everything there is to tell, as JSON has it. O(volumes of the SR).

    ``nodes``: parents first, and the older first. ``id`` and ``parent`` are numbers of this SR. A hidden node that a commit replaced is a
    ``ghost``; one that was discarded is not shown, and what descends from it hangs from the node above.
    """
    wanted = {volume.ident: volume for volume in store.volumes.values() if volume.meta.get("snapshot_of") == disk.uuid and "role" not in volume.meta}
    wanted[disk.volume.ident] = disk.volume
    for volume in list(wanted.values()):
        for above in _above(store, volume):
            if is_hidden(above.meta) and not above.meta.get("replaced"):
                continue
            wanted.setdefault(above.ident, above)
    parents = {ident: next((one.ident for one in _above(store, volume) if one.ident in wanted), None) for ident, volume in wanted.items()}
    base = catalogue.node(parents[disk.volume.ident])
    return {
        "vdi": disk.uuid, "name": disk.name, "gen": disk.gen, "base": base.uuid if base else None, "dirty": _is_dirty(store, disk),
        "nodes": [_node(catalogue, disk, wanted[ident], parents[ident]) for ident in _in_order(wanted, parents, disk)],
        "undo": describe_steps(disk, "undo"), "redo": describe_steps(disk, "redo"),
    }  # fmt: skip


def describe_steps(disk: Vdi, stack: str) -> list[dict]:
    """What can be undone or redone, the next one first."""
    return [{"mode": entry["m"], "time": entry["t"], "disks": entry.get("n", 1)} for entry in reversed(disk.history.get(stack, ()))]


def _above(store: Store, volume: Volume) -> Iterator[Volume]:
    while (parent := volume.meta.get("parent")) is not None:
        volume = store.volumes[parent]
        yield volume


def _is_dirty(store: Store, disk: Vdi) -> bool:
    """Whether the head is not what its base is."""
    base = store.volumes.get(disk.parent)
    ours = disk.volume
    return base is None or is_hidden(base.meta) or base.map.root != ours.map.root or base.size_bytes != ours.size_bytes


def _in_order(wanted: dict[int, Volume], parents: dict[int, int | None], disk: Vdi) -> list[int]:
    kids: dict[int | None, list[int]] = {}
    for ident, parent in parents.items():
        kids.setdefault(parent, []).append(ident)
    order: list[int] = []
    stack: list[int | None] = [None]
    while stack:
        ident = stack.pop()
        if ident is not None:
            order.append(ident)
        below = kids.get(ident, [])
        # The head last, tips behind snapshots: the trunk of the tree stays where it is when tips come and go.
        below.sort(key=lambda one: (one == disk.volume.ident, "tip" in wanted[one].meta, wanted[one].meta["snapshot_time"] or "", one))
        stack += reversed(below)
    return order


def _node(catalogue: Catalogue, disk: Vdi, volume: Volume, parent: int | None) -> dict:
    vdi, meta = catalogue.node(volume.ident), volume.meta
    kind = "ghost" if vdi is None else "head" if vdi is disk else "tip" if vdi.is_a_tip else "snapshot" if vdi.is_a_snapshot else "disk"
    return {
        "id": volume.ident, "parent": parent, "kind": kind, "uuid": meta["uuid"], "name": meta["name"], "time": meta["snapshot_time"],
        "size_bytes": volume.size_bytes, "used_bytes": volume.mapped_bytes, "of": meta["snapshot_of"],
        "consistency": vdi.consistency if isinstance(vdi, Tip) else None, "group": (meta.get("group") or {}).get("id"),
    }  # fmt: skip

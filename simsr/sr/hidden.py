"""Volumes that are no VDIs: they belong to one, or to an operation that is under way.

``role`` in the metadata says what such a volume is for, ``of`` the uuid of the VDI, ``name`` what people may be told. Nobody can name it, and
it goes with what it belongs to. What an operation was building when the daemon ended is nobody's: `left_over` finds it at the next start.
"""

from __future__ import annotations

from simsr.store.store import Delete, Store

__all__ = ["BOOT_BASE", "DRAFT", "KEPT", "GHOST", "hidden_meta", "is_hidden", "left_over"]

BOOT_BASE = "boot base"
"""What a disk with on_boot=reset goes back to; the disk's ``boot_base`` names it."""

DRAFT = "draft"
"""What an operation is building. Its last record makes it a part of a VDI, or takes it away."""

KEPT, GHOST = "kept", "ghost"
"""Nodes of the tree that a disk's history is (`simsr.sr.catalogue`): discarded, but to be had back; and gone, but others descend from it.
These have a uuid, the one they had, and ``snapshot_of`` in place of ``of``."""


def hidden_meta(role: str, uuid: str, name: str) -> dict:
    """Metadata of a hidden volume of VDI ``uuid``."""
    return {"role": role, "of": uuid, "name": name}


def is_hidden(meta: dict) -> bool:
    return "role" in meta


def left_over(store: Store) -> list[Delete]:
    """What removes the drafts in a store that was just opened. O(volumes)."""
    return [Delete(ident) for ident, volume in store.volumes.items() if volume.meta.get("role") == DRAFT]

"""Damage in the words of a storage repository: the store knows volumes by number, people know VDIs."""

from __future__ import annotations

from collections.abc import Iterable

from simsr.store.store import Store
from simsr.store.volume import Volume

__all__ = ["vdi_of", "damage_lines"]


def vdi_of(volume: Volume) -> dict[str, str]:
    """Uuid and name of the VDI that a volume is; its number if its metadata are not those of a VDI."""
    uuid, name = volume.meta.get("uuid") or volume.meta.get("of"), volume.meta.get("name")
    return {"vdi": uuid if isinstance(uuid, str) else f"volume {volume.ident}", "name": name if isinstance(name, str) else ""}


def damage_lines(store: Store, volumes: Iterable[int], offset: int, length: int, **more: object) -> list[dict]:
    """One line for each VDI, with the range cut to its size; one without a VDI if the damage is nobody's in particular."""
    lines = []
    for volume in (store.volumes[ident] for ident in volumes if ident in store.volumes):
        inside = max(0, min(length, volume.size_bytes - offset))
        lines.append({**more, **vdi_of(volume), "offset": offset, "length": inside})
    return lines or [{**more, "vdi": None, "name": "", "offset": 0, "length": 0}]

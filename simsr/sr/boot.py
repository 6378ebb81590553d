"""Disks that forget: with on_boot=reset every start of a VM finds the disk as it was when that was set (smapiv1.md, vdi_epoch_begin).

The content of that moment is the disk's *base*: a hidden volume that shares all of it, made by the record that sets the mode and gone
with the record that ends it, so neither is ever there without the other. An epoch is the time between the start of a VM and its end. Its
begin is one record, a `Reset` of the disk to its base, as a revert is; after a crash the disk is wholly as it was, or wholly as its base. Its
end does nothing: what the VM left can be looked at, and be kept with a snapshot, until the next one starts.

What else happens to such a disk:

* a **snapshot** or a **clone** takes what is in the disk now, and has on_boot=persist; the base stays (sm, by the way its chains are built,
  would make the snapshot the new base, so that what a running VM had written would stay for ever);
* **growing** it grows the base as well, in one record: the space that was added stays there;
* a **revert**, and a graft (`simsr.sr.compose`), is meant to last: it gives disk and base the new content, in one record;
* **deleting** it deletes the base; **persist** keeps what is in the disk now and drops the base;
* **CBT** and this exclude each other, as in xapi: the content would jump where no backup expects it.

The mode changes only while nobody is attached, and neither do epochs begin then.
"""

from __future__ import annotations

from collections.abc import Callable

from simsr.errors import BadRequest, WrongKind
from simsr.sr.hidden import BOOT_BASE, hidden_meta
from simsr.sr.vdi import Vdi
from simsr.store.store import Create, Delete, Op, Reset, Store
from simsr.store.volume import Volume

__all__ = ["PERSIST", "RESET", "check_mode", "switch", "bases", "begin", "follow"]

PERSIST, RESET = "persist", "reset"


def check_mode(vdi: Vdi, mode: str) -> None:
    """Raise `BadRequest` or `WrongKind` if ``vdi`` cannot be given ``mode``."""
    if mode not in (PERSIST, RESET):
        raise BadRequest(what=f"on_boot {mode!r}", reason=f"it is neither {PERSIST} nor {RESET}")
    if vdi.read_only:
        kind = "a snapshot" if vdi.is_a_snapshot else "read-only"
        raise WrongKind(operation="set on_boot of", uuid=vdi.uuid, kind=kind)
    if vdi.cbt_enabled:
        raise WrongKind(operation="set on_boot of", uuid=vdi.uuid, kind="one whose changed blocks are tracked (CBT)")


def switch(vdi: Vdi, meta: dict, mode: str, new_ident: Callable[[], int]) -> tuple[dict, list[Op]]:
    """(metadata of ``vdi`` in the other ``mode``, operations that belong in the record that sets them)."""
    if mode == RESET:
        ident = new_ident()
        base = hidden_meta(BOOT_BASE, vdi.uuid, f"{vdi.name} (at boot)")
        return {**meta, "boot_base": ident}, [Create(ident, vdi.size_bytes, base, vdi.volume.ident)]
    return {key: value for key, value in meta.items() if key != "boot_base"}, [Delete(base) for base in bases(vdi)]


def bases(vdi: Vdi) -> list[int]:
    """The base of ``vdi``, if it has one."""
    return [vdi.volume.meta["boot_base"]] if vdi.on_boot == RESET else []


def _differ(one: Volume, other: Volume) -> bool:
    return one.map.root != other.map.root or one.size_bytes != other.size_bytes


def begin(store: Store, vdi: Vdi) -> list[Op]:
    """What takes ``vdi`` back to its base; nothing if it is there, or has none."""
    return [Reset(vdi.volume.ident, base) for base in bases(vdi) if _differ(vdi.volume, store.volumes[base])]


def follow(store: Store, vdi: Vdi, source: Volume) -> list[Op]:
    """What gives the base of ``vdi``, if it has one, the content of ``source`` as well."""
    return [Reset(base, source.ident) for base in bases(vdi) if _differ(store.volumes[base], source)]

"""Changed block tracking: which units of 64 KiB of a disk are not what they were in an earlier snapshot (datapath.md 8).

Nothing is tracked while a disk is written to. What has changed is found by comparing two maps (`simsr.store.units`), so it is exact: across any
number of snapshots between, made or deleted, and across reverts. What CBT adds is the promise that the comparison stays possible
when the older snapshot's data has gone (`simsr.sr.drafts`), and the rules that backup programs know from xapi and sm:

* Enabling CBT on a disk begins a **chain**, which the snapshots made from then on belong to. Disabling it ends the chain for the disk, but not for
  its snapshots; enabling it again begins another one. A clone belongs to none.
* Changed blocks are told from a snapshot to a later one of the same chain, or to the disk itself. Anything else is sm's fault 460: the same VDI
  twice, no common chain, the wrong direction.
* A disk that a revert made smaller than the snapshot was is sm's fault 459. If it grew, all that is new counts as changed.
"""

from __future__ import annotations

from simsr.errors import CbtSizes, NoChangedBlocks, WrongKind
from simsr.sr.vdi import Vdi

__all__ = ["check_switch", "check_pair", "inherited", "refuse_without_data"]

SIZE_MAX_BYTES = 32 << 40
"""Of a disk whose changed blocks can be listed: the bitmap of a larger one would have more than 64 MiB."""

_NO_CBT_TYPES = frozenset({"metadata", "redo_log"})


def refuse_without_data(vdi: Vdi, operation: str) -> None:
    """Raise `WrongKind` if the data of ``vdi`` was destroyed."""
    if not vdi.has_data:
        raise WrongKind(operation=operation, uuid=vdi.uuid, kind="changed block metadata only (cbt_metadata); its data was destroyed")


def check_switch(vdi: Vdi) -> None:
    """Raise `WrongKind` if CBT can be neither enabled nor disabled on ``vdi``."""
    kind = None
    if vdi.is_a_snapshot:
        kind = "a snapshot"
    elif vdi.volume.meta["type"] in _NO_CBT_TYPES:
        kind = f"of type {vdi.volume.meta['type']}"
    elif vdi.on_boot != "persist":
        kind = f"set to on_boot={vdi.on_boot}"
    if kind:
        raise WrongKind(operation="track changed blocks of", uuid=vdi.uuid, kind=kind)


def inherited(vdi: Vdi) -> dict[str, str]:
    """What a snapshot of ``vdi`` takes over."""
    return {"cbt": vdi.cbt_chain} if vdi.cbt_enabled else {}


def check_pair(old: Vdi, new: Vdi) -> None:
    """Raise `NoChangedBlocks` or `CbtSizes` unless changed blocks are told from ``old`` to ``new``."""
    reason = None
    without = [vdi.uuid for vdi in (old, new) if not vdi.cbt_enabled]
    if old is new:
        reason = "they are the same"
    elif without:
        reason = f"CBT is not enabled for {' and '.join(without)}"
    elif old.cbt_chain != new.cbt_chain:
        reason = "they do not belong together: they are of different disks, or CBT was disabled between them"
    elif not old.is_a_snapshot or (new.is_a_snapshot and old.volume.ident > new.volume.ident):
        reason = "the first one is not the older one"
    elif new.size_bytes > SIZE_MAX_BYTES:
        reason = f"{new.size_bytes} bytes are more than {SIZE_MAX_BYTES}, for which one bitmap is made"
    if reason:
        raise NoChangedBlocks(old=old.uuid, new=new.uuid, reason=reason)
    if new.size_bytes < old.size_bytes:
        raise CbtSizes(old=old.uuid, new=new.uuid, reason=f"it has {new.size_bytes} bytes, fewer than the {old.size_bytes} of the older one")

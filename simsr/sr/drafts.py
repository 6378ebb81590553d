"""Operations that have to write before they can happen: a draft is filled for as long as it takes, and one record makes it the VDI's.

A draft is a hidden volume. While there is one nobody attaches to its VDI, reverts or deletes it; and until the last record nothing about the
VDI has changed, so a crash, an error or a full SR leave it as it was (`simsr.sr.hidden.left_over`).

**Destroying the data** of a snapshot with CBT: the draft becomes its table of digests (`simsr.store.births`), 16 bytes for each 64 KiB that hold anything, so
at most 512 MiB for 2 TiB. Then the snapshot takes the table for its content and is of type ``cbt_metadata``. Being data like any other the
table is checked, cleaned, checkpointed and recovered like it. Changed blocks from and to it depend on nothing else: snapshots beside it may be deleted, and
their disk reverted.

**Composing** (smapiv1.md, vdi_compose) lays the blocks of a VDI over the content of a parent: the draft begins as a copy of the parent, and gets
every block that the VDI has data in and that is not the parent's own block; then the VDI takes it for its content, keeping all else, and belongs to the parent's
family. The unit is a block of 4 KiB: one that holds any data hides the parent's, one that was never written, or holds only zeros, shows it.
The parent stays as it is, and is not needed any more. Data is copied because blocks can be shared within a family only.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from simsr.errors import BadSize, NoCbt, SimsrError, VdiReadOnly, WrongKind
from simsr.sr import boot, cbt
from simsr.sr.change import Change
from simsr.sr.hidden import DRAFT, hidden_meta
from simsr.sr.tips import STACKS
from simsr.sr.vdi import JOB, Attachment, Vdi
from simsr.store.births import Fingerprint
from simsr.store.store import Create, Delete
from simsr.store.volume import Volume
from simsr.store.walk import Diff

if TYPE_CHECKING:
    from simsr.sr.repository import Repository

__all__ = ["Draft", "Destruction", "Graft"]


class Draft:
    """What an operation on ``vdi`` is building in ``volume``. To be ended with `finish` or `abandon`.

    Raises `VdiInUse`, `NotFound`, `NoSpace` with nothing changed.
    """

    operation = ""
    frees = False  # so it may use the store's reserve

    def __init__(self, repository: Repository, vdi: Vdi, source: Volume | None = None) -> None:
        repository._refuse_if_gone(vdi)
        repository._refuse_if_used(vdi, self.operation)
        self.repository, self.vdi = repository, vdi
        store = repository.store
        ident = store.new_ident()
        meta = hidden_meta(DRAFT, vdi.uuid, f"{vdi.name} ({self.operation})")
        store.commit([Create(ident, vdi.size_bytes, meta, source.ident if source else None)])
        self.volume = store.volumes[ident]
        vdi.attachments[self] = Attachment(f"simsrd, to {self.operation} it", True, JOB)

    def _complete(self, change: Change) -> None:
        """Put into ``change`` what happens besides that the VDI takes over the content."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make the draft the content of the VDI, in one record. Raises `NoSpace`, `StoreStopped` with nothing changed."""
        vdi, volume = self.vdi, self.volume
        change = Change(self.repository.store, self.repository.catalogue)
        if vdi.size_bytes > volume.size_bytes:
            change.resize(volume.ident, vdi.size_bytes)
        change.reset(vdi.volume.ident, volume.ident)
        self._complete(change)
        change.delete(volume.ident)
        change.commit(urgent=self.frees)
        self.repository.detach(vdi, self)

    def abandon(self) -> None:
        """Take the draft away, if `finish` has not; the VDI is as it was."""
        self.repository.detach(self.vdi, self)
        if self.volume.ident in self.repository.store.volumes:
            with suppress(SimsrError):  # of a log that has stopped; then the next start takes it away
                self.repository.store.commit([Delete(self.volume.ident)])


class Destruction(Draft):
    """Drops the data of a snapshot, keeping what tells changed blocks. Raises `WrongKind`, `NoCbt` too."""

    operation = "destroy the data of"
    frees = True

    def __init__(self, repository: Repository, vdi: Vdi) -> None:
        cbt.refuse_without_data(vdi, self.operation)
        if not vdi.is_a_snapshot or vdi.is_a_tip:
            raise WrongKind(operation=self.operation, uuid=vdi.uuid, kind="not a snapshot")
        if not vdi.cbt_enabled:
            raise NoCbt(operation=self.operation, uuid=vdi.uuid)
        super().__init__(repository, vdi)

    def fingerprint(self, window: int) -> Fingerprint:
        """A job that makes the next part of the table."""
        return Fingerprint(self.repository.store, self.repository.births, self.vdi.volume, window)

    def _complete(self, change: Change) -> None:
        """Steps to undo that would bring back the data go with it."""
        ident = self.vdi.volume.ident
        self.repository.keeper.forget(change, ident)
        change.set(ident, type="cbt_metadata")


class Graft(Draft):
    """Lays the blocks of ``vdi`` over the content of ``parent``. Raises `WrongKind`, `VdiReadOnly`, `BadSize`, too."""

    operation = "compose"

    def __init__(self, repository: Repository, vdi: Vdi, parent: Vdi) -> None:
        for one in (vdi, parent):
            cbt.refuse_without_data(one, self.operation)
        repository._refuse_if_gone(parent)
        if vdi is parent:
            raise WrongKind(operation=self.operation, uuid=vdi.uuid, kind="the parent itself")
        if vdi.read_only:
            raise VdiReadOnly(uuid=vdi.uuid)
        repository._refuse_if_used(parent, "compose another one with")
        if parent.size_bytes > vdi.size_bytes:
            reason = f"the parent {parent.uuid} has {parent.size_bytes} bytes, and must not be larger than the VDI"
            raise BadSize(size=vdi.size_bytes, reason=reason)
        self._family = parent.family
        super().__init__(repository, vdi, parent.volume)

    def difference(self, start: int, ranges_max: int) -> Diff:
        """A job that finds where, from byte ``start`` on, the VDI has data that the draft has not got yet."""
        return Diff(self.repository.store, self.volume, self.vdi.volume, start, ranges_max)

    def _complete(self, change: Change) -> None:
        """As a clone of the parent the disk is the root of a tree; what it was before cannot be brought back."""
        ident = self.vdi.volume.ident
        for base in boot.bases(self.vdi):
            change.reset(base, self.volume.ident)
        for stack in STACKS:
            self.repository.keeper.drop_entries(change, ident, stack, len(self.vdi.history.get(stack, ())))
        change.set(ident, family=self._family, parent=None, history={"gen": self.vdi.gen + 1})

"""A storage repository: the VDIs of one store, and the rules for changing them.

Every change is one record of the log (`Store.commit`): it happens wholly or not at all, in the same order as the writes
around it, and is durable after the next flush, which the caller owes. Nothing here waits; the clock and the source of
uuids are handed in.

What a disk was, and going back to it, is the matter of `simsr.sr.history` (revert, undo), `wishes` (what is meant), `tips` (what is kept
without being asked for), `catalogue` and `change` (the tree). Uuid, location, name, links and everything else of a disk stay whatever it
is reverted to.

Invariants (`_check`): uuids are unique; a snapshot's map never changes; no VDI is attached twice for writing by different
hosts unless it is sharable, or they agree elsewhere (`Attachment.exclusive`); those of the catalogue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from simsr.errors import BadRequest, BadSize, NoSpace, NotFound, ShrinkRefused
from simsr.errors import SrInUse, SrNotEmpty, StoreStopped, VdiExists, VdiInUse, VdiReadOnly
from simsr.personalities import find_personality
from simsr.sr import boot, cbt
from simsr.sr.catalogue import Catalogue
from simsr.sr.change import Change
from simsr.sr.hidden import is_hidden, left_over
from simsr.sr.history import History, Reverted
from simsr.sr.imitation import Imitation
from simsr.sr.nbd_terms import NbdTerms
from simsr.sr.space import cap_for, check_limit, describe_space
from simsr.sr.tips import Keeper, check_tip_settings
from simsr.sr.vdi import FUSE, FUSE_CACHED, JOB, VDI_TYPES, Attachment, Vdi
from simsr.sr.wishes import Wishes, stamp_of
from simsr.store.births import Births, FingerprintDiff
from simsr.store.layout import BLOCK
from simsr.store.store import SPARES_MIN, Resize, SetMeta, Store
from simsr.store.units import UnitDiff
from simsr.store.walk import Diff, Survey, VolumeSpace

__all__ = ["Repository", "check_uuid", "check_text", "check_sm_config", "SIZE_MAX_BYTES", "SECTOR_BYTES"]

SECTOR_BYTES = 512
SIZE_MAX_BYTES = 1 << 48  # what the map's 36-bit block numbers address; LARGE_VDI of XenAPI ends far below
TEXT_MAX = 101 << 10  # xapi has no limit; this, twice (a disk and its snapshot) for two texts and sm_config, fits into a record
SM_CONFIG_MAX = 44 << 10
_SR_FIELDS = frozenset({"name", "description", "sm_config"})
_VDI_FIELDS = _SR_FIELDS | {"managed", "read_only", "sharable", "on_boot"}
_OWN_FIELDS = _SR_FIELDS | {"verify_reads", "tips_max", "tips_hours", "expose_tips"}
GROUP_MAX = 256

_RIVALS = {FUSE_CACHED: ("nbd", FUSE), "nbd": (FUSE_CACHED,), FUSE: (FUSE_CACHED,)}

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def check_uuid(text: str) -> str:
    """Return ``text`` in lower case. Raises `BadRequest` unless it is a uuid."""
    lower = text.lower()
    if not _UUID.fullmatch(lower):
        raise BadRequest(what=f"uuid {text!r}", reason="it is not of the form 8-4-4-4-12 hexadecimal digits")
    return lower


def _json_bytes(text: str) -> int:
    """What ``text`` takes in a record."""
    return len(json.dumps(text, ensure_ascii=False).encode()) - 2


def check_text(what: str, text: str, bytes_max: int = TEXT_MAX) -> str:
    """Return ``text``. Raises `BadRequest` if it is too long, holds a NUL, or cannot be written as UTF-8."""
    try:
        size_bytes = _json_bytes(text)
    except UnicodeEncodeError:
        raise BadRequest(what=what, reason="it is not valid Unicode") from None
    if size_bytes > bytes_max or "\0" in text:
        raise BadRequest(what=what, reason=f"it must have no NUL and at most {bytes_max} bytes of UTF-8 as JSON has it")
    return text


def check_sm_config(sm_config: dict[str, str]) -> dict[str, str]:
    """Return a copy of ``sm_config``. Raises `BadRequest` if it is too large or holds what `check_text` refuses."""
    texts = [text for item in sm_config.items() for text in item]
    if sum(_json_bytes(check_text("sm_config", text, SM_CONFIG_MAX)) for text in texts) > SM_CONFIG_MAX:
        raise BadRequest(what="sm_config", reason=f"it is larger than {SM_CONFIG_MAX} bytes as JSON has it")
    return dict(sm_config)


def _round_size(size_bytes: int) -> int:
    if not 0 < size_bytes <= SIZE_MAX_BYTES:
        raise BadSize(size=size_bytes, reason=f"a disk has 1 to {SIZE_MAX_BYTES} bytes")
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES


class Repository:
    """One SR.

    VDIs:       `create`, `delete`, `resize`, `update`, `set_nbd_terms`, `get`, ``vdis``
    History:    `snapshot`, `snapshot_group`, `clone`, `revert`; all else: ``history``, ``wishes``, ``keeper`` (tips); `begin_epoch`, `set_cbt`
    Use:        `attach`, `detach`, `written`
    Itself:     `describe`, `update_self`, `resize_self`, `check_deletable`
    Comparing:  `diff`, `changed_blocks`, `survey`
    """

    def __init__(self, store: Store, now: Callable[[], str], new_uuid: Callable[[], str]) -> None:
        self.store = store
        self.births = Births(store.pool)
        self._now, self._new_uuid = now, new_uuid
        self.catalogue = Catalogue(store, self.uuid, lambda vdi: self.imitation.shown(vdi))
        self.vdis, self.tips = self.catalogue.vdis, self.catalogue.tips
        self.imitation = Imitation(find_personality(self.personality), self.vdis, lambda: self.name, self._physical)
        self.keeper = Keeper(store, self.catalogue, now)
        self.history, self.wishes = History(self.catalogue, self.keeper, new_uuid, self.imitation), Wishes(self.catalogue)
        self._apply_settings()
        if left := left_over(store):
            store.commit(left)

    @property
    def uuid(self) -> str:
        return str(self.store.uuid)

    @property
    def name(self) -> str:
        return self.store.meta["name"]

    @property
    def limit_bytes(self) -> int | None:
        """What the SR may take on the host's disk; None: what there is."""
        return self.store.meta.get("limit_bytes")

    @property
    def personality(self) -> str:
        """The type of SR that this one is like (`simsr.personalities`)."""
        return self.store.meta.get("personality", "sim")

    @property
    def verify_reads(self) -> bool:
        """Whether every block read is held against its checksum, or only those that come from the disk."""
        return self.store.meta.get("verify_reads", True)

    @property
    def expose_tips(self) -> bool:
        """Whether tips are listed with the snapshots."""
        return self.store.meta.get("expose_tips", False)

    def _apply_settings(self) -> None:
        pool = self.store.pool
        pool.cap_segments, pool.verify_reads = cap_for(self.limit_bytes, self.store.geometry), self.verify_reads

    # VDIs.

    def get(self, uuid: str) -> Vdi:
        """Return the disk, snapshot or tip of that uuid. Raises `NotFound`."""
        vdi = self.catalogue.get(uuid)
        if vdi is None:
            raise NotFound(kind="VDI", name=uuid)
        return vdi

    def create(
        self, size_bytes: int, *, uuid: str | None = None, name: str = "", description: str = "", type: str = "user",
        sharable: bool = False, read_only: bool = False, sm_config: dict[str, str] | None = None,
    ) -> Vdi:  # fmt: skip
        """Make an empty disk; its size is rounded up to whole sectors. Raises `BadRequest`, `BadSize`, `VdiExists`."""
        if type not in VDI_TYPES:
            raise BadRequest(what=f"VDI type {type!r}", reason=f"it is none of {', '.join(sorted(VDI_TYPES))}")
        size_bytes, more = self.imitation.admit(_round_size(size_bytes), sm_config or {})
        return self._add(
            size_bytes, None, uuid, name=check_text("name", name), sharable=sharable, read_only=read_only,
            description=check_text("description", description), type=type, sm_config=check_sm_config(sm_config or {}),
            snapshot_of=None, snapshot_time=None, **more,
        )  # fmt: skip

    def _add(self, size_bytes: int, source: Vdi | None, uuid: str | None, **meta: object) -> Vdi:
        change = Change(self.store, self.catalogue)
        ident = self._put_in(change, size_bytes, source, uuid, **meta)
        change.commit()
        return self.catalogue.node(ident)

    def _put_in(self, change: Change, size_bytes: int, source: Vdi | None, uuid: str | None, **meta: object) -> int:
        """Make a VDI a part of ``change``; returns the number of its volume."""
        if source is not None:
            self._refuse_if_gone(source)
            cbt.refuse_without_data(source, "copy")
        uuid = self._new_uuid() if uuid is None else check_uuid(uuid)
        if self.catalogue.get(uuid):
            raise VdiExists(uuid=uuid)
        family = source.family if source else uuid
        meta = {"uuid": uuid, "family": family, "created_time": self._now(), "managed": True, **meta}
        return change.create(size_bytes, meta, source.volume.ident if source else None)

    def delete(self, vdi: Vdi) -> None:
        """Remove a VDI; its snapshots and clones stay as they are, its tips go with it (but see `Imitation.dying_with`). Raises `VdiInUse`, `NotFound`."""
        self._refuse_if_gone(vdi)
        dying = [vdi, *self.imitation.dying_with(vdi)]
        for one in dying:
            self._refuse_if_used(one, "delete")
        change = Change(self.store, self.catalogue)
        for one in dying:
            if one.is_a_snapshot:
                self.keeper.remove_node(change, one.volume.ident)
            else:
                self.keeper.remove_disk(change, one)
        change.commit(urgent=True)

    def resize(self, vdi: Vdi, size_bytes: int) -> None:
        """Grow a disk, attached or not; clients see it when they connect anew. Raises `ShrinkRefused`, `VdiReadOnly`."""
        self._refuse_if_gone(vdi)
        size_bytes = _round_size(size_bytes)
        cbt.refuse_without_data(vdi, "resize")
        if vdi.read_only:
            raise VdiReadOnly(uuid=vdi.uuid)
        size_bytes = self.imitation.admit_resize(vdi, size_bytes)
        if size_bytes < vdi.size_bytes:
            raise ShrinkRefused(uuid=vdi.uuid, old_bytes=vdi.size_bytes, size=size_bytes)
        if size_bytes > vdi.size_bytes:
            self.store.commit([Resize(ident, size_bytes) for ident in (vdi.volume.ident, *boot.bases(vdi))])

    def update(self, vdi: Vdi, **changes: object) -> None:
        """Change any of name, description, sm_config, managed, read_only, sharable, on_boot (`simsr.sr.boot`).

        Raises `BadRequest`, `VdiInUse`, `WrongKind`.
        """
        self._refuse_if_gone(vdi)
        if vdi.is_a_tip:
            raise BadRequest(what=f"a change of the tip {vdi.uuid}", reason="pin it first, which makes a snapshot of it")
        on_boot = changes.pop("on_boot", vdi.on_boot)
        meta = self._changed(vdi.volume.meta, changes, _VDI_FIELDS)
        if on_boot != vdi.on_boot:
            boot.check_mode(vdi, on_boot)
            self._refuse_if_used(vdi, "change on_boot of")
            meta, ops = boot.switch(vdi, meta, on_boot, self.store.new_ident)
            self.store.commit([*ops, SetMeta(vdi.volume.ident, meta)])
            return
        if meta != vdi.volume.meta:
            if meta["read_only"] and not vdi.read_only:
                self._refuse_if_used(vdi, "make read-only")
            hosts = [attachment for attachment in vdi.attachments.values() if attachment.kind == "attach"]
            if not meta["sharable"] and len(hosts) > 1 and any(host.writable for host in hosts):
                self._refuse_if_used(vdi, "stop sharing")
            self.store.commit([SetMeta(vdi.volume.ident, meta)])

    def set_nbd_terms(self, vdi: Vdi, **changes: object) -> None:
        """Change on which terms a VDI is served over NBD (`NbdTerms`), attached or not. Raises `BadRequest`."""
        self._refuse_if_gone(vdi)
        terms = NbdTerms.of(vdi.volume.meta).changed(**changes).as_meta()
        if terms != vdi.volume.meta.get("nbd"):
            self.store.commit([SetMeta(vdi.volume.ident, {**vdi.volume.meta, "nbd": terms})])

    def _changed(self, meta: dict, changes: dict, fields: frozenset[str]) -> dict:
        unknown = changes.keys() - fields
        if unknown:
            raise BadRequest(what=", ".join(sorted(unknown)), reason="there is no such field that can be changed")
        for key in ("name", "description"):
            if key in changes:
                check_text(key, changes[key])
        if "sm_config" in changes:
            changes["sm_config"] = check_sm_config(changes["sm_config"])
        return {**meta, **changes}

    # History.

    def snapshot(
        self, vdi: Vdi, *, uuid: str | None = None, name: str | None = None, description: str | None = None,
        sm_config: dict[str, str] | None = None, group: str | None = None, vm: str | None = None,
    ) -> Vdi:  # fmt: skip
        """Keep the content of ``vdi`` as it is now, attached or not, in a VDI that never changes. O(1).

        ``group``: a stamp; snapshots that carry the same one can be reverted to together. ``vm``: the uuid of the VM they are of.
        """
        change = Change(self.store, self.catalogue)
        if vm is not None and group is None:
            raise BadRequest(what="vm", reason="it belongs to a group, and there is none")
        stamp = None if group is None else stamp_of(check_text("group", group, 256), vm)
        ident = self._snapshot(change, vdi, uuid, name, description, sm_config, stamp)
        change.commit()
        return self.catalogue.node(ident)

    def snapshot_group(self, vdis: Sequence[Vdi], *, name: str | None = None, vm: str | None = None) -> list[Vdi]:
        """Snapshot several disks at one moment, in one record; with ``vm``, a uuid, those of a VM, which may have one only.

        Raises `BadRequest` if they are not two to 256 different ones.
        """
        least = 2 if vm is None else 1
        if len({vdi.uuid for vdi in vdis}) != len(vdis) or not least <= len(vdis) <= GROUP_MAX or any(vdi.is_a_snapshot for vdi in vdis):
            raise BadRequest(what="the group", reason=f"it must be {least} to {GROUP_MAX} disks, each of them once")
        change, stamp = Change(self.store, self.catalogue), stamp_of(self._new_uuid(), vm, len(vdis))
        idents = [self._snapshot(change, vdi, None, name, None, None, stamp) for vdi in vdis]
        change.commit()
        return [self.catalogue.node(ident) for ident in idents]

    def _snapshot(
        self, change: Change, vdi: Vdi, uuid: str | None, name: str | None, description: str | None, sm_config: dict | None,
        stamp: dict | None,
    ) -> int:  # fmt: skip
        if vdi.is_a_tip:
            raise BadRequest(what=f"a snapshot of the tip {vdi.uuid}", reason="pin it instead, which makes a snapshot of it")
        stamped = {} if stamp is None else {"group": stamp}
        parent = vdi.volume.ident if vdi.is_a_snapshot else vdi.parent
        more = {"snapshot_of": vdi.uuid, "snapshot_time": self._now(), "parent": parent, **cbt.inherited(vdi), **stamped}
        ident = self._copy(change, vdi, "snapshot", uuid, name, description, sm_config, **more)
        if not vdi.is_a_snapshot:
            change.set(vdi.volume.ident, parent=ident, history={**vdi.history, "gen": vdi.gen + 1})
        return ident

    def clone(
        self, vdi: Vdi, *, uuid: str | None = None, name: str | None = None, description: str | None = None,
        sm_config: dict[str, str] | None = None,
    ) -> Vdi:  # fmt: skip
        """Make a disk with the content of ``vdi``, which may be a snapshot or a tip. O(1)."""
        change = Change(self.store, self.catalogue)
        ident = self._copy(change, vdi, "clone", uuid, name, description, sm_config, snapshot_of=None, snapshot_time=None)
        change.commit()
        return self.catalogue.node(ident)

    def _copy(
        self, change: Change, vdi: Vdi, operation: str, uuid: str | None, name: str | None, description: str | None,
        sm_config: dict | None, **meta: object,
    ) -> int:  # fmt: skip
        old = vdi.meta
        self._refuse_if_gone(vdi)
        if "nbd" in old:
            meta["nbd"] = old["nbd"]
        more, source_meta = self.imitation.admit_copy(vdi, operation, -self.store.new_ident())
        if source_meta is not None:
            change.set(vdi.volume.ident, chain=source_meta["chain"])
        return self._put_in(
            change, vdi.size_bytes, vdi, uuid,
            name=old["name"] if name is None else check_text("name", name),
            description=old["description"] if description is None else check_text("description", description),
            type=old["type"], sharable=False, read_only=False,
            sm_config=dict(old["sm_config"]) if sm_config is None else check_sm_config(sm_config), **meta, **more,
        )  # fmt: skip

    def revert(self, snapshot: Vdi, target: str | None = None) -> Reverted:
        """Take the disk that ``snapshot`` was made of, or ``target``, back to it, as xapi wants it: mode ``reset``. O(1), and atomic.

        Raises what `Wishes.one` and `History.carry_out` raise, with nothing changed.
        """
        self._refuse_if_gone(snapshot)
        wish = self.wishes.one(snapshot, target=None if target is None else check_uuid(target))
        return self.history.carry_out([wish])[0]

    def pin(self, tip: Vdi, name: str | None = None, description: str = "") -> Vdi:
        """Make a snapshot of a tip, which keeps its uuid. Raises `BadRequest`, `NotFound`."""
        self._refuse_if_gone(tip)
        if not tip.is_a_tip:
            raise BadRequest(what=f"pinning VDI {tip.uuid}", reason="it is not a tip; snapshots stay until they are deleted")
        name = tip.name if name is None else check_text("name", name)
        self.keeper.pin(tip, name, check_text("description", description))
        return self.vdis[tip.uuid]

    def begin_epoch(self, vdi: Vdi) -> bool:
        """A VM is about to start with ``vdi``: take it back to its base if it is on_boot=reset; whether that changed it. O(1), atomic.

        Raises `NotFound`, `VdiInUse` with nothing changed.
        """
        self._refuse_if_gone(vdi)
        if vdi.on_boot == boot.RESET:
            self._refuse_if_used(vdi, "reset")
        ops = boot.begin(self.store, vdi)
        if ops:
            self.store.commit(ops)
        return bool(ops)

    def set_cbt(self, vdi: Vdi, enabled: bool) -> None:
        """Track changed blocks of ``vdi``, or stop it; nothing happens if it is so already. Raises `WrongKind`, `NotFound`."""
        self._refuse_if_gone(vdi)
        if enabled != vdi.cbt_enabled:
            cbt.check_switch(vdi)
            self.store.commit([SetMeta(vdi.volume.ident, {**vdi.volume.meta, "cbt": self._new_uuid() if enabled else None})])

    # Use.

    def attach(self, vdi: Vdi, key: object, client: str, writable: bool, kind: str, exclusive: bool = True) -> None:
        """Note that ``client`` uses ``vdi``; ``key`` identifies this use. The same key again replaces it.

        Raises `VdiReadOnly`, or `VdiInUse` when another host has it, one of the two writes, and one is ``exclusive`` (unless it is sharable).
        Connections are not told apart by host, so they do not exclude each other. What is read and written past the pages that a
        kernel keeps (`FUSE_CACHED`) and those who keep them exclude each other, unless it is a snapshot.
        """
        cbt.refuse_without_data(vdi, "attach")
        if any(other.kind == JOB for other in vdi.attachments.values()):
            raise VdiInUse(operation="attach", uuid=vdi.uuid, by=vdi.used_by)
        if writable and vdi.read_only:
            raise VdiReadOnly(uuid=vdi.uuid)
        self.imitation.admit_attach(vdi, writable, kind)
        if kind == "attach" and not vdi.volume.meta["sharable"]:
            for other_key, other in vdi.attachments.items():
                if other.kind == "attach" and other_key != key and (other.writable or writable) and (other.exclusive or exclusive):
                    raise VdiInUse(operation="attach", uuid=vdi.uuid, by=other.client)
        rivals = _RIVALS.get(kind, ()) if not vdi.is_a_snapshot else ()
        for other in vdi.attachments.values():
            if other.kind in rivals:
                raise VdiInUse(operation="attach", uuid=vdi.uuid, by=other.client)
        vdi.attachments[key] = Attachment(client, writable, kind, exclusive)

    def detach(self, vdi: Vdi, key: object, in_order: bool = True) -> None:
        """Note that the use ``key`` has ended, ``in_order`` or just so; nothing happens if there is none."""
        ended = vdi.attachments.pop(key, None)
        if ended is not None and ended.writable and in_order and not vdi.attachments:
            self._set_open(vdi, False)

    def written(self, vdi: Vdi) -> None:
        """Note that somebody attached is about to write: until the last one leaves in order, the content is as a crash leaves it.

        To be called before the first write of each attachment, so that no write is in the log without this in front of it.
        """
        self._set_open(vdi, True)

    def _set_open(self, vdi: Vdi, is_open: bool) -> None:
        if bool(vdi.history.get("open")) == is_open or self.vdis.get(vdi.uuid) is not vdi:
            return
        history = {key: value for key, value in vdi.history.items() if key != "open"} | ({"open": True} if is_open else {})
        try:
            self.store.commit([SetMeta(vdi.volume.ident, {**vdi.volume.meta, "history": history})])
        except (NoSpace, StoreStopped):
            pass  # no reason to refuse a write; whatever cannot be logged is not in the log after it either

    def _refuse_if_gone(self, vdi: Vdi) -> None:
        """Callers may have waited since they found ``vdi``, and a record about a VDI that is gone could not be replayed."""
        if self.catalogue.get(vdi.uuid) is not vdi:
            raise NotFound(kind="VDI", name=vdi.uuid)

    @staticmethod
    def _refuse_if_used(vdi: Vdi, operation: str) -> None:
        if vdi.attachments:
            raise VdiInUse(operation=operation, uuid=vdi.uuid, by=vdi.used_by)

    # Itself.

    def update_self(self, **changes: object) -> None:
        """Change any of name, description, sm_config, verify_reads, tips_max, tips_hours, expose_tips of the SR. Raises `BadRequest`."""
        check_tip_settings(changes)
        meta = self._changed(self.store.meta, changes, _OWN_FIELDS)
        if not meta["name"]:
            raise BadRequest(what="the name of the SR", reason="it is empty")
        if meta != self.store.meta:
            self.store.commit([SetMeta(0, meta)])
            self._apply_settings()
            self.keeper.expire()

    def resize_self(self, limit_bytes: int) -> None:
        """Change the size limit. Raises `BadSize`, also if what is in use would not fit."""
        check_limit(limit_bytes)
        pool = self.store.pool
        cap, in_use = cap_for(limit_bytes, self.store.geometry), pool.count - len(pool.spares)
        if cap < in_use + SPARES_MIN:
            needed = (in_use + SPARES_MIN + 1) * self.store.geometry.segment_bytes
            raise BadSize(size=limit_bytes, reason=f"the SR's segments in use and its reserve take {needed} bytes")
        self.store.commit([SetMeta(0, {**self.store.meta, "limit_bytes": limit_bytes})])
        self._apply_settings()

    def check_deletable(self) -> None:
        """Raise `SrNotEmpty` or `SrInUse` if the SR cannot be deleted."""
        for vdi in self.vdis.values():
            if vdi.attachments:
                raise SrInUse(name=self.name, by=f"VDI {vdi.uuid} is attached by {vdi.used_by}")
        if self.vdis:
            raise SrNotEmpty(name=self.name, count=len(self.vdis))

    def _physical(self) -> tuple[int, int]:
        """The size of the SR and how much of it is used, in bytes."""
        space = describe_space(self.store)
        size = self.limit_bytes or space["segment_bytes"] + space["map_bytes"] + self.store.directory.free_bytes()
        if self.imitation.personality.thick:
            return size, sum(map(self.imitation.utilisation_bytes, self.vdis.values()))
        return size, space["live_bytes"] + space["map_bytes"]

    def describe(self) -> dict:
        """Everything there is to tell, as JSON has it."""
        statistics = self.store.statistics()
        snapshots = sum(vdi.is_a_snapshot for vdi in self.vdis.values())
        physical_size_bytes, physical_utilisation_bytes = self._physical()
        return {
            "uuid": self.uuid,
            "name": self.name,
            "description": self.store.meta["description"],
            "sm_config": self.store.meta["sm_config"],
            "path": self.store.directory.path,
            "limit_bytes": self.limit_bytes,
            "personality": self.personality,
            "verify_reads": self.verify_reads,
            "tips_max": self.keeper.tips_max,
            "tips_hours": self.keeper.tips_hours,
            "expose_tips": self.expose_tips,
            "tip_count": len(self.tips),
            "physical_size_bytes": physical_size_bytes,
            "physical_utilisation_bytes": physical_utilisation_bytes,
            "virtual_allocation_bytes": sum(vdi.size_bytes for vdi in self.vdis.values()),
            "vdi_count": len(self.vdis),
            "snapshot_count": snapshots,
            "space": describe_space(self.store),
            "statistics": statistics,
        }

    # Comparing.

    def diff(self, old: Vdi, new: Vdi, start: int = 0, ranges_max: int | None = None, end: int | None = None) -> Diff:
        """A job that finds what changed from ``old`` to ``new``. Raises `NotFound`."""
        for vdi in (old, new):
            self._refuse_if_gone(vdi)
            cbt.refuse_without_data(vdi, "compare")
        return Diff(self.store, old.volume, new.volume, start, ranges_max, end)

    def changed_blocks(self, old: Vdi, new: Vdi) -> UnitDiff | FingerprintDiff:
        """A job that finds which units of 64 KiB differ (`simsr.sr.cbt`). Raises `NoChangedBlocks`, `CbtSizes`, `NotFound`."""
        for vdi in (old, new):
            self._refuse_if_gone(vdi)
        cbt.check_pair(old, new)
        if not (old.has_data and new.has_data):
            destroyed = not old.has_data, not new.has_data
            return FingerprintDiff(self.store, self.births, old.volume, new.volume, destroyed)
        return UnitDiff(self.store, old.volume, new.volume)

    def survey(self) -> Survey:
        """A job that finds who holds how much, and what deleting a VDI would free."""
        return Survey(self.store)

    def describe_survey(self, survey: Survey) -> dict:
        """What a survey that has run says of the SR."""
        return {
            "uuid": self.uuid,
            "name": self.name,
            "distinct_bytes": survey.distinct_blocks * BLOCK,
            "shared_bytes": survey.shared_blocks * BLOCK,
        }

    @staticmethod
    def vdis_of(survey: Survey) -> list[VolumeSpace]:
        """What a survey that has run found, of volumes that are VDIs."""
        return [space for space in survey.volumes if not is_hidden(space.meta)]

    @staticmethod
    def describe_volume_space(space: VolumeSpace) -> dict:
        """What a survey says of a VDI, which may be gone since."""
        return {
            "uuid": space.meta["uuid"],
            "name": space.meta["name"],
            "is_a_snapshot": space.meta["snapshot_of"] is not None,
            "virtual_bytes": space.size_bytes,
            "referenced_bytes": space.referenced_blocks * BLOCK,
            "exclusive_bytes": space.exclusive_blocks * BLOCK,
        }

    def _check(self) -> None:
        """Verify the invariants; for tests."""
        self.catalogue._check()
        for uuid, vdi in self.vdis.items():
            writers = [a for a in vdi.attachments.values() if a.kind == "attach" and a.writable]
            agreed = vdi.volume.meta["sharable"] or not any(a.exclusive for a in writers)
            assert len(writers) <= 1 or agreed, f"{uuid} has {len(writers)} writers"

"""What NBD clients see of a host: which VDIs, on which terms, and what has changed in them.

`NbdExports` is what `NbdServer` serves. For each client it makes an `_Offer`: the VDIs that this client may have. Who may is in the VDI's
metadata (`simsr.sr.nbd_terms`); a change of it holds for connections that are open, too, and ends those that it shuts out.

Metadata contexts: for each snapshot of the same family, in the same SR, that the client may have

    simsr:changed/UUID               blocks that differ from that snapshot: another block of the log, or a hole in one only
    qemu:dirty-bitmap:UUID or NAME   the same under a name that qemu and nbdinfo know the meaning of
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from nbd_export.handshake import ExportInfo
from nbd_export.limits import Terms
from nbd_export.peer import Peer
from nbd_export.transmission import ProtocolError
from simsr.daemon.engine import Disk
from simsr.daemon.walks import Walks
from simsr.errors import Ambiguous, NotFound, SimsrError
from simsr.sr.nbd_terms import NbdTerms
from simsr.sr.vdi import FUSE_CACHED, Vdi

if TYPE_CHECKING:
    from simsr.daemon.host import Host, Mounted

__all__ = ["NbdExports"]

CHANGED, BITMAP = "simsr:changed/", "qemu:dirty-bitmap:"
_DURABLE = {"auto": None, "flush": False, "each-write": True}


@dataclass
class _Door:
    """The connections of one VDI: key -> (who, how to end it)."""

    terms: Terms = field(default_factory=Terms)
    open: dict[object, tuple[Peer, Callable[[str], None]]] = field(default_factory=dict)


class NbdExports:
    """All VDIs of a host (`nbd_export.disk.Disks`)."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.walks = Walks(host)
        self._doors: WeakKeyDictionary[Vdi, _Door] = WeakKeyDictionary()

    def offer_to(self, peer: Peer) -> _Offer:
        return _Offer(self, peer)

    def door_of(self, vdi: Vdi) -> _Door:
        door = self._doors.get(vdi)
        if door is None:
            door = self._doors[vdi] = _Door()
            self._set_terms(vdi, door)
        return door

    def hang_up(self, vdi: Vdi, reason: str) -> None:
        """Close all connections of ``vdi``."""
        if door := self._doors.get(vdi):
            for _, hang_up in list(door.open.values()):
                hang_up(reason)

    def terms_changed(self, vdi: Vdi) -> None:
        """Have the connections of ``vdi`` follow its metadata."""
        if door := self._doors.get(vdi):
            self._set_terms(vdi, door)
            for peer, hang_up in list(door.open.values()):
                if not self.admits(vdi, peer):
                    hang_up(f"{peer} is not among those any more who may use VDI {vdi.uuid}")

    def _set_terms(self, vdi: Vdi, door: _Door) -> None:
        wanted = NbdTerms.of(vdi.volume.meta)
        door.terms.set_rate(wanted.bytes_s, wanted.requests_s)
        door.terms.each_write_durable = _DURABLE[wanted.durability]

    @staticmethod
    def admits(vdi: Vdi, peer: Peer) -> bool:
        meta = vdi.volume.meta
        return "nbd" not in meta or NbdTerms.of(meta).allows(peer.uid, peer.address, peer.subject)  # LIST asks for thousands

    def refusal(self, vdi: Vdi, peer: Peer) -> str:
        """Why ``peer`` must not connect to ``vdi`` now; empty if it may."""
        if not vdi.has_data:
            return f"the data of VDI {vdi.uuid} was destroyed, only its changed blocks are known"
        gate = self.host.mounted[vdi.sr].engine.gates.get(vdi.volume)
        if gate is not None and gate.barred:
            return f"VDI {vdi.uuid} is being reverted; try again"
        if not self.admits(vdi, peer):
            return f"VDI {vdi.uuid} is not for {peer}; 'simsr vdi set' says for whom it is"
        most = NbdTerms.of(vdi.volume.meta).connections_max
        if most and len(self.door_of(vdi).open) >= most:
            return f"VDI {vdi.uuid} has {most} connections, and no more are allowed"
        cached = next((one for one in vdi.attachments.values() if one.kind == FUSE_CACHED), None)
        if cached and not vdi.is_a_snapshot:
            return f"VDI {vdi.uuid} is open as a file that the kernel caches ({cached.client}); close it, or mount without a cache"
        return ""


class _Offer:
    """What one client may have (`nbd_export.disk.Offer`)."""

    def __init__(self, exports: NbdExports, peer: Peer) -> None:
        self._exports, self._host, self._peer = exports, exports.host, peer
        self._named: dict[str, dict[str, Vdi]] = {}  # export -> name of a snapshot -> it; of one moment of the handshake

    def find(self, name: str) -> ExportInfo | None:
        try:
            if name:
                mounted, vdi = self._host.find_vdi(name)
            else:
                ((mounted, vdi),) = ((m, vdi) for m in self._host.mounted.values() for vdi in m.repository.vdis.values())
        except (NotFound, Ambiguous, ValueError):
            return None
        if refusal := self._exports.refusal(vdi, self._peer):
            return ExportInfo(vdi.uuid, 0, True, refusal=refusal)
        read_only = mounted.repository.imitation.export_read_only(vdi)
        return ExportInfo(vdi.uuid, vdi.size_bytes, read_only, vdi.name.encode()[:256].decode(errors="ignore"))

    def names(self) -> Iterable[str]:
        return [vdi.uuid for vdi in self._host.all_vdis() if vdi.has_data and self._exports.admits(vdi, self._peer)]

    def contexts(self, name: str) -> Iterable[str]:
        return [prefix + vdi.uuid for vdi in self._snapshots(*self._host.find_vdi(name)) for prefix in (CHANGED, BITMAP)]

    def has_context(self, name: str, context: str) -> bool:
        return self._snapshot(name, context) is not None

    def attach(self, name: str, hang_up: Callable[[str], None]) -> Disk:
        """Raises `ProtocolError` if somebody else was faster, or the VDI has gone."""
        try:
            mounted, vdi = self._host.find_vdi(name)
            if refusal := self._exports.refusal(vdi, self._peer):
                raise ProtocolError(refusal)
            key, writable = object(), not mounted.repository.imitation.export_read_only(vdi)
            mounted.repository.attach(vdi, key, self._peer.label, writable, "nbd")
        except SimsrError as error:
            raise ProtocolError(str(error)) from None
        door = self._exports.door_of(vdi)
        door.open[key] = self._peer, hang_up

        def on_detach() -> None:
            door.open.pop(key)
            self._host.theatre.detach(disk)
            mounted.repository.detach(vdi, key, disk.in_order)

        changed, on_write = partial(self._changed, mounted, vdi), partial(mounted.repository.written, vdi)
        disk = Disk(mounted.engine, vdi.volume, on_detach, door.terms, changed, on_write if writable else None)
        self._host.theatre.attach(vdi, disk, self._peer.label)
        return disk

    # What has changed.

    def _snapshots(self, mounted: Mounted, vdi: Vdi) -> Iterable[Vdi]:
        """Those that ``vdi`` can be compared with."""
        for other in mounted.repository.vdis.values():
            if self._comparable(vdi, other) and self._exports.admits(other, self._peer):
                yield other

    @staticmethod
    def _comparable(vdi: Vdi, other: Vdi) -> bool:
        has_map = other.volume.meta["type"] != "cbt_metadata"
        return other.is_a_snapshot and other.family == vdi.family and other is not vdi and has_map

    def _snapshot(self, name: str, context: str) -> Vdi | None:
        """The snapshot that ``context`` means for the export ``name``."""
        mounted, vdi = self._host.find_vdi(name)
        prefix = next((prefix for prefix in (CHANGED, BITMAP) if context.startswith(prefix)), None)
        if prefix is None:
            return None
        reference = context.removeprefix(prefix)
        found = mounted.repository.vdis.get(reference)
        if found is not None:
            return found if self._comparable(vdi, found) and self._exports.admits(found, self._peer) else None
        return self._names_of_snapshots(name).get(reference) if prefix == BITMAP else None

    def _names_of_snapshots(self, name: str) -> dict[str, Vdi]:
        """The snapshots that a name means, and it alone. Looked up once for an offer: a client may ask for many."""
        if name not in self._named:
            found: dict[str, Vdi | None] = {}
            for snapshot in self._snapshots(*self._host.find_vdi(name)):
                found[snapshot.name] = None if snapshot.name in found else snapshot
            self._named[name] = {key: snapshot for key, snapshot in found.items() if key and snapshot is not None}
        return self._named[name]

    async def _changed(
        self, mounted: Mounted, vdi: Vdi, context: str, offset: int, length: int, extents_max: int
    ) -> list[tuple[int, bool]]:
        snapshot = self._snapshot(vdi.uuid, context)
        if snapshot is None:
            raise NotFound(kind="snapshot for metadata context", name=context)
        end = offset + length
        diff = await self._exports.walks.run(
            mounted, lambda: mounted.repository.diff(snapshot, vdi, offset, extents_max, end)
        )
        return _as_extents(diff.ranges, offset, end if diff.next_offset is None else diff.next_offset)[:extents_max]


def _as_extents(ranges: Iterable[tuple[int, int, bool]], offset: int, end: int) -> list[tuple[int, bool]]:
    """Ranges that have changed as extents that cover all from ``offset`` to ``end``, of alternating kind."""
    extents: list[tuple[int, bool]] = []
    at = offset
    for begin, length, _ in ranges:
        if begin == at and extents:  # the range before is changed in another way
            extents[-1] = extents[-1][0] + length, True
        else:
            if begin > at:
                extents.append((begin - at, False))
            extents.append((length, True))
        at = begin + length
    if at < end:
        extents.append((end - at, False))
    return extents

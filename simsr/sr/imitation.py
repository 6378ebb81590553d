"""An SR that is like another type: what its personality refuses, rounds, counts and deletes with something else.

Theory of chains. A file of VHD cannot fork: a snapshot turns it into a base that nobody writes to, and puts two images on it, one for the disk
and one for the snapshot. So a disk is a path through bases, and the path is what is too long at 30. ``meta["chain"]`` of a VDI names the
bases below it. A base with one image left on it is merged with that image by the garbage collector of real drivers, in its own time; here at once: it counts as
long as paths part there. A snapshot cannot be written to, so cloning it makes no base; a revert puts the disk beside the snapshot.

Nothing here changes anything: what an operation has to put into its record is returned, what cannot be is raised before. `Repository` asks
in every operation; with the personality ``sim`` nothing is refused, and nothing is added to a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simsr.errors import BadRequest, BadSize, NoSpace, SnapshotChainTooLong, Unsupported, VdiReadOnly
from simsr.personalities import Format, Personality
from simsr.sr.vdi import Vdi
from simsr.units import format_size

__all__ = ["Imitation", "chain_of"]


def _round_up(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes


def chain_of(vdi: Vdi, family: list[Vdi]) -> list[int]:
    """Return the bases below ``vdi`` that other images of its ``family`` stand on as well, the oldest first. O(family x chain)."""
    chain: list[int] = vdi.volume.meta.get("chain") or []
    parted = set()
    for other in family:
        if chain and other is not vdi:
            # Bases that were merged may be missing in one of the two, so places do not tell; all paths are in one tree.
            theirs = set(other.volume.meta.get("chain") or ())
            parted.update([base for base in chain if base in theirs][-1:])
    return [base for base in chain if base in parted]


class Imitation:
    """The rules of ``personality`` for the SR that holds ``vdis``.

    ``space``: returns how much the SR has and how much of it is used, in bytes. ``name`` of the SR is for messages.
    """

    def __init__(
        self, personality: Personality, vdis: Mapping[str, Vdi], name: Callable[[], str], space: Callable[[], tuple[int, int]]
    ) -> None:
        self.personality = personality
        self._vdis, self._name, self._space = vdis, name, space
        self._is_own = personality.name == "sim"

    # What a VDI is.

    def _format_of(self, vdi: Vdi) -> tuple[str, Format]:
        formats = self.personality.formats
        name = vdi.volume.meta.get("image_format")
        return (name, formats[name]) if name in formats else next(iter(formats.items()))

    def utilisation_bytes(self, vdi: Vdi) -> int:
        """What ``vdi`` takes of the SR. A snapshot in a thick SR takes what it holds, as its disk keeps the whole size."""
        if self._is_own:
            return vdi.volume.mapped_bytes
        whole = self.personality.thick and not vdi.is_a_snapshot
        return _round_up(vdi.size_bytes if whole else vdi.volume.mapped_bytes, self.personality.allocation_unit_bytes)

    def shown(self, vdi: Vdi) -> dict[str, object]:
        """What is to be told about ``vdi`` instead of its own fields."""
        return {"physical_utilisation_bytes": self.utilisation_bytes(vdi)} | (
            {"read_only": True, "sharable": True} if self.personality.read_only else {}
        )

    # What an operation may do.

    def admit(self, size_bytes: int, sm_config: dict[str, str]) -> tuple[int, dict[str, object]]:
        """Return the size that a new disk gets, and its format. Raises `BadRequest`, `BadSize`, `NoSpace`."""
        if self._is_own:
            return size_bytes, {}
        formats = self.personality.formats
        wanted = "raw" if sm_config.get("type") == "raw" else sm_config.get("image-format", next(iter(formats)))
        if wanted not in formats:
            raise BadRequest(what=f"image format {wanted!r}", reason=f"SRs like {self.personality.name} have {', '.join(formats)}")
        size_bytes = self._rounded(size_bytes, wanted)
        if self.personality.thick:
            self._need(size_bytes, 0, "a disk")
        return size_bytes, {"image_format": wanted}

    def _rounded(self, size_bytes: int, name: str) -> int:
        form = self.personality.formats[name]
        rounded = max(_round_up(size_bytes, form.size_unit_bytes), form.size_min_bytes)
        if rounded > form.size_max_bytes:
            reason = f"a {name} disk of an SR like {self.personality.name} has at most {format_size(form.size_max_bytes)}"
            raise BadSize(size=size_bytes, reason=reason)
        return rounded

    def _need(self, size_bytes: int, had_bytes: int, what: str) -> None:
        """Raise `NoSpace` unless the SR has room for what grows from ``had_bytes`` to ``size_bytes``."""
        unit = self.personality.allocation_unit_bytes
        size, used = self._space()
        needed = _round_up(size_bytes, unit) - _round_up(had_bytes, unit)
        if needed > size - used:
            free = format_size(max(0, size - used))
            reason = f"{what} takes its whole size of {format_size(size_bytes)} in an SR like {self.personality.name}; {free} are free"
            raise NoSpace(name=self._name(), reason=reason)

    def admit_resize(self, vdi: Vdi, size_bytes: int) -> int:
        """Return the size that ``vdi`` gets. Raises `Unsupported`, `BadSize`, `NoSpace`."""
        if self._is_own:
            return size_bytes
        if "VDI_RESIZE" not in self.personality.capabilities:
            raise Unsupported(operation=f"resizing VDI {vdi.uuid}", reason=f"SRs like {self.personality.name} cannot")
        rounded = self._rounded(size_bytes, self._format_of(vdi)[0])
        if self.personality.thick and rounded > vdi.size_bytes:
            self._need(rounded, vdi.size_bytes, "the disk")
        return rounded

    def admit_copy(self, vdi: Vdi, operation: str, base: int) -> tuple[dict[str, object], dict | None]:
        """Return what is to be in the metadata of the copy, and the metadata that ``vdi`` gets, None if it keeps its own.

        ``operation``: "snapshot" or "clone". ``base``: a number that no base of this SR has. Raises `Unsupported`,
        `SnapshotChainTooLong`, `NoSpace`.
        """
        if self._is_own:
            return {}, None
        self._refuse_unless(f"VDI_{operation.upper()}", vdi, operation, self._format_of(vdi)[1].clones)
        if self.personality.thick:
            # The disk had its whole size before; what it has written now belongs to the copies as well.
            needed = vdi.size_bytes if operation == "clone" else vdi.volume.mapped_bytes
            self._need(needed, 0, f"a {operation}")
        more: dict[str, object] = {"image_format": self._format_of(vdi)[0]}
        if self.personality.chain_max is None:
            return more, None
        chain = chain_of(vdi, self._family(vdi))
        if vdi.is_a_snapshot:
            return more | {"chain": chain}, None
        if len(chain) + 1 >= self.personality.chain_max:
            raise SnapshotChainTooLong(
                operation=operation, uuid=vdi.uuid, length=len(chain) + 1, personality=self.personality.name
            )
        chain = [*chain, base]
        return more | {"chain": chain}, vdi.volume.meta | {"chain": chain}

    def admit_revert(self, snapshot: Vdi, vdi: Vdi) -> dict | None:
        """Return the metadata that ``vdi`` gets, None if it keeps its own. Raises `Unsupported`, `NoSpace`."""
        if self._is_own:
            return None
        self._refuse_unless("VDI_REVERT", snapshot, "revert", self._format_of(snapshot)[1].reverts)
        if self.personality.thick and snapshot.size_bytes > vdi.size_bytes:
            self._need(snapshot.size_bytes, vdi.size_bytes, "the disk")
        chain = snapshot.volume.meta.get("chain")
        return None if chain == vdi.volume.meta.get("chain") else vdi.volume.meta | {"chain": chain}

    def _refuse_unless(self, capability: str, vdi: Vdi, operation: str, format_can: bool) -> None:
        here = self.personality.name
        if capability not in self.personality.capabilities:
            raise Unsupported(operation=f"{operation} of VDI {vdi.uuid}", reason=f"SRs like {here} have no {capability}")
        if not format_can:
            reason = f"an SR like {here} cannot do that with the format {self._format_of(vdi)[0]}"
            raise Unsupported(operation=f"{operation} of VDI {vdi.uuid}", reason=reason)

    def admit_attach(self, vdi: Vdi, writable: bool, kind: str) -> None:
        """Raise `VdiReadOnly` if a host wants to write in a library. Connections may, unless `export_read_only`."""
        if self.personality.read_only and writable and kind == "attach":
            raise VdiReadOnly(uuid=vdi.uuid)

    def export_read_only(self, vdi: Vdi) -> bool:
        """Whether connections may only read: also in a library, while a host has the VDI. Before that it is filled."""
        return vdi.read_only or (self.personality.read_only and any(a.kind == "attach" for a in vdi.attachments.values()))

    def dying_with(self, vdi: Vdi) -> list[Vdi]:
        """The snapshots that are deleted together with ``vdi``."""
        if not self.personality.snapshots_die or vdi.is_a_snapshot:
            return []
        return [other for other in self._vdis.values() if other.snapshot_of == vdi.uuid]

    def _family(self, vdi: Vdi) -> list[Vdi]:
        return [other for other in self._vdis.values() if other.family == vdi.family]

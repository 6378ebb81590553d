"""A VDI: an identity (uuid = location, name, links) with content, which is a volume of the store.

What has to survive is in ``volume.meta``, so it is in the log and ordered against writes. Who is attached is not: it ends
with the daemon.

Kinds: a disk can be written to; a snapshot cannot, and has a name that somebody gave it; a tip (`Tip`) is what a disk held that
nobody had named when it went somewhere else (`simsr.sr.history`). Snapshots and tips are nodes of the tree that a disk's history is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simsr.store.volume import Volume

__all__ = ["Vdi", "Tip", "Attachment", "VDI_TYPES", "CLEAN", "CRASH", "FUSE", "FUSE_CACHED", "JOB"]

FUSE, FUSE_CACHED = "fuse", "fuse-cached"

VDI_TYPES = frozenset(
    "user system suspend crashdump ha_statefile metadata redo_log rrd pvs_cache cbt_metadata ephemeral".split()
)
"""XenAPI's vdi_type."""

CLEAN, CRASH = "clean", "crash"
"""What a tip holds: a disk that everybody had let go of in order, or one that was left as a crash leaves it."""

JOB = "job"
"""The kind of use that an operation of the daemon itself makes of a VDI. It wants it for itself."""


@dataclass(frozen=True)
class Attachment:
    """Somebody who uses a VDI.

    ``kind`` is "nbd" for a connection, `FUSE` for an open file, `FUSE_CACHED` for one whose pages the kernel keeps, "attach" for a
    host that asked for it, `JOB` for an operation of the daemon itself. One that is not ``exclusive`` leaves it to others to see that
    only one host writes at a time.
    """

    client: str
    writable: bool
    kind: str
    exclusive: bool = True

    @property
    def sees_changes(self) -> bool:
        """Whether content that changes at a stroke, as in a revert, does no harm: what reads through FUSE finds the new one."""
        return not self.writable and self.kind in (FUSE, FUSE_CACHED)


class Vdi:
    """One VDI. Properties are read from the volume; `Repository` changes them."""

    def __init__(self, volume: Volume, sr: str, shown: Callable[[Vdi], dict[str, object]] = lambda _: {}) -> None:
        self.volume = volume
        self.sr = sr
        self._shown = shown  # what an SR that is like another type tells instead
        self.attachments: dict[object, Attachment] = {}

    @property
    def uuid(self) -> str:
        return self.meta["uuid"]

    @property
    def name(self) -> str:
        return self.meta["name"]

    @property
    def meta(self) -> dict:
        """What is kept of it beside its content."""
        return self.volume.meta

    @property
    def size_bytes(self) -> int:
        return self.volume.size_bytes

    @property
    def is_a_snapshot(self) -> bool:
        return self.meta["snapshot_of"] is not None

    @property
    def snapshot_of(self) -> str | None:
        """The uuid of the disk it was taken of; that disk may be gone."""
        return self.meta["snapshot_of"]

    @property
    def family(self) -> str:
        """The uuid of the VDI that it descends from by snapshots and clones."""
        return self.meta["family"]

    @property
    def read_only(self) -> bool:
        """Whether its content cannot change: snapshots, and disks marked so."""
        return self.is_a_snapshot or self.meta["read_only"]

    @property
    def is_a_tip(self) -> bool:
        return False

    @property
    def parent(self) -> int | None:
        """The volume of the node that the content descends from; None: it descends from none."""
        return self.volume.meta.get("parent")

    @property
    def history(self) -> dict:
        """Of a disk, what `simsr.sr.history` keeps about it. Not to be changed in place."""
        return self.volume.meta.get("history", {})

    @property
    def gen(self) -> int:
        """How often the disk, or the node that it descends from, was changed by anything but writes."""
        return self.history.get("gen", 0)

    @property
    def modified_ns(self) -> int:
        """When the content was changed last, in nanoseconds since the epoch; 0: not since the daemon was started."""
        return self.volume.modified_ns

    @modified_ns.setter
    def modified_ns(self, time_ns: int) -> None:
        self.volume.modified_ns = time_ns

    @property
    def on_boot(self) -> str:
        """"reset" if every start of a VM takes it back to its base (`simsr.sr.boot`), else "persist"."""
        return "reset" if "boot_base" in self.volume.meta else "persist"

    @property
    def cbt_chain(self) -> str | None:
        """What links a disk with the snapshots made of it while changed blocks were tracked (`simsr.sr.cbt`); None: they are not."""
        return self.volume.meta.get("cbt")

    @property
    def cbt_enabled(self) -> bool:
        return self.cbt_chain is not None

    @property
    def has_data(self) -> bool:
        """Whether it can be read: False for a snapshot whose data was destroyed."""
        return self.volume.meta.get("type") != "cbt_metadata"

    @property
    def used_by(self) -> str:
        """Who is attached, in words."""
        return ", ".join(sorted(attachment.client for attachment in self.attachments.values()))

    def describe(self) -> dict:
        """Everything there is to tell, as JSON has it."""
        meta = self.meta
        return {
            "uuid": meta["uuid"],
            "location": meta["uuid"],
            "sr": self.sr,
            "name": meta["name"],
            "description": meta["description"],
            "type": meta["type"],
            "size_bytes": self.size_bytes,
            "physical_utilisation_bytes": self.volume.mapped_bytes,
            "is_a_snapshot": self.is_a_snapshot,
            "is_a_tip": self.is_a_tip,
            "snapshot_of": meta["snapshot_of"],
            "family": meta["family"],
            "snapshot_time": meta["snapshot_time"],
            "created_time": meta["created_time"],
            "read_only": self.read_only,
            "sharable": meta["sharable"],
            "managed": meta["managed"],
            "on_boot": self.on_boot,
            "cbt_enabled": self.cbt_enabled,
            "sm_config": meta["sm_config"],
            "attached": [
                {"client": a.client, "writable": a.writable, "kind": a.kind} for a in self.attachments.values()
            ],
        } | self._shown(self)


class Tip(Vdi):
    """A tip looks like a snapshot of its disk. Its metadata are few, so that the record of a revert stays small."""

    _FIXED = {"description": "", "sharable": False, "managed": False, "read_only": True, "sm_config": {}}

    @property
    def meta(self) -> dict:
        meta = self.volume.meta
        return {**self._FIXED, "created_time": meta["snapshot_time"], **meta}

    @property
    def is_a_tip(self) -> bool:
        return True

    @property
    def consistency(self) -> str:
        """`CLEAN` or `CRASH`."""
        return self.volume.meta["tip"]

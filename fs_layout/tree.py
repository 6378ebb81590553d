"""The tree that is shown, without I/O: which names there are, what they lead to, how large and old it is.

    DIR/<sr>/<uuid>.raw                a disk
    DIR/<sr>/snapshots/<uuid>.raw      a snapshot, read-only
    DIR/<sr>/by-name/<name>.raw        links to both
    DIR/.simsr/status.json             the daemon; beside it sr/<uuid>.json and vdi/<uuid>.json

Everything is looked up afresh: nothing here is kept that could be out of date, but for the names that `fs_layout.names` gave away.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from fs_layout.names import Namer
from fs_layout.nodes import ROOT, Key
from fs_layout.source import File, Folder, Source

__all__ = ["Attributes", "Tree"]

SUFFIX = ".raw"
STATUS_DIR = ".simsr"
DIRECTORIES = frozenset({"root", "sr", "snapshots", "by-name", "status", "status-sr", "status-vdi"})
TEXTS = frozenset({"status.json", "sr.json", "vdi.json"})
"""Kinds of keys. Besides there are "vdi", which is a disk or a snapshot, and "link"."""

BLOCK_BYTES = 4096
_SECTOR_BYTES = 512  # the unit of st_blocks
_XATTR = "user.simsr."


@dataclass(frozen=True)
class Attributes:
    """What stat(2) tells."""

    mode: int
    size_bytes: int = 0
    allocated_bytes: int = 0
    modified_ns: int = 0
    links: int = 1

    @property
    def blocks(self) -> int:
        return -(-self.allocated_bytes // _SECTOR_BYTES)


def _time_ns(text: str | None) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1_000_000_000 if text else 0


class Tree:
    """The tree over a `Source`. Keys are (kind, uuid). Methods return None for what is not (or no longer) there."""

    def __init__(self, source: Source, shared: bool = False) -> None:
        """``shared``: the group may do what the owner may."""
        self._source = source
        self._shared = shared
        self._folder_names = Namer()
        self._link_names: dict[str, Namer] = {}

    def file(self, key: Key) -> File | None:
        return self._source.find(key[1])

    def exists(self, key: Key) -> bool:
        kind, uuid = key
        if kind in ("vdi", "link", "vdi.json"):
            return self._source.find(uuid) is not None
        if kind in ("sr", "snapshots", "by-name", "sr.json"):
            return uuid in self._source.folders()
        return kind in DIRECTORIES or kind == "status.json"

    # Names.

    def look_up(self, parent: Key, name: bytes) -> Key | None:
        """What ``name`` in the directory ``parent`` leads to."""
        kind, uuid = parent
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return None
        if kind in ("sr", "snapshots") and text.endswith(SUFFIX):
            folder, file = self._source.folders().get(uuid), self._source.find(text.removesuffix(SUFFIX))
            if folder and file and file.uuid in folder.vdis and file.is_a_snapshot == (kind == "snapshots"):
                return ("vdi", file.uuid)
            return None
        return dict(self.children(parent)).get(text)

    def children(self, parent: Key) -> Iterable[tuple[str, Key]]:
        """All (name, key) in a directory, in an order that stays."""
        kind, uuid = parent
        folders = self._source.folders()
        folder = folders.get(uuid)
        if kind == "root":
            named = self._folder_names.assign((one.uuid, one.name) for one in folders.values())
            return [(STATUS_DIR, ("status", "")), *((name, ("sr", one)) for name, one in sorted(named.items()))]
        if kind == "sr" and folder:
            own = [("by-name", ("by-name", uuid)), ("snapshots", ("snapshots", uuid))]
            return own + self._files(folder, snapshots=False)
        if kind == "snapshots" and folder:
            return self._files(folder, snapshots=True)
        if kind == "by-name" and folder:
            namer = self._link_names.setdefault(uuid, Namer())
            named = namer.assign((one.uuid, one.name) for one in folder.vdis.values() if one.name)
            return [(name + SUFFIX, ("link", one)) for name, one in sorted(named.items())]
        if kind == "status":
            return [("sr", ("status-sr", "")), ("status.json", ("status.json", "")), ("vdi", ("status-vdi", ""))]
        if kind == "status-sr":
            return [(f"{one}.json", ("sr.json", one)) for one in sorted(folders)]
        if kind == "status-vdi":
            return [(f"{one}.json", ("vdi.json", one)) for each in folders.values() for one in sorted(each.vdis)]
        return []

    @staticmethod
    def _files(folder: Folder, snapshots: bool) -> list[tuple[str, Key]]:
        return [(uuid + SUFFIX, ("vdi", uuid)) for uuid, one in sorted(folder.vdis.items()) if one.is_a_snapshot == snapshots]

    def folder_name(self, uuid: str) -> str | None:
        """The name of the directory of an SR."""
        for name, key in self.children(ROOT):
            if key == ("sr", uuid):
                return name
        return None

    def link_target(self, key: Key) -> str | None:
        file = self.file(key)
        if file is None:
            return None
        return f"../{'snapshots/' if file.is_a_snapshot else ''}{file.uuid}{SUFFIX}"

    # What they are.

    def attributes(self, key: Key) -> Attributes | None:
        kind, _ = key
        if not self.exists(key):
            return None
        if kind in DIRECTORIES:
            links = 2 + sum(child in DIRECTORIES for _, (child, _) in self.children(key))
            return Attributes(self._mode(stat.S_IFDIR, 0o500), modified_ns=self._source.started_ns, links=links)
        if kind in TEXTS:
            text = self.text(key) or b""
            return Attributes(self._mode(stat.S_IFREG, 0o400), len(text), len(text), self._source.started_ns)
        if kind == "link":
            return Attributes(stat.S_IFLNK | 0o777, len(self.link_target(key) or ""), modified_ns=self._source.started_ns)
        file = self.file(key)
        return file and self._file_attributes(file)

    def _file_attributes(self, file: File) -> Attributes:
        about = file.describe()
        allocated = about["physical_utilisation_bytes"]
        mode = self._mode(stat.S_IFREG, 0o400 if file.read_only else 0o600)
        if file.is_a_snapshot:
            modified_ns = _time_ns(about["snapshot_time"])
        else:
            modified_ns = file.modified_ns or max(_time_ns(about["created_time"]), self._source.started_ns)
        return Attributes(mode, file.size_bytes, allocated, modified_ns)

    def _mode(self, kind: int, owner: int) -> int:
        return kind | owner | (owner >> 3 if self._shared else 0)

    def text(self, key: Key) -> bytes | None:
        """The content of a JSON file."""
        kind, uuid = key
        about: object = None
        if kind == "status.json":
            names = {one: self.folder_name(one) for one in self._source.folders()}
            about = {**self._source.status(), "directories": names}
        elif kind == "sr.json" and (folder := self._source.folders().get(uuid)):
            about = folder.describe()
        elif kind == "vdi.json" and (file := self._source.find(uuid)):
            about = file.describe()
        return None if about is None else json.dumps(about, indent=2).encode() + b"\n"

    def extended(self, key: Key) -> dict[bytes, bytes]:
        """The extended attributes of a file or the directory of an SR."""
        kind, uuid = key
        values: dict[str, object] = {}
        if kind == "vdi" and (file := self.file(key)):
            about = file.describe()
            values = {
                "uuid": file.uuid, "name": file.name, "sr": about["sr"], "parent": about["snapshot_of"],
                "allocated_bytes": about["physical_utilisation_bytes"],
            }  # fmt: skip
        elif kind in ("sr", "snapshots", "by-name") and (folder := self._source.folders().get(uuid)):
            values = {"uuid": folder.uuid, "name": folder.name}
        return {(_XATTR + name).encode(): str(value).encode() for name, value in values.items() if value is not None}

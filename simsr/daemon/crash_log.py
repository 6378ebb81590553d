"""The log of everything that was written to one disk, in a file: what crash states are made of (`scenarios.crash_states`).

    one line of JSON    what it is a log of
    then records        kind (1 write, 2 zero, 3 flush), stable, offset, length as in `Entry`; behind a write its data

In order of the answers, as dm-log-writes has it. The file outlives the daemon; a record that a crash has cut short is left out. Appending
costs a copy into the page cache. A log that could not take everything says so (`failure`) and takes no more.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import Any

from scenarios.crash_states import Entry

__all__ = ["CrashLog", "LOG_BYTES_MAX", "ENTRIES_MAX"]

LOG_BYTES_MAX = 4 << 30
ENTRIES_MAX = 1 << 20

_RECORD = struct.Struct("<BBxxxxxxQQ")
_KINDS = ("", "write", "zero", "flush")
_MAGIC = "simsr crash log 1"


class CrashLog:
    """`create` begins one, `open` reads one that is there. ``about``: what it is a log of."""

    def __init__(self, fd: int, about: dict[str, Any], entries: list[Entry], places: list[int], end: int) -> None:
        self._fd, self.about, self.entries = fd, about, entries
        self._places, self._end = places, end
        self._map: mmap.mmap | None = None
        self.writes = sum(entry.kind != "flush" for entry in entries)
        self.bytes = sum(entry.length for entry in entries if entry.kind != "flush")
        self.failure = ""
        self.is_recording = False
        """What is told while it is not is not for this log."""

    @classmethod
    def create(cls, path: str, about: dict[str, Any]) -> CrashLog:
        """Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            end = os.write(fd, json.dumps({"magic": _MAGIC, **about}).encode() + b"\n")
        except OSError:
            os.close(fd)
            raise
        return cls(fd, about, [], [], end)

    @classmethod
    def open(cls, path: str) -> CrashLog:
        """Raises OSError, ValueError if it is something else."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            head = os.pread(fd, 65536, 0).partition(b"\n")[0]
            about = json.loads(head)
            if not isinstance(about, dict) or about.pop("magic", None) != _MAGIC:
                raise ValueError("it is no log of writes")
            entries, places, end = _scan(fd, len(head) + 1)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, about, entries, places, end)

    # What it is told (scenarios.write_cache.WriteLog).

    def wrote(self, offset: int, data: bytes | memoryview | None, length: int, stable: bool) -> None:
        self._append(Entry("zero" if data is None else "write", offset, length, stable or self.about["each_write"]), data)

    def mark(self) -> int:
        return self.writes

    def flushed(self, mark: int) -> None:
        self._append(Entry("flush", 0, mark), None)

    def _append(self, entry: Entry, data: bytes | memoryview | None) -> None:
        if self.failure or not self.is_recording:
            return
        record = _RECORD.pack(_KINDS.index(entry.kind), entry.stable, entry.offset, entry.length)
        size = len(record) + (len(data) if data is not None else 0)
        if len(self.entries) >= ENTRIES_MAX or self._end + size > LOG_BYTES_MAX:
            self.failure = f"it holds {ENTRIES_MAX} writes and flushes, or {LOG_BYTES_MAX >> 30} GiB, and there were more"
            return
        try:
            done = os.pwritev(self._fd, [record] if data is None else [record, data], self._end)
        except OSError as error:
            self.failure = f"it could not be written: {error.strerror}"
            return
        if done != size:
            self.failure = "it could not be written: there is no space left"
            return
        self._places.append(self._end + len(record))
        self._end += size
        self.entries.append(entry)
        if entry.kind != "flush":
            self.writes += 1
            self.bytes += entry.length

    # What it tells.

    def data(self, place: int) -> memoryview:
        """The bytes of the write at a place in `entries`."""
        if self._map is None or len(self._map) < self._end:
            self._map = mmap.mmap(self._fd, self._end, access=mmap.ACCESS_READ)
        start = self._places[place]
        return memoryview(self._map)[start : start + self.entries[place].length]

    def describe(self) -> dict[str, Any]:
        return {
            **self.about, "recording": self.is_recording, "writes": self.writes, "flushes": len(self.entries) - self.writes,
            "bytes": self.bytes, "failure": self.failure or None,
        }  # fmt: skip

    def close(self) -> None:
        """Views that `data` gave stay good."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _scan(fd: int, at: int) -> tuple[list[Entry], list[int], int]:
    entries: list[Entry] = []
    places: list[int] = []
    size = os.fstat(fd).st_size
    while at + _RECORD.size <= size:
        kind, stable, offset, length = _RECORD.unpack(os.pread(fd, _RECORD.size, at))
        if not 0 < kind < len(_KINDS):
            raise ValueError(f"the record at byte {at} is damaged")
        data = length if _KINDS[kind] == "write" else 0
        if at + _RECORD.size + data > size:
            break
        entries.append(Entry(_KINDS[kind], offset, length, bool(stable)))
        places.append(at + _RECORD.size)
        at += _RECORD.size + data
    return entries, places, at

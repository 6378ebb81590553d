"""A thin pool: disks that promise more than there is, and what happens when it runs out. Modelled on dm-thin.

Each write takes the chunks that its disk does not own yet. After a snapshot the chunks are shared, so the next write takes a
new one. When nothing is free the pool queues writes until it grows, and fails them after a while; or fails them at once.
Snapshots and clones of a full pool fail. When its metadata are full it is read-only for good.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from scenarios.clients import errno_of
from scenarios.request import Hang

__all__ = ["Pool", "CHUNK_BYTES"]

CHUNK_BYTES = 64 << 10

Fate = Hang | int | None
"""A hang, an errno, or nothing."""


class Pool:
    """``raise_event`` is called with the name of an event, once for each edge."""

    def __init__(
        self,
        name: str,
        capacity_bytes: int,
        raise_event: Callable[[str], None],
        low_water_bytes: int = 0,
        queues: bool = True,
        timeout_ns: int = 0,
        then: str = "ENOSPC",
        needs_check: bool = False,
    ) -> None:
        self.name, self._event = name, raise_event
        self._first_capacity_bytes = self.capacity_bytes = capacity_bytes
        self.used_bytes = self._taken_bytes = 0  # by our disks, and by others
        self._low_water_bytes, self._was_low = low_water_bytes, False
        self._queues, self._timeout_ns, self._then, self._needs_check = queues, timeout_ns, then, needs_check
        self.is_read_only = self._was_full = False
        self._owned: dict[str, set[int]] = {}

    @property
    def free_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.used_bytes - self._taken_bytes)

    def adopt(self, vdi: str, extents: list[tuple[int, int]]) -> None:
        """The disk has these (offset, length) already."""
        owned = self._owned.setdefault(vdi, set())
        before = len(owned)
        for offset, length in extents:
            owned.update(range(offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES)))
        self.used_bytes += (len(owned) - before) * CHUNK_BYTES
        self._levels()

    def fate(self, op: str, vdi: str, offset: int, length: int, now: int) -> Fate:
        """What becomes of a request because of the pool."""
        if op in ("write", "zero"):
            return self._write(vdi, offset, length, now)
        if op in ("snapshot", "clone", "resize"):
            if self.is_read_only or not self.free_bytes:
                return errno.ENOSPC
            if op == "snapshot":
                self._owned[vdi] = set()
        elif op == "trim" and not self.is_read_only:
            first, last = -(-offset // CHUNK_BYTES), (offset + length) // CHUNK_BYTES
            owned = self._owned.get(vdi, set())
            few = range(first, last) if last - first < len(owned) else [chunk for chunk in owned if first <= chunk < last]
            self._free(vdi, few)
        elif op == "delete":
            self._free(vdi, list(self._owned.pop(vdi, ())), gone=True)
        return None

    def _write(self, vdi: str, offset: int, length: int, now: int) -> Fate:
        if self.is_read_only:
            return errno.EIO
        owned = self._owned.setdefault(vdi, set())
        chunks = range(offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES))
        fresh = [chunk for chunk in chunks if chunk not in owned]
        if not fresh:
            return None
        if len(fresh) * CHUNK_BYTES > self.free_bytes:
            self._full()
            if not self._queues:
                return errno_of(self._then)
            return Hang(f"pool:{self.name}", now + self._timeout_ns, errno_of(self._then))
        owned.update(fresh)
        self.used_bytes += len(fresh) * CHUNK_BYTES
        self._levels()
        return None

    def _free(self, vdi: str, chunks: Any, gone: bool = False) -> None:
        owned = self._owned.get(vdi, set())
        freed = [chunk for chunk in chunks if gone or chunk in owned]
        owned.difference_update(freed)
        self.used_bytes -= len(freed) * CHUNK_BYTES
        self._levels()

    def _levels(self) -> None:
        low = self.free_bytes < self._low_water_bytes
        if low and not self._was_low:
            self._event("pool-low")
        self._was_low = low
        if not self.free_bytes:
            self._full()
        else:
            self._was_full = False

    def _full(self) -> None:
        if not self._was_full:
            self._was_full = True
            self._event("pool-full")

    def fill(self) -> None:
        """Somebody else takes all that is free."""
        self._taken_bytes += self.free_bytes
        self._levels()

    def fill_metadata(self) -> None:
        if not self.is_read_only:
            self.is_read_only = True
            self._event("pool-metadata-full")

    def grow(self, size_bytes: int) -> None:
        self.capacity_bytes += size_bytes
        if self.is_read_only and not self._needs_check:
            self.is_read_only = False
        self._levels()

    def reset(self) -> None:
        """What rules did to the pool is undone; what disks wrote stays."""
        self.capacity_bytes, self._taken_bytes, self.is_read_only = self._first_capacity_bytes, 0, False
        self._levels()

    def statistics(self) -> dict[str, Any]:
        return {
            "pool": self.name,
            "capacity_bytes": self.capacity_bytes,
            "used_bytes": self.used_bytes,
            "read_only": self.is_read_only,
        }

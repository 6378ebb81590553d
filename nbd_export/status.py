"""Answering BLOCK_STATUS: what is known of the blocks of a range, for each metadata context that the client selected.

``base:allocation`` and ``qemu:allocation-depth`` come from the disk's map, here and now if it is in memory. All other contexts say what has
changed since some snapshot; finding that out is a walk over two maps, in slices, and always a matter for a task.

The flags of ``qemu:allocation-depth`` are a number: 0 for what is a hole, 1 for what the disk has itself. Nothing lies deeper, because a map
is complete: a disk that was made from a snapshot shares its blocks and does not refer to it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from nbd_export import constants as c
from nbd_export.disk import Disk, is_answer
from nbd_export.replies import Replies
from nbd_export.transmission import Request

__all__ = ["BlockStatus"]

EXTENTS_MAX = 1 << 15

Extents = list[tuple[int, bool]]

_OF_ALLOCATION = {
    c.BASE_ALLOCATION: (c.NBD_STATE_HOLE | c.NBD_STATE_ZERO, 0),
    c.QEMU_ALLOCATION_DEPTH: (0, 1),
}
"""The flags of a hole and of data, for the contexts that are made of the allocation."""

_CHANGED = (0, c.STATE_CHANGED)


class BlockStatus:
    """The contexts of one connection: ``contexts`` maps their names to their ids."""

    def __init__(
        self, disk: Disk, contexts: dict[str, int], replies: Replies, failure: Callable[[Request, Exception], bytes]
    ) -> None:
        self._disk, self._replies, self._failure = disk, replies, failure
        self._names = {ident: name for name, ident in contexts.items()}

    def problem(self, request: Request) -> str | None:
        """Why ``request`` cannot be answered, whatever its range."""
        if not self._names:
            return "no metadata context was negotiated"
        if request.payload is not None:
            ids = self._ids(request)
            if len(ids) != len(set(ids)) or not ids or not set(ids) <= self._names.keys():
                return "its payload does not list contexts that were negotiated, each once"
        return None

    def now(self, request: Request) -> bytes | None:
        """The answer, or None if it has to wait (`later`)."""
        if any(self._names[ident] not in _OF_ALLOCATION for ident in self._ids(request)):
            return None
        try:
            extents = self._disk.allocation(request.offset, request.length, self._extents_max(request))
        except Exception as error:
            if not is_answer(error):
                raise
            return self._failure(request, error)
        return self._answer(request, extents, {}) if extents else None

    async def later(self, request: Request) -> bytes:
        """The answer, after waiting for disks and walks."""
        names = [self._names[ident] for ident in self._ids(request)]
        range_, most = (request.offset, request.length), self._extents_max(request)
        allocation: Extents = []
        try:
            if not _OF_ALLOCATION.keys().isdisjoint(names):
                allocation = await self._disk.allocation_cold(*range_, most)
            changed = {name: await self._disk.changed(name, *range_, most) for name in names if name not in _OF_ALLOCATION}
        except Exception as error:
            if not is_answer(error):
                raise
            return self._failure(request, error)
        return self._answer(request, allocation, changed)

    def _answer(self, request: Request, allocation: Extents, changed: dict[str, Extents]) -> bytes:
        statuses = []
        for ident in self._ids(request):
            name = self._names[ident]
            extents, values = (changed[name], _CHANGED) if name in changed else (allocation, _OF_ALLOCATION[name])
            statuses.append((ident, [(length, values[flag]) for length, flag in extents]))
        return self._replies.block_status(request, statuses)

    def _ids(self, request: Request) -> list[int]:
        """The contexts that a request is about: all, unless its payload says otherwise."""
        if request.payload is None:
            return list(self._names)
        return list(struct.unpack_from(f">{len(request.payload) // 4 - 2}I", request.payload, 8))

    @staticmethod
    def _extents_max(request: Request) -> int:
        return 1 if request.flags & c.NBD_CMD_FLAG_REQ_ONE else EXTENTS_MAX

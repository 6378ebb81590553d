"""What the FUSE face needs of the daemon. `simsr.sr` fits: a repository is a `Folder`, a VDI is a `File`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Disk", "File", "Folder", "Source", "Write"]

Write = tuple[int, int, memoryview | None]
"""(offset in bytes, length in bytes, the data or None for zeros)"""


class File(Protocol):
    """A disk or a snapshot. ``modified_ns``: when its content changed last, nanoseconds since the epoch; 0: not since the start."""

    modified_ns: int

    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def is_a_snapshot(self) -> bool: ...
    @property
    def read_only(self) -> bool: ...
    def describe(self) -> dict[str, Any]:
        """Everything about it, as the API tells it."""


class Folder(Protocol):
    """An SR."""

    @property
    def uuid(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def vdis(self) -> Mapping[str, File]: ...
    def describe(self) -> dict[str, Any]:
        """Everything about it, as the API tells it."""


class Scripted(Protocol):
    """A disk that a scenario is in force on. Every method may wait as long as the scenario says."""

    async def read(self, offset: int, length: int) -> bytearray:
        """The data of a range."""

    async def write(self, op: str, offset: int, length: int, payload: bytes, fua: bool) -> None:
        """``op``: "write"."""

    async def flush(self) -> None:
        """Make every write answered so far durable."""

    async def meet(self, op: str) -> None:
        """Let opening and closing take their time, or fail."""


class Disk(Protocol):
    """One attached disk. Methods that are not async never wait; ranges are inside the disk. Errors as in `Source`.

    ``scripted``: what to ask instead while a scenario is in force on the disk; it may come and go at any time.
    """

    scripted: Scripted | None
    in_order: bool  # set before `detach`: whether nothing was written after the last flush

    def read(self, batch: Sequence[tuple[int, memoryview]]) -> list[int]:
        """Fill the views from memory; returns the indices of those that would have to wait for a disk."""

    async def read_cold(self, batch: Sequence[tuple[int, memoryview]]) -> list[Exception | None]:
        """Fill the views, waiting for the disk; for each what went wrong, or None."""

    def write(self, batch: Sequence[Write]) -> int:
        """Write in order; returns how many are done. The rest has to wait: `write_rest`."""

    async def write_rest(self, batch: Sequence[Write], start: int) -> None:
        """Write ``batch[start:]``, waiting where that is needed."""

    def is_durable(self) -> bool:
        """Whether a flush has nothing to do."""

    def flush_soon(self, done: Callable[[Exception | None], None]) -> None:
        """Call ``done`` when every write answered so far is durable, or with the error; perhaps at once. It must not raise."""

    def detach(self) -> None:
        """The file is closed."""


class Source(Protocol):
    """All SRs. Errors are exceptions with an ``nbd_errno`` attribute (`simsr.errors`), or OSError."""

    started_ns: int
    """Since when the daemon runs: no disk is shown as older, for what happened before is not known."""

    def folders(self) -> Mapping[str, Folder]:
        """All SRs by uuid."""

    def find(self, uuid: str) -> File | None:
        """The VDI of that uuid."""

    def attach(self, uuid: str, client: str, writable: bool, cached: bool) -> Disk:
        """Attach for one open file. ``cached``: the kernel will keep its pages, so nobody may write past the kernel meanwhile;
        raises `VdiInUse` if somebody else is attached that may."""

    async def resize(self, uuid: str, size_bytes: int) -> None:
        """Grow a disk; returns when that is durable."""

    async def statvfs(self) -> os.statvfs_result:
        """The file system that the SRs live on."""

    def status(self) -> dict[str, Any]:
        """The state of the daemon, as JSON has it."""

    def is_busy(self) -> bool:
        """Whether other clients of the daemon are being served, so that nobody should wait for the next request on the CPU."""

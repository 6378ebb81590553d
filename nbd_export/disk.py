"""What the NBD server needs of a disk. The daemon provides it; this package knows nothing of stores and SRs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from nbd_export.handshake import Exports
from nbd_export.limits import Terms
from nbd_export.peer import Peer

__all__ = ["Disk", "Disks", "Dropped", "Offer", "Reply", "Scripted", "Write", "is_answer"]

Write = tuple[int, int, memoryview | None]
"""(offset in bytes, length in bytes, the data or None for zeros)"""


def is_answer(error: Exception) -> bool:
    """Whether an exception is one to answer a request with, and not a bug."""
    return isinstance(error, OSError) or hasattr(error, "nbd_errno")


class Dropped(Exception):
    """The client's connection is to be dropped; with ``error``, behind an answer with that. Where there is no connection to drop, it is
    an error like others."""

    nbd_errno = errno.ESHUTDOWN

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("dropped by a scenario")
        self.error = error


class Reply(Protocol):
    """The answer to one request, for who carries it out to send at its time: before the task that waits for it could go on.

    ``taken_ns``: when the request was taken from its connection, by trio's clock; ``woken_ns``: when the task that took it was
    last woken because something had come, None if it has taken others since.
    """

    taken_ns: int
    woken_ns: int | None

    def prepare(self, data: bytearray | None) -> None:
        """It has been carried out; ``data`` are those of a read."""

    def send(self) -> None:
        """Send what was prepared. Never waits, never raises."""


class Scripted(Protocol):
    """A disk that a scenario is in force on. Every method may wait as long as the scenario says; it raises `Dropped`, or an error as
    those of a `Disk` do. With a ``reply`` that has been prepared and sent when they return; not if they raise."""

    async def read(self, offset: int, length: int, reply: Reply | None = None) -> bytearray:
        """The data of a range."""

    async def write(
        self, op: str, offset: int, length: int, payload: bytes | bytearray | None, fua: bool, reply: Reply | None = None
    ) -> None:
        """``op``: write, or zero or trim without a payload."""

    async def flush(self, reply: Reply | None = None) -> None:
        """Make every write answered so far durable."""

    async def meet(self, op: str, offset: int = 0, length: int = 0) -> None:
        """Let another operation (extents, open, close) take its time, or fail, before it is carried out as usual."""


class Disk(Protocol):
    """One attached disk. Methods that are not async never wait; ranges are inside the disk.

    Errors are exceptions with an ``nbd_errno`` attribute, or OSError. ``size_bytes`` may grow meanwhile. ``scripted``: what to ask
    instead while a scenario is in force on the disk; it may come and go at any time.
    """

    size_bytes: int
    terms: Terms
    scripted: Scripted | None
    client_kind: str
    """tapdisk, qemu or kernel, as well as the handshake tells them apart"""
    each_write_durable: bool
    """whether it takes writes for durable when they are answered"""
    in_order: bool  # set by the connection when the client says that it is done

    def read(self, batch: Sequence[tuple[int, memoryview]]) -> list[int]:
        """Fill the views from memory; returns the indices of those that would have to wait for a disk."""

    def lend(self, offset: int, length: int) -> list[memoryview] | None:
        """The data of a range as they lie in memory, piece by piece, to be looked at before anything else happens; None: `read` can say more."""

    async def read_cold(self, batch: Sequence[tuple[int, memoryview]]) -> list[Exception | None]:
        """Fill the views, waiting for the disk; for each what went wrong, or None."""

    def read_soon(self, batch: Sequence[tuple[int, memoryview]], done: Callable[[list[Exception | None]], None]) -> bool:
        """`read_cold` without a task: call ``done`` with what it would return. It must not raise. False: only `read_cold` can do it now."""

    def write(self, batch: Sequence[Write]) -> int:
        """Write in order; returns how many are done. The rest has to wait: `write_rest`."""

    async def write_rest(self, batch: Sequence[Write], start: int) -> None:
        """Write ``batch[start:]``, waiting where that is needed."""

    def is_durable(self) -> bool:
        """Whether a flush has nothing to do."""

    def flush_soon(self, done: Callable[[Exception | None], None]) -> None:
        """Call ``done`` when every write answered so far is durable, or with the error; perhaps at once. It must not raise."""

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range into memory."""

    def allocation(self, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        """Describe a range as [(length in bytes, is data)]; may stop early. Nothing: it would have to wait (`allocation_cold`)."""

    async def allocation_cold(self, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        """`allocation`, waiting for the disk."""

    async def changed(self, context: str, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        """What a metadata context of `Offer.context` says of a range: [(length in bytes, has changed)], at least one; may stop early."""

    def detach(self) -> None:
        """The client is gone."""


class Offer(Exports, Protocol):
    """The exports of a server as one client sees them."""

    def attach(self, name: str) -> Disk:
        """Return the disk called ``name`` for one connection. Raises `ProtocolError` if that is refused."""


class Disks(Protocol):
    """All exports of a server."""

    def offer_to(self, peer: Peer) -> Offer:
        """What ``peer`` may see. Asked anew when more is known of it."""

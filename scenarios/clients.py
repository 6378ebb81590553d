"""What the clients of a disk can bear: which errors reach them, what they do then, and when a write counts as kept.

tapdisk over NBD drops every request and never comes back after the first error reply, sends neither FLUSH nor FUA, and takes an
answered write for stable. qemu and the kernel flush, and pass errors on to the guest. NBD carries eight error numbers; FUSE
carries any. A scenario that asks for more than its client can bear does something else than it says, so it is told.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from scenarios.quantities import NS

__all__ = ["Client", "CLIENTS", "NBD_ERRORS", "errno_of"]

NBD_ERRORS = frozenset({"EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "ESHUTDOWN"})


class Client(NamedTuple):
    """``durability``: "flush" or "each-write". ``patience_ns``: how long a request may hang before the client gives up, or None.

    ``errors`` None: any. ``dies_of_errors``: the first error reply costs it the disk.
    """

    durability: str
    errors: frozenset[str] | None
    ops: frozenset[str]
    dies_of_errors: bool = False
    patience_ns: int | None = None


_BLOCK = frozenset({"read", "write", "flush", "trim", "zero", "extents", "open", "close"})

CLIENTS = {
    "tapdisk": Client("each-write", NBD_ERRORS, frozenset({"read", "write", "open", "close"}), True, 120 * NS),
    "qemu": Client("flush", NBD_ERRORS, _BLOCK),
    "kernel": Client("flush", NBD_ERRORS, _BLOCK - {"extents"}, False, 30 * NS),
    "fuse": Client("flush", None, frozenset({"read", "write", "flush", "open", "close"})),
}


def errno_of(name: str) -> int:
    """The number of an errno name. Raises ValueError."""
    number = getattr(errno, name, None)
    if not isinstance(number, int) or not name.startswith("E"):
        raise ValueError(f"{name!r} is not an error such as EIO, ENOSPC or ETIMEDOUT")
    return number

"""Who is at the other end of a connection, as far as the system vouches for it."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

__all__ = ["Peer", "peer_of"]

_UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class Peer:
    """``label`` is for logs. ``uid``: of the process that connected to a unix socket. ``address``: where a TCP connection comes from.
    ``subject``: the common name in a TLS certificate that was verified."""

    label: str
    uid: int | None = None
    address: str | None = None
    subject: str | None = None

    def __str__(self) -> str:
        known = [("user", self.uid), ("address", self.address), ("certificate", self.subject)]
        return ", ".join(f"{what} {value}" for what, value in known if value is not None) or "an unknown client"


def peer_of(sock: socket.socket, number: int) -> Peer:
    """The peer of an accepted connection, the ``number``-th of the server. Raises OSError if it is gone already."""
    if sock.family == socket.AF_UNIX:
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return Peer(f"nbd client {number}", uid=uid)
    address = sock.getpeername()[0]
    return Peer(f"nbd client {number} at {address}", address=address)

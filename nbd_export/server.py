"""The NBD server: listening sockets, and one trio task for each connection (`nbd_export.connection`)."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import ssl
import stat

import trio

from nbd_export.channel import Channel
from nbd_export.connection import Connection
from nbd_export.disk import Disks
from nbd_export.peer import Peer, peer_of
from nbd_export.transmission import ProtocolError

__all__ = ["NbdServer", "listen_unix", "listen_tcp", "is_local"]

log = logging.getLogger("simsr.nbd")

SOCKET_BUFFER_BYTES = 4 << 20
_QUIET_NS = 2_000_000


def listen_unix(path: str) -> socket.socket:
    """Return a listening unix socket at ``path``; a stale socket there is replaced. Raises OSError."""
    if len(os.fsencode(path)) > 107:
        raise OSError(errno.ENAMETOOLONG, "the path of a unix socket may have at most 107 bytes", path)
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
    return _listen(socket.AF_UNIX, path)


def listen_tcp(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return _listen(family, address)


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can reach ``listener``: a unix socket, or TCP on a loopback address."""
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _listen(family: int, address: str | tuple) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # means nothing to a unix socket
        sock.bind(address)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


class NbdServer:
    """Serves ``disks`` on any number of listening sockets.

    ``tls``: offered on all of them if given, and required where others than this machine can reach them; everywhere with ``tls_required``.
    ``connections_max``: further ones are closed at once; 0: no limit.
    """

    def __init__(
        self, disks: Disks, tls: ssl.SSLContext | None = None, *, tls_required: bool = False, connections_max: int = 0
    ) -> None:
        self._disks = disks
        self._tls, self._tls_required = tls, tls_required
        self._connections_max = connections_max
        self._busy: Connection | None = None  # the connection that had requests last
        self._contended_ns = 0  # when it took over from another one
        self.connections = 0
        self.connections_total = self.refused_total = 0
        self.requests_total = 0

    async def serve(self, listener: socket.socket, *, fixed_export: str | None = None) -> None:
        """Accept connections on ``listener`` until cancelled. With ``fixed_export`` all get that export. Raises ValueError for a socket
        that must not be served without TLS."""
        tls_required = self._tls_required or not is_local(listener)
        if tls_required and self._tls is None:
            raise ValueError(f"without TLS NBD is not served on {listener.getsockname()}")
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        sock, _ = listener.accept()
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        if error.errno not in (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                            raise
                        log.warning("cannot accept a connection: %s", error)
                        await trio.sleep(0.1)
                        continue
                    if self._connections_max and self.connections >= self._connections_max:
                        self.refused_total += 1
                        log.warning("a connection is closed: there are %d, and no more are allowed", self.connections)
                        sock.close()
                        continue
                    nursery.start_soon(self._accepted, sock, self._count_in(), fixed_export, tls_required)
            finally:
                nursery.cancel_scope.cancel()

    async def converse(self, channel: Channel, *, fixed_export: str | None = None) -> None:
        """Serve one client that did not come over a listening socket, until one side ends it."""
        await self._serve(channel, Peer(f"nbd client {self._count_in()}"), fixed_export, self._tls_required)

    def _count_in(self) -> int:
        """One more; returns its number."""
        self.connections += 1
        self.connections_total += 1
        return self.connections_total

    async def _accepted(self, sock: socket.socket, number: int, fixed_export: str | None, tls_required: bool) -> None:
        with sock:
            peer = Peer(f"nbd client {number}")
            try:
                peer = peer_of(sock, number)
                sock.setblocking(False)
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
            except OSError as error:
                log.info("%s: connection closed: %s", peer.label, error)
                self.connections -= 1
                return
            await self._serve(Channel(sock), peer, fixed_export, tls_required)

    async def _serve(self, channel: Channel, peer: Peer, fixed_export: str | None, tls_required: bool) -> None:
        connection = Connection(self, channel, peer)
        try:
            await connection.run(self._disks, fixed_export, self._tls, tls_required)
        except* (OSError, ProtocolError) as group:
            log.info("%s: connection closed: %s", peer.label, group.exceptions[0])
        except* Exception:
            log.exception("%s: connection closed by a bug in simsr", peer.label)
        finally:
            self.connections -= 1
            if self._busy is connection:
                self._busy = None

    @property
    def tls_mode(self) -> str:
        """``off``, ``on`` (the client's choice where only this machine can connect), or ``require``."""
        return "off" if self._tls is None else "require" if self._tls_required else "on"

    def may_spin(self, connection: Connection, now_ns: int) -> bool:
        """Whether ``connection`` is the only busy one. Called after each of its batches."""
        if self._busy is not connection:
            if self._busy is not None:
                self._contended_ns = now_ns
            self._busy = connection
        return now_ns - self._contended_ns > _QUIET_NS

    def statistics(self) -> dict[str, int]:
        return {
            "connections": self.connections,
            "connections_total": self.connections_total,
            "refused_total": self.refused_total,
            "requests_total": self.requests_total,
        }

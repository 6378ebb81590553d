"""The socket of a connection: non-blocking receiving, and sending by several tasks without mixing what they send.

`Channel` is the plain one, and costs what the system calls cost. `TlsChannel` puts TLS between the socket and the same interface:
a receive decrypts all that has arrived, a send encrypts a whole batch of replies and leaves with one system call.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Sequence
from functools import partial
from time import perf_counter_ns

import trio

__all__ = ["Channel", "TlsChannel"]

_RECEIVE_BYTES = 256 << 10
_IOV_MAX = 1024


class Channel:
    """What a connection sends and receives through.

    ``unsent`` is not empty while some task is in `drain`; ``drained`` is set when that ends. ``turn_began_ns``: since when the
    connection's task has gone on without letting others go on; the tasks that move data keep it, by the clock ``now_ns``. ``woken_ns``: when it was
    last woken because something had come.
    ``readable`` and ``writable`` wait until there is something to receive, or room to send.
    """

    now_ns = staticmethod(perf_counter_ns)

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.recv_into = sock.recv_into
        self.readable = partial(trio.lowlevel.wait_readable, sock)
        self.writable = partial(trio.lowlevel.wait_writable, sock)
        self.unsent: deque[bytes | memoryview] = deque()
        self.drained = trio.Event()
        self.turn_began_ns = self.woken_ns = 0

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``, not mixed with what others send; waits until the client has taken it."""
        if self.unsent:
            self.unsent.append(data)
            await self.drained.wait()
        elif rest := self._send_now(data):
            self.unsent.append(rest)
            await self.drain()

    async def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """`send` of several parts one behind the other. None of them is looked at any more when this waits."""
        sent = 0
        if not self.unsent:
            try:
                sent = self.sock.sendmsg(parts[:_IOV_MAX])
            except BlockingIOError:
                pass
        rest = []
        for part in parts:
            if sent < len(part):
                rest.append(part[sent:])
            sent = max(0, sent - len(part))
        if rest:
            busy = bool(self.unsent)
            self.unsent.append(b"".join(rest))
            await (self.drained.wait() if busy else self.drain())

    def post(self, data: bytes | memoryview) -> bool:
        """`send` for callers that cannot wait. True: not all could be sent, so `drain` has to run. Raises OSError."""
        if self.unsent:
            self.unsent.append(data)
        elif rest := self._send_now(data):
            self.unsent.append(rest)
            return True
        return False

    async def drain(self) -> None:
        """Send what waits. Only one task does, the one that found the queue empty.

        Cut short it leaves the queue as it is, for good: whatever was sent behind a part of a reply would pass for the rest of it.
        """
        unsent = self.unsent
        try:
            while unsent:
                await self.writable()
                if rest := self._send_now(unsent[0]):
                    unsent[0] = rest
                else:
                    unsent.popleft()
        finally:
            self.drained.set()
            self.drained = trio.Event()

    def _send_now(self, data: bytes | memoryview) -> bytes | memoryview:
        """Send what can be sent without waiting; returns the rest."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return data
        return b"" if sent == len(data) else memoryview(data)[sent:]

    def say_goodbye(self) -> None:
        """What this kind of channel owes the other side at its end; sent only if that needs no waiting."""


class TlsChannel(Channel):
    """A channel inside TLS. `shake_hands` comes first.

    What is sent is encrypted at once, in the order of the calls, and only ciphertext waits.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._received = memoryview(bytearray(_RECEIVE_BYTES))
        self.recv_into = self._recv_into

    async def shake_hands(self) -> None:
        """The server's part of the TLS handshake. Raises OSError (`ssl.SSLError` is one)."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_pending()
            except ssl.SSLError:
                await self._send_pending()  # the alert that says why
                raise
            await self.readable()
            if not self._take_from_socket():
                raise ConnectionError("the client went away in the TLS handshake")
        await self._send_pending()

    def subject(self) -> str | None:
        """The common name in the client's certificate; None if it showed none that was verified."""
        certificate = self._tls.getpeercert() or {}
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        return names[0] if len(names) == 1 else None  # several would make it a matter of taste who this is

    def describe(self) -> str:
        """Protocol and cipher, for logs."""
        return f"{self._tls.version()} {(self._tls.cipher() or ('',))[0]}"

    async def send(self, data: bytes | memoryview) -> None:
        await super().send(self._sealed(data))

    async def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        await self.send(b"".join(parts))

    def post(self, data: bytes | memoryview) -> bool:
        return super().post(self._sealed(data))

    def say_goodbye(self) -> None:
        try:
            self._tls.unwrap()
        except (ssl.SSLError, OSError):  # it wants the other side's goodbye, which nobody waits for
            pass
        if not self.unsent and (data := self._outgoing.read()):
            try:
                self._send_now(data)
            except OSError:
                pass

    def _sealed(self, data: bytes | memoryview) -> bytes:
        done = 0
        while done < len(data):
            done += self._tls.write(data[done:] if done else data)
        return self._outgoing.read()

    async def _send_pending(self) -> None:
        if data := self._outgoing.read():
            await super().send(data)

    def _take_from_socket(self) -> bool:
        """Move what has arrived into TLS; False at the end of the stream. Raises BlockingIOError if nothing has arrived."""
        count = self.sock.recv_into(self._received)
        self._incoming.write(self._received[:count])
        return count > 0

    def _recv_into(self, space: memoryview) -> int:
        """Fill ``space`` with what has arrived; 0 at the end of the stream. Raises BlockingIOError, OSError."""
        while True:
            filled = 0
            try:
                while filled < len(space):
                    count = self._tls.read(len(space) - filled, space[filled:])
                    if not count:
                        return filled
                    filled += count
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return filled
            if filled or not self._take_from_socket():
                return filled

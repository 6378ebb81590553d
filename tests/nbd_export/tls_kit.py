"""Certificates for tests, made once for a file by ``simsr tls-setup``; and a client inside TLS."""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from fake_disks import Client
from nbd_wire import MODERN, option

from nbd_export import constants as c
from simsr.cli.tls_setup import tls_setup

__all__ = ["certificates", "client_context", "starttls", "connect_tls", "dial", "hang_up_all"]


@contextmanager
def certificates() -> Iterator[str]:
    """A directory with an authority, a server and the clients alice and bob; beside it, in ``other``, those of somebody else."""
    with tempfile.TemporaryDirectory(prefix="simsr-tls-") as directory:
        tls_setup(directory, ["localhost", "127.0.0.1"], ["alice", "bob"])
        tls_setup(os.path.join(directory, "other"), None, ["alice"])
        yield directory


def client_context(directory: str, client: str | None = None, authority: str | None = None) -> ssl.SSLContext:
    """What a client needs: ``client``'s certificate out of ``directory``, and trust in its authority."""
    context = ssl.create_default_context(cafile=os.path.join(authority or directory, "ca-cert.pem"))
    if client is not None:
        folder = os.path.join(directory, "clients", client)
        context.load_cert_chain(os.path.join(folder, "client-cert.pem"), os.path.join(folder, "client-key.pem"))
    return context


_dialled: list[trio.SocketStream] = []


async def dial(path: str) -> trio.SocketStream:
    """Connect to a unix socket. Closed by `hang_up_all`."""
    _dialled.append(await trio.open_unix_socket(path))
    return _dialled[-1]


def hang_up_all() -> None:
    while _dialled:
        _dialled.pop().socket.close()


async def starttls(path: str, before: bytes = b"") -> trio.SocketStream:
    """Connect and get STARTTLS acknowledged; ``before`` is sent in front of it."""
    stream = await dial(path)
    client = Client(stream, False)
    assert (await client.exactly(18))[:16] == b"NBDMAGICIHAVEOPT"
    await stream.send_all(MODERN + before + option(c.NBD_OPT_STARTTLS))
    while True:
        header = await client.exactly(20)
        number, kind, length = (int.from_bytes(header[at : at + 4], "big") for at in (8, 12, 16))
        await client.exactly(length)
        if number == c.NBD_OPT_STARTTLS:
            assert kind == c.NBD_REP_ACK, hex(kind)
            return stream


async def connect_tls(path: str, context: ssl.SSLContext, **style: bool) -> Client:
    """A client inside TLS, which may send options next."""
    stream = trio.SSLStream(await starttls(path), context, server_hostname="localhost", https_compatible=True)
    with trio.fail_after(120):
        await stream.do_handshake()
    return Client(stream, style.get("structured", False), style.get("extended", False))

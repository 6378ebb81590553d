"""The listeners of the control API: a unix socket, and HTTPS with a token for a dom0 elsewhere. What both ask of a request.

Whoever can open the unix socket may do everything, so it needs no password; over HTTPS every request must carry the token, which is compared in
constant time before anything of its body is read. Bodies are read whole before a route begins, so a route never waits for a client: they
may have `BODY_MAX_BYTES`, and take `BODY_TIMEOUT_S`. The head of a request may have 16 KiB, and a connection that has nothing to say for 15 s is closed
(hypercorn's limits).
"""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import logging
import os
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simsr.daemon.answers import error_answer
from simsr.daemon.host import Host
from simsr.errors import BadRequest, NotAllowed, TooLarge
from simsr.sr.vdi import Vdi

__all__ = ["Https", "Limits", "TokenRequired", "https_from", "serve_unix", "serve_https", "nbd_uri", "split_address"]

log = logging.getLogger("simsr.http")

BODY_MAX_BYTES = 1 << 20
BODY_TIMEOUT_S = 30.0
HEAD_MAX_BYTES = 16 << 10
IDLE_S = 15  # longer than clients keep a connection (httpx: 5 s), or their next request meets its end
HANDSHAKE_TIMEOUT_S = 10
TOKEN_MIN, TOKEN_MAX = 16, 4096

_reached: ContextVar[str | None] = ContextVar("reached", default=None)
"""For a request that came over HTTPS: the address of ours that the caller reached. None: the caller is on this host."""


def nbd_uri(host: Host, vdi: Vdi) -> str:
    """Where the caller of the current request finds ``vdi``: over TCP, if it is elsewhere and the daemon serves NBD there."""
    reached = _reached.get()
    if reached is None or host.nbd_tcp is None:
        return host.uri_of(vdi)
    address, _, port = host.nbd_tcp.rpartition(":")
    address = address.strip("[]")
    loopback = ipaddress.ip_address(address).is_loopback
    address = reached if address in ("0.0.0.0", "::") else address
    scheme = "nbd" if loopback and host.nbd.tls_mode != "require" else "nbds"
    return f"{scheme}://[{address}]:{port}/{vdi.uuid}" if ":" in address else f"{scheme}://{address}:{port}/{vdi.uuid}"

# Every request.


class Limits:
    """Reads the body of each request, then lets ``app`` have it; answers `TooLarge` and `BadRequest` itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            with trio.fail_after(BODY_TIMEOUT_S):
                body = await self._read(scope, receive)
        except (TooLarge, trio.TooSlowError) as error:
            if not isinstance(error, TooLarge):
                error = BadRequest(what="the request", reason=f"its body has not arrived within {BODY_TIMEOUT_S:.0f} s")
            await error_answer(error)(scope, receive, _and_close(send))
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    @staticmethod
    async def _read(scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client has gone."""
        too_large = TooLarge(what="the body of the request", reason=f"at most {BODY_MAX_BYTES} bytes are taken")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if len(declared) > 15 or int(declared) > BODY_MAX_BYTES:  # that it is a number the parser has seen to
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > BODY_MAX_BYTES:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _and_close(send: Send) -> Send:
    """What answers before it has read everything must close: the rest would be taken for the next request."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    return closing


class TokenRequired:
    """Lets nobody through who does not send ``Authorization: Bearer`` and the token."""

    def __init__(self, app: ASGIApp, token: bytes) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            reason = self._why_not(scope)
            if reason is None:
                _reached.set(str((scope.get("server") or ("",))[0]))
                await self._app(scope, receive, send)
                return
            log.warning("%s: refused, %s", (scope.get("client") or ("somebody",))[0], reason)
            await error_answer(NotAllowed(reason=reason))(scope, receive, _and_close(_challenge(send)))
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    def _why_not(self, scope: Scope) -> str | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return "it has no token" if not given else "it has several tokens"
        kind, _, token = given[0].partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            return "its token is not the right one"
        return None


def _challenge(send: Send) -> Send:
    async def challenging(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"www-authenticate", b'Bearer realm="simsrd"')]
        await send(message)

    return challenging


# Listening.


@dataclass(frozen=True)
class Https:
    """What is needed to listen: checked, and bound already."""

    listener: socket.socket
    certificate: str
    key: str
    token: bytes

    @property
    def address(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def split_address(option: str, text: str) -> tuple[str, int]:
    """Return the host and the port in ``text``, the value of ``option``. Raises `BadRequest`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 <= int(port) < 65536:
        raise BadRequest(what=f"{option} {text}", reason="it is not of the form HOST:PORT")
    return host.strip("[]"), int(port)


def https_from(arguments: argparse.Namespace) -> Https | None:
    """What ``--https`` and its companions say; None without them. Raises `BadRequest`."""
    options = {
        "--https": arguments.https, "--https-cert": arguments.https_cert, "--https-key": arguments.https_key,
        "--token-file": arguments.token_file,
    }  # fmt: skip
    if not any(options.values()):
        return None
    if missing := [name for name, value in options.items() if not value]:
        raise BadRequest(what=" ".join(name for name, value in options.items() if value), reason=f"{' and '.join(missing)} must be given, too")
    token = _read_token(arguments.token_file)
    _check_certificate(arguments.https_cert, arguments.https_key)
    host, port = split_address("--https", arguments.https)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise BadRequest(what=f"--https {arguments.https}", reason=error.strerror or str(error)) from None
    return Https(listener, arguments.https_cert, arguments.https_key, token)


def _refuse_open_to_others(option: str, path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadRequest(what=f"{option} {path}", reason="it is not a file")
    if status.st_mode & 0o077:
        raise BadRequest(what=f"{option} {path}", reason=f"others may use it (mode {status.st_mode & 0o777:03o}): chmod 600 it")


def _read_token(path: str) -> bytes:
    """The token in a file that nobody else can read. Raises `BadRequest`, which never tells what is in it."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # which a FIFO would make wait
            _refuse_open_to_others("--token-file", path, os.fstat(file.fileno()))
            token = file.read(TOKEN_MAX + 2).strip()
    except OSError as error:
        raise BadRequest(what=f"--token-file {path}", reason=(error.strerror or str(error)).lower()) from None
    if not TOKEN_MIN <= len(token) <= TOKEN_MAX or not all(0x21 <= byte < 0x7F for byte in token):
        reason = f"it must hold one word of {TOKEN_MIN} to {TOKEN_MAX} printable ASCII characters"
        raise BadRequest(what=f"--token-file {path}", reason=reason)
    return token


def _check_certificate(certificate: str, key: str) -> None:
    try:
        _refuse_open_to_others("--https-key", key, os.stat(key))
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except FileNotFoundError:
        missing = [path for path in (certificate, key) if not os.path.exists(path)]
        raise BadRequest(what=f"--https-cert/--https-key {missing[0]}", reason="no such file") from None
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise BadRequest(what=f"--https-cert {certificate} with --https-key {key}", reason=str(reason)) from None


def _config(bind: str) -> Config:
    config = Config()
    config.bind = [bind]
    config.loglevel = "WARNING"
    config.graceful_timeout = 1.0
    config.h11_max_incomplete_size = HEAD_MAX_BYTES
    config.keep_alive_timeout = IDLE_S
    return config


async def _serve(app: ASGIApp, config: Config, stopped: Callable[[], Awaitable], task_status: trio.TaskStatus) -> None:
    await serve(app, config, shutdown_trigger=stopped, task_status=task_status)


async def serve_unix(
    app: ASGIApp, bind: str, stop: trio.Event, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve ``app`` on the control socket until ``stop``."""
    config = _config(bind)
    config.umask = 0o077
    await _serve(Limits(app), config, stop.wait, task_status)


async def serve_https(
    app: ASGIApp, https: Https, stop: trio.Event, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve ``app`` over TLS 1.2 or later, to those who know the token, until ``stop``."""
    config = _config(f"fd://{https.listener.detach()}")
    config.certfile, config.keyfile = https.certificate, https.key
    config.alpn_protocols = ["http/1.1"]
    config.ssl_handshake_timeout = HANDSHAKE_TIMEOUT_S
    await _serve(TokenRequired(Limits(app), https.token), config, stop.wait, task_status)

"""HTTP in front of the model: XML-RPC at ``/`` and ``/RPC2``, JSON-RPC at ``/jsonrpc``; on a unix socket and on loopback TCP.

A request is answered with status 200 and a XenAPI document, also when the call failed; only what is no request at all gets
another status or an XML-RPC fault. Bodies are bounded. A client that goes away stops the waiting for its answer and nothing
else.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from simsr.xapi import wire
from simsr.xapi.failure import XenError
from simsr.xapi.model import Model

__all__ = ["make_app", "serve_http", "BODY_MAX_BYTES"]

log = logging.getLogger("simsr.xapi")

BODY_MAX_BYTES = 16 * 2**20
KEEP_ALIVE_S = 3600.0
"""Stock clients keep one connection and are surprised when it is gone."""
BACKLOG = 1024
"""On a unix socket a full one refuses clients at once."""

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _Refused(Exception):
    """The request gets an HTTP status and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text


def make_app(model: Model) -> Any:
    """Return the ASGI application for ``model``."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            status, content_type, body = await _respond(model, scope, receive)
        except _Refused as refusal:
            status, content_type, body = refusal.status, "text/plain", f"{refusal.text}\n".encode()
        except _Gone:
            return
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


class _Gone(Exception):
    """The client has closed the connection."""


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _respond(model: Model, scope: Scope, receive: Receive) -> tuple[int, str, bytes]:
    if scope["path"] not in ("/", "/RPC2", "/jsonrpc", "/xmlrpc"):
        raise _Refused(404, "POST XML-RPC to / or JSON-RPC to /jsonrpc")
    if scope["method"] != "POST":
        raise _Refused(405, "only POST is answered here")
    body = await _read_body(scope, receive)
    # hypercorn gives no port to the server's end of a unix socket.
    is_local = scope.get("server") is None or scope["server"][1] is None
    origin = {"is_local": is_local, "subtask_of": dict(scope["headers"]).get(b"subtask-of", b"").decode(errors="replace")}
    answer = _json if scope["path"] == "/jsonrpc" else _xml
    result: list[tuple[int, str, bytes]] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        result.append(await answer(model, body, origin))
        nursery.cancel_scope.cancel()
    if not result:
        raise _Gone
    return result[0]


async def _read_body(scope: Scope, receive: Receive) -> bytes:
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > BODY_MAX_BYTES:
        raise _Refused(413, f"a request may have at most {BODY_MAX_BYTES} bytes")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > BODY_MAX_BYTES:
            raise _Refused(413, f"a request may have at most {BODY_MAX_BYTES} bytes")
        if not message.get("more_body"):
            return bytes(body)


async def _xml(model: Model, body: bytes, origin: dict[str, Any]) -> tuple[int, str, bytes]:
    try:
        name, arguments = wire.read_call(body)
        value = await model.answer(name, arguments, **origin)
    except wire.Malformed as error:
        return 200, "text/xml", wire.write_fault(400, str(error))
    except XenError as error:
        return 200, "text/xml", wire.write_failure(error.description)
    return 200, "text/xml", wire.write_success(value)


async def _json(model: Model, body: bytes, origin: dict[str, Any]) -> tuple[int, str, bytes]:
    try:
        name, arguments, request_id, version_2 = wire.read_json(body)
    except wire.Malformed as error:
        return 400, "text/plain", f"{error}\n".encode()
    try:
        value = await model.answer(name, arguments, **origin)
    except XenError as error:
        return 200, "application/json", wire.json_reply(request_id, version_2, failure=error.description)
    return 200, "application/json", wire.json_reply(request_id, version_2, result=value)


async def serve_http(
    model: Model, listeners: list[socket.socket], stop: trio.Event,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:  # fmt: skip
    """Serve ``model`` on sockets that listen, until ``stop`` is set."""
    config = Config()
    config.bind = [f"fd://{sock.fileno()}" for sock in listeners]
    config.loglevel = "WARNING"
    config.graceful_timeout = 1.0
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.backlog = BACKLOG
    await serve(make_app(model), config, shutdown_trigger=stop.wait, task_status=task_status)

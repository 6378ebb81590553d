"""The administrator's way in: the daemon's HTTP API, called in this process (ASGI), without sockets.

Middleware, routing, checking of bodies, handlers and the JSON of answers are the daemon's own. The application is made once for a process, because
that takes half a second; a stand-in gives it the host of the life that is being played.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from simsr import errors
from simsr.daemon.api import make_app
from simsr.daemon.host import Host

__all__ = ["Refused", "call"]


class Refused(Exception):
    """An error was answered. ``kind``: its class in `simsr.errors`."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.status, self.kind = status, getattr(errors, error["code"])


class _StandIn:
    """Has the attributes of whatever ``find`` gives at that moment."""

    def __init__(self, find: Callable[[], object]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> object:
        if name == "theatre":
            return _StandIn(lambda: self._find().theatre)
        return getattr(self._find(), name)


_current: list[Host] = []


@cache
def _app() -> object:
    return make_app(_StandIn(lambda: _current[0]), None, None)


async def call(host: Host, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON of the answer. Raises `Refused`."""
    _current[:] = [host]
    sent = b"" if body is None else json.dumps(body).encode()
    path, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "server": ("simulation", 80), "client": ("simulation", 1),
        "headers": [(b"content-type", b"application/json")] if sent else [],
    }  # fmt: skip
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    await _app()(scope, receive, send)
    data = b"".join(message.get("body", b"") for message in messages[1:])
    status = messages[0]["status"]
    answer = json.loads(data) if data else None
    if status >= 400:
        raise Refused(status, answer["error"])
    return answer

"""The HTTP API of simsrd, seen from the command line.

One `Client` per run; httpx is imported and the socket opened at the first request, so that help and usage errors stay
quick. An error body of the daemon becomes a `DaemonAnswer` with the daemon's own message, hint and exit status;
whatever keeps an answer from arriving becomes `DaemonUnreachable`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from simsr.cli.failures import DaemonAnswer
from simsr.cli.interrupts import interrupts_later
from simsr.cli.remote import FINGERPRINT_VARIABLE, connect, is_remote
from simsr.errors import BadRequest, DaemonUnreachable, NotFound

if TYPE_CHECKING:
    import httpx

__all__ = ["Client", "Session", "DEFAULT_SOCKET", "checked_text"]

DEFAULT_SOCKET = "/run/simsr/control.sock"

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 120.0  # creating an SR writes its first segments in advance, which a slow disk may take long over

_REASONS = {
    errno.ENOENT: "there is no such socket",
    errno.ENOTSOCK: "it is no socket",
    errno.ECONNREFUSED: "nobody listens on it",
}


def checked_text(what: str, text: str) -> str:
    """Return ``text`` if JSON and URLs can carry it; arguments that are not UTF-8 arrive with lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(what=f"{what} {text!r}", reason="it is not UTF-8") from None
    return text


class Client:
    """Requests to one daemon.

    Requests: `get`, `post`, `delete`. Paths: `sr_path`, `vdi_path`. ``store_ms``: how long the last change took in the
    daemon, until it was durable, in milliseconds; None if that was no change.
    """

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self._http: httpx.Client | None = None
        self.store_ms: float | None = None

    def close(self) -> None:
        """Close the connection; the client can be used again afterwards."""
        if self._http is not None:
            self._http.close()
            self._http = None

    @staticmethod
    def sr_path(name: str, *rest: str) -> str:
        """Return the path of the SR that ``name`` names (uuid, unique prefix or name)."""
        return _object_path("srs", "SR", name, rest)

    @staticmethod
    def vdi_path(name: str, *rest: str) -> str:
        """Return the path of the VDI that ``name`` names (uuid, unique prefix or name)."""
        return _object_path("vdis", "VDI", name, rest)

    @staticmethod
    def path_of(collection: str, name: str) -> str:
        """Return the path of anything else that has a name."""
        return f"/v1/{collection}/{quote(name, safe='')}"

    def get(self, path: str, **query: str) -> Any:
        """Return the answer to GET ``path``."""
        return self._request("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the answer to POST ``path``; members of ``body`` that are None are left out."""
        return self._request("POST", path, json={key: value for key, value in body.items() if value is not None})

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """Return the answer to PATCH ``path``."""
        return self._request("PATCH", path, json=body)

    def delete(self, path: str) -> Any:
        """Send DELETE ``path``; returns the answer, if it has one."""
        return self._request("DELETE", path)

    @contextlib.contextmanager
    def stream(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[Iterator[str]]:
        """Give the lines of an answer as they come."""
        with self._stream(method, path, body) as response:
            yield response.iter_lines()

    @contextlib.contextmanager
    def stream_bytes(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[Iterator[bytes]]:
        """Give the bytes of an answer as they come."""
        with self._stream(method, path, body) as response:
            yield response.iter_raw()

    @contextlib.contextmanager
    def _stream(self, method: str, path: str, body: dict[str, Any] | None) -> Iterator[httpx.Response]:
        connected = self._connected()
        import httpx

        content = {} if body is None else {"json": {key: value for key, value in body.items() if value is not None}}
        try:
            with connected.stream(method, path, timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S), **content) as response:
                if not response.is_success:
                    response.read()
                    raise _remote_error(response.json(), response.status_code, f"{method} {path}")
                yield response
        except httpx.TransportError as error:
            raise self._unreachable(str(error)) from None

    def _request(self, method: str, path: str, **content: Any) -> Any:
        connected = self._connected()
        import httpx

        try:
            response = connected.request(method, path, **content)
        except httpx.TimeoutException:
            raise self._unreachable("it does not answer") from None
        except httpx.RemoteProtocolError:
            raise self._unreachable("the answer broke off or was not HTTP") from None
        except httpx.TransportError as error:
            raise self._unreachable(str(error)) from None
        self.store_ms = _store_ms(response.headers.get("Server-Timing", ""))
        if response.status_code == httpx.codes.NO_CONTENT:
            return None
        try:
            answer = response.json()
        except ValueError:
            raise self._unreachable(f"status {response.status_code} without JSON, so it is no simsrd") from None
        if response.is_success:
            return answer
        raise _remote_error(answer, response.status_code, f"{method} {path}")

    def _connected(self) -> httpx.Client:
        if self._http is None:
            transport, url, headers = self._transport()
            with interrupts_later():  # who ends us asks the daemon for something, and must not find half of a module
                import httpx

            self._http = httpx.Client(
                transport=transport, base_url=url, headers=headers, trust_env=False,
                timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            )  # fmt: skip
        return self._http

    def _transport(self) -> tuple[httpx.BaseTransport, str, dict[str, str]]:
        """(transport, base URL, headers)"""
        if is_remote(self.socket_path):
            return connect(self.socket_path, CONNECT_TIMEOUT_S)
        self._try_socket()
        with interrupts_later():
            import httpx

        # No TLS on a unix socket; verify=False spares loading the certificates of the web, 30 ms.
        return httpx.HTTPTransport(uds=self.socket_path, verify=False), "http://simsrd", {}

    def _try_socket(self) -> None:
        """Connect once without httpx: quick when nobody is there, and the reason is an errno and not a text."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(CONNECT_TIMEOUT_S)
            try:
                probe.connect(self.socket_path)
            except OSError as error:
                known = _REASONS.get(error.errno) if error.errno else None
                words = os.strerror(error.errno).lower() if error.errno else str(error)
                raise self._unreachable(known or words) from None

    def _unreachable(self, reason: str) -> DaemonUnreachable:
        error = DaemonUnreachable(socket=self.socket_path, reason=reason)
        if reason == "permission denied":
            error.hint = "It is for the user who runs simsrd: be that one, or have simsrd serve HTTPS (docs/api.md)."
        if "CERTIFICATE_VERIFY_FAILED" in reason:  # httpx passes on only the words
            error.hint = f"Name its certificate in {FINGERPRINT_VARIABLE}; 'simsr https-setup' printed it."
        return error


@dataclass
class Session:
    """What the options before the command say; every command finds it as its context object."""

    client: Client = field(default_factory=lambda: Client(DEFAULT_SOCKET))
    debug: bool = False


def _store_ms(server_timing: str) -> float | None:
    name, _, value = server_timing.partition(";dur=")
    try:
        return float(value) if name == "store" else None
    except ValueError:
        return None


def _object_path(collection: str, kind: str, name: str, rest: tuple[str, ...]) -> str:
    if not name:
        raise NotFound(kind=kind, name=name)
    # "." and ".." would be taken for steps in the path if they stood there bare.
    encoded = quote(checked_text(f"{kind} name", name), safe="")
    encoded = encoded.replace(".", "%2E") if set(name) == {"."} else encoded
    return "/".join(("/v1", collection, encoded, *rest))


def _remote_error(answer: Any, status: int, request: str) -> DaemonAnswer:
    body = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(body, dict) or "message" not in body:
        body = {"code": "SimsrError", "message": f"simsrd answered {request} with status {status}"}
    details = body.get("details")
    return DaemonAnswer(
        code=str(body.get("code", "SimsrError")),
        message=str(body["message"]),
        hint=str(body.get("hint") or ""),
        exit_code=int(body.get("exit_code") or 1),
        details=details if isinstance(details, dict) else {},
    )

"""XenAPI calls for ``simsr xe``: XML-RPC over the unix socket of ``simsr xapi serve``."""

from __future__ import annotations

import http.client
import os
import socket
import xmlrpc.client
from typing import Any

from simsr.errors import SimsrError

__all__ = ["XenApi", "XenApiFailure", "XapiUnreachable"]


class XenApiFailure(SimsrError):
    """{method} failed: {description}"""

    def __init__(self, method: str, description: list[str]) -> None:
        super().__init__(method=method, description=" ".join(description))
        self.description = description


class XapiUnreachable(SimsrError):
    """xapi cannot be reached at {socket}: {reason}"""

    exit_code = 4
    hint = "Start it with 'simsr xapi serve --root DIR', or name its socket (DIR/xapi) in SIMSR_XAPI."


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if self._connection and self._connection[1]:
            return self._connection[1]
        connection = http.client.HTTPConnection("localhost")
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            reason = os.strerror(error.errno).lower() if error.errno else str(error)
            raise XapiUnreachable(socket=self._path, reason=reason) from None
        connection.sock = sock
        self._connection = "localhost", connection
        return connection


class XenApi:
    """A session: ``api("VM.get_record", ref)``. Leaving the context logs out."""

    def __init__(self, path: str, user: str = "root", password: str = "") -> None:
        self._path = path
        self._proxy = xmlrpc.client.ServerProxy("http://localhost/", transport=_Transport(path), allow_none=True)
        self._session: str | None = None
        self._login = (user, password)

    def __enter__(self) -> XenApi:
        self._session = self._send("session.login_with_password", *self._login, "2.21", "simsr xe")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self("session.logout")
        except SimsrError:
            pass  # the work is done or has failed already
        finally:
            self._proxy("close")()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Return the value of one call. Raises `XenApiFailure`, `XapiUnreachable`."""
        return self._send(method, self._session, *arguments)

    def _send(self, method: str, *arguments: Any) -> Any:
        try:
            answer = getattr(self._proxy, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            raise XenApiFailure(method, [fault.faultString]) from None
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise XapiUnreachable(socket=self._path, reason=f"it broke off ({error})") from None
        if answer.get("Status") == "Success":
            return answer["Value"]
        raise XenApiFailure(method, answer["ErrorDescription"])

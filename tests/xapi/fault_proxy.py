"""A proxy in front of a server's unix socket that lets the server die at a chosen request of a plug-in.

The plug-in makes a connection for every request, so the n-th connection is the n-th step. At the step chosen something happens at
a chosen moment: ``before`` the request reaches the server, ``after`` the server has done it and not answered, or in the ``middle`` of
the answer. Then the server is dead: connections are refused until `revive`. ``at_step`` can do more, such as really killing it.
With ``answer`` nothing dies: this step and all later ones get that document instead.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable

MOMENTS = ("before", "after", "middle")


class Proxy:
    """Listens on ``path`` for ``server``. ``steps`` has what was asked since the last `revive`."""

    def __init__(self, path: str, server: Callable[[], str]) -> None:
        self.path, self._server = path, server
        self.steps: list[str] = []
        self._step, self._moment, self._answer = -1, "", b""
        self._at_step: Callable[[], object] = lambda: None
        self._listener: socket.socket | None = None
        self.revive()

    def revive(self) -> None:
        """Serve again, with no fault planned."""
        self.close()
        self.steps, self._step, self._answer = [], -1, b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, args=(self._listener,))
        self._thread.start()

    def die_at(self, step: int, moment: str, at_step: Callable[[], object] = lambda: None) -> None:
        self._step, self._moment, self._at_step = step, moment, at_step

    def answer_from(self, step: int, document: bytes) -> None:
        self._step, self._answer = step, document

    def close(self) -> None:
        if self._listener is not None:
            self._die(self._listener)
            self._thread.join()
        if os.path.lexists(self.path):
            os.unlink(self.path)

    @staticmethod
    def _die(listener: socket.socket) -> None:
        try:
            listener.shutdown(socket.SHUT_RDWR)  # wakes up accept(); from now on connections are refused
        except OSError:
            pass
        listener.close()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                self._exchange(client, listener)

    def _exchange(self, client: socket.socket, listener: socket.socket) -> None:
        head, body = _read_request(client)
        method = re.search(rb"<methodName>(.*?)</methodName>", body)
        self.steps.append((method[1] if method else head.split(b"\r\n")[0].rsplit(b" ", 1)[0]).decode())
        number = len(self.steps) - 1
        if self._answer and number >= self._step:
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self._answer) + self._answer)
            return
        dies = number == self._step
        if not (dies and self._moment == "before"):
            answer = self._ask(head, body)
            client.sendall(answer if not dies else answer[: len(answer) // 2] if self._moment == "middle" else b"")
        if dies:
            self._at_step()
            self._die(listener)

    def _ask(self, head: bytes, body: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(self._server())
            server.sendall(head + body)
            answer = b""
            while piece := server.recv(1 << 16):
                answer += piece
            return answer


def _read_request(client: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)^content-length: *([0-9]+)", head, re.M)
    while length and len(body) < int(length[1]):
        body += client.recv(1 << 16)
    return head + b"\r\n\r\n", body

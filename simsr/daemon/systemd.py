"""The little of systemd that a daemon needs: being handed sockets, and saying that it is ready (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import os
import socket

__all__ = ["listen_fds", "notify"]

_FIRST_FD = 3


def listen_fds() -> list[int]:
    """The descriptors that systemd passed to this process, in order; the environment is cleared of them."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not pid.isdigit() or int(pid) != os.getpid() or not count.isdigit():
        return []
    fds = list(range(_FIRST_FD, _FIRST_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def notify(state: str) -> None:
    """Tell systemd, if it listens; otherwise nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.send(state.encode())
        except OSError:
            pass  # readiness is a courtesy: the daemon works without it

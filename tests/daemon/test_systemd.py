"""systemd's side of the daemon: sockets that it is handed, and what it tells when it is ready or stops."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys

import httpx
import pytest
from daemon_tools import Simsrd
from nbd_wire import MIB, WireClient

_ACTIVATE = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
for target, fd in enumerate(fds, 3):
    os.dup2(fd, target, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=":".join("x" * len(fds)))
os.execv(sys.executable, [sys.executable, "-m", "simsr.daemon.main", *sys.argv[2:]])
"""


class Activated:
    """A simsrd started with sockets that it inherits, as systemd starts it."""

    def __init__(self, sockets: list[socket.socket], notify: socket.socket, *arguments: str) -> None:
        # High numbers first, so that dup2 onto 3, 4... overwrites none that is still needed.
        fds = [os.dup(sock.fileno()) for sock in sockets]
        high = [self._move_up(fd) for fd in fds]
        self._notify = notify
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ACTIVATE, ",".join(map(str, high)), *arguments],
            env={**os.environ, "NOTIFY_SOCKET": notify.getsockname()}, pass_fds=high,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        for fd in high:
            os.close(fd)

    @staticmethod
    def _move_up(fd: int) -> int:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD, 100)
        os.close(fd)
        return high

    def told(self) -> str:
        """The next state that it told systemd."""
        self._notify.settimeout(60)
        return self._notify.recv(1000).decode()

    def stop(self) -> tuple[int, str]:
        self.process.terminate()
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said.decode()


def listening(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    return sock


@pytest.fixture
def notified(folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{folder}/notify")
        yield sock


def api_at(path: str) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://simsrd", timeout=120)


def test_systemd_passes_the_control_socket(root, folder, notified):
    path = f"{folder}/anything"
    with listening(path) as control, api_at(path) as api:
        daemon = Activated([control], notified, "--root", root)
        try:
            assert "READY=1" in daemon.told()
            assert api.get("/v1/daemon").json()["root"] == root
            assert not os.path.exists(f"{root}/control.sock") and os.path.exists(f"{root}/nbd.sock")
            status, said = daemon.stop()
            assert status == 0, said
            assert "STOPPING=1" in daemon.told()
            assert os.path.exists(path), "the socket belongs to systemd, which goes on listening"
        finally:
            daemon.process.kill()
            daemon.process.wait()


def test_systemd_passes_all_sockets(root, folder, notified):
    paths = f"{folder}/nbd-of-systemd", f"{folder}/control.sock"
    with listening(paths[0]) as nbd, listening(paths[1]) as control, api_at(paths[1]) as api:
        with socket.create_server(("127.0.0.1", 0)) as tcp:
            daemon = Activated([nbd, control, tcp], notified, "--root", root)
            try:
                assert "READY=1" in daemon.told()
                api.post("/v1/srs", json={"name": "sr"}).raise_for_status()
                vdi = api.post("/v1/vdis", json={"size_bytes": MIB}).raise_for_status().json()
                assert vdi["nbd_uri"].endswith(f"?socket={paths[0]}")
                with WireClient.connect(paths[0], vdi["uuid"]) as client:
                    client.write(0, b"s" * 512)
                with socket.create_connection(tcp.getsockname()) as sock:
                    assert sock.recv(8) == b"NBDMAGIC"
                assert not os.path.exists(f"{root}/nbd.sock")
                status, said = daemon.stop()
                assert status == 0, said
                assert os.path.exists(paths[0]) and os.path.exists(paths[1])
            finally:
                daemon.process.kill()
                daemon.process.wait()


def test_sockets_meant_for_another_process_are_left_alone(root):
    """LISTEN_PID tells whose they are; a child of an activated service may see the variables of its parent."""
    with Simsrd(root, environment={"LISTEN_PID": "1", "LISTEN_FDS": "3"}):
        pass


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens-here"])
def test_a_notify_socket_that_nobody_reads(root, address):
    with Simsrd(root, environment={"NOTIFY_SOCKET": address}):
        pass

"""A real simsrd for tests: started on a root of its own, asked over HTTP, stopped or killed, and looked at from outside."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

__all__ = ["Simsrd", "short_directory", "simsrd_command"]

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 120
LIMIT_BYTES = 2 << 30
"""Of the SRs of tests: their segments are small then, and so is what is written in advance: 56 MiB instead of 224 for an SR."""

_READY = "simsrd: ready, control socket "
_NOISE = re.compile(r"ERROR|Traceback|\bbug\b", re.IGNORECASE)


def simsrd_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "simsr.daemon.main", *arguments]


@contextmanager
def short_directory() -> Iterator[str]:
    """A temporary directory whose path is short enough for unix sockets below it."""
    path = tempfile.mkdtemp(prefix="simsr-", dir="/tmp")
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Simsrd:
    """One simsrd on ``root``; `start` it as often as you like.

    ``process`` is the running one, ``api`` an HTTP client of its control socket. Whatever it logs is kept in `log`.
    """

    def __init__(self, root: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.root = root
        self.socket = os.path.join(root, "control.sock")
        self.nbd_socket = os.path.join(root, "nbd.sock")
        self._arguments = arguments
        self._environment = environment
        self._log_path = root.rstrip("/") + ".log"
        self.process: subprocess.Popen[bytes] | None = None
        self.api: httpx.Client | None = None

    @property
    def log(self) -> str:
        """All that was logged, by every process so far."""
        with open(self._log_path, errors="replace") as file:
            return file.read()

    @property
    def pid(self) -> int:
        return self.process.pid

    # Life.

    def start(self) -> Simsrd:
        """Start it; returns when it serves."""
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                simsrd_command("--root", self.root, *self._arguments), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, env=self._environment and {**os.environ, **self._environment},
            )  # fmt: skip
        line = self._first_line()
        assert line.startswith(_READY), f"simsrd said {line!r} and logged:\n{self.log}"
        self.socket = line.removeprefix(_READY).rstrip("\n")
        self.api = httpx.Client(transport=httpx.HTTPTransport(uds=self.socket), base_url="http://simsrd", timeout=120)
        return self

    def _first_line(self) -> str:
        output, deadline = b"", time.monotonic() + START_TIMEOUT_S
        while not output.endswith(b"\n"):
            wait_s = max(0.0, deadline - time.monotonic())
            assert select.select([self.process.stdout], [], [], wait_s)[0], f"simsrd is not ready after {START_TIMEOUT_S} s"
            piece = os.read(self.process.stdout.fileno(), 4096)
            if not piece:
                break
            output += piece
        return output.decode()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and return its exit status."""
        self.process.send_signal(number)
        return self._gone()

    def kill(self) -> None:
        self.process.kill()
        self._gone()

    def stop_cleanly(self, number: int = signal.SIGTERM) -> None:
        """Stop it; it must leave with status 0, and must not have logged anything that smells of a bug."""
        status = self.stop(number)
        assert status == 0, f"simsrd ended with status {status} and logged:\n{self.log}"
        noise = [line for line in self.log.splitlines() if _NOISE.search(line) and "(injected by" not in line]
        assert not noise, "simsrd logged:\n" + "\n".join(noise)

    def _gone(self) -> int:
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()
            self.api.close()
        return status

    def end(self) -> None:
        """Make sure that it is gone, however."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            if self.api is not None:
                self.api.close()
        if os.path.exists(self._log_path):
            os.unlink(self._log_path)

    # Use.

    def get(self, path: str) -> dict | list:
        return self._answer(self.api.get(path))

    def post(self, path: str, **body: object) -> dict:
        return self._answer(self.api.post(path, json=body))

    def delete(self, path: str) -> None:
        self._answer(self.api.delete(path))

    @staticmethod
    def _answer(response: httpx.Response) -> dict | list:
        assert response.is_success, f"{response.request.method} {response.request.url}: {response.text}"
        return response.json() if response.content else {}

    def create_sr(self, name: str = "sr", limit_bytes: int | None = LIMIT_BYTES) -> dict:
        return self.post("/v1/srs", name=name, limit_bytes=limit_bytes)

    def create_vdi(self, size_bytes: int, name: str = "", **more: object) -> dict:
        return self.post("/v1/vdis", size_bytes=size_bytes, name=name, **more)

    # Insight.

    def rss_bytes(self) -> int:
        with open(f"/proc/{self.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) << 10

    def fds(self, kind: str = "") -> int:
        """How many descriptors it has open; those of files with ``kind`` in their path, or, if it is "socket:", of sockets."""
        count, folder = 0, f"/proc/{self.pid}/fd"
        for fd in os.listdir(folder):
            try:
                count += kind in os.readlink(f"{folder}/{fd}")
            except FileNotFoundError:  # closed meanwhile
                pass
        return count

    def connections(self) -> int:
        return self.get("/v1/daemon")["statistics"]["nbd"]["connections"]

    def wait_for_connections(self, count: int) -> None:
        """Wait until exactly ``count`` NBD clients are connected."""
        deadline = time.monotonic() + 120
        while (now := self.connections()) != count:
            assert time.monotonic() < deadline, f"{now} NBD connections, not {count}"
            time.sleep(0.02)

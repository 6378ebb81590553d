"""A real simsrd for tests: started on a root of its own, asked over HTTP, stopped or killed, and looked at from outside.

Each is a process of its own that runs what ``simsrd`` runs, but forked from one that has imported everything already: importing is two
thirds of a start, and there are hundreds of starts. That it starts from nothing is for the tests of the command, of systemd and of
``simsr run``, which have `simsrd_command` or start it by another program.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import httpx

__all__ = ["LIMIT_BYTES", "Simsrd", "running_simsrd", "short_directory", "simsrd_command"]

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 120
LIMIT_BYTES = 2 << 30
"""Of the SRs of tests: their segments are small then, and so is what is written in advance: 56 MiB instead of 224 for an SR."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["simsr.daemon.main"])

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


def _simsrd(output: Connection, log_path: str, environment: dict[str, str], arguments: list[str]) -> None:
    """What the new process does: be simsrd."""
    from simsr.daemon.main import main

    with open(log_path, "ab") as log:
        os.dup2(output.fileno(), 1)
        os.dup2(log.fileno(), 2)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["simsrd", *arguments]
    main()


@contextmanager
def running_simsrd(*arguments: str) -> Iterator[Simsrd]:
    """A running daemon on a root of its own; it has to end well."""
    with short_directory() as folder, Simsrd(f"{folder}/r", *arguments) as simsrd:
        yield simsrd


class Simsrd:
    """One simsrd on ``root``; `start` it as often as you like, or let it run ``with`` a block.

    At the end of the block it must stop cleanly, unless it was killed there.

    ``process`` is the running one, ``api`` an HTTP client of its control socket. Whatever it logs is kept in `log`.
    """

    def __init__(self, root: str | os.PathLike[str], *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.root = root = os.fspath(root)
        self.socket = os.path.join(root, "control.sock")
        self.nbd_socket = os.path.join(root, "nbd.sock")
        self._arguments = arguments
        self._environment = environment or {}
        self._log_path = root.rstrip("/") + ".log"
        self._is_killed = False
        self._output: Connection | None = None
        self.process: BaseProcess | None = None
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

    def __enter__(self) -> Simsrd:
        try:
            return self.start()
        except BaseException:
            self.end()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and not self._is_killed:
                self.stop_cleanly()
        finally:
            self.end()

    def start(self) -> Simsrd:
        """Start it; returns when it serves."""
        self._output, output = _FORKS.Pipe(duplex=False)
        environment = {**os.environ, **self._environment}
        arguments = (output, self._log_path, environment, ["--root", self.root, *self._arguments])
        self.process = _FORKS.Process(target=_simsrd, args=arguments, daemon=True)
        self.process.start()
        output.close()
        line = self._first_line()
        assert line.startswith(_READY), f"simsrd said {line!r} and logged:\n{self.log}"
        self.socket = line.removeprefix(_READY).rstrip("\n")
        self._is_killed = False
        self.api = httpx.Client(transport=httpx.HTTPTransport(uds=self.socket), base_url="http://simsrd", timeout=120)
        return self

    def _first_line(self) -> str:
        output, deadline = b"", time.monotonic() + START_TIMEOUT_S
        while not output.endswith(b"\n"):
            wait_s = max(0.0, deadline - time.monotonic())
            assert select.select([self._output], [], [], wait_s)[0], f"simsrd is not ready after {START_TIMEOUT_S} s"
            piece = os.read(self._output.fileno(), 4096)
            if not piece:
                break
            output += piece
        return output.decode()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and return its exit status."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        return self._gone()

    def kill(self) -> None:
        self.process.kill()
        self._gone()
        self._is_killed = True

    def stop_cleanly(self, number: int = signal.SIGTERM) -> None:
        """Stop it; it must leave with status 0, and must not have logged anything that smells of a bug."""
        status = self.stop(number)
        assert status == 0, f"simsrd ended with status {status} and logged:\n{self.log}"
        noise = [line for line in self.log.splitlines() if _NOISE.search(line) and "(injected by" not in line]
        assert not noise, "simsrd logged:\n" + "\n".join(noise)

    def wait(self) -> int:
        """Wait until it has gone; returns its exit status, or the number of the signal that ended it, negative."""
        self.process.join(STOP_TIMEOUT_S)
        assert self.process.exitcode is not None, f"simsrd has not gone after {STOP_TIMEOUT_S} s"
        return self.process.exitcode

    def _gone(self) -> int:
        try:
            return self.wait()
        finally:
            self._output.close()
            self.api.close()

    def end(self) -> None:
        """Make sure that it is gone, however."""
        if self.process is not None:
            self.process.kill()
            self.wait()
            self._output.close()
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

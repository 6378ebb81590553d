"""Fixtures of the command line's tests: a fake daemon and ``simsr`` run in this process or in one of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import daemon_tools
import pytest
from cli_fake_daemon import FakeDaemon
from cli_kit import Outcome, wait_until

from simsr.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find this tree's simsr, installed or not, and no variable of the caller changes what is printed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    for name in ("SIMSR_SOCKET", "NO_COLOR", "LC_ALL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for the names of unix sockets, which pytest's own may not."""
    with daemon_tools.short_directory() as directory:
        yield Path(directory)


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A fake daemon that SIMSR_SOCKET names."""
    fake = FakeDaemon(short_directory)
    monkeypatch.setenv("SIMSR_SOCKET", fake.socket)
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def real() -> Iterator[daemon_tools.Simsrd]:
    """A real daemon without any SR, the same for all tests of a file; it has to end well."""
    with daemon_tools.running_simsrd() as simsrd:
        yield simsrd


@pytest.fixture
def simsr(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``simsr`` with the given words in this process."""

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as ended:
                main(words)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, out, err)

    return run


@pytest.fixture
def serve_disks(daemon: FakeDaemon) -> Iterator[Callable[..., Callable[[], None]]]:
    """Serve the fake daemon's disks over NBD, with further arguments for nbdkit such as a filter. ``paused``: reads and writes wait until
    what this returns is called, or the test ends."""
    with contextlib.ExitStack() as servers:

        def serve(*filters: str, settings: tuple[str, ...] = (), paused: bool = False) -> Callable[[], None]:
            ready, control = daemon.disks.parent / "nbdkit.pid", daemon.disks.parent / "pause"
            command = ["nbdkit", "-f", "-U", daemon.nbd_socket, "-P", str(ready), "--filter=pause", *filters, "file"]
            server = servers.enter_context(subprocess.Popen([*command, f"dir={daemon.disks}", f"pause-control={control}", *settings]))
            servers.callback(server.terminate)
            wait_until(ready.exists)
            sock = servers.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(control))

            def say(letter: bytes) -> None:
                sock.sendall(letter)
                assert sock.recv(1) == letter.upper()

            if paused:
                say(b"p")
                servers.callback(say, b"r")
            return lambda: say(b"r")

        yield serve


@pytest.fixture
def start_simsr() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start ``simsr`` as a process of its own, in its own session, for tests of signals and terminals."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **options: object) -> subprocess.Popen[str]:
        environment = {**os.environ, **options.pop("env", {})}  # type: ignore[dict-item]
        command = [sys.executable, "-m", "simsr.cli.main", *words]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, **options}
        child = subprocess.Popen(command, text=True, env=environment, **options)  # type: ignore[call-overload]
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()

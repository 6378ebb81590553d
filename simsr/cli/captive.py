"""``simsr run``: a daemon with one VDI that live exactly as long as a command.

The daemon is a child in a process group of its own, so that a Ctrl-C at the terminal ends the command and not the
disk under it; the kernel ends it should simsr itself be killed. The command stays in our group and has the terminal.
While it runs we only wait for signals: one from the terminal has reached the command already, any other is passed on.
Whatever happens, the VDI, the daemon and a temporary root are gone in the end, in this order.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from simsr.cli.client import Client
from simsr.cli.failures import FileFailure, StartFailed
from simsr.cli.output import complain
from simsr.cli.transfer import delete_when_free, undisturbed
from simsr.errors import SimsrError

__all__ = ["run_captive"]

SR_NAME = "run"
READY_LINE = "simsrd: ready, control socket "
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0

LONGEST_ROOT = 60
"""A unix socket path has at most 107 characters, and ROOT/nbd/UUID.sock must fit."""

_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80  # si_code of a signal that the terminal sent
_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def run_captive(command: list[str], *, size_bytes: int, root: str | None, debug: bool) -> int:
    """Run ``command`` beside a daemon with a VDI of ``size_bytes`` and return the exit status to end with."""
    with _root(root) as directory, _daemon(directory, debug) as socket, _disk(socket, size_bytes) as vdi:
        environment = {**os.environ, "uri": vdi["nbd_uri"], "vdi": vdi["uuid"], "SIMSR_SOCKET": socket}
        return _run([word.replace("{uri}", vdi["nbd_uri"]) for word in command], environment)


@contextlib.contextmanager
def _root(given: str | None) -> Iterator[str]:
    if given is not None:
        try:
            os.makedirs(given, exist_ok=True)
        except OSError as error:
            raise FileFailure(action="use", path=given, reason=error.strerror or str(error)) from None
        yield os.path.abspath(given)
        return
    parent = tempfile.gettempdir()
    directory = tempfile.mkdtemp(prefix="simsr-run-", dir=parent if len(parent) < LONGEST_ROOT - 20 else "/tmp")
    try:
        yield directory
    finally:
        with undisturbed():
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _daemon(root: str, debug: bool) -> Iterator[str]:
    """Start simsrd on ``root``, give the path of its control socket, stop it in the end."""
    with tempfile.TemporaryFile() as log:
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "simsr.daemon.main", "--root", root],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if debug else log,
            process_group=0,
            preexec_fn=_end_with_parent,
        )
        try:
            yield _socket_when_ready(daemon, root, log)
        finally:
            with undisturbed():
                _stop(daemon)


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies (runs in the child)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _socket_when_ready(daemon: subprocess.Popen[bytes], root: str, log: IO[bytes]) -> str:
    assert daemon.stdout is not None
    output, give_up = b"", time.monotonic() + START_TIMEOUT_S
    while not output.endswith(b"\n"):
        readable, _, _ = select.select([daemon.stdout], [], [], max(0.0, give_up - time.monotonic()))
        piece = os.read(daemon.stdout.fileno(), 4096) if readable else b""
        if not piece:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            late = f"no answer within {START_TIMEOUT_S:.0f} s" if not readable else "it ended at once"
            raise StartFailed(root=root, reason=lines[-1].removeprefix("simsrd: ") if lines else late)
        output += piece
    line = output.decode(errors="replace").splitlines()[-1]
    if not line.startswith(READY_LINE):
        raise StartFailed(root=root, reason=f"it said {line!r}")
    return line.removeprefix(READY_LINE)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    if daemon.poll() is None:
        daemon.terminate()
    try:
        daemon.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        complain(f"simsrd did not stop within {STOP_TIMEOUT_S:.0f} s and was killed")
        daemon.kill()
        daemon.wait()
    if daemon.stdout is not None:
        daemon.stdout.close()


@contextlib.contextmanager
def _disk(socket: str, size_bytes: int) -> Iterator[dict[str, Any]]:
    client, chosen = Client(socket), str(uuid.uuid4())
    try:
        body = {"uuid": chosen, "size_bytes": size_bytes, "name": f"run-{os.getpid()}", "sr": _home_sr(client)}
        yield client.post("/v1/vdis", body)
    finally:
        with undisturbed():
            client.close()
            try:
                delete_when_free(client, chosen)
            except SimsrError as error:
                # Only a root that stays can miss it; an error or the command's own status is on its way.
                if sys.exc_info()[0] is None:
                    complain(f"VDI {chosen} stays: {error}", error.hint)
            client.close()


def _home_sr(client: Client) -> str:
    """Return the uuid of the SR for the disk: the only one, else the one called ``run``, made if there is none."""
    repositories = client.get("/v1/srs")
    named = repositories if len(repositories) == 1 else [sr for sr in repositories if sr["name"] == SR_NAME]
    uuid_of_sr = (named[0] if named else client.post("/v1/srs", {"name": SR_NAME}))["uuid"]
    assert isinstance(uuid_of_sr, str)
    return uuid_of_sr


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run the command to its end, passing signals on; return its status as a shell would."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
    try:
        child = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before)
        )
        while child.poll() is None:
            received = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
            if received.si_signo != signal.SIGCHLD and received.si_code != _SI_KERNEL:
                child.send_signal(received.si_signo)
    except OSError as error:
        complain(f"cannot run {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    status = child.returncode
    return status if status >= 0 else 128 - status

"""``simsr run``: a daemon with one VDI that live exactly as long as a command.

The daemon is out of reach of a Ctrl-C at the terminal, which ends the command and not the disk under it. The command
stays in our process group and has the terminal. While it runs we only wait for signals: one that the terminal sent has
reached the command already, any other is passed on.
Whatever happens, the VDI, the daemon and a temporary root are gone in the end, in this order.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
from simsr.cli.client import Client
from simsr.cli.failures import FileFailure
from simsr.cli.output import complain
from simsr.cli.transfer import delete_when_free, undisturbed
from simsr.errors import SimsrError

__all__ = ["run_captive"]

SR_NAME = "run"

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
    directory = short_temporary_directory("simsr-run-")
    try:
        yield directory
    finally:
        with undisturbed():
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _daemon(root: str, debug: bool) -> Iterator[str]:
    """Start simsrd on ``root``, give the path of its control socket, stop it in the end."""
    with ChildDaemon(root, show_log=debug) as daemon:
        try:
            yield daemon.socket
        finally:
            with undisturbed():
                daemon.stop()


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

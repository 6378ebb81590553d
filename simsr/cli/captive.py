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
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
from simsr.cli.client import Client
from simsr.cli.failures import DaemonAnswer, ExpectationsBroken, FileFailure
from simsr.cli.output import complain
from simsr.cli.report_file import check_expectations
from simsr.cli.transfer import delete_when_free, undisturbed
from simsr.errors import SimsrError

__all__ = ["run_captive"]

SR_NAME = "run"
DISK_NAME = "run"  # the same each time: faults are drawn from the name of the disk

_SI_KERNEL = 0x80  # si_code of a signal that the terminal sent
_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_LOOK_S = 0.5  # if another thread of this process swallows SIGCHLD between looking and waiting
_IGNORED_BY_PYTHON = [signal.SIGPIPE, signal.SIGXFSZ]


def run_captive(
    command: list[str],
    *,
    size_bytes: int,
    root: str | None,
    debug: bool,
    scenario: dict[str, Any] | None = None,
    write_report: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run ``command`` beside a daemon with a VDI of ``size_bytes`` and return the exit status to end with.

    ``scenario``: what the API takes to put one in force, from before the command begins until it has ended. ``write_report`` then gets its report; a
    command that succeeds is taken for one that failed (1) if the scenario's expectations are broken.
    """
    lasting = root is not None
    with _root(root) as directory, _daemon(directory, debug) as socket, _disk(socket, size_bytes, lasting) as vdi:
        environment = {**os.environ, "uri": vdi["nbd_uri"], "vdi": vdi["uuid"], "SIMSR_SOCKET": socket}
        if scenario is not None:
            with contextlib.closing(Client(socket)) as client:
                client.post("/v1/scenario", scenario)
        status = _run([word.replace("{uri}", vdi["nbd_uri"]) for word in command], environment)
        return status if scenario is None else _conclude(socket, status, write_report)


def _conclude(socket: str, status: int, write_report: Callable[[dict[str, Any]], None] | None) -> int:
    """End the scenario, unless the command has, and say what came of it."""
    with undisturbed(), contextlib.closing(Client(socket)) as client:
        try:
            with contextlib.suppress(DaemonAnswer):
                client.delete("/v1/scenario")
            report = client.get("/v1/scenario/report")
        except SimsrError as error:
            complain(f"what came of the scenario is not known: {error}", error.hint)
            return status
        if write_report is not None:
            write_report(report)
        try:
            check_expectations(report)
        except ExpectationsBroken as error:
            complain(str(error), "" if write_report else "Give --report FILE.html to see the whole run.")
            return status or error.exit_code
    return status


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
def _disk(socket: str, size_bytes: int, lasting: bool) -> Iterator[dict[str, Any]]:
    """Create the disk, give it, delete it in the end if the store outlasts it."""
    client, chosen = Client(socket), str(uuid.uuid4())
    try:
        body = {"uuid": chosen, "size_bytes": size_bytes, "name": DISK_NAME, "sr": _home_sr(client)}
        yield client.post("/v1/vdis", body)
    except BaseException:
        if lasting:
            with undisturbed(), contextlib.suppress(SimsrError):  # the first error is the one to report
                client.close()
                delete_when_free(client, chosen)
        raise
    else:
        if lasting:
            with undisturbed():
                _delete_or_complain(client, chosen)
    finally:
        client.close()


def _delete_or_complain(client: Client, vdi_uuid: str) -> None:
    try:
        delete_when_free(client, vdi_uuid)
    except SimsrError as error:
        complain(f"the disk of this run stays: {error}", error.hint)


def _home_sr(client: Client) -> str:
    """Return the uuid of the SR for the disk: the only one, else the one called ``run``, made if there is none."""
    repositories = client.get("/v1/srs")
    named = repositories if len(repositories) == 1 else [sr for sr in repositories if sr["name"] == SR_NAME]
    uuid_of_sr = (named[0] if named else client.post("/v1/srs", {"name": SR_NAME}))["uuid"]
    assert isinstance(uuid_of_sr, str)
    return uuid_of_sr


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run the command to its end, passing signals on; return its status as a shell would."""
    if not command[0]:  # which posix_spawnp refuses in another way than what is not there
        complain("cannot run '': its name is empty")
        return 127
    watched = _FORWARDED | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        child = os.posix_spawnp(command[0], command, environment, setsigmask=before, setsigdef=_IGNORED_BY_PYTHON)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            received = signal.sigtimedwait(watched, _LOOK_S)
            if received is None:
                continue
            if received.si_signo != signal.SIGCHLD and received.si_code != _SI_KERNEL:
                os.kill(child, received.si_signo)
    except OSError as error:
        complain(f"cannot run {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

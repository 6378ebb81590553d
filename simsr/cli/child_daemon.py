"""A simsrd as a child of this process: started, waited for, stopped.

It has a process group of its own, so that a Ctrl-C at the terminal does not reach it, and the kernel sends it SIGTERM
should the thread that started it die. What it logs is kept in a temporary file and consulted when it does not start.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

from simsr.cli.failures import StartFailed
from simsr.cli.interrupts import interrupts_later
from simsr.cli.output import complain

__all__ = ["ChildDaemon", "short_temporary_directory"]

DAEMON = [sys.executable, "-P", "-m", "simsr.daemon.main"]
READY_LINE = "simsrd: ready, control socket "
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0

LONGEST_ROOT = 60
"""A unix socket path has at most 107 characters, and ROOT/nbd/UUID.sock must fit."""

END_WITH_PARENT = ["setpriv", "--pdeathsig", "TERM", "--"]
"""Put before a command. setpriv belongs to util-linux; without it only the tie to this process is missing."""


def short_temporary_directory(prefix: str) -> str:
    """Make a temporary directory whose path leaves room for the daemon's sockets."""
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix=prefix, dir=parent if len(parent) + len(prefix) + 9 <= LONGEST_ROOT else "/tmp")


class ChildDaemon:
    """A daemon on ``root``, ready when the constructor returns; leaving the context stops it.

    ``socket`` is its control socket, ``process`` the child.
    """

    def __init__(self, root: str, *, show_log: bool = False) -> None:
        self.root = root
        self._log = tempfile.TemporaryFile()
        child = None
        try:
            with interrupts_later():
                child = self.process = subprocess.Popen(
                    [*(END_WITH_PARENT if shutil.which("setpriv") else []), *DAEMON, "--root", root],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=None if show_log else self._log,
                    process_group=0,
                )
            self.socket = self._socket_when_ready()
        except BaseException:
            if child is not None:
                self.stop()
            raise

    def __enter__(self) -> ChildDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """End it in good order, or by force after a while; return its exit status. Doing it twice is once."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            complain(f"simsrd did not stop within {STOP_TIMEOUT_S:.0f} s and was killed")
            self.process.kill()
        return self._gone()

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self.process.kill()
        self._gone()

    def log(self) -> list[str]:
        """Return the lines it has logged so far; none after it has gone."""
        if self._log.closed:
            return []
        self._log.seek(0)
        return self._log.read().decode(errors="replace").splitlines()

    def _gone(self) -> int:
        status = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()
        return status

    def _socket_when_ready(self) -> str:
        assert self.process.stdout is not None
        output, give_up = b"", time.monotonic() + START_TIMEOUT_S
        while not output.endswith(b"\n"):
            readable, _, _ = select.select([self.process.stdout], [], [], max(0.0, give_up - time.monotonic()))
            if not readable:
                raise StartFailed(root=self.root, reason=f"it was not ready within {START_TIMEOUT_S:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 4096)
            if not piece:
                raise StartFailed(root=self.root, reason=self._last_words())
            output += piece
        line = output.decode(errors="replace").splitlines()[-1]
        if not line.startswith(READY_LINE):
            raise StartFailed(root=self.root, reason=f"it said {line!r}")
        return line.removeprefix(READY_LINE)

    def _last_words(self) -> str:
        self.process.wait()
        said = [line for line in self.log() if line.strip() and not line.startswith("Hint: ")]
        return said[-1].removeprefix("simsrd: ") if said else f"it ended with status {self.process.returncode}"

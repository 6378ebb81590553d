"""The root directory of a daemon: where its SRs are, its lock, and the sockets of its disks. What is in it: `simsr.daemon.host`.

An SR comes into being under a name that is not a uuid and is renamed when it is whole; it is deleted the other way round. So
whatever else is in ``sr/`` at the start was left by a crash, and goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from typing import Protocol

from nbd_export.server import listen_unix
from simsr.errors import StoreLocked
from simsr.store.files import Directory, DiskDirectory

__all__ = ["Root", "DiskRoot"]


class Root(Protocol):
    """What a host needs of its root. All but `listen` and `unlisten` may block."""

    report_file: str | None
    """Where the report of the last scenario is kept, if anywhere."""

    def prepare(self) -> None:
        """Take it for this process, and sweep up what a crash left. Raises OSError, `StoreLocked`."""

    def release(self) -> None: ...

    def srs(self) -> list[str]:
        """The names of the SRs in it, in order."""

    def sr_path(self, name: str) -> str: ...

    def open(self, name: str) -> Directory: ...

    def begin(self, uuid: str) -> Directory:
        """An empty directory for a new SR, which is nobody's yet."""

    def finish(self, directory: Directory, uuid: str) -> None:
        """Make it that of SR ``uuid``, durably."""

    def give_up(self, uuid: str) -> None:
        """Take away what `begin` made."""

    def remove(self, directory: Directory, uuid: str) -> None:
        """Take away an SR and its files, all or nothing."""

    def listen(self, path: str) -> socket.socket | None:
        """A listening socket there; None if there are no sockets in this root. Raises OSError."""

    def unlisten(self, path: str) -> None: ...


class DiskRoot:
    """`Root` in a directory of the host's file system."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock_fd = -1
        self.report_file: str | None = self._of("last-report.json")

    def _of(self, *parts: str) -> str:
        return os.path.join(self._path, *parts)

    def prepare(self) -> None:
        os.makedirs(self._of("sr"), mode=0o700, exist_ok=True)
        os.makedirs(self._of("nbd"), exist_ok=True)
        self._lock_fd = os.open(self._of("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(path=self._path) from None
        for name in os.listdir(self._of("sr")):
            if name.startswith((".new-", ".deleted-")):
                shutil.rmtree(self._of("sr", name))
        for name in os.listdir(self._of("nbd")):
            if name.endswith(".sock"):
                os.unlink(self._of("nbd", name))

    def release(self) -> None:
        os.close(self._lock_fd)

    def srs(self) -> list[str]:
        return sorted(os.listdir(self._of("sr")))

    def sr_path(self, name: str) -> str:
        return self._of("sr", name)

    def open(self, name: str) -> DiskDirectory:
        return DiskDirectory(self.sr_path(name))

    def begin(self, uuid: str) -> DiskDirectory:
        return DiskDirectory(self._of("sr", f".new-{uuid}"))

    def finish(self, directory: DiskDirectory, uuid: str) -> None:
        directory.rename(self.sr_path(uuid))
        self._sync()

    def give_up(self, uuid: str) -> None:
        shutil.rmtree(self._of("sr", f".new-{uuid}"), ignore_errors=True)

    def remove(self, directory: DiskDirectory, uuid: str) -> None:
        gone = self._of("sr", f".deleted-{uuid}")
        os.rename(directory.path, gone)
        self._sync()
        shutil.rmtree(gone)

    def _sync(self) -> None:
        fd = os.open(self._of("sr"), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def listen(self, path: str) -> socket.socket:
        return listen_unix(path)

    def unlisten(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

"""A directory of the host that is only read: for `simsr check` and `simsr salvage`, which must change nothing.

Files are opened for reading, the lock is taken shared, so two checks may run beside each other and a daemon may not start meanwhile.
Whatever would write raises OSError (EROFS), as on a file system that is mounted so.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence

from simsr.errors import StoreLocked
from simsr.store.files import DiskArea, DiskFile, File

__all__ = ["ReadOnlyDirectory"]


def _refused(what: str) -> OSError:
    return OSError(errno.EROFS, f"{what}: the store is open for reading only")


class _ReadOnlyFile(DiskFile):
    """`File` over a descriptor that cannot write."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._fd).st_size

    def pwritev(self, buffers: Sequence, offset: int) -> None:
        raise _refused(self._path)

    def area(self, offset: int, length: int) -> DiskArea:
        raise _refused(self._path)

    def datasync(self) -> None:
        raise _refused(self._path)


class ReadOnlyDirectory:
    """`simsr.store.files.Directory` of which nothing changes; raises OSError if it is not there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock_fd = -1

    def lock(self) -> None:
        """Keep daemons away until `close`. Raises `StoreLocked` if one has the store. Nothing is made if there is no LOCK."""
        try:
            fd = os.open(os.path.join(self.path, "LOCK"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreLocked(path=self.path) from None
        self._lock_fd = fd

    def names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.path) if name != "LOCK")

    def create(self, name: str, size_bytes: int) -> File:
        raise _refused(name)

    def open(self, name: str) -> File:
        return _ReadOnlyFile(os.path.join(self.path, name))

    def remove(self, name: str) -> None:
        raise _refused(name)

    def sync(self) -> None:
        raise _refused(self.path)

    def free_bytes(self) -> int:
        return 0

    def close(self) -> None:
        for fd in (self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._fd = -1

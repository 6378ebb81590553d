"""Disk files behind one small interface: the real one. The crash-recording twin is in `simsr.store.memory`.

The store touches the host's file system through `Directory` and `File` alone, so that tests can put a recording
implementation below it and enumerate every state a power cut may leave. Both implementations make the same promises:

* ``pwritev`` transfers everything or raises; what it wrote survives the death of the process at once and a power
  cut only after ``datasync``.
* an `Area` (a writable shared mapping of a part of a file) behaves as ``pwritev`` does, but its ``write`` costs no system call. The first one after a
  sync does cost a page fault, and makes the next sync write the whole folio around it: its ``pwrite`` is better where syncs are frequent.
* ``pread_disk`` asks the disk itself, where that is possible, and leaves the page cache as it is.
* ``read_cached`` never waits for a disk: it answers False when a page is not in memory.
* ``in_memory`` gives the whole file as it is and as it will be, in memory as long as the view is there; OSError where that cannot be had.
* a file created, or removed, is durably so after ``Directory.sync``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from simsr.errors import StoreLocked

__all__ = ["Area", "File", "Directory", "DiskDirectory", "PIECE_BYTES"]

PIECE_BYTES = 65536
"""Files are pre-written in pieces of this size. ext4 keeps the page cache in folios as large as the write that made
them, and a later 4 KiB overwrite costs time proportional to its folio (measured: 1 MiB pieces cost 24 us a write,
64 KiB pieces 4 us)."""

_IOV_MAX = 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Area(Protocol):
    """A writable window into a file."""

    def write(self, position: int, data: bytes) -> None: ...
    def pwrite(self, position: int, data: bytes) -> None: ...
    def close(self) -> None: ...


class File(Protocol):
    """An open file of fixed size."""

    size_bytes: int
    descriptor: int | None
    """by which the kernel knows it; None if the kernel does not"""

    def pwritev(self, buffers: Sequence, offset: int) -> None: ...
    def pread(self, view: memoryview, offset: int) -> None: ...
    def pread_disk(self, view: memoryview, offset: int) -> None: ...
    def read_cached(self, view: memoryview, offset: int) -> bool: ...
    def in_memory(self) -> memoryview: ...
    def will_need(self, offset: int, length: int) -> None: ...
    def area(self, offset: int, length: int) -> Area: ...
    def datasync(self) -> None: ...
    def close(self) -> None: ...


class Directory(Protocol):
    """A flat set of files."""

    path: str

    def lock(self) -> None: ...
    def names(self) -> list[str]: ...
    def create(self, name: str, size_bytes: int) -> File: ...
    def open(self, name: str) -> File: ...
    def remove(self, name: str) -> None: ...
    def sync(self) -> None: ...
    def free_bytes(self) -> int: ...
    def close(self) -> None: ...


class DiskArea:
    """`Area` over mmap(2). ``write`` may fault a page in, so the file's pages should be resident by then."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self._fd, self._offset = fd, offset
        self._map = mmap.mmap(fd, length, offset=offset)

    def write(self, position: int, data: bytes) -> None:
        self._map[position : position + len(data)] = data

    def pwrite(self, position: int, data: bytes) -> None:
        if os.pwrite(self._fd, data, self._offset + position) < len(data):
            raise OSError(errno.EIO, "short write")

    def close(self) -> None:
        self._map.close()


class DiskFile:
    """`File` over a descriptor."""

    def __init__(self, path: str, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self.size_bytes = os.fstat(self._fd).st_size

    @property
    def descriptor(self) -> int:
        return self._fd

    def pwritev(self, buffers: Sequence, offset: int) -> None:
        for first in range(0, len(buffers), _IOV_MAX):
            part = buffers[first : first + _IOV_MAX]
            wanted = sum(map(len, part))
            done = os.pwritev(self._fd, part, offset)
            while done < wanted:  # a short write: a signal, or a full disk that answers ENOSPC on the next call
                rest = memoryview(b"".join(part))[done:]
                done += os.pwrite(self._fd, rest, offset + done)
            offset += wanted
        self.size_bytes = max(self.size_bytes, offset)

    def pread(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if not count:
                raise OSError(errno.EIO, f"the file ends at {offset + done}, {len(view) - done} bytes too early")
            done += count

    def pread_disk(self, view: memoryview, offset: int) -> None:
        """``view`` must begin at a page, and it and ``offset`` be whole blocks of the disk, or the page cache is asked after all."""
        try:
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            try:
                if os.preadv(fd, [view], offset) == len(view):
                    return
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP):  # this file system cannot, or there is no /proc
                raise
        self.pread(view, offset)

    def read_cached(self, view: memoryview, offset: int) -> bool:
        try:
            return os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT) == len(view)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # this file system cannot say: let a worker thread read
                return False
            raise

    def in_memory(self) -> memoryview:
        """Blocks until all of it has been read. If somebody else cuts the file short then, whoever looks at the view dies by SIGBUS."""
        view = memoryview(mmap.mmap(self._fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(self.size_bytes)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return view

    def will_need(self, offset: int, length: int) -> None:
        """Have the kernel begin to read this; does not wait for it."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def area(self, offset: int, length: int) -> Area:
        return DiskArea(self._fd, offset, length)

    def datasync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DiskDirectory:
    """`Directory` over a directory of the host; made if it is not there."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.makedirs(path, mode=0o700, exist_ok=True)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock_fd = -1

    def lock(self) -> None:
        """Take the store for this process until `close`. Raises `StoreLocked` if another one has it."""
        fd = os.open(os.path.join(self.path, "LOCK"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreLocked(path=self.path) from None
        self._lock_fd = fd

    def rename(self, path: str) -> None:
        """Move the directory, open files and lock and all, to ``path``."""
        os.rename(self.path, path)
        self.path = path

    def names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.path) if name != "LOCK")

    def create(self, name: str, size_bytes: int) -> File:
        """Create ``name`` filled with ``size_bytes`` zeros, every page written. Blocks: call it from a worker."""
        path = os.path.join(self.path, name)
        file = DiskFile(path, os.O_CREAT | os.O_TRUNC)
        try:
            if size_bytes:
                os.posix_fallocate(file._fd, 0, size_bytes)
            zeros = bytes(PIECE_BYTES)
            for offset in range(0, size_bytes, PIECE_BYTES):
                file.pwritev([zeros[: size_bytes - offset]], offset)
            file.datasync()
        except OSError:
            file.close()
            os.unlink(path)
            raise
        return file

    def open(self, name: str) -> File:
        return DiskFile(os.path.join(self.path, name), 0)

    def remove(self, name: str) -> None:
        os.unlink(os.path.join(self.path, name))

    def sync(self) -> None:
        os.fsync(self._fd)

    def free_bytes(self) -> int:
        stat = os.statvfs(self.path)
        return stat.f_bavail * stat.f_frsize

    def close(self) -> None:
        for fd in (self._lock_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._fd = -1

"""fdatasync(2) without a thread: the kernel carries it out and tells of its end by an eventfd (io_submit(2), IOCB_CMD_FDSYNC).

A worker thread needs Python's interpreter lock before it can begin and again to say that it has ended, and takes it from the thread that
has the next writes to carry out. Writes with a flush every 32 are a seventh faster without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable

import trio

__all__ = ["KernelSync"]

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}  # io_setup, io_destroy, io_getevents, io_submit
_FDSYNC, _RESFD = 3, 1
_IOCB = struct.Struct("<QIIHhIQQqQII")  # data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved2, flags, resfd
_EVENT = struct.Struct("<QQqq")  # data, obj, res, res2

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _call(number: int, *arguments: object) -> int:
    result = _syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class KernelSync:
    """One sync at a time. `run` is the task that is told of its end; `close` only when none is under way."""

    def __init__(self) -> None:
        """Raises OSError where the kernel does not offer this."""
        if platform.machine() not in _CALLS:
            raise OSError(f"the numbers of the system calls on {platform.machine()} are not known")
        self._setup, self._destroy, self._getevents, self._submit = _CALLS[platform.machine()]
        self._context = ctypes.c_ulong(0)
        self._ended_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            _call(self._setup, ctypes.c_uint(1), ctypes.byref(self._context))
        except OSError:
            os.close(self._ended_fd)
            raise
        self._request = ctypes.create_string_buffer(_IOCB.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._event = ctypes.create_string_buffer(_EVENT.size)
        self._done: Callable[[OSError | None], None] | None = None

    def begin(self, fd: int, done: Callable[[OSError | None], None]) -> None:
        """Have ``fd`` synced; ``done`` is called on trio's thread with what went wrong. Never waits. Raises OSError if it cannot begin."""
        assert self._done is None, "a sync is under way"
        _IOCB.pack_into(self._request, 0, 0, 0, 0, _FDSYNC, 0, fd, 0, 0, 0, 0, _RESFD, self._ended_fd)
        _call(self._submit, self._context, ctypes.c_long(1), self._requests)
        self._done = done

    async def run(self) -> None:
        """Tell of ends until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._ended_fd)
            self.collect()

    def collect(self) -> None:
        """Tell of the end of the sync if it has ended. Never waits."""
        try:
            os.eventfd_read(self._ended_fd)
        except BlockingIOError:
            return
        _call(self._getevents, self._context, ctypes.c_long(1), ctypes.c_long(1), self._event, None)
        _, _, result, _ = _EVENT.unpack(self._event)
        done, self._done = self._done, None
        done(OSError(-result, os.strerror(-result)) if result else None)

    def close(self) -> None:
        _call(self._destroy, self._context)
        os.close(self._ended_fd)

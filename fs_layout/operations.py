"""What pyfuse3 calls: requests of the kernel in, answers out.

Reads and writes are done at once if they can be, in the task that took the request. Whatever has to wait (a cold read, a flush, a
write that needs room) lets another task go on reading requests first (`_wait`), so a disk that hangs stops nobody but
those who use it. When the mount ends, requests that still wait are answered with EIO: nothing keeps pages locked then.

How the kernel caches, per open file:

* direct (the default): not at all. Every read and write of a program comes here, so all see each other's writes, and NBD's.
* writeback: the kernel keeps pages and writes them when it likes, or at fsync and close. Such a file excludes everybody who would
  write past the kernel (`Source.attach`, ``cached``); where somebody does already, the file is opened as in direct mode.
* Snapshots never change: their pages are kept in either mode.

O_SYNC reaches the file system as a flag only if nothing is cached, so such writes are flushed here.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn, TypeVar

import pyfuse3
import trio

from fs_layout.nodes import Key, Nodes
from fs_layout.source import Disk, File, Source
from fs_layout.tree import BLOCK_BYTES, DIRECTORIES, TEXTS, Attributes, Tree
from fs_layout.turns import Turns
from simsr.errors import ShrinkRefused, SimsrError, VdiInUse

__all__ = ["Operations"]

log = logging.getLogger("simsr.fuse")

REQUEST_BYTES_MAX = 1 << 20
CACHED_ATTRIBUTES_S = 1.0
"""For how long the kernel may go without asking where it caches: reads of cached pages ask when this has passed. Resize and revert
say so themselves (`Operations.changed`)."""

_Result = TypeVar("_Result")


def _fail(error: Exception) -> NoReturn:
    """Raise what pyfuse3 answers with. What is no answer but a bug is logged; it must not end the whole mount."""
    if isinstance(error, pyfuse3.FUSEError):
        raise error
    if isinstance(error, SimsrError) or hasattr(error, "nbd_errno"):
        raise pyfuse3.FUSEError(getattr(error, "nbd_errno", errno.EIO)) from None
    if isinstance(error, OSError):
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
    log.error("a bug in simsr", exc_info=error)
    raise pyfuse3.FUSEError(errno.EIO) from None


def _answered(handler: Callable[..., Awaitable[_Result]]) -> Callable[..., Awaitable[_Result]]:
    @wraps(handler)
    async def answering(*arguments: object) -> _Result:
        try:
            return await handler(*arguments)
        except Exception as error:
            _fail(error)

    return answering


def _refusing(number: int) -> Callable[..., Awaitable[NoReturn]]:
    async def refuse(*_: object) -> NoReturn:
        raise pyfuse3.FUSEError(number)

    return refuse


@dataclass(slots=True)
class _Open:
    """An open disk or snapshot."""

    number: int
    file: File
    disk: Disk
    writable: bool
    cached: bool
    synchronous: bool
    unflushed: bool = False  # whether something was written since the last flush

    @property
    def locks(self) -> int:
        """The file whose pages the kernel keeps locked while a request for this waits; 0: none."""
        return self.number if self.cached else 0


class Operations(pyfuse3.Operations):
    """The handlers of one mount."""

    supports_dot_lookup = False
    enable_acl = False

    def __init__(self, source: Source, turns: Turns, *, writeback: bool, shared: bool) -> None:
        super().__init__()
        self.enable_writeback_cache = writeback
        self._source, self._turns = source, turns
        self.tree = Tree(source, shared)
        self.nodes = Nodes(self.tree.exists)
        self._open: dict[int, _Open] = {}
        self._texts: dict[int, bytes] = {}
        self._listings: dict[int, list[tuple[str, Key]]] = {}
        self._handles = itertools.count(1)
        self._buffer = memoryview(bytearray(REQUEST_BYTES_MAX))
        self._waits: dict[trio.CancelScope, int] = {}  # requests that wait -> the number of their file
        self._told_sizes: dict[str, int] = {}  # by uuid; what the kernel knows
        self._owner = os.geteuid(), os.getegid()
        self.requests_total = 0
        self.waits_total = 0

    # Waiting.

    async def _wait(self, number: int, work: Callable[..., Awaitable[_Result]], *arguments: object) -> _Result:
        """Carry out ``work``, which may take long, while the kernel keeps pages of file ``number`` locked (0: of none)."""
        if self._turns.ended.is_set():
            raise pyfuse3.FUSEError(errno.EIO)
        self.waits_total += 1
        self._turns.pass_on()
        with trio.CancelScope() as scope:
            self._waits[scope] = number
            try:
                return await work(*arguments)
            finally:
                del self._waits[scope]
        raise pyfuse3.FUSEError(errno.EIO)  # `give_up`

    def give_up(self) -> None:
        """Answer everything that waits with EIO."""
        for scope in self._waits:
            scope.cancel()

    def is_waiting(self, number: int) -> bool:
        """Whether a request for that file waits. The kernel holds the pages that it reads into locked until then."""
        return number in self._waits.values()

    # Names.

    def _key(self, number: int) -> Key:
        try:
            return self.nodes.key(number)
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    def _entry(self, number: int, key: Key) -> pyfuse3.EntryAttributes:
        attributes = self.tree.attributes(key)
        if attributes is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if key[0] == "vdi":
            self._told_sizes[key[1]] = attributes.size_bytes
        entry = pyfuse3.EntryAttributes()
        _fill(entry, attributes)
        entry.st_ino = number
        entry.st_uid, entry.st_gid = self._owner
        entry.entry_timeout = 0
        entry.attr_timeout = CACHED_ATTRIBUTES_S if self.enable_writeback_cache and key[0] == "vdi" else 0
        return entry

    @_answered
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        key = self.tree.look_up(self._key(parent), name)
        if key is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        number = self.nodes.number(key)
        entry = self._entry(number, key)
        self.nodes.remember(number)
        return entry

    async def forget(self, numbers: Sequence[tuple[int, int]]) -> None:
        for number, times in numbers:
            self.nodes.forget(number, times)

    @_answered
    async def getattr(self, number: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(number, self._key(number))

    @_answered
    async def setattr(
        self, number: int, wanted: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, handle: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        key = self._key(number)
        file = self.tree.file(key) if key[0] == "vdi" else None
        if file is None or file.is_a_snapshot or fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and wanted.st_size != file.size_bytes:
            if wanted.st_size < file.size_bytes:
                raise ShrinkRefused(uuid=file.uuid, old_bytes=file.size_bytes, size=wanted.st_size)
            await self._wait(0, self._source.resize, file.uuid, wanted.st_size)
        if fields.update_mtime:
            file.modified_ns = wanted.st_mtime_ns
        return self._entry(number, key)

    @_answered
    async def readlink(self, number: int, ctx: pyfuse3.RequestContext) -> bytes:
        target = self.tree.link_target(self._key(number))
        if target is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return target.encode()

    @_answered
    async def opendir(self, number: int, ctx: pyfuse3.RequestContext) -> int:
        key = self._key(number)
        if not self.tree.exists(key):
            raise pyfuse3.FUSEError(errno.ENOENT)
        handle = next(self._handles)
        self._listings[handle] = list(self.tree.children(key))
        return handle

    @_answered
    async def readdir(self, handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        """What is in a directory is what was there when it was opened, without what has gone since."""
        for at, (name, key) in enumerate(self._listings[handle][start:], start + 1):
            if not self.tree.exists(key):
                continue
            number = self.nodes.number(key)
            if not pyfuse3.readdir_reply(token, name.encode(), self._entry(number, key), at):
                break
            self.nodes.remember(number)

    @_answered
    async def releasedir(self, handle: int) -> None:
        self._listings.pop(handle, None)

    async def fsyncdir(self, handle: int, datasync: bool) -> None:
        """Changes of the tree are made by the daemon, which made them durable then."""

    mknod = mkdir = symlink = link = unlink = rmdir = rename = create = _refusing(errno.EPERM)
    setxattr = removexattr = _refusing(errno.EPERM)

    @_answered
    async def getxattr(self, number: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        value = self.tree.extended(self._key(number)).get(name) if name.startswith(b"user.") else None
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @_answered
    async def listxattr(self, number: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return list(self.tree.extended(self._key(number)))

    @_answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        below = await self._wait(0, self._source.statvfs)
        answer = pyfuse3.StatvfsData()
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail"):
            setattr(answer, field, getattr(below, field))
        answer.f_files = len(self.nodes)
        answer.f_namemax = 255
        return answer

    # Files.

    @_answered
    async def open(self, number: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        key = self._key(number)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        handle = next(self._handles)
        if key[0] in TEXTS:
            if writable:
                raise pyfuse3.FUSEError(errno.EPERM)
            text = self.tree.text(key)
            if text is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
            self._texts[handle] = text
            return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)
        file = self.tree.file(key)
        if key[0] in DIRECTORIES or file is None:
            raise pyfuse3.FUSEError(errno.EISDIR if key[0] in DIRECTORIES else errno.ENOENT)
        if writable and file.read_only:
            raise pyfuse3.FUSEError(errno.EROFS)
        if flags & os.O_TRUNC and self.enable_writeback_cache:
            raise pyfuse3.FUSEError(errno.EINVAL)  # the kernel would take the size to be 0 from then on
        opened = self._attach(number, file, f"FUSE, pid {ctx.pid}", writable, bool(flags & (os.O_SYNC | os.O_DSYNC)))
        self._open[handle] = opened
        try:
            await self._meet(opened, "open")
        except BaseException:
            self._let_go(handle)
            raise
        return pyfuse3.FileInfo(fh=handle, direct_io=not opened.cached, keep_cache=file.is_a_snapshot)

    def _attach(self, number: int, file: File, client: str, writable: bool, synchronous: bool) -> _Open:
        for other in self._open.values():
            if other.cached and other.file is file and other.number != number:
                raise VdiInUse(operation="open", uuid=file.uuid, by="files opened before its size was changed")
        if self.enable_writeback_cache and not file.is_a_snapshot:
            try:
                disk = self._source.attach(file.uuid, client, writable, True)
                return _Open(number, file, disk, writable, True, synchronous)
            except VdiInUse:
                pass
        disk = self._source.attach(file.uuid, client, writable, False)
        return _Open(number, file, disk, writable, file.is_a_snapshot, synchronous)

    async def read(self, handle: int, offset: int, size: int) -> bytes | memoryview:
        self.requests_total += 1
        try:
            opened = self._open.get(handle)
            if opened is None:
                return self._texts[handle][offset : offset + size]
            size = min(size, opened.file.size_bytes - offset, REQUEST_BYTES_MAX)
            if size <= 0:
                return b""
            if (scripted := opened.disk.scripted) is not None:
                return await self._wait(opened.locks, scripted.read, offset, size)
            # One buffer for all: pyfuse3 has sent it before anything else can run.
            view = self._buffer[:size]
            if not opened.disk.read([(offset, view)]):
                return view
            own = memoryview(bytearray(size))
            (error,) = await self._wait(opened.locks, opened.disk.read_cold, [(offset, own)])
            if error is not None:
                raise error
            return own
        except Exception as error:
            self._complain(handle, "read", offset, size, error)

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        self.requests_total += 1
        size = len(data)
        try:
            opened = self._open[handle]
            size = min(size, opened.file.size_bytes - offset)
            if size < len(data) and opened.cached:
                self.nodes.renew(("vdi", opened.file.uuid))  # the kernel takes the file to be larger, and would for ever
            if size <= 0:
                raise pyfuse3.FUSEError(errno.ENOSPC)  # as a block device says at its end
            opened.unflushed = True
            if (scripted := opened.disk.scripted) is not None:
                await self._wait(opened.locks, scripted.write, "write", offset, size, data[:size], opened.synchronous)
                return size
            batch = [(offset, size, memoryview(data)[:size])]
            if not opened.disk.write(batch):
                await self._wait(opened.locks, opened.disk.write_rest, batch, 0)
            if opened.synchronous:
                await self._flush(opened)
            return size
        except Exception as error:
            self._complain(handle, "write", offset, size, error)

    def _complain(self, handle: int, what: str, offset: int, size: int, error: Exception) -> NoReturn:
        if not isinstance(error, pyfuse3.FUSEError) and (opened := self._open.get(handle)):
            log.warning("%s of VDI %s, bytes %s to %s, failed: %s", what, opened.file.uuid, offset, offset + size, error)
        _fail(error)

    @_answered
    async def fsync(self, handle: int, datasync: bool) -> None:
        if opened := self._open.get(handle):
            await self._flush(opened)

    async def _flush(self, opened: _Open) -> None:
        opened.unflushed = False  # what is written meanwhile sets it again
        if (scripted := opened.disk.scripted) is not None:
            await self._wait(opened.locks, scripted.flush)
        elif not opened.disk.is_durable():
            await self._wait(opened.locks, _flushed, opened.disk)

    flush = _refusing(errno.ENOSYS)  # nothing to do at close; the kernel does not ask again

    @_answered
    async def release(self, handle: int) -> None:
        self._texts.pop(handle, None)
        if opened := self._open.get(handle):
            try:
                await self._meet(opened, "close")
            finally:
                self._let_go(handle)

    async def _meet(self, opened: _Open, op: str) -> None:
        """Let opening or closing take as long as the scenario says, if there is one, or fail."""
        if (scripted := opened.disk.scripted) is not None:
            await self._wait(0, scripted.meet, op)

    def _let_go(self, handle: int) -> None:
        if opened := self._open.pop(handle, None):
            opened.disk.in_order = not opened.unflushed
            opened.disk.detach()

    def close_all(self) -> None:
        """Let go of everything that is open; for when the kernel asks no more."""
        while self._open:
            self._open.popitem()[1].disk.detach()

    # What others have changed.

    def changed(self, uuid: str) -> int | None:
        """The content of a disk is not what the kernel was told; returns the number to make the kernel forget about.

        With the writeback cache the kernel takes the size of a file it knows for its own affair and listens to nobody; so the file
        gets another number, under which whoever opens it finds it with its new size.
        """
        key = ("vdi", uuid)
        number, file = self.nodes.known(key), self.tree.file(key)
        if self.enable_writeback_cache and file is not None and file.size_bytes != self._told_sizes.get(uuid):
            self.nodes.renew(key)
        return number

    def statistics(self) -> dict[str, Any]:
        return {
            "open_files": len(self._open), "requests_total": self.requests_total, "waits_total": self.waits_total,
            "waiting": len(self._waits),
        }  # fmt: skip


def _fill(entry: pyfuse3.EntryAttributes, attributes: Attributes) -> None:
    entry.st_mode, entry.st_nlink = attributes.mode, attributes.links
    entry.st_size, entry.st_blocks, entry.st_blksize = attributes.size_bytes, attributes.blocks, BLOCK_BYTES
    entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = attributes.modified_ns


async def _flushed(disk: Disk) -> None:
    ended = trio.Event()
    errors: list[Exception] = []

    def done(error: Exception | None) -> None:
        if error is not None:
            errors.append(error)
        ended.set()

    disk.flush_soon(done)
    await ended.wait()
    if errors:
        raise errors[0]

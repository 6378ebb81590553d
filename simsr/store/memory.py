"""A file layer in memory that remembers every write and sync: the ground on which crashes are enumerated.

Fault model (what the disk below a store may do; `simsr.store.files` is held to it):

* Bytes written are seen by everybody at once, and stay when the process dies.
* A power cut keeps everything written before the last completed ``datasync`` of that file. Of what was written later,
  every 512-byte sector keeps, independently of all others, the effect of a prefix of the writes that touched it: the
  kernel writes pages back when it likes, and a disk tears between sectors, not inside one.
* Creating and removing files survives only from the next ``Directory.sync``, all or nothing for each file. A file
  whose creation survived has its full size (``create`` writes and syncs the content first), except that a cut in the
  middle of ``create`` leaves a shorter one.
* ``datasync`` may fail (`fail_sync`): then what was pending stays pending, and may be lost although the pages look clean.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator, Sequence

from simsr.errors import StoreLocked

__all__ = ["MemoryDirectory", "MemoryFile", "SECTOR_BYTES"]

SECTOR_BYTES = 512


class _Disk:
    """The content of one file: what is durable, and what was written since, in order."""

    def __init__(self, size_bytes: int) -> None:
        self.durable = bytearray(size_bytes)
        self.now = bytearray(size_bytes)
        self.pending: dict[int, list[bytes]] = {}  # sector -> its contents after each write since the last sync

    def write(self, data: bytes | memoryview, offset: int) -> None:
        end = offset + len(data)
        if end > len(self.now):
            grow = end - len(self.now)
            self.now.extend(bytes(grow))
            self.durable.extend(bytes(grow))
        self.now[offset:end] = data
        for sector in range(offset // SECTOR_BYTES, (end + SECTOR_BYTES - 1) // SECTOR_BYTES):
            first = sector * SECTOR_BYTES
            self.pending.setdefault(sector, []).append(bytes(self.now[first : first + SECTOR_BYTES]))

    def sync(self) -> None:
        for sector, versions in self.pending.items():
            first = sector * SECTOR_BYTES
            self.durable[first : first + len(versions[-1])] = versions[-1]
        self.pending.clear()

    def after_cut(self, rng: random.Random, style: str) -> _Disk:
        """A legal survivor: ``style`` is "none", "all" or "some" of the pending sector versions."""
        disk = _Disk(0)
        disk.durable = bytearray(self.durable)
        for sector, versions in sorted(self.pending.items()):
            kept = {"none": 0, "all": len(versions), "some": rng.randint(0, len(versions))}[style]
            if kept:
                first = sector * SECTOR_BYTES
                disk.durable[first : first + len(versions[kept - 1])] = versions[kept - 1]
        disk.now = bytearray(disk.durable)
        return disk


class MemoryFile:
    """`simsr.store.files.File` in memory. ``cold`` makes `read_cached` say that nothing is cached."""

    descriptor = None

    def __init__(self, owner: MemoryDirectory, name: str, disk: _Disk) -> None:
        self._owner, self._name, self._disk = owner, name, disk

    @property
    def size_bytes(self) -> int:
        return len(self._disk.now)

    def pwritev(self, buffers: Sequence, offset: int) -> None:
        data = b"".join(buffers)
        self._owner._step(f"write {self._name} {offset}+{len(data)}")
        self._disk.write(data, offset)

    def pread(self, view: memoryview, offset: int) -> None:
        data = self._disk.now[offset : offset + len(view)]
        if len(data) < len(view):
            raise OSError(errno.EIO, "read past the end of the file")
        view[:] = data

    def pread_disk(self, view: memoryview, offset: int) -> None:
        self.pread(view, offset)

    def read_cached(self, view: memoryview, offset: int) -> bool:
        if self._owner.cold:
            return False
        self.pread(view, offset)
        return True

    def in_memory(self) -> memoryview:
        return memoryview(self._disk.now).toreadonly()

    def will_need(self, offset: int, length: int) -> None:
        pass

    def area(self, offset: int, length: int) -> _MemoryArea:
        return _MemoryArea(self, offset, length)

    def datasync(self) -> None:
        self._owner._step(f"sync {self._name}")
        if self._owner.fail_sync:
            raise OSError(errno.EIO, "injected")
        self._disk.sync()

    def close(self) -> None:
        pass


class _MemoryArea:
    def __init__(self, file: MemoryFile, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length

    def write(self, position: int, data: bytes) -> None:
        assert position + len(data) <= self._length
        self._file.pwritev([data], self._offset + position)

    pwrite = write

    def close(self) -> None:
        pass


class MemoryDirectory:
    """`simsr.store.files.Directory` in memory.

    ``on_step`` is called with a description before every operation that changes something, so a test can count the
    kill points and stop at any of them (by raising). `after_kill` and `after_cut` give the directory that the next
    process finds.
    """

    path = "memory"

    def __init__(self, on_step: Callable[[str], None] | None = None) -> None:
        self._files: dict[str, _Disk] = {}
        self._durable_names: dict[str, _Disk] = {}
        self.on_step = on_step
        self.cold = False
        self.fail_sync = False
        self.room_bytes: int | None = None
        self._locked = False

    def _step(self, what: str) -> None:
        if self.on_step is not None:
            self.on_step(what)

    def lock(self) -> None:
        if self._locked:
            raise StoreLocked(path=self.path)
        self._locked = True

    def names(self) -> list[str]:
        return sorted(self._files)

    def create(self, name: str, size_bytes: int) -> MemoryFile:
        if self.room_bytes is not None:
            if size_bytes > self.room_bytes:
                raise OSError(errno.ENOSPC, "injected")
            self.room_bytes -= size_bytes
        disk = self._files[name] = _Disk(size_bytes // 2)
        self._step(f"create {name}")
        disk = self._files[name] = _Disk(size_bytes)
        return MemoryFile(self, name, disk)

    def open(self, name: str) -> MemoryFile:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return MemoryFile(self, name, self._files[name])

    def remove(self, name: str) -> None:
        self._step(f"remove {name}")
        del self._files[name]

    def sync(self) -> None:
        self._step("sync directory")
        self._durable_names = dict(self._files)

    def free_bytes(self) -> int:
        return 1 << 40 if self.room_bytes is None else self.room_bytes

    def close(self) -> None:
        self._locked = False

    # What the next process finds.

    def after_kill(self) -> MemoryDirectory:
        """The process died, the machine lives: everything written is there."""
        survivor = MemoryDirectory()
        for name, disk in self._files.items():
            survivor._files[name] = copy = _Disk(0)
            copy.durable, copy.now = bytearray(disk.durable), bytearray(disk.now)
            copy.pending = {sector: list(versions) for sector, versions in disk.pending.items()}
        survivor._durable_names = {name: survivor._files.get(name, disk) for name, disk in self._durable_names.items()}
        return survivor

    def after_cut(self, rng: random.Random, style: str = "some") -> MemoryDirectory:
        """The machine lost power: one legal survivor, chosen by ``rng``; "none" and "all" are the two extremes."""
        survivor = MemoryDirectory()
        for name in sorted(self._files.keys() | self._durable_names.keys()):
            old, new = self._durable_names.get(name), self._files.get(name)
            keep_new = {"none": False, "all": True, "some": rng.random() < 0.5}[style]
            disk = new if old is new or keep_new else old
            if disk is not None:
                survivor._files[name] = disk.after_cut(rng, style)
        survivor._durable_names = dict(survivor._files)
        return survivor

    def flip(self, name: str, offset: int, mask: int = 0xFF) -> None:
        """Damage one byte, durably."""
        disk = self._files[name]
        disk.now[offset] ^= mask
        disk.durable[offset] ^= mask

    def images(self) -> Iterator[tuple[str, bytes]]:
        for name, disk in sorted(self._files.items()):
            yield name, bytes(disk.now)

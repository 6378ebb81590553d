"""A FUSE server over disks of its own, for what no real disk does: ``python fuse_server.py DIR direct|writeback``.

There is one SR with the disks ``good``, ``hangs`` (what is read or written waits for ever, once `DIR.hang` exists) and ``fails``. Ends when its
standard input does; what goes wrong then is on standard error.
"""

from __future__ import annotations

import errno
import os
import sys
from functools import partial

import trio

MIB = 1 << 20
UUIDS = {name: f"00000000-0000-4000-8000-00000000000{n}" for n, name in enumerate(("good", "hangs", "fails"))}


class FakeFile:
    is_a_snapshot = read_only = False

    def __init__(self, name: str) -> None:
        self.name, self.uuid, self.size_bytes, self.modified_ns = name, UUIDS[name], MIB, 0
        self.data = bytearray(MIB)

    def describe(self) -> dict:
        return {
            "uuid": self.uuid, "sr": "sr", "physical_utilisation_bytes": 0, "snapshot_of": None, "snapshot_time": None,
            "created_time": "2026-01-01T00:00:00Z",
        }  # fmt: skip


class FakeDisk:
    scripted = None

    def __init__(self, file: FakeFile, hang_path: str) -> None:
        self._file, self._hang_path = file, hang_path

    @property
    def _stuck(self) -> bool:
        return self._file.name == "hangs" and os.path.exists(self._hang_path)

    def read(self, batch):
        if self._file.name == "fails":
            raise OSError(errno.EIO, "it fails")
        if self._file.name == "good":
            for offset, view in batch:
                view[:] = self._file.data[offset : offset + len(view)]
            return []
        return list(range(len(batch)))

    async def read_cold(self, batch):
        if self._stuck:
            await trio.sleep_forever()
        for offset, view in batch:
            view[:] = self._file.data[offset : offset + len(view)]
        return [None] * len(batch)

    def write(self, batch):
        if self._file.name == "fails":
            raise ValueError("a bug")
        if self._stuck:
            return 0
        for offset, length, view in batch:
            self._file.data[offset : offset + length] = view
        return len(batch)

    async def write_rest(self, batch, start):
        await trio.sleep_forever()

    def is_durable(self):
        return not self._stuck

    def flush_soon(self, done):
        if not self._stuck:
            done(None)

    def detach(self):
        pass


class FakeFolder:
    uuid, name = "sr", "sr"

    def __init__(self) -> None:
        self.vdis = {UUIDS[name]: FakeFile(name) for name in UUIDS}

    def describe(self) -> dict:
        return {"uuid": self.uuid}


class FakeSource:
    started_ns = 0

    def __init__(self, hang_path: str) -> None:
        self.folder, self._hang_path = FakeFolder(), hang_path

    def folders(self):
        return {"sr": self.folder}

    def find(self, uuid):
        return self.folder.vdis.get(uuid)

    def attach(self, uuid, client, writable, cached):
        return FakeDisk(self.folder.vdis[uuid], self._hang_path)

    async def resize(self, uuid, size_bytes):
        self.folder.vdis[uuid].size_bytes = size_bytes

    async def statvfs(self):
        return os.statvfs("/")

    def status(self):
        return {}

    def is_busy(self):
        return False


async def main(path: str, cache: str) -> None:
    from fs_layout.session import FuseMount  # needs pyfuse3, which what is above does not

    mount = FuseMount(FakeSource(path + ".hang"), path, writeback=cache == "writeback", shared=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(mount.run)
        print("ready", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            nursery.start_soon(partial(command, mount, line.strip()))
        await mount.unmount(lazy=True)


async def command(mount, line: str) -> None:
    """``changed NAME``: as after a revert."""
    word, name = line.split()
    assert word == "changed"
    await mount.changed([UUIDS[name]])
    print(f"told {name}", flush=True)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])

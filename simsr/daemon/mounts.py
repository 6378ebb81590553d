"""FUSE mounts of the daemon: what `fs_layout` needs of it, and the mount that is there.

pyfuse3 is imported when somebody wants to mount: it takes time, and it may be missing.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from simsr import __version__
from simsr.daemon.engine import Disk
from simsr.errors import BadRequest, MountFailed, NotFound, Unsupported
from simsr.sr.repository import Repository
from simsr.sr.vdi import FUSE, FUSE_CACHED, Vdi
from simsr.store.volume import Volume

if TYPE_CHECKING:
    from fs_layout.session import FuseMount
    from simsr.daemon.host import Host

__all__ = ["Mounts", "CACHES"]

CACHES = ("direct", "writeback")


class Mounts:
    """The mounts of one host; also the `fs_layout.source.Source` of them."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._changing = trio.Lock()
        self._mounts: dict[str, FuseMount] = {}
        self._nbd_requests = 0
        self.started_ns = time.time_ns()

    async def mount(self, path: str, cache: str = "direct", shared: bool = False) -> FuseMount:
        """Mount at ``path``; returns when it is served. Raises `MountFailed`, `Unsupported`, `BadRequest`."""
        if cache not in CACHES:
            raise BadRequest(what=f"cache mode {cache!r}", reason=f"it is none of {', '.join(CACHES)}")
        path = await self._checked(path)
        try:
            from fs_layout.session import FuseMount
        except ImportError as error:
            reason = f"pyfuse3 cannot be loaded ({error}); Debian's packages are python3-pyfuse3 and fuse3"
            raise Unsupported(operation="mount", reason=reason) from None
        async with self._changing:
            self._forget_ended()
            for other in self._mounts:
                raise MountFailed(path=path, reason=f"the VDIs are mounted at {other}; a daemon has one mount at a time")
            mount = FuseMount(self, path, writeback=cache == "writeback", shared=shared)
            await self._host._nursery.start(mount.run)
            self._mounts[path] = mount
            return mount

    async def unmount(self, path: str, lazy: bool = False) -> None:
        """Raises `MountBusy`, `MountFailed`, `NotFound` if we have nothing mounted there."""
        path = await self._checked(path)
        async with self._changing:
            self._forget_ended()
            if path not in self._mounts:
                raise NotFound(kind="mount", name=path)
            await self._mounts[path].unmount(lazy=lazy)
            self._forget_ended()

    async def stop(self) -> None:
        """Unmount everything, for the end of the daemon."""
        async with self._changing:
            self._forget_ended()
            for mount in self._mounts.values():
                await mount.unmount(lazy=True)

    def describe(self) -> list[dict[str, Any]]:
        self._forget_ended()
        return [mount.describe() for mount in self._mounts.values()]

    async def replaced(self, volumes: list[Volume]) -> None:
        """Volumes have other content, or another size, than before; returns when no mount shows what was before."""
        for volume in volumes:
            volume.modified_ns = time.time_ns()
        self._forget_ended()
        for mount in list(self._mounts.values()):
            await mount.changed([uuid for volume in volumes if (uuid := volume.meta.get("uuid"))])

    def _forget_ended(self) -> None:
        self._mounts = {path: mount for path, mount in self._mounts.items() if not mount.ended.is_set()}

    @staticmethod
    async def _checked(path: str) -> str:
        """``path`` as the kernel lists it. Raises `BadRequest`."""
        if not os.path.isabs(path):
            raise BadRequest(what=f"mount directory {path!r}", reason="it is no absolute path")
        if "\0" in path:
            raise BadRequest(what=f"mount directory {path!r}", reason="it has a NUL in it")
        return await trio.to_thread.run_sync(os.path.realpath, path, abandon_on_cancel=True)

    # What the mounts ask (fs_layout.source.Source).

    def folders(self) -> dict[str, Repository]:
        return {uuid: mounted.repository for uuid, mounted in self._host.mounted.items()}

    def find(self, uuid: str) -> Vdi | None:
        for mounted in self._host.mounted.values():
            if vdi := mounted.repository.vdis.get(uuid):
                return vdi
        return None

    def attach(self, uuid: str, client: str, writable: bool, cached: bool) -> Disk:
        mounted, vdi = self._host.find_vdi(uuid)
        key = object()
        mounted.repository.attach(vdi, key, client, writable, FUSE_CACHED if cached else FUSE)

        def on_detach() -> None:
            self._host.theatre.detach(disk)
            mounted.repository.detach(vdi, key, disk.in_order)

        on_write = partial(mounted.repository.written, vdi) if writable else None
        disk = Disk(mounted.engine, vdi.volume, on_detach, on_write=on_write)
        disk.client_kind = "fuse"
        self._host.theatre.attach(vdi, disk, client)
        return disk

    async def resize(self, uuid: str, size_bytes: int) -> None:
        mounted, vdi = self._host.find_vdi(uuid)
        mounted.repository.resize(vdi, size_bytes)
        # The kernel knows what it asks for, and to have it write its pages meanwhile would be a deadlock.
        mounted.repository.store.replaced.discard(vdi.volume.ident)
        await mounted.engine.flush()

    async def statvfs(self) -> os.statvfs_result:
        return await trio.to_thread.run_sync(os.statvfs, self._host.root, abandon_on_cancel=True)

    def status(self) -> dict[str, Any]:
        host = self._host
        return {
            "version": __version__, "pid": os.getpid(), "root": host.root, "mounts": self.describe(),
            "failed_srs": host.failed, "statistics": host.statistics(),
        }  # fmt: skip

    def is_busy(self) -> bool:
        requests, before = self._host.nbd.requests_total, self._nbd_requests
        self._nbd_requests = requests
        return requests != before

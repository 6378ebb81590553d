"""The host: all SRs of one root directory, and the NBD server and the FUSE mount in front of their VDIs.

    ROOT/lock              one simsrd for a root
    ROOT/control.sock      HTTP API (simsr.daemon.api)
    ROOT/nbd.sock          NBD, all VDIs by uuid or unique name
    ROOT/nbd/<uuid>.sock   NBD, one VDI whatever name the client asks for (tapdisk always asks for the same one)
    ROOT/sr/<uuid>/        the store of one SR
    ROOT/crash/<uuid>.log  what was written to one disk (simsr.daemon.exploring)

Every operation here that changes something returns when it is durable.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid as uuid_module
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any, TypeVar
from urllib.parse import quote

import trio

from nbd_export.server import NbdServer
from simsr.daemon import threads
from simsr.daemon.engine import Disk, Engine
from simsr.daemon.exploring import Exploring
from simsr.daemon.mounts import Mounts
from simsr.daemon.nbd_offer import NbdExports
from simsr.daemon.root import DiskRoot, Root
from simsr.daemon.replays import Replays
from simsr.daemon.theatre import Theatre
from simsr.errors import BadRequest, NoSpace, SimsrError, SrExists
from simsr.errors import StoreStopped, UnknownPersonality, VdiExists, VdiInUse, WhichSr
from simsr.personalities import find_personality
from simsr.sr.lookup import resolve
from simsr.sr.repository import Repository, check_text, check_uuid
from simsr.sr.space import check_limit, geometry_for
from simsr.sr.vdi import Vdi
from simsr.store.hot import HOT_MEMORY_BYTES, HotMemory
from simsr.store.node_table import MAP_MEMORY_BYTES, MapMemory
from simsr.store.store import Op, Store

__all__ = ["Host", "Mounted"]

log = logging.getLogger("simsr.host")

_Result = TypeVar("_Result")

TIPS_PERIOD_S = 60
"""How often tips are looked at that may have become too old."""

DETACH_TURNS, DETACH_TURN_S = 100, 0.005
"""How often, and how far apart, an operation that needs a VDI unused looks again for connections that are about to end: a client that has
just closed its socket has, as far as its user can tell, let go of the disk. Counted, because time also passes while this process is not run,
and nobody's end is noticed meanwhile."""


@dataclass
class Mounted:
    """An SR that is open, with the tasks that serve it."""

    repository: Repository
    engine: Engine
    scope: trio.CancelScope
    stopped: trio.Event  # its tasks have ended, so nothing is under way in the store


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _new_uuid() -> str:
    return str(uuid_module.uuid4())


class Host:
    """Everything one simsrd holds. Use: ``async with trio.open_nursery() as n: await n.start(host.run)``."""

    def __init__(
        self, root: str, nbd_socket: str | None = None, map_memory_bytes: int = MAP_MEMORY_BYTES, *,
        hot_memory_bytes: int = HOT_MEMORY_BYTES, files: Root | None = None,
        now: Callable[[], str] = _now, new_uuid: Callable[[], str] = _new_uuid, **nbd_options: Any,
    ) -> None:  # fmt: skip
        """``files``: what is at ``root``, if not a directory; ``now``, ``new_uuid``: whence times and uuids come; ``nbd_options``: those of
        `NbdServer`."""
        self.memory, self.hot_memory = MapMemory(map_memory_bytes), HotMemory(hot_memory_bytes)
        self.root = os.path.abspath(root)
        self._files, self._now, self._new_uuid = files or DiskRoot(self.root), now, new_uuid
        self.nbd_socket = nbd_socket or os.path.join(self.root, "nbd.sock")
        self.nbd_tcp: str | None = None  # HOST:PORT, if NBD is served on TCP, too
        self.mounted: dict[str, Mounted] = {}
        self.failed: dict[str, str] = {}  # path of an SR that cannot be opened -> why
        self.nbd_exports = NbdExports(self)
        self.nbd = NbdServer(self.nbd_exports, **nbd_options)
        self.mounts = Mounts(self)
        self.replays = Replays(self)
        self.theatre = Theatre(
            self.plain_disk, lambda vdi: self.mounted[vdi.sr].engine, self.replays.reach, self._files.report_file, self.all_vdis
        )
        self.exploring = Exploring(self)
        self.started = time.monotonic()
        self._listeners: dict[str, trio.CancelScope] = {}
        self._srs_lock = trio.Lock()
        self._nursery: trio.Nursery

    # Life.

    def prepare(self) -> None:
        """Make the directories, take the lock, sweep up what a crash left. Raises OSError, `StoreLocked`."""
        self._files.prepare()

    async def run(self, listeners: Iterable[socket.socket] = (), task_status=trio.TASK_STATUS_IGNORED) -> None:
        """Open all SRs and serve them until cancelled; then close them, with a checkpoint each."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self.theatre.run)
                for name in self._files.srs():
                    await self._mount_found(name)
                for listener in listeners or filter(None, [self._files.listen(self.nbd_socket)]):
                    nursery.start_soon(self.nbd.serve, listener)
                task_status.started()
                await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for mounted in self.mounted.values():
                    await self._close(mounted)
            self._files.release()

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    async def _mount_found(self, name: str) -> None:
        path = self._files.sr_path(name)
        try:
            store = await threads.run_sync(Store.open, self._files.open(name), self.memory)
        except (SimsrError, OSError) as error:
            log.error("SR not opened: %s. %s", error, getattr(error, "hint", ""))
            self.failed[path] = str(error)
            return
        try:
            find_personality(store.meta.get("personality", "sim"))
        except UnknownPersonality as error:  # a newer simsr made it
            log.error("SR %s not opened: %s. %s", path, error, error.hint)
            self.failed[path] = str(error)
            await threads.run_sync(store.close)
            return
        recovered = store.recovered
        if recovered["records_replayed"] or recovered["records_dropped"]:
            log.info(
                "%s: %d records replayed, %d of an unflushed tail dropped",
                path, recovered["records_replayed"], recovered["records_dropped"],
            )  # fmt: skip
        await self._mount(store)

    async def _mount(self, store: Store) -> Mounted:
        repository = Repository(store, self._now, self._new_uuid)
        store.observer = partial(self._committed, repository)
        mounted = Mounted(repository, Engine(store, self.mounts.replaced, self.hot_memory), trio.CancelScope(), trio.Event())
        mounted.engine.give_up = repository.keeper.give_up_oldest
        await self._nursery.start(self._serve_engine, mounted)
        self.mounted[repository.uuid] = mounted
        for vdi in repository.vdis.values():
            if not vdi.is_a_snapshot:
                self._listen(vdi)
        return mounted

    def _committed(self, repository: Repository, ops: list[Op]) -> None:
        self.theatre.committed(repository.uuid, ops)
        self.exploring.committed(repository.vdis, ops)

    @staticmethod
    async def _serve_engine(mounted: Mounted, task_status: trio.TaskStatus) -> None:
        try:
            with mounted.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(Host._expire_tips, mounted)
                    await mounted.engine.run(task_status)
        finally:
            mounted.stopped.set()

    @staticmethod
    async def _expire_tips(mounted: Mounted) -> None:
        while True:
            await trio.sleep(TIPS_PERIOD_S)
            try:
                if mounted.repository.keeper.expire():
                    mounted.engine.wake()
            except (NoSpace, StoreStopped) as error:
                log.warning("tips that are too old stay: %s", error)

    async def _close(self, mounted: Mounted) -> None:
        mounted.scope.cancel()
        await mounted.engine.settle()
        try:
            await threads.run_sync(mounted.repository.store.close)
        except SimsrError as error:
            log.error("%s", error)

    # Finding.

    def find_sr(self, reference: str | None) -> Mounted:
        """Return the SR that ``reference`` means; None means the only one there is."""
        repositories = [mounted.repository for mounted in self.mounted.values()]
        if reference is None:
            if len(repositories) == 1:
                return next(iter(self.mounted.values()))
            if not repositories:
                raise BadRequest(what="the request", reason="there is no SR yet; make one with 'simsr sr create NAME'")
            raise WhichSr(candidates=", ".join(r.name for r in repositories[:5]))
        return self.mounted[resolve(reference, "SR", repositories).uuid]

    def find_vdi(self, reference: str) -> tuple[Mounted, Vdi]:
        """Return the VDI that ``reference`` means, and its SR."""
        for mounted in self.mounted.values():
            if vdi := mounted.repository.catalogue.get(reference):
                return mounted, vdi
        tips = (tip for mounted in self.mounted.values() for tip in mounted.repository.tips.values())
        vdi = resolve(reference, "VDI", chain(self.all_vdis(), tips))
        return self.mounted[vdi.sr], vdi

    def listed(self, mounted: Mounted, tips: bool | None = None) -> Iterable[Vdi]:
        """What a listing of an SR shows; ``tips``: with tips, None: if the SR is set so."""
        repository = mounted.repository
        shows_tips = repository.expose_tips if tips is None else tips
        return chain(repository.vdis.values(), repository.tips.values() if shows_tips else ())

    def all_vdis(self) -> Iterable[Vdi]:
        for mounted in self.mounted.values():
            yield from mounted.repository.vdis.values()

    # SRs.

    async def create_sr(
        self, name: str, uuid: str | None, description: str, sm_config: dict[str, str], limit_bytes: int | None = None,
        personality: str = "sim",
    ) -> Mounted:  # fmt: skip
        """Make an SR that may take ``limit_bytes`` on the disk (None: what there is), like SRs of type ``personality``.

        Raises `BadSize`, `SrExists`, `BadRequest`, `UnknownPersonality`, `NoSpace`; nothing is left behind then.
        """
        uuid = check_uuid(uuid) if uuid else self._new_uuid()
        meta = {
            "uuid": uuid, "name": check_text("name", name), "description": check_text("description", description),
            "sm_config": dict(sm_config), "limit_bytes": None if limit_bytes is None else check_limit(limit_bytes),
            "personality": find_personality(personality).name,
        }  # fmt: skip
        if not name:
            raise BadRequest(what="the name of the SR", reason="it is empty")
        async with self._srs_lock:
            if uuid in self._files.srs():
                raise SrExists(name=uuid)
            if any(mounted.repository.name == name for mounted in self.mounted.values()):
                raise SrExists(name=name)
            store = await threads.run_sync(self._make_store, uuid, meta)
            return await self._mount(store)

    def _make_store(self, uuid: str, meta: dict) -> Store:
        try:
            directory = self._files.begin(uuid)
            geometry = geometry_for(meta["limit_bytes"])
            store = Store.create(directory, uuid_module.UUID(uuid).bytes, geometry, meta, self.memory)
            store.flush()
            self._files.finish(directory, uuid)
        except BaseException:
            self._files.give_up(uuid)
            raise
        return store

    async def delete_sr(self, reference: str) -> None:
        """Delete an empty SR and its files. Raises `SrNotEmpty`, `SrInUse`."""
        async with self._srs_lock:
            mounted = self.find_sr(reference)
            mounted.repository.check_deletable()
            del self.mounted[mounted.repository.uuid]
            mounted.scope.cancel()
            with trio.CancelScope(shield=True):
                await mounted.stopped.wait()
                await threads.run_sync(self._remove_store, mounted.repository.store)

    def _remove_store(self, store: Store) -> None:
        store.abandon()
        self._files.remove(store.directory, str(store.uuid))

    # VDIs.

    async def when_unused(self, vdi: Vdi, operation: Callable[[], _Result], *others: Vdi) -> _Result:
        """Do ``operation``; if clients are attached to ``vdi`` or one of ``others``, give those that are leaving a moment to do so."""
        for _ in range(DETACH_TURNS):
            try:
                return operation()
            except VdiInUse:
                if any(attachment.kind == "attach" for one in (vdi, *others) for attachment in one.attachments.values()):
                    raise
            await trio.sleep(DETACH_TURN_S)
        return operation()

    async def delete_vdi(self, mounted: Mounted, vdi: Vdi) -> None:
        await self.when_unused(vdi, lambda: mounted.repository.delete(vdi))
        self._stop_listening(vdi)
        mounted.engine.wake()
        await mounted.engine.flush()

    def refuse_known(self, uuid: str | None) -> None:
        """Raise `VdiExists` if any SR has a VDI of that uuid: it names a VDI, and its NBD export, across all SRs."""
        if uuid is not None and any(mounted.repository.catalogue.get(check_uuid(uuid)) for mounted in self.mounted.values()):
            raise VdiExists(uuid=check_uuid(uuid))

    def added(self, vdi: Vdi) -> None:
        """Serve a VDI that has just been made."""
        if not vdi.is_a_snapshot:
            self._listen(vdi)

    def attach_host(self, mounted: Mounted, vdi: Vdi, client: str, writable: bool, exclusive: bool) -> None:
        """Attach for a host (SMAPI); a snapshot gets its own socket then."""
        mounted.repository.attach(vdi, client, client, writable, "attach", exclusive)
        self._listen(vdi)

    def detach_host(self, mounted: Mounted, vdi: Vdi, client: str) -> None:
        mounted.repository.detach(vdi, client)
        if vdi.is_a_snapshot and not vdi.attachments:
            self._stop_listening(vdi)

    def socket_of(self, vdi: Vdi) -> str:
        return self._path("nbd", f"{vdi.uuid}.sock")

    def uri_of(self, vdi: Vdi) -> str:
        scheme = "nbds+unix" if self.nbd.tls_mode == "require" else "nbd+unix"
        return f"{scheme}:///{vdi.uuid}?socket={quote(self.nbd_socket)}"

    def _listen(self, vdi: Vdi) -> None:
        if vdi.uuid in self._listeners:
            return
        try:
            listener = self._files.listen(self.socket_of(vdi))
        except OSError as error:
            log.error("VDI %s gets no socket of its own: %s", vdi.uuid, error)
            return
        if listener is None:
            return
        scope = self._listeners[vdi.uuid] = trio.CancelScope()
        self._nursery.start_soon(self._serve_one, scope, vdi.uuid, listener)

    async def _serve_one(self, scope: trio.CancelScope, uuid: str, listener: socket.socket) -> None:
        with scope, listener:  # which may have been cancelled before this began
            await self.nbd.serve(listener, fixed_export=uuid)

    def _stop_listening(self, vdi: Vdi) -> None:
        if scope := self._listeners.pop(vdi.uuid, None):
            scope.cancel()
            self._files.unlisten(self.socket_of(vdi))

    def plain_disk(self, vdi: Vdi) -> Disk:
        """A disk for the daemon's own reading and writing, outside of any scenario and without counting as a client."""
        return Disk(self.mounted[vdi.sr].engine, vdi.volume, lambda: None)

    def statistics(self) -> dict[str, object]:
        return {
            "nbd": self.nbd.statistics(),
            "srs": {uuid: mounted.engine.statistics() for uuid, mounted in self.mounted.items()},
        }

"""One worker of the soak: a thread with a family of disks of its own, which it uses in every way there is, one random step after the
other. It knows what each of its VDIs must hold (`soak_model`), up to what was under way when the daemon died (`resolve`).

Steps are drawn from a generator seeded with the soak's seed, the worker and the round; what time changes is how far a round gets,
and where space runs out.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import numpy as np
from nbd_wire import FLUSH, FUA, TRIM, WRITE, ZEROES, WireClient
from soak_model import BLOCK, SECTOR, SECTORS, Content, Family, Layout, Vdi, fill, live_blocks

__all__ = ["Plan", "Worker"]

_GONE = (OSError, httpx.TransportError)
_ENOSPC, _ESHUTDOWN = 28, 108
_WEIGHTS = {
    "burst": 50, "look": 10, "snapshot": 10, "clone": 5, "revert": 7, "delete": 5, "resize": 2, "rewrite": 2, "create": 1,
}  # fmt: skip
_IN_FLIGHT = 32
_TRIM_BYTES = 1 << 30
_CROWDED_STEPS = 4  # counting what is in use takes some milliseconds


@dataclass(frozen=True)
class Plan:
    """What a worker works with. ``blocks``: of a disk in the beginning; it may double. ``share_blocks``: what its family may keep."""

    name: str
    layout: Layout
    blocks: int
    share_blocks: int
    vdis_max: int


class Daemon:
    """How a worker reaches the daemon; new for each round."""

    def __init__(self, control_socket: str, nbd_socket: str) -> None:
        self.nbd_socket = nbd_socket
        self.api = httpx.Client(transport=httpx.HTTPTransport(uds=control_socket), base_url="http://simsrd", timeout=120)

    def ask(self, method: str, path: str, body: dict | None = None) -> httpx.Response:
        return self.api.request(method, path, json=body)

    def connect(self, vdi: Vdi) -> WireClient:
        return WireClient.connect(self.nbd_socket, vdi.uuid)


class Refused(Exception):
    """The daemon had no space for an operation."""


class Worker(threading.Thread):
    """A round of a worker. `family` and `numbers` go from round to round, with the worker's `Plan`."""

    def __init__(
        self, plan: Plan, family: Family, daemon: Daemon, rng: random.Random, take: Callable[[int], int], counts: Counter,
        no_space: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(name=f"soak {plan.name}")
        self.plan, self.family, self.server, self.rng, self.take, self.counts = plan, family, daemon, rng, take, counts
        self.no_space = no_space
        self.stopping = threading.Event()  # the daemon is about to go: refusals mean nothing any more
        self.error: BaseException | None = None
        self.trace: list[str] = []
        self._undecided: Callable[[dict[str, dict]], None] | None = None  # what the step under way will have done

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.step()
        except _GONE:
            if not self.stopping.wait(5):  # the one who ends the daemon says so first
                self.error = AssertionError(f"{self.name}: the daemon went away by itself, after {self.trace[-3:]}")
        except BaseException as error:
            if not (self.stopping.is_set() and isinstance(error, Refused)):
                error.add_note(f"{self.name}, steps: {', '.join(self.trace[-12:])}")
                self.error = error
        finally:
            self.server.api.close()

    def step(self) -> None:
        name = "create"
        if self.family.disks:
            crowded = len(self.trace) % _CROWDED_STEPS == 0 and live_blocks(self.family) > self.plan.share_blocks
            name = "relieve" if crowded else self.rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        self.trace.append(name)
        try:
            getattr(self, name)()
        except Refused:
            self.counts["out of space"] += 1
            self.no_space()
            self.relieve()
        self.counts[name] += 1

    # The API.

    def new_uuid(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def change(self, method: str, path: str, body: dict, done: Callable[[], None], undone: Callable[[dict], None]) -> None:
        """Ask for a change. ``done`` notes it; ``undone`` finds out, from all VDIs that are there later, whether it happened."""
        self._undecided = undone
        response = self.server.ask(method, path, body or None)
        if not response.is_success:
            error = response.json()["error"]
            assert error["code"] == "NoSpace" or self.stopping.is_set(), f"{method} {path}: {error}"
            raise Refused
        done()
        self._undecided = None

    def resolve(self, there: dict[str, dict]) -> None:
        """The daemon has been started anew and these VDIs are there: which steps under way have been taken?"""
        if self._undecided is not None:
            self._undecided(there)
            self._undecided = None
        mine = set(self.family.vdis)
        assert mine <= set(there), f"{self.name}: gone are {mine - set(there)}, after {self.trace[-3:]}"

    def add(self, method: str, path: str, vdi: Vdi, **body: object) -> None:
        def added() -> None:
            self.family.vdis[vdi.uuid] = vdi

        def perhaps(there: dict[str, dict]) -> None:
            if vdi.uuid in there:
                added()

        self.change(method, path, {"uuid": vdi.uuid, **body}, added, perhaps)

    def create(self) -> None:
        if len(self.family.vdis) < self.plan.vdis_max:
            sectors = self.plan.blocks * SECTORS
            vdi = Vdi(self.new_uuid(), self.plan.layout, [Content(np.zeros(sectors, dtype=np.int64))])
            self.add("POST", "/v1/vdis", vdi, size_bytes=self.plan.layout.size_bytes(sectors), name=self.plan.name)

    def snapshot(self, disk: Vdi | None = None) -> None:
        if len(self.family.vdis) < self.plan.vdis_max:
            disk = disk or self.rng.choice(self.family.disks)
            vdi = Vdi(self.new_uuid(), self.plan.layout, [disk.content.copy()], disk.uuid)
            self.add("POST", f"/v1/vdis/{disk.uuid}/snapshot", vdi)

    def clone(self) -> None:
        if len(self.family.vdis) < self.plan.vdis_max:
            source = self.rng.choice(list(self.family.vdis.values()))
            vdi = Vdi(self.new_uuid(), self.plan.layout, [source.content.copy()])
            self.add("POST", f"/v1/vdis/{source.uuid}/clone", vdi)

    def revert(self) -> None:
        pairs = [(one, self.family.vdis[one.snapshot_of]) for one in self.family.snapshots if one.snapshot_of in self.family.vdis]
        if pairs:
            source, disk = self.rng.choice(pairs)
            self.replace("POST", f"/v1/vdis/{source.uuid}/revert", {}, disk, source.content.copy())

    def resize(self) -> None:
        disk = self.rng.choice(self.family.disks)
        sectors = disk.sectors + self.rng.randint(1, self.plan.blocks // 8) * SECTORS
        if sectors <= 2 * self.plan.blocks * SECTORS:
            body = {"size_bytes": self.plan.layout.size_bytes(sectors)}
            self.replace("POST", f"/v1/vdis/{disk.uuid}/resize", body, disk, disk.content.resized(sectors))

    def replace(self, method: str, path: str, body: dict, disk: Vdi, content: Content) -> None:
        old = disk.content

        def replaced() -> None:
            disk.candidates = [content]

        def perhaps(there: dict[str, dict]) -> None:
            disk.candidates = [old, content]

        self.change(method, path, body, replaced, perhaps)

    def delete(self) -> None:
        others = self.family.snapshots + (self.family.disks if len(self.family.disks) > 1 else [])
        if others:
            self.remove(self.rng.choice(others))

    def remove(self, vdi: Vdi) -> None:
        def removed() -> None:
            del self.family.vdis[vdi.uuid]

        def perhaps(there: dict[str, dict]) -> None:
            if vdi.uuid not in there:
                removed()

        self.change("DELETE", f"/v1/vdis/{vdi.uuid}", {}, removed, perhaps)

    def relieve(self) -> None:
        """Make room: delete the oldest snapshot, else the newest disk but one, else trim half of the last."""
        if self.family.snapshots:
            self.remove(self.family.snapshots[0])
        elif len(self.family.disks) > 1:
            self.remove(self.family.disks[-1])
        else:
            (disk,) = self.family.disks
            step = max(1, _TRIM_BYTES // (disk.layout.stride_blocks * BLOCK)) * SECTORS
            with self.server.connect(disk) as client:
                burst = _Burst(self, disk, client)
                for at in range(0, disk.sectors // 2, step):
                    burst.send(TRIM, at, min(disk.sectors, at + step))
                burst.finish()

    # NBD.

    def burst(self) -> None:
        """Many small requests on one disk, now and then a snapshot while they are on their way."""
        disk, rng = self.rng.choice(self.family.disks), self.rng
        hot = rng.random() < 0.5
        with self.server.connect(disk) as client:
            burst = _Burst(self, disk, client)
            for _ in range(rng.choice((1, 20, 100, 300))):
                command = rng.choices((WRITE, ZEROES, TRIM, FLUSH), (90, 3, 4, 3))[0]
                burst.send(command, *self.span(disk, command, hot))
            if rng.random() < 0.2:
                burst.snapshot()
            burst.finish()

    def span(self, disk: Vdi, command: int, hot: bool) -> tuple[int, int]:
        """A range of sectors: mostly one block, now and then more, or unaligned parts of some."""
        rng, blocks = self.rng, disk.sectors // SECTORS
        block = rng.randrange(blocks // 10 if hot else blocks)
        sparse_write = command == WRITE and disk.layout.stride_blocks > 1
        if rng.random() < 0.12 and command != TRIM:  # parts of blocks are not trimmed
            first = block * SECTORS + rng.randrange(SECTORS)
            room = (block + 1) * SECTORS if sparse_write else disk.sectors
            return first, min(room, first + rng.randint(1, 20))
        count = 1 if sparse_write else rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 4, 16))
        return block * SECTORS, min(blocks, block + count) * SECTORS

    def rewrite(self) -> None:
        """A large part of a disk in order, with large requests."""
        disk = self.rng.choice(self.family.disks)
        step = 64 * SECTORS if disk.layout.stride_blocks == 1 else SECTORS
        first = self.rng.randrange(disk.sectors // 2) // SECTORS * SECTORS
        with self.server.connect(disk) as client:
            burst = _Burst(self, disk, client)
            for at in range(first, first + disk.sectors // 3, step):
                burst.send(WRITE, at, min(disk.sectors, at + step))
            burst.finish()

    def look(self) -> None:
        """Read a part of some VDI and compare."""
        vdi = self.rng.choice(list(self.family.vdis.values()))
        first = self.rng.randrange(vdi.sectors)
        last = min(vdi.sectors, first + self.rng.choice((1, 8, 64, 2000)))
        with self.server.connect(vdi) as client:
            found = vdi.read(client, first, last)
            client.disconnect()
        wrong = vdi.content.wrong(first, found)
        assert not len(wrong), vdi.complain(vdi.content, wrong, found, first)

    def settle(self) -> int:
        """Read everything and compare; returns how many sectors."""
        sectors = 0
        for vdi in self.family.vdis.values():
            with self.server.connect(vdi) as client:
                size_bytes = self.server.ask("GET", f"/v1/vdis/{vdi.uuid}").json()["size_bytes"]
                vdi.settle(vdi.read(client, 0, vdi.layout.sectors(size_bytes)))
                client.disconnect()
            sectors += vdi.sectors
        return sectors


class _Burst:
    """Requests of one connection, none of which touches a sector that another on its way touches."""

    def __init__(self, worker: Worker, disk: Vdi, client: WireClient) -> None:
        self._worker, self._disk, self._client = worker, disk, client
        self._waiting: dict[int, tuple[int, np.ndarray]] = {}  # cookie -> (first sector, stamps)
        self._refused = False

    def send(self, command: int, first: int, last: int) -> None:
        disk, rng = self._disk, self._worker.rng
        for cookie, (begin, stamps) in list(self._waiting.items()):
            if command != FLUSH and begin < last and first < begin + len(stamps):
                self.take(cookie)
        while len(self._waiting) >= _IN_FLIGHT:
            self.take(next(iter(self._waiting)))
        if self._refused:
            raise Refused
        if command == FLUSH:
            self._waiting[self._client.send(FLUSH)] = 0, np.zeros(0, dtype=np.int64)
            return
        stamps = np.zeros(last - first, dtype=np.int64)
        payload = b""
        if command == WRITE:
            begin = self._worker.take(last - first)
            stamps = np.arange(begin, begin + last - first, dtype=np.int64)
            payload = fill(stamps)
        offset = disk.layout.offset(first)
        length = disk.layout.offset(last - 1) + SECTOR - offset
        doubt = first, stamps
        disk.content.doubt(*doubt)  # before it is sent: the daemon may die in the middle
        cookie = self._client.send(command, offset, length, payload, FUA if rng.random() < 0.03 else 0)
        self._waiting[cookie] = doubt

    def take(self, cookie: int) -> None:
        reply = self._client.reply(cookie)
        first, stamps = self._waiting.pop(cookie)
        if not reply.error:
            content = self._disk.content
            if len(stamps):
                content.write(first, stamps)
                content.doubts = [(begin, other) for begin, other in content.doubts if self.is_open(content, begin, other)]
                self._worker.counts["sectors written"] += len(stamps)
            return
        ends = self._worker.stopping.is_set() and reply.error == _ESHUTDOWN
        assert reply.error == _ENOSPC or ends, f"{self._disk.uuid}: error {reply.error} {reply.text}"
        self._refused = True

    @staticmethod
    def is_open(content: Content, begin: int, other: np.ndarray) -> bool:
        return bool((content.stamps[begin : begin + len(other)] != other).any())

    def snapshot(self) -> None:
        """Of this disk, while requests are on their way: whether their writes are in it, reading it will tell."""
        self._worker.snapshot(self._disk)

    def finish(self) -> None:
        while self._waiting:
            self.take(next(iter(self._waiting)))
        self._client.disconnect()
        if self._refused:
            raise Refused

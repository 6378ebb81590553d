"""One seed: a machine that lives several lives, with guests, an administrator and faults; after each life everything is read and judged.

A life ends with a power cut (a legal survivor of all files), a kill of the daemon, or a stop in order; also while the daemon is starting.
"""

from __future__ import annotations

import errno
import random
import uuid as uuid_module
from datetime import UTC, datetime, timedelta
from functools import partial

import trio
from nbd_wire import FLUSH, READ, WRITE
from sim_client import STUCK_S, Session, guest
from sim_control import Administrator, Op
from sim_faults import faults
from sim_machine import Failure, Journal, MemoryRoot, Turns
from sim_model import Content, Disk

from simsr.daemon import threads
from simsr.daemon.host import Host
from simsr.store.layout import Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.store import Store

__all__ = ["World"]

LIVES = 4
_START = datetime(2026, 1, 1, tzinfo=UTC)
_EXPECTED_ERRORS = frozenset({errno.EIO, errno.ENOSPC, errno.ESHUTDOWN, errno.ETIMEDOUT})


class World:
    """Everything that one seed decides. `run` is the main task of a trio run."""

    def __init__(self, seed: int, clock: trio.abc.Clock, lives: int = LIVES) -> None:
        self.seed, self._lives = seed, lives
        self.rng = random.Random(f"simulation {seed}")
        self._uuids = random.Random(f"uuids {seed}")
        self.journal = Journal(clock)
        self.note = self.journal.note
        self.turns = Turns(random.Random(f"threads {seed}"), self.note)
        self.root = MemoryRoot(self.turns.step)
        self.host: Host
        self.disks: dict[str, Disk] = {}
        self.locks: dict[str, trio.Lock] = {}
        self.ops: list[Op] = []  # operations of the administrator that have not been answered
        self.sessions: dict[Session, None] = {}
        self.changed: dict[str, int] = {}  # family -> when an operation on it ended last
        self.moment = self._values = 0
        self.horizon = self._flushed = 0  # everything answered before it is durable
        self._under_way: dict[int, None] = {}  # moments at which something began that has not ended
        self.is_down = False
        self.faulty, self.damaging = 0, 0  # scenarios in force
        self.faulty_until = self.damaged_until = -1
        self.is_broken = False  # the disk below the store fails
        self.is_limited = False
        self.requests = self.operations = self.sectors_read = self.crashes = 0
        self.simulated_s = 0.0

    # The model's clock.

    def tick(self) -> int:
        self.moment += 1
        return self.moment

    def begun(self, moment: int) -> None:
        self._under_way[moment] = None

    def ended(self, moment: int) -> None:
        self._under_way.pop(moment, None)

    @property
    def oldest(self) -> int:
        """Nobody asks about an earlier moment any more."""
        return min(next(iter(self._under_way), self.moment), self.horizon)

    def is_durable(self, moment: int) -> None:
        self.horizon = max(self.horizon, moment)

    async def if_up(self) -> None:
        """What comes out of a machine without power is nobody's business."""
        if self.is_down:
            await trio.sleep_forever()

    def new_value(self, sector: int) -> int:
        self._values += 1
        return self._values << 16 | sector

    def new_uuid(self) -> str:
        return str(uuid_module.UUID(int=self._uuids.getrandbits(128), version=4))

    @staticmethod
    def now() -> str:
        return (_START + timedelta(seconds=trio.current_time())).strftime("%Y-%m-%dT%H:%M:%SZ")

    # What is excused.

    def is_excused(self, disk: Disk, issue: int) -> bool:
        """Whether there was a reason that a request issued then fails, or loses its connection."""
        reverting = disk.reverting in ("error", "disconnect") or disk.excused >= issue
        return bool(self.faulty) or self.faulty_until >= issue or self.is_broken or reverting

    def may_fail(self, disk: Disk, issue: int, command: int, error: int) -> bool:
        if self.is_limited and error == errno.ENOSPC and command not in (READ, FLUSH):
            return True
        return error in _EXPECTED_ERRORS and self.is_excused(disk, issue)

    def may_be_refused(self, disk: Disk, issue: int) -> bool:
        changing = any(op.family == disk.family for op in self.ops) or self.changed.get(disk.family, -1) >= issue
        return self.is_excused(disk, issue) or disk.uuid not in self.disks or changing

    def is_damaged(self, issue: int) -> bool:
        """Whether data of that time need not be right."""
        return bool(self.damaging) or self.damaged_until >= issue

    # A seed.

    async def run(self) -> None:
        threads.hand_in(self.turns)
        rng = self.rng
        self.is_limited = rng.random() < 0.3
        self._make_sr(rng)
        self.map_memory = rng.choice((0, 4096, 1 << 20, 64 << 20))
        try:
            for life in range(self._lives):
                self.turns.slowness = rng.choice((0.05, 1, 1, 5))
                await self._live(life)
            await self._live(self._lives, is_last=True)
        finally:
            self.turns.close()
        self.simulated_s = trio.current_time()

    def _make_sr(self, rng: random.Random) -> None:
        geometry = rng.choice((Geometry(16, 2, 2), Geometry(32, 2, 3), Geometry(64, 2, 4)))
        segments = rng.choice((24, 40)) if self.is_limited else None
        uuid = self.new_uuid()
        limit = None if segments is None else (segments + 1) * geometry.segment_bytes * 100 // 99
        meta = {
            "uuid": uuid, "name": "sr", "description": "", "sm_config": {}, "limit_bytes": limit, "personality": "sim",
            "tips_max": rng.choice((0, 2, 8)),
        }  # fmt: skip
        directory = self.root.begin(uuid)
        store = Store.create(directory, uuid_module.UUID(uuid).bytes, geometry, meta)
        store.flush()
        store.close()
        self.root.finish(directory, uuid)
        self.sr = uuid
        self.note(f"seed {self.seed}: {geometry}, limit {limit}, tips {meta['tips_max']}")

    @property
    def directory(self) -> MemoryDirectory:
        return self.root.directories[self.sr]

    @property
    def mounted(self):
        return self.host.mounted[self.sr]

    # A life.

    async def _live(self, life: int, is_last: bool = False) -> None:
        rng = self.rng
        self.directory.cold = rng.random() < 0.4
        self.is_broken = False
        ending = rng.choice(("cut", "cut", "cut", "kill", "stop"))
        if is_last:
            ending, lasts_s = "stop", None
        elif rng.random() < 0.25:
            lasts_s = rng.random() * rng.choice((0.01, 0.3))
        else:
            lasts_s = rng.choice((0.5, 5, 40, 90)) * rng.random()
        self.note(f"life {life} begins: {'the last' if lasts_s is None else f'{lasts_s:.4f} s'}, then {ending}; cold {self.directory.cold}")
        self.is_down = self._is_examined = False
        survivors: list[MemoryRoot] = []
        with trio.CancelScope() as everything:
            self._end = partial(self._crash, ending, survivors, everything)
            async with trio.open_nursery() as nursery:
                if lasts_s is not None:
                    nursery.start_soon(self._ends_after, lasts_s)
                self.host = Host(
                    "/simulated", map_memory_bytes=self.map_memory, files=self.root, now=self.now, new_uuid=self.new_uuid
                )
                self.host.prepare()
                await nursery.start(partial(self.host.run, ()))
                if self.host.failed:
                    raise Failure(f"the SR cannot be opened: {self.host.failed}")
                await self._examine()
                if is_last:
                    self._crash("stop", survivors, everything)
                await self._load(rng)
        if ending == "stop":
            flushed = not self.is_broken  # a store that has stopped does not flush when it ends
            survivors.append(self.root.survivor(partial(self._survive, "cut" if flushed and rng.random() < 0.5 else "kill")))
        self.root = survivors[0]

    async def _load(self, rng: random.Random) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(rng.choice((1, 3, 6))):
                nursery.start_soon(guest, self, random.Random(rng.random()), f"guest {number}")
            for number in range(rng.choice((1, 1, 2))):
                nursery.start_soon(Administrator(self, random.Random(rng.random()), f"admin {number}").run)
            if rng.random() < 0.4:
                nursery.start_soon(faults, self, random.Random(rng.random()))
            if rng.random() < 0.1:
                nursery.start_soon(self._break_disk, random.Random(rng.random()))

    async def _break_disk(self, rng: random.Random) -> None:
        await trio.sleep(rng.random() * 20)
        self.note("the disk fails")
        self.is_broken = self.directory.fail_sync = True
        await trio.sleep(rng.random() * 10)
        self._end()

    async def _ends_after(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self._end()

    def _survive(self, ending: str, directory: MemoryDirectory) -> MemoryDirectory:
        if ending == "kill":
            return directory.after_kill()
        return directory.after_cut(self.rng, self.rng.choice(("some", "some", "some", "none", "all")))

    def _crash(self, ending: str, survivors: list[MemoryRoot], everything: trio.CancelScope) -> None:
        if self.is_down:
            return
        self.is_down = True
        self.crashes += ending != "stop"
        now = self.tick()
        self.note(f"{ending} at {now}; durable up to {self.horizon}; {len(self.ops)} operations under way")
        self._look_for_stuck()
        if self._is_examined:
            self._flushed = self.horizon
            if ending != "cut":
                self.horizon = max(self.horizon, now)
        elif ending == "cut":  # it may take what a kill before has left and recovery has not flushed yet
            self.horizon = self._flushed
        if ending != "stop":
            survivors.append(self.root.survivor(partial(self._survive, ending)))
        self.sessions.clear()
        self._under_way.clear()
        self.faulty = self.damaging = 0
        self.faulty_until = self.damaged_until = -1
        everything.cancel()

    def _look_for_stuck(self) -> None:
        late = trio.current_time() - STUCK_S
        for session in self.sessions:
            for asked in session.asked.values():
                if asked.at_s < late and not self.is_excused(session.disk, asked.issue):
                    raise Failure(f"{session.name}: a request issued {trio.current_time() - asked.at_s:.0f} s ago was never answered: {asked}")
        for op in self.ops:
            if op.at_s < late and not self.faulty and not self.is_broken:
                raise Failure(f"{op} was never answered")

    def stopped(self) -> None:
        """The store has stopped: somebody will see to it soon."""
        if not self.is_broken:
            raise Failure("the store has stopped without a reason")

    # Judgement.

    async def _examine(self) -> None:
        """Read everything, decide what became of what was under way, and hold all of it against the model."""
        found: dict[str, list[int | None]] = {}
        vdis = self._vdis()
        for uuid in sorted(vdis):
            self.sessions.clear()
            session = Session(self, self.disks.get(uuid) or Disk(uuid, Content([]), ""), random.Random(self.seed), "examiner")
            await session.open()
            if self.disks.get(uuid) is None:
                session.sectors = vdis[uuid].size_bytes // 512
            found[uuid] = await session.read_all()
            await session.close(in_order=True)
        repository = self.mounted.repository
        repository.store._check()
        self._resolve()
        self._check_list()
        self._judge(found)
        self._is_examined = True
        self.note(f"examined: {len(found)} VDIs")

    def _vdis(self) -> dict:
        repository = self.mounted.repository
        return {**repository.vdis, **repository.tips}

    def _resolve(self) -> None:
        """Find out which operations happened that were never answered."""
        for op in self.ops:
            happened = op.happened()
            self.note(f"{op}, issued {op.issue}: {'happened' if happened else 'did not happen'}")
            if happened:
                op.apply(op.issue, None)
                self.horizon = max(self.horizon, op.issue)
        self.ops.clear()

    def _check_list(self) -> None:
        """What is there is what must be; tips may go by themselves."""
        there = self.mounted.repository
        there._check()
        for disk in there.vdis.values():
            if disk.parent is not None and disk.parent not in there.store.volumes:
                raise Failure(f"{disk.uuid} descends from volume {disk.parent}, which is not there")
        wanted = {uuid for uuid, disk in self.disks.items() if not disk.is_tip}
        if wanted != set(there.vdis):
            gone, new = sorted(wanted - set(there.vdis)), sorted(set(there.vdis) - wanted)
            raise Failure(f"VDIs that are gone: {gone}; that nobody made, or that were deleted: {new}")
        for uuid in [uuid for uuid, disk in self.disks.items() if disk.is_tip and uuid not in there.tips]:
            del self.disks[uuid]
        if strange := set(there.tips) - set(self.disks):
            raise Failure(f"tips of nothing: {sorted(strange)}")
        for uuid, vdi in self._vdis().items():
            disk = self.disks[uuid]
            if vdi.size_bytes != disk.sectors * 512:
                raise Failure(f"{uuid} has {vdi.size_bytes} bytes, not {disk.sectors * 512}")

    def _judge(self, found: dict[str, list[int | None]]) -> None:
        read = [(self.disks[uuid], values) for uuid, values in sorted(found.items()) if uuid in self.disks]
        for disk, values in read:
            if wrong := disk.content.wrong(values, self.horizon + 1):
                raise Failure(f"after the start {disk.uuid}{' (a node)' if disk.of else ''}, horizon {self.horizon}: {wrong}")
        evident = max([self.horizon, *(d.content.newest(values, self.horizon + 1) for d, values in read if d.of is None)])
        for disk, values in read:
            if wrong := disk.content.wrong(values, evident):
                raise Failure(f"not a prefix: {disk.uuid} against what was there at {evident} (durable: {self.horizon}): {wrong}")
        now = self.horizon = self.tick()
        for disk, values in read:
            disk.content = Content.of(values, now)
            disk.reverting, disk.excused, disk.unsure, disk.coming = None, -1, -1, None
            self.sectors_read += len(values)

    # Helpers for whoever acts.

    def lock_of(self, family: str) -> trio.Lock:
        return self.locks.setdefault(family, trio.Lock())

    def add(self, disk: Disk) -> Disk:
        self.disks[disk.uuid] = disk
        return disk

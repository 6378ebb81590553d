"""One seed: a machine that lives several lives, with guests, an administrator and faults; after each life everything is read and judged.

A life ends with a power cut (a legal survivor of all files), a kill of the daemon, or a stop in order; also while the daemon is starting. A quarter of
them end at once. The others go through phases: in a *rush* everybody is busy, for seconds; in the *office* the same people do the same with minutes
between; in the *night* backups run; *idle*, for up to hours, only the daemon's own timers and what a scenario has planned go on.
"""

from __future__ import annotations

import errno
import random
import uuid as uuid_module
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import trio
from nbd_wire import FLUSH, READ
from sim_admin import Administrator
from sim_api import call
from sim_client import STUCK_S, Session
from sim_control import Op
from sim_faults import faults
from sim_fuse import Mount
from sim_guest import guest
from sim_judge import Judge
from sim_machine import Failure, Journal, MemoryRoot, Turns
from sim_model import Disk

from simsr.daemon import threads
from simsr.daemon.host import Host, Mounted
from simsr.store.layout import Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.store import Store

__all__ = ["World"]

LIVES = 4
_START = datetime(2026, 1, 1, tzinfo=UTC)
_EXPECTED_ERRORS = frozenset({errno.EIO, errno.ENOSPC, errno.ESHUTDOWN, errno.ETIMEDOUT})
_TEMPO = {"rush": 1.0, "office": 150.0, "night": 60.0, "idle": 1e7}
_SHORT_S = (0.5, 5, 40, 90)
_LONG_S = {"office": (600, 7200), "night": (600, 3600), "idle": (120, 600, 14400)}


class _Died(BaseException):
    """The daemon has been killed at this very place."""


@dataclass
class Sr:
    """What the simulation knows of one SR. ``horizon``: everything answered before it is durable."""

    uuid: str
    is_limited: bool
    tips_max: int
    tips_hours: int
    horizon: int = 0
    flushed: int = 0
    is_broken: bool = False  # the disk below the store fails


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
        self.judge = Judge(self)
        self.srs: dict[str, Sr] = {}
        self.disks: dict[str, Disk] = {}
        self.born_s: dict[str, float] = {}  # of every node there ever was
        self.backups: dict[str, tuple[Disk, list[int | None]]] = {}
        self._locks: dict[str, trio.Lock] = {}
        self.ops: list[Op] = []  # operations of the administrator that have not been answered
        self.sessions: dict[Session, None] = {}
        self.changed: dict[str, int] = {}  # family -> when an operation on it ended last
        self.moment = self._values = 0
        self._under_way: dict[int, None] = {}  # moments at which something began that has not ended
        self.is_down = self._is_examined = False
        self.faulty, self.damaging = 0, 0  # scenarios in force
        self.faulty_until = self.damaged_until = -1
        self._volatile_from: int | None = None  # since when `is_volatile`
        self._is_cut = False
        self._tempo, self._phase_ended = 1.0, trio.Event()
        self.life_began_s = self.busy_s = self.simulated_s = 0.0
        self.requests = self.operations = self.sectors_read = self.crashes = self.scenarios = self.errors = self.disconnects = self.compared = 0

    # The model's clock.

    def tick(self) -> int:
        self.moment += 1
        return self.moment

    def begun(self, moment: int) -> None:
        self.turns.asked()
        self._under_way[moment] = None

    def ended(self, moment: int) -> None:
        self._under_way.pop(moment, None)

    def oldest(self, sr: str) -> int:
        """Nobody asks about an earlier moment any more."""
        return min(next(iter(self._under_way), self.moment), self.srs[sr].horizon)

    def is_durable(self, sr: str, moment: int) -> None:
        self.srs[sr].horizon = max(self.srs[sr].horizon, moment)

    async def if_up(self) -> None:
        """What comes out of a machine without power is nobody's business."""
        if self.is_down:
            await trio.sleep_forever()

    @property
    def is_volatile(self) -> bool:
        """Whether a scenario is in force that may cut the power of disks."""
        return self._volatile_from is not None

    async def think(self, seconds: float) -> None:
        """Do nothing for a while, which is longer or shorter as the times are; everybody is busy while the power of disks may fail."""
        tempo = 1.0 if self.is_volatile else self._tempo
        with trio.move_on_after(seconds * tempo):
            await (self._phase_ended.wait() if tempo > 1 else trio.sleep_forever())

    def _wake(self) -> None:
        """Nobody goes on thinking as long as it was meant."""
        ended, self._phase_ended = self._phase_ended, trio.Event()
        ended.set()

    def new_value(self, sector: int) -> int:
        self._values += 1
        return self._values << 16 | sector

    def new_uuid(self) -> str:
        return str(uuid_module.UUID(int=self._uuids.getrandbits(128), version=4))

    @staticmethod
    def now() -> str:
        return (_START + timedelta(seconds=trio.current_time())).strftime("%Y-%m-%dT%H:%M:%SZ")

    # What is excused.

    def is_faulty(self, issue: int) -> bool:
        """Whether a scenario was in force at some time since."""
        return bool(self.faulty) or self.faulty_until >= issue

    def is_excused(self, disk: Disk, issue: int) -> bool:
        """Whether there was a reason that a request issued then fails, or loses its connection."""
        reverting = disk.reverting in ("error", "disconnect") or disk.excused >= issue
        return self.is_faulty(issue) or self.srs[disk.sr].is_broken or reverting

    def may_fail(self, disk: Disk, issue: int, command: int, error: int) -> bool:
        if self.srs[disk.sr].is_limited and error == errno.ENOSPC and command not in (READ, FLUSH):
            return True
        return error in _EXPECTED_ERRORS and self.is_excused(disk, issue)

    def may_be_refused(self, disk: Disk, issue: int) -> bool:
        changing = any(disk.family in op.families for op in self.ops) or self.changed.get(disk.family, -1) >= issue
        return self.is_excused(disk, issue) or disk.uuid not in self.disks or changing

    def is_damaged(self, issue: int) -> bool:
        """Whether data of that time need not be right."""
        return bool(self.damaging) or self.damaged_until >= issue

    # Scenarios.

    def scenario_begins(self, damages: bool, cuts: bool) -> int:
        began = self.tick()
        self.scenarios += 1
        self.faulty += 1
        self.damaging += damages
        if cuts:
            self._volatile_from, self._is_cut = began, False
            self._wake()  # a cut behind which nobody has written says nothing
            for disk in self.disks.values():
                disk.content.lose_from(began)
        return began

    def power_fails(self) -> None:
        self.note("the power of disks fails")
        self._is_cut = True
        for disk in self.disks.values():
            disk.content.is_cut = True

    def scenario_ends(self, damages: bool, cuts: bool, began: int) -> None:
        now = self.tick()
        self.faulty -= 1
        self.faulty_until = now
        self.damage_ends(damages)
        if cuts:
            self._volatile_from = None
            for disk in self.disks.values():
                disk.content.lose_no_more(began, now)

    def damage_ends(self, damages: bool) -> None:
        """From now on all data must be right again."""
        self.damaging -= damages
        if damages:
            self.damaged_until = self.tick()

    # A seed.

    async def run(self) -> None:
        threads.hand_in(self.turns)
        rng = self.rng
        for number in range(rng.choice((1, 1, 2))):
            self._make_sr(rng, number)
        self.crowd = 10 * len(self.srs)
        self.map_memory = rng.choice((0, 4096, 1 << 20, 64 << 20))
        try:
            for life in range(self._lives):
                self.turns.slowness = rng.choice((0.05, 1, 1, 5))
                await self._live(life)
            await self._live(self._lives, is_last=True)
        finally:
            self.turns.close()
        self.simulated_s = trio.current_time()

    def _make_sr(self, rng: random.Random, number: int) -> None:
        sr = Sr(self.new_uuid(), rng.random() < 0.3, rng.choice((0, 2, 8)), rng.choice((1, 24)))
        geometry = rng.choice((Geometry(16, 2, 2), Geometry(32, 2, 3), Geometry(64, 2, 4)))
        limit = (rng.choice((24, 40)) + 1) * geometry.segment_bytes * 100 // 99 if sr.is_limited else None
        meta = {
            "uuid": sr.uuid, "name": f"sr {number}", "description": "", "sm_config": {}, "limit_bytes": limit, "personality": "sim",
            "tips_max": sr.tips_max, "tips_hours": sr.tips_hours,
        }  # fmt: skip
        directory = self.root.begin(sr.uuid)
        store = Store.create(directory, uuid_module.UUID(sr.uuid).bytes, geometry, meta)
        store.flush()
        store.close()
        self.root.finish(directory, sr.uuid)
        self.srs[sr.uuid] = sr
        self.note(f"seed {self.seed}: SR {sr.uuid[:8]}, {geometry}, limit {limit}, tips {sr.tips_max} for {sr.tips_hours} h")

    def mounted(self, sr: str) -> Mounted:
        return self.host.mounted[sr]

    # A life.

    async def _live(self, life: int, is_last: bool = False) -> None:
        rng = self.rng
        for uuid in self.srs:
            self.root.directories[uuid].cold = rng.random() < 0.4
            self.srs[uuid].is_broken = False
        ending = rng.choice(("cut", "cut", "cut", "kill", "stop"))
        plan = self._plan(rng)
        if is_last:
            ending, plan = "stop", []
        self.note(f"life {life} begins: {', '.join(f'{name} {lasts_s:.4f} s' for name, lasts_s in plan) or 'the last'}; then {ending}")
        self.is_down = self._is_examined = False
        self.life_began_s = trio.current_time()
        survivors: list[MemoryRoot] = []
        with trio.CancelScope() as everything:
            self._end = partial(self._crash, ending, survivors, everything)
            self._is_killed = partial(self._crash, "kill", survivors, everything)
            try:
                await self._run_daemon(rng, plan)
            except* _Died:
                pass
        if not survivors:
            flushed = not any(sr.is_broken for sr in self.srs.values())  # a store that has stopped does not flush when it ends
            way = "cut" if flushed and rng.random() < 0.5 else "kill"
            survivors.append(self.root.survivor(partial(self._survive, way)))
            for sr in self.srs.values():
                if way == "cut" and not self._is_examined:  # an SR that had not been opened again was not flushed when the daemon stopped
                    sr.horizon = sr.flushed
        self.root = survivors[0]

    @staticmethod
    def _plan(rng: random.Random) -> list[tuple[str, float]]:
        """The phases of a life."""
        if rng.random() < 0.25:
            return [("rush", rng.random() * rng.choice((0.01, 0.3)))]
        plan = [("rush", rng.choice(_SHORT_S) * rng.random())]
        while rng.random() < 0.45:
            name = rng.choice(("rush", "office", "night", "idle"))
            plan.append((name, rng.choice(_LONG_S.get(name, _SHORT_S)) * rng.random()))
        return plan

    async def _run_daemon(self, rng: random.Random, plan: list[tuple[str, float]]) -> None:
        async with trio.open_nursery() as nursery:
            if plan:
                nursery.start_soon(self._go_through, plan)
            self.host = Host("/simulated", map_memory_bytes=self.map_memory, files=self.root, now=self.now, new_uuid=self.new_uuid)
            self.host.theatre.die = self._die
            self.host.prepare()
            await nursery.start(partial(self.host.run, ()))
            if self.host.failed:
                raise Failure(f"the SR cannot be opened: {self.host.failed}")
            self.files = Mount(self.host)
            await self.judge.examine()
            self._is_examined = True
            if not plan:
                self._end()
            await self._load(rng)

    async def _go_through(self, plan: list[tuple[str, float]]) -> None:
        for name, lasts_s in plan:
            self.note(f"a phase begins: {name}, {lasts_s:.4f} s")
            self._tempo = _TEMPO[name]
            self._wake()
            await trio.sleep(lasts_s)
        self._end()

    async def _load(self, rng: random.Random) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(rng.choice((1, 3, 6))):
                nursery.start_soon(guest, self, random.Random(rng.random()), f"guest {number}")
            for number in range(rng.choice((1, 1, 2))):
                nursery.start_soon(Administrator(self, random.Random(rng.random()), f"admin {number}").run)
            nursery.start_soon(Administrator(self, random.Random(rng.random()), "backup").back_up, rng.choice((5, 30)))
            if rng.random() < 0.4:
                nursery.start_soon(faults, self, random.Random(rng.random()))
            if rng.random() < 0.1:
                nursery.start_soon(self._break_disk, random.Random(rng.random()))

    async def _break_disk(self, rng: random.Random) -> None:
        await self.think(rng.random() * 20)
        sr = rng.choice(list(self.srs.values()))
        self.note(f"the disk below {sr.uuid[:8]} fails")
        sr.is_broken = self.root.directories[sr.uuid].fail_sync = True
        await trio.sleep(rng.random() * 10)
        self._end()

    def _survive(self, ending: str, directory: MemoryDirectory) -> MemoryDirectory:
        if ending == "kill":
            return directory.after_kill()
        return directory.after_cut(self.rng, self.rng.choice(("some", "some", "some", "none", "all")))

    def _die(self) -> None:
        """A scenario kills the daemon at this step."""
        self._is_killed()
        raise _Died

    def _crash(self, ending: str, survivors: list[MemoryRoot], everything: trio.CancelScope) -> None:
        if self.is_down:
            return
        self.is_down = True
        self.crashes += ending != "stop"
        now = self.tick()
        self.note(f"{ending} at {now}; durable up to {[sr.horizon for sr in self.srs.values()]}; {len(self.ops)} operations under way")
        self._look_for_stuck()
        for sr in self.srs.values():
            if self._is_examined:
                sr.flushed = sr.horizon
                if ending != "cut":
                    sr.horizon = max(sr.horizon, now)
            elif ending == "cut":  # it may take what a kill before has left and recovery has not flushed yet
                sr.horizon = sr.flushed
        if ending != "stop":
            survivors.append(self.root.survivor(partial(self._survive, ending)))
        self.sessions.clear()
        self._under_way.clear()
        self.faulty = self.damaging = 0
        self.faulty_until = self.damaged_until = -1
        self._volatile_from = None
        everything.cancel()

    def _look_for_stuck(self) -> None:
        late = trio.current_time() - STUCK_S
        for session in self.sessions:
            for asked in session.asked.values():
                if asked.at_s < late and not session.has_answers and not self.is_excused(session.disk, asked.issue):
                    raise Failure(f"{session.name}: a request issued {trio.current_time() - asked.at_s:.0f} s ago was never answered: {asked}")
        for op in self.ops:
            if op.at_s < late and not self.faulty and not self.srs[op.sr].is_broken:
                raise Failure(f"{op} was never answered")

    def stopped(self, sr: str) -> None:
        """The store has stopped: somebody will see to it soon."""
        if not self.srs[sr].is_broken:
            raise Failure("the store has stopped without a reason")

    # Helpers for whoever acts.

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The HTTP API. Raises `Refused`. Never returns if the daemon dies meanwhile."""
        try:
            return await call(self.host, method, path, body)
        except _Died:
            await trio.sleep_forever()
        finally:
            if self.is_down:
                await trio.sleep_forever()

    @asynccontextmanager
    async def locked(self, *families: str) -> AsyncIterator[None]:
        """Nobody else of the administrators does anything to disks of these families."""
        async with AsyncExitStack() as stack:
            for family in sorted(set(families)):
                await stack.enter_async_context(self._locks.setdefault(family, trio.Lock()))
            yield

    def add(self, disk: Disk) -> Disk:
        self.born_s.setdefault(disk.uuid, trio.current_time())  # who redoes what made a tip gets it back as old as it was
        if self._volatile_from is not None:
            disk.content.lose_from(self._volatile_from)
            disk.content.is_cut = self._is_cut
        self.disks[disk.uuid] = disk
        return disk

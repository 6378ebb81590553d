"""One attached disk under a scenario: asks the rules about each request and carries the plan out (`scenarios.request`).

The faces (NBD, FUSE) call `read`, `write` and `flush` instead of the disk's own methods while the disk is
scripted, and `meet` before others; each may wait as long as the plan says, and raises an OSError to answer with, or `Dropped`.

A delay counts from when the request came until its answer is there, and the disk's own time is part of it: the request is carried out
before it is due, as long as the alarm has learned that it takes, and its answer is held back and sent at its time by the alarm itself. Orders (a
hang, a power cut) reach it there, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from nbd_export.disk import Disk, Dropped, Reply
from scenarios.crash_states import SECTOR_BYTES
from scenarios.disk import DiskRules
from scenarios.recorder import Meter
from scenarios.request import Effect, Hang, Plan, Request
from scenarios.write_cache import WriteCache, WriteLog
from simsr.daemon.alarm import current_ns
from simsr.daemon.direct import answer, flush, read, write

if TYPE_CHECKING:
    from simsr.daemon.scenario_run import ScenarioRun

__all__ = ["ScriptedDisk", "UnderWay", "Measured"]


class UnderWay:
    """A request that sleeps or is parked, so that orders can reach it. ``parked_by``: the rule, or None while it sleeps. ``wake_ns``: when it is
    to be carried out, ``send_ns``: when its answer is to be sent; 0: at once."""

    __slots__ = ("vdi", "path", "plan", "event", "wake_ns", "send_ns", "parked_by", "error", "hang", "dropped")

    def __init__(self, vdi: str, path: str, plan: Plan) -> None:
        self.vdi, self.path, self.plan = vdi, path, plan
        self.event = trio.Event()
        self.wake_ns = self.send_ns = 0
        self.parked_by: str | None = None
        self.error = 0
        self.hang: str | None = None  # the rule it is to be parked by although it was only sleeping
        self.dropped = False  # the power went


class Measured:
    """``with`` it a request is measured, however it ends; from ``came_ns`` on if that is given."""

    __slots__ = ("_meter", "_op", "_length", "_began_ns")

    def __init__(self, meter: Meter, op: str, length: int = 0, came_ns: int | None = None) -> None:
        self._meter, self._op, self._length, self._began_ns = meter, op, length, came_ns

    def __enter__(self) -> None:
        now = current_ns()
        if self._began_ns is None:
            self._began_ns = now
        self._meter.begin(self._op, now)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        meter, op, now = self._meter, self._op, current_ns()
        if kind is None:
            meter.end(op, self._began_ns, now, self._length, False)
        elif isinstance(error, Dropped):
            meter.end(op, self._began_ns, now, self._length, error.error is not None, True)
        elif isinstance(error, Exception):
            meter.end(op, self._began_ns, now, self._length, True)
        else:
            meter.abandon(op, now)


class ScriptedDisk:
    """``disk`` is the attachment whose requests these are (None: only `until_due` is used); ``rules`` and ``cache`` belong to the VDI,
    shared by all attachments."""

    def __init__(self, run: ScenarioRun, vdi: str, disk: Disk | None, rules: DiskRules, cache: WriteCache, lock: trio.Lock) -> None:
        self._run, self._vdi, self._disk, self._rules, self._cache, self._lock = run, vdi, disk, rules, cache, lock
        self._meter = run.recorder.meter(vdi)

    @property
    def client(self) -> str:
        """The kind of client, as rules name it (`scenarios.clients`)."""
        return self._disk.client_kind if self._disk is not None else ""

    # What faces call.

    async def read(self, offset: int, length: int, reply: Reply | None = None) -> bytearray:
        """Read under the rules. Raises OSError, `Dropped`, what the disk raises."""
        came_ns = self._came_ns(reply)
        with Measured(self._meter, "read", length, came_ns):
            return await self._read(offset, length, reply, came_ns)

    def _came_ns(self, reply: Reply | None) -> int:
        return current_ns() if reply is None else self._run.alarm.came_ns(reply.taken_ns, reply.woken_ns)

    async def _read(self, offset: int, length: int, reply: Reply | None, came_ns: int) -> bytearray:
        state = await self._until_due(Request("read", offset, length, client=self.client), came_ns)
        overlay, effects = self._rules.overlay, state.plan.effects
        data = await read(self._disk, overlay.source(offset, effects), length)
        if effects or not overlay.is_quiet:
            overlay.show(offset, memoryview(data), current_ns(), effects)
        await self._answer("read", state, reply, data)
        return data

    async def write(
        self, op: str, offset: int, length: int, payload: bytes | bytearray | None, fua: bool, reply: Reply | None = None
    ) -> None:
        """``op``: write, zero or trim. Raises OSError, `Dropped`, what the disk raises."""
        came_ns = self._came_ns(reply)
        with Measured(self._meter, op, length, came_ns):
            await self._write(op, offset, length, payload, fua, reply, came_ns)

    async def _write(
        self, op: str, offset: int, length: int, payload: bytes | bytearray | None, fua: bool, reply: Reply | None, came_ns: int
    ) -> None:
        state = await self._until_due(Request(op, offset, length, fua, client=self.client), came_ns)
        if op == "trim":
            start, end = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
            offset, length = start, max(0, end - start)
        view = None if payload is None else memoryview(payload)
        overlay, effects = self._rules.overlay, state.plan.effects
        if length and (effects or not overlay.is_quiet or self._cache.keeps or self._cache.log is not None):
            async with self._lock:
                await self._write_noted(offset, length, view, effects, fua)
        elif length:
            await write(self._disk, offset, length, view)
        stable = fua or self._cache.each_write
        if stable:
            await flush(self._disk)
        await self._answer(op, state, reply)
        self._cache.promises.wrote({effect.kind for effect in effects}, stable)

    async def _write_noted(
        self, offset: int, length: int, view: memoryview | None, effects: Sequence[Effect], fua: bool
    ) -> None:
        overlay, cache = self._rules.overlay, self._cache
        before = [bytes(await read(self._disk, *where)) for where in overlay.before(offset, length, effects)]
        if cache.keeps:
            cache.before(offset, bytes(await read(self._disk, offset, length)))
        await write(self._disk, offset, length, view)
        if cache.keeps:
            cache.wrote(offset, bytes(length) if view is None else bytes(view), stable=fua or cache.each_write)
        overlay.wrote(offset, length if view is None else view, current_ns(), effects, before)
        if cache.log is not None:
            await self._log(cache.log, offset, length, view, fua or cache.each_write, {effect.kind: effect.value for effect in effects})

    async def _log(
        self, log: WriteLog, offset: int, length: int, view: memoryview | None, stable: bool, damage: dict[str, Any]
    ) -> None:
        """Tell of what a write has done to the medium, in whole sectors: of a part of one, and of what was damaged, as it is seen now."""
        places = [offset] if not damage or {"torn", "flip"} & damage.keys() else []
        places += [damage["misdirect"]] if "misdirect" in damage else []
        for place in places:
            start, end = place // SECTOR_BYTES * SECTOR_BYTES, -(-(place + length) // SECTOR_BYTES) * SECTOR_BYTES
            if damage or (start, end) != (place, place + length):
                view = memoryview(await read(self._disk, start, end - start))
                self._rules.overlay.show(start, view, current_ns())
            log.wrote(start, view, end - start, stable)

    async def flush(self, reply: Reply | None = None) -> None:
        """Raises OSError, `Dropped`, what the disk raises."""
        came_ns = self._came_ns(reply)
        with Measured(self._meter, "flush", 0, came_ns):
            await self._flush_planned(reply, came_ns)

    async def _flush_planned(self, reply: Reply | None, came_ns: int) -> None:
        promise = self._cache.promises.mark(self._cache.mark())
        state = await self._until_due(Request("flush", client=self.client), came_ns)
        if not any(effect.kind == "lose" for effect in state.plan.effects):
            mark, log = self._cache.mark(), self._cache.log
            log_mark = log.mark() if log is not None else 0
            await flush(self._disk)
            self._cache.flushed(mark)
            if log is not None:
                log.flushed(log_mark)
        await self._answer("flush", state, reply)
        self._cache.promises.flushed(promise)

    async def meet(self, op: str, offset: int = 0, length: int = 0) -> None:
        """For what is carried out elsewhere: extents, open, close. Raises OSError, `Dropped`."""
        with Measured(self._meter, op):
            await self.until_due(Request(op, offset, length, client=self.client))

    async def meet_control(self, op: str, client: str, vdis: int = 1) -> Plan:
        """For an operation of the control plane; what it then does itself takes no part. Raises OSError, `Dropped`."""
        self._rules.vdis = vdis
        with Measured(self._meter, op):
            return await self.until_due(Request(op, client=client))

    # Plans.

    async def until_due(self, request: Request) -> Plan:
        """Decide, hang, wait. Raises OSError and `Dropped` as the plan says; one that comes back is to be carried out."""
        return (await self._until_due(request, current_ns(), has_lead=False)).plan

    async def _until_due(self, request: Request, came_ns: int, has_lead: bool = True) -> UnderWay:
        """Decide, hang, wait until the request, which came at ``came_ns``, is to be carried out; `_answer` comes behind that."""
        run, alarm, now = self._run, self._run.alarm, current_ns()
        path = run.path_of(self._rules, now)
        plan = self._rules.decide(request, now)
        state = UnderWay(self._vdi, path, plan)
        run.obey()
        if plan.rules:
            self._meter.fired(plan.rules, now)
        if plan.hang is None and not plan.delay_ns:
            self._refuse(plan, plan.error)
            return state
        with run.watching(state):
            if plan.hang is not None:
                await self._park(state, plan.hang)
                came_ns = current_ns()
            state.send_ns = came_ns + plan.delay_ns - alarm.wire_ns
            lead_ns = alarm.lead_ns(request.op) if has_lead and not plan.error else 0
            state.wake_ns = max(came_ns, state.send_ns - lead_ns)
            await self._sleep(state, state.wake_ns)
            self._refuse(plan, state.error or plan.error)
        return state

    async def _answer(self, op: str, state: UnderWay, reply: Reply | None, data: bytearray | None = None) -> None:
        """The request has been carried out: send its answer when it is due. Raises OSError, `Dropped`: it is not to be answered."""
        if not state.send_ns:
            answer(reply, data)
            return
        self._run.alarm.learn(op, current_ns() - state.wake_ns)
        if reply is None:
            with self._run.watching(state):
                await self._sleep(state, state.send_ns)
                self._refuse(state.plan, state.error)
            return
        is_sent = False

        def send() -> None:
            nonlocal is_sent
            if state.hang is None:
                is_sent = True
                reply.send()

        reply.prepare(data)
        with self._run.watching(state):
            await self._sleep(state, state.send_ns, send)
            if not is_sent:
                self._refuse(state.plan, state.error)
                reply.send()

    async def _sleep(self, state: UnderWay, until_ns: int, then: Callable[[], None] | None = None) -> None:
        """Wait, unless that time has come; hang, if that was ordered meanwhile. ``then`` is called at that time if nothing was."""
        if until_ns > current_ns():
            state.event = trio.Event()
            await self._run.alarm.wait(state.event, until_ns, then)
        while state.hang is not None:
            rule, state.hang, state.event = state.hang, None, trio.Event()
            await self._park(state, Hang(rule))
        if state.dropped:
            raise Dropped(None)

    async def _park(self, state: UnderWay, hang: Hang) -> None:
        state.parked_by = hang.rule
        recorder = self._run.recorder
        recorder.park(state, current_ns())
        try:
            if hang.until_ns is None:
                await state.event.wait()
            else:
                await self._run.alarm.wait(state.event, hang.until_ns)
        finally:
            recorder.unpark(state, current_ns())
        by_order, state.parked_by, state.event = state.parked_by is None, None, trio.Event()
        if state.dropped:
            raise Dropped(None)
        self._refuse(state.plan, state.error or (0 if by_order else hang.error))

    def _refuse(self, plan: Plan, error: int) -> None:
        """Raise what the plan ends with instead of carrying the request out."""
        failure = OSError(error, f"{os.strerror(error)} (injected by {', '.join(plan.rules) or 'the scenario'})") if error else None
        if failure is not None and plan.fault:
            failure.sm_fault = plan.fault
        if plan.disconnect:
            raise Dropped(failure)
        if failure is not None:
            raise failure

"""The loads of a scenario (``replay`` as a workload): they begin when their rule comes into force, and end with it.

``on = "scratch"``: the load has a disk of its own, which takes everything and keeps nothing, and which the profiles and rules apply to like
to any other; so it competes for what is shared. ``on = "disk"``: it goes to each disk that the rule matches, as one more client.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from nbd_export.disk import Scripted
from scenarios.request import Order
from scenarios.rules import matches_name
from scenarios.schema import Replay
from scenarios.traces.workload import Workload
from scenarios.write_cache import WriteCache
from simsr.daemon.alarm import Alarm
from simsr.daemon.direct import Direct
from simsr.daemon.load import Load, ScratchDisk
from simsr.daemon.scripted import ScriptedDisk
from simsr.daemon.trace_files import TraceFiles
from simsr.errors import NotFound, SimsrError

if TYPE_CHECKING:
    from simsr.daemon.engine import Disk
    from simsr.daemon.scenario_run import ScenarioRun

__all__ = ["Loads", "Reach", "SCRATCH_BYTES", "make_workload"]

log = logging.getLogger("simsr.scenario")

SCRATCH_BYTES = 1 << 40
"""Of the scratch disk of a trace that does not say how large its disk was."""

Reach = Callable[[Callable[[tuple[str, ...]], bool], str], list[tuple[str, "Disk"]]]
"""``reach(chosen, who)`` attaches ``who`` to each VDI whose names are ``chosen``: [(uuid, disk)]. Raises `VdiInUse`, `VdiReadOnly`..."""


def make_workload(files: TraceFiles, spec: Replay, size_bytes: int | None) -> Workload:
    """Open what ``spec`` names, for a disk of that size, or as large as the trace's. Blocks. Raises `BadTrace`."""
    trace_bytes = files.device_bytes(spec.trace, spec.format, spec.device, must=spec.fit == "scale")
    return Workload(
        files.opener(spec), size_bytes or trace_bytes or SCRATCH_BYTES, 0, spec.speed, spec.start, spec.loop, spec.fit, trace_bytes
    )


class Loads:
    """Those of one run. `run` is their task; before it begins they wait."""

    def __init__(self, play: ScenarioRun, files: TraceFiles, alarm: Alarm, reach: Reach | None) -> None:
        self._play, self._files, self._alarm, self._reach = play, files, alarm, reach
        self._send, self._receive = trio.open_memory_channel[Order](1024)
        self._scopes: dict[str, list[trio.CancelScope]] = {}
        self._all: list[tuple[str, str, Load]] = []  # (rule, disk, load)
        self._problems: dict[str, str] = {}

    def begin(self, order: Order) -> None:
        """A rule that replays a workload has come into force."""
        self._scopes.setdefault(order.details["rule"], [])
        self._send.send_nowait(order)

    def stop(self, order: Order) -> None:
        """It is not in force any more."""
        for scope in self._scopes.pop(order.details["rule"], []):
            scope.cancel()

    def end(self) -> None:
        """The run is over."""
        self._send.close()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for order in self._receive:
                if (scopes := self._scopes.get(order.details["rule"])) is not None:
                    scope = trio.CancelScope()
                    scopes.append(scope)
                    nursery.start_soon(self._replay, order, scope)

    async def _replay(self, order: Order, scope: trio.CancelScope) -> None:
        rule, spec = order.details["rule"], order.details["spec"]
        with scope:
            try:
                if spec.on == "scratch":
                    await self._on_scratch(rule, spec)
                else:
                    await self._on_disks(rule, spec, order.details["vdi"])
            except SimsrError as error:
                self._problems[rule] = str(error)
                log.warning("the load of rule %s cannot run: %s", rule, error)

    async def _on_scratch(self, rule: str, spec: Replay) -> None:
        size_bytes = await trio.to_thread.run_sync(
            partial(self._files.device_bytes, spec.trace, spec.format, spec.device), abandon_on_cancel=True
        )
        disk, name = ScratchDisk(size_bytes or SCRATCH_BYTES), f"scratch:{rule}"
        rules = self._play.engine.disk(name, disk.size_bytes)
        scripted = ScriptedDisk(self._play, name, disk, rules, WriteCache(False), trio.Lock())
        await self._run(rule, name, spec, disk.size_bytes, lambda: scripted)

    async def _on_disks(self, rule: str, spec: Replay, globs: tuple[str, ...]) -> None:
        disks = self._reach(lambda names: matches_name(globs, names), f"load of rule {rule}") if self._reach else []
        if not disks:
            raise NotFound(kind="VDI for the load, one that is called", name=", ".join(globs))
        try:
            async with trio.open_nursery() as nursery:
                for uuid, disk in disks:
                    direct = Direct(disk)
                    nursery.start_soon(self._run, rule, uuid, spec, disk.size_bytes, lambda d=disk, plain=direct: d.scripted or plain)
        finally:
            for _, disk in disks:
                disk.detach()

    async def _run(self, rule: str, name: str, spec: Replay, size_bytes: int, target: Callable[[], Scripted]) -> None:
        load = Load(lambda: make_workload(self._files, spec, size_bytes), target, self._alarm, on_lag=self._play.recorder.lag)
        self._all.append((rule, name, load))
        await load.run()
        if load.problem:
            log.warning("the load of rule %s has ended: %s", rule, load.problem)

    def statistics(self) -> list[dict[str, Any]]:
        return [
            *({"rule": rule, "disk": name, **load.statistics()} for rule, name, load in self._all),
            *({"rule": rule, "disk": None, "problem": problem, "is_over": True} for rule, problem in self._problems.items()),
        ]

"""The scenario that is in force in this daemon: one engine (`scenarios.engine`) over all its disks, and what carries out its orders.

Live rules (``simsr fault add``) go into the running scenario, or into an empty one that is made for them. A disk is scripted while rules
apply to it or damage lies on it; otherwise its requests do not come by here at all.

Whoever changes what is in force gets its answer when it is in force: rules are swapped between two requests, and the answer names the
last request that was decided before.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import trio

from scenarios.disk import DiskRules
from scenarios.draws import Draws
from scenarios.engine import Engine
from scenarios.loader import load_rule
from scenarios.metrics import Seen
from scenarios.overlay import Layer
from scenarios.recorder import Recorder
from scenarios.report import Recording, outcomes_of
from scenarios.request import Order
from scenarios.rules import matches_name
from scenarios.schema import Rule, Scenario
from scenarios.write_cache import WriteCache, WriteLog
from simsr.daemon.alarm import Alarm, current_ns
from simsr.daemon.direct import read
from simsr.daemon.engine import Disk
from simsr.daemon.loads import Loads, Reach
from simsr.daemon.recording import script
from simsr.daemon.scripted import ScriptedDisk, UnderWay
from simsr.daemon.trace_files import TraceFiles
from simsr.errors import NotFound, SimsrError
from simsr.sr.vdi import Vdi
from simsr.store.layout import BLOCK
from simsr.store.store import Create, Delete, Op, Reset, Resize

__all__ = ["ScenarioRun", "LIVE", "NOTES_MAX"]

log = logging.getLogger("simsr.scenario")

NOTES_MAX = 4096
"""Phases and events that are kept for whoever asks later."""

DRAIN_S, _POLL_S = 5.0, 0.002
"""How long a rule that lets requests hang is not answered while some that came before it are still being answered."""

LIVE = "live"
"""The name of the empty scenario that is made for live rules."""

_LATE_NS = 1_000
"""Seconds in a float are less exact than nanoseconds: who woke up at the very end of a phase might find that it has not come yet, for ever."""

GROUP_KEY = "simsr-group"
"""In sm_config: the groups that a VDI is in, for ``scope = "group:NAME"``."""


class _Attached:
    """The attachments of one VDI, and what they share."""

    def __init__(self, vdi: Vdi, rules: DiskRules, each_write: bool, is_measured: bool) -> None:
        self.vdi, self.rules, self.is_measured = vdi, rules, is_measured
        self.cache = WriteCache(each_write)
        self.lock = trio.Lock()
        self.resets = 0  # times that all of its content was replaced
        self.disks: dict[Disk, ScriptedDisk] = {}
        self._clients: set[tuple[str, str]] = set()  # of attachments that have ended

    def gone(self, disk: Disk) -> None:
        self.disks.pop(disk, None)
        self._clients.add(self._client(disk))

    @property
    def clients(self) -> list[tuple[str, str]]:
        """(kind, when its writes survive a power cut) of those that have, or had, the disk attached."""
        return sorted(self._clients | {self._client(disk) for disk in self.disks})

    def _client(self, disk: Disk) -> tuple[str, str]:
        return disk.client_kind, "each-write" if self.cache.each_write or disk.each_write_durable else "flush"


class ScenarioRun:
    """One scenario from its beginning to its end. `run` is its task; ``make_disk`` gives a disk for the run's own writing."""

    def __init__(
        self, scenario: Scenario, seed: int | None, files: TraceFiles, alarm: Alarm, make_disk: Callable[[Vdi], Disk],
        reach: Reach | None = None,
    ) -> None:  # fmt: skip
        self.alarm, self._make_disk, self._files = alarm, make_disk, files
        self.loads = Loads(self, files, alarm, reach)
        self._under_way: set[UnderWay] = set()
        self._vdis: dict[str, _Attached] = {}
        self._layers: dict[tuple[str, int], Layer] = {}  # (SR, volume) -> the damage of data of volumes that are not in _vdis
        self._changed = trio.Event()
        self._cuts: list[Order] = []
        self.notes: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.cuts = 0
        self.is_over = False
        self._live_rules = 0
        self._measures = True
        self._keeps = _cuts_power(scenario)
        self._durability = {name: profile.durability for name, profile in scenario.profile.items()}
        self.began_ns = current_ns()
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        self.recorder = Recorder(self.began_ns)
        self.engine = Engine(scenario, self.began_ns, seed, replays=files.replay)

    # Disks come and go.

    def _of(self, vdi: Vdi) -> _Attached:
        attached = self._vdis.get(vdi.uuid)
        if attached is None:
            groups = tuple(filter(None, vdi.meta["sm_config"].get(GROUP_KEY, "").split(",")))
            rules = self.engine.disk(vdi.uuid, vdi.size_bytes, [vdi.name] if vdi.name else [], vdi.name or vdi.uuid, groups)
            each_write = self._durability.get(self.engine.profile_name(rules) or "") == "each-write"
            attached = self._vdis[vdi.uuid] = _Attached(vdi, rules, each_write, _concerns(self.engine.scenario, rules))
            attached.cache.keeps = self._keeps
            if layer := self._layers.pop((vdi.sr, vdi.volume.ident), None):
                rules.overlay.take_over(layer)
        if attached.rules.size_bytes != vdi.size_bytes:
            attached.rules.resize(vdi.size_bytes)
        return attached

    def gate(self, vdi: Vdi) -> ScriptedDisk:
        """What operations on the VDI have to pass."""
        attached = self._of(vdi)
        return ScriptedDisk(self, vdi.uuid, None, attached.rules, attached.cache, attached.lock)

    def attach(self, vdi: Vdi, disk: Disk) -> None:
        """A client has attached; ``disk`` is scripted if anything applies to it."""
        attached = self._of(vdi)
        attached.disks[disk] = ScriptedDisk(self, vdi.uuid, disk, attached.rules, attached.cache, attached.lock)
        self._script(attached)
        self.obey()

    def detach(self, vdi: Vdi, disk: Disk) -> None:
        if attached := self._vdis.get(vdi.uuid):
            attached.gone(disk)
        script(disk, None)

    def _script(self, attached: _Attached) -> None:
        rules = attached.rules
        kept = attached.cache.keeps or attached.cache.log is not None
        needed = rules.applies or self._measures and attached.is_measured or not rules.overlay.is_quiet or kept
        for disk, scripted in attached.disks.items():
            script(disk, scripted if needed else None)

    def _script_all(self) -> None:
        for attached in self._vdis.values():
            self._script(attached)

    @property
    def is_live(self) -> bool:
        return self.engine.scenario.name == LIVE

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in force, no disk is damaged and none is recorded."""
        quiet = all(attached.rules.overlay.is_quiet and attached.cache.log is None for attached in self._vdis.values())
        return not self.engine.live_rules and quiet

    async def record(self, vdi: Vdi, log: WriteLog | None) -> None:
        """Have a log told of every write and flush of a disk from now on; None: no longer."""
        attached = self._of(vdi)
        async with attached.lock:
            attached.cache.log = log
        self._script(attached)

    # What happens to volumes in the meantime.

    def committed(self, sr: str, ops: list[Op]) -> None:
        """Damage that sticks to data goes where the data go: into snapshots and clones, and back with a revert."""
        for op in ops:
            match op:
                case Create(ident, _, _, source) if source is not None:
                    if (layer := self._layer(sr, source)) is not None:
                        self._layers[sr, ident] = layer.frozen()
                case Reset(ident, source):
                    self._reset(sr, ident, self._layer(sr, source))
                case Resize(ident, size_bytes):
                    if attached := self._attached(sr, ident):
                        attached.rules.resize(size_bytes)
                case Delete(ident):
                    self._layers.pop((sr, ident), None)

    def _attached(self, sr: str, ident: int) -> _Attached | None:
        return next((one for one in self._vdis.values() if one.vdi.sr == sr and one.vdi.volume.ident == ident), None)

    def _layer(self, sr: str, ident: int) -> Layer | None:
        attached = self._attached(sr, ident)
        return attached.rules.overlay.data if attached else self._layers.get((sr, ident))

    def _reset(self, sr: str, ident: int, layer: Layer | None) -> None:
        if attached := self._attached(sr, ident):
            attached.rules.overlay.take_over(layer)
            attached.rules.resize(attached.vdi.size_bytes)
            attached.cache.clear()
            attached.resets += 1
            self._script(attached)
        elif layer is not None:
            self._layers[sr, ident] = layer.frozen()
        else:
            self._layers.pop((sr, ident), None)

    # The run.

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Go through the phases, carry out orders; until cancelled or `end`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.loads.run)
            task_status.started()
            await self._go_through()
            self.loads.end()

    async def _go_through(self) -> None:
        self.obey()
        while not self.is_over:
            self._changed = trio.Event()
            ends_ns = self.engine.next_change_ns
            if self._cuts:
                await self._cut(self._cuts.pop(0))
                continue
            with trio.move_on_at(min((ends_ns + _LATE_NS) / 1e9, trio.current_time() + 3600)):
                await self._changed.wait()
            self.engine.advance(current_ns())
            self.obey()

    def end(self) -> None:
        """Take everything out of force and let everybody go on."""
        self.recorder.close(current_ns())
        self.engine.reset(current_ns())
        self.obey()
        self.is_over = True
        self._changed.set()
        for attached in self._vdis.values():
            attached.cache.clear()
            attached.cache.keeps, attached.cache.log = False, None
            for disk in attached.disks:
                script(disk, None)

    def dead_man(self) -> None:
        """Whoever controlled the scenario is gone: nobody may hang any more."""
        self.engine.dead_man(current_ns())
        self.obey()

    # Orders.

    def obey(self) -> None:
        """Carry out what the engine wants. Called after everything that may have given orders."""
        if not self.engine.has_orders:
            return
        for order in self.engine.take_orders():
            _ORDERS[order.kind](self, order)
        self._changed.set()

    def _note(self, order: Order) -> None:
        name = order.details.get("name") or order.details.get("rule") or ""
        if order.kind in ("phase", "over"):
            self.recorder.enter(name or None, order.at_ns)
        if order.kind == "over":
            self._measure_no_more()
        if order.kind != "phase":
            self.recorder.note(order.kind, name, order.at_ns)
        self.notes.append({"at_s": (order.at_ns - self.began_ns) / 1e9, "what": order.kind, **_plain(order.details)})
        del self.notes[:-NOTES_MAX]
        log.info("%s: %s %s", self.engine.scenario.name, order.kind, order.details.get("name", ""))

    def _applies(self, order: Order) -> None:
        if attached := self._vdis.get(order.details["vdi"]):
            self._script(attached)

    def _release(self, order: Order) -> None:
        rule, error = order.details["rule"], order.details["error"]
        for state in self._under_way:
            if state.parked_by is not None and rule in (None, state.parked_by):
                state.parked_by, state.error = None, error
                state.event.set()

    def _inflight(self, order: Order) -> None:
        for state in self._under_way:
            if state.path != order.details["path"] or state.parked_by is not None:
                continue
            if order.details["what"] == "error":
                state.error = errno.EIO
                state.event.set()
            else:
                state.hang = order.details["rule"]

    def _replay(self, order: Order) -> None:
        self._note(order)
        self.loads.begin(order)

    def _replay_stop(self, order: Order) -> None:
        self._note(order)
        self.loads.stop(order)

    def _power_cut(self, order: Order) -> None:
        self._note(order)
        self._cuts.append(order)
        off = {name for name, attached in self._vdis.items() if self.engine.is_off(attached.rules)}
        for state in self._under_way:
            if state.vdi in off:
                state.dropped, state.parked_by = True, None
                state.event.set()

    async def _cut(self, order: Order) -> None:
        """Make the disks without power look as the cut has left them."""
        details = order.details
        for name, attached in list(self._vdis.items()):  # others may be attached meanwhile
            if not self.engine.is_off(attached.rules):
                continue
            draws = Draws(details["seed"], details["rule"], attached.rules.key, "cut", details["number"])
            async with attached.lock:
                pieces, resets = attached.cache.cut(details["keep"], draws, details["torn"], details["order"]), attached.resets
                try:
                    await self._store(attached.vdi, pieces, lambda: self.is_over or attached.resets != resets)
                    log.info("power cut of VDI %s: %d pieces differ", name, len(pieces))
                except NotFound:
                    pass  # it was deleted: nobody will ask what it has lost
                except (SimsrError, OSError) as error:
                    log.error("power cut of VDI %s: what it loses is there still, in part or wholly: %s", name, error)
        self.cuts += 1

    async def _store(self, vdi: Vdi, pieces: list[tuple[int, bytes]], is_stale: Callable[[], bool] = lambda: False) -> None:
        """Write ``pieces``, until they are stale: about content that a revert has taken away, or when the scenario has ended and clients write
        beside us. Whole blocks, so that nothing has to be waited for between asking that and writing, but room in a full SR."""
        disk = self._make_disk(vdi)
        try:
            for offset, data in pieces:
                start, end = offset // BLOCK * BLOCK, min(-(-(offset + len(data)) // BLOCK) * BLOCK, vdi.size_bytes)
                if is_stale() or end <= start:  # a disk that was deleted has no bytes any more
                    return
                is_whole = (start, end) == (offset, offset + len(data))
                blocks = bytearray(end - start) if is_whole else await read(disk, start, end - start)
                await disk.passed()
                if is_stale():
                    return
                blocks[offset - start : offset - start + len(data)] = data
                batch = [(start, len(blocks), memoryview(blocks))]
                if not disk.write(batch):
                    await disk.write_rest(batch, 0)
        finally:
            disk.detach()

    # What disks ask.

    def path_of(self, rules: DiskRules, now: int) -> str:
        """The storage path that a request takes now, or ""."""
        paths = self.engine.paths_of(rules)
        return (paths.route("", now)[0] or "") if paths is not None else ""

    @contextmanager
    def watching(self, state: UnderWay) -> Iterator[None]:
        self._under_way.add(state)
        try:
            yield
        finally:
            self._under_way.discard(state)

    # Live commands.

    def read_rule(self, data: dict[str, Any], name: str | None) -> Rule:
        """What `add_rule` puts in force. Blocks, for it reads traces. Raises `BadScenario`, `BadTrace`."""
        self._live_rules += 1
        rule = load_rule({**data, **({"name": name} if name else {})}, f"live-{self._live_rules}", self._files.times, self.engine.scenario)
        self._files.prepare_rule(rule)
        return rule

    async def add_rule(self, rule: Rule) -> dict[str, Any]:
        """Put a rule in force; if requests may hang because of it, wait a while for those that were under way. Raises `BadRequest`."""
        earlier = [state for state in self._under_way if state.parked_by is None] if self.engine.hangs(rule) else []
        if rule.action.power_cut is not None:
            self._remember_writes()
        decided = self.engine.add_rule(rule, current_ns())
        self.obey()
        self._script_all()
        with trio.move_on_after(DRAIN_S):
            while any(state in self._under_way and state.parked_by is None for state in earlier):
                await trio.sleep(_POLL_S)
            await trio.sleep(_POLL_S if earlier else 0)  # an answer that is due is sent a little after the request has been carried out
        left = sum(state in self._under_way and state.parked_by is None for state in earlier)
        return _in_force(rule.name, decided, left)

    def _remember_writes(self) -> None:
        self._keeps = True
        for attached in self._vdis.values():
            attached.cache.keeps = True

    def remove_rule(self, name: str) -> dict[str, Any]:
        """Raises `NotFound`."""
        decided = self.engine.remove_rule(name, current_ns())
        self.obey()
        return _in_force(name, decided)

    def reset(self) -> dict[str, Any]:
        """End all rules and phases, heal all damage, let everybody go on."""
        decided = self.engine.reset(current_ns())
        self._layers.clear()
        self.obey()
        self._measure_no_more()
        return _in_force(None, decided)

    def _measure_no_more(self) -> None:
        """Where no rule applies any more, that is."""
        self._measures = False
        self._script_all()

    async def heal(self, vdis: Iterable[Vdi], permanent: bool) -> dict[str, Any]:
        """Take damage away from these VDIs, or write it into their stores first; also from clones that nobody has attached yet."""
        healed = []
        for vdi in vdis:
            if vdi.uuid not in self._vdis and (vdi.sr, vdi.volume.ident) not in self._layers:
                continue
            name, attached = vdi.uuid, self._of(vdi)
            async with attached.lock:
                overlay, now = attached.rules.overlay, current_ns()
                if permanent:
                    await self._spoil(attached, overlay.permanent(now), overlay.rotten_bits(now))
                overlay.heal(now)
            self._script(attached)
            healed.append(name)
        self.obey()
        return {"healed": healed, "permanent": permanent}

    async def _spoil(self, attached: _Attached, pieces: list[tuple[int, bytes]], bits: list[int]) -> None:
        disk = self._make_disk(attached.vdi)
        try:
            for bit in bits:
                cell = await read(disk, bit // 8, 1)
                pieces.append((bit // 8, bytes([cell[0] ^ 1 << bit % 8])))
        finally:
            disk.detach()
        await self._store(attached.vdi, pieces)

    def statistics(self) -> dict[str, Any]:
        shown = self.engine.statistics()
        return {
            **shown,
            "age_s": (current_ns() - self.began_ns) / 1e9,
            "is_over": self.engine.is_over,
            "hung": self.recorder.hanging,
            "under_way": len(self._under_way),
            "power_cuts": self.cuts,
            "replays": self.loads.statistics(),
            "notes": self.notes[-100:],
            "warnings": self.warnings,
            "expectations": outcomes_of(self.engine.scenario, self._seen(self.recorder, shown["rules"])),
        }

    def _seen(self, recorder: Recorder, rules: list[dict[str, Any]]) -> Seen:
        promises = [attached.cache.promises for attached in self._vdis.values()]
        return Seen(
            recorder,
            current_ns(),
            {rule["rule"]: rule["hits"] for rule in rules},
            recorder.events,
            sum(one.promised for one in promises),
            sum(one.lost for one in promises),
            self.cuts,
        )

    def recording(self) -> Recording:
        """What a report is made of (`scenarios.report`), in a worker thread if need be: the run changes nothing of it."""
        rules = self.engine.statistics()["rules"]
        disks = [(one.vdi.uuid, one.vdi.name, one.vdi.size_bytes, one.clients) for one in self._vdis.values()]
        seen = self._seen(self.recorder.frozen(), rules)
        return Recording(self.engine.scenario, self.engine.seed, self._began, seen, rules, disks)


def _in_force(rule: str | None, decided: int, under_way: int = 0) -> dict[str, Any]:
    return {"rule": rule, "in_force_after": decided, "under_way": under_way, "warnings": []}


def _concerns(scenario: Scenario, rules: DiskRules) -> bool:
    """Whether the disk is one that the scenario is about, and there are times when no rule applies to it that have to be measured, too."""
    if not (scenario.phase or scenario.expect):
        return False
    everything = [*(profile.vdi for profile in scenario.profile.values())]
    everything += [rule.match.vdi for rule in (*scenario.rule, *(rule for phase in scenario.phase for rule in phase.rule))]
    named = any(not vdis or matches_name(vdis, rules.names) for vdis in everything)
    return named or not everything and bool(scenario.expect)


def _cuts_power(scenario: Scenario) -> bool:
    rules = [*scenario.rule, *(rule for phase in scenario.phase for rule in phase.rule)]
    return any(rule.action.power_cut is not None for rule in rules)


def _plain(details: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in details.items() if isinstance(value, str | int | float | bool | None)}


def _nothing(run: ScenarioRun, order: Order) -> None:
    pass


_ORDERS: dict[str, Callable[[ScenarioRun, Order], None]] = {
    "applies": ScenarioRun._applies,
    "release": ScenarioRun._release,
    "inflight": ScenarioRun._inflight,
    "power_cut": ScenarioRun._power_cut,
    "power_on": ScenarioRun._note,
    "event": ScenarioRun._note,
    "phase": ScenarioRun._note,
    "over": ScenarioRun._note,
    "replay": ScenarioRun._replay,
    "replay_stop": ScenarioRun._replay_stop,
}

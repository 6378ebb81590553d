"""Which scenario is in force in this daemon, if any; starting, ending, what the operations of the control plane meet; what is recorded.

At most one `ScenarioRun` at a time. Disks are told to it as clients come and go; while there is none, nothing here is asked on the
way of a request.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import trio

from nbd_export.disk import Dropped
from scenarios.loader import load, without_ends
from scenarios.report import Recording as Recorded
from scenarios.report import report_of
from scenarios.request import LOGGED_OPS, STEPS, Effect
from scenarios.schema import Scenario
from scenarios.write_cache import WriteLog
from simsr.daemon import threads
from simsr.daemon.alarm import Alarm, current_ns
from simsr.daemon.engine import Disk, Engine
from simsr.daemon.fitting import check_fit, check_rules
from simsr.daemon.last_report import load_report, save_report
from simsr.daemon.loads import Reach
from simsr.daemon.recording import Recording, Tap
from simsr.daemon.scenario_run import LIVE, ScenarioRun
from simsr.daemon.trace_files import TraceFiles
from simsr.errors import DaemonStopping, InjectedFault, NoScenario, NotFound, RecordingRunning, ScenarioRunning
from simsr.sr.vdi import Vdi
from simsr.store.store import Delete, Op

__all__ = ["Theatre"]


class Theatre:
    """``make_disk`` gives a disk on which damage is made permanent and power cuts are carried out; ``engine_of`` the engine of a VDI's SR;
    ``reach`` the disks that loads go to; ``report_file`` is where the report of the last scenario is kept, if anywhere; ``vdis`` gives all."""

    def __init__(
        self, make_disk: Callable[[Vdi], Disk], engine_of: Callable[[Vdi], Engine], reach: Reach | None = None,
        report_file: str | None = None, vdis: Callable[[], Iterable[Vdi]] = tuple,
    ) -> None:  # fmt: skip
        self._report_file, self._vdis = report_file, vdis
        self._is_stopping = False
        self._make_disk, self._engine_of, self._reach = make_disk, engine_of, reach
        self._disks: dict[Disk, tuple[Vdi, str]] = {}
        self.recordings: dict[str, Recording] = {}  # uuid of the VDI -> what is recorded of it now
        self._nursery: trio.Nursery
        self.alarm = Alarm()
        self.play: ScenarioRun | None = None
        self._last: Recorded | None = None
        self._step = STEPS[0]
        self.die: Callable[[], None] = _die
        """Ends the daemon at once, wherever it is: what ``kill_daemon`` calls."""

    async def run(self, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Under another clock than the system's the alarm stays out of it."""
        async with trio.open_nursery() as self._nursery:
            if type(trio.lowlevel.current_clock()).__name__ == "SystemClock":
                await self._nursery.start(self.alarm.run)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._is_stopping = True
                self._keep_report(self.play)

    # Disks.

    def attach(self, vdi: Vdi, disk: Disk, client: str = "") -> None:
        self._disks[disk] = vdi, client
        if recording := self.recordings.get(vdi.uuid):
            Tap.put(recording, disk, client)
        if self.play is not None:
            self.play.attach(vdi, disk)

    def detach(self, disk: Disk) -> None:
        vdi, _ = self._disks.pop(disk)
        Tap.take_away(disk)
        if self.play is not None:
            self.play.detach(vdi, disk)

    def committed(self, sr: str, ops: list[Op]) -> None:
        """The store of an SR has made, reset or deleted volumes."""
        if self.play is not None:
            self.play.committed(sr, ops)
        gone = {(sr, op.ident) for op in ops if isinstance(op, Delete)}
        for recording in [one for one in self.recordings.values() if one.place in gone]:
            self.end_recording(recording)

    # Recording.

    def begin_recording(self, vdi: Vdi, seconds: float | None = None) -> Recording:
        """Begin to record what the clients of a VDI ask, those that come later, too. Raises `RecordingRunning`."""
        if vdi.uuid in self.recordings:
            raise RecordingRunning(name=vdi.uuid)
        recording = self.recordings[vdi.uuid] = Recording(vdi.uuid, (vdi.sr, vdi.volume.ident), vdi.size_bytes, seconds)
        for disk, (recorded, client) in self._disks.items():
            if recorded is vdi:
                Tap.put(recording, disk, client)
        return recording

    def recording_of(self, vdi: Vdi) -> Recording:
        """Raises `NotFound`."""
        if vdi.uuid not in self.recordings:
            raise NotFound(kind="recording of VDI", name=vdi.uuid)
        return self.recordings[vdi.uuid]

    def end_recording(self, recording: Recording) -> None:
        """Nothing more is recorded when this returns."""
        recording.end()
        if self.recordings.get(recording.vdi) is recording:
            del self.recordings[recording.vdi]
            for disk, (vdi, _) in self._disks.items():
                if vdi.uuid == recording.vdi:
                    Tap.take_away(disk)

    # Scenarios.

    async def start(
        self, text: str, source: str, directory: str | None, seed: int | None = None, step: str | None = None, ends: bool = True
    ) -> ScenarioRun:
        """Put a scenario in force. ``step``: one of `STEPS`, where ``kill_daemon = "at-step"`` kills; whoever
        enumerates them starts the scenario anew for each. ``ends``: if not, rules that cut the power or kill the daemon are left out.

        Raises `BadScenario`, `BadTrace`, `ScenarioRunning`, `DaemonStopping`."""
        files = TraceFiles(directory)

        def read() -> Scenario:
            scenario = load(text, source, files.times)
            files.prepare(scenario)
            return scenario

        scenario = await threads.run_sync(read)
        if self.play is not None:
            raise ScenarioRunning(name=self.play.engine.scenario.name)
        if not ends:
            scenario = without_ends(scenario)
        warnings = check_rules(scenario, self._vdis(), self._clients(), source)
        self._step = step or STEPS[0]
        play = await self._begin(scenario, seed, files)
        play.warnings = warnings
        return play

    async def _begin(self, scenario: Scenario, seed: int | None, files: TraceFiles) -> ScenarioRun:
        if self._is_stopping:
            raise DaemonStopping(what=f"scenario {scenario.name!r}")
        play = ScenarioRun(scenario, seed, files, self.alarm, self._make_disk, self._reach)
        self.play = play
        for disk, (vdi, _) in self._disks.items():
            play.attach(vdi, disk)
        try:
            await self._nursery.start(play.run)
        except RuntimeError:  # it was cancelled before it had begun
            self.play = None
            raise DaemonStopping(what=f"scenario {scenario.name!r}") from None
        return play

    def _clients(self) -> dict[str, set[str]]:
        """uuid of a VDI -> the kinds of clients that have it attached."""
        found: dict[str, set[str]] = {}
        for disk, (vdi, _) in self._disks.items():
            found.setdefault(vdi.uuid, set()).add(disk.client_kind)
        return found

    def stop(self) -> dict[str, Any]:
        """End it; returns how it ended. Raises `NoScenario`."""
        play = self.playing
        play.end()
        self.play = None
        if not play.is_live:
            self._last = play.recording()
        return play.statistics()

    async def stop_and_keep(self) -> dict[str, Any]:
        """`stop`, and its report outlives this daemon."""
        ended = self.stop()
        if self._last is not None and self._report_file is not None:
            last, file = self._last, self._report_file
            await threads.run_sync(lambda: save_report(file, report_of(last)))
        return ended

    def _keep_report(self, play: ScenarioRun | None) -> None:
        """The daemon ends, and the scenario with it."""
        if play is not None and not play.is_live and self._report_file is not None:
            play.recorder.close(current_ns())
            save_report(self._report_file, report_of(play.recording()))

    async def report(self) -> dict[str, Any]:
        """Of the run that is in force, else of the last scenario that was (not of live rules), if need be in an earlier daemon. Raises `NoScenario`."""
        recording = self.play.recording() if self.play is not None else self._last
        if recording is not None:
            return await threads.run_sync(report_of, recording)
        kept = await threads.run_sync(load_report, self._report_file) if self._report_file is not None else None
        if kept is None:
            raise NoScenario(where="this daemon")
        return kept

    @property
    def playing(self) -> ScenarioRun:
        """Raises `NoScenario`."""
        if self.play is None:
            raise NoScenario(where="this daemon")
        return self.play

    async def add_rule(self, data: dict[str, Any], name: str | None) -> dict[str, Any]:
        """Put one rule in force, in an empty scenario if there is none. Raises `BadScenario`, `BadRequest`."""
        play = self.play
        began = play is None
        if play is None:
            play = await self._begin(Scenario(simsr=1, name=LIVE), None, TraceFiles(None))
        try:
            rule = await threads.run_sync(play.read_rule, data, name)
            warnings = check_fit(play.engine.scenario, None, rule, self._vdis(), self._clients(), "of the live rules")
            return {**await play.add_rule(rule), "warnings": warnings}
        except BaseException:
            if began:
                self.stop()
            raise

    def remove_rule(self, name: str) -> dict[str, Any]:
        """Take a rule out of force. The scenario that was made for live rules ends with the last of them, unless damage is left.
        Raises `NoScenario`, `NotFound`."""
        play = self.playing
        answer = play.remove_rule(name)
        if play.is_live and play.is_idle:
            self.stop()
        return answer

    def reset(self) -> dict[str, Any]:
        """End all rules and phases, heal all damage, let everybody go on; the scenario that was made for live rules ends with them.
        Raises `NoScenario`."""
        play = self.playing
        answer = play.reset()
        if play.is_live and play.is_idle:
            self.stop()
        return answer

    async def record(self, vdi: Vdi, log: WriteLog | None) -> None:
        """Have a log told of every write and flush of a disk from now on, or until the scenario ends; None: no longer."""
        if log is None and self.play is None:
            return
        play = self.play or await self._begin(Scenario(simsr=1, name=LIVE), None, TraceFiles(None))
        await play.record(vdi, log)
        if play.is_live and play.is_idle:
            self.stop()

    # The control plane.

    async def before(self, op: str, vdi: Vdi | None, client: str = "", vdis: int = 1) -> Callable[[], None]:
        """Meet what the scenario has for an operation; returns what to call when its answer is about to leave. ``vdis``: in its SR.

        Raises `InjectedFault`, also where a data path would drop the connection.
        """
        play = self.play
        if play is None or vdi is None:
            return _nothing
        try:
            plan = await play.gate(vdi).meet_control(op, client, vdis)
        except OSError as error:
            fault = getattr(error, "sm_fault", 0)
            reason = f"fault {fault}" if fault else error.strerror or ""
            raise InjectedFault(number=error.errno or errno.EIO, fault=fault, operation=op, name=vdi.uuid, reason=reason) from None
        except Dropped as dropped:
            number = dropped.error.errno if isinstance(dropped.error, OSError) else errno.ESHUTDOWN
            raise InjectedFault(number=number or errno.EIO, operation=op, name=vdi.uuid, reason="the connection is dropped") from None
        steps = [effect for effect in plan.effects if effect.kind == "kill_daemon"]
        return self._stage(op, vdi, steps[0]) if steps else _nothing

    def _stage(self, op: str, vdi: Vdi, effect: Effect) -> Callable[[], None]:
        """Have the daemon die at its step. An operation that is refused logs nothing, and nobody dies of it."""
        step = self._step if effect.value == "at-step" else effect.value
        if step == "before-log":
            self._die()
        elif step in ("after-log", "after-swap") and op in LOGGED_OPS:
            engine = self._engine_of(vdi)
            engine.on_flush = self._die
            return partial(setattr, engine, "on_flush", None)
        return self._die

    def _die(self) -> None:
        self._keep_report(self.play)
        self.die()

    def statistics(self) -> dict[str, Any] | None:
        return self.play.statistics() if self.play is not None else None


def _nothing() -> None:
    pass


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

"""Scrubs beside the running load: one at a time for each SR, at a rate, to be watched and stopped.

What `simsr.store.scrub` says in numbers of volumes is told here in VDIs, in the daemon's log as well, because that is where somebody
looks a year later. The result of the last scrub of an SR stays until the next one, or until the daemon ends.
"""

from __future__ import annotations

import logging
from contextlib import closing
from datetime import UTC, datetime

import trio

from simsr.daemon import threads
from simsr.daemon.host import Host, Mounted
from simsr.errors import SimsrError, SrInUse
from simsr.sr.damage import damage_lines
from simsr.store.scrub import Scrub

__all__ = ["Scrubbing", "ScrubUnderWay", "RATE_BYTES_S"]

log = logging.getLogger("simsr.scrub")

RATE_BYTES_S = 100 << 20
_SLEEP_MAX_S = 0.5


class ScrubUnderWay(SrInUse):
    """SR {name!r} is being scrubbed already"""

    hint = "Watch it, or stop it first: there is one scrub at a time for an SR."


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Run:
    """One scrub of one SR."""

    def __init__(self, mounted: Mounted, rate_bytes_s: int) -> None:
        self.mounted, self.rate_bytes_s = mounted, rate_bytes_s
        self.scrub = Scrub(mounted.repository.store)
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.state, self.reason = "running", ""
        self.began_time, self.ended_time = _now(), None
        self.damage: list[dict] = []

    async def run(self, task_status: trio.TaskStatus) -> None:
        task_status.started()
        repository = self.mounted.repository
        try:
            with self.scope:
                await self._work()
                self.state = "done"
            if self.scope.cancelled_caught:
                self.state = "stopped"
        except (SimsrError, OSError) as error:
            self.state, self.reason = "failed", str(error)
            log.error("the scrub of SR %s (%s) failed: %s", repository.uuid, repository.name, error)
        finally:
            if self.state == "running":  # the daemon ends
                self.state = "stopped"
            self.ended_time = _now()
            self.ended.set()

    async def _work(self) -> None:
        scrub, repository = self.scrub, self.mounted.repository
        began = trio.current_time()
        limiter = trio.CapacityLimiter(1)
        with closing(scrub.work()) as work:
            for step in work:
                if self.mounted.scope.cancel_called:  # the SR is being deleted
                    self.scope.cancel()
                if step is None:
                    await self._keep_to_rate(began)
                else:
                    with trio.CancelScope(shield=True):
                        await threads.run_sync(step, limiter=limiter)
                    await trio.lowlevel.checkpoint()
        for one in scrub.damage:
            self.damage += damage_lines(repository.store, one.volumes, one.offset, one.length, kind=one.kind, where=one.where)
        for line in self.damage:
            log.error(
                "SR %s (%s), VDI %s (%s): bytes %d to %d are damaged: %s", repository.uuid, repository.name, line["vdi"],
                line["name"], line["offset"], line["offset"] + line["length"], line["where"],
            )  # fmt: skip

    async def _keep_to_rate(self, began: float) -> None:
        """Wait until so much may have been read; at least until everybody else had a turn."""
        await trio.lowlevel.checkpoint()
        while (ahead_s := self.scrub.bytes_done / self.rate_bytes_s - (trio.current_time() - began)) > 0:
            await trio.sleep(min(ahead_s, _SLEEP_MAX_S))

    def describe(self) -> dict[str, object]:
        counts = self.scrub.describe()
        return {
            "state": self.state, "reason": self.reason, "rate_bytes_s": self.rate_bytes_s, "began_time": self.began_time,
            "ended_time": self.ended_time, **counts, "clean": self.state == "done" and self.scrub.is_clean,
            "damage": self.damage,
        }  # fmt: skip


class Scrubbing:
    """The scrubs of a host: `start`, `status`, `stop`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._runs: dict[str, _Run] = {}  # SR uuid -> the last one

    def _last(self, mounted: Mounted) -> _Run | None:
        run = self._runs.get(mounted.repository.uuid)
        return run if run is not None and run.mounted is mounted else None

    async def start(self, mounted: Mounted, rate_bytes_s: int = RATE_BYTES_S) -> dict[str, object]:
        """Begin one. Raises `ScrubUnderWay`."""
        last = self._last(mounted)
        if last is not None and not last.ended.is_set():
            raise ScrubUnderWay(name=mounted.repository.name)
        for uuid in [uuid for uuid in self._runs if uuid not in self._host.mounted]:
            del self._runs[uuid]
        run = self._runs[mounted.repository.uuid] = _Run(mounted, rate_bytes_s)
        await self._host._nursery.start(run.run)
        return run.describe()

    def status(self, mounted: Mounted) -> dict[str, object]:
        """How far the last one is, or how it ended; ``state`` is "never" if there was none."""
        run = self._last(mounted)
        if run is not None:
            return run.describe()
        counts = {"bytes_done": 0, "bytes_total": 0, "nodes": 0, "blocks": 0, "damaged_nodes": 0, "damaged_blocks": 0}
        return {
            "state": "never", "reason": "", "rate_bytes_s": 0, "began_time": None, "ended_time": None, **counts,
            "clean": False, "damage": [],
        }  # fmt: skip

    async def stop(self, mounted: Mounted) -> dict[str, object]:
        """End it, if one is under way."""
        run = self._last(mounted)
        if run is not None and not run.ended.is_set():
            run.scope.cancel()
            await run.ended.wait()
        return self.status(mounted)

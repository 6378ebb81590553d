"""Trace files as scenarios name them: relative to the scenario's own directory, read whole before anything is in force.

Reading blocks, so `prepare` and loading a scenario belong in a worker thread; `times` and `replay` then find everything read.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from scenarios.disk import DiskRules
from scenarios.schema import Replay, Rule, Scenario
from scenarios.traces import HEAD_BYTES, Record, detect, format_of, read
from scenarios.traces.own import read_info
from scenarios.traces.service_times import ServiceTimes
from simsr.errors import BadRequest, BadTrace

__all__ = ["TraceFiles"]

_Key = tuple[str, str | None, tuple[str, ...], int, bool, str | None]


class TraceFiles:
    """``directory``: where relative names begin; None where no file may be named (a rule that comes without one)."""

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        self._times: dict[_Key, ServiceTimes] = {}

    def path_of(self, name: str) -> str:
        """Raises `BadTrace` if there is no such file."""
        if self._directory is None and not os.path.isabs(name):
            raise BadTrace(source=name, where="its name", reason="it is relative, and there is no scenario file to be relative to")
        path = os.path.join(self._directory or "/", name)
        if not os.path.isfile(path) and not glob.glob(glob.escape(path) + ".blktrace.*"):
            reason = f"there is no file {path}"
            try:
                os.stat(path)
                reason = f"{path} is no file"
            except PermissionError:
                reason = f"nobody lets us look at {path}"
            except OSError:
                pass
            raise BadTrace(source=name, where="its name", reason=reason, hint="Look for a typing error, or bring the trace there.")
        return path

    def format_of(self, name: str, format: str | None) -> str:
        """The format of a trace, found out if it is not given. Raises `BadTrace`."""
        if format:
            return format_of(format, name).name
        with self._open(name) as streams:
            return detect(streams[0].read(HEAD_BYTES), name)

    @contextmanager
    def _open(self, name: str) -> Iterator[list[BinaryIO]]:
        path = self.path_of(name)
        parts = [path] if os.path.isfile(path) else sorted(glob.glob(glob.escape(path) + ".blktrace.*"))
        with ExitStack() as stack:
            try:
                yield [stack.enter_context(Path(part).open("rb")) for part in parts]
            except OSError as error:
                raise BadTrace(source=name, where="its file", reason=error.strerror or str(error)) from None

    def device_bytes(self, name: str, format: str | None, device: str | None = None, must: bool = False) -> int:
        """The size of the disk that a trace is of: as the trace says, else, if it ``must`` be known, the end of what is used. Raises `BadTrace`."""
        if self.format_of(name, format) == "simsr":
            with self._open(name) as streams:
                return read_info(streams[0], name)[0].device_bytes
        return max((one.offset + one.length for one in self.records(name, format, device)), default=0) if must else 0

    def records(self, name: str, format: str | None, device: str | None = None) -> Iterator[Record]:
        """The records of a trace, from its beginning. blktrace's files of each CPU are read together. Raises `BadTrace`."""
        format = self.format_of(name, format)
        with self._open(name) as streams:
            yield from read(streams, format, name, device)

    def times(self, name: str, format: str | None, bucket: tuple[str, ...]) -> ServiceTimes:
        """For ``trace("...")`` in a latency. Raises `BadTrace`."""
        return self._read((name, format, tuple(bucket), 0, True, None))

    def _read(self, key: _Key) -> ServiceTimes:
        if key not in self._times:
            name, format, bucket, start_ns, loop, device = key
            self._times[key] = ServiceTimes(self.records(name, format, device), bucket, name, start_ns, loop)
        return self._times[key]

    def prepare(self, scenario: Scenario) -> None:
        """Read what its rules replay. Raises `BadTrace`."""
        for rule in _rules_of(scenario):
            self.prepare_rule(rule)

    def prepare_rule(self, rule: Rule) -> None:
        spec = rule.action.replay
        if spec is None:
            return
        if spec.as_ == "latency":
            self._read(_key(spec))
        else:
            next(self.records(spec.trace, spec.format, spec.device), None)

    def replay(self, rule: Rule, disk: DiskRules) -> ServiceTimes:
        """The service times for one disk: a stream of its own over what was read."""
        return self._read(_key(rule.action.replay)).again()

    def opener(self, spec: Replay) -> Callable[[], Iterable[Record]]:
        """What a workload reads, anew for each round."""
        return lambda: self.records(spec.trace, spec.format, spec.device)


def _key(spec: Replay | None) -> _Key:
    if spec is None:
        raise BadRequest(what="the rule", reason="it replays nothing")
    return spec.trace, spec.format, tuple(spec.bucket), spec.start, spec.loop, spec.device


def _rules_of(scenario: Scenario) -> Iterator[Rule]:
    yield from scenario.rule
    for phase in scenario.phase:
        yield from phase.rule

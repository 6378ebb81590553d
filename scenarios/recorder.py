"""What happened during a scenario, in bounded memory: for each stretch of time and each phase how many requests, how many bytes, how late.

Sans-I/O: whoever serves a request says when it began and ended (`Meter`), who parks one says so, and the run says which phase it is.
Latencies are counted in bins that are 5 % wide, so a percentile is at most 2.5 % off; the least and the greatest are exact. Time is cut into
buckets. They begin short; when there would be more than `BUCKETS_MAX` of them, each two become one, so a run of a week takes the
memory of a run of a minute (some MB), and adding a request stays O(1).

A request belongs to the bucket and the phase in which it was answered.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from copy import copy
from math import log
from typing import NamedTuple

import numpy as np

__all__ = ["Recorder", "Meter", "Tally", "sum_of", "Bucket", "Interval", "Note", "BINS", "BUCKETS_MAX", "bin_of", "bin_begins_ns"]

BUCKETS_MAX = 600
_FIRST_BUCKET_NS = 1_000_000
_SHORTEST_NS = 1000
_WIDTH = 1.05
_PER_E = 1 / log(_WIDTH)
_BASE = log(_SHORTEST_NS) * _PER_E
BINS = 452
"""1 us to an hour; whatever is beyond is in the first or the last."""

INTERVALS_MAX = 1000
NOTES_MAX = 1000
NAMES_MAX = 200
OTHERS = "(others)"


def bin_of(latency_ns: int) -> int:
    if latency_ns <= _SHORTEST_NS:
        return 0
    number = int(log(latency_ns) * _PER_E - _BASE)
    return number if number < BINS else BINS - 1


def bin_begins_ns(number: float) -> float:
    """The shortest latency of a bin. The bin ends where the next one begins."""
    return _SHORTEST_NS * _WIDTH**number


class Tally:
    """Requests that have something in common, for one operation. ``bytes`` are those of requests that were done."""

    __slots__ = ("count", "bytes", "errors", "sum_ns", "min_ns", "max_ns", "bins")

    def __init__(self) -> None:
        self.count = self.bytes = self.errors = self.sum_ns = self.max_ns = 0
        self.min_ns = 1 << 62
        self.bins = array("Q", bytes(8 * BINS))

    def add(self, latency_ns: int, at_bin: int, length: int, failed: bool) -> None:
        self.count += 1
        self.sum_ns += latency_ns
        self.bins[at_bin] += 1
        if latency_ns > self.max_ns:
            self.max_ns = latency_ns
        if latency_ns < self.min_ns:
            self.min_ns = latency_ns
        if failed:
            self.errors += 1
        else:
            self.bytes += length

    def merge(self, other: Tally) -> None:
        self.count += other.count
        self.bytes += other.bytes
        self.errors += other.errors
        self.sum_ns += other.sum_ns
        self.min_ns, self.max_ns = min(self.min_ns, other.min_ns), max(self.max_ns, other.max_ns)
        np.frombuffer(self.bins, np.uint64)[:] += np.frombuffer(other.bins, np.uint64)

    def copy(self) -> Tally:
        other = Tally.__new__(Tally)  # copy.copy takes ten times as long, and there are thousands
        other.count, other.bytes, other.errors = self.count, self.bytes, self.errors
        other.sum_ns, other.min_ns, other.max_ns, other.bins = self.sum_ns, self.min_ns, self.max_ns, self.bins[:]
        return other

    def percentile_ns(self, share: float) -> float | None:
        """The latency that ``share`` of the requests did not exceed; None without requests. O(bins)."""
        if not self.count:
            return None
        if share >= 1:
            return float(self.max_ns)
        sums = np.cumsum(np.frombuffer(self.bins, np.uint64))
        wanted = share * self.count
        number = int(np.searchsorted(sums, max(wanted, 1)))
        here, below = int(self.bins[number]), int(sums[number]) - int(self.bins[number])
        within = min(max((wanted - below) / here, 0.0), 1.0)
        return min(max(bin_begins_ns(number + within), float(self.min_ns)), float(self.max_ns))


def sum_of(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total


class Bucket:
    """A stretch of time. ``depth_max``, ``hanging_max``: most at a time; ``depth``, ``hanging``: at its end."""

    __slots__ = ("tallies", "hits", "depth", "depth_max", "hanging", "hanging_max")

    def __init__(self, depth: int, hanging: int) -> None:
        self.tallies: dict[str, Tally] = {}
        self.hits: dict[str, int] = {}
        self.depth = self.depth_max = depth
        self.hanging = self.hanging_max = hanging

    def copy(self) -> Bucket:
        other = Bucket(self.depth, self.hanging)
        other.depth_max, other.hanging_max = self.depth_max, self.hanging_max
        other.tallies = {op: tally.copy() for op, tally in self.tallies.items()}
        other.hits = dict(self.hits)
        return other

    def merge(self, later: Bucket) -> None:
        for op, tally in later.tallies.items():
            if op in self.tallies:
                self.tallies[op].merge(tally)
            else:
                self.tallies[op] = tally
        for rule, hits in later.hits.items():
            self.hits[rule] = self.hits.get(rule, 0) + hits
        self.depth, self.hanging = later.depth, later.hanging
        self.depth_max, self.hanging_max = max(self.depth_max, later.depth_max), max(self.hanging_max, later.hanging_max)


class Interval(NamedTuple):
    """When a phase was in force."""

    name: str
    began_ns: int
    ended_ns: int | None


class Note(NamedTuple):
    at_ns: int
    what: str
    name: str


class _Waiting:
    """How long requests of one operation of one disk have waited without any of them being answered."""

    __slots__ = ("count", "since_ns", "gap_ns", "gap_at_ns")

    def __init__(self) -> None:
        self.count = self.since_ns = self.gap_ns = self.gap_at_ns = 0

    def ends(self, now: int) -> None:
        if now - self.since_ns > self.gap_ns:
            self.gap_ns, self.gap_at_ns = now - self.since_ns, self.since_ns
        self.since_ns = now


class Meter:
    """The requests of one disk: `begin` each, and `end` it, or `abandon` it when its client did."""

    def __init__(self, recorder: Recorder, disk: str) -> None:
        self._recorder, self.disk = recorder, disk
        self.counts: dict[str, list[int]] = {}  # op -> [count, bytes, errors]
        self.waiting: dict[str, _Waiting] = {}

    def frozen(self) -> Meter:
        other = copy(self)
        other.counts = {op: list(counts) for op, counts in self.counts.items()}
        other.waiting = {op: copy(waiting) for op, waiting in self.waiting.items()}
        return other

    def begin(self, op: str, now: int) -> None:
        recorder, waiting = self._recorder, self.waiting.get(op)
        if recorder.ended_ns is not None:
            return
        if waiting is None:
            waiting = self.waiting[op] = _Waiting()
            self.counts[op] = [0, 0, 0]
        if not waiting.count:
            waiting.since_ns = now
        waiting.count += 1
        recorder.depth += 1
        bucket = recorder.bucket(now)
        if recorder.depth > bucket.depth_max:
            bucket.depth_max = recorder.depth

    def end(self, op: str, began_ns: int, now: int, length: int, failed: bool, dropped: bool = False) -> None:
        """The request was answered. ``failed``: with an error; ``dropped``: the connection was dropped, perhaps behind an error."""
        recorder = self._recorder
        if recorder.ended_ns is not None:
            return
        self._less(op, now)
        if dropped:
            recorder.disconnects += 1
            if not failed:
                return
        if op not in ("read", "write", "trim", "zero"):
            length = 0
        counts = self.counts[op]
        counts[0] += 1
        counts[1] += 0 if failed else length
        counts[2] += failed
        latency_ns = now - began_ns
        at_bin, bucket = bin_of(latency_ns), recorder.bucket(now)
        for tallies in (bucket.tallies, recorder.phase_tallies):
            tally = tallies.get(op)
            if tally is None:
                tally = tallies[op] = Tally()
            tally.add(latency_ns, at_bin, length, failed)

    def abandon(self, op: str, now: int) -> None:
        """Nobody waits for the request any more."""
        if self._recorder.ended_ns is None:
            self._less(op, now)

    def _less(self, op: str, now: int) -> None:
        waiting = self.waiting[op]
        waiting.ends(now)
        waiting.count -= 1
        self._recorder.depth -= 1

    def fired(self, rules: Iterable[str], now: int) -> None:
        """Rules have hit a request."""
        recorder = self._recorder
        if recorder.ended_ns is None:
            hits = recorder.bucket(now).hits
            for rule in rules:
                rule = recorder.rule_name(rule)
                hits[rule] = hits.get(rule, 0) + 1


class Recorder:
    """Times are absolute nanoseconds of the caller's clock, never going back; ``began_ns`` is the scenario's beginning."""

    def __init__(self, began_ns: int) -> None:
        self.began_ns, self.ended_ns = began_ns, None
        self.width_ns = _FIRST_BUCKET_NS
        self.buckets: dict[int, Bucket] = {}
        self.meters: dict[str, Meter] = {}
        self.depth = self.disconnects = 0
        self.hangs = Tally()
        self.lags = Tally()
        self.intervals: list[Interval] = []
        self.notes: list[Note] = []
        self.events: dict[str, int] = {}
        self.left_out = 0  # phases and notes beyond what is kept
        self.phases: dict[str, dict[str, Tally]] = {"": {}}
        self.phase_tallies = self.phases[""]
        self._hanging: dict[Hashable, int] = {}
        self._rules: set[str] = set()
        self._bucket = Bucket(0, 0)
        self._bucket_ends_ns = began_ns

    def meter(self, disk: str) -> Meter:
        """For the disk of that name: the same one each time."""
        if disk not in self.meters:
            self.meters[disk] = Meter(self, disk)
        return self.meters[disk]

    def rule_name(self, rule: str) -> str:
        """The name to count it under: live rules may come and go without end."""
        if rule in self._rules:
            return rule
        if len(self._rules) >= NAMES_MAX:
            return OTHERS
        self._rules.add(rule)
        return rule

    # Time.

    def bucket(self, now: int) -> Bucket:
        """The one that ``now`` is in."""
        return self._bucket if now < self._bucket_ends_ns else self._turn(now)

    def _turn(self, now: int) -> Bucket:
        self._leave()
        elapsed_ns = now - self.began_ns
        while elapsed_ns >= BUCKETS_MAX * self.width_ns:
            self._merge_pairs()
        number = elapsed_ns // self.width_ns
        if number not in self.buckets:
            self.buckets[number] = Bucket(self.depth, len(self._hanging))
        self._bucket = self.buckets[number]
        self._bucket_ends_ns = self.began_ns + (number + 1) * self.width_ns
        return self._bucket

    def _leave(self) -> None:
        self._bucket.depth, self._bucket.hanging = self.depth, len(self._hanging)

    def _merge_pairs(self) -> None:
        merged: dict[int, Bucket] = {}
        for number in sorted(self.buckets):
            if number // 2 in merged:
                merged[number // 2].merge(self.buckets[number])
            else:
                merged[number // 2] = self.buckets[number]
        self.buckets = merged
        self.width_ns *= 2

    def enter(self, phase: str | None, now: int) -> None:
        """A phase has begun; None: the last one is over."""
        if self.ended_ns is not None:
            return
        if self.intervals and self.intervals[-1].ended_ns is None:
            self.intervals[-1] = self.intervals[-1]._replace(ended_ns=now)
        if len(self.intervals) < INTERVALS_MAX:
            if phase is not None:
                self.intervals.append(Interval(phase, now, None))
        else:
            self.left_out += 1
        self.phase_tallies = self.phases.setdefault(phase or "", {})

    def note(self, what: str, name: str, now: int) -> None:
        """Something happened that people want to see on the timeline."""
        if what == "event":
            self.events[name] = self.events.get(name, 0) + 1
        if len(self.notes) < NOTES_MAX:
            self.notes.append(Note(now, what, name))
        else:
            self.left_out += 1

    def close(self, now: int) -> None:
        """The scenario is over: what is said from now on changes nothing."""
        if self.ended_ns is None:
            self.bucket(now)
            self._leave()
            if self.intervals and self.intervals[-1].ended_ns is None:
                self.intervals[-1] = self.intervals[-1]._replace(ended_ns=now)
            for began_ns in self._hanging.values():
                self._hung(began_ns, now)
            for meter in self.meters.values():
                for waiting in meter.waiting.values():
                    if waiting.count:
                        waiting.ends(now)
            self.ended_ns = now

    def frozen(self) -> Recorder:
        """As it is now, for whoever looks at it while it goes on: itself if it is closed. Some milliseconds."""
        if self.ended_ns is not None:
            return self
        self._leave()
        frozen = copy(self)
        frozen.buckets = {number: bucket.copy() for number, bucket in self.buckets.items()}
        frozen.phases = {phase: {op: tally.copy() for op, tally in tallies.items()} for phase, tallies in self.phases.items()}
        frozen.meters = {disk: meter.frozen() for disk, meter in self.meters.items()}
        frozen.hangs, frozen.lags, frozen._hanging = self.hangs.copy(), self.lags.copy(), dict(self._hanging)
        frozen.intervals, frozen.notes, frozen.events = list(self.intervals), list(self.notes), dict(self.events)
        return frozen

    # Hanging.

    @property
    def hanging(self) -> int:
        """Requests that hang now."""
        return len(self._hanging)

    def park(self, who: Hashable, now: int) -> None:
        self._hanging[who] = now
        bucket = self.bucket(now)
        bucket.hanging_max = max(bucket.hanging_max, len(self._hanging))

    def unpark(self, who: Hashable, now: int) -> None:
        began_ns = self._hanging.pop(who)
        if self.ended_ns is None:
            self.bucket(now)
            self._hung(began_ns, now)

    def _hung(self, began_ns: int, now: int) -> None:
        self.hangs.add(now - began_ns, bin_of(now - began_ns), 0, False)

    def hung_max_ns(self, now: int) -> int:
        """The longest time that a request has hung, or hangs now."""
        hanging = [] if self.ended_ns is not None else [now - began_ns for began_ns in self._hanging.values()]
        return max(self.hangs.max_ns, *hanging, 0)

    # What came of it.

    def lag(self, lag_ns: int) -> None:
        """A replayed workload made a request so much later than its trace did."""
        self.lags.add(lag_ns, bin_of(lag_ns), 0, False)

    def operations(self) -> list[str]:
        return sorted({op for tallies in self.phases.values() for op in tallies})

    def tally(self, op: str | None, phase: str | None) -> Tally:
        """All requests of an operation (None: of any) in the phases of that name (None: always)."""
        chosen = self.phases.values() if phase is None else [self.phases.get(phase, {})]
        return sum_of(tally for tallies in chosen for name, tally in tallies.items() if op in (None, name))

    def seconds(self, phase: str | None, now: int) -> float:
        """How long the run, or the phase, has been in force."""
        end_ns = now if self.ended_ns is None else self.ended_ns
        if phase is None:
            return (end_ns - self.began_ns) / 1e9
        return sum((i.ended_ns or end_ns) - i.began_ns for i in self.intervals if i.name == phase) / 1e9

    def gap(self, op: str, now: int) -> tuple[int, int, str] | None:
        """(length, when it began, disk) of the longest time in which requests of ``op`` waited at one disk and none was answered."""
        found = []
        for meter in self.meters.values():
            if (waiting := meter.waiting.get(op)) is None:
                continue
            found.append((waiting.gap_ns, waiting.gap_at_ns, meter.disk))
            if waiting.count and self.ended_ns is None:
                found.append((now - waiting.since_ns, waiting.since_ns, meter.disk))
        return max(found, default=None)

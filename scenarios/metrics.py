"""What expectations can be about: every name of their language, what kind of value it has, and how it is found in what was recorded.

A metric without a function is known to the language but cannot be seen from inside a daemon; whoever runs the scenario from outside (a
test, a hypervisor) looks at it. A metric that has nothing to look at, as the latency of reads when nobody has read, raises `Unknown`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from scenarios.recorder import Recorder, Tally

__all__ = ["METRICS", "Metric", "Seen", "Unknown"]


class Unknown(Exception):
    """Why there is no value."""


class Seen(NamedTuple):
    """What a run has recorded by ``now``. ``hits``: of each rule; ``events``: how often each happened; ``promised``, ``lost``: writes
    (`scenarios.promises`); ``power_cuts``: how many."""

    recorder: Recorder
    now: int
    hits: Mapping[str, int]
    events: Mapping[str, int]
    promised: int
    lost: int
    power_cuts: int

    @property
    def hanging(self) -> int:
        """Requests that hang now."""
        return 0 if self.recorder.ended_ns is not None else self.recorder.hanging


class Metric(NamedTuple):
    """``kind`` of its value: time (ns), count, bytes, rate (bytes a second), number, or word (then ``words`` are all it can be).
    ``args``: what its arguments name; those in brackets may be left out."""

    kind: str
    about: str
    args: tuple[str, ...] = ()
    find: Callable[..., float] | None = None
    words: tuple[str, ...] = ()


def _answered(seen: Seen, op: str | None, phase: str | None) -> Tally:
    tally = seen.recorder.tally(op, phase)
    if not tally.count:
        where = f" in phase {phase!r}" if phase else ""
        raise Unknown(f"no {op or 'request'} was answered{where}")
    return tally


def _percentile(share: float) -> Callable[..., float]:
    return lambda seen, op, phase=None: _answered(seen, op, phase).percentile_ns(share)


def _client(find: Callable[[Seen], float]) -> Callable[[Seen], float]:
    """Nothing can be said of clients that were not there."""

    def value(seen: Seen) -> float:
        if not any(meter.waiting for meter in seen.recorder.meters.values()):
            raise Unknown("no request was made of a disk of the scenario")
        return find(seen)

    return value


def _gap(seen: Seen, op: str) -> float:
    found = seen.recorder.gap(op, seen.now)
    if found is None:
        raise Unknown(f"no {op} was asked for")
    return found[0]


def _per_second(field: str) -> Callable[..., float]:
    def value(seen: Seen, op: str, phase: str | None = None) -> float:
        seconds = seen.recorder.seconds(phase, seen.now)
        if not seconds:
            raise Unknown("it took no time")
        return getattr(_answered(seen, op, phase), field) / seconds

    return value


def _lag(find: Callable[[Tally], float]) -> Callable[[Seen], float]:
    def value(seen: Seen) -> float:
        if not seen.recorder.lags.count:
            raise Unknown("no workload was replayed")
        return find(seen.recorder.lags)

    return value


def _lost(seen: Seen) -> float:
    if not seen.promised:
        raise Unknown("no write was flushed")
    return seen.lost


_OP = ("op", "[phase]")
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}

METRICS: dict[str, Metric] = {
    "client.requests": Metric("count", "requests that were answered", (), lambda seen: seen.recorder.tally(None, None).count),
    "client.errors": Metric(
        "count", "requests that were answered with an error", (), _client(lambda seen: seen.recorder.tally(None, None).errors)
    ),
    "client.disconnects": Metric("count", "connections that were dropped", (), _client(lambda seen: seen.recorder.disconnects)),
    "count()": Metric(
        "count", "requests answered", ("[op]", "[phase]"), lambda seen, op=None, phase=None: seen.recorder.tally(op, phase).count
    ),
    "errors()": Metric("count", "of these, with an error", _OP, lambda seen, op, phase=None: _answered(seen, op, phase).errors),
    **{
        f"{name}()": Metric("time", f"latency that {100 * share:g} % did not exceed", _OP, _percentile(share))
        for name, share in _PERCENTILES.items()
    },
    "min()": Metric("time", "least latency", _OP, lambda seen, op, phase=None: _answered(seen, op, phase).min_ns),
    "mean()": Metric(
        "time", "mean latency", _OP, lambda seen, op, phase=None: (t := _answered(seen, op, phase)).sum_ns / t.count
    ),
    "max()": Metric("time", "greatest latency", _OP, lambda seen, op, phase=None: _answered(seen, op, phase).max_ns),
    "rate()": Metric("rate", "bytes a second", _OP, _per_second("bytes")),
    "iops()": Metric("number", "requests a second", _OP, _per_second("count")),
    "gap().max": Metric("time", "longest time in which requests waited and none was answered", ("op",), _gap),
    "hung.max": Metric("time", "longest hang", (), _client(lambda seen: seen.recorder.hung_max_ns(seen.now))),
    "hung.count": Metric(
        "count", "requests that have hung", (), _client(lambda seen: seen.recorder.hangs.count + seen.hanging)
    ),
    "depth.max": Metric(
        "count", "most requests at a time", (), _client(lambda seen: max(b.depth_max for b in seen.recorder.buckets.values()))
    ),
    "hits()": Metric("count", "how often a rule has hit", ("rule",), lambda seen, rule: seen.hits.get(rule, 0)),
    "events()": Metric("count", "how often an event has happened", ("event",), lambda seen, event: seen.events.get(event, 0)),
    "power_cuts": Metric("count", "power cuts", (), lambda seen: seen.power_cuts),
    "flushed_writes.lost": Metric("count", "writes that were flushed, or FUA, and lost all the same", (), _lost),
    **{
        f"replay.lag.{name}": Metric(
            "time", "how late requests of replayed workloads were made", (), _lag(lambda lags, share=share: lags.percentile_ns(share))
        )
        for name, share in {**_PERCENTILES, "max": 1.0}.items()
    },
    "group.snapshot": Metric("word", "which disks of a VM have the snapshot", words=("all", "none", "some")),
    "group.state": Metric("word", "which disks of a VM were reverted", words=("all-old", "all-new", "mixed")),
    "verify.digest()": Metric("word", "whether the disk holds what was acknowledged", ("word",), words=("ok", "broken")),
    "read()": Metric("word", "what a disk reads as", ("word",), words=("snapshot", "before")),
    "undo()": Metric("word", "what undoing gives", ("word",), words=("before",)),
    "vdi.uuid": Metric("word", "the disk's uuid"),
    "vdi.location": Metric("word", "the disk's location"),
}

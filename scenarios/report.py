"""The report of a run, as plain data for JSON and for whoever draws it: what was expected, what happened when, how late requests were.

Times are seconds from the beginning of the run, latencies seconds. Lists of ``timeline`` have one entry for each stretch of ``bucket_s``.
Cells of ``latency`` are [stretch, row, requests]; row r is latencies from ``shortest_s * ratio**r`` on, and rows without requests are left out.
Its ``percentiles`` are [from stretch, to stretch, median, 99th percentile, greatest] of a few stretches together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from scenarios.checks import expectations
from scenarios.expectations import BROKEN, MET, NOT_EVALUATED, Outcome
from scenarios.metrics import Seen
from scenarios.recorder import BINS, Bucket, Recorder, Tally, bin_begins_ns, sum_of
from scenarios.request import OPS
from scenarios.schema import Scenario

__all__ = ["Recording", "outcomes_of", "verdict_of", "report_of"]

_NS_PER_S = 1e9
_BINS_PER_ROW = 3
_POINTS_MAX = 120
_SHARES = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99, "p999_s": 0.999}


class Recording(NamedTuple):
    """Everything that a report is made of; nothing of it changes any more. ``disks``: (uuid, name, size in bytes, clients: (kind, durability))."""

    scenario: Scenario
    seed: int
    began: str
    seen: Seen
    rules: list[dict[str, Any]]
    disks: list[tuple[str, str, int, list[tuple[str, str]]]]


def outcomes_of(scenario: Scenario, seen: Seen) -> list[dict[str, Any]]:
    """What has become of what the scenario expects, so far."""
    return [_outcome(expectation.evaluate(seen)) for expectation in expectations(scenario)]


def _outcome(outcome: Outcome) -> dict[str, Any]:
    found = [{"what": what, "value": value} for what, value in outcome.found]
    return {"that": outcome.that, "verdict": outcome.verdict, "found": found, "reason": outcome.reason}


def verdict_of(outcomes: Sequence[dict[str, Any]]) -> str:
    """Of all together: broken if one is, met if all are, else not evaluated; "" where nothing is expected."""
    verdicts = {outcome["verdict"] for outcome in outcomes}
    if not verdicts:
        return ""
    return BROKEN if BROKEN in verdicts else NOT_EVALUATED if NOT_EVALUATED in verdicts else MET


def report_of(recording: Recording) -> dict[str, Any]:
    """O(buckets * operations); some milliseconds."""
    scenario, seen = recording.scenario, recording.seen
    recorder, now = seen.recorder, seen.now
    outcomes = outcomes_of(scenario, seen)
    whole = recorder.tally(None, None)
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "seed": recording.seed,
        "began": recording.began,
        "is_running": recorder.ended_ns is None,
        "duration_s": recorder.seconds(None, now),
        "verdict": verdict_of(outcomes),
        "expectations": outcomes,
        "requests": whole.count,
        "errors": whole.errors,
        "disconnects": recorder.disconnects,
        "power_cuts": seen.power_cuts,
        "phases": [
            {"name": one.name, "begins_s": _since(recorder, one.began_ns), "ends_s": _since(recorder, one.ended_ns or now)}
            for one in recorder.intervals
        ],
        "events": [{"at_s": _since(recorder, note.at_ns), "what": note.what, "name": note.name} for note in recorder.notes],
        "left_out": recorder.left_out,
        "operations": _operations(recorder),
        "hangs": {**_latencies(recorder.hangs), "now": seen.hanging, "max_s": recorder.hung_max_ns(now) / _NS_PER_S},
        "gaps": _gaps(recorder, now, {uuid: name for uuid, name, *_ in recording.disks}),
        "flushed_writes": {"promised": seen.promised, "lost": seen.lost},
        "replay_lag": _latencies(recorder.lags) if recorder.lags.count else None,
        "rules": recording.rules,
        "disks": [_disk(recorder, *disk) for disk in recording.disks],
        "timeline": _timeline(recorder, now),
        "latency": _heat(recorder),
    }


def _since(recorder: Recorder, at_ns: int) -> float:
    return max(0, at_ns - recorder.began_ns) / _NS_PER_S


def _latencies(tally: Tally) -> dict[str, Any]:
    some = bool(tally.count)
    return {
        "count": tally.count,
        "min_s": tally.min_ns / _NS_PER_S if some else None,
        "mean_s": tally.sum_ns / tally.count / _NS_PER_S if some else None,
        **{name: tally.percentile_ns(share) / _NS_PER_S if some else None for name, share in _SHARES.items()},
        "max_s": tally.max_ns / _NS_PER_S if some else None,
    }


def _operations(recorder: Recorder) -> list[dict[str, Any]]:
    """One line for each operation, then one for each phase that it was met in."""
    lines = []
    for op in sorted(recorder.operations(), key=OPS.index):
        phases = [phase for phase, tallies in recorder.phases.items() if op in tallies]
        for phase in [None, *(phases if len(recorder.phases) > 1 else [])]:
            tally = recorder.tally(op, phase)
            steps = [0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0] if phase is None else []
            lines.append(
                {
                    "op": op,
                    "phase": phase,
                    "bytes": tally.bytes,
                    "errors": tally.errors,
                    **_latencies(tally),
                    "quantiles": [[share, (tally.percentile_ns(share) if share else tally.min_ns) / _NS_PER_S] for share in steps
                                  if share == 1 or tally.count * (1 - share) >= 1],
                }
            )  # fmt: skip
    return lines


def _gaps(recorder: Recorder, now: int, names: dict[str, str]) -> list[dict[str, Any]]:
    found = []
    for op in OPS:
        if gap := recorder.gap(op, now):
            length_ns, at_ns, disk = gap
            found.append(
                {"op": op, "max_s": length_ns / _NS_PER_S, "at_s": _since(recorder, at_ns), "vdi": disk, "name": names.get(disk, "")}
            )
    return found


def _disk(recorder: Recorder, uuid: str, name: str, size_bytes: int, clients: list[tuple[str, str]]) -> dict[str, Any]:
    counts = recorder.meters[uuid].counts if uuid in recorder.meters else {}
    return {
        "vdi": uuid,
        "name": name,
        "size_bytes": size_bytes,
        "clients": [{"kind": kind, "durability": durability} for kind, durability in clients],
        "requests": {op: count for op, (count, _, _) in counts.items()},
        "bytes": {op: size for op, (_, size, _) in counts.items() if size},
        "errors": sum(errors for _, _, errors in counts.values()),
    }


def _timeline(recorder: Recorder, now: int) -> dict[str, Any]:
    end_ns = now if recorder.ended_ns is None else recorder.ended_ns
    length = (max(end_ns, recorder.began_ns) - recorder.began_ns) // recorder.width_ns + 1
    length = max(length, *(number + 1 for number in recorder.buckets), 1) if recorder.buckets else length
    ops, rules = recorder.operations(), sorted({rule for bucket in recorder.buckets.values() for rule in bucket.hits})
    answered, moved = {op: [0] * length for op in ops}, {op: [0] * length for op in ops}
    hits = {rule: [0] * length for rule in rules}
    errors, depth, hanging = [0] * length, [0] * length, [0] * length
    last = Bucket(0, 0)
    for number in range(length):
        bucket = recorder.buckets.get(number)
        if bucket is None:
            depth[number], hanging[number] = last.depth, last.hanging
            continue
        last = bucket
        depth[number], hanging[number] = bucket.depth_max, bucket.hanging_max
        for op, tally in bucket.tallies.items():
            answered[op][number], moved[op][number] = tally.count, tally.bytes
            errors[number] += tally.errors
        for rule, count in bucket.hits.items():
            hits[rule][number] = count
    return {
        "bucket_s": recorder.width_ns / _NS_PER_S,
        "requests": answered,
        "bytes": {op: sizes for op, sizes in moved.items() if any(sizes)},
        "errors": errors,
        "depth": depth,
        "hanging": hanging,
        "hits": hits,
    }


def _heat(recorder: Recorder) -> dict[str, Any]:
    """How many requests of each operation were how late, when; and the percentiles of each stretch of time."""
    group = -(-(max(recorder.buckets, default=0) + 1) // _POINTS_MAX)
    cells: dict[str, list[list[int]]] = {}
    lines: dict[str, list[list[Any]]] = {}
    for op in recorder.operations():
        tallies = [(number, bucket.tallies[op]) for number, bucket in sorted(recorder.buckets.items()) if op in bucket.tallies]
        table = np.array([np.frombuffer(tally.bins, np.uint64) for _, tally in tallies]).astype(np.int64)
        padded = np.pad(table, ((0, 0), (0, -BINS % _BINS_PER_ROW)))
        rows = padded.reshape(len(tallies), -1, _BINS_PER_ROW).sum(axis=2)
        numbers = [number for number, _ in tallies]
        cells[op] = [[numbers[at], int(row), int(rows[at, row])] for at, row in zip(*rows.nonzero())]
        lines[op] = []
        for place, several in groupby(tallies, lambda pair: pair[0] // group):
            tally = sum_of(one for _, one in several)
            shares = (tally.percentile_ns(share) / _NS_PER_S for share in (0.5, 0.99))
            lines[op].append([place * group, (place + 1) * group, *shares, tally.max_ns / _NS_PER_S])
    return {
        "shortest_s": bin_begins_ns(0) / _NS_PER_S,
        "ratio": bin_begins_ns(_BINS_PER_ROW) / bin_begins_ns(0),
        "cells": cells,
        "percentiles": lines,
    }

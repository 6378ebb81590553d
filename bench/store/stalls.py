"""4 KiB random writes at depth 32 while checkpoints are written, and while none is.

Both come from one run, so both see the same machine: fio logs the latency of every write with the time of its end, the daemon notes
when each checkpoint began and ended (`noted_daemon`), and a write counts as "during" if it was under way in any part of one.
Checkpoints come by themselves, every 256 MiB of log.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import fio
from bench.failure import BenchFailure
from bench.operations import Finding
from bench.servers import simsrd
from bench.store.disks import random_disk
from bench.store.scale import Scale, Tell

__all__ = ["stalls"]

AT_MOST = 3.0
_LEAST_WRITES = 2000  # for a 99.9th percentile


def stalls(directory: Path, scale: Scale, tell: Tell) -> Iterator[Finding]:
    """Yield p99.9 during checkpoints, without, and the ratio: the median of the rounds."""
    notes = directory / "checkpoints"
    options = {"module": "bench.store.noted_daemon", "environment": {"SIMSR_BENCH_CHECKPOINTS": str(notes)}}
    during, without = [], []
    with simsrd(directory, **options) as daemon:
        vdi = random_disk(daemon, scale.depth_bytes, tell)
        for number in range(scale.rounds):
            ends_ms, latencies_ns = fio.write_latencies(vdi["nbd_uri"], scale.checkpoint_seconds, number + 1, directory)
            spans = np.loadtxt(notes, ndmin=2) * 1000 if notes.exists() else np.zeros((0, 2))
            inside = _inside(ends_ms, latencies_ns, spans)
            enough = min(int(inside.sum()), int((~inside).sum())) >= (_LEAST_WRITES if scale.rounds > 1 else 1)
            if not enough:
                raise BenchFailure(f"of {len(inside)} writes {inside.sum()} were during a checkpoint: too few to compare")
            during.append(float(np.percentile(latencies_ns[inside], 99.9)) / 1e6)
            without.append(float(np.percentile(latencies_ns[~inside], 99.9)) / 1e6)
            tell(
                f"stalls round {number + 1}/{scale.rounds}: p99.9 {during[-1]:.2f} ms during checkpoints ({inside.mean():.0%} of "
                f"{len(inside)} writes), {without[-1]:.2f} ms without; longest {latencies_ns.max() / 1e6:.1f} ms"
            )
    yield Finding("stalls", "p99.9 of 4k writes, depth 32, no checkpoint", statistics.median(without), "ms")
    yield Finding("stalls", "p99.9 of 4k writes, depth 32, during a checkpoint", statistics.median(during), "ms")
    ratio = statistics.median(one / other for one, other in zip(during, without, strict=True))
    yield Finding("stalls", "during against without", ratio, "x", at_most=AT_MOST)


def _inside(ends_ms: np.ndarray, latencies_ns: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Which writes were under way in any part of a span. fio logs whole milliseconds, so the ends are wide by one."""
    inside = np.zeros(len(ends_ms), dtype=bool)
    begins_ms = ends_ms - latencies_ns / 1e6
    for first, last in spans:
        inside |= (ends_ms + 1 >= first) & (begins_ms <= last)
    return inside

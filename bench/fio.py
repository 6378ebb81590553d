"""fio with its ``nbd`` engine: the one client that all servers are measured with."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.failure import BenchFailure

__all__ = [
    "Speed", "background_load", "burst", "fill_at_random", "fill_in_order", "fill_sparsely", "load_until_killed", "measure",
    "overwrite_twice", "write_latencies",
]  # fmt: skip

RAMP_MS = 300
SLOWEST_BYTES_PER_S = 2 << 20
"""A fill or a run that is slower than this counts as hung."""


@dataclass(frozen=True)
class Speed:
    iops: float
    bytes_per_s: float

    def in_unit(self, unit: str) -> float:
        return self.bytes_per_s / 1e6 if unit == "MB/s" else self.iops


def measure(uri: str, options: Sequence[str], seconds: float, seed: int) -> Speed:
    """Run a workload for ``seconds`` and return its speed.

    The same seed gives the same offsets, so all servers of a round do the same work. Dirty pages are written out
    first: what an earlier run left behind is not to be paid by this one.
    """
    os.sync()
    timing = ("--time_based", _runtime(seconds), f"--ramp_time={RAMP_MS}ms")
    return _run(uri, (*options, *timing, f"--randseed={seed}"), seconds + 120)


def _runtime(seconds: float) -> str:
    """In milliseconds: of a fraction of seconds fio takes the whole ones, or much less."""
    return f"--runtime={round(seconds * 1000)}ms"


def burst(uri: str, options: Sequence[str], io_bytes: int, seed: int) -> Speed:
    """Run a workload from its first request until ``io_bytes`` are done, and return its speed."""
    os.sync()
    timeout_s = 120 + io_bytes / SLOWEST_BYTES_PER_S
    return _run(uri, (*options, f"--io_size={io_bytes}", f"--randseed={seed}", "--refill_buffers"), timeout_s)


def fill_sparsely(uri: str, size_bytes: int, every_bytes: int, run_bytes: int, runs: int) -> None:
    """Write 4 KiB at the beginning of each ``every_bytes``, and ``runs`` long runs."""
    timeout_s = 600 + size_bytes / every_bytes / 1000
    skip = (every_bytes >> 10) - 4
    blocks = ("--bs=4k", "--iodepth=32", f"--io_size={size_bytes // every_bytes * 4096}", f"--size={size_bytes}")
    _run(uri, (f"--rw=write:{skip}k", *blocks, "--refill_buffers", "--end_fsync=1"), timeout_s)
    for run in range(runs):
        where = (f"--offset={size_bytes // runs * run}", f"--size={run_bytes}")
        _run(uri, ("--rw=write", "--bs=1M", "--iodepth=4", *where, "--refill_buffers", "--end_fsync=1"), timeout_s)


def fill_in_order(uri: str, size_bytes: int) -> None:
    """Write the whole disk with data that no server can compress or share."""
    options = ("--rw=write", "--bs=1M", "--iodepth=4", "--refill_buffers", "--end_fsync=1")
    _run(uri, options, 120 + size_bytes / SLOWEST_BYTES_PER_S)


def fill_at_random(uri: str, size_bytes: int, seed: int, io_bytes: int | None = None) -> None:
    """Write ``io_bytes`` in blocks of 4 KiB; without it every block of the disk, each once, in random order."""
    io_bytes = io_bytes or size_bytes
    options = ("--rw=randwrite", "--bs=4k", "--iodepth=32", "--refill_buffers", "--end_fsync=1")
    _run(uri, (*options, f"--io_size={io_bytes}", f"--randseed={seed}"), 120 + io_bytes / SLOWEST_BYTES_PER_S)


def overwrite_twice(uri: str, size_bytes: int) -> None:
    """Bring a disk into its steady state: every block has been overwritten twice, in two random orders."""
    for seed in (1001, 1002):
        fill_at_random(uri, size_bytes, seed)


def write_latencies(uri: str, seconds: float, seed: int, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write 4 KiB blocks at random at depth 32 and return for each write when it ended (milliseconds since the epoch) and how long it
    took (nanoseconds)."""
    prefix = directory / "latencies"
    options = ("--rw=randwrite", "--bs=4k", "--iodepth=32", "--time_based", _runtime(seconds), f"--randseed={seed}")
    logs = (f"--write_lat_log={prefix}", "--log_unix_epoch=1", "--per_job_logs=0", "--disable_slat=1", "--disable_clat=1")
    _run(uri, (*options, *logs), seconds + 120)
    log = directory / "latencies_lat.log"
    table = np.loadtxt(log, delimiter=",", usecols=(0, 1), ndmin=2)
    for path in directory.glob("latencies_*.log"):
        path.unlink()
    return table[:, 0], table[:, 1]


@contextlib.contextmanager
def load_until_killed(uri: str) -> Iterator[None]:
    """Write 4 KiB blocks at random as fast as it goes; the server may die meanwhile."""
    options = ("--rw=randwrite", "--bs=4k", "--iodepth=32", "--time_based", "--runtime=3600")
    load = subprocess.Popen(_command(uri, options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        load.terminate()
        load.wait()


@contextlib.contextmanager
def background_load(uri: str, write_iops: int) -> Iterator[None]:
    """Write 4 KiB blocks at random, ``write_iops`` a second, for as long as the block lasts."""
    timing = ("--time_based", "--runtime=3600", f"--rate_iops={write_iops}")
    options = ("--rw=randwrite", "--bs=4k", "--iodepth=4", *timing)
    load = subprocess.Popen(_command(uri, options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield
        if load.poll() is not None:
            raise BenchFailure(f"the background load on {uri} ended by itself: {_tail(load.communicate()[0])}")
    finally:
        load.terminate()
        load.communicate()


def _run(uri: str, options: Sequence[str], timeout_s: float) -> Speed:
    try:
        done = subprocess.run(_command(uri, options), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise BenchFailure(f"fio did not end within {timeout_s:.0f} s: fio {' '.join(options)}") from None
    # fio prints notes, some of them about errors, ahead of the JSON and on the same stream.
    notes, brace, rest = done.stdout.partition("{")
    job = json.loads(brace + rest)["jobs"][0] if brace and done.returncode == 0 else {"error": done.returncode or "?"}
    if job["error"]:
        raise BenchFailure(f"fio failed ({job['error']}) on {uri}: {_tail(notes + done.stderr)}")
    sides = job["read"], job["write"]
    return Speed(sum(side["iops"] for side in sides), sum(side["bw_bytes"] for side in sides))


def _command(uri: str, options: Sequence[str]) -> list[str]:
    # --thread: fio then is one process, and ending it ends the load.
    return ["fio", "--name=bench", "--thread", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", *options]


def _tail(text: str) -> str:
    return "; ".join(text.strip().splitlines()[-4:]) or "it said nothing"

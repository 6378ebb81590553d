"""What depends on how much is stored: operations, the start after SIGKILL, memory. A root for each size, one after the other.

``operations``  see `bench.store.operations`.
``recovery``    the daemon is killed under random writes, and the time until it serves again is taken, imports and all; the start on
                an empty root is given beside it.
``memory``      of the daemon with the huge, sparse disk, after random reads all over it; and what the budget for maps costs those who
                read something that fits: the same reads with the default budget and with one without an end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from bench import fio
from bench.operations import Finding
from bench.servers import simsrd
from bench.store.disks import kill, memory_kib, random_disk, settle, sparse_disk
from bench.store.operations import ratios, timed_operations
from bench.store.scale import Scale, Tell
from simsr.cli.client import Client
from simsr.units import format_size

__all__ = ["ROWS", "large"]

ROWS = ("operations", "recovery", "memory")
RECOVERY_AT_MOST_S = {"random": 2.0, "sparse": 3.0}
RESIDENT_AT_MOST_MIB = 400.0
FITTING_AT_LEAST = 0.90
_LOAD_S = 1.5
_READS = ("--rw=randread", "--bs=4k", "--iodepth=32")
_UNLIMITED = ("--map-memory", "1TiB")


def large(parent: Path, rows: Collection[str], scale: Scale, tell: Tell) -> Iterator[Finding]:
    """Yield the findings of ``rows``."""
    medians: dict[str, dict[str, float]] = {}
    if "recovery" in rows:
        seconds = statistics.median(_start_empty(parent / f"empty{number}") for number in range(scale.kills))
        yield Finding("recovery", "start on an empty root", seconds, "s")
    for kind, size_bytes in (("random", scale.small_bytes), ("random", scale.large_bytes), ("sparse", scale.sparse_bytes)):
        is_small = size_bytes == scale.small_bytes
        if is_small and "operations" not in rows or rows == {"memory"} and kind == "random":
            continue
        root = parent / f"root{len(list(parent.iterdir()))}"
        root.mkdir()
        name = f"{format_size(size_bytes)} {kind}"
        with simsrd(root) as daemon:
            if kind == "random":
                vdi = random_disk(daemon, size_bytes, tell)
            else:
                vdi = sparse_disk(daemon, size_bytes, scale.sparse_run_bytes, tell)
            if "operations" in rows:
                medians[name] = timed_operations(daemon, vdi, scale.repeats)
                tell(f"operations, {name}: " + "  ".join(f"{what} {ms:.2f} ms" for what, ms in medians[name].items()))
        if "recovery" in rows and not is_small:
            yield from _recovery(root, vdi, kind, name, scale, tell)
        if "memory" in rows and kind == "sparse":
            yield from _memory(root, vdi, name, scale, tell)
        _remove(root)
    if medians:
        yield from ratios("operations", medians)


def _start_empty(root: Path) -> float:
    root.mkdir()
    began = time.monotonic()
    with simsrd(root, new=False):
        taken = time.monotonic() - began
    _remove(root)
    return taken


def _remove(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.rmdir()


def _recovery(root: Path, vdi: dict, kind: str, name: str, scale: Scale, tell: Tell) -> Iterator[Finding]:
    starts, replayed = [], 0
    for number in range(scale.kills):
        with simsrd(root, new=False) as daemon:
            uri = daemon.get(daemon.vdi_path(vdi["uuid"]))["nbd_uri"]
            with fio.load_until_killed(uri):
                time.sleep(_LOAD_S + scale.seconds * number / scale.kills)
                kill(daemon)
        began = time.monotonic()
        with simsrd(root, new=False) as daemon:
            starts.append(time.monotonic() - began)
            replayed = max(replayed, daemon.get(daemon.sr_path(vdi["sr"]))["statistics"]["records_replayed"])
    tell(f"recovery, {name}: " + "  ".join(f"{seconds:.2f} s" for seconds in starts) + f"; up to {replayed} records replayed")
    yield Finding("recovery", f"start after SIGKILL, {name}: slowest", max(starts), "s", at_most=RECOVERY_AT_MOST_S[kind])
    yield Finding("recovery", f"the same: records replayed at most, {name}", replayed, "records")


def _memory(root: Path, vdi: dict, name: str, scale: Scale, tell: Tell) -> Iterator[Finding]:
    fitting: dict | None = None
    speeds: dict[tuple[str, ...], list[float]] = {(): [], _UNLIMITED: []}
    resident = {}
    for number in range(scale.rounds):
        for options in list(speeds)[:: -1 if number % 2 else 1]:
            with simsrd(root, *options, new=False) as daemon:
                if fitting is None:
                    fitting = random_disk(daemon, scale.small_bytes, tell)
                fio.measure(vdi["nbd_uri"], _READS, 2 * scale.seconds, seed=number + 1)
                if not options:
                    resident = memory_kib(daemon)
                    _tell_memory(daemon, vdi, resident, tell)
                fio.measure(fitting["nbd_uri"], _READS, scale.seconds, seed=99)
                speeds[options].append(fio.measure(fitting["nbd_uri"], _READS, scale.seconds, seed=number + 1).iops)
                settle(daemon, fitting)
    for what, bound in (("VmRSS", RESIDENT_AT_MOST_MIB), ("RssAnon", None), ("VmHWM", None)):
        yield Finding("memory", f"{what} of the daemon, {name}", resident[what] / 1024, "MiB", at_most=bound)
    ratio = statistics.median(one / other for one, other in zip(speeds[()], speeds[_UNLIMITED], strict=True))
    yield Finding("memory", "reads that fit, default budget against none", ratio, "x", at_least=FITTING_AT_LEAST)


def _tell_memory(daemon: Client, vdi: dict, resident: dict[str, int], tell: Tell) -> None:
    said = daemon.get(daemon.sr_path(vdi["sr"]))["statistics"]
    tell(
        f"memory: VmRSS {resident['VmRSS'] >> 10} MiB, RssAnon {resident['RssAnon'] >> 10} MiB; maps {said['map_memory_bytes'] >> 20} "
        f"MiB with {said['map_nodes_in_memory']} of {said['map_nodes']} nodes"
    )

"""Snapshot, clone, revert and delete: how long they take against how much is mapped and how many snapshots there are.

Times are the daemon's own (``Server-Timing``): from the decoded request until the change is durable. Before each snapshot and
each revert the disk is written to at random, so there is something to keep and something to take back.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench import fio
from bench.failure import BenchFailure
from bench.operations import Finding
from bench.store.disks import make, settle, wait_until_detached
from bench.store.scale import Scale, Tell
from simsr.cli.client import Client

__all__ = ["WHAT", "counts", "ratios", "timed_operations"]

WHAT = ("snapshot", "clone", "revert", "delete")
AT_MOST_MS = 5.0
RATIO_AT_MOST = 1.5
_WRITTEN_BYTES = 1000 * 4096
_COUNTS_DISK_BYTES = 64 << 20
_LOAD_IOPS = 2000


def timed_operations(daemon: Client, vdi: dict, repeats: int) -> dict[str, float]:
    """Median time of each in milliseconds."""
    times: dict[str, list[float]] = {what: [] for what in WHAT}

    def timed(what: str, call, *arguments) -> dict:
        answer = call(*arguments)
        if daemon.store_ms is None:
            raise BenchFailure(f"simsrd did not say how long {what} took")
        times[what].append(daemon.store_ms)
        return answer

    def write(seed: int) -> None:
        fio.fill_at_random(vdi["nbd_uri"], vdi["size_bytes"], seed, io_bytes=min(vdi["size_bytes"], _WRITTEN_BYTES))
        wait_until_detached(daemon, vdi)

    for repeat in range(repeats):
        write(2 * repeat + 1)
        snapshot = timed("snapshot", daemon.post, daemon.vdi_path(vdi["uuid"], "snapshot"), {})["uuid"]
        write(2 * repeat + 2)
        clone = timed("clone", daemon.post, daemon.vdi_path(snapshot, "clone"), {})["uuid"]
        timed("revert", daemon.post, daemon.vdi_path(snapshot, "revert"), {})
        timed("delete", daemon.delete, daemon.vdi_path(clone))
        timed("delete", daemon.delete, daemon.vdi_path(snapshot))
    return {what: statistics.median(taken) for what, taken in times.items()}


def ratios(row: str, medians: dict[str, dict[str, float]]) -> Iterator[Finding]:
    """Findings for ``medians``, (size or count -> operation -> milliseconds): each, and each against the first."""
    base_name, base = next(iter(medians.items()))
    for name, of_name in medians.items():
        for what in WHAT:
            yield Finding(row, f"{what}, {name}", of_name[what], "ms", at_most=AT_MOST_MS)
    for name, of_name in medians.items():
        for what in WHAT:
            if name != base_name:
                yield Finding(row, f"{what}, {name} against {base_name}", of_name[what] / base[what], "x", at_most=RATIO_AT_MOST)


def counts(daemon: Client, scale: Scale, tell: Tell) -> Iterator[Finding]:
    """The same against the number of snapshots of the disk, which is written to while they are taken."""
    vdi = make(daemon, _COUNTS_DISK_BYTES)
    fio.fill_at_random(vdi["nbd_uri"], _COUNTS_DISK_BYTES, seed=1)
    there, medians = 0, {}
    for count in scale.counts:
        tell(f"counts: taking {count - there} snapshots")
        with fio.background_load(vdi["nbd_uri"], _LOAD_IOPS):
            while there < count:
                daemon.post(daemon.vdi_path(vdi["uuid"], "snapshot"), {})
                there += 1
        settle(daemon, vdi)
        medians[f"{count} snapshots"] = timed_operations(daemon, vdi, scale.repeats)
        tell(f"counts {count}: " + "  ".join(f"{what} {ms:.2f} ms" for what, ms in medians[f"{count} snapshots"].items()))
    yield from ratios("counts", medians)

"""What has no peer to be compared with: how snapshots scale, what they cost readers, how long a plug-in call takes.

``scaling``  snapshot, clone and revert of a disk that has been written in random order, small and large: same time.
``depth``    random reads of one disk with no snapshots and with a thousand, in turns: same speed.
``plugin``   wall time of the SMAPIv1 plug-in as xapi runs it, interpreter start included.

Times of scaling are those the daemon reports (``Server-Timing``): from the decoded request until the change is durable.
"""

from __future__ import annotations

import statistics
import subprocess
import time
import uuid
import xmlrpc.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import fio
from bench.failure import BenchFailure
from simsr.cli.client import Client
from simsr.units import format_size

__all__ = ["OPERATIONS", "PLUGIN", "Finding", "Scale", "wait_until_detached"]

PLUGIN = Path(__file__).parents[1] / "simsr" / "smapi" / "SimSR"
PLUGIN_ENVIRONMENT = {"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "ORIGINATOR": "SM"}  # all that xapi gives it
PLUGIN_CALLS = 20
DETACH_TIMEOUT_S = 10.0
LOAD_WRITE_IOPS = 2000


@dataclass(frozen=True)
class Scale:
    """How much of each operation is done."""

    small_bytes: int
    large_bytes: int
    repeats: int
    snapshots: int
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Finding:
    """One number, and the bound that it should keep (``at_most`` or ``at_least``; None where there is none)."""

    operation: str
    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ok(self) -> bool:
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


def scaling(daemon: Client, scale: Scale, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Time snapshot, clone and revert of a small and a large disk, both written in random order all over."""
    medians: dict[tuple[str, int], float] = {}
    for size_bytes in (scale.small_bytes, scale.large_bytes):
        vdi = _random_disk(daemon, size_bytes, tell)
        times: dict[str, list[float]] = {"snapshot": [], "clone": [], "revert": []}
        for repeat in range(scale.repeats):
            _snapshot_clone_revert(daemon, vdi, times, seed=repeat + 1)
        tell(f"scaling {format_size(size_bytes)}: " + "  ".join(f"{k} {statistics.median(v):.2f} ms" for k, v in times.items()))
        for what, taken in times.items():
            medians[what, size_bytes] = statistics.median(taken)
            name = f"{what} at {format_size(size_bytes)} mapped"
            yield Finding("scaling", name, medians[what, size_bytes], "ms", at_most=5.0)
        daemon.delete(daemon.vdi_path(vdi["uuid"]))
    for what in ("snapshot", "clone", "revert"):
        ratio = medians[what, scale.large_bytes] / medians[what, scale.small_bytes]
        sizes = f"{format_size(scale.large_bytes)} against {format_size(scale.small_bytes)}"
        yield Finding("scaling", f"{what}, {sizes}", ratio, "x", at_most=1.5)


def _snapshot_clone_revert(daemon: Client, vdi: dict, times: dict[str, list[float]], seed: int) -> None:
    """Do each once and add what it took. Between snapshot and revert the disk leaves its snapshot at 5000 places."""

    def timed(what: str, path: str) -> dict:
        answer = daemon.post(path, {})
        if daemon.store_ms is None:
            raise BenchFailure(f"simsrd did not say how long {what} took")
        times[what].append(daemon.store_ms)
        return answer

    snapshot = timed("snapshot", daemon.vdi_path(vdi["uuid"], "snapshot"))["uuid"]
    fio.fill_at_random(vdi["nbd_uri"], vdi["size_bytes"], seed, io_bytes=min(vdi["size_bytes"], 5000 * 4096))
    wait_until_detached(daemon, vdi["uuid"])
    clone = timed("clone", daemon.vdi_path(snapshot, "clone"))["uuid"]
    timed("revert", daemon.vdi_path(snapshot, "revert"))
    for each in (clone, snapshot):
        daemon.delete(daemon.vdi_path(each))


def depth(daemon: Client, scale: Scale, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Compare random reads of one disk without snapshots and with many, in turns.

    The disk is written to while the snapshots are taken, so that each of them differs from the next.
    """
    vdi = _random_disk(daemon, scale.small_bytes, tell)
    reads = ("--rw=randread", "--bs=4k", "--iodepth=32")
    ratios = []
    for round_number in range(scale.rounds):
        before = fio.measure(vdi["nbd_uri"], reads, scale.seconds, seed=round_number + 1).iops
        with fio.background_load(vdi["nbd_uri"], LOAD_WRITE_IOPS):
            snapshot_path = daemon.vdi_path(vdi["uuid"], "snapshot")
            snapshots = [daemon.post(snapshot_path, {})["uuid"] for _ in range(scale.snapshots)]
        after = fio.measure(vdi["nbd_uri"], reads, scale.seconds, seed=round_number + 1).iops
        ratios.append(after / before)
        tell(f"depth round {round_number + 1}/{scale.rounds}: none {before:,.0f}  {scale.snapshots} {after:,.0f} IOPS")
        for snapshot in snapshots:
            daemon.delete(daemon.vdi_path(snapshot))
    daemon.delete(daemon.vdi_path(vdi["uuid"]))
    name = f"4k random read with {scale.snapshots} snapshots against none"
    yield Finding("depth", name, statistics.median(ratios), "x", at_least=0.95)


def plugin(daemon: Client, scale: Scale, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Time whole runs of the plug-in: one command that needs no daemon, and one that does."""
    vdi = daemon.post("/v1/vdis", {"name": "plugin", "size_bytes": 1 << 20})
    about_vdi = {
        "sr_uuid": vdi["sr"],
        "vdi_uuid": vdi["uuid"],
        "vdi_location": vdi["uuid"],
        "vdi_on_boot": "persist",
        "vdi_allow_caching": "false",
    }
    for command, members in (("sr_get_driver_info", {}), ("vdi_update", about_vdi)):
        config = {"socket": daemon.socket_path, "standalone": "true", "SRmaster": "true"} if members else {}
        request = {"host_ref": f"OpaqueRef:{uuid.uuid4()}", "command": command, "args": [], "device_config": config}
        document = xmlrpc.client.dumps(({**request, **members},), command)
        taken = _ms([_run_plugin(document) for _ in range(PLUGIN_CALLS)])
        tell(f"plugin {command}: {taken:.1f} ms")
        yield Finding("plugin", f"plug-in call {command}", taken, "ms", at_most=120.0)
    daemon.delete(daemon.vdi_path(vdi["uuid"]))


OPERATIONS: dict[str, Callable[[Client, Scale, Callable[[str], None]], Iterator[Finding]]] = {
    "scaling": scaling,
    "depth": depth,
    "plugin": plugin,
}


def _random_disk(daemon: Client, size_bytes: int, tell: Callable[[str], None]) -> dict:
    tell(f"writing {format_size(size_bytes)} in random order")
    vdi = daemon.post("/v1/vdis", {"name": f"random {uuid.uuid4()}", "size_bytes": size_bytes})
    fio.fill_at_random(vdi["nbd_uri"], size_bytes, seed=1)
    return vdi


def wait_until_detached(daemon: Client, vdi: str) -> None:
    """Return when the daemon has noticed that fio has gone; until then a revert is refused."""
    give_up = time.monotonic() + DETACH_TIMEOUT_S
    while daemon.get(daemon.vdi_path(vdi))["attached"]:
        if time.monotonic() > give_up:
            raise BenchFailure(f"VDI {vdi} is still attached {DETACH_TIMEOUT_S:.0f} s after its client has gone")
        time.sleep(0.005)


def _run_plugin(document: str) -> float:
    start = time.perf_counter()
    done = subprocess.run([PLUGIN, document], capture_output=True, text=True, env=PLUGIN_ENVIRONMENT, timeout=60)
    taken = time.perf_counter() - start
    if done.returncode or "<fault>" in done.stdout:
        raise BenchFailure(f"the plug-in failed ({done.returncode}): {done.stdout.strip()[:500]} {done.stderr.strip()}")
    return taken


def _ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3

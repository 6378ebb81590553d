"""The disks that the rows measure, and a daemon that can be killed."""

from __future__ import annotations

import os
import re
import signal
import time
import uuid
from pathlib import Path

from bench import fio
from bench.failure import BenchFailure
from bench.store.scale import Tell
from simsr.cli.client import Client
from simsr.units import format_size

__all__ = ["kill", "make", "memory_kib", "random_disk", "settle", "sparse_disk", "wait_until_detached"]

EVERY_BYTES = 2 << 20
RUNS = 4
WAIT_S = 600.0


def make(daemon: Client, size_bytes: int) -> dict:
    """An empty disk."""
    return daemon.post("/v1/vdis", {"name": f"bench {uuid.uuid4()}", "size_bytes": size_bytes})


def random_disk(daemon: Client, size_bytes: int, tell: Tell) -> dict:
    """A disk of which every block has been written, in random order."""
    tell(f"writing {format_size(size_bytes)} in random order")
    vdi = make(daemon, size_bytes)
    fio.fill_at_random(vdi["nbd_uri"], size_bytes, seed=1)
    settle(daemon, vdi)
    return vdi


def sparse_disk(daemon: Client, size_bytes: int, run_bytes: int, tell: Tell) -> dict:
    """A disk with one block in every 2 MiB and four long runs: as many map nodes as a disk of that size can need."""
    tell(f"writing one block in every {format_size(EVERY_BYTES)} of {format_size(size_bytes)}")
    vdi = make(daemon, size_bytes)
    fio.fill_sparsely(vdi["nbd_uri"], size_bytes, EVERY_BYTES, run_bytes, RUNS)
    settle(daemon, vdi)
    return vdi


def settle(daemon: Client, vdi: dict) -> None:
    """Return when nobody is attached to the disk, nothing is left to be taken apart, and what was written is on the disk."""
    wait_until_detached(daemon, vdi)
    give_up = time.monotonic() + WAIT_S
    while daemon.get(daemon.sr_path(vdi["sr"]))["statistics"]["nodes_to_reap"]:
        if time.monotonic() > give_up:
            raise BenchFailure(f"after {WAIT_S:.0f} s there are still dropped map nodes")
        time.sleep(0.05)
    os.sync()


def wait_until_detached(daemon: Client, vdi: dict) -> None:
    """Return when the daemon has noticed that fio has gone; until then a revert is refused."""
    give_up = time.monotonic() + WAIT_S
    while daemon.get(daemon.vdi_path(vdi["uuid"]))["attached"]:
        if time.monotonic() > give_up:
            raise BenchFailure(f"VDI {vdi['uuid']} is still attached {WAIT_S:.0f} s after its client has gone")
        time.sleep(0.005)


def kill(daemon: Client) -> None:
    """Kill the daemon, and return when it is gone: it is a child of ours, so what it leaves is a zombie."""
    pid = daemon.get("/v1/daemon")["pid"]
    os.kill(pid, signal.SIGKILL)
    status = Path(f"/proc/{pid}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)


def memory_kib(daemon: Client) -> dict[str, int]:
    """VmRSS, RssAnon and the others of the daemon, in KiB."""
    text = Path(f"/proc/{daemon.get('/v1/daemon')['pid']}/status").read_text()
    return {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}

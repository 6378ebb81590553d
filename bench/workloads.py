"""What is measured, and the ratios to each peer that we want to reach.

Reads come before writes, and sequential writes last: so every round of the fresh state begins with disks as they are after
having been written in order, and every round of the steady state with disks that were overwritten at random.

``rw4k_fs32`` asks for a flush after every 32 writes. The peers are keys of `bench.servers.SERVERS`; qemu-nbd with
io_uring is reported beside them and has no targets.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True, eq=False)
class Workload:
    """One row of the table. ``fio`` are the options that make it; ``targets`` maps a peer to the least ratio."""

    name: str
    title: str
    fio: tuple[str, ...]
    unit: str
    targets: dict[str, float]


def _workload(
    name: str, title: str, rw: str, bs: str, depth: int, nbdkit: float, qemu: float, *more: str, unit: str = "IOPS"
) -> Workload:
    options = (f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", *more)
    return Workload(name, title, options, unit, {"nbdkit": nbdkit, "qemu": qemu})


WORKLOADS = (
    _workload("rr4k_q32", "4k random read, depth 32", "randread", "4k", 32, 1.2, 3.0),
    _workload("rr4k_q1", "4k random read, depth 1", "randread", "4k", 1, 0.75, 1.2),
    _workload("rr64k_q16", "64k random read, depth 16", "randread", "64k", 16, 0.8, 1.0),
    _workload("sr1m_q4", "1M sequential read, depth 4", "read", "1M", 4, 0.9, 1.3, unit="MB/s"),
    _workload("rw4k_q32", "4k random write, depth 32", "randwrite", "4k", 32, 0.6, 2.2),
    _workload("rw4k_q1", "4k random write, depth 1", "randwrite", "4k", 1, 0.5, 1.1),
    _workload("rw4k_fs32", "4k random write, flush every 32", "randwrite", "4k", 32, 0.5, 3.0, "--fsync=32"),
    _workload("sw1m_q4", "1M sequential write, depth 4", "write", "1M", 4, 0.6, 1.1, unit="MB/s"),
)

"""``python -m bench.fuse``: our files beside nbdfuse over nbdkit's memory and qemu-storage-daemon's over qcow2, with the same fio jobs.

Prints the table and writes ``build/bench-fuse.json``. Servers take turns within each round, the ratios are taken within a round, and
their medians are what counts (`bench.comparison`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.__main__ import directory_in, tell
from bench.comparison import Sample, order_of_round, rows_of
from bench.failure import BenchFailure
from bench.report import aligned
from bench.servers import Served, running, simsrd
from simsr.errors import SimsrError
from simsr.units import parse_size

QSD = "qemu-storage-daemon"
TARGET_PEER = "qsd-qcow2"
RAMP_MS = 300


@dataclass(frozen=True, eq=False)
class Workload:
    """One row of the table; ``target`` is the least ratio of ``ours`` to qemu-storage-daemon."""

    name: str
    title: str
    fio: tuple[str, ...]
    unit: str
    target: float
    ours: str = "simsr"

    @property
    def is_buffered(self) -> bool:
        return "--direct=1" not in self.fio


WORKLOADS = (
    Workload("rr4k", "4k random read, direct", ("--rw=randread", "--bs=4k", "--direct=1"), "IOPS", 0.9),
    Workload("rr4k_j8", "4k random read, direct, 8 jobs", ("--rw=randread", "--bs=4k", "--direct=1", "--numjobs=8"), "IOPS", 0.8),
    Workload("sr1m", "1M sequential read, direct", ("--rw=read", "--bs=1M", "--direct=1"), "MB/s", 1.2),
    Workload("rw4k", "4k random write, direct", ("--rw=randwrite", "--bs=4k", "--direct=1"), "IOPS", 0.9),
    Workload("b_rw4k", "4k random write, buffered", ("--rw=randwrite", "--bs=4k"), "IOPS", 3.0, "simsr-writeback"),
    Workload("sw1m", "1M sequential write, direct", ("--rw=write", "--bs=1M", "--direct=1"), "MB/s", 0.7),
)
"""Every round begins with disks that were written in order; so reads come first."""


# Servers: each gives the path of a file.


@contextlib.contextmanager
def _simsr(directory: Path, size_bytes: int, cache: str) -> Iterator[str]:
    mount, root = directory / "m", directory / "r"
    mount.mkdir()
    root.mkdir()
    with simsrd(root, "--mount", str(mount), "--mount-cache", cache) as client:
        vdi = client.post("/v1/vdis", {"name": "bench", "size_bytes": size_bytes})
        yield str(mount / "bench" / f"{vdi['uuid']}.raw")


@contextlib.contextmanager
def _nbdfuse(directory: Path, size_bytes: int) -> Iterator[str]:
    sock, file = directory / "nbd.sock", directory / "m" / "disk"
    file.parent.mkdir()
    (directory / "kit").mkdir()
    with running("nbdkit", ["nbdkit", "-f", "-U", str(sock), "memory", str(size_bytes)], directory / "kit", lambda _: sock.exists()):
        command = ["nbdfuse", str(file), f"nbd+unix:///?socket={sock}"]
        with running("nbdfuse", command, directory, lambda _: file.exists()):
            try:
                yield str(file)
            finally:
                _unmount(file.parent)


@contextlib.contextmanager
def _qsd(directory: Path, size_bytes: int) -> Iterator[str]:
    image, file = directory / "disk.qcow2", directory / "disk"
    file.touch()
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", str(image), str(size_bytes)]
    subprocess.run(create, check=True)
    command = [
        QSD, "--blockdev", f"driver=file,node-name=file,filename={image}", "--blockdev", "driver=qcow2,node-name=disk,file=file",
        "--export", f"type=fuse,id=export,node-name=disk,mountpoint={file},writable=on",
    ]  # fmt: skip
    with running(QSD, command, directory, lambda _: file.stat().st_size == size_bytes):
        try:
            yield str(file)
        finally:
            _unmount(file)


def _unmount(path: Path) -> None:
    subprocess.run(["fusermount3", "-u", "-z", str(path)], check=False)


SERVERS: dict[str, Callable[[Path, int], contextlib.AbstractContextManager[str]]] = {
    "simsr": lambda directory, size_bytes: _simsr(directory, size_bytes, "direct"),
    "simsr-writeback": lambda directory, size_bytes: _simsr(directory, size_bytes, "writeback"),
    TARGET_PEER: _qsd,
    "nbdfuse": _nbdfuse,
}


# Measuring.


def measure(path: str, size_bytes: int, workload: Workload, seconds: float, seed: int) -> float:
    """Run a workload on a file and return its speed. What it leaves dirty is written out afterwards, so nobody pays for another's."""
    timing = ("--time_based", f"--runtime={round(seconds * 1000)}ms", f"--ramp_time={RAMP_MS}ms", f"--randseed={seed}")
    job = fio(path, size_bytes, (*workload.fio, *timing), seconds + 120)
    if workload.is_buffered:
        fd = os.open(path, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sides = job["read"], job["write"]
    return sum(side["bw_bytes"] for side in sides) / 1e6 if workload.unit == "MB/s" else sum(side["iops"] for side in sides)


def fill(path: str, size_bytes: int) -> None:
    """Write the whole disk in order, with data that no server can compress or share."""
    fio(path, size_bytes, ("--rw=write", "--bs=1M", "--refill_buffers", "--end_fsync=1"), 600)


def fio(path: str, size_bytes: int, options: tuple[str, ...], timeout_s: float) -> dict:
    command = [
        "fio", "--name=bench", "--thread", "--ioengine=psync", f"--filename={path}", f"--size={size_bytes}", "--group_reporting",
        "--output-format=json", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    notes, brace, rest = done.stdout.partition("{")
    job = json.loads(brace + rest)["jobs"][0] if brace and done.returncode == 0 else {"error": done.returncode or "?"}
    if job["error"]:
        raise BenchFailure(f"fio failed ({job['error']}) on {path}: {(notes + done.stderr).strip()[-300:]}")
    return job


def measure_all(servers: list[Served], arguments: argparse.Namespace) -> list[Sample]:
    samples = []
    for round_number in range(arguments.rounds):
        for server in servers:
            fill(server.uri, arguments.size)
        for workload in WORKLOADS:
            now = {}
            taking_part = [one for one in servers if one.name == workload.ours or not one.name.startswith("simsr")]
            for server in order_of_round(taking_part, round_number):
                value = measure(server.uri, arguments.size, workload, arguments.seconds, round_number + 1)
                now[server.name] = value
                samples.append(Sample(workload, server.name, round_number, value))  # type: ignore[arg-type]
            values = "  ".join(f"{name} {value:,.0f}" for name, value in now.items())
            tell(f"round {round_number + 1}/{arguments.rounds} {workload.name:<8} {workload.unit}: {values}")
    return samples


# Telling.


def table_text(rows: list[dict], names: list[str]) -> str:
    lines = [["workload", "unit", *names, f"/{TARGET_PEER}", "target", "", "/nbdfuse"]]
    for workload in WORKLOADS:
        by_server = {row["server"]: row for row in rows if row["workload"] == workload.name}
        if workload.ours not in by_server:
            continue
        ratios = by_server[workload.ours]["ratio_to"]
        cells = ["-", "", ""]
        if TARGET_PEER in ratios:
            ratio = ratios[TARGET_PEER]
            cells = [f"{ratio:.2f}", f">= {workload.target:g}", "ok" if ratio >= workload.target else "BELOW"]
        other = f"{ratios['nbdfuse']:.2f}" if "nbdfuse" in ratios else "-"
        lines.append([workload.title, workload.unit, *(f"{by_server[name]['value']:,.0f}" if name in by_server else "-" for name in names), *cells, other])
    return f"medians, and medians of the ratios within each round (buffered: ours is simsr-writeback)\n{aligned(lines)}"


def write(path: Path, arguments: argparse.Namespace, rows: list[dict]) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    settings |= {"kernel": platform.release(), "python": platform.python_version(), "time": time.time()}
    targets = {workload.name: {"ours": workload.ours, TARGET_PEER: workload.target} for workload in WORKLOADS}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "targets": targets, "rows": rows}, indent=2) + "\n")
    tell(f"written to {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuse", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the table (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of each run (default 1)")
    parser.add_argument("--size", type=parse_size, default=256 << 20, help="size of the disks (default 256MiB)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the disks live (default /var/tmp)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "build" / "bench-fuse.json")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is put away then as well
    try:
        with contextlib.ExitStack() as stack:
            servers = []
            for name, serve in SERVERS.items():
                try:
                    directory = stack.enter_context(directory_in(arguments.dir))
                    path = stack.enter_context(serve(directory, arguments.size))
                except BenchFailure as failure:
                    if name.startswith("simsr"):
                        raise
                    tell(f"without {name}: {failure}")
                    continue
                servers.append(Served(name, path))
            rows = rows_of("fresh", measure_all(servers, arguments))
    except (BenchFailure, SimsrError) as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    print(table_text(rows, [server.name for server in servers]))
    write(arguments.output, arguments, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Latency as a scenario asks for it against latency as clients see it, on eight disks at once: ``script/bench-latency``.

Each disk has one request at a time, at a rate that the daemon can bear (Poisson arrivals), so that what is measured is how exactly a delay is
kept, not how fast the daemon is. Three things tell what the machine has to do with it:

* nbdkit with its filter "delay" under the same load: what another server makes of the same machine;
* "held", the latencies that the daemon itself has measured: without the way there and back, and the client's own waking;
* "slip", what a sleep comes late meanwhile in a process of its own that asks for no slack (prctl(2), PR_SET_TIMERSLACK).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
from simsr.cli.client import Client

DISKS = 8
SHARES = (50.0, 99.0, 99.9)
MIB = 1 << 20
Z99, Z999 = 2.3263, 3.0902
PR_SET_TIMERSLACK = 29

Percentiles = tuple[float, ...]


def constant(us: float) -> Percentiles:
    return (us * 1e3,) * 3


@dataclass(frozen=True)
class Row:
    """``kind``: nbd, fuse (files of ours), nbdkit, alone (one disk, the next request at once) or scan (an operation of the API); ``latency`` as a
    scenario says it, None without one; ``asked``: its percentiles and its mean in ns."""

    kind: str
    latency: str | None = None
    asked: Percentiles | None = None
    mean: float = 0.0

    @property
    def name(self) -> str:
        where = {"nbd": "", "nbdkit": "nbdkit: ", "fuse": "FUSE: ", "alone": "one disk: ", "scan": "scan over the API: "}[self.kind]
        return where + (f"`{self.latency}`" if self.latency else "no delay")


ROWS = (
    Row("nbdkit"),
    *(Row("nbdkit", f"{us // 1000}ms", constant(us), us * 1e3) for us in (1000, 5000)),
    Row("nbd"),
    *(Row("nbd", f"{us}us", constant(us), us * 1e3) for us in (200, 500, 1000, 5000)),
    Row("nbd", "uniform(200us, 2ms)", tuple(200e3 + share / 100 * 1.8e6 for share in SHARES), 1.1e6),
    Row(
        "nbd", "lognormal(p50=400us, p99=3ms)", (400e3, 3e6, 400e3 * math.exp(math.log(3 / 0.4) / Z99 * Z999)),
        400e3 * math.exp((math.log(3 / 0.4) / Z99) ** 2 / 2),
    ),
    *(Row("alone", f"{us}us", constant(us), us * 1e3) for us in (1000, 5000)),
    Row("fuse"),
    Row("fuse", "1000us", constant(1000), 1e6),
    Row("scan"),
    Row("scan", "5000us", constant(5000), 5e6),
)  # fmt: skip

SLEEPER = f"""
import ctypes, sys, time
ctypes.CDLL(None).prctl({PR_SET_TIMERSLACK}, 1)
late, end = [], time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    due = time.perf_counter_ns() + 500_000
    time.sleep(500e-6)
    late.append(time.perf_counter_ns() - due)
late.sort()
print(*[late[int(len(late) * share / 100)] for share in (50, 99, 99.9)])
"""


@dataclass
class Seen:
    """What clients saw, in ns."""

    percentiles: list[float]
    least: float
    mean: float
    requests: int


@dataclass
class Target:
    """Where the requests go: ``words`` of fio for each disk."""

    words: list[list[str]]
    client: Client | None = None
    sr: str = ""


def fio(words: list[list[str]], seconds: float, rate: int | None, seed: int) -> Seen:
    """Random reads on all disks; ``rate``: so many a second on each, None: the next one at once."""
    jobs = [word for number, disk in enumerate(words) for word in (f"--name=disk{number}", *disk)]
    shared = [
        "--rw=randread", "--bs=4k", "--iodepth=1", "--time_based", f"--runtime={seconds * 1000:.0f}ms", "--group_reporting",
        f"--randseed={seed}", "--percentile_list=50:99:99.9", "--output-format=json", "--lat_percentiles=1", "--clat_percentiles=0",
        "--size=16m", *(() if rate is None else (f"--rate_iops={rate}", "--rate_process=poisson")),
    ]  # fmt: skip
    done = subprocess.run(["fio", *shared, *jobs], capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        sys.exit(f"fio failed: {done.stdout}{done.stderr}")
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    times = read["lat_ns"]
    return Seen([times["percentile"][f"{share:.6f}"] for share in SHARES], times["min"], times["mean"], read["total_ios"])


def scan(client: Client, sr: str, seconds: float) -> Seen:
    """The time of requests to the API, one after the other."""
    took, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter_ns()
        client.get("/v1/vdis", sr=sr)
        took.append(float(time.perf_counter_ns() - began))
    took.sort()
    return Seen([took[int(len(took) * share / 100)] for share in SHARES], took[0], statistics.mean(took), len(took))


def measure(row: Row, target: Target, seconds: float, rate: int, seed: int) -> dict[str, object]:
    """One run: what clients saw, and what a sleeper saw at the same time."""
    held, play = None, target.client if row.latency else None
    if play is not None:
        key = "control.scan" if row.kind == "scan" else "latency.read"
        play.post("/v1/scenario", {"text": f'simsr = 1\nname = "latency"\nseed = {seed}\n[profile.p]\n{key} = "{row.latency}"\n'})
    sleeper = subprocess.Popen([sys.executable, "-c", SLEEPER, str(seconds)], stdout=subprocess.PIPE, text=True)
    try:
        if row.kind == "scan":
            seen = scan(target.client, target.sr, seconds)
        else:
            seen = fio(target.words[:1] if row.kind == "alone" else target.words, seconds, None if row.kind == "alone" else rate, seed)
        slip = [float(word) for word in sleeper.communicate()[0].split()]
        if play is not None:
            lines = play.get("/v1/scenario/report")["operations"]
            (line,) = [line for line in lines if line["op"] == ("scan" if row.kind == "scan" else "read")]
            held = [line[name] * 1e9 for name in ("p50_s", "p99_s", "p999_s")]
    finally:
        sleeper.kill()
        sleeper.wait()
        if play is not None:
            play.delete("/v1/scenario")
    return {"row": row.name, **vars(seen), "held": held, "slip": slip, "load": os.getloadavg()[0]}


# Servers.


@contextlib.contextmanager
def ours(first: bool) -> Iterator[dict[str, Target]]:
    with contextlib.ExitStack() as stack:
        root = short_temporary_directory("simsr-latency-")
        stack.callback(shutil.rmtree, root)
        if first:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(20))  # the daemon inherits it
        daemon = stack.enter_context(ChildDaemon(f"{root}/r"))
        if first:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))  # fio spins before its requests are due, and must not be in the way
        client = Client(daemon.socket)
        stack.callback(client.close)
        sr = client.post("/v1/srs", {"name": "latency"})["uuid"]
        vdis = [client.post("/v1/vdis", {"size_bytes": 16 * MIB, "name": f"d{number}"}) for number in range(DISKS)]
        nbd = Target([["--ioengine=nbd", f"--uri={vdi['nbd_uri']}"] for vdi in vdis], client, sr)
        targets = {"nbd": nbd, "alone": nbd, "scan": nbd}
        if os.access("/dev/fuse", os.R_OK | os.W_OK):
            os.mkdir(f"{root}/m")
            client.post("/v1/mounts", {"path": f"{root}/m"})
            stack.callback(client.post, "/v1/mounts/unmount", {"path": f"{root}/m", "lazy": True})
            files = [["--ioengine=psync", "--direct=1", f"--filename={root}/m/latency/{vdi['uuid']}.raw"] for vdi in vdis]
            targets["fuse"] = Target(files, client, sr)
        yield targets


@contextlib.contextmanager
def nbdkit(latency: str | None) -> Iterator[Target]:
    folder = short_temporary_directory("simsr-latency-")
    path = f"{folder}/nbd.sock"
    delay = [] if latency is None else ["--filter=delay", f"rdelay={latency}"]
    server = subprocess.Popen(["nbdkit", "--foreground", "--exit-with-parent", "--unix", path, *delay[:1], "memory", "16M", *delay[1:]])
    try:
        give_up = time.monotonic() + 30
        while not os.path.exists(path):
            if server.poll() is not None or time.monotonic() > give_up:
                sys.exit("nbdkit does not start")
            time.sleep(0.01)
        yield Target([["--ioengine=nbd", f"--uri=nbd+unix:///?socket={path}"]] * DISKS)
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)


def kept(asked: float, seen: float) -> bool:
    """Within 5 % or 100 us, whichever is more."""
    return abs(seen - asked) <= max(0.05 * asked, 100e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row and round")
    parser.add_argument("--rounds", type=int, default=3, help="the median of them counts")
    parser.add_argument("--rate", type=int, default=150, help="requests a second of each disk")
    parser.add_argument("--rows", help="only those whose name contains this", default="")
    parser.add_argument("--out", type=Path, default=Path("build/latency.json"))
    parser.add_argument("--first", action="store_true", help="let daemon and fio run before all else (SCHED_RR, needs root): on a busy machine")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)  # fio and nbdkit inherit it
    runs = []
    with ours(options.first) as targets:
        for round_ in range(options.rounds):
            for row in (row for row in ROWS if options.rows in row.name):
                if row.kind == "nbdkit" and shutil.which("nbdkit"):
                    with nbdkit(row.latency) as target:
                        runs.append({"round": round_, **measure(row, target, options.seconds, options.rate, round_ + 1)})
                elif row.kind in targets:
                    runs.append({"round": round_, **measure(row, targets[row.kind], options.seconds, options.rate, round_ + 1)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(runs, indent=1))
    return report(runs)


def report(runs: list[dict]) -> int:
    """Print a table of medians over the rounds; the status is 1 if a latency of ours is not kept."""
    bad = False
    loads = [run["load"] for run in runs]
    print(f"{DISKS} disks, {sum(run['requests'] for run in runs)} requests, load average {min(loads):.1f} to {max(loads):.1f}\n")
    print("| asked for | p50 | p99 | p99.9 | mean | least | held by the daemon: p50, p99, p99.9 | slip |\n|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if not (these := [run for run in runs if run["row"] == row.name]):
            continue
        values = [*places(these, "percentiles"), statistics.median(run["mean"] for run in these)]
        cells = []
        for value, asked in zip(values, [*row.asked, row.mean] if row.asked else [None] * 4):
            ok = asked is None or kept(asked, value)
            bad |= not ok and row.kind != "nbdkit"
            text = f"{value / 1e3:.0f}" + ("" if asked is None else f" of {asked / 1e3:.0f}")
            cells.append(text if ok else f"**{text}**")
        cells.append(f"{min(run['least'] for run in these) / 1e3:.0f}")
        cells += [", ".join(f"{value / 1e3:.0f}" for value in places(these, key)) if these[0][key] else "" for key in ("held", "slip")]
        print(f"| {row.name} | {' | '.join(cells)} |")
    print("\nMicroseconds; bold: more than 5 % and more than 100 us away.")
    return int(bad)


def places(runs: list[dict], key: str) -> list[float]:
    return [statistics.median(run[key][place] for run in runs) for place in range(3)] if runs[0][key] else []


if __name__ == "__main__":
    sys.exit(main())

"""Latency as a scenario asks for it against latency as fio sees it, over NBD, on eight disks at once: ``script/bench-latency``.

Each disk has one request at a time, at a rate that the daemon can bear (Poisson arrivals), so that what is measured is how exactly a delay is
kept, not how fast the daemon is. ``slip`` is what a plain sleep of the same machine comes late meanwhile (a process of its own, clock_nanosleep):
what no program in user space can do much about.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
from simsr.cli.client import Client

DISKS = 8
SHARES = (50.0, 99.0, 99.9)
MIB = 1 << 20
Z99, Z999 = 2.3263, 3.0902

LATENCIES: dict[str, tuple[float, float, float]] = {
    **{f"{us}us": (us * 1e3,) * 3 for us in (200, 500, 1000, 5000)},
    "uniform(200us, 2ms)": tuple(200e3 + share / 100 * 1.8e6 for share in SHARES),  # type: ignore[dict-item]
    "lognormal(p50=400us, p99=3ms)": (400e3, 3e6, 400e3 * math.exp(math.log(3 / 0.4) / Z99 * Z999)),
}
"""What is asked for, and its percentiles in ns."""

SLEEPER = """
import sys, time
late, end = [], time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    due = time.perf_counter_ns() + 500_000
    time.sleep(500e-6)
    late.append(time.perf_counter_ns() - due)
late.sort()
print(*[late[int(len(late) * share / 100)] for share in (50, 99, 99.9)])
"""


def fio(uris: list[str], seconds: float, rate: int, seed: int) -> tuple[list[float], int]:
    """(percentiles in ns, requests) of random reads on all disks."""
    jobs = [word for number, uri in enumerate(uris) for word in (f"--name=disk{number}", "--ioengine=nbd", f"--uri={uri}")]
    shared = [
        "--rw=randread", "--bs=4k", "--iodepth=1", "--time_based", f"--runtime={seconds * 1000:.0f}ms", "--group_reporting",
        f"--rate_iops={rate}", "--rate_process=poisson", f"--randseed={seed}", "--percentile_list=50:99:99.9", "--output-format=json",
        "--lat_percentiles=1", "--clat_percentiles=0", "--size=16m",
    ]  # fmt: skip
    done = subprocess.run(["fio", *shared, *jobs], capture_output=True, text=True, timeout=seconds + 120)
    if done.returncode:
        sys.exit(f"fio failed: {done.stdout}{done.stderr}")
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return [read["lat_ns"]["percentile"][f"{share:.6f}"] for share in SHARES], read["total_ios"]


def measure(client: Client, uris: list[str], latency: str | None, seconds: float, rate: int, seed: int) -> dict[str, object]:
    """One run: what fio saw, and what a sleeper saw at the same time."""
    if latency is not None:
        text = f'simsr = 1\nname = "latency"\nseed = {seed}\n[profile.p]\nlatency.read = "{latency}"\n'
        client.post("/v1/scenario", {"text": text})
    sleeper = subprocess.Popen([sys.executable, "-c", SLEEPER, str(seconds)], stdout=subprocess.PIPE, text=True)
    try:
        seen, count = fio(uris, seconds, rate, seed)
        slip = [float(word) for word in sleeper.communicate()[0].split()]
    finally:
        sleeper.kill()
        sleeper.wait()
        if latency is not None:
            client.delete("/v1/scenario")
    return {"latency": latency, "seen_ns": seen, "requests": count, "slip_ns": slip, "load": os.getloadavg()[0]}


def kept(asked: float, seen: float) -> bool:
    """Within 5 % or 100 us, whichever is more."""
    return abs(seen - asked) <= max(0.05 * asked, 100e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each latency and round")
    parser.add_argument("--rounds", type=int, default=3, help="the median of them counts")
    parser.add_argument("--rate", type=int, default=150, help="requests a second of each disk")
    parser.add_argument("--out", type=Path, default=Path("build/latency.json"))
    parser.add_argument("--first", action="store_true", help="let daemon and fio run before all else (SCHED_RR, needs root): on a busy machine")
    options = parser.parse_args()
    if options.first:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(20))  # the daemon inherits it
    runs = []
    root = short_temporary_directory("simsr-latency-")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root)
        daemon = stack.enter_context(ChildDaemon(root))
        if options.first:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))  # fio spins before its requests are due, and must not be in the way
        client = Client(daemon.socket)
        client.post("/v1/srs", {"name": "latency"})
        uris = [client.post("/v1/vdis", {"size_bytes": 16 * MIB, "name": f"d{number}"})["nbd_uri"] for number in range(DISKS)]
        for round_ in range(options.rounds):
            for latency in (None, *LATENCIES):
                runs.append({"round": round_, **measure(client, uris, latency, options.seconds, options.rate, round_ + 1)})
        client.close()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(runs, indent=1))
    return report(runs)


def report(runs: list[dict]) -> int:
    """Print a table of medians over the rounds; the status is 1 if a latency is not kept."""
    bad = False
    loads = [run["load"] for run in runs]
    print(f"{DISKS} disks, {sum(run['requests'] for run in runs)} requests, load average {min(loads):.1f} to {max(loads):.1f}\n")
    print("| asked for | p50 | p99 | p99.9 | a plain sleep is late by (p50, p99, p99.9) |\n|---|---|---|---|---|")
    for latency in (None, *LATENCIES):
        these = [run for run in runs if run["latency"] == latency]
        seen = [statistics.median(run["seen_ns"][place] for run in these) for place in range(3)]
        slip = [statistics.median(run["slip_ns"][place] for run in these) for place in range(3)]
        cells = []
        for place, value in enumerate(seen):
            asked = LATENCIES[latency][place] if latency else None
            ok = asked is None or kept(asked, value)
            bad |= not ok
            text = f"{value / 1e3:.0f}" + ("" if asked is None else f" of {asked / 1e3:.0f}")
            cells.append(text if ok else f"**{text}**")
        print(f"| {f'`{latency}`' if latency else 'no rule'} | {' | '.join(cells)} | {', '.join(f'{value / 1e3:.0f}' for value in slip)} |")
    print("\nMicroseconds; bold: more than 5 % and more than 100 us away.")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())

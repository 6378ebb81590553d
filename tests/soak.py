"""The soak: a small, full, busy SR that is killed again and again. ``make soak MINUTES=10``, ``script/soak --help``.

A real daemon with hardly any memory for maps serves an SR whose size limit keeps the cleaner working all the time. Several
workers (`soak_worker`) write, zero, trim, flush, snapshot, clone, revert, delete and resize on disks of their own, dense ones and
a sparse one; after some seconds the daemon is killed, or now and then stopped. Before it is started again the store is sometimes
opened and examined from inside (`Store._check`), and sometimes left there as if that process had died as well. Then every
byte of every disk and snapshot is read and held against what is known (`soak_model`): what was acknowledged is there, what
was not may be, and nothing else is.

"No space" must be honest: it counts as a failure while clearly less than the limit is in use. The seed is printed; with the same one
the workers do the same things, as far as time lets them.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx

_TESTS = Path(__file__).parent
sys.path[:0] = [str(_TESTS.parent), str(_TESTS / "nbd_export")]

from daemon_tools import Simsrd  # noqa: E402
from soak_model import BLOCK, Family, Layout, live_blocks  # noqa: E402
from soak_worker import Daemon, Plan, Worker  # noqa: E402

from simsr.store.files import DiskDirectory  # noqa: E402
from simsr.store.node_table import MapMemory  # noqa: E402
from simsr.store.store import Store  # noqa: E402

__all__ = ["Soak", "main"]

LIMIT_BYTES = 192 << 20
MAP_MEMORY_BYTES = 4 << 20
ROUND_MIN_S, ROUND_MAX_S = 1.0, 8.0
SHORT_PART, SHORT_MAX_S = 0.3, 0.5  # of the rounds are so short that one crash follows the other
KILLS_PART = 0.85  # of the rounds end with SIGKILL, the others with SIGTERM
GREEDY_PART = 0.25  # of the rounds the workers take all the space there is
EXAMINED_PART = 0.3
HONEST_PART = 0.6  # of the limit must be in use when there is "no space"
JOIN_S = 120
_NOISE = re.compile(r"ERROR|Traceback|\bbug\b")
_COUNTED = ("segments_cleaned", "blocks_moved", "map_nodes_evicted", "map_nodes_paged_in")


def plans(limit_bytes: int) -> list[Plan]:
    """Two workers with dense disks, one with a sparse one; together they may fill 85 % of the SR."""
    blocks = limit_bytes // BLOCK
    return [
        Plan("dense", Layout(), blocks // 8, blocks * 35 // 100, 12),
        Plan("other", Layout(), blocks // 12, blocks * 30 // 100, 16),
        Plan("sparse", Layout(stride_blocks=513), blocks // 24, blocks * 20 // 100, 10),
    ]


class Soak:
    """Rounds on one root. ``tell`` gets a line now and then."""

    def __init__(self, root: str, seed: int, limit_bytes: int = LIMIT_BYTES, tell=print) -> None:
        self.seed, self.limit_bytes, self.tell = seed, limit_bytes, tell
        self.simsrd = Simsrd(root, "--map-memory", str(MAP_MEMORY_BYTES))
        self.plans = plans(limit_bytes)
        self.families = [Family() for _ in self.plans]
        self.counts: Counter[str] = Counter()
        self.rounds = 0
        self.recovery_max_s = 0.0
        self.sectors_verified = 0
        self._next_stamp = 1
        self._stamps = threading.Lock()
        self._log_seen = 0
        self._dishonest: list[str] = []
        self.sr = ""

    def take(self, count: int) -> int:
        """The first of ``count`` numbers that nobody has had before."""
        with self._stamps:
            self._next_stamp += count
            return self._next_stamp - count

    def run(self, seconds: float, enough: Callable[[], bool] = lambda: True) -> None:
        """Soak so long, and then until it was ``enough``; returns after the final verification. Raises AssertionError, with the seed and the
        round in its notes."""
        end = time.monotonic() + seconds
        try:
            self.simsrd.start()
            self.sr = self.simsrd.post("/v1/srs", name="soak", limit_bytes=self.limit_bytes)["uuid"]
            while time.monotonic() < end or not enough():
                self.one_round()
                self.rounds += 1
            self.simsrd.stop_cleanly()
            self.examine(leave=False)
        except BaseException as error:
            error.add_note(f"soak: seed {self.seed}, round {self.rounds}")
            Path(f"{self.simsrd.root}.log.kept").write_text(self.simsrd.log)  # the log itself goes
            raise
        finally:
            self.simsrd.end()

    def one_round(self) -> None:
        """Load, end, perhaps examine, start, verify."""
        rng = random.Random(f"{self.seed} round {self.rounds}")
        workers = [self.worker(number) for number in range(len(self.plans))]
        for worker in workers:
            worker.start()
        short = rng.random() < SHORT_PART
        deadline = time.monotonic() + (rng.uniform(0, SHORT_MAX_S) if short else rng.uniform(ROUND_MIN_S, ROUND_MAX_S))
        while time.monotonic() < deadline and all(worker.is_alive() for worker in workers):
            time.sleep(0.05)
        self.count()
        killed = rng.random() < KILLS_PART
        self.end_daemon(workers, killed)
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        assert not self._dishonest, self._dishonest[0]
        self.look_at_log()
        if rng.random() < EXAMINED_PART:
            self.examine(leave=rng.random() < 0.5)
        began = time.monotonic()
        self.simsrd.start()
        self.recovery_max_s = max(self.recovery_max_s, time.monotonic() - began)
        self.verify(workers)
        in_use = sum(map(live_blocks, self.families)) * BLOCK / self.limit_bytes
        self.tell(
            f"round {self.rounds}: {'killed' if killed else 'stopped'}, {sum(len(f.vdis) for f in self.families)} VDIs with "
            f"{in_use:.0%} of the SR verified, {self.counts['blocks_moved']} blocks moved by the cleaner so far"
        )

    def worker(self, number: int) -> Worker:
        rng = random.Random(f"{self.seed} worker {number} round {self.rounds}")
        daemon = Daemon(self.simsrd.socket, self.simsrd.nbd_socket)
        plan = self.plans[number]
        if random.Random(f"{self.seed} greedy round {self.rounds}").random() < GREEDY_PART:
            plan = replace(plan, share_blocks=self.limit_bytes // BLOCK)
        return Worker(plan, self.families[number], daemon, rng, self.take, self.counts, self.no_space)

    def no_space(self) -> None:
        """A worker was told that there is no space."""
        in_use = sum(map(live_blocks, self.families)) * BLOCK
        if in_use < HONEST_PART * self.limit_bytes:
            try:
                sr = self.simsrd.get(f"/v1/srs/{self.sr}")
            except httpx.TransportError:  # it has been killed meanwhile
                return
            told = sr["space"] | {key: value for key, value in sr["statistics"].items() if key.startswith("segments_")}
            self._dishonest.append(f"no space, with {in_use} of {self.limit_bytes} bytes in use; the daemon says {told}")

    def count(self) -> None:
        """Add up what the daemon has counted since it was started."""
        try:
            statistics = self.simsrd.get(f"/v1/srs/{self.sr}")["statistics"]
        except httpx.TransportError:
            return
        for name in _COUNTED:
            self.counts[name] += statistics[name]

    def end_daemon(self, workers: list[Worker], killed: bool) -> None:
        for worker in workers:
            worker.stopping.set()
        if killed:
            self.simsrd.kill()
        else:
            self.simsrd.stop_cleanly()
        self.counts["kills" if killed else "stops"] += 1
        for worker in workers:
            worker.join(JOIN_S)
            assert not worker.is_alive(), f"{worker.name} does not notice that the daemon is gone"

    def look_at_log(self) -> None:
        new = self.simsrd.log[self._log_seen :]
        self._log_seen += len(new)
        noise = [line for line in new.splitlines() if _NOISE.search(line)]
        assert not noise, "simsrd logged:\n" + "\n".join(noise[:20])

    def examine(self, leave: bool) -> None:
        """Open the store, count everything anew, and close it, or ``leave`` it as if we had been killed."""
        store = Store.open(DiskDirectory(f"{self.simsrd.root}/sr/{self.sr}"), MapMemory(MAP_MEMORY_BYTES))
        try:
            store._check()
        finally:
            store.abandon() if leave else store.close()
        self.counts["examined"] += 1

    def verify(self, workers: list[Worker]) -> None:
        """Every VDI that should be there is, no other, and each holds what it must."""
        there = {vdi["uuid"]: vdi for vdi in self.simsrd.get("/v1/vdis")}
        for worker in workers:
            worker.resolve(there)
        unknown = set(there) - {name for family in self.families for name in family.vdis}
        assert not unknown, f"VDIs that nobody has made, or that were deleted: {unknown}"
        for worker in workers:
            worker.server = Daemon(self.simsrd.socket, self.simsrd.nbd_socket)
            try:
                self.sectors_verified += worker.settle()
            except AssertionError as error:
                error.add_note(f"{worker.name}, steps: {', '.join(worker.trace[-12:])}")
                raise
            finally:
                worker.server.api.close()

    def summary(self) -> str:
        written, verified = self.counts["sectors written"] * 512 >> 20, self.sectors_verified * 512 >> 20
        names = ("burst", "rewrite", "snapshot", "clone", "revert", "delete", "resize", "relieve", "out of space", "examined")
        return (
            f"{self.counts['kills']} kills, {self.counts['stops']} stops; {written} MiB written, {verified} MiB verified; "
            + ", ".join(f"{self.counts[name]} {name}" for name in names)
            + "; "
            + ", ".join(f"{name} {self.counts[name]}" for name in _COUNTED)
            + f"; slowest start {self.recovery_max_s:.2f} s"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description="Random operations on a small, full SR, with kills.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--seed", type=int, default=None, help="repeat the soak that printed this seed")
    parser.add_argument("--limit", type=int, default=LIMIT_BYTES >> 20, metavar="MIB", help="size of the SR (default %(default)s)")
    parser.add_argument("--dir", default="/var/tmp", help="where the root of the daemon is made (default /var/tmp)")
    arguments = parser.parse_args(argv)
    seed = random.randrange(1 << 31) if arguments.seed is None else arguments.seed
    print(f"soak: seed {seed}", flush=True)
    directory = tempfile.mkdtemp(prefix="soak-", dir=arguments.dir)
    soak = Soak(f"{directory}/r", seed, arguments.limit << 20, lambda line: print(f"soak: {line}", flush=True))
    try:
        soak.run(arguments.minutes * 60)
    except BaseException as error:
        print(f"soak: FAILED with seed {seed} in round {soak.rounds}; what is left is in {directory}", file=sys.stderr)
        print(f"soak: {soak.summary()}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            shutil.rmtree(directory)
            return 130
        raise
    shutil.rmtree(directory)
    print(f"soak: {soak.summary()}\nsoak: everything was there")
    return 0


if __name__ == "__main__":
    sys.exit(main())

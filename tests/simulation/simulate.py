"""Runs seeds of the simulation: ``script/simulate --seeds 1000``. See docs/simulation.md."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import trio
import trio.testing

sys.path.insert(0, str(Path(__file__).parents[1] / "nbd_export"))  # for nbd_wire

from sim_machine import Failure
from sim_world import World
from trio._core import _run as trio_run

from nbd_export import reading

__all__ = ["KEPT", "Summary", "Tally", "kept_seeds", "play"]

KEPT = Path(__file__).with_name("seeds.txt")
LAST_EVENTS = 60


class _Bugs(logging.Handler):
    """What the daemon logs with a traceback is a bug."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(self.format(record))


def play(seed: int) -> World:
    """Play one seed, from its beginning to its end. Raises `Failure`, with the last events as a note; anything else is a bug, too."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    world = World(seed, clock)
    bugs = _Bugs()
    logger = logging.getLogger("simsr")
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers[:]
    logger.handlers, logger.propagate = [bugs], False
    logger.setLevel(logging.ERROR)
    lend_min_bytes, reading.LEND_MIN_BYTES = reading.LEND_MIN_BYTES, 4096  # the guests read little at a time
    before = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate()
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # trio's own hook: runs tasks in an order that only _r decides
    trio_run._r.seed(f"scheduler {seed}")
    gc.disable()  # when it runs depends on what ran before
    try:
        trio.run(world.run, clock=clock)
        if bugs.found:
            raise Failure(f"the daemon logged a bug: {bugs.found[0]}")
    except BaseException as error:
        cause = _first(error)
        cause.add_note("\n".join(["the last events:", *world.journal.lines[-LAST_EVENTS:], *bugs.found[:1]]))
        cause.add_note(f"seed {seed}; to repeat it: script/simulate --seed {seed}")
        raise cause from None
    finally:
        gc.enable()
        gc.collect()
        reading.LEND_MIN_BYTES = lend_min_bytes
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before[0]
        trio_run._r.setstate(before[1])
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    return world


def _first(error: BaseException) -> BaseException:
    """The failure that matters in a group of them."""
    found = [error]
    while any(isinstance(one, BaseExceptionGroup) for one in found):
        found = [part for one in found for part in (one.exceptions if isinstance(one, BaseExceptionGroup) else (one,))]
    failures = [one for one in found if isinstance(one, Failure)]
    others = [one for one in found if isinstance(one, Exception)]
    return (failures or others or found)[0]


class Tally(NamedTuple):
    """What a seed has done."""

    simulated_s: float
    crashes: int
    requests: int
    errors: int
    disconnects: int
    operations: int
    compared: int
    scenarios: int
    sectors_read: int
    steps: int

    @classmethod
    def of(cls, world: World) -> Tally:
        return cls(*(getattr(world, name) for name in cls._fields[:-1]), world.turns.steps)


class Summary:
    """What some seeds have done."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seeds = 0
        self.total = Tally(*(0 for _ in Tally._fields))

    def add(self, tally: Tally) -> None:
        self.seeds += 1
        self.total = Tally(*map(sum, zip(self.total, tally)))

    def __str__(self) -> str:
        took_s, total = time.perf_counter() - self.began, self.total
        hours = total.simulated_s / 3600
        parts = ("requests", "errors", "disconnects", "operations", "scenarios", "crashes")
        an_hour = ", ".join(f"{getattr(total, name) / max(hours, 1e-9):.0f} {name}" for name in parts)
        return (
            f"{self.seeds} seeds in {took_s:.0f} s: {hours:.1f} simulated hours, {hours / (took_s / 60):.1f} a minute; {total.crashes} crashes, "
            f"{total.requests} requests, {total.operations} operations, {total.compared} bitmaps of changed blocks, {total.steps} steps of worker "
            f"threads, {total.sectors_read * 512 >> 20} MiB read and judged. In an hour: {an_hour}"
        )


def kept_seeds() -> list[int]:
    """Seeds that once found something, and are always run."""
    lines = (line.partition("#")[0].strip() for line in KEPT.read_text().splitlines())
    return [int(line) for line in lines if line]


def _seeds(arguments: argparse.Namespace) -> Iterable[int]:
    if arguments.seed is not None:
        return [arguments.seed]
    first = random.randrange(1 << 40) if arguments.first is None else arguments.first
    count = arguments.seeds or (1 << 40 if arguments.minutes else 100)
    return range(first, first + count)


def _tally_of(seed: int) -> tuple[int, Tally | str]:
    """For a worker process: what the seed has done, or what it has found."""
    try:
        return seed, Tally.of(play(seed))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return seed, "".join(traceback.format_exception(error))


def _played(seeds: Iterable[int], jobs: int) -> Iterator[tuple[int, Tally | str]]:
    if jobs == 1:
        yield from map(_tally_of, seeds)
        return
    waiting = iter(seeds)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        under_way = {pool.submit(_tally_of, seed) for seed in islice(waiting, 2 * jobs)}
        try:
            while under_way:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                under_way |= {pool.submit(_tally_of, seed) for seed in islice(waiting, len(done))}
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="simulate", description="The whole daemon in one process, with simulated crashes, clients and time.")
    parser.add_argument("--seeds", type=int, help="how many (default 100)")
    parser.add_argument("--first", type=int, help="the first of them (default: at random)")
    parser.add_argument("--seed", type=int, help="only this one: repeats a failure exactly")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time (default: one for each core)")
    parser.add_argument("--keep-going", action="store_true", help="go on with other seeds when one has found something")
    parser.add_argument("--events", action="store_true", help="print all that happens, and no more; with --seed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.seed is not None and arguments.events:
        print("\n".join(play(arguments.seed).journal.lines))
        return 0
    summary, found = Summary(), []
    told = summary.began
    try:
        for seed, tally in _played(_seeds(arguments), 1 if arguments.seed is not None else arguments.jobs):
            if isinstance(tally, str):
                found.append(seed)
                print(f"{tally}\nsimulate: FAILED with seed {seed}", flush=True)
                if not arguments.keep_going:
                    break
            else:
                summary.add(tally)
            now = time.perf_counter()
            if now - told > 10:
                print(f"simulate: {summary}", flush=True)
                told = now
            if arguments.minutes and now - summary.began > arguments.minutes * 60:
                break
    except KeyboardInterrupt:
        print(f"simulate: interrupted; {summary}")
        return 130
    print(f"simulate: {summary}\nsimulate: {f'seeds that found something: {found}' if found else 'nothing found'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

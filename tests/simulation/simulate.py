"""Runs seeds of the simulation: ``script/simulate --seeds 1000``. See docs/simulation.md."""

from __future__ import annotations

import argparse
import gc
import logging
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import trio
import trio.testing

sys.path.insert(0, str(Path(__file__).parents[1] / "nbd_export"))  # for nbd_wire

from sim_machine import Failure
from sim_world import World
from trio._core import _run as trio_run

__all__ = ["KEPT", "Summary", "kept_seeds", "play"]

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


class Summary:
    """What some seeds have done."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seeds = self.crashes = self.requests = self.operations = self.sectors_read = self.disk_steps = 0
        self.simulated_s = 0.0

    def add(self, world: World) -> None:
        self.seeds += 1
        self.simulated_s += world.simulated_s
        self.disk_steps += world.turns.steps
        for name in ("crashes", "requests", "operations", "sectors_read"):
            setattr(self, name, getattr(self, name) + getattr(world, name))

    def __str__(self) -> str:
        took_s = time.perf_counter() - self.began
        rate = self.simulated_s / 3600 / (took_s / 60)
        return (
            f"{self.seeds} seeds in {took_s:.0f} s: {self.simulated_s / 3600:.1f} simulated hours, {rate:.1f} a minute; {self.crashes} crashes, "
            f"{self.requests} requests, {self.operations} operations, {self.disk_steps} steps of worker threads, "
            f"{self.sectors_read * 512 >> 20} MiB read and judged"
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="simulate", description="The whole daemon in one process, with simulated crashes, clients and time.")
    parser.add_argument("--seeds", type=int, help="how many (default 100)")
    parser.add_argument("--first", type=int, help="the first of them (default: at random)")
    parser.add_argument("--seed", type=int, help="only this one: repeats a failure exactly")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--events", action="store_true", help="print all that happens")
    arguments = parser.parse_args(argv)
    summary = Summary()
    told = summary.began
    for seed in _seeds(arguments):
        try:
            world = play(seed)
        except KeyboardInterrupt:
            print(f"simulate: interrupted at seed {seed}; {summary}")
            return 130
        except BaseException as error:
            error.add_note(f"simulate: FAILED with seed {seed}, after {summary}")
            raise
        summary.add(world)
        if arguments.events:
            print("\n".join(world.journal.lines))
        now = time.perf_counter()
        if now - told > 10:
            print(f"simulate: {summary}", flush=True)
            told = now
        if arguments.minutes and now - summary.began > arguments.minutes * 60:
            break
    print(f"simulate: {summary}\nsimulate: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())

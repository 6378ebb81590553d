"""The deterministic simulation (docs/simulation.md): seeds that once found something, fresh ones for a while, and that a seed is a seed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from sim_machine import Failure
from simulate import Summary, Tally, kept_seeds, play

SECONDS = 60
"""How long fresh seeds are played in the suite; `script/simulate` plays more."""

SEEDS_MIN = 8  # fewer prove too little, however slow the machine is
FIRST = 0
REPEATED = 17
"""A short one, with scenarios and backups."""


def test_a_seed_repeats_byte_by_byte():
    """Here, and in another process, where strings have other hashes and objects lie elsewhere."""
    once, again = play(REPEATED).journal.bytes(), play(REPEATED).journal.bytes()
    assert once == again
    assert len(once.splitlines()) > 500, "too little happened to prove anything"
    script = f"import hashlib, simulate; print(hashlib.sha256(simulate.play({REPEATED}).journal.bytes()).hexdigest())"
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env={**os.environ, "PYTHONHASHSEED": "77"}, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    assert told.stdout.strip() == sha256(once).hexdigest()


@pytest.mark.parametrize("seed", kept_seeds())
def test_seeds_that_found_something(seed):
    play(seed)


def test_fresh_seeds(request):
    only = request.config.getoption("--seed")
    summary, seed = Summary(), FIRST if only is None else only
    ends = time.monotonic() + SECONDS * request.config.getoption("--effort")
    while time.monotonic() < ends or summary.seeds < SEEDS_MIN:
        summary.add(Tally.of(play(seed)))
        seed += 1
        if only is not None:
            return
    print(summary)
    seeds, total = summary.seeds, summary.total
    assert total.crashes > seeds and total.operations > 10 * seeds and total.simulated_s > 60 * seeds
    assert total.requests > 100 * seeds and total.sectors_read > 1000 * seeds


@pytest.mark.parametrize("lie", [
    "a lost write", "a flush that flushes nothing", "a clone that is another's", "a change that is not told",
])  # fmt: skip
def test_what_is_wrong_is_found(lie, monkeypatch):
    """The daemon is made to lie; the simulation has to notice within a few seeds."""
    if lie == "a lost write":
        from simsr.store.volume import Volume

        honest = Volume.write
        count = 0

        def write(self, batch, start=0, fetched=None):
            nonlocal count
            count += 1
            return len(batch) if count % 50 == 0 else honest(self, batch, start, fetched)

        monkeypatch.setattr(Volume, "write", write)
    elif lie == "a flush that flushes nothing":
        from simsr.store.memory import MemoryFile

        monkeypatch.setattr(MemoryFile, "datasync", lambda self: self._owner._step(f"sync {self._name}"))
    elif lie == "a change that is not told":
        from simsr.store import units

        mark = units.mark
        monkeypatch.setattr(units, "mark", lambda bitmap, first, last: mark(bitmap, first + 1, last))
    else:
        from simsr.sr.repository import Repository

        honest_clone = Repository.clone
        monkeypatch.setattr(Repository, "clone", lambda self, vdi, **more: honest_clone(self, next(iter(self.vdis.values())), **more))
    with pytest.raises((Failure, AssertionError)):
        for seed in (7, 12, *range(6)):
            play(seed)

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
from simulate import Summary, kept_seeds, play

SECONDS = 25
"""How long fresh seeds are played in the suite; `script/simulate` plays more."""

SEEDS_MIN = 8  # fewer prove too little, however slow the machine is
FIRST = 1_000_000


def test_a_seed_repeats_byte_by_byte():
    """Here, and in another process, where strings have other hashes and objects lie elsewhere."""
    once, again = play(3).journal.bytes(), play(3).journal.bytes()
    assert once == again
    assert len(once.splitlines()) > 500, "too little happened to prove anything"
    assert play(5).journal.bytes() != once
    script = "import hashlib, simulate; print(hashlib.sha256(simulate.play(3).journal.bytes()).hexdigest())"
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
        summary.add(play(seed))
        seed += 1
        if only is not None:
            return
    print(summary)
    assert summary.seeds > 3 and summary.crashes > 2 * summary.seeds and summary.operations > 10 * summary.seeds
    assert summary.requests > 100 * summary.seeds and summary.sectors_read > 1000 * summary.seeds


@pytest.mark.parametrize("lie", ["a lost write", "a flush that flushes nothing", "a clone that is another's"])
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
    else:
        from simsr.sr.repository import Repository

        honest_clone = Repository.clone
        monkeypatch.setattr(Repository, "clone", lambda self, vdi, **more: honest_clone(self, next(iter(self.vdis.values())), **more))
    with pytest.raises((Failure, AssertionError)):
        for seed in range(12):
            play(seed)

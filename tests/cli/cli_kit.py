"""What the tests of the command line have in common besides fixtures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Outcome:
    """What a run of ``simsr`` left behind."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def wait_until(true: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Return when ``true()`` is so, fail the test if that takes too long."""
    give_up = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.01)


def processes(*words: str, parent: int | None = None) -> list[int]:
    """Return the processes whose arguments contain all of ``words``, those of one parent if it is given."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode(errors="replace")
            parent_pid = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        if parent in (None, parent_pid) and all(word in arguments for word in words):
            found.append(int(process.name))
    return found

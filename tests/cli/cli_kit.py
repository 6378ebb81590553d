"""What the tests of the command line have in common besides fixtures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Outcome:
    """What a run of ``simsr`` left behind."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def wait_until(true: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Return when ``true()`` is so, fail the test if that takes too long."""
    give_up = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.01)

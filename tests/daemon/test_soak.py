"""Two minutes of the soak (tests/soak.py): random operations on a small, full SR with little memory, killed again and again."""

from __future__ import annotations

import pytest
from soak import Soak

SECONDS = 120


# httpcore does not close its socket when the daemon dies while it connects.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_everything_is_there_after_two_minutes_of_soak(root, request):
    seed = request.config.getoption("--seed") or 0
    soak = Soak(root, seed)
    soak.run(SECONDS * request.config.getoption("--effort"))
    print(f"seed {seed}: {soak.summary()}")
    counts = soak.counts
    assert soak.rounds and counts["kills"], "nothing was proved: the daemon was never killed"
    assert counts["blocks_moved"] > 200 * soak.rounds, "the cleaner had too little to do to prove anything"
    assert counts["map_nodes_evicted"] > 100 * soak.rounds, "the maps fitted into memory"
    for name in ("burst", "snapshot", "clone", "revert", "delete", "resize"):
        assert counts[name] >= soak.rounds // 2, f"only {counts[name]} times {name}"

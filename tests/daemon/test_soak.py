"""A minute of the soak (tests/soak.py): random operations on a small, full SR with little memory, killed again and again."""

from __future__ import annotations

import pytest
from soak import Soak

SECONDS, ROUNDS_MAX = 60, 200


# httpcore does not close its socket when the daemon dies while it connects.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_everything_is_there_after_a_minute_of_soak(root, request):
    seed = request.config.getoption("--seed") or 0
    soak = Soak(root, seed)
    counts = soak.counts
    operations = ("burst", "snapshot", "clone", "revert", "delete", "resize")

    def proved() -> bool:
        """The daemon was killed, the cleaner had to work, and the maps did not fit into memory; a slow machine takes longer for it."""
        assert soak.rounds < ROUNDS_MAX, f"nothing was proved: {soak.summary()}"
        worked = counts["blocks_moved"] > 5000 and counts["map_nodes_evicted"] > 2500 and min(counts[name] for name in operations) >= 5
        return counts["kills"] >= 3 and worked

    soak.run(SECONDS * request.config.getoption("--effort"), proved)
    print(f"seed {seed}: {soak.summary()}")

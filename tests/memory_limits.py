"""What this process may lock in memory: tests that need more are skipped."""

from __future__ import annotations

import re
import resource
from pathlib import Path

__all__ = ["may_lock"]

_CAP_IPC_LOCK = 14  # capabilities(7)


def may_lock(size_bytes: int) -> bool:
    """Whether mlock(2) of so much is allowed, to this process or to a daemon that it starts."""
    capabilities = int(re.search(r"CapEff:\s+(\w+)", Path("/proc/self/status").read_text())[1], 16)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return bool(capabilities >> _CAP_IPC_LOCK & 1) or hard == resource.RLIM_INFINITY or hard >= size_bytes

"""Daemons with a mount, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuse_kit import Mounted, mounted_daemon


@pytest.fixture(scope="module")
def direct() -> Iterator[Mounted]:
    """Nothing is cached by the kernel."""
    with mounted_daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def writeback() -> Iterator[Mounted]:
    """The kernel caches."""
    with mounted_daemon("--mount-cache", "writeback") as daemon:
        yield daemon

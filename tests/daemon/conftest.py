"""Fixtures with a real daemon."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemon_tools import Simsrd, short_directory


@pytest.fixture
def folder() -> Iterator[str]:
    """A temporary directory with a short path."""
    with short_directory() as path:
        yield path


@pytest.fixture
def root(folder: str) -> str:
    """A root for a daemon; does not exist yet."""
    return f"{folder}/r"


@pytest.fixture
def daemon(root: str) -> Iterator[Simsrd]:
    """A running daemon, which has to end well after the test."""
    simsrd = Simsrd(root)
    try:
        yield simsrd.start()
        simsrd.stop_cleanly()
    finally:
        simsrd.end()

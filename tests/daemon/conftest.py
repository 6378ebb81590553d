"""Fixtures with a real daemon."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_tools import Simsrd, short_directory

sys.path.insert(0, str(Path(__file__).parent.parent / "nbd_export"))  # for nbd_wire


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

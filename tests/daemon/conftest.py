"""Fixtures with a real daemon."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_tools import Simsrd, running_simsrd, short_directory

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
    with Simsrd(root) as simsrd:
        yield simsrd


@pytest.fixture(scope="module")
def shared() -> Iterator[Simsrd]:
    """A daemon with one SR, "s", for all tests of a file; it has to end well."""
    with running_simsrd() as simsrd:
        simsrd.create_sr("s")
        yield simsrd

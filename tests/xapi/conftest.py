"""Fixtures: a world of simsrd, xapi and the stock client for each fidelity, shared by all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from xapi_kit import World


@pytest.fixture(scope="module")
def upstream() -> Iterator[World]:
    """xapi as it is."""
    world = World()
    yield world
    world.close()


@pytest.fixture(scope="module")
def fixed() -> Iterator[World]:
    """xapi with the gaps of VM.revert filled."""
    world = World("--fidelity", "fixed")
    yield world
    world.close()


@pytest.fixture(scope="module")
def native_sr(upstream: World) -> str:
    """An SR whose driver reverts."""
    return upstream.sr("native")

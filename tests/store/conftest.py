"""Fixtures of the store's tests."""

from __future__ import annotations

import random

import pytest

from simsr.store import cleaner, walk


@pytest.fixture
def small_slices(monkeypatch):
    """Walks pause wherever they may, look few nodes ahead, and take many nodes and columns in several pieces."""

    def shrink(rng: random.Random) -> None:
        monkeypatch.setattr(walk, "_SLICE_COST", rng.choice((1, 1, 30, 250)))
        monkeypatch.setattr(walk, "_PAGES", rng.choice((1, 2, 64)))
        monkeypatch.setattr(walk, "_LEAVES_A_SLICE", rng.choice((1, 2, 1000)))
        monkeypatch.setattr(walk, "_INNERS_A_SLICE", rng.choice((1, 2, 16)))
        monkeypatch.setattr(walk, "_VALUES_A_SLICE", rng.choice((1, 4, 9, 8000)))
        monkeypatch.setattr(cleaner, "_GAIN_MIN", 0.0)
        monkeypatch.setattr(cleaner, "BATCH_BLOCKS", rng.choice((1, 5, 64)))

    return shrink

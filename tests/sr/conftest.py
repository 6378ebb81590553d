"""Fixtures of the model's tests."""

import pytest
from sr_kit import BLOCK, World, fill


@pytest.fixture
def world():
    return World()


@pytest.fixture
def sr(world):
    return world.repository


@pytest.fixture
def disk(sr):
    vdi = sr.create(6 * BLOCK, name="disk", description="first", sm_config={"a": "1"})
    fill(vdi, 1)
    return vdi

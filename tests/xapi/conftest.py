"""Fixtures: a world of simsrd, xapi and the stock client for each fidelity, shared by all tests of a run. A test that restarts
a server leaves it running; one that needs a world to itself makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from wrapped_driver import Plan, wrapped
from xapi_kit import World


@pytest.fixture(scope="session")
def upstream() -> Iterator[World]:
    """xapi as it is."""
    world = World()
    yield world
    world.close()


@pytest.fixture(scope="session")
def fixed() -> Iterator[World]:
    """xapi with the gaps of VM.revert filled; its driver can be told to fail as well (`plan_for`)."""
    world = World("--fidelity", "fixed", drivers={"SimSR": wrapped(), "OddSR": wrapped()})
    yield world
    world.close()


@pytest.fixture(scope="session")
def native_sr(upstream: World) -> str:
    """An SR whose driver reverts."""
    return upstream.shared_sr()


@pytest.fixture(scope="session")
def wrapped_world() -> Iterator[World]:
    """xapi with drivers that can be told to fail: ``odd`` like SimSR, ``noclone``, ``norevert``, ``cbt``."""
    cbt = ("VDI_CONFIG_CBT", "VDI_GENERATE_CONFIG", "VDI_MIRROR")
    world = World(
        drivers={
            "OddSR": wrapped(),
            "NoCloneSR": wrapped(without=("VDI_CLONE",)),
            "NoRevertSR": wrapped(without=("VDI_REVERT",)),
            "CbtSR": wrapped(added=cbt),
        }
    )
    yield world
    world.close()


@pytest.fixture
def plan_for() -> Iterator[Callable[[World], Plan]]:
    """``plan_for(world)``: what the wrapped drivers of a world do next; forgotten after the test."""
    plans: list[Plan] = []

    def make(world: World) -> Plan:
        plan = Plan(world)
        plan.set()
        plan.forget_calls()
        plans.append(plan)
        return plan

    yield make
    for plan in plans:
        plan.set()


@pytest.fixture
def plan(wrapped_world: World, plan_for: Callable[[World], Plan]) -> Plan:
    """The plan for `wrapped_world`."""
    return plan_for(wrapped_world)

"""The host without a daemon: how long it waits for clients that are leaving."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from trio.testing import MockClock

from simsr.daemon.host import DETACH_TURNS, Host
from simsr.errors import VdiInUse


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


def vdi(*kinds: str) -> SimpleNamespace:
    return SimpleNamespace(attachments={number: SimpleNamespace(kind=kind) for number, kind in enumerate(kinds)})


class Operation:
    """It finds the VDI in use ``times`` times; each time the machine stands still for a minute."""

    def __init__(self, times: int, clock: MockClock) -> None:
        self.times, self.clock, self.tried = times, clock, 0

    def __call__(self) -> str:
        self.clock.jump(60)
        self.tried += 1
        if self.tried <= self.times:
            raise VdiInUse(operation="delete", uuid="it", by="nbd")
        return "done"


async def test_the_wait_for_those_who_leave_is_not_eaten_by_a_machine_that_stands_still(autojump_clock):
    operation = Operation(DETACH_TURNS, autojump_clock)
    assert await Host.when_unused(None, vdi("nbd"), operation) == "done"


async def test_who_stays_is_named_in_the_end(autojump_clock):
    operation = Operation(10_000, autojump_clock)
    with pytest.raises(VdiInUse):
        await Host.when_unused(None, vdi("nbd"), operation, vdi("nbd", "fuse"))
    assert operation.tried == DETACH_TURNS + 1


async def test_a_host_that_has_it_attached_is_not_waited_for(autojump_clock):
    operation = Operation(1, autojump_clock)
    with pytest.raises(VdiInUse):
        await Host.when_unused(None, vdi("nbd"), operation, vdi("attach"))
    assert operation.tried == 1

"""Requests that were carried out ahead of time, while their answers are held back: sent at their time, unless orders come in between. Under a mock
clock."""

from __future__ import annotations

import contextlib

import pytest
import trio
from scenario_stage import stage, timed
from trio.testing import MockClock

from nbd_export.disk import Dropped
from simsr.daemon.alarm import Alarm

DATA = b"x" * 512


class EagerAlarm(Alarm):
    """Has everything carried out as soon as it comes."""

    def lead_ns(self, op):
        return 10**15


class Reply:
    """When an answer was made and sent, in seconds."""

    def __init__(self):
        self.taken_ns = self.woken_ns = int(trio.current_time() * 1e9)
        self.prepared, self.sent, self.data = [], [], None

    def prepare(self, data):
        self.prepared.append(trio.current_time())
        self.data = data

    def send(self):
        assert self.prepared, "nothing to send yet"
        self.sent.append(trio.current_time())


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


@contextlib.asynccontextmanager
async def writing(text):
    """A scenario, and the reply to a write that comes 1 s after its beginning; what the write raises is raised at the end of the block."""
    async with stage(text, alarm=EagerAlarm()) as here:
        await trio.sleep(1)
        reply = Reply()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here["one"].write, "write", 0, 512, DATA, False, reply)
            await trio.sleep(0.5)
            assert here.disks["one"].content[:512] == DATA and len(reply.prepared) == 1 and not reply.sent
            yield here, reply, nursery


def raised(group):
    error = group.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


PATHS = '[profile.p]\npaths = { A = "optimized", B = "standby" }\nlatency.all = "20s"\n[[phase]]\nfor = "10s"\n'


async def test_sent_once_at_the_time(autojump_clock):
    async with writing('[profile.p]\nlatency.write = "3s"\n') as (_, reply, _):
        pass
    assert reply.sent == [pytest.approx(4)]


@pytest.mark.parametrize("delay_s", [0, 3])
async def test_every_operation_is_answered_once(autojump_clock, delay_s):
    async with stage(f'[profile.p]\nlatency.all = "{delay_s}s"\n[[expect]]\nthat = "client.errors == 0"\n', alarm=EagerAlarm()) as here:
        disk, began = here["one"], 0
        for call in (partial_write(disk, "write", DATA), partial_write(disk, "zero"), partial_write(disk, "trim"), disk.flush):
            reply, began = Reply(), trio.current_time()
            await call(reply=reply)
            assert reply.sent == [pytest.approx(began + delay_s)] and reply.data is None
        reply, began = Reply(), trio.current_time()
        data = await disk.read(0, 512, reply)
        assert reply.data is data and reply.sent == [pytest.approx(began + delay_s)]


def partial_write(disk, op, payload=None):
    async def call(reply):
        await disk.write(op, 0, 512, payload, False, reply)

    return call


async def test_not_sent_when_an_error_comes_first(autojump_clock):
    text = PATHS + '[[phase]]\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "down", inflight = "error" }\n'
    with pytest.raises(ExceptionGroup) as caught:
        async with writing(text) as (_, reply, _):
            pass
    assert isinstance(raised(caught), OSError) and trio.current_time() == pytest.approx(10) and not reply.sent


async def test_sent_when_let_go_after_a_hang_that_came_first(autojump_clock):
    text = (
        PATHS + '[[phase]]\nfor = "30s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "down", inflight = "hang" }\n'
        '[[phase]]\n[[phase.rule]]\naction = { path = "B", state = "optimized", release = "hang" }\n'
    )
    async with writing(text) as (here, reply, _):
        await trio.sleep_until(autojump_clock.current_time() + 30)
        assert here.play.statistics()["hung"] == 1 and not reply.sent
    assert reply.sent == [pytest.approx(40)]


async def test_not_sent_when_the_power_goes_first(autojump_clock):
    text = '[profile.p]\nlatency.write = "20s"\n[[rule]]\nmatch = { op = "flush" }\naction = { power_cut = { keep = "none" } }\n'
    with pytest.raises(ExceptionGroup) as caught:
        async with writing(text) as (here, reply, _):
            with pytest.raises(Dropped):
                await here["one"].flush()
    assert isinstance(raised(caught), Dropped) and trio.current_time() < 20 and not reply.sent


async def test_not_sent_when_the_client_has_gone(autojump_clock):
    async with writing('[profile.p]\nlatency.write = "20s"\n') as (_, reply, nursery):
        nursery.cancel_scope.cancel()
    await trio.sleep(60)
    assert not reply.sent


async def test_delays_of_many_requests_add_up(autojump_clock):
    """No request's error is left to the next one."""
    async with stage('[profile.p]\nlatency.read = "uniform(200us, 2ms)"\n', alarm=EagerAlarm()) as here:
        asked_s, took_s = 0.0, 0.0
        for _ in range(300):
            reply = Reply()
            _, took = await timed(here["one"].read(0, 512, reply))
            took_s += took
            asked_s += reply.sent[0] - reply.taken_ns / 1e9
    assert took_s == pytest.approx(asked_s) == pytest.approx(300 * 1.1e-3, rel=0.1)

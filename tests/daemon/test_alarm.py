"""The alarm: what it learns about how early requests have to go on. (That it wakes in time is measured, by script/bench-latency.)"""

from __future__ import annotations

import pytest
import trio

from simsr.daemon.alarm import Alarm, current_ns

S = 1_000_000_000


@pytest.fixture
async def alarm(nursery):
    one = Alarm()
    await nursery.start(one.run)
    return one


async def test_late_answers_make_requests_begin_earlier_and_early_ones_later(alarm):
    first = alarm.lead_ns("read")
    assert 0 < first < 200_000
    for _ in range(10):
        alarm.learn("read", current_ns() - S)
    later = alarm.lead_ns("read")
    assert later > first and alarm.lead_ns("write") == first, "each operation on its own"
    for _ in range(20):
        alarm.learn("read", current_ns() + S)
    assert alarm.lead_ns("read") < first
    alarm.learn("read", 0)
    assert alarm.lead_ns("read") < first, "what was due at no time teaches nothing"


async def test_it_follows_the_median_and_not_the_worst(alarm):
    for number in range(500):
        alarm.learn("read", current_ns() + (-100 * S if number % 5 == 0 else S))
    assert alarm.lead_ns("read") <= 2_000


async def test_within_bounds(alarm):
    for _ in range(1000):
        alarm.learn("read", current_ns() - S)
        alarm.learn("write", current_ns() + S)
    assert alarm.lead_ns("read") < 1_000_000 and alarm.lead_ns("write") == 0


async def test_who_is_not_run_learns_nothing():
    """Under a mock clock nothing takes time, so nothing may begin early."""
    alarm = Alarm()
    alarm.learn("read", current_ns() - S)
    assert alarm.lead_ns("read") == 0


async def test_it_wakes_not_before_the_time(alarm):
    for delay_ns in (200_000, 3_000_000):
        due = current_ns() + delay_ns
        with trio.fail_after(120):
            await alarm.wait(trio.Event(), due)
        assert current_ns() >= due

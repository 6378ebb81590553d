"""What a run records and says in the end, with disks, clients and faults, under a mock clock."""

from __future__ import annotations

import json

import pytest
import trio
from scenario_stage import stage
from trio.testing import MockClock

from nbd_export.disk import Dropped
from scenarios.loader import library_text
from scenarios.report import report_of


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


async def keep_busy(disk, until_s, every_s=0.05):
    """A guest that reads and writes all the time, whatever happens."""
    number = 0
    while trio.current_time() < until_s:
        number += 1
        try:
            if number % 2:
                await disk.write("write", number % 64 * 4096, 4096, b"w" * 4096, False)
            else:
                await disk.read(number % 64 * 4096, 4096)
        except (OSError, Dropped):
            pass
        await trio.sleep(every_s)


def verdicts(play):
    return {one["that"]: one["verdict"] for one in play.statistics()["expectations"]}


def report(play):
    return json.loads(json.dumps(report_of(play.recording())))


async def test_a_failover_as_the_library_has_it(autojump_clock):
    async with stage(library_text("san-controller-failover")) as here:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(keep_busy, here["one"], 149)
        await trio.sleep_until(150)
        here.play.end()
        assert verdicts(here.play) == {"client.errors == 0": "met", "gap('write').max < 30s": "met"}
        found = report(here.play)
    assert [(phase["name"], phase["begins_s"]) for phase in found["phases"]] == [
        ("healthy", 0), ("A dies", 60), ("B takes over, cache cold", 84), ("A flaps", 129), ("A flaps", 139),
    ]  # fmt: skip
    assert found["verdict"] == "met" and found["errors"] == 0 and found["hangs"]["count"] == 4
    assert 23.9 < found["hangs"]["max_s"] <= 24 and max(found["timeline"]["hanging"]) == 4
    (gap,) = [gap for gap in found["gaps"] if gap["op"] == "write"]
    assert 23.9 < gap["max_s"] < 24.5 and gap["name"] == "one"
    phases = {one["phase"]: one for one in found["operations"] if one["op"] == "write"}
    assert "A dies" not in phases, "nothing was answered"
    assert phases["healthy"]["p50_s"] < 0.001 < phases["B takes over, cache cold"]["p50_s"]
    line = found["timeline"]
    at = [number * line["bucket_s"] for number, count in enumerate(line["requests"]["write"]) if count]
    assert not [second for second in at if 61 < second < 83]
    assert sum(line["requests"]["write"]) == phases[None]["count"] == sum(cell[2] for cell in found["latency"]["cells"]["write"])
    assert sum(line["hits"]["B takes over, cache cold/rule-2"]) > 100


async def test_a_hang_that_lasts_too_long_breaks_it_while_it_hangs(autojump_clock):
    text = '[[rule]]\nmatch = { op = "read" }\naction = { hang = true }\n[[expect]]\nthat = "hung.max < 120s"\n'
    async with stage(text) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here["one"].read, 0, 512)
        await trio.sleep(100)
        assert verdicts(here.play) == {"hung.max < 120s": "met"}
        await trio.sleep(30)
        assert verdicts(here.play) == {"hung.max < 120s": "broken"}
        here.play.end()
        await trio.sleep(1000)
        assert report(here.play)["hangs"]["max_s"] == pytest.approx(130, abs=0.01), "what comes after the end does not count"


CUT = '[[rule]]\nname = "cut"\nmatch = { op = "write" }\ntrigger = { nth = 4 }\naction = { power_cut = { keep = "none" } }\n'
LIE = '[[rule]]\nmatch = { op = "flush" }\naction = { lose = true }\n'
TORN = '[[rule]]\nmatch = { op = "write" }\ntrigger = { nth = 2 }\naction = { torn = "512B" }\n'


@pytest.mark.parametrize("rules, fua, lost", [(CUT, False, 0), (LIE + CUT, False, 3), (LIE, False, 0), (TORN, False, 1), (TORN, True, 1)])
async def test_flushed_writes_that_are_lost(autojump_clock, rules, fua, lost):
    async with stage(rules + '[[expect]]\nthat = "flushed_writes.lost == 0"\n') as here:
        disk = here["one"]
        assert verdicts(here.play) == {"flushed_writes.lost == 0": "not evaluated"}
        for number in range(3):
            await disk.write("write", number * 8192, 8192, b"w" * 8192, fua)
        await disk.flush()
        if "power_cut" in rules:
            with pytest.raises(Dropped):
                await disk.write("write", 0, 512, b"w" * 512, False)
            await trio.sleep(1)
        assert report(here.play)["flushed_writes"] == {"promised": 3, "lost": lost}
        assert verdicts(here.play) == {"flushed_writes.lost == 0": "broken" if lost else "met"}
        assert not lost or "power_cut" not in rules or bytes(here.disks["one"].content[:8192]) == bytes(8192)


async def test_errors_drops_and_clients_that_go(autojump_clock):
    text = (
        '[[rule]]\nname = "e"\nmatch = { op = "read" }\ntrigger = { nth = 1 }\naction = { error = "EIO" }\n'
        '[[rule]]\nname = "d"\nmatch = { op = "read" }\ntrigger = { nth = 2 }\naction = { disconnect = true }\n'
        '[[rule]]\nname = "h"\nmatch = { op = "read" }\ntrigger = { nth = 3 }\naction = { hang = true }\n'
        '[[rule]]\nname = "ev"\nmatch = { op = "flush" }\naction = { event = "flushed" }\n'
        '[[expect]]\nthat = "events(\'flushed\') == 1 and hits(\'e\') == 1 and client.disconnects == 1 and client.errors == 1"\n'
    )
    async with stage(text) as here:
        for expected in (OSError, Dropped):
            with pytest.raises(expected):
                await here["one"].read(0, 512)
        with trio.move_on_after(5):
            await here["one"].read(0, 512)
        await here["one"].flush()
        found = report(here.play)
    assert found["verdict"] == "met" and here.play.recorder.depth == 0 and found["hangs"]["now"] == 0
    reads = [one for one in found["operations"] if one["op"] == "read"]
    assert [(one["count"], one["errors"], one["bytes"]) for one in reads] == [(1, 1, 0)]
    assert found["gaps"][0]["max_s"] == pytest.approx(5) and found["events"][0]["name"] == "flushed"
    assert found["disks"][0]["clients"] == [{"kind": "qemu", "durability": "flush"}]
    assert found["rules"][0] == {"rule": "e", "action": "error", "in_force": True, "matched": 3, "hits": 1}


async def test_operations_of_the_control_plane_are_measured(autojump_clock):
    text = '[profile.p]\ncontrol.snapshot = "2s"\n[[expect]]\nthat = "max(\'snapshot\') == 2s"\n'
    async with stage(text) as here:
        await here.play.gate(here.vdis["one"]).meet_control("snapshot", "")
        assert set(verdicts(here.play).values()) == {"met"}

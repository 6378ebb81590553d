"""Loads and recordings without a daemon, under a mock clock: pace, lag, limits, what is in force on the disk, what is lost."""

from __future__ import annotations

import errno
import io
import random
from hashlib import sha256

import pytest
import trio
from scenario_stage import SIZE, RamDisk, stage
from trio.testing import MockClock, wait_all_tasks_blocked

from nbd_export.disk import Dropped
from scenarios.request import Request
from scenarios.traces import Record, convert, read
from scenarios.traces.own import count_lost
from scenarios.traces.workload import Workload, payload
from simsr.daemon import recording as recording_module
from simsr.daemon.alarm import Alarm
from simsr.daemon.direct import Direct
from simsr.daemon.load import Load
from simsr.daemon.recording import Recording, Tap, script
from simsr.daemon.scenario_text import library_text
from simsr.errors import BadScenario, BadTrace

MS, S, KIB = 10**6, 10**9, 1024


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


def rule(match="", action="", more=""):
    return f"[[rule]]\n{more}\nmatch = {{ {match} }}\naction = {{ {action} }}\n"


class Slow:
    """A disk that takes its time; notes when it was asked for what."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.seconds, self.error, self.asked = seconds, error, []
        self.now = self.most = 0

    async def _take(self, *what):
        self.asked.append((round(trio.current_time() - self.began, 6), *what))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await trio.sleep(self.seconds)
            if self.error is not None:
                raise self.error
        finally:
            self.now -= 1

    async def read(self, offset, length):
        await self._take("read", offset, length)
        return bytearray(length)

    async def write(self, op, offset, length, payload, fua):
        await self._take(op, offset, length)

    async def flush(self):
        await self._take("flush", 0, 0)


def records(*rows):
    return [Record(int(at * S), op, offset, length) for at, op, offset, length in rows]


async def played(found, disk, *, workload=None, **more):
    load = Load(lambda: Workload(lambda: iter(found), SIZE, 0, **(workload or {})), lambda: disk, Alarm(), **more)
    await load.prepare()
    disk.began = trio.current_time()
    await load.run()
    return load


class TestLoad:
    async def test_each_request_in_its_time(self, autojump_clock):
        disk = Slow()
        load = await played(records((0, "read", 0, 512), (1.5, "flush", 0, 0), (4, "zero", 4096, 4096)), disk)
        assert disk.asked == [(0, "read", 0, 512), (1.5, "flush", 0, 0), (4, "zero", 4096, 4096)]
        found = load.statistics()
        assert (found["issued"], found["answered"], found["lag_max_ns"], found["errors"]) == (3, 3, 0, {})
        assert found["is_over"] and found["seconds"] == pytest.approx(4) and found["problem"] is None

    async def test_twice_as_fast(self, autojump_clock):
        disk = Slow()
        await played(records((0, "read", 0, 512), (4, "read", 0, 512)), disk, workload={"speed": 2.0})
        assert [at for at, *_ in disk.asked] == [0, 2]

    async def test_requests_do_not_wait_for_each_other(self, autojump_clock):
        disk = Slow(10)
        load = await played(records(*[(number, "read", 0, 512) for number in range(5)]), disk)
        assert [at for at, *_ in disk.asked] == [0, 1, 2, 3, 4] and disk.most == 5 and load.statistics()["lag_max_ns"] == 0

    async def test_what_waits_for_room_is_late_and_that_is_said(self, autojump_clock):
        disk = Slow(10)
        load = await played(records(*[(number, "read", 0, 512) for number in range(4)]), disk, depth=2)
        assert [at for at, *_ in disk.asked] == [0, 1, 10, 11] and disk.most == 2
        assert load.statistics()["lag_max_ns"] == pytest.approx(8 * S, rel=1e-6)

    async def test_as_fast_as_it_goes(self, autojump_clock):
        disk = Slow(1)
        load = await played(records(*[(100 * number, "read", 0, 512) for number in range(6)]), disk, is_paced=False, depth=3)
        assert [at for at, *_ in disk.asked] == [0, 0, 0, 1, 1, 1] and load.statistics()["lag_max_ns"] == 0

    async def test_bytes_in_flight_are_bounded(self, autojump_clock, monkeypatch):
        monkeypatch.setattr("simsr.daemon.load._BYTES_MAX", 100 * KIB)
        disk = Slow(1)
        await played(records(*[(0, "read", 0, 64 * KIB) for _ in range(3)]), disk)
        assert [at for at, *_ in disk.asked] == [0, 1, 2]

    async def test_writes_that_overlap_are_made_in_order(self, autojump_clock):
        disk = Slow(1)
        rows = [(0, "write", 0, 4096), (0, "write", 8192, 4096), (0, "zero", 2048, 4096), (0, "read", 0, 4096)]
        await played(records(*rows), disk)
        assert sorted(disk.asked) == [
            (0, "write", 0, 4096), (0, "write", 8192, 4096), (1, "read", 0, 4096), (1, "zero", 2048, 4096),
        ]  # fmt: skip

    async def test_failures_are_counted_and_the_load_goes_on(self, autojump_clock):
        load = await played(records((0, "read", 0, 512), (1, "write", 0, 512)), Slow(0, OSError(errno.EIO, "bad")))
        found = load.statistics()
        assert found["errors"] == {"Input/output error": 2} and found["answered"] == 0
        assert found["first_error"].startswith("read of bytes 0 to 512: ")
        assert (await played(records((0, "read", 0, 512)), Slow(0, Dropped(None)))).errors.total() == 1

    async def test_an_end_after_some_time_waits_for_answers(self, autojump_clock):
        disk = Slow(3)
        rows = records((0, "read", 0, 512), (5, "read", 0, 512), (5, "read", 0, 2 * SIZE))
        found = (await played(rows, disk, workload={"loop": True, "fit": "skip"}, seconds=12)).statistics()
        assert len(disk.asked) == found["issued"] == found["answered"] == 5
        assert (found["rounds"], found["skipped"]) == (3, 2), "what has been done, not what has been read ahead"

    async def test_stop_gives_up_what_is_in_flight(self, autojump_clock):
        disk, found = Slow(100), records((0, "read", 0, 512), (5000, "read", 0, 512))
        load = Load(lambda: Workload(lambda: iter(found), SIZE, 0), lambda: disk, Alarm())
        async with trio.open_nursery() as nursery:
            disk.began = trio.current_time()
            nursery.start_soon(load.run)
            await trio.sleep(1)
            load.stop()
            await load.over.wait()
        assert trio.current_time() - disk.began == pytest.approx(1) and load.statistics()["answered"] == 0

    async def test_a_trace_that_is_bad_further_on_ends_it_and_is_told(self, autojump_clock):
        def broken():
            yield from records(*[(0.001 * number, "read", 0, 512) for number in range(3000)])
            raise BadTrace(source="t", where="line 3001", reason="torn")

        disk = Slow()
        load = Load(lambda: Workload(broken, SIZE, 0), lambda: disk, Alarm())
        disk.began = 0
        await load.run()
        assert "line 3001" in load.statistics()["problem"] and load.issued >= 1

    async def test_two_replays_leave_the_same_and_other_requests_something_else(self, autojump_clock):
        draw = random.Random(5)
        rows = [(0, "write", draw.randrange(0, 200) * 512, draw.randrange(1, 30) * 512) for _ in range(400)]
        digests = []
        for _ in range(2):
            ram = RamDisk(bytearray(SIZE))
            load = Load(lambda: Workload(lambda: iter(records(*rows)), SIZE, 0), lambda disk=ram: Direct(disk), Alarm())
            await load.run()
            assert load.statistics()["answered"] == 400
            digests.append(sha256(ram.content).hexdigest())
        assert digests[0] == digests[1]
        model = bytearray(SIZE)
        for number, (_, op, offset, length) in enumerate(rows, 1):
            model[offset : offset + length] = payload(Request(op, offset, length), number)
        assert sha256(model).hexdigest() == digests[0]


def test_payloads_say_where_and_when():
    one = payload(Request("write", 4096, 8192), 1)
    assert len(one) == 8192 and one[:4096] != one[4096:] and one[4096:] == payload(Request("write", 8192, 100_000), 1)[:4096]
    assert payload(Request("write", 4096, 8192), 2) != one and len(payload(Request("write", 512, 700), 1)) == 700


SHARED = """
[profile.shared]
share = {{ group = "lun", iops = {iops}, depth = 64 }}
"""
NEIGHBOUR = """
[[{where}rule]]
name = "neighbour"
{match}
[rule.action.replay]
trace = "t.trace"
as = "workload"
{more}
"""


@pytest.fixture
def trace(tmp_path):
    """Writes a trace of a second: a read each 10 ms."""
    with open(tmp_path / "t.trace", "wb") as out:
        convert(records(*[(number / 100, "write", 4096 * number, 4096) for number in range(100)]), "simsr", out)
    return str(tmp_path)


class TestInAScenario:
    async def over(self, here, seconds):
        """Some time of the load; it begins when a worker thread, which the mock clock does not wait for, has read the trace."""
        while not any(found["issued"] for found in here.play.statistics()["replays"]):
            await trio.sleep(0)
        await trio.sleep(seconds)

    async def test_it_competes_for_what_is_shared_and_leaves_the_disks_alone(self, autojump_clock, trace):
        text = SHARED.format(iops=150) + NEIGHBOUR.format(where="", match="", more="loop = true")
        async with stage(text, directory=trace) as here:
            await self.over(here, 2)
            began = trio.current_time()
            for _ in range(100):
                await here["one"].read(0, 512)
            assert trio.current_time() - began > 1.2, "alone they would take 0.6 s"
            (found,) = here.play.statistics()["replays"]
            assert found["rule"] == "neighbour" and found["disk"] == "scratch:neighbour" and found["errors"] == {}
            assert found["issued"] > 280 and found["lag_max_ns"] == 0
            assert any(disk["vdi"] == "scratch:neighbour" for disk in here.play.statistics()["disks"])
        assert not any(here.disks["one"].content)
        assert here.play.statistics()["replays"][0]["is_over"]

    async def test_it_ends_with_its_phase(self, autojump_clock, trace):
        text = '[[phase]]\nname = "busy"\nfor = "10s"\n' + NEIGHBOUR.format(where="phase.", match="", more="loop = true").replace(
            "[rule.action", "[phase.rule.action"
        )
        async with stage(text + '[[phase]]\nname = "quiet"\n', directory=trace) as here:
            await self.over(here, 9)
            (found,) = here.play.statistics()["replays"]
            assert not found["is_over"]
            await trio.sleep(2)
            (ended,) = here.play.statistics()["replays"]
            assert ended["is_over"] and ended["issued"] >= found["issued"] > 500
            assert [note["what"] for note in here.play.notes] == ["phase", "replay", "replay_stop", "phase"]

    async def test_removed_by_hand_and_gone_at_the_end(self, autojump_clock, trace):
        async with stage(NEIGHBOUR.format(where="", match="", more="loop = true"), directory=trace) as here:
            await self.over(here, 1)
            here.play.remove_rule("neighbour")
            await wait_all_tasks_blocked()
            assert here.play.statistics()["replays"][0]["is_over"]

    async def test_on_a_disk_that_nobody_finds(self, autojump_clock, trace):
        async with stage(NEIGHBOUR.format(where="", match='match = { vdi = "two" }', more='on = "disk"'), directory=trace) as here:
            while not here.play.statistics()["replays"]:
                await trio.sleep(0.1)
            assert "two" in here.play.statistics()["replays"][0]["problem"]

    async def test_the_librarys_neighbour_makes_itself_felt(self, autojump_clock, tmp_path):
        """The last second of its trace, 3 h on: 3500 requests a second, twice as fast, of the 4000 that the array can do."""
        busy = [Record(3 * 3600 * S + number * S // 3500, "write", number * 4096, 4096, MS) for number in range(3500)]
        with open(tmp_path / "proj_0.csv", "wb") as out:
            convert([Record(0, "read", 0, 512, MS), *busy], "msr", out)
        with open(tmp_path / "cp-w17.vscsi", "wb") as out:
            convert([Record(0, "read", 0, 4096, 7 * MS)], "vscsi2", out)
        async with stage(library_text("noisy-neighbour"), ("guest-1", "other"), directory=str(tmp_path)) as here:
            began = trio.current_time()
            await here["guest-1"].read(0, 4096)
            assert trio.current_time() - began == pytest.approx(0.007), "recorded service times, before the load begins"
            await self.over(here, 0.2)
            began = trio.current_time()
            for _ in range(20):
                await here["other"].read(0, 512)
            assert trio.current_time() - began > 20 * 0.01, "alone it takes 0.3 ms"
            (found,) = here.play.statistics()["replays"]
            assert found["rule"] == "neighbour" and found["issued"] > 2000 and found["errors"] == {}
            assert here.play.recorder.lags.count == found["issued"], "expectations can look at it"

    async def test_on_every_disk_is_refused(self, trace):
        with pytest.raises(BadScenario, match="overwrite every disk"):
            async with stage(NEIGHBOUR.format(where="", match="", more='on = "disk"'), directory=trace):
                raise AssertionError


# Recording.


def recorded(name="vdi", seconds=None):
    return Recording(name, ("sr", 1), SIZE, seconds)


async def fetch(recording):
    data = b"".join([chunk async for chunk in recording.chunks()])
    return list(read(io.BytesIO(data), "simsr")), count_lost(io.BytesIO(data), "t")


class TestRecording:
    async def test_everything_is_noted(self, autojump_clock):
        ram, recording = RamDisk(bytearray(SIZE)), recorded()
        Tap.put(recording, ram, "me")
        await trio.sleep(2)
        await ram.scripted.write("write", 512, 3, b"abc", True)
        await ram.scripted.write("trim", 0, 8192, None, False)
        await ram.scripted.write("zero", 4096, 100, None, False)
        assert bytes(await ram.scripted.read(512, 3)) == bytes(3), "trimmed"
        await ram.scripted.flush()
        recording.end()
        Tap.take_away(ram)
        assert ram.scripted is None
        found, lost = await fetch(recording)
        assert [(one.op, one.offset, one.length, one.fua, one.client, one.device) for one in found] == [
            ("write", 512, 3, True, "me", "vdi"), ("trim", 0, 8192, False, "me", "vdi"), ("zero", 4096, 100, False, "me", "vdi"),
            ("read", 512, 3, False, "me", "vdi"), ("flush", 0, 0, False, "me", "vdi"),
        ]  # fmt: skip
        assert all(one.issue_ns == pytest.approx(2 * S, abs=1000) and one.latency_ns == 0 and not one.depth for one in found) and not lost

    async def test_latency_depth_errors_and_what_is_never_answered(self, autojump_clock):
        text = rule('op = "read"', action='delay = "3s"') + rule('op = "write"', action='error = "ENOSPC"')
        text += rule('op = "flush"', action="hang = true")
        async with stage(text) as here:
            disk, recording = here.disks["one"], recorded()
            Tap.put(recording, disk, "me")
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(disk.scripted.read, 0, 512)
                    await wait_all_tasks_blocked()
                nursery.start_soon(disk.scripted.flush)
                await trio.sleep(10)
                with pytest.raises(OSError):
                    await disk.scripted.write("write", 0, 512, bytes(512), False)
                recording.end()
                Tap.take_away(disk)
                here.play.reset()
            found, _ = await fetch(recording)
        brief = sorted((one.op, one.latency_ns, one.depth, one.error) for one in found if one.op != "flush")
        assert brief == [
            ("read", pytest.approx(3 * S, abs=1000), 0, 0), ("read", pytest.approx(3 * S, abs=1000), 1, 0), ("write", 0, 1, errno.ENOSPC),
        ]  # fmt: skip
        assert [(one.latency_ns, one.depth) for one in found if one.op == "flush"] == [(None, 2)]

    async def test_a_scenario_comes_and_goes_behind_the_tap(self, autojump_clock):
        async with stage("") as here:
            disk, recording = here.disks["one"], recorded()
            Tap.put(recording, disk, "me")
            tap = disk.scripted
            await here.play.add_rule(here.play.read_rule({"match": {"op": ["read"]}, "action": {"error": "EIO"}}, "bad"))
            assert disk.scripted is tap
            with pytest.raises(OSError):
                await tap.read(0, 512)
            here.play.remove_rule("bad")
            assert disk.scripted is tap and len(await tap.read(0, 512)) == 512
            await here.play.add_rule(here.play.read_rule({"match": {"op": ["read"]}, "action": {"error": "EIO"}}, "bad"))
            Tap.take_away(disk)
            with pytest.raises(OSError):
                await disk.scripted.read(0, 512)
            here.play.remove_rule("bad")
            assert disk.scripted is None
            recording.end()
            assert [one.error for one in (await fetch(recording))[0]] == [errno.EIO, 0]

    async def test_what_is_not_fetched_in_time_is_lost_and_said(self, autojump_clock, monkeypatch):
        monkeypatch.setattr(recording_module, "WAITING_MAX_BYTES", 4000)
        ram, recording = RamDisk(bytearray(SIZE)), recorded()
        Tap.put(recording, ram, "me")
        for _ in range(200):
            await ram.scripted.read(0, 512)
        assert recording.lost > 100 and recording.statistics()["waiting_bytes"] < 5000
        chunks = recording.chunks()
        data = await anext(chunks)
        for _ in range(5):
            await ram.scripted.read(4096, 512)
        recording.end()
        data += b"".join([chunk async for chunk in chunks])
        found = list(read(io.BytesIO(data), "simsr"))
        assert [one.offset for one in found[-5:]] == [4096] * 5 and recording.requests == 205
        assert len(found) + recording.lost == 205 and count_lost(io.BytesIO(data), "t") == recording.lost

    async def test_it_ends_by_itself(self, autojump_clock):
        recording = recorded(seconds=7)
        began = trio.current_time()
        assert await fetch(recording) == ([], 0)
        assert recording.is_over and trio.current_time() - began == pytest.approx(7)


def test_a_disk_that_is_not_recorded_is_scripted_directly():
    ram, staged = RamDisk(bytearray(SIZE)), object()
    script(ram, staged)
    assert ram.scripted is staged

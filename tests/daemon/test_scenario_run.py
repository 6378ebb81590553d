"""A scenario in force on disks: plans are carried out, orders obeyed, under a mock clock."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
import trio
from scenario_stage import SIZE, RamDisk, stage, timed
from trio.testing import MockClock

from nbd_export.disk import Dropped
from simsr.daemon.theatre import Theatre
from simsr.errors import BadTrace, DaemonStopping, NoSpace, NotFound
from simsr.sr.vdi import Tip
from simsr.store.store import Create, Reset

KIB = 1024


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


def rule(match="", trigger="", action="", more=""):
    return f"[[rule]]\n{more}\nmatch = {{ {match} }}\ntrigger = {{ {trigger} }}\naction = {{ {action} }}\n"


async def test_a_disk_without_rules_is_not_scripted(autojump_clock):
    async with stage(rule('vdi = "one"', action='delay = "3ms"'), ("one", "two")) as here:
        assert here["two"] is None and here["one"] is not None


async def test_a_tip_meets_the_scenario_like_any_disk(autojump_clock):
    """Its volume has few metadata (found by the simulation)."""
    meta = {"uuid": "uuid-9", "name": "tip", "snapshot_of": "uuid-one", "snapshot_time": "2026-01-01T00:00:00Z", "tip": "clean"}
    tip = Tip(SimpleNamespace(ident=9, size_bytes=SIZE, meta=meta), "sr")
    async with stage('[[rule]]\naction = { error = "EIO" }') as disks:
        disk = RamDisk(bytearray(SIZE))
        disks.play.attach(tip, disk)
        with pytest.raises(OSError):
            await disk.scripted.read(0, 4096)
        disks.play.detach(tip, disk)


async def test_delays_take_their_time_and_data_arrive(autojump_clock):
    async with stage(rule('op = "read"', action='delay = "3ms"')) as here:
        _, took = await timed(here["one"].write("write", 4096, 5, b"hello", False))
        assert took == 0
        data, took = await timed(here["one"].read(4094, 9))
        assert bytes(data) == b"\0\0hello\0\0" and took == pytest.approx(0.003, abs=1e-6)


async def test_errors_and_disconnects(autojump_clock):
    text = rule('op = "read"', "nth = 2", 'error = "ENOSPC", delay = "1s"') + rule('op = "read"', "nth = 3", "disconnect = true")
    async with stage(text) as here:
        await here["one"].read(0, 512)
        with pytest.raises(OSError, match="injected by rule-1") as caught:
            await here["one"].read(0, 512)
        assert caught.value.errno == errno.ENOSPC and trio.current_time() > 0
        with pytest.raises(Dropped) as dropped:
            await here["one"].read(0, 512)
        assert dropped.value.error is None


async def test_what_hangs_is_let_go_when_its_rule_is_removed(autojump_clock):
    async with stage(rule('op = "write"', action="hang = true", more='name = "stuck"')) as here:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here["one"].write, "write", 0, 512, b"x" * 512, False)
            await trio.sleep(1000)
            assert here.play.statistics()["hung"] == 1
            assert bytes(await here["one"].read(0, 1)) == b"\0", "reads go on"
            disk = here["one"]
            assert here.play.remove_rule("stuck")["in_force_after"] >= 1
        assert here["one"] is None and bytes(await disk.read(0, 1)) == b"x"


@pytest.mark.parametrize("delay_s, waited_s, left", [(2, 1, 0), (60, 5, 1)])
async def test_a_hang_is_answered_when_what_was_under_way_has_ended(autojump_clock, delay_s, waited_s, left):
    async with stage(rule('op = "read"', action=f'delay = "{delay_s}s"')) as here:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here["one"].read, 0, 512)
            await trio.sleep(1)
            stuck = here.play.read_rule({"match": {"op": "read"}, "action": {"hang": True}}, "stuck")
            answer, took = await timed(here.play.add_rule(stuck))
            assert took == pytest.approx(waited_s, abs=0.1) and answer["under_way"] == left


async def test_a_daemon_that_stops_begins_no_scenario(autojump_clock):
    theatre = Theatre(lambda vdi: None, lambda vdi: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(theatre.run)
        nursery.cancel_scope.cancel()
    with pytest.raises(DaemonStopping):
        await theatre.start('simsr = 1\nname = "late"\n', "t", None)
    assert theatre.play is None


async def test_one_that_stops_while_a_scenario_is_begun(autojump_clock):
    theatre, outcome = Theatre(lambda vdi: None, lambda vdi: None), []

    async def late():
        with trio.CancelScope(shield=True), pytest.raises(DaemonStopping) as caught:
            await theatre.start('simsr = 1\nname = "late"\n', "t", None)
        outcome.append(caught.value)

    async with trio.open_nursery() as nursery:
        await nursery.start(theatre.run)
        nursery.start_soon(late)
        nursery.cancel_scope.cancel()
    assert outcome and theatre.play is None


async def test_a_hang_ends_by_itself_and_with_an_error(autojump_clock):
    async with stage(rule('op = "read"', action='hang = "70s"')) as here:
        _, took = await timed(here["one"].read(0, 512))
        assert took == pytest.approx(70)


async def test_the_dead_man_lets_go(autojump_clock):
    async with stage(rule('op = "read"', action="hang = true")) as here:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here["one"].read, 0, 512)
            await trio.sleep(5)
            here.play.dead_man()
        assert here.play.recorder.hanging == 0


async def test_disks_are_measured_in_phases_without_rules_if_the_scenario_is_about_them(autojump_clock):
    bad = '[[phase]]\nname = "bad"\nfor = "10s"\n[[phase.rule]]\nmatch = { vdi = "one" }\naction = { error = "EIO" }\n'
    async with stage('[[phase]]\nname = "good"\nfor = "10s"\n' + bad, ("one", "two")) as here:
        await here["one"].read(0, 512)
        assert here["two"] is None
        await trio.sleep(20.5)
        assert here["one"] is None, "the last phase is over"
        assert here.play.recorder.tally("read", "good").count == 1


async def test_phases_come_and_go_without_requests(autojump_clock):
    text = (
        '[[phase]]\nname = "good"\nfor = "10s"\n[[phase]]\nname = "bad"\nfor = "10s"\n[[phase.rule]]\naction = { error = "EIO" }\n'
        '[[phase]]\nname = "gone"\n'
    )
    async with stage(text) as here:
        await here["one"].read(0, 512)
        await trio.sleep(10.5)
        with pytest.raises(OSError):
            await here["one"].read(0, 512)
        await trio.sleep(10)
        await here["one"].read(0, 512)
        assert [(note["at_s"], note["name"]) for note in here.play.notes] == [(0, "good"), (10, "bad"), (20, "gone")]


@pytest.mark.parametrize("begins_s", [0.1 + 0.2, 4105.605076, 1e5 / 3])
async def test_a_phase_ends_whatever_a_float_makes_of_its_end(autojump_clock, begins_s):
    """Under a clock that stands still in between, the run once woke up for ever a nanosecond early (found by the simulation)."""
    await trio.sleep(begins_s)
    phases = "".join(f'[[phase]]\nname = "p{number}"\nfor = "{number * 7 + 3}ms"\n' for number in range(40))
    async with stage(rule(action='delay = "1ms"') + phases) as here:
        with trio.fail_after(60):
            while not here.play.engine.is_over:
                await trio.sleep(0.5)


async def test_requests_under_way_on_a_path_that_dies_hang_and_go_on_by_the_other(autojump_clock):
    text = (
        '[profile.san]\npaths = { A = "optimized", B = "standby" }\nlatency.all = "20s"\n'
        '[[phase]]\nfor = "10s"\n'
        '[[phase]]\nfor = "30s"\n[[phase.rule]]\nmatch = { path = "A" }\naction = { path = "down", inflight = "hang" }\n'
        '[[phase]]\n[[phase.rule]]\naction = { path = "B", state = "optimized", release = "hang" }\n'
    )
    async with stage(text) as here:
        _, took = await timed(here["one"].read(0, 512))
        assert took == pytest.approx(40), "parked at 20 s, let go at 40 s"


class TestDamage:
    async def test_torn_and_healed(self, autojump_clock):
        async with stage(rule('op = "write"', "nth = 2", "torn = { sector = 512, keep = \"prefix\" }"), seed=3) as here:
            disk = here["one"]
            await disk.write("write", 0, 8 * KIB, b"a" * 8 * KIB, False)
            await disk.write("write", 0, 8 * KIB, b"b" * 8 * KIB, False)
            seen = bytes(await disk.read(0, 8 * KIB))
            kept = seen.count(b"b")
            assert kept % 512 == 0 and kept < 8 * KIB and seen == b"b" * kept + b"a" * (8 * KIB - kept)
            assert here.disks["one"].content[: 8 * KIB] == b"b" * 8 * KIB, "the store is never damaged"
            await here.play.heal(here.vdis.values(), permanent=False)
            assert bytes(await disk.read(0, 8 * KIB)) == b"b" * 8 * KIB

    async def test_permanent(self, autojump_clock):
        async with stage(rule('op = "write"', "nth = 2", "lose = true")) as here:
            disk = here["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)
            await disk.write("write", 0, 512, b"b" * 512, False)
            assert bytes(await disk.read(0, 512)) == b"a" * 512
            await here.play.heal([here.vdis["one"]], permanent=True)
            assert here.disks["one"].content[:512] == b"a" * 512

    async def test_rotten_bits_made_permanent_stay(self, autojump_clock):
        async with stage('[[rule]]\nmatch = { op = "read" }\ntrigger = { bits = 0.0001 }\naction = { flip = 1 }\n') as here:
            disk = here["one"]
            rotten = bytes(await disk.read(0, SIZE))
            assert any(rotten)
            await here.play.heal(here.vdis.values(), permanent=True)
            assert bytes(here.disks["one"].content) == rotten


class TestDamageAndHistory:
    TORN = rule('op = "write"', "nth = 2", "lose = true")

    async def damaged(self, here, letters=b"ab"):
        for letter in letters:
            await here["one"].write("write", 0, 512, bytes([letter]) * 512, False)
        return bytes(await here["one"].read(0, 1))

    async def test_a_clone_that_nobody_has_attached_is_healed(self, autojump_clock):
        async with stage(self.TORN) as here:
            await self.damaged(here)
            here.play.committed("sr", [Create(7, SIZE, {}, 1), Create(8, SIZE, {}, 1)])
            one = here.vdis["one"]
            clones = [SimpleNamespace(**{**vars(one), "uuid": f"uuid-{n}", "volume": SimpleNamespace(ident=n, meta={})}) for n in (7, 8)]
            assert await here.play.heal(clones[:1], permanent=False) == {"healed": ["uuid-7"], "permanent": False}
            disks = [RamDisk(bytearray(b"b" * SIZE)) for _ in clones]
            for clone, disk in zip(clones, disks):
                here.play.attach(clone, disk)
            assert [bytes(await disk.scripted.read(0, 1)) for disk in disks] == [b"b", b"a"]
            for clone, disk in zip(clones, disks):
                here.play.detach(clone, disk)

    async def test_a_reset_heals_snapshots_and_clones_too(self, autojump_clock):
        """Those that nobody had attached kept their damage (found by the simulation)."""
        async with stage(self.TORN) as here:
            assert await self.damaged(here) == b"a"
            here.play.committed("sr", [Create(7, SIZE, {}, 1)])
            here.play.reset()
            snapshot = SimpleNamespace(**{**vars(here.vdis["one"]), "uuid": "uuid-7", "volume": SimpleNamespace(ident=7, meta={})})
            here.play.attach(snapshot, disk := RamDisk(here.disks["one"].content))
            assert here["one"] is None and disk.scripted is None
            here.play.committed("sr", [Reset(1, 7)])
            assert here["one"] is None, "and nothing comes back with a revert"
            here.play.detach(snapshot, disk)

    async def test_it_goes_into_a_snapshot_and_comes_back_with_a_revert(self, autojump_clock):
        async with stage(self.TORN) as here:
            assert await self.damaged(here) == b"a", "the second write is lost"
            here.play.committed("sr", [Create(7, SIZE, {}, 1)])
            await here["one"].write("write", 0, 512, b"c" * 512, False)
            assert bytes(await here["one"].read(0, 1)) == b"c"
            here.disks["one"].content[:512] = b"b" * 512
            here.play.committed("sr", [Reset(1, 7)])
            assert bytes(await here["one"].read(0, 1)) == b"a", "what the snapshot looked like"

    async def test_a_revert_to_a_snapshot_that_was_good_heals(self, autojump_clock):
        async with stage(self.TORN) as here:
            here.play.committed("sr", [Create(7, SIZE, {}, 1)])
            assert await self.damaged(here) == b"a"
            here.play.committed("sr", [Reset(1, 7)])
            assert bytes(await here["one"].read(0, 1)) == b"b", "nothing covers the store any more"

    async def test_what_sticks_to_the_device_stays(self, autojump_clock):
        async with stage(self.TORN.replace("[[rule]]", '[[rule]]\nsticks_to = "device"')) as here:
            here.play.committed("sr", [Create(7, SIZE, {}, 1)])
            assert await self.damaged(here) == b"a"
            here.play.committed("sr", [Reset(1, 7)])
            assert bytes(await here["one"].read(0, 1)) == b"a"

    async def test_a_clone_of_a_snapshot_has_the_damage_of_its_data(self, autojump_clock):
        async with stage(self.TORN) as here:
            assert await self.damaged(here) == b"a"
            here.play.committed("sr", [Create(7, SIZE, {}, 1), Create(8, SIZE, {}, 7)])
            content = bytearray(here.disks["one"].content)
            clone = SimpleNamespace(
                uuid="uuid-8", sr="sr", name="eight", size_bytes=SIZE, meta={"sm_config": {}},
                volume=SimpleNamespace(ident=8, meta={"sm_config": {}}),
            )
            here.play.attach(clone, disk := RamDisk(content))
            assert bytes(await disk.scripted.read(0, 1)) == b"a"
            here.play.detach(clone, disk)


class TestPowerCut:
    CUT = '[[rule]]\nname = "cut"\nmatch = {{ op = "write" }}\ntrigger = {{ nth = {nth} }}\naction = {{ power_cut = {{ keep = {keep} }} }}\n'

    async def cut(self, here, disk):
        with pytest.raises(Dropped):
            await disk.write("write", 64 * KIB, 512, b"z" * 512, False)
        await trio.sleep(1)
        with pytest.raises(Dropped):
            await disk.read(0, 512)

    async def test_what_was_flushed_stays_and_the_rest_goes(self, autojump_clock):
        async with stage(self.CUT.format(nth=4, keep='"none"')) as here:
            disk = here["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)
            await disk.flush()
            await disk.write("write", 0, 512, b"b" * 512, False)
            await disk.write("write", 4096, 512, b"c" * 512, True)
            await self.cut(here, disk)
            content = here.disks["one"].content
            assert content[:512] == b"a" * 512 and content[4096 : 4096 + 512] == b"c" * 512, "flushed and FUA writes are kept"
            assert not any(content[64 * KIB :])
            here.play.remove_rule("cut")
            assert bytes(await disk.read(0, 512)) == b"a" * 512, "power is back"

    async def test_listed_writes_are_kept(self, autojump_clock):
        async with stage(self.CUT.format(nth=4, keep="[1, 3]")) as here:
            disk = here["one"]
            for at, letter in ((0, b"a"), (0, b"b"), (256, b"c")):
                await disk.write("write", at, 512, letter * 512, False)
            await self.cut(here, disk)
            assert here.disks["one"].content[:1024] == b"a" * 256 + b"c" * 512 + bytes(256)

    async def test_a_disk_may_be_attached_while_the_loss_is_written(self, autojump_clock):
        """Found by the simulation."""
        async with stage(self.CUT.format(nth=2, keep='"none"')) as here:
            disk, below = here["one"], here.disks["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)
            write, another = below.write, SimpleNamespace(**vars(here.vdis["one"]) | {"uuid": "uuid-another"})

            async def write_rest(batch, done):
                here.play.attach(another, RamDisk(bytearray(SIZE)))
                await trio.sleep(0.1)
                write(batch[done:])

            below.write, below.write_rest = lambda batch: 0, write_rest
            await self.cut(here, disk)
            assert not any(below.content) and here.play.cuts == 1

    async def test_what_is_reverted_to_loses_nothing(self, autojump_clock):
        """The power fails while a revert keeps the gate of the disk closed: what it loses is of the content that goes."""
        async with stage(self.CUT.format(nth=2, keep='"none"')) as here:
            disk, below = here["one"], here.disks["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)
            below.opened = trio.Event()
            await self.cut(here, disk)
            assert here.play.cuts == 0, "it waits at the gate"
            below.content[:] = b"s" * len(below.content)
            here.play.committed("sr", [Reset(1, 7)])
            below.opened.set()
            await trio.sleep(1)
            assert here.play.cuts == 1 and bytes(below.content) == b"s" * len(below.content)

    async def test_a_scenario_that_has_ended_writes_no_more(self, autojump_clock):
        """Clients go on beside it then, and what they write is theirs (found by the simulation)."""
        async with stage(self.CUT.format(nth=3, keep='"none"')) as here:
            disk, below = here["one"], here.disks["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)
            await disk.write("write", 8192, 512, b"b" * 512, False)

            async def read_cold(batch):
                await trio.sleep(60)
                read(batch)
                return [None for _ in batch]

            async def write_rest(batch, done):  # parts of blocks wait for the rest of them
                await trio.sleep(60)
                write(batch[done:])

            def write_whole(batch):
                return 0 if any(length % 4096 for _, length, _ in batch) else write(batch)

            read, below.read, below.read_cold = below.read, lambda batch: [0], read_cold
            write, below.write, below.write_rest = below.write, write_whole, write_rest
            with pytest.raises(Dropped):
                await disk.write("write", 64 * KIB, 512, b"z" * 512, False)
            await trio.sleep(1)
            here.play.end()
            below.content[:] = b"c" * len(below.content)
            await trio.sleep(200)
            assert bytes(below.content) == b"c" * len(below.content)

    async def test_what_cannot_be_written_is_not_lost_and_the_scenario_goes_on(self, autojump_clock):
        """The SR is full, say."""
        async with stage(self.CUT.format(nth=2, keep='"none"')) as here:
            disk, below = here["one"], here.disks["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)

            def full(batch):
                raise NoSpace(name="sr", reason="no segment is left")

            below.write = full
            await self.cut(here, disk)
            here.play.remove_rule("cut")
            assert bytes(await disk.read(0, 512)) == b"a" * 512 and here.play.cuts == 1

    async def test_a_client_whose_writes_are_stable_loses_none(self, autojump_clock):
        text = '[profile.p]\ndurability = "each-write"\n' + self.CUT.format(nth=2, keep='"none"')
        async with stage(text) as here:
            disk = here["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)
            assert here.disks["one"].flushes == 1
            await self.cut(here, disk)
            assert here.disks["one"].content[:512] == b"a" * 512

    async def test_a_live_rule_remembers_writes_from_then_on(self, autojump_clock):
        async with stage("") as here:
            assert here["one"] is None
            rule = {"match": {"op": ["flush"]}, "trigger": {"nth": 2}, "action": {"power_cut": {"keep": "none"}}}
            assert (await here.play.add_rule(here.play.read_rule(rule, "now")))["rule"] == "now"
            disk = here["one"]
            await disk.write("write", 0, 512, b"a" * 512, False)
            await disk.flush()
            await disk.write("write", 0, 512, b"b" * 512, False)
            with pytest.raises(Dropped):
                await disk.flush()
            await trio.sleep(1)
            assert here.disks["one"].content[:512] == b"a" * 512


async def test_live_rules_have_names_and_go(autojump_clock):
    async with stage("") as here:
        first = await here.play.add_rule(here.play.read_rule({"action": {"error": "EIO"}, "match": {"op": "read"}}, None))
        assert first["rule"] == "live-1"
        with pytest.raises(OSError):
            await here["one"].read(0, 512)
        assert here.play.remove_rule("live-1")["in_force_after"] == 1
        assert here["one"] is None
        with pytest.raises(NotFound):
            here.play.remove_rule("live-1")


async def test_a_replayed_trace_gives_its_times(autojump_clock, tmp_path):
    (tmp_path / "t.csv").write_text(
        "128166372003061629,h,0,Read,0,4096,50000\n128166372013061629,h,0,Read,4096,4096,70000\n"
    )
    text = '[[rule]]\n[rule.action.replay]\ntrace = "t.csv"\nformat = "msr"\nas = "latency"\nloop = true\n'
    async with stage(text, directory=str(tmp_path)) as here:
        times = [(await timed(here["one"].read(0, 4096)))[1] for _ in range(3)]
        assert times == pytest.approx([0.005, 0.007, 0.005])


async def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadTrace, match="there is no file"):
        async with stage('[[rule]]\n[rule.action.replay]\ntrace = "no.csv"\nas = "latency"\n', directory=str(tmp_path)):
            raise AssertionError

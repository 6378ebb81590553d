"""The seven scenarios of the library, carried out whole on disks with clients, under a mock clock: what a client sees is what their files say."""

from __future__ import annotations

import errno

import pytest
import trio
from scenario_stage import stage
from trio.testing import MockClock

from nbd_export.disk import Dropped
from scenarios.loader import library_text
from scenarios.request import Request
from scenarios.traces import convert
from scenarios.traces.records import Record

KIB, MIB = 1024, 1 << 20
BLOCK = 4 * KIB


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


class Client:
    """Asks a disk for one thing after the other, and keeps (began_s, took_s, error or None) of each."""

    def __init__(self, disk):
        self.disk, self.seen = disk, []

    async def ask(self, op, offset=0, length=BLOCK, letter=b"x", fua=False):
        """The data of a read, None otherwise; what went wrong is in `seen`."""
        began, error, data = trio.current_time(), None, None
        try:
            match op:
                case "read":
                    data = bytes(await self.disk.read(offset, length))
                case "flush":
                    await self.disk.flush()
                case _:
                    await self.disk.write(op, offset, length, letter * length, fua)
        except (OSError, Dropped) as raised:
            error = raised
        self.seen.append((began, trio.current_time() - began, error))
        return data

    def between(self, begin_s, end_s):
        return [took for began, took, _ in self.seen if begin_s <= began < end_s]

    @property
    def errors(self):
        return [error for _, _, error in self.seen if error is not None]


def median(values):
    return sorted(values)[len(values) // 2]


def phases(here):
    return [(note["at_s"], note["name"]) for note in here.play.notes if note["what"] == "phase"]


async def until(at_s):
    await trio.sleep_until(at_s)


async def test_san_controller_failover(autojump_clock):
    """Expected: no error, and no gap of 30 s without a write."""
    async with stage(library_text("san-controller-failover")) as here:
        start, client = trio.current_time(), Client(here["one"])
        ended = []
        while trio.current_time() - start < 155:
            await client.ask("write", len(ended) % 256 * BLOCK)
            ended.append(trio.current_time() - start)
            await trio.sleep(0.05)
        gaps = [later - earlier for earlier, later in zip(ended, ended[1:])]
        assert not client.errors
        assert 23 < max(gaps) < 30 and sum(gap > 1 for gap in gaps) == 1, "one hang, when A dies; flapping is bridged by B"
        assert median(client.between(start, start + 60)) < 0.001
        assert 0.003 < median(client.between(start + 84.1, start + 129)) < 0.01, "B's cache is cold"
        assert median(client.between(start + 129.1, start + 155)) < 0.001
        assert [name for _, name in phases(here)] == ["healthy", "A dies", "B takes over, cache cold", "A flaps", "A flaps"]
        assert [at for at, _ in phases(here)] == [0, 60, 84, 129, 139]


async def test_slow_nfs(autojump_clock):
    """Expected: nothing hangs for 120 s."""
    async with stage(library_text("slow-nfs"), ("one", "two")) as here:
        start = trio.current_time()

        async def copy(client):
            for _ in range(300):
                await client.ask("write", 0, MIB)

        clients = [Client(here[name]) for name in ("one", "two")]
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(copy, client)
        took = trio.current_time() - start
        rate = (600 * MIB - 200e6) / took
        assert 20e6 < rate <= 30.5e6, "30 MB/s for both together, once the burst is used up"

        await until(start + 300)
        gate = here.play.gate(here.vdis["one"])
        began = trio.current_time()
        await gate.until_due(Request("snapshot"))
        assert 1 <= trio.current_time() - began <= 4, "the control plane is slow, too"

        await until(start + 531)
        reader = Client(here["two"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.ask, "read")
            nursery.start_soon(reader.ask, "flush")
            await gate.until_due(Request("snapshot"))
        assert trio.current_time() >= start + 600
        assert not reader.errors and all(69 - 0.01 < took < 120 for _, took, _ in reader.seen)


async def test_pool_full_mid_snapshot(autojump_clock):
    """Expected: never half a VM, and every acknowledged write is there."""
    async with stage(library_text("pool-full-mid-snapshot"), ("root", "data"), size_bytes=4 * MIB) as here:
        start, acknowledged, snapshots = trio.current_time(), [], []

        async def write(client, block, letter):
            await client.ask("write", block * 64 * KIB, BLOCK, letter)
            if client.seen[-1][2] is None:
                acknowledged.append((client, block, letter))

        root, data = (Client(here[name]) for name in ("root", "data"))
        for client in (root, data):
            await write(client, 0, b"a")
        try:
            for name in ("root", "data"):
                await here.play.gate(here.vdis[name]).until_due(Request("snapshot"))
                snapshots.append(name)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            snapshots.clear()  # what the group's snapshot does when one fails
        assert snapshots == [], "all or none"
        assert phases(here)[-1][1] == "nobody notices" and [n["name"] for n in here.play.notes if n["what"] == "event"] == ["pool-low", "pool-full"]

        await write(data, 1, b"b")
        assert data.seen[-1][1] == pytest.approx(60) and data.errors[-1].errno == errno.ENOSPC, "queued, as dm-thin does, then refused"
        began = trio.current_time()
        await write(data, 2, b"c")
        assert data.errors[1:] == [] and start + 75 <= trio.current_time() < began + 60, "until an operator added space"
        assert [letter for _, _, letter in acknowledged] == [b"a", b"a", b"c"]
        for client, block, letter in acknowledged:
            assert await client.ask("read", block * 64 * KIB) == letter * BLOCK


async def test_dying_disk(autojump_clock):
    size = 256 * MIB
    async with stage(library_text("dying-disk"), size_bytes=size) as here:
        start, disk = trio.current_time(), here["one"]
        client, blocks = Client(disk), range(size // BLOCK)
        early = Client(disk)
        for block in blocks[len(blocks) // 4 : len(blocks) * 2 // 5 : 4]:
            await early.ask("read", block * BLOCK)
            if trio.current_time() - start > 60:
                break
        assert len(early.errors) <= 3, "hardly any sector is bad yet"

        await until(start + 560)
        area = range(size // 4, size * 2 // 5 - 64 * BLOCK, 64 * BLOCK)
        bad = []
        for offset in area:
            if await client.ask("read", offset, 64 * BLOCK) is None:
                bad.append((offset, client.seen[-1]))
            if trio.current_time() - start > 595:
                break
        assert 1 <= len(bad) and all(error.errno == errno.EIO and 3 <= took <= 7.1 for _, (_, took, error) in bad)
        offset = bad[0][0]
        assert await client.ask("read", 0) is not None, "outside of the range all is well"
        await client.ask("write", offset, 64 * BLOCK, b"h")
        assert await client.ask("read", offset, 64 * BLOCK) == b"h" * 64 * BLOCK, "healed by writing"

        await until(start + 601)
        for number in range(2000):
            if trio.current_time() - start > 655:
                break
            await client.ask("write", number * BLOCK, BLOCK, bytes([number % 251 + 1]))
        content = here.disks["one"].content
        assert number > 1000 and all(content[n * BLOCK] == n % 251 + 1 for n in range(number)), "the store itself is whole"
        seen = [bytes(await disk.read(n * BLOCK, 1)) != bytes([n % 251 + 1]) for n in range(0, number, 10)]
        overlay = here.play.statistics()["disks"][0]["overlay"]["data"]["bytes"]
        assert overlay >= BLOCK and sum(seen) < len(seen) / 4, "some writes went elsewhere"

        await until(start + 661)
        gone = Client(disk)
        await gone.ask("read")
        assert isinstance(gone.errors[0], Dropped) and gone.errors[0].error.errno == errno.ESHUTDOWN
        assert [name for _, name in phases(here)][1:] == ["last hour", "gone"]


async def test_power_cut(autojump_clock):
    """Expected: nothing that was flushed is lost, on any disk of the group."""
    async with stage(library_text("power-cut"), ("root", "data"), groups="vm1", size_bytes=4 * MIB) as here:
        clients = {name: Client(here[name]) for name in ("root", "data")}
        flushed = {name: {} for name in clients}
        for number in range(20):
            for name, client in clients.items():
                letter = bytes([1 + number])
                await client.ask("write", number % 8 * BLOCK, BLOCK, letter)
                await client.ask("flush")
                flushed[name][number % 8] = letter
        assert phases(here)[-1][1] == "cut" and not any(client.errors for client in clients.values())
        unflushed = {name: set() for name in clients}
        for number in range(17):
            name = ("root", "data")[number % 2]
            await clients[name].ask("write", (number // 2 + 4) * BLOCK, BLOCK, b"U")
            unflushed[name].add(number // 2 + 4)
        assert isinstance(clients["root"].errors[-1], Dropped), "the 17th write"
        while here.play.cuts == 0:
            await trio.sleep(0.01)
        lost = 0
        for name in clients:
            content = bytes(here.disks[name].content)
            for block, letter in flushed[name].items():
                sectors = [content[at : at + 512] for at in range(block * BLOCK, (block + 1) * BLOCK, 512)]
                legal = {letter * 512} | ({b"U" * 512} if block in unflushed[name] else set())
                assert set(sectors) <= legal, (name, block)
            for block in unflushed[name]:
                lost += content[block * BLOCK : (block + 1) * BLOCK] != b"U" * BLOCK
        assert 0 < lost < 17, "of what was not flushed some is there and some is not"
        await trio.sleep(6)
        for client in clients.values():
            again = Client(client.disk)
            await again.ask("read")
            assert not again.errors, "power is back"
        assert here.play.statistics()["power_cuts"] == 1


async def test_noisy_neighbour(autojump_clock, tmp_path):
    """A guest sees the recorded service times; other disks share what the array can do."""
    times_ns = [5_000_000, 9_000_000, 2_000_000]
    for name, format, times in (("cp-w17.vscsi", "vscsi2", times_ns), ("proj_0.csv", "msr", [1_000_000] * 4)):
        step = 1_000_000_000 if format == "vscsi2" else 4_000_000_000_000
        records = [Record(number * step, "read", number * BLOCK, BLOCK, latency_ns=took) for number, took in enumerate(times)]
        with open(tmp_path / name, "wb") as out:
            convert(records, format, out)
    async with stage(library_text("noisy-neighbour"), ("guest-1", "other"), directory=str(tmp_path)) as here:
        guest, other = Client(here["guest-1"]), Client(here["other"])
        for number in range(3):
            await guest.ask("read", number * BLOCK)
        assert [took for _, took, _ in guest.seen] == pytest.approx([ns / 1e9 for ns in times_ns])
        for _ in range(200):
            await other.ask("read")
        assert 0.0002 < median([took for _, took, _ in other.seen]) < 0.001, "the array's own latency"
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(2000):
                nursery.start_soon(other.ask, "read")
        assert trio.current_time() - began > (2000 - 400) / 4000, "4000 requests a second for all"
        assert not guest.errors and not other.errors


async def test_revert_under_fire(autojump_clock):
    """Writes are late all the time of the load; then each revert is told to die at the step."""
    async with stage(library_text("revert-under-fire"), ("disk0", "disk1")) as here:
        start, client = trio.current_time(), Client(here["disk0"])
        gates = [here.play.gate(here.vdis[name]) for name in ("disk0", "disk1")]
        while trio.current_time() - start < 9.5:
            await client.ask("write")
        took = [took for _, took, _ in client.seen]
        assert 0.004 < sum(took) / len(took) < 0.006 and not client.errors
        assert not (await gates[0].until_due(Request("revert"))).effects
        await until(start + 10.1)
        effects = [effect for gate in gates for effect in (await gate.until_due(Request("revert"))).effects]
        assert [(effect.kind, effect.value) for effect in effects] == [("kill_daemon", "at-step")] * 2
        assert phases(here)[-1][1] == "revert"

"""The trio thread never waits for a disk: what is cold for one client delays no other.

Once exactly, in this process, over a file layer whose cold reads do not return until they are let; and once for real: a
daemon whose segment files were dropped from the page cache, one disk read hot at depth 1, another one cold.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from daemon_tools import Simsrd
from fake_disks import Client
from nbd_wire import CACHE, FLUSH, FUA, MIB, READ, WRITE, ZEROES, WireClient

from nbd_export.handshake import ExportInfo
from nbd_export.peer import Peer
from nbd_export.server import NbdServer, listen_unix
from simsr.daemon.engine import Disk, Engine
from simsr.store.files import DiskDirectory, DiskFile
from simsr.store.layout import Geometry
from simsr.store.store import Create, Store

SMALL = Geometry(segment_blocks=512, record_blocks=16)
TIMEOUT_S = 120


# --- In this process: cold reads that do not come back until they are let ------------------------------------------


class StuckFile(DiskFile):
    """A segment file; ``cold`` byte ranges are not in memory, and reading them waits for the directory's ``release``."""

    directory: StuckDirectory

    def _is_cold(self, view: memoryview, offset: int) -> bool:
        return any(part.start < offset + len(view) and offset < part.stop for part in self.cold)

    def read_cached(self, view: memoryview, offset: int) -> bool:
        return not self._is_cold(view, offset) and super().read_cached(view, offset)

    def pread(self, view: memoryview, offset: int) -> None:
        if self._is_cold(view, offset):
            with self.directory.reading():
                assert self.directory.release.wait(TIMEOUT_S)
        super().pread(view, offset)


class StuckDirectory(DiskDirectory):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.release = threading.Event()
        self.stuck = 0
        self.files: dict[str, StuckFile] = {}
        self._lock = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._lock:
            self.stuck += 1
        yield
        with self._lock:
            self.stuck -= 1

    def _adopt(self, name: str, file: DiskFile) -> DiskFile:
        file.__class__ = StuckFile
        file.directory, file.cold = self, []
        self.files[name] = file
        return file

    def create(self, name: str, size_bytes: int) -> DiskFile:
        return self._adopt(name, super().create(name, size_bytes))

    def open(self, name: str) -> DiskFile:
        return self._adopt(name, super().open(name))


class TwoDisks:
    """The disks "hot" and "cold" of one store, as the NBD server wants them. Each block holds its number."""

    SIZE_BYTES = 4 * MIB

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.volumes = {}
        for ident, name in ((1, "hot"), (2, "cold")):
            engine.store.commit([Create(ident, self.SIZE_BYTES, {})])
            volume = self.volumes[name] = engine.store.volumes[ident]
            data = memoryview(b"".join(content(name, block) for block in range(self.SIZE_BYTES // 4096)))
            for at in range(0, self.SIZE_BYTES, MIB):
                assert volume.write([(at, MIB, data[at : at + MIB])]) == 1

    def cool(self, name: str) -> None:
        """From now on all data of a disk are cold."""
        volume = self.volumes[name]
        entries = volume._entries(0, self.SIZE_BYTES // 4096)
        for segment, position, _, length in volume._runs(entries):
            segment.file.cold.append(range(position, position + length))

    def find(self, name: str) -> ExportInfo | None:
        return ExportInfo(name, self.SIZE_BYTES, False) if name in self.volumes else None

    def names(self) -> list[str]:
        return list(self.volumes)

    def offer_to(self, peer: Peer) -> TwoDisks:
        return self

    def contexts(self, name: str) -> list[str]:
        return []

    def has_context(self, name: str, context: str) -> bool:
        return False

    def attach(self, name: str, hang_up: Callable[[str], None]) -> Disk:
        return Disk(self.engine, self.volumes[name], lambda: None)


def content(name: str, block: int) -> bytes:
    return f"{name:>8}{block:8}".encode() * 256


@asynccontextmanager
async def stuck_store(folder: str):
    directory = StuckDirectory(f"{folder}/store")
    store = Store.create(directory, bytes(15) + b"s", SMALL)
    engine = Engine(store)
    path = f"{folder}/nbd.sock"
    listener = listen_unix(path)
    clients: list[Client] = []

    async def connect(name: str) -> Client:
        clients.append(await Client.connect(path, name, structured=True))
        return clients[-1]

    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        disks = TwoDisks(engine)
        nursery.start_soon(NbdServer(disks).serve, listener)
        try:
            yield directory, disks, connect
        finally:
            directory.release.set()
            for client in clients:
                client.close()
            listener.close()
            nursery.cancel_scope.cancel()
    for segment in store.pool.by_slot:
        assert segment is None or not segment.pins, f"{segment} is still pinned"
    store.abandon()


async def test_hot_reads_and_writes_go_on_while_cold_reads_wait(folder):
    async with stuck_store(folder) as (directory, disks, connect):
        disks.cool("cold")
        cold, hot = await connect("cold"), await connect("hot")
        blocks = TwoDisks.SIZE_BYTES // 4096
        waiting = await cold.send_batch(*[(READ, n * 7 % blocks * 4096, 4096) for n in range(40)])
        with trio.fail_after(TIMEOUT_S):
            while directory.stuck < 3:  # batches
                await trio.sleep(0.002)
        for n in range(300):
            block = n * 13 % blocks
            assert (await hot.call(READ, block * 4096, 4096)).data == content("hot", block)
        for n in range(50):
            assert not (await hot.call(WRITE, n * 4096, payload=content("new", n))).error
        assert not (await hot.call(FLUSH)).error
        assert (await hot.call(READ, 0, 8192)).data == content("new", 0) + content("new", 1)
        assert not (await hot.call(WRITE, 5, payload=b"within a block")).error
        assert not any(cookie in cold.reader.replies for cookie in waiting) and directory.stuck
        directory.release.set()
        for n, cookie in enumerate(waiting):
            assert (await cold.reply(cookie)).data == content("cold", n * 7 % blocks)


async def test_every_kind_of_request_for_a_cold_disk_leaves_the_others_alone(folder):
    async with stuck_store(folder) as (directory, disks, connect):
        disks.cool("cold")
        hot = await connect("hot")
        requests = [
            (READ, 100, 2 * MIB), (READ, 0, 1), (CACHE, 0, MIB), (WRITE, 4096 * 9 + 100, 0, b"unaligned"),
            (ZEROES, 4096 * 20 + 1, 5000), (WRITE, 4096 * 30 + 4000, 0, b"x" * 600, FUA),
        ]  # fmt: skip
        sent = []
        for one in requests:
            client = await connect("cold")
            sent.append((client, await client.send(*one)))
        with trio.fail_after(TIMEOUT_S):
            while directory.stuck < len(requests):
                await trio.sleep(0.002)
        for n in range(100):
            assert (await hot.call(READ, n * 4096, 4096)).data == content("hot", n)
        assert all(not client.reader.replies for client, _ in sent)
        directory.release.set()
        for client, cookie in sent:
            assert not (await client.reply(cookie)).error
        found = await (await connect("cold")).call(READ, 4096 * 9, 4096 * 23)
        expected = bytearray(b"".join(content("cold", block) for block in range(9, 32)))
        expected[100:109] = b"unaligned"
        expected[4096 * 11 + 1 : 4096 * 11 + 5001] = bytes(5000)
        expected[4096 * 21 + 4000 : 4096 * 21 + 4600] = b"x" * 600
        assert found.data == expected


async def test_a_cold_read_returns_what_was_there_when_it_was_asked_or_later(folder):
    """The blocks that it waits for are overwritten and flushed meanwhile; their segments must not be used again."""
    async with stuck_store(folder) as (directory, disks, connect):
        disks.cool("cold")
        reader, writer = await connect("cold"), await connect("cold")
        cookie = await reader.send(READ, 0, MIB)
        with trio.fail_after(TIMEOUT_S):
            while not directory.stuck:
                await trio.sleep(0.002)
        for part in range(4):
            for _ in range(8):  # several segments long, so that the old ones die
                assert not (await writer.call(WRITE, part * MIB, payload=os.urandom(4096) * 256)).error
        assert not (await writer.call(FLUSH)).error
        await disks.engine.checkpoint()
        for _ in range(8):
            assert not (await writer.call(WRITE, 0, payload=os.urandom(4096) * 256)).error
        directory.release.set()
        data = (await reader.reply(cookie)).data
        assert len(data) == MIB
        later = (await writer.call(READ, 0, MIB)).data
        for block in range(256):
            got = data[block * 4096 : (block + 1) * 4096]
            assert got in (content("cold", block), later[block * 4096 : (block + 1) * 4096])


async def test_a_client_that_leaves_while_its_cold_reads_wait(folder):
    async with stuck_store(folder) as (directory, disks, connect):
        disks.cool("cold")
        cold, hot = await connect("cold"), await connect("hot")
        await cold.send_batch(*[(READ, n * 4096, 4096) for n in range(100)])
        with trio.fail_after(TIMEOUT_S):
            while not directory.stuck:
                await trio.sleep(0.002)
        cold.close()
        assert (await hot.call(READ, 0, 4096)).data == content("hot", 0)
        directory.release.set()
        with trio.fail_after(TIMEOUT_S):
            while directory.stuck:
                await trio.sleep(0.002)
        assert (await hot.call(READ, 0, 4096)).data == content("hot", 0)


# --- For real ----------------------------------------------------------------------------------------------------

HOT_BYTES, COLD_BYTES = 8 * MIB, 192 * MIB
ATTEMPTS = 15
MEASURE_S = 1.0
RATIO_MAX = 3.0
COLD_IN_FLIGHT = 1

_COLD_READER = """
import random, sys
sys.path[:0] = sys.argv[5:]
from nbd_wire import CACHE, FLUSH, FUA, MIB, READ, WRITE, ZEROES, WireClient
rng = random.Random(int(sys.argv[3]))
with WireClient.connect(sys.argv[1]) as client:
    print("reading", flush=True)
    for block in rng.sample(range(int(sys.argv[2]) // 4096), int(sys.argv[2]) // 4096):
        while client.reader.waiting >= int(sys.argv[4]):
            client.receive()
        client.send(0, block * 4096, 4096)
        client.reader.replies.clear()
"""


def drop_page_cache(root: str) -> None:
    """Have the kernel forget what is in the segment files. Needs no privileges for files that are clean."""
    for path in Path(root).rglob("seg-*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def p99_of_hot_reads(client: WireClient, rng: random.Random) -> float:
    latencies = []
    end = time.perf_counter() + MEASURE_S
    while (began := time.perf_counter()) < end:
        client.read(rng.randrange(HOT_BYTES // 4096) * 4096, 4096)
        latencies.append(time.perf_counter() - began)
    latencies.sort()
    return latencies[math.floor(len(latencies) * 0.99)]


@pytest.mark.alone
def test_cold_reads_of_one_disk_leave_the_p99_of_another_alone(root):
    simsrd = Simsrd(root)
    try:
        simsrd.start().create_sr()
        hot, cold = simsrd.create_vdi(HOT_BYTES, "hot"), simsrd.create_vdi(COLD_BYTES, "cold")
        rng = random.Random(1)
        for vdi in (cold, hot):
            with WireClient.connect(vdi["nbd_socket"]) as client:
                for at in range(0, vdi["size_bytes"], MIB):
                    client.write(at, rng.randbytes(MIB))
                client.flush()
        tried = []
        for seed in range(ATTEMPTS):  # whatever else the machine does can make it look worse, but not better
            simsrd.stop_cleanly()
            drop_page_cache(root)
            simsrd.start()
            tried.append(measure(simsrd, hot, cold, seed))
            if tried[-1][-1] <= RATIO_MAX:
                break
        simsrd.stop_cleanly()
        lines = [f"p99 alone {a * 1e6:.0f} us, beside cold reads {b * 1e6:.0f} us, ratio {r:.2f}" for a, b, r in tried]
        print("; ".join(lines))
        assert min(ratio for *_, ratio in tried) <= RATIO_MAX, "; ".join(lines)
    finally:
        simsrd.end()


def measure(simsrd: Simsrd, hot: dict, cold: dict, seed: int) -> tuple[float, float, float]:
    """(p99 alone, p99 while the other disk is read cold, their ratio; infinite if hardly a read was cold)"""
    rng = random.Random(seed)
    with WireClient.connect(hot["nbd_socket"]) as client:
        client.read(0, HOT_BYTES)
        alone = p99_of_hot_reads(client, rng)
        tests = Path(__file__).parents[1]
        arguments = [cold["nbd_socket"], str(COLD_BYTES), str(seed), str(COLD_IN_FLIGHT)]
        paths = [str(tests / "nbd_export"), str(tests.parent)]
        reader = subprocess.Popen([sys.executable, "-c", _COLD_READER, *arguments, *paths], stdout=subprocess.PIPE)
        try:
            assert reader.stdout.readline() == b"reading\n"
            before = cold_reads(simsrd)
            beside = p99_of_hot_reads(client, rng)
            done = cold_reads(simsrd) - before
        finally:
            reader.kill()
            reader.wait()
            reader.stdout.close()
    return alone, beside, beside / alone if done > 20 else math.inf


def cold_reads(simsrd: Simsrd) -> int:
    return sum(sr["cold_reads"] for sr in simsrd.get("/v1/daemon")["statistics"]["srs"].values())

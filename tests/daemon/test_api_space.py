"""Diffs and surveys of a real simsrd; and how walks get along with checkpoints, cancellation and an SR that goes away, in this process."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import trio
import trio.testing
from api_daemon import BLOCK, MIB, Api, Nbd, Unchanged, alone, api  # noqa: F401 (two of them are fixtures)

from simsr.daemon.walks import Walks
from simsr.daemon.engine import Engine
from simsr.errors import NotFound, StoreDamaged, StoreError
from simsr.store.files import DiskDirectory
from simsr.store.layout import Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.store import Create, Delete, Store
from simsr.store.walk import Diff, Survey


def diff(api, old: dict, new: dict, **query: object) -> dict:
    return api.ok("GET", f"/v1/vdis/{old['uuid']}/diff/{new['uuid']}", params=query)


def space(api, sr: str = "sr") -> tuple[dict, dict]:
    """(what is said of the SR, uuid -> what is said of a VDI)"""
    answer = api.ok("GET", f"/v1/srs/{sr}/space")
    return answer, {vdi["uuid"]: vdi for vdi in answer["vdis"]}


def one(offset: int, length: int, data: bool = True) -> dict:
    return {"offset": offset, "length": length, "data": data}


# Of a real daemon.


def test_diff(api):
    disk = api.vdi(name="changing")
    with Nbd(disk["nbd_socket"]) as nbd:
        nbd.write(0, b"a" * 8 * BLOCK)
        first = api.snapshot(disk, name="first")
        nbd.write(2 * BLOCK, b"b" * BLOCK)
        nbd.write(4 * BLOCK, bytes(2 * BLOCK))
        nbd.write(200 * BLOCK + 7, b"c")
        second = api.snapshot(disk, name="second")
    there = [one(2 * BLOCK, BLOCK), one(4 * BLOCK, 2 * BLOCK, False), one(200 * BLOCK, BLOCK)]
    back = [one(2 * BLOCK, BLOCK), one(4 * BLOCK, 2 * BLOCK), one(200 * BLOCK, BLOCK, False)]
    with Unchanged(api):
        assert diff(api, first, second) == {
            "vdi": first["uuid"], "other": second["uuid"], "size_bytes": MIB, "other_size_bytes": MIB, "ranges": there,
            "next_offset": None,
        }  # fmt: skip
        assert diff(api, second, first)["ranges"] == back
        assert diff(api, disk, second)["ranges"] == diff(api, disk, disk)["ranges"] == []
        assert api.ok("GET", "/v1/vdis/first/diff/second")["ranges"] == there
    api.act(disk, "resize", size_bytes=2 * MIB)
    grown = diff(api, second, disk)
    assert (grown["ranges"], grown["size_bytes"], grown["other_size_bytes"]) == ([one(MIB, MIB, False)], MIB, 2 * MIB)


def test_a_diff_in_parts(api):
    disk = api.vdi()
    before = api.snapshot(disk)
    with Nbd(disk["nbd_socket"]) as nbd:
        for block in range(0, 250, 2):
            nbd.write(block * BLOCK, b"d" * BLOCK)
    whole = diff(api, before, disk)["ranges"]
    assert whole == [one(block * BLOCK, BLOCK) for block in range(0, 250, 2)]
    found, start, parts = [], 0, 0
    while start is not None:
        part = diff(api, before, disk, start=start, limit=40)
        found, start, parts = found + part["ranges"], part["next_offset"], parts + 1
    assert found == whole and parts == 4
    assert diff(api, before, disk, start=100 * BLOCK + 512, limit=1)["ranges"] == [one(100 * BLOCK + 512, BLOCK - 512)]
    assert diff(api, before, disk, start=1 << 60)["ranges"] == []


def test_a_diff_of_many_ranges_is_valid_json(api):
    """It is put together of pieces."""
    disk = api.vdi(8 * MIB)
    before = api.snapshot(disk)
    with Nbd(disk["nbd_socket"]) as nbd:
        for block in range(0, 2000, 2):
            nbd.write(block * BLOCK, b"e" * BLOCK)
    for limit in (1, 255, 256, 257, 512, 1000, 1001):
        answer = diff(api, before, disk, limit=limit)
        assert answer["ranges"] == [one(block * BLOCK, BLOCK) for block in range(0, 2000, 2)][:limit]
        assert (answer["next_offset"] is None) == (limit >= 1000)


def test_what_a_diff_refuses(alone):
    api = alone
    api.sr("a"), api.sr("b")
    here, there = api.vdi(sr="a"), api.vdi(sr="b")
    api.error("NotFound", "GET", f"/v1/vdis/{here['uuid']}/diff/nothing")
    api.error("NotFound", "GET", f"/v1/vdis/nothing/diff/{here['uuid']}")
    error = api.error("BadRequest", "GET", f"/v1/vdis/{here['uuid']}/diff/{there['uuid']}")
    assert "different SRs" in error["message"]
    for query in ({"start": -1}, {"start": "x"}, {"limit": 0}, {"limit": 100_001}):
        api.error("BadRequest", "GET", f"/v1/vdis/{here['uuid']}/diff/{here['uuid']}", params=query)
    api.error("NotFound", "GET", "/v1/srs/nothing/space")


def test_space(alone):
    api = alone
    api.sr("sr")
    assert space(api)[0] == {**space(api)[0], "distinct_bytes": 0, "shared_bytes": 0, "vdis": []}
    disk = api.vdi(name="disk")
    with Nbd(disk["nbd_socket"]) as nbd:
        nbd.write(0, b"f" * 10 * BLOCK)
        snapshot = api.snapshot(disk, name="kept")
        nbd.write(0, b"g" * 3 * BLOCK)
        nbd.write(20 * BLOCK, b"g" * BLOCK)
    clone = api.act(snapshot, "clone", 201, name="clone")
    other = api.vdi(3 * MIB, name="other")
    with Nbd(other["nbd_socket"]) as nbd:
        nbd.write(0, b"h" * 5 * BLOCK)
    told, vdis = space(api)
    assert (told["name"], told["distinct_bytes"], told["shared_bytes"]) == ("sr", 19 * BLOCK, 10 * BLOCK)
    assert vdis[disk["uuid"]] == {
        "uuid": disk["uuid"], "name": "disk", "is_a_snapshot": False, "virtual_bytes": MIB, "referenced_bytes": 11 * BLOCK,
        "exclusive_bytes": 4 * BLOCK,
    }  # fmt: skip
    assert [vdis[vdi["uuid"]]["exclusive_bytes"] // BLOCK for vdi in (snapshot, clone, other)] == [0, 0, 5]
    assert [vdis[vdi["uuid"]]["referenced_bytes"] // BLOCK for vdi in (snapshot, clone, other)] == [10, 10, 5]
    for vdi in (clone, disk, snapshot, other):
        told, vdis = space(api)
        api.delete(vdi)
        assert space(api)[0]["distinct_bytes"] == told["distinct_bytes"] - vdis[vdi["uuid"]]["exclusive_bytes"]
    assert space(api)[0]["distinct_bytes"] == 0


def test_both_say_how_long_it_took(api):
    disk = api.vdi()
    for path in (f"/v1/vdis/{disk['uuid']}/diff/{disk['uuid']}", "/v1/srs/sr/space"):
        assert re.fullmatch(r"store;dur=\d+\.\d{3}", api.send("GET", path).headers["server-timing"])


def test_while_a_disk_is_written_to(api):
    """Snapshots stay as they are, and the survey is of one moment."""
    disk = api.vdi(16 * MIB)
    first = api.snapshot(disk)
    with Nbd(disk["nbd_socket"]) as nbd:
        for block in range(0, 4000, 40):
            nbd.write(block * BLOCK, b"i" * BLOCK)
        second = api.snapshot(disk)
        stop = threading.Event()

        def write() -> None:
            block = 0
            while not stop.is_set():
                nbd.write(block * BLOCK, b"j" * BLOCK)
                block = (block + 7) % 4000

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(20):
                assert diff(api, first, second)["ranges"] == [one(block * BLOCK, BLOCK) for block in range(0, 4000, 40)]
                told, vdis = space(api)
                now = vdis[disk["uuid"]]
                assert now["exclusive_bytes"] + 100 * BLOCK >= now["referenced_bytes"]
                assert vdis[second["uuid"]]["referenced_bytes"] == 100 * BLOCK
        finally:
            stop.set()
            writer.join()


def test_after_a_kill_nothing_is_held(alone):
    """Killed while walks are under way, again and again: everything that is deleted then is freed."""
    api, simsrd = alone, alone.simsrd
    api.sr("sr")
    disk = api.vdi(16 * MIB)

    def ask_until_it_dies(answered: threading.Event) -> None:
        with suppress(httpx.TransportError), closing(Api(simsrd)) as own:
            while own.send("GET", "/v1/srs/sr/space").status_code == 200:
                answered.set()

    for round_ in range(3):
        with Nbd(api.show(disk)["nbd_socket"]) as nbd:
            for block in range(round_, 4000, 9):
                nbd.write(block * BLOCK, b"k" * BLOCK)
            nbd.flush()
        api.snapshot(disk)
        with ThreadPoolExecutor() as pool:
            answered = [threading.Event(), threading.Event()]
            asking = [pool.submit(ask_until_it_dies, event) for event in answered]
            assert all(event.wait(120) for event in answered)
            simsrd.kill()
            for future in asking:
                future.result()
        simsrd.start()
    for vdi in api.ok("GET", "/v1/vdis"):
        api.delete(vdi)
    assert space(api)[0]["distinct_bytes"] == 0
    simsrd.stop_cleanly()
    (path,) = (Path(simsrd.root) / "sr").iterdir()
    store = Store.open(DiskDirectory(str(path)))
    try:
        with store.table.waiting():
            store.reap()
        store._check()
        assert sum(store.usage.live) == 0
    finally:
        store.abandon()
    simsrd.start()


# In this process.


@asynccontextmanager
async def walks_over(blocks: int = 400) -> AsyncIterator[SimpleNamespace]:
    """A store with a disk and a snapshot of it, an engine, and `Walks`."""
    store = Store.create(MemoryDirectory(), bytes(range(16)), Geometry(512, 32, 3))
    store.commit([Create(1, blocks * BLOCK, {"uuid": "u"})])
    store.volumes[1].write([(block * BLOCK, BLOCK, memoryview(bytes([block % 255 + 1]) * BLOCK)) for block in range(blocks)])
    store.commit([Create(2, blocks * BLOCK, {"uuid": "v"}, 1)])
    engine = Engine(store)
    mounted = SimpleNamespace(engine=engine, scope=trio.CancelScope(), repository=SimpleNamespace(name="sr", store=store))
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            yield SimpleNamespace(store=store, engine=engine, mounted=mounted, walks=Walks(SimpleNamespace(_nursery=nursery)))
            nursery.cancel_scope.cancel()
    store._check()  # nothing is held any more
    store.abandon()


class Watched(Survey):
    """A survey that does something between its steps."""

    def __init__(self, store: Store, between) -> None:
        super().__init__(store)
        self._between = between

    def work(self):
        for step in super().work():
            for _ in range(10):
                self._between()
                yield None
            yield step


async def test_a_checkpoint_in_the_middle_of_a_walk_does_not_count_it():
    """A crash behind it ends the walk, and nothing may be held for it then."""
    async with walks_over() as rig:
        generation = rig.store.statistics()["checkpoint_generation"]
        survivors = []

        def between() -> None:
            if not survivors:
                rig.store.checkpoint()
                while not survivors:
                    with suppress(RuntimeError):  # a thread makes spare segments meanwhile
                        survivors.append(rig.store.directory.after_kill())

        survey = await rig.walks.run(rig.mounted, lambda: Watched(rig.store, between))
        assert survey.done and survey.distinct_blocks == 400 and not rig.store.table.pinned
        assert rig.store.statistics()["checkpoint_generation"] == generation + 1
        again = Store.open(survivors[0])
        again._check()
        again.commit([Delete(1), Delete(2)])
        with again.table.waiting():
            again.reap()
        again._check()
        assert not sum(again.usage.live)


async def test_walks_wait_for_each_other():
    async with walks_over() as rig:
        under_way = []

        async def one_walk() -> None:
            def between() -> None:
                assert [other for other in under_way if not other.done] == [walk]

            def begin() -> Watched:
                under_way.append(walk)
                return walk

            walk = Watched(rig.store, between)
            assert (await rig.walks.run(rig.mounted, begin)).done
            under_way.remove(walk)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one_walk)


async def test_who_asked_has_gone():
    async with walks_over() as rig:
        steps = []
        with trio.CancelScope() as scope:

            def between() -> None:
                steps.append(True)
                scope.cancel()

            await rig.walks.run(rig.mounted, lambda: Watched(rig.store, between))
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert len(steps) <= 2, "it went on for nobody"
        rig.store._check()
        assert (await rig.walks.run(rig.mounted, lambda: Survey(rig.store))).done


async def test_the_sr_is_deleted_meanwhile():
    async with walks_over() as rig:
        with pytest.raises(NotFound, match="SR is called 'sr'"):
            await rig.walks.run(rig.mounted, lambda: Watched(rig.store, rig.mounted.scope.cancel))
        rig.store._check()


async def test_what_goes_wrong_is_told():
    async with walks_over() as rig:
        rig.store.checkpoint()
        volumes = rig.store.volumes
        name = next(name for name in rig.store.directory.names() if name.startswith("map-") and rig.store.maps.size_bytes[int(name[4:])])

        def squeeze() -> None:
            for _ in range(2):
                rig.store.table.evict(1 << 30, -1)

        def broken(wrong: Exception) -> None:
            def read(home):
                raise wrong

            rig.store.maps.read = read

        broken(StoreDamaged(path="p", reason=name))
        squeeze()
        with pytest.raises(StoreDamaged, match=name):
            await rig.walks.run(rig.mounted, lambda: Survey(rig.store))
        broken(OSError(5, "Input/output error"))
        with pytest.raises(StoreError, match="a map cannot be read: .*Input/output error"):
            await rig.walks.run(rig.mounted, lambda: Survey(rig.store))
        del rig.store.maps.read
        assert (await rig.walks.run(rig.mounted, lambda: Diff(rig.store, volumes[1], volumes[2]))).ranges == []

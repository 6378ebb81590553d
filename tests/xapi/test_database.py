"""The database: all of a change or nothing, in memory and on disk, also across restarts and kills."""

from __future__ import annotations

import random
import signal
import sqlite3
import time

import pytest
from wrapped_driver import Plan, wrapped
from xapi_kit import World, failure

from simsr.xapi.database import Database, DatabaseUnusable
from simsr.xapi.failure import XenError
from simsr.xapi.schema import NULL


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "xapi.db")


@pytest.fixture
def db(path):
    database = Database(path)
    yield database
    database.close()


def test_all_of_a_transaction_or_nothing(db, path):
    sr = db.create("SR", name_label="kept")
    generation = db.generation
    with pytest.raises(RuntimeError):
        with db.transaction():
            db.set("SR", sr, name_label="changed")
            vdi = db.create("VDI", SR=sr)
            db.delete("SR", sr)
            raise RuntimeError
    assert db.get("SR", sr)["name_label"] == "kept" and not db.has("VDI", vdi)
    assert db.pointing("SR", "VDIs", sr) == [] and db.generation == generation
    db._check()


def test_inner_transactions_belong_to_the_outer_one(db):
    with pytest.raises(RuntimeError):
        with db.transaction():
            with db.transaction():
                sr = db.create("SR")
            raise RuntimeError
    assert not db.has("SR", sr)


def test_memory_follows_when_the_file_cannot_be_written(db):
    sr = db.create("SR", name_label="kept")
    db._sql.execute("PRAGMA query_only = 1")
    with pytest.raises(XenError, match="database could not be written"):
        db.set("SR", sr, name_label="changed")
    assert db.get("SR", sr)["name_label"] == "kept"
    db._sql.execute("PRAGMA query_only = 0")
    db.set("SR", sr, name_label="changed")
    db._check()


def test_transient_classes_stay_out_of_the_file(db, path):
    db.create("session")
    db.create("task")
    sr = db.create("SR", current_operations={"OpaqueRef:op": "scan"})
    db.close()
    again = Database(path)
    assert again.count("session") == again.count("task") == 0
    assert again.get("SR", sr)["current_operations"] == {}
    again.close()


def test_generations_never_go_back(db, path):
    """Also when the last changes were of rows that are not kept: an event token would lie."""
    for _ in range(50):
        db.create("session")
    last = db.generation
    db.close()
    again = Database(path)
    assert again.generation > last and again.oldest == again.generation
    again.close()


def test_pointers_follow_every_change(db):
    sr, other = db.create("SR"), db.create("SR")
    vdis = [db.create("VDI", SR=sr) for _ in range(3)]
    assert db.pointing("SR", "VDIs", sr) == vdis
    db.set("VDI", vdis[0], SR=other)
    db.delete("VDI", vdis[1])
    assert (db.pointing("SR", "VDIs", sr), db.pointing("SR", "VDIs", other)) == ([vdis[2]], [vdis[0]])
    db.set("VDI", vdis[2], SR=NULL)
    assert db.pointing("SR", "VDIs", sr) == []


def test_uuids_are_unique(db):
    sr = db.create("SR")
    with pytest.raises(XenError, match="UUID_NOT_UNIQUE"):
        db.create("SR", uuid=db.get("SR", sr)["uuid"])


def test_random_changes_survive(path, seeds, note):
    """Any mixture of changes, some rolled back, with restarts in between: the file is what memory was."""
    for seed in seeds(20):
        dice = random.Random(seed)
        database = Database(f"{path}{seed}")
        with note(seed=seed):
            for _ in range(60):
                _random_change(database, dice)
                if dice.random() < 0.1:
                    before = {cls: database.all(cls) for cls in ("SR", "VDI")}
                    generation = database.generation
                    database.close()
                    database = Database(f"{path}{seed}")
                    assert {cls: database.all(cls) for cls in ("SR", "VDI")} == before
                    assert database.generation >= generation
            database._check()
            database.close()


def _random_change(database, dice):
    try:
        with database.transaction():
            for _ in range(dice.randint(1, 4)):
                srs, vdis = list(database.all("SR")), list(database.all("VDI"))
                action = dice.choice(["sr", "vdi", "set", "delete", "fail"])
                if action == "sr":
                    database.create("SR", tags=[str(dice.random())])
                elif action == "vdi" and srs:
                    database.create("VDI", SR=dice.choice(srs), other_config={"a": "b"})
                elif action == "set" and vdis and srs:
                    database.set("VDI", dice.choice(vdis), SR=dice.choice([*srs, NULL]), virtual_size=dice.randrange(2**60))
                elif action == "delete" and vdis:
                    database.delete("VDI", dice.choice(vdis))
                elif action == "fail" and dice.random() < 0.3:
                    raise RuntimeError
    except RuntimeError:
        pass


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be looked at " * 20, None])
def test_files_that_are_no_database(path, content):
    if content is None:
        with sqlite3.connect(path) as sql:
            sql.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            sql.execute("INSERT INTO meta VALUES ('format', '99')")
        sql.close()
    else:
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises(DatabaseUnusable, match=path):
        Database(path)


# The whole server.


@pytest.fixture(scope="module")
def world():
    world = World(drivers={"OddSR": wrapped()})
    yield world
    world.close()


@pytest.fixture
def plan(world):
    plan = Plan(world)
    plan.set()
    plan.forget_calls()
    yield plan
    plan.set()


def wait_until_killed(world) -> None:
    """xapi is killed by a driver; start it again."""
    world.session("close")()
    assert world.xapi.process.wait(60) == -signal.SIGKILL
    world.xapi.stop()
    world.start_xapi()


def everything(world) -> dict:
    records = {}
    for cls in ("pool", "host", "VM", "SR", "PBD", "VDI", "VBD", "SM", "message"):
        records |= getattr(world.x, cls).get_all_records()
    return {ref: {key: str(value) for key, value in record.items()} for ref, record in records.items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_everything_is_there_after_a_restart(world, number):
    x = world.x
    disk = world.vdi(world.shared_sr("odd"))
    vm = world.vm("restart", (disk,))
    x.VM.start(vm, False, False)
    world.fill(disk, 0x11)
    snapshot = x.VM.snapshot(vm, "s")
    world.fill(disk, 0x22)
    before, session, token = everything(world), world.session._session, x.event_from(["*"], "", 0.0)["token"]
    world.restart_xapi(number)
    assert everything(world) == before
    world.session._session, fresh = session, world.session._session
    assert world.x.VM.get_all() and world.session._session != session, "sessions end with the process"
    del fresh
    assert failure(world.x.event_from, ["*"], token, 0.0) == ["EVENTS_LOST"]
    world.x.VM.revert(snapshot)
    world.holds(disk, 0x11)


@pytest.mark.parametrize(("disk_number", "moment"), [(0, "kill_after"), (1, "kill"), (2, "kill_after")])
def test_killed_in_the_middle_of_a_revert(world, plan, disk_number, moment):
    """Before the plug-in begins, and when it has done its work and has not answered: no operation is left over, a retry works."""
    disks = tuple(world.vdi(world.shared_sr("odd"), name=f"disk {number}") for number in range(3))
    vm = world.vm("killed", disks)
    for disk in disks:
        world.fill(disk, 0x11)
    snapshot = world.x.VM.snapshot(vm, "s")
    copies = sorted(vbd["VDI"] for vbd in world.vbds(snapshot).values())
    in_order = [world.x.VDI.get_snapshot_of(copy) for copy in copies]
    for disk in disks:
        world.fill(disk, 0x22)
    plan.set(vdi_revert=[None] * disk_number + [{moment: "xapi"}])
    world.x.Async.VM.revert(snapshot)
    wait_until_killed(world)
    x = world.x
    for cls, refs in (("VM", [vm, snapshot]), ("VDI", disks)):
        assert [getattr(x, cls).get_current_operations(ref) for ref in refs] == [{}] * len(refs)
    reverted = disk_number + (moment == "kill_after")
    for number, disk in enumerate(in_order):
        if moment == "kill_after" or number != disk_number:  # which the plug-in, left alone, may or may not have done yet
            world.holds(disk, 0x11 if number < reverted else 0x22)
    x.VM.revert(snapshot)
    for disk in disks:
        world.holds(disk, 0x11)
    assert sorted(vbd["VDI"] for vbd in world.vbds(vm).values()) == sorted(disks)


@pytest.mark.parametrize(
    ("command", "number", "moment"),
    [("vdi_epoch_begin", 0, "kill"), ("vdi_attach", 0, "kill_after"), ("vdi_activate", 0, "kill_after"), ("vdi_activate", 1, "kill")],
)
def test_killed_while_a_vm_starts(world, plan, command, number, moment):
    """What was attached for a VM that did not get as far as running is detached at the next start."""
    sr = world.shared_sr("odd")
    disks = (world.vdi(sr), world.vdi(sr))
    vm = world.vm("half started", disks)
    snapshots = [world.x.VDI.snapshot(disk, {}) for disk in disks]
    plan.set(**{command: [None] * number + [{moment: "xapi"}]})
    world.x.Async.VM.start(vm, False, False)
    wait_until_killed(world)
    x = world.x
    assert x.VM.get_power_state(vm) == "Halted"
    give_up = time.monotonic() + 120
    while any(vbd["currently_attached"] or vbd["storage_lock"] for vbd in world.vbds(vm).values()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    x.VM.start(vm, False, False)
    x.VM.hard_shutdown(vm)
    for snapshot in snapshots:
        x.VDI.revert(snapshot)


def test_killed_while_a_vm_is_suspended(world, plan):
    """A VM that still runs has all its disks attached after the next start, also those that the suspend had let go of."""
    sr = world.shared_sr("odd")
    x, disks = world.x, (world.vdi(sr), world.vdi(sr))
    vm = world.vm("half suspended", disks)
    x.VM.set_suspend_SR(vm, sr)
    x.VM.start(vm, False, False)
    plan.set(vdi_detach=[None, {"kill": "xapi"}])
    x.Async.VM.suspend(vm)
    wait_until_killed(world)
    x = world.x
    assert x.VM.get_power_state(vm) == "Running"
    give_up = time.monotonic() + 120
    while not all(vbd["storage_lock"] and vbd["runtime_properties"] for vbd in world.vbds(vm).values()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    for disk in disks:
        assert x.VDI.get_nbd_info(disk)
    x.VM.suspend(vm)
    x.VM.resume(vm, False, False)
    x.VM.hard_shutdown(vm)

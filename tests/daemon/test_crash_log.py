"""Recording what is written to a disk, and the disks that a crash could have left: over the API, with NBD clients at the other end."""

from __future__ import annotations

import contextlib
import os

import nbd
import pytest
from daemon_tools import Simsrd

from simsr.daemon import crash_log
from simsr.daemon.crash_log import CrashLog

MIB = 1 << 20
KIB = 1024


class Disk:
    def __init__(self, api, vdi):
        self.api, self.vdi = api, vdi
        self.log = f"/v1/vdis/{vdi['uuid']}/crash-log"

    @contextlib.contextmanager
    def client(self, uri=None):
        handle = nbd.NBD()
        handle.connect_uri(uri or self.vdi["nbd_uri"])
        try:
            yield handle
        finally:
            handle.shutdown()

    def begin(self, **body):
        answer = self.api.post(self.log, json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def states(self, **body):
        answer = self.api.post(f"{self.log}/states", json=body)
        assert answer.status_code == 200, answer.text
        return [one["state"] for one in answer.json()]

    def image(self, state, length=MIB):
        answer = self.api.post(f"{self.log}/states/{state}")
        assert answer.status_code == 201, answer.text
        made = answer.json()
        with self.client(made["nbd_uri"]) as client:
            data = client.pread(length, 0)
        assert self.api.delete(f"/v1/vdis/{made['uuid']}").status_code == 204
        return data

    def letters(self, state, count=6):
        """The first byte of each of the first 4 KiB blocks."""
        return self.image(state)[: count * 4 * KIB : 4 * KIB].replace(b"\0", b".").decode()


@pytest.fixture
def disk(shared, request):
    vdi = shared.api.post("/v1/vdis", json={"size_bytes": MIB, "name": request.node.name[:60]}).json()
    one = Disk(shared.api, vdi)
    yield one
    shared.api.delete(one.log)


def put(client, block, letter, **more):
    client.pwrite(letter * 4 * KIB, block * 4 * KIB, **more)


def test_writes_flushes_and_fua(disk):
    with disk.client() as client:
        put(client, 0, b"o")
        log = disk.begin()
        assert (log["recording"], log["writes"]) == (True, 0)
        put(client, 1, b"a")
        client.flush()
        put(client, 2, b"b")
        put(client, 3, b"c", flags=nbd.CMD_FLAG_FUA)
        client.zero(4 * KIB, 0)
    ended = disk.api.post(f"{disk.log}/end").json()
    assert (ended["writes"], ended["flushes"], ended["bytes"], ended["recording"]) == (4, 1, 16 * KIB, False)
    assert disk.letters("0-none") == "o....."
    assert disk.letters("2-none") == "oa...."
    assert disk.letters("4-none") == "oa.c..", "FUA is stable, what came before it is not"
    assert disk.letters("5-all") == ".abc.."
    assert disk.letters("5-only2") == ".a.c.."
    assert disk.image("3-all-torn3")[8 * KIB : 12 * KIB] == b"b" * 1536 + bytes(4 * KIB - 1536)
    names = disk.states(states=500)
    images = {disk.letters(name) for name in names if "torn" not in name}
    assert images >= {"o.....", "oa....", "oab...", "oa.c..", "oabc..", ".a.c..", ".abc.."} and len(images) == 7
    assert disk.states(states=500) == names != disk.states(states=500, seed=1)


def test_parts_of_sectors_are_logged_as_the_sectors_became(disk):
    with disk.client() as client:
        put(client, 0, b"o")
        disk.begin()
        client.pwrite(b"x" * 100, 1000)
        client.trim(4 * KIB, 0)
        client.flush()
    assert disk.image("1-all")[: 4 * KIB] == b"o" * 1000 + b"x" * 100 + b"o" * (4 * KIB - 1100)
    assert disk.api.get(disk.log).json()["bytes"] == 1024 + 4 * KIB


def test_where_each_write_is_stable_nothing_is_lost(disk):
    disk.begin(each_write=True)
    with disk.client() as client:
        put(client, 1, b"a")
        put(client, 2, b"b")
    assert [disk.letters(name) for name in sorted(disk.states())] == ["......", ".a....", ".ab..."]


def test_a_log_outlives_the_daemon(folder):
    simsrd = Simsrd(f"{folder}/r")
    try:
        api = simsrd.start().api
        api.post("/v1/srs", json={"name": "s"})
        disk = Disk(api, api.post("/v1/vdis", json={"size_bytes": MIB}).json())
        disk.begin()
        with disk.client() as client:
            put(client, 1, b"a")
            client.flush()
            put(client, 2, b"b")
        names = disk.states()
        simsrd.kill()
        (path,) = [os.path.join(folder, "r", "crash", name) for name in os.listdir(f"{folder}/r/crash")]
        with open(path, "ab") as file:
            file.write(b"\1" * 20)  # cut short by the crash
        disk.api = simsrd.start().api
        assert disk.states() == names and disk.letters("3-all") == ".ab..."
        again = disk.api.get(disk.log).json()
        assert (again["recording"], again["writes"], again["failure"]) == (False, 2, None)
        assert disk.api.delete(disk.log).status_code == 204 and not os.path.exists(path)
        assert disk.api.get(disk.log).status_code == 404
        assert [one["uuid"] for one in disk.api.get("/v1/vdis").json()] == [disk.vdi["uuid"]], "its base is gone as well"
        with open(path, "wb") as file:
            file.write(b"something else\n")
        answer = disk.api.get(disk.log)
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "CannotExplore"
        simsrd.stop_cleanly()
    finally:
        simsrd.end()


class TestRefused:
    def test_what_is_not_there(self, disk):
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/end"), ("POST", "/states"), ("POST", "/states/1-all")):
            assert disk.api.request(method, disk.log + path).status_code == 404, path
        disk.begin()
        assert disk.api.post(disk.log, json={}).json()["error"]["code"] == "CannotExplore", "recorded already"
        for name in ("1-all", "nonsense", "0-all%2F..", "0-some99999999999999999999x1"):
            answer = disk.api.post(f"{disk.log}/states/{name}")
            assert (answer.status_code, "crash state" in answer.text) == (400, True)

    def test_a_snapshot(self, disk):
        snapshot = disk.api.post(f"/v1/vdis/{disk.vdi['uuid']}/snapshot").json()
        assert disk.api.post(f"/v1/vdis/{snapshot['uuid']}/crash-log").status_code == 400

    @pytest.mark.parametrize("how", ["revert", "resize"])
    def test_a_disk_that_was_changed_by_more_than_writes(self, disk, how):
        base = disk.begin()["base"]
        with disk.client() as client:
            put(client, 0, b"a")
        if how == "revert":
            assert disk.api.post(f"/v1/vdis/{base}/revert").status_code == 200
        else:
            assert disk.api.post(f"/v1/vdis/{disk.vdi['uuid']}/resize", json={"size_bytes": 2 * MIB}).status_code == 200
        answer = disk.api.post(f"{disk.log}/states", json={})
        assert answer.status_code == 409 and "meanwhile" in answer.json()["error"]["message"]


def test_recording_ends_and_nothing_of_it_is_in_force(disk):
    disk.begin()
    assert disk.api.get("/v1/scenario").status_code == 200
    disk.api.post(f"{disk.log}/end")
    assert disk.api.get("/v1/scenario").status_code == 409


class TestFile:
    def test_it_holds_so_much_and_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr(crash_log, "LOG_BYTES_MAX", 2000)
        log = CrashLog.create(str(tmp_path / "log"), {"each_write": False})
        log.is_recording = True
        for number in range(5):
            log.wrote(512 * number, b"x" * 512, 512, False)
        log.flushed(5)
        assert log.writes == 3 and "there were more" in log.describe()["failure"]
        log.close()

    def test_a_disk_that_is_full(self):
        log = CrashLog(os.open("/dev/full", os.O_RDWR), {"each_write": False}, [], [], 0)
        log.is_recording = True
        log.wrote(0, b"x" * 512, 512, False)
        assert log.entries == [] and "No space left" in log.failure
        log.close()


def test_what_rules_do_to_writes_is_what_is_recorded(disk):
    """A crash after all of it, with everything on the medium, leaves what readers saw before."""
    rules = (("0..64KiB", {"torn": {"keep": "any"}}), ("64KiB..128KiB", {"misdirect": "8KiB"}), ("128KiB..192KiB", {"lose": True}), ("192KiB..256KiB", {"flip": 9}))
    for area, action in rules:
        answer = disk.api.post("/v1/faults", json={"rule": {"match": {"op": "write", "range": area, "vdi": disk.vdi["uuid"]}, "action": action}})
        assert answer.status_code == 201, answer.text
    disk.begin()
    with disk.client() as client:
        for number in range(40):
            client.pwrite(bytes([number + 1]) * 4096, number * 7168)
        client.flush()
        seen = client.pread(MIB, 0)
    disk.api.post(f"{disk.log}/end")
    image = disk.image(disk.states(states=1)[0])
    disk.api.delete("/v1/scenario")
    assert image == seen and 0 < sum(seen[at] != number + 1 for number, at in enumerate(range(0, 40 * 7168, 7168))) < 40

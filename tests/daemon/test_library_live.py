"""The seven scenarios of the library on the real clock, hurried, with real clients: fio, qemu-io, libnbd, and daemons that die.

Durations are scaled, and where a client must meet a certain phase, that begins with what the client does; all else is what the files
say. Nothing here asserts an upper limit of time, or depends on who is faster.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time

import nbd
import pytest
from daemon_tools import Simsrd

from scenarios.loader import library_text
from scenarios.traces import convert
from scenarios.traces.records import Record

pytestmark = pytest.mark.realtime

KIB, MIB = 1024, 1 << 20
BLOCK = 4 * KIB


def hurried(name, **changes):
    """The text of a scenario with some words in place of others; each must be there."""
    text = library_text(name)
    for old, new in changes.items():
        assert old in text, (name, old)
        text = text.replace(old, new)
    return text


@pytest.fixture
def api(shared):
    yield shared.api
    if shared.api.get("/v1/scenario").status_code == 200:
        shared.api.delete("/v1/scenario")


def disk(api, name, size_bytes=16 * MIB, **more):
    answer = api.post("/v1/vdis", json={"size_bytes": size_bytes, "name": name, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def start(api, text, **more):
    answer = api.post("/v1/scenario", json={"text": text, **more})
    assert answer.status_code == 201, answer.text


def wait_for_phase(api, *names):
    give_up = time.monotonic() + 120
    while (phase := api.get("/v1/scenario").json()["timeline"].get("phase")) not in names:
        assert time.monotonic() < give_up, phase
        time.sleep(0.02)


CUE = '[[rule]]\nname = "cue"\nmatch = { op = "flush", vdi = "cue" }\naction = { event = "cue" }\n'
"""Flushing the disk of that name ends the phase that waits for "event:cue"."""


def phases(api):
    return [note["name"] for note in api.get("/v1/scenario").json()["notes"] if note["what"] == "phase"]


def phase(api):
    return api.get("/v1/scenario").json()["timeline"].get("phase")


def qemu_io(vdi, *commands, cache="writeback"):
    """What qemu-io says; it goes on behind a command that fails."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", "-t", cache, *words, vdi["nbd_uri"]], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def fio(vdi, *words):
    command = ["fio", "--name=load", "--ioengine=nbd", f"--uri={vdi['nbd_uri']}", "--bs=4k", "--output-format=json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]


def test_san_controller_failover(api):
    vdi = disk(api, "san")
    start(api, hurried("san-controller-failover", **{
        'for  = "60s"': 'until = { op = "write", nth = 100 }', '"24s"': '"2s"', '"45s"': '"1s"', '"10s"': '"500ms"',
        '"2s", down = "3s"': '"100ms", down = "150ms"',
    }))  # fmt: skip
    load = fio(vdi, "--rw=randwrite", "--iodepth=4", "--number_ios=600")
    assert load["error"] == 0 and load["write"]["total_ios"] == 600, "the client rides it out"
    assert load["write"]["clat_ns"]["max"] > 1.9e9, "what was under way hung until B took over"
    assert phases(api)[1:3] == ["A dies", "B takes over, cache cold"]


def test_slow_nfs(api):
    vdi = disk(api, "nfs")
    start(api, hurried("slow-nfs", **{
        'for = "530s"': 'until = { op = "write", nth = 1 }', '"70s"': '"1s"', "uniform(1s, 4s)": "uniform(100ms, 400ms)",
    }))  # fmt: skip
    said = qemu_io(vdi, "write -P 7 0 64k", "flush", "read -P 7 0 64k")
    assert "server not responding" in phases(api) and phase(api) != "server not responding", "the flush hung until it was over"
    assert "failed" not in said.lower(), said
    assert api.post(f"/v1/vdis/{vdi['uuid']}/snapshot").status_code == 201


def test_pool_full_mid_snapshot(api):
    first, second, cue = disk(api, "pool-1"), disk(api, "pool-2"), disk(api, "cue")
    start(api, hurried("pool-full-mid-snapshot", **{'"60s"': '"1s"', 'for  = "75s"': 'until = "event:cue"'}) + CUE)
    assert "failed" not in qemu_io(second, "write -P 1 0 64k", "flush")
    taken = api.post(f"/v1/vdis/{first['uuid']}/snapshot")
    refused = api.post(f"/v1/vdis/{second['uuid']}/snapshot")
    assert (taken.status_code, refused.json()["error"]["sm_fault"]) == (201, 44)
    assert phase(api) == "nobody notices"
    assert "No space left on device" in qemu_io(second, "write -P 2 1M 64k", cache="none")
    qemu_io(cue, "flush")
    assert phase(api) == "operator adds space"
    said = qemu_io(second, "write -P 3 2M 64k", "flush", "read -P 1 0 64k", "read -P 3 2M 64k")
    assert "failed" not in said.lower(), said


def test_dying_disk(api):
    vdi, cue = disk(api, "dying"), disk(api, "cue")
    start(api, hurried("dying-disk", **{
        "2e-5": "0.02", 'for = "10m"': 'until = "event:cue"', "uniform(3s, 7s)": "uniform(3ms, 7ms)", '"60s"': '"1s"', "per 60s": "per 60m",
        "seek(min=0.5ms, half=6ms, max=11ms, rpm=7200)": "200us",
    }) + CUE)  # fmt: skip
    places = range(4 * MIB, 6 * MIB, BLOCK)
    said = qemu_io(vdi, *[f"read {place} 4k" for place in places])
    outcomes = re.findall(r"^(read failed: Input/output error|read 4096/4096)", said, re.MULTILINE)
    bad = [place for place, outcome in zip(places, outcomes, strict=True) if "failed" in outcome]
    assert 0 < len(bad) < 50
    healed = qemu_io(vdi, *[f"{op} {place} 4k" for place in bad for op in ("write -P 5", "read -P 5")])
    assert "failed" not in healed.lower(), healed
    qemu_io(cue, "flush")
    wait_for_phase(api, "gone")
    assert "read 4096/4096" not in qemu_io(vdi, "read 0 4k")


def test_power_cut(api):
    vdi = disk(api, "cut", sm_config={"simsr-group": "vm1"})
    start(api, hurried("power-cut", **{'"5s"': '"300ms"'}))
    flushed = [word for n in range(40) for word in (f"write -P {n + 1} {n * 64}k 64k", "flush")]
    doubtful = [f"write -P 99 {(n + 30) * 64}k 64k" for n in range(20)]
    said = qemu_io(vdi, *flushed, *doubtful)
    before, cut, _ = said.partition("write failed")  # behind it qemu-io connects again for each command, until the power is back
    assert before.count("wrote 65536/65536") == 40 + 16 and cut, "the 17th write ends it"
    give_up = time.monotonic() + 120
    while not (status := api.get("/v1/scenario").json())["is_over"]:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert status["power_cuts"] == 1
    said = qemu_io(vdi, *[f"read -P {n + 1} {n * 64}k 64k" for n in range(30)])
    assert said.count("read 65536/65536") == 30 and "failed" not in said.lower(), said


def test_noisy_neighbour(api, tmp_path):
    for name, format, step in (("cp-w17.vscsi", "vscsi2", 10**9), ("proj_0.csv", "msr", 10**11)):
        records = [Record(number * step, "read", number * BLOCK, BLOCK, latency_ns=5_000_000 + number * 10_000) for number in range(200)]
        with open(tmp_path / name, "wb") as out:
            convert(records, format, out)
    guest, other = disk(api, "guest-1"), disk(api, "other")
    start(api, library_text("noisy-neighbour"), directory=str(tmp_path))
    slow = fio(guest, "--rw=randread", "--iodepth=1", "--number_ios=100")["read"]
    fast = fio(other, "--rw=randread", "--iodepth=1", "--number_ios=100")["read"]
    assert slow["total_ios"] == fast["total_ios"] == 100
    assert slow["lat_ns"]["mean"] > 5e6, "recorded: 5 to 6 ms; other disks have the array's latency"
    assert fast["lat_ns"]["min"] < 4.5e6


class Fire:
    """Writes to a disk, until its connection ends."""

    def __init__(self, vdi):
        self.handle = nbd.NBD()
        self.handle.connect_uri(vdi["nbd_uri"])
        self.thread = threading.Thread(target=self._write)
        self.thread.start()

    def _write(self):
        with contextlib.suppress(nbd.Error):
            for number in range(1_000_000):
                self.handle.pwrite(b"f" * BLOCK, 64 * BLOCK + number % 64 * BLOCK)


def put(vdi, letter):
    handle = nbd.NBD()
    handle.connect_uri(vdi["nbd_uri"])
    handle.pwrite(letter * BLOCK * 8, 0)
    handle.flush()
    handle.shutdown()


def head(vdi):
    handle = nbd.NBD()
    handle.connect_uri(vdi["nbd_uri"])
    data = bytes(handle.pread(BLOCK * 8, 0))
    handle.shutdown()
    assert data == data[:1] * len(data)
    return data[:1]


def test_revert_under_fire(root):
    """A group of two is reverted below clients that write; the daemon is killed at each step and started again."""
    with Simsrd(root) as simsrd:
        simsrd.create_sr("s")
        api = simsrd.api
        disks = [disk(api, f"disk{number}", MIB) for number in range(2)]
        for step in ("before-log", "after-log", "after-swap", "before-ack"):
            for one in disks:
                put(one, b"o")
            taken = api.post("/v1/snapshots", json={"vdis": [one["uuid"] for one in disks]})
            assert taken.status_code == 201, taken.text
            for one in disks:
                put(one, b"n")
            start(api, hurried("revert-under-fire", **{'"10s"': '"200ms"'}), step=step)
            fires = [Fire(one) for one in disks]
            wait_for_phase(api, "revert")
            with contextlib.suppress(Exception):  # it dies before it has answered
                api.post(f"/v1/vdis/{taken.json()['snapshots'][0]['uuid']}/revert", json={"group": True, "live": "disconnect"})
            assert simsrd.wait() == -9, step
            for fire in fires:
                fire.thread.join()
            simsrd.end()
            api = simsrd.start().api
            heads = {head(one) for one in disks}
            assert heads in ({b"o"}, {b"n"}), f"{step}: half a group"
            assert step in ("after-log", "after-swap") or heads == {{"before-log": b"n", "before-ack": b"o"}[step]}
            assert {one["uuid"] for one in disks} <= {one["uuid"] for one in api.get("/v1/vdis").json()}
            if heads == {b"o"}:
                undone = api.post(f"/v1/vdis/{disks[0]['uuid']}/undo", json={"group": True})
                assert undone.status_code == 200, undone.text
                assert {head(one) for one in disks} == {b"n"}, "undo brings back what was before"

"""A scenario in force on files of a mount."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import threading
from collections import Counter

import httpx
import pytest
from fuse_kit import eventually

from scenarios.traces import read


@pytest.fixture
def faults(direct):
    yield lambda name, **rule: direct.post("/v1/faults", rule=rule, name=name)
    if direct.get("/v1/faults"):
        direct.delete("/v1/scenario")


def test_errors_that_nbd_cannot_carry_reach_the_reader(direct, faults):
    vdi, path = direct.disk("broken")
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pread(fd, 4096, 0) == bytes(4096)
        faults("remote", match={"vdi": vdi["uuid"], "op": "read"}, action={"error": "EREMOTEIO"})
        with pytest.raises(OSError) as caught:
            os.pread(fd, 4096, 0)
        assert caught.value.errno == errno.EREMOTEIO
        assert os.pwrite(fd, b"w" * 4096, 0) == 4096
        direct.delete("/v1/faults/remote")
        assert os.pread(fd, 4096, 0) == b"w" * 4096
    finally:
        os.close(fd)


def test_opening_fails_and_closing_takes_its_time(direct, faults):
    vdi, path = direct.disk("door")
    faults("shut", match={"vdi": vdi["uuid"], "op": "open"}, action={"error": "ETIMEDOUT"})
    with pytest.raises(OSError) as caught:
        os.open(path, os.O_RDWR)
    assert caught.value.errno == errno.ETIMEDOUT and not direct.get(f"/v1/vdis/{vdi['uuid']}")["attached"]
    direct.delete("/v1/faults/shut")
    faults("stuck", match={"vdi": vdi["uuid"], "op": "close"}, action={"hang": True})
    os.close(os.open(path, os.O_RDWR))
    eventually(lambda: direct.get("/v1/scenario")["hung"] == 1)
    assert direct.get(f"/v1/vdis/{vdi['uuid']}")["attached"], "it is still being closed"
    direct.delete("/v1/faults/stuck")
    eventually(lambda: not direct.get(f"/v1/vdis/{vdi['uuid']}")["attached"])


def test_a_disk_that_hangs_holds_up_no_other_and_no_listing(direct, faults):
    stuck, stuck_path = direct.disk("stuck")
    _, free_path = direct.disk("free")
    faults("hang", match={"vdi": stuck["uuid"], "op": "read"}, action={"hang": True})
    read: list[bytes] = []

    def reader():
        with open(stuck_path, "rb", buffering=0) as file:
            read.append(file.read(4096))

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: direct.get("/v1/scenario")["hung"] == 3)
    with open(free_path, "rb", buffering=0) as file:
        assert file.read(4096) == bytes(4096)
    assert os.path.basename(stuck_path) in os.listdir(os.path.dirname(stuck_path)) and os.stat(stuck_path).st_size
    assert not read
    direct.delete("/v1/faults/hang")
    for thread in threads:
        thread.join(120)
    assert read == [bytes(4096)] * 3


def test_what_is_asked_of_a_file_is_recorded(direct):
    """fio on a file of the mount; what the daemon saw is what fio says that it did."""
    vdi, path = direct.disk("recorded")
    parts: list[bytes] = []

    def fetch():
        with httpx.Client(transport=httpx.HTTPTransport(uds=direct.socket), base_url="http://simsrd", timeout=120) as client:
            with client.stream("POST", f"/v1/vdis/{vdi['uuid']}/record", json={}) as answer:
                parts.extend(answer.iter_raw())

    thread = threading.Thread(target=fetch)
    thread.start()
    eventually(lambda: parts)
    job = ["--name=t", f"--filename={path}", "--rw=randrw", "--bs=4k", "--number_ios=200", "--randseed=7", "--fsync=50", "--size=512k"]
    done = subprocess.run(["fio", *job, "--output-format=json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = direct.get(f"/v1/vdis/{vdi['uuid']}/record")
    direct.delete(f"/v1/vdis/{vdi['uuid']}/record")
    thread.join(120)
    found = list(read(io.BytesIO(b"".join(parts)), "simsr"))
    said = json.loads(done.stdout)["jobs"][0]
    counts = Counter(one.op for one in found)
    assert counts["read"] == said["read"]["total_ios"] and counts["write"] == said["write"]["total_ios"]
    assert counts["flush"] >= 1 and state["lost"] == 0 and state["requests"] == len(found)
    assert all(one.client.startswith("FUSE, pid") and one.latency_ns > 0 for one in found)
    assert all(one.length == 4096 and one.offset < 512 << 10 for one in found if one.op != "flush")

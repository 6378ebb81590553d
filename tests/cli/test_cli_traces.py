"""``simsr record``, ``replay`` and ``trace`` with a real daemon and real clients: what is recorded is what was asked, and comes back so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import nbd
import pytest
from daemon_tools import running_simsrd

from scenarios.traces import FORMATS, Info, Record, convert, read
from scenarios.traces.own import Recorder, count_lost

MS = 10**6


@pytest.fixture
def disk(simsr, real, monkeypatch) -> Iterator[dict]:
    monkeypatch.setenv("SIMSR_SOCKET", real.socket)
    if not json.loads(simsr("sr", "list", "--json").out):
        simsr("sr", "create", "main")
    [uuid] = simsr("vdi", "create", "--size", "8MiB", "--name", "disk").lines
    yield json.loads(simsr("vdi", "show", uuid, "--json").out)
    assert simsr("vdi", "delete", uuid).status == 0
    assert json.loads(simsr("vdi", "list", "--json").out) == [], "no scratch disk is left behind"


@pytest.fixture
def recording(start_simsr):
    """Starts ``simsr record``; returns when it records. The answer ends it and gives its exit status and standard error."""

    def start(*words: str):
        child = start_simsr("record", *words, stderr=subprocess.PIPE)
        first = child.stderr.readline()
        assert "Recording" in first, first

        def end(number: int | None = signal.SIGINT) -> tuple[int, str]:
            if number is not None:
                child.send_signal(number)
            _, said = child.communicate(timeout=120)
            return child.returncode, said

        return end

    return start


def qemu_io(disk: dict, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-t", "writeback", "-f", "raw", *words, disk["nbd_uri"]], capture_output=True, text=True)
    assert done.returncode == 0 and "error" not in done.stdout + done.stderr, done.stdout + done.stderr


def records(path) -> list[Record]:
    with open(path, "rb") as stream:
        return list(read(stream, "simsr"))


def asked(path) -> Counter:
    return Counter((one.op, one.offset, one.length, one.fua) for one in records(path))


LOAD = [
    "write -P 1 0 4k", "write -P 2 512 512", "aio_write -P 3 64k 64k", "aio_write -P 4 256k 1M", "aio_flush", "read 0 64k",
    "write -f -P 5 2M 4k", "write -z 3M 64k", "discard 4M 128k", "flush", "read 1M 2M",
]  # fmt: skip
EXPECTED = Counter(
    [
        ("write", 0, 4096, False), ("write", 512, 512, False), ("write", 65536, 65536, False), ("write", 262144, 1 << 20, False),
        ("read", 0, 65536, False), ("write", 2 << 20, 4096, True), ("zero", 3 << 20, 65536, False), ("trim", 4 << 20, 131072, False),
        ("read", 1 << 20, 2 << 20, False),
    ]
)  # fmt: skip


def test_record_replay_record_again(simsr, disk, recording, tmp_path):
    first, second = str(tmp_path / "first.trace"), str(tmp_path / "second.trace")
    end = recording("disk", first)
    qemu_io(disk, *LOAD)
    status, said = end()
    assert status == 0 and f"requests in {first}" in said, said
    found = asked(first)
    assert Counter({what: count for what, count in found.items() if what[0] != "flush"}) == EXPECTED
    assert sum(count for what, count in found.items() if what[0] == "flush") >= 2
    assert all(one.latency_ns > 0 and one.client.startswith("nbd client") and one.device == disk["uuid"] for one in records(first))
    end = recording(disk["uuid"], second)
    replayed = json.loads(simsr("replay", first, "--vdi", "disk", "--json", "--max-lag", "1000s").out)
    assert end()[0] == 0
    assert replayed["issued"] == replayed["answered"] == found.total() and replayed["errors"] == {} and replayed["skipped"] == 0
    assert asked(second) == found, "the same requests"
    assert {one.client for one in records(second)} == {"replay of first.trace"}
    before = records(first)
    assert replayed["seconds"] >= (before[-1].issue_ns - before[0].issue_ns) / 1e9, "in the trace's time"
    shown = json.loads(simsr("trace", "show", second, "--json").out)
    assert shown["requests"] == found.total() and shown["lost"] == 0 and shown["device_bytes"] == 8 << 20
    assert shown["ops"]["write"]["requests"] == 5 and shown["ops"]["write"]["latency_ns"]["max"] > 0
    table = simsr("trace", "show", second)
    assert "MS_P99.9" in table.out and "replay of first.trace" in table.out


def test_recording_while_clients_come_and_go_loses_nothing(simsr, disk, recording, tmp_path):
    """A client that is connected before, and goes on after, and one in between."""
    path = str(tmp_path / "t.trace")
    handle = nbd.NBD()
    handle.connect_uri(disk["nbd_uri"])
    handle.pwrite(b"before" * 100, 0)
    end = recording("disk", path)
    for number in range(2000):
        handle.pwrite(b"x" * 512, number * 512)
    qemu_io(disk, "read 0 4k")
    status, _ = end(signal.SIGTERM)
    assert status == 0
    assert handle.pread(512, 512 * 1999) == b"x" * 512
    handle.shutdown()
    found = records(path)
    assert [one.offset for one in found if one.op == "write"] == [number * 512 for number in range(2000)]
    assert len({one.client for one in found}) == 2
    with open(path, "rb") as stream:
        assert count_lost(stream, path) == 0
    assert simsr("record", "disk", path).status == 1, "the file is there"


def test_another_format_and_an_end_by_time(simsr, disk, recording, tmp_path):
    path = str(tmp_path / "log")
    end = recording("disk", path, "--format", "fio3", "--for", "2", "--json")
    second = simsr("record", "disk", str(tmp_path / "other"))
    assert second.status == 48 and "already" in second.err and not (tmp_path / "other").exists()
    qemu_io(disk, "write 0 4k", "write -z 64k 64k")
    status, said = end(None)
    assert status == 0 and "1 requests are left out" in said, said
    with open(path, "rb") as stream:
        assert ("write", 0, 4096) in [one[1:4] for one in read(stream, "fio3")]


def test_a_recording_ends_with_its_disk_and_with_its_daemon(simsr, disk, recording, tmp_path, monkeypatch):
    [uuid] = simsr("vdi", "create", "--size", "1MiB", "--name", "brief").lines
    end = recording("brief", str(tmp_path / "t.trace"))
    assert simsr("vdi", "delete", uuid).status == 0
    assert end(None)[0] == 0
    with running_simsrd() as other, monkeypatch.context() as patched:
        patched.setenv("SIMSR_SOCKET", other.socket)
        simsr("sr", "create", "main")
        simsr("vdi", "create", "--size", "1MiB", "--name", "one")
        end = recording("one", str(tmp_path / "u.trace"))
        give_up = time.monotonic() + 120
        while not (tmp_path / "u.trace").stat().st_size:
            assert time.monotonic() < give_up
        other.kill()
        status, said = end(None)
        assert status == 4 and "u.trace" in said
    assert records(tmp_path / "u.trace") == []


@pytest.fixture
def trace(tmp_path):
    def write(count=50, every_ns=2 * MS, op="write", size=8 << 20, length=4096, format="simsr"):
        path = tmp_path / f"made.{format}"
        found = [Record(number * every_ns, op, number * length, length, MS, device="d") for number in range(count)]
        with open(path, "wb") as out:
            assert convert(found, format, out, Info(device_bytes=size)).skipped == 0
        return str(path)

    return write


def test_replay_on_a_scratch_disk(simsr, disk, trace):
    outcome = simsr("replay", trace(), "--scratch", "1MiB", "--max-lag", "1000s")
    assert outcome.status == 0 and "requests:" in outcome.out and "lag p50, p99, max" in outcome.out
    fast = json.loads(simsr("replay", trace(count=500, every_ns=10**10), "--scratch", "8MiB", "--as-fast-as-possible", "--json").out)
    assert fast["issued"] == 500 and not fast["paced"] and fast["seconds"] < 1000


def test_every_format_is_replayed(simsr, disk, trace):
    for format in FORMATS:
        found = json.loads(simsr("replay", trace(count=3, op="read", format=format), "--vdi", "disk", "--json", "--max-lag", "1000s").out)
        assert found["answered"] == 3 and found["problem"] is None, format


def test_a_pace_that_is_not_kept_is_admitted(simsr, disk, trace):
    assert simsr("fault", "add", "--vdi", "disk", "--op", "write", "--delay", "300ms", "--name", "slow").status == 0
    outcome = simsr("replay", trace(count=20), "--vdi", "disk", "--depth", "2")
    assert simsr("fault", "remove", "slow").status == 0
    assert outcome.status == 49 and "pace was not kept" in outcome.err and "requests:" in outcome.out


def test_failures_are_admitted(simsr, disk, trace):
    assert simsr("fault", "add", "--vdi", "disk", "--op", "write", "--nth", "3", "--error", "ENOSPC", "--name", "full").status == 0
    outcome = simsr("replay", trace(), "--vdi", "disk", "--max-lag", "1000s")
    assert simsr("fault", "remove", "full").status == 0
    assert outcome.status == 49 and "1 of 50 requests failed" in outcome.err and "injected by full" in outcome.err


def test_a_disk_in_use_is_refused_unless_told(simsr, disk, trace):
    handle = nbd.NBD()
    handle.connect_uri(disk["nbd_uri"])
    refused = simsr("replay", trace(), "--vdi", "disk")
    assert refused.status == 16 and "nbd client" in refused.err
    assert handle.pread(4096, 0) == bytes(4096), "nothing was written"
    assert simsr("replay", trace(), "--vdi", "disk", "--in-use", "--max-lag", "1000s").status == 0
    assert handle.pread(4096, 0) != bytes(4096)
    handle.shutdown()


def test_ctrl_c_ends_a_replay_with_its_report(simsr, disk, trace, start_simsr):
    child = start_simsr("replay", trace(count=10), "--vdi", "disk", "--loop", "--max-lag", "1000s", "--json")
    deadline = time.monotonic() + 120
    while not (running := simsr_replays(disk)) or not running[0]["issued"]:
        assert time.monotonic() < deadline and child.poll() is None
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0 and json.loads(out)["rounds"] >= 1 and json.loads(out)["is_over"]
    assert simsr_replays(disk) == []
    child = start_simsr("replay", trace(count=10), "--scratch", "1MiB", "--loop")
    while not simsr_replays(disk):
        assert time.monotonic() < deadline and child.poll() is None
    child.kill()
    child.wait()
    while simsr_replays(disk):
        assert time.monotonic() < deadline, "it ends with who wanted it"
    for vdi in json.loads(simsr("vdi", "list", "--json").out):
        assert vdi["uuid"] == disk["uuid"] or simsr("vdi", "delete", vdi["uuid"]).status == 0


def simsr_replays(disk: dict) -> list[dict]:
    import httpx

    with httpx.Client(transport=httpx.HTTPTransport(uds=os.environ["SIMSR_SOCKET"]), base_url="http://simsrd") as client:
        return client.get("/v1/replays").json()


@pytest.mark.parametrize(
    "words, status, says",
    [
        (["replay", "TRACE"], 2, "--vdi"),
        (["replay", "TRACE", "--vdi", "disk", "--scratch", "1MiB"], 2, "either"),
        (["replay", "/nonexistent", "--vdi", "disk"], 41, "no file"),
        (["replay", "TRACE", "--vdi", "nobody"], 10, "nobody"),
        (["replay", "TRACE", "--vdi", "disk", "--format", "fio3"], 41, "fio version 3"),
        (["replay", "TRACE", "--vdi", "disk", "--format", "foo3"], 41, "'fio3'"),
        (["replay", "TRACE", "--vdi", "disk", "--start", "soon"], 2, "soon"),
        (["replay", "TRACE", "--vdi", "disk", "--fit", "squeeze"], 2, "fit"),
        (["replay", "TRACE", "--vdi", "disk", "--speed", "0"], 2, "speed"),
        (["replay", "JUNK", "--vdi", "disk"], 41, "no format known"),
        (["record", "nobody", "OUT"], 10, "nobody"),
        (["record", "disk", "/nonexistent/t"], 1, "No such file"),
        (["record", "disk", "OUT", "--format", "msx"], 41, "'msr'"),
        (["trace", "show", "/nonexistent"], 41, "no file"),
        (["trace", "show", "JUNK"], 41, "no format known"),
        (["trace", "show", "CUT"], 41, "record"),
        (["trace", "show", "TRACE", "--device", "nosuch"], 41, "'nosuch' is none of them; there are "),
        (["trace", "convert", "TRACE", "OUT", "--device", "nosuch"], 41, "'nosuch' is none of them"),
        (["replay", "TRACE", "--vdi", "disk", "--device", "nosuch"], 41, "'nosuch' is none of them"),
        (["trace", "convert", "CUT", "OUT"], 41, "record"),
        (["trace", "convert", "TRACE", "TRACE"], 1, "it exists"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(simsr, disk, trace, tmp_path, words, status, says):
    (tmp_path / "junk").write_bytes(b"\0\1junk\n")
    good = trace()
    with open(good, "rb") as stream:
        (tmp_path / "cut").write_bytes(stream.read()[:-7])
    out = str(tmp_path / "out")
    names = {"TRACE": good, "JUNK": str(tmp_path / "junk"), "CUT": str(tmp_path / "cut"), "OUT": out}
    before = sorted(os.listdir(tmp_path))
    outcome = simsr(*[names.get(word, word) for word in words])
    assert outcome.status == status and says in outcome.err and "Traceback" not in outcome.err, outcome.err
    left = sorted(os.listdir(tmp_path))
    assert left == before, "no file that is not a trace"


def test_convert_there_and_back(simsr, trace, tmp_path):
    source, text, back = trace(), str(tmp_path / "t.msr"), str(tmp_path / "back.trace")
    done = simsr("trace", "convert", source, text, "--to", "msr")
    assert done.status == 0 and "50 requests" in done.err
    assert simsr("trace", "convert", text, back, "--from", "msr").status == 0
    strip = lambda found: [one[:5] for one in found]  # noqa: E731
    assert strip(records(back)) == strip(records(source))
    assert simsr("trace", "convert", source, text, "--to", "fio2", "--force").status == 0
    shown = simsr("trace", "show", text)
    assert "fio2" in shown.out and shown.status == 0


def test_lost_requests_are_said(simsr, tmp_path):
    path = tmp_path / "t.trace"
    with open(path, "wb") as out:
        recorder = Recorder(out)
        recorder.add(Record(0, "read", 0, 512))
        out.write(recorder._encoder.lost(5, 17))
        recorder.add(Record(9, "read", 0, 512, client="a name that is longer than thirty-five bytes"))
    shown = simsr("trace", "show", str(path))
    assert "lost while recording:  17" in shown.out and "longer than thirty-five bytes (1)" in shown.out
    assert json.loads(simsr("trace", "show", str(path), "--json").out)["requests"] == 2

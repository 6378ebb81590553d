"""Scenarios and faults on a running daemon: over its API, with NBD clients at the other end."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import threading
import time

import nbd
import pytest
from daemon_tools import Simsrd

from scenarios.request import Request
from scenarios.traces import Record, convert
from scenarios.traces.workload import payload

MIB = 1 << 20


@pytest.fixture
def api(shared):
    yield shared.api
    if shared.api.get("/v1/scenario").status_code == 200:
        shared.api.delete("/v1/scenario")


@pytest.fixture
def vdi(api, request):
    answer = api.post("/v1/vdis", json={"size_bytes": 4 * MIB, "name": request.node.name[:60]})
    assert answer.status_code == 201, answer.text
    return answer.json()


@contextlib.contextmanager
def connected(vdi):
    handle = nbd.NBD()
    handle.connect_uri(vdi["nbd_uri"])
    try:
        yield handle
    finally:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()


def add(api, name=None, **rule):
    answer = api.post("/v1/faults", json={"rule": rule, **({"name": name} if name else {})})
    assert answer.status_code == 201, answer.text
    return answer.json()


def start(api, text, **more):
    answer = api.post("/v1/scenario", json={"text": 'simsr = 1\nname = "test"\n' + text, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_a_fault_comes_and_goes_while_a_client_is_connected(api, vdi):
    with connected(vdi) as client:
        client.pwrite(b"a" * 4096, 0)
        add(api, "broken", match={"op": "read", "vdi": vdi["uuid"]}, action={"error": "EIO"})
        with pytest.raises(nbd.Error) as caught:
            client.pread(4096, 0)
        assert caught.value.errnum == errno.EIO
        client.pwrite(b"b" * 4096, 4096)
        (line,) = api.get("/v1/faults").json()
        assert (line["rule"], line["hits"]) == ("broken", 1)
        assert api.delete("/v1/faults/broken").status_code == 200
        assert client.pread(8192, 0) == b"a" * 4096 + b"b" * 4096
    assert api.get("/v1/faults").json() == []


def test_a_reset_leaves_nothing_in_the_way_of_a_scenario(api, vdi):
    add(api, "torn", match={"op": "write", "vdi": vdi["uuid"]}, action={"torn": True})
    with connected(vdi) as client:
        client.pwrite(b"a" * 4096, 0)
    assert api.post("/v1/faults-reset").status_code == 200
    assert api.get("/v1/scenario").json()["error"]["code"] == "NoScenario"
    with connected(vdi) as client:
        assert client.pread(4096, 0) == b"a" * 4096, "the damage is healed"


def test_requests_run_beside_one_that_hangs_and_it_goes_on_later(api, vdi):
    with connected(vdi) as client:
        add(api, "stuck", match={"op": "write", "range": "0..4KiB"}, action={"hang": "until-released"})
        hanging = client.aio_pwrite(b"x" * 512, 0)
        assert client.pread(512, 0) == bytes(512), "it has not been done yet"
        client.pwrite(b"y" * 512, MIB)
        deadline = time.monotonic() + 120
        while api.get("/v1/scenario").json()["hung"] != 1:
            assert time.monotonic() < deadline
        api.delete("/v1/faults/stuck")
        while not client.aio_command_completed(hanging):
            client.poll(1000)
        assert client.pread(512, 0) == b"x" * 512


def test_a_real_client_is_never_answered_early(api, vdi):
    """Neither one request nor, one after the other, their sum; not even when the alarm has just learned from a spell of slow ones."""
    start(api, f'[profile.p]\nvdi = "{vdi["uuid"]}"\nlatency.read = "5ms"\nlatency.write = "1ms"\n')
    with connected(vdi) as client:
        for _ in range(3):
            cookies = [client.aio_pwrite(bytes(MIB), 0) for _ in range(4)] + [client.aio_pread(nbd.Buffer(4096), 0) for _ in range(32)]
            for cookie in cookies:
                while not client.aio_command_completed(cookie):
                    client.poll(1000)
        began = time.perf_counter()
        for _ in range(40):
            asked = time.perf_counter()
            client.pread(4096, 0)
            assert time.perf_counter() - asked >= 0.005 * 0.95
        assert time.perf_counter() - began >= 40 * 0.005 * 0.95


def test_a_disconnect(api, vdi):
    add(api, match={"op": "flush", "vdi": vdi["uuid"]}, action={"disconnect": True})
    with connected(vdi) as client:
        client.pwrite(b"z" * 512, 0)
        with pytest.raises(nbd.Error):
            client.flush()
    api.delete("/v1/scenario")
    with connected(vdi) as client:
        assert client.pread(512, 0) == b"z" * 512


def test_large_writes_in_pieces_and_reads_of_every_kind(api, vdi):
    data = bytes(range(256)) * (3 * MIB // 256)
    with connected(vdi) as client:
        add(api, match={"vdi": vdi["uuid"]}, action={"delay": "1ms"})
        client.pwrite(data, 12345 - 12345 % 512)
        assert client.pread(len(data), 12345 - 12345 % 512) == data
        client.zero(4096, 65536)
        client.trim(65536, 131072)
        client.flush()
        assert client.pread(4096, 65536) == bytes(4096)
    api.delete("/v1/scenario")
    with connected(vdi) as client:
        assert client.pread(MIB, 2 * MIB) == data[2 * MIB - 12288 :][:MIB]


def test_a_scenario_ends_in_the_middle_of_large_writes_and_nothing_is_lost(api, vdi):
    """Pieces of a write that came under the scenario are written when the rest comes without it."""
    stop = threading.Event()

    def flicker():
        while not stop.is_set():
            start(api, '[[rule]]\naction = { delay = "100us" }\n')
            api.delete("/v1/scenario")

    other = threading.Thread(target=flicker)
    other.start()
    try:
        with connected(vdi) as client:
            for number in range(40):
                data = bytes([number + 1]) * (4 * MIB)
                client.pwrite(data, 0)
                assert client.pread(4 * MIB, 0) == data, number
    finally:
        stop.set()
        other.join()


def test_a_power_cut_loses_what_was_not_flushed(api, vdi):
    text = '[[rule]]\nmatch = { op = "write" }\ntrigger = { nth = 3 }\naction = { power_cut = { keep = "none" } }\n'
    with connected(vdi) as client:
        start(api, text)
        client.pwrite(b"f" * 4096, 0)
        client.flush()
        client.pwrite(b"u" * 4096, 0)
        with pytest.raises(nbd.Error):
            client.pwrite(b"c" * 4096, 8192)
    status = api.delete("/v1/scenario").json()
    assert status["power_cuts"] == 1
    with connected(vdi) as client:
        assert client.pread(12288, 0) == b"f" * 4096 + bytes(8192)


@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (8192, 512)], ids=["a block", "a part of one"])
def test_a_power_cut_passes_over_a_disk_that_was_deleted(shared, api, vdi, offset, length):
    """What had not been flushed to it cannot be lost any more (found by the simulation: it ended the daemon)."""
    gone = api.post("/v1/vdis", json={"size_bytes": MIB, "name": "gone"}).json()
    start(api, '[[rule]]\nmatch = { op = "flush" }\naction = { power_cut = { keep = "none", scope = "host" } }\n')
    with connected(gone) as client:
        client.pwrite(b"g" * length, offset)
    shared.wait_for_connections(0)
    assert api.delete(f"/v1/vdis/{gone['uuid']}").is_success
    with connected(vdi) as client:
        client.pwrite(b"u" * 4096, 0)
        with pytest.raises(nbd.Error):
            client.flush()
    assert api.delete("/v1/scenario").json()["power_cuts"] == 1
    with connected(vdi) as client:
        assert client.pread(4096, 0) == bytes(4096)


@pytest.mark.parametrize("kind", ["qemu", "kernel"])
def test_rules_for_a_kind_of_client(api, vdi, kind):
    add(api, "picky", match={"op": "read", "vdi": vdi["uuid"], "client": [kind]}, action={"error": "EIO"})
    for structured in (True, False):
        handle = nbd.NBD()
        handle.set_request_structured_replies(structured)
        handle.connect_uri(vdi["nbd_uri"])
        if structured == (kind == "qemu"):
            with pytest.raises(nbd.Error):
                handle.pread(512, 0)
        else:
            assert handle.pread(512, 0) == bytes(512)
        handle.shutdown()


class TestControlPlane:
    def test_operations_are_late_and_fail_with_the_fault_that_fits(self, api, vdi):
        add(api, "full", match={"op": "snapshot"}, trigger={"nth": 1}, action={"error": "ENOSPC"})
        answer = api.post(f"/v1/vdis/{vdi['uuid']}/snapshot")
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert (error["code"], error["sm_fault"]) == ("InjectedFault", 44)
        assert not [one for one in api.get("/v1/vdis").json() if one["snapshot_of"] == vdi["uuid"]], "nothing was done"
        assert api.post(f"/v1/vdis/{vdi['uuid']}/snapshot").status_code == 201

    @pytest.mark.parametrize("number", [38, 109])
    def test_a_fault_of_choice_on_the_nth_call(self, api, vdi, number):
        add(api, "chosen", match={"op": "clone", "vdi": vdi["uuid"]}, trigger={"nth": 2}, action={"fault": number})
        assert api.post(f"/v1/vdis/{vdi['uuid']}/clone").status_code == 201
        error = api.post(f"/v1/vdis/{vdi['uuid']}/clone").json()["error"]
        assert (error["code"], error["sm_fault"], error["xenapi_code"]) == ("InjectedFault", number, f"SR_BACKEND_FAILURE_{number}")
        assert api.post(f"/v1/vdis/{vdi['uuid']}/clone").status_code == 201

    def test_a_snapshot_of_a_group_meets_the_rules_of_each_disk(self, api, vdi):
        other = api.post("/v1/vdis", json={"size_bytes": MIB}).json()
        add(api, "second", match={"op": "snapshot"}, trigger={"nth": 2}, action={"error": "ENOSPC"})
        answer = api.post("/v1/snapshots", json={"vdis": [vdi["uuid"], other["uuid"]]})
        assert answer.status_code == 409 and answer.json()["error"]["sm_fault"] == 44
        assert not [one for one in api.get("/v1/vdis").json() if one["snapshot_of"] == vdi["uuid"]], "none of them was taken"
        assert api.post("/v1/snapshots", json={"vdis": [vdi["uuid"], other["uuid"]]}).status_code == 201

    def test_a_revert_meets_the_rules_of_the_disk_and_only_when_it_is_one(self, api, vdi):
        snapshot = api.post(f"/v1/vdis/{vdi['uuid']}/snapshot").json()
        add(api, "no", match={"op": "revert", "vdi": vdi["uuid"]}, action={"fault": 109})
        revert = f"/v1/vdis/{snapshot['uuid']}/revert"
        assert api.post(revert, json={"dry_run": True}).status_code == 200
        assert api.get("/v1/faults").json()[0]["matched"] == 0
        for body in ({}, {"target": vdi["uuid"]}, None):
            assert api.post(revert, **({} if body is None else {"json": body})).json()["error"]["sm_fault"] == 109
        assert api.post(revert, content=b"[" * 100_000).status_code in (400, 422)

    def test_a_scan_takes_time_for_each_disk_of_the_sr(self, api, vdi):
        api.post("/v1/vdis", json={"size_bytes": MIB})
        count = len(api.get("/v1/vdis").json())
        start(api, '[profile.p]\ncontrol.scan = "per_vdi(5ms)"\n')
        began = time.monotonic()
        assert len(api.get("/v1/vdis", params={"sr": vdi["sr"]}).json()) == count
        assert time.monotonic() - began >= 0.005 * count

    @pytest.mark.parametrize("step", ["before-log", "after-log", "after-swap", "before-ack"])
    def test_the_daemon_dies_at_a_step_of_a_revert(self, step, root):
        with Simsrd(root) as simsrd:
            simsrd.create_sr("s")
            api = simsrd.api
            disk = api.post("/v1/vdis", json={"size_bytes": MIB}).json()
            with connected(disk) as client:
                client.pwrite(b"o" * 4096, 0)
            snapshot = api.post(f"/v1/vdis/{disk['uuid']}/snapshot").json()
            with connected(disk) as client:
                client.pwrite(b"n" * 4096, 0)
                client.flush()
            start(api, '[[rule]]\nmatch = { op = "revert" }\naction = { kill_daemon = "at-step" }\n', step=step)
            with contextlib.suppress(Exception):
                api.post(f"/v1/vdis/{snapshot['uuid']}/revert")
            assert simsrd.wait() == -9
            simsrd.end()
            api = simsrd.start().api
            with connected(disk) as client:
                seen = client.pread(4096, 0)
            assert seen == {"before-log": b"n", "before-ack": b"o"}.get(step, seen[:1]) * 4096
            assert seen[:1] in (b"o", b"n") and seen == seen[:1] * 4096
            report = api.get("/v1/scenario/report").json()
            assert (report["scenario"], report["is_running"], report["rules"][0]["hits"]) == ("test", False, 1), "it is kept"


def test_metrics(api, vdi):
    add(api, "slow", match={"op": "read", "vdi": vdi["uuid"]}, action={"delay": "1us"})
    with connected(vdi) as client:
        client.pread(512, 0)
        lines = api.get("/metrics").text.splitlines()
    assert 'simsr_rule_hits_total{action="delay",rule="slow",scenario="live"} 1.0' in lines
    assert any(line.startswith("simsr_sr_used_bytes{") for line in lines)
    assert "simsr_nbd_connections 1.0" in lines


class TestClientsInUse:
    def test_what_they_cannot_be_told_is_refused(self, api, vdi):
        rule = {"match": {"op": "read", "vdi": vdi["uuid"]}, "action": {"error": "ESTALE"}}
        assert add(api, "nobody", **rule)["warnings"] == [], "nobody is there who could not be told"
        api.delete("/v1/faults/nobody")
        with connected(vdi) as client:
            answer = api.post("/v1/faults", json={"rule": rule})
            assert answer.status_code == 400 and "qemu over NBD cannot be told ESTALE" in answer.text and "FUSE carries any" in answer.text
            assert api.get("/v1/faults").json() == [] and client.pread(512, 0) == bytes(512)
            text = f'simsr = 1\nname = "x"\n[[rule]]\nmatch = {{ vdi = "{vdi["uuid"]}" }}\naction = {{ error = "ESTALE" }}\n'
            assert "cannot be told" in api.post("/v1/scenario", json={"text": text}).text
            assert add(api, match={"client": "fuse"}, action={"error": "ESTALE"})["warnings"] == []

    def test_disks_that_are_not_there(self, api, vdi):
        assert "no disk is called nosuch now" in add(api, match={"vdi": "nosuch"}, action={"error": "EIO"})["warnings"][0]
        far = add(api, match={"vdi": vdi["uuid"], "range": "1GiB..2GiB"}, action={"error": "EIO"})
        assert "behind the end of every disk" in far["warnings"][0]
        assert start_again(api, '[[rule]]\nmatch = { vdi = "nosuch" }\naction = { error = "EIO" }\n')["warnings"]


def start_again(api, text):
    api.delete("/v1/scenario")
    return start(api, text)


class TestBadInput:
    @pytest.mark.parametrize(
        "text, says",
        [
            ("simsr = 1\n", "name"),
            ("nonsense", "not TOML"),
            ('simsr = 1\nname = "x"\n[[rule]]\naction = { eror = "EIO" }\n', "error"),
            ('simsr = 1\nname = "x"\n[[rule]]\n[rule.action.replay]\ntrace = "no"\nas = "latency"\n', "no scenario file"),
        ],
    )
    def test_scenarios(self, api, text, says):
        answer = api.post("/v1/scenario", json={"text": text})
        assert answer.status_code == 400 and says in answer.text
        assert api.get("/v1/scenario").status_code == 409, "nothing is in force"

    def test_only_one_at_a_time(self, api):
        start(api, "")
        assert api.post("/v1/scenario", json={"text": 'simsr = 1\nname = "y"\n'}).json()["error"]["code"] == "ScenarioRunning"

    def test_faults(self, api):
        assert api.post("/v1/faults", json={"rule": {"action": {}}}).status_code == 400
        assert api.get("/v1/scenario").status_code == 409
        assert api.delete("/v1/faults/none").json()["error"]["code"] == "NoScenario"
        add(api, "one", action={"delay": "1ms"})
        assert api.delete("/v1/faults/two").status_code == 404
        assert api.post("/v1/faults", json={"rule": {"action": {"delay": "1ms"}}, "name": "one"}).status_code == 400


def test_the_dead_man_lets_go_when_who_holds_the_scenario_is_gone(api, vdi, shared):
    start(api, '[[rule]]\nmatch = { op = "read" }\naction = { hang = true }\n')
    command = ["curl", "-sN", "--unix-socket", shared.socket, "-X", "POST", "http://simsrd/v1/scenario/hold"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as held, connected(vdi) as client:
        held.stdout.readline()
        hanging = client.aio_pread(nbd.Buffer(512), 0)
        held.kill()
        while not client.aio_command_completed(hanging):
            assert client.poll(30_000) >= 0


def test_a_load_on_a_disk_beside_its_clients(api, vdi, tmp_path):
    """It writes what can be foretold, meets the rules of the disk, is measured, and ends with the scenario."""
    found = [Record(number * 10_000_000, "write", number * 4096, 4096) for number in range(20)]
    with open(tmp_path / "t.trace", "wb") as out:
        convert(found, "simsr", out)
    text = (
        f'[[rule]]\nname = "load"\nmatch = {{ vdi = "{vdi["uuid"]}" }}\n'
        '[rule.action.replay]\ntrace = "t.trace"\nas = "workload"\non = "disk"\n'
        '[[rule]]\nname = "bad"\nmatch = { op = "write", range = "76KiB..80KiB" }\naction = { error = "ENOSPC" }\n'
        "[[expect]]\nthat = \"replay.lag.p99 < 100s\"\n"
    )
    with connected(vdi) as client:
        start(api, text, directory=str(tmp_path))
        give_up = time.monotonic() + 120
        while not ((loads := api.get("/v1/scenario").json()["replays"]) and loads[0]["is_over"]):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        (load,) = loads
        assert (load["rule"], load["disk"], load["issued"], load["answered"]) == ("load", vdi["uuid"], 20, 19)
        assert load["errors"] == {"No space left on device": 1} and "injected by bad" in load["first_error"]
        written = b"".join(payload(Request("write", number * 4096, 4096), number + 1) for number in range(19))
        assert client.pread(20 * 4096, 0) == written + bytes(4096)
        while len(there := api.get(f"/v1/vdis/{vdi['uuid']}").json()["attached"]) > 1:
            assert time.monotonic() < give_up, "the load lets go of the disk"
        assert there[0]["kind"] == "nbd"


def test_a_load_that_is_under_way_is_a_client_until_it_ends(api, vdi, tmp_path):
    with open(tmp_path / "t.trace", "wb") as out:
        convert([Record(number * 1_000_000_000, "read", 0, 4096) for number in range(1000)], "simsr", out)
    text = '[[rule]]\nname = "load"\nmatch = {{ vdi = "{}" }}\n[rule.action.replay]\ntrace = "t.trace"\nas = "workload"\non = "disk"\n'
    start(api, text.format(vdi["uuid"]), directory=str(tmp_path))
    give_up = time.monotonic() + 120
    while not (there := api.get(f"/v1/vdis/{vdi['uuid']}").json()["attached"]):
        assert time.monotonic() < give_up
    assert [(one["client"], one["kind"]) for one in there] == [("load of rule load", "replay")]
    assert api.delete(f"/v1/vdis/{vdi['uuid']}").status_code == 409
    assert api.delete("/v1/scenario").status_code == 200
    while api.get(f"/v1/vdis/{vdi['uuid']}").json()["attached"]:
        assert time.monotonic() < give_up
    assert api.delete(f"/v1/vdis/{vdi['uuid']}").status_code == 204

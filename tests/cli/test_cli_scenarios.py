"""``simsr scenario`` and ``simsr fault``: what they print, and that what they say is in force."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest



@pytest.fixture
def disk(simsr, real, monkeypatch) -> Iterator[dict]:
    monkeypatch.setenv("SIMSR_SOCKET", real.socket)
    if not json.loads(simsr("sr", "list", "--json").out):
        simsr("sr", "create", "main")
    [uuid] = simsr("vdi", "create", "--size", "4MiB", "--name", "disk").lines
    yield json.loads(simsr("vdi", "show", uuid, "--json").out)
    simsr("scenario", "stop")
    assert simsr("vdi", "delete", uuid).status == 0


@pytest.fixture
def scenario(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "my.toml"
        path.write_text(f'simsr = 1\nname = "mine"\nabout = "A test."\n{text}')
        return str(path)

    return write


def qemu_io(disk: dict, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *words, disk["nbd_uri"]], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_fault_from_beginning_to_end(simsr, disk):
    [name] = simsr("fault", "add", "--vdi", "disk", "--op", "write", "--nth", "2", "--error", "ENOSPC", "--name", "full").lines
    assert name == "full"
    assert "No space left" in qemu_io(disk, "write 0 4k", "write 0 4k")
    assert simsr("fault", "list").lines == ["RULE  MATCHED  HITS", "full        2     1"]
    wrong = simsr("fault", "remove", "ful")
    assert wrong.status == 10 and wrong.err.endswith("Hint: List what there is with 'simsr fault list'.\n")
    assert simsr("fault", "remove", "full").lines == ["full is no longer in force."]
    assert simsr("scenario", "status").status == 43, "nothing is left behind"
    assert simsr("fault", "remove", "full").status == 43


def test_toml_and_options_together(simsr, disk):
    answer = json.loads(
        simsr("fault", "add", "--op", "write", "--rule", "sticks_to = 'data'\naction = { torn = { sector = 512 } }", "--json").out
    )
    assert answer["rule"] == "live-1"
    qemu_io(disk, "write -P 7 0 64k")
    (shown,) = json.loads(simsr("scenario", "status", "--json").out)["disks"]
    assert shown["overlay"]["data"]["bytes"] > 0
    assert "Pattern verification failed" in qemu_io(disk, "read -P 7 0 64k")
    assert simsr("fault", "heal", "disk").status == 0
    assert "failed" not in qemu_io(disk, "read -P 7 0 64k")


@pytest.mark.parametrize(
    "words, says",
    [
        (["--op", "reed", "--error", "EIO"], "did you mean 'read'"),
        (["--op", "read"], "nothing happens"),
        (["--error", "EWHAT"], "EWHAT"),
        (["--rule", "action ="], "not TOML"),
        (["--rule", "action = 3"], "must be a table"),
        (["--op", "read", "--p", "200%", "--error", "EIO"], "200%"),
    ],
)
def test_faults_that_make_no_sense(simsr, disk, words, says):
    outcome = simsr("fault", "add", *words)
    assert outcome.status == 40 and says in outcome.err
    assert simsr("scenario", "status").status == 43


def test_check_and_plan_need_no_daemon(simsr, monkeypatch, scenario):
    monkeypatch.setenv("SIMSR_SOCKET", "/nonexistent")
    assert simsr("scenario", "check", "slow-nfs").status == 0
    plan = simsr("scenario", "plan", "san-controller-failover").lines
    assert any(line.startswith("60s   A dies") and "inflight=hang" in line for line in plan)
    assert [one["name"] for one in json.loads(simsr("scenario", "list", "--json").out)] == sorted(
        one["name"] for one in json.loads(simsr("scenario", "list", "--json").out)
    )
    assert json.loads(simsr("scenario", "schema").out)["title"] == "simsr scenario"
    bad = simsr("scenario", "check", scenario('[[rule]]\naction = { eror = "EIO" }\n'))
    assert bad.status == 40 and "rule 1" in bad.err and "error" in bad.err
    assert simsr("scenario", "check", "/nonexistent.toml").status != 0


def test_a_scenario_runs_to_its_end(simsr, disk, scenario):
    path = scenario('[[phase]]\nname = "one"\nfor = "0.2s"\n[[phase]]\nname = "two"\nfor = "0.2s"\n')
    outcome = simsr("scenario", "run", path)
    assert outcome.status == 0 and "mine is in force" in outcome.lines[0] and "over" in outcome.out
    assert simsr("scenario", "status").status == 43


def test_ctrl_c_stops_the_scenario(simsr, disk, scenario, start_simsr):
    path = scenario('[[phase]]\nname = "stuck"\n[[phase.rule]]\nmatch = { op = "read" }\naction = { hang = true }\n')
    child = start_simsr("scenario", "run", path)
    while "stuck" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(120) == 130
    assert simsr("scenario", "status").status == 43
    assert "4 KiB" in qemu_io(disk, "read 0 4k")


def test_detached(simsr, disk, scenario):
    assert simsr("scenario", "run", scenario(""), "--detach", "--seed", "5").lines == ["mine is in force, seed 5."]
    again = simsr("scenario", "run", scenario(""), "--detach")
    assert again.status == 42 and "stop" in again.err
    assert simsr("scenario", "stop").status == 0


def test_run_with_a_scenario(simsr, scenario, tmp_path):
    rule = '[[rule]]\nmatch = { op = "read" }\naction = { error = "EIO" }\n'
    script = 'qemu-io -f raw -c "read 0 4k" "$uri" 2>&1 | grep -q Input/output'
    page = tmp_path / "page.html"
    words = ["run", "--size", "16MiB", "--scenario", scenario(rule), "--report", str(page), "--", "sh", "-c", script]
    assert simsr(*words).status == 0 and "EIO" not in page.read_text() and "errors answered" in page.read_text()
    scenario(rule + '[[expect]]\nthat = "client.errors == 0"\n')
    outcome = simsr(*words)
    assert outcome.status == 1 and "did not go as expected: client.errors == 0" in outcome.err
    assert "1 of 1 expectations broken" in page.read_text()
    assert simsr(*words[:-1], "exit 7").status == 7
    assert simsr("run", "--size", "16MiB", "--report", str(page), "--", "true").status == 2


def test_a_run_is_repeated_by_its_seed(simsr, scenario):
    """In another daemon, on another disk."""
    reads = " ".join(f'-c "read {number * 4}k 4k"' for number in range(40))
    script = f'qemu-io -f raw {reads} "$uri" 2>&1 | cut -d" " -f1-2 | grep ^read'
    words = ["run", "--size", "16MiB", "--scenario", scenario('[[rule]]\nmatch = { op = "read" }\ntrigger = { p = 0.4 }\naction = { error = "EIO" }\n')]
    first, second = (simsr(*words, "--", "sh", "-c", script).out for _ in range(2))
    assert first == second and 5 < first.count("read failed") < 35


def test_a_report_of_a_run_with_a_broken_expectation(simsr, disk, scenario, tmp_path):
    page = tmp_path / "out.html"
    path = scenario(
        '[[expect]]\nthat = "count(\'read\') >= 1"\n[[expect]]\nthat = "client.errors == 0"\n[[phase]]\nname = "only"\nfor = "0.3s"\n'
        '[[phase.rule]]\nmatch = { op = "write" }\naction = { error = "EIO" }\n'
    )
    outcome = simsr("scenario", "run", path, "--report", str(page))
    assert outcome.status == 1 and "did not go as expected: count('read') >= 1" in outcome.err
    assert "broken: count('read') >= 1 (count('read') is 0)" in outcome.out
    assert "not evaluated: client.errors == 0 (client.errors: no request was made of a disk of the scenario)" in outcome.out
    assert "1 of 2 expectations broken" in page.read_text() and sorted(os.listdir(tmp_path)) == ["my.toml", "out.html"]
    shown = json.loads(simsr("scenario", "report", "--json").out)
    assert shown["verdict"] == "broken" and shown["phases"][0]["name"] == "only" and not shown["is_running"]
    assert "verdict:" in simsr("scenario", "report").out


def test_a_report_of_a_run_under_way(simsr, disk, scenario, tmp_path):
    path = scenario('[[expect]]\nthat = "client.errors == 0"\n[[phase]]\nname = "slow"\n[[phase.rule]]\naction = { delay = "2ms" }\n')
    assert simsr("scenario", "run", path, "--detach").status == 0
    qemu_io(disk, "write 0 64k", "read 0 64k", "flush")
    assert "met: client.errors == 0 (client.errors is 0)" in simsr("scenario", "status").out
    page = tmp_path / "now.html"
    assert simsr("scenario", "report", "--out", str(page)).lines == [f"The report of mine is in {page}."]
    assert "still running" in page.read_text()
    shown = json.loads(simsr("scenario", "report", "--json").out)
    ops = {one["op"]: one for one in shown["operations"] if one["phase"] is None}
    assert ops["read"]["bytes"] == ops["write"]["bytes"] == 64 << 10
    assert ops["read"]["min_s"] >= 0.0015 and sum(shown["timeline"]["requests"]["read"]) == ops["read"]["count"]
    assert shown["disks"][0]["name"] == "disk" and shown["timeline"]["hits"]


def test_reports_that_cannot_be_written(simsr, disk, scenario, tmp_path):
    path = scenario('[[phase]]\nfor = "0.1s"\n')
    for place in (tmp_path, tmp_path / "none" / "x.html"):
        outcome = simsr("scenario", "run", path, "--report", str(place))
        assert outcome.status == 1 and "cannot write" in outcome.err
        assert simsr("scenario", "status").status == 43, "it was not even begun"
    assert simsr("scenario", "run", path, "--detach", "--report", "x.html").status == 2
    assert os.listdir(tmp_path) == ["my.toml"]

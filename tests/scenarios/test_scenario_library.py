"""The library: every file loads, suits its clients, and its disks are as fast as docs/scenarios.md says."""

import random
import re
from pathlib import Path

import pytest
from scenario_kit import GIB, MS, S, ask, orders

from scenarios.checks import client_problems
from scenarios.engine import Engine
from scenarios.loader import library, library_text, load
from scenarios.request import Request
from scenarios.rules import LiveRule

PROFILES = ["nvme", "sata-ssd", "hdd-7200", "san-ok", "nfs-ok", "smb", "s3-backed"]
SCENARIOS = [name for name in library() if name not in PROFILES]
DOCS = (Path(__file__).parents[2] / "docs/scenarios.md").read_text()
ROW = re.compile(r"\| `([a-z0-9-]+)` \| (read|write|flush) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")
DOCUMENTED = {(name, op): tuple(map(float, values)) for name, op, *values in ROW.findall(DOCS)}


class NoTrace:
    def next(self, op, length, depth):
        return MS


def run(name):
    return Engine(load(library_text(name), name), replays=lambda rule, disk: NoTrace())


@pytest.mark.parametrize("name", library())
def test_each_is_called_as_its_file_and_says_what_it_is(name):
    found = load(library_text(name), name)
    assert found.name == name and found.about.endswith(".")
    if name in PROFILES:
        assert list(found.profile) == [name] and not found.rule and not found.phase
    else:
        assert found.rule or found.phase


def test_the_docs_list_them():
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \| [A-Z]", DOCS, re.MULTILINE)) == set(library())
    assert {name for name, _ in DOCUMENTED} == set(PROFILES)


@pytest.mark.parametrize("name, op", sorted(DOCUMENTED))
def test_percentiles_are_as_documented(name, op):
    """p50, p99 and p99.9 in ms of 4 KiB at random places, one at a time."""
    one = run(name).disk("disk", 100 * GIB)
    count = 30_000
    delays = []
    places = random.Random(1)
    for number in range(count):
        offset = places.randrange(100 * GIB // 4096) * 4096
        delays.append(one.decide(Request(op, *((offset, 4096) if op != "flush" else ())), number * 60 * S).delay_ns / MS)
    delays.sort()
    for share, expected, tolerance in zip((0.5, 0.99, 0.999), DOCUMENTED[name, op], (0.03, 0.1, 0.2), strict=True):
        assert delays[int(share * count)] == pytest.approx(expected, rel=tolerance), f"p{100 * share:g}"


def test_sequential_access_of_a_hard_disk_is_fast():
    one = run("hdd-7200").disk("disk", 100 * GIB)
    delays = [ask(one, "read", number << 20, 1 << 20, at=number * S).delay_ns for number in range(10)]
    assert all(delay == pytest.approx(1024 * 5000, rel=0.01) for delay in delays[1:]), "200 MB/s"


def test_tapdisk_limits():
    many = run("tapdisk-limits")
    one = many.disk("d", GIB)
    hangs = [(at, hang.until_ns // S - at) for at in range(380) if (hang := ask(one, at=at * S).hang)]
    assert hangs == [(0, 9), (40, 11), (80, 119), (230, 121)]
    assert [problem.reason for problem in client_problems(many.scenario, "tapdisk")] == ["tapdisk does not wait 121s"]


def test_failover_of_a_san():
    many = run("san-controller-failover")
    one = many.disk("d", GIB)
    plans = {at: ask(one, "write", at=at * S) for at in (30, 70, 90, 131, 141)}
    assert [bool(plans[at].hang) for at in plans] == [False, True, False, False, False]
    median = sorted(ask(one, "write", at=150 * S).delay_ns for _ in range(301))[150]
    assert median < MS
    assert [at for kind, at, _ in orders(many) if kind == "inflight"] == [60.0]


def test_slow_nfs():
    many = run("slow-nfs")
    one = many.disk("d", GIB)
    assert not ask(one, at=0).hang and ask(one, "snapshot", at=531 * S).hang and ask(one, at=599 * S).hang
    many.advance(600 * S)
    assert ("release", 600.0, {"rule": "server not responding/rule-1", "error": 0}) in orders(many)


def test_a_pool_that_is_full_between_two_snapshots():
    many = run("pool-full-mid-snapshot")
    a, b = many.disk("a", GIB), many.disk("b", GIB)
    assert ask(a, "snapshot").error == 0 and ask(b, "snapshot").error
    assert many.phase == "nobody notices" and ask(a, "write", at=S).hang
    assert not ask(a, "write", at=76 * S).hang and many.phase == "operator adds space"


def test_a_dying_disk():
    many = run("dying-disk")
    one = many.disk("d", 4 * GIB)
    blocks = range(4 * GIB // 4096)
    bad = [block for block in blocks[::64] if ask(one, "read", 4096 * block, 64 * 4096, at=S).error]
    assert 1 <= len(bad) < 20 and all(
        0.25 <= block / len(blocks) + 64 / len(blocks) and block / len(blocks) < 0.4 for block in bad
    )
    moved = sum(bool(ask(one, "write", GIB, at=630 * S).effects) for _ in range(2000))
    assert 5 < moved < 40
    assert ask(one, at=661 * S).disconnect


def test_a_power_cut():
    many = run("power-cut")
    one = many.disk("d", GIB, groups=["vm1"])
    for number in range(40):
        ask(one, "write", at=number), ask(one, "flush", at=number)
    assert [ask(one, "write", at=S).disconnect for _ in range(17)] == [False] * 16 + [True]
    kinds = [kind for kind, _, _ in orders(many)]
    assert kinds.index("power_cut") < kinds.index("power_on")


def test_a_noisy_neighbour():
    many = run("noisy-neighbour")
    assert [more["rule"] for kind, _, more in orders(many) if kind == "replay"] == ["neighbour"]
    assert ask(many.disk("guest-1", GIB)).delay_ns == MS and ask(many.disk("other", GIB)).rules == ()


def test_revert_under_fire():
    many = run("revert-under-fire")
    one = many.disk("disk0", GIB)
    assert ask(one, "write").delay_ns and not ask(one, "revert").effects
    assert ask(one, "revert", at=10 * S).effects[0].value == "at-step"


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rule_of_a_scenario_can_come_into_force(name):
    found = load(library_text(name), name)
    rules = [*found.rule, *(rule for phase in found.phase for rule in phase.rule)]
    assert rules and all(LiveRule(rule, 0).ops or LiveRule(rule, 0).is_standing for rule in rules)

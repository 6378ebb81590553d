"""`simsr personality`, and SRs that have one."""

from __future__ import annotations

import json

from simsr.personalities import find_personality, personality_names


def test_list(simsr):
    done = simsr("personality", "list")
    assert done.status == 0 and [line.split()[0] for line in done.lines[1:]] == personality_names()
    [line] = [line.split() for line in done.lines if line.startswith("lvm+revert ")]
    assert line[:8] == ["lvm+revert", "LVMSR", "thick", "vhd", "qcow2", "raw", "vhd", "30"]
    assert json.loads(simsr("personality", "list", "--json").out)[0] == find_personality("sim").describe()


def test_show(simsr):
    done = simsr("personality", "show", "array")
    assert done.status == 0 and "go with their disk" in done.out and "VDI_REVERT" in done.out
    assert json.loads(simsr("personality", "show", "nfs+revert", "--json").out) == find_personality("nfs+revert").describe()
    done = simsr("personality", "show", "nsf")
    assert (done.status, done.out) == (44, "")
    assert done.err == (
        "simsr: there is no personality 'nsf' of SRs\nHint: Did you mean nfs? 'simsr personality list' shows them.\n"
    )


def test_sr_create_sends_it(simsr, daemon):
    daemon.refusals.clear()
    done = simsr("sr", "create", "main", "--personality", "exr")
    assert done.status == 44 and "Did you mean ext?" in done.err and daemon.requests == []
    assert simsr("sr", "create", "main", "--personality", "ext+revert").status == 0
    assert daemon.requests[-1][2] == {"name": "main", "personality": "ext+revert"}
    assert "LIKE" in simsr("sr", "list").lines[0] and "like:" in simsr("sr", "status").out

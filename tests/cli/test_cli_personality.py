"""`simsr personality`, and SRs that have one."""

from __future__ import annotations

import json
from pathlib import Path

from simsr.personalities import PERSONALITIES, find_personality, personality_names
from simsr.units import format_size


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


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs/personalities.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(PERSONALITIES)
    for name, description, driver, space, formats, reverts, chain, capabilities in rows:
        like = PERSONALITIES[name.strip("`")]
        base, _, without = capabilities.partition("; without ")
        told = {"VDI_CREATE", "VDI_DELETE", "VDI_ATTACH", "VDI_DETACH"} - set(without.split()) | set(base.split())
        assert (description, driver, formats.split(), told) == (like.description, like.driver or "", list(like.formats), set(like.capabilities))
        assert space == f"{'thick' if like.thick else 'thin'}, {format_size(like.allocation_unit_bytes)}"
        assert chain == str(like.chain_max or "")
        possible = [form for form, what in like.formats.items() if what.reverts] if like.could_revert else []
        assert reverts.removesuffix(" (as it is)").split() == possible and reverts.endswith("(as it is)") == like.can_revert

"""The benchmark of the store works: a little of it, on disks of some megabytes, gives every row and leaves nothing behind."""

from __future__ import annotations

import json

import pytest

from bench.operations import Finding
from bench.store.__main__ import main
from bench.store.report import findings_table

ROWS = {"counts": 12, "fresh": 5, "amplification": 8, "recovery": 5}
"""Findings of each row. The others are made of the same parts."""


@pytest.mark.parametrize("row", ROWS)
def test_a_row_gives_all_its_findings(row, tmp_path, capsys):
    output, disks = tmp_path / "bench-store.json", tmp_path / "d"
    disks.mkdir()
    assert main(["--quick", "--only", row, "--dir", str(disks), "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["complete"] and len(written["findings"]) == ROWS[row]
    for finding in written["findings"]:
        assert finding["operation"] == row and finding["value"] >= 0
    table = capsys.readouterr().out
    assert all(finding["name"] in table for finding in written["findings"])
    assert not list(disks.iterdir()), "disks were left behind"


def test_a_row_of_the_table_ends_with_target_and_verdict():
    findings = [Finding("r", "good", 1.0, "x", at_most=2.0), Finding("r", "bad", 0.5, "x", at_least=0.9), Finding("r", "no", 3.0, "x")]
    lines = findings_table("r", findings).splitlines()
    assert lines[1].split()[-3:] == ["<=", "2", "ok"]
    assert lines[2].split()[-3:] == [">=", "0.9", "below"]
    assert lines[3].split() == ["no", "3.00", "x"]

"""`simsr smapi check`: simsr's own plug-in keeps every point, and what is no plug-in is told."""

from __future__ import annotations

import json
from pathlib import Path

from simsr.smapi import install

PLUGIN = Path(install.__file__).parent / "SimSR"


def test_own_plugin_as_it_is_installed(simsr, tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    assert simsr("smapi", "install", "--root", str(root)).status == 0
    done = simsr("smapi", "check", "--root", str(root), "--json")
    answer = json.loads(done.out)
    assert done.status == 0 and answer["ok"] and answer["plugin"] == f"{root}/opt/xensource/sm/SimSR"
    unchecked = {point["reason"] for point in answer["points"] if point["ok"] is None}
    assert {point["ok"] for point in answer["points"]} == {True, None}
    assert "it advertises VDI_REVERT" in unchecked and len(unchecked) <= 2 and len(answer["points"]) >= 25


def test_what_is_no_plugin(simsr, tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    done = simsr("smapi", "check", "--root", str(root))
    assert done.status == 1 and "there is no such file" in done.err and "simsr smapi install" in done.err
    path = tmp_path / "NoneSR"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    done = simsr("smapi", "check", "--plugin", str(path))
    assert done.status == 1 and done.lines[0].startswith("NOT OK  1   is found") and "non-zero exit" in done.lines[0]
    assert done.lines[-1].startswith("0 ok, 4 not ok, ") and done.lines[-1].endswith(" not checked.")

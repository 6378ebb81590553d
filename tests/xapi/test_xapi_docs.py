"""The page about the model says what is true: its commands run, its table of calls is the table of calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simsr.xapi import model  # noqa: F401 - enters the calls in the table
from simsr.xapi.registry import METHODS
from simsr.xapi.schema import CLASSES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "xapi.md").read_text()


@pytest.fixture
def session():
    """The commands of the page, as one script."""
    [block] = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    return block


def run(script: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = "trap 'kill $simsrd $xapi 2>/dev/null || true; wait; rm -rf ${dir:-/nonexistent}' EXIT\n" + script
    return subprocess.run(
        ["bash", "-eu", "-c", script], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": path}, timeout=120
    )


def test_the_commands_run(session):
    done = run(session)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vdi-uuid ( RO): " in done.stdout and "Pattern verification failed" not in done.stdout


def test_without_the_feature_the_last_check_fails(session):
    script = session.replace("device-config:xapi_socket", "device-config:revert=off device-config:xapi_socket")
    script = script.replace('--minimal)" = $disk', '--minimal)" != $disk').replace("qemu-io -f raw -r -c", "true")
    assert "!= $disk" in script
    done = run(script)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_calls_named_are_the_calls_there():
    classes, table = (
        re.search(r"Classes: (.*?)\. All", PAGE, re.S)[1],
        re.search(r"\| class \| further calls \|\n.*?\n(.*?)\n\n", PAGE, re.S)[1],
    )
    assert set(re.findall(r"\w+", classes)) == {*CLASSES, "event"}
    for row in table.splitlines():
        names, calls = row.strip("| ").split(" | ")
        known = {name.partition(".")[2] for name in METHODS if name.partition(".")[0] in names.split(", ")}
        named = set(re.findall(r"\b[a-z]+(?:_[A-Za-z]+)*\b", re.sub(r":.*|;? ?for plug-ins|and setters", "", calls)))
        assert named <= known, named - known

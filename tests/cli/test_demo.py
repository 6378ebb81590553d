"""The demo as its reader runs it, and that it leaves nothing when it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import wait_until

DEMO = Path(__file__).parents[2] / "script" / "demo.py"

pytest.importorskip("nbd", reason="needs libnbd's Python module; script/setup installs it")


@pytest.fixture
def temporary(short_directory, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(short_directory))
    return short_directory


def test_the_demo_holds_and_leaves_nothing(temporary):
    done = subprocess.run([sys.executable, DEMO], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout[done.stdout.index("What was done") :].splitlines()
    results = [line.split()[-1] for line in table[1:13]]
    assert results == ["ok"] * 12
    assert "Everything held." in done.stdout
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_leaves_nothing(temporary, number):
    child = subprocess.Popen([sys.executable, DEMO], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with child:
        wait_until(lambda: list(temporary.glob("simsr-demo-*/store/control.sock")))
        child.send_signal(number)
        _, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (128 + number, "")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["demo", "demo-cloudstack"])
def test_arguments_are_refused_before_anything_is_done(name):
    done = subprocess.run([Path(DEMO).parent / name, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.endswith(f"{name}: it takes no arguments\n")


def test_a_demo_that_fails_says_so(temporary, tmp_path):
    """Without a working qemu-io the disk cannot be damaged; whatever fails, the exit status is not 0."""
    (tmp_path / "qemu-io").write_text("#!/bin/sh\necho out of order; exit 1\n")
    (tmp_path / "qemu-io").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, DEMO], capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 1
    assert "qemu-io ended with status 1: out of order" in done.stdout
    assert "FAILED" in done.stdout
    assert "not reached" in done.stdout
    assert list(temporary.iterdir()) == []

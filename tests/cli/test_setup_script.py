"""script/setup as far as it can be tested without installing anything: what it asks of apt and how it refuses.

A copy of the script runs in a tree of its own, with stand-ins for dpkg-query and apt-get first on PATH. The tree has
no pyproject.toml, so that the script stops before it would make a virtual environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "script" / "setup"


@pytest.fixture
def tree(tmp_path) -> Path:
    (tmp_path / "script").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(SETUP, tmp_path / "script" / "setup")
    return tmp_path


def program(tree: Path, name: str, body: str) -> None:
    path = tree / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def setup(tree: Path, path: str | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path or f"{tree}/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(
        [tree / "script" / "setup"], env=environment, cwd="/", capture_output=True, text=True, check=False, **options
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gets as far as apt-get")
def test_installs_what_is_missing_and_fetches_the_lists_if_need_be(tree):
    installed = tree / "installed"
    program(tree, "dpkg-query", f'[[ ${{!#}} != fio || -e {installed} ]] && echo "ii "')
    program(
        tree,
        "apt-get",
        f'echo "$DEBIAN_FRONTEND $*" >> {tree}/calls\n'
        f"case $* in *update*) touch {tree}/updated;; *) [[ -e {tree}/updated ]] && touch {installed};; esac",
    )
    done = setup(tree)
    assert done.stdout.splitlines() == ["setup: installing Debian packages: fio"]
    calls = [(words[0], words[-2:]) for words in map(str.split, (tree / "calls").read_text().splitlines())]
    install = ("noninteractive", ["--no-install-recommends", "fio"])
    assert [calls[0], calls[2]] == [install, install]
    assert calls[1][1][-1] == "update"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gets as far as apt-get")
def test_shows_why_apt_failed(tree):
    program(tree, "dpkg-query", "")
    program(tree, "apt-get", "echo E: the net is down; exit 100")
    done = setup(tree)
    assert done.returncode == 1
    assert "E: the net is down" in done.stderr
    assert "setup: apt-get install python3-venv " in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without rights")
def test_says_what_to_install_by_hand_without_rights(tree):
    program(tree, "dpkg-query", '[[ ${!#} != nbdkit ]] && echo "ii "')
    for directory in (tree, *tree.parents[:-2], tree / "bin", tree / "script"):
        directory.chmod(0o755)
    (tree / "bin" / "sudo").write_text("#!/bin/sh\nexit 1\n")
    (tree / "bin" / "sudo").chmod(0o755)
    done = setup(tree, user=65534, group=65534, extra_groups=[], stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "setup: these packages are missing: nbdkit",
        "setup: sudo was refused; run: sudo apt-get install nbdkit",
    ]


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("WARNING: Retrying (...: [Errno 111] Connection refused')): /simple/trio/\nERROR: Could not find a version\nERROR: No matching distribution found for trio>=0.27",
         "No matching distribution found for trio>=0.27 ([Errno 111] Connection refused)"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "THESE PACKAGES DO NOT MATCH THE HASHES"),
        ("Killed", "Killed"),
    ],
)  # fmt: skip
def test_says_in_one_line_why_pip_failed(tree, said, line):
    """In an environment that was made for an older pyproject.toml, with a stand-in for its Python."""
    program(tree, "dpkg-query", 'echo "ii "')
    program(tree, "apt-get", "")
    (tree / "pyproject.toml").write_text("")
    (tree / ".venv" / "bin").mkdir(parents=True)
    version = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=True).stdout
    (tree / ".venv" / "ready").write_text(f"{version}{tree}\nolder\n")
    (tree / "words").write_text(said + "\n")
    (tree / ".venv" / "bin" / "python").write_text(f"#!/bin/sh\ncat {tree}/words >&2; exit 1\n")
    (tree / ".venv" / "bin" / "python").chmod(0o755)
    done = setup(tree)
    assert done.returncode == 1 and done.stdout.splitlines() == ["setup: installing simsr and its Python dependencies into .venv"]
    [complaint] = done.stderr.splitlines()
    assert complaint.startswith(f"setup: pip install failed: {line}. Is Python's package index reachable?")
    assert (tree / ".venv" / "pip.log").read_text() == said + "\n" and not (tree / ".venv" / "ready").exists()


def test_refuses_other_systems(tree):
    for name in ("bash", "env", "dirname", "readlink", "flock"):
        (tree / "bin" / name).symlink_to(shutil.which(name))
    done = setup(tree, path=f"{tree}/bin")
    assert done.returncode == 1
    assert done.stderr.startswith("setup: this is neither Debian nor Ubuntu")
    assert "python3-libnbd" in done.stderr

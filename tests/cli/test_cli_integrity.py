"""scrub, check and salvage from the command line, against the real daemon and the files that it leaves."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import wait_until
from daemon_tools import Simsrd, short_directory

ROOT = Path(__file__).parents[2]
MIB = 2**20
BLOCK = 4096
DATA = random.Random(5).randbytes(3 * MIB)
"""No two blocks are the same, so a block can be found in the segments by its content."""


@pytest.fixture
def root(short_directory, monkeypatch) -> Path:
    monkeypatch.setenv("SIMSR_SOCKET", str(short_directory / "root" / "control.sock"))
    return short_directory / "root"


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The files of a daemon that has ended: an SR with a disk of 64 MiB, 3 MiB of it data, and its snapshot."""
    raw = tmp_path_factory.mktemp("raw") / "raw"
    raw.write_bytes(DATA)
    os.truncate(raw, 64 * MIB)
    with short_directory() as directory:
        with Simsrd(f"{directory}/root") as daemon:

            def simsr(*words: str) -> str:
                command = [sys.executable, "-m", "simsr.cli.main", "--socket", daemon.socket, *words]
                return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()

            uuids = {
                "sr": simsr("sr", "create", "main", "--size", "64MiB"),  # small segments are made quickly
                "vdi": simsr("import", str(raw), "--name", "root"),
                "snapshot": simsr("snapshot", "root", "--name", "clean"),
            }
        yield Path(directory, "root"), uuids


@pytest.fixture
def filled(root, pattern) -> dict[str, str]:
    """A copy of these files as the root; the uuids of what is in it."""
    directory, uuids = pattern
    subprocess.run(["cp", "-a", directory, root], check=True)
    return dict(uuids)


def damage(root: Path, block: int) -> None:
    """Flip a bit of a block of the disk."""
    content = DATA[block * BLOCK : block * BLOCK + 64]
    for path in root.glob("sr/*/seg-*"):
        with open(path, "r+b") as file:
            at = file.read().find(content)
            if at >= 0:
                flip(path, at + 1000)
                return
    raise AssertionError(f"block {block} is nowhere")


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 4]))


def files_of(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*") if path.is_file()}


# Check.


def test_check_of_a_clean_root(simsr, root, filled):
    before = files_of(root)
    for directory in (root, root / "sr" / filled["sr"]):
        outcome = simsr("check", str(directory))
        assert (outcome.status, outcome.err) == (0, "")
        assert "(main): 2 VDIs, 768 blocks and " in outcome.lines[0]
        assert outcome.lines[-1] == "No errors were found."
    result = json.loads(simsr("check", str(root), "--json").out)
    assert result["outcome"] == 0 and [store["uuid"] for store in result["stores"]] == [filled["sr"]]
    assert files_of(root) == before


def test_check_names_what_is_damaged(simsr, root, filled):
    damage(root, 7)
    outcome = simsr("check", str(root))
    assert outcome.status == 2 and "2 problems, corrupt:" in outcome.out
    for uuid, name in ((filled["vdi"], "root"), (filled["snapshot"], "clean")):
        assert f"VDI {uuid} ({name}), bytes {7 * BLOCK} to {8 * BLOCK}: blocks fail their checksum: seg-" in outcome.out
    result = json.loads(simsr("check", str(root), "--json").out)
    [store] = result["stores"]
    assert result["outcome"] == 2 and {line["vdi"] for line in store["corruptions"]} == {filled["vdi"], filled["snapshot"]}
    assert all((line["offset"], line["length"]) == (7 * BLOCK, BLOCK) for line in store["corruptions"])


def test_check_of_leaks(simsr, root, filled):
    (root / "sr" / filled["sr"] / "core").write_bytes(b"x")
    outcome = simsr("check", str(root))
    assert outcome.status == 3 and "1 problem, leaked:\n  file core does not belong to the store" in outcome.out


def test_check_that_cannot_be_done(simsr, root, filled, tmp_path):
    with Simsrd(root):
        outcome = simsr("check", str(root))
        assert outcome.status == 1 and "in use by another process" in outcome.err and outcome.out == ""
    for directory in (tmp_path / "nowhere", tmp_path, Path(__file__)):
        outcome = simsr("check", str(directory))
        assert outcome.status == 1 and str(directory) in outcome.err
        assert "Errno" not in outcome.err and outcome.err.splitlines()[1].startswith("Hint: Name the root of a daemon")


def test_a_store_that_cannot_be_opened_is_corrupt(simsr, root, filled):
    for name in ("super.0", "super.1"):
        flip(root / "sr" / filled["sr"] / name, 40)
    outcome = simsr("check", str(root))
    assert outcome.status == 2 and "neither super block" in outcome.out and "simsr salvage" in outcome.out


# Salvage.


def test_salvage(simsr, root, filled, tmp_path):
    damage(root, 7)
    damage(root, 9)
    for name in ("super.0", "super.1"):
        flip(root / "sr" / filled["sr"] / name, 40)
    before = files_of(root)
    out = tmp_path / "out"
    outcome = simsr("salvage", str(root), str(out))
    assert outcome.status == 2 and files_of(root) == before
    assert f"  bytes {7 * BLOCK} to {8 * BLOCK} are lost" in outcome.lines and "super.0 is not valid" in outcome.out
    wanted = bytearray(DATA)
    for block in (7, 9):
        wanted[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["report.json", f"{filled['vdi']}.raw", f"{filled['snapshot']}.raw"]
    )
    for uuid in (filled["vdi"], filled["snapshot"]):
        file = out / f"{uuid}.raw"
        assert file.read_bytes() == bytes(wanted).ljust(64 * MIB, b"\0")
        assert file.stat().st_blocks * 512 < 8 * MIB, "it is sparse"
    report = json.loads((out / "report.json").read_text())
    [store] = report["stores"]
    vdis = {vdi["vdi"]: vdi for vdi in store["vdis"]}
    assert not report["complete"] and (store["uuid"], store["name"]) == (filled["sr"], "main")
    assert vdis[filled["snapshot"]]["snapshot_of"] == filled["vdi"] and vdis[filled["vdi"]]["name"] == "root"
    for vdi in vdis.values():
        assert vdi["size_bytes"] == 64 * MIB and vdi["lost_bytes"] == 2 * BLOCK
        assert vdi["lost"] == [{"offset": block * BLOCK, "length": BLOCK} for block in (7, 9)]


def test_salvage_of_what_is_whole(simsr, root, filled, tmp_path):
    outcome = simsr("salvage", str(root), str(tmp_path / "out"), "--json")
    assert outcome.status == 0 and json.loads(outcome.out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(outcome.out)["complete"]


def test_salvage_refuses(simsr, root, filled, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = files_of(root)
    for out, words in ((tmp_path / "full", "not empty"), (root / "out", "lies in"), (root, "lies in")):
        outcome = simsr("salvage", str(root), str(out))
        assert outcome.status == 1 and words in outcome.err
    assert files_of(root) == before and not (root / "out").exists()


# Scrub.


def test_scrub(simsr, root, filled):
    daemon = Simsrd(root)
    try:
        daemon.start()
        outcome = simsr("sr", "scrub")
        assert outcome.status == 0 and "768 blocks" in outcome.out and outcome.err == ""
        damage(root, 3)
        outcome = simsr("sr", "scrub", "main", "--rate", "1GiB")
        assert outcome.status == 31
        assert f"  VDI {filled['vdi']} (root), bytes {3 * BLOCK} to {4 * BLOCK}: seg-" in outcome.out
        outcome = simsr("sr", "scrub", "main", "--json")
        result = json.loads(outcome.out)
        assert outcome.status == 31 and result["damaged_blocks"] == 1 and len(result["damage"]) == 2
        assert simsr("sr", "scrub", "nowhere").status == 10
        assert simsr("sr", "scrub", "--rate", "fast").status == 2
        assert daemon.stop() == 0  # damage is logged as an error
    finally:
        daemon.end()


def test_an_interrupted_scrub_is_stopped(simsr, root, filled, start_simsr):
    with Simsrd(root):
        child = start_simsr("sr", "scrub", "--rate", "64KiB")

        def state() -> str:
            status = subprocess.run(
                ["curl", "-sS", "--unix-socket", f"{root}/control.sock", f"http://simsrd/v1/srs/{filled['sr']}/scrub"],
                capture_output=True, check=True,
            )  # fmt: skip
            return json.loads(status.stdout)["state"]

        wait_until(lambda: state() == "running")
        assert "being scrubbed already" in simsr("sr", "scrub").err
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 130
        assert state() == "stopped"


def test_progress_is_drawn_on_a_terminal_only(root, filled, start_simsr):
    with Simsrd(root):
        master, slave = pty.openpty()
        child = start_simsr("sr", "scrub", "--rate", "4MiB", stderr=slave)
        os.close(slave)
        assert child.wait(120) == 0
        shown = os.read(master, 1 << 16).decode(errors="replace")
        os.close(master)
        assert "scrub main" in shown and "MiB" in shown

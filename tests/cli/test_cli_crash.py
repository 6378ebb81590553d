"""``simsr crash explore``: it finds a flush that is missing, is content where none is, and what it found can be had again. With real daemons."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from cli_kit import processes

# A file system of sorts: records of 4 KiB behind a superblock that says how many there are. argv: uri, records, flushes or not.
APPEND = """
import sys, nbd
disk = nbd.NBD(); disk.connect_uri(sys.argv[1])
for number in range(1, int(sys.argv[2]) + 1):
    disk.pwrite(bytes([number]) * 4096, 4096 * number)
    if sys.argv[3] == "flushes":
        disk.flush()
    disk.pwrite(bytes([number]) * 512, 0)
    disk.flush()
disk.shutdown()
"""
CHECK = """
import sys, nbd
disk = nbd.NBD(); disk.connect_uri(sys.argv[1])
count = disk.pread(1, 0)[0]
for number in range(1, count + 1):
    if disk.pread(4096, 4096 * number) != bytes([number]) * 4096:
        sys.exit(f"record {number} of {count} is not there")
disk.shutdown()
"""


@pytest.fixture
def temporary(tmp_path, short_directory, monkeypatch) -> Path:
    """The directory for temporary files; no daemon is left on it."""
    monkeypatch.setenv("TMPDIR", str(short_directory))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield short_directory
    assert not processes("simsr.daemon.main", str(short_directory))
    assert str(short_directory) not in Path("/proc/mounts").read_text()


@pytest.fixture
def programs(tmp_path):
    """(load, check): commands; the load with or without its flushes."""
    (tmp_path / "append.py").write_text(APPEND)
    (tmp_path / "check.py").write_text(CHECK)
    python = shlex.quote(sys.executable)
    return lambda how: f"{python} {tmp_path}/append.py {{uri}} 12 {how}", f'{python} {tmp_path}/check.py "$uri"'


def test_a_forgotten_flush_is_found_and_the_state_can_be_had_again(simsr, temporary, programs):
    load, check = programs
    words = ["crash", "explore", "--size", "1M", "--workload", load("forgets"), "--check", check, "--states", "20"]
    done = simsr(*words)
    assert done.status == 1 and done.lines[0] == "24 writes (54 KiB) and 12 flushes are recorded."
    assert "is not there" in done.out and "failed with status 1" in done.err
    again = shlex.split(done.lines[-1].partition(": ")[2])
    root, state = again[again.index("--root") + 1], again[again.index("--state") + 1]
    assert Path(root).parent == temporary, "kept because something failed"

    one = simsr("crash", "explore", "--root", root, "--check", check, "--state", state, "--json")
    found = json.loads(one.out)
    assert one.status == 1 and found["failed"] == 1 and "is not there" in found["output"]
    inner = f"{sys.executable} -m simsr.cli.main vdi show {found['vdi']} --json; nbdcopy $({sys.executable} -m simsr.cli.main vdi uri {found['vdi']}) -"
    kept = simsr("run", "--size", "1M", "--root", root, "--", "sh", "-c", f"{inner} | head -c 512 | od -An -tu1 | head -n 1")
    assert kept.status == 0 and f'"name": "crash-{state}"' in kept.out
    count = int(kept.lines[-1].split()[0])
    assert 0 < count <= 12, "a superblock that promises more than there is"

    whole = simsr("crash", "explore", "--root", root, "--check", "true", "--states", "5", "--json")
    assert whole.status == 0 and json.loads(whole.out)["writes"] == 24, "explored again without the load"
    wrong = simsr("crash", "explore", "--root", root, "--check", "true", "--state", "900-all")
    assert wrong.status == 2 and "it is no state of a log of 36 writes and flushes" in wrong.err
    assert simsr("crash", "explore", "--root", root, "--check", "no-such-checker").status == 55


def test_with_its_flushes_every_state_is_good_and_nothing_stays(simsr, temporary, programs):
    load, check = programs
    done = simsr("crash", "explore", "--size", "1M", "--workload", load("flushes"), "--check", check, "--states", "25", "--seed", "3", "--json")
    found = json.loads(done.out)
    assert (done.status, found["failed"], found["root"], found["flushes"], found["states"]) == (0, 0, None, 24, 25)
    assert not list(temporary.iterdir())


RULES = """
simsr = 1
name = "liar"
[[rule]]
match = { op = "flush" }
action = { lose = true }
[[phase]]
for = "1h"
[[phase.rule]]
trigger = { after = { op = "flush", nth = 2 } }
action = { power_cut = "none" }
[explore]
size = "1MiB"
states = 15
check = "true"
"""


def test_the_rules_are_in_force_during_the_load_but_for_its_end(simsr, temporary, programs, tmp_path):
    """A load that does all right, on a disk that lies about its flushes."""
    load, check = programs
    (tmp_path / "liar.toml").write_text(RULES)
    done = simsr("crash", "explore", str(tmp_path / "liar.toml"), "--workload", load("flushes"), "--check", check)
    assert done.status == 1 and done.lines[0] == "24 writes (54 KiB) and 0 flushes are recorded."
    assert "is not there" in done.out


def test_a_state_is_recovered_before_it_is_checked(simsr, temporary, programs):
    load, _ = programs
    words = ["crash", "explore", "--size", "1M", "--workload", load("flushes"), "--states", "3", "--check", "test $(head -c 3 {device}) = yes"]
    done = simsr(*words, "--recover", "printf yes | dd of={device} conv=notrunc status=none")
    assert done.status == 0, done.err
    assert simsr(*words, "--recover", "exit 9").status == 1


EXT4 = """
simsr = 1
name = "ext4"
seed = 3
[explore]
states = 25
check = "true"
"""


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices")
def test_ext4_survives_every_crash(simsr, temporary, tmp_path):
    """The kernel's own file system on a loop device over FUSE, which is what a file without a load gets: journal replayed, fsck has nothing to say."""
    (tmp_path / "ext4.toml").write_text(EXT4)
    done = simsr("crash", "explore", str(tmp_path / "ext4.toml"), "--check", "e2fsck -fn {device}", "--json")
    found = json.loads(done.out)
    assert found["failures"] == [] and done.status == 0
    assert found["states"] == 25 and found["writes"] > 20 and found["flushes"] > 5 and found["cuts"] > 5


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "status", "says"),
        [
            (["--workload", "true"], 2, "there is no checker"),
            (["nvme"], 2, "there is no checker"),
            (["no/such.toml"], 1, "no/such.toml"),
            (["--check", "true", "--size", "x"], 2, "x"),
            (["--check", "true", "--states", "0"], 2, "--states"),
        ],
    )
    def test_before_anything_is_started(self, simsr, temporary, words, status, says):
        done = simsr("crash", "explore", *words)
        assert done.status == status and says in done.err

    def test_a_directory_without_a_recording_and_loads_that_do_not_work(self, simsr, temporary):
        root, check = str(temporary / "root"), ["--check", "true"]
        for words, status, says in (
            ([], 2, "there is no load"),
            (["--state", "1-all"], 55, "has no recording"),
            (["--workload", "echo alas >&2; exit 3"], 55, "the load ended with status 3: alas"),
        ):
            done = simsr("crash", "explore", "--root", root, *check, *words)
            assert (done.status, says in done.err) == (status, True), done.err
        nothing = simsr("crash", "explore", *check, "--workload", "true")
        assert nothing.status == 55 and "has written nothing" in nothing.err

"""The whole command line against the real daemon, with real images and real NBD clients."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import wait_until
from daemon_tools import Simsrd


MIB = 2**20


@pytest.fixture
def root(short_directory, monkeypatch) -> Path:
    """The root of the daemon; SIMSR_SOCKET names its control socket."""
    monkeypatch.setenv("SIMSR_SOCKET", str(short_directory / "root" / "control.sock"))
    return short_directory / "root"


@pytest.fixture
def sr(simsr, real, monkeypatch) -> Iterator[str]:
    """An SR in the running daemon, the only one there; it and its disks are gone after the test."""
    monkeypatch.setenv("SIMSR_SOCKET", real.socket)
    [uuid] = simsr("sr", "create", "main", "--size", "1GiB").lines
    yield uuid
    for vdi in reversed(json.loads(simsr("vdi", "list", "--json").out)):
        assert simsr("vdi", "delete", vdi["uuid"]).status == 0
    assert simsr("sr", "delete", "main").status == 0


@pytest.fixture
def image(tmp_path) -> Path:
    """A qcow2 image of 64 MiB with 5 MiB of data in two places."""
    raw, path = tmp_path / "image.raw", tmp_path / "image.qcow2"
    data = random.Random(2).randbytes(5 * MIB)
    with open(raw, "wb") as file:
        file.truncate(64 * MIB)
        file.write(data[: 2 * MIB])
        file.seek(50 * MIB)
        file.write(data[2 * MIB :])
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, path], check=True)
    return path


def same(first: object, second: object) -> bool:
    return subprocess.run(["qemu-img", "compare", "-q", str(first), str(second)], check=False).returncode == 0


def qemu_io(uri: str, *commands: str) -> None:
    options = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "raw", *options, uri], check=True, capture_output=True)


def test_a_disk_from_import_to_export(simsr, sr, image, tmp_path):
    [disk] = simsr("import", str(image), "--name", "root").lines
    [uri] = simsr("vdi", "uri", "root").lines
    assert same(uri, image)
    [snapshot] = simsr("snapshot", "root", "--name", "clean").lines
    qemu_io(uri, "write -P 7 0 8M", "discard 50M 4M", "flush")
    assert not same(uri, image)
    done = simsr("revert", "clean")
    assert (done.status, done.lines) == (0, [f"VDI {disk} (root) is reverted to clean."])
    assert same(uri, image)
    assert simsr("vdi", "uri", "root").lines == [uri]
    assert "nothing to revert" in simsr("revert", snapshot).out
    for ending in ("raw", "qcow2", "vhd", "vmdk", "vhdx"):
        assert simsr("export", "clean", str(tmp_path / f"out.{ending}")).status == 0
        assert same(tmp_path / f"out.{ending}", image)


def test_import_stores_only_data(simsr, sr, image):
    simsr("import", str(image), "--name", "root")
    [vdi] = json.loads(simsr("vdi", "list", "--json").out)
    assert (vdi["size_bytes"], vdi["physical_utilisation_bytes"]) == (64 * MIB, 5 * MIB)


def test_what_the_listings_say(simsr, sr):
    [disk] = simsr("vdi", "create", "--size", "1GiB", "--name", "d").lines
    [snapshot] = simsr("snapshot", "d", "--name", "s").lines
    [clone] = simsr("clone", "s", "--name", "c").lines
    listed = {vdi["uuid"]: vdi for vdi in json.loads(simsr("vdi", "list", "--sr", "main", "--json").out)}
    assert set(listed) == {disk, snapshot, clone}
    assert listed[snapshot] == json.loads(simsr("vdi", "show", "s", "--json").out)
    assert (listed[snapshot]["snapshot_of"], listed[snapshot]["is_a_snapshot"]) == (disk, True)
    assert (listed[clone]["snapshot_of"], listed[clone]["read_only"]) == (None, False)
    [status] = json.loads(simsr("sr", "list", "--json").out)
    assert (status["vdi_count"], status["snapshot_count"], status["uuid"]) == (3, 1, sr)
    assert json.loads(simsr("sr", "status", "--json").out)["uuid"] == sr
    assert [line.split()[0] for line in simsr("vdi", "list").lines] == ["UUID", disk, snapshot, clone]


def test_nbd_tools_take_the_uri(simsr, sr, tmp_path):
    simsr("vdi", "create", "--size", "8MiB", "--name", "d")
    [uri] = simsr("vdi", "uri", "d").lines
    nbdinfo = subprocess.run(["nbdinfo", "--json", uri], capture_output=True, check=True)
    assert json.loads(nbdinfo.stdout)["exports"][0]["export-size"] == 8 * MIB
    (tmp_path / "in").write_bytes(random.Random(3).randbytes(8 * MIB))
    subprocess.run(["nbdcopy", "--flush", tmp_path / "in", uri], check=True)
    subprocess.run(["nbdcopy", uri, tmp_path / "out"], check=True)
    assert (tmp_path / "in").read_bytes() == (tmp_path / "out").read_bytes()
    if shutil.which("fio"):
        job = ["--name=j", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--size=4M", "--verify=crc32c"]
        subprocess.run(["fio", "--output-format=terse", *job], check=True, capture_output=True, cwd=tmp_path)


def test_a_disk_in_use_is_neither_reverted_nor_deleted(simsr, sr):
    simsr("vdi", "create", "--size", "8MiB", "--name", "d")
    simsr("snapshot", "d", "--name", "s")
    [uri] = simsr("vdi", "uri", "d").lines
    with subprocess.Popen(["qemu-io", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        wait_until(lambda: json.loads(simsr("vdi", "show", "d", "--json").out)["attached"])
        assert " rw" in simsr("vdi", "list").lines[1]
        for words in (["revert", "s"], ["vdi", "delete", "d"]):
            done = simsr(*words)
            assert (done.status, done.out) == (16, "")
            assert "attached by" in done.err
        writer.stdin.close()
    wait_until(lambda: not json.loads(simsr("vdi", "show", "d", "--json").out)["attached"])
    assert simsr("revert", "s").status == 0
    assert simsr("vdi", "delete", "d").status == 0


def test_errors_of_the_daemon_have_their_own_status(simsr, sr):
    simsr("vdi", "create", "--size", "8MiB", "--name", "d")
    assert simsr("vdi", "resize", "d", "1MiB").status == 20
    assert simsr("vdi", "resize", "d", "9MiB").status == 0
    assert simsr("revert", "d").status == 18
    assert simsr("sr", "delete", "main").status == 13
    assert simsr("vdi", "show", "e").status == 10
    assert simsr("vdi", "create", "--size", "1M", "--sr", "other").status == 10
    simsr("vdi", "create", "--size", "8MiB", "--name", "d")
    assert simsr("vdi", "show", "d").status == 11


@pytest.mark.parametrize("name", ["50% ü?#&", "..", "--x", "a/b"])
def test_strange_names(simsr, sr, name):
    [uuid] = simsr("vdi", "create", "--size", "1M", f"--name={name}").lines
    assert json.loads(simsr("vdi", "show", "--json", "--", name).out)["uuid"] == uuid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_nothing(simsr, start_simsr, sr, image, number):
    assert simsr("fault", "add", "--op", "write", "--delay", "500ms", "--name", "slow").status == 0  # else it may be done before the signal
    child = start_simsr("import", str(image), "--name", "big")
    wait_until(lambda: any(vdi["attached"] for vdi in json.loads(simsr("vdi", "list", "--json").out)))
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (128 + number, "", "")
    assert json.loads(simsr("vdi", "list", "--json").out) == []
    assert simsr("fault", "remove", "slow").status == 0


def test_everything_is_there_after_a_restart(simsr, root, image):
    with Simsrd(root):
        simsr("sr", "create", "main", "--size", "1GiB")
        simsr("import", str(image), "--name", "root")
        simsr("snapshot", "root", "--name", "clean")
        before = json.loads(simsr("vdi", "list", "--json").out)
    assert simsr("vdi", "list").status == 4
    with Simsrd(root):
        assert json.loads(simsr("vdi", "list", "--json").out) == before
        [uri] = simsr("vdi", "uri", "root").lines
        assert same(uri, image)


def test_histories_by_hand(simsr, sr, monkeypatch):
    """Every command about histories once, against the real daemon."""
    disk = simsr("vdi", "create", "--size", "1MiB", "--name", "root").out.strip()
    other = simsr("vdi", "create", "--size", "1MiB", "--name", "data").out.strip()
    a = simsr("snapshot", "root", "--name", "a").out.strip()
    assert simsr("vdi", "resize", "root", "2MiB").status == 0
    pair = simsr("snapshot", "root", "data", "--group", "--name", "pair").lines
    assert len(pair) == 2 and simsr("snapshot", "root", "data").status == 2
    assert simsr("vdi", "resize", "root", "3MiB").status == 0
    plan = json.loads(simsr("revert", "a", "--dry-run", "--json").out)
    assert plan["dry_run"] and plan["members"][0]["size_bytes"] == MIB and "kept as a tip" in simsr("revert", "a", "--dry-run").out
    assert simsr("revert", a).lines == [f"VDI {disk} (root) is reverted to {a}. Its size is 1 MiB (1048576 bytes) again."]
    [header, tip] = simsr("tip", "list", "root").lines
    tip = tip.split()[0]
    assert tip not in simsr("vdi", "list").out and tip in simsr("vdi", "list", "--tips").out
    drawn = simsr("tree", "root", "--ascii")
    assert drawn.status == 0 and "`- " in drawn.out and "* root" in drawn.out and "undo: reset" in drawn.lines[-1]
    assert "└─ " in simsr("tree", "root", "--utf8").out
    assert json.loads(simsr("tree", "root", "--json").out)["vdi"] == disk
    assert "is taken back" in simsr("undo", "root").out and simsr("redo", "root").status == 0
    assert simsr("redo", "root").status == 62
    assert "end of the branch" in simsr("revert", "root", "--follow", tip).out
    nothing = simsr("revert", pair[0], "--follow")
    assert nothing.status == 57 and f"snapshot {pair[0]} has no tip to follow" in nothing.err
    unknown = simsr("revert", "a", "--live", "gently")
    assert unknown.status == 2 and "Value error" not in unknown.err and "disconnect" in unknown.err
    assert simsr("revert", pair[0], "--group").status == 0
    done = simsr("undo", "root", "--group", "--live", "hang")
    assert done.status == 0 and "--live is for tests only" in done.err
    assert "for tests" not in simsr("redo", "root", "--group", "--live", "hang", "--dry-run").err
    assert simsr("redo", "root", "--group").status == 0 and simsr("undo", "data", "--group").status == 62, "data was as it should be"
    refused = simsr("revert", "a", "--discard")
    assert refused.status == 59 and "would lose 1 of its snapshots" in refused.err and "--yes" in refused.err
    assert "Gone: 1 snapshot or tip" in simsr("revert", "a", "--discard", "--yes").out
    assert simsr("vdi", "show", a).status == 10 and simsr("undo", "root").status == 0 and simsr("vdi", "show", a).status == 0
    assert simsr("revert", "a", "--commit").lines == [f"VDI {disk} (root) is what a holds now."]
    tip = simsr("tip", "list", "root").lines[-1].split()[0]
    assert simsr("tip", "pin", tip, "--name", "kept").lines == [f"Tip {tip} is snapshot {tip} (kept) now."]
    assert simsr("tip", "delete", tip).status == 2
    assert simsr("sr", "set", sr, "--tips", "0").lines[-1] == "Its disks keep no tips."
    assert "no tips" in simsr("sr", "status", sr).out
    assert simsr("vdi", "resize", "root", "5MiB").status == 0
    assert simsr("revert", "kept").status == 59, "without tips what is not snapshotted would go"
    assert simsr("revert", "kept", "--yes").status == 0
    for name in ("kept", "a", "pair", pair[0], pair[1], disk, other):
        simsr("vdi", "delete", name)
    assert simsr("sr", "set", sr, "--tips", "8", "--hide-tips").lines[-1] == "Its disks keep 8 tips for 24 hours."

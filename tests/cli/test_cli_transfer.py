"""Import and export through the real qemu-img, the disks being files that nbdkit serves."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from cli_kit import processes, wait_until

from simsr.errors import VdiInUse

MIB = 2**20
DATA = random.Random(1).randbytes(3 * MIB)


@pytest.fixture
def sr(daemon):
    return daemon.add_sr("main")


@pytest.fixture
def image(tmp_path) -> Path:
    """A sparse raw image: data, a hole of 60 MiB, data."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.write(DATA[: 2 * MIB])
        file.seek(62 * MIB)
        file.write(DATA[2 * MIB :])
    return path


@pytest.fixture
def full_disk(daemon, sr):
    """A VDI with the content of `image`."""
    vdi = daemon.add_vdi(63 * MIB, sr["uuid"], name="full")
    with open(daemon.disks / vdi["uuid"], "r+b") as disk:
        disk.write(DATA[: 2 * MIB])
        disk.seek(62 * MIB)
        disk.write(DATA[2 * MIB :])
    return vdi


def make_image(path: Path, *arguments: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", *arguments[:1], *arguments[1:-1], str(path), arguments[-1]], check=True)
    return path


# --- import ----------------------------------------------------------------------------------------------------------


def test_import_prints_the_uuid_and_copies_data_and_holes(simsr, daemon, sr, serve_disks, image):
    serve_disks()
    done = simsr("import", str(image), "--name", "copy", "--sr", "main")
    assert (done.status, done.err) == (0, "")
    [vdi] = daemon.vdis.values()
    assert done.lines == [vdi["uuid"]]
    assert (vdi["name"], vdi["size_bytes"]) == ("copy", 63 * MIB)
    disk = daemon.disks / vdi["uuid"]
    assert disk.read_bytes() == image.read_bytes()
    assert disk.stat().st_blocks * 512 < 8 * MIB


def test_import_is_on_disk_when_it_says_so(simsr, daemon, sr, serve_disks, image, tmp_path):
    serve_disks("--filter=log", settings=(f"logfile={tmp_path}/log",))
    assert simsr("import", str(image)).status == 0
    log = (tmp_path / "log").read_text()
    assert log.rindex(" Flush ") > log.rindex(" Write ")


@pytest.mark.parametrize("kind", ["qcow2", "vpc", "vmdk", "vhdx"])
def test_import_of_every_format(simsr, daemon, sr, serve_disks, image, tmp_path, kind):
    serve_disks()
    other = tmp_path / "disk.image"
    options = ["-o", "force_size=on"] if kind == "vpc" else []
    subprocess.run(["qemu-img", "convert", "-O", kind, *options, image, other], check=True)
    [uuid] = simsr("import", str(other)).lines
    assert (daemon.disks / uuid).read_bytes() == image.read_bytes()


@pytest.mark.parametrize("name", ["-n.raw", "nbd:x:1.raw", "json:{}", "a b\n.raw", "\udcff.raw"])
def test_import_of_files_with_strange_names(simsr, daemon, sr, serve_disks, image, monkeypatch, name):
    serve_disks()
    monkeypatch.chdir(image.parent)
    image.rename(image.parent / name)
    [uuid] = simsr("import", "--", name).lines
    assert (daemon.disks / uuid).read_bytes() == (image.parent / name).read_bytes()


def test_import_rounds_an_odd_size_up(simsr, daemon, sr, serve_disks, tmp_path):
    serve_disks()
    (tmp_path / "odd.raw").write_bytes(b"x" * 700)
    [uuid] = simsr("import", str(tmp_path / "odd.raw")).lines
    assert daemon.vdis[uuid]["size_bytes"] == 1024
    assert (daemon.disks / uuid).read_bytes() == b"x" * 700 + bytes(324)


def test_import_takes_the_format_it_is_told(simsr, daemon, sr, serve_disks, tmp_path):
    """A raw disk may begin with anything, also with what a guest made look like a qcow2 header."""
    serve_disks()
    trap = make_image(tmp_path / "trap.raw", "qcow2", "64M")
    [uuid] = simsr("import", str(trap), "--format", "raw").lines
    assert (daemon.disks / uuid).read_bytes()[: trap.stat().st_size] == trap.read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "it is neither a file nor a block device"),
        (lambda path: path.touch(), "it is empty"),
        (os.mkfifo, "it is neither a file nor a block device"),
    ],
    ids=["missing", "directory", "empty", "fifo"],
)
def test_import_of_what_is_no_image(simsr, daemon, sr, tmp_path, make, message):
    make(tmp_path / "it")
    done = simsr("import", str(tmp_path / "it"))
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines()[0] == f"simsr: cannot import {tmp_path}/it: {message}"
    assert not daemon.vdis


def test_import_of_a_broken_image(simsr, daemon, sr, tmp_path):
    path = make_image(tmp_path / "x.qcow2", "qcow2", "64M")
    path.write_bytes(path.read_bytes()[:4] + b"\0\0\0\x09" + path.read_bytes()[8:])
    done = simsr("import", str(path))
    assert done.status == 1
    assert "Unsupported qcow2 version 9" in done.err
    assert not daemon.vdis


def test_import_from_standard_input_is_no_file_called_dash(simsr, daemon, sr):
    done = simsr("import", "-")
    assert done.status == 1
    assert "standard input" in done.err and "nbdcopy" in done.err


def test_import_without_qemu_img(simsr, daemon, sr, image, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = simsr("import", str(image))
    assert done.status == 1
    assert done.err.splitlines() == [
        "simsr: qemu-img is not installed, and simsr import needs it",
        "Hint: On Debian and Ubuntu: apt-get install qemu-utils",
    ]


def test_import_refuses_images_that_read_other_files(simsr, daemon, sr, serve_disks, image, tmp_path):
    serve_disks()
    backed = tmp_path / "backed.qcow2"
    make_image(backed, "qcow2", "-F", "raw", "-b", str(image), "63M")
    done = simsr("import", str(backed))
    assert (done.status, done.out) == (1, "")
    assert f"it makes qemu-img read other files: {image}" in done.err
    assert "--allow-backing" in done.err
    assert not daemon.vdis
    [uuid] = simsr("import", str(backed), "--allow-backing").lines
    assert (daemon.disks / uuid).read_bytes() == image.read_bytes()


def test_import_refuses_external_data_and_extents(simsr, daemon, sr, tmp_path):
    make_image(tmp_path / "x.qcow2", "qcow2", "-o", f"data_file={tmp_path}/data", "1M")
    make_image(tmp_path / "x.vmdk", "vmdk", "-o", "subformat=monolithicFlat", "1M")
    for name, other in (("x.qcow2", "data"), ("x.vmdk", "x-flat.vmdk")):
        done = simsr("import", str(tmp_path / name))
        assert done.status == 1
        assert f"other files: {tmp_path / other}" in done.err


def test_import_that_fails_deletes_its_vdi(simsr, daemon, sr, image):
    done = simsr("import", str(image))  # nobody serves the disks
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"simsr: cannot import {image}: ")
    assert "No such file or directory" in done.err
    assert not daemon.vdis


def test_import_waits_until_the_daemon_lets_go_of_its_vdi(simsr, daemon, sr, image):
    daemon.refuse("DELETE", VdiInUse(operation="delete", uuid="it", by="nbd"), times=2)
    assert simsr("import", str(image)).status == 1
    assert not daemon.vdis


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_import_leaves_nothing(start_simsr, daemon, sr, serve_disks, image, number):
    serve_disks(paused=True)
    child = start_simsr("import", str(image))
    wait_until(lambda: daemon.vdis and _copying(child.pid))
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (128 + number, "", "")
    assert not daemon.vdis
    assert not _copying(child.pid)


def test_a_progress_bar_on_a_terminal(daemon, sr, serve_disks, image, start_simsr):
    serve_disks()
    ours, theirs = pty.openpty()
    child = start_simsr("import", str(image), stderr=theirs, env={"TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert out.strip() in daemon.vdis
    drawn = _read_all(ours)
    assert "import disk.raw" in drawn
    assert "63.0/63.0 MiB" in drawn


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.raw", "raw"), ("a.img", "raw"), ("a.qcow2", "qcow2"), ("a.vhd", "vpc"), ("a.vmdk", "vmdk"), ("a.VHDX", "vhdx")],
)
def test_export_takes_the_format_from_the_ending(simsr, full_disk, serve_disks, image, tmp_path, name, kind):
    serve_disks()
    target = tmp_path / "out" / name
    target.parent.mkdir()
    done = simsr("export", "full", str(target))
    assert (done.status, done.out, done.err) == (0, "", "")
    info = json.loads(subprocess.run(["qemu-img", "info", "--output=json", target], capture_output=True, check=True).stdout)
    assert (info["format"], info["virtual-size"]) == (kind, 63 * MIB)
    subprocess.run(["qemu-img", "compare", "-q", target, image], check=True)
    assert os.listdir(target.parent) == [name]


def test_export_keeps_holes(simsr, full_disk, serve_disks, tmp_path):
    serve_disks()
    simsr("export", "full", str(tmp_path / "a.raw"))
    assert (tmp_path / "a.raw").stat().st_blocks * 512 < 8 * MIB


def test_export_in_a_named_format(simsr, full_disk, serve_disks, tmp_path):
    serve_disks()
    assert simsr("export", "full", str(tmp_path / "disk"), "--format", "qcow2").status == 0
    assert (tmp_path / "disk").read_bytes()[:4] == b"QFI\xfb"


def test_export_to_an_unknown_ending(simsr, full_disk, tmp_path):
    done = simsr("export", "full", str(tmp_path / "disk.zip"))
    assert done.status == 2
    assert "name the format with --format" in done.err


def test_export_of_an_unknown_format(simsr, full_disk, serve_disks, tmp_path):
    serve_disks()
    done = simsr("export", "full", str(tmp_path / "disk"), "--format", "nosuch")
    assert done.status == 1
    assert "Unknown file format 'nosuch'" in done.err
    assert not list(tmp_path.iterdir())


def test_export_overwrites_only_when_told(simsr, full_disk, serve_disks, image, tmp_path):
    serve_disks()
    target = tmp_path / "a.raw"
    target.write_text("precious")
    done = simsr("export", "full", str(target))
    assert done.status == 1
    assert done.err == f"simsr: cannot export to {target}: it exists\nHint: Overwrite it with --force.\n"
    assert target.read_text() == "precious"
    (tmp_path / "link.raw").symlink_to("a.raw")
    assert simsr("export", "full", str(tmp_path / "link.raw"), "--force").status == 0
    assert target.read_bytes() == image.read_bytes()
    assert (tmp_path / "link.raw").is_symlink()


def test_export_never_replaces_a_file_made_meanwhile(start_simsr, full_disk, serve_disks, tmp_path):
    go_on = serve_disks(paused=True)
    target = tmp_path / "a.raw"
    child = start_simsr("export", "full", str(target))
    wait_until(lambda: _copying(child.pid))
    target.write_text("precious")
    go_on()
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "it exists" in err
    assert target.read_text() == "precious"
    assert os.listdir(tmp_path) == ["a.raw"]


@pytest.mark.parametrize("before", [None, "precious"])
def test_an_interrupted_export_leaves_what_was_there(start_simsr, full_disk, serve_disks, tmp_path, before):
    serve_disks(paused=True)
    target = tmp_path / "a.qcow2"
    if before:
        target.write_text(before)
    child = start_simsr("export", "full", str(target), "--force")
    wait_until(lambda: _copying(child.pid))
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (130, "")
    assert [path.read_text() for path in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere/a.raw", "there is no directory"),
        ("dir.raw", "it is neither a file nor a block device"),
    ],
)
def test_export_to_where_it_cannot(simsr, full_disk, tmp_path, target, message):
    (tmp_path / "dir.raw").mkdir()
    done = simsr("export", "full", str(tmp_path / target), "--force")
    assert done.status == 1
    assert message in done.err


def test_export_to_standard_output_is_no_file_called_dash(simsr, full_disk):
    done = simsr("export", "full", "-", "--format", "raw")
    assert done.status == 1
    assert "nbdcopy" in done.err


def test_export_of_an_unknown_vdi_makes_no_file(simsr, daemon, sr, tmp_path):
    assert simsr("export", "nosuch", str(tmp_path / "a.raw")).status == 10
    assert not list(tmp_path.iterdir())


# --- helpers ---------------------------------------------------------------------------------------------------------


def _copying(pid: int) -> bool:
    """Say whether the process has a qemu-img that is copying."""
    return bool(processes("qemu-img", "convert", parent=pid))


def _read_all(terminal: int) -> str:
    pieces = []
    try:
        while piece := os.read(terminal, 65536):
            pieces.append(piece)
    except OSError:  # a terminal whose other end is closed says EIO
        pass
    os.close(terminal)
    return b"".join(pieces).decode()


if shutil.which("qemu-img") is None or shutil.which("nbdkit") is None:
    pytest.skip("needs qemu-img and nbdkit; script/setup installs them", allow_module_level=True)


def test_an_import_without_a_daemon_speaks_of_that_only(simsr, image, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSR_SOCKET", str(tmp_path / "nothing"))
    done = simsr("import", str(image))
    assert done.status == 4 and done.err.startswith("simsr: simsrd cannot be reached") and "unfinished" not in done.err

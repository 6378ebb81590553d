"""qemu's tools, fio, and nbdkit as a proxy in front, against a real daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
from interop_tools import qemu_io, run
from nbd_wire import KIB, MIB

# --- qemu --------------------------------------------------------------------------------------------------------


def test_qemu_img_info(disk):
    said = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", disk["nbd_uri"]))
    assert said["virtual-size"] == 32 * MIB


def test_qemu_img_converts_in_and_out(disk, image, folder):
    qcow = f"{folder}/image.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image), qcow)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow, disk["nbd_uri"])
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, disk["nbd_uri"])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk["nbd_uri"], f"{folder}/back.qcow2")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", f"{folder}/back.qcow2", f"{folder}/back")
    run("cmp", str(image), f"{folder}/back")


def test_qemu_img_compare_finds_one_byte(disk, image):
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", str(image), disk["nbd_uri"])
    qemu_io(disk["nbd_uri"], "write -P 0x7 20001k 512")
    said = run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), disk["nbd_uri"], status=1)
    assert f"offset {20001 * KIB}" in said


def test_qemu_img_map(disk):
    qemu_io(disk["nbd_uri"], "write -P 1 1M 64k", "write -P 2 31M 1M")
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", disk["nbd_uri"]))
    data = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
    assert data == [(MIB, 64 * KIB), (31 * MIB, MIB)]
    assert all(extent["zero"] for extent in extents if not extent["data"])


@pytest.mark.parametrize("options", [["-w"], [], ["-w", "--flush-interval=32"]])
def test_qemu_img_bench(disk, options):
    shape = ["-c", "2000", "-d", "32", "-s", "4096", "-S", "12288"]
    said = run("qemu-img", "bench", "-f", "raw", *shape, *options, disk["nbd_uri"])
    assert "Run completed" in said


def test_qemu_io(disk):
    uri = disk["nbd_uri"]
    qemu_io(
        uri, "write -P 0x11 0 1M", "write -P 0x22 4000 200", "flush", "read -P 0x11 0 4000", "read -P 0x22 4000 200",
        "read -P 0x11 4200 100k", "discard 512k 64k", "read -P 0 512k 64k", "write -z 600k 4k", "read -P 0 600k 4k",
        "write -z -u 700k 9k", "read -P 0 700k 9k", "read -P 0x11 709k 1k", "write -f -P 0x33 31M 1M", "read -P 0x33 31M 1M",
        "aio_write -P 0x44 2M 3M", "aio_read -P 0x44 2M 1M", "aio_flush", "writev -P 0x55 8M 1k 2k 3k", "read -P 0x55 8M 6k",
        "alloc 0 1M",
    )  # fmt: skip
    qemu_io(uri, "read -P 0x11 0 4000", "read -P 0x44 2M 3M", "read -P 0 16M 8M")


def test_qemu_nbd_lists_the_exports(shared, disk):
    qemu_nbd = shutil.which("qemu-nbd")
    said = run(qemu_nbd, "--list", "-k", shared.nbd_socket)
    assert disk["uuid"] in said and str(32 * MIB) in said and "base:allocation" in said


# --- fio ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [["--rw=randwrite", "--bs=4k", "--iodepth=32"], ["--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned", "--iodepth=16"],
     ["--rw=randrw", "--bs=4k", "--iodepth=8", "--fsync=32"], ["--rw=write", "--bs=1M", "--iodepth=4"]],
    ids=["4k random", "mixed sizes", "read and write with flushes", "1 MiB sequential"],
)  # fmt: skip
def test_fio_verifies(disk, folder, job):
    said = run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={disk['nbd_uri']}", "--size=32M", "--verify=crc32c",
        "--verify_fatal=1", "--do_verify=1", "--serialize_overlap=1", "--output-format=json", "--randseed=11", *job, cwd=folder,
    )  # fmt: skip
    (result,) = json.loads(said[said.index("{") :])["jobs"]
    assert not result["error"] and result["write"]["total_ios"] and result["read"]["total_ios"]


# --- nbdkit in front ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [[], ["--filter=cow"], ["--filter=blocksize"]], ids=["plain", "cow", "blocksize"])
def test_nbdkit_as_a_proxy(disk, image, folder, filters):
    through = f"{folder}/proxy"
    command = ["nbdkit", "--exit-with-parent", "-f", "-U", through, *filters, "nbd", f"uri={disk['nbd_uri']}"]
    run("nbdcopy", str(image), disk["nbd_uri"])
    with subprocess.Popen([*command, "shared=true"]) as proxy:
        try:
            for _ in range(600):
                if os.path.exists(through):
                    break
                proxy.poll()
                assert proxy.returncode is None, "nbdkit did not start"
                time.sleep(0.02)
            uri = f"nbd+unix:///?socket={through}"
            (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
            assert export["export-size"] == 32 * MIB and export["can_trim"]
            run("nbdcopy", uri, f"{folder}/back")
            run("cmp", str(image), f"{folder}/back")
            qemu_io(uri, "write -P 0x66 5M 100k", "flush", "read -P 0x66 5M 100k", "discard 0 64k", "read -P 0 0 64k")
        finally:
            proxy.terminate()
    kept = filters == ["--filter=cow"]
    qemu_io(disk["nbd_uri"], f"read -P {0x66 if not kept else 0} 5M 100k")


def test_all_tools_are_there():
    """Nothing here is skipped; script/setup installs what is missing."""
    tools = ["nbdinfo", "nbdcopy", "nbdsh", "qemu-img", "qemu-io", "qemu-nbd", "fio", "nbdkit"]
    assert not [tool for tool in tools if not shutil.which(tool)]

"""Reads below many snapshots and writes right after one, beside qcow2.

``depth``  4 KiB random reads of disks with no, ten, ... snapshots, and of qcow2 images at the end of backing chains, all served at
the same time. Every disk was written to while its snapshots were taken, and so was each image of the chain. What
counts is the speed against depth 0 of the same kind, measured right before or right after.

``fresh``  the first writes after a snapshot: a snapshot of ours, a new overlay over a qcow2 image, an internal snapshot of a qcow2
image. The image and our disk hold the same, written before.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench import fio
from bench.failure import BenchFailure
from bench.operations import Finding
from bench.servers import qemu_nbd
from bench.store.disks import make, random_disk, settle
from bench.store.scale import Scale, Tell
from simsr.cli.client import Client

__all__ = ["depth", "fresh"]

READS = ("--rw=randread", "--bs=4k", "--iodepth=32")
WRITES = ("--rw=randwrite", "--bs=4k", "--iodepth=32")
AT_LEAST = 0.95
FRESH_AT_LEAST = {"overlay": 16.0, "internal snapshot": 57.0}
"""What a prototype reached."""
_LOAD_IOPS = 10_000
_WRITES_AN_IMAGE = 64
_FRESH_WRITES = 16384


def depth(daemon: Client, directory: Path, scale: Scale, tell: Tell) -> Iterator[Finding]:
    """Yield the speed of each depth against that of depth 0."""
    with contextlib.ExitStack() as stack:
        ours = {count: _disk_with_snapshots(daemon, scale, count, tell) for count in (0, *scale.depths)}
        chain = _chain(directory, scale, tell)
        theirs = {}
        for length in (0, *scale.chains):
            socket = directory / f"chain{length}.sock"
            theirs[length] = stack.enter_context(qemu_nbd(chain[length], socket, "--read-only", "--shared=4"))
        deep_ones = [(kind, count, uris) for kind, uris in (("snapshots", ours), ("backing files", theirs)) for count in uris if count]
        speeds: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for number in range(scale.rounds):
            for kind, count, uris in deep_ones:
                order = (count, 0) if number % 2 else (0, count)
                now = {which: fio.measure(uris[which], READS, scale.seconds, seed=number + 1).iops for which in order}
                speeds.setdefault((kind, count), []).append((now[0], now[count]))
            last = "  ".join(f"{count} {kind} {of[-1][1]:,.0f} ({of[-1][0]:,.0f})" for (kind, count), of in speeds.items())
            tell(f"depth round {number + 1}/{scale.rounds}, IOPS and (without): {last}")
    for (kind, count), values in speeds.items():
        yield Finding("depth", f"4k random read, {count} {kind}", statistics.median(deep for _, deep in values), "IOPS")
        ratio = statistics.median(deep / flat for flat, deep in values)
        bound = AT_LEAST if kind == "snapshots" else None
        yield Finding("depth", f"{count} {kind} against none", ratio, "x", at_least=bound)


def _disk_with_snapshots(daemon: Client, scale: Scale, count: int, tell: Tell) -> str:
    """A disk that was written to at random, with ``count`` snapshots taken meanwhile; the address of its export."""
    vdi = random_disk(daemon, scale.depth_bytes, tell)
    with fio.background_load(vdi["nbd_uri"], _LOAD_IOPS):
        for _ in range(count):
            daemon.post(daemon.vdi_path(vdi["uuid"], "snapshot"), {})
    fio.burst(vdi["nbd_uri"], WRITES, 64 * _WRITES_AN_IMAGE * 4096, seed=2)
    settle(daemon, vdi)
    return vdi["nbd_uri"]


def _chain(directory: Path, scale: Scale, tell: Tell) -> list[Path]:
    """A filled image and as many overlays, one over the other, as the longest chain needs, each with some blocks of its own."""
    images = [directory / "chain-0.qcow2"]
    _filled_image(images[0], scale, tell)
    rng = random.Random("chain")
    tell(f"making a chain of {max(scale.chains)} images")
    for number in range(1, 1 + max(scale.chains)):
        images.append(directory / f"chain-{number}.qcow2")
        _overlay(images[-1], images[-2])
        offsets = [rng.randrange(scale.depth_bytes // 4096) * 4096 for _ in range(_WRITES_AN_IMAGE)]
        writes = [word for offset in offsets for word in ("-c", f"write -q -P {number % 255 + 1} {offset} 4096")]
        _run("qemu-io", "-f", "qcow2", *writes, str(images[-1]))
    return images


def _filled_image(path: Path, scale: Scale, tell: Tell) -> None:
    tell(f"filling {path.name}")
    _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", str(path), str(scale.depth_bytes))
    with qemu_nbd(path, path.parent / "fill.sock") as uri:
        fio.fill_at_random(uri, scale.depth_bytes, seed=1)


def _overlay(path: Path, backing: Path) -> None:
    _run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(backing), str(path))


def fresh(daemon: Client, directory: Path, scale: Scale, tell: Tell) -> Iterator[Finding]:
    """Yield the speed of the first writes after a snapshot, and ours against qcow2's."""
    ours = make(daemon, scale.depth_bytes)
    fio.fill_at_random(ours["nbd_uri"], scale.depth_bytes, seed=1)
    settle(daemon, ours)
    image, overlay = directory / "fresh.qcow2", directory / "overlay.qcow2"
    _filled_image(image, scale, tell)
    io_bytes = min(_FRESH_WRITES * 4096, scale.depth_bytes)
    speeds: dict[str, list[float]] = {"simsr": [], "overlay": [], "internal snapshot": []}
    for number in range(scale.rounds):
        daemon.post(daemon.vdi_path(ours["uuid"], "snapshot"), {})
        speeds["simsr"].append(fio.burst(ours["nbd_uri"], WRITES, io_bytes, number + 1).iops)
        _overlay(overlay, image)
        with qemu_nbd(overlay, directory / "fresh.sock") as uri:
            speeds["overlay"].append(fio.burst(uri, WRITES, io_bytes, number + 1).iops)
        overlay.unlink()
        _run("qemu-img", "snapshot", "-q", "-c", f"s{number}", str(image))
        with qemu_nbd(image, directory / "fresh.sock") as uri:
            speeds["internal snapshot"].append(fio.burst(uri, WRITES, io_bytes, number + 1).iops)
        tell(f"fresh round {number + 1}/{scale.rounds}: " + "  ".join(f"{kind} {v[-1]:,.0f}" for kind, v in speeds.items()))
    for kind, values in speeds.items():
        yield Finding("fresh", f"4k random write right after a snapshot: {kind}", statistics.median(values), "IOPS")
    for kind, least in FRESH_AT_LEAST.items():
        ratio = statistics.median(our / their for our, their in zip(speeds["simsr"], speeds[kind], strict=True))
        yield Finding("fresh", f"the same against qcow2's {kind}", ratio, "x", at_least=least)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise BenchFailure(f"{command[0]} is not installed; script/setup installs it") from None
    if done.returncode:
        raise BenchFailure(f"{' '.join(command[:3])} failed: {(done.stderr or done.stdout).strip()[-300:]}")

"""The demo: a disk goes through simsr's main job on real data, and every claim is checked.

A real ext4 file system full of real files is put on a disk, the disk is damaged and taken back to its snapshot through
the plug-in that xapi would call, and everything must be as it was: file system, files, uuid, location, name. Then the
daemon is killed in the middle of a write load, and every acknowledged write must be there afterwards.
The exit status is 0 only if all of that held. Nothing stays behind, whatever happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import signal
import statistics
import sys
import sysconfig
import time
import uuid
from pathlib import Path

import nbd
from demo_kit import PlugIn, Steps, WriteLoad, demand, output_of

from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
from simsr.cli.client import Client
from simsr.units import format_size

MIB = 2**20
DISK_BYTES = 256 * MIB
LOAD_DISK_BYTES = 64 * MIB
DISK_NAME = "root disk of the demo"
LOAD_SECONDS = 2.0
TIMED_REVERTS = 5
INTERRUPTED = 130

CLEAN, DAMAGED = (0,), (4, 8, 12)
"""Exit statuses of e2fsck -n: nothing wrong; errors left uncorrected, or too damaged to look at."""


class Demo:
    """What the steps pass on to one another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "store"
        self.image = directory / "ext4.img"
        self.files: dict[str, str] = {}
        self.daemon: ChildDaemon | None = None

    def steps(self):
        """Return the steps in order."""
        return [
            ("Start simsrd on an empty root", self.start_daemon),
            ("Create an SR and a disk through the SMAPIv1 plug-in", self.create),
            ("Build an ext4 image of real files", self.build_image),
            ("Copy it onto the disk with nbdcopy", self.fill),
            ("Take a snapshot through the plug-in", self.snapshot),
            ("Damage the disk with qemu-io", self.damage),
            ("See that e2fsck finds it damaged", self.see_damage),
            ("Revert to the snapshot through the plug-in", self.revert),
            ("See that file system, files and identity are as before", self.see_all_as_before),
            ("Revert again and again over the API, timed", self.time_reverts),
            ("Kill the daemon (SIGKILL) in the middle of a write load", self.kill_under_load),
            ("Restart it; every acknowledged write must be there", self.restart_and_check),
        ]

    def start_daemon(self) -> str:
        self.daemon = ChildDaemon(str(self.root))
        self.client = Client(self.daemon.socket)
        return f"process {self.daemon.process.pid}, control socket {self.daemon.socket}"

    def create(self) -> str:
        self.plug_in = PlugIn(self.daemon.socket, str(uuid.uuid4()))
        self.plug_in.call("sr_create", "0")
        self.plug_in.call("sr_attach")
        self.disk = self._create_disk(DISK_BYTES, DISK_NAME)
        self.identity = self._identity()
        return f"SR {self.plug_in.sr_uuid}\nVDI {self.disk}, {format_size(DISK_BYTES)}, '{self.identity['name']}'"

    def build_image(self) -> str:
        tree = self.directory / "files"
        library = Path(sysconfig.get_path("stdlib"))
        unwanted = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages")
        shutil.copytree(library, tree / "lib", ignore=unwanted, symlinks=True)
        self.files = _hashes(tree)
        demand(len(self.files) >= 200, f"only {len(self.files)} files in {library}")
        output_of("mkfs.ext4", "-q", "-F", "-d", tree, self.image, f"{DISK_BYTES // MIB}M")
        volume = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
        return f"{len(self.files)} files of {library}, {format_size(volume)}, as mkfs.ext4 -d wrote them"

    def fill(self) -> str:
        self.uri = self._attach(self.disk)
        output_of("nbdcopy", "--flush", self.image, self.uri)
        return f"to {self.uri}"

    def snapshot(self) -> str:
        begun = time.monotonic()
        answer = self.plug_in.call_for(self.disk, "vdi_snapshot")
        took_ms = (time.monotonic() - begun) * 1000
        self.snapshot_uuid = answer["uuid"]
        return f"snapshot {self.snapshot_uuid}, {took_ms:.0f} ms, the disk being attached"

    def damage(self) -> str:
        """Overwrite group descriptors, bitmaps, inode tables and data, and discard some more."""
        commands = ("write -P 0xdb 4k 12M", "write -P 0x5a 40M 16M", "discard 100M 64M", "flush")
        options = [word for command in commands for word in ("-c", command)]
        output_of("qemu-io", "-f", "raw", *options, self.uri)
        return "28 MiB overwritten from byte 4096 on, 64 MiB discarded"

    def see_damage(self) -> str:
        status, said = output_of("e2fsck", "-fn", self._copy_out("damaged.img"), accept=DAMAGED)
        lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("e2fsck ")]
        return f"exit status {status}, {len(lines)} lines such as: {lines[0][:70]}"

    def revert(self) -> str:
        self._detach(self.disk)
        begun = time.monotonic()
        answer = self.plug_in.call_for(self.snapshot_uuid, "vdi_revert", self.disk)
        self.plug_in_revert_ms = (time.monotonic() - begun) * 1000
        demand(answer is None, f"vdi_revert answered {answer!r} and not nil")
        return f"the call took {self.plug_in_revert_ms:.0f} ms, the start of the plug-in included"

    def see_all_as_before(self) -> str:
        self.uri = self._attach(self.disk)
        copy = self._copy_out("reverted.img")
        output_of("e2fsck", "-fn", copy, accept=CLEAN)
        found = self._files_in(copy)
        different = {name for name in found.keys() | self.files.keys() if found.get(name) != self.files.get(name)}
        demand(not different, f"{len(different)} files differ, such as {sorted(different)[:1]}")
        demand(_hash(copy) == _hash(self.image), "the disk is not the image, byte for byte")
        demand(self._identity() == self.identity, f"it was {self.identity} and is {self._identity()}")
        return (
            f"e2fsck: clean; sha256 of {len(found)} files equal, and of the whole disk\n"
            "uuid, location and name unchanged"
        )

    def time_reverts(self) -> str:
        self._detach(self.disk)
        uri, times_ms = self.client.get(self.client.vdi_path(self.disk))["nbd_uri"], []
        for number in range(TIMED_REVERTS):
            writer = nbd.NBD()
            writer.connect_uri(uri)
            writer.pwrite(bytes([number + 1]) * MIB, number * MIB)
            writer.shutdown()
            del writer
            self._wait_until_free()
            begun = time.perf_counter()
            answer = self.client.post(self.client.vdi_path(self.snapshot_uuid, "revert"), {})
            times_ms.append((time.perf_counter() - begun) * 1000)
            demand(answer["changed"], "the revert changed nothing")
        self.api_revert_ms = statistics.median(times_ms)
        demand(_hash(self._copy_out("again.img", uri)) == _hash(self.image), "the disk is not the image any more")
        return f"median of {TIMED_REVERTS}: {self.api_revert_ms:.1f} ms, the disk equal to the image again"

    def kill_under_load(self) -> str:
        self.load_disk = self._create_disk(LOAD_DISK_BYTES, "disk of the write load")
        self.load = WriteLoad(self._attach(self.load_disk), LOAD_DISK_BYTES)
        self.load.start()
        time.sleep(LOAD_SECONDS)
        under_way = len(self.load.in_flight)
        self.daemon.kill()
        self.client.close()
        self.load.wait_for_the_end()
        demand(under_way, "no write was under way")
        demand(self.load.acknowledged_count > 1000, f"only {self.load.acknowledged_count} writes were acknowledged")
        count = self.load.acknowledged_count
        return f"{count} writes of 4 KiB acknowledged, none flushed, {len(self.load.in_flight)} cut off"

    def restart_and_check(self) -> str:
        self.start_daemon()
        held = self.load.check(self._attach(self.load_disk))
        demand(_hash(self._copy_out("after.img", self._attach(self.disk))) == _hash(self.image), "the first disk changed")
        demand(self._identity() == self.identity, "the first disk's identity changed")
        return f"{held} blocks hold their last acknowledged write or the one cut off; the first disk is untouched"

    # --- parts of steps --------------------------------------------------------------------------------------------

    def _create_disk(self, size_bytes: int, name: str) -> str:
        arguments = (str(size_bytes), name, "", "", "false", "19700101T00:00:00Z", "", "false")
        answer = self.plug_in.call("vdi_create", *arguments, vdi_type="user", vdi_sm_config={})
        demand(answer["uuid"] == answer["location"], f"location {answer['location']} is not uuid {answer['uuid']}")
        return answer["uuid"]

    def _attach(self, vdi_uuid: str) -> str:
        """Attach and activate a disk as for a VM that starts; return its address for NBD clients."""
        answer = self.plug_in.call_for(vdi_uuid, "vdi_attach", "true")
        self.plug_in.call_for(vdi_uuid, "vdi_activate", "true")
        found = re.fullmatch(r"nbd:unix:(.+):exportname=(.+)", answer["params_nbd"])
        demand(found, f"params_nbd is {answer['params_nbd']!r}")
        return f"nbd+unix:///{found[2]}?socket={found[1]}"

    def _detach(self, vdi_uuid: str) -> None:
        self.plug_in.call_for(vdi_uuid, "vdi_deactivate")
        self.plug_in.call_for(vdi_uuid, "vdi_detach")

    def _wait_until_free(self) -> None:
        """Wait until the daemon has noticed that the last client is gone, so that this is not part of a revert."""
        give_up = time.monotonic() + 5
        while self.client.get(self.client.vdi_path(self.disk))["attached"]:
            demand(time.monotonic() < give_up, "the disk stays attached")
            time.sleep(0.01)

    def _identity(self) -> dict[str, object]:
        vdi = self.client.get(self.client.vdi_path(self.disk))
        return {key: vdi[key] for key in ("uuid", "location", "name", "size_bytes", "created_time")}

    def _copy_out(self, name: str, uri: str | None = None) -> Path:
        target = self.directory / name
        output_of("nbdcopy", uri or self.uri, target)
        return target

    def _files_in(self, image: Path) -> dict[str, str]:
        """Return the hashes of the files in an ext4 image, read without mounting it and without rights."""
        target = self.directory / "extracted"
        target.mkdir()
        output_of("debugfs", "-R", f"rdump /lib {target}", image)
        return _hashes(target)


def _hashes(tree: Path) -> dict[str, str]:
    """Return the SHA-256 of every regular file below ``tree``, by its name from there."""
    paths = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(tree)): _hash(path) for path in paths}


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Run the demo and return the exit status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    steps, directory = Steps(), Path(short_temporary_directory("simsr-demo-"))
    demo = Demo(directory)
    try:
        held = steps.run(demo.steps())
        if not held and demo.daemon is not None:
            steps.console.print("\n".join(demo.daemon.log()[-10:]), style="dim", markup=False)
        steps.sum_up()
        if held:
            steps.console.print(
                f"\nReverting {format_size(DISK_BYTES)} took {demo.plug_in_revert_ms:.0f} ms as a call of the plug-in, "
                f"{demo.api_revert_ms:.1f} ms as one of the API. Everything held."
            )
        return 0 if held else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        with contextlib.suppress(AttributeError):
            demo.client.close()
        if demo.daemon is not None:
            demo.daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

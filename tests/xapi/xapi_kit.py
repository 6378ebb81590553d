"""A real simsrd, a real ``simsr xapi serve`` and the stock XenAPI client, for tests that take the whole way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import XenAPI
from daemon_tools import Simsrd

ROOT = Path(__file__).parents[2]
SIMSR_PLUGIN = ROOT / "simsr" / "smapi" / "SimSR"
MIB = 2**20
SR_SIZE = 256 * MIB
"""Physical size of the tests' SRs: one without a limit gets some 200 MiB of zeros written at once, which takes a second."""
NULL = "OpaqueRef:NULL"


def failure(function, *arguments) -> list[str]:
    """Return the ErrorDescription with which the call must fail."""
    try:
        value = function(*arguments)
    except XenAPI.Failure as error:
        return list(error.details)
    raise AssertionError(f"it succeeded with {value!r}")


def short_directory() -> Path:
    """Make a directory without underscores in its path, which the stock client could not connect to, and short enough."""
    while True:
        path = tempfile.mkdtemp(prefix="simsr-", dir="/tmp")
        if "_" not in path:
            return Path(path)
        os.rmdir(path)


class Server:
    """``simsr xapi serve`` on ``root``, ready when the constructor returns."""

    def __init__(self, root: Path, *options: str) -> None:
        self.root = root
        self.log = open(root.parent / f"{root.name}.log", "ab")  # noqa: SIM115 - closed by stop
        self.process = subprocess.Popen(
            [sys.executable, "-m", "simsr.cli.main", "xapi", "serve", "--root", str(root), *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT,
        )  # fmt: skip
        line = self.process.stdout.readline()
        ready = re.fullmatch(r"simsr xapi: ready, socket (\S+?)(?:, TCP (\S+))?\n", line)
        assert ready, f"it said {line!r}: {self.log_text()}"
        self.socket, self.tcp = ready.groups()

    def log_text(self) -> str:
        return (self.root.parent / f"{self.root.name}.log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=120)
        self.process.stdout.close()
        self.log.close()
        return status

    def session(self) -> XenAPI.Session:
        """Return a logged-in session of the stock client."""
        session = XenAPI.Session("http://" + self.socket.replace("/", "_") + "/", transport=XenAPI.UDSTransport())
        session.login_with_password("root", "")
        return session


class World:
    """simsrd and xapi together, with shorthands for what every test needs."""

    def __init__(self, *options: str, drivers: dict[str, str] | None = None) -> None:
        self.folder = short_directory()
        if drivers is not None:
            (self.folder / "sm").mkdir()
            for name, text in drivers.items():
                self.write_driver(name, text)
            options = (*options, "--sm-dir", str(self.folder / "sm"))
        self.options = options
        self._shared: dict[str, str] = {}
        self.start_simsrd()
        self.start_xapi()

    def start_simsrd(self) -> None:
        """Start simsrd, again if it was killed."""
        self.simsrd = Simsrd(self.folder / "simsrd").start()
        (self.folder / "simsrd.pid").write_text(str(self.simsrd.process.pid))

    def start_xapi(self) -> None:
        """Start xapi and log in."""
        self.xapi = Server(self.folder / "xapi", *self.options)
        (self.folder / "xapi.pid").write_text(str(self.xapi.process.pid))
        self.login()

    def login(self) -> None:
        self.session = self.xapi.session()
        self.x: Any = self.session.xenapi
        [self.host] = self.x.host.get_all()
        self.template = self.x.VM.get_by_name_label("Other install media")[0]

    def write_driver(self, name: str, text: str) -> Path:
        path = self.folder / "sm" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def close(self) -> None:
        self.session.logout()
        for part in self._clients():
            part("close")()
        try:
            assert self.xapi.stop() == 0
            assert "Traceback" not in (log := self.xapi_log()), log
        finally:
            self.simsrd.stop_cleanly()
            shutil.rmtree(self.folder)

    def _clients(self):
        return [self.session]

    def xapi_log(self) -> str:
        return (self.folder / "xapi.log").read_text()

    def restart_xapi(self, number: int = signal.SIGTERM) -> None:
        self.session("close")()
        self.xapi.stop(number)
        self.start_xapi()

    # Shorthands.

    def device_config(self, **more: str) -> dict[str, str]:
        return {"socket": self.simsrd.socket, "xapi_socket": self.xapi.socket, **more}

    def sr(self, name: str = "sr", kind: str = "sim", *, size: int = SR_SIZE, **device_config: str) -> str:
        config = self.device_config(**device_config)
        return self.x.SR.create(self.host, config, str(size), name, "", kind, "user", False, {})

    def shared_sr(self, kind: str = "sim") -> str:
        """Return an SR of this type that all tests with the world have in common: for those that look at their own VDIs only."""
        if kind not in self._shared:
            self._shared[kind] = self.sr(f"shared {kind}", kind, size=8 * SR_SIZE)
        return self._shared[kind]

    def vdi(self, sr: str, size: int = 4 * MIB, name: str = "disk", **fields: Any) -> str:
        record = {"SR": sr, "name_label": name, "name_description": "", "virtual_size": str(size), "type": "user",
                  "sharable": False, "read_only": False, "other_config": {}, "sm_config": {}, "tags": [], "xenstore_data": {}}  # fmt: skip
        return self.x.VDI.create(record | fields)

    def vm(self, name: str = "vm", disks: tuple[str, ...] = (), **vbd: Any) -> str:
        vm = self.x.VM.clone(self.template, name)
        self.x.VM.set_is_a_template(vm, False)
        for number, disk in enumerate(disks):
            self.vbd(vm, disk, str(number), **vbd)
        return vm

    def vbd(self, vm: str, disk: str, device: str = "autodetect", **fields: Any) -> str:
        record = {"VM": vm, "VDI": disk, "userdevice": device, "bootable": False, "mode": "RW", "type": "Disk", "unpluggable": True,
                  "empty": disk == NULL, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {}}  # fmt: skip
        return self.x.VBD.create(record | fields)

    def vbds(self, vm: str) -> dict[str, dict[str, Any]]:
        """Return the VBD records of a VM by userdevice."""
        records = [self.x.VBD.get_record(vbd) for vbd in self.x.VM.get_VBDs(vm)]
        return {record["userdevice"]: record for record in records}

    def uuid(self, vdi: str) -> str:
        return self.x.VDI.get_uuid(vdi)

    def io(self, vdi: str, *commands: str) -> None:
        """Run qemu-io commands on the disk, through simsrd's own NBD socket."""
        words = [word for command in commands for word in ("-c", command)]
        uri = f"nbd+unix:///{self.uuid(vdi)}?socket={self.simsrd.root}/nbd.sock"
        read_only = ["-r"] if all(command.startswith("read") for command in commands) else []
        done = subprocess.run(
            ["qemu-io", "-f", "raw", *read_only, *words, uri],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr

    def fill(self, vdi: str, pattern: int, size: str = "4M") -> None:
        self.io(vdi, f"write -P {pattern} 0 {size}", "flush")

    def holds(self, vdi: str, pattern: int, size: str = "4M") -> None:
        """Fail unless the disk holds the pattern."""
        self.io(vdi, f"read -P {pattern} 0 {size}")

    def wait_task(self, task: str, seconds: float = 120.0) -> dict[str, Any]:
        give_up = time.monotonic() + seconds
        while (record := self.x.task.get_record(task))["status"] in ("pending", "cancelling"):
            assert time.monotonic() < give_up, record
            time.sleep(0.02)
        return record

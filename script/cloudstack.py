"""CloudStack's part of the demonstration: its bookkeeping, and what it does to a VM on XenServer, call by call.

The management server keeps in `volumes.path` the uuid of the VDI that a volume is; table and column names are CloudStack's. A stopped VM
has no record in XenServer: it is made again, from `volumes.path`, whenever one is needed. To revert a VM snapshot CloudStack runs a script
in dom0 that destroys the VM, reverts, and destroys the disks that the VM had: `stock_revert` has the same calls in the same order, the
script's by ``xe``. `plain_revert` is what an integrator can do instead where the SR reverts natively.
"""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import XenAPI

__all__ = ["Management", "RevertFailed"]

SCHEMA = """
CREATE TABLE vm_instance (id INTEGER PRIMARY KEY, instance_name TEXT NOT NULL, state TEXT NOT NULL);
CREATE TABLE volumes (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, instance_id INTEGER NOT NULL, device_id INTEGER NOT NULL, pool_id TEXT NOT NULL,
    path TEXT NOT NULL, size INTEGER NOT NULL, state TEXT NOT NULL, update_count INTEGER NOT NULL DEFAULT 0);
CREATE TABLE vm_snapshots (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, vm_id INTEGER NOT NULL, vm_snapshot_type TEXT NOT NULL, current INTEGER NOT NULL,
    state TEXT NOT NULL);
"""
TEMPLATE = "Other install media"
POLL_S = 0.05
XE_TIMEOUT_S = 60


class RevertFailed(Exception):
    """CloudStack has given up on the revert; the text is what its log would say."""


class Management:
    """The management server with its database, for one pool."""

    def __init__(self, database: str, session: XenAPI.Session, xapi_socket: str) -> None:
        self.db = sqlite3.connect(database, isolation_level=None)
        self.db.executescript(SCHEMA)
        self.x: Any = session.xenapi
        self.xapi_socket = xapi_socket
        self.said: list[str] = []
        """What the script's ``xe`` commands complained about; the script itself does not look."""

    # The database.

    def volumes(self, vm_id: int) -> list[dict[str, Any]]:
        """Return the rows of a VM's volumes, by device."""
        rows = self.db.execute("SELECT * FROM volumes WHERE instance_id = ? ORDER BY device_id", (vm_id,))
        names = [column[0] for column in rows.description]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def name_of(self, vm_id: int) -> str:
        [name] = self.db.execute("SELECT instance_name FROM vm_instance WHERE id = ?", (vm_id,)).fetchone()
        return name

    def _set_state(self, vm_id: int, state: str) -> None:
        self.db.execute("UPDATE vm_instance SET state = ? WHERE id = ?", (state, vm_id))

    # The life of a VM.

    def deploy(self, vm_id: int, sr: str, sizes: list[int]) -> None:
        """Make a VM's volumes and start it."""
        self.db.execute("INSERT INTO vm_instance VALUES (?, ?, 'Stopped')", (vm_id, f"i-2-{vm_id}-VM"))
        for device, size in enumerate(sizes):
            name = f"{'DATA' if device else 'ROOT'}-{vm_id}"
            vdi = self.x.VDI.create({
                "SR": sr, "name_label": name, "name_description": "", "virtual_size": str(size), "type": "user", "sharable": False,
                "read_only": False, "other_config": {}, "sm_config": {}, "tags": [], "xenstore_data": {},
            })  # fmt: skip
            row = (name, vm_id, device, self.x.SR.get_uuid(sr), self.x.VDI.get_uuid(vdi), size, "Ready")
            self.db.execute("INSERT INTO volumes (name, instance_id, device_id, pool_id, path, size, state) VALUES (?,?,?,?,?,?,?)", row)
        self.start(vm_id)

    def start(self, vm_id: int) -> str:
        """Start a stopped VM: make its record from the volumes, and start that. Return its reference."""
        vm = self._working_vm(vm_id)
        self.x.VM.start(vm, False, False)
        self._set_state(vm_id, "Running")
        return vm

    def stop(self, vm_id: int) -> None:
        """Stop a VM; its record goes, its disks stay."""
        [vm] = self.x.VM.get_by_name_label(self.name_of(vm_id))
        self.x.VM.clean_shutdown(vm)
        self.x.VM.destroy(vm)
        self._set_state(vm_id, "Stopped")

    def _working_vm(self, vm_id: int) -> str:
        disks = [(volume["device_id"], self.x.VDI.get_by_uuid(volume["path"])) for volume in self.volumes(vm_id)]
        vm = self.x.VM.clone(self.x.VM.get_by_name_label(TEMPLATE)[0], self.name_of(vm_id))
        self.x.VM.set_is_a_template(vm, False)
        for device, vdi in disks:
            self.x.VBD.create({
                "VM": vm, "VDI": vdi, "userdevice": str(device), "bootable": device == 0, "mode": "RW", "type": "Disk",
                "unpluggable": True, "empty": False, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {},
            })  # fmt: skip
        return vm

    # VM snapshots.

    def snapshot(self, vm_id: int) -> str:
        """Take a VM snapshot without memory of a running VM; return its name."""
        name = f"{self.name_of(vm_id)}_VS_{time.strftime('%Y%m%d%H%M%S')}"
        [vm] = self.x.VM.get_by_name_label(self.name_of(vm_id))
        task = getattr(self.x, "Async.VM.snapshot")(vm, name)
        self.x.task.add_to_other_config(task, "CS_VM_SNAPSHOT_KEY", name)
        while (status := self.x.task.get_status(task)) == "pending":
            time.sleep(POLL_S)
        if status != "success":
            raise RevertFailed(f"the snapshot failed: {self.x.task.get_error_info(task)}")
        self.x.task.destroy(task)
        row = (name, vm_id, "Disk", 0, "Ready")
        self.db.execute("INSERT INTO vm_snapshots (name, vm_id, vm_snapshot_type, current, state) VALUES (?,?,?,?,?)", row)
        return name

    def stock_revert(self, vm_id: int, snapshot_name: str, look: Callable[[], None] = lambda: None) -> None:
        """Revert a stopped VM as CloudStack does. ``look`` is called when the script is done and nothing is in the database yet.

        Raises `RevertFailed`; the volumes are as they were then.
        """
        [snapshot] = self.x.VM.get_by_name_label(snapshot_name)
        vm = self._working_vm(vm_id)
        self._script(self.x.VM.get_uuid(snapshot), self.name_of(vm_id), self.x.VM.get_uuid(vm))
        look()
        [again] = self.x.VM.get_by_name_label(self.name_of(vm_id))
        vbds = [self.x.VBD.get_record(vbd) for vbd in self.x.VM.get_VBDs(again)]
        disk_of = {vbd["userdevice"]: self.x.VDI.get_uuid(vbd["VDI"]) for vbd in vbds if vbd["type"] == "Disk"}
        self.x.VM.destroy(again)
        volumes = self.volumes(vm_id)
        missing = [volume["name"] for volume in volumes if str(volume["device_id"]) not in disk_of]
        if missing:
            raise RevertFailed(f"null pointer: the VM has no disk for {' and '.join(missing)}")
        self._finalize(snapshot_name, {volume["id"]: disk_of[str(volume["device_id"])] for volume in volumes})

    def _script(self, snapshot_uuid: str, vm_name: str, old_vm_uuid: str) -> str:
        """What vmopsSnapshot does in dom0, for a snapshot without memory. It answers 0 whatever its commands said."""
        self.said = []
        old_disks = re.findall(r"vdi-uuid \( RO\): ([0-9a-f-]{36})", self._xe("vbd-list", f"vm-uuid={old_vm_uuid}"))
        if self._xe("vm-param-get", "param-name=power-state", f"uuid={old_vm_uuid}").strip() != "halted":
            self._xe("vm-shutdown", "force=true", f"vm={vm_name}")
        self._xe("vm-destroy", f"uuid={old_vm_uuid}")
        self._xe("snapshot-revert", f"snapshot-uuid={snapshot_uuid}")
        for uuid in old_disks:
            self._xe("vdi-destroy", f"uuid={uuid}")
        return "0"

    def plain_revert(self, vm_id: int, snapshot_name: str) -> None:
        """Revert with VM.revert alone: nothing else is destroyed, and the volumes need no change."""
        [snapshot] = self.x.VM.get_by_name_label(snapshot_name)
        self.x.VM.revert(snapshot)
        [again] = self.x.VM.get_by_name_label(self.name_of(vm_id))
        self.x.VM.destroy(again)
        self._finalize(snapshot_name, {})

    def _finalize(self, snapshot_name: str, paths: dict[int, str]) -> None:
        """Write the volumes' new paths, if there are any, and note which snapshot is the current one."""
        with self.db:
            for volume, path in paths.items():
                self.db.execute("UPDATE volumes SET path = ?, update_count = update_count + 1 WHERE id = ?", (path, volume))
            self.db.execute("UPDATE vm_snapshots SET current = (name = ?)", (snapshot_name,))

    def _xe(self, *words: str) -> str:
        command = [sys.executable, "-m", "simsr.cli.main", "xe", "--xapi", self.xapi_socket, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=XE_TIMEOUT_S)
        if done.returncode:
            self.said.append(f"xe {words[0]}: {done.stderr.strip()}")
        return done.stdout

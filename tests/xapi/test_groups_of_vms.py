"""The disks of a VM as a group: what ``simsr`` does with ``vm:UUID``, before and after xapi reverts the VM disk by disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from xapi_kit import ROOT, failure


@pytest.fixture
def simsr(upstream):
    """Run ``simsr`` against the daemon below xapi; returns what it printed."""
    environment = {**os.environ, "SIMSR_SOCKET": upstream.simsrd.socket}

    def run(*arguments, status=0):
        done = subprocess.run(
            [sys.executable, "-m", "simsr.cli.main", *arguments],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, timeout=60,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def vm(upstream, native_sr):
    """A VM with two disks that hold 1, were snapshotted, and hold 2; and its snapshot."""
    disks = (upstream.vdi(native_sr), upstream.vdi(native_sr))
    vm = upstream.vm("pair", disks)
    for disk in disks:
        upstream.fill(disk, 1)
    snapshot = upstream.x.VM.snapshot(vm, "s", [])
    for disk in disks:
        upstream.fill(disk, 2)
    return vm, disks, snapshot


def test_a_vm_is_reverted_as_one_and_then_xapi_has_nothing_to_do(upstream, vm, simsr):
    vm, disks, snapshot = vm
    name = f"vm:{upstream.x.VM.get_uuid(vm)}"
    plan = json.loads(simsr("revert", "--group", name, "--dry-run", "--json"))
    assert {member["vdi"] for member in plan["members"]} == {upstream.uuid(disk) for disk in disks}
    simsr("revert", "--group", name)
    for disk in disks:
        upstream.holds(disk, 1)
    gens = [json.loads(simsr("tree", upstream.uuid(disk), "--json"))["gen"] for disk in disks]
    upstream.x.VM.revert(snapshot)
    assert gens == [json.loads(simsr("tree", upstream.uuid(disk), "--json"))["gen"] for disk in disks]
    simsr("undo", "--group", name)
    for disk in disks:
        upstream.holds(disk, 2)
    again = simsr("snapshot", "--group", name).split()
    assert len(again) == 2, "those of the last snapshot"
    assert "more than one group" in simsr("revert", "--group", name, status=39)
    simsr("revert", again[0], "--group")


def test_a_vm_that_xapi_reverted_by_half_is_as_it_was_after_undo(upstream, vm, simsr):
    vm, disks, snapshot = vm
    name = f"vm:{upstream.x.VM.get_uuid(vm)}"
    order = sorted(row["VDI"] for row in upstream.vbds(snapshot).values())  # that of VM.revert
    stuck = upstream.x.VDI.get_snapshot_of(order[1])
    script = 'import sys,nbd;h=nbd.NBD();h.connect_uri(sys.argv[1]);print(flush=True);sys.stdin.read()'
    uri = f"nbd+unix:///{upstream.uuid(stuck)}?socket={upstream.simsrd.root}/nbd.sock"
    with subprocess.Popen(["/usr/bin/python3", "-c", script, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        client.stdout.readline()
        assert failure(upstream.x.VM.revert, snapshot)[0] == "VM_REVERT_FAILED"
        client.stdin.close()
    first = next(disk for disk in disks if disk != stuck)
    upstream.holds(first, 1)
    upstream.holds(stuck, 2)
    assert upstream.uuid(first) in simsr("undo", "--group", name)
    for disk in disks:
        upstream.holds(disk, 2)


def test_what_cannot_be_meant_is_refused(simsr, upstream, vm):
    assert "no snapshots of VM" in simsr("revert", "--group", "vm:00000000-0000-4000-8000-00000000000f", status=58)
    assert "hexadecimal" in simsr("undo", "--group", "vm:web", status=2)
    name = f"vm:{upstream.x.VM.get_uuid(vm[0])}"
    assert "not both" in simsr("revert", upstream.uuid(vm[1][0]), name, "--group", status=2)

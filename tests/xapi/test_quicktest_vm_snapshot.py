"""vdi_revert.md 13.1: the quicktest of VM snapshots, one test for each of its five behaviours."""

from __future__ import annotations

import pytest
from xapi_kit import MIB


@pytest.fixture(scope="module")
def clone_sr(upstream):
    """An SR that has revert switched off behind xapi's back, so that it allows vdi_revert but answers 38."""
    return upstream.sr("clone", revert="off")


@pytest.fixture
def setup_a(upstream, native_sr):
    disks = (upstream.vdi(native_sr, 4 * MIB), upstream.vdi(native_sr, 4 * MIB))
    return upstream.vm("quicktest", disks), disks


def test_snapshot_of_points_to_the_vm_and_to_each_disk(upstream, setup_a):
    vm, disks = setup_a
    snapshot = upstream.x.VM.snapshot(vm, "s", [])
    assert upstream.x.VM.get_snapshot_of(snapshot) == vm
    vbds = upstream.vbds(snapshot)
    for device, disk in zip("01", disks, strict=True):
        assert upstream.x.VDI.get_snapshot_of(vbds[device]["VDI"]) == disk


def test_an_ignored_disk_has_no_vbd_in_the_snapshot(upstream, setup_a):
    vm, disks = setup_a
    vbds = upstream.vbds(upstream.x.VM.snapshot(vm, "s", [disks[1]]))
    assert list(vbds) == ["0"]
    assert upstream.x.VDI.get_snapshot_of(vbds["0"]["VDI"]) == disks[0]


def test_revert_with_vdi_revert_keeps_the_vdi_of_the_only_vbd_left(upstream, setup_a, native_sr):
    assert {"vdi_create", "vdi_revert"} <= set(upstream.x.SR.get_allowed_operations(native_sr))
    vm, disks = setup_a
    upstream.x.VM.revert(upstream.x.VM.snapshot(vm, "s", [disks[1]]))
    vbds = upstream.vbds(vm)
    assert list(vbds) == ["0"] and vbds["0"]["VDI"] == disks[0]


def test_revert_without_vdi_revert_gives_the_only_vbd_left_another_vdi(wrapped_world, plan):
    world = wrapped_world
    sr = world.sr("norevert", "norevert")
    allowed = set(world.x.SR.get_allowed_operations(sr))
    assert {"vdi_create", "vdi_clone"} <= allowed and "vdi_revert" not in allowed
    disks = (world.vdi(sr), world.vdi(sr))
    vm = world.vm("quicktest", disks)
    world.x.VM.revert(world.x.VM.snapshot(vm, "s", [disks[1]]))
    vbds = world.vbds(vm)
    assert list(vbds) == ["0"] and vbds["0"]["VDI"] not in disks
    assert "vdi_revert" not in plan.commands()


def test_cds_are_the_same_before_and_after(upstream, native_sr):
    media = (upstream.vdi(native_sr), upstream.vdi(native_sr))
    vm = upstream.vm("setup B", media, type="CD", mode="RO")
    snapshot = upstream.x.VM.snapshot(vm, "s", [])
    assert len(upstream.vbds(snapshot)) == 2
    upstream.x.VM.revert(snapshot)
    vbds = upstream.vbds(vm)
    assert {device: vbd["VDI"] for device, vbd in vbds.items()} == {"0": media[0], "1": media[1]}


def test_revert_where_the_driver_answers_38_gives_another_vdi(upstream, clone_sr):
    disk = upstream.vdi(clone_sr)
    vm = upstream.vm("quicktest", (disk,))
    upstream.x.VM.revert(upstream.x.VM.snapshot(vm, "s"))
    assert upstream.vbds(vm)["0"]["VDI"] != disk

"""vdi_revert.md 3.5, 12 and the CBT part of 13.3: changed blocks and reset-on-boot through the whole way, and what a revert does to them."""

from __future__ import annotations

import base64

import pytest
from xapi_kit import failure

UNIT = 65536


def changed(world, older: str, newer: str) -> set[int]:
    """Return the numbers of the blocks of 64 KiB that list_changed_blocks marks; the highest bit of a byte comes first."""
    bitmap = base64.b64decode(world.x.VDI.list_changed_blocks(older, newer))
    return {8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte & (0x80 >> bit)}


@pytest.fixture
def tracked(upstream, native_sr):
    disk = upstream.vdi(native_sr)
    upstream.x.VDI.enable_cbt(disk)
    return disk


def test_cbt_enable_snapshot_clone_and_disable(upstream, tracked):
    x = upstream.x
    snapshot = x.VDI.snapshot(tracked, {})
    assert x.VDI.get_cbt_enabled(tracked) is True is x.VDI.get_cbt_enabled(snapshot)
    assert x.VDI.get_cbt_enabled(x.VDI.clone(tracked, {})) is False
    x.VDI.disable_cbt(tracked)
    assert x.VDI.get_cbt_enabled(tracked) is False
    x.SR.scan(x.VDI.get_SR(tracked))
    assert (x.VDI.get_cbt_enabled(tracked), x.VDI.get_cbt_enabled(snapshot)) == (False, True), "a scan finds the same"


def test_cbt_names_exactly_what_was_written(upstream, tracked):
    first = upstream.x.VDI.snapshot(tracked, {})
    upstream.io(tracked, "write -P 1 0 4k", f"write -P 1 {3 * UNIT - 512} 1k", f"write -P 1 {63 * UNIT} 64k", "flush")
    second = upstream.x.VDI.snapshot(tracked, {})
    assert changed(upstream, first, second) == {0, 2, 3, 63}
    assert changed(upstream, first, tracked) == {0, 2, 3, 63} and changed(upstream, second, tracked) == set()


def test_cbt_across_a_revert(upstream, tracked):
    """list_changed_blocks(A, disk) has every block in which the disk, reverted, differs from A."""
    x = upstream.x
    first = x.VDI.snapshot(tracked, {})
    upstream.io(tracked, f"write -P 1 {5 * UNIT} 4k", "flush")
    second = x.VDI.snapshot(tracked, {})
    upstream.io(tracked, f"write -P 2 {9 * UNIT} 4k", "flush")
    third = x.VDI.snapshot(tracked, {})
    x.VDI.revert(first)
    assert x.VDI.get_cbt_enabled(tracked) is True
    assert {5} <= changed(upstream, second, tracked) and {5, 9} <= changed(upstream, third, tracked)
    upstream.io(tracked, f"write -P 3 {20 * UNIT} 4k", "flush")
    assert 20 in changed(upstream, first, tracked) and {5, 9, 20} <= changed(upstream, third, tracked)


def test_cbt_errors(upstream, native_sr, tracked):
    x = upstream.x
    untracked = upstream.vdi(native_sr)
    assert failure(x.VDI.list_changed_blocks, untracked, tracked)[0] == "SR_BACKEND_FAILURE_460"
    snapshot = x.VDI.snapshot(tracked, {})
    assert failure(x.VDI.enable_cbt, snapshot)[0] == "OPERATION_NOT_ALLOWED"


def test_on_boot_reset_forgets_what_was_written(upstream, native_sr):
    x = upstream.x
    disk = upstream.vdi(native_sr)
    upstream.fill(disk, 0x11)
    vm = upstream.vm("reset", (disk,))
    x.VDI.set_on_boot(disk, "reset")
    for _ in range(2):
        x.VM.start(vm, False, False)
        upstream.holds(disk, 0x11)
        upstream.fill(disk, 0x22)
        x.VM.hard_shutdown(vm)


def test_revert_is_what_a_reset_disk_goes_back_to(upstream, native_sr):
    """Section 12: after a revert the next boot resets to the reverted content, not to the base there was before."""
    x = upstream.x
    disk = upstream.vdi(native_sr)
    upstream.fill(disk, 0x11)
    snapshot = x.VDI.snapshot(disk, {})
    upstream.fill(disk, 0x22)
    vm = upstream.vm("reset and revert", (disk,))
    x.VDI.set_on_boot(disk, "reset")
    x.VM.start(vm, False, False)
    upstream.holds(disk, 0x22)
    x.VM.hard_shutdown(vm)
    x.VDI.revert(snapshot)
    for _ in range(2):
        x.VM.start(vm, False, False)
        upstream.holds(disk, 0x11)
        upstream.fill(disk, 0x33)
        x.VM.hard_shutdown(vm)

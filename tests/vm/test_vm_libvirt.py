"""A real guest under libvirt, with the disks that ``simsr vdi libvirt-xml`` prints: one from the start, one plugged in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from libvirt_kit import Libvirtd
from vm_kit import KERNEL_ARGUMENTS, Boot, Guest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a libvirtd in a mount namespace needs root")

DOMAIN = """
<domain type='{type}'>
  <name>simsr-test</name>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{arguments}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{folder}/console'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{folder}/port'/><target port='1'/></serial>
    {disk}
  </devices>
</domain>
"""


@pytest.fixture
def libvirt(tmp_path):
    with Libvirtd(tmp_path / "libvirt") as libvirtd:
        yield libvirtd


class Domain:
    """``with Domain(...) as guest:`` the transient domain, until it has powered itself off."""

    def __init__(self, libvirt: Libvirtd, boot: Boot, folder: Path, disk: str) -> None:
        self._libvirt, self._folder = libvirt, folder
        kind = "kvm" if boot.accelerator == "kvm" else "qemu"
        text = DOMAIN.format(type=kind, kernel=boot.kernel, initrd=boot.initrd, arguments=KERNEL_ARGUMENTS, folder=folder, disk=disk)
        (folder / "domain.xml").write_text(text)

    def __enter__(self) -> Guest:
        self._libvirt.virsh("create", str(self._folder / "domain.xml"))
        self._guest = Guest(self._folder / "port", self._folder / "console")
        return self._guest

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._guest.power_off()
                self._libvirt.wait_until_gone("simsr-test")
        finally:
            self._guest.close()


def test_a_domain_goes_back_in_time(boot, api, daemon, libvirt, tmp_path):
    def simsr(*words: str) -> str:
        command = [sys.executable, "-m", "simsr.cli.main", "--socket", daemon.socket, *words]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout

    def plug_in(guest: Guest) -> None:
        libvirt.virsh("attach-device", "simsr-test", str(tmp_path / "second.xml"))
        guest.run(f"until [ -e /sys/block/vdb ] && link_disks && [ -e /disks/{serials[1]} ]; do usleep 100000; done")

    vdis = [simsr("vdi", "create", "--size", "64MiB", "--name", name).strip() for name in ("one", "two")]
    serials = [vdi[:20] for vdi in vdis]
    first = simsr("vdi", "libvirt-xml", vdis[0])
    (tmp_path / "second.xml").write_text(simsr("vdi", "libvirt-xml", vdis[1], "--target", "vdb"))
    with Domain(libvirt, boot, tmp_path, first) as guest:
        plug_in(guest)
        for serial in serials:
            guest.run(f"/e2fsprogs/mke2fs -q -t ext4 /disks/{serial} && mkdir /mnt/{serial} && mount /disks/{serial} /mnt/{serial}")
            guest.run(f"echo old > /mnt/{serial}/file; sync")
        snapshots = [simsr("snapshot", vdi).strip() for vdi in vdis]
        for serial in serials:
            guest.run(f"echo new > /mnt/{serial}/file; sync; umount /mnt/{serial}")
        refused = subprocess.run([sys.executable, "-m", "simsr.cli.main", "--socket", daemon.socket, "revert", snapshots[0]],
                                 stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
        assert refused.returncode == 16 and vdis[0] in refused.stderr, refused.stderr
    for snapshot in snapshots:
        simsr("revert", snapshot)
    assert simsr("vdi", "libvirt-xml", vdis[0]) == first
    with Domain(libvirt, boot, tmp_path, first) as guest:
        plug_in(guest)
        for serial in serials:
            guest.check(serial)
            guest.run(f"mkdir /mnt/{serial} && mount /disks/{serial} /mnt/{serial}")
            assert guest.run(f"cat /mnt/{serial}/file") == "old"
            guest.run(f"umount /mnt/{serial}")

"""A real guest under qemu, with a disk over NBD and one over FUSE: it writes, is snapshotted while it runs, goes on, is reverted, and boots again."""

from __future__ import annotations

import time

from vm_kit import Guest, Qemu

MIB = 1 << 20
DISKS = ("over-nbd", "over-fuse")


def mounted(guest: Guest) -> None:
    for name in DISKS:
        guest.run(f"mkdir -p /mnt/{name} && mount /disks/{name} /mnt/{name}")


def unmounted(guest: Guest) -> None:
    for name in DISKS:
        guest.run(f"umount /mnt/{name}")


def write_files(guest: Guest, name: str, label: str) -> str:
    """Write some files below ``label`` on a disk, for good; returns their checksums."""
    folder = f"/mnt/{name}/{label}"
    guest.run(f"mkdir {folder}")
    guest.run(f"for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of={folder}/$n bs=64k count=$n 2>/dev/null; done")
    guest.run(f"echo {label} > {folder}/label; sync")
    return guest.run(f"cd {folder} && sha256sum *; cd /")


def test_a_guest_goes_back_in_time(boot, api, mount, tmp_path, capsys):
    vdis = {name: api.post("/v1/vdis", {"size_bytes": 64 * MIB, "name": name}) for name in DISKS}
    nbd, fuse = vdis.values()
    drives = dict(zip(DISKS, (f"file={nbd['nbd_uri']}", f"file={mount}/{fuse['uuid']}.raw,cache=none")))
    began = time.monotonic()
    with Qemu(boot, tmp_path, drives) as guest:
        for name in DISKS:
            assert guest.run(f"blockdev --getsize64 /disks/{name}") == str(64 * MIB)
            guest.run(f"/e2fsprogs/mke2fs -q -t ext4 /disks/{name}")
        mounted(guest)
        old = {name: write_files(guest, name, "old") for name in DISKS}
        snapshots = {name: api.post(f"/v1/vdis/{vdi['uuid']}/snapshot", {"name": "running"}) for name, vdi in vdis.items()}
        for name in DISKS:
            write_files(guest, name, "new")
            guest.run(f"rm -r /mnt/{name}/old")
        unmounted(guest)
    for name, snapshot in snapshots.items():
        after = api.post(f"/v1/vdis/{snapshot['uuid']}/revert", {})["vdi"]
        assert {key: after[key] for key in ("uuid", "location", "name", "nbd_uri")} == {
            key: vdis[name][key] for key in ("uuid", "location", "name", "nbd_uri")}
    with Qemu(boot, tmp_path, drives) as guest:
        for name in DISKS:
            guest.check(name)
        mounted(guest)
        for name in DISKS:
            assert guest.run(f"ls /mnt/{name}").split() == ["lost+found", "old"]
            assert guest.run(f"cd /mnt/{name}/old && sha256sum *; cd /") == old[name]
        unmounted(guest)
    with capsys.disabled():
        print(f"\n  two boots with {boot.accelerator}, snapshot of the running guest, revert: {time.monotonic() - began:.1f} s")

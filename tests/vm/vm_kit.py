"""A guest to test disks with: Debian's cloud kernel, an initramfs of busybox and e2fsprogs, commands over a serial line.

The guest's init loads the virtio drivers and then runs, as shell, each line that it reads from its second serial port; the
first has the kernel's messages. KVM is used where a guest comes up with it in a few seconds: /dev/kvm can be there and guests
hang all the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

__all__ = ["Boot", "Qemu", "Guest", "KERNEL_ARGUMENTS"]

BOOT_TIMEOUT_S = 120
COMMAND_TIMEOUT_S = 120
PROBE_TIMEOUT_S = 10
MARK = "simsr-guest-status"
KERNEL_ARGUMENTS = "console=ttyS0 panic=-1 quiet"
DRIVERS = ["virtio_pci", "virtio_blk"]
PROGRAMS = ["/sbin/e2fsck", "/sbin/mke2fs"]  # in /e2fsprogs of the guest; busybox has programs of these names
TROUBLE = re.compile(r"(Buffer I/O|I/O error|EXT4-fs error|Kernel panic|Oops)")

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod /lib/modules/$module; done
link_disks() { for disk in /sys/block/vd*; do [ -e $disk ] && ln -sf /dev/${disk##*/} /disks/$(cat $disk/serial); done; }
link_disks
ln -s /proc/mounts /etc/mtab
exec <>/dev/ttyS1 >&0 2>&1
stty raw -echo
echo MARK ready >/dev/console
echo MARK ready
while read -r line; do eval "$line"; echo "MARK $?"; done
""".replace("MARK", MARK)


class Boot:
    """Kernel and initramfs, made in ``folder`` from the unpacked kernel package ``package``."""

    def __init__(self, package: Path, folder: Path) -> None:
        (self.kernel,) = package.glob("boot/vmlinuz-*")
        self.initrd = folder / "initrd"
        tree = folder / "initramfs"
        for name in ("bin", "dev", "proc", "sys", "etc", "mnt", "disks", "lib/modules", "e2fsprogs"):
            (tree / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", tree / "bin" / "busybox")
        (tree / "init").write_text(INIT)
        (tree / "init").chmod(0o755)
        modules = self._with_dependencies({path.stem: path for path in package.glob("lib/modules/*/kernel/**/*.ko")})
        for path in modules:
            shutil.copy(path, tree / "lib" / "modules")
        (tree / "modules").write_text("\n".join(path.name for path in modules))
        for program in PROGRAMS:
            shutil.copy(program, tree / "e2fsprogs")
            for library in re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", program], capture_output=True, text=True).stdout):
                place = tree / library.lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, place)
        with self.initrd.open("wb") as output:
            names = "\n".join(str(path.relative_to(tree)) for path in tree.rglob("*"))
            subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), stdout=output,
                           stderr=subprocess.DEVNULL, check=True)

        self.accelerator = self._probed(folder / "probe")

    def command(self, accelerator: str, console: Path) -> list[str]:
        """qemu without disks."""
        return ["qemu-system-x86_64", "-accel", accelerator, "-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config",
                "-display", "none", "-no-reboot", "-kernel", str(self.kernel), "-initrd", str(self.initrd),
                "-append", KERNEL_ARGUMENTS, "-serial", f"file:{console}"]  # fmt: skip

    def _probed(self, console: Path) -> str:
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return "tcg"
        command = [*self.command("kvm", console), "-serial", "null"]
        probe = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + PROBE_TIMEOUT_S
        try:
            while time.monotonic() < give_up and probe.poll() is None:
                if console.exists() and MARK in console.read_text(errors="replace"):
                    return "kvm"
                time.sleep(0.1)
            return "tcg"
        finally:
            probe.kill()
            probe.wait()

    @staticmethod
    def _with_dependencies(files: dict[str, Path]) -> list[Path]:
        """The drivers and what they depend on (each module names that itself), in the order to load them."""
        ordered: list[Path] = []

        def add(name: str) -> None:
            path = files[name]
            found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
            for needed in found[1].decode().split(",") if found and found[1] else []:
                add(needed)
            if path not in ordered:
                ordered.append(path)

        for name in DRIVERS:
            add(name)
        return ordered


class Guest:
    """A guest that has been started and listens at the unix socket ``port``: runs commands in it."""

    def __init__(self, port: Path, console: Path) -> None:
        self._console = console
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(port))
        self._lines = self._socket.makefile("r", encoding="utf-8", errors="replace", newline="\n")
        try:
            self._read_until(f"{MARK} ready", BOOT_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def _read_until(self, start: str, timeout_s: float) -> tuple[str, list[str]]:
        self._socket.settimeout(timeout_s)
        said = []
        try:
            for line in self._lines:
                line = line.rstrip("\r\n")
                if line.startswith(start):
                    return line, said
                said.append(line)
        except TimeoutError:
            said.append(f"... and nothing for {timeout_s} s")
        raise AssertionError("the guest said:\n" + "\n".join(said) + "\nand its kernel:\n" + self.console())

    def console(self) -> str:
        """What the kernel has said."""
        return self._console.read_text(errors="replace")

    def run(self, command: str, status: int = 0) -> str:
        """Run one line of shell in the guest; returns what it printed."""
        assert "\n" not in command
        self._socket.sendall(command.encode() + b"\n")
        last, said = self._read_until(MARK + " ", COMMAND_TIMEOUT_S)
        assert last == f"{MARK} {status}", f"{command}: {last}\n" + "\n".join(said) + "\n" + self.console()[-2000:]
        return "\n".join(said)

    def check(self, disk: str) -> None:
        """The file system on /disks/``disk``, which may have been in use when it was last seen, is whole."""
        self.run(f"/e2fsprogs/e2fsck -p /disks/{disk}; test $? -le 1")  # plays the journal, mends nothing else
        self.run(f"/e2fsprogs/e2fsck -f -n /disks/{disk}")

    def power_off(self) -> None:
        """Begin to power it off; whoever started it knows when it has."""
        self._socket.sendall(b"sync; poweroff -f\n")
        with contextlib.suppress(OSError):
            self._socket.settimeout(COMMAND_TIMEOUT_S)
            while self._socket.recv(4096):
                pass
        assert not TROUBLE.search(self.console()), self.console()


    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Qemu:
    """``with Qemu(boot, folder, drives) as guest:`` a guest under qemu; it must have powered itself off at the end.

    ``drives``: {serial number of the disk in the guest: what qemu's -drive takes for it}.
    """

    def __init__(self, boot: Boot, folder: Path, drives: dict[str, str]) -> None:
        self._folder = folder
        command = boot.command(boot.accelerator, folder / "console")
        command += ["-chardev", f"socket,id=port,path={folder}/port,server=on,wait=off", "-serial", "chardev:port"]
        for number, (serial, drive) in enumerate(drives.items()):
            command += ["-drive", f"if=none,id=d{number},format=raw,discard=unmap,{drive}"]
            command += ["-device", f"virtio-blk-pci,drive=d{number},serial={serial}"]
        self._guest: Guest | None = None
        with open(folder / "qemu.log", "wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> Guest:
        port = self._folder / "port"
        try:
            while not port.exists():  # soon: qemu listens before it starts the guest
                assert self._process.poll() is None, "qemu has ended"
                time.sleep(0.02)
            self._guest = Guest(port, self._folder / "console")
        except BaseException as error:
            self.__exit__(type(error))
            error.add_note("qemu said: " + (self._folder / "qemu.log").read_text())
            raise
        return self._guest

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._guest.power_off()
                assert self._process.wait(COMMAND_TIMEOUT_S) == 0, (self._folder / "qemu.log").read_text()
        finally:
            self._process.kill()
            self._process.wait()
            if self._guest:
                self._guest.close()
            (self._folder / "port").unlink(missing_ok=True)

"""A libvirtd of the test's own: as root, with configuration, state and socket in a folder of the test.

libvirt's directories are compiled in, so the daemon gets a mount namespace in which its own lie over the machine's. The
machine's libvirt, if there is one, does not notice. virsh reaches it by the path of its socket.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

__all__ = ["Libvirtd"]

START_TIMEOUT_S = 60
COMMAND_TIMEOUT_S = 120
DIRECTORIES = ["/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt"]
LIBVIRTD_CONF = """
unix_sock_dir = "{folder}/sock"
auth_unix_rw = "none"
log_outputs = "2:file:{folder}/libvirtd.log"
"""
QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
"""
USER = "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n"
GROUP = "libvirt-qemu:x:64055:\n"
"""libvirtd looks for them although it does not use them; Debian's package that makes them would start services, too."""


class Libvirtd:
    """``with Libvirtd(folder) as libvirt: libvirt.virsh("list")``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "sock" / "libvirt-sock"

    def __enter__(self) -> Libvirtd:
        folder = self._folder
        (folder / "sock").mkdir(parents=True)
        (folder / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(folder=folder))
        script = ["set -e", "mount --make-rprivate /"]
        for directory in DIRECTORIES:
            own = folder / "over" / directory.lstrip("/")
            own.mkdir(parents=True)
            script += [f"mkdir -p {directory}", f"mount --bind {own} {directory}"]
        (folder / "over/etc/libvirt/qemu.conf").write_text(QEMU_CONF)
        for name, line in (("passwd", USER), ("group", GROUP)):
            own = folder / name
            own.write_text(Path("/etc", name).read_text() + line)
            script.append(f"mount --bind {own} /etc/{name}")
        script.append(f"exec libvirtd -f {folder}/libvirtd.conf -p {folder}/libvirtd.pid")
        with open(folder / "libvirtd.out", "wb") as output:
            self._process = subprocess.Popen(["unshare", "--mount", "sh", "-c", "\n".join(script)],
                                             stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # fmt: skip
        give_up = time.monotonic() + START_TIMEOUT_S
        try:
            while self._virsh("uri").returncode:
                assert self._process.poll() is None and time.monotonic() < give_up, self._log()
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._virsh("list", "--name").stdout.split():
            self._virsh("destroy", name)
        self._process.terminate()
        try:
            self._process.wait(START_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()

    def _log(self) -> str:
        paths = [self._folder / name for name in ("libvirtd.out", "libvirtd.log")]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())

    def _virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["virsh", "-q", "-c", f"qemu+unix:///system?socket={self._socket}", *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)

    def virsh(self, *arguments: str) -> str:
        done = self._virsh(*arguments)
        assert done.returncode == 0, f"virsh {' '.join(arguments)}: {done.stderr}\n{self._log()}"
        return done.stdout

    def wait_until_gone(self, name: str) -> None:
        """Wait until the transient domain ``name`` has ended."""
        give_up = time.monotonic() + COMMAND_TIMEOUT_S
        while name in self.virsh("list", "--all", "--name").split():
            assert time.monotonic() < give_up, f"domain {name} does not end"
            time.sleep(0.1)

"""Mounting and unmounting, through ``fusermount3``: it needs no privileges and hands over the open FUSE device.

Everything here but `parse_mounts` may block, on a file system that does not answer for example, and belongs in a worker thread.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass

from simsr.errors import MountBusy, MountFailed, Unsupported

__all__ = [
    "MountPoint", "check_directory", "mount", "mounted_at", "parse_mounts", "raise_background_limit", "raise_dirty_limit", "sync", "unmount",
]  # fmt: skip

TYPE = "fuse.simsr"
_TOOL = "fusermount3"
_TOOL_TIMEOUT_S = 60
_OCTAL = re.compile(r"\\([0-7]{3})")
_BACKGROUND_REQUESTS = 1024
_DIRTY_PERCENT = 20
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)


@dataclass(frozen=True)
class MountPoint:
    """One line of /proc/self/mountinfo."""

    path: str
    type: str
    source: str
    device: str  # major:minor


def parse_mounts(text: str) -> list[MountPoint]:
    """Read /proc/self/mountinfo, in its order: later ones lie over earlier ones. Lines that are none are left out."""
    found = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if dash and len(fields) >= 5 and len(rest) >= 2:
            path = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
            found.append(MountPoint(path, rest[0], rest[1], fields[2]))
    return found


def mounted_at(path: str) -> MountPoint | None:
    """The uppermost mount at exactly ``path``."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        return next((one for one in reversed(parse_mounts(file.read())) if one.path == path), None)


def check_directory(path: str) -> None:
    """Raise `MountFailed` if nothing can be mounted at ``path``. What a simsrd that died has left there is unmounted first."""
    try:
        entries = os.listdir(path)
    except OSError as error:
        over = mounted_at(path)
        if error.errno not in _DEAD or over is None or over.type != TYPE:
            raise MountFailed(path=path, reason=(error.strerror or str(error)).lower()) from None
        unmount(path, lazy=True)
        return check_directory(path)
    over = mounted_at(path)
    if over is not None and over.type == TYPE:
        raise MountFailed(path=path, reason="a simsrd has mounted its VDIs there already")
    if entries:
        raise MountFailed(path=path, reason="the directory is not empty, and the mount would hide what is in it")


def mount(path: str, *, shared: bool) -> int:
    """Mount at ``path`` and return the FUSE device. ``shared``: other users than ours may look. Raises `MountFailed`, `Unsupported`."""
    options = ["fsname=simsr", "subtype=simsr", "default_permissions", "nosuid", "nodev", *(["allow_other"] if shared else [])]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [_tool(), "-o", ",".join(options), "--", path]
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        done = subprocess.run(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_TOOL_TIMEOUT_S,
        )  # fmt: skip
        if done.returncode:
            raise MountFailed(path=path, reason=_said(done))
        fd = _receive_descriptor(ours)
    if fd is None:
        raise MountFailed(path=path, reason=f"{_TOOL} gave no FUSE device")
    os.set_inheritable(fd, False)
    return fd


def _receive_descriptor(sock: socket.socket) -> int | None:
    size = array.array("i").itemsize
    sock.settimeout(_TOOL_TIMEOUT_S)
    _, messages, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(size))
    for level, kind, data in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", data[:size])[0]
    return None


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount ``path``; ``lazy``: also if it is in use. No error if nothing is mounted there. Raises `MountBusy`, `MountFailed`."""
    done = subprocess.run(
        [_tool(), "-u", *(["-z"] if lazy else []), "--", path], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=_TOOL_TIMEOUT_S, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    if done.returncode:
        over = mounted_at(path)
        if over is None or over.type != TYPE:
            return
        if "busy" in (said := _said(done)):
            raise MountBusy(path=path)
        raise MountFailed(path=path, reason=said)


def sync(path: str) -> None:
    """Have the kernel write what it keeps for the file system at ``path``. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)  # calls through it let other threads run: the writes come to us
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    finally:
        os.close(fd)


def raise_background_limit(device: str) -> bool:
    """Let the kernel have many requests under way that no program waits for (readahead, write-back, asynchronous I/O); 12 is the
    default, so a dozen that hang on one disk would stop those of all. Only root may, and only where fusectl is mounted."""
    return _set(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/max_background", _BACKGROUND_REQUESTS)


def raise_dirty_limit(device: str) -> bool:
    """Let the kernel collect more writes than the hundredth of its dirty pages that it grants a FUSE file system, which it takes for
    slow: then writers wait for the write-back almost from the beginning. Only root may."""
    return _set(f"/sys/class/bdi/{device}/max_ratio", _DIRTY_PERCENT)


def _set(path: str, value: int) -> bool:
    try:
        with open(path, "w") as file:
            file.write(str(value))
    except OSError:
        return False
    return True


def _tool() -> str:
    if path := shutil.which(_TOOL):
        return path
    raise Unsupported(operation="mount", reason=f"{_TOOL} is not installed (Debian's package fuse3)")


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix(f"{_TOOL}: ") if lines else f"{_TOOL} ended with status {done.returncode}"

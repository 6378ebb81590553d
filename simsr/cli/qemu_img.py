"""qemu-img as a child process: looking at an image, copying one, with a progress bar on a terminal.

The child runs in a process group of its own, so a Ctrl-C at the terminal reaches only simsr, which ends the child
and then cleans up in a known order. File names are passed as absolute paths: after a leading ``/`` neither ``-`` nor
``:`` has a meaning to qemu.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from simsr.cli.failures import FileFailure, ToolMissing
from simsr.cli.interrupts import interrupts_later

__all__ = ["image_info", "files_named_inside", "convert", "MANY_COROUTINES"]

MANY_COROUTINES = ["-m", "8"]
"""Requests in flight while copying; more than 8 gain nothing over a unix socket."""

STOP_TIMEOUT_S = 30.0

_PROGRESS = re.compile(rb"\((\d+\.\d+)/100%\)")


def image_info(path: str, image_format: str | None) -> dict[str, Any]:
    """Return what ``qemu-img info`` says of the image at ``path``, whose format is guessed unless given."""
    command = [_qemu_img("import"), "info", "--output=json"]
    command += ["-f", image_format] if image_format else []
    done = subprocess.run([*command, os.path.abspath(path)], capture_output=True, env=_c_locale(), check=False)
    if done.returncode != 0:
        raise FileFailure(
            action="import", path=path, reason=_last_words(done.stderr), hint="Name its format with --format."
        )
    info = json.loads(done.stdout)
    assert isinstance(info, dict)
    return info


def files_named_inside(info: dict[str, Any], path: str) -> list[str]:
    """Return the other files that an image makes qemu open: backing file, data file, extents.

    An image from a stranger may name any file of this host there, and its content would end up on the disk.
    """
    data = (info.get("format-specific") or {}).get("data") or {}
    named = [info.get("full-backing-filename") or info.get("backing-filename"), data.get("data-file")]
    named += [extent.get("filename") for extent in data.get("extents") or []]
    itself = {path, os.path.abspath(path), info.get("filename")}
    return [name for name in named if name and name not in itself]


def convert(arguments: list[str], *, action: str, path: str, size_bytes: int) -> None:
    """Run ``qemu-img convert`` and show how far it is; ``path`` is the file to name if it fails.

    The child has ended when this returns or raises, whatever happened.
    """
    command = [_qemu_img(action), "convert", "-p", *MANY_COROUTINES, *arguments]
    with tempfile.TemporaryFile() as complaints, _progress_bar(action, path, size_bytes) as show:
        child = None
        try:
            with interrupts_later():
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    env=_c_locale(),
                    process_group=0,
                )
            assert child.stdout is not None
            with child.stdout as output:
                for percent in _percentages(output.fileno()):
                    show(percent)
            status = child.wait()
        finally:
            if child is not None:
                _stop(child)
        complaints.seek(0)
        if status != 0:
            raise FileFailure(action=action, path=path, reason=_last_words(complaints.read()))


def _qemu_img(action: str) -> str:
    found = shutil.which("qemu-img")
    if found is None:
        raise ToolMissing(tool="qemu-img", action=f"simsr {action}")
    return found


def _c_locale() -> dict[str, str]:
    """Return an environment in which qemu's messages and numbers have one form."""
    return {**os.environ, "LC_ALL": "C"}


def _percentages(descriptor: int) -> Iterator[float]:
    """Yield the progress that qemu-img -p writes, until it closes its end."""
    rest = b""
    while piece := os.read(descriptor, 4096):
        rest += piece
        for found in _PROGRESS.finditer(rest):
            yield float(found[1])
        rest = rest[-32:]  # a number may be cut in two; what repeats does no harm


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_words(stderr: bytes) -> str:
    """Return qemu-img's complaint without its name in front, on one line.

    qemu repeats itself ("Could not open 'x': Could not open 'x': No such file"); the last line says it all.
    """
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("qemu-img: ") if lines else "qemu-img failed and did not say why"


@contextlib.contextmanager
def _progress_bar(action: str, path: str, size_bytes: int) -> Iterator[Callable[[float], None]]:
    """Give a function that takes percentages; they are drawn if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda percent: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    name = escape(os.path.basename(path))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{action} {name}", total=size_bytes)
        yield lambda percent: progress.update(task, completed=int(size_bytes * percent / 100))

"""Running other people's NBD clients."""

from __future__ import annotations

import subprocess

__all__ = ["run", "qemu_io"]

TIMEOUT_S = 120


def run(*command: str, status: int = 0, **options) -> str:
    """Run a tool; returns its output."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, **options
    )
    assert done.returncode == status, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(uri: str, *commands: str, read_only: bool = False) -> str:
    arguments = [part for command in commands for part in ("-c", command)]
    said = run("qemu-io", *["-r"] * read_only, "-f", "raw", *arguments, uri)
    assert "failed" not in said.lower(), said
    return said

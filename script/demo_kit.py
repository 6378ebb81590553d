"""Tools of the demo: steps that are timed and shown, the plug-in called as xapi calls it, a checked write load."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import threading
import time
import xmlrpc.client
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import nbd
from rich.console import Console
from rich.markup import escape as plain

from simsr.errors import SimsrError

__all__ = ["Failed", "Steps", "PlugIn", "WriteLoad", "demand", "output_of"]

PLUG_IN = Path(__file__).parents[1] / "simsr" / "smapi" / "SimSR"

BLOCK_BYTES = 4096
PATIENCE_S = 60.0


class Failed(Exception):
    """Something that the demo promised did not hold."""


def demand(holds: object, otherwise: str) -> None:
    """Stop the demo unless ``holds``."""
    if not holds:
        raise Failed(otherwise)


def output_of(*command: object, accept: tuple[int, ...] = (0,)) -> tuple[int, str]:
    """Run a program; return its exit status and output, or stop the demo if the status is none of ``accept``."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},  # where e2fsprogs live
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{words[0]} was not done after {PATIENCE_S:.0f} s") from None
    text = done.stdout.decode(errors="replace")
    demand(done.returncode in accept, f"{words[0]} ended with status {done.returncode}: {text.strip()[-400:]}")
    return done.returncode, text


class Steps:
    """Runs the steps of the demo one after the other, shows each with its time, and sums up in a table."""

    COLOURS = {"ok": "green", "FAILED": "bold red", "not reached": "dim"}

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.results: list[tuple[str, float | None, str]] = []

    def run(self, steps: list[tuple[str, Callable[[], str]]]) -> bool:
        """Run ``steps`` until one fails; say whether all held."""
        for number, (title, step) in enumerate(steps):
            begun = time.monotonic()
            try:
                with self.console.status(f"{title} ..."):
                    detail = step()
            except (Failed, OSError, SimsrError, nbd.Error, xmlrpc.client.Fault) as error:
                self._record(title, time.monotonic() - begun, "FAILED", str(error))
                self.results += [(later, None, "not reached") for later, _ in steps[number + 1 :]]
                return False
            self._record(title, time.monotonic() - begun, "ok", detail)
        return True

    def sum_up(self) -> None:
        """Print the table of all steps."""
        width = max(len(title) for title, _, _ in self.results)
        self.console.print(f"\n[bold]{'What was done':<{width}}  {'Time':>7}  Result[/]")
        for title, seconds, result in self.results:
            took = "" if seconds is None else f"{seconds:.2f} s"
            self.console.print(f"{plain(title):<{width}}  {took:>7}  [{self.COLOURS[result]}]{result}[/]")

    def _record(self, title: str, seconds: float, result: str, detail: str) -> None:
        self.results.append((title, seconds, result))
        tick, cross = ("✓", "✗") if self.console.encoding.startswith("utf") else ("+", "!")
        mark = tick if result == "ok" else cross
        self.console.print(f"[{self.COLOURS[result]}]{mark}[/] {plain(title)}  [dim]{seconds:.2f} s[/]")
        for line in detail.splitlines():
            self.console.print(f"    {plain(line)}", style="dim" if result == "ok" else "red")


class PlugIn:
    """Runs the SMAPIv1 plug-in exactly as xapi does: a process per call, the request as XML in its last argument."""

    def __init__(self, socket: str, sr_uuid: str) -> None:
        self.socket = socket
        self.sr_uuid = sr_uuid

    def call(self, command: str, *arguments: str, **members: Any) -> Any:
        """Return the answer to ``command``; a fault is raised as `xmlrpc.client.Fault`."""
        request = {
            "host_ref": "OpaqueRef:1f6b0c55-0d4b-4f0e-9c59-0a86ab2c1101",
            "command": command,
            "args": list(arguments),
            "device_config": {"SRmaster": "true", "socket": self.socket, "standalone": "true"},
            "session_ref": "OpaqueRef:7d0c2c9e-6a34-4d8e-8f0a-3f1f5a8d2202",
            "sr_ref": "OpaqueRef:aa10f7a2-54f5-4cf7-9d43-1b7b0f2e3303",
            "sr_uuid": self.sr_uuid,
            **members,
        }
        xml = f"<methodCall><methodName>{command}</methodName><params><param>{_xml(request)}</param></params></methodCall>"
        done = subprocess.run(
            [PLUG_IN, xml],
            env={"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "ORIGINATOR": "SM"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        demand(done.returncode == 0, f"the plug-in ended with status {done.returncode}: {done.stderr.decode()[-400:]}")
        [answer], _ = xmlrpc.client.loads(done.stdout)
        return answer

    def call_for(self, vdi_uuid: str, command: str, *arguments: str) -> Any:
        """Return the answer to a command about an existing VDI."""
        about = {
            "vdi_ref": "OpaqueRef:0be1d0d3-2f6e-4b36-8a2c-66a7f93c7707",
            "vdi_location": vdi_uuid,
            "vdi_uuid": vdi_uuid,
            "subtask_of": "OpaqueRef:c3b0e5d1-11aa-4a0e-b1de-8b2f4c6d5505",
            "vdi_on_boot": "persist",
            "vdi_allow_caching": "false",
        }
        return self.call(command, *arguments, **about)


def _xml(value: Any) -> str:
    """Return an XML-RPC value in xapi's way: strings bare, no blanks between elements."""
    if isinstance(value, dict):
        members = "".join(f"<member><name>{escape(name)}</name>{_xml(item)}</member>" for name, item in value.items())
        return f"<value><struct>{members}</struct></value>"
    if isinstance(value, list):
        return f"<value><array><data>{''.join(map(_xml, value))}</data></array></value>"
    return f"<value>{escape(value, {chr(34): '&quot;'})}</value>" if value else "<value/>"


@dataclass
class _Written:
    """What is known of one block: the newest stamp sent, the newest one acknowledged."""

    sent: int = 0
    acknowledged: int = 0


class WriteLoad:
    """Random 4 KiB writes with many in flight and never a flush, each full of its block number and a rising stamp.

    One write at a time is in flight for a block, so that after a crash exactly two contents are right: that of the
    newest acknowledged write, and that of the one after it, which may have arrived without our hearing of it.
    """

    DEPTH = 32

    def __init__(self, uri: str, size_bytes: int) -> None:
        self.uri = uri
        self.blocks = [_Written() for _ in range(size_bytes // BLOCK_BYTES)]
        self.acknowledged_count = 0
        self.in_flight: set[int] = set()
        self._thread = threading.Thread(target=self._write_until_cut_off)

    def start(self) -> None:
        """Begin to write in a thread of its own."""
        self._thread.start()

    def wait_for_the_end(self) -> None:
        """Return when the connection has broken and the last acknowledgement is noted."""
        self._thread.join(30)
        demand(not self._thread.is_alive(), "the write load does not notice that the daemon is gone")

    def check(self, uri: str) -> int:
        """Read every block back; return how many hold a write that was acknowledged."""
        client = nbd.NBD()
        client.connect_uri(uri)
        held = 0
        for number, block in enumerate(self.blocks):
            content = bytes(client.pread(BLOCK_BYTES, number * BLOCK_BYTES))
            right = {_content(number, block.acknowledged), _content(number, block.sent)}
            demand(
                content in right,
                f"block {number} holds neither write {block.acknowledged}, which was acknowledged, nor {block.sent}: "
                f"{content[:16].hex()}",
            )
            held += block.acknowledged > 0
        client.shutdown()
        return held

    def _write_until_cut_off(self) -> None:
        client = nbd.NBD()
        client.connect_uri(self.uri)
        choose, stamp = random.Random(1), 0
        try:
            while True:
                while len(self.in_flight) < self.DEPTH:
                    number = choose.randrange(len(self.blocks))
                    if number not in self.in_flight:
                        stamp += 1
                        self._send(client, number, stamp)
                client.poll(-1)
        except nbd.Error:
            pass

    def _send(self, client: nbd.NBD, number: int, stamp: int) -> None:
        def completed(error: Any) -> int:
            if error.value == 0:
                self.blocks[number].acknowledged = stamp
                self.acknowledged_count += 1
                self.in_flight.discard(number)
            return 1  # retire the command

        self.in_flight.add(number)
        self.blocks[number].sent = stamp
        content = nbd.Buffer.from_bytearray(bytearray(_content(number, stamp)))
        client.aio_pwrite(content, number * BLOCK_BYTES, completion=completed)


def _content(number: int, stamp: int) -> bytes:
    """Return what write ``stamp`` puts into block ``number``; before the first write it is zeros."""
    return struct.pack("<QQ", number, stamp) * (BLOCK_BYTES // 16) if stamp else bytes(BLOCK_BYTES)

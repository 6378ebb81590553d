"""One plug-in on trial: run exactly as xapi runs it, against a daemon and a model of xapi made for the purpose, and watched.

Theory. The model of xapi (`Model`) is the judge of most things, because it reads answers and database rows by xapi's rules. Between it and the
plug-in stands `WatchedPlugin`, which judges each process by itself: exit status, one document on standard output. `WatchedModel`
writes down what the plug-in asks of the XenAPI. A command can be sent with members changed, as xapi of another version would send it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from simsr.errors import SimsrError
from simsr.xapi import smapiv1
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.model import Model, Settings
from simsr.xapi.schema import NULL
from simsr.xapi.server import serve_http
from simsr.xapi.storage import sr_command, vdi_command
from simsr.xapi.xml_tree import Element, NotXml, parse

__all__ = ["Trial", "Wrong", "fault_number", "on_trial"]

PATIENCE_S = 120.0
Members = dict[str, Any]

_NUMBERS = {
    "SR_NOT_EMPTY": 39, "VDI_IN_USE": 24, "SR_DEVICE_IN_USE": 16, "VDI_MISSING": 144, "UNIMPLEMENTED_IN_SM_BACKEND": 38,
    "SR_OPERATION_NOT_SUPPORTED": 38,
}  # fmt: skip


class Wrong(Exception):
    """The plug-in does not do what the checklist says; the argument is a sentence."""


def fault_number(error: XenError | Unimplemented) -> int | None:
    """The number of the fault that a plug-in answered with; None if it was no fault but something broken."""
    if isinstance(error, Unimplemented):
        return 38
    match = re.fullmatch(r"SR_BACKEND_FAILURE_([0-9]+)", error.xenapi_code)
    return int(match[1]) if match else _NUMBERS.get(error.xenapi_code)


class WatchedModel(Model):
    """Writes down every call that the plug-in makes."""

    calls: list[tuple[str, list[Any]]]

    async def answer(self, name: str, arguments: list[Any], **origin: Any) -> Any:
        self.calls.append((name, arguments[1:]))
        return await super().answer(name, arguments, **origin)


@dataclass(frozen=True)
class WatchedPlugin(smapiv1.Plugin):
    """Runs the plug-in, and keeps what it does as a process that it should not."""

    breaches: list[str] = field(default_factory=list)
    changes: list[Callable[[Members], Members]] = field(default_factory=list)

    async def run(self, command: str, members: Members) -> Element:
        for change in self.changes:
            members = change(members)
        return self.read(command, await self.watched(command, smapiv1.write_request(command, members)))

    async def watched(self, what: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run it with these arguments; what is wrong about the process is added to ``breaches``."""
        with trio.move_on_after(PATIENCE_S):
            done = await self.execute(*arguments)
            if done.returncode:
                self.breaches.append(f"{what}: {_ended(done.returncode)}")
            else:
                try:
                    parse(done.stdout)
                except (NotXml, IndexError) as error:
                    self.breaches.append(f"{what}: standard output is not one XML document ({error}): {_beginning(done.stdout)}")
            return done
        self.breaches.append(f"{what}: it did not end within {PATIENCE_S:.0f} s")
        raise Wrong(f"{what} did not end within {PATIENCE_S:.0f} s")

    def read(self, what: str, done: subprocess.CompletedProcess[bytes]) -> Element:
        """The answer, as xapi reads it."""
        said = done.stderr.decode(errors="replace")[-2000:]
        if done.returncode:
            raise smapiv1.failed_process(done.returncode, done.stdout.decode(errors="replace"), said)
        return smapiv1.read_answer(done.stdout, said)


def _ended(returncode: int) -> str:
    return f"exit status {returncode}" if returncode > 0 else f"ended by signal {-returncode}"


def _beginning(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))


class Trial:
    """What a point of the checklist works with."""

    def __init__(self, plugin: WatchedPlugin, model: WatchedModel, device_config: dict[str, str]) -> None:
        self.plugin, self.model, self.db = plugin, model, model.db
        self.device_config = device_config
        self.session = model.sessions.login("root", "", "check", is_local=True)
        self.call = model.internal_call()
        self.capabilities: dict[str, int] | None = None  # until sr_get_driver_info has told them
        self.sr = NULL

    @property
    def calls(self) -> list[tuple[str, list[Any]]]:
        """What the plug-in asked of the XenAPI."""
        return self.model.calls

    def can(self, *capabilities: str) -> bool:
        return all(name in (self.capabilities or ()) for name in capabilities)

    # Commands.

    async def xenapi(self, method: str, *arguments: Any) -> Any:
        """Call the XenAPI as a client does."""
        return await self.model.answer(method, [self.session, *arguments], is_local=True)

    async def send(
        self, command: str, args: Sequence[str] = (), vdi: str | None = None, change: Callable[[Members], Members] | None = None,
        **members: Any,
    ) -> Element:  # fmt: skip
        """Send one command about the SR, or about a VDI, as xapi does; ``change`` may alter the members. Returns the value answered."""
        if change is not None:
            self.plugin.changes.append(change)
        try:
            if vdi is None:
                return await sr_command(self.call, self.sr, command, args, device_config=self.device_config, **members)
            return await vdi_command(self.call, vdi, command, args, **members)
        finally:
            self.plugin.changes.clear()

    async def fault(self, command: str, *arguments: Any, **members: Any) -> int:
        """Send a command that has to fail, and return the number of its fault. Raises `Wrong` if it does something else."""
        try:
            await self.send(command, *arguments, **members)
        except (XenError, Unimplemented) as error:
            number = fault_number(error)
            if number is None:
                raise Wrong(f"{command} was to be a fault, and is {error}") from None
            return number
        raise Wrong(f"{command} was to be a fault, and succeeded")

    # Rows.

    def row(self, vdi: str) -> dict[str, Any]:
        """The row of a VDI, as it is now."""
        return dict(self.db.get("VDI", vdi))

    def vdi_called(self, uuid: str, what: str) -> str:
        """The row that ``what`` has answered to be about."""
        try:
            return self.db.by_uuid("VDI", uuid)
        except XenError:
            raise Wrong(f"{what} answers {uuid}, which is not in the database: it must be introduced before") from None

    # Data.

    async def use(self, vdi: str, *commands: str, writable: bool = True) -> None:
        """Attach, run qemu-io's ``commands`` on what the answer names, detach. Raises `Wrong` if the data is not so."""
        text = "true" if writable else "false"
        info = smapiv1.attach_info(await self.send("vdi_attach", [text], vdi))
        try:
            if self.can("VDI_ACTIVATE"):
                smapiv1.unit(await self.send("vdi_activate", [text], vdi))
            await self._qemu_io(info, commands, writable)
        finally:
            if self.can("VDI_DEACTIVATE"):
                smapiv1.unit(await self.send("vdi_deactivate", [], vdi))
            smapiv1.unit(await self.send("vdi_detach", [], vdi))

    async def _qemu_io(self, info: smapiv1.AttachInfo, commands: Sequence[str], writable: bool) -> None:
        match = re.fullmatch(r"nbd:unix:([^:]+):exportname=([^:]*)", info.params_nbd)
        target = f"nbd+unix:///{match[2]}?socket={match[1]}" if match else info.params
        if not target:
            raise Wrong(f"vdi_attach names no data: params_nbd is {info.params_nbd!r}, and there is no params")
        words = [word for command in commands for word in ("-c", command)]
        done = await trio.run_process(
            ["qemu-io", "-f", "raw", *([] if writable else ["-r"]), *words, target],
            stdin=subprocess.DEVNULL, capture_stdout=True, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        said = done.stdout.decode(errors="replace")
        if done.returncode or "failed" in said:
            lines = said.strip().splitlines() or ["qemu-io failed"]
            raise Wrong(f"{'; '.join(commands)}: {next((line for line in lines if 'failed' in line), lines[-1])}")


class ToolMissing(SimsrError):
    """{tool} is not installed, and the check needs it to look at data"""

    hint = "On Debian and Ubuntu: apt-get install qemu-utils"


@asynccontextmanager
async def on_trial(path: str, folder: str, daemon_socket: str) -> AsyncIterator[Trial]:
    """A trial of the plug-in at ``path``. ``folder`` is for the database and the socket of the model of xapi."""
    if not shutil.which("qemu-io"):
        raise ToolMissing(tool="qemu-io")
    plugin = WatchedPlugin(os.path.abspath(path))
    nobody = os.path.join(folder, "no-plugins")
    os.mkdir(nobody)
    model = WatchedModel(Settings(os.path.join(folder, "xapi.db"), nobody))
    model.calls = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, "xapi"))
    listener.listen(64)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(model.run)
        await nursery.start(serve_http, model, [listener], stop)
        try:
            yield Trial(plugin, model, {"socket": daemon_socket, "xapi_socket": listener.getsockname()})
        finally:
            stop.set()
            nursery.cancel_scope.cancel()
    listener.detach()  # the server has closed it

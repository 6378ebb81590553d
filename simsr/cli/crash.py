"""``simsr crash explore``: what a crash in the middle of a load could leave of a disk, and whether a checker is content with it.

A daemon of its own has a disk; the load runs on it while every write and flush is recorded; then each state that a crash could have left is made
as a disk (docs/scenarios.md) and shown to the checker, and deleted again. Store and recording are in one directory: a temporary one, which is
kept if a check fails, or the one that is given, whose recording can be explored again without the load.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Optional

import typer

from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
from simsr.cli.client import Client, Session
from simsr.cli.failures import DaemonAnswer, FileFailure
from simsr.cli.output import complain, print_json, say
from simsr.cli.repositories import Json
from simsr.cli.scenarios import read_scenario
from simsr.cli.transfer import delete_when_free, undisturbed
from simsr.errors import BadRequest, CannotExplore
from simsr.units import format_size, parse_size

__all__ = ["crash_commands"]

crash_commands = typer.Typer(help="Find out what a crash would leave of a disk.", no_args_is_help=True)

NAME = "explored"
LIBRARY = "power-cut"
"""The scenario of the library whose load is taken when a file has none: an ext4 that a kernel mounts."""
FAILED = 1
SHOWN_MAX = 10
OUTPUT_MAX = 4000
CANNOT_RUN = {126, 127}


class Plan(NamedTuple):
    """What to do; commands are for ``sh -c``."""

    source: str
    size_bytes: int
    prepare: str | None
    load: str | None
    recover: str | None
    check: str
    states: int
    seed: int
    sector_bytes: int
    each_write: bool
    in_force: dict[str, Any] | None
    """the scenario whose rules are in force during the load, as the API takes it"""

    @property
    def needs_files(self) -> bool:
        return any("device" in command for command in (self.prepare, self.load, self.recover, self.check) if command)


@crash_commands.callback()
def _group() -> None:
    """Find out what a crash would leave of a disk."""


@crash_commands.command("explore")
def explore(
    context: typer.Context,
    file: Annotated[Optional[str], typer.Argument(metavar="[FILE]", help="A scenario with [explore], or a name of the library.")] = None,
    check: Annotated[Optional[str], typer.Option("--check", metavar="CMD", help="Status 0: the state is good.")] = None,
    workload: Annotated[Optional[str], typer.Option("--workload", metavar="CMD", help="What writes to the disk.")] = None,
    prepare: Annotated[Optional[str], typer.Option("--prepare", metavar="CMD", help="Before it; not explored.")] = None,
    recover: Annotated[Optional[str], typer.Option("--recover", metavar="CMD", help="On each state, before it is checked.")] = None,
    size: Annotated[Optional[str], typer.Option("--size", metavar="SIZE", help="Of the disk; 64MiB if not given.")] = None,
    states: Annotated[Optional[int], typer.Option("--states", metavar="N", help="At most so many; 200 if not given.", min=1, max=100_000)] = None,
    seed: Annotated[Optional[int], typer.Option("--seed", metavar="N", help="Instead of the seed of FILE.", min=0)] = None,
    sector: Annotated[Optional[str], typer.Option("--sector", metavar="SIZE", help="Written whole or not at all; 512 if not given.")] = None,
    each_write: Annotated[bool, typer.Option("--each-write", help="Writes are stable when answered, as tapdisk takes them.")] = False,
    state: Annotated[Optional[str], typer.Option("--state", metavar="STATE", help="Make only this one, check it, and keep it as a VDI.")] = None,
    root: Annotated[Optional[str], typer.Option("--root", metavar="DIR", help="Keep disk and recording; one that is there is explored again.")] = None,
    as_json: Json = False,
) -> None:
    """Run a load on a disk, and a checker on every state that a crash could leave.

    The commands are for sh; {device} is the disk as a file, {uri} over NBD, also in $device and $uri. The checker may write to what it
    gets. The rules of FILE are in force during the load, but for power cuts. Exit status: 0 all states are good, 1 some are not.
    """
    options = {
        "check": check, "load": workload, "prepare": prepare, "recover": recover, "states": states, "seed": seed,
        "size": None if size is None else parse_size(size), "sector": None if sector is None else parse_size(sector),
    }  # fmt: skip
    plan = _plan(file, {key: value for key, value in options.items() if value is not None}, each_write)
    session: Session = context.obj
    with _directory(root) as keeping, _Explorer(keeping.path, plan, session.debug) as explorer:
        result = explorer.one(state) if state is not None else explorer.all(as_json)
        keeping.keep |= bool(result["failed"]) or state is not None
        result["root"] = keeping.path if keeping.keep else None
        print_json(result) if as_json else _print(result, file)
    raise typer.Exit(FAILED if result["failed"] else 0)


def _plan(file: str | None, options: dict[str, Any], each_write: bool) -> Plan:
    """What FILE says, with the options in place of it. Raises `BadScenario`, `BadRequest`, `FileFailure`."""
    nothing = dict.fromkeys(("prepare", "load", "recover"))
    usual: dict[str, Any] = {"seed": 0, "size": 64 << 20, "states": 200, "sector": 512, **nothing, "each_write": False, "in_force": False}
    said, body = options, None
    if file is not None:
        from simsr.daemon.scenario_text import explore_of

        body = read_scenario(file)
        said = explore_of(**body) | options
        if not said.get("load"):
            of_library = explore_of(**read_scenario(LIBRARY))
            usual |= {key: of_library[key] for key in ("size", "sector", "prepare", "load", "recover")}
    said = usual | said
    if not said.get("check"):
        raise BadRequest(what="the exploration", reason="there is no checker: give --check CMD, or FILE with [explore]")
    return Plan(
        file or "the load", said["size"], said["prepare"], said["load"], said["recover"], said["check"], said["states"], said["seed"],
        said["sector"], each_write or said["each_write"], body if said["in_force"] else None,
    )  # fmt: skip


class _Keeping:
    def __init__(self, path: str, keep: bool) -> None:
        self.path, self.keep = path, keep


@contextlib.contextmanager
def _directory(given: str | None) -> Iterator[_Keeping]:
    """Where the store is. What `_Keeping.keep` says in the end happens to it."""
    if given is not None:
        try:
            os.makedirs(given, exist_ok=True)
        except OSError as error:
            raise FileFailure(action="use", path=given, reason=error.strerror or str(error)) from None
        yield _Keeping(os.path.abspath(given), True)
        return
    keeping = _Keeping(short_temporary_directory("simsr-crash-"), False)
    try:
        yield keeping
    finally:
        if not keeping.keep:
            with undisturbed():
                shutil.rmtree(keeping.path, ignore_errors=True)


class _Explorer:
    """``with`` it there is a daemon, and the disk with its recording."""

    def __init__(self, root: str, plan: Plan, debug: bool) -> None:
        self._root, self._plan, self._debug = root, plan, debug
        self._mount = os.path.join(root, "mount")

    def __enter__(self) -> _Explorer:
        with contextlib.ExitStack() as stack:
            daemon = stack.enter_context(ChildDaemon(self._root, show_log=self._debug))
            self._client = Client(daemon.socket)
            stack.callback(self._client.close)
            self._socket = daemon.socket
            self._sr = self._repository()
            if self._plan.needs_files:
                os.makedirs(self._mount, exist_ok=True)
                self._client.post("/v1/mounts", {"path": self._mount, "cache": "direct", "shared": False})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            self._stack.close()

    def _repository(self) -> str:
        found = [sr for sr in self._client.get("/v1/srs") if sr["name"] == NAME]
        return str((found[0] if found else self._client.post("/v1/srs", {"name": NAME}))["uuid"])

    # The recording.

    def _recorded(self) -> dict[str, Any] | None:
        """The log that is there already, if there is one."""
        for vdi in self._client.get("/v1/vdis", sr=self._sr):
            if vdi["name"] == NAME and not vdi["is_a_snapshot"]:
                with contextlib.suppress(DaemonAnswer):
                    return dict(self._client.get(self._client.vdi_path(vdi["uuid"], "crash-log")))
        return None

    def _record(self) -> dict[str, Any]:
        plan, client = self._plan, self._client
        if plan.load is None:
            raise BadRequest(what="the exploration", reason="there is no load: give --workload CMD, or 'load' in [explore]")
        vdi = client.post("/v1/vdis", {"size_bytes": plan.size_bytes, "name": NAME, "sr": self._sr})
        try:
            if plan.prepare is not None:
                self._must("the preparation", plan.prepare, vdi)
            with self._in_force():
                client.post(client.vdi_path(vdi["uuid"], "crash-log"), {"each_write": plan.each_write})
                self._load(plan.load, vdi)
                log = client.post(client.vdi_path(vdi["uuid"], "crash-log", "end"), {})
        except BaseException:
            with undisturbed(), contextlib.suppress(DaemonAnswer):  # so that a directory that was given has no half recording
                client.close()
                delete_when_free(client, vdi["uuid"])
            raise
        return dict(log)

    @contextlib.contextmanager
    def _in_force(self) -> Iterator[None]:
        """With it the rules of the scenario are in force, but for those that end everything."""
        body = self._plan.in_force
        if body is None:
            yield
            return
        self._client.post("/v1/scenario", {**body, "seed": self._plan.seed, "ends": False})
        try:
            yield
        finally:
            with undisturbed(), contextlib.suppress(DaemonAnswer):
                self._client.delete("/v1/scenario")

    def _load(self, command: str, vdi: dict[str, Any]) -> None:
        """Run the load. Where rules are in force it may fail because of them, and what it has written counts."""
        if self._plan.in_force is None:
            return self._must("the load", command, vdi)
        status, output = self._run(command, vdi)
        if status in CANNOT_RUN:
            raise CannotExplore(what=self._plan.source, reason=f"the load cannot be run: {output.strip()}")
        if status:
            complain(f"the load ended with status {status} under the rules: {output.strip() or 'it said nothing'}")

    def _log(self) -> dict[str, Any]:
        log = self._recorded() or self._record()
        if not log["writes"]:
            raise CannotExplore(what=self._plan.source, reason="the load has written nothing", hint="Does it use {device} or {uri}?")
        return log

    # The states.

    def all(self, quiet: bool) -> dict[str, Any]:
        """Check states as the plan says."""
        began, plan = time.monotonic(), self._plan
        log = self._log()
        recorded = time.monotonic()
        if not quiet:
            say(f"{log['writes']} writes ({format_size(log['bytes'])}) and {log['flushes']} flushes are recorded.")
        asked = {"states": plan.states, "seed": plan.seed, "sector_bytes": plan.sector_bytes}
        found = self._client.post(self._client.vdi_path(log["vdi"], "crash-log", "states"), asked)
        failures = []
        for one in found:
            status, output = self._check(log["vdi"], one["state"])
            if status:
                failures.append({**one, "status": status, "output": output})
        return {
            **self._about(log), "states": len(found), "cuts": len({one["cut"] for one in found}), "failed": len(failures), "failures": failures,
            "load_s": recorded - began, "checks_s": time.monotonic() - recorded,
        }  # fmt: skip

    def one(self, state: str) -> dict[str, Any]:
        """Check one state and leave it as a VDI."""
        log = self._recorded()
        if log is None:
            raise CannotExplore(
                what=self._plan.source, reason=f"{self._root} has no recording", hint="--state goes with --root DIR of the exploration that found it."
            )
        status, output = self._check(log["vdi"], state)
        made = self._make(log["vdi"], state)
        failures = [{"state": state, "status": status, "output": output}] if status else []
        return {**self._about(log), "states": 1, "failed": len(failures), "failures": failures, "vdi": made["uuid"], "output": output}

    def _about(self, log: dict[str, Any]) -> dict[str, Any]:
        return {"source": self._plan.source, "seed": self._plan.seed, **{key: log[key] for key in ("each_write", "writes", "flushes", "bytes")}}

    def _make(self, vdi: str, state: str) -> dict[str, Any]:
        return dict(self._client.post(self._client.vdi_path(vdi, "crash-log", "states", state), {}))

    def _check(self, vdi: str, state: str) -> tuple[int, str]:
        made = self._make(vdi, state)
        try:
            status, output = self._run(self._plan.recover, made) if self._plan.recover is not None else (0, "")
            if not status:
                status, output = self._run(self._plan.check, made)
        finally:
            with undisturbed():
                delete_when_free(self._client, made["uuid"])
        if status in CANNOT_RUN:
            raise CannotExplore(what=self._plan.source, reason=f"the checker, or the recovery, cannot be run: {output.strip()}")
        return status, output

    # Commands.

    def _must(self, what: str, command: str, vdi: dict[str, Any]) -> None:
        status, output = self._run(command, vdi)
        if status:
            raise CannotExplore(what=self._plan.source, reason=f"{what} ended with status {status}: {output.strip() or 'it said nothing'}")

    def _run(self, command: str, vdi: dict[str, Any]) -> tuple[int, str]:
        """(exit status as a shell has it, the end of what it said)."""
        device = os.path.join(self._mount, NAME, f"{vdi['uuid']}.raw")
        words = {"device": device, "uri": vdi["nbd_uri"]}
        for key, value in words.items():
            command = command.replace(f"{{{key}}}", shlex.quote(value))
        environment = {**os.environ, **words, "vdi": vdi["uuid"], "SIMSR_SOCKET": self._socket}
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
            output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_MAX))
            said = output.read().decode(errors="replace")
        return (done.returncode if done.returncode >= 0 else 128 - done.returncode), said


def _print(result: dict[str, Any], file: str | None) -> None:
    if "vdi" in result:
        _quote(result["output"])
        say(f"{'The check failed.' if result['failed'] else 'The check was content.'} The state is VDI {result['vdi']} of {result['root']}.")
        return say(f"To look at it: simsrd --root {shlex.quote(result['root'])}")
    say(
        f"{result['states']} states of {result['cuts']} moments, {result['states'] - result['failed']} good, {result['failed']} failed "
        f"({result['checks_s']:.1f} s, seed {result['seed']})."
    )
    for failure in result["failures"][:SHOWN_MAX]:
        complain(f"state {failure['state']} failed with status {failure['status']}")
        _quote(failure["output"], 5)
    if result["failed"] > SHOWN_MAX:
        say(f"and {result['failed'] - SHOWN_MAX} more; --json lists them all")
    if result["failed"]:
        words = ["simsr", "crash", "explore", *([file] if file else ["--check", "CMD"]), "--root", result["root"]]
        say(f"To keep one as a VDI: {shlex.join(words)} --state {result['failures'][0]['state']}")


def _quote(output: str, lines_max: int = 1000) -> None:
    for line in output.strip().splitlines()[-lines_max:]:
        say(f"    {line}")

"""The model of one xapi: a pool with one host, its database, sessions and plug-ins, and how a call is carried out.

Theory. A call runs in a task of the model, not of the connection that it came by: a client that goes away interrupts nothing.
What a call waits for (plug-ins, its turn on an SR) it waits for as a trio task, so any number of calls are under way at once.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import trio

from simsr.xapi import (
    attachment,
    events,
    generic,
    host,
    messages,
    pbd,
    sessions,
    sr,
    tasks,
    vbd,
    vdi,
    vdi_copy,
    vm,
    vm_clone,
    vm_power,
    vm_revert,
    vm_snapshot,
)
from simsr.xapi.database import Database, new_ref
from simsr.xapi.failure import Unimplemented, XenError, internal_error
from simsr.xapi.registry import METHODS, Method, find_method
from simsr.xapi.schema import NULL
from simsr.xapi.sessions import Sessions
from simsr.xapi.storage import Drivers

__all__ = ["Call", "Model", "Settings"]

log = logging.getLogger("simsr.xapi")

HOUSEKEEPING_S = 30.0
FIDELITIES = ("upstream", "fixed")
_MODULES = (events, host, messages, pbd, sessions, sr, tasks, vbd, vdi, vdi_copy, vm, vm_clone, vm_power, vm_revert, vm_snapshot)
"""Importing them has entered their calls in the table; the generic ones come after, because custom calls have precedence."""
generic.install()

HostPlugin = Mapping[str, Callable[[str, dict[str, str]], str]]


@dataclass(frozen=True)
class Settings:
    """What the model is started with. ``fidelity``: VM.revert as xapi has it, or with its gaps filled (vm_revert.py)."""

    database: str
    sm_directory: str
    sm_plugins: str = "*"
    fidelity: str = "upstream"
    user: str = "root"
    password: str | None = None


@dataclass
class Call:
    """One call being carried out. ``task`` is the reference of its task; only calls of Async have a task object behind it."""

    model: Model
    session: str
    task: str
    is_local: bool
    cancellable: bool = True

    @property
    def db(self) -> Database:
        """The database."""
        return self.model.db

    @property
    def host(self) -> str:
        """The one host of the pool."""
        return next(iter(self.db.all("host")))

    def progress(self, part: float) -> None:
        """Show how far the call is."""
        if self.db.has("task", self.task):
            self.db.set("task", self.task, progress=part)

    def not_cancellable(self) -> None:
        """Finish from here on, whoever asks to cancel."""
        self.cancellable = False
        if self.db.has("task", self.task):
            self.db.set("task", self.task, allowed_operations=[])

    def check_cancelled(self) -> None:
        """Raise TASK_CANCELLED if somebody cancelled the task."""
        if self.cancellable and self.db.has("task", self.task) and self.db.get("task", self.task)["status"] == "cancelling":
            raise XenError("TASK_CANCELLED", self.task)

    def for_clearing_up(self) -> Call:
        """Return this call as one that cancelling does not reach: what undoes half of an operation must get through."""
        return replace(self, cancellable=False)

    async def wait_for_change(self) -> None:
        """Return when something in the database has changed, which includes the state of this task."""
        await self.db.wait_for_change()


class Model:
    """Use: ``async with trio.open_nursery() as n: await n.start(model.run)``; then `answer` calls."""

    def __init__(self, settings: Settings) -> None:
        if settings.fidelity not in FIDELITIES:
            raise ValueError(f"fidelity must be one of {FIDELITIES}")
        self.settings = settings
        self.db = Database(settings.database)
        host.bootstrap(self.db)
        self.sessions = Sessions(self.db, settings.user, settings.password)
        self.drivers = Drivers(self)
        self.registrations: dict[str, tuple[list[str], int]] = {}
        self.host_plugins: dict[str, HostPlugin] = {}
        self.attach_locks: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self._nursery: trio.Nursery
        self._calls = 0

    def register_plugin(self, name: str, functions: HostPlugin) -> None:
        """Make host.call_plugin know ``name``. A function gets (session, arguments), runs in a thread and returns a string."""
        self.host_plugins[name] = functions

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask all plug-ins what they can do, then carry out calls until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self.drivers.query_all()
                # Plug-ins ask this server about the VDIs they work on, so it must be answering before the next step.
                task_status.started()
                await attachment.settle(self.internal_call())
                await self._housekeeping()
        finally:
            self.db.close()

    async def _housekeeping(self) -> None:
        while True:
            await trio.sleep(HOUSEKEEPING_S)
            self.sessions.expire()
            self.registrations = {
                session: kept for session, kept in self.registrations.items() if self.db.has("session", session)
            }
            tasks.collect_garbage(self.db)
            await sr.scan_automatically(self.internal_call())

    def internal_call(self) -> Call:
        """Return a call that nobody made, for what the model does by itself."""
        return Call(self, "", new_ref(), is_local=True)

    async def answer(self, name: str, arguments: list[Any], *, is_local: bool = False, subtask_of: str = "") -> Any:
        """Carry out one call of a client and return its value. ``subtask_of``: the task it is part of. Raises `XenError`."""
        self._calls += 1
        found, is_async = find_method(name)
        if not found.needs_session:
            return await self._perform(Call(self, "", new_ref(), is_local), found, found.read(arguments))
        session = self.sessions.check(arguments[0] if arguments else "")
        if found.sm_only and not self.sessions.is_sm(session):
            raise XenError("PERMISSION_DENIED", "")
        values = found.read(arguments[1:])
        if is_async:
            parent = subtask_of if self.db.has("task", subtask_of) else NULL
            task = tasks.start_task(self.db, f"Async.{found.name}", subtask_of=parent)
            self._nursery.start_soon(self._run_task, Call(self, session, task, is_local), found, values)
            return task
        return await self._perform(Call(self, session, new_ref(), is_local), found, values)

    async def _perform(self, call: Call, found: Method, values: list[Any]) -> Any:
        """Run the function and return its value; one that can wait runs in a task of the model."""
        if not inspect.iscoroutinefunction(found.function):
            with _clean_errors():
                return _shown(found.function(call, *values))
        if found.name.startswith("event."):  # waits for as long as its client does
            with _clean_errors():
                return _shown(await found.function(call, *values))
        done = trio.Event()
        values_or_errors: list[Any] = []

        async def run() -> None:
            try:
                values_or_errors.append(await found.function(call, *values))
            except Exception as error:
                values_or_errors.append(error)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if not values_or_errors:
            raise internal_error("xapi is being stopped")
        with _clean_errors():
            if isinstance(values_or_errors[0], Exception):
                raise values_or_errors[0]
            return _shown(values_or_errors[0])

    async def _run_task(self, call: Call, found: Method, values: list[Any]) -> None:
        try:
            call.check_cancelled()
            value = await self._perform(call, found, values)
        except XenError as error:
            tasks.finish_task(self.db, call.task, failure=error.description)
        else:
            tasks.finish_task(self.db, call.task, value=value)

    def statistics(self) -> dict[str, Any]:
        """Return counters."""
        return {
            "calls": self._calls,
            "methods": len(METHODS),
            "sessions": self.sessions.statistics(),
            "database": self.db.statistics(),
        }


def _shown(value: Any) -> Any:
    return "" if value is None else value


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Let a client see nothing but XenAPI errors."""
    try:
        yield
    except XenError:
        raise
    except Unimplemented as error:  # of a command for which xapi has no special meaning of 38
        raise internal_error(f"the plug-in does not implement it: {error}") from None
    except Exception as error:
        log.exception("a call failed in a way that it should not")
        raise internal_error(f"{type(error).__name__}: {error}") from None

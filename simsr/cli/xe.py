"""``simsr xe``: the commands and the output of ``xe``, as far as scripts about disks and snapshots use them.

A command is a word and ``key=value`` arguments; ``--minimal`` prints bare values separated by commas; ``vm-list`` takes
``params=`` and any field as a filter. Names of fields are written with ``-`` for ``_``. Stock xe has no ``vdi-revert``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simsr.cli.output import printable
from simsr.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from simsr.cli.xe_client import XenApi

__all__ = ["xe", "Arguments", "Command", "belongs", "find", "show_value", "XE_CONTEXT"]

DEFAULT_SOCKET = "/var/lib/xcp/xapi"

XE_CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


@dataclass
class Arguments:
    """The words behind the command. Asking for one marks it as used; what is left in the end is a mistake."""

    values: dict[str, str]
    flags: set[str]
    used: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, words: list[str]) -> Arguments:
        """Return the arguments in ``words``: ``key=value``, ``--flag``; ``--key value`` is not xe's way."""
        values, flags = {}, set()
        for word in words:
            key, equals, value = word.partition("=")
            if word.startswith("--"):
                flags.add(word[2:])
            elif equals and key:
                values[key] = value
            else:
                raise BadRequest(what=f"argument {word!r}", reason="it is not of the form key=value")
        return cls(values, flags)

    def get(self, *keys: str) -> str | None:
        """Return the value of the first key that is there."""
        for key in keys:
            if key in self.values:
                self.used.add(key)
                return self.values[key]
        return None

    def need(self, *keys: str) -> str:
        """Return the value of one of the keys, which must be there."""
        value = self.get(*keys)
        if value is None:
            raise BadRequest(what="the command", reason=f"{' or '.join(f'{key}=' for key in keys)} is missing")
        return value

    def truth(self, key: str, default: bool = False) -> bool:
        """Return ``key`` as a truth value."""
        value = self.get(key)
        if value is None:
            return default
        if value not in ("true", "false", "1", "0", "yes", "no"):
            raise BadRequest(what=f"{key}={value}", reason="it must be true or false")
        return value in ("true", "1", "yes")

    def mapping(self, key: str) -> dict[str, str]:
        """Return all of ``key:name=value`` as a dict."""
        found = {name.partition(":")[2]: value for name, value in self.values.items() if name.startswith(f"{key}:")}
        self.used |= {f"{key}:{name}" for name in found}
        return found

    def flag(self, name: str) -> bool:
        """True if ``--name`` was given."""
        self.used.add(name)
        return name in self.flags

    def finish(self) -> None:
        """Raise if something was given that nobody asked for. ``--minimal`` is welcome everywhere, as it is to xe."""
        unknown = sorted((self.values.keys() | self.flags) - self.used - {"minimal"})
        if unknown:
            raise BadRequest(what=f"argument {unknown[0]}", reason="the command does not know it")


class _NoObject(NotFound):
    """no {kind} is called {name!r}"""

    hint = "'simsr xe vm-list', 'vdi-list' and so on list what there is."


Command = Callable[["XenApi", Arguments], list[str]]
"""Returns the lines to print."""


def find(api: XenApi, cls: str, arguments: Arguments, *keys: str) -> str:
    """Return the object that one of the arguments ``keys`` (or ``uuid``) names. ``vm=`` takes a name too, ``uuid=`` does not."""
    named = arguments.need(*keys, "uuid")
    by_name = any(not key.endswith("uuid") for key in keys if key in arguments.values)
    found = list(api(f"{cls}.get_all_records_where", f'field "uuid" = "{_quoted(named)}"'))
    if not found and by_name:
        records = api(f"{cls}.get_all_records_where", f'field "name_label" = "{_quoted(named)}"')
        # A template or a snapshot may have the name of a VM; then the command means what it asks for.
        noun = "template" if "template" in keys else "vm"
        found = [ref for ref, record in records.items() if cls == "VM" and belongs(noun, record)] or list(records)
    if len(found) > 1:
        raise BadRequest(what=named, reason=f"{len(found)} objects of class {cls} are called so; use the uuid")
    if not found:
        raise _NoObject(kind=cls, name=named)
    return str(found[0])


def belongs(noun: str, record: dict[str, Any]) -> bool:
    """True if ``noun-list`` shows the object: snapshots are no templates to xe, and neither of them is a vm."""
    if noun in ("vm", "template"):
        return bool(record["is_a_template"] == (noun == "template") and not record["is_a_snapshot"])
    return noun != "snapshot" or bool(record["is_a_snapshot"])


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def show_value(value: Any) -> str:
    """Return a field's value as xe prints it."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return printable(value)


def xe(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="Such as vm-list; 'help' lists all.")],
    socket: Annotated[
        str, typer.Option("--xapi", envvar="SIMSR_XAPI", metavar="PATH", help="The socket of 'simsr xapi serve'.")
    ] = DEFAULT_SOCKET,
) -> None:
    """Run a command of xe: simsr xe vm-list name-label=web --minimal."""
    # Not before they are needed: other commands of simsr should not wait for these modules.
    from simsr.cli.xe_client import XenApi
    from simsr.cli.xe_commands import COMMANDS, find_command

    if command == "help":
        print("\n".join(sorted(COMMANDS)))
        return
    function = find_command(command)
    arguments = Arguments.parse(context.args)
    with XenApi(socket) as api:
        lines = function(api, arguments)
    for line in lines:
        print(line)

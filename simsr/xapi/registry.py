"""The table of methods: name, typed parameters, function. Custom calls enter it with `method`, generic ones in ``generic.py``.

A function gets the `Call` and its parameters in the forms of ``schema.py``; it may be async. It returns str, int, bool, list,
dict or None for void.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simsr.xapi.failure import XenError
from simsr.xapi.schema import CLASSES, Field, read_fields

__all__ = ["METHODS", "Method", "method", "find_method"]


@dataclass(frozen=True)
class Method:
    """``sm_only``: for the sessions that plug-ins get. ``needs_session``: its first parameter on the wire is a session."""

    name: str
    parameters: tuple[Field, ...]
    function: Callable[..., Any]
    sm_only: bool = False
    needs_session: bool = True

    def read(self, arguments: list[Any]) -> list[Any]:
        """Return the arguments, without the session, in the forms of the model. Raises if there are too few or too many."""
        required = [parameter for parameter in self.parameters if not parameter.has_default]
        if not len(required) <= len(arguments) <= len(self.parameters):
            expected = len(self.parameters) if len(arguments) > len(self.parameters) else len(required)
            raise XenError("MESSAGE_PARAMETER_COUNT_MISMATCH", self.name, str(expected), str(len(arguments)))
        values = [
            parameter.type.read(value, parameter.name) for parameter, value in zip(self.parameters, arguments, strict=False)
        ]
        return values + [parameter.default for parameter in self.parameters[len(values) :]]


METHODS: dict[str, Method] = {}


def method(name: str, parameters: str = "", **options: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated function as ``name``. ``parameters`` is written as the fields in ``fields.py`` are."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        METHODS[name] = Method(name, tuple(read_fields(parameters).values()), function, **options)
        return function

    return enter


def find_method(name: str) -> tuple[Method, bool]:
    """Return the method that a client calls ``name``, and whether it is to run as a task.

    Both ``Class.method`` and ``Class_method`` are understood, the latter also where the class has an underscore itself.
    """
    plain = name
    is_async = name.startswith(("Async.", "Async_"))
    if is_async:
        plain = name[len("Async.") :]
    if plain not in METHODS:
        for cls in sorted([*CLASSES, "event", "login"], key=len, reverse=True):
            if plain.startswith(f"{cls}_") and f"{cls}.{plain[len(cls) + 1 :]}" in METHODS:
                plain = f"{cls}.{plain[len(cls) + 1 :]}"
                break
    found = METHODS.get(plain)
    if found is None or is_async and not found.needs_session:
        raise XenError("MESSAGE_METHOD_UNKNOWN", name[:200])
    return found, is_async

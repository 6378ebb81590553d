"""Types and classes of the XenAPI, read from the table in ``fields.py``.

A value inside the model is str, int, float, bool, `Time`, list or dict of str. `Type.read` makes one from what a client sent;
it is lenient where stock clients are careless (numbers and booleans as text, other spellings of times) and refuses everything
else with FIELD_TYPE_ERROR or VALUE_NOT_SUPPORTED naming the field.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simsr.xapi import fields
from simsr.xapi.failure import XenError

__all__ = ["Time", "Type", "Field", "CLASSES", "NULL", "NO_TIME", "read_fields", "now"]

NULL = "OpaqueRef:NULL"
_TIME = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)T(\d\d):?(\d\d):?(\d\d)(?:\.\d+)?Z?\Z", re.ASCII)
_INT = re.compile(r"\s*([+-]?\d{1,19})\s*\Z", re.ASCII)
_BOOLEANS: dict[Any, bool] = {"true": True, "false": False, "1": True, "0": False, "True": True, "False": False}


class Time(str):
    """A moment, written ``20260821T10:00:00Z``."""


NO_TIME = Time("19700101T00:00:00Z")


def now() -> Time:
    """Return the present moment."""
    return Time(time.strftime("%Y%m%dT%H:%M:%SZ", time.gmtime()))


def _read_string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # JSON can carry lone surrogates, which are no text: UnicodeEncodeError is a ValueError
    return str(value)


def _read_int(value: Any) -> int:
    if isinstance(value, str) and (match := _INT.match(value)) or isinstance(value, float) and value.is_integer():
        value = int(match[1] if isinstance(value, str) else value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return int(value)
    raise TypeError


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError
    return number


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return _BOOLEANS[str(value)]


def _read_time(value: Any) -> Time:
    match = _TIME.match(value)
    if not match:
        raise ValueError
    return Time("{}{}{}T{}:{}:{}Z".format(*match.groups()))


def _read_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError
    return {_read_string(key): _read_string(item) for key, item in value.items()}


def _read_record(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value


_SIMPLE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "string": (_read_string, ""),
    "int": (_read_int, 0),
    "float": (_read_float, 0.0),
    "bool": (_read_bool, False),
    "datetime": (_read_time, NO_TIME),
    "map": (_read_map, {}),
    "record": (_read_record, {}),
}


@dataclass(frozen=True)
class Type:
    """``kind`` is simple (string, int, ...), ref, enum or set; ``of`` the class, the enum or the type of the members."""

    kind: str
    of: str = ""

    @classmethod
    def parse(cls, text: str) -> Type:
        """Return the type that the table calls ``text``."""
        if text in _SIMPLE:
            return cls(text)
        if text == "strings":
            return cls("set", "string")
        name, _, word = text.partition(" ")
        if word == "ref":
            return cls("ref", name)
        if word == "refs":
            return cls("set", f"{name} ref")
        if word == "set":
            return cls("set", name)
        if not word and name in fields.ENUMS:
            return cls("enum", name)
        raise ValueError(f"no type {text!r}")

    @property
    def default(self) -> Any:
        """The value of a field that nobody gave one."""
        if self.kind in _SIMPLE:
            default = _SIMPLE[self.kind][1]
            return {} if default == {} else default
        return {"ref": NULL, "set": [], "enum": fields.ENUMS.get(self.of, " ").split(" ")[0]}[self.kind]

    def read(self, value: Any, what: str) -> Any:
        """Return ``value``, as a client sent it, in the form the model uses. ``what`` names it in the error."""
        try:
            return self._read(value, what)
        except (TypeError, ValueError, KeyError):
            raise XenError("FIELD_TYPE_ERROR", what) from None

    def _read(self, value: Any, what: str) -> Any:
        if self.kind in _SIMPLE:
            return _SIMPLE[self.kind][0](value)
        if self.kind == "ref":
            return _read_string(value) or NULL
        if self.kind == "set":
            if not isinstance(value, list):
                raise TypeError
            member = Type.parse(self.of)
            return list(dict.fromkeys(member._read(item, what) for item in value))
        text = _read_string(value)
        if text not in fields.ENUMS[self.of].split():
            raise XenError("VALUE_NOT_SUPPORTED", what, text[:200], f"it must be one of: {fields.ENUMS[self.of]}")
        return text


@dataclass(frozen=True)
class Field:
    """One field of a class, or one parameter of a method (then without qualifier)."""

    name: str
    type: Type
    qualifier: str
    default: Any
    has_default: bool


_FIELD = re.compile(r"(\w+) ([\w ]+?)(?: (ro|c|rw))?(?: ?=(.*))?\Z")


def read_fields(text: str) -> dict[str, Field]:
    """Return the fields in ``text``, separated by semicolons, by name."""
    found = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        match = _FIELD.match(entry)
        if not match:
            raise ValueError(f"not a field: {entry!r}")
        name, type_name, qualifier, default = match.groups()
        kind = Type.parse(type_name)
        value = kind.default if not default else kind.read(default.strip('"'), name)
        found[name] = Field(name, kind, qualifier or "", value, default is not None)
    return found


CLASSES: dict[str, dict[str, Field]] = {name: read_fields(text) for name, text in fields.CLASSES.items()}

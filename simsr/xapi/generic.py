"""The calls that every class has: get_all, get_record, get_by_uuid, get_<field>, set_<field>, add_to_<field> and so on.

They are made from the table in ``fields.py``. Sessions are different: a reference to one is a secret, so a session can ask
about itself only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from simsr.xapi.checks import allowed
from simsr.xapi.database import Database
from simsr.xapi.failure import XenError
from simsr.xapi.fields import DERIVED, SETTERS, SM_SETTERS
from simsr.xapi.query import compile_query
from simsr.xapi.registry import METHODS, method
from simsr.xapi.schema import CLASSES, Field, Type

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["render", "install"]


def render(db: Database, cls: str, ref: str) -> dict[str, Any]:
    """Return the record of an object as clients see it, with derived fields."""
    return {**db.get(cls, ref), **{name: _field(db, cls, ref, name) for name in _computed(cls)}}


def _computed(cls: str) -> list[str]:
    return [*DERIVED.get(cls, ()), *(["allowed_operations"] if cls in ("VM", "VDI", "SR", "VBD") else [])]


def _field(db: Database, cls: str, ref: str, name: str) -> Any:
    if name in DERIVED.get(cls, ()):
        db.get(cls, ref)
        return db.pointing(cls, name, ref)
    if name == "allowed_operations" and cls in ("VM", "VDI", "SR", "VBD"):
        return allowed(db, cls, ref)
    return db.get(cls, ref)[name]


def _kind(field: Field) -> str:
    """Return how the table would write the type."""
    kind = field.type
    return {"ref": f"{kind.of} ref", "set": "strings", "enum": kind.of}.get(kind.kind, kind.kind)


def install() -> None:
    """Enter the generic calls of all classes. A custom call of the same name has precedence."""
    for cls, fields in CLASSES.items():
        if cls != "session":
            _install_class(cls, fields)
        _enter(f"{cls}.get_record", f"self {cls} ref", partial(_record, cls))
        for name, field in fields.items():
            _install_field(cls, name, field)


def _enter(name: str, parameters: str, function: Callable[..., Any], **options: bool) -> None:
    if name not in METHODS:
        method(name, parameters, **options)(function)


def _install_class(cls: str, fields: dict[str, Field]) -> None:
    def get_all_records(call: Call) -> dict[str, Any]:
        return {ref: render(call.db, cls, ref) for ref in call.db.all(cls)}

    def get_all_records_where(call: Call, expression: str) -> dict[str, Any]:
        matches = compile_query(expression)
        stored = {ref: render(call.db, cls, ref) for ref in call.db.all(cls)}
        return {ref: row for ref, row in stored.items() if matches(row)}

    def get_by_name_label(call: Call, label: str) -> list[str]:
        return [ref for ref, row in call.db.all(cls).items() if row["name_label"] == label]

    _enter(f"{cls}.get_all", "", lambda call: list(call.db.all(cls)))
    _enter(f"{cls}.get_all_records", "", get_all_records)
    _enter(f"{cls}.get_all_records_where", "expr string", get_all_records_where)
    _enter(f"{cls}.get_by_uuid", "uuid string", lambda call, uuid: call.db.by_uuid(cls, uuid))
    if "name_label" in fields:
        _enter(f"{cls}.get_by_name_label", "label string", get_by_name_label)


def _require_own(call: Call, cls: str, ref: str) -> None:
    if cls == "session" and ref != call.session:
        raise XenError("HANDLE_INVALID", cls, ref)


def _record(cls: str, call: Call, ref: str) -> dict[str, Any]:
    _require_own(call, cls, ref)
    return render(call.db, cls, ref)


def _install_field(cls: str, name: str, field: Field) -> None:
    def get_field(call: Call, ref: str) -> Any:
        _require_own(call, cls, ref)
        return _field(call.db, cls, ref, name)

    _enter(f"{cls}.get_{name}", f"self {cls} ref", get_field)
    sm_only = name in SM_SETTERS.get(cls, "").split()
    if field.qualifier == "rw" or sm_only or name in SETTERS.get(cls, "").split():

        def set_field(call: Call, ref: str, value: Any) -> None:
            _require_own(call, cls, ref)
            call.db.set(cls, ref, **{name: value})

        _enter(f"{cls}.set_{name}", f"self {cls} ref; {name} {_kind(field)}", set_field, sm_only=sm_only)
    if field.qualifier == "rw" and field.type.kind == "map":
        _install_map(cls, name)
    if field.qualifier == "rw" and field.type == Type("set", "string"):
        _install_set(cls, name)


def _install_map(cls: str, name: str) -> None:
    def add_to(call: Call, ref: str, key: str, value: str) -> None:
        _require_own(call, cls, ref)
        present = call.db.get(cls, ref)[name]
        if key in present:
            raise XenError("MAP_DUPLICATE_KEY", cls, name, ref, key)
        call.db.set(cls, ref, **{name: {**present, key: value}})

    def remove_from(call: Call, ref: str, key: str) -> None:
        _require_own(call, cls, ref)
        present = call.db.get(cls, ref)[name]
        call.db.set(cls, ref, **{name: {other: value for other, value in present.items() if other != key}})

    _enter(f"{cls}.add_to_{name}", f"self {cls} ref; key string; value string", add_to)
    _enter(f"{cls}.remove_from_{name}", f"self {cls} ref; key string", remove_from)


def _install_set(cls: str, name: str) -> None:
    def add(call: Call, ref: str, value: str) -> None:
        present = call.db.get(cls, ref)[name]
        call.db.set(cls, ref, **{name: list(dict.fromkeys([*present, value]))})

    def remove(call: Call, ref: str, value: str) -> None:
        present = call.db.get(cls, ref)[name]
        call.db.set(cls, ref, **{name: [other for other in present if other != value]})

    _enter(f"{cls}.add_{name}", f"self {cls} ref; value string", add)
    _enter(f"{cls}.remove_{name}", f"self {cls} ref; value string", remove)

"""How people name things: by uuid, by the beginning of a uuid, or by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from simsr.errors import Ambiguous, NotFound

__all__ = ["resolve", "PREFIX_MIN"]

PREFIX_MIN = 4
"""So many characters of a uuid are needed at least, so that a short name is not taken for one."""


class _Named(Protocol):
    uuid: str
    name: str


T = TypeVar("T", bound=_Named)


def resolve(reference: str, kind: str, things: Iterable[T]) -> T:
    """Return the one of ``things`` that ``reference`` means: its uuid, else its name, else the beginning of its uuid.

    A snapshot without a name of its own has that of its disk; the name then means the disk.

    Raises `NotFound`, or `Ambiguous` with the uuids that are meant. O(things).
    """
    wanted = reference.lower()
    named, begun = [], []
    for thing in things:
        if thing.uuid == wanted:
            return thing
        if thing.name == reference:
            named.append(thing)
        if len(wanted) >= PREFIX_MIN and thing.uuid.startswith(wanted):
            begun.append(thing)
    if len(named) > 1:
        named = [thing for thing in named if not getattr(thing, "is_a_snapshot", False)] or named
    found = named or begun
    if not found or not reference:
        raise NotFound(kind=kind, name=reference)
    if len(found) > 1:
        shown = ", ".join(thing.uuid for thing in found[:5]) + (" ..." if len(found) > 5 else "")
        raise Ambiguous(kind=kind, name=reference, candidates=shown)
    return found[0]

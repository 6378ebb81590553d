"""Events: what changed since a moment that the client names.

Theory. The database stamps every row with the generations of its creation and last change and remembers deletions; a token is a
generation. So an event is computed when somebody asks, nothing is queued, and slow clients cost nothing. A client that changed
row is told its state now, once, however often it changed. Sessions never appear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from simsr.xapi.database import Database
from simsr.xapi.failure import XenError
from simsr.xapi.generic import render
from simsr.xapi.registry import method
from simsr.xapi.schema import CLASSES
from simsr.xapi.wire import I4

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["Interest", "changes_since"]

TIMEOUT_MAX_S = 3600.0
_TOKEN = re.compile(r"(\d{20}),(\d{20})\Z", re.ASCII)
_CLASS_NAMES = {cls.lower(): cls for cls in CLASSES if cls != "session"}


@dataclass(frozen=True)
class Interest:
    """What a client wants to hear of: classes, single objects as (class, reference), or everything."""

    everything: bool
    classes: frozenset[str]
    objects: frozenset[tuple[str, str]]

    @classmethod
    def parse(cls, names: list[str]) -> Interest:
        """Return the interest in ``names``: ``*``, class names in any case, ``class/ref``."""
        classes, objects = set(), set()
        for name in names:
            class_name, slash, ref = name.partition("/")
            found = _CLASS_NAMES.get(class_name.lower(), class_name)
            if slash:
                objects.add((found, ref))
            elif name != "*":
                classes.add(found)
        return cls("*" in names, frozenset(classes), frozenset(objects))

    def includes(self, cls: str, ref: str) -> bool:
        """True if an event about this object is wanted."""
        return cls != "session" and (self.everything or cls in self.classes or (cls, ref) in self.objects)


def changes_since(db: Database, since: int, interest: Interest) -> list[dict[str, Any]]:
    """Return the events after generation ``since``, oldest first."""
    found: list[tuple[int, str, str, str, str]] = []
    for (cls, ref), (created, changed) in reversed(db.recent.items()):
        if changed <= since:
            break
        if interest.includes(cls, ref):
            found.append((changed, "add" if created > since else "mod", cls, ref, db.get(cls, ref)["uuid"]))
    for gone in reversed(db.deleted):
        if gone.generation <= since:
            break
        if gone.created <= since and interest.includes(gone.cls, gone.ref):
            found.append((gone.generation, "del", gone.cls, gone.ref, gone.uuid))
    return [_event(db, *entry) for entry in sorted(found)]


def _event(db: Database, generation: int, operation: str, cls: str, ref: str, uuid: str) -> dict[str, Any]:
    event: dict[str, Any] = {
        "id": generation, "timestamp": "0.0", "class": cls.lower(), "operation": operation, "ref": ref, "obj_uuid": uuid,
    }  # fmt: skip
    if operation != "del":
        event["snapshot"] = render(db, cls, ref)
    return event


def _token(generation: int) -> str:
    return f"{generation:020d},{generation:020d}"


def _read_token(db: Database, token: str) -> int:
    if not token:
        return 0
    match = _TOKEN.match(token)
    if not match:
        raise XenError("EVENT_FROM_TOKEN_PARSE_FAILURE", token[:200])
    since = int(match[1])
    if since < db.oldest or since > db.generation:  # older than what is remembered, or of another database
        raise XenError("EVENTS_LOST")
    return since


@method("event.from", "classes strings; token string; timeout float")
async def event_from(call: Call, classes: list[str], token: str, timeout_s: float) -> dict[str, Any]:
    db, interest, since = call.db, Interest.parse(classes), _read_token(call.db, token)
    events = changes_since(db, since, interest)
    with trio.move_on_after(min(max(timeout_s, 0.0), TIMEOUT_MAX_S)):
        while not events and token:
            await db.wait_for_change()
            events = changes_since(db, since, interest)
    counts = {name: I4(db.count(cls)) for name, cls in _CLASS_NAMES.items() if interest.everything or cls in interest.classes}
    return {"events": events, "valid_ref_counts": counts, "token": _token(db.generation)}


@method("event.register", "classes strings")
def register(call: Call, classes: list[str]) -> None:
    previous = call.model.registrations.get(call.session)
    position = previous[1] if previous else call.db.generation
    names = [*(previous[0] if previous else []), *classes]
    call.model.registrations[call.session] = (names, position)


@method("event.unregister", "classes strings")
def unregister(call: Call, classes: list[str]) -> None:
    names, position = call.model.registrations.get(call.session, ([], 0))
    left = [name for name in names if name not in classes]
    if left:
        call.model.registrations[call.session] = (left, position)
    else:
        call.model.registrations.pop(call.session, None)


@method("event.next")
async def next_events(call: Call) -> list[dict[str, Any]]:
    while True:
        if call.session not in call.model.registrations:
            raise XenError("SESSION_NOT_REGISTERED", call.session)
        names, position = call.model.registrations[call.session]
        if position < call.db.oldest:
            call.model.registrations[call.session] = (names, call.db.generation)
            raise XenError("EVENTS_LOST")
        events = changes_since(call.db, position, Interest.parse(names))
        call.model.registrations[call.session] = (names, call.db.generation)
        if events:
            return events
        await call.db.wait_for_change()


@method("event.get_current_id")
def get_current_id(call: Call) -> int:
    return call.db.generation


@method("event.inject", "class string; ref string")
def inject(call: Call, class_name: str, ref: str) -> str:
    cls = _CLASS_NAMES.get(class_name.lower())
    if cls is None:
        raise XenError("VALUE_NOT_SUPPORTED", "class", class_name[:200], "there is no such class")
    call.db.touch(cls, ref)
    return _token(call.db.generation)

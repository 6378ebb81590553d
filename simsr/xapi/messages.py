"""Messages: notes for the administrator, such as that a VM was reverted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simsr.xapi.database import Database
from simsr.xapi.failure import XenError
from simsr.xapi.generic import render
from simsr.xapi.registry import method
from simsr.xapi.schema import Time, now

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["post"]

MESSAGES_KEPT = 1000

_CLASS_OF = {"VM": "VM", "Host": "host", "SR": "SR", "Pool": "pool", "VDI": "VDI"}


def post(db: Database, name: str, priority: int, cls: str, uuid: str, body: str) -> str:
    """Create a message about an object; the oldest one makes room if there are many."""
    with db.transaction():
        ref = db.create("message", name=name, priority=priority, cls=cls, obj_uuid=uuid, timestamp=now(), body=body)
        for oldest in list(db.all("message"))[:-MESSAGES_KEPT]:
            db.delete("message", oldest)
    return ref


@method("message.create", "name string; priority int; cls cls; obj_uuid string; body string")
def create(call: Call, name: str, priority: int, cls: str, obj_uuid: str, body: str) -> str:
    if cls in _CLASS_OF:
        try:
            call.db.by_uuid(_CLASS_OF[cls], obj_uuid)
        except XenError:
            raise XenError("UUID_INVALID", cls, obj_uuid) from None
    return post(call.db, name, priority, cls, obj_uuid, body)


@method("message.destroy", "self message ref")
def destroy(call: Call, message: str) -> None:
    call.db.delete("message", message)


@method("message.get", "cls cls; obj_uuid string; since datetime")
def get(call: Call, cls: str, obj_uuid: str, since: Time) -> dict[str, Any]:
    return {ref: row for ref, row in get_since(call, since).items() if (row["cls"], row["obj_uuid"]) == (cls, obj_uuid)}


@method("message.get_since", "since datetime")
def get_since(call: Call, since: Time) -> dict[str, Any]:
    return {ref: render(call.db, "message", ref) for ref, row in call.db.all("message").items() if row["timestamp"] >= since}

"""Tasks: calls that run in the background, and those that clients make to keep notes in.

A task's ``result`` is the XML-RPC text of the value, because clients cut it out of there with string operations. Cancelling
asks: an operation that waits for its turn stops, one that works finishes.
"""

from __future__ import annotations

import calendar
import logging
import time
from typing import TYPE_CHECKING, Any

from simsr.xapi.database import Database
from simsr.xapi.registry import method
from simsr.xapi.schema import now
from simsr.xapi.wire import xml_value

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["start_task", "finish_task", "collect_garbage"]

log = logging.getLogger("simsr.xapi")
KEPT_S = 24 * 3600


def start_task(db: Database, name: str, description: str = "", **values: Any) -> str:
    """Return a new pending task."""
    host = next(iter(db.all("host")))
    return db.create(
        "task", name_label=name, name_description=description, created=now(), status="pending", resident_on=host,
        allowed_operations=["cancel", "destroy"], type="<none/>", **values,
    )  # fmt: skip


def finish_task(db: Database, task: str, *, value: Any = None, failure: list[str] | None = None) -> None:
    """Record how the task ended. It may have been destroyed meanwhile."""
    if not db.has("task", task):
        return
    ended = {"finished": now(), "progress": 1.0, "allowed_operations": ["destroy"]}
    if failure is None:
        db.set("task", task, status="success", result=xml_value(value) if value not in (None, "") else "", **ended)
    else:
        cancelled = failure[0] == "TASK_CANCELLED"
        db.set("task", task, status="cancelled" if cancelled else "failure", result="", error_info=failure, **ended)


def collect_garbage(db: Database) -> None:
    """Remove the tasks that ended more than a day ago."""
    oldest = time.time() - KEPT_S
    for ref, row in db.all("task").items():
        if row["status"] not in ("pending", "cancelling"):
            if calendar.timegm(time.strptime(row["finished"], "%Y%m%dT%H:%M:%SZ")) < oldest:
                db.delete("task", ref)


@method("task.create", "label string; description string")
def create(call: Call, label: str, description: str) -> str:
    return start_task(call.db, label, description)


@method("task.destroy", "self task ref")
def destroy(call: Call, task: str) -> None:
    call.db.delete("task", task)


@method("task.cancel", "self task ref")
def cancel(call: Call, task: str) -> None:
    row = call.db.get("task", task)
    if row["status"] == "pending" and "cancel" in row["allowed_operations"]:
        call.db.set("task", task, status="cancelling")


@method("task.set_progress", "self task ref; value float")
def set_progress(call: Call, task: str, value: float) -> None:
    call.db.set("task", task, progress=min(max(value, 0.0), 1.0))


@method("task.set_status", "self task ref; value task_status_type")
def set_status(call: Call, task: str, value: str) -> None:
    ended = {"finished": now(), "progress": 1.0} if value in ("success", "failure", "cancelled") else {}
    call.db.set("task", task, status=value, **ended)

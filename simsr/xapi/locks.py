"""Operations under way: recorded in ``current_operations``, waited for, and removed whatever happens.

An operation takes all its places at once or none. While a check says OTHER_OPERATION_IN_PROGRESS it waits for a change of the
database and asks again; any other error is immediate. So two operations on one SR run one after the other, and clients see the
error only if the wait is given up.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from simsr.xapi.checks import sr_error, vbd_error, vdi_error
from simsr.xapi.database import Database
from simsr.xapi.failure import XenError
from simsr.xapi.vm_checks import vm_error

if TYPE_CHECKING:
    from simsr.xapi.model import Call

__all__ = ["operations", "GIVE_UP_S"]

GIVE_UP_S = 2 * 3600.0

_CHECKS: dict[str, Callable[[Database, str, str], XenError | None]] = {
    "SR": sr_error,
    "VDI": vdi_error,
    "VBD": vbd_error,
    "VM": vm_error,
}


@asynccontextmanager
async def operations(call: Call, *places: tuple[str, str, str]) -> AsyncIterator[None]:
    """Hold the operations in ``places``, each (class, reference, operation), checked in this order."""
    db, opref = call.db, call.task
    give_up = trio.current_time() + GIVE_UP_S
    while True:
        call.check_cancelled()
        error = next(filter(None, (_CHECKS[cls](db, ref, operation) for cls, ref, operation in places)), None)
        if error is None:
            break
        if error.xenapi_code != "OTHER_OPERATION_IN_PROGRESS" or trio.current_time() >= give_up:
            raise error
        with trio.move_on_at(give_up):
            await call.wait_for_change()
    with db.transaction():
        for cls, ref, operation in places:
            _record(db, cls, ref, opref, operation)
    try:
        yield
    finally:
        with db.transaction():
            for cls, ref, _ in places:
                _record(db, cls, ref, opref, None)


def _record(db: Database, cls: str, ref: str, opref: str, operation: str | None) -> None:
    if not db.has(cls, ref):
        return  # it was destroyed, which may have been the operation
    under_way = {key: value for key, value in db.get(cls, ref)["current_operations"].items() if key != opref}
    db.set(cls, ref, current_operations=under_way | ({opref: operation} if operation else {}))

"""What is asked of the rule engine, and what it answers: `Request`, `Plan`, `Effect`, `Order`.

A face (NBD, FUSE, the plug-in, the API) builds a `Request`, gets a `Plan` and carries it out, in this order:

1. ``hang``: park the request until an `Order` releases it, or until ``hang.until_ns``.
2. ``delay_ns``: answer no sooner than that after the request came (or was released).
3. ``error``: answer with this errno and do not touch the store; otherwise carry the request out, with ``effects`` through the
   disk's `Overlay`.
4. ``disconnect``: drop the client's connection, behind the error if there is one, else instead of doing and answering anything.

Times are whole nanoseconds of one clock that the caller owns; the engine never looks at any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["DATA_OPS", "CONTROL_OPS", "OPS", "LOGGED_OPS", "STEPS", "WRITE_OPS", "MOVING_OPS", "Request", "Hang", "Effect", "Plan", "GO", "Order"]

DATA_OPS = ("read", "write", "flush", "trim", "zero", "extents", "open", "close")
CONTROL_OPS = ("attach", "detach", "snapshot", "revert", "clone", "delete", "resize", "scan")
OPS = DATA_OPS + CONTROL_OPS
LOGGED_OPS = ("snapshot", "revert", "clone", "delete", "resize")
"""Operations that change the store, so that there is a log record of them."""

STEPS = ("before-log", "after-log", "after-swap", "before-ack")
"""Where ``kill_daemon`` can kill: nothing is done; the change is in the log and in memory, which is one step here, but not yet durable (the
second and third); it is durable and the answer has not left. What is in no log has only the first and the last."""

WRITE_OPS = ("write", "trim", "zero")
MOVING_OPS = ("read", "write")


class Request(NamedTuple):
    """One request to the disk that is asked. ``path``: the storage path it came by, if the client chose one."""

    op: str
    offset: int = 0
    length: int = 0
    fua: bool = False
    path: str = ""
    client: str = ""


class Hang(NamedTuple):
    """Park the request. ``until_ns``: go on then, whatever comes; None: only an `Order` releases it."""

    rule: str
    until_ns: int | None = None
    error: int = 0
    """When ``until_ns`` passes without an order, answer with this errno instead of going on; 0: go on."""


class Effect(NamedTuple):
    """A fault of the data, with every random choice already made. `Overlay` knows the kinds.

    ====================  ============================================================================
    kind                  value
    ====================  ============================================================================
    ``lose``              None, or until when (ns) readers see the old data; a flush is answered and not done
    ``torn``              ((start, end), ...): the parts of the request that were written
    ``flip``              (bit, ...): bits counted from the beginning of the request, lowest of a byte first
    ``misdirect``         the offset in bytes where the data went, or came from
    ``stale``             None
    ``kill_daemon``       the step at which the daemon dies (executed by the control plane, not by the overlay)
    ====================  ============================================================================
    """

    kind: str
    rule: str
    sticks_to: str
    value: Any = None


class Plan(NamedTuple):
    """What becomes of one request. ``rules``: the names of those that fired. ``fault``: the number of SMAPIv1 that goes with the error; 0: what
    fits the errno."""

    delay_ns: int = 0
    error: int = 0
    hang: Hang | None = None
    disconnect: bool = False
    effects: tuple[Effect, ...] = ()
    rules: tuple[str, ...] = ()
    fault: int = 0


GO = Plan()
"""Nothing happens to the request."""


class Order(NamedTuple):
    """Something the engine wants done that is not the fate of one request. `Engine.take_orders` hands them out.

    ``release``: let parked requests of ``rule`` go on (``error``: answer them with that errno instead).
    ``inflight``: ``what`` ("hang", "error") is done to requests of path ``path`` that are under way.
    ``power_cut``, ``power_on``: with the action's own fields. ``event``: ``name`` happened. ``phase``: ``name`` began.
    """

    kind: str
    at_ns: int
    details: dict[str, Any]

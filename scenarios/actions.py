"""What is true of each action: which operations it can happen to, and whether it is a fate of requests or a command.

A *fate* is part of a request's plan. A *command* changes something that lasts (a path, the pool, the power); it is carried
out once, at the beginning of its phase, or at the request that fires it if the rule matches operations or has a trigger.
"""

from __future__ import annotations

from scenarios.request import CONTROL_OPS, DATA_OPS, OPS, WRITE_OPS
from scenarios.schema import Action, Rule, Trigger

__all__ = ["OPS_OF", "COMMANDS", "DATA_FAULTS", "given", "ops_of", "is_standing", "commands_of", "fates_of"]

OPS_OF: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "delay": (OPS, DATA_OPS),
    "error": (OPS, DATA_OPS),
    "fault": (CONTROL_OPS, CONTROL_OPS),
    "hang": (OPS, DATA_OPS),
    "disconnect": (OPS, DATA_OPS),
    "rate": (("read", "write"), ("read", "write")),
    "iops": (DATA_OPS, DATA_OPS),
    "depth": (DATA_OPS, DATA_OPS),
    "readonly": (WRITE_OPS, WRITE_OPS),
    "full": (OPS, ("write", "zero")),
    "torn": (("write",), ("write",)),
    "lose": (("write", "trim", "zero", "flush"), ("write",)),
    "flip": (("read", "write"), ("read",)),
    "misdirect": (("read", "write"), ("write",)),
    "stale": (("read",), ("read",)),
    "drain": (("close", "detach"), ("close", "detach")),
    "kill_daemon": (CONTROL_OPS, CONTROL_OPS),
    "replay": (DATA_OPS, DATA_OPS),
    "power_cut": (OPS, DATA_OPS),
    "power": (OPS, DATA_OPS),
    "path": (OPS, DATA_OPS),
    "release": (OPS, DATA_OPS),
    "grow": (OPS, DATA_OPS),
    "event": (OPS, DATA_OPS),
}
"""Action -> (operations it can happen to, operations it happens to unless ``match.op`` says otherwise)."""

COMMANDS = ("path", "release", "grow", "power_cut", "power", "event")
"""Always commands. ``full`` (now, metadata) and ``replay`` (as a workload) are commands as well."""

DATA_FAULTS = ("torn", "lose", "flip", "misdirect", "stale")
"""Happen to the data, through the overlay."""


def given(action: Action) -> list[str]:
    """The actions that are given, of those that can stand alone."""
    values = {name: getattr(action, name) for name in OPS_OF}
    return [name for name, value in values.items() if value is not None and value is not False]


def commands_of(action: Action) -> list[str]:
    found = [name for name in given(action) if name in COMMANDS]
    if action.full in ("now", "metadata"):
        found.append("full")
    if action.replay is not None and action.replay.as_ == "workload":
        found.append("replay")
    return found


def fates_of(action: Action) -> list[str]:
    commands = commands_of(action)
    return [name for name in given(action) if name not in commands]


def is_standing(rule: Rule) -> bool:
    """Whether the commands of the rule are carried out when its phase begins, not at a request."""
    return not rule.match.op and rule.trigger == Trigger()


def ops_of(rule: Rule) -> tuple[str, ...]:
    """The operations that the rule looks at."""
    if rule.match.op:
        return rule.match.op
    names = fates_of(rule.action) or given(rule.action)
    if rule.trigger.bad_blocks is not None or rule.trigger.bits is not None:
        return ("read",)
    return tuple(op for op in OPS if all(op in OPS_OF[name][1] for name in names))

"""What commands do: they change a path, a pool or the power, raise events, and tell the host what it must do itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from scenarios.rules import LiveRule

if TYPE_CHECKING:
    from scenarios.disk import DiskRules
    from scenarios.engine import Engine

__all__ = ["carry_out", "take_back"]


def carry_out(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    """Carry out the commands of a rule: at request ``number`` of ``disk``, or (0) at the beginning of its phase."""
    for name in rule.commands:
        _COMMANDS[name](engine, rule, now, disk, number)


def take_back(engine: Engine, rule: LiveRule, now: int) -> None:
    """Undo what the commands of a rule have done to paths, pools and power, and let go what hung on it."""
    if "path" in rule.commands:
        for profile, paths in engine.paths.items():
            paths.reset()
            engine.order("release", now, rule=f"path:{profile}", error=0)
    if {"full", "grow"} & set(rule.commands):
        for name, pool in engine.pools.items():
            pool.reset()
            engine.order("release", now, rule=f"pool:{name}", error=0)
    if "power_cut" in rule.commands and engine.is_anything_off:
        engine.power_on()
        engine.order("power_on", now)


def _path(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    action = rule.spec.action
    is_state = action.path in ("down", "up", "flap")
    name = rule.spec.match.path if is_state else action.path
    for profile, paths in engine.paths.items():
        if name not in paths:
            continue
        if action.path == "flap":
            paths.flap(name, action.up, action.down, now)
        else:
            paths.set(name, action.path if is_state else action.state)
        if paths.state(name, now) == "down" and action.inflight != "finish":
            engine.order("inflight", now, path=name, what=action.inflight, rule=f"path:{profile}")
        if paths.route("", now)[0] is not None:
            engine.order("release", now, rule=f"path:{profile}", error=0)


def _release(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    engine.order("release", now, rule=None, error=0)


def _grow(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    for name, pool in engine.pools.items():
        pool.grow(rule.spec.action.grow)
        engine.order("release", now, rule=f"pool:{name}", error=0)


def _full(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    for pool in engine.pools.values():
        if rule.spec.action.full == "now":
            pool.fill()
        else:
            pool.fill_metadata()


def _power_cut(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    spec = rule.spec.action.power_cut
    engine.cut_power(spec.scope, (disk.name,) if disk is not None else rule.spec.match.vdi)
    engine.order(
        "power_cut", now, rule=rule.name, vdi=disk.name if disk else None, number=number, seed=engine.seed, **spec.model_dump()
    )
    engine.raise_event("power-cut", now)


def _power(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    engine.power_on()
    engine.order("power_on", now)


def _event(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    engine.raise_event(rule.spec.action.event, now)


def _replay(engine: Engine, rule: LiveRule, now: int, disk: DiskRules | None, number: int) -> None:
    engine.order("replay", now, rule=rule.name, spec=rule.spec.action.replay, vdi=rule.spec.match.vdi)


_COMMANDS: dict[str, Callable[[Engine, LiveRule, int, DiskRules | None, int], None]] = {
    "path": _path,
    "release": _release,
    "grow": _grow,
    "full": _full,
    "power_cut": _power_cut,
    "power": _power,
    "event": _event,
    "replay": _replay,
}

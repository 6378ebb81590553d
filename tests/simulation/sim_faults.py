"""Scenarios of the simulation: random rules on random disks, for a while."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from simsr.errors import DaemonStopping, ScenarioRunning

if TYPE_CHECKING:
    from sim_world import World

__all__ = ["faults"]

_HARMLESS = (
    '{ delay = "+ exp(mean=2ms)" }', '{ delay = "+ uniform(1ms, 2s)" }', '{ delay = "mix(95%: 0s, 5%: 9s)" }',
    '{ error = "EIO" }', '{ error = "ENOSPC" }', '{ hang = "3s" }', '{ hang = true }', '{ disconnect = true }', '{ error = "EIO", disconnect = true }',
)  # fmt: skip
_DAMAGING = (
    '{ torn = "512B" }', '{ lose = true }', '{ flip = 1 }', '{ misdirect = { by = "4KiB" } }',
)  # fmt: skip
_OPS = ("read", "write", "flush", "zero", "trim", "snapshot", "revert", "clone", "delete", "resize", "open", "close", "extents")


def _rule(rng: random.Random, damaging: bool) -> str:
    action = rng.choice(_DAMAGING if damaging else _HARMLESS)
    if damaging:
        match = 'op = "write"'
    elif "ENOSPC" in action:
        match = 'op = "write"'
    else:
        ops = rng.sample(_OPS, rng.randint(1, 4))
        match = f"op = [{', '.join(repr(op) for op in ops)}]" if rng.random() < 0.7 else ""
    trigger = rng.choice(("p = 0.3", "p = 0.05", "every = 3", "nth = 4", "skip = 5, times = 3"))
    lines = ["[[rule]]", f"trigger = {{ {trigger} }}", f"action = {action}"]
    if match:
        lines.append(f"match = {{ {match} }}")
    return "\n".join(lines)


async def faults(world: World, rng: random.Random) -> None:
    """One scenario after the other."""
    while True:
        await trio.sleep(rng.choice((0.1, 5)) * rng.random())
        damaging = rng.random() < 0.25
        rules = [_rule(rng, damaging and index == 0) for index in range(rng.choice((1, 1, 2, 3)))]
        text = "\n".join(['simsr = 1\nname = "random"', *rules])
        world.tick()
        world.faulty += 1
        world.damaging += damaging
        world.note(f"scenario:\n{text}")
        try:
            await world.host.theatre.start(text, "simulation", None, rng.randrange(1 << 30))
            await trio.sleep(rng.choice((0.5, 20)) * rng.random())
            await world.if_up()
            world.host.theatre.stop()
            world.note("scenario ends")
        except ScenarioRunning:
            pass
        except DaemonStopping:
            if not world.is_down:
                raise
        await world.if_up()
        now = world.tick()
        world.faulty -= 1
        world.damaging -= damaging
        world.faulty_until = now
        if damaging:
            world.damaged_until = now

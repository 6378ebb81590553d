"""Scenarios of the simulation, one after the other: random rules, power cuts behind a volatile cache, daemons that die at a step, and the library's."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
from sim_api import Refused
from sim_machine import Failure

from simsr.daemon.scenario_text import library_text
from simsr.errors import BadScenario, DaemonStopping, ScenarioRunning

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
_OPS = ("read", "write", "flush", "zero", "trim", "snapshot", "revert", "clone", "delete", "resize", "attach", "open", "close", "extents")
_KILLABLE = ("snapshot", "revert", "revert", "clone", "delete", "resize")
_STEPS = ("before-log", "after-log", "after-swap", "before-ack")
_LIBRARY = ("slow-nfs", "san-controller-failover", "pool-full-mid-snapshot", "dying-disk")
_HEAD = 'simsr = 1\nname = "random"'


def _rule(rng: random.Random, damaging: bool, kind: str = "rule") -> str:
    action = rng.choice(_DAMAGING if damaging else _HARMLESS)
    if damaging:
        match = 'op = "write"'
    elif "ENOSPC" in action:
        match = 'op = "write"'
    else:
        ops = rng.sample(_OPS, rng.randint(1, 4))
        match = f"op = [{', '.join(repr(op) for op in ops)}]" if rng.random() < 0.7 else ""
    trigger = rng.choice(("p = 0.3", "p = 0.05", "every = 3", "nth = 4", "skip = 5, times = 3"))
    lines = [f"[[{kind}]]", f"trigger = {{ {trigger} }}", f"action = {action}"]
    if match:
        lines.append(f"match = {{ {match} }}")
    return "\n".join(lines)


def _power_cut(rng: random.Random) -> str:
    """Load, a cut, power again; maybe twice."""
    parts = [_HEAD]
    for _ in range(rng.choice((1, 1, 2))):
        keep = rng.choice(("none", "all", "prefix", "p=0.5", "p=0.9"))
        torn = ', torn = "512B"' if rng.random() < 0.4 else ""
        order = f', order = "{rng.choice(("any", "completion"))}"'
        when = rng.choice(("", f'trigger = {{ after = {{ op = "write", nth = {rng.randint(1, 80)} }} }}\n'))
        if not when:
            parts.append(f'[[phase]]\nfor = "{rng.choice((0.1, 5, 15)) * rng.random() + 0.01:.3f}s"')
        parts.append(f'[[phase]]\n[[phase.rule]]\n{when}action = {{ power_cut = {{ keep = "{keep}"{torn}{order} }} }}')
        if rng.random() < 0.5:
            parts.append(f'[[phase]]\nfor = "{rng.random() * 3 + 0.01:.3f}s"')
        parts.append(f'[[phase]]\nfor = "{rng.choice((0.1, 5)) * rng.random() + 0.01:.3f}s"\n[[phase.rule]]\naction = {{ power = "on" }}')
    return "\n".join(parts)


def _killer(rng: random.Random) -> str:
    op, step = rng.choice(_KILLABLE), rng.choice(_STEPS)
    return f'{_HEAD}\n[[rule]]\nmatch = {{ op = "{op}" }}\ntrigger = {{ nth = {rng.randint(1, 4)} }}\naction = {{ kill_daemon = "{step}" }}'


def _wearing(rng: random.Random) -> str:
    """A disk that fails more and more often, over a day."""
    phases = []
    for share in (0.001, 0.01, 0.05):
        phases.append(f'[[phase]]\nfor = "{rng.choice((5, 60, 400))}m"\n[[phase.rule]]\nmatch = {{ op = ["read", "write", "flush"] }}')
        phases.append(f'trigger = {{ p = {share} }}\naction = {{ delay = "uniform(1s, 5s)", error = "EIO" }}')
    return "\n".join([_HEAD, *phases])


class _Scenario:
    """A text, and what it may do to data. ``lasts_s``: for how long it is in force at most."""

    def __init__(self, rng: random.Random) -> None:
        self.damages = self.cuts = False
        self.lasts_s = rng.choice((0.5, 20)) * rng.random()
        draw = rng.random()
        if draw < 0.2:
            self.text, self.cuts = _power_cut(rng), True
            self.lasts_s = rng.choice((5, 30)) * rng.random()
        elif draw < 0.27:
            self.text = _killer(rng)
            self.lasts_s = 60 * rng.random()
        elif draw < 0.32:
            self.text, self.lasts_s = _wearing(rng), rng.choice((600, 30000)) * rng.random()
        elif draw < 0.39:
            name = rng.choice(_LIBRARY)
            self.text, self.damages = library_text(name), name == "dying-disk"
            self.lasts_s = rng.choice((20, 900)) * rng.random()
        else:
            self.damages = rng.random() < 0.25
            rules = [_rule(rng, self.damages and index == 0) for index in range(rng.choice((1, 1, 2, 3)))]
            self.text = "\n".join([_HEAD, *rules])


async def faults(world: World, rng: random.Random) -> None:
    """One scenario after the other."""
    while True:
        await world.think(rng.choice((0.1, 5)) * rng.random())
        scenario = _Scenario(rng)
        world.note(f"scenario:\n{scenario.text}")
        began = world.scenario_begins(scenario.damages, scenario.cuts)
        try:
            body = {"text": scenario.text, "source": "simulation", "seed": rng.randrange(1 << 30)}
            await world.call("POST", "/v1/scenario", body)
            if scenario.cuts:
                _listen_for_cuts(world)
            await trio.sleep(scenario.lasts_s)
            if rng.random() < 0.2:
                await world.call("POST", "/v1/faults-reset")
                world.damage_ends(scenario.damages)
                scenario.damages = False
                await world.think(rng.choice((0.1, 3)))
            await world.call("DELETE", "/v1/scenario")
            world.note("scenario ends")
        except Refused as error:
            never_fires = error.kind is BadScenario and "can never fire" in str(error)  # for those who are connected just now
            if error.kind is not ScenarioRunning and not never_fires and not (error.kind is DaemonStopping and world.is_down):
                raise Failure(f"a scenario was refused: {error}\n{scenario.text}") from error
        await world.if_up()
        world.scenario_ends(scenario.damages, scenario.cuts, began)


def _listen_for_cuts(world: World) -> None:
    """Have the world know of a cut before anybody can see what it has done."""
    play = world.host.theatre.play
    note = play._note

    def heard(order: object) -> None:
        if order.kind == "power_cut":
            world.power_fails()
        note(order)

    play._note = heard
    if any(line["what"] == "power_cut" for line in play.notes):
        world.power_fails()

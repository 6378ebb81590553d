"""What is wrong with a scenario although every value in it is right: combinations that cannot be, rules that never fire.

`problems` are errors. `client_problems` holds a scenario against one kind of client (`scenarios.clients`): what that
client cannot carry is an error, what does it more harm than the scenario says is a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from scenarios.actions import DATA_FAULTS, OPS_OF, commands_of, fates_of, given, is_standing, ops_of
from scenarios.clients import CLIENTS, NBD_ERRORS
from scenarios.expectations import BadExpectation, Expectation, Names, parse_expectation
from scenarios.quantities import format_duration
from scenarios.request import CONTROL_OPS, DATA_OPS
from scenarios.schema import Action, After, Phase, Rule, Scenario
from scenarios.suggest import did_you_mean

__all__ = ["Problem", "problems", "all_rules", "client_problems", "rule_problems", "expectations", "moment_of", "EVENTS"]

EVENTS = ("pool-low", "pool-full", "pool-metadata-full", "power-cut", "steps-done")
"""Events that the engine raises itself. A rule raises others with ``event = "name"``."""

START = "start"
_RANGED = ("read", "write", "trim", "zero", "extents")


class Problem(NamedTuple):
    """``level``: "error"; "unfinished" is one in a file, but not in a live rule that others may follow; "warning" is none."""

    place: tuple[Any, ...]
    reason: str
    hint: str = ""
    level: str = "error"


def problems(scenario: Scenario) -> list[Problem]:
    """Everything that makes no sense, in the order of the file."""
    found = [problem for place, _, rule in all_rules(scenario) for problem in _rule(scenario, place, rule)]
    found += _names(scenario)
    found += _profiles(scenario)
    found += _phases(scenario)
    found += _expectations(scenario)
    return found


def all_rules(scenario: Scenario) -> Iterator[tuple[tuple[Any, ...], Phase | None, Rule]]:
    """(place, phase or None, rule)."""
    for at, rule in enumerate(scenario.rule):
        yield ("rule", at), None, rule
    for number, phase in enumerate(scenario.phase):
        for at, rule in enumerate(phase.rule):
            yield ("phase", number, "rule", at), phase, rule


def _rule(scenario: Scenario, place: tuple[Any, ...], rule: Rule) -> Iterator[Problem]:
    match_at, trigger_at, action_at = ((*place, part) for part in ("match", "trigger", "action"))
    names = given(rule.action)
    if not names:
        yield Problem(action_at, "nothing happens", f"Give one of: {', '.join(OPS_OF)}.")
        return
    for reason, hint in _match(scenario, rule):
        yield Problem(match_at, reason, hint)
    for reason, hint in _trigger(scenario, rule):
        yield Problem(trigger_at, reason, hint)
    used = {START, *(state for _, _, other in all_rules(scenario) for state in other.trigger.state)}
    if rule.trigger.goto and rule.trigger.goto not in used:
        reason, hint = f"no rule is for state {rule.trigger.goto!r}", _hint(rule.trigger.goto, sorted(used))
        yield Problem(trigger_at, reason, hint, "unfinished")
    for reason, hint in (*_action(rule, names), *_environment(scenario, place, rule)):
        yield Problem(action_at, reason, hint)
    if rule.sticks_to and not any(name in DATA_FAULTS for name in names) and rule.trigger.bad_blocks is None:
        yield Problem(
            (*place, "sticks_to"), "there is no damage that could stick", f"It is for bad_blocks, {', '.join(DATA_FAULTS)}."
        )


_Reasons = Iterator[tuple[str, str]]


def _match(scenario: Scenario, rule: Rule) -> _Reasons:
    match = rule.match
    for op in match.op:
        for name in fates_of(rule.action):
            if op not in OPS_OF[name][0]:
                yield f"{name} cannot happen to {op}", f"It is for {', '.join(OPS_OF[name][0])}."
    if not match.op and not ops_of(rule):
        yield "these actions have no operation in common", "Make a rule of its own of each."
    for key in ("range", "size", "fua"):
        useless = [op for op in match.op if op not in (_RANGED if key != "fua" else ("write", "zero", "trim"))]
        if getattr(match, key) is not None and match.op and len(useless) == len(match.op):
            yield f"the rule can never fire: {', '.join(useless)} has no {key}", f"Leave {key} out."
    if rule.action.replay is not None and rule.action.replay.on == "disk" and not match.vdi and rule.action.replay.as_ == "workload":
        yield "this load would overwrite every disk", 'Name its disks: match = { vdi = ... }, or take on = "scratch".'
    sent = {*CONTROL_OPS, *(op for client in match.client for op in CLIENTS[client].ops)}
    if match.client and not sent & set(ops_of(rule)):
        yield f"the rule can never fire: {' and '.join(match.client)} never send {', '.join(ops_of(rule))}", "Leave client out."
    paths = sorted({path for profile in scenario.profile.values() for path in profile.paths})
    if match.path is not None and match.path not in paths:
        yield (
            f"no profile has a path {match.path!r}",
            _hint(match.path, paths) if paths else 'Give a profile paths = { A = "optimized" }.',
        )


def _trigger(scenario: Scenario, rule: Rule) -> _Reasons:
    trigger = rule.trigger
    if trigger.p == 0:
        yield "the rule can never fire: p is 0", "Take p between 0 and 1, or leave it out."
    if trigger.nth and trigger.every:
        yield "nth and every exclude each other", "nth names single requests, every repeats."
    if trigger.nth and trigger.times and trigger.times >= len(trigger.nth):
        yield "times changes nothing: nth fires no more often", "Leave times out."
    if trigger.bad_blocks is not None and trigger.bits is not None:
        yield "bad_blocks and bits exclude each other", "Make two rules."
    if trigger.bad_blocks in (0, 0.0) or trigger.bits == 0:
        yield "the rule can never fire: no block is ever hit", "Take more than 0."
    if trigger.grows is not None and not isinstance(trigger.bad_blocks, float | int):
        yield "grows is for a share of bad_blocks", "Give bad_blocks as a share such as 2e-5."
    if trigger.bits is None and trigger.per is not None:
        yield "per is for bits", "Leave it out."
    if trigger.block != 4096 and trigger.bad_blocks is None:
        yield "block is for bad_blocks", "Leave it out."
    if (trigger.bad_blocks is not None or trigger.bits is not None) and any(
        op not in ("read", "write") for op in rule.match.op
    ):
        yield "blocks are bad for read and write only", 'Match op = "read".'
    if trigger.after is not None and (trigger.after.event is None) == (not trigger.after.op):
        yield "after needs either op or event", 'Write after = { op = "write", nth = 17 }.'
    for event in filter(None, (trigger.when, trigger.after.event if trigger.after else None)):
        yield from _event(scenario, event)
    yield from _states(scenario, trigger)


def _states(scenario: Scenario, trigger: Any) -> _Reasons:
    reachable = {START, *(rule.trigger.goto for _, _, rule in all_rules(scenario) if rule.trigger.goto)}
    for state in trigger.state:
        if state not in reachable:
            yield f"the rule can never fire: no rule goes to state {state!r}", _hint(state, sorted(reachable))


def _event(scenario: Scenario, event: str) -> _Reasons:
    known = {*EVENTS, *(rule.action.event for _, _, rule in all_rules(scenario) if rule.action.event)}
    if event not in known:
        yield f"nothing raises event:{event}", _hint(event, sorted(known))
    elif event.startswith("pool-") and not any(profile.capacity for profile in scenario.profile.values()):
        yield f"event:{event} never happens without a pool", "Give a profile a capacity."


def _action(rule: Rule, names: list[str]) -> _Reasons:
    action, trigger = rule.action, rule.trigger
    if action.heal_on_write and trigger.bad_blocks is None:
        yield "heal_on_write is for bad_blocks", "Give the trigger bad_blocks; bad_blocks = 1.0 is every block of the range."
    if trigger.bits is not None and names != ["flip"]:
        yield "bits at rest can only be flipped", "Write action = { flip = 1 }."
    if (action.burst or action.iops_size) and not (action.rate or action.iops):
        yield "burst and iops_size are for rate and iops", "Give one of these."
    if action.burst and not action.rate:
        yield "burst is for rate", "Give a rate."
    if action.iops_size and not action.iops:
        yield "iops_size is for iops", "Give iops."
    if action.group and not {"rate", "iops", "depth", "kill_daemon"} & set(names):
        yield "group is for rate, iops, depth and kill_daemon", "Leave it out."
    if len(action.group) > 1 and action.kill_daemon is None:
        yield "a limit has one group", "Name one."
    if action.disconnect and action.hang is not None:
        yield "a request that is cut off cannot hang", "Make two rules."
    if action.error_as and not (action.error or action.readonly or action.full):
        yield "error_as is for error, readonly and full", "Leave it out."
    stops = [name for name in ("error", "readonly", "disconnect") if name in names] + (
        ["full"] if action.full == "writes" else []
    )
    damage = [name for name in DATA_FAULTS if name in names]
    if stops and damage:
        yield f"{damage[0]} cannot happen to a request that ends with {stops[0]}", "Make two rules."
    if len(damage) > 1 and set(damage) != {"torn", "flip"}:
        yield f"{' and '.join(damage)} cannot happen to one request", "Make a rule of its own of each."
    yield from _path_action(rule, action)


def _path_action(rule: Rule, action: Action) -> _Reasons:
    if action.path is None:
        if action.state or action.up or action.down:
            yield "state, up and down are for path", 'Give path = "B", or path = "flap".'
        if action.inflight != "finish":
            yield "inflight is for path", "Leave it out."
    elif action.path in ("down", "up", "flap"):
        if rule.match.path is None:
            yield f"which path goes {action.path}?", 'Name it: match = { path = "A" }.'
        if action.state:
            yield f"path = {action.path!r} is a state already", "Leave state out, or name a path."
    elif not action.state:
        yield f"what becomes of path {action.path!r}?", 'Give state = "optimized", or take path = "down", "up" or "flap".'
    if (action.path == "flap") != bool(action.up and action.down) and (action.path is not None):
        yield "up and down are for flap, and both are needed there", 'Write path = "flap", up = "2s", down = "3s".'


def _environment(scenario: Scenario, place: tuple[Any, ...], rule: Rule) -> _Reasons:
    """Whether what the action needs is there: a phase, a path, a pool."""
    action = rule.action
    paths = sorted({path for profile in scenario.profile.values() for path in profile.paths})
    if action.hang == "until-phase-end" and place[0] == "rule":
        yield "a rule outside the phases has no phase to end", 'Take hang = "until-released", or move it into a phase.'
    if action.path is not None and action.path not in ("down", "up", "flap", *paths):
        yield f"no profile has a path {action.path!r}", _hint(action.path, ["down", "up", "flap", *paths])
    pools = any(profile.capacity for profile in scenario.profile.values())
    if (action.grow or action.full in ("now", "metadata")) and not pools:
        yield "there is no pool", "Give a profile a capacity, or take full = true."
    if is_standing(rule) and action.power_cut is not None and place[0] == "rule":
        hint = "Give the rule a trigger, such as { after = { op = \"write\", nth = 1 } }, or put it into a phase."
        yield "the power would be cut at once, and of what was written before nothing is known that could be lost", hint


def _names(scenario: Scenario) -> Iterator[Problem]:
    counts = Counter(rule.name for _, _, rule in all_rules(scenario))
    for place, _, rule in all_rules(scenario):
        if rule.name and counts[rule.name] > 1:
            yield Problem(
                (*place, "name"), f"{counts[rule.name]} rules are called {rule.name!r}", "Counters need names that differ."
            )


def _profiles(scenario: Scenario) -> Iterator[Problem]:
    shares: dict[str, Any] = {}
    everything = None
    for name, profile in scenario.profile.items():
        place = ("profile", name)
        selected = any(phase.profile == name for phase in scenario.phase)
        if everything and not selected:
            yield Problem(
                place,
                f"never used: profile {everything!r} is for every disk already",
                "Give both a vdi, or name it in a phase.",
            )
        if not profile.vdi and not selected:
            everything = everything or name
        if profile.burst and not profile.rate or profile.iops_size and not profile.iops:
            yield Problem(place, "burst is for rate, and iops_size for iops", "Give these as well.")
        if (profile.low_water or {"when_full", "metadata_full"} & profile.model_fields_set) and not profile.capacity:
            yield Problem(place, "there is no pool", "Give it a capacity.")
        if profile.capacity and (profile.low_water or 0) >= profile.capacity:
            yield Problem((*place, "low_water"), "it is above the capacity", "Take less.")
        if profile.paths and not any(state in ("optimized", "non-optimized") for state in profile.paths.values()):
            yield Problem((*place, "paths"), "no path can be used", 'Make one of them "optimized".')
        if share := profile.share:
            if not (share.bytes or share.iops or share.depth):
                yield Problem((*place, "share"), "there is nothing to share", "Give bytes, iops or depth.")
            if share.burst and not share.bytes or share.iops_size and not share.iops:
                yield Problem((*place, "share"), "burst is for bytes, and iops_size for iops", "Give these as well.")
            if shares.setdefault(share.group, share) != share:
                yield Problem(
                    (*place, "share"), f"group {share.group!r} has other limits elsewhere", "Give it the same everywhere."
                )


def _phases(scenario: Scenario) -> Iterator[Problem]:
    for number, phase in enumerate(scenario.phase):
        place = ("phase", number)
        endless = phase.for_ is None and moment_of(phase) is None
        if endless and number < len(scenario.phase) - 1:
            yield Problem(place, "it never ends, so what follows is never reached", "Give it 'for' or 'until'.")
        if endless and phase.repeat != 1:
            yield Problem((*place, "repeat"), "it never ends, so it is never repeated", "Give it 'for' or 'until'.")
        if phase.for_ == 0:
            yield Problem((*place, "for"), "the rules in it can never fire: it lasts no time", "Take more than 0.")
        if phase.profile is not None and phase.profile not in scenario.profile:
            yield Problem(
                (*place, "profile"), f"there is no profile {phase.profile!r}", _hint(phase.profile, list(scenario.profile))
            )
        if phase.until is not None:
            if (phase.until.event is None) == (not phase.until.op):
                yield Problem(
                    (*place, "until"),
                    "it needs either op or event",
                    'Write until = "event:NAME" or { op = "flush", nth = 40 }.',
                )
            for reason, hint in _event(scenario, phase.until.event) if phase.until.event else ():
                yield Problem((*place, "until"), reason, hint)


def expectations(scenario: Scenario) -> list[Expectation]:
    """What it expects, ready to be evaluated. Raises `BadExpectation`."""
    return [parse_expectation(expect.that, _names_of(scenario)) for expect in scenario.expect]


def _names_of(scenario: Scenario) -> Names:
    rules = [rule for _, _, rule in all_rules(scenario)]
    return Names(
        [phase.name for phase in scenario.phase if phase.name],
        [rule.name for rule in rules if rule.name],
        [*EVENTS, *(rule.action.event for rule in rules if rule.action.event)],
    )


def _expectations(scenario: Scenario) -> Iterator[Problem]:
    names = _names_of(scenario)
    for number, expect in enumerate(scenario.expect):
        try:
            parse_expectation(expect.that, names)
        except BadExpectation as error:
            yield Problem(("expect", number, "that"), f"{expect.that!r}: {error.reason}", error.hint)


def moment_of(phase: Phase) -> After | None:
    """What ends the phase, besides the time. A phase with a power cut ends with it if it says nothing else."""
    if phase.until is not None or phase.for_ is not None:
        return phase.until
    if isinstance(phase.repeat, str):
        return After(event="event:steps-done")
    if any(rule.action.power_cut for rule in phase.rule):
        return After(event="event:power-cut")
    return None


def client_problems(scenario: Scenario, client: str) -> list[Problem]:
    """What is wrong when disks are used by ``client`` (a name of `CLIENTS`)."""
    return [problem for where in all_rules(scenario) for problem in rule_problems(scenario, *where, client)]


def rule_problems(scenario: Scenario, place: tuple[Any, ...], phase: Phase | None, rule: Rule, client: str) -> list[Problem]:
    """What is wrong with one rule for them."""
    if rule.match.client and client not in rule.match.client:
        return []
    found, nature, action_at = [], CLIENTS[client], (*place, "action")
    delivered = rule.action.error_as or scenario.error_as
    errors = [name for name in (rule.action.error, "EPERM" if rule.action.readonly else None) if name]
    errors += ["ENOSPC"] if rule.action.full == "writes" else []
    for error in errors if delivered == "error" and any(op in DATA_OPS for op in ops_of(rule)) else ():
        if nature.errors is not None and error not in nature.errors:
            hint = f"NBD carries {', '.join(sorted(NBD_ERRORS))}; FUSE carries any."
            found.append(Problem(action_at, f"{client} over NBD cannot be told {error}", hint))
        elif nature.dies_of_errors:
            hint = 'Use the FUSE file, or error_as = "hang" or "disconnect".'
            found.append(Problem(action_at, f"the first error costs {client} the disk for good", hint, "warning"))
    ops = [op for op in ops_of(rule) if op in nature.ops or op in CONTROL_OPS]
    if not ops and not (commands_of(rule.action) and is_standing(rule)):
        hint = f"It sends {', '.join(sorted(nature.ops))}."
        found.append(Problem((*place, "match"), f"the rule can never fire: {client} never sends {', '.join(ops_of(rule))}", hint))
    length = rule.action.hang if isinstance(rule.action.hang, int) else phase and phase.for_
    if rule.action.hang is not None and nature.patience_ns and length and length >= nature.patience_ns:
        hint = f"It gives up after {format_duration(nature.patience_ns)}."
        found.append(Problem(action_at, f"{client} does not wait {format_duration(length)}", hint, "warning"))
    return found


def _hint(word: str, words: list[str]) -> str:
    clause = did_you_mean(word, words)
    return clause[0].upper() + clause[1:] + ("" if clause.endswith("?") else ".")

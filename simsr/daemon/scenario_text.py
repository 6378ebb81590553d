"""Scenarios as text: what `simsr scenario check` and `plan` show, without anything in force. Blocks: traces are read."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from scenarios.checks import client_problems, moment_of
from scenarios.clients import CLIENTS
from scenarios.loader import library, library_text, load, without_ends
from scenarios.schema import Phase, Rule, Scenario, json_schema
from simsr.daemon.trace_files import TraceFiles

__all__ = ["check_text", "plan_of", "explore_of", "library_plans", "library_text", "json_schema"]


def check_text(text: str, source: str, directory: str | None) -> dict[str, Any]:
    """Raises `BadScenario`, `BadTrace`. The result is `plan_of` with ``clients``: what each kind of client cannot carry or bear."""
    files = TraceFiles(directory)
    scenario = load(text, source, files.times)
    files.prepare(scenario)
    clients = {
        name: [
            {"level": problem.level, "where": ".".join(map(str, problem.place)), "reason": problem.reason, "hint": problem.hint}
            for problem in client_problems(scenario, name)
        ]
        for name in CLIENTS
    }
    return {**_plan(scenario, text), "clients": clients}


def library_plans() -> list[dict[str, Any]]:
    """`plan_of` for everything in the library."""
    return [plan_of(library_text(name), name, None) for name in library()]


def plan_of(text: str, source: str, directory: str | None) -> dict[str, Any]:
    """The timeline and the rules of a scenario. Raises `BadScenario`, `BadTrace`."""
    return _plan(load(text, source, TraceFiles(directory).times), text)


def explore_of(text: str, source: str, directory: str | None) -> dict[str, Any]:
    """What a scenario says of exploring crash states: name, seed, each_write, whether there is anything to be put in force during the load, and
    what its [explore] says, if there is one. Raises `BadScenario`, `BadTrace`."""
    scenario = load(text, source, TraceFiles(directory).times)
    durabilities = {profile.durability for profile in scenario.profile.values()}
    explore = scenario.explore.model_dump(exclude_unset=True) if scenario.explore is not None else {}
    rest = without_ends(scenario)
    in_force = bool(rest.profile or rest.rule or any(phase.rule for phase in rest.phase))
    return {"name": scenario.name, "seed": scenario.seed, "each_write": durabilities == {"each-write"}, "in_force": in_force, **explore}


def _plan(scenario: Scenario, text: str) -> dict[str, Any]:
    """With the words of the file, which say more to its reader than what they were read as."""
    lines, at_ns, written = [], 0, tomllib.loads(text)
    for phase, words in zip(scenario.phase, written.get("phase", ())):
        lines.append({**_phase(phase, words), "begins_s": None if at_ns is None else at_ns / 1e9})
        known = at_ns is not None and phase.for_ is not None and phase.until is None and isinstance(phase.repeat, int)
        at_ns = at_ns + phase.for_ * phase.repeat if known else None
    return {
        "name": scenario.name,
        "about": scenario.about,
        "seed": scenario.seed,
        "profiles": sorted(scenario.profile),
        "rules": _rules(scenario.rule, written),
        "phases": lines,
        "expect": [expect.that for expect in scenario.expect],
    }


def _phase(phase: Phase, words: dict[str, Any]) -> dict[str, Any]:
    until = phase.until or moment_of(phase)
    return {
        "name": phase.name,
        "for": words.get("for"),
        "until": None if until is None else f"event:{until.event}" if until.event else f"{'/'.join(until.op)} {until.nth}",
        "repeat": phase.repeat,
        "rules": _rules(phase.rule, words),
    }


def _rules(rules: Sequence[Rule], words: dict[str, Any]) -> list[dict[str, Any]]:
    parts = ("match", "trigger", "action")
    return [
        {"name": rule.name, **{part: given.get(part, {}) for part in parts}} for rule, given in zip(rules, words.get("rule", ()))
    ]

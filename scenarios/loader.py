"""Scenario files: TOML text in, a checked `Scenario` out, or `BadScenario` that names the place, the reason and a way out.

Checking is strict: unknown keys, values of the wrong kind, combinations that cannot be and rules that can never fire are
errors. The engine may therefore take for granted that a `Scenario` makes sense. Files are opened by the caller; only the
library, which is part of this package, is read here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from pydantic import ValidationError

from scenarios.checks import Problem, problems
from scenarios.latency_text import Traces
from scenarios.schema import Rule, Scenario
from scenarios.suggest import did_you_mean
from simsr.errors import BadScenario

__all__ = ["load", "load_rule", "library", "library_text", "without_ends"]

_MODEL_ERRORS = {
    "missing": "this is required",
    "tuple_type": "must be a list of tables: write [[...]] with two brackets",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def load(text: str, source: str = "text", traces: Traces | None = None) -> Scenario:
    """Read a scenario. ``traces`` opens the files that ``trace("...")`` names. Raises `BadScenario`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).rpartition(" (at ")
        raise BadScenario(source=source, where=place.rstrip(")") or "the end", reason=f"not TOML: {reason}") from None
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, lists in lists in lists
        raise BadScenario(source=source, where="its text", reason=f"cannot be read: {error}") from None
    try:
        scenario = name_all(Scenario.model_validate(_with_bases(data, source, text), context={"traces": traces}))
    except ValidationError as error:
        raise _bad(source, text, data, [_problem(line) for line in error.errors()]) from None
    if found := problems(scenario):
        raise _bad(source, text, data, found)
    return scenario


def load_rule(data: Mapping[str, Any], name: str, traces: Traces | None = None, scenario: Scenario | None = None) -> Rule:
    """One rule, as a live command brings it, for a daemon that runs ``scenario``. Raises `BadScenario`."""
    around = scenario or Scenario(simsr=1, name="live")
    try:
        rule = Rule.model_validate(data, context={"traces": traces})
    except ValidationError as error:
        raise _bad("of the live rules", "", data, [_problem(line) for line in error.errors()]) from None
    rule = rule.model_copy(update={"name": rule.name or name})
    at = len(around.rule)
    whole = around.model_copy(update={"rule": (*around.rule, rule)})
    if found := [problem for problem in problems(whole) if problem.place[:2] == ("rule", at) and problem.level == "error"]:
        raise _bad("of the live rules", "", data, [problem._replace(place=problem.place[2:]) for problem in found])
    return rule


def library() -> list[str]:
    """The names of the scenarios that come with simsr."""
    files = resources.files("scenarios").joinpath("library").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def library_text(name: str) -> str:
    """The text of one of them. Raises `BadScenario`."""
    known = library()
    if name not in known:
        raise BadScenario(
            source=repr(name), where="its name", reason="it is not in the library", hint=_sentence(did_you_mean(name, known))
        )
    return resources.files("scenarios").joinpath("library", f"{name}.toml").read_text()


def name_all(scenario: Scenario) -> Scenario:
    """Give names to phases and rules that have none: counters and logs need them."""
    rules = tuple(_named(rule, f"rule-{number}") for number, rule in enumerate(scenario.rule, 1))
    phases = []
    for number, phase in enumerate(scenario.phase, 1):
        name = phase.name or f"phase-{number}"
        inner = tuple(_named(rule, f"{name}/rule-{count}") for count, rule in enumerate(phase.rule, 1))
        phases.append(phase.model_copy(update={"name": name, "rule": inner}))
    return scenario.model_copy(update={"rule": rules, "phase": tuple(phases)})


def without_ends(scenario: Scenario) -> Scenario:
    """The scenario without what would end a load that is recorded: power cuts and kills of the daemon."""

    def kept(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(rule for rule in rules if not (rule.action.power_cut or rule.action.power or rule.action.kill_daemon))

    phases = tuple(phase.model_copy(update={"rule": kept(phase.rule)}) for phase in scenario.phase)
    return scenario.model_copy(update={"rule": kept(scenario.rule), "phase": phases})


def _named(rule: Rule, name: str) -> Rule:
    return rule.model_copy(update={"name": rule.name or name})


def _with_bases(data: dict[str, Any], source: str, text: str) -> dict[str, Any]:
    """Put what a profile says on top of the library's profile that it names as its base."""
    profiles = data.get("profile")
    if not isinstance(profiles, dict):
        return data
    merged = dict(profiles)
    for name, profile in profiles.items():
        base = profile.get("base") if isinstance(profile, dict) else None
        if base is None:
            continue
        if not isinstance(base, str) or base not in library():
            hint = _sentence(did_you_mean(str(base), library()))
            raise _bad(
                source, text, data, [Problem(("profile", name, "base"), f"no profile of the library is called {base!r}", hint)]
            )
        below = tomllib.loads(library_text(base)).get("profile", {})
        merged[name] = _merge(next(iter(below.values())), profile)
    return {**data, "profile": merged}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _problem(error: Any) -> Problem:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return Problem(error["loc"], str(context["error"]))
    if kind == "unknown_key":
        return Problem(error["loc"], error["msg"], context["hint"])
    if kind == "literal_error":
        return Problem(error["loc"], f"{error['input']!r} is not {context['expected']}")
    if kind in _MODEL_ERRORS:
        return Problem(error["loc"], _MODEL_ERRORS[kind])
    return Problem(error["loc"], f"{error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}")


def _bad(source: str, text: str, data: Any, found: list[Problem]) -> BadScenario:
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    error = BadScenario(source=source, where=_where(first.place, text, data), reason=first.reason + more, hint=first.hint)
    error.details["problems"] = [
        {"where": _where(problem.place, text, data), "reason": problem.reason, "hint": problem.hint} for problem in found
    ]
    return error


def _where(place: tuple[Any, ...], text: str, data: Any) -> str:
    """``phase 2 (A dies), rule 1, action.delay, line 17``."""
    parts: list[str] = []
    for step in place:
        below = data[step] if isinstance(data, list | dict) and _has(data, step) else None
        if isinstance(step, int):
            name = below.get("name") if isinstance(below, dict) else None
            parts[-1:] = [f"{parts[-1]} {step + 1}" + (f" ({name})" if isinstance(name, str) else "")]
        else:
            parts.append(str(step))
        data = below
    tables = [part for part in parts if " " in part]
    keys = ".".join(part for part in parts if " " not in part)
    line = line_of(text, place)
    return ", ".join([*tables, *([keys] if keys else []), *([f"line {line}"] if line else [])]) or "the top"


def _has(data: Any, step: Any) -> bool:
    return step in data if isinstance(data, dict) else isinstance(step, int) and step < len(data)


_HEADER = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?")


def line_of(text: str, place: tuple[Any, ...]) -> int | None:
    """The line of a key, as well as it can be told without a parser that keeps lines: headers are counted, keys looked for."""
    lines = text.splitlines()
    counts: dict[tuple[str, ...], int] = {}
    best = found = None
    current: tuple[Any, ...] = ()
    for number, line in enumerate(lines, 1):
        header = _HEADER.fullmatch(line)
        if header:
            names = tuple(name.strip().strip("\"'") for name in header[1].split("."))
            if line.lstrip().startswith("[["):
                counts[names] = counts.get(names, -1) + 1
                for longer in [known for known in counts if len(known) > len(names) and known[: len(names)] == names]:
                    del counts[longer]
            current = tuple(step for at, name in enumerate(names, 1) for step in (name, *_index(counts, names[:at])))
            if current and place[: len(current)] == current:
                best = number
        elif place[: len(current)] == current and (rest := [step for step in place[len(current) :] if isinstance(step, str)]):
            key = line.partition("=")[0].strip().strip("\"'")
            if key and (key == rest[0] or key == ".".join(rest[:2])):
                found = number
    return found or best


def _index(counts: dict[tuple[str, ...], int], names: tuple[str, ...]) -> tuple[int, ...]:
    return (counts[names],) if names in counts else ()


def _sentence(clause: str) -> str:
    return clause[0].upper() + clause[1:] + ("" if clause.endswith("?") else ".")

"""Whether rules fit the disks and clients that are there now: what `scenarios.checks` cannot know from a file alone.

What no client in use can be told is an error. What only some cannot, what does them more harm than the scenario says, and rules for disks
that are not there (they may come later) are warnings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scenarios.actions import commands_of, is_standing, ops_of
from scenarios.checks import all_rules, rule_problems
from scenarios.request import DATA_OPS
from scenarios.rules import matches_name
from scenarios.schema import Phase, Rule, Scenario
from simsr.errors import BadScenario
from simsr.sr.vdi import Vdi

__all__ = ["check_fit", "check_rules"]

Clients = Mapping[str, set[str]]
"""uuid of a VDI -> the kinds of clients that have it attached."""


def check_rules(scenario: Scenario, vdis: Iterable[Vdi], clients: Clients, source: str) -> list[str]:
    """Warnings about all rules of a scenario. Raises `BadScenario`."""
    there = list(vdis)
    return [warning for place, phase, rule in all_rules(scenario) for warning in check_fit(scenario, phase, rule, there, clients, source)]


def check_fit(scenario: Scenario, phase: Phase | None, rule: Rule, vdis: Iterable[Vdi], clients: Clients, source: str) -> list[str]:
    """Warnings about one rule. Raises `BadScenario`."""
    meant = [vdi for vdi in vdis if not rule.match.vdi or matches_name(rule.match.vdi, (vdi.uuid, vdi.name))]
    who = f"rule {rule.name!r}"
    if rule.match.vdi and not meant:
        return [f"{who}: no disk is called {' or '.join(rule.match.vdi)} now"]
    if commands_of(rule.action) and is_standing(rule):
        return []
    warnings = []
    if rule.match.range is not None and meant:
        begins = [rule.match.range.bytes_of(vdi.size_bytes)[0] for vdi in meant]
        if all(begin >= vdi.size_bytes for begin, vdi in zip(begins, meant)):
            warnings.append(f"{who}: its range begins behind the end of every disk that there is now")
    kinds = set().union(*(clients.get(vdi.uuid, set()) for vdi in meant))
    if rule.match.client:
        kinds &= set(rule.match.client)
    if not kinds or not set(ops_of(rule)) & set(DATA_OPS):
        return warnings
    found = {kind: rule_problems(scenario, (), phase, rule, kind) for kind in sorted(kinds)}
    errors = [next((one for one in problems if one.level == "error"), None) for problems in found.values()]
    if (first := errors[0]) is not None and all(errors):
        raise BadScenario(source=source, where=who, reason=f"{first.reason}, and nobody else has its disks attached", hint=first.hint)
    return warnings + [f"{who}: {one.reason}. {one.hint}" for problems in found.values() for one in problems]

"""The rule engine: a scenario in force over any number of disks. Sans-I/O: time and requests come in, plans and orders go out.

A face asks ``engine.disk(...)`` once for each disk and then ``disk.decide(request, now)`` for each request, as long as
``disk.applies``. Whoever owns the clock calls ``advance(now)`` at ``next_change_ns`` (a request that comes later does it as
well) and empties ``take_orders()`` after every call. Live commands change the rules: when the call returns they are in force, and
the number it returns is that of the last request decided before.

There is no clock and no generator of random numbers in here; the same calls give the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from scenarios.actions import given
from scenarios.commands import carry_out, take_back
from scenarios.decisions import Decision, DecisionLog, read_decisions
from scenarios.disk import DiskRules
from scenarios.limits import Limit
from scenarios.paths import Paths
from scenarios.pool import Pool
from scenarios.request import Order
from scenarios.rules import BoundRule, Hit, LiveRule, Moment, matches_name
from scenarios.schema import Profile, Rule, Scenario
from scenarios.timeline import Timeline
from simsr.errors import BadRequest, NotFound

__all__ = ["Engine"]

ReplayOpener = Callable[[Rule, DiskRules], Any]


class Engine:
    """``replays`` gives the service times for a rule with ``replay`` as latency: an object with ``next(op, length, depth)``.

    ``decisions``: lines of a decision log to run again.
    """

    def __init__(
        self,
        scenario: Scenario,
        now: int = 0,
        seed: int | None = None,
        replays: ReplayOpener | None = None,
        decisions: Iterable[str] | None = None,
    ) -> None:
        self.scenario = scenario
        self.seed = scenario.seed if seed is None else seed
        self.began_ns = now
        self.decided = 0
        self.happened: set[str] = set()
        self.decisions = DecisionLog()
        self.replays_decisions = decisions is not None
        self._recorded = read_decisions(decisions) if decisions is not None else {}
        self._replays = replays
        self._replay_times: dict[tuple[LiveRule, str], Any] = {}
        self._disks: dict[str, DiskRules] = {}
        self._orders: list[Order] = []
        self._limits: dict[tuple[Hashable, ...], Limit] = {}
        self._off: list[tuple[str, tuple[str, ...]]] = []  # (scope, names of disks) without power
        self.paths = {name: Paths(profile.paths) for name, profile in scenario.profile.items() if profile.paths}
        self.pools = {name: self._pool(name, profile) for name, profile in scenario.profile.items() if profile.capacity}
        self._always = [LiveRule(rule, now) for rule in scenario.rule]
        self._phase_rules: list[LiveRule] = []
        self._past_hits: dict[str, tuple[int, int]] = {}
        self._profiles_use_depth = any(_uses_depth(profile) for profile in scenario.profile.values())
        self.counts_depth = False
        self.now = now
        self._timeline = Timeline(scenario.phase, now)
        self._begin(self._always, now)
        self._enter_phase(now)
        self.settle()

    # Disks

    def disk(
        self, name: str, size_bytes: int, names: Iterable[str] = (), key: str | None = None, groups: Iterable[str] = ()
    ) -> DiskRules:
        """The disk called ``name``, made if it is new. ``names``: what rules may call it as well; ``key``: see `DiskRules`."""
        disk = self._disks.get(name)
        if disk is None:
            disk = self._disks[name] = DiskRules(self, name, size_bytes, tuple(names), key or name, tuple(groups))
            self._rebuild([disk])
        return disk

    def forget(self, name: str) -> None:
        """The disk is gone."""
        self._disks.pop(name, None)

    # Time

    @property
    def next_change_ns(self) -> int:
        return self._timeline.ends_ns

    @property
    def phase(self) -> str | None:
        return self._timeline.phase.name if self._timeline.phase else None

    @property
    def is_over(self) -> bool:
        """Whether the last phase has ended."""
        return bool(self.scenario.phase) and self._timeline.phase is None

    def advance(self, now: int) -> None:
        """Go through all phases that end by ``now``."""
        self.now = max(self.now, now)
        self.settle()

    @property
    def has_orders(self) -> bool:
        """Whether `take_orders` would give any. Cheap enough to look at after every request."""
        return bool(self._orders)

    def take_orders(self) -> list[Order]:
        """What is to be done besides the plans, in order. They are handed out once."""
        orders, self._orders = self._orders, []
        return orders

    def order(self, kind: str, at_ns: int, **details: Any) -> None:
        self._orders.append(Order(kind, at_ns, details))

    def event(self, name: str, now: int) -> None:
        """Something happened that rules and phases may wait for; whoever sees it from outside says so here."""
        self.advance(now)
        self.raise_event(name, now)
        self.settle()

    def raise_event(self, name: str, now: int) -> None:
        self.happened.add(name)
        self.order("event", now, name=name)
        moment = self._timeline.moment
        if moment is not None and moment.spec.event == name and moment.reached_ns is None:
            moment.reached_ns = now

    def settle(self) -> None:
        """Leave every phase that has ended."""
        while True:
            timeline = self._timeline
            if timeline.moment is not None and timeline.moment.reached_ns is not None:
                self._next_phase(timeline.moment.reached_ns)
            elif timeline.ends_ns <= self.now:
                self._next_phase(timeline.ends_ns)
            else:
                return

    def _next_phase(self, at_ns: int) -> None:
        for rule in self._phase_rules:
            self._end(rule, at_ns)
        self._timeline.next(at_ns)
        self._enter_phase(at_ns)

    def _enter_phase(self, now: int) -> None:
        phase = self._timeline.phase
        self._phase_rules = [LiveRule(rule, now, phase.name) for rule in phase.rule] if phase else []
        if phase is not None:
            self.order("phase", now, name=phase.name)
        elif self.scenario.phase:
            self.order("over", now)
        self._rebuild(self._disks.values())
        self._begin(self._phase_rules, now)

    def _begin(self, rules: list[LiveRule], now: int) -> None:
        """Carry out what happens when rules come into force."""
        for rule in rules:
            if rule.is_standing and rule.commands:
                rule.hits += 1
                self.decisions.add(Decision(now, rule.name, "", "", 0, None, (), "+".join(rule.commands)))
                self.command(rule, now)

    def _end(self, rule: LiveRule, now: int) -> None:
        matched, hits = self._past_hits.get(rule.name, (0, 0))
        self._past_hits[rule.name] = matched + rule.matched, hits + rule.hits
        if self.hangs(rule.spec):
            self.order("release", now, rule=rule.name, error=0)
        if "replay" in rule.commands:
            self.order("replay_stop", now, rule=rule.name)
        self._limits = {who: limit for who, limit in self._limits.items() if who[0] is not rule}
        self._replay_times = {who: times for who, times in self._replay_times.items() if who[0] is not rule}

    # Rules

    @property
    def live_rules(self) -> list[LiveRule]:
        return self._always + self._phase_rules

    def add_rule(self, rule: Rule, now: int) -> int:
        """Put one more rule in force (`loader.load_rule`)."""
        if not rule.name or rule.name in self._names():
            raise BadRequest(what=f"rule {rule.name!r}", reason="another rule has that name" if rule.name else "it has no name")
        self.advance(now)
        live = LiveRule(rule, now)
        self._always.append(live)
        self._rebuild(self._disks.values())
        self._begin([live], now)
        self.settle()
        return self.decided

    def remove_rule(self, name: str, now: int) -> int:
        """Take a rule out of force, release what it has hanging, and undo what its commands did to paths, pools and power."""
        self.advance(now)
        live = next((rule for rule in self.live_rules if rule.name == name), None)
        if live is None:
            raise NotFound(kind="rule in force", name=name)
        self._always = [rule for rule in self._always if rule is not live]
        self._phase_rules = [rule for rule in self._phase_rules if rule is not live]
        self._end(live, now)
        take_back(self, live, now)
        self._rebuild(self._disks.values())
        return self.decided

    def reset(self, now: int) -> int:
        """Take every rule out of force, end the phases, heal all damage, release what hangs. Profiles stay: they are the disks."""
        for rule in self.live_rules:
            self._end(rule, now)
        self._always, self._phase_rules = [], []
        self._timeline = Timeline((), now)
        for thing in (*self.paths.values(), *self.pools.values()):
            thing.reset()
        if self._off:
            self.order("power_on", now)
        self.power_on()
        for disk in self._disks.values():
            disk.overlay.heal(now)
        self.order("release", now, rule=None, error=0)
        return self.decided

    def dead_man(self, now: int) -> int:
        """Who controls the scenario is gone: end what makes requests hang, unless a rule persists, and release them."""
        for rule in [rule for rule in self.live_rules if not rule.spec.persist]:
            if self.hangs(rule.spec) or {"path", "power_cut"} & set(rule.commands):
                self.remove_rule(rule.name, now)
        return self.decided

    def hangs(self, rule: Rule) -> bool:
        """Whether requests may hang because of it."""
        return rule.action.hang is not None or (rule.action.error_as or self.scenario.error_as) == "hang"

    def _names(self) -> set[str]:
        return {rule.name or "" for phase in self.scenario.phase for rule in phase.rule} | {
            rule.name for rule in self.live_rules
        }

    def _rebuild(self, disks: Iterable[DiskRules]) -> None:
        self.counts_depth = self._profiles_use_depth or any(rule.uses_depth for rule in self.live_rules)
        for disk in disks:
            before = disk.applies
            disk.rebuild()
            if disk.applies != before:
                self.order("applies", self.now, vdi=disk.name, applies=disk.applies)

    # What disks ask for

    def profile_name(self, disk: DiskRules) -> str | None:
        """The profile that the phase names, else the first that is for this disk."""
        phase = self._timeline.phase
        if phase is not None and phase.profile is not None:
            return phase.profile
        selected = {phase.profile for phase in self.scenario.phase}
        for name, profile in self.scenario.profile.items():
            if matches_name(profile.vdi, disk.names) if profile.vdi else name not in selected:
                return name
        return None

    def profile_of(self, disk: DiskRules) -> Profile | None:
        return self.scenario.profile.get(self.profile_name(disk) or "")

    def paths_of(self, disk: DiskRules) -> Paths | None:
        return self.paths.get(self.profile_name(disk) or "")

    def pool_of(self, disk: DiskRules) -> Pool | None:
        return self.pools.get(self.profile_name(disk) or "")

    def moments_of(self, op: str) -> list[Moment]:
        """The moments that requests of ``op`` bring nearer, and those that a command of one may end."""
        moments = [rule.moment for rule in self.live_rules if rule.moment is not None]
        if self._timeline.moment is not None:
            moments.append(self._timeline.moment)
        return [moment for moment in moments if op in moment.spec.op]

    def limit_of(self, who: tuple[Hashable, ...], make: Callable[[], Limit]) -> Limit:
        """The limit of that name; made if it is new, so that all who share it have the same."""
        if who not in self._limits:
            self._limits[who] = make()
        return self._limits[who]

    def replay_of(self, rule: LiveRule, disk: DiskRules) -> Any:
        """The service times that a rule replays, one stream for each disk."""
        if self._replays is None:
            raise BadRequest(what=f"rule {rule.name!r}", reason="traces cannot be replayed here")
        key = rule, disk.name
        if key not in self._replay_times:
            self._replay_times[key] = self._replays(rule.spec, disk)
        return self._replay_times[key]

    def is_off(self, disk: DiskRules) -> bool:
        """Whether the disk is without power."""
        return bool(self._off) and any(
            scope == "host" or scope == "disk" and matches_name(names, disk.names) or scope.removeprefix("group:") in disk.groups
            for scope, names in self._off
        )

    @property
    def is_anything_off(self) -> bool:
        return bool(self._off)

    def cut_power(self, scope: str, disks: tuple[str, ...]) -> None:
        """``disks``: those of scope "disk"; none: every one."""
        self._off.append((scope, disks) if disks or scope != "disk" else ("host", ()))
        self._rebuild(self._disks.values())

    def power_on(self) -> None:
        self._off.clear()
        self._rebuild(self._disks.values())

    def command(self, rule: LiveRule, now: int, disk: DiskRules | None = None, number: int = 0) -> None:
        """Carry out the commands of a rule."""
        carry_out(self, rule, now, disk, number)

    def log(self, rule: LiveRule, disk: DiskRules, op: str, number: int, now: int, hit: Hit) -> None:
        self.decisions.add(
            Decision(now, rule.name, disk.key, op, number, hit.u, hit.places, "+".join(rule.fates + rule.commands))
        )

    def replayed_hit(self, rule: BoundRule, number: int) -> Hit | None:
        """What the log that is run again says."""
        hit = self._recorded.get((rule.rule.name, rule.disk_key, rule.op, number))
        rule.rule.hits += hit is not None
        return hit

    def _pool(self, name: str, profile: Profile) -> Pool:
        when_full = profile.when_full
        return Pool(
            name,
            profile.capacity,
            lambda event: self.raise_event(event, self.now),
            profile.low_water or 0,
            when_full.mode == "queue",
            when_full.timeout,
            when_full.then,
            profile.metadata_full.needs_check,
        )

    def statistics(self) -> dict[str, Any]:
        """Everything that status pages and metrics show."""
        rules = dict.fromkeys(
            [rule.name for rule in self.scenario.rule] + [r.name for p in self.scenario.phase for r in p.rule]
        )
        counts = {name: list(self._past_hits.get(name, (0, 0))) for name in (*rules, *(rule.name for rule in self.live_rules))}
        live = {rule.name for rule in self.live_rules}
        specs = (*self.scenario.rule, *(rule for phase in self.scenario.phase for rule in phase.rule), *(rule.spec for rule in self.live_rules))
        actions = {rule.name: "+".join(given(rule.action)) for rule in specs}
        for rule in self.live_rules:
            counts[rule.name][0] += rule.matched
            counts[rule.name][1] += rule.hits
        return {
            "scenario": self.scenario.name,
            "seed": self.seed,
            "decided": self.decided,
            "timeline": self._timeline.statistics(),
            "rules": [
                {"rule": name, "action": actions.get(name, ""), "in_force": name in live, "matched": matched, "hits": hits}
                for name, (matched, hits) in counts.items()
            ],
            "events": sorted(self.happened),
            "limits": [limit.statistics() for limit in self._limits.values()],
            "pools": [pool.statistics() for pool in self.pools.values()],
            "paths": {name: paths.statistics() for name, paths in self.paths.items()},
            "disks": [disk.statistics() for disk in self._disks.values()],
        }


def _uses_depth(profile: Profile) -> bool:
    return any(latency is not None and latency.uses_depth for _, latency in profile.latency)

"""One disk under the rules: `DiskRules.decide(request, now)` -> `Plan`. This is what the data path asks.

Everything that can be known before a request comes is worked out when the rules change: for each operation that anything
applies to there is an entry with the latency of the profile, the limits and the rules, already bound to this disk. An
operation without an entry costs one look into a dictionary; a disk with none at all (``applies`` is False) need not be asked.

Requests are numbered for each operation, and all draws come from these numbers, so what happens to a request depends on
the disk's own requests of that operation and on nothing else that goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from scenarios.draws import Draws
from scenarios.fates import Outcome, Step, compile_fates
from scenarios.limits import Depth, Limit
from scenarios.media import Media
from scenarios.overlay import Overlay
from scenarios.pool import Pool
from scenarios.request import DATA_OPS, GO, MOVING_OPS, OPS, Hang, Plan, Request
from scenarios.rules import BoundRule, Counters, LiveRule, Moment, matches_name
from scenarios.schema import Profile, Rule

if TYPE_CHECKING:
    from scenarios.engine import Engine

__all__ = ["DiskRules"]


class _Entry:
    """What applies to one operation."""

    __slots__ = (
        "latency",
        "draws",
        "limits",
        "queues",
        "rules",
        "moments",
        "needs_depth",
        "is_plain",
        "moves",
        "paths",
        "pool",
    )

    def __init__(self) -> None:
        self.latency: Callable[..., float] | None = None
        self.draws: Draws | None = None
        self.limits: list[Limit] = []
        self.queues: list[Depth] = []
        self.rules: list[tuple[BoundRule, list[Step]]] = []
        self.moments: list[Moment] = []
        self.needs_depth = False
        self.is_plain = self.moves = True
        self.paths = self.pool = None


class DiskRules:
    """The rules of one disk. ``key`` names it for draws: the same key and seed give the same faults, whatever its uuid.

    Latencies look at ``depth``, ``head_bytes``, ``size_bytes`` and ``vdis``: how many there are in its SR, as whoever asks for an operation
    of the control plane has said last.
    """

    def __init__(
        self, engine: Engine, name: str, size_bytes: int, names: tuple[str, ...], key: str, groups: tuple[str, ...]
    ) -> None:
        self._engine = engine
        self.name, self.names, self.key, self.groups = name, (name, *names), key, groups
        self.size_bytes = size_bytes
        self.head_bytes = self.depth = 0
        self.vdis = 1
        self.state = "start"
        self.overlay = Overlay(key)
        self.profile: Profile | None = None
        self._numbers = dict.fromkeys(OPS, 0)
        self._counters: dict[LiveRule, Counters] = {}
        self._media: dict[LiveRule, Media] = {}
        self._queue = Depth()
        self._limit: tuple[Profile, Limit] | None = None
        self._table: dict[str, _Entry] = {}

    # What the steps of rules ask for

    @property
    def seed(self) -> int:
        return self._engine.seed

    @property
    def error_as(self) -> str:
        return self._engine.scenario.error_as

    @property
    def happened(self) -> set[str]:
        return self._engine.happened

    def limit_of(self, who: Hashable, make: Callable[[], Limit]) -> Limit:
        return self._engine.limit_of(who, make)

    def replay_of(self, rule: LiveRule) -> Any:
        return self._engine.replay_of(rule, self)

    # Rules

    @property
    def applies(self) -> bool:
        """Whether requests must be decided on at all."""
        return bool(self._table)

    def resize(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._media.clear()
        self.rebuild()

    def rebuild(self) -> None:
        """Work out the entries anew: the rules, the phase or the disk have changed."""
        engine = self._engine
        self.profile = engine.profile_of(self)
        rules = [rule for rule in engine.live_rules if self._is_meant(rule.spec)]
        self._counters = {rule: self._counters.get(rule) or Counters() for rule in rules}
        self._media = {rule: media for rule in rules if (media := self._make_media(rule)) is not None}
        self.overlay.media = list(self._media.values())
        self.overlay.keep_history(any(rule.spec.action.stale for rule in rules))
        bound = {op: [self._bind(rule, op) for rule in rules if op in rule.ops] for op in OPS}
        self._table = {op: entry for op in OPS if (entry := self._entry(op, bound[op])) is not None}

    def _is_meant(self, rule: Rule) -> bool:
        group = rule.action.group if rule.action.kill_daemon is not None else ()
        if group and not matches_name(group, (*self.names, *self.groups)):
            return False
        return not rule.match.vdi or matches_name(rule.match.vdi, self.names)

    def _bind(self, rule: LiveRule, op: str) -> tuple[BoundRule, list[Step]]:
        media = self._media.get(rule)
        return BoundRule(rule, self, op, self._counters[rule], media), compile_fates(rule, self, op)

    def _make_media(self, rule: LiveRule) -> Media | None:
        if rule in self._media:
            return self._media[rule]
        spec: Rule = rule.spec
        trigger, action = spec.trigger, spec.action
        if trigger.bad_blocks is None and trigger.bits is None:
            return None
        area = spec.match.range.bytes_of(self.size_bytes) if spec.match.range else (0, self.size_bytes)
        if trigger.bits is not None:
            layer = self.overlay.layer(spec.sticks_to or "data")
            return Media(rule.name, self.seed, layer, trigger.bits, area, rule.began_ns, flips=action.flip or 1)
        layer = self.overlay.layer(spec.sticks_to or "device")
        return Media(
            rule.name,
            self.seed,
            layer,
            trigger.bad_blocks,
            area,
            rule.began_ns,
            trigger.block,
            trigger.grows,
            0,
            action.heal_on_write,
        )

    def _entry(self, op: str, rules: list[tuple[BoundRule, list[Step]]]) -> _Entry | None:
        """What applies to ``op``, or None."""
        engine, profile = self._engine, self.profile
        entry = _Entry()
        entry.moves = op in MOVING_OPS
        entry.rules = rules
        entry.moments = engine.moments_of(op)
        latency = None
        if profile is not None:
            table = profile.latency if op in DATA_OPS else profile.control
            latency = getattr(table, op) or table.all
            if op in DATA_OPS:
                entry.limits = self._limits(profile)
                entry.paths = engine.paths_of(self)
            entry.pool = engine.pool_of(self)
        if latency is not None:
            entry.latency = latency.sample
            entry.draws = Draws(self.seed, "profile", self.key, op, count=max(1, latency.draws))
        entry.queues = [limit.queue for limit in entry.limits if limit.queue.slots]
        entry.needs_depth = engine.counts_depth and op in DATA_OPS
        if entry.needs_depth and self._depth_queue(entry) not in entry.queues:
            entry.queues.append(self._depth_queue(entry))
        entry.is_plain = not (rules or entry.moments or entry.paths or entry.pool or engine.is_off(self))
        if entry.is_plain and latency is None and not entry.limits:
            return None
        return entry

    def _limits(self, profile: Profile) -> list[Limit]:
        limits = []
        if profile.rate or profile.iops or profile.depth:
            if self._limit is None or self._limit[0] is not profile:
                limit = Limit(
                    self.name, profile.rate or 0, profile.iops or 0, profile.burst, profile.iops_size or 0, profile.depth or 0
                )
                self._limit = profile, limit
            limits.append(self._limit[1])
        if share := profile.share:
            limits.append(
                self._engine.limit_of(
                    ("share", share.group),
                    lambda: Limit(
                        share.group, share.bytes or 0, share.iops or 0, share.burst, share.iops_size or 0, share.depth or 0
                    ),
                )
            )
        return limits

    def _depth_queue(self, entry: _Entry) -> Depth:
        """Where the depth is counted: in what is shared, if anything is."""
        return entry.limits[-1].queue if entry.limits else self._queue

    # Deciding

    def decide(self, request: Request, now: int) -> Plan:
        """What becomes of the request. ``now`` must not go back."""
        engine = self._engine
        if now >= engine.next_change_ns:
            engine.advance(now)
        op = request.op
        entry = self._table.get(op)
        if entry is None:
            return GO
        number = self._numbers[op] = self._numbers[op] + 1
        engine.decided += 1
        if entry.needs_depth:
            self.depth = self._depth_queue(entry).depth(now)
        latency = 0.0
        if entry.latency is not None:
            latency = entry.latency(entry.draws(number), request, self)
        start = now
        for limit in entry.limits:
            if limit.buckets:
                start = max(start, limit.admit(request.length if entry.moves else 0, now))
        if entry.is_plain:
            plan = _plain_plan(entry.queues, latency, start, now)
        else:
            plan = self._decide(entry, request, number, now, latency, start)
        if entry.moves:
            self.head_bytes = request.offset + request.length
        return plan

    def _decide(self, entry: _Entry, request: Request, number: int, now: int, latency: float, start: int) -> Plan:
        """With rules and all else that is not plain. The outcome is made when there is something to put into it."""
        engine = self._engine
        engine.now = now
        outcome: Outcome | None = None
        for moment in entry.moments:
            moment.count(self.names, now)
        path = request.path
        if entry.paths is not None:
            route, until_ns = entry.paths.route(request.path, now)
            if route is None:
                outcome = Outcome(request, self, number, now, latency, start)
                outcome.hang = Hang(f"path:{engine.profile_name(self)}", until_ns)
            path = route or ""
        goto = None
        for rule, steps in entry.rules:
            hit = engine.replayed_hit(rule, number) if engine.replays_decisions else rule.fires(request, number, now, path)
            if hit is None:
                continue
            if outcome is None:
                outcome = Outcome(request, self, number, now, latency, start)
            for step in steps:
                step(outcome, hit)
            outcome.rules.append(rule.rule.name)
            engine.log(rule.rule, self, request.op, number, now, hit)
            goto = rule.goto or goto
            if rule.rule.commands and not rule.rule.is_standing:
                engine.command(rule.rule, now, self, number)
        if goto:
            self.state = goto
        if entry.pool is not None:
            outcome = outcome or Outcome(request, self, number, now, latency, start)
            if outcome.hang is None and not outcome.error and not outcome.disconnect:
                self._ask_pool(entry.pool, outcome)
        plan = outcome.plan(entry.queues) if outcome else _plain_plan(entry.queues, latency, start, now)
        if engine.is_off(self):
            plan = Plan(disconnect=True, rules=plan.rules)
        engine.settle()
        return plan

    def _ask_pool(self, pool: Pool, outcome: Outcome) -> None:
        request = outcome.request
        fate = pool.fate(request.op, self.name, request.offset, request.length, outcome.now)
        if isinstance(fate, Hang):
            outcome.hang = fate
        elif fate is not None:
            outcome.fail(fate, self.error_as, f"pool:{pool.name}")

    def statistics(self) -> dict[str, Any]:
        return {
            "vdi": self.name,
            "applies": self.applies,
            "state": self.state,
            "requests": {op: count for op, count in self._numbers.items() if count},
            "overlay": self.overlay.statistics(),
        }


_make_plan = tuple.__new__


def _plain_plan(queues: list[Depth], latency: float, start: int, now: int) -> Plan:
    """Only a delay; the request takes its place in the queues."""
    for queue in queues:
        start = queue.start(start)
    done = start + int(latency)
    for queue in queues:
        queue.finish(done)
    return _make_plan(Plan, (done - now, 0, None, False, (), (), 0))

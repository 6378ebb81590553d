"""What fired rules do to a request: each action of a rule is compiled into a step that changes the `Outcome`.

The latency of the disk comes first, then the rules in order: ``delay`` takes its place, adds to it or multiplies it; limits
move the moment at which the request starts; the rest says how it ends. When all rules were asked the outcome becomes a `Plan`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scenarios.clients import errno_of
from scenarios.draws import Draws
from scenarios.limits import Depth, Limit
from scenarios.overlay import EFFECT_BYTES_MAX
from scenarios.request import MOVING_OPS, Effect, Hang, Plan, Request
from scenarios.rules import Hit, LiveRule
from scenarios.schema import Action

if TYPE_CHECKING:
    from scenarios.disk import DiskRules

__all__ = ["Outcome", "Step", "compile_fates"]

_SECTOR_BYTES = 512


class Outcome:
    """A plan that is being made."""

    __slots__ = (
        "request", "disk", "number", "now", "latency", "start", "error", "fault", "hang", "disconnect", "effects", "queues", "rules"
    )  # fmt: skip

    def __init__(self, request: Request, disk: DiskRules, number: int, now: int, latency: float, start: int) -> None:
        self.request, self.disk, self.number, self.now = request, disk, number, now
        self.latency, self.start = latency, start
        self.error, self.fault, self.disconnect = 0, 0, False
        self.hang: Hang | None = None
        self.effects: list[Effect] = []
        self.queues: list[Depth] = []
        self.rules: list[str] = []

    @property
    def moved(self) -> int:
        """Bytes that a limit counts: trimming and zeroing move none."""
        return self.request.length if self.request.op in MOVING_OPS else 0

    def fail(self, error: int, way: str, rule: str) -> None:
        """End with an error, or in the way in which the scenario wants errors delivered."""
        if way == "hang":
            self.hang = self.hang or Hang(rule)
        elif way == "disconnect":
            self.disconnect = True
        else:
            self.error = self.error or error

    def plan(self, queues: Sequence[Depth]) -> Plan:
        """The plan; the request takes its place in the queues."""
        start = self.start
        queues = [] if self.hang else [*queues, *self.queues]
        for queue in queues:
            start = queue.start(start)
        done = start + max(0, int(self.latency))
        for queue in queues:
            queue.finish(done)
        effects = () if self.error or self.disconnect else tuple(self.effects)
        return Plan(done - self.now, self.error, self.hang, self.disconnect, effects, tuple(self.rules), self.fault)


Step = Callable[[Outcome, Hit], None]


def compile_fates(rule: LiveRule, disk: DiskRules, op: str) -> list[Step]:
    """The steps of a rule for one disk and operation."""
    return [
        _COMPILERS[name](rule, rule.spec.action, disk, op)
        for name in rule.fates
        if not (name == "drain" and op not in _DRAINED)
    ]


_DRAINED = ("close", "detach")


def _delay(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    mode, latency = action.delay
    sample = latency.sample
    draws = Draws(disk.seed, rule.name, disk.key, op, "delay", count=max(1, latency.draws))

    def step(outcome: Outcome, hit: Hit) -> None:
        value = sample(draws(outcome.number), outcome.request, disk)
        if mode == "set":
            outcome.latency = value
        elif mode == "add":
            outcome.latency += value
        else:
            outcome.latency *= value

    return step


def _drain(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    latency = action.drain
    draws = Draws(disk.seed, rule.name, disk.key, op, "drain", count=max(1, latency.draws))

    def step(outcome: Outcome, hit: Hit) -> None:
        outcome.latency += latency.sample(draws(outcome.number), outcome.request, disk)

    return step


def _limit(kind: str) -> Callable[[LiveRule, Action, DiskRules, str], Step]:
    def compiler(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
        def make() -> Limit:
            burst, iops_size = (action.burst, 0) if kind == "rate" else (None, action.iops_size or 0)
            return Limit(f"{rule.name} {kind}", burst=burst, iops_size=iops_size, **{kind: getattr(action, kind)})

        owner = ("group", action.group[0]) if action.group else ("vdi", disk.name)
        limit = disk.limit_of((rule, kind, owner), make)

        def step(outcome: Outcome, hit: Hit) -> None:
            outcome.start = max(outcome.start, limit.admit(outcome.moved, outcome.now))
            if limit.queue.slots:
                outcome.queues.append(limit.queue)

        return step

    return compiler


def _error(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    error = errno_of(action.error or ("EPERM" if action.readonly else "ENOSPC"))
    way = action.error_as or disk.error_as

    def step(outcome: Outcome, hit: Hit) -> None:
        outcome.fail(error, way, rule.name)

    return step


def _fault(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    def step(outcome: Outcome, hit: Hit) -> None:
        outcome.fault = outcome.fault or action.fault
        outcome.error = outcome.error or errno.EIO

    return step


def _hang(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    length_ns = action.hang if isinstance(action.hang, int) else None

    def step(outcome: Outcome, hit: Hit) -> None:
        outcome.hang = Hang(rule.name, None if length_ns is None else outcome.now + length_ns)

    return step


def _disconnect(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    def step(outcome: Outcome, hit: Hit) -> None:
        outcome.disconnect = True

    return step


def _damage(kind: str) -> Callable[[LiveRule, Action, DiskRules, str], Step]:
    """Faults of the data. Random choices are made here, so an `Effect` is the same whenever it is carried out."""
    choose = _CHOICES[kind]

    def compiler(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
        sticks_to = rule.spec.sticks_to or "data"
        draws = Draws(disk.seed, rule.name, disk.key, op, kind)

        def step(outcome: Outcome, hit: Hit) -> None:
            request = outcome.request
            if request.length <= EFFECT_BYTES_MAX and (request.length or kind == "lose"):
                value = choose(action, outcome, hit, draws)
                if value is not _NOTHING:
                    outcome.effects.append(Effect(kind, rule.name, sticks_to, value))

        return step

    return compiler


_NOTHING = object()


def _torn(action: Action, outcome: Outcome, hit: Hit, draws: Draws) -> Any:
    """Sectors are those of the disk. A write within one sector cannot tear."""
    sector, keep = action.torn.sector, action.torn.keep
    offset, end = outcome.request.offset, outcome.request.offset + outcome.request.length
    first, count = offset // sector, (end - 1) // sector - offset // sector + 1
    if count < 2:
        return _NOTHING
    at = 1 + int(draws(outcome.number)[0] * (count - 1))
    if keep == "any":
        kept = _some(count, at, draws, outcome.number)
    else:
        kept = [(0, at)] if keep == "prefix" else [(at, count)]
    return tuple((max(0, (first + low) * sector - offset), min(end, (first + high) * sector) - offset) for low, high in kept)


def _some(count: int, sure: int, draws: Draws, number: int) -> list[tuple[int, int]]:
    """Each sector with a chance of one half; sector ``sure`` is never written and ``sure - 1`` always is."""
    words = Draws(*map(str, draws(number)[1:3]))
    kept: list[tuple[int, int]] = []
    for sector in range(count):
        taken = sector == sure - 1 or sector != sure and words(sector // 8)[sector % 8] < 0.5
        if taken and kept and kept[-1][1] == sector:
            kept[-1] = kept[-1][0], sector + 1
        elif taken:
            kept.append((sector, sector + 1))
    return kept


def _lose(action: Action, outcome: Outcome, hit: Hit, draws: Draws) -> Any:
    return outcome.now + action.lose if action.lose else None


def _flip(action: Action, outcome: Outcome, hit: Hit, draws: Draws) -> Any:
    request = outcome.request
    if hit.places:
        return tuple(bit - 8 * request.offset for bit in hit.places)
    bits, found, round_ = 8 * request.length, set(), 0
    while len(found) < min(action.flip, bits):
        words = draws(outcome.number + (round_ << 44))
        found.update(int(u * bits) for u in words[: action.flip - len(found)])
        round_ += 1
    return tuple(sorted(found))


def _misdirect(action: Action, outcome: Outcome, hit: Hit, draws: Draws) -> Any:
    """Whole sectors away, within the disk; the other way if the first one leads out of it."""
    low, high = action.misdirect.by
    u, direction, *_ = draws(outcome.number)
    by = low + int(u * ((high - low) // _SECTOR_BYTES + 1)) * _SECTOR_BYTES
    request = outcome.request
    last = outcome.disk.size_bytes - request.length
    for target in (request.offset + by, request.offset - by)[:: 1 if direction < 0.5 else -1]:
        if 0 <= target <= last:
            return target
    return _NOTHING


def _stale(action: Action, outcome: Outcome, hit: Hit, draws: Draws) -> Any:
    return None


_CHOICES = {"torn": _torn, "lose": _lose, "flip": _flip, "misdirect": _misdirect, "stale": _stale}


def _kill_daemon(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    def step(outcome: Outcome, hit: Hit) -> None:
        outcome.effects.append(Effect("kill_daemon", rule.name, "device", action.kill_daemon))

    return step


def _replay(rule: LiveRule, action: Action, disk: DiskRules, op: str) -> Step:
    times = disk.replay_of(rule)

    def step(outcome: Outcome, hit: Hit) -> None:
        request = outcome.request
        found = times.next(request.op, request.length, disk.depth)
        if found is not None:
            outcome.latency = found

    return step


_COMPILERS: dict[str, Callable[[LiveRule, Action, DiskRules, str], Step]] = {
    "delay": _delay,
    "drain": _drain,
    "rate": _limit("rate"),
    "iops": _limit("iops"),
    "depth": _limit("depth"),
    "error": _error,
    "fault": _fault,
    "readonly": _error,
    "full": _error,
    "hang": _hang,
    "disconnect": _disconnect,
    "torn": _damage("torn"),
    "lose": _damage("lose"),
    "flip": _damage("flip"),
    "misdirect": _damage("misdirect"),
    "stale": _damage("stale"),
    "kill_daemon": _kill_daemon,
    "replay": _replay,
}

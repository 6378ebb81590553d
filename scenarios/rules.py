"""When a rule fires: its match and its trigger, for one disk and one operation.

`LiveRule` is a rule in force, with the counters that people see. `BoundRule` is what the data path asks. Requests are
counted for each disk on its own, so that disks do not disturb each other's faults. Requests of the control plane are counted
over all disks, as "the second snapshot" means any disk's, and so are those that a command waits for.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from scenarios.actions import commands_of, fates_of, is_standing, ops_of
from scenarios.draws import Draws
from scenarios.media import Media
from scenarios.request import CONTROL_OPS, Request
from scenarios.schema import After, Rule

if TYPE_CHECKING:
    from scenarios.disk import DiskRules

__all__ = ["LiveRule", "BoundRule", "Moment", "Hit", "matches_name"]


class Hit(NamedTuple):
    """Why a rule fired: the number drawn for ``p`` (or None), and the bad blocks or rotten bits that were met."""

    u: float | None
    places: tuple[int, ...] = ()


class Counters:
    """What a trigger counts. ``seen`` requests of ``seen_bytes`` so far, ``fired`` times."""

    __slots__ = ("seen", "seen_bytes", "fired")

    def __init__(self) -> None:
        self.seen = self.seen_bytes = self.fired = 0


class Moment:
    """The nth request of an operation, or an event."""

    __slots__ = ("spec", "left", "reached_ns")

    def __init__(self, spec: After) -> None:
        self.spec, self.left = spec, spec.nth
        self.reached_ns: int | None = None

    def count(self, names: tuple[str, ...], now: int) -> None:
        """A request of one of its operations came."""
        if self.reached_ns is None and (not self.spec.vdi or matches_name(self.spec.vdi, names)):
            self.left -= 1
            if self.left <= 0:
                self.reached_ns = now


def matches_name(globs: tuple[str, ...], names: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


class LiveRule:
    """A rule in force since ``began_ns``. ``matched`` requests it looked at, ``hits`` times it fired."""

    def __init__(self, spec: Rule, began_ns: int, phase: str | None = None) -> None:
        self.spec, self.name, self.began_ns, self.phase = spec, spec.name or "", began_ns, phase
        self.fates, self.commands = fates_of(spec.action), commands_of(spec.action)
        self.is_standing = bool(self.commands) and is_standing(spec)
        self.ops = () if self.is_standing and not self.fates else ops_of(spec)
        self.moment = Moment(spec.trigger.after) if spec.trigger.after else None
        self.shared = Counters()
        self.matched = self.hits = 0

    @property
    def uses_depth(self) -> bool:
        """Whether the queue depth matters to it."""
        action = self.spec.action
        latencies = [action.delay.latency if action.delay else None, action.drain]
        by_depth = action.replay is not None and "depth" in action.replay.bucket
        return by_depth or any(latency is not None and latency.uses_depth for latency in latencies)

    @property
    def times(self) -> int | None:
        """A rule with a command that requests fire does so once, unless the trigger says otherwise."""
        trigger = self.spec.trigger
        waits = self.commands and not self.is_standing
        return trigger.times or (1 if waits and not (trigger.nth or trigger.every) else None)


class BoundRule:
    """A rule on one disk for one operation: ``fires(request, number, now, path)`` -> `Hit` or None."""

    def __init__(self, rule: LiveRule, disk: DiskRules, op: str, counters: Counters, media: Media | None) -> None:
        spec = rule.spec
        match, trigger = spec.match, spec.trigger
        self.rule, self._disk, self.op, self.disk_key = rule, disk, op, disk.key
        self._counters = rule.shared if op in CONTROL_OPS or rule.commands and not rule.is_standing else counters
        self._area = match.range.bytes_of(disk.size_bytes) if match.range else None
        self._size, self._fua, self._path, self._client = match.size, match.fua, match.path, match.client
        self._selective = any(part is not None for part in (self._area, self._size, self._fua, self._path)) or bool(
            match.client
        )
        self._state, self.goto = trigger.state, trigger.goto
        self._sleeps = bool(trigger.when or trigger.after or trigger.state)
        self._skip_requests, self._skip_bytes = (0, 0)
        if trigger.skip:
            kind, amount = trigger.skip
            self._skip_requests, self._skip_bytes = (amount, 0) if kind == "requests" else (0, amount)
        self._every, self._nth = trigger.every, frozenset(trigger.nth)
        self._times = rule.times
        self._counts = bool(trigger.skip or trigger.every or trigger.nth or self._times)
        self._p = None if trigger.p is None or trigger.p >= 1 else trigger.p
        self._draws = Draws(disk.seed, rule.name, disk.key, op, "p", count=1)
        self._media = media
        self._flips = trigger.bits is not None
        self._simple = not (self._selective or self._sleeps or self._counts or media or self.goto)

    def fires(self, request: Request, number: int, now: int, path: str) -> Hit | None:
        rule = self.rule
        if self._simple:
            rule.matched += 1
            u = None
            if self._p is not None:
                u = self._draws(number)[0]
                if u >= self._p:
                    return None
            rule.hits += 1
            return _ALWAYS if u is None else Hit(u)
        return self._fires(request, number, now, path)

    def _fires(self, request: Request, number: int, now: int, path: str) -> Hit | None:
        rule, counters = self.rule, self._counters
        if self._selective and not self._selects(request, path) or self._sleeps and not self._is_awake():
            return None
        rule.matched += 1
        if self._counts:
            if counters.seen_bytes < self._skip_bytes:
                counters.seen_bytes += request.length
                return None
            counters.seen += 1
            if not self._counted(counters.seen - self._skip_requests):
                return None
        places: tuple[int, ...] = ()
        if self._media is not None:
            find = self._media.bits if self._flips else self._media.blocks
            places = tuple(find(request.offset, request.length, now))
            if not places:
                return None
        u = None
        if self._p is not None:
            u = self._draws(number)[0]
            if u >= self._p:
                return None
        if self._times is not None and counters.fired >= self._times:
            return None
        counters.fired += 1
        rule.hits += 1
        return Hit(u, places)

    def _selects(self, request: Request, path: str) -> bool:
        _, offset, length, fua, _, client = request
        if self._area is not None and not (offset < self._area[1] and offset + length > self._area[0]):
            return False
        if self._size is not None and not self._size[0] <= length <= (length if self._size[1] is None else self._size[1]):
            return False
        if self._fua is not None and fua != self._fua or self._path is not None and path != self._path:
            return False
        return not self._client or client in self._client

    def _is_awake(self) -> bool:
        trigger, moment, happened = self.rule.spec.trigger, self.rule.moment, self._disk.happened
        if trigger.when and trigger.when not in happened or self._state and self._disk.state not in self._state:
            return False
        return moment is None or moment.reached_ns is not None or moment.spec.event in happened

    def _counted(self, count: int) -> bool:
        if count < 1 or self._nth and count not in self._nth:
            return False
        return not self._every or count % self._every == 0

    def statistics(self) -> dict[str, Any]:
        return {"rule": self.rule.name, "op": self.op, "seen": self._counters.seen, "fired": self._counters.fired}


_ALWAYS = Hit(None)

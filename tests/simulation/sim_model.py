"""What may be on each disk: the model that the simulated daemon is held to.

Every sector of every disk and snapshot has *versions*. A version has a value, the moment at which its request was issued and the one at which it
ended (was answered, or could not come any more); a version is *certain* if success was answered. Moments are numbers of one counter.

* A read that was issued at r may give any version that no certain one has overtaken: one issued after the version had ended, and ended before r.
* After a crash the same holds with r = the horizon: the moment at which the last flush that was answered was issued, or a later one that what survived
  gives away, because the log is a prefix: whoever sees an effect that was issued at t must see all that had been answered before t.
* A revert is a version of every sector; a snapshot is the versions that a read in its place might have seen.
* Under a volatile write cache (a scenario that cuts the power of disks) only what is *stable* overtakes: FUA, what a flush of that disk covers, reverts.

A version has an *origin* besides: the write that it comes from, which copies and reverts keep. Two sectors of one origin were not written in
between; that is what changed block tracking is held to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

__all__ = ["NEVER", "SECTOR", "UNIT", "Content", "Disk", "Step", "Together", "Version", "sectors_of", "payload"]

SECTOR = 512
UNIT = 128
"""Sectors for which changed block tracking has one bit."""
NEVER = 1 << 62
_origins = count(1)


class Version:
    __slots__ = ("issue", "end", "value", "certain", "stable", "origin")

    def __init__(self, issue: int, end: int, value: int, certain: bool, stable: bool = True, origin: int = 0) -> None:
        self.issue, self.end, self.value, self.certain = issue, end, value, certain
        self.stable, self.origin = stable, origin or next(_origins)

    def __repr__(self) -> str:
        end = "?" if self.end == NEVER else self.end
        return f"{self.value:x}[{self.issue}..{end}{'' if self.certain else ' maybe'}]"


def payload(values: Iterable[int]) -> bytes:
    """Sectors that hold these values."""
    return b"".join(value.to_bytes(8, "little") * (SECTOR // 8) for value in values)


def sectors_of(data: bytes) -> list[int | None]:
    """The value of each sector; None for one that is torn."""
    found = []
    for at in range(0, len(data), SECTOR):
        sector = data[at : at + SECTOR]
        found.append(int.from_bytes(sector[:8], "little") if sector == sector[:8] * (SECTOR // 8) else None)
    return found


def _allowed(versions: list[Version], moment: int, held: int = -1) -> list[Version]:
    """``held``: see `Content`."""
    if len(versions) == 1:
        return versions
    floor = max((one.issue for one in versions if one.certain and (one.end < moment or one.stable and one.issue <= held)), default=-1)
    return [one for one in versions if one.end >= floor]


def _allowed_weakly(versions: list[Version], moment: int, stable_until: int) -> list[Version]:
    """The same if what is not stable may have been lost; all that ended before ``stable_until`` is."""
    overtaking = (one.issue for one in versions if one.certain and one.end < moment and (one.stable or one.end < stable_until))
    floor = max(overtaking, default=-1)
    return [one for one in versions if one.end >= floor]


def _different(versions: Iterable[Version]) -> list[tuple[int, int]]:
    return sorted({(one.value, one.origin) for one in versions})


class Content:
    """The versions of all sectors. While there is a volatile cache, ``stable_until`` says what a flush of it covers; ``is_cut``: its power failed.
    ``held``: what is stable by itself and was issued by then is there after a crash, although it was answered later."""

    def __init__(self, versions: list[list[Version]]) -> None:
        self.versions = versions
        self.stable_until: int | None = None
        self.is_cut = False
        self.held = -1

    @classmethod
    def of(cls, values: Iterable[int], moment: int) -> Content:
        return cls([[Version(moment, moment, value, True)] for value in values])

    def __len__(self) -> int:
        return len(self.versions)

    def allowed(self, sector: int, moment: int) -> list[Version]:
        """What whoever asks at ``moment`` may find there."""
        if self.is_cut and self.stable_until is not None:
            return _allowed_weakly(self.versions[sector], moment, self.stable_until)
        return _allowed(self.versions[sector], moment, self.held)

    def may_be(self, sector: int, moment: int, value: int | None, coming: Content | None = None) -> bool:
        for one in self.allowed(sector, moment):
            if one.value == value:
                return True
        if coming is None:
            return False
        return value == 0 if sector >= len(coming) else any(one.value == value for one in coming.versions[sector])

    def prune(self, first: int, last: int, moment: int) -> None:
        """Forget what nobody who asks at ``moment`` or later may find."""
        for sector in range(first, min(last, len(self.versions))):
            versions = self.versions[sector]
            if len(versions) > 1:
                until = self.stable_until
                self.versions[sector] = _allowed(versions, moment) if until is None else _allowed_weakly(versions, moment, until)

    def seen(self, issue: int) -> Content:
        """A copy as somebody who asked at ``issue`` may have made it; its making has not ended yet."""
        return Content([
            [Version(issue, NEVER, value, False, True, origin) for value, origin in _different(self.allowed(sector, issue))]
            for sector in range(len(self.versions))
        ])  # fmt: skip

    def made(self, end: int) -> Content:
        """The copy has been made."""
        for versions in self.versions:
            for one in versions:
                one.end, one.certain = end, True
        return self

    def copy(self) -> Content:
        return Content([list(versions) for versions in self.versions])

    def take_over(self, other: Content, issue: int, end: int, certain: bool = True, stable: bool = True) -> None:
        """This became ``other`` between ``issue`` and ``end``; what was written at the same time may have come before or after."""
        new = [[Version(issue, end, value, certain, stable, origin) for value, origin in _different(one)] for one in other.versions]
        if certain:
            del self.versions[len(new) :]
        for versions, more in zip(self.versions, new):
            versions += more
        self.versions += new[len(self.versions) :]

    def grow(self, sectors: int, moment: int) -> None:
        self.versions += [[Version(moment, moment, 0, True)] for _ in range(sectors - len(self.versions))]

    def found(self, values: Sequence[int | None], moment: int, now: int) -> Content:
        """What was found there is all that there is from now on; where it comes from is known if only one version has that value."""
        contents = []
        for sector, value in enumerate(values):
            origins = {one.origin for one in self.allowed(sector, moment) if one.value == value} if sector < len(self.versions) else set()
            contents.append([Version(now, now, value, True, True, origins.pop() if len(origins) == 1 else 0)])
        return Content(contents)

    def wrong(self, found: Sequence[int | None], moment: int, first: int = 0, coming: Content | None = None) -> str:
        """Why ``found`` cannot be what lies there from sector ``first`` on; empty if it can. ``coming``: what may have become of it just now."""
        for sector, value in enumerate(found, first):
            versions = self.versions[sector]
            if len(versions) == 1 and versions[0].value == value:
                continue
            if not self.may_be(sector, moment, value, coming):
                have = "a torn sector" if value is None else f"{value:x}"
                return f"sector {sector} holds {have}; versions {versions}, asked at {moment}"
        return ""

    def newest(self, found: Sequence[int | None], moment: int) -> int:
        """The latest moment of which ``found`` is evidence."""
        latest = 0
        for sector, value in enumerate(found):
            issues = [one.issue for one in self.allowed(sector, moment) if one.value == value]
            latest = max(latest, min(issues, default=0))
        return latest

    # Volatile caches.

    def lose_from(self, moment: int) -> None:
        """From now on there is a volatile cache in front of it."""
        self.stable_until = moment

    def flushed(self, moment: int) -> None:
        """A flush that was issued then was answered. Behind a cut it says nothing of what was written before, which may be lost."""
        if self.stable_until is not None and not self.is_cut:
            self.stable_until = max(self.stable_until, moment)

    def lose_no_more(self, began: int, now: int) -> None:
        """The cache is gone. What a power cut may have brought back stays possible: as written at any time in between."""
        until, was_cut = self.stable_until, self.is_cut
        self.stable_until, self.is_cut = None, False
        if until is None or not was_cut:
            return
        for versions in self.versions:
            if len(versions) > 1:
                left = _allowed_weakly(versions, now, until)
                versions += [Version(began, now, value, True) for value in sorted({one.value for one in left})]

    # Changed blocks.

    def wrong_changes(self, bits: bytes, old: Content, moment: int) -> str:
        """Why ``bits`` cannot say in which units this, as asked at ``moment``, differs from ``old``, which does not change."""
        for unit in range(-(-len(self.versions) // UNIT)):
            same, differs = True, False
            for sector in range(unit * UNIT, min((unit + 1) * UNIT, len(self.versions))):
                mine = self.allowed(sector, moment)
                if sector >= len(old):
                    same, differs = False, True
                    break
                others = old.versions[sector]
                same = same and len(mine) == len(others) == 1 and mine[0].origin == others[0].origin
                differs = differs or not {one.value for one in mine} & {one.value for one in others}
            bit = bits[unit >> 3] >> (7 - (unit & 7)) & 1
            if differs and not bit:
                return f"unit {unit} differs and is not told"
            if same and bit:
                return f"unit {unit} was not written to and is told"
        return ""


class Together:
    """Something that several disks did at one moment: a group snapshot, or a revert of a group. ``count``: of how many."""

    def __init__(self, count: int) -> None:
        self.count = count


@dataclass
class Step:
    """Something that can be undone: content of the head (None: it stays), nodes that come back and nodes that go; with which others."""

    head: Content | None
    show: dict[str, Disk] = field(default_factory=dict)
    hide: set[str] = field(default_factory=set)
    together: Together | None = None
    tip: str | None = None  # that holds the content of the head, and goes when this is undone


@dataclass
class Disk:
    """A disk, a snapshot (``of`` a disk) or a tip."""

    uuid: str
    content: Content
    family: str
    of: str | None = None
    is_tip: bool = False
    sr: str = ""
    group: Together | None = None  # with which a snapshot was taken
    chain: object = None  # of changed block tracking
    is_destroyed: bool = False  # only changed blocks are known
    base: Content | None = None  # of a disk that forgets
    hosts: dict[str, bool] = field(default_factory=dict)  # hosts that have it attached: whether for writing
    undo: list[Step] = field(default_factory=list)
    redo: list[Step] = field(default_factory=list)
    reverting: str | None = None  # the live mode in which it is being reverted now
    excused: int = -1  # requests issued up to this moment may have failed
    spoiled: int = -1  # who had connected by then may find that everything fails with EIO
    unsure: int = -1  # and these may have met any content
    coming: Content | None = None  # what an operation makes of it that has not been answered

    def as_it_is(self) -> Disk:
        """A node, to be kept for who undoes its going."""
        return Disk(
            self.uuid, self.content, self.family, self.of, self.is_tip, self.sr, self.group, self.chain, self.is_destroyed
        )

    @property
    def sectors(self) -> int:
        return len(self.content)

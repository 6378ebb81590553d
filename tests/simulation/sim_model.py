"""What may be on each disk: the model that the simulated daemon is held to.

Every sector of every disk and snapshot has *versions*. A version has a value, the moment at which its request was issued and the one at which it
ended (was answered, or could not come any more); a version is *certain* if success was answered. Moments are numbers of one counter.

* A read that was issued at r may give any version that no certain one has overtaken: one issued after the version had ended, and ended before r.
* After a crash the same holds with r = the horizon: the moment at which the last flush that was answered was issued, or a later one that what survived
  gives away, because the log is a prefix: whoever sees an effect that was issued at t must see all that had been answered before t.
* A revert is a version of every sector; a snapshot is the versions that a read in its place might have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["NEVER", "SECTOR", "Content", "Disk", "Step", "Version", "sectors_of", "payload"]

SECTOR = 512
NEVER = 1 << 62


class Version:
    __slots__ = ("issue", "end", "value", "certain")

    def __init__(self, issue: int, end: int, value: int, certain: bool) -> None:
        self.issue, self.end, self.value, self.certain = issue, end, value, certain

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


def _allowed(versions: list[Version], moment: int) -> list[Version]:
    floor = max((one.issue for one in versions if one.certain and one.end < moment), default=-1)
    return [one for one in versions if one.end >= floor]


class Content:
    """The versions of all sectors."""

    def __init__(self, versions: list[list[Version]]) -> None:
        self.versions = versions

    @classmethod
    def of(cls, values: Iterable[int], moment: int) -> Content:
        return cls([[Version(moment, moment, value, True)] for value in values])

    def __len__(self) -> int:
        return len(self.versions)

    def allowed(self, sector: int, moment: int) -> list[Version]:
        """What whoever asks at ``moment`` may find there."""
        return _allowed(self.versions[sector], moment)

    def may_be(self, sector: int, moment: int, value: int | None, coming: Content | None = None) -> bool:
        if any(one.value == value for one in self.allowed(sector, moment)):
            return True
        if coming is None:
            return False
        return value == 0 if sector >= len(coming) else any(one.value == value for one in coming.versions[sector])

    def prune(self, first: int, last: int, moment: int) -> None:
        """Forget what nobody who asks at ``moment`` or later may find."""
        for sector in range(first, min(last, len(self.versions))):
            versions = self.versions[sector]
            if len(versions) > 1:
                self.versions[sector] = _allowed(versions, moment)

    def seen(self, issue: int) -> Content:
        """A copy as somebody who asked at ``issue`` may have made it; its making has not ended yet."""
        copies = []
        for sector in range(len(self.versions)):
            values = {one.value for one in self.allowed(sector, issue)}
            copies.append([Version(issue, NEVER, value, False) for value in sorted(values)])
        return Content(copies)

    def made(self, end: int) -> Content:
        """The copy has been made."""
        for versions in self.versions:
            for one in versions:
                one.end, one.certain = end, True
        return self

    def copy(self) -> Content:
        return Content([list(versions) for versions in self.versions])

    def take_over(self, other: Content, issue: int, end: int) -> None:
        """This became ``other`` between ``issue`` and ``end``; what was written at the same time may have come before or after."""
        values = [sorted({one.value for one in versions}) for versions in other.versions]
        del self.versions[len(values) :]
        for versions, new in zip(self.versions, values):
            versions += [Version(issue, end, value, True) for value in new]
        self.versions += [[Version(issue, end, value, True) for value in new] for new in values[len(self.versions) :]]

    def grow(self, sectors: int, moment: int) -> None:
        self.versions += [[Version(moment, moment, 0, True)] for _ in range(sectors - len(self.versions))]

    def wrong(self, found: Sequence[int | None], moment: int, first: int = 0, coming: Content | None = None) -> str:
        """Why ``found`` cannot be what lies there from sector ``first`` on; empty if it can. ``coming``: what may have become of it just now."""
        for sector, value in enumerate(found, first):
            if not self.may_be(sector, moment, value, coming):
                have = "a torn sector" if value is None else f"{value:x}"
                return f"sector {sector} holds {have}; versions {self.versions[sector]}, asked at {moment}"
        return ""

    def newest(self, found: Sequence[int | None], moment: int) -> int:
        """The latest moment of which ``found`` is evidence."""
        latest = 0
        for sector, value in enumerate(found):
            issues = [one.issue for one in self.allowed(sector, moment) if one.value == value]
            latest = max(latest, min(issues, default=0))
        return latest


@dataclass
class Step:
    """Something that can be undone: content of the head (None: it stays), nodes that come back and nodes that go."""

    head: Content | None
    show: dict[str, Disk] = field(default_factory=dict)
    hide: set[str] = field(default_factory=set)


@dataclass
class Disk:
    """A disk, a snapshot (``of`` a disk) or a tip."""

    uuid: str
    content: Content
    family: str
    of: str | None = None
    is_tip: bool = False
    undo: list[Step] = field(default_factory=list)
    redo: list[Step] = field(default_factory=list)
    reverting: str | None = None  # the live mode in which it is being reverted now
    excused: int = -1  # requests issued up to this moment may have failed
    spoiled: int = -1  # who had connected by then may find that everything fails with EIO
    unsure: int = -1  # and these may have met any content
    coming: Content | None = None  # what an operation makes of it that has not been answered

    def as_it_is(self) -> Disk:
        """A node, to be kept for who undoes its going."""
        return Disk(self.uuid, self.content, self.family, self.of, self.is_tip)

    @property
    def sectors(self) -> int:
        return len(self.content)

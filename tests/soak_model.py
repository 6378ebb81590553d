"""What the soak knows: the content that every disk and snapshot must have, and how to read and compare it.

Every sector is filled with a number that is never used twice, so a sector that is torn, lost, stale or from another place
shows, and says where it comes from. 0 is what holes hold.

A request that was not acknowledged, because the daemon died or had no space, may be there in part: its range is in doubt, and
each sector may hold the old or the new number. An operation of the API happened wholly or not at all: until the daemon has said
which, a disk has several candidates for its whole content. Reading the disk settles both, for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from nbd_wire import READ, WireClient

__all__ = ["BLOCK", "SECTOR", "SECTORS", "Content", "Family", "Layout", "Vdi", "fill", "live_blocks", "stamps_of"]

SECTOR, BLOCK = 512, 4096
SECTORS = BLOCK // SECTOR
_READ_BYTES = 256 << 10
_READS_IN_FLIGHT = 32
_WORDS = SECTOR // 8


@dataclass(frozen=True)
class Layout:
    """Where the blocks that we use lie on a disk: one in every ``stride_blocks``. 1 is a dense disk, more a sparse one."""

    stride_blocks: int = 1

    def offset(self, sector: int) -> int:
        block, rest = divmod(sector, SECTORS)
        return block * self.stride_blocks * BLOCK + rest * SECTOR

    def size_bytes(self, sectors: int) -> int:
        """The size of a disk with that many sectors of ours."""
        return self.offset(sectors)

    def sectors(self, size_bytes: int) -> int:
        return size_bytes // (self.stride_blocks * BLOCK) * SECTORS


@dataclass
class Content:
    """``stamps`` of all sectors; ``doubts``: ranges (first sector, stamps) that may hold these instead, sector by sector."""

    stamps: np.ndarray
    doubts: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def copy(self) -> Content:
        return Content(self.stamps.copy(), [(first, other.copy()) for first, other in self.doubts])

    def resized(self, sectors: int) -> Content:
        new = self.copy()
        new.stamps = np.concatenate([new.stamps, np.zeros(sectors - len(self.stamps), dtype=np.int64)])
        return new

    def write(self, first: int, stamps: np.ndarray) -> None:
        """A write was acknowledged: no doubt is left about its range."""
        last = first + len(stamps)
        self.stamps[first:last] = stamps
        for begin, other in self.doubts:
            low, high = max(first, begin), min(last, begin + len(other))
            if low < high:
                other[low - begin : high - begin] = stamps[low - first : high - first]

    def doubt(self, first: int, stamps: np.ndarray) -> None:
        self.doubts.append((first, stamps.copy()))

    def wrong(self, first: int, found: np.ndarray) -> np.ndarray:
        """The sectors, from ``first`` on, at which ``found`` is not what may be there."""
        last = first + len(found)
        allowed = found == self.stamps[first:last]
        for begin, other in self.doubts:
            low, high = max(first, begin), min(last, begin + len(other))
            if low < high:
                allowed[low - first : high - first] |= found[low - first : high - first] == other[low - begin : high - begin]
        return first + np.flatnonzero(~allowed)


@dataclass
class Vdi:
    """A disk or a snapshot. More than one of ``candidates`` only until it is read."""

    uuid: str
    layout: Layout
    candidates: list[Content]
    snapshot_of: str | None = None

    @property
    def content(self) -> Content:
        (content,) = self.candidates
        return content

    @property
    def sectors(self) -> int:
        return len(self.content.stamps)

    def settle(self, found: np.ndarray) -> None:
        """This is all that the VDI holds. Raises AssertionError if it cannot be."""
        fitting = [one for one in self.candidates if len(one.stamps) == len(found)]
        sizes = sorted({len(one.stamps) for one in self.candidates})
        assert fitting, f"{self.uuid} has {len(found)} sectors, not {sizes}"
        wrong = [one.wrong(0, found) for one in fitting]
        if not any(len(sectors) == 0 for sectors in wrong):
            raise AssertionError(self.complain(fitting[0], wrong[0], found))
        self.candidates = [Content(found.copy())]

    def complain(self, content: Content, wrong: np.ndarray, found: np.ndarray, first: int = 0) -> str:
        at = int(wrong[0])
        have, wanted = int(found[at - first]), int(content.stamps[at])
        return (
            f"{self.uuid}{' (a snapshot)' if self.snapshot_of else ''}: {len(wrong)} sectors are wrong, the first is sector {at} "
            f"at byte {self.layout.offset(at)}: it holds {have}, not {wanted}; {len(content.doubts)} ranges are in doubt, "
            f"{len(self.candidates)} candidates"
        )

    # Reading.

    def requests(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(byte offset, bytes) of the reads that fetch these sectors."""
        step = _READ_BYTES // SECTOR if self.layout.stride_blocks == 1 else SECTORS
        at = first
        while at < last:
            stop = min(last, (at // step + 1) * step)
            yield self.layout.offset(at), (stop - at) * SECTOR
            at = stop

    def read(self, client: WireClient, first: int, last: int) -> np.ndarray:
        """The stamps of these sectors, as the daemon has them."""
        cookies: list[int] = []
        parts: list[bytes] = []

        def take() -> None:
            reply = client.reply(cookies[len(parts)])
            assert not reply.error, f"{self.uuid} cannot be read: error {reply.error} {reply.text}"
            parts.append(reply.data)

        for offset, length in self.requests(first, last):
            cookies.append(client.send(READ, offset, length))
            if len(cookies) - len(parts) >= _READS_IN_FLIGHT:
                take()
        while len(parts) < len(cookies):
            take()
        return stamps_of(b"".join(parts))


def fill(stamps: np.ndarray) -> bytes:
    """Sectors that hold ``stamps``."""
    return np.repeat(stamps.astype("<i8"), _WORDS).tobytes()


def stamps_of(data: bytes) -> np.ndarray:
    """The stamp of each sector; none may be torn."""
    words = np.frombuffer(data, dtype="<i8").reshape(-1, _WORDS)
    torn = np.flatnonzero((words != words[:, :1]).any(axis=1))
    assert not len(torn), f"sector {torn[0]} of a read is torn: it holds {np.unique(words[torn[0]]).tolist()[:4]}"
    return words[:, 0].copy()


@dataclass
class Family:
    """The VDIs of one worker: disks, their snapshots and their clones. Nothing outside of it shares blocks with it."""

    vdis: dict[str, Vdi] = field(default_factory=dict)

    @property
    def disks(self) -> list[Vdi]:
        return [vdi for vdi in self.vdis.values() if vdi.snapshot_of is None]

    @property
    def snapshots(self) -> list[Vdi]:
        return [vdi for vdi in self.vdis.values() if vdi.snapshot_of is not None]


_WEIGHTS = np.array([3, 5, 7, 11, 13, 17, 19, 23], dtype=np.int64)


def live_blocks(family: Family) -> int:
    """How many different blocks its VDIs hold, about: what any store must keep."""
    sums = [
        one.stamps.reshape(-1, SECTORS) @ _WEIGHTS for vdi in list(family.vdis.values()) for one in vdi.candidates[:1]
    ]
    return int(np.count_nonzero(np.unique(np.concatenate(sums)))) if sums else 0

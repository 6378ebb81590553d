"""Limits without waiting: when may this request start? Token buckets, queue depth, and limits shared by several disks.

Nothing here waits or is called back. A `Bucket` lets its level go below zero and says how long that debt takes to fill:
over any time T it lets no more through than size + rate * T, and one request. A `Depth` keeps the times at which the
requests in service will be done, so it knows when the next slot falls free, and how deep the queue is, for latencies
that depend on it. Both answer at once and are the same at each run with the same arrivals.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from typing import Any

from scenarios.quantities import NS, Burst

__all__ = ["Bucket", "Depth", "Limit"]

_DEFAULT_BURST_NS = NS // 10


class Bucket:
    """Tokens at ``rate`` a second, at most ``size`` of them in store. ``take`` is O(1).

    The level is kept as the moment at which the bucket is full again, in token-nanoseconds, so there is no rounding:
    tokens * NS are integers.
    """

    __slots__ = ("rate", "size", "_full_at", "taken")

    def __init__(self, rate: int, size: int) -> None:
        self.rate, self.size = rate, size
        self._full_at = 0  # ns * rate
        self.taken = 0

    def take(self, tokens: int, now: int) -> int:
        """Take tokens; returns the moment (ns) when they are really there, ``now`` or later."""
        moment = now * self.rate
        full_at = (self._full_at if self._full_at > moment else moment) + tokens * NS
        self._full_at = full_at
        self.taken += tokens
        ready = full_at - self.size * NS
        return now if ready <= moment else -(-ready // self.rate)


class Depth:
    """``slots`` requests are in service at a time, the others wait in order of arrival. O(log requests).

    ``slots`` 0: no limit, the depth is only counted. Each `start` is followed by its `finish`.
    """

    __slots__ = ("slots", "_free_at", "_done_at")

    def __init__(self, slots: int = 0) -> None:
        self.slots = slots
        self._free_at: list[int] = []  # a heap: when each slot that was used falls free
        self._done_at: list[int] = []  # a heap: when each request that is here will be gone

    def depth(self, now: int) -> int:
        """Requests in service or waiting."""
        done_at = self._done_at
        while done_at and done_at[0] <= now:
            heappop(done_at)
        return len(done_at)

    def start(self, now: int) -> int:
        """When a request that comes now gets its slot."""
        if len(self._free_at) < self.slots or not self.slots:
            return now
        return max(now, self._free_at[0])

    def finish(self, done_at: int) -> None:
        """The request that `start` was asked for last will be done then."""
        heappush(self._done_at, done_at)
        if self.slots:
            if len(self._free_at) < self.slots:
                heappush(self._free_at, done_at)
            else:
                heapreplace(self._free_at, done_at)


class Limit:
    """Bytes a second, requests a second and queue depth, each or none; one disk's or shared by a group of disks."""

    __slots__ = ("name", "buckets", "_iops_size", "queue")

    def __init__(
        self,
        name: str = "",
        rate: int = 0,
        iops: int = 0,
        burst: Burst | None = None,
        iops_size: int = 0,
        depth: int = 0,
    ) -> None:
        self.name = name
        self._iops_size = iops_size
        self.queue = Depth(depth)
        self.buckets: list[tuple[bool, Bucket]] = []  # (counts bytes, bucket)
        if rate:
            size = burst.size_bytes if burst else rate * _DEFAULT_BURST_NS // NS
            self.buckets.append((True, Bucket(rate, size)))
            if burst and burst.over_ns:
                fastest = rate + burst.size_bytes * NS // burst.over_ns
                self.buckets.append((True, Bucket(fastest, fastest * _DEFAULT_BURST_NS // NS)))
        if iops:
            self.buckets.append((False, Bucket(iops, max(1, iops * _DEFAULT_BURST_NS // NS))))

    def admit(self, length: int, now: int) -> int:
        """When a request of ``length`` bytes may start as far as rates go. It has taken its tokens then."""
        start = now
        for counts_bytes, bucket in self.buckets:
            tokens = length if counts_bytes else -(-length // self._iops_size) or 1 if self._iops_size else 1
            start = max(start, bucket.take(tokens, now)) if tokens else start
        return start

    def statistics(self) -> dict[str, Any]:
        taken = {"bytes" if counts_bytes else "requests": bucket.taken for counts_bytes, bucket in self.buckets}
        return {"limit": self.name, "depth": self.queue.slots, "taken": taken}

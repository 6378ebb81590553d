"""Latency replay: a live guest is answered with the service times of a trace.

The trace's times are sorted into buckets of what is alike: operation, size (powers of two), queue depth (powers of two). A
request gets the next time of its own bucket, in the order of the trace, so bursts and stalls stay together; where
the trace has no such bucket, of the nearest. At the end of a bucket it begins again (``loop``) or there is no time
(None), and the disk's own latency holds.

`sample` draws from the same buckets at random, for ``trace("file", op, size)`` in a latency.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from copy import copy
from heapq import heappop, heappush
from typing import Any

from scenarios.traces.records import Record
from simsr.errors import BadTrace

__all__ = ["ServiceTimes"]

_Key = tuple[str, int, int]


class ServiceTimes:
    """Memory: 8 bytes for each request of the trace."""

    def __init__(
        self,
        records: Iterable[Record],
        bucket: Sequence[str] = ("op", "size"),
        source: str = "trace",
        start_ns: int = 0,
        loop: bool = True,
    ) -> None:
        self._by_op, self._by_size, self._by_depth = ("op" in bucket, "size" in bucket, "depth" in bucket)
        self._loop = loop
        self._times: dict[_Key, array] = {}
        in_service: list[int] = []
        for record in records:
            if record.latency_ns is None:
                continue
            while in_service and in_service[0] <= record.issue_ns:
                heappop(in_service)
            depth = len(in_service) if record.depth is None else record.depth
            heappush(in_service, record.issue_ns + record.latency_ns)
            if record.issue_ns >= start_ns:
                key = self._key(record.op, record.length, depth)
                self._times.setdefault(key, array("q")).append(record.latency_ns)
        if not self._times:
            raise BadTrace(
                source=source, where="its records", reason="none says how long it took; msr, vscsi2, blktrace and blkparse do"
            )
        self._at = dict.fromkeys(self._times, 0)
        self._sorted: dict[_Key, list[int]] = {}
        self._nearest: dict[_Key, _Key] = {}
        self.given = self.ended = 0

    def again(self) -> ServiceTimes:
        """Another stream of the same times, from the beginning."""
        other = copy(self)
        other._at = dict.fromkeys(self._times, 0)
        other.given = other.ended = 0
        return other

    def _key(self, op: str, length: int, depth: int) -> _Key:
        return (
            op if self._by_op else "",
            max(0, length - 1).bit_length() if self._by_size else 0,
            depth.bit_length() if self._by_depth else 0,
        )

    def _bucket(self, key: _Key) -> _Key:
        """The bucket that is nearest to a key: the same operation if there is one, then the size, then the depth."""
        if key in self._times:
            return key
        found = self._nearest.get(key)
        if found is None:
            kin = {"zero": "write", "trim": "write", "extents": "read"}.get(key[0], key[0])
            found = min(
                self._times,
                key=lambda other: (other[0] != key[0], other[0] != kin, abs(other[1] - key[1]), abs(other[2] - key[2]), other),
            )
            self._nearest[key] = found
        return found

    def next(self, op: str, length: int, depth: int) -> float | None:
        """The next service time (ns) for such a request, or None when the trace has no more."""
        bucket = self._bucket(self._key(op, length, depth))
        times, at = self._times[bucket], self._at[bucket]
        if at == len(times):
            if not self._loop:
                self.ended += 1
                return None
            at = 0
        self._at[bucket] = at + 1
        self.given += 1
        return times[at]

    def sample(self, u: float, op: str, length: int) -> float:
        """A service time at random: percentile ``u`` of the bucket, with straight lines between the values."""
        bucket = self._bucket(self._key(op, length, 0))
        values = self._sorted.get(bucket)
        if values is None:
            values = self._sorted[bucket] = sorted(self._times[bucket])
        place = u * (len(values) - 1)
        low = values[int(place)]
        return low + (values[min(int(place) + 1, len(values) - 1)] - low) * (place - int(place))

    def percentile_of(self, op: str, length: int, value_ns: int) -> float:
        """The share of the trace's times for such a request that are not above a value."""
        values = sorted(self._times[self._bucket(self._key(op, length, 0))])
        return bisect_right(values, value_ns) / len(values)

    def statistics(self) -> dict[str, Any]:
        return {
            "given": self.given,
            "after_the_end": self.ended,
            "buckets": [
                {"op": op, "size_max": 1 << size, "depth_max": (1 << depth) - 1, "times": len(self._times[op, size, depth])}
                for op, size, depth in sorted(self._times)
            ],
        }

"""What an export allows its clients, beyond what the protocol does: how fast, and how durable.

One `Terms` object belongs to an export; all its connections look at it, so changes hold for those that are open, too. `Rate` is a pair of
token buckets, for bytes and for requests, in the form that needs no tokens: for each a time up to which what was asked for so far is paid.
A request may begin as soon as that lies no further ahead than the burst.
"""

from __future__ import annotations

from collections.abc import Iterator

from nbd_export import constants as c
from nbd_export.transmission import Request

__all__ = ["Rate", "Terms"]

BURST_NS = 100_000_000
_NS = 1_000_000_000


class Rate:
    """At most so many bytes (of READ and WRITE) and so many requests (of any kind) a second; 0: as many as there are."""

    def __init__(self, bytes_s: int = 0, requests_s: int = 0) -> None:
        self.bytes_s, self.requests_s = bytes_s, requests_s
        self._bytes_paid_ns = self._requests_paid_ns = 0

    def portions(self, batch: list[Request]) -> Iterator[list[Request]]:
        """Cut a batch, so that none of its requests has to wait for more than a burst of those behind it."""
        portion: list[Request] = []
        cost_ns = 0
        for request in batch:
            more_ns = max(self._costs(request))
            if portion and cost_ns + more_ns > BURST_NS:
                yield portion
                portion, cost_ns = [], 0
            portion.append(request)
            cost_ns += more_ns
        if portion:
            yield portion

    def take(self, portion: list[Request], now_ns: int) -> int:
        """Take what ``portion`` costs; returns for how many nanoseconds to wait before it may begin."""
        byte_costs, request_costs = zip(*map(self._costs, portion))
        before_ns = now_ns - BURST_NS  # an unused bucket holds a burst and no more
        self._bytes_paid_ns = max(self._bytes_paid_ns, before_ns) + sum(byte_costs)
        self._requests_paid_ns = max(self._requests_paid_ns, before_ns) + sum(request_costs)
        return max(0, self._bytes_paid_ns - now_ns, self._requests_paid_ns - now_ns)

    def _costs(self, request: Request) -> tuple[int, int]:
        moves = request.command in (c.NBD_CMD_READ, c.NBD_CMD_WRITE)
        byte_cost = request.length * _NS // self.bytes_s if self.bytes_s and moves else 0
        counts = self.requests_s and request.final and request.command != c.NBD_CMD_DISC
        return byte_cost, _NS // self.requests_s if counts else 0


class Terms:
    """The terms of one export.

    ``rate``: None if there is no limit. ``each_write_durable``: whether a write is answered only when it is durable, whatever its flags; for
    clients that never flush. None: if the client is one that is known for it (tapdisk).
    """

    def __init__(self) -> None:
        self.rate: Rate | None = None
        self.each_write_durable: bool | None = None

    def set_rate(self, bytes_s: int, requests_s: int) -> None:
        """Change the limits; what was used up stays so, if they are the same as before."""
        if not bytes_s and not requests_s:
            self.rate = None
        elif self.rate is None or (self.rate.bytes_s, self.rate.requests_s) != (bytes_s, requests_s):
            self.rate = Rate(bytes_s, requests_s)

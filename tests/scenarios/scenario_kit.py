"""Kit of the scenario tests: small scenarios, disks under them, and requests in time."""

from __future__ import annotations

from scenarios.engine import Engine
from scenarios.loader import load
from scenarios.request import Plan, Request

MS, S = 10**6, 10**9
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HEAD = 'simsr = 1\nname = "test"\n'


def scenario(text: str = "", traces=None):
    """A scenario with the head that each needs."""
    return load(HEAD + text, "test.toml", traces)


def engine(text: str = "", **more) -> Engine:
    return Engine(scenario(text), **more)


def disk(text: str = "", size_bytes: int = GIB, name: str = "disk", **more):
    """One disk under a scenario; its engine is ``disk._engine``."""
    return engine(text, **more).disk(name, size_bytes)


def ask(disk, op: str = "read", offset: int = 0, length: int = 4096, at: int = 0, **more) -> Plan:
    return disk.decide(Request(op, offset, length, **more), at)


def fired(disk, count: int, op: str = "read", **more) -> list[int]:
    """Which of ``count`` requests (from 1) a rule fired at."""
    return [number for number in range(1, count + 1) if ask(disk, op, **more).rules]


def orders(engine) -> list[tuple]:
    """(kind, seconds, details) of what the engine wants done, without what tests look at seldom."""
    return [(order.kind, order.at_ns / S, order.details) for order in engine.take_orders() if order.kind != "applies"]


class Store:
    """A disk's bytes and its overlay, used as a face must use them."""

    def __init__(self, size_bytes: int, overlay) -> None:
        self.data = bytearray(size_bytes)
        self.overlay = overlay
        self._snapshots: dict[str, bytes] = {}

    def write(self, offset: int, data: bytes, effects=(), now: int = 0) -> None:
        before = [bytes(self.data[at : at + length]) for at, length in self.overlay.before(offset, len(data), effects)]
        self.data[offset : offset + len(data)] = data
        self.overlay.wrote(offset, data, now, effects, before)
        self.overlay._check()

    def read(self, offset: int, length: int, effects=(), now: int = 0) -> bytes:
        at = self.overlay.source(offset, effects)
        view = bytearray(self.data[at : at + length])
        self.overlay.show(offset, memoryview(view), now, effects)
        return bytes(view)

    def snapshot(self, name: str) -> None:
        self._snapshots[name] = bytes(self.data)
        self.overlay.snapshot(name)

    def revert(self, name: str) -> None:
        self.data[:] = self._snapshots[name]
        self.overlay.revert(name)

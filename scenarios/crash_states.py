"""The states in which a disk can be after a crash, enumerated from a log of its writes and flushes.

A *cut* is a place in the log: what is before it had been answered when the power went. There, writes that a flush covered and FUA writes
are on the medium for certain; any subset of the others may be, laid over each other in the order in which they were answered, and one of
them perhaps only in part: its first sectors, its last ones, or some. A state is a cut and such a subset; it has a name that says which (`CrashState.name`), so it can be made
again from the same log. Where states have the same content one of them is enough (`Contents`).

Which subsets: all, none, one alone, all but one, a prefix, half of them at random, torn ones. Most bugs that a crash finds need one write to be
there without one other that came before it (ALICE, Pillai et al., OSDI 2014; CrashMonkey, Mohan et al., OSDI 2018), so these come first.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from scenarios.draws import Draws
from scenarios.patches import Patches

__all__ = ["Entry", "CrashState", "Contents", "SECTOR_BYTES", "enumerate_states", "parse_state", "pieces_of", "sector_hashes", "touched"]

SECTOR_BYTES = 512
"""Written whole or not at all."""

_ROUNDS_MAX = 24
_TRIES = 20  # for each state that is wanted
_KINDS = 8
_NAME = re.compile(r"(\d{1,9})-(all|none|(first|only|without)(\d{1,9})|some(\d{1,19})x(\d{1,9}))(?:-(?:(torn|tail)(\d{1,9})|mix(\d{1,9})x(\d{1,6})))?")


class Entry(NamedTuple):
    """One line of a log. ``kind``: write, zero (a write of zeros), flush. Writes begin and end at sectors.

    ``length``: bytes; of a flush: how many writes of the log it makes stable. ``stable``: the write was stable when it was answered (FUA).
    """

    kind: str
    offset: int
    length: int
    stable: bool = False


class CrashState(NamedTuple):
    """``cut``: entries before the crash. ``keep``: all, none, first, only, without, some. ``number`` (from 1): of the write among those that may
    be lost; for "some" the number of the draw.

    ``torn``: one write is there in part: the one that "without" names, else the last that is kept. ``tear`` says which part: "torn" its first so
    many sectors, "tail" all but these, "mix" some, where ``torn`` is the number of the draw and ``unit`` so many sectors are whole or missing.
    """

    cut: int
    keep: str
    number: int = 0
    seed: int = 0
    torn: int | None = None
    tear: str = "torn"
    unit: int = 1

    @property
    def name(self) -> str:
        number = f"{self.seed}x{self.number}" if self.keep == "some" else self.number or ""
        part = "" if self.torn is None else f"-{self.tear}{self.torn}" + (f"x{self.unit}" if self.tear == "mix" else "")
        return f"{self.cut}-{self.keep}{number}{part}"


def parse_state(name: str) -> CrashState | None:
    """The state of that name; None if it is no name of a state."""
    if (found := _NAME.fullmatch(name)) is None:
        return None
    cut, whole, numbered, number, seed, draw, tear, torn, mix, unit = found.groups()
    part: tuple[Any, ...] = (None,)
    if tear is not None:
        part = int(torn), tear
    elif mix is not None:
        part = int(mix), "mix", max(1, int(unit))
    if draw is not None:
        return CrashState(int(cut), "some", int(draw), int(seed), *part)
    return CrashState(int(cut), numbered or whole, int(number or 0), 0, *part)


class Log:
    """A log, with what is asked of it again and again."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._writes = [place for place, entry in enumerate(entries) if entry.kind != "flush"]
        self._last: tuple[int, tuple[list[int], list[int]]] = (-1, ([], []))

    def at(self, cut: int) -> tuple[list[int], list[int]]:
        """(writes that are on the medium, writes that may be lost) of a cut, as places in the log. Linear in the cut."""
        if self._last[0] != cut:
            self._last = cut, self._split(cut)
        return self._last[1]

    def _split(self, cut: int) -> tuple[list[int], list[int]]:
        covered = max((entry.length for entry in self.entries[:cut] if entry.kind == "flush"), default=0)
        certain, doubtful = [], []
        for number, place in enumerate(self._writes):
            if place >= cut:
                break
            (certain if number < covered or self.entries[place].stable else doubtful).append(place)
        return certain, doubtful


def _kept(doubtful: list[int], state: CrashState) -> list[int]:
    match state.keep:
        case "all":
            return doubtful
        case "none":
            return []
        case "first":
            return doubtful[: state.number]
        case "only":
            return doubtful[state.number - 1 : state.number]
        case "without":
            return doubtful[: state.number - 1] + doubtful[state.number :]
    draws = Draws(state.seed, "some", state.cut, state.number)
    return [place for place in doubtful if draws(place)[0] < 0.5]


def _applied(log: Log, state: CrashState) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(place, parts of it that are there, as bytes from its beginning) of the writes that are there, in order."""
    certain, doubtful = log.at(state.cut)
    kept, torn = _kept(doubtful, state), []
    if state.torn is not None and state.keep == "without":
        kept, torn = doubtful, doubtful[max(0, state.number - 1) : state.number]
    elif state.torn is not None:
        torn = kept[-1:]
    for place in sorted([*certain, *kept]):
        entry = log.entries[place]
        yield place, _parts(entry, place, state) if place in torn else [(0, entry.length)]


def _parts(entry: Entry, place: int, state: CrashState) -> list[tuple[int, int]]:
    """What is there of a torn write."""
    length = entry.length
    if state.tear != "mix":
        at = min(length, (state.torn or 0) * SECTOR_BYTES)
        return [(0, at) if state.tear == "torn" else (at, length)]
    unit, words = state.unit * SECTOR_BYTES, Draws("mix", state.cut, place, state.torn)
    first, last = entry.offset // unit, (entry.offset + length - 1) // unit
    kept = [number for number in range(first, last + 1) if words(number // 8)[number % 8] < 0.5]
    return [(max(0, number * unit - entry.offset), min(length, (number + 1) * unit - entry.offset)) for number in kept]


def pieces_of(
    entries: Sequence[Entry], state: CrashState, data: Callable[[int], memoryview]
) -> list[tuple[int, int, memoryview | None]]:
    """What to write over the base for a state: (offset, length, data or None for zeros), no byte twice. ``data``: of the entry at a place."""
    image = Patches()
    for place, parts in _applied(Log(entries), state):
        entry = entries[place]
        for start, end in parts:
            if entry.kind == "zero":
                image.put(entry.offset + start, _zeros(end - start), "zero")
            else:
                image.put(entry.offset + start, data(place)[start:end], "write")
    return [(start, len(piece.data), None if piece.rule == "zero" else piece.data) for start, piece in image.all()]


def _zeros(length: int) -> memoryview:
    """Stands for zeros: one byte of memory, whatever the length."""
    return memoryview(np.broadcast_to(np.zeros(1, np.uint8), length))


# Which states have the same content.


def touched(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Everything that is written: where it begins and where it ends, in order."""
    ranges: list[tuple[int, int]] = []
    for start, end in sorted((entry.offset, entry.offset + entry.length) for entry in entries if entry.kind != "flush"):
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], end)
        else:
            ranges.append((start, end))
    return ranges


class Contents:
    """Tells whether states differ: a hash for each sector that the log touches, and one over them for a state.

    ``base``: the `sector_hashes` of what was on the `touched` ranges before the log begins, in order; ``data``: the bytes of an entry.
    Memory: 8 bytes for each sector written.
    """

    def __init__(self, entries: Sequence[Entry], base: np.ndarray, data: Callable[[int], memoryview]) -> None:
        self._log, self._base, self._data = Log(entries), base, data
        self._starts, self._index = [], [0]
        for start, end in touched(entries):
            self._starts.append(start)
            self._index.append(self._index[-1] + (end - start) // SECTOR_BYTES)
        self._hashes: dict[int, np.ndarray] = {}
        self._zero = sector_hashes(bytes(SECTOR_BYTES))[0]

    def digest(self, state: CrashState) -> bytes:
        """The same for states with the same content."""
        sectors = self._base.copy()
        for place, parts in _applied(self._log, state):
            entry = self._log.entries[place]
            at = bisect_right(self._starts, entry.offset) - 1
            first = self._index[at] + (entry.offset - self._starts[at]) // SECTOR_BYTES
            for start, end in parts:
                low, high = start // SECTOR_BYTES, end // SECTOR_BYTES
                sectors[first + low : first + high] = self._zero if entry.kind == "zero" else self._of(place)[low:high]
        return blake2b(sectors.tobytes(), digest_size=16).digest()

    def _of(self, place: int) -> np.ndarray:
        if place not in self._hashes:
            self._hashes[place] = sector_hashes(self._data(place))
        return self._hashes[place]


_MULTIPLIERS = np.frombuffer(blake2b(b"crash states", digest_size=64).digest() * 8, np.uint64).copy()
_MULTIPLIERS += np.arange(64, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS |= np.uint64(1)


def sector_hashes(data: bytes | memoryview) -> np.ndarray:
    """64 bits for each sector."""
    words = np.frombuffer(data, np.uint64).reshape(-1, SECTOR_BYTES // 8)
    mixed = words ^ (words >> np.uint64(32))
    sums = (mixed * _MULTIPLIERS).sum(axis=1, dtype=np.uint64)
    sums ^= sums >> np.uint64(29)
    return sums * np.uint64(0xBF58476D1CE4E5B9)


# Enumeration.


def enumerate_states(
    entries: Sequence[Entry], wanted: int, seed: int, digest: Callable[[CrashState], bytes], sector_bytes: int = SECTOR_BYTES
) -> list[CrashState]:
    """Up to ``wanted`` states with different content, of cuts all over the log; the same ones for the same log and seed.

    The end of the log, whole, is always the first. Writes are torn between sectors of ``sector_bytes``, a multiple of 512. Fewer come back if the log has no more, or if most draws bring nothing new.
    """
    found: dict[bytes, CrashState] = {}
    for state in islice(_candidates(Log(entries), max(1, wanted // _KINDS), seed, sector_bytes), _TRIES * wanted + _TRIES * _TRIES):
        found.setdefault(digest(state), state)
        if len(found) >= wanted:
            break
    return list(found.values())


def _candidates(log: Log, batch: int, seed: int, sector_bytes: int) -> Iterator[CrashState]:
    """All kinds of some cuts, then of others, until there are no more; then more draws for all of them."""
    cuts = _cuts(log.entries, seed)
    yield CrashState(cuts[0], "all")
    for begin in range(0, len(cuts), batch):
        for cut in cuts[begin : begin + batch]:
            for round_ in range(_KINDS):
                yield from _state(log, cut, round_, seed, sector_bytes)
    for round_ in range(_KINDS, _ROUNDS_MAX):
        for cut in cuts:
            yield from _state(log, cut, round_, seed, sector_bytes)


def _cuts(entries: Sequence[Entry], seed: int) -> list[int]:
    """All cuts: the end, then, in an order drawn, those before and behind a flush and the others by turns."""
    draws = Draws(seed, "cuts")
    end = len(entries)
    near = {cut for place, entry in enumerate(entries) if entry.kind == "flush" for cut in (place, place + 1)} - {end}
    far = set(range(end)) - near
    first, second = (sorted(some, key=lambda cut: draws(cut)[0]) for some in (near, far))
    mixed = [cut for pair in zip(first, second) for cut in pair]
    shorter = min(len(first), len(second))
    return [end, *mixed, *first[shorter:], *second[shorter:]]


def _state(log: Log, cut: int, round_: int, seed: int, sector_bytes: int) -> Iterator[CrashState]:
    _, doubtful = log.at(cut)
    count = len(doubtful)
    if not count:
        if round_ == 0:
            yield CrashState(cut, "none")
        return
    u = Draws(seed, "state", cut)(round_)
    one = 1 + int(u[0] * count)
    match round_:
        case 0:
            yield CrashState(cut, "all")
        case 1:
            yield CrashState(cut, "none")
        case 2:
            yield CrashState(cut, "only", count)
        case 3:
            yield CrashState(cut, "without", one)
        case 4:
            yield CrashState(cut, "first", one)
        case 5:
            yield CrashState(cut, "all", 0, 0, *_tear(log.entries[doubtful[-1]], u, round_, sector_bytes))
        case 6:
            yield CrashState(cut, "some", round_, seed)
        case _:
            kept = _kept(doubtful, CrashState(cut, "some", round_, seed))
            if u[3] < 0.3:
                yield CrashState(cut, "only", one)
            elif u[3] < 0.5:
                yield CrashState(cut, "without", one, 0, *_tear(log.entries[doubtful[one - 1]], u, round_, sector_bytes))
            else:
                part = _tear(log.entries[kept[-1]], u, round_, sector_bytes) if kept and u[2] < 0.25 else (None,)
                yield CrashState(cut, "some", round_, seed, *part)


def _tear(entry: Entry, u: Sequence[float], round_: int, sector_bytes: int) -> tuple[int, str, int]:
    """``torn``, ``tear`` and ``unit`` of a state that has a write in part: up to a sector's end, from there on, or some of its sectors."""
    if u[4] < 0.3:
        return round_, "mix", sector_bytes // SECTOR_BYTES
    end = (entry.offset + int(u[1] * entry.length)) // sector_bytes * sector_bytes
    return max(0, end - entry.offset) // SECTOR_BYTES, "torn" if u[4] < 0.7 else "tail", 1

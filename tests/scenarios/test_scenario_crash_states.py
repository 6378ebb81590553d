"""Crash states of a log: all that are legal can be found, none that is not, each once, and each can be made again from its name."""

import random
from itertools import combinations

import pytest

from scenarios.crash_states import SECTOR_BYTES, Contents, CrashState, Entry, enumerate_states, parse_state, pieces_of, sector_hashes, touched

DISK = 16 * SECTOR_BYTES


class Recording:
    """A log on a small disk with its data."""

    def __init__(self, *lines, base=bytes(DISK)):
        self.entries, self._data, self.base = [], [], base
        for line in lines:
            self.add(*line)

    def add(self, kind, first=0, sectors=1, letter=b"", stable=False):
        if kind == "flush":
            self.entries.append(Entry("flush", 0, first))
        else:
            self.entries.append(Entry(kind, first * SECTOR_BYTES, sectors * SECTOR_BYTES, stable))
        self._data.append(letter * (sectors * SECTOR_BYTES))

    def data(self, place):
        return memoryview(self._data[place])

    def image(self, state):
        disk = bytearray(self.base)
        for offset, length, view in pieces_of(self.entries, state, self.data):
            disk[offset : offset + length] = bytes(length) if view is None else view
        return bytes(disk)

    def contents(self):
        base = b"".join(self.base[start:end] for start, end in touched(self.entries))
        return Contents(self.entries, sector_hashes(base), self.data)

    def states(self, wanted, seed=0, **more):
        return enumerate_states(self.entries, wanted, seed, self.contents().digest, **more)

    def legal(self):
        """Every image without torn writes that any cut may leave, the slow and obvious way."""
        images = set()
        for cut in range(len(self.entries) + 1):
            before = self.entries[:cut]
            covered = max((entry.length for entry in before if entry.kind == "flush"), default=0)
            writes = [place for place, entry in enumerate(before) if entry.kind != "flush"]
            doubtful = [place for number, place in enumerate(writes) if number >= covered and not before[place].stable]
            for count in range(len(doubtful) + 1):
                for lost in combinations(doubtful, count):
                    disk = bytearray(self.base)
                    for place in writes:
                        if place not in lost:
                            entry = self.entries[place]
                            data = bytes(entry.length) if entry.kind == "zero" else self._data[place]
                            disk[entry.offset : entry.offset + entry.length] = data
                    images.add(bytes(disk))
        return images


def some(seed):
    """A random log of a few writes, zeros, FUA writes and flushes, each of which covers some of what was answered."""
    rng = random.Random(seed)
    log = Recording(base=bytes(rng.randrange(2) for _ in range(DISK)))
    writes = 0
    for _ in range(rng.randrange(3, 9)):
        if rng.random() < 0.25:
            log.add("flush", rng.randrange(max(0, writes - 1), writes + 1))
            continue
        sectors = rng.randrange(1, 4)
        kind, letter = ("zero", b"") if rng.random() < 0.2 else ("write", bytes([rng.randrange(1, 4)]))
        log.add(kind, rng.randrange(16 - sectors), sectors, letter, rng.random() < 0.2)
        writes += 1
    return log


def test_whole_states_are_legal_and_with_few_writes_all_are_found(seeds, note):
    small = 0
    for seed in seeds(60):
        with note(seed=seed):
            log = some(seed)
            legal, states = log.legal(), log.states(10_000)
            assert {log.image(state) for state in states if state.torn is None} <= legal
            if len(legal) <= 8:
                assert legal <= {log.image(state) for state in states}
                small += 1
    assert small


def test_each_content_comes_once_and_the_digest_tells_contents_apart(seeds, note):
    for seed in seeds(40):
        with note(seed=seed):
            log = some(seed)
            images = [log.image(state) for state in log.states(10_000)]
            assert len(set(images)) == len(images)


def test_what_was_there_before_is_no_difference():
    log = Recording(("write", 0, 2, b"\1"), base=b"\1" * DISK)
    assert [state.name for state in log.states(100)] == ["1-all"]


def test_the_same_for_the_same_seed_only_and_no_more_than_wanted():
    log = Recording(*[("write", place, 1, b"\1") for place in range(12)])
    names = [state.name for state in log.states(40, seed=5)]
    assert names == [state.name for state in log.states(40, seed=5)] and len(names) == 40
    assert names != [state.name for state in log.states(40, seed=6)]


def test_names_say_everything():
    log = Recording(*[("write", place, 2, b"\1") for place in range(8)])
    for state in log.states(200, seed=1 << 62):
        assert parse_state(state.name) == state
        assert log.image(parse_state(state.name)) == log.image(state)


@pytest.mark.parametrize("name", ["", "x", "1", "1-most", "1-only", "1-all1", "-1-all", "1-some3", "1-all-torn", "1-all-mix3", "1-all-torn3x2", "1-all ", "9" * 12 + "-all"])
def test_what_is_no_name(name):
    assert parse_state(name) is None


def test_a_write_without_the_one_before_it_is_among_the_first():
    """The state that most bugs need: of the writes of an epoch only the last."""
    lines = []
    for number in range(50):
        lines += [("write", number % 8, 1, b"\1"), ("write", 8 + number % 8, 1, b"\2"), ("flush", 2 * number + 2)]
    states = Recording(*lines).states(100)
    assert sum(state.keep == "only" for state in states) >= 5


class TestTorn:
    LOG = Recording(("write", 0, 8, b"\1"))

    def sectors(self, state, count=8):
        """Which of the first sectors are there whole; none is there in part."""
        image = self.LOG.image(state)
        parts = [image[at : at + SECTOR_BYTES] for at in range(0, count * SECTOR_BYTES, SECTOR_BYTES)]
        assert all(part in (b"\1" * SECTOR_BYTES, bytes(SECTOR_BYTES)) for part in parts)
        return [number for number, part in enumerate(parts) if part[0]]

    def test_its_first_sectors_its_last_or_some(self):
        torn = [state for seed in range(5) for state in self.LOG.states(1000, seed) if state.torn is not None]
        assert {state.tear for state in torn} == {"torn", "tail", "mix"}
        for state in torn:
            assert parse_state(state.name) == state
            there = self.sectors(state)
            if state.tear != "mix":
                assert there == list(range(state.torn) if state.tear == "torn" else range(state.torn, 8))
        assert any(self.sectors(state) != list(range(len(self.sectors(state)))) for state in torn), "not only the first ones"

    def test_between_sectors_of_the_device(self):
        torn = [state for state in self.LOG.states(1000, sector_bytes=4 * SECTOR_BYTES) if state.torn is not None]
        assert torn
        for state in torn:
            assert self.sectors(state) in ([], [0, 1, 2, 3], [4, 5, 6, 7], list(range(8))), state.name

    def test_one_that_is_not_the_last(self):
        log = Recording(("write", 0, 8, b"\1"), ("write", 8, 8, b"\2"))
        image = log.image(parse_state("2-without1-torn3"))
        assert image == b"\1" * 3 * SECTOR_BYTES + bytes(5 * SECTOR_BYTES) + b"\2" * 8 * SECTOR_BYTES
        found = [state for seed in range(5) for state in log.states(1000, seed) if state.keep == "without" and state.torn is not None]
        assert found and all(log.image(state)[8 * SECTOR_BYTES :] in (b"\2" * 8 * SECTOR_BYTES,) for state in found if state[:3] == (2, "without", 1))

    def test_what_a_flush_covers_is_not_torn(self):
        log = Recording(("write", 0, 8, b"\1"), ("flush", 1), ("write", 8, 8, b"\2", True))
        state = CrashState(3, "all", torn=0)
        assert log.image(state) == b"\1" * (DISK // 2) + b"\2" * (DISK // 2)


def test_a_flush_covers_what_was_answered_before_it_was_asked_for():
    log = Recording(("write", 0, 1, b"\1"), ("write", 1, 1, b"\2"), ("flush", 1))
    assert log.image(CrashState(3, "none"))[: 2 * SECTOR_BYTES] == b"\1" * SECTOR_BYTES + bytes(SECTOR_BYTES)


def test_large_zeros_take_no_memory():
    log = [Entry("zero", 0, 1 << 40)]
    assert [(offset, length, view) for offset, length, view in pieces_of(log, CrashState(1, "all"), lambda place: None)] == [(0, 1 << 40, None)]


def test_an_empty_log_has_one_state():
    assert [state.name for state in Recording().states(10)] == ["0-all"]

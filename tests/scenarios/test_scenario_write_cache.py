"""Power cuts: what is left is a legal subset of the writes since the last flush, in whole sectors of the disk."""

import random

import pytest

from scenarios import write_cache
from scenarios.draws import Draws
from scenarios.write_cache import WriteCache

SECTOR, SIZE = 512, 16 * 512


class Disk:
    """A disk with a volatile cache."""

    def __init__(self):
        self.data, self.cache = bytearray(SIZE), WriteCache()
        self.cache.keeps = True

    def write(self, sector, letter, count=1, stable=False, shift=0):
        offset, data = sector * SECTOR + shift, letter * count * SECTOR
        self.cache.before(offset, bytes(self.data[offset : offset + len(data)]))
        self.data[offset : offset + len(data)] = data
        self.cache.wrote(offset, data, stable)

    def flush(self):
        self.cache.flushed(self.cache.mark())

    def cut(self, keep, seed=0, **more):
        for offset, data in self.cache.cut(keep, Draws(seed, "cut"), **more):
            self.data[offset : offset + len(data)] = data
        return self.letters()

    def letters(self):
        parts = [bytes(self.data[at : at + SECTOR]) for at in range(0, SIZE, SECTOR)]
        assert all(part == part[:1] * SECTOR for part in parts), "no sector is there in part"
        return "".join(part[:1].decode().replace("\0", ".") for part in parts).rstrip(".")


def some():
    disk = Disk()
    disk.write(0, b"f")
    disk.flush()
    for number, letter in enumerate((b"a", b"b", b"c", b"d")):
        disk.write(number, letter)
    disk.write(4, b"s", stable=True)
    return disk


@pytest.mark.parametrize("keep, left", [("none", "f...s"), ("all", "abcds"), ((1, 4), "a..ds"), ((2, 9), "fb..s")])
def test_what_was_flushed_or_fua_stays_and_of_the_rest_what_is_said(keep, left):
    assert some().cut(keep) == left


def test_a_prefix_and_a_share():
    assert {some().cut("prefix", seed) for seed in range(60)} == {"f...s", "a...s", "ab..s", "abc.s", "abcds"}
    assert len({some().cut(0.5, seed) for seed in range(200)}) == 16, "any subset"


def test_the_last_one_is_torn_between_sectors_of_the_disk_in_order():
    def cut(seed):
        disk = Disk()
        disk.write(1, b"x", 9)
        return disk.cut("all", seed, torn_bytes=4 * SECTOR)

    assert {cut(seed) for seed in range(60)} == {"", ".xxx", ".xxxxxxx", ".xxxxxxxxx"}


def test_in_any_order_any_of_its_sectors_may_be_missing():
    def cut(seed):
        disk = Disk()
        disk.write(0, b"o", 4)
        disk.flush()
        disk.write(0, b"n", 4)
        return disk.cut("all", seed, torn_bytes=SECTOR, order="any")

    assert len({cut(seed) for seed in range(300)}) == 16


def test_in_any_order_the_later_one_need_not_win():
    def cut(seed, order):
        disk = Disk()
        disk.write(0, b"1")
        disk.write(0, b"2")
        return disk.cut("all", seed, order=order)

    assert {cut(seed, "any") for seed in range(40)} == {"1", "2"} and {cut(seed, "completion") for seed in range(40)} == {"2"}


class Model:
    """What a disk with a volatile cache may hold: everything that was written, in order, less what a cut loses."""

    def __init__(self):
        self.writes = []  # [number, offset, data, may be lost]

    def wrote(self, number, offset, data, stable):
        self.writes.append([number, offset, data, not stable])

    def flushed(self, mark):
        for write in self.writes:
            write[3] = write[3] and write[0] > mark

    def content(self, lost=()):
        data = bytearray(64)
        for number, offset, written, _ in self.writes:
            if number not in lost:
                data[offset : offset + len(written)] = written
        return bytes(data)

    def unstable(self):
        """number -> how many of its bytes no stable write has overwritten since."""
        left = {}
        for place, (number, offset, data, may_be_lost) in enumerate(self.writes):
            if may_be_lost:
                after = [set(range(at, at + len(more))) for _, at, more, unstable in self.writes[place + 1 :] if not unstable]
                left[number] = len(set(range(offset, offset + len(data))).difference(*after))
        return {number: count for number, count in left.items() if count}


def test_any_history_against_a_model(seeds):
    """Overlapping writes, FUA, flushes that cover what came before they were asked for; then a cut, and whatever it keeps is what it says."""
    for seed in seeds(400):
        rng = random.Random(seed)
        cache, model, content = WriteCache(), Model(), bytes(64)
        mark = cache.mark()
        for _ in range(rng.randrange(1, 12)):
            if (draw := rng.random()) < 0.12:
                mark = cache.mark()
            elif draw < 0.24:
                cache.flushed(mark)
                model.flushed(mark)
            else:
                offset, stable = rng.randrange(60), rng.random() < 0.3
                data = rng.randbytes(rng.randrange(1, min(24, 65 - offset)))
                cache.before(offset, content[offset : offset + len(data)])
                cache.wrote(offset, data, stable)
                model.wrote(cache.number, offset, data, stable)
                content = model.content()
        unstable = model.unstable()
        assert cache.statistics() == {"writes": len(unstable), "bytes": sum(unstable.values()), "destaged": 0}
        numbers = sorted(unstable)
        assert cache.unstable == numbers
        places = [place for place in range(-1, len(numbers) + 3) if rng.random() < 0.5]
        kept = {numbers[place - 1] for place in places if 1 <= place <= len(numbers)}
        keep, kept = rng.choice([("none", set()), ("all", set(numbers)), (tuple(places), kept)])
        left = bytearray(content)
        for offset, data in cache.cut(keep, Draws(seed, "cut")):
            left[offset : offset + len(data)] = data
        assert bytes(left) == model.content(set(numbers) - kept)
        assert cache.statistics() == {"writes": 0, "bytes": 0, "destaged": 0}


def test_what_does_not_fit_into_the_cache_is_on_the_medium(monkeypatch):
    monkeypatch.setattr(write_cache, "CACHE_BYTES_MAX", 3 * SECTOR)
    disk = Disk()
    disk.write(0, b"a", 2)
    disk.write(2, b"b")
    assert disk.cache.statistics() == {"writes": 2, "bytes": 3 * SECTOR, "destaged": 0}
    disk.write(3, b"c")
    assert disk.cache.statistics() == {"writes": 2, "bytes": 2 * SECTOR, "destaged": 1}
    assert disk.cut("none") == "aa", "the oldest went first"
    disk.write(4, b"d", 3)
    assert disk.cache.statistics() == {"writes": 1, "bytes": 3 * SECTOR, "destaged": 1}


def test_only_the_last_of_what_is_kept_is_torn():
    def cut(seed):
        disk = Disk()
        disk.write(0, b"a", 3)
        disk.write(5, b"b", 3)
        disk.write(10, b"c", 3)
        return disk.cut((1, 2), seed, torn_bytes=SECTOR)

    assert {cut(seed) for seed in range(60)} == {"aaa", "aaa..b", "aaa..bb", "aaa..bbb"}


def test_which_sectors_are_missing_has_nothing_to_do_with_whether_it_is_kept():
    """With a share of writes kept and torn in any order every sector is as likely to be there as any other."""
    found = set()
    for seed in range(400):
        disk = Disk()
        disk.write(0, b"n", 12)
        left = disk.cut(0.5, seed, torn_bytes=SECTOR, order="any")
        found |= {(sector, left[sector : sector + 1] == "n") for sector in range(12)}
    assert len(found) == 24

"""Power cuts: what is left is a legal subset of the writes since the last flush, in whole sectors of the disk."""

import pytest

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

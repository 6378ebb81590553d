"""Draws: even, independent of each other, and a function of who asks and the number alone."""

import pytest

from scenarios.draws import DRAWS_MAX, BlockHash, Draws


def test_the_same_for_the_same():
    assert Draws(7, "rule", "disk", "read")(5) == Draws(7, "rule", "disk", "read")(5)
    values = {Draws(*who)(n) for who in [(7, "rule"), (8, "rule"), (7, "rules"), ("7r", "ule")] for n in range(10)}
    assert len(values) == 40
    assert Draws(1, count=3)(4) != Draws(1, count=8)(4)[:3], "counts are parts of the key: no one may rely on a prefix"


def test_known_values():
    """The numbers are part of the format: a seed in a bug report must mean the same next year."""
    assert Draws(7, "rule", "disk")(1)[0] == pytest.approx(0.6457649903505386, abs=1e-15)
    assert BlockHash(7, "rule", "disk").word(1) == 17080066700576110929


@pytest.mark.parametrize("at", range(DRAWS_MAX))
def test_even(at):
    draws = Draws(1, "even")
    values = [draws(number)[at] for number in range(8000)]
    assert all(0 < value < 1 for value in values)
    counts = [sum(low / 10 <= value < (low + 1) / 10 for value in values) for low in range(10)]
    chi = sum((count - 800) ** 2 / 800 for count in counts)
    assert chi < 28, "9 degrees of freedom: 28 is one in a thousand"


def test_no_correlation_between_numbers_of_one_request_or_neighbours():
    draws = Draws(2)
    rows = [draws(number) for number in range(4000)]
    for a, b in [(0, 1), (3, 7)]:
        assert abs(sum((row[a] - 0.5) * (row[b] - 0.5) for row in rows) / 4000 * 12) < 0.06
    assert abs(sum((x[0] - 0.5) * (y[0] - 0.5) for x, y in zip(rows, rows[1:], strict=False)) / 4000 * 12) < 0.06


class TestBlocks:
    def test_a_range_is_what_its_blocks_are(self):
        places = BlockHash(3, "x")
        whole = places.below(0, 5000, 0.02)
        assert 60 < len(whole) < 145
        for first, count in [(0, 5000), (17, 1), (100, 12), (100, 13), (4000, 900)]:
            assert places.below(first, count, 0.02) == [block for block in whole if first <= block < first + count]
        assert whole == [block for block in range(5000) if places.word(block) < int(0.02 * 2.0**64)]

    def test_growing_only_adds(self):
        places = BlockHash(3, "x")
        found = [set(places.below(0, 20000, rate)) for rate in (0, 0.001, 0.01, 0.5, 1)]
        assert found[0] == set() and len(found[-1]) == 20000
        assert all(less <= more for less, more in zip(found, found[1:], strict=False))

    def test_far_away(self):
        places = BlockHash(3, "x")
        far = 2**52
        assert places.below(far, 300, 0.1) == [
            block for block in range(far, far + 300) if places.word(block) < int(0.1 * 2.0**64)
        ]


def test_the_ends_are_never_reached():
    """0 and 1 have no logarithm and no quantile: the largest and the smallest word must stay inside."""

    class Ends:
        def __init__(self, byte):
            self.byte = byte

        def update(self, data):
            pass

        def digest(self):
            return bytes([self.byte]) * 8

    for byte in (0, 255):
        draws = Draws(1, count=1)
        draws._copy = lambda byte=byte: Ends(byte)
        assert 0 < draws(1)[0] < 1

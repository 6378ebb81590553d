"""Limits: a bucket never lets more through than it may, never less than it must, and a queue serves so many at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_kit import MIB, MS, S, ask, disk, engine

from scenarios.limits import Bucket, Depth, Limit
from scenarios.quantities import Burst

arrivals = st.lists(st.tuples(st.integers(0, S // 10), st.integers(1, 1 << 20)), min_size=1, max_size=60)


@given(arrivals, st.integers(1, 10**8), st.integers(0, 10**7))
@settings(derandomize=True, database=None, max_examples=200, deadline=None)
def test_conservation(arrivals, rate, size):
    """Between any two starts no more passes than size + rate * time, and the one request that ends it."""
    bucket, now, passed = Bucket(rate, size), 0, []
    for gap, tokens in arrivals:
        now += gap
        start = bucket.take(tokens, now)
        assert start >= now
        passed.append((start, tokens))
    assert [start for start, _ in passed] == sorted(start for start, _ in passed), "first come, first served"
    for first in range(len(passed)):
        total = 0
        for start, tokens in passed[first:]:
            assert total * S <= size * S + rate * (start - passed[first][0]) + passed[first][1] * S
            total += tokens
    assert bucket.taken == sum(tokens for _, tokens in arrivals)


@given(arrivals, st.integers(1, 10**8), st.integers(0, 10**7))
@settings(derandomize=True, database=None, max_examples=100, deadline=None)
def test_nobody_waits_without_need(arrivals, rate, size):
    """A request that waits starts exactly when its tokens are there: all that was ever let in, and no nanosecond later."""
    bucket, now = Bucket(rate, size), 0
    total, idle_since = 0, 0  # tokens taken since the bucket was last full, and when that was
    for gap, tokens in arrivals:
        now += gap
        if total * S <= rate * (now - idle_since):
            total, idle_since = 0, now
        total += tokens
        need = max(0, total - size)
        assert bucket.take(tokens, now) == max(now, idle_since + -(-need * S // rate))


def test_a_steady_rate():
    limit = Limit(rate=30_000_000)
    starts = [limit.admit(MIB, 0) for _ in range(300)]
    assert (starts[-1] - starts[100]) / S == pytest.approx(199 * MIB / 30_000_000, rel=1e-6)


def test_the_bucket_starts_full_and_fills_again():
    bucket = Bucket(1000, 500)
    assert [bucket.take(250, 0) for _ in range(4)] == [0, 0, 250 * MS, 500 * MS]
    assert bucket.take(500, 10 * S) == 10 * S, "full again, but never more than full"
    assert bucket.take(1, 10 * S) == 10 * S + MS


def test_a_burst_over_time():
    """200 MB on top of 30 MB/s over 5 s: 70 MB/s while it lasts, then 30."""
    limit = Limit(rate=30_000_000, burst=Burst(200_000_000, 5 * S))
    starts = [limit.admit(1_000_000, 0) for _ in range(600)]
    for seconds in (1, 3, 5):
        assert 70 * seconds <= sum(start <= seconds * S for start in starts) <= 70 * seconds + 8
    assert (starts[599] - starts[499]) / S == pytest.approx(100 / 30, rel=0.01)


def test_large_requests_count_as_several():
    limit = Limit(iops=100, iops_size=32 << 10)
    assert [limit.admit(64 << 10, 0) for _ in range(10)][-1] == S // 10, "20 of 100 a second; 10 at once"
    for limit in (Limit(iops=100, iops_size=32 << 10), Limit(iops=100)):
        assert limit.admit(0, 0) == 0 and limit.statistics()["taken"] == {"requests": 1}, "one without data is one, too"


class TestDepth:
    def serve(self, slots, jobs):
        """[(arrival, service)] -> [(start, done)]."""
        queue, found = Depth(slots), []
        for now, service in jobs:
            start = queue.start(now)
            queue.finish(start + service)
            found.append((start, start + service))
        return found

    def test_one_at_a_time(self):
        assert self.serve(1, [(0, 10), (1, 10), (2, 10), (50, 10)]) == [(0, 10), (10, 20), (20, 30), (50, 60)]

    def test_two_at_a_time(self):
        assert self.serve(2, [(0, 10), (0, 5), (0, 5), (0, 5)]) == [(0, 10), (0, 5), (5, 10), (10, 15)]

    @given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 50)), max_size=60))
    @settings(derandomize=True, database=None, max_examples=200, deadline=None)
    def test_never_more_than_the_slots_and_never_fewer_than_could_be(self, slots, jobs):
        now, arrivals = 0, []
        for gap, service in jobs:
            now += gap
            arrivals.append((now, service))
        served = self.serve(slots, arrivals)
        for (arrived, _), (start, _) in zip(arrivals, served, strict=True):
            busy = [(s, d) for s, d in served if s <= start < d]
            assert len(busy) <= slots
            if start > arrived:
                assert sum(s < start <= d for s, d in served) >= slots, "it waits although a slot is free"

    def test_depth_is_who_is_here(self):
        queue = Depth()
        for done in (10, 20, 30):
            assert queue.start(0) == 0
            queue.finish(done)
        assert [queue.depth(now) for now in (0, 10, 25, 40)] == [3, 2, 1, 0]


class TestInScenarios:
    def test_rate_of_a_profile(self):
        one = disk('[profile.p]\nrate = "10MB/s"\n')
        assert [ask(one, length=MIB).delay_ns for _ in range(2)] == [(MIB - 1_000_000) * 100, (2 * MIB - 1_000_000) * 100]
        assert ask(one, "flush", length=0).delay_ns == 0 and ask(one, "zero", length=MIB).delay_ns == 0, "they move no bytes"

    def test_iops_of_a_rule(self):
        one = disk('[[rule]]\nmatch = { op = "read" }\naction = { iops = 10 }\n')
        assert [ask(one).delay_ns for _ in range(4)] == [0, 100 * MS, 200 * MS, 300 * MS]
        assert ask(one, "write").delay_ns == 0

    def test_depth_of_a_profile_makes_them_wait_in_turn(self):
        one = disk('[profile.p]\ndepth = 2\nlatency.all = "10ms"\n')
        assert [ask(one).delay_ns // MS for _ in range(5)] == [10, 10, 20, 20, 30]
        assert ask(one, at=100 * MS).delay_ns == 10 * MS

    def test_depth_of_a_rule(self):
        one = disk('[[rule]]\nmatch = { op = "read" }\naction = { depth = 1, delay = "10ms" }\n')
        assert [ask(one).delay_ns // MS for _ in range(3)] == [10, 20, 30]
        assert ask(one, "write").delay_ns == 0 and ask(one, at=S).delay_ns == 10 * MS

    def test_rate_of_a_rule_with_a_burst(self):
        one = disk('[[rule]]\naction = { rate = "1MB/s", burst = "2MB" }\n')
        assert [ask(one, length=1_000_000).delay_ns // MS for _ in range(4)] == [0, 0, 1000, 2000]
        assert ask(one, "trim", length=1_000_000).delay_ns == 0

    def test_iops_of_a_rule_by_size(self):
        one = disk('[[rule]]\naction = { iops = 10, iops_size = "4KiB" }\n')
        assert [ask(one, length=16 << 10).delay_ns // MS for _ in range(2)] == [300, 700]

    def test_limits_shared_by_a_group(self):
        many = engine('[profile.p]\nshare = { group = "g", iops = 10 }\n')
        a, b = many.disk("a", MIB), many.disk("b", MIB)
        assert [ask(one).delay_ns for one in (a, b, a, b)] == [0, 100 * MS, 200 * MS, 300 * MS]
        alone = engine("[profile.p]\niops = 10\n")
        a, b = alone.disk("a", MIB), alone.disk("b", MIB)
        assert [ask(one).delay_ns for one in (a, b, a, b)] == [0, 0, 100 * MS, 100 * MS]

    def test_limits_of_a_rule_shared_by_a_group(self):
        many = engine('[[rule]]\naction = { iops = 10, group = "g" }\n')
        a, b = many.disk("a", MIB), many.disk("b", MIB)
        assert [ask(one).delay_ns for one in (a, b)] == [0, 100 * MS]

    def test_latency_follows_the_depth_of_the_group(self):
        many = engine(
            '[profile.p]\nlatency.read = "10ms * (1 + depth)"\nlatency.write = "100ms"\nshare = { group = "g", depth = 64 }\n'
        )
        a, b = many.disk("a", MIB), many.disk("b", MIB)
        assert ask(a).delay_ns == 10 * MS
        assert ask(b, "write").delay_ns == 100 * MS
        assert ask(a).delay_ns == 30 * MS, "it meets its own read and the other disk's write"
        assert ask(a, at=50 * MS).delay_ns == 20 * MS

    def test_rate_and_latency_add_up(self):
        one = disk('[profile.p]\niops = 10\nlatency.all = "7ms"\n')
        assert [ask(one).delay_ns // MS for _ in range(3)] == [7, 107, 207]

    def test_statistics(self):
        many = engine('[profile.p]\nshare = { group = "g", iops = 10, bytes = "1MB/s" }\n')
        ask(many.disk("a", MIB), length=1000)
        assert many.statistics()["limits"] == [{"limit": "g", "depth": 0, "taken": {"bytes": 1000, "requests": 1}}]

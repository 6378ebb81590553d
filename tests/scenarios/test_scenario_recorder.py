"""What a run records: counts and percentiles, buckets that merge, gaps, hangs, and broken promises."""

from __future__ import annotations

import random

import pytest

from scenarios.promises import Promises
from scenarios.recorder import BINS, BUCKETS_MAX, NAMES_MAX, OTHERS, Recorder, bin_begins_ns, bin_of

S = 10**9
MS = 10**6


def serve(recorder, disk, op, began, took, length=4096, failed=False):
    meter = recorder.meter(disk)
    meter.begin(op, began)
    meter.end(op, began, began + took, length, failed)


class TestHistogram:
    def test_a_latency_is_in_its_bin(self):
        draw = random.Random(5)
        for _ in range(2000):
            latency = int(10 ** draw.uniform(3, 12.4))
            number = bin_of(latency)
            assert bin_begins_ns(number) <= latency * 1.000001 and latency <= bin_begins_ns(number + 1) * 1.000001
        assert bin_of(0) == bin_of(1000) == 0 and bin_of(10**30) == BINS - 1

    @pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999])
    def test_percentiles_are_near_the_exact_ones(self, share):
        draw, recorder = random.Random(11), Recorder(0)
        latencies = sorted(int(draw.lognormvariate(13, 1.5)) for _ in range(20_000))
        for latency in latencies:
            serve(recorder, "d", "read", 0, latency)
        exact = latencies[round(share * len(latencies)) - 1]
        tally = recorder.tally("read", None)
        assert tally.percentile_ns(share) == pytest.approx(exact, rel=0.05)
        assert (tally.min_ns, tally.max_ns, tally.percentile_ns(1)) == (latencies[0], latencies[-1], latencies[-1])
        assert tally.sum_ns == sum(latencies) and tally.count == len(latencies)

    def test_nothing_has_no_percentile(self):
        assert Recorder(0).tally("read", None).percentile_ns(0.5) is None


class TestBuckets:
    def test_memory_is_bounded_and_nothing_is_lost(self):
        draw, recorder, now, count = random.Random(3), Recorder(7 * S), 7 * S, 3000
        for number in range(count):
            now += int(draw.expovariate(1) * MS * 1.004**number)
            serve(recorder, "d", draw.choice(["read", "write"]), now - 100, 100)
            recorder.meter("d").fired(["slow"], now)
            assert len(recorder.buckets) <= BUCKETS_MAX
        buckets = recorder.buckets.values()
        assert sum(tally.count for bucket in buckets for tally in bucket.tallies.values()) == count
        assert sum(sum(tally.bins) for bucket in buckets for tally in bucket.tallies.values()) == count
        assert sum(bucket.hits["slow"] for bucket in buckets) == count
        assert max(recorder.buckets) * recorder.width_ns <= now - 7 * S < BUCKETS_MAX * recorder.width_ns

    def test_a_request_belongs_where_it_was_answered(self):
        recorder = Recorder(0)
        recorder.enter("first", 0)
        recorder.meter("d").begin("read", 0)
        recorder.enter("second", 5 * MS)
        recorder.meter("d").end("read", 0, 8 * MS, 512, False)
        assert list(recorder.buckets) == [0, 8]
        assert recorder.tally("read", "first").count == 0 and recorder.tally("read", "second").count == 1
        assert [(one.name, one.began_ns, one.ended_ns) for one in recorder.intervals] == [("first", 0, 5 * MS), ("second", 5 * MS, None)]
        assert recorder.seconds("first", 10 * MS) == 0.005

    def test_depth_and_hangs_last_into_the_next_bucket(self):
        recorder = Recorder(0)
        meter = recorder.meter("d")
        for _ in range(3):
            meter.begin("read", 0)
        recorder.park("one", 0)
        meter.end("read", 0, 5 * MS, 512, False)
        assert (recorder.buckets[0].depth_max, recorder.buckets[5].depth_max, recorder.depth) == (3, 2, 2)
        assert recorder.buckets[5].hanging_max == 1

    def test_rules_without_end_are_counted_together(self):
        recorder = Recorder(0)
        for number in range(NAMES_MAX + 50):
            recorder.meter("d").fired([f"live-{number}"], 0)
        assert recorder.buckets[0].hits[OTHERS] == 50 and len(recorder.buckets[0].hits) == NAMES_MAX + 1


class TestEnds:
    def test_errors_move_no_data_and_drops_are_not_answers(self):
        recorder = Recorder(0)
        serve(recorder, "d", "write", 0, 10, 4096, failed=True)
        serve(recorder, "d", "write", 0, 10, 4096)
        meter = recorder.meter("d")
        for failed in (False, True):
            meter.begin("write", 0)
            meter.end("write", 0, 20, 4096, failed, dropped=True)
        meter.begin("write", 0)
        meter.abandon("write", 30)
        tally = recorder.tally("write", None)
        assert (tally.count, tally.errors, tally.bytes, recorder.disconnects, recorder.depth) == (3, 2, 4096, 2, 0)

    def test_what_comes_after_the_end_changes_nothing(self):
        recorder = Recorder(0)
        meter = recorder.meter("d")
        meter.begin("read", 0)
        recorder.park("one", 0)
        recorder.close(3 * S)
        frozen = recorder.frozen()
        assert frozen is recorder
        meter.end("read", 0, 9 * S, 512, False)
        recorder.unpark("one", 9 * S)
        serve(recorder, "d", "read", 9 * S, 1)
        assert recorder.tally(None, None).count == 0 and recorder.hung_max_ns(9 * S) == 3 * S and recorder.gap("read", 9 * S)[0] == 3 * S

    def test_frozen_stays_as_it_was(self):
        recorder = Recorder(0)
        serve(recorder, "d", "read", 0, 10)
        frozen = recorder.frozen()
        serve(recorder, "d", "read", 0, 10)
        recorder.note("event", "late", 5)
        assert frozen.tally("read", None).count == 1 and frozen.buckets[0].tallies["read"].count == 1
        assert frozen.meters["d"].counts["read"][0] == 1 and not frozen.events and recorder.events == {"late": 1}


class TestGaps:
    def test_idle_time_is_no_gap(self):
        recorder = Recorder(0)
        serve(recorder, "d", "write", 0, 2 * S)
        serve(recorder, "d", "write", 100 * S, 3 * S)
        assert recorder.gap("write", 200 * S) == (3 * S, 100 * S, "d")

    def test_answers_to_others_end_it_on_the_same_disk_only(self):
        recorder = Recorder(0)
        stuck, busy = recorder.meter("stuck"), recorder.meter("busy")
        stuck.begin("write", 0)
        busy.begin("write", 0)
        for second in range(1, 10):
            serve(recorder, "busy", "write", second * S - 10, 10)
        assert recorder.gap("write", 10 * S) == (10 * S, 0, "stuck"), "it waits still"
        busy.end("write", 0, 10 * S, 0, False)
        assert busy.waiting["write"].gap_ns == 1 * S
        assert recorder.gap("read", 10 * S) is None

    def test_hangs(self):
        recorder = Recorder(0)
        recorder.park("a", 0)
        recorder.park("b", 5 * S)
        recorder.unpark("a", 7 * S)
        assert recorder.hung_max_ns(8 * S) == 7 * S and recorder.hung_max_ns(20 * S) == 15 * S and recorder.hanging == 1


class TestPromises:
    def test_a_flush_promises_what_was_written_before_it_was_asked_for(self):
        promises = Promises()
        promises.wrote({"lose"}, stable=False)
        mark = promises.mark(1)
        promises.wrote({"torn"}, stable=False)
        assert (promises.promised, promises.lost) == (0, 0)
        promises.flushed(mark)
        assert (promises.promised, promises.lost) == (1, 1)
        promises.flushed(promises.mark(2))
        promises.flushed(mark)
        assert (promises.promised, promises.lost) == (2, 2), "a flush that is answered late takes nothing back"

    def test_fua(self):
        promises = Promises()
        promises.wrote(set(), stable=True)
        promises.wrote({"misdirect"}, stable=True)
        assert (promises.promised, promises.lost) == (2, 1)

    def test_a_cut_behind_a_flush_that_was_a_lie(self):
        promises = Promises()
        for _ in range(3):
            promises.wrote(set(), stable=False)
        promises.flushed(promises.mark(2))
        promises.cut({1, 3})
        assert promises.lost == 1, "the third was never promised"

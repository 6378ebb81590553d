"""Replay: a workload comes in the trace's own time and admits its lag; a guest gets the trace's service times, in order."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_kit import GIB, KIB, MIB, MS, S, ask, engine, scenario

from scenarios.engine import Engine
from scenarios.request import Request
from scenarios.traces import Record, read
from scenarios.traces.service_times import ServiceTimes
from scenarios.traces.workload import Workload
from simsr.errors import BadTrace


def trace(*rows):
    return [Record(time, op, offset, length) for time, op, offset, length in rows]


SIMPLE = trace((0, "read", 0, 4096), (10 * MS, "write", MIB, 8192), (10 * MS, "flush", 0, 0), (40 * MS, "read", 4096, 512))


def workload(records=SIMPLE, size=GIB, began=0, **more):
    return Workload(lambda: list(records), size, began, **more)


def drain(load, limit=100):
    """[(due, request)] taken exactly when due."""
    found = []
    while (due := load.next_due_ns) is not None and len(found) < limit:
        found += [(due, request) for request in load.take(due)]
    return found


class TestWorkload:
    def test_in_its_own_time(self):
        load = workload(began=S)
        assert [due - S for due, _ in drain(load)] == [0, 10 * MS, 10 * MS, 40 * MS]
        assert load.lag_max_ns == 0 and load.taken == 4 and load.next_due_ns is None

    def test_requests(self):
        assert [request for _, request in drain(workload())] == [
            Request("read", 0, 4096), Request("write", MIB, 8192), Request("flush"), Request("read", 4096, 512),
        ]  # fmt: skip

    @pytest.mark.parametrize("speed, last", [(2.0, 20 * MS), (0.5, 80 * MS), (1e6, 40)])
    def test_speed(self, speed, last):
        assert drain(workload(speed=speed))[-1][0] == last

    def test_start(self):
        found = drain(workload(start_ns=5 * MS))
        assert [due for due, _ in found] == [5 * MS, 5 * MS, 35 * MS]

    def test_nothing_before_its_time(self):
        load = workload()
        assert len(load.take(0)) == 1 and load.take(10 * MS - 1) == [] and len(load.take(10 * MS)) == 2

    def test_lag_is_reported(self):
        load = workload()
        assert len(load.take(50 * MS)) == 4
        assert load.lag_max_ns == 50 * MS and load.lag_ns(0.5) == 40 * MS and load.lag_ns(0) == 10 * MS
        assert load.statistics() == {
            "taken": 4, "skipped": 0, "rounds": 1, "lag_p50_ns": 40 * MS, "lag_p99_ns": 50 * MS, "lag_max_ns": 50 * MS,
        }  # fmt: skip

    def test_a_batch_has_an_end(self):
        load = workload(trace(*[(0, "read", 0, 512)] * 500))
        assert [len(load.take(0)) for _ in range(3)] == [256, 244, 0]

    def test_loop(self):
        found = drain(workload(loop=True), 12)
        assert [request for _, request in found[:4]] == [request for _, request in found[8:]]
        times = [due for due, _ in found]
        assert times == sorted(times) and times[4] == 40 * MS + 1

    def test_loop_over_nothing_ends(self):
        assert drain(workload([], loop=True)) == []
        load = workload(trace((0, "read", 0, 2 * GIB)), loop=True)
        assert load.next_due_ns is None and load.skipped == 1

    def test_loop_over_a_trace_without_time_moves_on(self):
        times = [due for due, _ in drain(workload(trace((0, "read", 0, 512)), loop=True), 5)]
        assert times == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        "fit, offsets", [("wrap", [0, 5 * 4096]), ("skip", [0]), ("scale", [0, MIB // 2 + 8 * KIB + 2048])]
    )
    def test_fit(self, fit, offsets):
        records = trace((0, "read", 0, 4096), (1, "read", MIB + 5 * 4096, 4096))
        found = drain(workload(records, MIB, fit=fit, trace_bytes=2 * MIB))
        assert [request.offset for _, request in found] == offsets

    def test_what_is_longer_than_the_disk_is_left_out(self):
        load = workload(trace((0, "read", 0, 2 * MIB), (1, "read", 0, MIB)), MIB)
        assert [request.length for _, request in drain(load)] == [MIB] and load.skipped == 1

    def test_scaling_needs_the_size(self):
        with pytest.raises(BadTrace, match="size of the trace's disk"):
            workload(fit="scale")

    @given(
        st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 1 << 45), st.integers(0, 1 << 22)), max_size=30),
        st.integers(1, 1 << 22),
        st.sampled_from(["wrap", "scale", "skip"]),
    )
    @settings(derandomize=True, database=None, max_examples=200, deadline=None)
    def test_never_outside_of_the_disk(self, rows, sectors, fit):
        size = sectors * 512
        records = [Record(time, "write", offset, length) for time, offset, length in sorted(rows)]
        load = workload(records, size, fit=fit, trace_bytes=1 << 46)
        found = drain(load)
        assert all(0 <= request.offset <= request.offset + request.length <= size for _, request in found)
        assert len(found) + load.skipped == len(records)


def timed(*rows):
    return [Record(time, op, 0, length, latency) for time, op, length, latency in rows]


class TestServiceTimes:
    def test_in_the_order_of_the_trace_for_each_bucket(self):
        times = ServiceTimes(
            timed((0, "read", 4096, 1), (1, "write", 4096, 10), (2, "read", 4096, 2), (3, "read", 65536, 100)), loop=False
        )
        assert [times.next("read", 4096, 0) for _ in range(3)] == [1, 2, None]
        assert [times.next("write", 4000, 0), times.next("read", 60000, 0)] == [10, 100]
        assert times.statistics()["given"] == 4 and times.statistics()["after_the_end"] == 1

    def test_loop(self):
        times = ServiceTimes(timed((0, "read", 4096, 1), (1, "read", 4096, 2)))
        assert [times.next("read", 4096, 0) for _ in range(5)] == [1, 2, 1, 2, 1]

    @pytest.mark.parametrize(
        "op, length, expected",
        [
            ("read", 512, 1),
            ("read", 1 << 20, 2),
            ("read", 32768, 2),
            ("flush", 0, 9),
            ("zero", 4096, 5),
            ("trim", 4096, 5),
            ("extents", 512, 1),
        ],
    )
    def test_the_nearest_bucket(self, op, length, expected):
        times = ServiceTimes(timed((0, "read", 4096, 1), (1, "read", 65536, 2), (2, "write", 4096, 5), (3, "flush", 0, 9)))
        assert times.next(op, length, 0) == expected

    def test_buckets_of_the_operation_only(self):
        times = ServiceTimes(timed((0, "read", 4096, 1), (1, "read", 65536, 2)), bucket=["op"])
        assert [times.next("read", 512, 7), times.next("read", 512, 7)] == [1, 2]

    def test_depth_is_counted_from_the_trace(self):
        rows = timed((0, "read", 4096, 100), (10, "read", 4096, 200), (20, "read", 4096, 300), (1000, "read", 4096, 50))
        times = ServiceTimes(rows, bucket=["depth"])
        assert [times.next("read", 4096, depth) for depth in (0, 0, 1, 2, 3)] == [100, 50, 200, 300, 300]

    def test_depth_that_the_trace_says(self):
        rows = [Record(0, "read", 0, 512, 7, depth=8), Record(1000, "read", 0, 512, 3, depth=0)]
        assert ServiceTimes(rows, bucket=["depth"]).next("read", 512, 10) == 7

    def test_start(self):
        assert ServiceTimes(timed((0, "read", 4096, 1), (S, "read", 4096, 2)), start_ns=1).next("read", 4096, 0) == 2

    def test_traces_without_times(self):
        with pytest.raises(BadTrace, match="none says how long it took"):
            ServiceTimes([Record(0, "read", 0, 512)], source="x")

    def test_sampling_has_the_traces_percentiles(self):
        times = ServiceTimes(timed(*[(at, "read", 4096, 1000 * (at + 1)) for at in range(101)], (999, "write", 4096, 5)))
        assert [times.sample(u, "read", 4096) for u in (0, 0.25, 0.5, 1)] == [1000, 26000, 51000, 101000]
        assert times.sample(0.7, "write", 4096) == 5 and times.percentile_of("read", 4096, 50_000) == pytest.approx(50 / 101)


MSR = b"".join(
    f"{128166372003061629 + 10000 * number},h,0,{'Read' if number % 2 else 'Write'},{4096 * number},4096,{100 * (number + 1)}\n".encode()
    for number in range(40)
)


class TestInScenarios:
    def open(self, name, format=None, groups=("op", "size")):
        return ServiceTimes(read(io.BytesIO(MSR), format or "msr", name), groups, name)

    def test_a_guest_gets_the_recorded_times(self):
        many = engine(
            '[[rule]]\naction = { replay = { trace = "t.csv", as = "latency" } }\n',
            replays=lambda rule, disk: self.open(rule.action.replay.trace),
        )
        one = many.disk("d", GIB)
        assert [ask(one, "write").delay_ns for _ in range(3)] == [10_000, 30_000, 50_000]
        assert [ask(one, "read").delay_ns for _ in range(3)] == [20_000, 40_000, 60_000]
        assert ask(many.disk("e", GIB), "read").delay_ns == 20_000, "each disk has the trace for itself"

    def test_a_distribution_of_a_trace(self):
        found = scenario("[profile.p]\nlatency.read = 'trace(\"t.csv\", op, size) + 1us'\n", self.open)

        one = Engine(found).disk("d", GIB)
        delays = sorted(ask(one).delay_ns for _ in range(2000))
        assert 21_000 <= delays[0] < 60_000 and 380_000 < delays[-1] <= 401_000
        assert delays[1000] == pytest.approx(211_000, rel=0.05)

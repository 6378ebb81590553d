"""Latencies: every distribution gives the percentiles it was asked for, and the language says clearly what is wrong."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_kit import GIB, MIB, MS, S

from scenarios.draws import Draws
from scenarios.latency_text import FUNCTIONS, parse_delay, parse_latency
from scenarios.request import Request

DISK = SimpleNamespace(depth=0, head_bytes=0, size_bytes=GIB, vdis=5)
REQUEST = Request("read", 0, 4096)
COUNT = 40_000


def at(text, u=0.5, request=REQUEST, disk=DISK):
    """The value where every number drawn is ``u``."""
    return parse_latency(text).sample((u,) * 8, request, disk)


def sampled(text, count=COUNT, request=REQUEST, disk=DISK):
    """Sorted values of a run with a fixed seed."""
    latency = parse_latency(text)
    draws = Draws(1, text, count=max(1, latency.draws))
    return sorted(latency.sample(draws(number), request, disk) for number in range(count))


US = 1000
CASES = {
    "3ms": {0: 3 * MS, 0.5: 3 * MS, 1: 3 * MS},
    "uniform(1ms, 5ms)": {0.1: 1.4 * MS, 0.5: 3 * MS, 0.99: 4.96 * MS},
    "normal(5ms, 1ms)": {0.5: 5 * MS, 0.8413447: 6 * MS, 0.9772499: 7 * MS, 0.0227501: 3 * MS},
    "normal(mean=1ms, sd=2ms)": {0.1: 0, 0.5: MS},
    "exp(mean=2ms)": {0.5: 2 * MS * math.log(2), 0.99: 2 * MS * math.log(100)},
    "exp(2ms, min=200us)": {0.5: 200 * US + 1.8 * MS * math.log(2), 0.99: 200 * US + 1.8 * MS * math.log(100)},
    "lognormal(p50=250us, p99=4ms)": {0.5: 250 * US, 0.99: 4 * MS, 0.01: 250 * US / 16},
    "lognormal(p50=1ms, p90=2ms)": {0.5: MS, 0.9: 2 * MS, 0.1: 0.5 * MS},
    "lognormal(p50=1ms, p999=100ms)": {0.5: MS, 0.999: 100 * MS},
    "lognormal(p50=250us, p99=4ms, min=200us, max=5ms)": {0.2: 200 * US, 0.5: 250 * US, 0.99: 4 * MS, 0.9995: 5 * MS},
    "pareto(min=1ms, alpha=1.3)": {0: MS, 0.5: MS * 2 ** (1 / 1.3), 0.99: MS * 100 ** (1 / 1.3)},
    "pareto(min=1ms, alpha=1, max=50ms)": {0.5: 2 * MS, 0.9: 10 * MS, 0.99: 50 * MS},
    "quantiles(p0=90us, p50=200us, p99=3ms, p999=80ms)": {0.5: 200 * US, 0.99: 3 * MS, 0.999: 80 * MS, 0.9999: 80 * MS},
    "quantiles(p25=1ms, p75=4ms)": {0.1: MS, 0.25: MS, 0.5: 2 * MS, 0.75: 4 * MS, 0.9: 4 * MS},
    "mix(90%: 1ms, 10%: 1s)": {0.5: MS, 0.89: MS, 0.91: S, 0.99: S},
    "mix(50%: uniform(1ms, 2ms), 30%: 10ms, 20%: 20ms)": {0.25: 1.5 * MS, 0.7: 10 * MS, 0.9: 20 * MS},
    "2 * uniform(1ms, 5ms) / 4 + 1ms": {0.5: 2.5 * MS},
    "per_KiB(3us)": {0.5: 12 * US},
    "per_vdi(80ms)": {0.5: 400 * MS},
}


@pytest.mark.parametrize("text", CASES)
def test_percentiles(text):
    """Of 40 000 draws: each percentile within what chance allows, about four standard deviations of its rank."""
    values = sampled(text)
    for share, expected in CASES[text].items():
        spread = 4 * math.sqrt(max(share * (1 - share), 1 / COUNT) / COUNT)
        low = values[max(0, math.floor((share - spread) * COUNT))]
        high = values[min(COUNT - 1, math.ceil((share + spread) * COUNT))]
        assert low * 0.999 <= expected <= high * 1.001, f"p{100 * share:g}: {expected} is not in {low}..{high}"


@pytest.mark.parametrize("text", ["exp(mean=2ms)", "exp(mean=2ms, min=500us)", "uniform(1ms, 3ms)", "normal(2ms, 0.2ms)"])
def test_means(text):
    assert sum(sampled(text)) / COUNT == pytest.approx(2 * MS, rel=0.02)


@given(st.floats(1e-9, 1 - 1e-9), st.floats(1e-9, 1 - 1e-9), st.sampled_from([text for text in CASES if "mix" not in text]))
@settings(derandomize=True, database=None, max_examples=300, deadline=None)
def test_more_luck_never_takes_less_time(u, v, text):
    low, high = at(text, min(u, v)), at(text, max(u, v))
    assert 0 <= low <= high < math.inf


@pytest.mark.parametrize(
    "text", ["pareto(min=1ms, alpha=0.001)", "lognormal(p50=1ms, p501=1h)", "lognormal(p50=1ns, p99=23h)", "exp(mean=1h)"]
)
@pytest.mark.parametrize("u", [2.0**-53, 1 - 2.0**-53])
def test_the_longest_tail_can_be_waited_for(text, u):
    assert 0 <= at(text, u) <= 2 * 86400 * S


def test_parts_are_independent():
    values = sampled("uniform(0s, 1s) + uniform(0s, 1s)")
    assert values[COUNT // 2] == pytest.approx(S, rel=0.02)
    assert values[COUNT // 8] == pytest.approx(S / 2, rel=0.03), "the sum of two has a triangle for a density"
    assert parse_latency("uniform(0s, 1s) + uniform(0s, 1s)").draws == 2


class TestSeek:
    TEXT = "seek(min=1ms, half=6ms, max=10ms, rpm=6000)"

    def seek(self, offset, head=0, u=0.0):
        return at(self.TEXT, u, Request("read", offset, 4096), SimpleNamespace(**{**vars(DISK), "head_bytes": head}))

    def test_points_of_the_curve(self):
        assert self.seek(GIB) == pytest.approx(10 * MS)
        assert self.seek(GIB // 2) == pytest.approx(6 * MS)
        assert self.seek(4096) == pytest.approx(MS, rel=0.03)
        assert self.seek(0, head=GIB) == self.seek(GIB), "both ways"

    def test_sequential_is_free(self):
        assert self.seek(8192, head=8192, u=0.9) == 0

    def test_the_platter_turns(self):
        assert self.seek(GIB, u=0.5) - self.seek(GIB) == pytest.approx(5 * MS)
        assert at("seek(min=1ms, half=6ms, max=10ms)", 0.9, Request("read", GIB, 1)) == pytest.approx(10 * MS)

    def test_further_takes_longer(self):
        times = [self.seek(part * MIB) for part in range(1, 1025)]
        assert times == sorted(times)

    @pytest.mark.parametrize(
        "text", ["seek(min=1ms, half=4ms, max=10ms)", "seek(min=1ms, half=9.9ms, max=10ms)", "seek(min=5ms, half=4ms, max=6ms)"]
    )
    def test_arms_that_cannot_be(self, text):
        with pytest.raises(ValueError, match="half"):
            parse_latency(text)


def test_depth():
    deep = SimpleNamespace(**{**vars(DISK), "depth": 32})
    latency = parse_latency("1ms * (1 + depth/16)")
    assert latency.uses_depth and not parse_latency("1ms").uses_depth
    assert latency.sample((), REQUEST, DISK) == MS and latency.sample((), REQUEST, deep) == 3 * MS


def test_size():
    assert at("1ms + per_KiB(1us)", request=Request("read", 0, MIB)) == MS + 1024 * US


@pytest.mark.parametrize(
    "text, mode, value", [("3ms", "set", 3 * MS), (" + 3ms", "add", 3 * MS), ("* 3", "scale", 3), ("* (1 + 2)", "scale", 3)]
)
def test_delays(text, mode, value):
    delay = parse_delay(text)
    assert delay.mode == mode and delay.latency.sample((), REQUEST, DISK) == value


def test_traces_are_asked_for():
    asked = []

    class Times:
        def sample(self, u, op, length):
            return u * length

    def traces(name, format, groups):
        asked.append((name, format, groups))
        return Times()

    latency = parse_latency('trace("a b.csv", op, size, msr) + 1ns', traces)
    assert asked == [("a b.csv", "msr", ("op", "size"))]
    assert latency.sample((0.5,), REQUEST, DISK) == 2049
    with pytest.raises(ValueError, match="traces cannot be opened here"):
        parse_latency('trace("a")')


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "missing"), ("3", "a time; write its unit"), ("depth", "a time"), ("3ms + 1", "cannot be added"),
        ("3ms * 3ms", "two times"), ("1s / depth", "divided"), ("1s / 0", "divided"), ("1s / 1ms", "divided"), ("3ms 4ms", "not expected"),
        ("lognorml(p50=1ms, p99=2ms)", "did you mean 'lognormal'"), ("gauss(1ms)", "there are uniform"), ("uniform(5ms, 1ms)", "below"),
        ("uniform(1ms)", "write uniform(1ms, 5ms)"), ("uniform(1ms, 2ms, 3ms)", "write uniform"), ("uniform(1, 2)", "write its unit"),
        ("exp()", "write exp"), ("exp(mean=1ms, min=2ms)", "mean"), ("exp(1ms, mean=1ms)", "write exp"), ("exp(mean=1ms, mean=2ms)", "twice"),
        ("exp(mean=1ms, 2ms)", "come first"), ("lognormal(p99=1ms)", "write lognormal"), ("lognormal(p50=1ms)", "write lognormal"),
        ("lognormal(p50=2ms, p99=1ms)", "above"), ("lognormal(p50=2ms, p10=1ms)", "above"), ("lognormal(p50=1ms, p99=2ms, max=1.5ms)", "max"),
        ("lognormal(p50=1ms, p101=2ms)", "higher percentile"), ("lognormal(p50=1ms, q99=2ms)", "write lognormal"), ("lognormal(p50=0s, p99=1s)", "above 0"), ("pareto(min=1ms)", "write pareto"),
        ("pareto(min=1ms, alpha=1s)", "alpha must be a number"), ("pareto(min=0s, alpha=1)", "above 0"), ("quantiles(p50=1ms)", "two percentiles"),
        ("quantiles(p50=2ms, p99=1ms)", "fall"), ("quantiles(p0=0s, p99=1ms)", "above 0"), ("mix(50%: 1ms)", "100%"), ("mix(1ms)", "share"),
        ("mix(50%: 1ms, 50%: 2)", "must be a time"), ("mix(50% 1ms)", "':'"), ("normal(1ms, 2ms, 3ms)", "write normal"), ("per_KiB()", "write per_KiB"),
        ("per_KiB(x=1us)", "write per_KiB"), ("uniform(1ms, depth)", "plain"), ("(1ms", "')'"), ("1ms)", "not expected"), ("1ms ?", "cannot read"),
        ("-1ms", "missing"), ("1ms - 1ms", "not expected"), ("(" * 30 + "1ms" + ")" * 30, "nested"), ("trace(x)", "write trace"),
        ("+".join(["uniform(1ms, 2ms)"] * 9), "more than 8"), ("seek(min=1ms)", "write seek"), ("1s/", "missing"), ("uniform", "'('"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text, says):
    with pytest.raises(ValueError) as caught:
        parse_latency(text)
    assert says in str(caught.value) and repr(text[:1000]) in str(caught.value)


def test_sums_have_an_end():
    with pytest.raises(ValueError, match="longer than 1000"):
        parse_latency("per_KiB(1us)" + " + per_KiB(1us)" * 80)
    deep = SimpleNamespace(**{**vars(DISK), "depth": 2})
    assert at("1ms * (depth" + "+depth" * 149 + ")", disk=deep) == 300 * MS


@pytest.mark.parametrize("text", ["* 3ms", "+ 3", "*", "+", "* exp(mean=1ms)"])
def test_wrong_delays(text):
    with pytest.raises(ValueError):
        parse_delay(text)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "trace"])
def test_the_way_to_write_each_that_errors_show_is_right(name):
    assert 0 <= at(FUNCTIONS[name][0], request=Request("read", MIB, 4096)) < math.inf


@given(st.text(alphabet='0123456789.msun%()*+/,:=pdepthxiuform "', max_size=30))
@settings(derandomize=True, database=None, max_examples=500, deadline=None)
def test_nonsense_is_a_value_error(text):
    try:
        parse_latency(text)
    except ValueError:
        pass

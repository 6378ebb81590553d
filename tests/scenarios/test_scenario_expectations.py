"""The language of [[expect]]: what it accepts and refuses, and that nothing is "met" that was not seen."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from scenarios.checks import expectations
from scenarios.expectations import BadExpectation, Names, parse_expectation
from scenarios.loader import library, library_text, load
from scenarios.metrics import METRICS, Seen
from scenarios.recorder import Recorder
from simsr.errors import BadScenario

S = 10**9
NAMES = Names(phase=["good", "bad one"], rule=["latent"], event=["pool-full"])


@pytest.fixture
def seen():
    recorder = Recorder(0)
    recorder.enter("good", 0)
    meter = recorder.meter("d")
    meter.begin("write", 0)
    recorder.park("w", 0)
    for number in range(100):
        meter.begin("read", number * S // 10)
        meter.end("read", number * S // 10, number * S // 10 + (number + 1) * 10**6, 4096, failed=number < 3)
    recorder.unpark("w", 7 * S)
    meter.end("write", 0, 7 * S, 8192, False)
    recorder.close(10 * S)
    return Seen(recorder, 10 * S, {"latent": 4}, {"pool-full": 1}, promised=5, lost=1, power_cuts=2)


@pytest.mark.parametrize(
    "that, verdict",
    [
        ("client.errors == 3", "met"),
        ("client.errors == 0", "broken"),
        ("3 == client.errors", "met"),
        ("client.requests >= 101 and client.disconnects == 0", "met"),
        ("gap('write').max < 30s", "met"),
        ("gap('write').max < 6.9s", "broken"),
        ("hung.max == 7s and hung.count == 1", "met"),
        ("p50('read') > 47ms and p50('read') < 53ms", "met"),
        ("p99('read', 'good') <= max('read')", "met"),
        ("max('read') in [99ms, 100ms]", "met"),
        ("min('read') == 1ms", "met"),
        ("mean('read') == 50.5ms", "met"),
        ("not p99('read') < 20ms", "met"),
        ("count() == 101", "met"),
        ("count('read') == 100 and errors('read') == 3 and count('read', 'good') == 100", "met"),
        ("count('trim') == 0", "met"),
        ("rate('read') > 38KiB/s and rate('read') < 40KiB/s", "met"),
        ("iops('read') == 10", "met"),
        ("depth.max == 2", "met"),
        ("hits('latent') > 3 and events('pool-full') == 1 and power_cuts == 2", "met"),
        ("flushed_writes.lost == 0", "broken"),
        ("(client.errors == 0 or hung.max < 1min) and (power_cuts != 0)", "met"),
        ("p99('flush') < 1ms", "not evaluated"),
        ("gap('flush').max < 1ms", "not evaluated"),
        ("p99('read', 'bad one') < 1ms", "not evaluated"),
        ("replay.lag.p99 < 5ms", "not evaluated"),
        ("group.state in ['all-old', 'all-new']", "not evaluated"),
        ("not group.state == 'mixed'", "not evaluated"),
        ("vdi.uuid unchanged and vdi.location unchanged", "not evaluated"),
        ("read(head) == snapshot or read(head) == before", "not evaluated"),
        ("undo(revert) restores before", "not evaluated"),
        ("verify.digest('acked-writes') == ok", "not evaluated"),
        ("vdi.uuid unchanged or client.errors == 3", "met"),
        ("vdi.uuid unchanged or client.errors == 0", "not evaluated"),
        ("vdi.uuid unchanged and client.errors == 0", "broken"),
        ("vdi.uuid unchanged and client.errors == 3", "not evaluated"),
    ],
)
def test_verdicts(seen, that, verdict):
    outcome = parse_expectation(that, NAMES).evaluate(seen)
    assert outcome.verdict == verdict, outcome
    assert bool(outcome.reason) == (verdict == "not evaluated")


def test_what_was_found_is_told(seen):
    outcome = parse_expectation("client.errors == 0 and gap('write').max < 3s").evaluate(seen)
    assert outcome.found == [("client.errors", "3"), ("gap('write').max", "7s")]


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_without_requests_nothing_is_met_that_says_how_good_it_was(metric):
    spec = METRICS[metric]
    args = {"op": "'read'", "rule": "'latent'", "event": "'pool-full'", "word": "'x'"}
    text = metric.replace("()", "(" + ", ".join(args[arg] for arg in spec.args if arg in args) + ")")
    value = {"time": "1h", "rate": "1GB/s", "word": f"'{spec.words[0] if spec.words else 'x'}'"}.get(spec.kind, "1000000")
    sign = "==" if spec.kind == "word" else "<"
    verdict = parse_expectation(f"{text} {sign} {value}", NAMES).evaluate(Seen(Recorder(0), S, {}, {}, 0, 0, 0)).verdict
    counted = {"client.requests", "count()", "hits()", "events()", "power_cuts"}
    assert verdict == ("met" if metric in counted else "not evaluated")


@pytest.mark.parametrize(
    "that, says",
    [
        ("client.erors == 0", "Did you mean 'client.errors'?"),
        ("p98('read') < 3ms", "Did you mean 'p9"),
        ("p99('reed') < 3ms", "Did you mean 'read'?"),
        ("p99('read', 'god') < 3ms", "Did you mean 'good'?"),
        ("hits('latant') > 3", "Did you mean 'latent'?"),
        ("events('pool-ful') > 3", "Did you mean 'pool-full'?"),
        ("p99('read') < 3", "30s or 5ms"),
        ("p99('read') < 4KiB", "30s or 5ms"),
        ("client.errors == 3ms", "is a number"),
        ("client.errors == 1.5", "is a number"),
        ("rate('read') > 30MB", "30MB/s"),
        ("hung.max == 'long'", "is a time"),
        ("p99('read') < client.errors", "is a time"),
        ("group.state == 'all-od'", "Did you mean 'all-old'?"),
        ("group.state < 'all-old'", "cannot be <"),
        ("client.errors unchanged", "cannot be compared"),
        ("undo(revert) restores after", "not known"),
        ("0 < client.errors < 3", "Join"),
        ("client.errors == 0 client.disconnects == 0", "Join"),
        ("1 == 1", "nothing is measured"),
        ("client.errors", "comparison"),
        ("client.errors ==", "at the end"),
        ("(client.errors == 0", "')'"),
        ("client.errors == 0)", "not expected"),
        ("", "at the end"),
        ("p99() < 3ms", "0 arguments"),
        ("p99('read', 'good', 'x') < 3ms", "3 arguments"),
        ("p99('read) < 3ms", "cannot be read"),
        ("client.errors = 0", "cannot be read"),
        ("__import__('os').system('x') == 0", "not known"),
        ("client.errors == 0; client.errors == 0", "cannot be read"),
        ("hung.max in []", "value"),
        ("max('read') in [3ms 4ms]", "']'"),
        ("and", "value"),
        ("not " * 50 + "power_cuts == 0", "nested"),
        ("(" * 100 + "power_cuts == 0", "nested"),
        ("client. == 0", "name"),
        ("power_cuts == ٠", "cannot be read"),
    ],
)
def test_refused(that, says):
    with pytest.raises(BadExpectation) as caught:
        parse_expectation(that, NAMES)
    assert says in f"{caught.value.reason} {caught.value.hint}"


def test_no_text_is_a_crash():
    draw = random.Random(17)
    words = "client.errors p99 ( ) 'read' == < 3ms 0 and or not in [ ] , . hung.max unchanged restores ok 1e9 %".split()
    for _ in range(5000):
        text = " ".join(draw.choices(words, k=draw.randrange(1, 9)))
        try:
            parse_expectation(text, NAMES).evaluate(Seen(Recorder(0), 0, {}, {}, 0, 0, 0))
        except BadExpectation as error:
            assert error.reason


@pytest.mark.parametrize("name", library())
def test_the_library_expects_what_can_be_read(name):
    scenario = load(library_text(name), name, lambda *a: None)
    assert len(expectations(scenario)) == len(scenario.expect)


def test_a_scenario_with_a_bad_expectation_is_refused_with_its_place():
    text = 'simsr = 1\nname = "x"\n[[expect]]\nthat = "client.errors == 0"\n[[expect]]\nthat = "p99(\'reed\') < 3ms"\n'
    with pytest.raises(BadScenario) as caught:
        load(text, "x.toml")
    assert "expect 2" in str(caught.value) and "line 6" in str(caught.value) and "'read'" in caught.value.hint


def test_the_page_lists_every_metric():
    page = (Path(__file__).parents[2] / "docs/scenarios.md").read_text().split("\n## Expectations\n")[1].split("\n## ")[0]
    rows = set(re.findall(r"^\| (`.*) \|$", page, re.MULTILINE))
    for name, metric in METRICS.items():
        shown = name.replace("()", f"({', '.join(metric.args)})")
        if metric.kind == "word":
            assert f"`{name.replace('()', '(...)')}`" in page, name
        else:
            assert f"`{shown}` | {metric.kind} | {metric.about}" in rows, shown
    for that in re.findall(r'^that = "(.*)"$', page, re.MULTILINE):
        parse_expectation(that)

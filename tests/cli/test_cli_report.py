"""The report's page: sound, self-contained, safe against names, and a picture when Chromium draws it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scenarios.loader import load
from scenarios.metrics import Seen
from scenarios.recorder import Recorder
from scenarios.report import Recording, report_of
from simsr.cli.report_figures import WIDTH, heat_level
from simsr.cli.report_page import report_page, verdict_words
from simsr.cli.report_scales import Linear, Log, clock, seconds, size, time_ticks
from simsr.cli.report_style import HEAT_LEVELS

S = 10**9
HOSTILE = "<script>alert('x')</script>\"&\u202e\x1b]0;"
EVIL = '<img src="http://example.com/a" onload="b()">'


def sample(seed=1, length_s=60, requests=4000, name="disk"):
    """A report of a made-up run: a good phase, one in which everything hangs, and one that is slow."""
    text = 'simsr = 1\nname = "sample"\nabout = "A sample."\nseed = 5\n' + (
        '[[expect]]\nthat = "client.errors == 0"\n[[expect]]\nthat = "gap(\'write\').max < 30s"\n'
        '[[expect]]\nthat = "vdi.uuid unchanged"\n'
    )
    draw, recorder = random.Random(seed), Recorder(100 * S)
    meter, pieces = recorder.meter("uuid-1"), []
    recorder.enter("good", 100 * S)
    for _ in range(requests):
        began = draw.uniform(0, length_s)
        op = draw.choices(["read", "write", "flush"], [60, 37, 3])[0]
        took = draw.lognormvariate(-7.5, 0.8) * (20 if op == "flush" else 1)
        if length_s * 0.4 < began < length_s * 0.6:
            took += length_s * 0.6 - began
        pieces += [(began, 0, op, began), (began + took, 1, op, began)]
    phases = [(length_s * 0.4, "all hangs"), (length_s * 0.6, name)]
    for at, ends, op, began in sorted(pieces):
        now = 100 * S + int(at * S)
        while phases and phases[0][0] <= at:
            recorder.note("event", phases[0][1], now)
            recorder.enter(phases.pop(0)[1], now)
        if ends:
            meter.end(op, 100 * S + int(began * S), now, 4096, draw.random() < 0.002)
            if draw.random() < 0.1:
                meter.fired([name], now)
        else:
            meter.begin(op, now)
    end = 100 * S + length_s * S
    recorder.note("over", "", end)
    recorder.close(end)
    rules = [{"rule": name, "action": "delay", "in_force": False, "matched": requests, "hits": requests // 10}]
    seen = Seen(recorder, end, {name: 400}, recorder.events, 3, 0, 0)
    return report_of(Recording(load(text), 5, "2026-01-02T03:04:05+00:00", seen, rules, [("uuid-1", name, 1 << 30, [("qemu", "flush"), ("tapdisk", "each-write")])]))


@pytest.fixture(scope="module")
def report():
    return json.loads(json.dumps(sample()))


class Checker(HTMLParser):
    """Tags that are allowed, closed in order; no attribute that runs or loads anything."""

    ALLOWED = set(
        "html head meta title style body main header section div span h1 h2 h3 p dl dt dd ul li code b table thead tbody tr th td "
        "svg g path rect line circle text".split()
    )

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.bad = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.ALLOWED or any(key.startswith("on") or key in ("src", "href", "xlink:href", "action") for key, _ in attributes):
            self.bad.append((tag, attributes))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(("end", tag))

    def handle_data(self, data):
        self.text.append(data)


def checked(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.bad and not checker.open
    assert not re.search(r"url\(|@import|https?:|javascript:", page.replace("http://example.com/a", ""))
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        within(ElementTree.fromstring(drawing))
    return " ".join(checker.text)


def within(svg):
    """Nothing is drawn outside of the picture, and every number is one."""
    _, _, width, height = map(float, svg.get("viewBox").split())
    for element in svg.iter():
        for key, most in (("x", width), ("cx", width), ("x1", width), ("x2", width), ("y", height), ("cy", height), ("y1", height)):
            if (value := element.get(key)) is not None:
                assert -0.1 <= float(value) <= most + 0.1, (element.tag, element.attrib)
        for number in re.findall(r"-?[\d.]+", element.get("d", "")):
            assert -0.1 <= float(number) <= max(width, height) + 0.1
        assert "nan" not in element.get("d", "")


class TestPage:
    def test_it_says_what_the_report_says(self, report):
        text = checked(report_page(report, "9.9"))
        for words in ("sample", "A sample.", "all hangs", "gap('write').max < 30s", "not evaluated", "9.9", "1 of 3 expectations broken", "12 s"):
            assert words in text, words
        assert f"{report['requests']:,}".replace(",", "\u2009") in text

    def test_names_are_hostile(self):
        for name in (HOSTILE, EVIL):
            report = {**sample(requests=200, name=name), "about": name, "scenario": name}
            report["expectations"].append({"that": name, "verdict": "broken", "found": [{"what": name, "value": name}], "reason": name})
            report["operations"][0]["op"] = report["gaps"][0]["vdi"] = name
            report["latency"]["cells"][name] = report["latency"]["cells"].pop("read")
            report["latency"]["percentiles"][name] = report["latency"]["percentiles"].pop("read")
            page = report_page(report, name)
            text = checked(page)
            assert "\u202e" not in page and "\x1b" not in page and "<img" not in page and "<script" not in page
            assert "alert('x')" in text or "onload" in text, "it is shown, as text"

    def test_it_may_load_nothing(self, report):
        assert "default-src 'none'" in report_page(report, "1")

    def test_every_cell_of_the_heat_map_is_drawn(self, report):
        page = report_page(report, "1")
        drawn = sum(len(re.findall("M", path)) for path in re.findall(r'<path class="h\d" d="([^"]*)"', page))
        groups = -(-len(report["timeline"]["depth"]) // 300)
        cells = {(op, at // groups, row) for op, cells in report["latency"]["cells"].items() for at, row, _ in cells}
        assert drawn == len(cells) > 500

    @pytest.mark.parametrize("length_s, requests", [(1, 1), (1, 3), (2, 50), (100_000, 30), (60, 0)])
    def test_short_long_and_empty_runs(self, length_s, requests):
        checked(report_page(sample(length_s=length_s, requests=requests), "1"))

    def test_a_run_of_no_time(self):
        recorder = Recorder(0)
        recorder.close(0)
        scenario = load('simsr = 1\nname = "nothing"\n')
        text = checked(report_page(report_of(Recording(scenario, 0, "", Seen(recorder, 0, {}, {}, 0, 0, 0), [], [])), "1"))
        assert "nothing was expected" in text and "No request came" in text


def test_verdicts():
    def words(*verdicts):
        return verdict_words({"expectations": [{"verdict": verdict} for verdict in verdicts]})

    assert words() == "nothing was expected" and words("met") == "expectation met" and words("met", "met") == "2 expectations met"
    assert words("met", "broken") == "1 of 2 expectations broken"
    assert words("met", "not evaluated") == "1 of 2 expectations met, 1 not evaluated"
    assert words("not evaluated") == "1 of 1 expectations not evaluated"


class TestScales:
    def test_words(self):
        assert [seconds(value) for value in (0, 4.12e-4, 0.9999, 1.5, 24, 0.0009999, 3e-9, None)] == [
            "0 s", "412 µs", "1 s", "1.5 s", "24 s", "1 ms", "3 ns", "–",
        ]  # fmt: skip
        assert (clock(65), clock(3725), clock(90_061)) == ("1:05", "1:02:05", "1 d 1:01:01")
        assert (size(0), size(4096), size(30 << 20)) == ("0 B", "4 KiB", "30 MiB")

    @pytest.mark.parametrize("length_s", [0.001, 0.3, 1, 7, 60, 150.5, 900, 86_400, 10_000_000])
    def test_ticks_of_time(self, length_s):
        ticks = time_ticks(length_s)
        assert 3 <= len(ticks) <= 14 and ticks[0][0] == 0 and ticks[-1][0] <= length_s * 1.001
        assert len({text for _, text in ticks}) == len(ticks)

    @pytest.mark.parametrize("top", [0, 1, 3, 17, 1234, 9.99e9])
    def test_linear(self, top):
        scale = Linear(top, 100, 0)
        assert 0 <= scale(top) <= 100 == scale(0) and 2 <= len(scale.ticks) <= 7

    @pytest.mark.parametrize("low, high", [(1e-6, 1e-6), (1e-4, 2e-3), (1e-6, 3600), (0.02, 0.03)])
    def test_log(self, low, high):
        scale = Log(low, high, 100, 0)
        assert 0 <= scale(high) <= scale(low) <= 100 and 2 <= len(scale.ticks) <= 14

    def test_levels(self):
        assert heat_level(1, 1) == heat_level(500, 500) == HEAT_LEVELS - 1 and heat_level(1, 500) == 0


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: script/report-test does it")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_draws_it(report, tmp_path, scheme):
    """SIMSR_PICTURES names a directory to keep the pictures in, for people."""
    Image = pytest.importorskip("PIL.Image", reason="run script/setup")
    page, picture = tmp_path / "report.html", Path(os.environ.get("SIMSR_PICTURES", tmp_path)) / f"report-{scheme}.png"
    page.write_text(report_page(report, "1.0"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    options += [f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}", "--window-size=1240,3300"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path}/profile", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and picture.exists(), done.stderr
    with Image.open(picture) as image:
        assert image.size == (1240, 3300)
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    css = report_page(report, "1").split("</style>")[0]
    chosen = dict(re.findall(r"--(\w+): (#\w{6})", css.split("@media")[0 if scheme == "light" else 1]))

    def pixels(name):
        return colours.get(tuple(bytes.fromhex(chosen[name][1:])), 0)

    assert pixels("page") > 100_000 and pixels("card") > 1_000_000, "the scheme that was asked for"
    assert all(pixels(f"h{level}") > 100 for level in range(HEAT_LEVELS)), "the heat map in all its shades"
    assert pixels("c0") > 1000 and pixels("c1") > 1000 and pixels("mark") > 500, "curves"
    assert pixels("bad-back" if "bad-back" in chosen else "band") > 300
    assert WIDTH < 1240

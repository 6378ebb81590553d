"""The pictures of a report, as SVG that stands in a page: phases, heat maps, curves over time, strips of rule hits, percentiles.

All figures over time have the same axis at the same place, so one looks from one to the next straight down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import log
from typing import Any

from simsr.cli.report_scales import Linear, Log, number, safe, seconds, size, time_ticks
from simsr.cli.report_style import HEAT_LEVELS

__all__ = ["Figures", "legend_key"]

WIDTH, LEFT, RIGHT = 1120, 72, 1106
COLUMNS_MAX = 300
_EVENT_ROWS = 3
_DRAWN_MIN = 20
_SHADES = 8


class Figures:
    """Of one report, as the API gives it. ``drawn``: operations with requests enough for a picture; the others are in tables."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report
        self._line = report["timeline"]
        self._bucket_s = self._line["bucket_s"]
        count = len(self._line["depth"])
        self._length_s = max(report["duration_s"], self._bucket_s if count <= 1 else (count - 1) * self._bucket_s, 1e-3)
        self._order = list(dict.fromkeys(line["op"] for line in report["operations"]))
        counts = {line["op"]: line["count"] for line in report["operations"] if line["phase"] is None}
        self.drawn = [op for op, count in counts.items() if count >= _DRAWN_MIN] or list(counts)
        self.shade = {op: number % _SHADES for number, op in enumerate(self._order)}

    def _x(self, at_s: float) -> float:
        return LEFT + (RIGHT - LEFT) * min(max(at_s / self._length_s, 0.0), 1.0)

    # Parts that figures share.

    def _svg(self, height: float, title: str, parts: Iterable[str]) -> str:
        drawn = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{safe(title)}">{"".join(parts)}</svg>'
        return f'<div class="scroll figure">{drawn}</div>'

    def _time_axis(self, bottom: float) -> str:
        parts = []
        for at, text in time_ticks(self._length_s):
            x = self._x(at)
            anchor = "end" if x > RIGHT - 20 else "middle"
            parts.append(f'<line class="frame" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{text}</text>')
        return "".join(parts)

    def _value_axis(self, scale: Linear | Log) -> str:
        parts = []
        for value, text in scale.ticks:
            y = scale(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        return "".join(parts)

    def _borders(self, top: float, bottom: float) -> str:
        """Where phases begin."""
        moments = {self._x(phase["begins_s"]) for phase in self._report["phases"] if phase["begins_s"] > 0}
        return "".join(f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>' for x in sorted(moments))

    def _frame(self, top: float, bottom: float) -> str:
        return f'<rect class="frame" x="{LEFT}" y="{top}" width="{RIGHT - LEFT}" height="{bottom - top}"/>'

    # Figures over time.

    def phases(self) -> str:
        """Bands with names, and flags for events."""
        parts, last = [], {}
        for phase in self._report["phases"]:
            shade = last.setdefault(phase["name"], len(last) % 2)
            begin, end = self._x(phase["begins_s"]), self._x(phase["ends_s"])
            title = f'{phase["name"]}: {seconds(phase["begins_s"])} to {seconds(phase["ends_s"])}'
            parts.append(
                f'<g><title>{safe(title)}</title><rect class="band{"2" if shade else ""}" x="{begin:.1f}" y="6" '
                f'width="{max(end - begin, 0.5):.1f}" height="30" rx="3"/>'
                f"{_fitted(phase['name'], begin + 8, 25.5, end - begin - 12)}</g>"
            )
        rows, flags = [float(LEFT - 100)] * _EVENT_ROWS, []
        for event in self._report["events"]:
            x, text = self._x(event["at_s"]), _event_text(event)
            title = f"<title>{safe(text)} at {safe(seconds(event['at_s']))}</title>"
            width = _width(text)
            row = next((number for number, taken in enumerate(rows) if x >= taken), None)
            label, bottom = "", 46.0
            if row is not None:
                to_left = x + 10 + width > RIGHT
                rows[row] = x + 18 + (0 if to_left else width)
                bottom = 56.0 + 18 * row
                end = ' text-anchor="end"' if to_left else ""
                label = f'<text class="ink" x="{x - 7 if to_left else x + 7:.1f}" y="{bottom + 1:.1f}"{end}>{safe(text)}</text>'
            flags.append(
                f'<g>{title}<line class="event" x1="{x:.1f}" x2="{x:.1f}" y1="32" y2="{bottom:.1f}"/>'
                f'<circle class="flag" cx="{x:.1f}" cy="{bottom - 3:.1f}" r="3.5"/>{label}</g>'
            )
        used = sum(taken > LEFT - 100 for taken in rows)
        bottom = 42 + 18 * used
        parts += flags
        parts.append(f'<line class="frame" x1="{LEFT}" x2="{RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        return self._svg(bottom + 22, "Phases and events", [*parts, self._time_axis(bottom)])

    def heat(self, op: str) -> str:
        """How many requests were how late, when; with the median and the 99th percentile."""
        latency = self._report["latency"]
        cells, group = self._grouped(latency["cells"][op])
        if not cells:
            return ""
        low, ratio = latency["shortest_s"], latency["ratio"]
        rows = [row for _, row in cells]
        top, bottom = 8.0, 218.0
        scale = Log(low * ratio ** (min(rows) - 1.5), low * ratio ** (max(rows) + 3), bottom, top)
        most = max(cells.values())
        paths: list[list[str]] = [[] for _ in range(HEAT_LEVELS)]
        for (column, row), count in sorted(cells.items()):
            level = heat_level(count, most)
            begin, end = self._x(column * group * self._bucket_s), self._x((column + 1) * group * self._bucket_s)
            above, below = scale(low * ratio ** (row + 1)), scale(low * ratio**row)
            above = min(above, below - 2.5)  # one that is alone must be seen
            if end > begin:
                paths[level].append(f"M{begin:.1f} {below:.1f}H{end:.1f}V{above:.1f}H{begin:.1f}z")
        parts = [self._value_axis(scale)]
        parts += [f'<path class="h{level}" d="{"".join(path)}"/>' for level, path in enumerate(paths) if path]
        parts.append(self._borders(top, bottom))
        lines = latency["percentiles"][op]
        gap_max = max(4 * (lines[0][1] - lines[0][0]), len(self._line["depth"]) // 40)  # beyond it nothing was answered in between
        for column, kind in ((3, "mark dash"), (2, "mark")):
            points = [(self._x((line[0] + line[1]) / 2 * self._bucket_s), scale(max(line[column], low)), line[0]) for line in lines]
            parts.append(f'<path class="curve thin {kind}" d="{_broken_line(points, gap_max)}"/>')
        parts += [self._frame(top, bottom), self._time_axis(bottom)]
        return self._svg(bottom + 22, f"Latency of {op} over time", parts)

    def _grouped(self, cells: Sequence[Sequence[int]]) -> tuple[dict[tuple[int, int], int], int]:
        """No more columns than can be told apart."""
        group = -(-len(self._line["depth"]) // COLUMNS_MAX)
        grouped: dict[tuple[int, int], int] = {}
        for at, row, count in cells:
            grouped[at // group, row] = grouped.get((at // group, row), 0) + count
        return grouped, group

    def heat_legend(self, op: str) -> str:
        most = max(self._grouped(self._report["latency"]["cells"][op])[0].values())
        group = -(-len(self._line["depth"]) // COLUMNS_MAX)
        boxes = "".join(f'<rect class="h{level}" x="{18 * level}" width="18" height="12"/>' for level in range(HEAT_LEVELS))
        lines = [("mark", "median"), ("mark dash", "99th percentile")]
        return (
            f"<span>1</span><svg viewBox='0 0 {18 * HEAT_LEVELS} 12' width='{18 * HEAT_LEVELS}' height='12'>{boxes}</svg>"
            f"<span>{number(most)} requests in {seconds(group * self._bucket_s)}</span>" + "".join(legend_key(kind, what) for kind, what in lines)
        )

    def throughput(self) -> str:
        return self._curves(
            {op: self._rates(values) for op, values in self._line["bytes"].items()},
            lambda value: f"{size(value)}/s",
            "Bytes a second",
            is_bytes=True,
        )

    def requests(self) -> str:
        series = {op: self._rates(values) for op, values in self._line["requests"].items() if op in self.drawn}
        return self._curves(series, number, "Requests a second")

    def _rates(self, values: Sequence[int]) -> list[float]:
        """A second; stretches are put together until there are no more than a curve can show."""
        group = -(-len(values) // 150)
        sums = [sum(values[at : at + group]) for at in range(0, len(values), group)]
        whole_s = self._bucket_s * group
        lengths = [min(whole_s, max(self._length_s - at * whole_s, self._bucket_s)) for at in range(len(sums))]
        return [total / length for total, length in zip(sums, lengths)]

    def _curves(self, series: dict[str, list[float]], write: Callable[[float], str], title: str, is_bytes: bool = False) -> str:
        top, bottom = 8.0, 148.0
        most = max((max(values, default=0) for values in series.values()), default=0)
        if not is_bytes or not most:
            scale = Linear(most, bottom, top, write)
        else:
            factor = 1024 ** next(power for power in range(5) if most < 1024 ** (power + 1) or power == 4)
            scale = _Scaled(most, factor, bottom, top, write)
        parts = [self._value_axis(scale)]
        for op, values in series.items():
            shade = self.shade.get(op, 6)
            line = self._steps(values, scale)
            first, last = self._x(0), self._x(len(values) * self._step(values))
            parts.append(f'<path class="area f{shade}" d="M{first:.1f} {bottom}L{line[1:]}L{last:.1f} {bottom}z"/>')
            parts.append(f'<path class="curve s{shade}" d="{line}"/>')
        parts += [self._borders(top, bottom), self._frame(top, bottom), self._time_axis(bottom)]
        return self._svg(bottom + 22, title, parts)

    def _step(self, values: Sequence[float]) -> float:
        return self._bucket_s * -(-len(self._line["depth"]) // max(len(values), 1))

    def _steps(self, values: Sequence[float], scale: Callable[[float], float]) -> str:
        step, parts = self._step(values), []
        for at, value in enumerate(values):
            parts.append(f"{'L' if at else 'M'}{self._x(at * step):.1f} {scale(value):.1f}H{self._x((at + 1) * step):.1f}")
        return "".join(parts)

    def depth(self) -> str:
        """Requests at a time, and those of them that hang."""
        top, bottom = 8.0, 128.0
        scale = Linear(max(self._line["depth"], default=0), bottom, top, number, whole=True)
        parts = [self._value_axis(scale)]
        for name, kind in (("depth", "s0"), ("hanging", "s1")):
            line = self._steps(self._line[name], scale)
            if any(self._line[name]):
                parts.append(f'<path class="area {"f" + kind[1]}" d="M{LEFT} {bottom}L{line[1:]}L{RIGHT} {bottom}z"/>')
                parts.append(f'<path class="curve thin {kind}" d="{line}"/>')
        parts += [self._borders(top, bottom), self._frame(top, bottom), self._time_axis(bottom)]
        return self._svg(bottom + 22, "Queue depth", parts)

    def strips(self) -> str:
        """For each rule when it hit, the darker the more often; and the errors that clients got."""
        hits = dict(self._line["hits"])
        rows = [(rule, hits[rule]) for rule in hits]
        if any(self._line["errors"]):
            rows.append(("errors answered", self._line["errors"]))
        group = -(-len(self._line["depth"]) // COLUMNS_MAX)
        parts, y = [], 0.0
        for name, values in rows:
            sums = [sum(values[at : at + group]) for at in range(0, len(values), group)]
            most = max(sums, default=0)
            total = f"{number(sum(values))} in all, at most {number(most)} in {seconds(group * self._bucket_s)}"
            label = _shortened(name, 560)
            parts.append(f'<text class="ink" x="{LEFT}" y="{y + 14}">{safe(label)}</text>')
            parts.append(f'<text x="{RIGHT}" y="{y + 14}" text-anchor="end">{total}</text>')
            parts.append(f'<rect class="band" x="{LEFT}" y="{y + 20}" width="{RIGHT - LEFT}" height="14"/>')
            for at, count in enumerate(sums):
                if count:
                    x, end = self._x(at * group * self._bucket_s), self._x((at + 1) * group * self._bucket_s)
                    level = max(2, heat_level(count, most))
                    parts.append(f'<rect class="h{level}" x="{x:.1f}" y="{y + 20}" width="{max(end - x, 1.5):.1f}" height="14"/>')
            y += 44
        return self._svg(y + 18, "Rule hits", [*parts, self._borders(0, y - 4), self._time_axis(y - 4)])

    # Latency as a whole.

    def percentiles(self) -> str:
        """Latency that a share of the requests did not exceed; the share grows by nines."""
        lines = [line for line in self._report["operations"] if line["phase"] is None and line["op"] in self.drawn and len(line["quantiles"]) > 1]
        if not lines:
            return ""
        top, bottom = 8.0, 268.0
        shortest_s = self._report["latency"]["shortest_s"]
        values = [max(value, shortest_s) for line in lines for _, value in line["quantiles"]]
        scale = Log(min(values), max(values), bottom, top)
        nines = max(_nines(share) for line in lines for share, _ in line["quantiles"] if share < 1)
        nines = max(nines, 1.0) * 1.08

        def x_of(share: float) -> float:
            return LEFT + (RIGHT - 60 - LEFT) * min(_nines(share) / nines, 1.0)

        parts = [self._value_axis(scale)]
        for share in (0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999):
            text = f"{100 * share:g} %" if share else "0"
            if _nines(share) <= nines:
                x = x_of(share)
                parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
                parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
        for line in lines:
            shade = self.shade[line["op"]]
            points = [(x_of(share) if share < 1 else RIGHT - 24, scale(max(value, shortest_s))) for share, value in line["quantiles"]]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path class="curve s{shade}" d="M{path}"/>')
            for (x, y), (share, value) in zip(points, line["quantiles"]):
                name = "slowest" if share == 1 else f"{100 * share:g} %"
                title = f"<title>{safe(line['op'])} {name}: {seconds(value)}</title>"
                parts.append(f'<circle class="f{shade}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>')
        parts.append(f'<text x="{RIGHT - 24}" y="{bottom + 17}" text-anchor="middle">slowest</text>')
        parts.append(self._frame(top, bottom))
        return self._svg(bottom + 22, "Latency percentiles", parts)

    def legend(self, ops: Iterable[str]) -> str:
        return "".join(legend_key(f"s{self.shade.get(op, 6)}", op) for op in ops)


class _Scaled(Linear):
    """A linear axis whose ticks are round in a unit that is a power of 1024."""

    def __init__(self, top: float, factor: int, below: float, above: float, write: Callable[[float], str]) -> None:
        super().__init__(top / factor, below, above)
        self._factor = factor
        self.ticks = [(value * factor, write(value * factor)) for value, _ in self.ticks]

    def __call__(self, value: float) -> float:
        return super().__call__(value / self._factor)


def heat_level(count: int, most: int) -> int:
    """0 to `HEAT_LEVELS` - 1, logarithmic: one request can be seen beside a million."""
    if most <= 1:
        return HEAT_LEVELS - 1
    return min(int(log(count) / log(most) * HEAT_LEVELS), HEAT_LEVELS - 1)


def _nines(share: float) -> float:
    return -log(1 - share) / log(10)


def _broken_line(points: Sequence[tuple[float, float, int]], gap_max: int) -> str:
    parts, before = [], None
    for x, y, at in points:
        joined = before is not None and at - before <= gap_max
        parts.append(f"{'L' if joined else 'M'}{x:.1f} {y:.1f}" + ("" if joined else "h.1"))
        before = at
    return "".join(parts)


def _event_text(event: dict[str, Any]) -> str:
    words = {"event": "", "over": "the end", "power_cut": "power cut", "power_on": "power on", "replay_stop": "replay ends"}
    what = words.get(event["what"], event["what"])
    return " ".join(filter(None, (what, event["name"])))


def _width(text: str) -> float:
    """About so many pixels wide at 12 px; safe fonts are no wider."""
    return 7.2 * len(text)


def _shortened(text: str, room: float) -> str:
    return text if _width(text) <= room else text[: max(int(room / 7.2) - 1, 0)] + "…"


def _fitted(text: str, x: float, y: float, room: float) -> str:
    """Text that is cut to its room, or nothing where there is none."""
    shown = _shortened(text, room)
    return f'<text class="strong" x="{x:.1f}" y="{y}">{safe(shown)}</text>' if len(shown) > 2 or shown == text and room > 12 else ""


def legend_key(kind: str, text: str) -> str:
    return (
        f"<span><svg viewBox='0 0 26 12' width='26' height='12' style='display:inline;vertical-align:-1px'>"
        f"<path class='curve {kind}' d='M2 6H24'/></svg> {safe(text)}</span>"
    )

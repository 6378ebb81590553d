"""The report of a scenario as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

What the page says comes from names that others chose. They are escaped (`report_scales.safe`), and the page forbids itself, by a
content security policy, to run or load anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from simsr.cli.report_figures import Figures, legend_key
from simsr.cli.report_scales import number, safe, seconds, size
from simsr.cli.report_style import STYLE

__all__ = ["report_page", "verdict_words"]

_MARKS = {"met": "✓", "broken": "✗", "not evaluated": "–"}
_KINDS = {"met": "met", "broken": "broken", "not evaluated": "open"}
_COLUMNS = (("min", "min_s"), ("median", "p50_s"), ("90 %", "p90_s"), ("99 %", "p99_s"), ("99.9 %", "p999_s"), ("max", "max_s"))


def report_page(report: dict[str, Any], version: str) -> str:
    """The page; ``report`` as the API gives it."""
    figures = Figures(report)
    body = [
        _header(report, version),
        _section("Expectations", _expectations(report)) if report["expectations"] else "",
        _section("Timeline", figures.phases(), _timeline_note(report)) if report["phases"] or report["events"] else "",
    ]
    if not report["operations"]:
        body.append(_section("Requests", '<p class="note">No request came to a disk that the scenario is about.</p>'))
    else:
        body += _pictures(report, figures)
    body += [
        _section("Rules", _rules(report)) if report["rules"] else "",
        _section("Waiting", _waiting(report)),
        _section("Disks", _disks(report)) if report["disks"] else "",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{safe(report['scenario'])}: simsr report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def verdict_words(report: dict[str, Any]) -> str:
    """One sentence of all expectations together."""
    verdicts = [one["verdict"] for one in report["expectations"]]
    count, broken = len(verdicts), verdicts.count("broken")
    left = verdicts.count("not evaluated")
    if not count:
        return "nothing was expected"
    if broken:
        return f"{broken} of {count} expectations broken"
    met = "expectation met" if count == 1 else f"{count} expectations met" if not left else f"{count - left} of {count} expectations met"
    return f"{left} of {count} expectations not evaluated" if left == count else met + (f", {left} not evaluated" if left else "")


def _section(title: str, content: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{f'<p class=note>{note}</p>' if note else ''}{content}</section>" if content else ""


def _header(report: dict[str, Any], version: str) -> str:
    verdict = report["verdict"]
    kind, mark = _KINDS.get(verdict, "none"), _MARKS.get(verdict, "")
    moved = sum(line["bytes"] for line in report["operations"] if line["phase"] is None)
    facts = [
        ("seed", f"{report['seed']:d}"),
        ("began", safe(report["began"].replace("T", " ").replace("+00:00", " UTC"))),
        ("so far" if report["is_running"] else "took", seconds(report["duration_s"])),
        ("disks", len(report["disks"])),
        ("requests", number(report["requests"])),
        ("data", size(moved)),
        ("errors answered", number(report["errors"])),
        ("connections dropped", number(report["disconnects"])),
        ("longest hang", seconds(report["hangs"]["max_s"]) if report["hangs"]["max_s"] else "none"),
        ("simsr", safe(version)),
    ]
    shown = "".join(f"<div{' class=wide' if name == 'began' else ''}><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    running = " (it is still running)" if report["is_running"] else ""
    return (
        f'<header><div class="top"><div><h1>{safe(report["scenario"])}</h1><p class="about">{safe(report["about"])}{running}</p></div>'
        f'<span class="badge {kind}">{mark} {verdict_words(report)}</span></div><dl class="facts">{shown}</dl></header>'
    )


def _expectations(report: dict[str, Any]) -> str:
    items = []
    for one in report["expectations"]:
        found = ", ".join(f"{safe(f['what'])} = <b>{safe(f['value'])}</b>" for f in one["found"])
        why = safe(one["reason"])
        said = "; ".join(filter(None, (found, why)))
        items.append(
            f'<li><span class="badge {_KINDS[one["verdict"]]}">{_MARKS[one["verdict"]]} {one["verdict"]}</span>'
            f'<span><code>{safe(one["that"])}</code>{f"<p class=note>{said}</p>" if said else ""}</span></li>'
        )
    return f'<ul class="expect">{"".join(items)}</ul>'


def _timeline_note(report: dict[str, Any]) -> str:
    left = report["left_out"]
    return f"{number(left)} later phases and events are not shown." if left else ""


def _pictures(report: dict[str, Any], figures: Figures) -> Iterable[str]:
    ops = figures.drawn
    maps = [
        f'<h3>{safe(op)}</h3><div class="legend">{figures.heat_legend(op)}</div>{figures.heat(op)}'
        for op in ops
        if report["latency"]["cells"].get(op)
    ]
    yield _section("Latency over time", "".join(maps), "Each request is counted when it was answered. Dotted lines: where phases begin.")
    yield _section(
        "Latency percentiles",
        f'<div class="legend">{figures.legend(ops)}</div>{figures.percentiles()}{_latencies(report)}',
        "The latency that a share of the requests did not exceed. To the right each step is ten times rarer.",
    )
    if report["timeline"]["bytes"]:
        yield _section("Throughput", f'<div class="legend">{figures.legend(report["timeline"]["bytes"])}</div>{figures.throughput()}')
    yield _section("Requests a second", f'<div class="legend">{figures.legend(ops)}</div>{figures.requests()}')
    yield _section(
        "Queue depth",
        f'<div class="legend">{legend_key("s0", "at a time")}{legend_key("s1", "of them hanging")}</div>{figures.depth()}',
        "Most requests at a time, of all disks together.",
    )
    if report["timeline"]["hits"] or any(report["timeline"]["errors"]):
        yield _section("Rule hits", figures.strips(), "The stronger the colour, the more often.")


def _table(headings: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], words: int = 1) -> str:
    """``rows``: (class, cells), the cells already safe; the first ``words`` columns are text."""
    head = "".join(f"<th{_words(at, words)}>{heading}</th>" for at, heading in enumerate(headings))
    lines = [
        f"<tr{f' class={kind}' if kind else ''}>"
        + "".join(f"<td{_words(at, words)}>{cell}</td>" for at, cell in enumerate(cells))
        + "</tr>"
        for kind, cells in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _words(at: int, words: int) -> str:
    return " class=words" if at < words else ""


def _count(value: int) -> str:
    return f'<span class="some">{number(value)}</span>' if value else "0"


def _latencies(report: dict[str, Any]) -> str:
    rows = []
    for line in report["operations"]:
        phase = line["phase"]
        name = safe(line["op"]) if phase is None else safe(f"in {phase!s}") if phase else "outside of phases"
        cells = [name, number(line["count"]), _count(line["errors"]), size(line["bytes"]) if line["bytes"] else "–"]
        rows.append(("part" if phase is not None else "", [*cells, *(seconds(line[key]) for _, key in _COLUMNS)]))
    return _table(("operation", "requests", "errors", "data", *(name for name, _ in _COLUMNS)), rows)


def _rules(report: dict[str, Any]) -> str:
    rows = [("", [safe(rule["rule"]), number(rule["matched"]), number(rule["hits"])]) for rule in report["rules"]]
    return _table(("rule", "requests it looked at", "hits"), rows)


def _waiting(report: dict[str, Any]) -> str:
    hangs, lost = report["hangs"], report["flushed_writes"]
    lines = []
    if report["gaps"]:
        rows = [
            ("", [safe(gap["op"]), safe(gap["name"] or gap["vdi"]), seconds(gap["max_s"]), seconds(gap["at_s"])]) for gap in report["gaps"]
        ]
        lines.append("<p class=note>The longest time in which requests waited at a disk and none of them was answered.</p>")
        lines.append(_table(("operation", "disk", "longest gap", "from"), rows, 2))
    if hangs["count"] or hangs["now"]:
        now = f", {number(hangs['now'])} hang now" if hangs["now"] else ""
        typical = f"; half of them no longer than {seconds(hangs['p50_s'])}" if hangs["count"] else ""
        lines.append(f"<p>{number(hangs['count'])} requests have hung{now}, the longest for {seconds(hangs['max_s'])}{typical}.</p>")
    if report["power_cuts"]:
        lines.append(f"<p>Power cuts: {number(report['power_cuts'])}.</p>")
    if lost["promised"]:
        lines.append(f"<p>Writes that were flushed: {number(lost['promised'])}; of these lost: {_count(lost['lost'])}.</p>")
    if lag := report["replay_lag"]:
        lines.append(f"<p>Replayed requests were {seconds(lag['p99_s'])} late at the 99th percentile, {seconds(lag['max_s'])} at most.</p>")
    return "".join(lines)


_DURABLE = {"flush": "at a flush", "each-write": "each write"}
"""When a client takes its writes for safe from a power cut."""


def _disks(report: dict[str, Any]) -> str:
    rows = [
        (
            "",
            [
                safe(disk["name"] or "–"),
                f"<code>{safe(disk['vdi'])}</code>",
                size(disk["size_bytes"]),
                ", ".join(f"{one['kind']} ({_DURABLE[one['durability']]})" for one in disk["clients"]) or "–",
                number(sum(disk["requests"].values())),
                size(disk["bytes"].get("read", 0)),
                size(disk["bytes"].get("write", 0)),
                _count(disk["errors"]),
            ],
        )
        for disk in report["disks"]
    ]
    return _table(("disk", "uuid", "size", "clients (durable)", "requests", "read", "written", "errors"), rows, 2)

"""What the benchmark shows and leaves behind: aligned text on standard output, ``bench.json`` for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.operations import Finding
from bench.workloads import WORKLOADS, Workload

__all__ = ["aligned", "findings_text", "table_text", "verdict_text", "write_json"]

OURS = "simsr"
_BY_NAME = {workload.name: workload for workload in WORKLOADS}


def table_text(state: str, rows: Sequence[dict]) -> str:
    """Return the table of one state: the median of each server, then our ratio to each peer and what was aimed at."""
    servers = list(dict.fromkeys(row["server"] for row in rows))
    peers = [server for server in servers if server != OURS] if OURS in servers else []
    lines = [["workload", "unit", *servers, *(cell for peer in peers for cell in (f"/{peer}", "target", ""))]]
    for name in dict.fromkeys(row["workload"] for row in rows):
        by_server = {row["server"]: row for row in rows if row["workload"] == name}
        workload = _BY_NAME[name]
        lines.append([workload.title, workload.unit, *(f"{by_server[server]['value']:,.0f}" for server in servers)])
        for peer in peers:
            lines[-1] += _ratio_cells(workload, peer, by_server[OURS]["ratio_to"][peer])
    return f"{state}: medians, and medians of the ratios within each round\n{aligned(lines)}"


def findings_text(findings: Iterable[Finding]) -> str:
    """Return the table of operations."""
    lines = [["operation", "value", "unit", "target", ""]]
    for finding in findings:
        bounds = [("<=", finding.at_most), (">=", finding.at_least)]
        target = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        verdict = _verdict(finding.ok) if target else ""
        lines.append([finding.name, f"{finding.value:.2f}", finding.unit, target, verdict])
    return f"operations\n{aligned(lines)}"


def verdict_text(rows: Iterable[dict], findings: Iterable[Finding]) -> str:
    """Return one line that counts the targets reached and names the others."""
    checks = [
        (f"{row['workload']} ({row['state']}) against {peer}", row["ratio_to"][peer] >= target)
        for row in rows
        if row["server"] == OURS
        for peer, target in _BY_NAME[row["workload"]].targets.items()
        if peer in row["ratio_to"]
    ]
    checks += [(finding.name, finding.ok) for finding in findings if (finding.at_most or finding.at_least) is not None]
    if not checks:
        return "no targets were measured"
    below = [name for name, ok in checks if not ok]
    counts = f"{len(checks) - len(below)} of {len(checks)} targets reached"
    return f"{counts}; not: {', '.join(below)}" if below else counts


def write_json(path: Path, settings: dict, rows: Sequence[dict], findings: Sequence[Finding], complete: bool) -> None:
    """Write everything; ``complete`` is false where the benchmark was ended early."""
    operations = [
        {
            "operation": finding.operation,
            "name": finding.name,
            "value": finding.value,
            "unit": finding.unit,
            "at_most": finding.at_most,
            "at_least": finding.at_least,
            "ok": finding.ok,
        }
        for finding in findings
    ]
    targets = {workload.name: workload.targets for workload in WORKLOADS}
    content = {"complete": complete, "settings": settings, "targets": targets, "rows": rows, "operations": operations}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return ``lines`` as columns, the first to the left and the others to the right, for any width of terminal."""
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _ratio_cells(workload: Workload, peer: str, ratio: float) -> list[str]:
    target = workload.targets.get(peer)
    if target is None:
        return [f"{ratio:.2f}", "", ""]
    return [f"{ratio:.2f}", f">= {target:g}", _verdict(ratio >= target)]


def _verdict(ok: bool) -> str:
    return "ok" if ok else "BELOW"

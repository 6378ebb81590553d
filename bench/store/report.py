"""What the benchmark of the store shows and leaves behind: a table for each row, ``bench-store.json`` for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.operations import Finding
from bench.report import aligned

__all__ = ["findings_table", "write_findings"]


def findings_table(row: str, findings: Sequence[Finding]) -> str:
    """Return the table of one row: what was measured, the target, and whether it was reached."""
    lines = [[row, "value", "unit", "target", ""]]
    for finding in findings:
        bounds = [("<=", finding.at_most), (">=", finding.at_least)]
        target = " ".join(f"{sign} {bound:.3g}" for sign, bound in bounds if bound is not None)
        verdict = ("ok" if finding.ok else "below") if target else ""
        value = f"{finding.value:,.0f}" if finding.value >= 1000 else f"{finding.value:.2f}"
        lines.append([finding.name, value, finding.unit, target, verdict])
    return aligned(lines)


def write_findings(path: Path, settings: dict, findings: Sequence[Finding], complete: bool) -> None:
    """Write everything; ``complete`` is false where the benchmark was ended early."""
    rows = [{**asdict(finding), "ok": finding.ok} for finding in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"complete": complete, "settings": settings, "findings": rows}, indent=2) + "\n")

"""``python -m bench.store``: measures the rows, prints their tables, writes ``build/bench-store.json``."""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.__main__ import directory_in, tell
from bench.failure import BenchFailure
from bench.operations import Finding
from bench.servers import simsrd
from bench.store.amplification import amplification
from bench.store.depth import depth, fresh
from bench.store.large import ROWS as LARGE_ROWS
from bench.store.large import large
from bench.store.operations import counts
from bench.store.report import findings_table, write_findings
from bench.store.scale import FULL, QUICK, Scale
from bench.store.stalls import stalls
from simsr.errors import SimsrError

ROWS = ("counts", "depth", "fresh", "stalls", "amplification", *LARGE_ROWS)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-store", description=__doc__)
    parser.add_argument("--only", action="append", choices=ROWS, metavar="ROW", help=f"only this, may be repeated: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see whether it works")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the disks live (default /var/tmp)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "build" / "bench-store.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    scale, rows = (QUICK if arguments.quick else FULL), set(arguments.only or ROWS)
    findings: list[Finding] = []
    status = 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is put away then as well
    try:
        for row in ROWS:
            if row in rows and row not in LARGE_ROWS:
                show(row, one_row(row, arguments.dir, scale), findings)
        if wanted := rows & set(LARGE_ROWS):
            with directory_in(arguments.dir) as directory:
                show(" ".join(sorted(wanted)), large(directory, wanted, scale, tell), findings)
        below = [finding.name for finding in findings if not finding.ok]
        print(f"below the target: {', '.join(below)}" if below else "all targets reached")
        status = 0
    except (BenchFailure, SimsrError) as failure:
        print(f"bench: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        status = 130
    finally:
        if findings:
            settings = {"quick": arguments.quick, "kernel": platform.release(), "python": platform.python_version()}
            write_findings(arguments.output, settings | {"time": time.time()}, findings, status == 0)
            tell(f"written to {arguments.output}")
    return status


def one_row(row: str, parent: Path, scale: Scale) -> Iterator[Finding]:
    """Measure a row in a directory of its own."""
    with directory_in(parent) as directory:
        if row == "amplification":
            yield from amplification(directory, scale, tell)
        elif row == "stalls":
            yield from stalls(directory, scale, tell)
        else:
            root = directory / "root"
            root.mkdir()
            with simsrd(root) as daemon:
                if row == "counts":
                    yield from counts(daemon, scale, tell)
                elif row == "depth":
                    yield from depth(daemon, directory, scale, tell)
                else:
                    yield from fresh(daemon, directory, scale, tell)


def show(title: str, measured: Iterator[Finding], findings: list[Finding]) -> None:
    """Collect what is measured, also if it ends early, and print the table."""
    before = len(findings)
    try:
        for finding in measured:
            findings.append(finding)
    finally:
        if len(findings) > before:
            print(findings_table(title, findings[before:]), end="\n\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench``: runs the comparison and the operations, prints the tables, writes ``build/bench.json``."""

from __future__ import annotations

import argparse
import contextlib
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench import fio
from bench.comparison import measure_table, rows_of
from bench.failure import BenchFailure
from bench.operations import OPERATIONS as DAEMON_OPERATIONS
from bench.operations import Finding, Scale
from bench.report import findings_text, table_text, verdict_text, write_json
from bench.servers import OPTIONAL, SERVERS, Served, serve, simsrd
from bench.vm_revert import vm_revert
from bench.workloads import WORKLOADS
from simsr.errors import SimsrError
from simsr.units import parse_size

GIB = 1 << 30
OPERATIONS = {**DAEMON_OPERATIONS, "revert": vm_revert}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    workloads = [workload.name for workload in WORKLOADS]
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the table (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each run (default 2)")
    parser.add_argument("--size", type=parse_size, default=GIB, help="size of the disks (default 1GiB)")
    parser.add_argument(
        "--only",
        action="append",
        choices=[*workloads, *OPERATIONS],
        metavar="NAME",
        help=f"measure only this, may be given again: {', '.join([*workloads, *OPERATIONS])}",
    )
    parser.add_argument(
        "--servers",
        type=_servers,
        default=list(SERVERS),
        help=f"comma-separated, of {','.join(SERVERS)} (default all); operations are measured if simsr is among them",
    )
    parser.add_argument("--skip-steady", action="store_true", help="measure the table on fresh disks only")
    parser.add_argument("--scaling", action="store_true", help="snapshots of 16 GiB instead of 4 GiB beside 1 GiB")
    parser.add_argument("--scaling-size", type=parse_size, help="the same with this size")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see whether it works")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the disks live (default /var/tmp)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "build" / "bench.json")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("--rounds and --seconds must be greater than zero")
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.size = 1, 0.3, 128 << 20
    return arguments


def _servers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SERVERS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} not known; there are {', '.join(SERVERS)}")
    return [name for name in SERVERS if name in names]


def scale_of(arguments: argparse.Namespace) -> Scale:
    if arguments.quick:
        return Scale(64 << 20, arguments.scaling_size or 256 << 20, 3, 50, 1, arguments.seconds)
    large_bytes = arguments.scaling_size or (16 * GIB if arguments.scaling else 4 * GIB)
    return Scale(GIB, large_bytes, 10, 1000, arguments.rounds, arguments.seconds)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    rows: list[dict] = []
    findings: list[Finding] = []
    status = 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is put away then as well
    try:
        compare(arguments, rows)
        operate(arguments, findings)
        print(verdict_text(rows, findings))
        status = 0
    except (BenchFailure, SimsrError) as failure:
        print(f"bench: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        status = 130
    finally:
        if rows or findings:
            write(arguments, rows, findings, complete=status == 0)
    return status


def write(arguments: argparse.Namespace, rows: list[dict], findings: list[Finding], complete: bool) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    settings |= {"kernel": platform.release(), "python": platform.python_version(), "time": time.time()}
    write_json(arguments.output, settings, rows, findings, complete)
    tell(f"written to {arguments.output}")


def compare(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Measure the table on fresh disks and again in the steady state; add what was measured to ``rows``."""
    workloads = [workload for workload in WORKLOADS if not arguments.only or workload.name in arguments.only]
    if not workloads:
        return
    with all_servers(arguments) as servers:
        for state, prepare in STATES.items():
            if state == "steady" and arguments.skip_steady:
                continue
            samples = measure_table(
                servers, workloads, arguments.rounds, arguments.seconds, tell, partial(prepare, arguments.size)
            )
            of_state = rows_of(state, samples)
            rows += of_state
            print(table_text(state, of_state), end="\n\n", flush=True)


def _write_once(size_bytes: int, server: Served, round_number: int) -> None:
    if round_number == 0:
        tell(f"writing {server.name}'s disk")
        fio.fill_in_order(server.uri, size_bytes)


def _overwrite(size_bytes: int, server: Served, round_number: int) -> None:
    tell(f"overwriting {server.name}'s disk twice, at random")
    fio.overwrite_twice(server.uri, size_bytes)


STATES = {"fresh": _write_once, "steady": _overwrite}
"""The tables, in order, and what happens to every disk before each round. No server is restarted in between."""


def operate(arguments: argparse.Namespace, findings: list[Finding]) -> None:
    """Measure the operations; add what was found to ``findings``."""
    operations = [OPERATIONS[name] for name in OPERATIONS if not arguments.only or name in arguments.only]
    if not operations or "simsr" not in arguments.servers:
        return
    with directory_in(arguments.dir) as directory, simsrd(directory) as daemon:
        for operation in operations:
            findings.extend(operation(daemon, scale_of(arguments), tell))
    print(findings_text(findings), end="\n\n", flush=True)


@contextlib.contextmanager
def all_servers(arguments: argparse.Namespace) -> Iterator[list[Served]]:
    """Run every server that was asked for, on an empty directory each."""
    with contextlib.ExitStack() as stack:
        servers = []
        for name in arguments.servers:
            directory = stack.enter_context(directory_in(arguments.dir))
            try:
                servers.append(stack.enter_context(serve(name, directory, arguments.size)))
            except BenchFailure as failure:
                if name not in OPTIONAL:
                    raise
                tell(f"without {name}: {failure}")
        yield servers


@contextlib.contextmanager
def directory_in(parent: Path) -> Iterator[Path]:
    """Give a directory that is gone in the end. Its path is short, because unix sockets in it allow 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="sb-", dir=parent, ignore_cleanup_errors=True) as path:
        yield Path(path)


def tell(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

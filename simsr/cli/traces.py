"""``simsr record``, ``simsr replay`` and ``simsr trace``: what was asked of a disk, asked again, and in the formats of others.

What is recorded comes as a stream that the daemon sends while it records; what is replayed is replayed by the daemon, which tells how it goes.
Both end with this process. Ctrl-C ends them in order: the daemon is told, and what it still has to say arrives.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, Optional

import typer

from simsr.cli.client import Client, checked_text
from simsr.cli.disks import For, Json, Vdi
from simsr.cli.failures import FileFailure
from simsr.cli.output import complain, print_fields, print_json, print_table
from simsr.cli.rename_target import rename_target
from simsr.cli.transfer import delete_when_free, undisturbed
from simsr.errors import BadRequest, DaemonUnreachable, ReplayUnfaithful, SimsrError
from simsr.units import format_size, parse_size

__all__ = ["record", "replay", "trace_commands"]

SCRATCH = "scratch"
"""What scratch disks are called: always the same, for faults are drawn from the name of the disk."""

trace_commands = typer.Typer(help="Look into recorded traces, and convert them.")

Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
Format = Annotated[Optional[str], typer.Option("--format", metavar="F", help="own, fio2, fio3, blktrace, msr, ...; default: found out.")]
Device = Annotated[Optional[str], typer.Option("--device", metavar="NAME", help="Only this disk of a trace with several.")]


@contextlib.contextmanager
def _ending(end: Callable[[], None]) -> Iterator[list[int]]:
    """Have the first Ctrl-C, or SIGTERM, call ``end`` and go on; the second one does what it always does. Gives the signals that came."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        came.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)
        try:
            end()
        except SimsrError:
            raise KeyboardInterrupt from None

    for number in before:
        signal.signal(number, handle)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _written(path: str, force: bool, keep: bool) -> Iterator[BinaryIO]:
    """A file to write to; ``keep`` what was written when something goes wrong. ``-`` is standard output. Raises `FileFailure`."""
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        if os.path.exists(path) and not force:
            raise FileFailure(action="write", path=path, reason="it exists", hint="Overwrite it with --force.")
        final = None if keep else rename_target(path)
        target = path if final is None else f"{final}.{uuid.uuid4().hex[:8]}.partial"
        try:
            with open(target, "wb") as out:
                yield out
            if final is not None:
                os.replace(target, final)
        finally:
            if final is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(target)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileFailure(action="write", path=path, reason=error.strerror or str(error)) from None


def record(
    context: typer.Context,
    vdi: Vdi,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where the trace goes; - is standard output.")],
    trace_format: Annotated[str, typer.Option("--format", metavar="F", help="own, fio2, fio3, blktrace, msr, ...")] = "own",
    for_s: For = None,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was recorded as JSON.")] = False,
) -> None:
    """Record every request to a disk, until Ctrl-C: operation, place, time, latency, depth, client.

    Exit status 1 if requests are missing because they came faster than they were written; the trace says where.
    """
    from simsr.daemon.trace_tools import Fetched, check_format, convert_stream

    chosen = check_format(trace_format)
    client: Client = context.obj.client
    path = client.vdi_path(checked_text("VDI", vdi), "record")

    def end() -> None:
        with contextlib.closing(Client(client.socket_path)) as other:
            other.delete(path)

    fetched, skipped = None, 0
    try:
        with _ending(end), client.stream_bytes("POST", path, {"seconds": for_s}) as chunks, _written(file, force, keep=True) as out:
            print(f"Recording {vdi}; Ctrl-C ends it.", file=sys.stderr, flush=True)
            fetched = Fetched(chunks)
            if chosen == "simsr":
                for chunk in fetched:
                    out.write(chunk)
                    out.flush()
            else:
                skipped = convert_stream(fetched, chosen, out).skipped
    except DaemonUnreachable as error:
        error.hint = f"What had come until then is in {file}." if fetched else error.hint
        raise
    if as_json:
        print_json({"file": file, "format": chosen, "requests": fetched.requests, "lost": fetched.lost, "skipped": skipped})
    else:
        print(f"{fetched.requests} requests in {file}.", file=sys.stderr)
    if skipped:
        complain(f"{skipped} requests are left out: format {chosen} cannot hold them", "--format own holds everything.")
    if fetched.lost:
        complain(f"{fetched.lost} requests came faster than they were written, and are missing")
        raise typer.Exit(1)


@trace_commands.command("show")
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A trace; for blktrace the name without .blktrace.N.")],
    trace_format: Format = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in a trace: requests, time, operations, sizes, percentiles of the latency if it has any."""
    from simsr.daemon.trace_tools import check_format, summary

    found = summary(checked_text("file", file), check_format(trace_format) if trace_format else None, device)
    if as_json:
        return print_json(found)
    size = found["device_bytes"]
    print_fields(
        [
            ("trace", file), ("format", found["format"]), ("requests", found["requests"]), ("lost while recording", found["lost"]),
            ("time", f"{found['duration_s']:.3f} s"), ("size of the disk", format_size(size) if size else ""),
            ("used up to", format_size(found["end_bytes"])), ("greatest depth", found["depth_max"]), ("errors", found["errors"]),
            ("FUA", found["fua"]), ("devices", _counted(found["devices"])), ("clients", _counted(found["clients"])),
        ]
    )  # fmt: skip
    print()
    rows = []
    for op, one in found["ops"].items():
        sizes, times = one["size"], one["latency_ns"]
        cells = [_ms(times[name]) for name in ("p50", "p99", "p999", "max")] if times else [""] * 4
        rows.append((op, one["requests"], format_size(one["bytes"]), sizes["p50"], sizes["max"], *cells))
    heads = ("OP", "REQUESTS", "BYTES", "SIZE_P50", "SIZE_MAX", "MS_P50", "MS_P99", "MS_P99.9", "MS_MAX")
    print_table(heads, rows, right=" ".join(heads[1:]))


def _counted(names: dict[str, int], most: int = 8) -> str:
    shown = [f"{name or '(no name)'} ({count})" for name, count in sorted(names.items(), key=lambda item: -item[1])[:most]]
    return ", ".join(shown + ([f"and {len(names) - most} more"] if len(names) > most else []))


def _ms(time_ns: int) -> str:
    return f"{time_ns / 1e6:.3f}"


@trace_commands.command("convert")
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A trace; for blktrace the name without .blktrace.N.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The new one; - is standard output.")],
    from_: Annotated[Optional[str], typer.Option("--from", metavar="F", help="The format of IN; default: found out.")] = None,
    to: Annotated[str, typer.Option("--to", metavar="F", help="The format of OUT.")] = "own",
    device: Device = None,
    force: Force = False,
) -> None:
    """Convert a trace into another format; says how many requests that format cannot hold."""
    from simsr.daemon.trace_tools import check_format, convert_file

    chosen, known = check_format(to), check_format(from_) if from_ else None
    with _written(target, force, keep=False) as out:
        done = convert_file(checked_text("file", source), known, chosen, out, device)
    print(f"{done.written} requests in {target}, format {chosen}.", file=sys.stderr)
    if done.skipped:
        complain(f"{done.skipped} requests are left out: format {chosen} cannot hold them, or they are of another disk")


def replay(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A trace that the daemon can read.")],
    vdi: Annotated[Optional[str], typer.Option("--vdi", metavar="VDI", help="The disk. WHAT IS ON IT IS OVERWRITTEN.")] = None,
    scratch: Annotated[Optional[str], typer.Option("--scratch", metavar="SIZE", help="A new disk, deleted in the end.")] = None,
    sr: Annotated[Optional[str], typer.Option("--sr", metavar="SR", help="Where the scratch disk is made.")] = None,
    speed: Annotated[float, typer.Option("--speed", metavar="X", min=1e-6, max=1e6, help="2: twice as fast as it was.")] = 1.0,
    fast: Annotated[bool, typer.Option("--as-fast-as-possible", help="Whatever the times in the trace.")] = False,
    depth: Annotated[Optional[int], typer.Option("--depth", metavar="N", min=1, max=1024, help="At most so many in flight.")] = None,
    start: Annotated[Optional[str], typer.Option("--start", metavar="TIME", help="Where in the trace to begin: 90s, 3h.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end.")] = False,
    fit: Annotated[str, typer.Option("--fit", metavar="HOW", help="What is beyond our disk: wrap, scale or skip.")] = "wrap",
    trace_format: Format = None,
    device: Device = None,
    for_s: For = None,
    max_lag: Annotated[str, typer.Option("--max-lag", metavar="TIME", help="Its p99 must not be above that.")] = "5ms",
    in_use: Annotated[bool, typer.Option("--in-use", help="Even if somebody uses the disk.")] = False,
    as_json: Json = False,
) -> None:
    """Make the requests of a trace to a disk, in their own time, and say how far that lagged behind.

    Exit status 49 if the trace's pace was not kept, or requests failed.
    """
    from simsr.daemon.trace_tools import check_format, duration_s

    if (vdi is None) == (scratch is None):
        raise BadRequest(what="the disk of the replay", reason="give either --vdi VDI, whose content goes, or --scratch SIZE")
    limit_s = duration_s(max_lag)
    body = {
        "trace": os.path.abspath(checked_text("file", file)), "format": check_format(trace_format) if trace_format else None,
        "device": device, "speed": speed, "start_s": duration_s(start) if start is not None else None, "loop": loop, "fit": fit, "paced": not fast,
        "depth": depth or (64 if fast else None), "in_use": in_use, "seconds": for_s,
    }  # fmt: skip
    client: Client = context.obj.client
    with _disk(client, vdi, scratch, sr) as name:
        last, interrupted = _follow(client, client.vdi_path(name, "replay"), body, quiet=as_json)
    print_json(last) if as_json else _print_replay(last)
    if reason := _unfaithful(last, limit_s):
        raise ReplayUnfaithful(trace=file, reason=reason)
    if interrupted and not loop:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _disk(client: Client, vdi: str | None, scratch: str | None, sr: str | None) -> Iterator[str]:
    if scratch is None:
        yield checked_text("VDI", vdi or "")
        return
    chosen = str(uuid.uuid4())
    size_bytes, where = parse_size(scratch), None if sr is None else checked_text("SR", sr)
    try:
        client.post("/v1/vdis", {"uuid": chosen, "size_bytes": size_bytes, "name": SCRATCH, "sr": where})
        yield chosen
    finally:
        with undisturbed():
            client.close()
            try:
                delete_when_free(client, chosen)
            except SimsrError as error:
                if getattr(error, "code", "") != "NotFound":
                    complain(f"the scratch disk {chosen} stays: {error}", error.hint)


def _follow(client: Client, path: str, body: dict[str, Any], quiet: bool) -> tuple[dict[str, Any], bool]:
    """Its last state, and whether somebody ended it."""
    state: dict[str, Any] = {}
    told = False

    def end() -> None:
        """Before we know which replay it is it may be under way already: then it is ended as soon as we do."""
        nonlocal told
        if state and not told:
            told = True
            with contextlib.closing(Client(client.socket_path)) as other:
                other.delete(client.path_of("replays", str(state["replay"])))

    shows = not quiet and sys.stderr.isatty()
    with _ending(end) as came, client.stream("POST", path, body) as lines:
        for line in lines:
            state.update(json.loads(line))
            if came:
                end()
            if shows:
                lag = f"lag {_ms(state['lag_p99_ns'])} ms" if state["paced"] else ""
                print(f"\r{state['seconds']:8.1f} s  {state['issued']} requests  {lag}\x1b[K", end="", file=sys.stderr, flush=True)
    if shows:
        print(file=sys.stderr)
    return state, bool(came)


def _print_replay(found: dict[str, Any]) -> None:
    lags = [_ms(found[f"lag_{name}_ns"]) for name in ("p50", "p99", "max")]
    times = [_ms(found[f"latency_{name}_ns"]) for name in ("p50", "p99", "max")]
    seconds = found["seconds"] or 1e-9
    print_fields(
        [
            ("requests", found["issued"]), ("failed", sum(found["errors"].values())), ("given up", found["in_flight"]),
            ("left out", found["skipped"]), ("rounds", found["rounds"]), ("time", f"{found['seconds']:.3f} s"),
            ("rate", f"{found['issued'] / seconds:.0f} requests/s, {format_size(int(found['bytes'] / seconds))}/s"),
            ("latency p50, p99, max", f"{', '.join(times)} ms"),
            ("lag p50, p99, max", f"{', '.join(lags)} ms" if found["paced"] else "not in the trace's time"),
        ]
    )  # fmt: skip


def _unfaithful(found: dict[str, Any], limit_s: float) -> str:
    """Why the replay was not what the trace is; empty if it was."""
    reasons = []
    if not found.get("is_over"):
        reasons.append("the daemon ended it")
    if found.get("problem"):
        reasons.append(found["problem"])
    if failed := sum(found["errors"].values()):
        reasons.append(f"{failed} of {found['issued']} requests failed, the first: {found['first_error']}")
    if found["paced"] and found["lag_p99_ns"] > limit_s * 1e9:
        reasons.append(f"its pace was not kept: one request in a hundred came {_ms(found['lag_p99_ns'])} ms late or more")
    return "; ".join(reasons)

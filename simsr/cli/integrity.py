"""``simsr sr scrub``, ``simsr check`` and ``simsr salvage``: is everything there, and if not, what can be had.

A scrub runs in the daemon and is watched from here; Ctrl-C stops it. Check and salvage work on the files of SRs that no daemon has
open, and change nothing in them. The exit status of check is that of ``qemu-img check``: 0 clean, 1 it could not be done, 2 corrupt, 3
leaks only.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Optional

import typer

from simsr.cli.client import Client, Session
from simsr.cli.failures import FileFailure
from simsr.cli.output import complain, print_json, say
from simsr.cli.repositories import Json, only_sr, sr_commands
from simsr.errors import SimsrError
from simsr.units import format_size, parse_size

__all__ = ["check", "salvage"]

POLL_S = 0.2
DAMAGED = 31
LOST = 2
NOT_DONE = 1
LINES_MAX = 100

Directory = Annotated[str, typer.Argument(metavar="DIR", help="The directory of an SR, or the root of a daemon.")]


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function for (bytes done, bytes in all); they are drawn if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _where(line: dict[str, Any]) -> str:
    """Damage as people read it: VDI, range, what."""
    text = line.get("text") or line.get("where", "")
    if line["vdi"] is None:
        return text
    name = f" ({line['name']})" if line["name"] else ""
    span = f", bytes {line['offset']} to {line['offset'] + line['length']}" if line["length"] else ""
    return f"VDI {line['vdi']}{name}{span}: {text}"


def _list(lines: list[dict[str, Any]]) -> None:
    for line in lines[:LINES_MAX]:
        say(f"  {_where(line)}")
    if len(lines) > LINES_MAX:
        say(f"  and {len(lines) - LINES_MAX} more; --json lists them all")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# Scrub.


@sr_commands.command("scrub")
def scrub(
    context: typer.Context,
    sr: Annotated[Optional[str], typer.Argument(metavar="[SR]", help="May be left out if there is only one.")] = None,
    rate: Annotated[str, typer.Option("--rate", metavar="SIZE", help="How much a second it may read.")] = "100MiB",
    as_json: Json = False,
) -> None:
    """Verify every checksum of an SR while it is in use."""
    client: Client = context.obj.client
    found = client.get(client.sr_path(sr)) if sr is not None else only_sr(client, "sr scrub")
    path = f"{client.sr_path(found['uuid'])}/scrub"
    client.post(path, {"rate_bytes_s": parse_size(rate)})
    try:
        result = _watch(client, path, f"scrub {found['name']}")
    except (KeyboardInterrupt, SystemExit):
        client.close()  # the answer to a request may be on its way
        client.delete(path)
        raise
    if as_json:
        print_json(result)
    elif result["state"] == "done":
        say(
            f"SR {found['uuid']} ({found['name']}): {_counted(result['blocks'], 'block')} and "
            f"{_counted(result['nodes'], 'map node')} verified, {format_size(result['bytes_done'])}; "
            f"{result['damaged_blocks']} and {result['damaged_nodes']} are damaged."
        )
        _list(result["damage"])
    if result["state"] != "done":
        complain(f"the scrub {result['state']}{': ' + result['reason'] if result['reason'] else ''}")
        raise typer.Exit(NOT_DONE)
    raise typer.Exit(0 if result["clean"] else DAMAGED)


def _watch(client: Client, path: str, what: str) -> dict[str, Any]:
    with _progress(what) as show:
        while (result := client.get(path))["state"] == "running":
            show(result["bytes_done"], result["bytes_total"])
            time.sleep(POLL_S)
    return result


# Check and salvage.


def _not_done(context: typer.Context, error: Exception, out: str = "its files") -> typer.Exit:
    session: Session = context.obj
    if session.debug:
        raise error
    if isinstance(error, OSError):
        error = FileFailure(action="use", path=error.filename or out, reason=error.strerror or str(error))
    complain(str(error), getattr(error, "hint", ""))
    return typer.Exit(NOT_DONE)


def check(context: typer.Context, directory: Directory, as_json: Json = False) -> None:
    """Check the files of an SR that no daemon has open.

    Nothing is changed. Exit status: 0 clean, 1 the check could not be done, 2 corrupt, 3 leaks only.
    """
    from simsr.daemon import offline

    try:
        with _progress("check") as show:
            result = offline.check(directory, lambda path, done, total: show(done, total))
    except (SimsrError, OSError) as error:
        raise _not_done(context, error) from None
    if as_json:
        print_json(result)
    else:
        for store in result["stores"]:
            _print_check(store)
    raise typer.Exit(result["outcome"])


def _print_check(store: dict[str, Any]) -> None:
    name = f" ({store['name']})" if store["name"] else ""
    say(
        f"{store['path']}{name}: {_counted(store['vdis'], 'VDI')}, {_counted(store['blocks'], 'block')} and "
        f"{_counted(store['nodes'], 'map node')} read, {format_size(store['bytes'])}."
    )
    for heading, lines in (("corrupt", store["corruptions"]), ("leaked", store["leaks"])):
        if lines:
            say(f"{_counted(len(lines), 'problem')}, {heading}:")
            _list(lines)
    if store["corruptions"]:
        say("'simsr salvage DIR OUT' gets out what can be read.")
    elif not store["leaks"]:
        say("No errors were found.")


def salvage(
    context: typer.Context,
    directory: Directory,
    out: Annotated[str, typer.Argument(metavar="OUT", help="An empty directory, or one that is not there yet.")],
    as_json: Json = False,
) -> None:
    """Copy what can still be read of a damaged SR into raw files.

    Nothing is changed in DIR. OUT gets VDI-UUID.raw for each VDI and snapshot, and report.json, which says what is lost. Exit
    status: 0 nothing is lost, 1 it could not be done, 2 something is lost.
    """
    from simsr.daemon import offline

    try:
        with _progress("salvage") as show:
            report = offline.salvage(directory, out, lambda path, done, total: show(done, total))
    except (SimsrError, OSError) as error:
        raise _not_done(context, error, out) from None
    if as_json:
        print_json(report)
    else:
        for store in report["stores"]:
            _print_salvage(store)
        say(f"{out}/report.json has all of this.")
    raise typer.Exit(0 if report["complete"] else LOST)


def _print_salvage(store: dict[str, Any]) -> None:
    if "error" in store:
        return say(f"{store['path']}: nothing could be read: {store['error']}")
    say(f"{store['path']}{' (' + store['name'] + ')' if store['name'] else ''}: the state after record {store['state_after_record']}.")
    for note in store["notes"]:
        say(f"  {note}")
    if store["older_state"]:
        say("  What was written after that record is lost, in whatever VDI it was.")
    for vdi in store["vdis"]:
        kind = f", a snapshot of {vdi['snapshot_of']}" if vdi["snapshot_of"] else ""
        lost = f"{format_size(vdi['lost_bytes'])} lost" if vdi["lost"] else "complete"
        name = f" ({vdi['name']})" if vdi["name"] else ""
        say(f"VDI {vdi['vdi']}{name}{kind}: {format_size(vdi['size_bytes'])}, {format_size(vdi['data_bytes'])} of data, {lost}")
        for part in vdi["lost"][:LINES_MAX]:
            say(f"  bytes {part['offset']} to {part['offset'] + part['length']} are lost")
        if len(vdi["lost"]) > LINES_MAX:
            say(f"  and {len(vdi['lost']) - LINES_MAX} more ranges")
    for volume in store["missing"]:
        say(f"Volume {volume['volume']} is lost: {volume['reason']}.")

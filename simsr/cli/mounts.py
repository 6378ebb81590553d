"""``simsr mount``, ``umount``, ``mounts``: the VDIs as files, through FUSE (docs/fuse.md)."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from simsr.cli.client import Client, checked_text
from simsr.cli.output import print_json, print_table, say
from simsr.cli.repositories import Json
from simsr.errors import BadRequest

__all__ = ["mount", "mounts", "umount"]

Directory = Annotated[str, typer.Argument(metavar="DIR", help="A directory on the daemon's host.")]


def _absolute(directory: str) -> str:
    if not directory:  # of a shell variable that is not set, mostly
        raise BadRequest(what="the directory ''", reason="it is empty; '.' is this directory")
    return os.path.abspath(checked_text("directory", directory))


def mount(
    context: typer.Context,
    directory: Directory,
    cache: Annotated[
        str, typer.Option("--cache", metavar="direct|writeback", help="Who caches: nobody (default), or the kernel.")
    ] = "direct",
    shared: Annotated[bool, typer.Option("--shared", help="Let the daemon's group read and write, too.")] = False,
) -> None:
    """Have the daemon show all VDIs as files below DIR.

    DIR must be empty. The files are DIR/SR/UUID.raw, DIR/SR/snapshots/UUID.raw and, by name, DIR/SR/by-name/NAME.raw.
    """
    client: Client = context.obj.client
    answer = client.post("/v1/mounts", {"path": _absolute(directory), "cache": cache, "shared": shared})
    say(f"The VDIs are mounted at {answer['path']} ({answer['cache']}).")


def umount(
    context: typer.Context,
    directory: Directory,
    lazy: Annotated[bool, typer.Option("--lazy", help="Also if it is in use; open files fail from then on.")] = False,
) -> None:
    """Unmount what 'simsr mount' mounted."""
    client: Client = context.obj.client
    path = _absolute(directory)
    client.post("/v1/mounts/unmount", {"path": path, "lazy": lazy})
    say(f"{path} is unmounted.")


def mounts(context: typer.Context, as_json: Json = False) -> None:
    """List where the VDIs are mounted."""
    client: Client = context.obj.client
    answer = client.get("/v1/mounts")
    if as_json:
        return print_json(answer)
    rows = [(one["path"], one["cache"], one["open_files"], one["requests_total"], one["waiting"]) for one in answer]
    print_table(("PATH", "CACHE", "OPEN", "REQUESTS", "WAITING"), rows, right="OPEN REQUESTS WAITING")

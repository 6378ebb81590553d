"""The commands about VDIs that are one call of the API each."""

from __future__ import annotations

import math
from typing import Annotated, Any, Optional

import typer

from simsr.cli.client import Client, checked_text
from simsr.cli.output import print_fields, print_json, print_table, say, size_and_bytes
from simsr.cli.space import space_of
from simsr.cli.terms import set_terms
from simsr.errors import BadRequest
from simsr.units import format_size, parse_size

__all__ = ["vdi_commands", "clone", "called", "For", "Json", "Name", "Sr", "Vdi"]

LONGEST_S = 1_000_000_000
"""The API takes no more, which is 31 years."""

vdi_commands = typer.Typer(help="Create, list, show, resize and delete VDIs.")

Vdi = Annotated[str, typer.Argument(metavar="VDI", help="Uuid, unique prefix of it, or name.")]
Name = Annotated[Optional[str], typer.Option("--name", metavar="NAME", help="Name for people; need not be unique.")]
Sr = Annotated[Optional[str], typer.Option("--sr", metavar="SR", help="The SR; may be left out if there is only one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON as the API gives it.")]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_S:  # false for nan, too
        raise BadRequest(what=f"--for {text!r}", reason=f"it must be a number of seconds, more than 0 and at most {LONGEST_S}")
    return seconds


For = Annotated[Optional[float], typer.Option("--for", metavar="SECONDS", parser=_seconds, help="End it after that time.")]


@vdi_commands.command("create")
def create(
    context: typer.Context,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Such as 10GiB, 512M or a number of bytes.")],
    name: Name = None,
    sr: Sr = None,
) -> None:
    """Create an empty VDI and print its uuid."""
    client: Client = context.obj.client
    body = {"size_bytes": parse_size(size), "name": _text("name", name), "sr": _text("SR", sr)}
    print(client.post("/v1/vdis", body)["uuid"])


@vdi_commands.command("list")
def list_vdis(
    context: typer.Context,
    sr: Sr = None,
    tips: Annotated[bool, typer.Option("--tips", help="With the tips that reverts have left.")] = False,
    as_json: Json = False,
) -> None:
    """List VDIs, each followed by its snapshots."""
    client: Client = context.obj.client
    vdis = client.get("/v1/vdis", **({"sr": checked_text("SR", sr)} if sr else {}), **({"tips": "true"} if tips else {}))
    if as_json:
        return print_json(vdis)
    names = {vdi["uuid"]: vdi["name"] or vdi["uuid"] for vdi in vdis}
    rows = [
        (
            vdi["uuid"],
            vdi["name"],
            format_size(vdi["size_bytes"]),
            format_size(vdi["physical_utilisation_bytes"]),
            names.get(vdi["snapshot_of"], vdi["snapshot_of"]) or "",
            vdi["snapshot_time"] or vdi["created_time"] or "",
            _clients(vdi),
        )
        for vdi in _families(vdis)
    ]
    print_table(("UUID", "NAME", "SIZE", "USED", "SNAPSHOT-OF", "CREATED", "ATTACHED"), rows, right="SIZE USED")


@vdi_commands.command("show")
def show(
    context: typer.Context,
    vdi: Vdi,
    as_json: Json = False,
    with_space: Annotated[
        bool, typer.Option("--space", help="Count what no other VDI holds, too; this looks at the whole SR.")
    ] = False,
) -> None:
    """Show everything about one VDI or snapshot."""
    client: Client = context.obj.client
    found = client.get(client.vdi_path(vdi))
    if with_space:
        found["exclusive_bytes"] = space_of(client, found)["exclusive_bytes"]
    if as_json:
        return print_json(found)
    fields = [
        ("uuid", found["uuid"]),
        ("name", found["name"]),
        ("description", found["description"]),
        ("sr", found["sr"]),
        ("type", found["type"]),
        ("size", size_and_bytes(found["size_bytes"])),
        ("used", size_and_bytes(found["physical_utilisation_bytes"])),
        *([("exclusive", f"{size_and_bytes(found['exclusive_bytes'])}, freed by deleting it")] if with_space else []),
        ("created", found["created_time"] or ""),
        ("flags", " ".join(flag for flag in ("read_only", "sharable", "managed") if found[flag])),
        ("attached", _clients(found)),
        ("uri", found["nbd_uri"]),
        ("socket", found["nbd_socket"]),
    ]
    if found["is_a_snapshot"]:
        fields += [("snapshot of", found["snapshot_of"] or ""), ("taken", found["snapshot_time"] or "")]
    fields += [(f"sm_config {key}", value) for key, value in sorted(found["sm_config"].items())]
    print_fields(fields)


@vdi_commands.command("resize")
def resize(
    context: typer.Context,
    vdi: Vdi,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="The new size; a VDI can only grow.")],
    as_json: Json = False,
) -> None:
    """Make a VDI larger."""
    client: Client = context.obj.client
    changed = client.post(client.vdi_path(vdi, "resize"), {"size_bytes": parse_size(size)})
    if as_json:
        return print_json(changed)
    say(f"VDI {called(changed)} has {size_and_bytes(changed['size_bytes'])} now.")


vdi_commands.command("set")(set_terms)


@vdi_commands.command("delete")
def delete(context: typer.Context, vdi: Vdi) -> None:
    """Delete a VDI or a snapshot.

    Snapshots and clones of a deleted VDI stay.
    """
    client: Client = context.obj.client
    found = client.get(client.vdi_path(vdi))
    client.delete(client.vdi_path(found["uuid"]))
    say(f"{'Snapshot' if found['is_a_snapshot'] else 'VDI'} {called(found)} is deleted.")


@vdi_commands.command("uri")
def uri(context: typer.Context, vdi: Vdi) -> None:
    """Print the NBD URI of a VDI.

    It can be given to qemu-img, nbdinfo, nbdcopy, fio and others.
    """
    client: Client = context.obj.client
    print(client.get(client.vdi_path(vdi))["nbd_uri"])


def clone(
    context: typer.Context,
    vdi: Annotated[str, typer.Argument(metavar="VDI-OR-SNAP", help="Uuid, unique prefix of it, or name.")],
    name: Name = None,
) -> None:
    """Clone a VDI or snapshot and print the uuid.

    The clone is writable and shares its data with the original until either is written to.
    """
    client: Client = context.obj.client
    print(client.post(client.vdi_path(vdi, "clone"), {"name": _text("name", name)})["uuid"])


def _text(what: str, value: str | None) -> str | None:
    return None if value is None else checked_text(what, value)


def called(vdi: dict[str, Any]) -> str:
    """Return how a sentence names a VDI."""
    return f"{vdi['uuid']} ({vdi['name']})" if vdi["name"] else str(vdi["uuid"])


def _clients(vdi: dict[str, Any]) -> str:
    """Return who has the VDI open, for one cell of a table."""
    return ", ".join(f"{entry['client']} {'rw' if entry['writable'] else 'ro'}" for entry in vdi["attached"])


def _families(vdis: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``vdis`` with every snapshot behind the disk it was taken of, in the order of the answer otherwise."""
    position = {vdi["uuid"]: number for number, vdi in enumerate(vdis)}
    return sorted(vdis, key=lambda vdi: (position.get(vdi["snapshot_of"], position[vdi["uuid"]]), position[vdi["uuid"]]))

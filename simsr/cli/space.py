"""``simsr diff`` and ``simsr sr space``: what has changed between two VDIs, and which VDI holds how much.

Offsets are printed as exact numbers of bytes, because they are to be used; lengths as people read them. A diff of many ranges comes in
several answers. Each of them is one moment, so for disks that are being written to the parts need not fit; for snapshots they do.
"""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from simsr.cli.client import Client
from simsr.cli.output import print_fields, print_json, print_table, say, size_and_bytes
from simsr.cli.repositories import Json, only_sr, sr_commands
from simsr.errors import NotFound
from simsr.units import format_size

__all__ = ["diff", "space_of"]

RANGES_AT_ONCE = 10_000


def diff(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="A", help="VDI or snapshot: uuid, unique prefix of it, or name.")],
    new: Annotated[str, typer.Argument(metavar="B", help="What to compare it with; in the same SR.")],
    as_json: Json = False,
) -> None:
    """List the ranges in which B differs from A.

    Blocks that were written count, whatever was written to them. What only one of the two has, because it is larger, counts too. The
    kind is what B has there.
    """
    client: Client = context.obj.client
    answer = _whole_diff(client, old, new)
    if as_json:
        return print_json(answer)
    ranges = answer["ranges"]
    rows = [(one["offset"], format_size(one["length"]), "data" if one["data"] else "hole") for one in ranges]
    print_table(("OFFSET", "LENGTH", "KIND"), rows, right="OFFSET LENGTH")
    total = sum(one["length"] for one in ranges)
    data = sum(one["length"] for one in ranges if one["data"])
    say(f"total: {size_and_bytes(total)} in {len(ranges)} ranges, {format_size(data)} data, {format_size(total - data)} holes")


def _whole_diff(client: Client, old: str, new: str) -> dict[str, Any]:
    """All parts of a diff as one answer. Names are looked up once: they may mean something else later."""
    uuids = [client.get(client.vdi_path(name))["uuid"] for name in (old, new)]
    path = client.vdi_path(uuids[0], "diff", uuids[1])
    answer = part = client.get(path, limit=str(RANGES_AT_ONCE))
    while part["next_offset"] is not None:
        part = client.get(path, limit=str(RANGES_AT_ONCE), start=str(part["next_offset"]))
        answer["ranges"] += part["ranges"]
        answer["next_offset"] = part["next_offset"]
    return answer


@sr_commands.command("space")
def space(
    context: typer.Context,
    sr: Annotated[Optional[str], typer.Argument(metavar="[SR]", help="May be left out if there is only one.")] = None,
    as_json: Json = False,
) -> None:
    """Show which VDI holds how much of an SR.

    Deleting a VDI frees what is EXCLUSIVE to it. Everything is counted exactly, which takes a while if there is much.
    """
    client: Client = context.obj.client
    name = sr if sr is not None else only_sr(client, "sr space")["uuid"]
    answer = client.get(client.sr_path(name, "space"))
    if as_json:
        return print_json(answer)
    rows = [
        (vdi["uuid"], vdi["name"], *(format_size(vdi[f"{key}_bytes"]) for key in ("virtual", "referenced", "exclusive")))
        for vdi in answer["vdis"]
    ]
    print_table(("UUID", "NAME", "VIRTUAL", "REFERENCED", "EXCLUSIVE"), rows, right="VIRTUAL REFERENCED EXCLUSIVE")
    print_fields([("distinct", size_and_bytes(answer["distinct_bytes"])), ("shared", size_and_bytes(answer["shared_bytes"]))])


def space_of(client: Client, vdi: dict[str, Any]) -> dict[str, Any]:
    """What the survey of its SR says of a VDI."""
    for one in client.get(client.sr_path(vdi["sr"], "space"))["vdis"]:
        if one["uuid"] == vdi["uuid"]:
            return one
    raise NotFound(kind="VDI", name=vdi["uuid"])  # not any more

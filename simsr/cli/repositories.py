"""The commands about SRs."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from simsr.cli.client import Client, checked_text
from simsr.cli.failures import NameNeeded, NoSr
from simsr.cli.output import print_fields, print_json, print_table, say, size_and_bytes
from simsr.personalities import find_personality
from simsr.units import format_size, parse_size

__all__ = ["sr_commands", "only_sr", "Json"]

sr_commands = typer.Typer(help="Create, list, show and delete SRs.")

SrName = Annotated[str, typer.Argument(metavar="SR", help="Uuid, unique prefix of it, or name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON as the API gives it.")]


_SPACE = ("live", "shared", "garbage", "reclaimable", "reserved", "free", "map")


@sr_commands.command("create")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new SR.")],
    size: Annotated[
        Optional[str], typer.Option("--size", metavar="SIZE", help="What it may take on the disk (default: what there is).")
    ] = None,
    personality: Annotated[
        str, typer.Option("--personality", metavar="P", help="The type of SR that it is like: see 'simsr personality list'.")
    ] = "sim",
) -> None:
    """Create an SR and print its uuid."""
    client: Client = context.obj.client
    body: dict[str, Any] = {"name": checked_text("name", name)}
    if size is not None:
        body["limit_bytes"] = parse_size(size)
    if personality != "sim":
        body["personality"] = find_personality(personality).name
    print(client.post("/v1/srs", body)["uuid"])


@sr_commands.command("resize")
def resize(
    context: typer.Context,
    sr: SrName,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="What the SR may take on the disk from now on.")],
) -> None:
    """Change the size limit of an SR."""
    client: Client = context.obj.client
    changed = client.post(f"{client.sr_path(sr)}/resize", {"limit_bytes": parse_size(size)})
    say(f"SR {changed['uuid']} may take {format_size(changed['limit_bytes'])} now.")


@sr_commands.command("set")
def set_sr(
    context: typer.Context,
    sr: SrName,
    verify_reads: Annotated[
        Optional[bool],
        typer.Option("--verify-reads/--no-verify-reads", help="Verify all blocks that are read, or only those from the disk."),
    ] = None,
    name: Annotated[Optional[str], typer.Option("--name", metavar="N", help="Another name.")] = None,
    tips: Annotated[
        Optional[int], typer.Option("--tips", metavar="N", help="Tips that each disk keeps when it is reverted; 0: none.")
    ] = None,
    tip_hours: Annotated[Optional[int], typer.Option("--tip-hours", metavar="H", help="For how long; 0: not at all.")] = None,
    expose_tips: Annotated[
        Optional[bool], typer.Option("--expose-tips/--hide-tips", help="List tips with the snapshots, for xapi, too.")
    ] = None,
) -> None:
    """Change settings of an SR."""
    client: Client = context.obj.client
    settings = {"verify_reads": verify_reads, "tips_max": tips, "tips_hours": tip_hours, "expose_tips": expose_tips}
    body: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    if name is not None:
        body["name"] = checked_text("name", name)
    changed = client.patch(client.sr_path(sr), body)
    verified = "all reads" if changed["verify_reads"] else "reads from the disk"
    say(f"SR {changed['uuid']} ({changed['name']}): {verified} are verified.")
    if {"tips_max", "tips_hours", "expose_tips"} & body.keys():
        say(f"Its disks keep {_tips(changed)}.")


def _tips(sr: dict[str, Any]) -> str:
    if not (sr["tips_max"] and sr["tips_hours"]):
        return "no tips"
    return f"{sr['tips_max']} tips for {sr['tips_hours']} hours{', listed with the snapshots' if sr['expose_tips'] else ''}"


@sr_commands.command("list")
def list_srs(context: typer.Context, as_json: Json = False) -> None:
    """List the SRs of the daemon."""
    client: Client = context.obj.client
    repositories = client.get("/v1/srs")
    if as_json:
        return print_json(repositories)
    rows = [
        (
            sr["uuid"],
            sr["name"],
            sr["vdi_count"],
            sr["snapshot_count"],
            format_size(sr["virtual_allocation_bytes"]),
            format_size(sr["physical_utilisation_bytes"]),
            format_size(sr["physical_size_bytes"]),
            sr["personality"],
        )
        for sr in repositories
    ]
    headings = ("UUID", "NAME", "VDIS", "SNAPSHOTS", "VIRTUAL", "USED", "SIZE", "LIKE")
    print_table(headings, rows, right="VDIS SNAPSHOTS VIRTUAL USED SIZE")


@sr_commands.command("status")
def status(
    context: typer.Context,
    sr: Annotated[Optional[str], typer.Argument(metavar="[SR]", help="May be left out if there is only one.")] = None,
    as_json: Json = False,
) -> None:
    """Show everything about one SR.

    What is live and what VDIs share is counted exactly, which takes a while if there is much.
    """
    client: Client = context.obj.client
    found = client.get(client.sr_path(sr)) if sr is not None else only_sr(client, "sr status")
    counted = client.get(client.sr_path(found["uuid"], "space"))
    found["space"] |= {"live_bytes": counted["distinct_bytes"], "shared_bytes": counted["shared_bytes"]}
    if as_json:
        return print_json(found)
    fields = [
        ("uuid", found["uuid"]),
        ("name", found["name"]),
        ("description", found["description"]),
        ("like", found["personality"]),
        ("path", found["path"]),
        ("size", size_and_bytes(found["physical_size_bytes"])),
        ("used", size_and_bytes(found["physical_utilisation_bytes"])),
        ("limit", "none" if found["limit_bytes"] is None else size_and_bytes(found["limit_bytes"])),
        ("verified", "all reads" if found["verify_reads"] else "reads from the disk only"),
        *((name, size_and_bytes(found["space"][f"{name}_bytes"])) for name in _SPACE),
        ("virtual", size_and_bytes(found["virtual_allocation_bytes"])),
        ("tips", f"{found['tip_count']}; a disk keeps {_tips(found)}"),
        ("vdis", found["vdi_count"]),
        ("snapshots", found["snapshot_count"]),
    ]
    fields += [(f"sm_config {key}", value) for key, value in sorted(found["sm_config"].items())]
    fields += [(key, value) for key, value in _flat(found["statistics"])]
    print_fields(fields)


@sr_commands.command("delete")
def delete(context: typer.Context, sr: SrName) -> None:
    """Delete an SR that holds no VDIs any more."""
    client: Client = context.obj.client
    found = client.get(client.sr_path(sr))
    client.delete(client.sr_path(found["uuid"]))
    say(f"SR {found['uuid']} ({found['name']}) is deleted.")


def only_sr(client: Client, command: str) -> Any:
    """Return the only SR there is, for ``command``, which was given no name."""
    repositories = client.get("/v1/srs")
    if len(repositories) == 1:
        return repositories[0]
    if not repositories:
        raise NoSr
    raise NameNeeded(
        what=command, count=len(repositories), names=", ".join(sr["name"] or sr["uuid"] for sr in repositories)
    )


def _flat(statistics: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Return nested counters as (dotted name, value) pairs."""
    pairs: list[tuple[str, object]] = []
    for key, value in statistics.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs

"""``simsr vdi set``: on which terms a VDI is served over NBD."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from simsr.cli.client import Client, checked_text
from simsr.cli.output import print_fields, print_json
from simsr.errors import BadRequest
from simsr.units import format_size, parse_size

__all__ = ["set_terms"]


def set_terms(
    context: typer.Context,
    vdi: Annotated[str, typer.Argument(metavar="VDI", help="Uuid, unique prefix of it, or name.")],
    allow: Annotated[
        Optional[list[str]],
        typer.Option("--allow", metavar="RULE", help="Only clients that fit a rule: uid:N, addr:ADDRESS[/BITS], cn:NAME. May be repeated."),
    ] = None,
    everybody: Annotated[bool, typer.Option("--allow-everybody", help="Any client, as at the beginning.")] = False,
    connections: Annotated[Optional[int], typer.Option("--connections", metavar="N", help="At most so many; 0: no limit.")] = None,
    rate: Annotated[Optional[str], typer.Option("--rate", metavar="SIZE", help="At most so much a second; 0: no limit.")] = None,
    requests: Annotated[Optional[int], typer.Option("--requests", metavar="N", help="At most so many a second; 0: no limit.")] = None,
    durability: Annotated[
        Optional[str], typer.Option("--durability", metavar="WHEN", help="When a write is durable: flush, each-write, or auto.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON as the API gives it.")] = False,
) -> None:
    """Say to whom, how fast and how durably a VDI is served over NBD.

    Without options it shows what holds. Clients that are connected follow at once; those that are not allowed any more are cut off.
    """
    if allow and everybody:
        raise BadRequest(what="--allow-everybody", reason="it leaves nothing for --allow to do")
    client: Client = context.obj.client
    given: dict[str, Any] = {
        "allow": [] if everybody else [checked_text("rule", rule) for rule in allow] if allow else None,
        "connections_max": connections, "bytes_s": None if rate is None else 0 if rate == "0" else parse_size(rate),
        "requests_s": requests, "durability": durability,
    }  # fmt: skip
    changes = {key: value for key, value in given.items() if value is not None}
    path = client.vdi_path(vdi, "nbd")
    found = client.patch(path, changes) if changes else client.get(path)
    if as_json:
        return print_json(found)
    print_fields([
        ("allowed", " ".join(found["allow"]) or "everybody"),
        ("connections", found["connections_max"] or "no limit"),
        ("rate", f"{format_size(found['bytes_s'])}/s" if found["bytes_s"] else "no limit"),
        ("requests", f"{found['requests_s']}/s" if found["requests_s"] else "no limit"),
        ("durability", found["durability"]),
    ])  # fmt: skip

"""The commands about what SRs can be like. The table is simsr's own, so no daemon is asked."""

from __future__ import annotations

from typing import Annotated

import typer

from simsr.cli.output import print_fields, print_json, print_table
from simsr.cli.repositories import Json
from simsr.personalities import Format, find_personality, personality_names
from simsr.units import format_size

__all__ = ["personality_commands"]

personality_commands = typer.Typer(help="Show what types of SR there are to imitate.")


@personality_commands.command("list")
def list_personalities(as_json: Json = False) -> None:
    """List the types of SR that an SR can be like."""
    found = [find_personality(name) for name in personality_names()]
    if as_json:
        return print_json([personality.describe() for personality in found])
    rows = [
        (
            p.name,
            p.driver,
            "thick" if p.thick else "thin",
            " ".join(p.formats),
            " ".join(name for name, form in p.formats.items() if form.reverts and p.can_revert),
            p.chain_max,
            p.description,
        )
        for p in found
    ]
    shown = [["" if cell is None else cell for cell in row] for row in rows]
    print_table(("NAME", "DRIVER", "SPACE", "FORMATS", "REVERTS", "CHAIN", "DESCRIPTION"), shown, right="CHAIN")


@personality_commands.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As 'simsr personality list' shows it.")], as_json: Json = False
) -> None:
    """Show everything about one of them."""
    found = find_personality(name)
    if as_json:
        return print_json(found.describe())
    fields: list[tuple[str, object]] = [
        ("name", found.name),
        ("description", found.description),
        ("driver", found.driver or ""),
        ("capabilities", " ".join(found.capabilities)),
        ("space", "a disk takes its whole size" if found.thick else "a disk takes what is written"),
        ("unit", format_size(found.allocation_unit_bytes)),
        ("chain", "any length" if found.chain_max is None else f"at most {found.chain_max} images"),
        ("access", "hosts only read" if found.read_only else "read and write"),
        ("snapshots", "go with their disk" if found.snapshots_die else "stay when their disk goes"),
        ("attach", found.attach),
    ]
    print_fields([*fields, *((f"format {name}", _limits(form)) for name, form in found.formats.items())])


def _limits(form: Format) -> str:
    can = [word for word, true in (("snapshots and clones", form.clones), ("revert", form.reverts)) if true]
    sizes = f"{format_size(form.size_min_bytes)} to {format_size(form.size_max_bytes)} in steps of {format_size(form.size_unit_bytes)}"
    return f"{sizes}; {', '.join(can) or 'no snapshots'}"

"""The commands about what disks were: snapshot, revert in all its modes, undo and redo, tips, the tree."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Optional
from urllib.parse import quote

import typer

from simsr.cli.client import Client, checked_text
from simsr.cli.disks import Json, Name, Vdi, called
from simsr.cli.failures import DaemonAnswer
from simsr.cli.output import complain, print_json, print_table, say, size_and_bytes
from simsr.cli.tree import can_draw_boxes, draw
from simsr.units import format_size

__all__ = ["snapshot", "revert", "undo", "redo", "tree", "tip_commands"]

tip_commands = typer.Typer(help="List, pin and delete tips: what disks were when they were reverted.")


class Live(str, Enum):
    """What becomes of clients that stay attached."""

    HANG = "hang"
    DISCONNECT = "disconnect"
    ERROR = "error"


Group = Annotated[bool, typer.Option("--group", help="All disks that were snapshotted, or reverted, together, or of vm:UUID; all or none.")]
LiveOption = Annotated[Optional[Live], typer.Option("--live", help="Even if it is in use: its requests hang, or are cut off, or fail. For tests only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would become of it, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask, whatever goes.")]


def snapshot(
    context: typer.Context,
    vdis: Annotated[list[str], typer.Argument(metavar="VDI...", help="Uuid, unique prefix of it, or name.")],
    name: Name = None,
    group: Annotated[bool, typer.Option("--group", help="Several disks at one moment, to be reverted together.")] = False,
) -> None:
    """Take a snapshot and print its uuid.

    The VDI may be in use meanwhile. With --group one line for each disk; with vm:UUID among them the group is that VM's, and vm:UUID
    alone means the disks of its last snapshot.
    """
    client: Client = context.obj.client
    checked = None if name is None else checked_text("name", name)
    if not group:
        if len(vdis) > 1:
            raise typer.BadParameter("several disks are snapshotted together with --group", context)
        return print(client.post(client.vdi_path(vdis[0], "snapshot"), {"name": checked})["uuid"])
    disks = [checked_text("VDI name", vdi) for vdi in vdis if not _is_vm(vdi)]
    vms = [vdi for vdi in vdis if _is_vm(vdi)]
    if len(vms) > 1:
        raise typer.BadParameter("a group is of one VM", context)
    if vms:
        answer = client.post(_vm_path(vms[0], "snapshot"), {"vdis": disks or None, "name": checked})
    else:
        answer = client.post("/v1/snapshots", {"vdis": disks, "name": checked})
    for one in answer["snapshots"]:
        print(one["uuid"])


def revert(
    context: typer.Context,
    references: Annotated[list[str], typer.Argument(metavar="[VDI] SNAP", help="The snapshot to go back to; with --follow the tip, or the disk; with --group also vm:UUID.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go to the tip that is named, or the only one below what is named; it is used up.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Leave the disk as it is, and make the snapshot what the disk is.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="And let go of the snapshot.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="And let go of all that descends from the snapshot.")] = False,
    group: Group = False,
    keep_size: Annotated[bool, typer.Option("--keep-size", help="A disk that is larger than the snapshot stays so.")] = False,
    live: LiveOption = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Take a VDI back to one of its snapshots.

    Its uuid and name and the snapshot stay as they are, and what the disk was is kept as a tip for a time. Nothing may be writing
    to the VDI. Asks before a snapshot or tip goes.
    """
    client: Client = context.obj.client
    if len(references) > 2 or (follow and commit):
        raise typer.BadParameter("one disk, one snapshot, one mode", context)
    mode = "follow" if follow else "commit" if commit else "reset"
    of_vm = group and _is_vm(references[-1])
    options = {"discard": discard, "prune": prune, "group": group and not of_vm, "keep_size": keep_size}
    body: dict[str, Any] = {key: True for key, value in options.items() if value}
    if mode != "reset":
        body["mode"] = mode
    if len(references) == 2 and (of_vm or group and _is_vm(references[0])):
        raise typer.BadParameter("name the VM, or one of its snapshots, not both", context)
    if len(references) == 2:
        body["target"] = client.get(client.vdi_path(references[0]))["uuid"]

    def tell(answer: dict[str, Any]) -> None:
        name, vdi = references[-1], answer["vdi"]
        if not answer["changed"]:
            return say(f"VDI {called(vdi)} is as it was in {name}; nothing to revert.")
        done = {"reset": f"is reverted to {name}", "follow": "is at the end of the branch again", "commit": f"is what {name} holds now"}[mode]
        if mode == "commit" and discard:
            done = f"stays as it is; {name} is gone"
        resized = f" Its size is {size_and_bytes(vdi['size_bytes'])} again." if answer["size_changed"] else ""
        say(f"VDI {called(vdi)} {done}.{resized}")
        _tell_others(answer)

    path = _vm_path(references[-1], "revert") if of_vm else client.vdi_path(references[-1], "revert")
    _carry_out(client, path, body, live, dry_run, yes, as_json, tell)


def _is_vm(reference: str) -> bool:
    """Whether that means a VM, as ``vm:UUID`` does where a group is wanted."""
    return reference.startswith("vm:")


def _vm_path(reference: str, what: str) -> str:
    """The API's path for the disks of a VM."""
    return f"/v1/vms/{quote(checked_text('VM', reference.removeprefix('vm:')), safe='')}/{what}"


def undo(
    context: typer.Context, vdi: Vdi, group: Group = False, live: LiveOption = None, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False
) -> None:  # fmt: skip
    """Take back the last revert of a VDI, in whatever mode.

    The disk is what it was before, byte for byte; what it is now becomes a tip if no snapshot holds it.
    """
    _take_back(context, "undo", vdi, group, live, dry_run, yes, as_json)


def redo(
    context: typer.Context, vdi: Vdi, group: Group = False, live: LiveOption = None, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False
) -> None:  # fmt: skip
    """Take back the last undo of a VDI."""
    _take_back(context, "redo", vdi, group, live, dry_run, yes, as_json)


def _take_back(
    context: typer.Context, what: str, vdi: str, group: bool, live: Live | None, dry_run: bool, yes: bool, as_json: bool
) -> None:
    client: Client = context.obj.client

    def tell(answer: dict[str, Any]) -> None:
        say(f"VDI {called(answer['vdi'])}: the last {'revert' if what == 'undo' else 'undo'} is taken back.")
        _tell_others(answer)

    # What goes by undoing comes back by redoing, so there is nothing to ask.
    if group and _is_vm(vdi):
        _carry_out(client, _vm_path(vdi, what), {}, live, dry_run, True, as_json, tell)
    else:
        _carry_out(client, client.vdi_path(vdi, what), {"group": True} if group else {}, live, dry_run, True, as_json, tell)


def _carry_out(
    client: Client, path: str, body: dict[str, Any], live: Live | None, dry_run: bool, yes: bool, as_json: bool, tell: Callable[[dict], None]
) -> None:
    """Send it; if something would be lost and a person is there, show what and ask."""
    if dry_run:
        plan = client.post(path, {**body, "dry_run": True})
        return print_json(plan) if as_json else _show(plan)
    if live is not None:
        body["live"] = live.value
        complain("whoever uses the disk meanwhile is not told, and what they have cached is wrong afterwards: --live is for tests only")
    body["op_id"] = str(uuid.uuid4())
    try:
        answer = client.post(path, body if yes else {**body, "may_lose": False})
    except DaemonAnswer as error:
        if error.code != "WouldLose" or as_json or not sys.stdin.isatty():
            raise
        plan = client.post(path, {**body, "op_id": None, "live": None, "dry_run": True})
        _show(plan)
        typer.confirm("Go on?", abort=True)
        answer = client.post(path, {**body, "expected": {member["vdi"]: member["gen"] for member in plan["members"]}})
    if as_json:
        return print_json(answer)
    tell(answer)


def _tell_others(answer: dict[str, Any]) -> None:
    for member in answer.get("members", ()):
        if member["vdi"] != answer["vdi"]["uuid"]:
            say(f"VDI {called({'uuid': member['vdi'], 'name': member['name']})}: the same.")
        if member["removed"] and member["mode"] not in ("undo", "redo"):
            count = len(member["removed"])
            say(f"Gone: {count} snapshot{'s' * (count > 1)} or tip{'s' * (count > 1)}; 'simsr undo' brings back what is kept.")


def _show(plan: dict[str, Any]) -> None:
    """Print what would become of each disk."""
    for member in plan["members"]:
        name = called({"uuid": member["vdi"], "name": member["name"]})
        if not member["changed"]:
            say(f"VDI {name}: nothing to do")
            continue
        size = f"; its size becomes {size_and_bytes(member['size_bytes'])}" if member["size_changed"] else ""
        say(f"VDI {name}: {member['mode']}{size}")
        differs = "" if member["unsaved_bytes"] is None else f", {size_and_bytes(member['unsaved_bytes'])} differ from its last node"
        if member["lost"]:
            say(f"  lost: what it holds now{differs}")
        elif member["mode"] in ("reset", "follow") and member["unsaved_bytes"] != 0:
            say(f"  kept as a tip: what it holds now{differs}")
        for node in member["going"]:
            say(f"  goes: {node['kind']} {called(node)} of {node['time']}, {size_and_bytes(node['exclusive_bytes'])} of its own")


def tree(
    context: typer.Context,
    vdi: Vdi,
    ascii_only: Annotated[Optional[bool], typer.Option("--ascii/--utf8", help="The characters to draw with (default: as the terminal can).")] = None,
    as_json: Json = False,
) -> None:
    """Draw the snapshots and tips of a VDI as a tree.

    The head is marked; a star behind it: it is not what the node above is.
    """
    client: Client = context.obj.client
    answer = client.get(client.vdi_path(vdi, "tree"))
    if as_json:
        return print_json(answer)
    draw(answer, can_draw_boxes() if ascii_only is None else not ascii_only)
    for what in ("undo", "redo"):
        if answer[what]:
            steps = ", ".join(f"{step['mode']} ({step['time']}{', ' + str(step['disks']) + ' disks' if step['disks'] > 1 else ''})" for step in answer[what])
            say(f"{what}: {steps}")


@tip_commands.command("list")
def list_tips(context: typer.Context, vdi: Vdi, as_json: Json = False) -> None:
    """List the tips of a VDI, the oldest first."""
    client: Client = context.obj.client
    found = client.get(client.vdi_path(vdi, "tips"))
    if as_json:
        return print_json(found)
    rows = [
        (tip["uuid"], tip["name"], format_size(tip["size_bytes"]), format_size(tip["physical_utilisation_bytes"]), tip["snapshot_time"])
        for tip in found
    ]
    print_table(("UUID", "NAME", "SIZE", "USED", "LEFT"), rows, right="SIZE USED")


@tip_commands.command("pin")
def pin(
    context: typer.Context,
    tip: Annotated[str, typer.Argument(metavar="TIP", help="Uuid, unique prefix of it, or name.")],
    name: Name = None,
    as_json: Json = False,
) -> None:
    """Make a snapshot of a tip, which stays until it is deleted.

    It keeps its uuid.
    """
    client: Client = context.obj.client
    pinned = client.post(client.vdi_path(tip, "pin"), {"name": None if name is None else checked_text("name", name)})
    if as_json:
        return print_json(pinned)
    say(f"Tip {pinned['uuid']} is snapshot {called(pinned)} now.")


@tip_commands.command("delete")
def delete(context: typer.Context, tip: Annotated[str, typer.Argument(metavar="TIP", help="Uuid, unique prefix of it, or name.")]) -> None:
    """Delete a tip now."""
    client: Client = context.obj.client
    found = client.get(client.vdi_path(tip))
    if not found["is_a_tip"]:
        raise typer.BadParameter(f"{tip} is not a tip; 'simsr vdi delete' deletes disks and snapshots", context)
    client.delete(client.vdi_path(found["uuid"]))
    say(f"Tip {called(found)} is deleted.")

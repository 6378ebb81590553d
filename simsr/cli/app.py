"""The tree of commands. The context object of every command is the `Session` of this run."""

from __future__ import annotations

from typing import Annotated, Optional

import typer
from typer.core import TyperGroup

from simsr import __version__
from simsr.cli.client import DEFAULT_SOCKET, Client, Session, checked_text
from simsr.cli.crash import crash_commands
from simsr.cli.disks import Name, Sr, Vdi, clone, vdi_commands
from simsr.cli.history import redo, revert, snapshot, tip_commands, tree, undo
from simsr.cli.https_setup import https_setup
from simsr.cli.integrity import check, salvage
from simsr.cli.libvirt import libvirt_xml
from simsr.cli.mounts import mount, mounts, umount
from simsr.cli.personality import personality_commands
from simsr.cli.repositories import sr_commands
from simsr.cli.smapi import smapi_commands
from simsr.cli.report_file import page_file
from simsr.cli.scenarios import fault_commands, read_scenario, scenario_commands
from simsr.cli.space import diff
from simsr.cli.tls_setup import tls_setup
from simsr.cli.traces import record, replay, trace_commands
from simsr.cli.xapi import xapi_commands
from simsr.cli.xe import XE_CONTEXT, xe
from simsr.units import parse_size

__all__ = ["app"]



class NounsFirst(TyperGroup):
    """A group whose help lists the groups in it before the commands."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """Return the names of the commands in the order of the help."""
        return sorted(self.commands, key=lambda name: not isinstance(self.commands[name], TyperGroup))


app = typer.Typer(
    name="simsr",
    cls=NounsFirst,
    help="Manage the disks of a simsrd daemon.",
    epilog="An object is named by its uuid, a unique prefix of it, or its name.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(sr_commands, name="sr")
vdi_commands.command("libvirt-xml")(libvirt_xml)
app.add_typer(vdi_commands, name="vdi")
app.add_typer(tip_commands, name="tip")
app.add_typer(smapi_commands, name="smapi")
app.add_typer(personality_commands, name="personality")
app.add_typer(xapi_commands, name="xapi")
app.add_typer(scenario_commands, name="scenario")
app.add_typer(fault_commands, name="fault")
app.add_typer(crash_commands, name="crash")
app.add_typer(trace_commands, name="trace")
app.command("snapshot")(snapshot)
app.command("clone")(clone)
app.command("revert")(revert)
app.command("undo")(undo)
app.command("redo")(redo)
app.command("tree")(tree)
app.command("diff")(diff)
app.command("mount")(mount)
app.command("umount")(umount)
app.command("mounts")(mounts)
app.command("record")(record)
app.command("replay")(replay)
app.command("check")(check)
app.command("salvage")(salvage)
app.command("https-setup")(https_setup)
app.command("tls-setup")(tls_setup)
app.command("xe", options_metavar="[--xapi PATH] COMMAND [KEY=VALUE]...", context_settings=XE_CONTEXT)(xe)

Format = Annotated[Optional[str], typer.Option("--format", metavar="FORMAT", help="As qemu-img names it: raw, qcow2, vpc, ...")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"simsr {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    socket: Annotated[
        str, typer.Option("--socket", envvar="SIMSR_SOCKET", metavar="PATH", help="The daemon's control socket, or https://ADDRESS:PORT.")
    ] = DEFAULT_SOCKET,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Manage the disks of a simsrd daemon."""
    session: Session = context.obj
    session.client.socket_path, session.debug = socket, debug
    context.call_on_close(session.client.close)


@app.command("import")
def import_command(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="An image in any format that qemu-img reads.")],
    name: Name = None,
    sr: Sr = None,
    image_format: Format = None,
    allow_backing: Annotated[
        bool, typer.Option("--allow-backing", help="Let the image read other files: backing file, extents.")
    ] = False,
) -> None:
    """Copy an image file into a new VDI.

    Prints the uuid. A VDI whose import does not finish is deleted again.
    """
    from simsr.cli.transfer import import_image

    client: Client = context.obj.client
    checked_name = None if name is None else checked_text("name", name)
    checked_sr = None if sr is None else checked_text("SR", sr)
    print(
        import_image(
            client, file, name=checked_name, sr=checked_sr, image_format=image_format, allow_other_files=allow_backing
        )
    )


@app.command("export")
def export_command(
    context: typer.Context,
    vdi: Vdi,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Ending in .raw .img .qcow2 .vhd .vmdk .vhdx .vdi")],
    image_format: Format = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Copy a VDI or snapshot into an image file.

    The ending of FILE says the format.
    """
    from simsr.cli.transfer import export_image

    client: Client = context.obj.client
    export_image(client, vdi, file, image_format=image_format, force=force)


@app.command(
    "run",
    options_metavar="--size SIZE [--root DIR] [--scenario FILE] [--report FILE] -- CMD ...",
    context_settings={"allow_interspersed_args": False, "allow_extra_args": True},
)
def run_command(
    context: typer.Context,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Size of the VDI, such as 1GiB.")],
    root: Annotated[
        Optional[str], typer.Option("--root", metavar="DIR", help="Keep the store here; else it is temporary.")
    ] = None,
    scenario: Annotated[
        Optional[str], typer.Option("--scenario", metavar="FILE", help="In force while CMD runs: a file, or a name of the library.")
    ] = None,
    report: Annotated[
        Optional[str], typer.Option("--report", metavar="FILE", help="Write a page about the scenario in the end.")
    ] = None,
) -> None:
    """Run a command beside a VDI of its own.

    A daemon is started and a VDI created; both are gone when CMD has ended, and its exit status is ours (1 if that is 0 and
    expectations of the scenario are broken). CMD finds the
    NBD URI in $uri, the uuid in $vdi and the daemon in $SIMSR_SOCKET; {uri} in its arguments is replaced by the URI.
    """
    from simsr.cli.captive import run_captive

    if not context.args:
        raise typer.BadParameter("no command to run; write it behind --", context)
    session: Session = context.obj
    if report is not None and scenario is None:
        raise typer.BadParameter("--report is about a scenario: give --scenario, too", context)
    chosen = None if scenario is None else read_scenario(scenario)
    with page_file(report) as write:
        status = run_captive(
            context.args,
            size_bytes=parse_size(size),
            root=root,
            debug=session.debug,
            scenario=chosen,
            write_report=write if report else None,
        )
    raise typer.Exit(status)

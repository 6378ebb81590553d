"""``simsr smapi``: install the plug-ins for xapi, take them away, check one."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from simsr.cli.output import say

__all__ = ["smapi_commands"]

smapi_commands = typer.Typer(help="Install, uninstall and check the plug-ins for xapi.")

Root = Annotated[str, typer.Option("--root", metavar="PREFIX", help="The root of the dom0 (default: this host).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@smapi_commands.command("install")
def install(
    root: Root = "/",
    v3: Annotated[bool, typer.Option("--v3", help="The SMAPIv3 plug-in, too.")] = False,
    personality: Annotated[
        Optional[str], typer.Option("--personality", metavar="P,P...", help="Drivers for SRs like these types, too.")
    ] = None,
    real_names: Annotated[
        bool, typer.Option("--real-names", help="Call them as the real drivers (EXTSR); only in a root for tests.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Put the plug-ins where xapi finds them, and add them to its list.

    What was installed before stays, and is brought up to date. Nothing that simsr did not put there is replaced.
    """
    from simsr.smapi.install import Installation, Options

    names = tuple(name.strip() for name in personality.split(",")) if personality is not None else ()
    installation = Installation(root)
    steps = installation.plan_install(Options(names, real_names, v3))
    if not dry_run:
        installation.apply()
    for step in steps:
        say(str(step))
    if not steps:
        return say("Everything is installed already; nothing was changed.")
    if dry_run:
        return say("Nothing was changed: --dry-run.")
    for line in installation.advice():
        say(line)


@smapi_commands.command("uninstall")
def uninstall(root: Root = "/", dry_run: DryRun = False) -> None:
    """Take away everything that 'install' has put there."""
    from simsr.smapi.install import Installation

    installation = Installation(root)
    if not installation.is_there:
        return say("Nothing of simsr is installed there; nothing was changed.")
    steps = installation.plan_uninstall()
    if not dry_run:
        installation.apply()
    for step in steps:
        say(str(step))
    if dry_run:
        return say("Nothing was changed: --dry-run.")
    for line in installation.advice():
        say(line)

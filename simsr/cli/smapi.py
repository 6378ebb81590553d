"""``simsr smapi``: install the plug-ins for xapi, take them away, check one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from simsr.cli.failures import FileFailure
from simsr.cli.output import print_json, say

if TYPE_CHECKING:
    from simsr.xapi.plugin_check import Finding

__all__ = ["smapi_commands"]

smapi_commands = typer.Typer(help="Install, uninstall and check the plug-ins for xapi.")

Root = Annotated[str, typer.Option("--root", metavar="PREFIX", help="The root of the dom0 (default: this host).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
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


@smapi_commands.command("check")
def check(
    root: Root = "/",
    plugin: Annotated[
        Optional[str], typer.Option("--plugin", metavar="FILE", help="This executable, wherever it is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a SMAPIv1 plug-in as xapi would, and tell for each point of the checklist whether it keeps it.

    It works on a daemon and a model of xapi that are made for the check. Exit status 1 if a point is not kept.
    """
    import shutil

    from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
    from simsr.xapi.plugin_check import check_plugin

    path = plugin if plugin is not None else _installed(root)
    if not os.path.isfile(path):
        hint = "Install it first ('simsr smapi install'), or name a plug-in with --plugin." if plugin is None else ""
        raise FileFailure(action="check", path=path, reason="there is no such file", hint=hint)
    folder = short_temporary_directory("simsr-check-")
    try:
        with ChildDaemon(os.path.join(folder, "r")) as daemon:
            findings = check_plugin(path, daemon.socket, (lambda _: None) if as_json else _tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counts = {ok: sum(finding.ok is ok for finding in findings) for ok in (True, False, None)}
    if as_json:
        print_json({"plugin": os.path.abspath(path), "ok": not counts[False], "points": [f.describe() for f in findings]})
    else:
        say(f"{counts[True]} ok, {counts[False]} not ok, {counts[None]} not checked.")
    raise typer.Exit(1 if counts[False] else 0)


def _installed(root: str) -> str:
    from simsr.smapi.install import FRAGMENT
    from simsr.smapi.xapi_conf import read_xapi_conf

    return os.path.join(root, read_xapi_conf(root, FRAGMENT).sm_directory.lstrip("/"), "SimSR")


def _tell(finding: Finding) -> None:
    word = {True: "ok", False: "NOT OK", None: "-"}[finding.ok]
    say(f"{word:<7} {finding.number:<3} {finding.text}{': ' if finding.reason else ''}{finding.reason}")
    sys.stdout.flush()


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

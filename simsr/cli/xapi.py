"""``simsr xapi serve``: puts the server in the place of this process."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

__all__ = ["xapi_commands"]

xapi_commands = typer.Typer(help="Serve a model of xapi.")

_SERVER = [sys.executable, "-P", "-m", "simsr.xapi"]
_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@xapi_commands.command("serve", options_metavar="--root DIR [OPTIONS]", context_settings=_ANYTHING)
def serve(context: typer.Context) -> NoReturn:
    """Serve the XenAPI and run SMAPIv1 plug-ins, until ended by SIGTERM or Ctrl-C.

    simsr xapi serve --help lists the options.
    """
    sys.stdout.flush()
    os.execv(_SERVER[0], [*_SERVER, *context.args])

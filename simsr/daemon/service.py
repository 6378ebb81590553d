"""How a service of the house runs and ends: simsrd, and the model of xapi."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio

from simsr.errors import SimsrError

__all__ = ["run_service"]


def run_service(name: str, serve: Callable[[argparse.Namespace], Awaitable[None]], arguments: argparse.Namespace) -> NoReturn:
    """Run ``serve(arguments)`` until it returns; the exit status is 0 then, and an error's own otherwise, told on standard error.

    ``arguments.log_level`` is the lowest level that is logged. What is made is for its owner only.
    """
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    status = 0
    try:
        trio.run(serve, arguments)
    except* (SimsrError, OSError) as group:  # which must not be left by sys.exit: it would come out wrapped in a group
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        hint = f"\nHint: {error.hint}" if isinstance(error, SimsrError) and error.hint else ""
        named = isinstance(error, OSError) and error.filename is not None
        said = f"cannot use {error.filename}: {error.strerror}" if named else error
        print(f"{name}: {said}{hint}", file=sys.stderr)
        status = getattr(error, "exit_code", 1)
    sys.exit(status)

"""Complaints about a wrong command line: one line, and a suggestion of what was meant.

The parser's exceptions differ between versions of typer in their wording; what is used of them here is what they
have in common: ``ctx``, ``option_name`` and ``possibilities`` of an unknown option, ``format_message``.
"""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any

from simsr.cli.output import complain

__all__ = ["complain_about_usage", "USAGE_STATUS"]

USAGE_STATUS = 2

_UNKNOWN_COMMAND = re.compile(r"No such command '(.*?)'")


def complain_about_usage(error: Any) -> int:
    """Print what is wrong with the command line and return the exit status for it."""
    context = getattr(error, "ctx", None)
    message = " ".join(str(error.format_message()).split()).removeprefix("Invalid value: ")
    if context is not None and (message.startswith("Missing command") or type(error).__name__ == "NoArgsIsHelpError"):
        print(context.get_help(), file=sys.stderr)
        return USAGE_STATUS
    message = message.replace(": Value error, ", ": ", 1)  # pydantic's words, which some versions of typer pass on
    suggestion = ""
    if unknown := _UNKNOWN_COMMAND.match(message):
        message = f"no such command: {unknown[1]}"
        suggestion = _nearest(unknown[1], context.command.list_commands(context))
    elif type(error).__name__ == "NoSuchOption":
        message = f"no such option: {error.option_name}"
        options = [name for parameter in context.command.params for name in parameter.opts if name[0] == "-"]
        suggestion = _nearest(error.option_name, options)
    complain(_small_first_letter(message), suggestion + _where_to_read(context))
    return USAGE_STATUS


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]}? " if near else ""


def _where_to_read(context: Any) -> str:
    return f"Try '{context.command_path} --help'." if context is not None else "Try 'simsr --help'."


def _small_first_letter(message: str) -> str:
    return message[:1].lower() + message[1:].rstrip(".")

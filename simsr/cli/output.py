"""What the commands print: tables, fields and JSON for standard output, messages for standard error.

A table has two spaces between columns, no borders and numbers to the right; its lines are as wide as they need to be,
so that grep and awk see whole words whatever the terminal. Names come from outside: control characters are shown
escaped and never reach the terminal. Colour needs a terminal and yields to ``NO_COLOR``.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from simsr.units import format_size

__all__ = ["print_json", "print_table", "table_width", "print_fields", "say", "complain", "printable", "size_and_bytes", "styled"]

BOLD, RED, DIM = "1", "1;31", "2"
_LONG_WORD = re.compile(r"\S{300,}")  # a name that is none; longer than any path that is usual


def printable(text: object) -> str:
    """Return ``text`` with control characters escaped, so that a name cannot steer the terminal."""
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in plain)


def styled(text: str, style: str, stream: TextIO) -> str:
    """Return ``text`` in an ANSI style if ``stream`` is a terminal that wants colour."""
    wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{style}m{text}\x1b[0m" if wanted else text


def print_json(value: Any) -> None:
    """Print an answer of the API as it is."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], right: str = "") -> None:
    """Print ``rows`` under ``headings``; the columns named in ``right`` (space separated) are numbers.

    An empty cell is shown as ``-``, so that every line has the same number of words in its fixed columns.
    """
    cells, widths = _laid_out(headings, rows)
    to_the_right = [heading in right.split() for heading in headings]
    for number, row in enumerate([list(headings), *cells]):
        padded = []
        for cell, width, is_number in zip(row, widths, to_the_right, strict=True):
            fill = " " * (width - _width(cell))
            padded.append(fill + cell if is_number else cell + fill)
        line = "  ".join(padded).rstrip()
        print(styled(line, BOLD, sys.stdout) if number == 0 else line)


def table_width(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Return how many terminal cells the lines of a table take."""
    return sum(_laid_out(headings, rows)[1]) + 2 * (len(headings) - 1)


def _laid_out(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> tuple[list[list[str]], list[int]]:
    cells = [[printable(cell) or "-" for cell in row] for row in rows]
    return cells, [max(map(_width, column)) for column in zip(headings, *cells, strict=True)]


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print ``name: value`` lines with the values under one another."""
    shown = [(name + ":", printable(value) or "-") for name, value in fields]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def size_and_bytes(size_bytes: int) -> str:
    """Return a size for people with the exact number beside it."""
    return f"{format_size(size_bytes)} ({size_bytes} bytes)"


def say(sentence: str) -> None:
    """Print one sentence about what happened."""
    print(printable(sentence))


def complain(message: str, hint: str = "") -> None:
    """Print an error and what to do about it on standard error."""
    shown = _LONG_WORD.sub(lambda word: f"{word[0][:80]}...{word[0][-40:]}", printable(message))
    print(styled("simsr:", RED, sys.stderr), shown, file=sys.stderr)
    if hint:
        print(styled("Hint:", BOLD, sys.stderr), printable(hint), file=sys.stderr)


def _width(text: str) -> int:
    """Return how many terminal cells ``text`` takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)

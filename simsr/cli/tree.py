"""Drawing the tree of a disk: one row a node, in characters that the terminal has.

A drawing whose lines are broken cannot be read. So at a terminal that is too narrow uuids are shown by their beginnings, which commands
take as well, then times without date, then no sizes; what goes into a pipe or file is always whole.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import Any

from simsr.cli.output import print_table, table_width
from simsr.units import format_size

__all__ = ["draw", "can_draw_boxes"]

_BOXES = ("├─ ", "└─ ", "│  ", "● ")
_ASCII = ("|- ", "`- ", "|  ", "* ")
_HEADINGS = ("NODE", "SIZE", "USED", "TIME", "KIND", "UUID")
_UUID_CHARS = 8  # of a uuid that is shown by its beginning


def can_draw_boxes() -> bool:
    """Whether standard output takes more than ASCII."""
    try:
        "".join(_BOXES).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw(tree: dict[str, Any], boxes: bool) -> None:
    """Print the tree as the API gives it. The head is marked, with a star behind it if it is not what its node is."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for headings, rows in _forms(_rows(tree, boxes)):
        if table_width(headings, rows) <= columns:
            break
    print_table(headings, rows, right="SIZE USED")


def _forms(rows: list[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Headings and rows, from the whole table to the narrowest."""
    yield _HEADINGS, rows
    if len({row[-1][:_UUID_CHARS] for row in rows}) == len({row[-1] for row in rows}):
        rows = [(*row[:-1], row[-1][:_UUID_CHARS]) for row in rows]
        yield _HEADINGS, rows
    rows = [(*row[:3], row[3][11:19], *row[4:]) for row in rows]
    yield _HEADINGS, rows
    yield (_HEADINGS[0], *_HEADINGS[3:]), [(row[0], *row[3:]) for row in rows]


def _rows(tree: dict[str, Any], boxes: bool) -> list[tuple[str, ...]]:
    fork, corner, bar, mark = _BOXES if boxes else _ASCII
    kids: dict[int | None, list[dict]] = {}
    for node in tree["nodes"]:
        kids.setdefault(node["parent"], []).append(node)
    rows = []
    stack = [(node, "", "", "") for node in reversed(kids.get(None, []))]
    while stack:
        node, before, branch, below = stack.pop()
        rows.append((before + branch + _label(node, tree, mark), *_cells(node)))
        children = kids.get(node["id"], [])
        last = len(children) - 1
        stack += [
            (kid, before + below, corner if index == last else fork, "   " if index == last else bar) for index, kid in enumerate(children)
        ][::-1]
    return rows


def _label(node: dict[str, Any], tree: dict[str, Any], mark: str) -> str:
    if node["kind"] == "head":
        return f"{mark}{node['name'] or 'head'}{'*' if tree['dirty'] else ''}"
    return f"({node['name']})" if node["kind"] == "ghost" else node["name"] or node["uuid"]


def _cells(node: dict[str, Any]) -> tuple[str, str, str, str, str]:
    kind = f"tip, {node['consistency']}" if node["kind"] == "tip" else node["kind"]
    return format_size(node["size_bytes"]), format_size(node["used_bytes"]), node["time"] or "", kind, node["uuid"]

"""Drawing the tree of a disk: one row a node, in characters that the terminal has."""

from __future__ import annotations

import sys
from typing import Any

from simsr.cli.output import print_table
from simsr.units import format_size

__all__ = ["draw", "can_draw_boxes"]

_BOXES = ("├─ ", "└─ ", "│  ", "● ")
_ASCII = ("|- ", "`- ", "|  ", "* ")


def can_draw_boxes() -> bool:
    """Whether standard output takes more than ASCII."""
    try:
        "".join(_BOXES).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw(tree: dict[str, Any], boxes: bool) -> None:
    """Print the tree as the API gives it. The head is marked, with a star behind it if it is not what its node is."""
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
    print_table(("NODE", "SIZE", "USED", "TIME", "KIND", "UUID"), rows, right="SIZE USED")


def _label(node: dict[str, Any], tree: dict[str, Any], mark: str) -> str:
    if node["kind"] == "head":
        return f"{mark}{node['name'] or 'head'}{'*' if tree['dirty'] else ''}"
    return f"({node['name']})" if node["kind"] == "ghost" else node["name"] or node["uuid"]


def _cells(node: dict[str, Any]) -> tuple[str, str, str, str, str]:
    kind = f"tip, {node['consistency']}" if node["kind"] == "tip" else node["kind"]
    return format_size(node["size_bytes"]), format_size(node["used_bytes"]), node["time"] or "", kind, node["uuid"]

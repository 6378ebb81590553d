"""What can be told from a plug-in's text: whether Python 3.6 would run it, and what it imports."""

from __future__ import annotations

import ast
import sys

__all__ = ["source_problem"]

NEWER_MODULES = {"dataclasses", "contextvars", "importlib.resources", "importlib.metadata", "graphlib", "zoneinfo", "tomllib"}
"""Of the standard library, but not of Python 3.6."""

NEWER_NAMES = {("asyncio", "run"), ("functools", "cache"), ("functools", "cached_property"), ("time", "time_ns"), ("shlex", "join"),
               ("asyncio", "to_thread"), ("subprocess", "capture_output"), ("datetime", "fromisoformat")}  # fmt: skip
SHARED_WITH_DOM0 = {"XenAPI", "observer", "sm"}
SIZE_MAX_BYTES = 16 << 20


def source_problem(path: str) -> tuple[str, bool]:
    """(what is wrong with the plug-in at ``path`` in a sentence, or "", whether it is Python). Looks at syntax, modules, and some names."""
    with open(path, "rb") as file:
        text = file.read(SIZE_MAX_BYTES)
    first = text.split(b"\n", 1)[0]
    if not (first.startswith(b"#!") and b"python" in first):
        return "", False
    try:
        tree = ast.parse(text, path, feature_version=(3, 6))
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"Python 3.6 cannot read it: {getattr(error, 'msg', error)}, line {getattr(error, 'lineno', '?')}", True
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            top = name.partition(".")[0]
            if name in NEWER_MODULES or top in NEWER_MODULES:
                return f"it imports {name}, which Python 3.6 does not have (line {node.lineno})", True
            if top not in sys.stdlib_module_names and top not in SHARED_WITH_DOM0:
                return f"it imports {top}, which is not of the standard library (line {node.lineno})", True
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in NEWER_NAMES:
            return f"it uses {node.value.id}.{node.attr}, which Python 3.6 does not have (line {node.lineno})", True
    return "", True

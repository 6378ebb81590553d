"""The house rules that can be checked: who may import whom, how large files are, what library code does not do.

docs/design.md has the table of folders. A module may import from its own folder, from folders below it, and from the
foundation; not from a folder beside it. The lower half must also stay free of what waits: no trio, no sockets, no clock.
"""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [  # highest first; folders on one floor know nothing of each other
    {"simsr.cli", "simsr.web"},
    {"simsr.smapi", "simsr.xapi"},
    {"simsr.daemon"},
    {"nbd_export", "fs_layout"},
    {"scenarios"},
    {"simsr.sr"},
    {"simsr.store"},
]
FOUNDATION = {"simsr", "simsr.errors", "simsr.units", "simsr.personalities"}
CLIENTS = {"simsr.cli", "simsr.web", "simsr.smapi", "simsr.xapi"}
"""They talk to the daemon over HTTP: of the rest of the house they may know each other, and that the daemon can be started."""

SANS_IO = {
    "simsr.store": {"trio", "asyncio", "socket", "threading", "time", "datetime", "random", "secrets"},
    "simsr.sr": {"trio", "asyncio", "socket", "threading", "time", "random", "secrets", "os"},
    "scenarios": {"trio", "asyncio", "socket", "threading", "time", "secrets"},
}
MAY_PRINT = {"simsr.cli", "simsr.web", "simsr.daemon.main", "simsr.daemon.service", "simsr.xapi.main"}
HANDED_IN = {("simsr.store.memory", "random")}  # takes a generator from the test that uses it
CODE_LINES_MAX = 450  # "about 400"
LINES_MAX = 600

AT_THE_TOP = {
    ".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "pyproject.toml",
    "bench", "docs", "fs_layout", "nbd_export", "scenarios", "script", "simsr", "tests",
}  # fmt: skip

FILES = sorted(
    path for folder in ("simsr", "nbd_export", "fs_layout", "scenarios") for path in (ROOT / folder).rglob("*.py")
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str | None:
    """The folder of the house that a module of ours belongs to."""
    for floor in FLOORS:
        for folder in floor:
            if module == folder or module.startswith(folder + "."):
                return folder
    return None


def imports(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, full name) of everything imported, inside functions as well."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return found


def in_foundation(name: str) -> bool:
    """``simsr.errors``, a name in it, or a name of the package itself."""
    return name in FOUNDATION or name.rpartition(".")[0] in FOUNDATION and folder_of(name) is None


def forbidden(module: str, name: str) -> str | None:
    """Why ``module`` may not import ``name``, or None."""
    here, there = folder_of(module), folder_of(name)
    top = name.partition(".")[0]
    if top in SANS_IO.get(here, ()) and (module, top) not in HANDED_IN:
        return f"{here} is synchronous and deterministic: no {top}"
    if there is None or there == here or in_foundation(name):
        return None
    if here is None:
        return f"{module} is foundation and may import nothing of the house"
    floor = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
    if floor[there] <= floor[here]:
        return f"{there} is not below {here}"
    if here in CLIENTS and there not in CLIENTS | {"simsr.daemon"}:
        return f"{here} is a client of the HTTP API and knows nothing of {there}"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    module = module_of(path)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}: {reason}"
        for line, name in imports(ast.parse(path.read_text()), module, path.name == "__init__.py")
        if (reason := forbidden(module, name))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path):
    """Not too long, opens with a docstring, and does not print unless that is its work."""
    text = path.read_text()
    tree = ast.parse(text)
    module = module_of(path)
    assert len(text.splitlines()) <= LINES_MAX, f"{len(text.splitlines())} lines"
    code = code_lines(tree)
    assert code <= CODE_LINES_MAX, f"{code} lines of code"
    if not path.name.startswith("_") or path.name == "__init__.py":
        assert ast.get_docstring(tree) or not text.strip(), "it does not say what it is for"
    if not any(module == who or module.startswith(who + ".") for who in MAY_PRINT):
        prints = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and is_print(node)]
        assert not prints, f"prints in lines {prints}"


def test_tests_are_not_too_long_either():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert lengths and not {name: lines for name, lines in lengths.items() if lines > LINES_MAX}


def is_print(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "print"


def code_lines(tree: ast.AST) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.stmt) and not is_docstring(node):
            if isinstance(node, ast.expr) or not hasattr(node, "body"):
                lines.update(range(node.lineno, node.end_lineno + 1))
            else:
                lines.add(node.lineno)
    docstrings = {
        line
        for node in ast.walk(tree)
        if is_docstring(node)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return len(lines - docstrings)


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_every_module_is_in_the_house():
    strangers = [module_of(path) for path in FILES if folder_of(module_of(path)) is None and module_of(path) not in FOUNDATION]
    assert not strangers, f"not in the table of folders: {strangers}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_nothing_else_lies_at_the_top():
    """What somebody tried out there is easily committed with the rest."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert {path.partition("/")[0] for path in listed if path} == AT_THE_TOP


def test_the_rule_itself():
    assert forbidden("simsr.store.log", "simsr.sr.vdi") and forbidden("simsr.sr.vdi", "simsr.daemon.main")
    assert forbidden("nbd_export.server", "fs_layout.tree") and forbidden("simsr.cli.app", "simsr.store.store")
    assert forbidden("simsr.sr.vdi", "trio.lowlevel") and forbidden("simsr.errors", "simsr.store")
    assert not forbidden("simsr.sr.vdi", "simsr.store.store.Store") and not forbidden("simsr.store.log", "simsr.errors.NoSpace")
    assert not forbidden("simsr.daemon.host", "nbd_export.server") and not forbidden("simsr.cli.app", "simsr.__version__")
    relative = ast.parse("from ..sr import vdi\nfrom . import log\nimport trio")
    found = [name for _, name in imports(relative, "simsr.store.store", False)]
    assert sorted(found) == ["simsr.sr.vdi", "simsr.store.log", "trio"]

"""The CloudStack demonstration as its reader runs it; what of it is claimed in docs/cloudstack.md."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys

import pytest
from xapi_kit import ROOT, short_directory

pytest.importorskip("nbd", reason="needs libnbd's Python module; script/setup installs it")

DEMO = ROOT / "script" / "demo_cloudstack.py"


def shape(text: str) -> list[list[str]]:
    """The words of each line, without what differs from run to run."""
    text = re.sub(r"\b[0-9a-f]{8}\b", "UUID", text)
    text = re.sub(r"[0-9]+ ms", "TIME", text)
    text = re.sub(r"\b[0-9]+ s\b|1/[0-9.]+", "NUMBER", text)
    return [re.findall(r"\S+", line) for line in text.splitlines() if line.strip(" ─")]


def test_it_holds_fits_the_terminal_and_prints_what_the_document_shows():
    folder = short_directory()
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "80"}
    done = subprocess.run([sys.executable, DEMO], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    page, left = done.stdout, list(folder.iterdir())
    folder.rmdir()
    assert left == [], "it leaves nothing behind"
    assert "Everything was as said" in page and "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 80
    [block] = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "cloudstack.md").read_text(), re.S)
    assert shape(block) == shape(page)


def test_failure_is_told_by_the_exit_status():
    folder = short_directory()
    script = "import sys; sys.path.insert(0, 'script'); import demo_cloudstack as d; d.plain = lambda *_: d.demand(False, 'as planned')"
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; sys.exit(d.main())"], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert (done.returncode, done.stderr) == (1, "") and "This did not hold: as planned" in done.stdout
    assert list(folder.iterdir()) == []
    folder.rmdir()


def test_the_columns_are_cloudstacks():
    sys.path.insert(0, str(ROOT / "script"))
    try:
        from cloudstack import SCHEMA
    finally:
        sys.path.remove(str(ROOT / "script"))
    with sqlite3.connect(":memory:") as db:
        db.executescript(SCHEMA)
        columns = {row[1] for row in db.execute("PRAGMA table_info(volumes)")}
    db.close()
    assert {"id", "name", "instance_id", "device_id", "pool_id", "path", "size", "state", "update_count"} == columns

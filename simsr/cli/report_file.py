"""Reports of scenarios as commands give them: a page in a file, JSON, or a few lines on the terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from simsr import __version__
from simsr.cli.failures import ExpectationsBroken, FileFailure
from simsr.cli.output import print_fields, print_table, say
from simsr.cli.rename_target import rename_target

__all__ = ["page_file", "print_report", "print_expectations", "check_expectations"]


@contextlib.contextmanager
def page_file(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what writes a report's page to ``path`` (None: nothing is written), whole or not at all.

    Whether it can be written is found out at once and not at the end of a long run. Raises `FileFailure`.
    """
    if path is None:
        yield lambda report: None
        return
    try:
        target = rename_target(path)
        beside = None if target is None else os.path.dirname(target)
        handle, part = tempfile.mkstemp(prefix=".simsr-report-", dir=beside)
    except OSError as error:
        raise FileFailure(action="write", path=path, reason=error.strerror or str(error)) from None

    def write(report: dict[str, Any]) -> None:
        from simsr.cli.report_page import report_page

        page = report_page(report, __version__)
        try:
            with open(part, "w", encoding="utf-8", errors="replace") as stream:
                stream.write(page)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(part, 0o666 & ~mask)
            if target is not None:
                os.replace(part, target)
                return
            with open(path, "wb") as device, open(part, "rb") as stream:
                shutil.copyfileobj(stream, device)
        except OSError as error:
            raise FileFailure(action="write", path=path, reason=error.strerror or str(error)) from None

    try:
        os.close(handle)
        yield write
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def print_report(report: dict[str, Any]) -> None:
    """What fits on a terminal."""
    from simsr.cli.report_page import verdict_words
    from simsr.cli.report_scales import seconds

    print_fields(
        [
            ("scenario", report["scenario"]),
            ("seed", report["seed"]),
            ("began", report["began"]),
            ("so far" if report["is_running"] else "took", seconds(report["duration_s"])),
            ("verdict", verdict_words(report)),
            ("requests", report["requests"]),
            ("errors", report["errors"]),
            ("longest hang", seconds(report["hangs"]["max_s"])),
        ]
    )
    if report["operations"]:
        print()
        columns = ("p50_s", "p99_s", "p999_s", "max_s")
        rows = [
            (one["op"], one["phase"] or "", one["count"], one["errors"], *(seconds(one[name]) for name in columns))
            for one in report["operations"]
        ]
        headings = ("OPERATION", "PHASE", "REQUESTS", "ERRORS", "P50", "P99", "P99.9", "MAX")
        print_table(headings, rows, right="REQUESTS ERRORS P50 P99 P99.9 MAX")
    print_expectations(report["expectations"])


def print_expectations(expectations: list[dict[str, Any]]) -> None:
    """One line each: met, broken or not evaluated, and what was found."""
    if expectations:
        print()
    for one in expectations:
        found = [f"{found['what']} is {found['value']}" for found in one["found"]]
        said = "; ".join(filter(None, (", ".join(found), one["reason"])))
        say(f"{one['verdict']}: {one['that']}" + (f" ({said})" if said else ""))


def check_expectations(ended: dict[str, Any]) -> None:
    """Raises `ExpectationsBroken` if one is."""
    broken = [one for one in ended["expectations"] if one["verdict"] == "broken"]
    if broken:
        what = "; ".join(one["that"] for one in broken)
        raise ExpectationsBroken(scenario=ended["scenario"], broken=what)

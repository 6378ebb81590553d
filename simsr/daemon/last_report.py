"""The report of the last scenario, in a file of the root, so that it outlives the daemon (which a scenario may kill).

Written beside and renamed, not synced: losing it in a power cut costs nobody data. One that cannot be read counts as none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import Any

__all__ = ["save_report", "load_report"]

log = logging.getLogger("simsr.scenario")

_FORMAT = 1
"""Of what is in a report; another one's is not shown."""


def save_report(path: str, report: dict[str, Any]) -> None:
    """Blocks for some milliseconds. What goes wrong is logged: the scenario has ended all the same."""
    beside = f"{path}.new"
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            json.dump({"format": _FORMAT, "report": report}, stream)
        os.replace(beside, path)
    except OSError as error:
        log.warning("the report of scenario %s is not kept: %s: %s", report["scenario"], beside, error.strerror)
        with contextlib.suppress(OSError):
            os.unlink(beside)


def load_report(path: str) -> dict[str, Any] | None:
    """Blocks. None if there is none that we can read."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
        if found["format"] == _FORMAT:
            return dict(found["report"])
        log.warning("%s is the report of another version of simsr", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("%s is no report of a scenario: %s", path, error)
    return None

"""Errors that arise in the command line itself and not in the daemon.

They belong to the one hierarchy of `simsr.errors`, so that ``main`` has a single way to report a failure.
"""

from __future__ import annotations

from typing import Any

from simsr.errors import BadRequest, NotFound, SimsrError

__all__ = ["DaemonAnswer", "FileFailure", "ExpectationsBroken", "ToolMissing", "StartFailed", "NameNeeded", "NoSr"]


class DaemonAnswer(SimsrError):
    """{message}"""

    def __init__(self, *, code: str, message: str, hint: str, exit_code: int, details: dict[str, Any]) -> None:
        super().__init__(message=message)
        self.details = details
        self.remote_code = code
        self.hint = hint
        self.exit_code = exit_code

    @property
    def code(self) -> str:
        """The name of the error class that the daemon raised."""
        return self.remote_code


class FileFailure(SimsrError):
    """cannot {action} {path}: {reason}"""

    def __init__(self, *, path: object, **details: object) -> None:
        super().__init__(path=path or "''", **details)


class ExpectationsBroken(SimsrError):
    """scenario {scenario} did not go as expected: {broken}"""

    hint = "'simsr scenario report --out FILE.html' shows the whole run."


class ToolMissing(SimsrError):
    """{tool} is not installed, and {action} needs it"""

    hint = "On Debian and Ubuntu: apt-get install qemu-utils"


class StartFailed(SimsrError):
    """simsrd did not start on {root}: {reason}"""

    exit_code = 4
    hint = "Run it by hand to see more: simsrd --root DIR"


class NameNeeded(BadRequest):
    """there are {count} SRs ({names}); say which one"""

    hint = "Give its name or uuid, for example: simsr sr status NAME"


class NoSr(NotFound):
    """there is no SR yet"""

    hint = "Create one with 'simsr sr create NAME'."

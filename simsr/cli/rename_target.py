"""Where a file that is written beside its place may be renamed to, so that it comes whole or not at all."""

from __future__ import annotations

import os
import stat

__all__ = ["rename_target"]


def rename_target(path: str) -> str | None:
    """Return what a rename may replace to bring a file to ``path``: behind symbolic links, which stay.

    None if a device or pipe is there (/dev/null, /dev/stdout): a rename would take it away, for everybody if root does it, so it has to be
    written as it is. Raises IsADirectoryError, FileNotFoundError for an empty name.
    """
    if not path:
        raise FileNotFoundError(0, "its name is empty")
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return os.path.realpath(path)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(0, "it is a directory")
    return os.path.realpath(path) if stat.S_ISREG(kind) else None

"""File names for things whose names come from outside: safe, unique, and the same tomorrow.

A name is kept where it can be a file name. Where it cannot (a slash, a control character, ``.`` and ``..``, a leading dot, more
than 200 bytes, no text at all, not Unicode), what is wrong becomes ``_`` and ``~`` and the uuid are added; so what was
changed never takes the name of something that was not. Names that look as if that had been done to them get the same treatment.

Where two things want one name, the first keeps it and the other gets its uuid added. A name once given stays until the thing
is renamed or gone, whatever comes and goes beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["Namer", "file_name"]

NAME_BYTES_MAX = 200  # a uuid, "~" and ".raw" fit behind it into the 255 of a file name
_MARKED = re.compile(r"~[0-9a-f]{8}-[0-9a-f-]{27}(\.|$)")


def file_name(name: str, uuid: str) -> str:
    """Return what ``name`` is called in a directory; pure, so it depends on nothing else there."""
    plain = "".join("_" if c == "/" or not c.isprintable() else c for c in name)
    encoded = plain.encode("utf-8", "replace")
    if len(encoded) > NAME_BYTES_MAX:
        plain = encoded[:NAME_BYTES_MAX].decode("utf-8", "ignore")
    if plain.startswith("."):
        plain = "_" + plain[1:]
    if plain != name or not name or _MARKED.search(name):
        return f"{plain or '_'}~{uuid}"
    return plain


class Namer:
    """The names in one directory."""

    def __init__(self) -> None:
        self._given: dict[str, tuple[str, str]] = {}  # uuid -> (what it is called, the file name it got)

    def assign(self, things: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Return file name -> uuid for all ``things``, which are (uuid, name), older ones first."""
        wanted = dict(things)
        self._given = {uuid: given for uuid, given in self._given.items() if wanted.get(uuid) == given[0]}
        taken = {file: uuid for uuid, (_, file) in self._given.items()}
        for uuid, name in wanted.items():
            if uuid not in self._given:
                file = file_name(name, uuid)
                if file in taken:
                    file = f"{file}~{uuid}"
                taken[file] = uuid
                self._given[uuid] = (name, file)
        return taken

"""xapi's configuration, read as xapi reads it: /etc/xapi.conf, then every file in /etc/xapi.conf.d in the order of the names.

A line is ``key = value``; the last one for a key counts; ``#`` begins a comment anywhere; quotes around a value go. xapi passes over lines that it
cannot read. The installer does not: it must not build on a guess, so what looks like one of our keys and is not clear is refused.
(source: ocaml/xapi-idl/lib/xcp_service.ml of xapi-project/xen-api)
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from simsr.errors import InstallRefused

__all__ = ["XapiConf", "CONF_FILE", "CONF_DIRECTORY", "read_xapi_conf"]

CONF_FILE = "/etc/xapi.conf"
CONF_DIRECTORY = "/etc/xapi.conf.d"
SM_DIRECTORY = "/opt/xensource/sm"

_KEYS = ("sm-plugins", "sm-dir")
_LINE = re.compile(r"([^= \t]+)[ \t]*=[ \t]*(.*)")
_PLUGIN = re.compile(r"[A-Za-z0-9_.+-]+|\*")
SIZE_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class XapiConf:
    """What xapi would find. ``sm_plugins``: the drivers that it accepts, None if the key is nowhere. ``set_in``: where that was."""

    exists: bool
    sm_directory: str
    sm_plugins: list[str] | None
    set_in: str | None

    @property
    def accepts_all(self) -> bool:
        return self.sm_plugins == ["*"]

    def accepts(self, name: str) -> bool:
        """True if xapi would run a driver of that name; it compares without case."""
        return self.accepts_all or name.lower() in {plugin.lower() for plugin in self.sm_plugins or ()}


def read_xapi_conf(root: str, without: str) -> XapiConf:
    """Read the configuration below ``root``, as if the fragment called ``without`` were not there. Raises `InstallRefused`."""
    found: dict[str, tuple[str, str]] = {}
    main = _below(root, CONF_FILE)
    exists = os.path.lexists(main)
    if exists:
        found |= _read(main)
    directory = _below(root, CONF_DIRECTORY)
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    for name in names:
        if name == without:
            continue
        settings = _read(os.path.join(directory, name))
        if "sm-plugins" in settings and name > without:
            raise InstallRefused(
                action="use", path=os.path.join(directory, name),
                reason=f"it sets sm-plugins and is read after {without}, which would have no effect",
                hint="Move its sm-plugins line into a file whose name comes earlier.",
            )  # fmt: skip
        found |= settings
    plugins, set_in = found.get("sm-plugins", (None, None))
    sm_directory, place = found.get("sm-dir", (SM_DIRECTORY, ""))
    if not sm_directory.startswith("/") or "\0" in sm_directory:
        raise InstallRefused(action="understand", path=place, reason=f"sm-dir is {sm_directory!r}, which is no absolute path")
    return XapiConf(exists, os.path.normpath(sm_directory), None if plugins is None else plugins.split(), set_in)


def _below(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))


def _read(path: str) -> dict[str, tuple[str, str]]:
    """Return our keys in the file: value and place."""
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE_MAX_BYTES + 1)
    except OSError as error:
        raise InstallRefused(action="read", path=path, reason=(error.strerror or str(error)).lower()) from None
    if len(data) > SIZE_MAX_BYTES:
        raise InstallRefused(action="understand", path=path, reason=f"it has more than {SIZE_MAX_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InstallRefused(action="understand", path=path, reason=f"it is not UTF-8: {error}") from None
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        bare = line.partition("#")[0].rstrip(" \t\r")
        match = _LINE.search(bare)
        place = f"{path}, line {number}"
        if match and match[1] in _KEYS:
            found[match[1]] = (_value(match[1], match[2], place), place)
        elif not match and bare.split()[:1] and bare.split()[0] in _KEYS:
            raise InstallRefused(action="understand", path=place, reason=f"there is no '=' in {bare.strip()[:80]!r}")
    return found


def _value(key: str, value: str, place: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    if key == "sm-plugins":
        strange = [word for word in value.split() if not _PLUGIN.fullmatch(word)]
        if strange or "*" in value.split() and value.split() != ["*"]:
            what = repr(strange[0][:80]) if strange else "'*' among other names"
            raise InstallRefused(action="understand", path=place, reason=f"sm-plugins has {what}, which is not the name of a driver")
    return value

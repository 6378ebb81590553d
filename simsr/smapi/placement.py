"""Files put below a root and taken away again, so that nothing foreign is ever touched.

Theory. A record in ROOT/var/lib/simsr says what was placed, by checksum, and which directories were made for it. A file that is not in the record, or
no longer as recorded, is foreign: it is refused, never replaced. Everything is checked before anything is changed. The record is written first, with
what is there and what is to be, so that an installation that was interrupted is known and can be repeated or taken back. A file comes and changes by
a rename, so there is never half of one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from simsr.errors import InstallRefused

__all__ = ["Wanted", "Step", "Placement", "RECORD"]

RECORD = "/var/lib/simsr/smapi.json"
_VERSION = 1


@dataclass(frozen=True)
class Wanted:
    """A file that is to be at ``path`` (absolute, below the root): ``data``, or a symbolic link to ``link``."""

    path: str
    data: bytes = b""
    executable: bool = False
    link: str | None = None
    temporary_beside: bool = True  # False where every name in the directory is read by somebody

    @property
    def mark(self) -> str:
        """What the record says of it."""
        if self.link is not None:
            return f"link {self.link}"
        return f"{'x' if self.executable else '-'} {hashlib.sha256(self.data).hexdigest()}"


@dataclass(frozen=True)
class Step:
    """One change that is to be made: ``action`` is make, write, replace, link or remove."""

    action: str
    path: str
    wanted: Wanted | None = None

    def __str__(self) -> str:
        arrow = f" -> {self.wanted.link}" if self.wanted and self.wanted.link is not None else ""
        return f"{self.action} {self.path}{arrow}"


@dataclass
class _Record:
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)  # path -> marks that are ours
    directories: list[str] = field(default_factory=list)  # in the order they were made


class Placement:
    """What simsr has placed below ``root``, and how to change that: `plan` then `apply`, or `plan_removal` then `apply`."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        self._lock()
        self._path = self._real(RECORD)
        self._record = self._load()
        self._next = self._record

    def _lock(self) -> None:
        """Be the only one who changes this root, as long as this object lives."""
        handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InstallRefused(
                action="change", path=self.root, reason="another installation is under way there", hint="Wait until it has ended."
            ) from None

    @property
    def settings(self) -> dict[str, Any]:
        """What the last installation kept for the next one."""
        return self._record.settings

    @property
    def is_there(self) -> bool:
        return os.path.lexists(self._path)

    def is_ours(self, path: str) -> bool:
        return path in self._record.files

    # Planning: everything that could be refused is refused here.

    def plan(self, wanted: Iterable[Wanted], settings: dict[str, Any]) -> list[Step]:
        """Return the steps to have exactly ``wanted`` of ours there, in order. Raises `InstallRefused`."""
        wanted = list(wanted)
        record = _Record(settings, {}, list(self._record.directories))
        made = self._missing_parents(RECORD)  # which come into being with the record
        steps: list[Step] = []
        for one in wanted:
            current = self._mark(one.path)
            known = self._record.files.get(one.path)
            if current == one.mark and known is None:
                continue  # put there by somebody else; fine, and not ours to take away
            if current is not None and current != one.mark and current not in (known or ()):
                changed = "it was changed since simsr put it there" if known else "it was not put there by simsr"
                raise InstallRefused(
                    action="replace", path=self._shown(one.path), reason=changed, hint="Look at it, and move it away if it is not needed."
                )
            record.files[one.path] = [one.mark]
            for directory in self._missing_parents(one.path):
                if directory not in made:
                    made.append(directory)
                    steps.append(Step("make", self._shown(directory)))
            if current != one.mark:
                action = "link" if one.link is not None else "write" if current is None else "replace"
                steps.append(Step(action, self._shown(one.path), one))
        gone = [path for path in self._record.files if path not in {one.path for one in wanted}]
        steps += self._removals(gone)
        record.directories += made
        self._next = record
        return steps

    def plan_removal(self) -> list[Step]:
        """Return the steps to have nothing of ours there. Raises `InstallRefused`."""
        steps = self._removals(reversed(self._record.files))
        steps += self._compiled()
        leaving = {step.path for step in steps}
        for directory in reversed(self._record.directories):
            real = self._real(directory)
            if RECORD.startswith(directory + "/") or not os.path.isdir(real):
                continue  # those of the record go with it
            if {self._shown(os.path.join(directory, name)) for name in os.listdir(real)} <= leaving:
                steps.append(Step("remove", self._shown(directory)))
                leaving.add(self._shown(directory))
        self._next = _Record()
        return steps

    def _compiled(self) -> list[Step]:
        """What Python made beside modules of ours when they were run; it is no more foreign than they are."""
        steps = []
        for directory in sorted({os.path.dirname(path) for path in self._record.files}):
            cache = self._real(f"{directory}/__pycache__")
            names = sorted(os.listdir(cache)) if os.path.isdir(cache) and not os.path.islink(cache) else []
            ours = [name for name in names if name.endswith(".pyc") and f"{directory}/{name.split('.')[0]}.py" in self._record.files]
            steps += [Step("remove", os.path.join(cache, name)) for name in ours]
            if names and ours == names:
                steps.append(Step("remove", cache))
        return steps

    def _removals(self, paths: Iterable[str]) -> list[Step]:
        steps = []
        for path in paths:
            current = self._mark(path)
            if current is None:
                continue
            if current not in self._record.files[path]:
                raise InstallRefused(
                    action="remove", path=self._shown(path), reason="it was changed since simsr put it there",
                    hint="Look at it, and move it away if it is not needed.",
                )  # fmt: skip
            steps.append(Step("remove", self._shown(path)))
        return steps

    # Doing it.

    def apply(self, steps: list[Step]) -> None:
        """Do the steps of the last plan. Raises `InstallRefused` if the system does; doing it again goes on where it ended."""
        if not steps and self._next == self._record:
            return
        try:
            if self._next.files:
                self._save(self._union())
            for step in steps:
                self._do(step)
            if self._next.files:
                self._save(self._next)
            elif self.is_there:
                self._forget()
        except OSError as error:
            path = error.filename if isinstance(error.filename, str) else self.root
            reason = (error.strerror or str(error)).lower()
            hint = "Run it as root." if error.errno in (errno.EACCES, errno.EPERM) else "Run it again when that is mended."
            raise InstallRefused(action="change", path=path, reason=reason, hint=hint) from None
        self._record = self._next

    def _union(self) -> _Record:
        files = {path: list(marks) for path, marks in self._record.files.items()}
        for path, marks in self._next.files.items():
            files[path] = [*files.get(path, ()), *(mark for mark in marks if mark not in files.get(path, ()))]
        return _Record(self._next.settings, files, self._next.directories)

    def _do(self, step: Step) -> None:
        path = step.path
        if step.action == "make":
            os.mkdir(path, 0o755)
        elif step.action == "remove":
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        elif step.wanted is not None:
            self._place(path, step.wanted)
        _sync_directory(os.path.dirname(path))

    @staticmethod
    def _place(path: str, wanted: Wanted) -> None:
        beside = os.path.dirname(path)
        beside = beside if wanted.temporary_beside else os.path.dirname(beside)
        if wanted.link is not None:
            temporary = tempfile.mktemp(prefix=".simsr-", dir=beside)
            os.symlink(wanted.link, temporary)
        else:
            handle, temporary = tempfile.mkstemp(prefix=".simsr-", dir=beside)
        try:
            if wanted.link is None:
                with open(handle, "wb") as file:
                    file.write(wanted.data)
                    os.fchmod(handle, 0o755 if wanted.executable else 0o644)
                    file.flush()
                    os.fsync(handle)
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise

    def _forget(self) -> None:
        os.unlink(self._path)
        for directory in reversed(self._record.directories):
            real = self._real(directory)
            if os.path.isdir(real) and not os.listdir(real):
                os.rmdir(real)

    # The record.

    def _load(self) -> _Record:
        if not os.path.lexists(self._path):
            return _Record()
        try:
            with open(self._path, encoding="utf-8") as file:
                value = json.load(file)
            if value["version"] != _VERSION:
                raise ValueError(f"version {value['version']!r}")
            files = {path: [str(mark) for mark in marks] for path, marks in value["files"].items()}
            directories, settings = [str(path) for path in value["directories"]], dict(value["settings"])
            if not all(_is_plain(path) for path in (*files, *directories)):
                raise ValueError("a path that is not absolute")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it is not a record of simsr: {error if isinstance(error, OSError | ValueError) else type(error).__name__}"
            raise InstallRefused(action="read", path=self._path, reason=reason) from None
        return _Record(settings, files, directories)

    def _save(self, record: _Record) -> None:
        os.makedirs(os.path.dirname(self._path), mode=0o755, exist_ok=True)
        value = {"version": _VERSION, "settings": record.settings, "files": record.files, "directories": record.directories}
        self._place(self._path, Wanted(RECORD, json.dumps(value, indent=1).encode() + b"\n"))
        _sync_directory(os.path.dirname(self._path))

    # Paths.

    def _shown(self, path: str) -> str:
        return os.path.join(self.root, path.lstrip("/"))

    def _real(self, path: str) -> str:
        """The path below the root, which its links must not lead out of."""
        own = self._shown(path)
        parent = os.path.realpath(os.path.dirname(own))
        if os.path.commonpath([parent, self.root]) != self.root:
            raise InstallRefused(action="use", path=own, reason=f"a link leads out of {self.root}, to {parent}")
        return os.path.join(parent, os.path.basename(own))

    def _missing_parents(self, path: str) -> list[str]:
        missing = []
        parent = os.path.dirname(path)
        while not os.path.isdir(self._shown(parent)):
            if os.path.lexists(self._shown(parent)):
                raise InstallRefused(action="use", path=self._shown(parent), reason="it is not a directory")
            missing.append(parent)
            parent = os.path.dirname(parent)
        return missing[::-1]

    def _mark(self, path: str) -> str | None:
        """What is at ``path``, as a record would say it; None if nothing is."""
        real = self._real(path)
        try:
            found = os.lstat(real)
            if stat.S_ISLNK(found.st_mode):
                return f"link {os.readlink(real)}"
            if not stat.S_ISREG(found.st_mode):
                return "neither a file nor a link"
            with open(real, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"{'x' if found.st_mode & 0o111 else '-'} {digest}"
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InstallRefused(action="read", path=real, reason=(error.strerror or str(error)).lower()) from None


def _is_plain(path: str) -> bool:
    return path.startswith("/") and os.path.normpath(path) == path


def _sync_directory(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The database: rows of all classes, in memory for reading and in SQLite for keeping.

Theory. A change is made in memory and remembered with what was there before. At the end of the outermost `transaction` all rows
that changed go to SQLite in one transaction of its own; if that fails, or the block raised, memory goes back to what it was. So
other tasks, clients and the file see all of a change or nothing, provided that no block awaits. Every commit that changes
something advances ``generation``; rows carry the generations of their creation and of their last change, from which events are
made.

Invariants
  * A row is never changed in place: it is replaced, so whoever holds one holds a consistent picture.
  * ``_pointers`` mirrors the fields named in `fields.DERIVED`; a change there also counts as a change of the row pointed at,
    whose derived fields it shows in.
  * Rows of transient classes never reach the file.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid as uuid_module
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from simsr.errors import SimsrError
from simsr.xapi.failure import XenError, internal_error
from simsr.xapi.fields import DERIVED, TRANSIENT
from simsr.xapi.schema import CLASSES, NULL, Time

__all__ = ["Database", "DatabaseUnusable", "Deleted", "Row", "new_ref"]

Row = dict[str, Any]
Key = tuple[str, str]
DELETIONS_KEPT = 10_000
FORMAT = "1"

_POINTERS = {(owner, field): target for target, derived in DERIVED.items() for owner, field in derived.values()}


class DatabaseUnusable(SimsrError):
    """database {path}: {reason}"""

    exit_code = 3
    hint = "Give another file with --database, or move this one away to start with an empty pool."


@dataclass(frozen=True)
class Deleted:
    """What is remembered of a row that is gone, for events."""

    generation: int
    created: int
    cls: str
    ref: str
    uuid: str


def new_ref() -> str:
    """Return a reference that no object has."""
    return f"OpaqueRef:{uuid_module.uuid4()}"


class Database:
    """All objects of the pool. Reading: `get`, `all`, `by_uuid`, `pointing`. Changing: `create`, `set`, `delete`."""

    def __init__(self, path: str) -> None:
        self._rows: dict[str, dict[str, Row]] = {cls: {} for cls in CLASSES}
        self._by_uuid: dict[str, dict[str, str]] = {cls: {} for cls in CLASSES}
        self._pointers: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)
        self._before: dict[Key, Row | None] | None = None
        self._touched: dict[Key, None] = {}
        self._changed = trio.Event()
        self.recent: OrderedDict[Key, tuple[int, int]] = OrderedDict()
        self.deleted: deque[Deleted] = deque()
        try:
            self._sql = sqlite3.connect(path, isolation_level=None)
            self._open()
        except (sqlite3.Error, ValueError) as error:
            raise DatabaseUnusable(path=path, reason=str(error)) from None
        self.oldest = self.generation

    def _open(self) -> None:
        self._sql.execute("PRAGMA journal_mode = WAL")
        # A commit survives the death of this process; after a power cut the last ones may be missing, but never parts of one.
        self._sql.execute("PRAGMA synchronous = NORMAL")
        self._sql.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
        self._sql.execute(
            "CREATE TABLE IF NOT EXISTS object"
            " (ref TEXT PRIMARY KEY, class TEXT NOT NULL, uuid TEXT NOT NULL, fields TEXT NOT NULL)"
        )
        meta = dict(self._sql.execute("SELECT name, value FROM meta"))
        if meta.setdefault("format", FORMAT) != FORMAT:
            raise ValueError(f"it has format {meta['format']}; this version reads {FORMAT}")
        self._sql.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (FORMAT,))
        # Higher than any before: commits of transient rows alone are not written, so the clock helps out. A token from before
        # the restart must never look like one from after it.
        self.generation = max(int(meta.get("generation", "0")), time.time_ns() // 1000) + 1
        for ref, cls, text in self._sql.execute("SELECT ref, class, fields FROM object ORDER BY rowid"):
            if cls in CLASSES:
                self._put((cls, ref), self._from_text(cls, text))
                self.recent[cls, ref] = (self.generation, self.generation)

    @staticmethod
    def _from_text(cls: str, text: str) -> Row:
        kept = json.loads(text)
        row: Row = {}
        for name, field in CLASSES[cls].items():
            value = kept.get(name, field.default)
            row[name] = Time(value) if field.type.kind == "datetime" else value
        if "current_operations" in row:
            row["current_operations"] = {}  # what was under way has ended with the process
        return row

    def close(self) -> None:
        """Write nothing more."""
        self._sql.close()

    # Reading.

    def get(self, cls: str, ref: str) -> Row:
        """Return a row as it is stored, without derived fields. Raises HANDLE_INVALID."""
        try:
            return self._rows[cls][ref]
        except KeyError:
            raise XenError("HANDLE_INVALID", cls, ref) from None

    def has(self, cls: str, ref: str) -> bool:
        """True if there is such an object."""
        return ref in self._rows[cls]

    def all(self, cls: str) -> dict[str, Row]:
        """Return all rows of a class by reference; a copy, so that the database may change meanwhile."""
        return dict(self._rows[cls])

    def by_uuid(self, cls: str, uuid: str) -> str:
        """Return the reference of the object called ``uuid``. Raises UUID_INVALID."""
        try:
            return self._by_uuid[cls][uuid]
        except KeyError:
            raise XenError("UUID_INVALID", cls, uuid) from None

    def pointing(self, target: str, field: str, ref: str) -> list[str]:
        """Return the value of a derived field: the references of the objects that point to ``ref``, oldest first."""
        return list(self._pointers.get((*DERIVED[target][field], ref), ()))

    def count(self, cls: str) -> int:
        """Return how many objects of the class there are."""
        return len(self._rows[cls])

    # Changing.

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the block, or none. The block must not await. Blocks may be nested; the outermost one counts."""
        if self._before is not None:
            yield
            return
        self._before, self._touched = {}, {}
        try:
            yield
            self._commit(self._before)
        except BaseException:
            for key, row in reversed(self._before.items()):
                self._put(key, row)
            raise
        finally:
            self._before = None

    def create(self, cls: str, ref: str | None = None, /, **values: Any) -> str:
        """Make an object; fields not given have their default. Returns its reference."""
        row = {name: field.default for name, field in CLASSES[cls].items()}
        row["uuid"] = str(uuid_module.uuid4())
        unknown = values.keys() - row.keys()
        if unknown:
            raise internal_error(f"class {cls} has no field {', '.join(sorted(unknown))}")
        row.update(values)
        ref = ref or new_ref()
        if row["uuid"] in self._by_uuid[cls]:
            raise XenError("UUID_NOT_UNIQUE", cls, row["uuid"])
        self._change((cls, ref), row)
        return ref

    def set(self, cls: str, ref: str, /, **values: Any) -> None:
        """Change fields of an object. Setting what is there already is no change."""
        row = self.get(cls, ref)
        if any(row[name] != value for name, value in values.items()):
            self._change((cls, ref), {**row, **values})

    def delete(self, cls: str, ref: str) -> None:
        """Remove an object."""
        self.get(cls, ref)
        self._change((cls, ref), None)

    def touch(self, cls: str, ref: str) -> None:
        """Count the object as changed, although nothing in it is."""
        self._change((cls, ref), dict(self.get(cls, ref)))

    async def wait_for_change(self) -> None:
        """Return after the next commit."""
        await self._changed.wait()

    # How a change is made and kept.

    def _change(self, key: Key, row: Row | None) -> None:
        with self.transaction():
            assert self._before is not None
            self._before.setdefault(key, self._rows[key[0]].get(key[1]))
            self._put(key, row)

    def _put(self, key: Key, row: Row | None) -> None:
        """Put a row, or its absence, in place, with the pointers that lead from it."""
        cls, ref = key
        old = self._rows[cls].get(ref)
        for field in CLASSES[cls]:
            target = _POINTERS.get((cls, field))
            before, after = (old[field] if old else None), (row[field] if row else None)
            if target is None or before == after:
                continue
            if before is not None and before != NULL:
                self._pointers[cls, field, before].pop(ref, None)
                self._touched[target, before] = None
            if after is not None and after != NULL:
                self._pointers[cls, field, after][ref] = None
                self._touched[target, after] = None
        if old is not None:
            self._by_uuid[cls].pop(old["uuid"], None)
        if row is None:
            self._rows[cls].pop(ref, None)
        else:
            self._rows[cls][ref] = row
            self._by_uuid[cls][row["uuid"]] = ref

    def _commit(self, before: dict[Key, Row | None]) -> None:
        changed = {key: self._rows[key[0]].get(key[1]) for key in before}
        if not changed:
            return
        self._write({key: row for key, row in changed.items() if key[0] not in TRANSIENT})
        self.generation += 1
        for key in [*before, *self._touched]:
            row = self._rows[key[0]].get(key[1])
            created = self.recent.pop(key, (self.generation, 0))[0]
            if row is not None:
                self.recent[key] = (created, self.generation)
            elif before.get(key) is not None:
                self.deleted.append(Deleted(self.generation, created, *key, before[key]["uuid"]))  # type: ignore[index]
        while len(self.deleted) > DELETIONS_KEPT:
            self.oldest = self.deleted.popleft().generation
        changed_event, self._changed = self._changed, trio.Event()
        changed_event.set()

    def _write(self, changed: dict[Key, Row | None]) -> None:
        if not changed:
            return
        try:
            self._sql.execute("BEGIN IMMEDIATE")
            for (cls, ref), row in changed.items():
                if row is None:
                    self._sql.execute("DELETE FROM object WHERE ref = ?", (ref,))
                else:
                    text = json.dumps({name: value for name, value in row.items() if name != "current_operations"})
                    self._sql.execute(
                        "INSERT INTO object VALUES (?, ?, ?, ?)"
                        " ON CONFLICT (ref) DO UPDATE SET uuid = excluded.uuid, fields = excluded.fields",
                        (ref, cls, row["uuid"], text),
                    )
            self._sql.execute("INSERT OR REPLACE INTO meta VALUES ('generation', ?)", (str(self.generation + 1),))
            self._sql.execute("COMMIT")
        except sqlite3.Error as error:
            if self._sql.in_transaction:
                self._sql.execute("ROLLBACK")
            raise internal_error(f"the database could not be written: {error}") from None

    def statistics(self) -> dict[str, int]:
        """Return the number of objects of each class and of commits so far."""
        return {"generation": self.generation, **{cls: len(rows) for cls, rows in self._rows.items() if rows}}

    def _check(self) -> None:
        """Compare memory with the file and with itself."""
        kept = {(cls, ref): json.loads(text) for ref, cls, text in self._sql.execute("SELECT ref, class, fields FROM object")}
        assert kept.keys() == {(cls, ref) for cls in CLASSES if cls not in TRANSIENT for ref in self._rows[cls]}
        for (cls, ref), row in kept.items():
            read = self._from_text(cls, json.dumps(row))
            assert {**self._rows[cls][ref], "current_operations": None} == {**read, "current_operations": None}
        for (owner, field), target in _POINTERS.items():
            for ref, row in self._rows[owner].items():
                assert row[field] == NULL or ref in self._pointers[owner, field, row[field]], (owner, ref, field, target)

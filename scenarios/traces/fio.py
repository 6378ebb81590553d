"""fio's I/O logs, versions 2 and 3.

Version 2 has no times but ``wait`` lines (microseconds); version 3 begins each line with microseconds since the start of
the job. Neither says how long a request took. Files become devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from scenarios.traces.records import Format, Info, Lines, Record, in_order, sole

__all__ = ["FIO2", "FIO3"]

_HEAD = {2: "fio version 2 iolog", 3: "fio version 3 iolog"}
_OPS = {"read": "read", "write": "write", "sync": "flush", "datasync": "flush", "trim": "trim"}
_FILE_ACTIONS = ("add", "open", "close")
_NAMES = {"read": "read", "write": "write", "flush": "datasync", "trim": "trim"}


def _reader(version: int):
    def read(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
        return in_order(_records(Lines(sole(streams, source, f"fio{version}"), source), version))

    return read


def _records(lines: Lines, version: int) -> Iterator[Record]:
    now = 0
    seen = False
    for line in lines:
        if not seen:
            seen = True
            if line != _HEAD[version]:
                raise lines.bad(f"{line[:40]!r} is not {_HEAD[version]!r}")
            continue
        words = line.split()
        if version == 3:
            now = lines.number_of(words.pop(0), "time", 1000)
        if len(words) == 2 and words[1] in _FILE_ACTIONS:
            continue
        if len(words) == 2 and _OPS.get(words[1]) == "flush":
            words += ["0", "0"]
        if len(words) != 4:
            raise lines.bad(f"{line[:60]!r} is not {'TIME ' if version == 3 else ''}FILE ACTION OFFSET LENGTH")
        file, action, offset, length = words
        if action == "wait" and version == 2:
            now += lines.number_of(offset, "wait", 1000)
            continue
        op = lines.op_of(action, _OPS)
        where = (0, 0) if op == "flush" else (lines.number_of(offset, "offset"), lines.number_of(length, "length"))
        yield Record(now, op, *where, device=file)
    if not seen:
        raise lines.bad(f"empty; a log begins with {_HEAD[version]!r}")


def _writer(version: int):
    def write(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
        out.write((_HEAD[version] + "\n").encode())
        known: set[str] = set()
        now = skipped = 0
        for record in records:
            name = "".join(record.device.split()) or "disk"
            time = f"{record.issue_ns // 1000} " if version == 3 else ""
            if name not in known:
                known.add(name)
                out.write(f"{time}{name} add\n{time}{name} open\n".encode())
            if record.op not in _NAMES:
                skipped += 1
                continue
            if version == 2 and record.issue_ns // 1000 > now:
                out.write(f"{name} wait {record.issue_ns // 1000 - now} 0\n".encode())
                now = record.issue_ns // 1000
            out.write(f"{time}{name} {_NAMES[record.op]} {record.offset} {record.length}\n".encode())
        for name in sorted(known):
            out.write(f"{f'{now} ' if version == 3 else ''}{name} close\n".encode())
        return skipped

    return write


def _format(version: int) -> Format:
    head = _HEAD[version].encode()
    return Format(
        f"fio{version}",
        f"fio I/O log, version {version}",
        _reader(version),
        _writer(version),
        lambda start: start.startswith(head),
        frozenset({"flush", "trim"}),
    )


FIO2, FIO3 = _format(2), _format(3)

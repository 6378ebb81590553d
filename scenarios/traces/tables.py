"""Text formats with one request in a line: MSR Cambridge, Alibaba, SPC.

============  =====================================================================================================
MSR           ``Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime``: times in 100 ns, Windows' epoch
Alibaba 2020  ``device_id,opcode,offset,length,timestamp``: bytes and microseconds
SPC           ``ASU,LBA,Size,Opcode,Timestamp``: sectors of 512 bytes, bytes, seconds
============  =====================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from scenarios.traces.records import SECTOR_BYTES, Format, Info, Lines, Record, in_order, sole

__all__ = ["MSR", "ALIBABA", "SPC"]

_CENTURY = 100 * 365 * 86400 * 10**7
_FILETIME_2007 = 128166372000000000  # where our MSR traces begin: the format has absolute times


def _read_msr(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
    return in_order(_msr(Lines(sole(streams, source, "msr"), source)))


def _msr(lines: Lines) -> Iterator[Record]:
    first = None
    for line in lines:
        if lines.number == 1 and line.lower().startswith("timestamp,"):
            continue
        time, host, disk, op, offset, size, response = lines.fields_of(line, 7, "MSR")
        moment = lines.number_of(time, "timestamp")
        first = moment if first is None else first
        if moment - first > _CENTURY:
            raise lines.bad(f"timestamp {time[:40]!r} is more than a century after the first")
        yield Record(
            max(0, moment - first) * 100,
            lines.op_of(op, {"read": "read", "write": "write"}),
            lines.number_of(offset, "offset"),
            lines.number_of(size, "size"),
            lines.number_of(response, "response time", 100),
            device=f"{host}.{disk}",
        )


def _write_msr(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
    skipped = 0
    for record in records:
        if record.op not in ("read", "write") or record.latency_ns is None:
            skipped += 1
            continue
        host, _, disk = (_name(record.device) or "simsr.0").rpartition(".")
        time = _FILETIME_2007 + record.issue_ns // 100
        fields = (
            time,
            host or disk,
            disk if host else 0,
            record.op.title(),
            record.offset,
            record.length,
            record.latency_ns // 100,
        )
        out.write((",".join(map(str, fields)) + "\n").encode())
    return skipped


def _read_alibaba(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
    return in_order(_alibaba(Lines(sole(streams, source, "alibaba"), source)))


def _alibaba(lines: Lines) -> Iterator[Record]:
    first = None
    for line in lines:
        if lines.number == 1 and line.lower().startswith("device_id,"):
            continue
        device, op, offset, length, time = lines.fields_of(line, 5, "Alibaba")
        moment = lines.number_of(time, "timestamp", 1000)
        first = moment if first is None else first
        yield Record(
            max(0, moment - first),
            lines.op_of(op, {"r": "read", "w": "write"}),
            lines.number_of(offset, "offset"),
            lines.number_of(length, "length"),
            device=device,
        )


def _write_alibaba(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
    skipped = 0
    for record in records:
        if record.op not in ("read", "write"):
            skipped += 1
            continue
        fields = (_name(record.device) or 0, record.op[0].upper(), record.offset, record.length, record.issue_ns // 1000)
        out.write((",".join(map(str, fields)) + "\n").encode())
    return skipped


def _read_spc(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
    return in_order(_spc(Lines(sole(streams, source, "spc"), source)))


def _spc(lines: Lines) -> Iterator[Record]:
    first = None
    for line in lines:
        unit, sector, size, op, time = lines.fields_of(line, 5, "SPC")
        moment = lines.seconds_of(time, "timestamp")
        first = moment if first is None else first
        yield Record(
            max(0, moment - first),
            lines.op_of(op, {"r": "read", "w": "write"}),
            lines.number_of(sector, "LBA", SECTOR_BYTES),
            lines.number_of(size, "size"),
            device=unit,
        )


def _write_spc(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
    """Units are numbers; devices of other names get some, in the order in which they come."""
    skipped = 0
    units: dict[str, str] = {}
    for record in records:
        if record.op not in ("read", "write") or record.offset % SECTOR_BYTES:
            skipped += 1
            continue
        time = f"{record.issue_ns // 10**9}.{record.issue_ns % 10**9:09}"
        device = record.device
        unit = device if device.isascii() and device.isdigit() else units.setdefault(device, str(len(units)))
        fields = (unit, record.offset // SECTOR_BYTES, record.length, record.op[0], time)
        out.write((",".join(map(str, fields)) + "\n").encode())
    return skipped


def _name(device: str) -> str:
    """A device's name as a field of a table holds it."""
    return re.sub(r"[,\s]+", "_", device)


def _like(pattern: str):
    compiled = re.compile(pattern.encode(), re.IGNORECASE)
    return lambda head: bool(compiled.match(head))


MSR = Format(
    "msr",
    "MSR Cambridge (SNIA), CSV",
    _read_msr,
    _write_msr,
    _like(r"(timestamp,hostname,|\d{15,20},[^,\n]*,\d+,\s*(read|write)\s*,)"),
    frozenset({"latency"}),
)
ALIBABA = Format(
    "alibaba",
    "Alibaba block traces 2020, CSV",
    _read_alibaba,
    _write_alibaba,
    _like(r"(device_id,opcode|[^,\n]*,\s*[rw]\s*,\s*\d+\s*,)"),
    frozenset(),
)
SPC = Format("spc", "UMass / SPC, CSV", _read_spc, _write_spc, _like(r"\s*\d+\s*,\s*\d+\s*,\s*\d+\s*,\s*[rw]\s*,"), frozenset())

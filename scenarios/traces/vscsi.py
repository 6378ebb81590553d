"""CloudPhysics' vscsi traces, versions 1 and 2: little-endian records of SCSI commands, times in microseconds.

Version 2 has the response time. The version is the high byte of ``ver``. Commands that move no data of a disk are passed over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from scenarios.traces.records import SECTOR_BYTES, Format, Info, Record, in_order, records_of, sole
from simsr.errors import BadTrace

__all__ = ["VSCSI1", "VSCSI2"]

_V1 = struct.Struct("<IIIHHQQ")
_V2 = struct.Struct("<HHIIIQQQ")
_COMMANDS = {
    **dict.fromkeys((0x08, 0x28, 0xA8, 0x88), "read"),
    **dict.fromkeys((0x0A, 0x2A, 0xAA, 0x8A), "write"),
    **dict.fromkeys((0x35, 0x91), "flush"),
    **dict.fromkeys((0x41, 0x93), "zero"),
    0x42: "trim",
}
_OPCODES = {"read": 0x88, "write": 0x8A, "flush": 0x91, "zero": 0x93, "trim": 0x42}


def _fields(version: int, raw: bytes) -> tuple[int, int, int, int, int, int | None]:
    """(ver, cmd, len, lbn, ts, rt)."""
    if version == 1:
        _, length, _, command, ver, sector, time = _V1.unpack(raw)
        return ver, command, length, sector, time, None
    command, ver, _, length, _, sector, time, response = _V2.unpack(raw)
    return ver, command, length, sector, time, response


def _reader(version: int, layout: struct.Struct):
    def records(stream: BinaryIO, source: str) -> Iterator[Record]:
        first = None
        for at, raw in records_of(stream, layout.size, source):
            ver, command, length, sector, time, response = _fields(version, raw)
            if ver >> 8 != version:
                raise BadTrace(source=source, where=f"byte {at}", reason=f"version {ver >> 8} is not {version}")
            if sector >= 1 << 54 or time >= 1 << 53 or (response or 0) >= 1 << 53:
                raise BadTrace(source=source, where=f"byte {at}", reason="sector or time is out of all bounds")
            first = time if first is None else first
            op = _COMMANDS.get(command)
            if op is not None:
                where = (0, 0) if op == "flush" else (sector * SECTOR_BYTES, length)
                yield Record(max(0, time - first) * 1000, op, *where, None if response is None else response * 1000)

    return lambda streams, source: in_order(records(sole(streams, source, f"vscsi{version}"), source))


def _writer(version: int):
    def write(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
        skipped = 0
        for number, record in enumerate(records, 1):
            lost = version == 2 and record.latency_ns is None or record.offset % SECTOR_BYTES or record.length > 0xFFFFFFFF
            if lost:
                skipped += 1
                continue
            sector, time, serial = record.offset // SECTOR_BYTES, record.issue_ns // 1000, number & 0xFFFFFFFF
            command = _OPCODES[record.op]
            if version == 1:
                out.write(_V1.pack(serial, record.length, 1, command, 1 << 8, sector, time))
            else:
                out.write(_V2.pack(command, 2 << 8, serial, record.length, 1, sector, time, record.latency_ns // 1000))
        return skipped

    return write


def _fits(version: int):
    layout = _V1 if version == 1 else _V2

    def fits(head: bytes) -> bool:
        raws = [head[at : at + layout.size] for at in range(0, min(len(head), 4 * layout.size), layout.size)]
        whole = [_fields(version, raw) for raw in raws if len(raw) == layout.size]
        return bool(whole) and all(fields[0] >> 8 == version and fields[1] < 0x100 for fields in whole)

    return fits


_OPS = frozenset({"flush", "trim", "zero"})
VSCSI1 = Format("vscsi1", "CloudPhysics vscsi, version 1", _reader(1, _V1), _writer(1), _fits(1), _OPS)
VSCSI2 = Format("vscsi2", "CloudPhysics vscsi, version 2", _reader(2, _V2), _writer(2), _fits(2), _OPS | {"latency"})

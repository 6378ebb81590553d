"""Our own format: a line that says what the trace is, then 40 bytes for each request. It keeps everything a `Record` has.

    simsr-trace 1 {"device_bytes": ..., "block_bytes": ..., "clock": ..., "anonymised": ..., "device": ...}
    issue_ns u64, offset u64, length u32, op u8, flags u8, error u16, latency_ns u64, depth u64      (little-endian)

All bits set means "unknown" in ``latency_ns`` and ``depth``. Flag 1 is FUA. A file that ends within a record was cut off
while it was recorded; that is an error with the place, so what is before it can be kept.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from scenarios.traces.records import LINE_BYTES_MAX, TRACE_OPS, Format, Info, Record, in_order, records_of, sole
from simsr.errors import BadTrace

__all__ = ["OWN", "Recorder", "read_info"]

_MAGIC = b"simsr-trace 1 "
_RECORD = struct.Struct("<QQIBBHQQ")
_UNKNOWN = (1 << 64) - 1
_NUMBERS = {op: number for number, op in enumerate(TRACE_OPS)}
_FUA = 1


class Recorder:
    """Writes a trace as it happens. All records are of one device."""

    def __init__(self, out: BinaryIO, info: Info = Info(), device: str = "") -> None:
        self._out = out
        self.count = 0
        out.write(_MAGIC + json.dumps({**info._asdict(), "device": device}).encode() + b"\n")

    def add(self, record: Record) -> None:
        latency = _UNKNOWN if record.latency_ns is None else record.latency_ns
        depth = _UNKNOWN if record.depth is None else record.depth
        flags = _FUA if record.fua else 0
        error = min(record.error, 0xFFFF)
        self._out.write(
            _RECORD.pack(
                record.issue_ns,
                record.offset,
                min(record.length, 0xFFFFFFFF),
                _NUMBERS[record.op],
                flags,
                error,
                latency,
                depth,
            )
        )
        self.count += 1


def read_info(stream: BinaryIO, source: str) -> tuple[Info, str]:
    """The first line: (info, device). Leaves the stream at the first record."""
    line = stream.readline(LINE_BYTES_MAX)
    try:
        if not line.startswith(_MAGIC) or not line.endswith(b"\n"):
            raise ValueError(f"it is not {_MAGIC.decode()}{{...}}")
        head = json.loads(line[len(_MAGIC) :])
        device = head.pop("device", "")
        info = Info(**head)
        if not all(type(value) is type(default) for value, default in zip(info, Info(), strict=True)) or not isinstance(
            device, str
        ):
            raise TypeError("a value is of the wrong kind")
    except (ValueError, TypeError, AttributeError) as error:
        raise BadTrace(source=source, where="line 1", reason=f"the head cannot be read: {error}") from None
    return info, device


def _read(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
    return in_order(_records(sole(streams, source, "simsr"), source))


def _records(stream: BinaryIO, source: str) -> Iterator[Record]:
    _, device = read_info(stream, source)
    for at, raw in records_of(stream, _RECORD.size, source):
        issue, offset, length, op, flags, error, latency, depth = _RECORD.unpack(raw)
        if op >= len(TRACE_OPS) or flags & ~_FUA:
            raise BadTrace(
                source=source, where=f"record {at // _RECORD.size + 1}", reason=f"operation {op}, flags {flags} are not known"
            )
        yield Record(
            issue,
            TRACE_OPS[op],
            offset,
            length,
            None if latency == _UNKNOWN else latency,
            error,
            bool(flags & _FUA),
            None if depth == _UNKNOWN else depth,
            device,
        )


def _write(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
    """Of a trace with several devices only the first is written: the format is for one."""
    recorder = None
    skipped, device = 0, ""
    for record in records:
        if recorder is None:
            recorder, device = Recorder(out, info, record.device), record.device
        if record.device != device or record.length > 0xFFFFFFFF:
            skipped += 1
            continue
        recorder.add(record)
    if recorder is None:
        Recorder(out, info)
    return skipped


OWN = Format(
    "simsr",
    "our own format",
    _read,
    _write,
    lambda head: head.startswith(_MAGIC),
    frozenset({"latency", "flush", "trim", "zero", "fua", "error", "depth"}),
)

"""Our own format: a line that says what the trace is, then 40 bytes for each request. It keeps everything a `Record` has.

    simsr-trace 1 {"device_bytes": ..., "block_bytes": ..., "clock": ..., "anonymised": ..., "device": ...}
    issue_ns u64, offset u64, length u32, op u8, flags u8, error u16, latency_ns u64, depth u32, client u32      (little-endian)

All bits set means "unknown" in ``latency_ns`` and ``depth``. Flag 1 is FUA. Clients are numbered from 1 on; 0 is nobody in particular. Two
values of ``op`` are no requests: 255 names the client of that number (the 35 bytes around ``op``, in UTF-8, filled up with zeros; again for
longer names), 254 says that from ``issue_ns`` on ``offset`` requests were made that are not in the trace.

A file that ends within a record was cut off while it was recorded; that is an error with the place, so what is before it can be kept.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from scenarios.traces.records import LINE_BYTES_MAX, TRACE_OPS, Format, Info, Record, in_order, records_of, sole
from simsr.errors import BadTrace

__all__ = ["OWN", "RECORD_BYTES", "Encoder", "Recorder", "count", "count_lost", "read_info"]

_MAGIC = b"simsr-trace 1 "
_RECORD = struct.Struct("<QQIBBHQII")
_NAME = struct.Struct("<20sB15sI")
RECORD_BYTES = _RECORD.size
_OP_AT = 20
_UNKNOWN = (1 << 64) - 1
_UNKNOWN_DEPTH = (1 << 32) - 1
_NUMBERS = {op: number for number, op in enumerate(TRACE_OPS)}
_CLIENT, _LOST = 255, 254
_FUA = 1


class Encoder:
    """Turns the records of one device into bytes. A trace is ``head``, then what the methods return, in that order."""

    def __init__(self, info: Info = Info(), device: str = "") -> None:
        self.head = _MAGIC + json.dumps({**info._asdict(), "device": device}).encode() + b"\n"
        self._clients: dict[str, int] = {"": 0}

    def encode(self, record: Record) -> bytes:
        number = self._clients.get(record.client)
        if number is None:
            return self._name(record.client) + self.encode(record)
        return _RECORD.pack(
            record.issue_ns,
            record.offset,
            min(record.length, 0xFFFFFFFF),
            _NUMBERS[record.op],
            _FUA if record.fua else 0,
            min(record.error, 0xFFFF),
            _UNKNOWN if record.latency_ns is None else record.latency_ns,
            _UNKNOWN_DEPTH if record.depth is None else min(record.depth, _UNKNOWN_DEPTH - 1),
            number,
        )

    def _name(self, client: str) -> bytes:
        number = self._clients[client] = len(self._clients)
        name = client.encode(errors="replace")
        return b"".join(_NAME.pack(name[at : at + 20], _CLIENT, name[at + 20 : at + 35], number) for at in range(0, len(name), 35))

    @staticmethod
    def lost(since_ns: int, count: int) -> bytes:
        """Say that ``count`` requests are missing from ``since_ns`` on."""
        return _RECORD.pack(since_ns, count, 0, _LOST, 0, 0, 0, 0, 0)


class Recorder:
    """Writes a trace as it happens. All records are of one device."""

    def __init__(self, out: BinaryIO, info: Info = Info(), device: str = "") -> None:
        self._out, self._encoder = out, Encoder(info, device)
        self.count = 0
        out.write(self._encoder.head)

    def add(self, record: Record) -> None:
        self._out.write(self._encoder.encode(record))
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


def count(raw: bytes) -> tuple[int, int]:
    """(requests, requests lost) in whole records of the format."""
    ops = raw[_OP_AT::RECORD_BYTES]
    lost = sum(_RECORD.unpack_from(raw, at * RECORD_BYTES)[1] for at, op in enumerate(ops) if op == _LOST) if _LOST in ops else 0
    return len(ops) - ops.count(_LOST) - ops.count(_CLIENT), lost


def count_lost(stream: BinaryIO, source: str) -> int:
    """How many requests the trace itself says are missing. Reads it whole. Raises `BadTrace`."""
    read_info(stream, source)
    return sum(count(raw)[1] for _, raw in records_of(stream, RECORD_BYTES, source))


def _read(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
    return in_order(_records(sole(streams, source, "simsr"), source))


def _records(stream: BinaryIO, source: str) -> Iterator[Record]:
    _, device = read_info(stream, source)
    clients: dict[int, bytes] = {}
    for at, raw in records_of(stream, RECORD_BYTES, source):
        issue, offset, length, op, flags, error, latency, depth, client = _RECORD.unpack(raw)
        if op == _CLIENT:
            clients[client] = clients.get(client, b"") + (raw[:_OP_AT] + raw[_OP_AT + 1 : -4]).rstrip(b"\0")
            continue
        if op == _LOST:
            continue
        if op >= len(TRACE_OPS) or flags & ~_FUA:
            raise BadTrace(
                source=source, where=f"record {at // RECORD_BYTES + 1}", reason=f"operation {op}, flags {flags} are not known"
            )
        yield Record(
            issue,
            TRACE_OPS[op],
            offset,
            length,
            None if latency == _UNKNOWN else latency,
            error,
            bool(flags & _FUA),
            None if depth == _UNKNOWN_DEPTH else depth,
            device,
            clients.get(client, b"").decode(errors="replace"),
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
    frozenset({"latency", "flush", "trim", "zero", "fua", "error", "depth", "client"}),
)

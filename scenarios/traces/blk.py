"""The kernel's block traces: blktrace's binary records, and the text that blkparse makes of them.

Both are events: a request is queued (Q), issued to the device (D), completed (C). A record is made of D and its C; where
a trace has no D, of Q and C. A write that carries a flush before it becomes a flush and a write; one without data, a flush.

blktrace writes one file for each CPU, and a request may complete on another one: hand in all of them.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush, merge
from itertools import chain, islice
from typing import BinaryIO, NamedTuple

from scenarios.traces.records import SECTOR_BYTES, Format, Info, Lines, Record, in_order, sole
from simsr.errors import BadTrace

__all__ = ["BLKTRACE", "BLKPARSE"]

_MAGIC = 0x65617407
_HEADER = "IIQQIIIIIHH"
_HEADER_BYTES = 48
_ACTIONS = {1: "Q", 7: "D", 8: "C"}
_NUMBERS = {name: number for number, name in _ACTIONS.items()}
_READ, _WRITE, _FLUSH, _NOTIFY, _DISCARD, _FUA = 1 << 16, 1 << 17, 1 << 18, 1 << 26, 1 << 29, 1 << 31
_CATEGORY = {"Q": 1 << 20, "D": 1 << 22, "C": 1 << 23}
_LOOK_AHEAD = 4096
_PENDING_MAX = 1 << 16
_CATEGORIES_OF = {"read": _READ, "write": _WRITE, "trim": _WRITE | _DISCARD, "flush": _FLUSH}

_LINE = re.compile(
    r"\s*(?P<device>\d+,\d+)\s+\d+\s+\d+\s+(?P<time>\d+\.\d+)\s+\d+\s+(?P<action>[A-Za-z]+)\s+(?P<rwbs>[A-Z]+)"
    r"(?:\s+(?P<sector>\d+)(?:\s+\+\s+(?P<count>\d+))?)?(?:\s+[\[(](?P<tail>.*)[\])])?(?:\s.*)?"
)
_EVENT = re.compile(r"\s*\d+,\d+\s")
_SUMMARY = re.compile(
    r"(CPU\d+|Total|Throughput|Events|Skips|Input file|\s*(Reads|Writes|Read|Write|PC|IO|Allocation|Merge)\b)"
)


class _Event(NamedTuple):
    time_ns: int
    action: str
    device: str
    op: str
    offset: int
    length: int
    flushes: bool = False
    fua: bool = False
    error: int = 0


def _paired(events: Iterable[_Event]) -> Iterator[Record]:
    """Put issues and completions together. Requests that never complete have no latency."""
    events = iter(events)
    head = list(islice(events, _LOOK_AHEAD))
    begins = "D" if any(event.action == "D" for event in head) else "Q"
    pending: OrderedDict[int, Record] = OrderedDict()
    waiting: dict[tuple[str, str, int], list[int]] = {}
    first = head[0].time_ns if head else 0
    number = 0
    for event in chain(head, events):
        key = event.device, event.op, event.offset
        time = max(0, event.time_ns - first)
        if event.action == begins:
            if event.flushes and event.length:
                pending[number] = Record(time, "flush", device=event.device)
                number += 1
            elif event.flushes:  # an fsync with nothing to write
                event = event._replace(op="flush")
            pending[number] = Record(time, event.op, event.offset, event.length, fua=event.fua, device=event.device)
            waiting.setdefault(key, []).append(number)
            number += 1
        elif event.action == "C" and (numbers := waiting.get(key)):
            at = numbers.pop(0)
            if not numbers:
                del waiting[key]
            if at in pending:
                pending[at] = pending[at]._replace(latency_ns=max(0, time - pending[at].issue_ns), error=event.error)
        while len(pending) > _PENDING_MAX:
            yield pending.popitem(last=False)[1]
    yield from pending.values()


def _read_blkparse(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
    return in_order(_paired(_parsed(Lines(sole(streams, source, "blkparse"), source))))


def _parsed(lines: Lines) -> Iterator[_Event]:
    for line in lines:
        if not _EVENT.match(line):
            if _SUMMARY.match(line):
                continue
            raise lines.bad(f"{line[:60]!r} is not an event of blkparse (DEV CPU SEQ TIME PID ACTION RWBS SECTOR + COUNT)")
        match = _LINE.fullmatch(line)
        if not match:
            if re.match(r"\s*\S+\s+\d+\s+\d+\s+\S+\s+\d+\s+(m|P|U|UT)\b", line):
                continue  # messages and plugs have no request
            raise lines.bad(f"{line[:60]!r} lacks a part of DEV CPU SEQ TIME PID ACTION RWBS SECTOR + COUNT")
        if match["action"] not in _NUMBERS:
            continue
        op, flushes, fua = _rwbs(match["rwbs"])
        if op is None:
            continue
        sector, count = match["sector"] or "0", match["count"] or "0"
        error = match["tail"] if match["action"] == "C" and (match["tail"] or "").lstrip("-").isdigit() else "0"
        yield _Event(
            lines.seconds_of(match["time"], "time"),
            match["action"],
            match["device"],
            op,
            0 if op == "flush" else lines.number_of(sector, "sector", SECTOR_BYTES),
            0 if op == "flush" else lines.number_of(count, "count", SECTOR_BYTES),
            flushes,
            fua,
            lines.number_of(error.lstrip("-"), "error"),
        )


def _rwbs(text: str) -> tuple[str | None, bool, bool]:
    """(operation, flush before, FUA). The F before the operation is a flush, the one behind it is FUA."""
    flushes = text.startswith("F")
    rest = text[1:] if flushes else text
    op = {"R": "read", "W": "write", "D": "trim"}.get(rest[:1])
    if op is None:
        return ("flush" if flushes else None), False, False
    return op, flushes, "F" in rest[1:]


def _write_blkparse(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
    written = _Written(records)
    for sequence, event in enumerate(written.events(), 1):
        major_minor = event.device if re.fullmatch(r"\d+,\d+", event.device) else "8,0"
        time = f"{event.time_ns // 10**9}.{event.time_ns % 10**9:09}"
        rwbs = {"read": "R", "write": "W", "trim": "D", "flush": "FN"}[event.op] + ("F" if event.fua else "")
        rwbs = "F" + rwbs if event.flushes else rwbs
        where = "" if event.op == "flush" else f" {event.offset // SECTOR_BYTES} + {event.length // SECTOR_BYTES}"
        tail = f"[{event.error}]" if event.action == "C" else "[simsr]"
        out.write(
            f"{major_minor:>5} {0:>4} {sequence:>8} {time:>14} {1:>5} {event.action:>2} {rwbs:>3}{where} {tail}\n".encode()
        )
    return written.skipped


class _Written:
    """The events of records, in order of time; counts what a block trace cannot hold."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records, self.skipped = records, 0

    def events(self) -> Iterator[_Event]:
        later: list[tuple[int, int, _Event]] = []
        for number, (record, flushes) in enumerate(self._merged()):
            if (
                record.op not in _CATEGORIES_OF
                or record.offset % SECTOR_BYTES
                or record.length % SECTOR_BYTES
                or _is_huge(record)
            ):
                self.skipped += 1
                continue
            while later and later[0][0] <= record.issue_ns:
                yield heappop(later)[2]
            issue = _Event(record.issue_ns, "D", record.device, record.op, record.offset, record.length, flushes, record.fua)
            yield issue
            if record.latency_ns is not None:
                done = record.issue_ns + record.latency_ns
                heappush(later, (done, number, issue._replace(time_ns=done, action="C", error=record.error)))
        while later:
            yield heappop(later)[2]

    def _merged(self) -> Iterator[tuple[Record, bool]]:
        """(record, whether it flushes first): a flush that never completes and a write at the same moment were one request."""
        held: Record | None = None
        for record in self._records:
            joins = held is not None and record.op == "write"
            joins = joins and (record.issue_ns, record.device) == (held.issue_ns, held.device)
            if held is not None and not joins:
                yield held, False
            held = None
            if record.op == "flush" and record.latency_ns is None:
                held = record
            else:
                yield record, joins
        if held is not None:
            yield held, False


def _is_huge(record: Record) -> bool:
    """More than the fields of a record of blktrace hold."""
    return record.length >= 1 << 32 or record.issue_ns + (record.latency_ns or 0) >= 1 << 63


def _read_blktrace(streams: Sequence[BinaryIO], source: str) -> Iterator[Record]:
    names = [source] if len(streams) == 1 else [f"{source} (file {number})" for number in range(1, len(streams) + 1)]
    files = [_sorted(_binary(stream, name)) for stream, name in zip(streams, names, strict=True)]
    return in_order(_paired(merge(*files, key=lambda event: event.time_ns)))


def _sorted(events: Iterator[_Event]) -> Iterator[_Event]:
    """A file of one CPU is nearly in order: buffers may be swapped."""
    heap: list[tuple[int, int, _Event]] = []
    for number, event in enumerate(events):
        heappush(heap, (event.time_ns, number, event))
        if len(heap) > _LOOK_AHEAD:
            yield heappop(heap)[2]
    while heap:
        yield heappop(heap)[2]


def _binary(stream: BinaryIO, source: str) -> Iterator[_Event]:
    order = ""
    at = 0
    while head := stream.read(_HEADER_BYTES):
        if len(head) < _HEADER_BYTES:
            raise BadTrace(
                source=source, where=f"byte {at}", reason=f"the last record has {len(head)} of {_HEADER_BYTES} bytes"
            )
        if not order:
            order = next((sign for sign in "<>" if struct.unpack_from(sign + "I", head)[0] == _MAGIC), "")
        fields = struct.unpack((order or "<") + _HEADER, head)
        magic, _, time, sector, length, action, _, device, _, error, extra = fields
        if magic != _MAGIC:
            raise BadTrace(
                source=source, where=f"byte {at}", reason=f"magic {magic:#x} is not {_MAGIC:#x} (blktrace version 7)"
            )
        if len(stream.read(extra)) < extra:
            raise BadTrace(source=source, where=f"byte {at}", reason=f"the record's {extra} bytes of extra data are cut short")
        at += _HEADER_BYTES + extra
        name, op = _ACTIONS.get(action & 0xFFFF), _op_of(action)
        if name is None or op is None or action & _NOTIFY:
            continue
        if sector >= 1 << 54:
            raise BadTrace(
                source=source, where=f"byte {at - _HEADER_BYTES - extra}", reason=f"sector {sector} is beyond any disk"
            )
        where = (0, 0) if op == "flush" else (sector * SECTOR_BYTES, length)
        flushes = bool(action & _FLUSH) and op != "flush"
        yield _Event(time, name, f"{device >> 20},{device & 0xFFFFF}", op, *where, flushes, bool(action & _FUA), error)


def _op_of(action: int) -> str | None:
    if action & _DISCARD:
        return "trim"
    if action & _WRITE:
        return "write"
    if action & _READ:
        return "read"
    return "flush" if action & _FLUSH else None


def _write_blktrace(records: Iterable[Record], out: BinaryIO, info: Info) -> int:
    written = _Written(records)
    for sequence, event in enumerate(written.events(), 1):
        major, _, minor = event.device.partition(",") if re.fullmatch(r"\d{1,4},\d{1,6}", event.device) else ("8", "", "0")
        action = _NUMBERS[event.action] | _CATEGORY[event.action] | _CATEGORIES_OF[event.op]
        action |= (_FUA if event.fua else 0) | (_FLUSH if event.flushes else 0)
        device = (int(major) << 20 | int(minor)) & 0xFFFFFFFF
        fields = (
            _MAGIC,
            sequence,
            event.time_ns,
            event.offset // SECTOR_BYTES,
            event.length,
            action,
            1,
            device,
            0,
            event.error & 0xFFFF,
            0,
        )
        out.write(struct.pack("<" + _HEADER, *fields))
    return written.skipped


_KEEPS = frozenset({"latency", "flush", "trim", "fua", "error"})
BLKPARSE = Format(
    "blkparse",
    "text output of blkparse",
    _read_blkparse,
    _write_blkparse,
    lambda head: bool(re.match(rb"\s*\d+,\d+\s+\d+\s+\d+\s+\d+\.\d+\s", head)),
    _KEEPS,
)
BLKTRACE = Format(
    "blktrace",
    "binary output of blktrace, version 7",
    _read_blktrace,
    _write_blktrace,
    lambda head: head[:4] in (struct.pack("<I", _MAGIC), struct.pack(">I", _MAGIC)),
    _KEEPS,
)

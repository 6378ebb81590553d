"""Traces: what every format is turned into, and the table of formats.

A `Record` is one request: when it was issued (from the beginning of the trace), what it was, and how long it took if the
trace knows. A format is a reader (binary stream -> records), perhaps a writer, and a test on the first bytes. Streams are
handed in; nothing is opened here. Bad input raises `BadTrace` with the line or byte, and the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Any, BinaryIO, NamedTuple

from simsr.errors import BadTrace

__all__ = ["Record", "Info", "Format", "Lines", "in_order", "records_of", "TRACE_OPS", "SECTOR_BYTES", "LINE_BYTES_MAX"]

TRACE_OPS = ("read", "write", "flush", "trim", "zero")
SECTOR_BYTES = 512
LINE_BYTES_MAX = 1 << 16
_NUMBER_MAX = 1 << 63
_ORDER_WINDOW = 4096


class Record(NamedTuple):
    """One request. ``latency_ns`` and ``depth`` (requests in service when it came) are None where the trace does not say, or where the
    request was never answered. ``client``: who asked."""

    issue_ns: int
    op: str
    offset: int = 0
    length: int = 0
    latency_ns: int | None = None
    error: int = 0
    fua: bool = False
    depth: int | None = None
    device: str = ""
    client: str = ""


class Info(NamedTuple):
    """What a trace says of itself. Only our own format keeps it."""

    device_bytes: int = 0
    block_bytes: int = 512
    clock: str = "relative"
    anonymised: str = "none"


class Format(NamedTuple):
    """``keeps``: what survives writing and reading, of ("latency", "flush", "trim", "zero", "fua", "error", "depth", "client")."""

    name: str
    about: str
    read: Callable[[Sequence[BinaryIO], str], Iterator[Record]]
    write: Callable[[Iterable[Record], BinaryIO, Info], int]
    fits: Callable[[bytes], bool]
    keeps: frozenset[str]


class Lines:
    """The lines of a text trace, numbered, and the errors that name them."""

    def __init__(self, stream: BinaryIO, source: str) -> None:
        self._stream, self.source, self.number = stream, source, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(LINE_BYTES_MAX):
            self.number += 1
            if len(line) == LINE_BYTES_MAX:
                raise self.bad(f"longer than {LINE_BYTES_MAX} bytes; this is no text")
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
                raise self.bad("not text in UTF-8") from None
            if text:
                yield text

    def bad(self, reason: str) -> BadTrace:
        return BadTrace(source=self.source, where=f"line {self.number}", reason=reason)

    def number_of(self, text: str, what: str, scale: int = 1) -> int:
        """A whole number of a field."""
        text = text.strip()
        if not text.isascii() or not text.isdigit() or len(text) > 20 or int(text) * scale >= _NUMBER_MAX:
            raise self.bad(f"{what} {text[:40]!r} is not a number below 2**63")
        return int(text) * scale

    def seconds_of(self, text: str, what: str) -> int:
        """Nanoseconds of a decimal number of seconds, without rounding errors."""
        whole, _, fraction = text.strip().partition(".")
        if fraction and (not fraction.isascii() or not fraction.isdigit()):
            raise self.bad(f"{what} {text[:40]!r} is not a number of seconds")
        return self.number_of(whole or "0", what, 10**9) + int(fraction[:9].ljust(9, "0") or 0)

    def fields_of(self, line: str, count: int, what: str) -> list[str]:
        """The fields between commas."""
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != count:
            raise self.bad(f"{len(fields)} fields, where {what} has {count}")
        return fields

    def op_of(self, text: str, ops: dict[str, str]) -> str:
        op = ops.get(text.strip().lower())
        if op is None:
            raise self.bad(f"operation {text[:40]!r} is not one of {', '.join(ops)}")
        return op


def in_order(records: Iterable[Record], window: int = _ORDER_WINDOW) -> Iterator[Record]:
    """Sort by time of issue. Formats are nearly sorted; what comes more than ``window`` records late stays late."""
    heap: list[tuple[int, int, Record]] = []
    for number, record in enumerate(records):
        heappush(heap, (record.issue_ns, number, record))
        if len(heap) > window:
            yield heappop(heap)[2]
    while heap:
        yield heappop(heap)[2]


def records_of(stream: BinaryIO, size: int, source: str) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of records of one size. A last one that is cut short is an error."""
    offset = 0
    while chunk := stream.read(size * 1024):
        while len(chunk) % size and (more := stream.read(size - len(chunk) % size)):
            chunk += more
        if len(chunk) % size:
            where = offset + len(chunk) - len(chunk) % size
            raise BadTrace(
                source=source, where=f"byte {where}", reason=f"the last record has {len(chunk) % size} of {size} bytes"
            )
        for at in range(0, len(chunk), size):
            yield offset + at, chunk[at : at + size]
        offset += len(chunk)


def sole(streams: Sequence[BinaryIO], source: str, name: str) -> BinaryIO:
    """The one stream of formats that have one file."""
    if len(streams) != 1:
        raise BadTrace(source=source, where="its files", reason=f"a trace in format {name} is one file, not {len(streams)}")
    return streams[0]


def statistics(records: Iterable[Record]) -> dict[str, Any]:
    """What is in a trace, in one pass."""
    counts: dict[str, int] = dict.fromkeys(TRACE_OPS, 0)
    first = last = end = 0
    timed = total = 0
    for record in records:
        first = record.issue_ns if not total else first
        total += 1
        counts[record.op] += 1
        last, end = max(last, record.issue_ns), max(end, record.offset + record.length)
        timed += record.latency_ns is not None
    return {"requests": total, **counts, "with_latency": timed, "duration_ns": last - first, "end_bytes": end}

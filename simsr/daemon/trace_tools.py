"""Traces for those who have them as files or streams: what is in one, and turning one into another format. No daemon is needed."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedReader, RawIOBase
from typing import Any, BinaryIO

from scenarios.quantities import parse_duration
from scenarios.traces import FORMATS, Converted, Info, Record, convert, format_of
from scenarios.traces import read as read_trace
from scenarios.traces.own import RECORD_BYTES, count, count_lost
from scenarios.traces.records import TRACE_OPS
from simsr.daemon.trace_files import TraceFiles
from simsr.errors import BadRequest

__all__ = ["FORMAT_NAMES", "check_format", "convert_stream", "convert_file", "duration_s", "Fetched", "summary"]

FORMAT_NAMES = tuple(FORMATS)
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def duration_s(text: str) -> float:
    """Seconds of a duration such as 5ms or 3h. Raises `BadRequest`."""
    try:
        return parse_duration(text) / 1e9
    except ValueError:
        raise BadRequest(what=f"the time {text!r}", reason="it must be a duration such as 250us, 3ms, 12s or 10m") from None


def check_format(name: str) -> str:
    """Its name; ``own`` is ours. Raises `BadTrace`."""
    return format_of("simsr" if name == "own" else name).name


class Fetched:
    """A trace in our own format that comes in chunks, and what is in it so far: ``requests``, ``lost``."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._left, self._in_head = chunks, b"", True
        self.requests = self.lost = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._count(self._left + chunk)
            yield chunk

    def _count(self, data: bytes) -> None:
        if self._in_head:
            head, end, data = data.partition(b"\n")
            if not end:
                self._left = head
                return
            self._in_head = False
        whole = len(data) - len(data) % RECORD_BYTES
        requests, lost = count(data[:whole])
        self.requests += requests
        self.lost += lost
        self._left = data[whole:]


class _Chunks(RawIOBase):
    """A file to read from what comes in chunks."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._left = iter(chunks), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = chunk
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def convert_stream(chunks: Iterable[bytes], format: str, out: BinaryIO) -> Converted:
    """Write a trace in our own format, which comes in chunks, in another one."""
    return convert(read_trace(BufferedReader(_Chunks(chunks), 1 << 16), "simsr", "the recording"), format, out)


def convert_file(path: str, from_: str | None, to: str, out: BinaryIO, device: str | None = None) -> Converted:
    """Raises `BadTrace`."""
    files = TraceFiles(os.getcwd())
    info = Info(device_bytes=files.device_bytes(path, from_, device))
    return convert(files.records(path, from_, device), to, out, info)


def summary(path: str, format: str | None = None, device: str | None = None) -> dict[str, Any]:
    """What is in a trace. Memory: 16 bytes for each request. Raises `BadTrace`."""
    files = TraceFiles(os.getcwd())
    name = files.format_of(path, format)
    by_op = {op: _Op() for op in TRACE_OPS}
    devices: Counter[str] = Counter()
    clients: Counter[str] = Counter()
    first = last = end = depth_max = errors = fua = 0
    for number, record in enumerate(files.records(path, name, device)):
        first = record.issue_ns if not number else first
        last, end = max(last, record.issue_ns), max(end, record.offset + record.length)
        depth_max, errors, fua = max(depth_max, record.depth or 0), errors + bool(record.error), fua + record.fua
        devices[record.device] += 1
        clients[record.client] += bool(record.client)
        by_op[record.op].add(record)
    lost, device_bytes = 0, files.device_bytes(path, name, device)
    if name == "simsr":
        with open(path, "rb") as stream:
            lost = count_lost(stream, path)
    return {
        "trace": path, "format": name, "requests": devices.total(), "lost": lost, "duration_s": (last - first) / 1e9,
        "device_bytes": device_bytes or None, "end_bytes": end, "depth_max": depth_max, "errors": errors, "fua": fua,
        "devices": dict(devices), "clients": {name: count for name, count in clients.items() if count},
        "ops": {op: found.summary() for op, found in by_op.items() if found.sizes},
    }  # fmt: skip


class _Op:
    """The requests of one operation."""

    def __init__(self) -> None:
        self.sizes, self._times = array("q"), array("q")

    def add(self, record: Record) -> None:
        self.sizes.append(record.length)
        if record.latency_ns is not None:
            self._times.append(record.latency_ns)

    def summary(self) -> dict[str, Any]:
        return {
            "requests": len(self.sizes), "bytes": sum(self.sizes), "size": _percentiles(self.sizes),
            "with_latency": len(self._times), "latency_ns": _percentiles(self._times) if self._times else None,
        }  # fmt: skip


def _percentiles(values: array) -> dict[str, int]:
    found = sorted(values)
    shares = {name: found[min(len(found) - 1, int(share * len(found)))] for name, share in _SHARES.items()}
    return {"min": found[0], **shares, "max": found[-1]}

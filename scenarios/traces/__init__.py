"""Recorded traces: reading, writing and converting them (`read`, `convert`), and replaying them (`workload`, `service_times`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from scenarios.suggest import did_you_mean
from scenarios.traces.blk import BLKPARSE, BLKTRACE
from scenarios.traces.fio import FIO2, FIO3
from scenarios.traces.own import OWN
from scenarios.traces.records import Format, Info, Record
from scenarios.traces.tables import ALIBABA, MSR, SPC
from scenarios.traces.vscsi import VSCSI1, VSCSI2
from simsr.errors import BadTrace

__all__ = ["FORMATS", "HEAD_BYTES", "Converted", "Info", "Record", "convert", "detect", "format_of", "read"]

FORMATS: dict[str, Format] = {
    format.name: format for format in (OWN, FIO3, FIO2, BLKTRACE, BLKPARSE, MSR, VSCSI2, VSCSI1, SPC, ALIBABA)
}
"""In the order in which `detect` tries them: the strictest tests first."""

DEVICES_NAMED_MAX = 8

HEAD_BYTES = 4096
"""How much of a trace `detect` wants to see."""


class Converted(NamedTuple):
    """``skipped``: records that the format cannot hold."""

    written: int
    skipped: int


def detect(head: bytes, source: str = "trace") -> str:
    """The name of the format of a trace that begins with ``head``. Raises `BadTrace`."""
    for name, format in FORMATS.items():
        if format.fits(head):
            return name
    raise BadTrace(
        source=source, where="its beginning", reason=f"no format known begins like that; there are {', '.join(FORMATS)}"
    )


def format_of(name: str, source: str = "trace") -> Format:
    """Look up a format. Raises `BadTrace`."""
    if name not in FORMATS:
        raise BadTrace(source=source, where="its format", reason=f"{name!r} is not known; {did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def read(
    streams: BinaryIO | Sequence[BinaryIO], format: str, source: str = "trace", device: str | None = None
) -> Iterator[Record]:
    """The records of a trace in order of time, from its beginning; of one ``device`` only if given.

    Several streams only for blktrace, which writes one for each CPU. Raises `BadTrace` where it gets to the bad place.
    """
    files = list(streams) if isinstance(streams, Sequence) else [streams]
    records = format_of(format, source).read(files, source)
    return records if device is None else _of_device(records, device, source)


def _of_device(records: Iterable[Record], device: str, source: str) -> Iterator[Record]:
    """Those of one device. Raises `BadTrace` in the end if there were none."""
    others: set[str] = set()
    for record in records:
        if record.device == device:
            yield record
            others = {device}
        elif device not in others and len(others) < DEVICES_NAMED_MAX:
            others.add(record.device)
    if device not in others:
        raise BadTrace(source=source, where="its devices", reason=f"{device!r} is none of them; {did_you_mean(device, sorted(others) or ['none'])}")


def convert(records: Iterable[Record], format: str, out: BinaryIO, info: Info = Info()) -> Converted:
    """Write records in another format."""
    counter = _Counter(records)
    skipped = format_of(format).write(counter, out, info)
    return Converted(counter.count - skipped, skipped)


class _Counter:
    def __init__(self, records: Iterable[Record]) -> None:
        self._records, self.count = records, 0

    def __iter__(self) -> Iterator[Record]:
        for record in self._records:
            self.count += 1
            yield record

"""The log: one sequence of records, appended to the active segment.

Every record has the sequence number after its predecessor's and carries the predecessor's checksum, so the log is a
chain: nothing can be missing, doubled or exchanged in the middle without notice. The data blocks of a record lie in
the same segment, in order, at ``data_block``; they are written first, the record second, into a shared mapping, which
costs no system call. A record that is there therefore tells of data that were handed to the kernel before it, which is
all that is needed to survive the death of the process. Surviving a power cut takes a flush.

A flush (`begin_flush`, ``job.run()`` in a worker thread, `end_flush`) syncs the segments written since the last one;
any number of waiters can share it. ``durable_seq`` says how far the log is known to be on the disk; every record repeats
it, and a MARK record is added after a flush, so that recovery can tell a torn tail (all after the last flush) from
damage (something that had been flushed).

After an I/O error the log stops for good: the kernel may have marked pages clean that never reached the disk, so a
second fsync would succeed and lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simsr.errors import StoreStopped
from simsr.store import layout
from simsr.store.files import File
from simsr.store.segments import Segment, SegmentPool

__all__ = ["Log", "FlushJob", "Position", "KEEP_FOR_WRITES", "KEEP_FOR_CLEANING"]

KEEP_FOR_WRITES, KEEP_FOR_CLEANING = 4, 2
"""Spares that must be left when a segment is taken for data, or for survivors. Deleting and reverting may take the last. Every crash
leaves two segments half filled behind, so there is more than one of each."""


_OFTEN_RECORDS = 64
"""So many records after a flush are written by a system call each (`simsr.store.files.Area`)."""


@dataclass(frozen=True)
class Position:
    """A place in the log: after record ``seq``, in segment ``log_index`` at ``record_offset`` of its record area."""

    seq: int
    log_index: int
    record_offset: int
    prev_crc: int


@dataclass
class FlushJob:
    """What one flush has to sync. `run` blocks and touches only files: it belongs in a worker thread."""

    seq: int
    files: list[File]
    log: Log

    def run(self) -> None:
        try:
            for file in self.files:
                file.datasync()
        except OSError as error:
            self.log.stop(error)  # at once: another sync of the same file may succeed now, and nobody may believe it
            raise


class Log:
    """Appends records, rolls from segment to segment, knows what is durable."""

    def __init__(self, pool: SegmentPool, path: str, start: Position) -> None:
        self._pool = pool
        self._path = path
        self.seq = self.durable_seq = start.seq
        self._prev_crc = start.prev_crc
        self._next_log_index = start.log_index
        self.active: Segment | None = None
        self._unsynced: dict[Segment, None] = {}
        self.flush_needed_seq = start.seq  # the last record that is not a MARK
        self.syncs_headers = False  # see `roll`
        self.failure: str | None = None
        self.on_roll: Callable[[], None] | None = None  # told whenever a segment was filled
        self._records_at_flush = -_OFTEN_RECORDS
        self.blocks_appended = self.records_appended = self.record_bytes_appended = self.flushes = 0

    @property
    def position(self) -> Position:
        if self.active is None:
            return Position(self.seq, self._next_log_index, layout.HEADER_BYTES, self._prev_crc)
        return Position(self.seq, self.active.log_index, self.active.record_end, self._prev_crc)

    def raise_if_stopped(self) -> None:
        if self.failure is not None:
            raise StoreStopped(path=self._path, reason=self.failure)

    def stop(self, error: BaseException) -> StoreStopped:
        """Stop for good; returns the error to raise."""
        if self.failure is None:
            self.failure = str(error) or type(error).__name__
        return StoreStopped(path=self._path, reason=self.failure)

    # Appending.

    def room(self, freeing: bool = False) -> tuple[int, int]:
        """How many data blocks, and how many bytes of records, still fit into the active segment.

        Of the last segment there is, only records that delete or revert (``freeing``) get any.
        """
        segment, geometry = self.active, self._pool.geometry
        if segment is None:
            return 0, 0
        if segment.reserve:
            segment.reserve = not self._pool.spares
        if segment.reserve and not freeing:
            return 0, 0
        return geometry.segment_blocks - segment.used_blocks, geometry.record_area_bytes - segment.record_end

    def roll(self, keep: int = KEEP_FOR_WRITES) -> None:
        """Go on in a fresh segment, and leave ``keep`` spares: the last ones are for the cleaner and for records without data, so
        that cleaning, deleting and reverting work on a full disk. Blocks only when no spare is ready, or with ``syncs_headers``: while this
        life has no checkpoint of its own, nothing but its headers keeps the next one from giving its log indexes again, and those are
        durable before anything is written behind them. Raises `NoSpace` with nothing changed."""
        self.raise_if_stopped()
        try:
            segment = self._pool.activate(self._next_log_index, self.seq + 1, self.durable_seq, self._prev_crc, keep)
            if self.syncs_headers:
                segment.file.datasync()
        except OSError as error:
            raise self.stop(error) from error
        if self.active is not None:
            self._pool.seal(self.active)
        segment.reserve = not self._pool.spares
        self.active = segment
        self._next_log_index = max(self._next_log_index, segment.log_index + 1)
        if self.on_roll is not None:
            self.on_roll()

    def append(self, kind: int, volume: int, payload: bytes, views: Sequence = (), blocks: int = 0) -> int:
        """Append one record with ``blocks`` blocks of data in ``views``; it must fit (`room`).

        Returns the physical number of the first block. Raises `StoreStopped` on an I/O error.
        """
        if self.failure is not None:
            self.raise_if_stopped()
        segment = self.active
        data_block = segment.used_blocks
        seq = self.seq + 1
        try:
            if blocks:
                segment.file.pwritev(views, data_block * layout.BLOCK)
            record, crc = layout.pack_record(
                kind, seq, self.durable_seq, self._prev_crc, segment.salt, volume, data_block, payload
            )
            often = self.records_appended - self._records_at_flush < _OFTEN_RECORDS
            (segment.area.pwrite if often else segment.area.write)(segment.record_end, record)
        except OSError as error:
            raise self.stop(error) from error
        segment.record_end += len(record)
        segment.used_blocks += blocks
        segment.last_seq = self.seq = seq
        self._prev_crc = crc
        self._unsynced[segment] = None
        if kind != layout.MARK:
            self.flush_needed_seq = seq
        self.blocks_appended += blocks
        self.records_appended += 1
        self.record_bytes_appended += len(record)
        return segment.slot << self._pool.geometry.segment_shift | data_block

    def new_index(self) -> int:
        """A log index for a segment outside the log (the cleaner's)."""
        self._next_log_index += 1
        return self._next_log_index - 1

    def covers(self, segment: Segment) -> None:
        """The last record refers to what was written to ``segment``, which is not the active one: the next flush syncs that too."""
        segment.last_seq = self.seq
        self._unsynced[segment] = None

    # Flushing.

    def begin_flush(self) -> FlushJob | None:
        """Return the work that makes everything appended so far durable, or None if it is."""
        self.raise_if_stopped()
        if self.durable_seq >= self.flush_needed_seq:
            return None
        return FlushJob(self.seq, [segment.file for segment in self._unsynced], self)

    def end_flush(self, job: FlushJob, error: BaseException | None = None, durable: Callable[[], None] | None = None) -> None:
        """Note that ``job`` has run. With an ``error`` the log stops, and `StoreStopped` is raised. ``durable`` is called as soon as
        `durable_seq` says so, before the MARK, for which nobody has to wait."""
        if error is not None:
            raise self.stop(error) from error
        self.raise_if_stopped()
        if job.seq <= self.durable_seq:
            return
        self.durable_seq = job.seq
        self.flushes += 1
        self._records_at_flush = self.records_appended
        self._unsynced = {segment: None for segment in self._unsynced if segment.last_seq > job.seq}
        if durable is not None:
            durable()
        if self.room(freeing=True)[1] >= layout.RECORD_BYTES:  # also when more was appended meanwhile: nothing may follow it
            self.append(layout.MARK, 0, b"")

    def flush(self) -> None:
        """Flush here and now. Blocks."""
        job = self.begin_flush()
        if job is not None:
            try:
                job.run()
            except OSError as error:
                self.end_flush(job, error)
            self.end_flush(job)

    def statistics(self) -> dict[str, int]:
        return {
            "seq": self.seq,
            "durable_seq": self.durable_seq,
            "records_appended": self.records_appended,
            "bytes_appended": self.blocks_appended * layout.BLOCK,
            "flushes": self.flushes,
            "segments_unsynced": len(self._unsynced),
        }

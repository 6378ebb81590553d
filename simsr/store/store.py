"""The store: volumes in one log. State = fold(records), and this file is the fold.

Create or open one with `Store.create`, `Store.open`. Change volumes with `Volume.write` (data) and `Store.commit` (everything
else: making, deleting, resizing volumes, taking over another's content, their metadata). One `commit` is one record,
so any set of changes is atomic: a snapshot is a volume created from another, a revert is a volume reset to another.

The store is synchronous, single-threaded and has no clock. What blocks is split in three, ``begin_x`` and ``end_x`` on the
store's thread and ``job.run()`` wherever the caller likes; `flush` and `checkpoint` do all three here and now.

Invariants (`_check`): those of the extent map, the pool and the usage counts; ``volumes`` is what replaying the log from
the last checkpoint gives.
"""

from __future__ import annotations

import json
import uuid as uuid_module
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from simsr.errors import BadRequest, NoSpace, SimsrError, StoreDamaged, StoreError, StoreFormat
from simsr.store import checkpoint as ckpt
from simsr.store import layout
from simsr.store.checkpoint import CheckpointJob
from simsr.store.cleaner import Cleaner
from simsr.store.files import Directory
from simsr.store.layout import BLOCK, Geometry, Super
from simsr.store.log import KEEP_FOR_WRITES, FlushJob, Log, Position
from simsr.store.node_table import MapMemory, NodeTable
from simsr.store.paging import MapFiles, PageJob
from simsr.store.recovery import Tail, find_tail
from simsr.store.segments import SegmentPool, State
from simsr.store.table_file import LIVE, ROWS, VOLUMES, read_sections, table_files
from simsr.store.usage import Usage
from simsr.store.volume import Volume

__all__ = ["Store", "Create", "Delete", "Reset", "Resize", "SetMeta", "Op", "decode_ops"]


@dataclass(frozen=True)
class Create:
    """Make volume ``ident`` (from `Store.new_ident`), empty or with the content of volume ``source``."""

    ident: int
    size_bytes: int
    meta: dict
    source: int | None = None


@dataclass(frozen=True)
class Delete:
    """Remove volume ``ident``. What only it referred to becomes garbage."""

    ident: int


@dataclass(frozen=True)
class Reset:
    """Give volume ``ident`` the content and the size of volume ``source``. Nothing is copied."""

    ident: int
    source: int


@dataclass(frozen=True)
class Resize:
    """Make volume ``ident`` larger."""

    ident: int
    size_bytes: int


@dataclass(frozen=True)
class SetMeta:
    """Replace the metadata of volume ``ident``; 0 is the store itself."""

    ident: int
    meta: dict


Op = Create | Delete | Reset | Resize | SetMeta
_OPS: dict[str, type] = {"create": Create, "delete": Delete, "reset": Reset, "resize": Resize, "meta": SetMeta}
_OP_NAMES = {kind: name for name, kind in _OPS.items()}

_SIZE_MAX_BYTES = BLOCK << (64 - layout.START_SHIFT)
CHECKPOINT_LOG_BYTES = 256 << 20
CHECKPOINT_RECORDS = 1 << 16
DIRTY_PART = 4  # a checkpoint is due when this part of the map memory is dirty
TABLE_SLACK_BYTES = 1 << 20
SPARES_MIN = 6  # fewer are a reason for a checkpoint, and for writers to look for room first


class Store:
    """A set of volumes in a directory.

    Opening:   `create`, `open`, `open_read_only`, `close`
    Volumes:   `volumes`, `commit`, `new_ident`
    Safety:    `flush`, `begin_flush`, `end_flush`
    Upkeep:    `checkpoint`, `begin_checkpoint`, `end_checkpoint`, `reap`, `pool.wanted`
    Insight:   `statistics`, `_check`
    """

    def __init__(self, directory: Directory, uuid: bytes, geometry: Geometry, memory: MapMemory | None = None) -> None:
        self.directory = directory
        self.uuid = uuid_module.UUID(bytes=uuid)
        self.geometry = geometry
        self.usage = Usage(geometry.segment_shift)
        self.pool = SegmentPool(directory, geometry, uuid, self.usage)
        self.table = NodeTable(geometry.fanout_bits, self.usage, memory)
        self.maps = MapFiles(directory, self.table)
        self.table.fetch_now = self.maps.fetch_now
        self.meta: dict = {}
        self.volumes: dict[int, Volume] = {}
        self.recovered = {"records_replayed": 0, "records_dropped": 0}
        self._next_ident = 1
        self._changed: set[int] = set()  # volumes that differ from the last checkpoint
        self.observer: Callable[[list[Op]], None] = lambda ops: None  # told of every commit, after it; must not raise
        self.replaced: set[int] = set()  # volumes with other content, or size, than before; who keeps copies takes them from here
        self._deleted: list[int] = []
        self._table_file = self._table_bytes = self._table_crc = 0
        self._table_bytes_first, self._generation = 0, 0  # what the first checkpoint of the table file wrote; the last checkpoint
        self._garbage_maps: list[int] = []
        self._garbage_tables: list[int] = []
        self.cleaner = Cleaner(self)
        self.map_bytes_written = 0
        self.checkpointing = False
        self._checkpoint_seq = 0
        self._checkpoint_blocks = self._checkpoint_records = 0
        self.log: Log

    # Opening.

    @classmethod
    def create(
        cls, directory: Directory, uuid: bytes, geometry: Geometry, meta: dict | None = None, memory: MapMemory | None = None
    ) -> Store:
        """Make an empty store in ``directory``, which must hold none. Raises `StoreError`, `StoreLocked`, OSError."""
        if not geometry.valid():
            raise StoreError(path=directory.path, reason=f"{geometry} is not a valid geometry")
        directory.lock()
        if directory.names():
            directory.close()
            raise StoreError(path=directory.path, reason="the directory is not empty, so no store is made in it")
        store = cls(directory, uuid, geometry, memory)
        store.meta = meta or {}
        store.log = Log(store.pool, directory.path, Position(0, 1, layout.HEADER_BYTES, 0))
        try:
            for _ in range(2):  # both super blocks: each is the other's spare, and later none must be made on a full disk
                store.checkpoint()
            store.log.roll()
        except BaseException:
            store.abandon()
            raise
        return store

    @classmethod
    def open(cls, directory: Directory, memory: MapMemory | None = None) -> Store:
        """Open the store in ``directory`` and recover it.

        Raises `StoreLocked`, `StoreFormat` (not a store, or of another version), `StoreDamaged` (with nothing changed).
        """
        directory.lock()
        try:
            return cls._recover(directory, memory)
        except OSError as error:
            directory.close()
            raise StoreError(path=directory.path, reason=f"cannot be read: {error}") from error
        except BaseException:
            directory.close()
            raise

    @classmethod
    def open_read_only(cls, directory: Directory, memory: MapMemory | None = None) -> Store:
        """As `open`, but nothing in ``directory`` is changed, and nothing can be: what was recovered is in memory only."""
        directory.lock()
        try:
            return cls._recover(directory, memory, read_only=True)
        except BaseException:
            directory.close()
            raise

    @classmethod
    def _recover(cls, directory: Directory, memory: MapMemory | None, read_only: bool = False) -> Store:
        supers = ckpt.read_supers(directory)
        for block in supers:
            if not isinstance(block, Super):
                reason = f"its format is version {block}, this simsr knows version {layout.FORMAT_VERSION}"
                raise StoreFormat(path=directory.path, reason=reason)
        if not supers:
            if any(name.startswith(("super.", "map-", "table-", "seg-")) for name in directory.names()):
                raise StoreDamaged(path=directory.path, reason="neither super block (super.0, super.1) is valid")
            raise StoreFormat(path=directory.path, reason="there is no store in this directory")
        failure: StoreDamaged | None = None
        for block in supers:
            try:
                return cls._recover_from(directory, block, max(other.seq for other in supers), memory, read_only)
            except StoreDamaged as error:
                failure = failure or error
        good = {ckpt.super_name(block.generation) for block in supers}
        bad = [name for name in ("super.0", "super.1") if name in directory.names() and name not in good]
        if bad:
            raise StoreDamaged(path=directory.path, reason=f"{bad[0]} is not valid, and without it: {failure.details['reason']}")
        raise failure

    @classmethod
    def _recover_from(
        cls, directory: Directory, block: Super, durable_seq: int, memory: MapMemory | None, read_only: bool
    ) -> Store:
        """Recover from one of the super blocks. Going back to the older one must lead as far as the newer one was."""
        store = cls(directory, block.uuid, block.geometry, memory)
        try:
            tail = find_tail(store.pool.adopt(), block, durable_seq, directory.path)
            store.log = Log(store.pool, directory.path, tail.end)
            store._load(block)
            store._survey(block)
            with store.table.waiting():
                store._replay(tail)
            store.pool.damaged_if_missing()
            if read_only:
                store._stay_as_found(block)
            else:
                store._settle(tail)
        except BaseException:
            store._let_go()
            raise
        return store

    def _load(self, block: Super) -> None:
        """Read the table file: the state of the checkpoint. Map nodes are read when they are needed."""
        lines: dict[int, dict] = {}
        for section in read_sections(self.directory, block.end):
            if section.kind == ROWS:
                self.table.load_rows(*section.rows())
            elif section.kind == LIVE:
                self.usage.load(*section.live())
            elif section.kind == VOLUMES:
                table = section.volumes()
                self.meta, self._next_ident = table["meta"], table["next_ident"]
                for ident in table["deleted"]:
                    lines.pop(ident, None)
                for line in table["set"]:
                    lines[line["ident"]] = line
        for ident, line in lines.items():
            self._new_volume(ident, line["size_bytes"], line["meta"]).load(line)
        self.table.loaded()
        self.usage.loaded()
        self._changed.clear()
        self._table_file, self._table_bytes, self._table_crc = block.end.file, block.end.offset, block.end.crc
        self._table_bytes_first = self._table_bytes // 2  # about; where its first part ended is not noted anywhere

    def _survey(self, block: Super) -> None:
        """See what map and table files there are. Those that hold nothing of the checkpoint just loaded are garbage; what replay is
        about to change is not: until the next checkpoint is durable, the one just loaded is what a crash goes back to."""
        self.maps.survey()
        needed = {number for number, nodes in self.table.nodes_at_home.items() if nodes}
        self._garbage_maps = [number for number in self.maps.size_bytes if number not in needed]
        tables = table_files(self.directory)
        self._garbage_tables = [number for number in tables if number != block.end.file]
        supers = [other.generation for other in ckpt.read_supers(self.directory)]
        self._generation = max([*supers, *self.maps.size_bytes, *tables])
        if ckpt.super_name(self._generation + 1) == ckpt.super_name(block.generation):
            self._generation += 1  # the next checkpoint must not write over the super block that holds

    def _replay(self, tail: Tail) -> None:
        shift = self.geometry.segment_shift
        for segment, record in tail.records:
            if record.kind == layout.EXTENTS:
                extents, crcs = layout.unpack_extents(record.payload)
                self.volumes[record.volume].apply(extents, crcs, segment.slot << shift | record.data_block)
            elif record.kind == layout.COMMIT:
                self._apply(decode_ops(record.payload))
            elif record.kind == layout.MOVED:
                self.cleaner.replay(record.payload)
            segment.last_seq = record.seq
        replayed = sum(record.kind != layout.MARK for _, record in tail.records)
        self.recovered = {"records_replayed": replayed, "records_dropped": tail.dropped_records}

    def _stay_as_found(self, block: Super) -> None:
        """Have everything that could be read, and the log stopped."""
        for segment in self.pool.by_slot:
            if segment is not None:
                segment.state = State.SEALED
        self._table_file, self._table_bytes, self._table_crc = block.end.file, block.end.offset, block.end.crc
        self.log.failure = "it was opened for reading only"

    def _settle(self, tail: Tail) -> None:
        """Make the recovered state a checkpoint of its own and go on in a fresh segment, so no torn tail is ever extended."""
        for segment in self.pool.by_slot:
            if segment is not None:
                if segment.log_index or self.usage.live[segment.slot]:
                    segment.state = State.SEALED
                else:
                    self.pool.spares.append(segment)
        # What a killed process wrote may not have reached the disk yet: neither the log nor the super block just used.
        replayed = {segment for segment, _ in tail.records}
        for _, record in tail.records:
            if record.kind == layout.MOVED:
                replayed.add(self.pool.by_slot[layout.unpack_moved(record.payload)[0]])
        for segment in sorted(replayed, key=lambda segment: segment.slot):
            segment.file.datasync()
        ckpt.sync_supers(self.directory)
        self.pool.remove_unmade()
        self.log.syncs_headers = not self._checkpoint_with_what_there_is()
        with suppress(NoSpace):  # reading needs no segment, and what needs one asks again
            self.log.roll()

    def _checkpoint_with_what_there_is(self) -> bool:
        """Checkpoint, giving up spare segments if there is no room. Without one the store works too: the log goes on where it ends."""
        while True:
            try:
                self.checkpoint()
                return True
            except NoSpace:
                if not self.pool.remove_spare():
                    return False

    def _let_go(self) -> None:
        self.pool.close()
        self.maps.close()
        self.table.close()

    def close(self) -> None:
        """Checkpoint, if the log has not stopped, and let go of everything. Blocks."""
        try:
            if self.log.failure is None and self.log.seq != self._checkpoint_seq:
                self.checkpoint()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of everything as it is, as if the process died here."""
        self._let_go()
        self.directory.close()

    # Volumes.

    def new_ident(self) -> int:
        """A number that no volume of this store has, or had since it was opened."""
        self._next_ident += 1
        return self._next_ident - 1

    def commit(self, ops: Iterable[Op], urgent: bool = False) -> None:
        """Do all of ``ops``, in order, as one record. Durable after the next flush. With ``urgent`` it may use up the reserve,
        as deleting and reverting always may.

        Raises `BadRequest`, `NoSpace` or `StoreStopped` with nothing changed. Cost: O(ops), whatever the size of the volumes.
        """
        ops = list(ops)
        self._check_ops(ops)
        payload = _encode_ops(ops)
        if layout.RECORD_BYTES + len(payload) > min(
            layout.MAX_RECORD_BYTES, self.geometry.record_area_bytes - layout.HEADER_BYTES
        ):
            raise NoSpace(name=self.directory.path, reason=f"{len(payload)} bytes of metadata do not fit into one record")
        freeing = urgent or all(isinstance(op, Delete | Reset) for op in ops)
        if self.log.room(freeing)[1] < layout.RECORD_BYTES + len(payload) + layout.RECORD_UNIT:
            self.log.roll(keep=0 if freeing else KEEP_FOR_WRITES)
        self.log.append(layout.COMMIT, 0, payload)
        self._apply(ops)
        self.replaced.update(op.ident for op in ops if isinstance(op, Reset | Resize))
        self.observer(ops)

    def _check_ops(self, ops: list[Op]) -> None:
        """Refuse what does not make sense: once it was in the log, replay would fail, and the store never open again."""
        changed: dict[int, int | None] = {}

        def size_of(ident: int | None) -> int | None:
            volume = self.volumes.get(ident)
            return changed[ident] if ident in changed else None if volume is None else volume.size_bytes

        for op in ops:
            size = size_of(op.ident)
            wrong = size is None
            match op:
                case Create(ident, size_bytes, _, source):
                    least = 0 if source is None else size_of(source)
                    wrong = size is not None or ident < 1 or least is None or not least <= size_bytes <= _SIZE_MAX_BYTES
                    changed[ident] = size_bytes
                case Delete(ident):
                    changed[ident] = None
                case Reset(ident, source):
                    changed[ident] = size_of(source)
                    wrong = wrong or changed[ident] is None
                case Resize(ident, size_bytes):
                    wrong = wrong or not size <= size_bytes <= _SIZE_MAX_BYTES
                    changed[ident] = size_bytes
                case SetMeta(0):
                    wrong = False
            if wrong:
                raise BadRequest(what=f"{op}", reason="no such volume, one too many, or a size out of range")

    def _apply(self, ops: list[Op]) -> None:
        self._changed.update(op.ident for op in ops)
        for op in ops:
            match op:
                case Create(ident, size_bytes, meta, source):
                    volume = self._new_volume(ident, size_bytes, meta)
                    self._next_ident = max(self._next_ident, ident + 1)
                    if source is not None:
                        volume.map.become(self.volumes[source].map)
                        volume.resize(size_bytes)
                case Delete(ident):
                    self.volumes.pop(ident).retire()
                    self._deleted.append(ident)
                case Reset(ident, source):
                    self.volumes[ident].map.become(self.volumes[source].map)
                    self.volumes[ident].resize(self.volumes[source].size_bytes)
                case Resize(ident, size_bytes):
                    self.volumes[ident].resize(size_bytes)
                case SetMeta(0, meta):
                    self.meta = meta
                case SetMeta(ident, meta):
                    self.volumes[ident].meta = meta

    def _new_volume(self, ident: int, size_bytes: int, meta: dict) -> Volume:
        volume = Volume(ident, size_bytes, meta, self.log, self.pool, self.table, self.page_job, self._changed)
        self.volumes[ident] = volume
        return volume

    # Safety.

    def begin_flush(self) -> FlushJob | None:
        return self.log.begin_flush()

    def end_flush(self, job: FlushJob, error: BaseException | None = None, durable: Callable[[], None] | None = None) -> None:
        self.log.end_flush(job, error, durable)

    def flush(self) -> None:
        """Make everything written so far durable. Blocks."""
        self.log.flush()

    # Upkeep.

    @property
    def wants_checkpoint(self) -> bool:
        """Whether enough was logged or changed since the last checkpoint for another one, or it would give spares that are needed."""
        log = self.log
        return log.failure is None and (
            self._dead_are_needed
            or (log.blocks_appended - self._checkpoint_blocks) * BLOCK >= CHECKPOINT_LOG_BYTES
            or log.records_appended - self._checkpoint_records >= CHECKPOINT_RECORDS
            or self.table.dirty_bytes * DIRTY_PART > self.table.memory.limit_bytes
        )

    @property
    def _dead_are_needed(self) -> bool:
        spares = len(self.pool.spares)
        if spares >= 2 * SPARES_MIN:
            return False
        dead = len(self.pool.dead())
        return dead >= SPARES_MIN or (dead > 0 and spares < SPARES_MIN)

    @property
    def too_dirty(self) -> bool:
        """Whether so much of the map memory is dirty that writing should wait for a checkpoint."""
        return self.table.dirty_bytes * 2 > self.table.memory.limit_bytes

    def begin_checkpoint(self) -> CheckpointJob:
        """Freeze the state; O(what changed). One checkpoint at a time. Raises `StoreStopped`."""
        self.log.raise_if_stopped()
        assert not self.checkpointing, "a checkpoint is under way already"
        self.checkpointing = True
        self._generation += 1
        self._checkpoint_blocks, self._checkpoint_records = self.log.blocks_appended, self.log.records_appended
        everything = not self._table_file or self._table_bytes > 2 * self._table_bytes_first + TABLE_SLACK_BYTES
        changed = self.volumes if everything else [ident for ident in self._changed if ident in self.volumes]
        volumes = {
            "meta": self.meta, "next_ident": self._next_ident, "deleted": [] if everything else self._deleted,
            "set": [self.volumes[ident].line() for ident in changed],
        }  # fmt: skip
        self._changed.clear()
        self._deleted = []
        if everything:
            file, offset, crc = self._generation, 0, 0
        else:
            file, offset, crc = self._table_file, self._table_bytes, self._table_crc
        return CheckpointJob(
            self.directory, self.table, self.maps, self.log.begin_flush(), self.log.position, self.uuid.bytes, self._generation,
            self.geometry, volumes, self.usage.changes(everything), file, offset, crc, self.pool.dead(), self.log.raise_if_stopped,
            self._garbage_maps, self._garbage_tables,
        )  # fmt: skip

    def run_checkpoint(self, job: CheckpointJob) -> None:
        """All of ``job.work()`` here and now. Blocks."""
        for step in job.work():
            if step is not None:
                step()

    def end_checkpoint(self, job: CheckpointJob, error: BaseException | None = None) -> None:
        """Note that ``job`` has run: dead segments become spares. With an ``error`` the log stops, unless it is `NoSpace`:
        then the store goes on as before."""
        self.checkpointing = False
        self._garbage_maps, self._garbage_tables = job.garbage_maps, job.garbage_tables
        for number in job.removed_maps:
            self.maps.size_bytes.pop(number, None)
            self.table.forget_file(number)
        if error is not None:
            self.table.thaw(failed=[*job.nodes, *self.table.frozen.values()])
            self._table_file = 0  # what changed is not known any more: the next one writes everything
            if not isinstance(error, NoSpace):
                raise self.log.stop(error) from error
            self._generation -= 1  # else the next one would write over the super block that holds
            raise error
        homes = job.homes
        self.table.came_home(job.generation, homes.ids, homes.offsets, homes.lengths, homes.crcs, homes.mapped)
        self.table.thaw()
        self.map_bytes_written += job.map_bytes + job.table_bytes
        if job.map_bytes:
            self.maps.size_bytes[job.generation] = job.map_bytes
        if job.everything:
            self._table_bytes_first = job.table_bytes
            self._garbage_tables = [number for number in table_files(self.directory) if number != job.table_file]
        self._table_file, self._table_bytes, self._table_crc = job.table_file, job.table_offset + job.table_bytes, job.crc
        if job.flush is not None:
            self.log.end_flush(job.flush)
        self._checkpoint_seq = job.position.seq
        self.log.syncs_headers = False
        self.pool.recycle(job.dead)
        needed = {number for number, nodes in self.table.nodes_at_home.items() if nodes} | self.table.late_files
        self._garbage_maps = [number for number in self.maps.size_bytes if number not in needed]

    def checkpoint(self) -> None:
        """Write a checkpoint here and now. Blocks."""
        job = self.begin_checkpoint()
        try:
            self.run_checkpoint(job)
        except (OSError, SimsrError) as error:
            self.end_checkpoint(job, error)
        self.end_checkpoint(job)

    def reap(self, nodes_max: int | None = None) -> int:
        """Take apart what deleted or reverted volumes left behind; returns how much is left to do. Raises `Absent`."""
        return self.table.reap(nodes_max)

    def page_job(self, ids: Iterable[int]) -> PageJob:
        """A job that brings map nodes into memory: those that an `Absent` named."""
        return PageJob(self.table, self.maps, ids)

    # Insight.

    @property
    def map_bytes(self) -> int:
        """Bytes of the map files and the table file."""
        return sum(self.maps.size_bytes.values()) + self._table_bytes

    @property
    def write_amplification(self) -> float:
        """Bytes written for each byte of data that users wrote, since the store was opened: data, records, moves, maps."""
        users = self.log.blocks_appended * BLOCK
        more = self.cleaner.blocks_moved * BLOCK + self.map_bytes_written + self.log.record_bytes_appended
        return (users + more) / users if users else 1.0

    def statistics(self) -> dict[str, Any]:
        live = sum(self.usage.live)
        return {
            "volumes": len(self.volumes),
            "live_bytes": live * BLOCK,
            "checkpoint_generation": self._generation,
            "checkpoint_seq": self._checkpoint_seq,
            "map_bytes": self.map_bytes,
            **self.recovered,
            **self.log.statistics(),
            **self.pool.statistics(),
            **self.cleaner.statistics(),
            "write_amplification": round(self.write_amplification, 3),
            **self.table.statistics(),
        }

    def _check(self) -> None:
        """Verify every invariant; for tests. O(mapped blocks)."""
        with self.table.waiting():
            self.table._check([volume.map.root for volume in self.volumes.values()])
            for volume in self.volumes.values():
                volume.map._check()
        self.pool._check()


def _encode_ops(ops: list[Op]) -> bytes:
    lines = [{"op": _OP_NAMES[type(op)], **asdict(op)} for op in ops]
    return json.dumps(lines, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode_ops(payload: bytes) -> list[Op]:
    return [_OPS[line.pop("op")](**line) for line in json.loads(payload.rstrip(b"\0"))]

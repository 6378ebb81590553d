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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from simsr.errors import BadRequest, NoSpace, StoreDamaged, StoreError, StoreFormat
from simsr.store import checkpoint as ckpt
from simsr.store import layout
from simsr.store.checkpoint import CheckpointJob, NodeLoader
from simsr.store.extent_map import Node, Usage
from simsr.store.files import Directory
from simsr.store.layout import BLOCK, Geometry, NodeRef, Super
from simsr.store.log import FlushJob, Log, Position
from simsr.store.recovery import Tail, find_tail
from simsr.store.segments import SegmentPool, State
from simsr.store.volume import Volume

__all__ = ["Store", "Create", "Delete", "Reset", "Resize", "SetMeta", "Op"]


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
SPARES_MIN = 3


class Store:
    """A set of volumes in a directory.

    Opening:   `create`, `open`, `close`
    Volumes:   `volumes`, `commit`, `new_ident`
    Safety:    `flush`, `begin_flush`, `end_flush`
    Upkeep:    `checkpoint`, `begin_checkpoint`, `end_checkpoint`, `reap`, `pool.wanted`
    Insight:   `statistics`, `_check`
    """

    def __init__(self, directory: Directory, uuid: bytes, geometry: Geometry, usage: Usage, pool: SegmentPool) -> None:
        self.directory = directory
        self.uuid = uuid_module.UUID(bytes=uuid)
        self.geometry = geometry
        self.usage = usage
        self.pool = pool
        self.meta: dict = {}
        self.volumes: dict[int, Volume] = {}
        self.recovered = {"records_replayed": 0, "records_dropped": 0}
        self._next_ident = 1
        self._generation = 0
        self._map_bytes: dict[int, int] = {}
        self._map_garbage: list[int] = []
        self._frozen: list[Node | None] = []
        self.checkpointing = False
        self._checkpoint_seq = 0
        self._checkpoint_blocks = self._checkpoint_records = 0
        self.log: Log

    # Opening.

    @classmethod
    def create(cls, directory: Directory, uuid: bytes, geometry: Geometry | None = None, meta: dict | None = None) -> Store:
        """Make an empty store in ``directory``, which must hold none. Raises `StoreError`, `StoreLocked`, OSError."""
        geometry = geometry or Geometry()
        if not geometry.valid():
            raise StoreError(path=directory.path, reason=f"{geometry} is not a valid geometry")
        directory.lock()
        if directory.names():
            directory.close()
            raise StoreError(path=directory.path, reason="the directory is not empty, so no store is made in it")
        usage = Usage(geometry.segment_shift)
        store = cls(directory, uuid, geometry, usage, SegmentPool(directory, geometry, uuid, usage))
        store.meta = meta or {}
        store.log = Log(store.pool, directory.path, Position(0, 1, layout.HEADER_BYTES, 0))
        for _ in range(2):  # both super blocks: each is the other's spare, and later none must be made on a full disk
            store.checkpoint()
        store.log.roll()
        return store

    @classmethod
    def open(cls, directory: Directory) -> Store:
        """Open the store in ``directory`` and recover it.

        Raises `StoreLocked`, `StoreFormat` (not a store, or of another version), `StoreDamaged` (with nothing changed).
        """
        directory.lock()
        try:
            return cls._recover(directory)
        except OSError as error:
            directory.close()
            raise StoreError(path=directory.path, reason=f"cannot be read: {error}") from error
        except BaseException:
            directory.close()
            raise

    @classmethod
    def _recover(cls, directory: Directory) -> Store:
        supers = ckpt.read_supers(directory)
        for block in supers:
            if not isinstance(block, Super):
                reason = f"its format is version {block}, this simsr knows version {layout.FORMAT_VERSION}"
                raise StoreFormat(path=directory.path, reason=reason)
        if not supers:
            if any(name.startswith(("super.", "map-", "seg-")) for name in directory.names()):
                raise StoreDamaged(path=directory.path, reason="neither super block (super.0, super.1) is valid")
            raise StoreFormat(path=directory.path, reason="there is no store in this directory")
        failure: StoreDamaged | None = None
        for block in supers:
            try:
                return cls._recover_from(directory, block, max(other.seq for other in supers))
            except StoreDamaged as error:
                failure = failure or error
        good = {ckpt.super_name(block.generation) for block in supers}
        bad = [name for name in ("super.0", "super.1") if name in directory.names() and name not in good]
        if bad:
            raise StoreDamaged(path=directory.path, reason=f"{bad[0]} is not valid, and without it: {failure.details['reason']}")
        raise failure

    @classmethod
    def _recover_from(cls, directory: Directory, block: Super, durable_seq: int) -> Store:
        """Recover from one of the super blocks. Going back to the older one must lead as far as the newer one was."""
        usage = Usage(block.geometry.segment_shift)
        pool = SegmentPool(directory, block.geometry, block.uuid, usage)
        store = cls(directory, block.uuid, block.geometry, usage, pool)
        try:
            tail = find_tail(pool.adopt(), block, durable_seq, directory.path)
            store.log = Log(pool, directory.path, tail.end)
            store._load(block)
            store._survey_maps(block)
            store._replay(tail)
            pool.damaged_if_missing()
            store._settle(tail)
        except BaseException:
            pool.close()
            raise
        return store

    def _load(self, block: Super) -> None:
        """Read the volumes of the checkpoint."""
        loader = NodeLoader(self.directory, self.geometry, self.usage)
        table = json.loads(bytes(loader.fetch(block.roots)))
        self.meta, self._next_ident = table["meta"], table["next_ident"]
        for line in table["volumes"]:
            volume = self._new_volume(line["ident"], line["size_bytes"], line["meta"])
            volume.map.height, volume.map.mapped_blocks = line["height"], line["mapped_blocks"]
            if line["root"] is not None:
                volume.map.root = loader.load(NodeRef(*line["root"]), line["height"])

    def _survey_maps(self, block: Super) -> None:
        """See what map files there are. Those that hold nothing of the checkpoint just loaded are garbage; what replay is
        about to change is not: until the next checkpoint is durable, the one just loaded is what a crash goes back to."""
        for generation in ckpt.map_files(self.directory):
            file = self.directory.open(ckpt.map_name(generation))
            self._map_bytes[generation] = file.size_bytes
            file.close()
        needed = {generation for generation, nodes in self.usage.nodes_at_home.items() if nodes} | {block.roots.file}
        self._map_garbage = [generation for generation in self._map_bytes if generation not in needed]
        supers = [other.generation for other in ckpt.read_supers(self.directory)]
        self._generation = max([*supers, *self._map_bytes])
        if ckpt.super_name(self._generation + 1) == ckpt.super_name(block.generation):
            self._generation += 1  # the next checkpoint must not write over the super block that holds

    def _replay(self, tail: Tail) -> None:
        shift = self.geometry.segment_shift
        for segment, record in tail.records:
            if record.kind == layout.EXTENTS:
                extents, crcs = layout.unpack_extents(record.payload)
                self.usage.reserve(segment.slot)
                self.volumes[record.volume].apply(extents, crcs, segment.slot << shift | record.data_block)
            elif record.kind == layout.COMMIT:
                self._apply(_decode_ops(record.payload))
            segment.last_seq = record.seq
        replayed = sum(record.kind != layout.MARK for _, record in tail.records)
        self.recovered = {"records_replayed": replayed, "records_dropped": tail.dropped_records}

    def _settle(self, tail: Tail) -> None:
        """Make the recovered state a checkpoint of its own and go on in a fresh segment, so no torn tail is ever extended."""
        for segment in self.pool.by_slot:
            if segment is not None:
                if segment.log_index or self.usage.live[segment.slot]:
                    segment.state = State.SEALED
                else:
                    self.pool.spares.append(segment)
        # What a killed process wrote may not have reached the disk yet: neither the log nor the super block just used.
        replayed = {segment.slot: segment for segment, _ in tail.records}
        for segment in replayed.values():
            segment.file.datasync()
        ckpt.sync_supers(self.directory)
        self.pool.remove_unmade()
        self.checkpoint()
        try:
            self.log.roll(keep=0)
        except NoSpace:
            pass  # reading needs no segment, and what needs one asks again

    def close(self) -> None:
        """Checkpoint, if the log has not stopped, and let go of everything. Blocks."""
        try:
            if self.log.failure is None and self.log.seq != self._checkpoint_seq:
                self.checkpoint()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of everything as it is, as if the process died here."""
        self.pool.close()
        self.directory.close()

    # Volumes.

    def new_ident(self) -> int:
        """A number that no volume of this store has, or had since it was opened."""
        self._next_ident += 1
        return self._next_ident - 1

    def commit(self, ops: Iterable[Op]) -> None:
        """Do all of ``ops``, in order, as one record. Durable after the next flush.

        Raises `BadRequest`, `NoSpace` or `StoreStopped` with nothing changed. Cost: O(ops), whatever the size of the volumes.
        """
        ops = list(ops)
        self._check_ops(ops)
        payload = _encode_ops(ops)
        if layout.RECORD_BYTES + len(payload) > min(
            layout.MAX_RECORD_BYTES, self.geometry.record_area_bytes - layout.HEADER_BYTES
        ):
            raise NoSpace(name=self.directory.path, reason=f"{len(payload)} bytes of metadata do not fit into one record")
        freeing = all(isinstance(op, Delete | Reset) for op in ops)
        if self.log.room(freeing)[1] < layout.RECORD_BYTES + len(payload) + layout.RECORD_UNIT:
            self.log.roll(keep=0 if freeing else 1)
        self.log.append(layout.COMMIT, 0, payload)
        self._apply(ops)

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
        volume = Volume(ident, size_bytes, meta, self.log, self.pool, self.usage, self.directory.path)
        self.volumes[ident] = volume
        return volume

    # Safety.

    def begin_flush(self) -> FlushJob | None:
        return self.log.begin_flush()

    def end_flush(self, job: FlushJob, error: BaseException | None = None) -> None:
        self.log.end_flush(job, error)

    def flush(self) -> None:
        """Make everything written so far durable. Blocks."""
        self.log.flush()

    # Upkeep.

    @property
    def wants_checkpoint(self) -> bool:
        """Whether enough was logged since the last checkpoint for another one, or it would give spares that are needed."""
        log = self.log
        return log.failure is None and (
            (len(self.pool.spares) < SPARES_MIN and bool(self.pool.dead()))
            or (log.blocks_appended - self._checkpoint_blocks) * BLOCK >= CHECKPOINT_LOG_BYTES
            or log.records_appended - self._checkpoint_records >= CHECKPOINT_RECORDS
        )

    def begin_checkpoint(self) -> CheckpointJob:
        """Freeze the state; O(volumes). One checkpoint at a time. Raises `StoreStopped`."""
        self.log.raise_if_stopped()
        assert not self.checkpointing, "a checkpoint is under way already"
        self.checkpointing = True
        roots = []
        for volume in self.volumes.values():
            line = {
                "ident": volume.ident, "size_bytes": volume.size_bytes, "height": volume.map.height,
                "mapped_blocks": volume.map.mapped_blocks, "meta": volume.meta, "root": None,
            }  # fmt: skip
            roots.append((volume.map.share(), line))
        self._frozen = [root for root, _ in roots]
        self._generation += 1
        self._checkpoint_blocks, self._checkpoint_records = self.log.blocks_appended, self.log.records_appended
        return CheckpointJob(
            self.directory, self.log.begin_flush(), self.log.position, self.uuid.bytes, self._generation, self.geometry,
            roots, {"meta": self.meta, "next_ident": self._next_ident}, self.pool.dead(),
            ckpt.wants_rewrite(self.usage, sum(self._map_bytes.values())), self.log.raise_if_stopped,
        )  # fmt: skip

    def run_checkpoint(self, job: CheckpointJob) -> None:
        """The blocking part of ``job``, and the removal of map files that the last checkpoint left behind."""
        self.log.raise_if_stopped()
        for generation in self._map_garbage:
            self.directory.remove(ckpt.map_name(generation))
        job.run()

    def end_checkpoint(self, job: CheckpointJob, error: BaseException | None = None) -> None:
        """Note that ``job`` has run: dead segments become spares. With an ``error`` the log stops, unless it is `NoSpace`:
        then the store goes on as before."""
        if error is not None and not isinstance(error, NoSpace):
            self._unfreeze()
            raise self.log.stop(error) from error
        for generation in self._map_garbage:
            self._map_bytes.pop(generation, None)
        self._map_garbage = []
        if error is not None:
            self._generation -= 1  # else the next one would write over the super block that holds
            self._unfreeze()
            raise error
        for node, home in job.homes.values():
            self.usage.left_home(node)
            self.usage.came_home(node, home)
        self._map_bytes[job.generation] = job.bytes_written
        self._unfreeze()
        if job.flush is not None:
            self.log.end_flush(job.flush)
        self._checkpoint_seq = job.position.seq
        self.pool.recycle(job.dead)
        self._map_garbage = [
            generation
            for generation in self._map_bytes
            if generation != job.generation and not self.usage.nodes_at_home[generation]
        ]

    def _unfreeze(self) -> None:
        for root in self._frozen:
            self.usage.drop(root)
        self._frozen, self.checkpointing = [], False

    def checkpoint(self) -> None:
        """Write a checkpoint here and now. Blocks."""
        job = self.begin_checkpoint()
        try:
            self.run_checkpoint(job)
        except (OSError, NoSpace) as error:
            self.end_checkpoint(job, error)
        self.end_checkpoint(job)

    def reap(self, nodes_max: int | None = None) -> int:
        """Take apart what deleted or reverted volumes left behind; returns how much is left to do."""
        return self.usage.reap(nodes_max)

    # Insight.

    def statistics(self) -> dict[str, Any]:
        live = sum(self.usage.live)
        return {
            "volumes": len(self.volumes),
            "live_bytes": live * BLOCK,
            "checkpoint_generation": self._generation,
            "checkpoint_seq": self._checkpoint_seq,
            "map_bytes": sum(self._map_bytes.values()),
            **self.recovered,
            **self.log.statistics(),
            **self.pool.statistics(),
            **self.usage.statistics(),
        }

    def _check(self) -> None:
        """Verify every invariant; for tests. O(mapped blocks)."""
        self.usage._check([*(volume.map.root for volume in self.volumes.values()), *self._frozen])
        self.pool._check()
        for volume in self.volumes.values():
            volume.map._check()


def _encode_ops(ops: list[Op]) -> bytes:
    lines = [{"op": _OP_NAMES[type(op)], **asdict(op)} for op in ops]
    return json.dumps(lines, sort_keys=True, separators=(",", ":")).encode()


def _decode_ops(payload: bytes) -> list[Op]:
    return [_OPS[line.pop("op")](**line) for line in json.loads(payload.rstrip(b"\0"))]

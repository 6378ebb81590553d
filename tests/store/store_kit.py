"""Kit of the store's tests: recognisable content, an oracle that works from the records alone, random histories.

`Witness` is the oracle of the crash tests. It sees every record on its way into the log and folds it, with plain dicts,
into the state that the store must show if the log ends there. So a recovered store can be held against the state after
exactly the record it claims to have recovered to, whatever batch or commit that record was a part of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from simsr.errors import NoSpace, SimsrError
from simsr.store import layout
from simsr.store.layout import BLOCK, Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import Absent, MapMemory
from simsr.store.store import Create, Delete, Op, Reset, Resize, SetMeta, Store
from simsr.store.volume import Volume

TINY = Geometry(32, 2, 2)
"""30 data blocks and 8 KiB of records a segment, 4 entries a map node: a few writes reach every edge."""

UUID = bytes(range(16))


class Kill(BaseException):
    """The process dies here. Not an `Exception`, so nothing in between takes it for an I/O error."""


def kill_at(directory: MemoryDirectory, step: str) -> None:
    """The process dies at the first step of ``directory`` that begins like this."""

    def on_step(what: str) -> None:
        if what.startswith(step):
            raise Kill

    directory.on_step = on_step


@lru_cache(4096)
def content(tag: int) -> bytes:
    """A block that no other tag has, different in each of its sectors."""
    return random.Random(tag).randbytes(BLOCK)


def make(
    directory: MemoryDirectory | None = None, geometry: Geometry = TINY, memory: MapMemory | None = None
) -> tuple[MemoryDirectory, Store]:
    directory = directory or MemoryDirectory()
    return directory, Store.create(directory, UUID, geometry, memory=memory)


def some_memory(rng: random.Random) -> MapMemory:
    """For maps: plenty, a little, or none that is not in use."""
    return MapMemory(rng.choice((1 << 30, 20_000, 0)))


def squeeze(store: Store) -> None:
    """Let go of every map node that may be let go of."""
    for _ in range(2):
        store.table.evict(1 << 30, -1)


def cut(directory: MemoryDirectory, style: str = "none") -> MemoryDirectory:
    """What a power cut leaves at most or at least."""
    return directory.after_cut(random.Random(0), style)


def disk(store: Store, blocks: int, source: int | None = None, **meta: object) -> Volume:
    """A new volume of ``blocks`` blocks."""
    ident = store.new_ident()
    store.commit([Create(ident, blocks * BLOCK, meta, source)])
    return store.volumes[ident]


def put(volume: Volume, offset: int, data: bytes) -> None:
    """Write at once; fetch cold blocks as the daemon does."""
    write(volume, [(offset, len(data), memoryview(data))])


def zero(volume: Volume, offset: int, length: int) -> None:
    write(volume, [(offset, length, None)])


def paged(owner: Volume | Store, call: Callable):
    """``call()``, with the map nodes it needs brought into memory as the daemon does."""
    for _ in range(100_000):
        try:
            return call()
        except Absent as absent:
            job = owner.page_job([absent.ident])
            try:
                job.run()
            finally:
                job.finish()
    raise AssertionError("bringing nodes into memory comes to no end")


def write(volume: Volume, batch: list) -> None:
    done = volume.write(batch)
    while done < len(batch):
        offset, length, view = batch[done]
        fetched = {}
        for block, job in paged(volume, lambda: volume.edge_jobs(offset, length, view is None)).items():
            try:
                job.run()
                fetched[block] = job.fetched
            finally:
                job.release()
        done = volume.write(batch, done, fetched)


def everything(volume: Volume) -> bytes:
    return volume.read_bytes(0, volume.size_bytes)


def read(volume: Volume, offset: int, length: int) -> bytes:
    """Read as the daemon does: at once what is in memory, the rest with a job."""
    view = memoryview(bytearray(length))
    if volume.read([(offset, view)]):
        job = paged(volume, lambda: volume.read_job(offset, view))
        try:
            job.run()
        finally:
            job.release()
    return bytes(view)


def allocated(volume: Volume, offset: int, length: int, extents_max: int = 1 << 16) -> list[tuple[int, bool]]:
    """`Volume.allocation` of all of a range, however often it stops early."""
    extents: list[tuple[int, bool]] = []
    end = offset + length
    while offset < end:
        found = paged(volume, lambda: volume.allocation(offset, end - offset, extents_max))
        assert 0 < len(found) <= extents_max and all(one[1] != two[1] for one, two in zip(found, found[1:]))
        extents += found
        offset += sum(count for count, _ in found)
    assert offset == end and all(count > 0 for count, _ in extents)
    return extents


def compare_allocation(volume: Volume, held: bytes, offset: int, length: int, extents_max: int = 1 << 16) -> None:
    """A block is data unless it is zero, to the byte."""
    for count, data in allocated(volume, offset, length, extents_max):
        for block in range(offset // BLOCK, -(-(offset + count) // BLOCK)):
            assert any(held[block * BLOCK : (block + 1) * BLOCK]) == data, f"block {block} of volume {volume.ident}"
        offset += count


# The oracle.


@dataclass
class Content:
    """A volume as it must be: size, metadata, and the blocks that are not zero."""

    size_bytes: int
    meta: dict
    blocks: dict[int, bytes] = field(default_factory=dict)

    def all(self) -> bytes:
        count = -(-self.size_bytes // BLOCK)
        return b"".join(self.blocks.get(block, layout.ZERO_BLOCK) for block in range(count))[: self.size_bytes]


State = dict[int, Content]


def fold_ops(state: State, ops: list[dict]) -> State:
    state = dict(state)
    for op in ops:
        match op:
            case {"op": "create", "ident": ident, "size_bytes": size, "meta": meta, "source": source}:
                state[ident] = Content(size, meta, {} if source is None else state[source].blocks)
            case {"op": "delete", "ident": ident}:
                del state[ident]
            case {"op": "reset", "ident": ident, "source": source}:
                state[ident] = replace(state[source], meta=state[ident].meta)
            case {"op": "resize", "ident": ident, "size_bytes": size}:
                state[ident] = replace(state[ident], size_bytes=size)
            case {"op": "meta", "ident": ident, "meta": meta}:
                state[ident] = replace(state.get(ident) or Content(0, {}), meta=meta)
    return state


def fold_extents(state: State, volume: int, payload: bytes, data: bytes) -> State:
    extents, _ = layout.unpack_extents(payload)
    blocks = dict(state[volume].blocks)
    at = 0
    for extent in extents:
        first, count = extent >> layout.START_SHIFT, extent & layout.COUNT_MASK
        if extent & layout.HOLE:
            for block in [block for block in blocks if first <= block < first + count]:
                del blocks[block]
        else:
            for block in range(first, first + count):
                blocks[block] = data[at : at + BLOCK]
                at += BLOCK
    assert at == len(data)
    return {**state, volume: replace(state[volume], blocks=blocks)}


class Witness:
    """The state after each record of the log, by sequence number."""

    def __init__(self, states: dict[int, State] | None = None) -> None:
        self.states: dict[int, State] = states or {0: {}}

    def fork(self) -> Witness:
        return Witness(dict(self.states))

    def attach(self, store: Store) -> None:
        """Watch what ``store`` appends from now on."""
        log, append = store.log, store.log.append

        def watched(kind, volume, payload, views=(), blocks=0):
            state = self.states[log.seq]
            if kind == layout.EXTENTS:
                data = b"".join(map(bytes, views))
                assert len(data) == blocks * BLOCK
                state = fold_extents(state, volume, payload, data)
            elif kind == layout.COMMIT:
                state = fold_ops(state, json.loads(payload))
            self.states[log.seq + 1] = state
            return append(kind, volume, payload, views, blocks)

        log.append = watched

    def compare(self, store: Store) -> None:
        """``store`` shows exactly the state after its last record."""
        state = self.states[store.log.seq]
        assert set(store.volumes) == set(state) - {0}
        assert store.meta == (state[0].meta if 0 in state else {})
        for ident, volume in store.volumes.items():
            wanted = state[ident]
            assert (volume.size_bytes, volume.meta) == (wanted.size_bytes, wanted.meta)
            assert everything(volume) == wanted.all(), f"volume {ident} differs after record {store.log.seq}"


# Random histories.


class Slices:
    """A checkpoint under way, to be carried out bit by bit."""

    def __init__(self, store: Store) -> None:
        self.store, self.job = store, store.begin_checkpoint()
        self._work = self.job.work()
        self._step: Callable[[], None] | None = None  # what another thread was given, and has not done

    def advance(self, at_once: bool = True) -> bool:
        """One slice; whether that was the last. Without ``at_once`` the next call does what blocks. Raises what `Store.checkpoint`
        raises, and then it is over."""
        try:
            if self._step is None:
                self._step = next(self._work)
                if self._step is None or not at_once:
                    return False
            step, self._step = self._step, None
            step()
        except StopIteration:
            self.store.end_checkpoint(self.job)
            return True
        except (SimsrError, OSError) as error:
            self.store.end_checkpoint(self.job, error)
        return False


class Driver:
    """Does random things to a store, the same for the same ``rng``, and keeps its own idea of every volume's bytes.

    Flushes, checkpoints and reads of map nodes stay open over other things. A checkpoint goes on slice by slice; what a slice
    gives to another thread may run at once or after other things were done.
    """

    def __init__(self, rng: random.Random, blocks_max: int = 40, volumes_max: int = 5) -> None:
        self.rng = rng
        self.blocks_max, self.volumes_max = blocks_max, volumes_max
        self.bytes: dict[int, bytearray] = {}
        self.jobs: list[tuple[str, object]] = []
        self.refused = 0

    def begin(self, store: Store) -> None:
        """Take over a store that was just opened, as it is."""
        self.store = store
        self.jobs = []
        self.look()

    def look(self) -> None:
        self.bytes = {ident: bytearray(everything(volume)) for ident, volume in self.store.volumes.items()}

    def step(self) -> None:
        rng = self.rng
        actions: list[tuple[int, Callable[[], None]]] = [
            (50, self.write), (6, self.flush), (4, self.checkpoint), (5, self.create), (3, self.delete), (4, self.reset),
            (2, self.resize), (1, self.meta), (5, self.begin_job), (4, self.end_job), (3, self.reap), (2, self.make_spare),
            (10, self.go_on), (3, self.shrink), (3, self.read), (2, self.begin_paging),
        ]  # fmt: skip
        weights, choices = zip(*actions)
        action = self.create if not self.bytes else rng.choices(choices, weights)[0]
        try:
            action()
        except NoSpace:
            self.refused += 1
            self.look()

    def pick(self) -> int:
        return self.rng.choice(sorted(self.bytes))

    def write(self) -> None:
        rng = self.rng
        ident = self.pick()
        held = self.bytes[ident]
        batch = []
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            offset = rng.randrange(len(held))
            length = min(len(held) - offset, rng.choice((1, 511, BLOCK, BLOCK, 2 * BLOCK, 3 * BLOCK + 7, 11 * BLOCK)))
            if rng.random() < 0.7:
                offset &= -BLOCK
                length = min(len(held) - offset, max(BLOCK, length & -BLOCK))
            kind = rng.random()
            data = rng.randbytes(length) if kind < 0.75 else bytes(length)
            batch.append((offset, length, memoryview(data) if kind < 0.85 else None))
            held[offset : offset + length] = data
        write(self.store.volumes[ident], batch)

    def flush(self) -> None:
        self.store.flush()

    def checkpoint(self) -> None:
        if not any(kind == "checkpoint" for kind, _ in self.jobs):
            self.store.checkpoint()

    def commit(self, ops: list[Op]) -> None:
        self.store.commit(ops)
        if self.rng.random() < 0.5:
            self.store.flush()

    def create(self) -> None:
        rng = self.rng
        if len(self.bytes) >= self.volumes_max:
            return self.delete()
        ident = self.store.new_ident()
        if self.bytes and rng.random() < 0.8:
            source = self.pick()
            held = bytearray(self.bytes[source])
        else:
            source, held = None, bytearray(rng.randint(1, self.blocks_max * 8) * 512)
        self.commit([Create(ident, len(held), {"made": ident}, source)])
        self.bytes[ident] = held

    def delete(self) -> None:
        if len(self.bytes) > 1:
            ident = self.pick()
            self.commit([Delete(ident)])
            del self.bytes[ident]

    def reset(self) -> None:
        """A revert as the model does it: several changes, one record."""
        rng = self.rng
        ident, source = self.pick(), self.pick()
        ops: list[Op] = [Reset(ident, source), SetMeta(ident, {"reset": rng.randrange(1000)})]
        if rng.random() < 0.3 and len(self.bytes) < self.volumes_max:
            tip = self.store.new_ident()
            ops.insert(0, Create(tip, len(self.bytes[ident]), {"tip": ident}, ident))
            self.commit(ops)
            self.bytes[tip] = bytearray(self.bytes[ident])
        else:
            self.commit(ops)
        self.bytes[ident] = bytearray(self.bytes[source])

    def resize(self) -> None:
        ident = self.pick()
        size = len(self.bytes[ident]) + self.rng.choice((512, 5 * BLOCK, 17 * BLOCK))
        if size <= 3 * self.blocks_max * BLOCK:
            self.commit([Resize(ident, size)])
            self.bytes[ident].extend(bytes(size - len(self.bytes[ident])))

    def meta(self) -> None:
        ident = self.rng.choice([0, self.pick()])
        self.commit([SetMeta(ident, {"text": "x" * self.rng.randrange(300)})])

    # What takes a while.

    def begin_job(self) -> None:
        if any(kind == "checkpoint" for kind, _ in self.jobs) or self.rng.random() < 0.4:
            job = self.store.begin_flush()
            if job is not None:
                self.jobs.append(("flush", job))
        else:
            self.jobs.append(("checkpoint", Slices(self.store)))

    def begin_paging(self) -> None:
        """Read some map nodes, wanted or not, already there or not; they may be gone when they come."""
        table = self.store.table
        alive = [ident for ident in range(1, table.rows) if table.file[ident]]
        if alive:
            self.jobs.append(("paging", self.store.page_job(self.rng.choices(alive, k=3))))

    def go_on(self) -> None:
        """A few slices of the checkpoint under way."""
        for index, (kind, job) in enumerate(self.jobs):
            if kind == "checkpoint":
                for _ in range(self.rng.choice((1, 1, 2, 5))):
                    if self.advance(job):
                        del self.jobs[index]
                        return
                return

    def advance(self, slices: Slices) -> bool:
        try:
            return slices.advance(at_once=self.rng.random() < 0.5)
        except NoSpace:
            self.jobs.remove(("checkpoint", slices))
            raise

    def end_job(self) -> None:
        if self.jobs:
            kind, job = self.jobs.pop(self.rng.randrange(len(self.jobs)))
            if kind == "flush":
                job.run()
                self.store.end_flush(job)
            elif kind == "paging":
                try:
                    job.run()
                finally:
                    job.finish()
            else:
                while not job.advance():
                    pass

    def end_jobs(self) -> None:
        while self.jobs:
            self.end_job()

    def shrink(self) -> None:
        self.store.table.memory.shrink(self.rng.choice((1, 10, 1000)))

    def reap(self) -> None:
        most = self.rng.choice((1, 4, None))
        paged(self.store, lambda: self.store.reap(most))

    def read(self) -> None:
        ident = self.pick()
        held = self.bytes[ident]
        offset = self.rng.randrange(len(held))
        length = self.rng.randrange(1, len(held) - offset + 1)
        assert read(self.store.volumes[ident], offset, length) == held[offset : offset + length]
        compare_allocation(self.store.volumes[ident], held, offset, length, self.rng.choice((1, 3, 1 << 16)))

    def make_spare(self) -> None:
        if self.store.pool.wanted(1 << 20):
            self.store.pool.make_one()

    def compare(self, store: Store | None = None) -> None:
        """The store, or one that was opened again since, shows what this driver thinks it must."""
        store = store or self.store
        assert set(store.volumes) == set(self.bytes)
        for ident, held in self.bytes.items():
            compare_allocation(store.volumes[ident], held, 0, len(held))
            assert everything(store.volumes[ident]) == held, f"volume {ident} differs"

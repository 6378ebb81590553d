"""The store against a dict of bytes: hypothesis looks for a sequence of operations after which they differ.

Reads, also of map nodes, flushes and checkpoints stay open over other operations, checkpoints slice by slice; memory may turn
cold, and map nodes go, at any time; the process is killed, and the power fails, and everything is done on a geometry so small
that every rule crosses borders.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_kit import UUID, Content, Slices, Witness, compare_allocation, everything, paged, squeeze, write

from simsr.store.layout import BLOCK, Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import MapMemory
from simsr.store.store import Create, Delete, Reset, Resize, SetMeta, Store

VOLUMES_MAX = 5
SIZE_MAX = 90 * BLOCK

pick = st.integers(0, 1000)
"""Which volume: an index, modulo how many there are."""

sizes = st.one_of(st.integers(1, 40 * 8).map(lambda sectors: sectors * 512), st.integers(1, 40).map(lambda n: n * BLOCK))
pieces = st.tuples(
    st.integers(0, SIZE_MAX),
    st.one_of(st.integers(1, 3 * BLOCK), st.sampled_from((1, 512, BLOCK, 8 * BLOCK, 33 * BLOCK))),
    st.booleans(),
    st.sampled_from("dddzh"),  # data, zeros as data, hole
    st.integers(1, 2**32),
)
"""(offset, length, whether to align both, what, seed of the data); cut to the volume's size when it is used"""


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, bytearray] = {}
        self.metas: dict[int, dict] = {0: {}}
        self.reads: list[tuple] = []
        self.flush_job = self.page_job = None
        self.slices: Slices | None = None
        self.witness = Witness()
        self.steps = 0

    @initialize(bits=st.sampled_from((1, 2, 3)), size=sizes, limit_bytes=st.sampled_from((0, 20_000, 1 << 30)))
    def start(self, bits: int, size: int, limit_bytes: int) -> None:
        self.directory = MemoryDirectory()
        self.limit_bytes = limit_bytes
        self.store = Store.create(self.directory, UUID, Geometry(16, 2, bits), memory=MapMemory(limit_bytes))
        self.witness.attach(self.store)
        self.create(0, size, False)

    def ident(self, number: int) -> int:
        return sorted(self.model)[number % len(self.model)]

    # Data.

    @rule(number=pick, batch=st.lists(pieces, min_size=1, max_size=4))
    def write(self, number: int, batch: list) -> None:
        ident = self.ident(number)
        held = self.model[ident]
        requests = []
        for offset, length, aligned, what, seed in batch:
            offset %= len(held)
            if aligned:
                offset, length = offset & -BLOCK, max(BLOCK, length & -BLOCK)
            length = min(length, len(held) - offset)
            data = random.Random(seed).randbytes(length) if what == "d" else bytes(length)
            requests.append((offset, length, None if what == "h" else memoryview(data)))
            held[offset : offset + length] = data
        write(self.store.volumes[ident], requests)

    @rule(number=pick, piece=pieces)
    def read(self, number: int, piece: tuple) -> None:
        ident = self.ident(number)
        offset = piece[0] % len(self.model[ident])
        length = min(piece[1], len(self.model[ident]) - offset)
        view = memoryview(bytearray(length))
        cold = self.store.volumes[ident].read([(offset, view)])
        if not cold:
            assert view == self.model[ident][offset : offset + length]
        elif len(self.reads) < 8:
            volume = self.store.volumes[ident]
            job = paged(volume, lambda: volume.read_job(offset, view))
            self.reads.append((job, view, bytes(self.model[ident][offset : offset + length])))

    @rule(number=pick, piece=pieces)
    def open_read_job(self, number: int, piece: tuple) -> None:
        if len(self.reads) < 8:
            ident = self.ident(number)
            offset = piece[0] % len(self.model[ident])
            length = min(piece[1], len(self.model[ident]) - offset)
            view = memoryview(bytearray(length))
            volume = self.store.volumes[ident]
            job = paged(volume, lambda: volume.read_job(offset, view))
            self.reads.append((job, view, bytes(self.model[ident][offset : offset + length])))

    @precondition(lambda self: self.reads)
    @rule(number=pick)
    def finish_read(self, number: int) -> None:
        job, view, wanted = self.reads.pop(number % len(self.reads))
        try:
            job.run()
        finally:
            job.release()
        assert view == wanted, "a read job does not give the content as of when it was made"

    @rule(number=pick, piece=pieces, extents_max=st.sampled_from((1, 2, 1000)))
    def look_at_allocation(self, number: int, piece: tuple, extents_max: int) -> None:
        ident = self.ident(number)
        held = self.model[ident]
        offset = piece[0] % len(held)
        length = min(piece[1], len(held) - offset)
        compare_allocation(self.store.volumes[ident], held, offset, length, extents_max)

    @rule()
    def let_go_of_nodes(self) -> None:
        squeeze(self.store)

    @precondition(lambda self: self.page_job is None)
    @rule(numbers=st.lists(st.integers(1, 60), min_size=1, max_size=4))
    def begin_paging(self, numbers: list[int]) -> None:
        table = self.store.table
        self.page_job = self.store.page_job([ident for ident in numbers if ident < table.rows and table.file[ident]])

    @precondition(lambda self: self.page_job is not None)
    @rule()
    def end_paging(self) -> None:
        self.page_job.run()
        self.page_job.finish()
        self.page_job = None

    @rule()
    def change_temperature(self) -> None:
        self.directory.cold = not self.directory.cold

    # Volumes.

    @rule(number=pick, size=sizes, copy=st.booleans())
    def create(self, number: int, size: int, copy: bool) -> None:
        if len(self.model) < VOLUMES_MAX:
            ident = self.store.new_ident()
            source = self.ident(number) if copy and self.model else None
            held = bytearray(size) if source is None else bytearray(self.model[source])
            self.store.commit([Create(ident, len(held), {"n": ident}, source)])
            self.model[ident], self.metas[ident] = held, {"n": ident}

    @precondition(lambda self: len(self.model) > 1)
    @rule(number=pick)
    def delete(self, number: int) -> None:
        ident = self.ident(number)
        self.store.commit([Delete(ident)])
        del self.model[ident], self.metas[ident]

    @rule(number=pick, other=pick)
    def reset(self, number: int, other: int) -> None:
        ident, source = self.ident(number), self.ident(other)
        self.store.commit([Reset(ident, source)])
        self.model[ident] = bytearray(self.model[source])

    @rule(number=pick, more=st.sampled_from((0, 512, 3 * BLOCK, 20 * BLOCK)))
    def resize(self, number: int, more: int) -> None:
        ident = self.ident(number)
        held = self.model[ident]
        if len(held) + more <= SIZE_MAX:
            held.extend(bytes(more))
            self.store.commit([Resize(ident, len(held))])

    @rule(number=pick, text=st.text(max_size=20), all_of_it=st.booleans())
    def set_meta(self, number: int, text: str, all_of_it: bool) -> None:
        ident = 0 if all_of_it else self.ident(number)
        self.store.commit([SetMeta(ident, {"t": text})])
        self.metas[ident] = {"t": text}

    # Upkeep.

    @rule()
    def flush(self) -> None:
        self.store.flush()
        assert self.store.log.durable_seq >= self.store.log.flush_needed_seq

    @precondition(lambda self: self.flush_job is None)
    @rule()
    def begin_flush(self) -> None:
        self.flush_job = self.store.begin_flush()

    @precondition(lambda self: self.flush_job is not None)
    @rule()
    def end_flush(self) -> None:
        self.flush_job.run()
        self.store.end_flush(self.flush_job)
        assert self.store.log.durable_seq >= self.flush_job.seq
        self.flush_job = None

    @precondition(lambda self: self.slices is None)
    @rule(whole=st.booleans())
    def checkpoint(self, whole: bool) -> None:
        if whole:
            self.store.checkpoint()
        else:
            self.slices = Slices(self.store)

    @precondition(lambda self: self.slices is not None)
    @rule(slices=st.sampled_from((1, 1, 2, 100)), at_once=st.booleans())
    def go_on_with_checkpoint(self, slices: int, at_once: bool) -> None:
        for _ in range(slices):
            if self.slices.advance(at_once):
                self.slices = None
                break

    @rule(nodes=st.sampled_from((1, 2, 10, None)))
    def reap(self, nodes: int | None) -> None:
        left = paged(self.store, lambda: self.store.reap(nodes))
        assert left == 0 or nodes is not None

    @rule()
    def make_spare(self) -> None:
        if self.store.pool.wanted(1 << 20):
            self.store.pool.make_one()

    # Ends and beginnings.

    def reopen(self, directory: MemoryDirectory) -> None:
        for job, *_ in self.reads:
            job.release()
        self.reads, self.flush_job, self.slices, self.page_job = [], None, None, None
        self.directory = directory
        self.store = Store.open(directory, MapMemory(self.limit_bytes))
        self.witness.attach(self.store)

    @rule()
    def close(self) -> None:
        if self.slices is None and self.page_job is None:
            self.store.close()
            self.reopen(self.directory)
            assert self.store.recovered["records_dropped"] == 0
            self.compare()

    @rule()
    def kill(self) -> None:
        last = self.store.log.seq
        self.reopen(self.directory.after_kill())
        assert self.store.log.seq == last, "records were lost"
        self.compare()

    @rule(seed=st.integers(0, 2**32), style=st.sampled_from(("none", "all", "some", "some")))
    def cut_power(self, seed: int, style: str) -> None:
        durable, last = self.store.log.durable_seq, self.store.log.seq
        self.reopen(self.directory.after_cut(random.Random(seed), style))
        assert durable <= self.store.log.seq <= last
        self.witness.compare(self.store)
        state = self.witness.states[self.store.log.seq]
        self.metas = {0: self.store.meta} | {ident: volume.meta for ident, volume in state.items() if ident}
        self.model = {ident: bytearray(volume.all()) for ident, volume in state.items() if ident}
        if not self.model:  # what is left of the log ends before the first volume
            self.create(0, 8 * BLOCK, False)

    @invariant()
    def check(self) -> None:
        self.steps += 1
        if self.steps % 5 == 0:
            self.store._check()
            squeeze(self.store)

    def compare(self) -> None:
        assert set(self.store.volumes) == set(self.model)
        assert self.store.meta == self.metas[0]
        for ident, held in self.model.items():
            volume = self.store.volumes[ident]
            assert (volume.size_bytes, volume.meta) == (len(held), self.metas[ident])
            assert everything(volume) == held, f"volume {ident} differs"
            compare_allocation(volume, held, 0, len(held))
            wanted = Content(len(held), {}, {n: held[n * BLOCK : (n + 1) * BLOCK] for n in range(-(-len(held) // BLOCK))})
            assert volume.mapped_bytes == BLOCK * sum(any(block) for block in wanted.blocks.values())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for job, view, wanted in self.reads:
                job.run()
                job.release()
                assert view == wanted
            self.compare()
            paged(self.store, self.store.reap)
            self.store._check()


StoreMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
test_store_model = StoreMachine.TestCase

"""The table file: sections that are one chain, and nothing counts unless all of it does."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import content, disk, make, put

from simsr.errors import StoreDamaged
from simsr.store.layout import BLOCK, Super, TableEnd
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import COLUMNS
from simsr.store.store import Delete, Store
from simsr.store.table_file import LIVE, ROWS, VOLUMES, SectionWriter, read_sections, table_files, table_name

HEAD_BYTES = 20
ROW_BYTES = 4 + sum(np.dtype(code).itemsize for _, code in COLUMNS)

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
row_lists = st.lists(st.tuples(u32, u32, u32, u32, u32, u32, u64, st.integers(0, 65535), u32), max_size=9)
lives = st.lists(st.tuples(u32, st.integers(-(2**63), 2**63 - 1)), max_size=9)
volume_tables = st.fixed_dictionaries({
    "meta": st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3), "next_ident": u32,
    "deleted": st.lists(u32, max_size=4), "set": st.lists(st.fixed_dictionaries({"ident": u32}), max_size=4),
})  # fmt: skip
pieces = st.lists(
    st.one_of(st.tuples(st.just(ROWS), row_lists), st.tuples(st.just(LIVE), lives), st.tuples(st.just(VOLUMES), volume_tables)),
    max_size=6,
)


def add(writer: SectionWriter, kind: int, value) -> None:
    if kind == ROWS:
        ids = np.array([row[0] for row in value], dtype=np.uint32)
        columns = {
            name: np.array([row[index + 1] for row in value], dtype=np.dtype(code)) for index, (name, code) in enumerate(COLUMNS)
        }
        writer.add_rows(ids, columns)
    elif kind == LIVE:
        writer.add_live(np.array([s for s, _ in value], dtype=np.intp), np.array([c for _, c in value], dtype=np.int64))
    else:
        writer.add_volumes(value)


def written(wanted: list[tuple], number: int = 1) -> tuple[MemoryDirectory, TableEnd]:
    """A table file written in pieces, as several checkpoints do."""
    directory = MemoryDirectory()
    file = directory.create(table_name(number), 0)
    crc = offset = 0
    for kind, value in wanted:
        writer = SectionWriter(crc)
        add(writer, kind, value)
        data = b"".join(writer.take())
        assert len(data) == writer.size_bytes and writer.take() == []
        file.pwritev([data], offset)
        crc, offset = writer.crc, offset + len(data)
    return directory, TableEnd(number, offset, 0, crc)


def found_in(directory: MemoryDirectory, end: TableEnd) -> list[tuple]:
    found = []
    for section in read_sections(directory, end):
        if section.kind == ROWS:
            ids, columns = section.rows()
            found.append((ROWS, list(zip(ids.tolist(), *(columns[name].tolist() for name, _ in COLUMNS)))))
        elif section.kind == LIVE:
            slots, counts = section.live()
            found.append((LIVE, list(zip(slots.tolist(), counts.tolist()))))
        else:
            found.append((section.kind, section.volumes()))
    return found


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(pieces)
def test_sections_round_trip(wanted):
    """Whoever writes them, in one go or one after the other: the same bytes."""
    directory, end = written(wanted)
    assert found_in(directory, end) == wanted
    writer = SectionWriter()
    for kind, value in wanted:
        add(writer, kind, value)
    assert b"".join(writer.take()) == dict(directory.images())[table_name(1)] and writer.crc == end.crc


SOME = [
    (ROWS, [(1, 2, 3, 4, 5, 6, 7 << 40, 8, 9), (7, 1, 1, 1, 1, 1, 1, 1, 1)]),
    (LIVE, [(3, 100), (4, 0)]),
    (VOLUMES, {"meta": {"a": "b"}, "next_ident": 3, "deleted": [1], "set": [{"ident": 2}]}),
    (ROWS, [(7, 0, 0, 0, 0, 0, 0, 0, 0)]),
    (VOLUMES, {"meta": {}, "next_ident": 4, "deleted": [], "set": []}),
]


def test_sizes_on_disk():
    _, end = written(SOME[:1])
    assert end.offset == HEAD_BYTES + 2 * ROW_BYTES == HEAD_BYTES + 2 * 38


def test_every_flipped_byte_is_found():
    directory, end = written(SOME)
    name = table_name(1)
    for offset in range(end.offset):
        for mask in (0xFF, 1, 0x80):
            damaged = directory.after_kill()
            damaged.flip(name, offset, mask)
            with pytest.raises(StoreDamaged, match=f"{name} cannot be used: "):
                found_in(damaged, end)


def test_nothing_counts_before_all_of_it_was_checked_to_be_what_the_super_block_means():
    """Sections that are good in themselves, of another table file with the same name."""
    directory, end = written(SOME)
    other, _ = written([(SOME[0][0], SOME[0][1][:1] * 2), *SOME[1:]])
    with pytest.raises(StoreDamaged, match="it is not the one that the super block means"):
        found_in(other, end)
    with pytest.raises(StoreDamaged, match="not the one"):
        found_in(directory, TableEnd(1, 0, 0, 5))
    assert found_in(directory, TableEnd(1, 0, 0, 0)) == []


def test_sections_that_changed_places_or_are_missing():
    ends = [written(SOME[:count])[1].offset for count in range(len(SOME) + 1)]
    directory, end = written(SOME)
    data = dict(directory.images())[table_name(1)]
    parts = [data[begin:stop] for begin, stop in zip(ends, ends[1:])]
    rng = random.Random(1)
    for _ in range(20):
        order = [rng.randrange(len(parts)) for _ in range(rng.randint(3, 7))]
        other = MemoryDirectory()
        forged = b"".join(parts[index] for index in order)
        other.create(table_name(1), 0).pwritev([forged], 0)
        if order != list(range(len(parts))):
            with pytest.raises(StoreDamaged):
                found_in(other, TableEnd(1, len(forged), 0, end.crc))


def test_truncated_and_missing_files():
    directory, end = written(SOME)
    data = dict(directory.images())[table_name(1)]
    for size in range(end.offset):
        short = MemoryDirectory()
        short.create(table_name(1), 0).pwritev([data[:size]], 0)
        with pytest.raises(StoreDamaged, match=f"it has {size} bytes, not {end.offset}"):
            found_in(short, end)
        with pytest.raises(StoreDamaged):
            found_in(directory, TableEnd(1, size, 0, end.crc))
    with pytest.raises(StoreDamaged, match="the file is missing"):
        found_in(MemoryDirectory(), end)


def test_what_follows_the_end_does_not_matter():
    """A checkpoint that did not come to its end may have written more."""
    directory, end = written(SOME)
    directory.open(table_name(1)).pwritev([b"x" * 500], end.offset)
    assert found_in(directory, end) == SOME


def test_hostile_heads():
    """Lengths and kinds that nobody writes, with anything behind them: `StoreDamaged`, and no huge allocation."""
    rng = random.Random(2)
    for _ in range(300):
        head = bytearray(b"SIMT" + rng.randbytes(16))
        if rng.random() < 0.5:
            head[12:16] = rng.choice((0, 1, 40, 2**32 - 1, 1 << 28)).to_bytes(4, "little")
        data = bytes(head[: rng.choice((20, 20, 20, 7))]) + rng.randbytes(rng.choice((0, 1, 40)))
        directory = MemoryDirectory()
        directory.create(table_name(9), 0).pwritev([data], 0)
        with pytest.raises(StoreDamaged, match=table_name(9)):
            found_in(directory, TableEnd(9, len(data), 0, rng.randrange(2**32)))


def test_names():
    directory = MemoryDirectory()
    for name in ("table-000000000007", "table-7", "table-0000000000077", "map-000000000001", "table-000000000012.old"):
        directory.create(name, 0)
    assert table_files(directory) == [7] and table_name(7) == "table-000000000007"


# As checkpoints use it.


def kinds(directory: MemoryDirectory) -> list[int]:
    blocks = [Super.unpack(data) for name, data in directory.images() if name.startswith("super")]
    newest = max(blocks, key=lambda block: block.generation)
    return [section.kind for section in read_sections(directory, newest.end)]


def test_what_a_checkpoint_appends():
    directory, store = make()
    begun = kinds(directory)
    assert begun == [VOLUMES, VOLUMES], "an empty store has no nodes, and two checkpoints"
    volume = disk(store, 8)
    put(volume, 0, content(1))
    store.checkpoint()
    assert kinds(directory) == begun + [ROWS, LIVE, VOLUMES]
    store.checkpoint()
    volume.meta = {"changed": "but not by a commit"}
    assert kinds(directory) == begun + [ROWS, LIVE, VOLUMES, VOLUMES]
    *_, last = read_sections(directory, TableEnd(store._table_file, store._table_bytes, 0, store._table_crc))
    assert last.volumes()["set"] == [] and last.volumes()["deleted"] == []
    put(volume, BLOCK, content(2))
    disk(store, 8)
    store.commit([Delete(volume.ident)])
    store.reap()
    store.checkpoint()
    *_, rows, live, volumes = read_sections(directory, TableEnd(store._table_file, store._table_bytes, 0, store._table_crc))
    ids, columns = rows.rows()
    assert not columns["family"].any() and len(ids) == 2, "the nodes that are gone"
    assert live.live()[1].tolist() == [0] and volumes.volumes()["deleted"] == [volume.ident]
    assert [line["ident"] for line in volumes.volumes()["set"]] == [volume.ident + 1]
    after = Store.open(directory.after_kill())
    assert set(after.volumes) == {volume.ident + 1} and after.table.statistics()["map_nodes"] == 0


def test_rows_of_a_large_table_are_written_in_pieces(monkeypatch):
    from simsr.store import checkpoint as ckpt

    monkeypatch.setattr(ckpt, "_PAGE_ROWS", 10)
    monkeypatch.setattr(ckpt, "_PIECE_BYTES", 300)
    directory, store = make()
    volume = disk(store, 400)
    put(volume, 0, b"".join(content(tag) for tag in range(1, 401)))
    store._table_file = 0  # as after opening: the next one writes everything
    steps: list[str] = []
    directory.on_step = steps.append
    store.checkpoint()
    directory.on_step = None
    assert kinds(directory).count(ROWS) >= 14
    assert sum(step.startswith("write table") for step in steps) > 5 and sum(step.startswith("write map") for step in steps) > 5
    after = Store.open(directory.after_kill())
    after._check()
    assert after.volumes[1].read_bytes(0, 400 * BLOCK) == volume.read_bytes(0, 400 * BLOCK)

"""The data path: any range, any batch, cold memory, zeros and holes, damaged blocks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import TINY, content, cut, disk, everything, make, put, write, zero

from simsr.errors import BadRequest, BlockDamaged, NoSpace, NotFound
from simsr.store.layout import BLOCK, ZERO_BLOCK, ZERO_CRC, Geometry, crc32c
from simsr.store.memory import MemoryDirectory
from simsr.store.segments import segment_name
from simsr.store.store import Create, Delete, Reset, Resize, Store
from simsr.store.volume import Volume

EDGES = (0, 1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK)


def reread(directory: MemoryDirectory, volume: Volume) -> bytes:
    """What a process started now reads."""
    return everything(Store.open(directory.after_kill()).volumes[volume.ident])


@pytest.mark.parametrize("filled", [False, True])
def test_every_alignment(filled):
    """All pairs of edges as begin and end of a write, with data and with zeros, over holes and over data."""
    directory, store = make()
    volume = disk(store, 5)
    held = bytearray(5 * BLOCK)
    rng = random.Random(1)
    for begin in EDGES:
        for end in (edge for edge in EDGES if edge > begin):
            if filled:
                held[:] = rng.randbytes(len(held))
                put(volume, 0, bytes(held))
            data = rng.randbytes(end - begin)
            put(volume, begin, data)
            held[begin:end] = data
            assert everything(volume) == held, (begin, end)
            zero(volume, begin + 1, end - begin)
            held[begin + 1 : end + 1] = bytes(end - begin)
            assert everything(volume) == held, (begin, end)
    store._check()
    assert reread(directory, volume) == held


def test_reads_of_every_alignment():
    _, store = make()
    volume = disk(store, 5)
    put(volume, 0, content(1) + bytes(BLOCK) + content(2) + content(3))
    held = everything(volume)
    for begin in EDGES:
        for end in (edge for edge in (*EDGES, 5 * BLOCK) if edge >= begin):
            view = memoryview(bytearray(end - begin))
            assert volume.read([(begin, view)]) == []
            assert view == held[begin:end] == volume.read_bytes(begin, end - begin)


requests = st.lists(
    st.tuples(st.integers(0, 6 * BLOCK), st.integers(0, 4 * BLOCK), st.booleans(), st.sampled_from("dzh")), max_size=6
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(requests, st.booleans())
def test_a_batch_is_the_same_as_its_requests_one_by_one(batch, cold):
    """Also where they overlap, and whether or not memory is cold."""
    directory, store = make()
    volume = disk(store, 10)
    rng = random.Random(0)
    put(volume, 0, rng.randbytes(4 * BLOCK))
    held = bytearray(everything(volume))
    directory.cold = cold
    todo = []
    for offset, length, aligned, what in batch:
        if aligned:
            offset, length = offset & -BLOCK, length & -BLOCK
        data = rng.randbytes(length) if what == "d" else bytes(length)
        todo.append((offset, length, None if what == "h" else memoryview(data)))
        held[offset : offset + length] = data
    write(volume, todo)
    assert everything(volume) == held
    store._check()
    assert reread(directory, volume) == held


def test_writes_larger_than_a_segment():
    directory, store = make()
    volume = disk(store, 400)
    data = b"".join(content(tag) for tag in range(200))
    put(volume, 7 * BLOCK, data)
    assert volume.read_bytes(7 * BLOCK, len(data)) == data
    assert store.statistics()["segments_sealed"] >= 6
    put(volume, 100 * BLOCK + 5, data[:-5])
    assert volume.read_bytes(100 * BLOCK + 5, len(data) - 5) == data[:-5]
    assert volume.mapped_bytes == 293 * BLOCK
    store._check()
    assert reread(directory, volume) == everything(volume)


def test_more_extents_than_a_record_area_holds():
    """8 KiB of records hold about a thousand extents; the batch goes on in the next segment."""
    directory, store = make()
    volume = disk(store, 3000)
    put(volume, 0, b"".join(content(tag) for tag in range(60)))
    write(volume, [(block * BLOCK, BLOCK, None) for block in range(2999, 0, -1)])
    assert everything(volume) == content(0) + bytes(2999 * BLOCK)
    store._check()
    assert reread(directory, volume) == everything(volume)


def test_more_extents_than_one_record_holds():
    directory, store = make(geometry=Geometry(1024, 512, 9))
    volume = disk(store, 1 << 20)
    put(volume, 70000 * BLOCK, content(1))
    records = store.log.records_appended
    write(volume, [(2 * block * BLOCK, BLOCK, None) for block in range(70000)] + [(BLOCK, BLOCK, memoryview(content(2)))])
    assert store.log.records_appended == records + 2
    store = Store.open(directory.after_kill())
    assert store.volumes[1].read_bytes(0, 2 * BLOCK) == bytes(BLOCK) + content(2)
    assert store.volumes[1].mapped_bytes == BLOCK


# Sizes that are no multiple of a block.


@pytest.mark.parametrize("tail", [1, 512, 4095])
def test_last_block_in_part(tail):
    directory, store = make()
    ident = store.new_ident()
    store.commit([Create(ident, 2 * BLOCK + tail, {})])
    volume = store.volumes[ident]
    data = random.Random(tail).randbytes(2 * BLOCK + tail)
    put(volume, 0, data)
    assert everything(volume) == data and volume.mapped_bytes == 3 * BLOCK
    put(volume, 2 * BLOCK + tail - 1, b"!")
    assert everything(volume) == data[:-1] + b"!"
    assert volume.allocation(0, volume.size_bytes) == [(2 * BLOCK + tail, True)]
    zero(volume, 2 * BLOCK, tail)
    assert volume.mapped_bytes == 2 * BLOCK, "the rest of a last block that became zero is a hole"
    assert volume.allocation(0, volume.size_bytes) == [(2 * BLOCK, True), (tail, False)]
    put(volume, 2 * BLOCK, data[-tail:])
    store.commit([Resize(ident, 4 * BLOCK)])
    assert everything(volume) == data + bytes(2 * BLOCK - tail), "what lies behind the old end is not zero"
    assert reread(directory, volume) == everything(volume)


@pytest.mark.parametrize("offset, length", [(-1, 5), (0, -1), (0, 10 * BLOCK + 1), (10 * BLOCK, 1), (1 << 70, 0), (5, 1 << 70)])
def test_ranges_outside_are_refused(offset, length):
    _, store = make()
    volume = disk(store, 10)
    with pytest.raises(BadRequest, match=f"does not lie within the {10 * BLOCK} bytes"):
        volume.check_range(offset, length)
    volume.check_range(0, 10 * BLOCK)
    volume.check_range(10 * BLOCK, 0)


def test_empty_requests():
    _, store = make()
    volume = disk(store, 2)
    seq = store.log.seq
    assert volume.write([]) == 0
    assert volume.write([(0, 0, memoryview(b"")), (BLOCK, 0, None), (17, 0, memoryview(b""))]) == 3
    assert store.log.seq == seq, "a record of nothing was written"
    assert volume.read([(5, memoryview(bytearray(0)))]) == [] and volume.read([]) == []
    assert volume.read_bytes(2 * BLOCK, 0) == b"" and volume.allocation(0, 0) == []


# Zeros.


def test_zeros_are_holes():
    directory, store = make()
    volume = disk(store, 40)
    data = content(1) + bytes(3 * BLOCK) + content(2) + bytes(BLOCK)
    appended = store.log.blocks_appended
    put(volume, 0, data)
    assert store.log.blocks_appended == appended + 2 and volume.mapped_bytes == 2 * BLOCK
    put(volume, 0, bytes(BLOCK))
    put(volume, 4 * BLOCK, bytes(2 * BLOCK))
    assert volume.mapped_bytes == 0 and store.log.blocks_appended == appended + 2
    put(volume, 5, b"x")
    put(volume, 5, b"\0")
    assert volume.mapped_bytes == 0, "a block that becomes zero by a write of a part of it is a hole"
    assert reread(directory, volume) == bytes(40 * BLOCK)


def with_checksum_of_zeros(seed: int) -> bytes:
    """A block that is not zero and has the checksum of one that is: CRCs are linear, so its last bytes can be solved for."""
    head = random.Random(seed).randbytes(BLOCK - 4)
    base = crc32c(head + bytes(4))
    rows = [(crc32c(head + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit) for bit in range(32)]
    wanted, tail = base ^ ZERO_CRC, 0
    for bit in range(32):
        pivot = next(row for row in rows if row[0] >> bit & 1)
        rows = [(v ^ pivot[0], m ^ pivot[1]) if v >> bit & 1 else (v, m) for v, m in rows if (v, m) != pivot]
        if wanted >> bit & 1:
            wanted, tail = wanted ^ pivot[0], tail ^ pivot[1]
    return head + tail.to_bytes(4, "little")


def test_blocks_that_only_look_like_zeros_by_checksum():
    directory, store = make()
    volume = disk(store, 40)
    false = [with_checksum_of_zeros(seed) for seed in range(3)]
    assert all(crc32c(block) == ZERO_CRC and block != ZERO_BLOCK for block in false)
    data = content(1) + false[0] + ZERO_BLOCK + false[1] + content(2) + false[2]
    put(volume, 0, data)
    put(volume, 10 * BLOCK, false[0])
    wanted = data.ljust(10 * BLOCK, b"\0") + false[0]
    assert everything(volume) == wanted.ljust(40 * BLOCK, b"\0")
    assert volume.mapped_bytes == 6 * BLOCK
    store._check()
    assert reread(directory, volume) == everything(volume)


def test_huge_discards_and_far_blocks():
    """256 TiB, the largest volume: discarding it all takes a few extents, and the far end works."""
    directory, store = make(geometry=Geometry(32, 2, 9))
    size = BLOCK << 36
    ident = store.new_ident()
    store.commit([Create(ident, size, {})])
    volume = store.volumes[ident]
    for offset in (0, 1 << 39, (1 << 39) + BLOCK, size - BLOCK):
        put(volume, offset, content(5))
    put(volume, size - 10, b"last bytes")
    assert volume.read_bytes(size - 10, 10) == b"last bytes"
    records = store.log.records_appended
    zero(volume, 1, size - BLOCK - 1)
    assert store.log.records_appended == records + 1
    assert volume.mapped_bytes == 2 * BLOCK
    assert volume.read_bytes(size - BLOCK, BLOCK) == content(5)[:-10] + b"last bytes"
    store._check()
    store = Store.open(directory.after_kill())
    assert store.volumes[ident].mapped_bytes == 2 * BLOCK
    zero(store.volumes[ident], 0, size)
    assert store.volumes[ident].mapped_bytes == 0


# Allocation.


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from("..ddh"), min_size=1, max_size=30), st.integers(0, 2**20), st.integers(0, 2**20))
def test_allocation(blocks, start, length):
    _, store = make()
    volume = disk(store, len(blocks))
    for index, kind in enumerate(blocks):
        if kind != ".":
            put(volume, index * BLOCK, content(index + 1))
        if kind == "h":
            zero(volume, index * BLOCK, BLOCK)
    start %= volume.size_bytes
    length %= volume.size_bytes - start + 1
    extents = volume.allocation(start, length)
    flat = b"".join((b"d" if data else b".") * count for count, data in extents)
    wanted = b"".join((b"d" if kind == "d" else b".") * BLOCK for kind in blocks)[start : start + length]
    assert flat == wanted
    assert all(a[1] != b[1] for a, b in zip(extents, extents[1:])), "neighbours are alike"
    for most in (1, 2, 3):
        assert volume.allocation(start, length, most) == extents[:most]


# Cold memory.


def cold_volume() -> tuple[MemoryDirectory, Store, Volume]:
    directory, store = make()
    volume = disk(store, 10)
    put(volume, 0, content(1) + content(2) + content(3))
    directory.cold = True
    return directory, store, volume


def fetch(volume: Volume, offset: int, length: int) -> dict:
    fetched = {}
    for block, job in volume.edge_jobs(offset, length).items():
        job.run()
        fetched[block] = job.fetched
        job.release()
    return fetched


def test_cold_reads_are_left_to_jobs():
    _, _, volume = cold_volume()
    views = [memoryview(bytearray(length)) for length in (BLOCK, BLOCK, 10, 3 * BLOCK, BLOCK)]
    offsets = (0, 5 * BLOCK, BLOCK - 5, 1, 2 * BLOCK)
    assert volume.read(list(zip(offsets, views))) == [0, 2, 3, 4], "a hole is never cold"
    for offset, view in zip(offsets, views):
        job = volume.read_job(offset, view)
        job.run()
        job.release()
        assert view == (content(1) + content(2) + content(3)).ljust(10 * BLOCK, b"\0")[offset : offset + len(view)]


def test_write_stops_in_front_of_a_cold_edge():
    _, store, volume = cold_volume()
    batch = [
        (4 * BLOCK, BLOCK, memoryview(content(7))),
        (BLOCK - 3, 6, memoryview(b"abcdef")),
        (5 * BLOCK, BLOCK, memoryview(content(8))),
    ]
    assert volume.write(batch) == 1
    assert volume.read_bytes(4 * BLOCK, 2 * BLOCK) == content(7) + bytes(BLOCK)
    assert volume.read_bytes(0, 2 * BLOCK) == content(1) + content(2)
    fetched = fetch(volume, BLOCK - 3, 6)
    assert set(fetched) == {0, 1}
    assert volume.write(batch, 1, fetched) == 3
    assert volume.read_bytes(0, 2 * BLOCK) == content(1)[:-3] + b"abc" + b"def" + content(2)[3:]
    assert volume.read_bytes(5 * BLOCK, BLOCK) == content(8)
    store._check()


def test_edges_over_holes_are_not_cold():
    _, _, volume = cold_volume()
    assert volume.write([(7 * BLOCK + 5, 3, memoryview(b"abc"))]) == 1
    assert volume.read_bytes(7 * BLOCK, BLOCK) == (bytes(5) + b"abc").ljust(BLOCK, b"\0")


@pytest.mark.parametrize("range_, blocks", [
    ((0, BLOCK), []), ((0, 3 * BLOCK), []), ((1, 1), [0]), ((0, 1), [0]), ((1, BLOCK - 1), [0]), ((1, BLOCK), [0, 1]),
    ((BLOCK, BLOCK + 1), [2]), ((BLOCK - 1, 2 * BLOCK + 2), [0, 3]), ((5, 0), []), ((BLOCK - 1, BLOCK + 1), [0]),
])  # fmt: skip
def test_edges_of_a_range(range_, blocks):
    _, store = make()
    assert list(disk(store, 10).edge_jobs(*range_)) == blocks


@pytest.mark.parametrize("between", ["other bytes", "same bytes", "hole", "revert", "moved and back"])
def test_stale_fetched_content_is_not_used(between):
    """What was fetched counts only while the block is still the same one, wherever the change came from."""
    directory, store, volume = cold_volume()
    batch = [(10, 3, memoryview(b"abc"))]
    saved = store.new_ident()
    store.commit([Create(saved, volume.size_bytes, {}, volume.ident)])
    if between == "revert":
        put(volume, 0, content(50))
    assert volume.write(batch) == 0
    fetched = fetch(volume, 10, 3)
    match between:
        case "other bytes":
            put(volume, 0, content(60))
        case "same bytes":
            put(volume, 0, content(1))
        case "hole":
            zero(volume, 0, BLOCK)
        case "revert":
            store.commit([Reset(volume.ident, saved)])
        case "moved and back":
            put(volume, 0, content(60))
            store.commit([Reset(volume.ident, saved)])
    old = volume.read_bytes(0, BLOCK)
    if volume.write(batch, 0, fetched) == 0:
        assert between in ("other bytes", "same bytes", "revert")
        assert volume.read_bytes(0, BLOCK) == old
        assert volume.write(batch, 0, fetch(volume, 10, 3)) == 1
    assert volume.read_bytes(0, BLOCK) == old[:10] + b"abc" + old[13:]
    store._check()


def test_one_stale_edge_of_two():
    _, _, volume = cold_volume()
    batch = [(BLOCK - 2, 4, memoryview(b"wxyz"))]
    fetched = fetch(volume, BLOCK - 2, 4)
    put(volume, BLOCK, content(70))
    assert volume.write(batch, 0, fetched) == 0
    assert volume.read_bytes(0, BLOCK) == content(1), "half of a request was written"
    assert volume.write(batch, 0, fetch(volume, BLOCK - 2, 4)) == 1
    assert volume.read_bytes(0, 2 * BLOCK) == content(1)[:-2] + b"wxyz" + content(70)[2:]


def test_read_job_gives_the_content_as_of_when_it_was_made():
    _, store, volume = cold_volume()
    view = memoryview(bytearray(10 * BLOCK))
    wanted = everything(volume)
    job = volume.read_job(0, view)
    put(volume, 0, content(80))
    zero(volume, BLOCK, BLOCK)
    store.commit([Delete(volume.ident)])
    store.reap()
    store.checkpoint()
    other = disk(store, 100)
    put(other, 0, b"".join(content(tag + 1) for tag in range(100)))
    store.checkpoint()
    job.run()
    job.release()
    assert view == wanted


# Damage.


def damage(directory: MemoryDirectory, volume: Volume, block: int) -> tuple[int, int]:
    entry = volume.map.leaf_at(block >> volume.map.bits).slots[block & (volume.map.fanout - 1)] & 0xFFFFFFFF
    segment, offset = entry >> TINY.segment_shift, (entry & (TINY.segment_blocks - 1)) * BLOCK
    directory.flip(segment_name(segment), offset + 99)
    return segment, offset


def test_damaged_block_is_named_and_others_are_read():
    directory, store = make()
    volume = disk(store, 12)
    put(volume, 0, b"".join(content(tag) for tag in range(1, 11)))
    segment, offset = damage(directory, volume, 4)
    whole = memoryview(bytearray(12 * BLOCK))
    for action in [
        lambda: volume.read([(4 * BLOCK, whole[:BLOCK])]),
        lambda: volume.read([(0, whole)]),
        lambda: volume.read([(4 * BLOCK + 7, whole[:9])]),
        lambda: volume.read_bytes(BLOCK, 8 * BLOCK),
        lambda: volume.read_bytes(4 * BLOCK + 7, 9),
    ]:
        with pytest.raises(BlockDamaged) as caught:
            action()
        assert {type(value) for value in caught.value.details.values()} == {int, str}, "the API tells them as JSON"
        assert caught.value.details == {
            "path": "memory", "volume": volume.ident, "offset_bytes": 4 * BLOCK, "segment": segment, "segment_offset": offset,
        }  # fmt: skip
    for block in (0, 3, 5, 9, 11):
        assert volume.read_bytes(block * BLOCK, BLOCK) == (content(block + 1) if block < 10 else bytes(BLOCK))


@pytest.mark.parametrize("verify", [True, False])
def test_one_leaf_of_fragments_runs_and_holes(verify):
    """Reads of whole blocks that lie in one leaf, from every first to every last block of it; also when one fragment is cold or damaged."""
    directory, store = make(geometry=Geometry(TINY.segment_blocks, TINY.record_blocks, 4))
    store.pool.verify_reads = verify
    volume = disk(store, 16)
    wanted = [ZERO_BLOCK] * 16
    for tag, (first, count) in enumerate([(12, 2), (3, 1), (1, 2), (4, 3), (5, 1), (15, 1), (8, 2)], 1):
        put(volume, first * BLOCK, content(tag) * count)
        wanted[first : first + count] = [content(tag)] * count
    for first in range(16):
        for last in range(first + 1, 17):
            view = memoryview(bytearray(b"?" * ((last - first) * BLOCK)))
            assert volume.read([(first * BLOCK, view)]) == []
            assert view == b"".join(wanted[first:last]), (first, last)
    directory.cold = True
    assert volume.read([(0, memoryview(bytearray(16 * BLOCK))), (10 * BLOCK, memoryview(bytearray(2 * BLOCK)))]) == [0]
    directory.cold = False
    damage(directory, volume, 5)
    whole = memoryview(bytearray(16 * BLOCK))
    if verify:
        with pytest.raises(BlockDamaged) as caught:
            volume.read([(0, whole)])
        assert caught.value.details["offset_bytes"] == 5 * BLOCK
    else:
        assert volume.read([(0, whole)]) == []


def test_write_to_a_part_of_a_damaged_block_is_refused_and_of_the_whole_heals_it():
    directory, store = make()
    volume = disk(store, 12)
    put(volume, 0, content(1) + content(2))
    damage(directory, volume, 1)
    seq = store.log.seq
    with pytest.raises(BlockDamaged):
        volume.write([(BLOCK + 5, 3, memoryview(b"abc"))])
    with pytest.raises(BlockDamaged):
        volume.write([(BLOCK // 2, BLOCK, memoryview(content(9)))])
    assert store.log.seq == seq
    jobs = volume.edge_jobs(BLOCK + 5, 3)
    with pytest.raises(BlockDamaged):
        jobs[1].run()
    jobs[1].release()
    put(volume, BLOCK, content(3))
    assert volume.read_bytes(0, 2 * BLOCK) == content(1) + content(3)


def test_snapshot_shares_damage_and_survives_the_overwriting_of_it():
    directory, store = make()
    volume = disk(store, 12)
    put(volume, 0, content(1))
    snapshot = disk(store, 12, volume.ident)
    damage(directory, volume, 0)
    put(volume, 0, content(2))
    assert volume.read_bytes(0, BLOCK) == content(2)
    with pytest.raises(BlockDamaged):
        snapshot.read_bytes(0, BLOCK)


# Ends.


def test_deleted_volume_takes_no_writes():
    """A record of a volume that is gone could not be replayed: the store would never open again."""
    directory, store = make()
    volume = disk(store, 12)
    disk(store, 3)
    put(volume, 0, content(1))
    job = volume.read_job(0, memoryview(bytearray(BLOCK)))
    store.commit([Delete(volume.ident)])
    seq = store.log.seq
    for batch in ([(0, BLOCK, memoryview(content(2)))], [(5, 3, memoryview(b"abc"))], [(0, BLOCK, None)]):
        with pytest.raises(NotFound, match="no volume is called 1"):
            volume.write(batch)
    with pytest.raises(BadRequest):
        volume.read_bytes(0, 1)
    assert store.log.seq == seq
    job.run()
    job.release()
    store._check()
    assert list(Store.open(directory.after_kill()).volumes) == [2]


def test_no_space_leaves_whole_records_only():
    directory, store = make()
    volume = disk(store, 400)
    directory.room_bytes = 0
    data = b"".join(content(tag) for tag in range(1, 301))
    with pytest.raises(NoSpace):
        put(volume, 0, data)
    found = everything(volume)
    done = found.index(bytes(BLOCK)) // BLOCK
    assert found == data[: done * BLOCK].ljust(400 * BLOCK, b"\0") and done > 0
    store._check()
    assert reread(directory, volume) == found
    store.flush()
    assert everything(Store.open(cut(directory)).volumes[volume.ident]) == found


def test_blocks_needed_is_an_upper_bound():
    _, store = make()
    volume = disk(store, 100)
    rng = random.Random(5)
    for _ in range(60):
        offset = rng.randrange(50 * BLOCK)
        length = rng.choice((1, 700, BLOCK, BLOCK + 1, 9 * BLOCK))
        batch = [(offset, length, memoryview(rng.randbytes(length)))]
        before = store.log.blocks_appended
        volume.write(batch)
        assert store.log.blocks_appended - before <= Volume.blocks_needed(batch)


def test_views_need_not_be_writable_nor_bytes():
    _, store = make()
    volume = disk(store, 4)
    buffer = bytearray(content(1) + content(2))
    volume.write([(0, BLOCK, memoryview(buffer)[:BLOCK]), (BLOCK, BLOCK, memoryview(buffer)[BLOCK:].toreadonly())])
    buffer[:] = bytes(len(buffer))
    assert volume.read_bytes(0, 2 * BLOCK) == content(1) + content(2), "the store kept the caller's buffer"


def test_extents_of_one_record_may_repeat_a_block():
    """Within a record later extents win; holes and data of the same block, in any order."""
    directory, store = make()
    volume = disk(store, 20)
    records = store.log.records_appended
    view = memoryview
    write(volume, [
        (0, BLOCK, view(content(1))), (0, BLOCK, None), (0, BLOCK, view(content(2))),
        (0, 10 * BLOCK, view(content(3) * 10)), (2 * BLOCK, 9 * BLOCK, view(content(4) * 9)), (5 * BLOCK, BLOCK, None),
    ])  # fmt: skip
    assert store.log.records_appended == records + 1
    wanted = content(3) * 2 + content(4) * 3 + bytes(BLOCK) + content(4) * 5
    assert everything(volume) == wanted.ljust(20 * BLOCK, b"\0")
    store._check()
    assert reread(directory, volume) == everything(volume)

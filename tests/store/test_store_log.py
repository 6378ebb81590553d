"""The log: the chain of records, rolling, group commit, and that an I/O error is the end."""

from __future__ import annotations

import errno

import pytest
from store_kit import TINY, UUID, content, cut, disk, everything, make, put

from simsr.errors import NoSpace, StoreStopped
from simsr.store import layout
from simsr.store.layout import BLOCK
from simsr.store.log import _OFTEN_RECORDS, KEEP_FOR_CLEANING, KEEP_FOR_WRITES
from simsr.store.memory import MemoryDirectory
from simsr.store.segments import segment_name
from simsr.store.store import Delete, SetMeta, Store


def records_on_disk(directory: MemoryDirectory) -> list[layout.Record]:
    """Every record of every segment, in log order."""
    found = []
    for name, data in directory.images():
        if name.startswith("seg-") and (header := layout.SegmentHeader.unpack(data[:64])) is not None:
            salt, offset = layout.salt_of(UUID, header.log_index), layout.HEADER_BYTES
            area = memoryview(data)[: TINY.record_area_bytes]
            while record := layout.unpack_record(area, offset, salt):
                found.append(record)
                offset += record.size
    return sorted(found, key=lambda record: record.seq)


def test_records_are_a_chain_over_all_segments():
    directory, store = make()
    volume = disk(store, 200)
    for index in range(100):
        put(volume, index * BLOCK, content(index + 1))
        if index % 7 == 0:
            store.flush()
    records = records_on_disk(directory)
    assert [record.seq for record in records] == list(range(1, store.log.seq + 1))
    assert store.log._next_log_index > 4, "the log did not roll"
    prev = 0
    for record in records:
        assert record.prev_crc == prev and record.durable_seq < record.seq
        prev = record.crc
    assert [record.durable_seq for record in records] == sorted(record.durable_seq for record in records)
    assert {record.kind for record in records} == {layout.EXTENTS, layout.COMMIT, layout.MARK}


def test_header_of_a_new_segment_repeats_what_is_durable():
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    store.flush()
    durable = store.log.durable_seq
    store.log.roll()
    header = layout.SegmentHeader.unpack(dict(directory.images())[segment_name(store.log.active.slot)][:64])
    assert header.durable_seq == durable and header.first_seq == store.log.seq + 1


def test_records_soon_after_a_flush_are_written_by_a_system_call():
    """The first store into a mapping after a sync would have the next sync write the whole folio."""
    _, store = make()
    volume, calls = disk(store, 4), []
    area = store.log.active.area
    write, pwrite = area.write, area.pwrite
    area.write = lambda position, data: (calls.append("write"), write(position, data))
    area.pwrite = lambda position, data: (calls.append("pwrite"), pwrite(position, data))
    for tag in range(1, 3):
        put(volume, 0, content(tag))
    assert set(calls) == {"write"}
    store.flush()
    del calls[:]
    for tag in range(_OFTEN_RECORDS + 10):
        store.log.append(layout.COMMIT, 0, b"[]")
    assert calls == ["pwrite"] * (_OFTEN_RECORDS - 1) + ["write"] * 11  # the first one was the MARK
    store.abandon()


def test_flush_of_nothing_is_nothing():
    directory, store = make()
    disk(store, 4)
    store.flush()
    steps: list[str] = []
    directory.on_step = steps.append
    assert store.begin_flush() is None
    store.flush()
    assert steps == [], "the MARK that a flush leaves asked for another flush"


def test_flush_syncs_only_segments_written_since():
    directory, store = make()
    volume = disk(store, 100)
    for index in range(70):
        put(volume, index * BLOCK, content(index))
    job = store.begin_flush()
    assert len(job.files) == 3
    job.run()
    store.end_flush(job)
    put(volume, 0, content(7))
    assert len(store.begin_flush().files) == 1


def test_flush_covers_what_was_there_when_it_began():
    directory, store = make()
    volume = disk(store, 100)
    store.flush()
    put(volume, 0, content(1))
    job = store.begin_flush()
    put(volume, BLOCK, content(2))
    for index in range(40):
        put(volume, (index + 2) * BLOCK, content(index + 3))  # on into the next segment
    last = store.log.seq
    job.run()
    store.end_flush(job)
    assert store.log.durable_seq == job.seq < last
    assert store.log.durable_seq < store.log.flush_needed_seq
    after = Store.open(cut(directory))
    assert after.volumes[1].read_bytes(0, BLOCK) == content(1)
    later = store.begin_flush()
    assert later.seq >= last
    later.run()
    store.end_flush(later)
    after = Store.open(cut(directory))
    assert everything(after.volumes[1]) == everything(volume)


@pytest.mark.parametrize("records", [1, 2])
def test_what_a_flush_came_too_early_for_is_synced_by_the_next_one(records):
    """Even if it is a single record, in a segment that has been left meanwhile, so that no MARK follows it there."""
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    job = store.begin_flush()
    job.run()
    for index in range(records):
        put(volume, (index + 1) * BLOCK, content(index + 2))
    store.log.roll()
    store.end_flush(job)
    store.flush()
    assert everything(Store.open(cut(directory)).volumes[1]) == everything(volume)


def test_who_waits_for_a_flush_is_told_before_its_mark_is_written():
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    job = store.begin_flush()
    job.run()
    told: list[tuple[int, int]] = []
    store.end_flush(job, durable=lambda: told.append((store.log.durable_seq, store.log.seq)))
    assert told == [(job.seq, job.seq)]
    assert [record.kind for record in records_on_disk(directory)][-1] == layout.MARK
    assert store.log.seq == job.seq + 1
    assert store.begin_flush() is None


def test_who_waits_for_a_flush_that_failed_is_not_told_that_it_is_durable():
    _, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    job = store.begin_flush()
    told: list[int] = []
    with pytest.raises(StoreStopped):
        store.end_flush(job, OSError(errno.EIO, "injected"), lambda: told.append(1))
    assert not told


def test_flushes_may_end_in_any_order():
    directory, store = make()
    volume = disk(store, 100)
    put(volume, 0, content(1))
    first = store.begin_flush()
    put(volume, BLOCK, content(2))
    second = store.begin_flush()
    second.run()
    store.end_flush(second)
    flushes = store.log.flushes
    first.run()
    store.end_flush(first)
    assert store.log.durable_seq == second.seq and store.log.flushes == flushes
    assert everything(Store.open(cut(directory)).volumes[1]) == everything(volume)


def test_roll_keeps_a_reserve_and_changes_nothing_when_there_is_none():
    directory, store = make()
    directory.room_bytes = 0
    active, spares = store.log.active, list(store.pool.spares)
    assert len(spares) == KEEP_FOR_WRITES
    with pytest.raises(NoSpace):
        store.log.roll()
    assert store.log.active is active and store.pool.spares == spares and store.log.failure is None
    store.log.roll(keep=KEEP_FOR_CLEANING)
    assert store.log.active is spares[-1] and store.pool.spares == spares[:-1]
    for _ in range(KEEP_FOR_WRITES - KEEP_FOR_CLEANING - 1):
        store.log.roll(keep=KEEP_FOR_CLEANING)
    with pytest.raises(NoSpace):
        store.log.roll(keep=KEEP_FOR_CLEANING)
    for _ in range(KEEP_FOR_CLEANING):
        store.log.roll(keep=0)
    assert store.log.active is spares[0] and not store.pool.spares


def fail_on(directory: MemoryDirectory, start: str) -> list[str]:
    steps: list[str] = []

    def on_step(what: str) -> None:
        steps.append(what)
        if what.startswith(start):
            raise OSError(errno.EIO, "injected")

    directory.on_step = on_step
    return steps


def assert_stopped(store: Store, volume, steps: list[str]) -> None:
    """Everything that would change something raises, and does not even try; reading works; closing does not checkpoint."""
    held = everything(volume)
    steps.clear()
    for action in [
        lambda: put(volume, 0, content(9)),
        lambda: volume.write([(0, BLOCK, None)]),
        lambda: volume.write([(5, 10, memoryview(bytes(10)))]),
        lambda: store.commit([SetMeta(0, {"a": 1})]),
        lambda: store.commit([Delete(volume.ident)]),
        store.begin_flush,
        store.flush,
        store.begin_checkpoint,
        store.checkpoint,
        store.log.roll,
        store.log.raise_if_stopped,
    ]:
        with pytest.raises(StoreStopped, match="has stopped after an I/O error: .*injected"):
            action()
    assert everything(volume) == held and not store.wants_checkpoint and not store.cleaner.wanted
    store.close()
    assert steps == [], "something was written or synced after the error"


@pytest.mark.parametrize("how", ["whole", "split"])
def test_sync_error_stops_the_store(how):
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    store.flush()
    flushed = store.log.durable_seq
    put(volume, BLOCK, content(2))
    steps = fail_on(directory, "sync seg")
    if how == "whole":
        with pytest.raises(StoreStopped, match="injected"):
            store.flush()
    else:
        job = store.begin_flush()
        with pytest.raises(OSError) as caught:
            job.run()
        with pytest.raises(StoreStopped, match="injected"):
            store.log.raise_if_stopped()  # at once, before anybody was told
        with pytest.raises(StoreStopped, match="injected"):
            store.end_flush(job, caught.value)
    assert store.log.durable_seq == flushed
    directory.on_step = steps.append  # the disk pretends to be well again
    assert_stopped(store, volume, steps)
    after = Store.open(cut(directory))
    assert everything(after.volumes[1]) == content(1) + bytes(39 * BLOCK)


def test_another_flush_under_way_does_not_become_durable_after_an_error():
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    first = store.begin_flush()
    put(volume, BLOCK, content(2))
    second = store.begin_flush()
    durable = store.log.durable_seq
    with pytest.raises(StoreStopped):
        store.end_flush(first, OSError(errno.EIO, "injected"))
    second.run()  # the kernel reports an error once; this sync may succeed, and lie
    with pytest.raises(StoreStopped):
        store.end_flush(second)
    assert store.log.durable_seq == durable


@pytest.mark.parametrize("start", ["write seg"])
@pytest.mark.parametrize("skip", [0, 1])
def test_write_error_stops_the_store(start, skip):
    """``skip`` 0: the data cannot be written; 1: the record cannot."""
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    store.flush()
    steps: list[str] = []

    def on_step(what: str) -> None:
        steps.append(what)
        if len(steps) > skip:
            raise OSError(errno.EIO, "injected")

    directory.on_step = on_step
    seq = store.log.seq
    with pytest.raises(StoreStopped, match="injected"):
        put(volume, 0, content(2))
    assert store.log.seq == seq
    assert everything(volume)[:BLOCK] == content(1), "a write that failed shows"
    directory.on_step = steps.append
    assert_stopped(store, volume, steps)
    store._check()


def test_error_while_rolling_stops_the_store():
    directory, store = make()
    volume = disk(store, 40)
    for index in range(30):
        put(volume, index * BLOCK, content(index + 1))
    steps = fail_on(directory, "create seg")
    with pytest.raises(StoreStopped, match="injected"):
        put(volume, 0, content(99))
    assert everything(volume)[:BLOCK] == content(1)
    directory.on_step = steps.append
    assert_stopped(store, volume, steps)


@pytest.mark.parametrize("step", [
    "create map", "write map", "sync map", "write table", "sync table", "sync directory", "write super", "sync super",
])  # fmt: skip
def test_checkpoint_error_stops_the_store(step):
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    store.flush()
    steps = fail_on(directory, step)
    with pytest.raises(StoreStopped, match="injected"):
        store.checkpoint()
    directory.on_step = steps.append
    store._check()
    assert_stopped(store, volume, steps)
    for style in ("none", "all"):
        assert everything(Store.open(cut(directory, style)).volumes[1])[:BLOCK] == content(1)


def test_checkpoint_under_way_does_not_go_on_after_a_sync_error():
    """Its own sync of the same files might succeed, and lie; so no super block may be written."""
    directory, store = make()
    volume = disk(store, 40)
    put(volume, 0, content(1))
    checkpoint = store.begin_checkpoint()
    flush = store.begin_flush()
    with pytest.raises(StoreStopped):
        store.end_flush(flush, OSError(errno.EIO, "injected"))
    steps: list[str] = []
    directory.on_step = steps.append
    with pytest.raises(StoreStopped):
        store.run_checkpoint(checkpoint)
    assert not any("super" in step for step in steps)
    with pytest.raises(StoreStopped):
        store.end_checkpoint(checkpoint, StoreStopped(path="", reason="injected"))
    store._check()


@pytest.mark.parametrize("step", ["sync seg", "create map", "write map", "sync map", "write table", "sync table", "sync directory"])
def test_checkpoint_writes_no_super_block_once_the_log_has_stopped(step):
    """Another thread's sync may fail while the checkpoint is being written."""
    directory, store = make()
    put(disk(store, 40), 0, content(1))
    steps: list[str] = []

    def on_step(what: str) -> None:
        steps.append(what.split()[0] + " " + what.split()[1][:5])
        if what.startswith(step):
            store.log.stop(OSError(errno.EIO, "injected"))

    directory.on_step = on_step
    with pytest.raises(StoreStopped, match="injected"):
        store.checkpoint()
    assert "create map-0" in steps and "write super" not in steps


def test_every_roll_is_told():
    _, store = make()
    told: list[int] = []
    store.log.on_roll = lambda: told.append(store.log.active.slot)
    volume = disk(store, 100)
    for index in range(70):
        put(volume, index * BLOCK, content(index + 1))
    assert len(told) == 2


def test_statistics_count():
    _, store = make()
    volume = disk(store, 4)
    put(volume, 0, content(1))
    store.flush()
    numbers = store.statistics()
    assert numbers["bytes_appended"] == BLOCK and numbers["flushes"] == 1 and numbers["segments_unsynced"] <= 1
    assert numbers["records_replayed"] == numbers["records_dropped"] == 0
    assert numbers["seq"] == 3 and numbers["durable_seq"] == 2 and numbers["records_appended"] == 3
    assert all(isinstance(value, int) for name, value in numbers.items() if name != "write_amplification")
    assert 1 < numbers["write_amplification"] < 2

"""Recovery: what it drops, what it says of it, and what it may not give away before its own checkpoint is durable."""

from __future__ import annotations

import errno

import pytest
from checkpoint_kit import supers
from store_kit import content, cut, disk, everything, make, put

from simsr.errors import NoSpace, StoreDamaged
from simsr.store.layout import BLOCK
from simsr.store.segments import segment_name
from simsr.store.store import Reset, Store


def test_a_torn_tail_is_counted_to_the_record_and_dropped_once():
    """Records behind the torn one are whole, also those in the segments after it; a second power cut finds nothing more to drop."""
    directory, store = make()
    volume = disk(store, 100)
    store.flush()
    places = []
    for tag in range(80):
        places.append((store.log.active, store.log.active.record_end, store.log.seq + 1))
        put(volume, tag * BLOCK, content(tag + 1))
    assert store.log.active.slot != places[50][0].slot != places[0][0].slot, "later segments begin with records that are dropped, too"
    torn, last = 10, store.log.seq
    segment, offset, seq = places[torn]
    directory = cut(directory, "all")
    file = directory._files[segment_name(segment.slot)]
    for side in (file.now, file.durable):
        side[offset : offset + 8] = bytes(8)
    held = b"".join(content(tag + 1) for tag in range(torn)).ljust(100 * BLOCK, b"\0")
    store = Store.open(directory)
    assert store.recovered["records_dropped"] == last - seq and everything(store.volumes[1]) == held
    for survivor in (directory.after_kill(), cut(directory, "none"), cut(directory, "all")):
        again = Store.open(survivor)
        assert again.recovered == {"records_replayed": 0, "records_dropped": 0} and again.log.seq == store.log.seq
        assert everything(again.volumes[1]) == held


def test_a_super_block_that_had_to_be_made_anew_is_durable_before_what_the_other_needs_is_written_over():
    """The segments of the replay are used again behind the checkpoint of recovery, without another sync of the directory."""
    directory, store = make()
    volume = disk(store, 4)
    for tag in range(250):
        put(volume, 0, content(tag))
    store.flush()
    directory = directory.after_kill()
    generations = {name: block.generation for name, block in supers(directory).items()}
    directory.remove(min(generations, key=generations.__getitem__))
    store = Store.open(directory)
    first, steps = store.log.active.slot, []
    directory.on_step = steps.append
    for tag in range(250, 330):
        put(store.volumes[1], 0, content(tag))
    store.flush()
    assert store.log.active.slot != first and "sync directory" not in steps
    assert everything(Store.open(cut(directory)).volumes[1]) == content(329).ljust(4 * BLOCK, b"\0")


@pytest.mark.parametrize("room", ["for everything", "for segments", "for nothing"])
def test_no_log_index_is_given_twice_whatever_a_power_cut_takes(room):
    """Else records of a life that was cut would count in the next one. Without room for a checkpoint only the headers tell of a life."""
    directory, store = make()
    disk(store, 40)
    store.checkpoint()
    given: list[int] = []

    def on_step(what: str) -> None:
        if what.startswith("write table") and room != "for everything":
            raise OSError(errno.ENOSPC, "injected")

    for _ in range(4):
        directory = cut(directory)
        directory.on_step = on_step
        directory.room_bytes = 0 if room == "for nothing" else None
        store = Store.open(directory)
        rolls: list[int] = [store.log.active.log_index] if store.log.active else []
        store.log.on_roll = lambda: rolls.append(store.log.active.log_index)
        try:
            while len(rolls) < 3:
                if room == "for nothing":
                    store.commit([Reset(1, 1)])
                else:
                    put(store.volumes[1], 0, content(len(rolls)))
        except NoSpace:
            assert room == "for nothing"
        given += rolls
    assert len(set(given)) == len(given) and given
    directory.on_step, directory.room_bytes, steps = None, None, []
    store.checkpoint()
    directory.on_step = steps.append
    store.log.roll(keep=0)
    assert steps and not any(what.startswith("sync") for what in steps), "behind a checkpoint it costs no sync"


def test_the_header_of_a_segment_is_enough_to_tell_damage_from_a_torn_tail():
    """A bad sector takes the last flushed record and the MARK behind it; nothing was written yet to the next segment but its header."""
    directory, store = make()
    volume = disk(store, 8)
    put(volume, 0, content(1))
    slot, offset = store.log.active.slot, store.log.active.record_end
    put(volume, 0, content(2))
    store.flush()
    end = store.log.active.record_end
    store.log.roll()
    directory = directory.after_kill()
    for at in range(offset, end):
        directory.flip(segment_name(slot), at)
    before = dict(directory.images())
    with pytest.raises(StoreDamaged, match=f"{segment_name(slot)} at offset {offset}: record .* had been flushed"):
        Store.open(directory)
    assert dict(directory.images()) == before

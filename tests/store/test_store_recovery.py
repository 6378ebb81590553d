"""Recovery: what it drops, what it says of it, and what it may not give away before its own checkpoint is durable."""

from __future__ import annotations

from store_kit import content, cut, disk, everything, make, put

from simsr.store.layout import BLOCK
from simsr.store.segments import segment_name
from simsr.store.store import Store


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

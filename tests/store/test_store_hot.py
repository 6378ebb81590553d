"""Hot segments: what makes one, what reads of it give, what holds while it is used anew, and what they may take together."""

from __future__ import annotations

import ctypes
import errno
import random

import pytest
from memory_limits import may_lock
from store_kit import TINY, content, disk, everything, make, put, read, write, zero

from simsr.errors import BlockDamaged
from simsr.store.files import DiskDirectory
from simsr.store.hot import HotMemory, HotSegments, memory_bytes
from simsr.store.layout import BLOCK, Geometry
from simsr.store.segments import segment_name

SEGMENT = TINY.segment_bytes
BLOCKS = TINY.segment_blocks


class Warmth:
    """`HotSegments` of a store, and who keeps what it wants, as the daemon does."""

    def __init__(self, store, memory=None):
        self.calls = 0
        self.memory = memory or HotMemory(1 << 30)
        self.hot = HotSegments(store.pool, self.memory, self._wake)

    def _wake(self):
        self.calls += 1

    def carry_out(self):
        """How many segments were kept."""
        kept = 0
        while True:
            segment, released = self.hot.next()
            for view in released:
                view.release()
            if segment is None:
                return kept
            self.hot.keep(segment, segment.file.in_memory())
            kept += 1


def segments_of(store):
    return [segment for segment in store.pool.by_slot if segment is not None]


def data_segment(store):
    return max(segments_of(store), key=lambda segment: store.usage.live[segment.slot])


def a_hot_disk(memory=None, blocks=4):
    """(directory, store, volume, its warmth): a disk in one segment that is kept, of which nothing has been verified there."""
    directory, store = make()
    volume = disk(store, blocks)
    put(volume, 0, b"".join(content(tag) for tag in range(1, blocks + 1)))
    warmth = Warmth(store, memory)
    heat(volume, BLOCKS // 4 + 1)
    assert warmth.carry_out() == 1
    return directory, store, volume, warmth


def heat(volume, blocks):
    for _ in range(blocks):
        read(volume, 0, BLOCK)


def test_a_segment_is_hot_when_a_quarter_as_much_was_read_of_it_as_it_holds():
    _, store = make()
    volume = disk(store, 4)
    put(volume, 0, content(1) + content(2) + content(3) + content(4))
    warmth = Warmth(store)
    heat(volume, BLOCKS // 4 - 4)
    read(volume, 0, 4 * BLOCK)
    assert not warmth.calls and warmth.hot.next() == (None, [])
    heat(volume, 1)
    assert warmth.calls == 1
    assert warmth.carry_out() == 1 and list(warmth.hot.kept) == [data_segment(store)]
    assert warmth.hot.statistics() == {"hot_segments": 1, "hot_bytes": SEGMENT} and warmth.memory.used_bytes == SEGMENT
    heat(volume, 3 * BLOCKS)
    assert warmth.calls == 1 and warmth.carry_out() == 0


def test_without_room_for_one_nothing_is_counted():
    _, store = make()
    volume = disk(store, 4)
    put(volume, 0, content(1))
    warmth = Warmth(store, HotMemory(SEGMENT - 1))
    heat(volume, 3 * BLOCKS)
    assert not warmth.calls


def test_what_is_kept_is_read_without_the_kernel(monkeypatch):
    _, store, volume, _ = a_hot_disk()
    monkeypatch.setattr(data_segment(store).file, "read_cached", None)
    assert read(volume, BLOCK, BLOCK) == content(2)
    assert read(volume, 0, 4 * BLOCK) == everything(volume)


@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK], ids=["one block", "a leaf"])
def test_a_checksum_is_verified_once_where_it_is_kept(length):
    directory, store, volume, _ = a_hot_disk()
    name, place = segment_name(data_segment(store).slot), TINY.record_blocks * BLOCK
    directory.flip(name, place + 5)
    with pytest.raises(BlockDamaged):
        read(volume, 0, length)
    assert volume.lend(0, length) is None
    directory.flip(name, place + 5)
    assert read(volume, 0, length) == (content(1) + content(2))[:length]
    directory.flip(name, place + 5)  # nobody looks for damage that comes about in memory
    assert read(volume, 0, length) != (content(1) + content(2))[:length]
    directory.flip(name, place + 2 * BLOCK)
    with pytest.raises(BlockDamaged):
        read(volume, 2 * BLOCK, length)  # these have not been looked at


def test_an_sr_that_verifies_what_comes_from_the_disk_only():
    directory, store, volume, _ = a_hot_disk()
    store.pool.verify_reads = False
    directory.flip(segment_name(data_segment(store).slot), TINY.record_blocks * BLOCK)
    read(volume, 0, BLOCK)
    assert volume.lend(0, BLOCK) is not None
    store.pool.verify_reads = True
    assert volume.lend(0, BLOCK) is None, "nobody has verified it"
    with pytest.raises(BlockDamaged):
        read(volume, 0, BLOCK)


def test_a_segment_that_is_used_anew_is_verified_anew():
    directory, store, volume, warmth = a_hot_disk()
    segment = data_segment(store)
    read(volume, 0, 4 * BLOCK)
    assert volume.lend(0, 4 * BLOCK)
    tag = 100
    while not (segment.state.value == "active" and segment.log_index > 1 and store.usage.live[segment.slot]):
        for at in range(4):
            put(volume, at * BLOCK, content(tag := tag + 1))
        store.flush()
        store.checkpoint()
    assert segment.memory is not None and list(warmth.hot.kept) == [segment]
    at = next(at for at in range(4) if volume._entries(at, at + 1)[0] & 0xFFFFFFFF >= segment.slot << store.pool.geometry.segment_shift)
    place = (int(volume._entries(at, at + 1)[0]) & 0xFFFFFFFF) % BLOCKS * BLOCK
    directory.flip(segment_name(segment.slot), place)
    assert volume.lend(at * BLOCK, BLOCK) is None
    with pytest.raises(BlockDamaged):
        read(volume, at * BLOCK, BLOCK)
    directory.flip(segment_name(segment.slot), place)
    assert read(volume, at * BLOCK, BLOCK) == content(tag - 3 + at) == bytes(volume.lend(at * BLOCK, BLOCK)[0])


def test_what_is_lent_is_what_is_there():
    """Random histories: whatever is lent is what a read from the disk gives."""
    lent_blocks = 0
    for seed in range(20):
        rng = random.Random(seed)
        _, store = make(geometry=Geometry(64, 4, 3))
        volume = disk(store, 40)
        warmth = Warmth(store, HotMemory(rng.choice((1, 3, 100)) * 64 * BLOCK))
        for step in range(300):
            begin = rng.randrange(40)
            count = rng.randint(1, min(8, 40 - begin))
            if rng.random() < 0.15:
                put(volume, begin * BLOCK, b"".join(content(rng.randrange(1000)) for _ in range(count)))
            elif rng.random() < 0.02:
                zero(volume, begin * BLOCK, min(count, 3) * BLOCK)
            elif rng.random() < 0.05:
                store.flush()
                store.checkpoint()
            elif rng.random() < 0.02:
                for view in warmth.hot.cool():
                    view.release()
            else:
                lent = volume.lend(begin * BLOCK, count * BLOCK)
                if lent is not None:
                    lent_blocks += count
                    assert b"".join(lent) == volume.read_bytes(begin * BLOCK, count * BLOCK), (seed, step)
                assert read(volume, begin * BLOCK, count * BLOCK) == volume.read_bytes(begin * BLOCK, count * BLOCK), (seed, step)
            warmth.carry_out()
            assert warmth.memory.used_bytes == len(warmth.hot.kept) * 64 * BLOCK <= warmth.memory.limit_bytes, (seed, step)
        store._check()
    assert lent_blocks > 300


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (1, BLOCK), (0, BLOCK + 1), (0, 5 * BLOCK), (3 * BLOCK, 2 * BLOCK)])
def test_other_ranges_than_whole_blocks_of_a_leaf_are_not_lent(offset, length):
    _, _, volume, _ = a_hot_disk(blocks=8)
    read(volume, 0, 4 * BLOCK)
    read(volume, 4 * BLOCK, 4 * BLOCK)
    assert volume.lend(offset, length) is None and volume.lend(4 * BLOCK, 4 * BLOCK)


def test_holes_are_not_lent():
    _, _, volume, _ = a_hot_disk()
    read(volume, 0, 4 * BLOCK)
    zero(volume, BLOCK, BLOCK)
    assert volume.lend(0, 2 * BLOCK) is None and volume.lend(BLOCK, BLOCK) is None and volume.lend(2 * BLOCK, 2 * BLOCK)


def three_disks(memory):
    """A store of three segments with a disk each, and its warmth."""
    _, store = make()
    volumes = []
    for number in range(3):
        volumes.append(disk(store, BLOCKS))
        put(volumes[-1], 0, b"".join(content(100 * number + at) for at in range(TINY.segment_blocks - TINY.record_blocks)))
    return store, volumes, Warmth(store, memory)


def test_what_is_read_more_drives_out_what_is_read_least():
    memory = HotMemory(2 * SEGMENT)
    store, (a, b, c), warmth = three_disks(memory)
    heat(a, BLOCKS + 1)
    heat(b, BLOCKS + 1)
    assert warmth.carry_out() == 2
    first, second = warmth.hot.kept
    for _ in range(3):  # they have just been read as much
        heat(c, BLOCKS + 1)
        assert warmth.carry_out() == 0 or first not in warmth.hot.kept
        heat(b, BLOCKS)
    assert len(warmth.hot.kept) == 2 and second in warmth.hot.kept and first not in warmth.hot.kept
    assert memory.used_bytes == 2 * SEGMENT and first.memory is None


def test_what_is_read_all_the_time_is_not_driven_out():
    store, (a, b, _), warmth = three_disks(HotMemory(SEGMENT))
    heat(a, BLOCKS + 1)
    warmth.carry_out()
    kept = list(warmth.hot.kept)
    for _ in range(10):
        heat(a, 2 * BLOCKS)
        heat(b, BLOCKS + 1)
        assert warmth.carry_out() == 0
    assert list(warmth.hot.kept) == kept


def test_what_nobody_reads_goes_by_itself():
    _, store, volume, warmth = a_hot_disk()
    assert not warmth.hot.cool(), "it has been read since"
    (view,) = warmth.hot.cool()
    view.release()
    assert not warmth.memory.used_bytes and data_segment(store).memory is None
    assert read(volume, 0, BLOCK) == content(1)
    heat(volume, BLOCKS + 1)
    assert warmth.carry_out() == 1
    for _ in range(20):
        read(volume, 0, 4 * BLOCK)
        assert not warmth.hot.cool()


def test_stores_share_the_memory():
    memory = HotMemory(SEGMENT)
    *_, one = a_hot_disk(memory)
    _, other = make()
    volume = disk(other, 4)
    put(volume, 0, content(1))
    warmth = Warmth(other, memory)
    heat(volume, BLOCKS + 1)
    assert warmth.carry_out() == 0
    for view in one.hot.let_go():
        view.release()
    heat(volume, BLOCKS + 1)
    assert warmth.carry_out() == 1 and memory.used_bytes == SEGMENT


def test_where_nothing_can_be_kept_no_more_is_asked_for(monkeypatch):
    memory = HotMemory(10 * SEGMENT)
    store, (a, b, c), warmth = three_disks(memory)
    heat(a, BLOCKS + 1)
    assert warmth.carry_out() == 1
    for segment in segments_of(store):
        monkeypatch.setattr(segment.file, "in_memory", lambda: None)
    heat(b, BLOCKS + 1)
    segment, _ = warmth.hot.next()
    warmth.hot.keep(segment, segment.file.in_memory())
    assert memory.limit_bytes == memory.used_bytes == SEGMENT and segment.memory is None
    heat(c, BLOCKS + 1)
    assert warmth.hot.next()[0] is None
    assert read(b, 0, BLOCK) == content(100)


def test_a_segment_whose_file_is_removed_is_let_go_of_first():
    """Its space comes back at once, which whoever removes it counts on."""
    _, store, _, warmth = a_hot_disk()
    (segment,) = warmth.hot.kept
    store.pool.spares.insert(0, segment)
    memory = segment.memory
    assert store.pool.take_spare_away() is segment
    assert not warmth.memory.used_bytes and not warmth.hot.kept
    store.pool.unlink(segment)
    with pytest.raises(ValueError, match="released"):
        memory[0]
    segment.memory = None
    warmth.hot._warm(segment)
    assert warmth.hot.next() == (None, []), "it is not there any more"


def test_a_file_that_goes_while_it_is_brought_into_memory():
    _, store, _, warmth = a_hot_disk()
    (segment,) = warmth.hot.kept
    warmth.hot.let_go()
    warmth.hot._warm(segment)
    wanted, _ = warmth.hot.next()
    store.pool.by_slot[segment.slot] = None
    warmth.hot.keep(wanted, wanted.file.in_memory())
    assert not warmth.memory.used_bytes and not warmth.hot.kept and segment.memory is None


def test_what_control_groups_allow(tmp_path):
    machine = memory_bytes("/nowhere", "/nowhere")
    proc, sys = tmp_path / "proc", tmp_path / "sys"

    def limit(group, name, text):
        (sys / "fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        (sys / "fs/cgroup" / group / name).write_text(f"{text}\n")

    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/system.slice/simsrd.service\n")
    assert memory_bytes(proc, sys) == machine
    limit("system.slice/simsrd.service", "memory.max", "max")
    assert memory_bytes(proc, sys) == machine
    limit("system.slice", "memory.max", 3 << 20)
    assert memory_bytes(proc, sys) == 3 << 20
    limit("system.slice/simsrd.service", "memory.max", 2 << 20)
    assert memory_bytes(proc, sys) == 2 << 20
    limit("", "memory.max", 1 << 20)
    assert memory_bytes(proc, sys) == 1 << 20
    (proc / "self/cgroup").write_text("3:cpu,cpuacct:/\n2:memory,hugetlb:/box\n1:name=systemd:/\n")
    assert memory_bytes(proc, sys) == machine
    limit("memory/box", "memory.limit_in_bytes", 5 << 20)
    assert memory_bytes(proc, sys) == 5 << 20
    (proc / "self/cgroup").write_text("nonsense\n")
    assert memory_bytes(proc, sys) == machine


def locked_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmLck"))


@pytest.mark.skipif(not may_lock(1 << 20), reason="may not lock 1 MiB (ulimit -l)")
def test_a_file_of_a_disk_in_memory(tmp_path):
    file = DiskDirectory(str(tmp_path / "d")).create("f", 1 << 20)
    before = locked_bytes()
    view = file.in_memory()
    assert locked_bytes() == before + (1 << 20) and view.readonly and len(view) == 1 << 20
    file.pwritev([content(1)], 8192)
    assert view[8192 : 8192 + BLOCK] == content(1) and not any(view[:8192])
    view.release()
    assert locked_bytes() == before
    file.close()


def test_a_file_that_may_not_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("simsr.store.files._libc.mlock", lambda address, length: ctypes.set_errno(errno.ENOMEM) or -1)
    file = DiskDirectory(str(tmp_path / "d")).create("f", 1 << 20)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        file.in_memory()
    file.close()

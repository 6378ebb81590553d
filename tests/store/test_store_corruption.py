"""Corruption sweep: damage a store in every way one byte, one block or one file can be damaged, and open it.

Either it is refused, with a message that names the file, or every read gives the right bytes, `BlockDamaged`, or, where a map
node is damaged, `StoreDamaged`. A damaged node costs what is below it and nothing else, and no later life makes it worse. Right
is: the state after the last record; only what had not been flushed when the process died may be missing, as after a power
cut. Where a whole file was lost or put back from an old copy, an older state after some record is all that can be asked
for (docs/durability.md says what cannot be told from a crash).
"""

from __future__ import annotations

import errno
import random
import re
from dataclasses import dataclass

import pytest
from store_kit import (
    UUID, Driver, State, Witness, compare_allocation, content, cut, disk, everything, make, put, read, some_memory,
)  # fmt: skip

from simsr.errors import BlockDamaged, StoreDamaged, StoreFormat
from simsr.store import layout
from simsr.store.layout import BLOCK, HEADER_BYTES, Geometry, Super
from simsr.store.memory import MemoryDirectory
from simsr.store.node_table import MapMemory
from simsr.store.segments import segment_name
from simsr.store.store import Store

SMALL = Geometry(8, 2, 2)
KINDS = {
    "closed": ["close"],
    "killed": ["kill"],
    "killed twice": ["kill", "kill"],
    "cut, closed": ["cut", "close"],
    "cut, killed": ["cut", "kill"],
}
STEPS_A_LIFE = 25
STRIDE = 19  # of the bytes that are damaged in turn, each beginning somewhere else


@dataclass
class Image:
    """A store at rest, what its records mean, and the last record that was durable and that was written."""

    directory: MemoryDirectory
    witness: Witness
    durable: int
    last: int
    earlier: MemoryDirectory  # the same store some time before

    @property
    def checkpointed(self) -> int:
        """The last record that a checkpoint includes: nothing before it may go missing, whatever is lost of the log."""
        blocks = [Super.unpack(data) for name, data in self.directory.images() if name.startswith("super.")]
        return max(block.seq for block in blocks if block is not None)

    def copy(self) -> MemoryDirectory:
        return self.directory.after_kill()


def image_of(kind: str, seed: int) -> Image:
    rng = random.Random(f"{kind} {seed}")
    directory = MemoryDirectory()
    store = Store.create(directory, UUID, SMALL, memory=some_memory(rng))
    witness, driver = Witness(), Driver(rng, blocks_max=8, volumes_max=4)
    ends = KINDS[kind]
    for life, end in enumerate(ends):
        if life:
            store = Store.open(directory)
        witness.attach(store)
        driver.begin(store)
        for step in range(STEPS_A_LIFE):
            driver.step()
            if step == STEPS_A_LIFE // 2 and life == len(ends) - 1:
                earlier = directory.after_kill()
        driver.end_jobs()
        if end == "close":
            store.close()
        directory = directory.after_cut(rng, "some") if end == "cut" else directory.after_kill()
    return Image(directory, witness, store.log.durable_seq, store.log.seq, earlier)


def judge(image: Image, directory: MemoryDirectory, least: int | None = None) -> str:
    """Open ``directory`` and hold it against ``image``: "refused", "damaged blocks", "damaged nodes", "older" or "right".

    ``least``: the first record after which the state it shows may be; left out, all that was durable must be there.
    """
    try:
        store = Store.open(directory, MapMemory(0))
    except StoreDamaged as error:
        assert re.search(r"seg-\d{8}.*(offset \d+|missing|bytes)|(map|table)-\d{12}|super\.[01]", str(error)), error
        assert not directory._locked
        return "refused"
    seq = store.log.seq
    least = image.durable if least is None else least
    assert least <= seq <= image.last, f"{seq} not in {least} to {image.last}"
    state = image.witness.states[seq]
    assert set(store.volumes) == set(state) - {0}
    damaged = compare(store, state)
    if damaged == "damaged nodes":
        lost = unreadable(store)
        store.close()
        again = Store.open(directory)
        compare(again, state)
        assert unreadable(again) == lost, "another life lost more, or found what is not there"
    return damaged or ("right" if state == image.witness.states[image.last] else "older")


def compare(store: Store, state: State) -> str | None:
    """Every read gives what it must, or says that it cannot; what is damaged."""
    damaged = None
    for ident, volume in store.volumes.items():
        wanted = state[ident]
        assert (volume.size_bytes, volume.meta) == (wanted.size_bytes, wanted.meta)
        data = wanted.all()
        try:
            assert read(volume, 0, len(data)) == data, f"volume {ident}"
            compare_allocation(volume, data, 0, len(data))
            continue
        except (BlockDamaged, StoreDamaged):
            pass
        for offset in range(0, volume.size_bytes, BLOCK):
            length = min(BLOCK, volume.size_bytes - offset)
            try:
                assert read(volume, offset, length) == data[offset : offset + length], f"volume {ident} at {offset}"
                compare_allocation(volume, data, offset, length)
            except BlockDamaged as error:
                assert error.details["volume"] == ident and error.details["offset_bytes"] == offset
                damaged = damaged or "damaged blocks"
            except StoreDamaged as error:
                assert_names_a_node(error)
                damaged = "damaged nodes"
    try:
        store._check()
    except StoreDamaged as error:  # it may also be one that was given up and not taken apart yet
        assert_names_a_node(error)
        damaged = "damaged nodes"
    return damaged


def assert_names_a_node(error: StoreDamaged) -> None:
    assert re.search(r"map node at offset \d+ of map-\d{12} cannot be used", str(error)), error
    assert error.nbd_errno == errno.EIO


def unreadable(store: Store) -> list[tuple[int, int]]:
    """(volume, offset) of the blocks whose map node is damaged."""
    found = []
    for ident, volume in store.volumes.items():
        for offset in range(0, volume.size_bytes, BLOCK):
            try:
                read(volume, offset, min(BLOCK, volume.size_bytes - offset))
            except BlockDamaged:
                pass
            except StoreDamaged:
                found.append((ident, offset))
    return found


def meaningful_bytes(name: str, data: bytes) -> list[int]:
    """The offsets of a file at which there is something."""
    if name.startswith("super"):
        return [*range(100), 200, 511, 512, 4095]
    if name.startswith(("map", "table")):
        return list(range(len(data)))
    records = [at for at in range(SMALL.record_area_bytes) if any(data[at & -8 : (at & -8) + 8])]
    return records + list(range(SMALL.record_area_bytes + 13, len(data), BLOCK // 2 + 1))


def sweep(image: Image, seed: int, stride: int, note, but: str = "nothing") -> set[str]:
    rng = random.Random(f"flips {seed}")
    outcomes = {judge(image, image.copy())}
    for name, data in image.directory.images():
        if name.startswith(but):
            continue
        offsets = meaningful_bytes(name, data)
        for offset in offsets[rng.randrange(stride) :: stride]:
            mask = rng.choice((0xFF, 1 << rng.randrange(8)))
            directory = image.copy()
            directory.flip(name, offset, mask)
            with note(file=name, offset=offset, mask=mask, durable=image.durable, last=image.last):
                outcome = judge(image, directory)
                assert outcome != "damaged nodes" or name.startswith("map")
                outcomes.add(outcome)
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_many_bytes(kind, seeds, note):
    outcomes = set()
    for seed in seeds(3):
        outcomes |= sweep(image_of(kind, seed), seed, STRIDE, note)
    assert {"right", "refused"} <= outcomes
    assert "killed" in kind or {"damaged nodes"} <= outcomes and "older" not in outcomes


def test_every_byte_of_maps_tables_and_super_blocks(seeds, note):
    for seed in seeds(1):
        sweep(image_of("closed", 100 + seed), seed, 1, note, but="seg")


def test_flip_in_flushed_record_is_refused():
    """A record that a later one knows to be durable is never taken for a torn tail, wherever it was hit."""
    directory, store = make()
    volume = disk(store, 16)
    store.flush()
    places = []
    for tag in range(1, 4):
        places.append((store.log.active.slot, store.log.active.record_end))
        put(volume, tag * BLOCK, content(tag))
    store.flush()
    directory = directory.after_kill()
    for slot, offset in places:
        for at in range(offset, offset + 64):
            damaged = directory.after_kill()
            damaged.flip(f"seg-{slot:08d}", at, 0x10)
            with pytest.raises(StoreDamaged, match=rf"seg-{slot:08d} at offset {offset}: record .* flushed"):
                Store.open(damaged)


def test_records_appended_during_a_flush_do_not_hide_it():
    """What a flush made durable is known from the log even if other records were appended while it ran and none after."""
    directory, store = make()
    volume = disk(store, 16)
    place = store.log.active.record_end
    put(volume, 0, content(1))
    job = store.begin_flush()
    put(volume, BLOCK, content(2))
    job.run()
    store.end_flush(job)
    damaged = directory.after_kill()
    damaged.flip(f"seg-{store.log.active.slot:08d}", place + 9)
    with pytest.raises(StoreDamaged, match="flushed"):
        Store.open(damaged)


def test_lost_super_block_after_a_dropped_tail():
    """The older super block leads through records that a recovery dropped: they stay dropped, what came after stays."""
    directory, store = make()
    volume = disk(store, 16)
    put(volume, 0, content(1))
    store.close()
    store = Store.open(directory)
    volume = store.volumes[1]
    put(volume, 0, content(2))
    store.flush()
    segment, block = store.log.active.slot, store.log.active.used_blocks
    for tag in range(1, 6):
        put(volume, tag * BLOCK, content(2))  # acknowledged, not flushed; and the data of the first does not arrive
    directory = directory.after_cut(random.Random(0), "all")
    zero_out(directory, f"seg-{segment:08d}", block * BLOCK, BLOCK)
    store = Store.open(directory)
    assert store.recovered["records_dropped"] >= 5
    volume = store.volumes[1]
    for tag in range(3):
        put(volume, tag * BLOCK, content(10 + tag))
        store.flush()
    directory = directory.after_kill()
    directory.flip(newest_super(directory), 40)
    volume = Store.open(directory).volumes[1]
    wanted = [content(10 + tag) for tag in range(3)] + [bytes(BLOCK)] * 13
    assert volume.read_bytes(0, 16 * BLOCK) == b"".join(wanted)


@pytest.mark.parametrize("flushed", [False, True])
def test_lost_super_block_after_a_torn_tail_of_many_segments(flushed):
    """A segment that recovery left out, because the log before it was torn, does not hide the ones after it."""
    directory, store = make()
    volume = disk(store, 100)
    store.close()
    store = Store.open(directory)
    volume = store.volumes[1]
    first = store.log.active
    places = []
    for tag in range(100):
        places.append((store.log.active, store.log.active.record_end))
        put(volume, tag * BLOCK, content(tag + 1))
    directory = cut(directory, "all")
    torn = [offset for segment, offset in places if segment is first][20]
    zero_out(directory, segment_name(first.slot), torn, 64)
    store = Store.open(directory)
    volume = store.volumes[1]
    assert everything(volume) == b"".join(content(tag + 1) for tag in range(20)).ljust(100 * BLOCK, b"\0")
    put(volume, 0, content(100))
    if flushed:
        store.flush()
    held = everything(volume)
    directory = directory.after_kill()
    directory.flip(newest_super(directory), 40)
    assert everything(Store.open(directory).volumes[1]) == held


def test_a_record_that_does_not_continue_the_chain_is_not_followed():
    directory, store = make()
    put(disk(store, 8), 0, content(1))
    store.flush()
    active = store.log.active
    forged, _ = layout.pack_record(
        layout.COMMIT, store.log.seq + 1, store.log.durable_seq, 12345, active.salt, 0, 0, b'[{"op":"delete","ident":1}]'
    )
    directory = directory.after_kill()
    replace_bytes(directory, segment_name(active.slot), active.record_end, forged)
    assert set(Store.open(directory).volumes) == {1}


def newest_super(directory: MemoryDirectory) -> str:
    generations = {name: int.from_bytes(data[32:40], "little") for name, data in directory.images() if name[:6] == "super."}
    return max(generations, key=generations.__getitem__)


def zero_out(directory: MemoryDirectory, name: str, offset: int, length: int) -> None:
    replace_bytes(directory, name, offset, bytes(length))


def replace_bytes(directory: MemoryDirectory, name: str, offset: int, data: bytes) -> None:
    for side in (directory._files[name].now, directory._files[name].durable):
        side[offset : offset + len(data)] = data


def replace_file(directory: MemoryDirectory, name: str, data: bytes) -> None:
    directory.create(name, len(data)).pwritev([data], 0)


def test_swapped_blocks(seeds, note):
    """Two blocks that changed places (a misdirected write) are told by the checksums in the map."""
    for seed in seeds(4):
        image = image_of("closed", 200 + seed)
        rng = random.Random(seed)
        names = [name for name, _ in image.directory.images() if name.startswith("seg")]
        for _ in range(40):
            directory = image.copy()
            (one, a), (two, b) = [(rng.choice(names), rng.randrange(2, 8) * BLOCK) for _ in range(2)]
            first, second = (bytes(directory._files[n].now[o : o + BLOCK]) for n, o in ((one, a), (two, b)))
            replace_bytes(directory, one, a, second)
            replace_bytes(directory, two, b, first)
            with note(one=(one, a), two=(two, b)):
                assert judge(image, directory) in ("right", "damaged blocks")


@pytest.mark.parametrize("kind", KINDS)
def test_lost_sectors_and_pages(kind, seeds, note):
    """Runs of 512 or 4096 zeros or of noise. In the tail of a log that may look like a power cut, elsewhere never."""
    for seed in seeds(2):
        image = image_of(kind, 300 + seed)
        rng = random.Random(seed)
        for name, data in image.directory.images():
            for _ in range(6):
                length = rng.choice((512, BLOCK))
                offset = rng.randrange(0, max(1, len(data)), length)
                length = min(length, len(data) - offset)
                directory = image.copy()
                replace_bytes(directory, name, offset, rng.choice((bytes(length), rng.randbytes(length))))
                with note(file=name, offset=offset, length=length):
                    outcome = judge(image, directory, image.checkpointed if name.startswith("seg") else None)
                    assert outcome != "damaged nodes" or name.startswith("map")


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_resized_files(kind, seeds, note):
    for seed in seeds(3):
        image = image_of(kind, 400 + seed)
        for name, data in image.directory.images():
            least = image.checkpointed if name.startswith("seg") else None
            for size in (None, 0, 1, HEADER_BYTES, 100, len(data) // 2, len(data) - 512, len(data) - 1, len(data) + BLOCK):
                directory = image.copy()
                if size is None:
                    directory.remove(name)
                elif size >= 0:
                    replace_file(directory, name, data[:size].ljust(size, b"\0"))
                before = dict(directory.images())
                with note(file=name, size=size):
                    outcome = judge(image, directory, least)
                    if outcome == "refused":
                        assert dict(directory.images()) == before, "a store that is refused was changed"


def test_truncated_segment_in_use_is_kept_and_named():
    """A segment of the wrong size that was in use is damage; it must not be taken for one whose making was cut short."""
    directory, store = make()
    put(disk(store, 8), 0, content(1))
    slot = store.log.active.slot
    store.close()
    name = f"seg-{slot:08d}"
    for size in (HEADER_BYTES, 32 * BLOCK - 1, 33 * BLOCK):
        damaged = directory.after_kill()
        replace_file(damaged, name, bytes(damaged._files[name].now)[:size].ljust(size, b"\0"))
        with pytest.raises(StoreDamaged, match=f"{name} has {size} bytes, not {32 * BLOCK}"):
            Store.open(damaged)
        assert name in damaged.names()


@pytest.mark.parametrize("kind", KINDS)
def test_stale_copies_put_back(kind, seeds, note):
    """Any file, or both super blocks, from the same store some time before."""
    for seed in seeds(6):
        image = image_of(kind, 500 + seed)
        earlier = dict(image.earlier.images())
        supers = [name for name in earlier if name.startswith("super")]
        for names in [[name] for name in earlier] + [supers]:
            directory = image.copy()
            for name in names:
                replace_file(directory, name, earlier[name])
            with note(files=names):
                judge(image, directory, image.checkpointed if names[0].startswith("seg") else 0 if names == supers else None)


def test_files_that_do_not_belong_there():
    image = image_of("killed", 600)
    for name, size in [
        ("notes.txt", 10), ("seg-1", 100), ("seg-00000000", SMALL.segment_bytes), ("seg-00000000", 5),
        ("seg-99999999", 7), ("seg-99999999x", SMALL.segment_bytes), ("map-1", 0), ("map-000000000999", 0),
        ("map-000000000999", 50), ("table-1", 0), ("table-000000000999", 0), ("table-000000000999", 50), ("super.2", 4096), ("super.0.old", 0), ("seg-00000090", SMALL.segment_bytes),
        ("seg-00000090", 700),
    ]:  # fmt: skip
        directory = image.copy()
        directory.create(name, size)
        assert judge(image, directory) == "right", name
        directory = directory.after_kill()
        store = Store.open(directory)
        disk(store, 4)
        store.close()
        Store.open(directory)._check()


def test_not_a_store():
    for names, error, words in [
        ([], StoreFormat, "no store in this directory"),
        (["readme"], StoreFormat, "no store in this directory"),
        (["seg-00000001"], StoreDamaged, "neither super block"),
        (["table-000000000001"], StoreDamaged, "neither super block"),
        (["map-000000000001"], StoreDamaged, "neither super block"),
        (["super.0", "super.1"], StoreDamaged, "neither super block"),
    ]:
        directory = MemoryDirectory()
        for name in names:
            directory.create(name, 4096)
        with pytest.raises(error, match=words):
            Store.open(directory)
        assert directory.names() == sorted(names)

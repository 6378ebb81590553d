"""Kit of the tests of node table and extent maps: a table whose disk is a dict, and a forest of maps with what each must hold.

`Shelf` does what checkpoints and map files do, without files, so that every moment of a checkpoint can be looked at. `Forest`
changes maps as `Volume` does: `ExtentMap.ready` first, and what is `Absent` is fetched before anything is changed; after that
nothing may be missing any more.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from simsr.store.extent_map import ExtentMap
from simsr.store.node_table import COLUMNS, Absent, MapMemory, NodeTable
from simsr.store.nodes import PHYSICAL_MASK, Node, decode, encode
from simsr.store.usage import Usage

SHIFT = 5
SEGMENTS = 300
PLENTY_BYTES = 1 << 40

Model = dict[int, int]
"""Block -> entry."""


@dataclass
class Image:
    """What a checkpoint leaves: rows, counts, and whatever else belonged to the same moment."""

    rows: dict[str, np.ndarray]
    live: list[int]
    attached: object


class Shelf:
    """A node table, its checkpoints and its disk."""

    def __init__(self, bits: int = 2, limit_bytes: int = PLENTY_BYTES, disk: dict | None = None) -> None:
        self.bits = bits
        self.usage = Usage(SHIFT)
        self.usage.reserve(SEGMENTS)
        self.memory = MapMemory(limit_bytes)
        self.table = NodeTable(bits, self.usage, self.memory)
        self.table.fetch_now = self.fetch
        self.disk: dict[tuple[int, int], bytes] = {} if disk is None else disk
        self.generation = max((file for file, _ in self.disk), default=0)
        self.image: Image | None = None  # of the last checkpoint that ended well
        self._begun: Image | None = None
        self.fetched = 0

    # Paging.

    def fetch(self, ident: int) -> None:
        table = self.table
        data = self.disk[table.file[ident], table.offset[ident]]
        assert len(data) == table.length[ident] and crc32c(data) == table.crc[ident]
        table.adopt(decode(data, table.fanout), ident)
        self.fetched += 1

    def paged(self, call):
        """``call()``; what is `Absent` is fetched, and as much as possible let go of each time, as the daemon may have to."""
        for _ in range(10_000):
            try:
                return call()
            except Absent as absent:
                self.fetch(absent.ident)
                self.memory.shrink(4)
        raise AssertionError("fetching nodes comes to no end")

    def squeeze(self) -> None:
        """Let go of every node that may be let go of."""
        for _ in range(2):
            self.table.evict(1 << 30, -1)
        assert all(not self.table.is_clean(ident) for ident in self.table.resident)

    # Checkpoints.

    @property
    def checkpointing(self) -> bool:
        return self._begun is not None

    def begin(self, attached: object = None) -> None:
        table = self.table
        self.generation += 1
        frozen = table.freeze()
        table.on_frozen = self.encode
        table.changed = set()
        rows = {name: np.array(getattr(table, name)) for name, _ in COLUMNS}
        self._begun = Image(rows, list(self.usage.live), attached)
        self.homes = tuple(array(code) for code in ("I", "Q", "H", "I", "I"))
        self.nodes: list[Node] = []
        self.promised = set(frozen)

    def encode(self, node: Node) -> None:
        table = self.table
        del table.frozen[node.ident]
        table.encoded[node.ident] = node
        self.nodes.append(node)
        data, mapped = encode(node)
        offset = len(self.nodes) * 100
        self.disk[self.generation, offset] = data
        for column, value in zip(self.homes, (node.ident, offset, len(data), crc32c(data), mapped)):
            column.append(value)

    def work(self, nodes_max: int | None = None) -> bool:
        """Encode some nodes; whether any are left."""
        frozen = self.table.frozen
        while frozen and nodes_max != 0:
            self.encode(next(iter(frozen.values())))
            nodes_max = None if nodes_max is None else nodes_max - 1
        return bool(frozen)

    def end(self) -> Image:
        self.work()
        assert set(self.homes[0]) == self.promised and len(self.homes[0]) == len(self.promised), "each frozen node becomes bytes once"
        image, self._begun = self._begun, None
        ids = np.array(self.homes[0], dtype=np.intp)
        for name, values in zip(("offset", "length", "crc", "mapped"), self.homes[1:]):
            image.rows[name][ids] = np.array(values)
        image.rows["file"][ids] = self.generation
        self.table.came_home(self.generation, *self.homes)
        self.table.thaw()
        self.image = image
        return image

    def fail(self) -> None:
        self._begun = None
        self.table.thaw(failed=[*self.nodes, *self.table.frozen.values()])

    def checkpoint(self, attached: object = None) -> Image:
        self.begin(attached)
        return self.end()

    def load(self, image: Image, limit_bytes: int = PLENTY_BYTES) -> Shelf:
        """What a process finds that starts from ``image``."""
        shelf = Shelf(self.bits, limit_bytes, self.disk)
        alive = np.flatnonzero(image.rows["family"]).astype(np.uint32)
        shelf.table.load_rows(alive, {name: column[alive] for name, column in image.rows.items()})
        shelf.table.loaded()
        counts = np.array(image.live, dtype=np.int64)
        shelf.usage.load(np.flatnonzero(counts), counts[np.flatnonzero(counts)])
        return shelf


class Forest:
    """Maps over one `Shelf`, and what each must hold."""

    def __init__(self, bits: int = 2, limit_bytes: int = PLENTY_BYTES) -> None:
        self.bits = bits
        self.shelf = Shelf(bits, limit_bytes)
        self.maps: list[tuple[ExtentMap, Model]] = []
        self.held: list[int] = []  # roots that something else holds

    @property
    def table(self) -> NodeTable:
        return self.shelf.table

    @property
    def live(self) -> array:
        return self.shelf.usage.live

    def plant(self, blocks: int) -> tuple[ExtentMap, Model]:
        self.maps.append((ExtentMap(self.table, len(self.maps) + 1, blocks), {}))
        return self.maps[-1]

    # Changes, as `Volume` makes them.

    def set(self, map_: ExtentMap, model: Model, block: int, entry: int) -> None:
        self.shelf.paged(lambda: map_.ready(block, block + 1))
        number = block >> self.bits
        leaf = map_.owned[number] if number in map_.owned else map_.own(number)
        index = block & (map_.fanout - 1)
        old = leaf.slots[index]
        leaf.slots[index] = entry
        self.live[(entry & PHYSICAL_MASK) >> SHIFT] += 1
        if old:
            self.live[(old & PHYSICAL_MASK) >> SHIFT] -= 1
        else:
            map_.mapped_blocks += 1
        model[block] = entry

    def fill(self, map_: ExtentMap, model: Model, blocks: int, seed: int = 0) -> None:
        for block in range(blocks):
            self.set(map_, model, block, entry_of(seed * 1000 + block))

    def clear(self, map_: ExtentMap, model: Model, first: int, last: int) -> None:
        if last == first + 1:
            self.shelf.paged(lambda: map_.ready(first, last))  # a block of zeros that is written
        else:
            self.shelf.paged(lambda: map_.ready_to_clear(first, last))
        map_.clear(first, last)
        for block in [block for block in model if first <= block < last]:
            del model[block]

    def become(self, map_: ExtentMap, model: Model, other: ExtentMap, content: Model) -> None:
        map_.become(other)
        if other is not map_:
            model.clear()
            model.update(content)

    def reap(self, nodes_max: int | None = None) -> int:
        return self.shelf.paged(lambda: self.table.reap(nodes_max))

    # Checkpoints and what they show.

    def state(self) -> tuple[list[tuple], list[int]]:
        return [(m.family, m.root, m.height, m.mapped_blocks, dict(model)) for m, model in self.maps], list(self.held)

    def check_image(self, image: Image) -> None:
        """A table loaded from ``image`` holds exactly what the maps held when its checkpoint began."""
        shelf = self.shelf.load(image)
        maps, roots = image.attached[0], list(image.attached[1])
        with shelf.table.waiting():
            for family, root, height, mapped, model in maps:
                map_ = ExtentMap(shelf.table, family)
                map_.root, map_.height, map_.mapped_blocks = root, height, mapped
                assert content_of(map_) == model, f"map {family} differs"
                map_._check()
                roots.append(root)
            shelf.table._check(roots)

    def check(self) -> None:
        with self.table.waiting():
            self.table._check([map_.root for map_, _ in self.maps] + self.held)
            for map_, model in self.maps:
                map_._check()
                assert content_of(map_) == model
                assert map_.mapped_blocks == len(model)
                for number, slots in map_.cache.items():
                    leaf = map_.leaf_at(number)
                    assert slots is (None if leaf is None else leaf.slots), f"leaf {number} is remembered wrongly"
                for number, leaf in map_.owned.items():
                    assert map_.leaf_at(number) is leaf, f"leaf {number} is not there any more"


def content_of(map_: ExtentMap) -> Model:
    found = {}
    for number, ident in map_.leaves():
        for index, entry in enumerate(map_._table.get(ident).slots):
            if entry:
                found[(number << map_.bits) + index] = entry
    return found


def entry_of(seed: int) -> int:
    """A map entry: some checksum, some block of some segment."""
    rng = random.Random(seed)
    return rng.randrange(2**32) << 32 | rng.randrange(1 << SHIFT, (SEGMENTS - 1) << SHIFT)


def look_up(map_: ExtentMap, block: int) -> int:
    number = block >> map_.bits
    slots = map_.cache[number] if number in map_.cache else map_.slots_at(number)
    return 0 if slots is None else slots[block & (map_.fanout - 1)]

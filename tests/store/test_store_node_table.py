"""The node table: who holds a node, where it is, when it may go, and that a checkpoint shows the moment at which it began."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from table_kit import SHIFT, Forest, Shelf, content_of, entry_of, look_up

from simsr.store import node_table
from simsr.store.node_table import NO_LEAF, Absent, MapMemory, NodeTable
from simsr.store.nodes import Inner, Leaf
from simsr.store.usage import Usage


def leaf(shelf: Shelf, number: int = 0, family: int = 1, entry: int = 0) -> int:
    """A leaf with one entry, counted."""
    slots = array("Q", bytes(8 * shelf.table.fanout))
    slots[0] = entry
    node = Leaf(slots)
    shelf.usage.count_leaf(node, +1)
    return shelf.table.make(node, family, number)


def inner(shelf: Shelf, kids: list[int], height: int = 1) -> int:
    row = array("I", kids + [0] * (shelf.table.fanout - len(kids)))
    return shelf.table.make(Inner(row, height), 1, 0)


# Holders.


def test_numbers_begin_at_one_and_are_used_again():
    shelf = Shelf()
    assert [leaf(shelf), leaf(shelf, 1), inner(shelf, [])] == [1, 2, 3] and shelf.table.rows == 4
    shelf.table.drop(2)
    assert shelf.table.reap() == 0
    assert shelf.table.number[3] == NO_LEAF and shelf.table.family[2] == 0
    assert leaf(shelf, 9) == 2 and leaf(shelf, 10) == 4
    shelf.table._check([1, 2, 3, 4])


def test_holders_are_counted():
    shelf = Shelf()
    table = shelf.table
    one = leaf(shelf, entry=entry_of(1))
    assert table.hold(one) == one and table.hold(0) == 0
    table.drop(one)
    table.drop(0)
    assert not table.dropped and table.refs[one] == 1
    table.drop(one)
    assert list(table.dropped) == [one] and sum(shelf.usage.live) == 1
    assert table.reap() == 0 and not any(shelf.usage.live) and not table.resident and table.resident_bytes == 0


def test_own_gives_the_node_itself_or_a_copy():
    shelf = Shelf()
    table = shelf.table
    kid = leaf(shelf, 5, entry=entry_of(1))
    top = inner(shelf, [kid])
    assert table.own(top) == top
    table.hold(top)
    copy = table.own(top)
    assert copy != top and table.refs[top] == table.refs[copy] == 1 and table.refs[kid] == 2
    twin = table.own(kid)
    table.get(copy).kids[0] = twin
    assert table.get(twin).slots == table.get(kid).slots and table.number[twin] == 5 and sum(shelf.usage.live) == 2
    table._check([top, copy])


def test_reap_goes_a_bit_at_a_time():
    shelf = Shelf()
    kids = [leaf(shelf, number, entry=entry_of(number)) for number in range(4)]
    top = inner(shelf, kids)
    shelf.table.hold(kids[3])
    shelf.table.drop(top)
    assert shelf.table.reap(1) == 3 and shelf.table.reap(2) == 1 and shelf.table.reap(0) == 1 and shelf.table.reap(5) == 0
    shelf.table._check([kids[3]])


def test_reap_of_nodes_that_are_not_in_memory():
    """It stops in front of one, and goes on when it is there; what it has done stays done."""
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    table, root = forest.table, map_.root
    map_.drop()
    model.clear()
    for _ in range(3):
        with pytest.raises(Absent) as caught:
            table.reap()
        assert caught.value.ident == root and list(table.dropped) == [root]
    forest.shelf.fetch(root)
    with pytest.raises(Absent) as caught:
        table.reap(1000)
    assert caught.value.ident == table.dropped[0] != root and len(table.dropped) == 4
    forest.check()
    forest.shelf.squeeze()
    assert forest.reap() == 0 and not any(forest.live)
    assert table.statistics()["map_nodes"] == 0
    forest.check()


def test_a_node_that_was_dropped_and_not_reaped_is_dropped_after_loading():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    map_.drop()
    model.clear()
    forest.reap(6)
    assert forest.table.dropped
    image = forest.shelf.checkpoint(forest.state())
    forest.check_image(image)
    after = forest.shelf.load(image)
    with after.table.waiting():
        assert after.table.reap() == 0
    assert not any(after.usage.live) and len(after.table._free) == after.table.rows - 1


# Finding leaves.


def members(table: NodeTable, family: int, number: int) -> set[int]:
    found = list(table.leaves_of(family, number))
    assert len(set(found)) == len(found)
    return set(found)


def test_leaves_of_is_what_a_search_finds(seeds, monkeypatch):
    """Also when there are so few chains that everything collides, and while they are made more."""
    monkeypatch.setattr(node_table, "_HEADS_MIN", 2)
    for seed in seeds(10):
        rng = random.Random(seed)
        shelf = Shelf()
        keys: dict[int, tuple[int, int]] = {}
        heads = len(shelf.table._heads)
        for _ in range(300):
            if keys and rng.random() < 0.4:
                ident = rng.choice(sorted(keys))
                del keys[ident]
                shelf.table.drop(ident)
                shelf.table.reap()
            else:
                key = rng.randrange(1, 4), rng.choice((rng.randrange(6), 0xFFFFFFFE))
                keys[leaf(shelf, key[1], key[0])] = key
            if rng.random() < 0.05:
                inner(shelf, [])  # never in a chain
            if rng.random() < 0.1:
                check_chains(shelf.table, keys)
        check_chains(shelf.table, keys)
        assert len(shelf.table._heads) > heads
        image = shelf.checkpoint()
        check_chains(shelf.load(image).table, keys)


def check_chains(table: NodeTable, keys: dict[int, tuple[int, int]]) -> None:
    for family in range(1, 5):
        for number in [*range(7), 0xFFFFFFFE]:
            assert members(table, family, number) == {ident for ident, key in keys.items() if key == (family, number)}
    chained = []
    for head in table._heads:
        before = 0
        while head:
            assert table._before[head] == before
            chained.append(head)
            before, head = head, table._next[head]
    assert sorted(chained) == sorted(keys) and table._leaves == len(keys)


def test_the_chains_of_a_large_table_are_short():
    """Loading makes as many chains as adding does; volumes that begin alike do not collide."""
    shelf = Shelf(bits=1)
    for family in range(1, 5):
        for number in range(1500):
            leaf(shelf, number, family)
    for table in (shelf.table, shelf.load(shelf.checkpoint()).table):
        longest = max(sum(1 for _ in chain(table, head)) for head in table._heads if head)
        assert len(table._heads) >= 3000 and longest < 16
        assert all(len(members(table, family, number)) == 1 for family in (1, 4) for number in (0, 7, 1499))


def chain(table: NodeTable, head: int):
    while head:
        yield head
        head = table._next[head]


def test_leaves_of_a_family_are_those_of_all_its_volumes():
    forest = Forest()
    origin, model = forest.plant(64)
    forest.fill(origin, model, 64)
    copies = [forest.plant(64) for _ in range(3)]
    for index, (copy, content) in enumerate(copies):
        forest.become(copy, content, origin, model)
        forest.set(copy, content, 20, entry_of(index))
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    assert len(members(forest.table, origin.family, 5)) == 4 and len(members(forest.table, origin.family, 6)) == 1
    assert members(forest.table, 2, 5) == set() and members(forest.table, origin.family, 64) == set()
    assert not forest.table.resident, "finding them reads none"


# One moment.


def test_a_checkpoint_shows_the_moment_it_began(seeds, note):
    """Whatever happens before, between and after its slices; nodes given up and numbers used again included."""
    for seed in seeds(15):
        rng = random.Random(seed)
        forest = Forest(2, limit_bytes=rng.choice((0, 1 << 30)))
        for blocks in (64, 64, 16):
            forest.fill(*forest.plant(blocks), blocks)
        for turn in range(6):
            forest.shelf.begin(forest.state())
            with note(turn=turn):
                for _ in range(12):
                    change(forest, rng)
                    if rng.random() < 0.4:
                        forest.shelf.work(rng.randrange(5))
                if turn == 3:
                    forest.shelf.fail()
                else:
                    forest.check_image(forest.shelf.end())
                forest.check()
                forest.shelf.squeeze()


def change(forest: Forest, rng: random.Random) -> None:
    map_, model = rng.choice(forest.maps)
    match rng.randrange(6):
        case 0 | 1:
            forest.set(map_, model, rng.randrange(16), entry_of(rng.randrange(1 << 30)))
        case 2:
            first = rng.randrange(16)
            forest.clear(map_, model, first, first + rng.choice((1, 4, 40)))
        case 3:
            forest.become(map_, model, *rng.choice(forest.maps))
        case 4:
            forest.reap(rng.choice((1, 3, None)))
        case 5:
            forest.shelf.memory.shrink(20)


def test_touching_a_frozen_node_makes_it_bytes_first():
    forest = Forest()
    map_, model = forest.plant(16)
    forest.fill(map_, model, 16)
    forest.shelf.begin(forest.state())
    frozen = dict(forest.table.frozen)
    assert len(frozen) == 5 and not forest.table.dirty and not map_.owned
    forest.set(map_, model, 0, entry_of(99))
    assert len(forest.table.frozen) == 4 and len(forest.shelf.nodes) == 1, "only the leaf; the node above it does not change"
    forest.set(map_, model, 1, entry_of(98))
    assert len(forest.shelf.nodes) == 1, "once"
    ident = map_.leaf_at(0).ident
    assert list(forest.table.dirty) == [ident] and not forest.table.is_clean(ident)
    image = forest.shelf.end()
    forest.check_image(image)
    assert not forest.table.is_clean(ident) and forest.table.is_clean(map_.root)
    forest.check_image(forest.shelf.checkpoint(forest.state()))


def test_numbers_given_up_during_a_checkpoint_are_not_used_before_its_end():
    """Its rows and its nodes still mean what they meant when it began."""
    forest = Forest()
    map_, model = forest.plant(16)
    forest.fill(map_, model, 16)
    forest.shelf.begin(forest.state())
    idents = {ident for _, ident in map_.leaves()}
    map_.drop()
    model.clear()
    forest.reap()
    assert not forest.table._free and set(forest.table._limbo) > idents
    forest.fill(map_, model, 16, seed=1)
    assert not idents & {ident for _, ident in map_.leaves()}
    forest.check_image(forest.shelf.end())
    assert not forest.table._limbo and set(forest.table._free) > idents
    forest.check()
    forest.fill(*forest.plant(16), 16, seed=2)
    assert not forest.table._free
    forest.check_image(forest.shelf.checkpoint(forest.state()))


def test_files_that_a_checkpoint_needs_are_told_when_all_its_nodes_are_gone():
    """A node that was given up while the checkpoint was made is still in it: where it was, or where the checkpoint put it."""
    forest = Forest()
    old, old_model = forest.plant(16)
    forest.fill(old, old_model, 16)
    forest.shelf.checkpoint()
    new, new_model = forest.plant(16)
    forest.fill(new, new_model, 16)
    forest.shelf.begin(forest.state())
    for map_, model in forest.maps:
        map_.drop()
        model.clear()
    forest.reap()
    forest.check_image(forest.shelf.end())
    assert not +forest.table.nodes_at_home and not +forest.table.bytes_at_home
    assert forest.table.late_files >= {1, 2}
    forest.shelf.checkpoint(forest.state())
    assert not forest.table.late_files - {0}


def test_homes_are_counted_by_file():
    forest = Forest()
    map_, model = forest.plant(16)
    forest.fill(map_, model, 16)
    forest.shelf.checkpoint()
    table = forest.table
    size = sum(len(data) for data in forest.shelf.disk.values())
    assert table.nodes_at_home[1] == 5 and table.bytes_at_home[1] == size
    forest.set(map_, model, 0, entry_of(99))
    assert table.nodes_at_home[1] == 5, "the old place still counts until the next checkpoint"
    forest.shelf.checkpoint()
    assert (table.nodes_at_home[1], table.nodes_at_home[2]) == (4, 1)
    assert table.bytes_at_home[1] + table.bytes_at_home[2] <= size + 40
    forest.clear(map_, model, 0, 4)
    forest.reap()
    assert (table.nodes_at_home[1], table.nodes_at_home[2]) == (4, 0) and table.bytes_at_home[2] == 0
    forest.check()
    loaded = forest.shelf.load(forest.shelf.checkpoint(forest.state())).table
    assert +loaded.nodes_at_home == +table.nodes_at_home and +loaded.bytes_at_home == +table.bytes_at_home


def test_rows_about_to_change_are_told_before_they_do(seeds):
    """A checkpoint that writes the table page by page copies a page when it hears of a change."""
    for seed in seeds(5):
        rng = random.Random(seed)
        forest = Forest()
        for blocks in (64, 16):
            forest.fill(*forest.plant(blocks), blocks)
        table = forest.table
        forest.shelf.begin(forest.state())
        wanted = {name: list(getattr(table, name)) for name, _ in node_table.COLUMNS}
        copied: dict[int, dict] = {}

        def copy(ids) -> None:
            for ident in ids:
                copied.setdefault(ident, {name: getattr(table, name)[ident] for name in wanted})

        table.on_change = copy
        for _ in range(40):
            change(forest, rng)
            forest.shelf.work(1)
        for ident in range(table.rows):
            for name, column in wanted.items():
                before = column[ident] if ident < len(column) else 0
                told = copied[ident][name] if ident in copied else getattr(table, name)[ident]
                assert told == before, f"{name} of row {ident}"
        assert set(copied) == table.changed
        forest.shelf.end()


def test_a_failed_checkpoint_makes_everything_dirty_again():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    twin, content = forest.plant(64)
    forest.become(twin, content, map_, model)
    forest.shelf.begin()
    nodes = set(forest.table.frozen)
    forest.shelf.work(7)
    forest.set(map_, model, 0, entry_of(99))  # copies a path that is partly bytes already
    forest.clear(twin, content, 16, 64)
    forest.reap()
    forest.shelf.fail()
    table = forest.table
    assert not table.frozen and not table.encoded and table.on_frozen is None and table.on_change is None
    assert set(table.dirty) >= {ident for ident in nodes if ident in table.resident} and set(table.dirty) == set(table.resident)
    assert all(node.epoch == table.epoch for node in table.dirty.values())
    forest.check()
    forest.shelf.squeeze()
    assert forest.shelf.fetched == 0
    forest.check_image(forest.shelf.checkpoint(forest.state()))
    forest.shelf.squeeze()
    forest.check()


def test_freezing_costs_what_was_written_to():
    forest = Forest()
    for _ in range(20):
        map_, model = forest.plant(16)
        forest.fill(map_, model, 16)
    forest.shelf.checkpoint()
    map_, model = forest.maps[3]
    forest.set(map_, model, 0, entry_of(1))
    assert forest.table.owning == {map_} and len(forest.table.dirty) == 1
    forest.shelf.begin()
    assert not forest.table.owning and len(forest.table.frozen) == 1
    forest.shelf.end()


# Memory.


def test_only_clean_nodes_go():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    forest.shelf.squeeze()
    assert len(forest.table.resident) == 21, "nothing was written yet"
    forest.shelf.begin()
    forest.shelf.work(10)
    forest.shelf.squeeze()
    assert len(forest.table.resident) == 21, "bytes are not a disk"
    forest.shelf.end()
    forest.set(map_, model, 5, entry_of(99))
    forest.shelf.squeeze()
    assert list(forest.table.resident) == [map_.owned[1].ident]
    assert forest.table.evicted == 20 and forest.table.resident_bytes == map_.owned[1].size_bytes
    forest.check()


def test_nothing_goes_while_somebody_waits():
    forest = Forest(limit_bytes=0)
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    with forest.table.waiting():
        assert content_of(map_) == model
        forest.shelf.memory.shrink(1000)
        assert len(forest.table.resident) == 21
    forest.shelf.memory.shrink(1000)
    forest.shelf.memory.shrink(1000)
    assert not forest.table.resident
    with pytest.raises(Absent):
        forest.table.get(map_.root)


def test_what_is_used_stays_longest():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    forest.shelf.checkpoint()
    size = forest.shelf.memory.used_bytes
    forest.table.evict(1000, -1)  # everything counted as used so far
    forest.shelf.memory.limit_bytes = size - 8 * 500
    look_up(map_, 9), look_up(map_, 40)
    forest.shelf.memory.shrink(1000)
    assert forest.shelf.memory.used_bytes <= forest.shelf.memory.limit_bytes
    leaves = {forest.table.number[ident] for ident in forest.table.resident}
    assert {9 >> 2, 40 >> 2} <= leaves, "the two leaves that were read"
    assert len(forest.table.resident) < 21


def test_eviction_looks_at_few_nodes_at_a_time():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    forest.shelf.checkpoint()
    forest.table.evict(1000, -1)
    forest.table.evict(5, -1)
    assert len(forest.table.resident) == 16
    forest.table.evict(5, 1 << 40)
    assert len(forest.table.resident) == 16, "there is room"


def test_memory_is_shared_by_all_tables():
    memory = MapMemory(limit_bytes=0)
    usage = Usage(SHIFT)
    small, large = NodeTable(1, usage, memory), NodeTable(5, usage, memory)
    assert memory.tables == [small, large]
    for table, blocks in ((small, 2), (large, 32)):
        ident = table.make(Leaf(array("Q", bytes(8 * blocks))), 1, 0)
        table.freeze()
        table.on_frozen = lambda node: None
        table.came_home(1, array("I", [ident]), array("Q", [0]), array("H", [8]), array("I", [0]), array("I", [0]))
        table.thaw()
    assert memory.used_bytes == small.memory_bytes + large.memory_bytes
    for left in ((1, 1), (1, 0), (1, 0), (0, 0)):  # every node has a second chance; the larger table gives first
        assert memory.shrink(10)
        assert (len(small.resident), len(large.resident)) == left
    large.close()
    large.close()
    assert memory.tables == [small] and memory.used_bytes == small.memory_bytes
    memory.limit_bytes = 1 << 30
    assert not memory.shrink(10)


def test_what_eviction_remembers_does_not_grow():
    """However many nodes come and go."""
    forest = Forest()
    map_, model = forest.plant(64)
    for turn in range(50):
        forest.fill(map_, model, 8, seed=turn)
        forest.clear(map_, model, 0, 64)
        forest.reap()
    assert not forest.table.resident and len(forest.table._clock) == 0
    forest.fill(map_, model, 64)
    assert set(forest.table._clock) == set(forest.table.resident)


def test_statistics():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    numbers = forest.table.statistics()
    assert numbers["map_nodes"] == numbers["map_nodes_in_memory"] == numbers["map_nodes_dirty"] == 21
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    forest.shelf.paged(lambda: look_up(map_, 0))
    map_.drop()
    numbers = forest.table.statistics()
    assert (numbers["map_nodes_paged_in"], numbers["map_nodes_in_memory"], numbers["map_nodes_dirty"]) == (3, 3, 0)
    assert numbers["map_nodes_evicted"] == 21 and numbers["nodes_to_reap"] == 1 and numbers["map_nodes"] == 21


# Rows as they are loaded.


def test_rows_are_loaded_in_any_pieces_and_order():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    image = forest.shelf.checkpoint(forest.state())
    ids = np.flatnonzero(image.rows["family"]).astype(np.uint32)
    rng = np.random.default_rng(1)
    shuffled = rng.permutation(ids)
    other = Shelf(disk=forest.shelf.disk)
    for piece in (ids[:3], ids[:0], *np.array_split(shuffled, 4), shuffled[:5]):
        other.table.load_rows(piece, {name: column[piece] for name, column in image.rows.items()})
    other.table.loaded()
    for name, _ in node_table.COLUMNS:
        assert list(getattr(other.table, name)) == image.rows[name].tolist()
    forest.check_image(image)


def test_free_numbers_are_found_when_loading():
    forest = Forest()
    first, model = forest.plant(64)
    forest.fill(first, model, 64)
    second, content = forest.plant(16)
    forest.fill(second, content, 16)
    first.drop()
    model.clear()
    forest.reap()
    image = forest.shelf.checkpoint(forest.state())
    after = forest.shelf.load(image).table
    assert sorted(after._free) == sorted(forest.table._free) and 0 not in after._free and len(after._free) == 21
    forest.check_image(image)

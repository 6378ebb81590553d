"""The radix tree alone: random changes of many maps that share nodes, against dicts, every invariant after every step."""

from __future__ import annotations

import random

import numpy as np
import pytest

from simsr.store import extent_map
from simsr.store.extent_map import PHYSICAL_MASK, ExtentMap, Inner, Usage
from simsr.store.layout import NodeRef

SHIFT = 5


class Forest:
    """Maps over one `Usage`, and what each must hold: block -> entry."""

    def __init__(self, bits: int = 2) -> None:
        self.usage = Usage(SHIFT)
        self.usage.reserve(300)
        self.bits = bits
        self.maps: list[tuple[ExtentMap, dict[int, int]]] = []
        self.frozen: list = []

    def plant(self, blocks: int) -> tuple[ExtentMap, dict[int, int]]:
        self.maps.append((ExtentMap(self.usage, self.bits, blocks), {}))
        return self.maps[-1]

    def set(self, map_: ExtentMap, model: dict[int, int], block: int, entry: int) -> None:
        """What `Volume.apply` does for one block."""
        number = block >> self.bits
        leaf = map_.owned[number] if number in map_.owned else map_.own(number)
        index = block & (map_.fanout - 1)
        old = leaf.slots[index]
        leaf.slots[index] = entry
        self.usage.live[(entry & PHYSICAL_MASK) >> SHIFT] += 1
        if old:
            self.usage.live[(old & PHYSICAL_MASK) >> SHIFT] -= 1
        else:
            map_.mapped_blocks += 1
        model[block] = entry

    def check(self) -> None:
        self.usage._check([map_.root for map_, _ in self.maps] + self.frozen)
        for map_, model in self.maps:
            map_._check()
            found = {}
            for number, leaf in map_.leaves():
                for index, entry in enumerate(leaf.slots):
                    if entry:
                        found[(number << self.bits) + index] = entry
            assert found == model
            assert map_.mapped_blocks == len(model)
            for number, slots in map_.cache.items():
                leaf = map_.leaf_at(number)
                assert slots is (None if leaf is None else leaf.slots), f"leaf {number} is remembered wrongly"
            for number, leaf in map_.owned.items():
                assert map_.leaf_at(number) is leaf, f"leaf {number} is not there any more"


def look_up(map_: ExtentMap, block: int) -> int:
    number = block >> map_.bits
    slots = map_.cache[number] if number in map_.cache else map_.slots_at(number)
    return 0 if slots is None else slots[block & (map_.fanout - 1)]


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("cached", [2, 1 << 15])
def test_random_changes(bits, cached, seeds, note, monkeypatch):
    monkeypatch.setattr(extent_map, "_CACHED_LEAVES_MAX", cached)
    for seed in seeds(12):
        rng = random.Random(seed)
        forest = Forest(bits)
        forest.plant(10)
        for step in range(150):
            action = rng.choice("wwwwwwclnbdgsurl")
            with note(step=step, action=action):
                random_change(forest, rng, action)
                forest.check()


def random_change(forest: Forest, rng: random.Random, action: str) -> None:
    map_, model = rng.choice(forest.maps)
    room = map_.fanout << (map_.bits * map_.height)
    match action:
        case "w":
            block = rng.randrange(room)
            for block in range(block, min(room, block + rng.randrange(1, 6))):
                forest.set(map_, model, block, rng.randrange(1, 2**32) << 32 | rng.randrange(1 << SHIFT, 200 << SHIFT))
        case "c":
            start = rng.randrange(room)
            end = min(room, start + rng.choice((0, 1, 3, map_.fanout, 4 * map_.fanout, room)))
            map_.clear(start, end)
            for block in [block for block in model if start <= block < end]:
                del model[block]
        case "l":
            block = rng.randrange(room)
            assert look_up(map_, block) == model.get(block, 0)
        case "n" if len(forest.maps) < 6:
            forest.plant(rng.choice((1, 9, 70)))
        case "b":
            other, content = rng.choice(forest.maps)
            map_.become(other)
            if other is not map_:
                model.clear()
                model.update(content)
        case "d":
            map_.drop()
            model.clear()
        case "g" if map_.height < 5:
            map_.grow(room * rng.choice((1, 2, 9)))
        case "s":
            forest.frozen.append(map_.share())
        case "u" if forest.frozen:
            forest.usage.drop(forest.frozen.pop(rng.randrange(len(forest.frozen))))
        case "r":
            forest.usage.reap(rng.choice((1, 2, 5, None)))


def test_own_copies_only_what_is_shared():
    forest = Forest()
    map_, model = forest.plant(64)
    for block in range(64):
        forest.set(map_, model, block, 1 << 32 | 40)
    before = {id(leaf) for _, leaf in map_.leaves()}
    forest.set(map_, model, 5, 2 << 32 | 41)
    assert {id(leaf) for _, leaf in map_.leaves()} == before
    copy, content = forest.plant(64)
    copy.become(map_)
    content.update(model)
    assert copy.root is map_.root
    forest.set(copy, content, 5, 3 << 32 | 42)
    kept = [id(leaf) for _, leaf in copy.leaves()]
    assert len(set(kept) & before) == 15 and len(kept) == 16
    assert [look_up(map_, 5) >> 32, look_up(copy, 5) >> 32] == [2, 3]
    forest.check()


def test_clear_of_a_whole_tree_touches_nothing_below_the_root():
    forest = Forest()
    map_, model = forest.plant(1024)
    for block in range(1024):
        forest.set(map_, model, block, 1 << 32 | 40)
    map_.clear(0, 1024)
    assert map_.root is None and map_.mapped_blocks == 0
    assert forest.usage.live[1] == 1024, "the blocks count as live until they are reaped"
    left = forest.usage.reap(3)
    assert left and forest.usage.live[1] > 0
    assert forest.usage.reap() == 0 and forest.usage.live[1] == 0
    model.clear()
    forest.check()


def test_clear_of_an_astronomic_range_is_quick():
    forest = Forest(bits=9)
    map_, model = forest.plant(1 << 36)
    for block in (0, 511, 512, 1 << 30, (1 << 36) - 1):
        forest.set(map_, model, block, 1 << 32 | 40)
    map_.clear(1, (1 << 36) - 1)
    for block in (511, 512, 1 << 30):
        del model[block]
    forest.check()


def test_grow_keeps_content_and_shared_roots():
    forest = Forest()
    map_, model = forest.plant(4)
    forest.set(map_, model, 3, 7 << 32 | 50)
    frozen = map_.share()
    forest.frozen.append(frozen)
    map_.grow(17)
    assert map_.height == 2 and look_up(map_, 3) == 7 << 32 | 50 and look_up(map_, 16) == 0
    forest.set(map_, model, 16, 8 << 32 | 51)
    forest.set(map_, model, 3, 9 << 32 | 52)
    assert frozen.slots[3] == 7 << 32 | 50, "a frozen root changed"
    forest.check()


def test_become_takes_over_another_height():
    forest = Forest()
    small, small_model = forest.plant(4)
    large, large_model = forest.plant(300)
    forest.set(large, large_model, 299, 7 << 32 | 50)
    forest.set(small, small_model, 1, 8 << 32 | 51)
    look_up(small, 1), look_up(small, 0)
    small.become(large)
    small_model.clear()
    small_model.update(large_model)
    assert small.height == large.height and look_up(small, 1) == 0 and look_up(small, 299) == 7 << 32 | 50
    large.become(small)
    forest.check()


def test_home_is_left_by_every_node_on_the_path_of_a_change():
    forest = Forest()
    map_, model = forest.plant(64)
    for block in (0, 63):
        forest.set(map_, model, block, 1 << 32 | 40)
    nodes, stack = [], [map_.root]
    while stack:
        nodes.append(stack.pop())
        if isinstance(nodes[-1], Inner):
            stack.extend(kid for kid in nodes[-1].kids if kid)
    map_.share()  # what a checkpoint does first
    forest.usage.drop(map_.root)
    for number, node in enumerate(nodes):
        forest.usage.came_home(node, NodeRef(3, number * 10, 10, 0))
    assert forest.usage.nodes_at_home[3] == len(nodes) == 5
    forest.set(map_, model, 1, 2 << 32 | 41)
    assert forest.usage.nodes_at_home[3] == 2 and forest.usage.bytes_at_home[3] == 20
    map_.clear(0, 64)
    forest.usage.reap()
    model.clear()
    assert forest.usage.nodes_at_home[3] == 0
    forest.check()


def test_release_vector_counts_holes_and_segments():
    usage = Usage(SHIFT)
    usage.live[1], usage.live[2] = 5, 5
    entry = lambda segment: 9 << 32 | segment << SHIFT | 3  # noqa: E731
    assert usage.release_vector(np.array([entry(1)] * 3, dtype=np.uint64)) == 0
    assert usage.release_vector(np.array([0, 0], dtype=np.uint64)) == 2
    assert usage.release_vector(np.array([entry(2), 0, entry(1)], dtype=np.uint64)) == 1
    assert list(usage.live[:3]) == [0, 1, 4]


def test_reserve_makes_room_for_far_segments():
    usage = Usage(SHIFT)
    usage.reserve(1000)
    usage.live[1000] += 1
    assert usage.statistics()["live_slots"] == 1


def test_checks_notice_wrong_books():
    forest = Forest()
    map_, model = forest.plant(16)
    forest.set(map_, model, 0, 1 << 32 | 40)
    forest.check()
    forest.usage.live[1] += 1
    with pytest.raises(AssertionError, match="segment 1: live 2, counted 1"):
        forest.usage._check([map_.root])
    forest.usage.live[1] -= 1
    map_.mapped_blocks += 1
    with pytest.raises(AssertionError, match="mapped 2, counted 1"):
        map_._check()
    map_.mapped_blocks -= 1
    map_.root.refs += 1
    with pytest.raises(AssertionError, match="refs 2, counted 1"):
        forest.usage._check([map_.root])

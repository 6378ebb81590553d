"""The extent maps alone: random changes of many maps that share nodes, against dicts, every invariant after every step.

Nodes are let go of all the time, checkpoints begin and end at any moment, and each of them must show the moment it began.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from table_kit import PLENTY_BYTES, SHIFT, Forest, content_of, entry_of, look_up

from simsr.store import extent_map
from simsr.store.node_table import Absent
from simsr.store.nodes import Inner, Leaf
from simsr.store.usage import Usage


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("limit_bytes", [0, 30_000, PLENTY_BYTES])
def test_random_changes(bits, limit_bytes, seeds, note, monkeypatch):
    monkeypatch.setattr(extent_map, "_CACHED_IN_MAX", 1)
    for seed in seeds(8):
        rng = random.Random(f"{bits} {limit_bytes} {seed}")
        forest = Forest(bits, limit_bytes)
        forest.plant(10)
        for step in range(120):
            action = rng.choice("wwwwwwcclnbdgsurreeekkkv")
            with note(step=step, action=action):
                random_change(forest, rng, action)
                if limit_bytes == 0 and rng.random() < 0.5:
                    forest.shelf.squeeze()
                if limit_bytes or step % 3 == 0:  # checking brings every node back
                    forest.check()
        forest.check()


def random_change(forest: Forest, rng: random.Random, action: str) -> None:
    shelf = forest.shelf
    map_, model = rng.choice(forest.maps)
    room = map_.fanout << (map_.bits * map_.height)
    match action:
        case "w":
            block = rng.randrange(room)
            for block in range(block, min(room, block + rng.randrange(1, 6))):
                forest.set(map_, model, block, entry_of(rng.randrange(1 << 30)))
        case "c":
            start = rng.randrange(room)
            end = min(room, start + rng.choice((0, 1, 1, 3, map_.fanout, 4 * map_.fanout, room)))
            forest.clear(map_, model, start, end)
        case "l":
            block = rng.randrange(room)
            assert shelf.paged(lambda: look_up(map_, block)) == model.get(block, 0)
        case "n" if len(forest.maps) < 6:
            forest.plant(rng.choice((1, 9, 70)))
        case "b":
            forest.become(map_, model, *rng.choice(forest.maps))
        case "d":
            map_.drop()
            model.clear()
        case "g" if map_.height < 5:
            map_.grow(room * rng.choice((1, 2, 9)))
        case "s":
            forest.held.append(forest.table.hold(map_.root))
        case "u" if forest.held:
            forest.table.drop(forest.held.pop(rng.randrange(len(forest.held))))
        case "r":
            forest.reap(rng.choice((1, 2, 5, None)))
        case "v":
            shelf.memory.shrink(rng.choice((1, 5, 100)))
        case "e" if not shelf.checkpointing:
            shelf.begin(forest.state())
        case "e" if rng.random() < 0.2:
            shelf.fail()
        case "e":
            shelf.work(rng.randrange(9))
            forest.check_image(shelf.end())
        case "k" if shelf.checkpointing:
            shelf.work(rng.randrange(4))


def nodes_of(forest: Forest, map_) -> dict[int, Leaf | Inner]:
    table = forest.table
    stack, found = [map_.root], {}
    while stack:
        ident = stack.pop()
        node = found[ident] = table.get(ident)
        if node.height:
            stack.extend(node.present.tolist())
    return found


def test_own_copies_only_what_is_shared():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    before = {ident for _, ident in map_.leaves()}
    forest.set(map_, model, 5, 2 << 32 | 41)
    assert {ident for _, ident in map_.leaves()} == before
    copy, content = forest.plant(64)
    forest.become(copy, content, map_, model)
    assert copy.root == map_.root and copy.family == map_.family
    forest.set(copy, content, 5, 3 << 32 | 42)
    kept = [ident for _, ident in copy.leaves()]
    assert len(set(kept) & before) == 15 and len(kept) == 16
    assert [look_up(map_, 5) >> 32, look_up(copy, 5) >> 32] == [2, 3]
    forest.check()


def test_the_last_holder_of_a_copied_path_changes_it_in_place():
    forest = Forest()
    map_, model = forest.plant(64)
    forest.fill(map_, model, 64)
    before = {ident for _, ident in map_.leaves()}
    held = forest.table.hold(map_.root)
    forest.table.drop(held)
    forest.set(map_, model, 5, 2 << 32 | 41)
    assert {ident for _, ident in map_.leaves()} == before
    forest.check()


def test_clear_of_a_whole_tree_reads_no_leaf():
    forest = Forest()
    map_, model = forest.plant(1024)
    forest.fill(map_, model, 1024)
    live = sum(forest.live)
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    assert not forest.table.resident
    forest.clear(map_, model, 0, 1024)
    assert forest.shelf.fetched == 1 + 4 + 16 + 64, "the inner nodes, for counting"
    assert map_.root == 0 and map_.mapped_blocks == 0
    assert sum(forest.live) == live == 1024, "the blocks count as live until they are reaped"
    assert forest.reap(3) and sum(forest.live) == 1024, "leaves come last"
    assert forest.reap() == 0 and not any(forest.live)
    forest.check()


def test_clear_of_an_astronomic_range_is_quick():
    forest = Forest(bits=9)
    map_, model = forest.plant(1 << 36)
    for block in (0, 511, 512, 1 << 30, (1 << 36) - 1):
        forest.set(map_, model, block, 1 << 32 | 40)
    forest.clear(map_, model, 1, (1 << 36) - 1)
    assert set(model) == {0, (1 << 36) - 1}
    forest.check()


def test_holes_are_told_without_reading_what_is_below():
    forest = Forest(bits=2)
    map_, model = forest.plant(1024)  # 256 leaves, height 4
    assert map_.hole_at(0) == 256 and map_.hole_at(100) == 156
    forest.set(map_, model, 70 * 4, entry_of(1))
    assert map_.hole_at(70) == 0 and map_.hole_at(0) == 64 and map_.hole_at(71) == 1 and map_.hole_at(72) == 4
    assert map_.hole_at(64) == 4 and map_.hole_at(128) == 64 and map_.hole_at(81) == 15
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    with pytest.raises(Absent):
        map_.hole_at(0)


def test_grow_keeps_content_and_shared_roots():
    forest = Forest()
    map_, model = forest.plant(4)
    forest.set(map_, model, 3, 7 << 32 | 50)
    root = forest.table.hold(map_.root)
    forest.held.append(root)
    map_.grow(17)
    assert map_.height == 2 and look_up(map_, 3) == 7 << 32 | 50 and look_up(map_, 16) == 0
    forest.set(map_, model, 16, 8 << 32 | 51)
    forest.set(map_, model, 3, 9 << 32 | 52)
    assert forest.table.get(root).slots[3] == 7 << 32 | 50, "a root that somebody else holds changed"
    forest.check()


def test_become_takes_over_another_height_and_family():
    forest = Forest()
    small, small_model = forest.plant(4)
    large, large_model = forest.plant(300)
    forest.set(large, large_model, 299, 7 << 32 | 50)
    forest.set(small, small_model, 1, 8 << 32 | 51)
    look_up(small, 1), look_up(small, 0)
    forest.become(small, small_model, large, large_model)
    assert small.height == large.height and look_up(small, 1) == 0 and look_up(small, 299) == 7 << 32 | 50
    forest.set(small, small_model, 2, entry_of(1))
    assert small.family == large.family
    forest.become(large, large_model, small, small_model)
    forest.become(large, large_model, large, large_model)
    forest.check()


# What is not in memory.


def squeezed(blocks: int = 64, bits: int = 2) -> tuple[Forest, object, dict]:
    """A filled map of which nothing is in memory."""
    forest = Forest(bits)
    map_, model = forest.plant(blocks)
    forest.fill(map_, model, blocks)
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    return forest, map_, model


def test_absent_is_raised_before_anything_changes():
    forest, map_, _ = squeezed()
    table = forest.table
    forest.held.append(table.hold(map_.root))
    root, changed = map_.root, set(table.changed)
    for call in [
        lambda: map_.ready(0, 1), lambda: map_.ready(60, 64), lambda: map_.ready_to_clear(0, 64), lambda: map_.ready_to_clear(1, 2),
        lambda: map_.slots_at(3), lambda: map_.leaf_at(0), lambda: list(map_.leaves()), lambda: map_.hole_at(0),
        lambda: map_.own(0), lambda: map_.clear(3, 60), lambda: table.mapped_below(map_.root),
    ]:  # fmt: skip
        with pytest.raises(Absent) as caught:
            call()
        assert caught.value.ident == root
    assert (map_.root, map_.cache, map_.owned, table.resident, table.changed) == (root, {}, {}, {}, changed)
    forest.check()


def test_everything_a_call_needs_comes_together_however_little_memory_there_is():
    """Each node fetched may send others away; in the end all of a range are there at once."""
    forest, map_, model = squeezed()
    forest.shelf.memory.limit_bytes = 0
    forest.shelf.paged(lambda: map_.ready(0, 64))
    forest.shelf.squeeze()
    forest.shelf.paged(lambda: map_.ready_to_clear(1, 63))
    forest.shelf.squeeze()
    assert forest.shelf.paged(lambda: content_of(map_)) == model


def test_blocks_of_an_owned_leaf_change_without_the_nodes_above_it():
    """They are clean, so they may go. What the log has by now must go into the map: it is too late for Absent."""
    forest, map_, model = squeezed()
    forest.set(map_, model, 5, entry_of(1))
    forest.shelf.squeeze()
    assert [node.height for node in forest.table.resident.values()] == [0]
    map_.ready(5, 6)
    forest.clear(map_, model, 6, 7)
    forest.clear(map_, model, 5, 6)
    forest.clear(map_, model, 5, 6)
    assert look_up(map_, 5) == 0 and look_up(map_, 7) == model[7]
    assert len(forest.table.resident) == 1
    forest.check()


def test_clear_keeps_what_is_owned_elsewhere():
    """One batch may clear a subtree and then change a leaf that `ready` found to be owned."""
    forest, map_, model = squeezed(1024)
    forest.set(map_, model, 700, entry_of(1))
    forest.shelf.squeeze()
    forest.shelf.paged(lambda: map_.ready_to_clear(0, 16))
    map_.ready(700, 701)
    map_.clear(0, 16)
    for block in range(16):
        del model[block]
    leaf = map_.owned[700 >> 2]
    forest.live[leaf.slots[0] >> SHIFT & 0x7FFFFFF] -= 1
    leaf.slots[0] = model[700] = 9 << 32 | 7 << SHIFT
    forest.live[7] += 1
    forest.check()
    forest.clear(map_, model, 512, 1024)
    assert not map_.owned
    forest.check()


def test_a_leaf_that_comes_back_is_not_the_one_that_was_remembered():
    """Maps forget a leaf when it goes: what they remembered would not see its changes."""
    forest = Forest()
    map_, model = forest.plant(16)
    forest.fill(map_, model, 16)
    twin, content = forest.plant(16)
    forest.become(twin, content, map_, model)
    for block in range(16):
        assert look_up(map_, block) == look_up(twin, block) == model[block]
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    assert not map_.cache and not twin.cache
    map_.drop()
    model.clear()
    forest.reap()
    assert forest.shelf.paged(lambda: look_up(twin, 3)) == content[3]
    forest.shelf.squeeze()
    forest.set(twin, content, 3, entry_of(77))
    assert look_up(twin, 3) == content[3]
    forest.check()


def test_mapped_below_knows_leaves_that_are_not_in_memory():
    forest, map_, model = squeezed()
    forest.clear(map_, model, 7, 9)
    with forest.table.waiting():
        assert forest.table.mapped_below(map_.root) == len(model) == map_.mapped_blocks == 62
    forest.shelf.checkpoint()
    forest.shelf.squeeze()
    with forest.table.waiting():
        assert forest.table.mapped_below(map_.root) == 62


# Usage.


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
    assert len(usage.live) > 1000 and sum(usage.live) == 1


def test_changes_of_the_counts_add_up(seeds):
    """Sections of changes, loaded in order, give the counts; a later one that has everything does so alone."""
    for seed in seeds(5):
        rng = random.Random(seed)
        usage, follower = Usage(SHIFT), Usage(SHIFT)
        for turn in range(12):
            for _ in range(rng.randrange(6)):
                slot = rng.randrange(1, 400)
                usage.reserve(slot)
                usage.live[slot] = rng.choice((0, 1, rng.randrange(1 << 40)))
            everything = turn % 5 == 4
            slots, counts = usage.changes(everything)
            if everything:
                follower = Usage(SHIFT)
            follower.load(slots, counts)
            size = max(len(usage.live), len(follower.live))
            assert [*usage.live, *[0] * (size - len(usage.live))] == [*follower.live, *[0] * (size - len(follower.live))]
        assert len(usage.changes(False)[0]) == 0


# The checks themselves.


def test_checks_notice_wrong_books():
    forest = Forest()
    map_, model = forest.plant(16)
    forest.set(map_, model, 0, 1 << 32 | 40)
    forest.check()
    table = forest.table
    forest.live[1] += 1
    with pytest.raises(AssertionError, match="segment 1: live 2, counted 1"):
        table._check([map_.root])
    forest.live[1] -= 1
    map_.mapped_blocks += 1
    with pytest.raises(AssertionError, match="mapped 2, counted 1"):
        map_._check()
    map_.mapped_blocks -= 1
    table.refs[map_.root] += 1
    with pytest.raises(AssertionError, match="refs 2, counted 1"):
        table._check([map_.root])
    table.refs[map_.root] -= 1
    with pytest.raises(AssertionError, match="nodes nobody holds"):
        table._check([])
    (_, leaf), = map_.leaves()
    table.family[leaf] += 1
    with pytest.raises(AssertionError, match="not in its chain"):
        table._check([map_.root])
    with pytest.raises(AssertionError, match="wrong key"):
        map_._check()
    table.family[leaf] -= 1
    forest.shelf.checkpoint()
    table.mapped[leaf] += 1
    with pytest.raises(AssertionError, match="has 1 blocks"):
        table._check([map_.root])
    table.mapped[leaf] -= 1
    table.nodes_at_home[1] += 1
    with pytest.raises(AssertionError, match="nodes at home"):
        table._check([map_.root])

"""Nodes as bytes: whatever a node holds comes back, and bytes that no node gives are refused with ValueError."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simsr.store.nodes import NODE_BYTES, Inner, Leaf, Node, decode, encode

FANOUTS = [1 << bits for bits in range(1, 13)]
PHYSICAL_MIN, PHYSICAL_MAX = 8, 0xFFFFFFFF  # segment 0 is never used, and a segment has 8 blocks or more
HEAD = 8

u32 = st.integers(0, 2**32 - 1)
physicals = st.one_of(
    st.integers(PHYSICAL_MIN, PHYSICAL_MAX), st.sampled_from((PHYSICAL_MIN, PHYSICAL_MAX - 1, PHYSICAL_MAX)), st.integers(8, 20)
)
runs = st.lists(st.tuples(st.integers(0, 4095), st.integers(1, 4096), physicals, u32), max_size=12)
"""(first slot, how many, first physical block, checksum of the first): later ones cover earlier ones"""

quick = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def leaf_of(fanout: int, pieces: list[tuple]) -> Leaf:
    slots = array("Q", bytes(8 * fanout))
    for start, count, physical, crc in pieces:
        for step in range(min(count, fanout - start % fanout, PHYSICAL_MAX + 1 - physical)):
            slots[start % fanout + step] = ((crc + step * 77) & 0xFFFFFFFF) << 32 | (physical + step)
    return Leaf(slots)


def same(one: Node, other: Node) -> bool:
    if one.height != other.height:
        return False
    return one.kids == other.kids if one.height else one.slots == other.slots


@quick
@given(st.sampled_from(FANOUTS), runs)
def test_leaf_round_trip(fanout, pieces):
    leaf = leaf_of(fanout, pieces)
    data, mapped = encode(leaf)
    assert mapped == sum(slot != 0 for slot in leaf.slots)
    assert len(data) <= HEAD + 8 * fanout < 1 << 16, "the table keeps the length in 16 bits"
    found = decode(data, fanout)
    assert same(found, leaf) and found.size_bytes == NODE_BYTES + 8 * fanout
    found.vector[0] = 99 << 32 | 77
    assert found.slots[0] == 99 << 32 | 77, "vector and slots are the same memory"


@quick
@given(st.sampled_from(FANOUTS), st.dictionaries(st.integers(0, 4095), st.integers(1, 2**32 - 1), max_size=60), st.integers(1, 36))
def test_inner_round_trip(fanout, kids, height):
    node = Inner(array("I", bytes(4 * fanout)), height)
    for index, kid in kids.items():
        node.kids[index % fanout] = kid
    data, _ = encode(node)
    assert len(data) <= HEAD + 4 * fanout
    found = decode(data, fanout)
    assert same(found, node) and found.size_bytes == NODE_BYTES + 4 * fanout
    assert found.present.tolist() == [kid for kid in node.kids if kid]


@pytest.mark.parametrize("fanout", FANOUTS)
def test_the_extremes_of_each_fanout(fanout):
    """Nothing, one slot at either end, every second one, all in one run, all in disorder; the same for kids."""
    full = [crc << 32 | physical for crc, physical in zip(range(7, 7 + fanout), range(1000, 1000 + fanout))]
    disorder = list(full)
    random.Random(fanout).shuffle(disorder)
    every_second = [entry if index % 2 else 0 for index, entry in enumerate(full)]
    last_block = [0] * (fanout - 1) + [5 << 32 | PHYSICAL_MAX]
    behind_the_last_block = [5 << 32 | PHYSICAL_MAX] + [0] * (fanout - 1)
    backwards = full[::-1]
    lists = [[0] * fanout, full, disorder, every_second, every_second[::-1], last_block, behind_the_last_block, backwards]
    for slots in lists:
        data, mapped = encode(Leaf(array("Q", slots)))
        assert list(decode(data, fanout).slots) == slots and mapped == fanout - slots.count(0)
    assert len(encode(Leaf(array("Q", bytes(8 * fanout))))[0]) == HEAD
    assert len(encode(Leaf(array("Q", full)))[0]) <= HEAD + 8 + 4 * fanout, "a run needs one place and the checksums"
    for kids in ([0] * fanout, list(range(1, fanout + 1)), [0] * (fanout - 1) + [2**32 - 1]):
        assert list(decode(encode(Inner(array("I", kids), 3))[0], fanout).kids) == kids


def test_sparse_nodes_are_small():
    slots = array("Q", bytes(8 * 512))
    slots[17] = 3 << 32 | 4000
    assert len(encode(Leaf(slots))[0]) == HEAD + 8 + 4
    kids = array("I", bytes(4 * 512))
    kids[511] = 9
    assert len(encode(Inner(kids, 1))[0]) == HEAD + 6


def test_copies_share_nothing():
    leaf = leaf_of(8, [(0, 8, 100, 5)])
    leaf.cached_in.append("somebody")
    copy = leaf.copy()
    copy.slots[3] = 0
    copy.vector[4] = 0
    assert leaf.slots[3] and leaf.slots[4] and copy.cached_in == []
    inner = Inner(array("I", [1, 2]), 2)
    twin = inner.copy()
    twin.kids[0] = 9
    assert list(inner.kids) == [1, 2] and twin.height == 2


# Hostile bytes: the checksums make them next to impossible, and still nothing but ValueError may come of them.


def try_to_decode(data: bytes, fanout: int) -> Node | None:
    try:
        node = decode(data, fanout)
    except ValueError:
        return None
    assert len(node.kids if node.height else node.slots) == fanout
    encode(node)
    return node


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from((2, 4, 512)), st.integers(0, 6), st.integers(0, 3), st.one_of(u32, st.integers(0, 600)), st.binary(max_size=90))
def test_any_bytes(fanout, kind, height, count, body):
    head = bytes([kind, 0]) + height.to_bytes(2, "little") + count.to_bytes(4, "little")
    for data in (body, head + body, head + body * 40, memoryview(head + body)):
        try_to_decode(data, fanout)


@quick
@given(st.sampled_from((2, 4, 64, 512)), runs, st.data())
def test_changed_and_cut_bytes(fanout, pieces, data):
    nodes: list[Node] = [leaf_of(fanout, pieces), Inner(array("I", [piece[3] for piece in pieces][:fanout]), 1)]
    nodes[1].kids.extend([0] * (fanout - len(nodes[1].kids)))
    for node in nodes:
        good = encode(node)[0]
        bad = bytearray(good)
        bad[data.draw(st.integers(0, min(len(bad) - 1, 40)))] ^= data.draw(st.integers(1, 255))
        try_to_decode(bytes(bad), fanout)
        assert try_to_decode(good + b"\0", fanout) is None
        for cut in {0, 1, HEAD - 1, len(good) - 1, len(good) // 2}:
            if cut < len(good):
                found = try_to_decode(good[:cut], fanout)
                assert found is None, f"cut to {cut} of {len(good)} bytes it is still a node"


@pytest.mark.parametrize("wrong", [
    b"", b"\1", bytes(7), bytes(8), b"\1\0\0\0\4\0\0\0" + bytes(31), b"\1\0\0\0\5\0\0\0" + bytes(32), b"\1\0\1\0\4\0\0\0" + bytes(32),
    b"\2\0\0\0\0\0\0\0\1", b"\2\0\1\0\0\0\0\0", b"\2\0\0\0\1\0\0\0" + bytes(7),
    b"\2\0\0\0\1\0\0\0" + b"\3\0\2\0\x64\0\0\0" + bytes(8),  # a run beyond the end
    b"\2\0\0\0\1\0\0\0" + b"\0\0\2\0\xff\xff\xff\xff" + bytes(8),  # of blocks beyond the last
    b"\3\0\0\0\4\0\0\0" + bytes(16), b"\3\0\1\0\3\0\0\0" + bytes(16), b"\3\0\1\0\4\0\0\0" + bytes(15),
    b"\4\0\1\0\1\0\0\0" + b"\4\0\1\0\0\0", b"\4\0\1\0\2\0\0\0" + bytes(11), b"\4\0\0\0\0\0\0\0", b"\5\0\0\0\0\0\0\0",
], ids=lambda wrong: wrong.hex())  # fmt: skip
def test_what_no_node_gives_is_refused(wrong):
    with pytest.raises(ValueError):
        decode(wrong, 4)


def test_decoded_nodes_can_be_changed():
    """They must not lie over the bytes that were read."""
    for node in (leaf_of(16, [(0, 16, 50, 1)]), leaf_of(16, [(3, 1, 50, 1)]), Inner(array("I", range(16)), 1)):
        data = bytearray(encode(node)[0])
        found = decode(data, 16)
        entries = np.frombuffer(found.kids if found.height else found.slots, dtype=np.uint8)
        entries[:] = 255
        del entries
        assert same(decode(data, 16), node)

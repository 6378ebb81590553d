"""Nodes of the extent maps, in memory and as bytes.

A leaf holds one 64-bit slot for each of its blocks: ``crc32c << 32 | physical block``, 0 for a hole. The checksum is
kept with the reference, so a block that was damaged, misdirected or is stale cannot pass for the one that is meant
(as in ZFS and TigerBeetle). A physical block number is ``segment slot << segment_shift | block in the segment``.

An inner node holds the numbers of the nodes one level below (`simsr.store.node_table`), 0 where nothing is mapped. Nodes name
each other by number and never by place, so a node can be written anew somewhere else without a change to its parents.

As bytes a leaf is either dense (all slots), or a list of runs: blocks that follow each other in the log as in the
disk. A nearly empty leaf is a few runs of one block; both forms decode to the same array.
"""

from __future__ import annotations

import struct
from array import array

import numpy as np

__all__ = ["Leaf", "Inner", "Node", "PHYSICAL_MASK", "encode", "decode", "NODE_BYTES"]

PHYSICAL_MASK = 0xFFFFFFFF
_DENSE, _RUNS, _INNER, _FEW_KIDS = 1, 2, 3, 4
_HEAD = struct.Struct("<BxHI")
NODE_BYTES = 1024  # what a node takes in memory besides its entries, about: objects, places in dictionaries


class Leaf:
    """512 slots (at the default fan-out). ``epoch``, ``used``: see `NodeTable`; ``cached_in``: the maps that remember ``slots``."""

    __slots__ = ("ident", "slots", "epoch", "used", "cached_in", "_vector")
    height = 0

    def __init__(self, slots: array) -> None:
        self.ident = self.epoch = 0
        self.slots = slots
        self.used = True
        self.cached_in: list = []
        self._vector = None

    @property
    def vector(self) -> np.ndarray:
        """The slots as a numpy array over the same memory."""
        if self._vector is None:
            self._vector = np.frombuffer(self.slots, dtype=np.uint64)
        return self._vector

    @property
    def size_bytes(self) -> int:
        return NODE_BYTES + 8 * len(self.slots)

    def copy(self) -> Leaf:
        return Leaf(self.slots[:])


class Inner:
    """The numbers of 512 nodes one level below; 0 where nothing is mapped."""

    __slots__ = ("ident", "kids", "height", "epoch", "used")

    def __init__(self, kids: array, height: int) -> None:
        self.ident = self.epoch = 0
        self.kids = kids
        self.height = height
        self.used = True

    @property
    def size_bytes(self) -> int:
        return NODE_BYTES + 4 * len(self.kids)

    def copy(self) -> Inner:
        return Inner(self.kids[:], self.height)

    @property
    def present(self) -> np.ndarray:
        """The numbers of the kids that are there, in order."""
        kids = np.frombuffer(self.kids, dtype=np.uint32)
        return kids[kids != 0]


Node = Leaf | Inner


def encode(node: Node) -> tuple[bytes, int]:
    """(the node as bytes, for a leaf how many of its slots are not holes). O(fan-out)."""
    return _encode_inner(node) if node.height else _encode_leaf(node)


def _encode_inner(node: Inner) -> tuple[bytes, int]:
    kids = np.frombuffer(node.kids, dtype=np.uint32)
    used = np.flatnonzero(kids)
    if 6 * len(used) < 4 * len(kids):
        head = _HEAD.pack(_FEW_KIDS, node.height, len(used))
        return head + used.astype(np.uint16).tobytes() + kids[used].tobytes(), 0
    return _HEAD.pack(_INNER, node.height, len(kids)) + node.kids.tobytes(), 0


def _encode_leaf(leaf: Leaf) -> tuple[bytes, int]:
    halves = leaf.vector.view(np.uint32)
    physical = halves[::2]
    mapped = int(np.count_nonzero(physical))
    if not mapped:
        return _HEAD.pack(_RUNS, 0, 0), 0
    starts = np.flatnonzero((physical[1:] != physical[:-1] + 1) & (physical[1:] != 0)) + 1
    if physical[0]:
        starts = np.concatenate((np.zeros(1, dtype=starts.dtype), starts))
    if 8 * len(starts) + 4 * mapped >= 8 * len(leaf.slots):
        return _HEAD.pack(_DENSE, 0, len(leaf.slots)) + leaf.slots.tobytes(), mapped
    used = np.flatnonzero(physical)
    counts = np.diff(np.searchsorted(used, starts), append=mapped)
    runs = np.empty((len(starts), 2), dtype=np.uint32)
    runs[:, 0] = starts | counts << 16
    runs[:, 1] = physical[starts]
    return _HEAD.pack(_RUNS, 0, len(starts)) + runs.tobytes() + halves[1::2][used].tobytes(), mapped


def decode(data: bytes | memoryview, fanout: int) -> Node:
    """The node that `encode` made ``data`` of. Raises ValueError for bytes that it never makes."""
    if len(data) < _HEAD.size:
        raise ValueError(f"{len(data)} bytes are no node")
    kind, height, count = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if kind == _DENSE and not height and count == fanout and len(body) == 8 * fanout:
        slots = array("Q", [0]) * fanout  # exactly as much memory as it takes, unlike an array that grows
        memoryview(slots).cast("B")[:] = body
        return Leaf(slots)
    if kind == _RUNS and not height and len(body) >= 8 * count:
        return _decode_runs(np.frombuffer(body[: 8 * count], dtype=np.uint32), body[8 * count :], fanout)
    if kind == _INNER and height and count == fanout and len(body) == 4 * fanout:
        kids = array("I")
        kids.frombytes(body)
        return Inner(kids, height)
    if kind == _FEW_KIDS and height and len(body) == 6 * count:
        vector = np.zeros(fanout, dtype=np.uint32)
        index = np.frombuffer(body[: 2 * count], dtype=np.uint16)
        if count and int(index.max()) >= fanout:
            raise ValueError("an index beyond the end of the node")
        vector[index] = np.frombuffer(body[2 * count :], dtype=np.uint32)
        kids = array("I")
        kids.frombytes(vector.tobytes())
        return Inner(kids, height)
    raise ValueError(f"kind {kind}, height {height}, {len(body)} bytes is no node")


def _decode_runs(runs: np.ndarray, rest: memoryview, fanout: int) -> Leaf:
    slots = array("Q", [0]) * fanout
    leaf = Leaf(slots)
    if not len(runs):
        if len(rest):
            raise ValueError("an empty leaf with checksums")
        return leaf
    starts, counts, firsts = (runs[::2] & 0xFFFF).astype(np.intp), (runs[::2] >> 16).astype(np.intp), runs[1::2]
    total = int(counts.sum())
    if len(rest) != 4 * total or int((starts + counts).max()) > fanout or int((firsts + counts).max()) > 1 << 32:
        raise ValueError("the runs of a leaf do not fit")
    steps = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    entries = np.frombuffer(rest, dtype=np.uint32).astype(np.uint64) << np.uint64(32)
    entries |= (np.repeat(firsts, counts) + steps).astype(np.uint64)
    np.frombuffer(slots, dtype=np.uint64)[np.repeat(starts, counts) + steps] = entries
    return leaf

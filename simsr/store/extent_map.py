"""The extent map: from blocks of a volume to blocks of the log. An immutable radix tree with structural sharing.

A leaf holds one 64-bit slot for each of its blocks: ``crc32c << 32 | physical block``, 0 for a hole. The checksum is
kept with the reference, so a block that was damaged, misdirected or is stale cannot pass for the one that is meant
(as in ZFS and TigerBeetle). A physical block number is ``segment slot << segment_shift | block in the segment``.

Sharing is by reference counts: ``refs`` of a node counts its parents, the maps whose root it is, and frozen handles.
A node may be changed in place only when every node on the path to it has ``refs == 1``; otherwise the path is copied.
So snapshot, clone and revert copy one root reference, whatever the size of the disk, and a lookup never depends on
the number of snapshots. Letting go of a root only queues it: `Usage.reap` walks what nobody else holds, later.

Invariants (`ExtentMap._check`, `Usage._check`):
* ``Usage.live[s]`` is the number of slots, over all distinct leaves alive, that name a block of segment ``s``;
* ``mapped_blocks`` is the number of slots of the map that are not holes;
* a node with a ``home`` is byte for byte the node stored there, and so is everything below it.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from simsr.store.layout import NodeRef

__all__ = ["Leaf", "Inner", "Node", "Usage", "ExtentMap", "PHYSICAL_MASK"]

PHYSICAL_MASK = 0xFFFFFFFF
_CACHED_LEAVES_MAX = 1 << 15


class Leaf:
    """512 slots (at the default fan-out), and the number of holders."""

    __slots__ = ("refs", "slots", "home", "_vector")

    def __init__(self, slots: array) -> None:
        self.refs = 1
        self.slots = slots
        self.home: NodeRef | None = None
        self._vector = None

    @property
    def vector(self) -> np.ndarray:
        """The slots as a numpy array over the same memory."""
        if self._vector is None:
            self._vector = np.frombuffer(self.slots, dtype=np.uint64)
        return self._vector


class Inner:
    """References to 512 nodes one level below; None where nothing is mapped."""

    __slots__ = ("refs", "kids", "home")

    def __init__(self, kids: list) -> None:
        self.refs = 1
        self.kids = kids
        self.home: NodeRef | None = None


Node = Leaf | Inner


class Usage:
    """Who uses what: live slots of each segment, live nodes of each checkpoint file, and the queue of dropped roots."""

    def __init__(self, segment_shift: int) -> None:
        self.segment_shift = segment_shift
        self.live = array("q", bytes(8 * 64))
        self.nodes_at_home: Counter[int] = Counter()
        self.bytes_at_home: Counter[int] = Counter()
        self._dropped: deque[Node] = deque()
        self._outdated: list[dict] = []  # what maps remembered; emptying it takes time in proportion to the disk

    def reserve(self, slot: int) -> None:
        """Make room for counting segment ``slot``."""
        if slot >= len(self.live):
            self.live.extend([0] * (slot + 1))

    def count_leaf(self, leaf: Leaf, sign: int) -> None:
        """Count the slots of a leaf that came into being (+1) or goes (-1). O(fan-out)."""
        counts = np.bincount(((leaf.vector & PHYSICAL_MASK) >> self.segment_shift).astype(np.intp))
        live = self.live
        for slot in np.flatnonzero(counts[1:]).tolist():
            live[slot + 1] += sign * int(counts[slot + 1])

    def release_vector(self, old: np.ndarray) -> int:
        """Uncount overwritten slots; returns how many of them were holes."""
        physical = (old & PHYSICAL_MASK) >> self.segment_shift
        first = int(physical[0])
        if first == int(physical[-1]) and bool((physical == first).all()):
            if not first:
                return len(old)
            self.live[first] -= len(old)
            return 0
        counts = np.bincount(physical.astype(np.intp))
        live = self.live
        for slot in np.flatnonzero(counts[1:]).tolist():
            live[slot + 1] -= int(counts[slot + 1])
        return int(counts[0])

    def came_home(self, node: Node, home: NodeRef) -> None:
        node.home = home
        self.nodes_at_home[home.file] += 1
        self.bytes_at_home[home.file] += home.length

    def left_home(self, node: Node) -> None:
        """The node changes or dies: what a checkpoint file holds of it is garbage from the next checkpoint on."""
        home = node.home
        if home is not None:
            node.home = None
            self.nodes_at_home[home.file] -= 1
            self.bytes_at_home[home.file] -= home.length

    def drop(self, node: Node | None) -> None:
        """Give back one reference to ``node``. O(1); `reap` does the rest."""
        if node is not None:
            if node.refs > 1:
                node.refs -= 1
            else:
                self._dropped.append(node)

    def empty_later(self, remembered: dict) -> dict:
        """Leave emptying ``remembered`` to `reap`; returns an empty one in its place."""
        if remembered:
            self._outdated.append(remembered)
        return {}

    def reap(self, nodes_max: int | None = None) -> int:
        """Take apart up to ``nodes_max`` dropped nodes; returns how many wait still."""
        self._outdated.clear()
        queue = self._dropped
        while queue and (nodes_max is None or nodes_max > 0):
            node = queue.popleft()
            if nodes_max is not None:
                nodes_max -= 1
            node.refs -= 1
            if node.refs:
                continue
            self.left_home(node)
            if isinstance(node, Leaf):
                self.count_leaf(node, -1)
            else:
                for kid in node.kids:
                    self.drop(kid)
        return len(queue)

    @property
    def dropped_nodes(self) -> int:
        """How many dropped nodes wait for `reap`."""
        return len(self._dropped)

    def statistics(self) -> dict[str, int]:
        return {"nodes_to_reap": self.dropped_nodes, "live_slots": sum(self.live)}

    def _check(self, roots: list[Node | None]) -> None:
        """Count everything anew from ``roots`` (those dropped included) and compare. O(nodes); for tests."""
        expected: Counter[int] = Counter()
        refs: Counter[int] = Counter()
        seen: dict[int, Node] = {}
        stack = [root for root in [*roots, *self._dropped] if root is not None]
        while stack:
            node = stack.pop()
            refs[id(node)] += 1
            if id(node) in seen:
                continue
            seen[id(node)] = node
            if isinstance(node, Leaf):
                for entry in node.slots:
                    if entry:
                        expected[(entry & PHYSICAL_MASK) >> self.segment_shift] += 1
            else:
                stack.extend(kid for kid in node.kids if kid is not None)
        for slot, live in enumerate(self.live):
            assert live == expected[slot], f"segment {slot}: live {live}, counted {expected[slot]}"
        for key, node in seen.items():
            assert node.refs == refs[key], f"node {node}: refs {node.refs}, counted {refs[key]}"
        homes = Counter(node.home.file for node in seen.values() if node.home)
        assert homes == +self.nodes_at_home, f"nodes at home {+self.nodes_at_home}, counted {homes}"


class ExtentMap:
    """The map of one volume: a root of ``height`` levels above the leaves.

    Looking up:   `slots_at`, `leaf_at`, `leaves`
    Changing:     `own`, `clear`, `grow`
    Sharing:      `share`, `become`, `drop`
    """

    def __init__(self, usage: Usage, fanout_bits: int, blocks: int = 0) -> None:
        self._usage = usage
        self.bits = fanout_bits
        self.fanout = 1 << fanout_bits
        self.root: Node | None = None
        self.height = 0
        self.mapped_blocks = 0
        self.cache: dict[int, array | None] = {}  # leaf number -> slots, for reading
        self.owned: dict[int, Leaf] = {}  # leaf number -> leaf that may be changed in place
        self.grow(blocks)

    def grow(self, blocks: int) -> None:
        """Make block numbers below ``blocks`` addressable. O(height)."""
        while blocks > self.fanout << (self.bits * self.height):
            if self.root is not None:
                self.root = Inner([self.root] + [None] * (self.fanout - 1))
            self.height += 1
            self.forget()

    def forget(self) -> None:
        """Drop what is remembered of the tree; needed whenever a root is shared or replaced."""
        self.cache.clear()
        self.owned.clear()

    def _forget_all(self) -> None:
        """`forget` in O(1), for when nobody is in the middle of using what is remembered."""
        self.cache = self._usage.empty_later(self.cache)
        self.owned = self._usage.empty_later(self.owned)

    def leaf_at(self, number: int) -> Leaf | None:
        """The leaf that covers blocks ``number * fanout`` and on. O(height)."""
        node = self.root
        for level in range(self.height - 1, -1, -1):
            if node is None:
                return None
            node = node.kids[(number >> (self.bits * level)) & (self.fanout - 1)]
        return node

    def slots_at(self, number: int) -> array | None:
        """The slots of that leaf, or None for holes only; remembered for the next time."""
        leaf = self.leaf_at(number)
        if len(self.cache) >= _CACHED_LEAVES_MAX:
            self.cache.clear()
        slots = self.cache[number] = None if leaf is None else leaf.slots
        return slots

    def own(self, number: int) -> Leaf:
        """Return that leaf ready for changes: made if absent, copied if shared. O(height), O(fan-out) on the first touch."""
        node = self.root = self._own_node(self.root, self.height)
        for level in range(self.height - 1, -1, -1):
            index = (number >> (self.bits * level)) & (self.fanout - 1)
            kid = node.kids[index] = self._own_node(node.kids[index], level)
            node = kid
        if len(self.owned) >= _CACHED_LEAVES_MAX:
            self.owned.clear()
        self.owned[number] = node
        self.cache[number] = node.slots
        return node

    def _own_node(self, node: Node | None, level: int) -> Node:
        if node is None:
            return Inner([None] * self.fanout) if level else Leaf(array("Q", bytes(8 * self.fanout)))
        if node.refs == 1:
            self._usage.left_home(node)
            return node
        node.refs -= 1
        if level:
            for kid in node.kids:
                if kid is not None:
                    kid.refs += 1
            return Inner(node.kids.copy())
        leaf = Leaf(node.slots[:])
        self._usage.count_leaf(leaf, +1)
        return leaf

    def clear(self, start: int, end: int) -> None:
        """Make holes of blocks ``start`` to ``end``. O(leaves of the range that are mapped)."""
        if self.root is not None and start < end:
            self.root = self._clear(self.root, self.height, 0, start, end)

    def _clear(self, node: Node, level: int, base: int, start: int, end: int) -> Node | None:
        span = self.fanout << (self.bits * level)
        if start <= base and base + span <= end:
            self.mapped_blocks -= self._count_mapped(node)
            for number in range(base >> self.bits, (base + span) >> self.bits) if level == 0 else ():
                self.cache.pop(number, None)
                self.owned.pop(number, None)
            if level:
                self.forget()
            self._usage.drop(node)
            return None
        node = self._own_node(node, level)
        if level:
            step = span >> self.bits
            for index in range(max(0, start - base) // step, min(self.fanout, (end - base + step - 1) // step)):
                kid = node.kids[index]
                if kid is not None:
                    node.kids[index] = self._clear(kid, level - 1, base + index * step, start, end)
        else:
            number = base >> self.bits
            first, last = max(0, start - base), min(self.fanout, end - base)
            vector = node.vector[first:last]
            self.mapped_blocks -= (last - first) - self._usage.release_vector(vector)
            vector[:] = 0
            self.owned[number] = node
            self.cache[number] = node.slots
        return node

    @staticmethod
    def _count_mapped(node: Node) -> int:
        if isinstance(node, Leaf):
            return int(np.count_nonzero(node.vector))
        return sum(ExtentMap._count_mapped(kid) for kid in node.kids if kid is not None)

    def share(self) -> Node | None:
        """Return the root with one more holder: from now on every node of the tree is copied before it changes. O(1)."""
        if self.root is not None:
            self.root.refs += 1
        self.owned = self._usage.empty_later(self.owned)
        return self.root

    def become(self, other: ExtentMap) -> None:
        """Take over the content of ``other``, sharing all of it; what was here before is dropped. O(1)."""
        old, self.root = self.root, other.share()
        self.height, self.mapped_blocks = other.height, other.mapped_blocks
        self._forget_all()
        self._usage.drop(old)

    def drop(self) -> None:
        """Let go of the content."""
        self._usage.drop(self.root)
        self.root, self.mapped_blocks = None, 0
        self._forget_all()

    def leaves(self) -> Iterator[tuple[int, Leaf]]:
        """All leaves in order, each with its number."""
        stack: list[tuple[int, int, Node | None]] = [(self.height, 0, self.root)]
        while stack:
            level, number, node = stack.pop()
            if node is None:
                continue
            if level == 0:
                yield number, node
            else:
                for index in range(self.fanout - 1, -1, -1):
                    if node.kids[index] is not None:
                        stack.append((level - 1, (number << self.bits) | index, node.kids[index]))

    def _check(self) -> None:
        mapped = 0
        for number, leaf in self.leaves():
            mapped += int(np.count_nonzero(leaf.vector))
            cached = self.cache.get(number, leaf.slots)
            assert cached is leaf.slots, f"cache of leaf {number} is stale"
            owned = self.owned.get(number, leaf)
            assert owned is leaf, f"owned leaf {number} is stale"
        assert mapped == self.mapped_blocks, f"mapped {self.mapped_blocks}, counted {mapped}"

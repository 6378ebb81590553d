"""The extent map of a volume: from blocks of the volume to blocks of the log. An immutable radix tree with structural sharing.

Nodes live in the `NodeTable` of the store and name each other by number. Snapshot, clone and revert take one more reference to a
root, whatever the size of the disk, and a lookup never depends on the number of snapshots. What is not in memory raises
`Absent` before anything is changed.

Two dictionaries keep the hot path short: ``cache`` (leaf number -> slots, for reading) and ``owned`` (leaf number -> leaf that may be
changed in place now). A leaf is owned if every node on the path to it has one holder, and it is dirty.

Invariants (`_check`): ``mapped_blocks`` is the number of slots of the map that are not holes; ``cache`` and ``owned`` agree with the tree.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from simsr.store.node_table import NodeTable
from simsr.store.nodes import Inner, Leaf

__all__ = ["ExtentMap"]

_CACHED_IN_MAX = 8


class ExtentMap:
    """The map of one volume: a root of ``height`` levels above the leaves.

    Looking up:   `slots_at`, `leaf_at`, `leaves`
    Changing:     `own`, `clear`, `grow`; first `ready` or `ready_to_clear`, then they cannot fail
    Sharing:      `become`, `drop`
    """

    def __init__(self, table: NodeTable, family: int, blocks: int = 0) -> None:
        self._table = table
        self.family = family
        self.bits, self.fanout = table.bits, table.fanout
        self.root = 0
        self.height = 0
        self.mapped_blocks = 0
        self.cache: dict[int, array | None] = {}
        self.owned: dict[int, Leaf] = {}
        self.grow(blocks)

    def grow(self, blocks: int) -> None:
        """Make block numbers below ``blocks`` addressable. O(height)."""
        while blocks > self.fanout << (self.bits * self.height):
            self.height += 1
            if self.root:
                kids = array("I", [0]) * self.fanout
                kids[0] = self.root
                self.root = self._table.make(Inner(kids, self.height), self.family, 0)
            self.forget()

    def forget(self) -> None:
        """Drop what is remembered of the tree; needed whenever a root is shared or replaced. O(1)."""
        self.cache = self._table.empty_later(self.cache)
        self.forget_owned()

    def forget_owned(self) -> None:
        self.owned = self._table.empty_later(self.owned)
        self._table.owning.discard(self)

    # Looking up.

    def leaf_at(self, number: int) -> Leaf | None:
        """The leaf that covers blocks ``number * fanout`` and on. O(height)."""
        table, ident = self._table, self.root
        for level in range(self.height - 1, -1, -1):
            if not ident:
                return None
            ident = table.get(ident).kids[(number >> (self.bits * level)) & (self.fanout - 1)]
        return table.get(ident) if ident else None

    def hole_at(self, number: int) -> int:
        """How many leaves from ``number`` on are surely not there, up to the end of the missing subtree; 0 if that leaf is."""
        ident = self.root
        for level in range(self.height, -1, -1):
            if not ident:
                below = 1 << (self.bits * level)
                return below - number % below
            if level:
                ident = self._table.get(ident).kids[(number >> (self.bits * (level - 1))) & (self.fanout - 1)]
        return 0

    def slots_at(self, number: int) -> array | None:
        """The slots of that leaf, or None for holes only; remembered for the next time."""
        leaf = self.owned[number] if number in self.owned else self.leaf_at(number)
        if leaf is None:
            self.cache[number] = None
            return None
        self._remember(number, leaf)
        return leaf.slots

    def _remember(self, number: int, leaf: Leaf) -> None:
        known = leaf.cached_in
        if self not in known:
            if len(known) > _CACHED_IN_MAX:  # most have forgotten it, or are gone
                known[:] = [other for other in known if number in other.cache]
            known.append(self)
        self.cache[number] = leaf.slots

    def ready(self, first: int, last: int) -> None:
        """Raise `Absent` unless blocks ``first`` to ``last`` can be looked up and changed without reading a node."""
        bits = self.bits
        for number in range(first >> bits, (last - 1 >> bits) + 1):
            if number not in self.owned:
                self.leaf_at(number)

    # Changing.

    def own(self, number: int) -> Leaf:
        """Return that leaf ready for changes: made if absent, copied if shared. O(height), O(fan-out) on the first touch."""
        leaf = self._own_path(number, 0)
        self._table.touch(leaf)
        self.owned[number] = leaf
        self._table.owning.add(self)
        self._remember(number, leaf)
        return leaf

    def _own_path(self, number: int, down_to: int) -> Leaf | Inner:
        """The node of height ``down_to`` above leaf ``number``, with one holder, as all nodes above it."""
        node = None
        for level in range(self.height, down_to - 1, -1):
            index = (number >> (self.bits * level)) & (self.fanout - 1)
            old = self.root if node is None else node.kids[index]
            new = self._own_node(old, level, number)
            if new != old:
                if node is None:
                    self.root = new
                else:
                    self._table.touch(node)
                    node.kids[index] = new
            node = self._table.get(new)
        return node

    def _own_node(self, ident: int, level: int, number: int) -> int:
        if ident:
            return self._table.own(ident)
        if level:
            return self._table.make(Inner(array("I", [0]) * self.fanout, level), self.family, 0)
        return self._table.make(Leaf(array("Q", [0]) * self.fanout), self.family, number)

    def ready_to_clear(self, first: int, last: int) -> None:
        """Raise `Absent` unless `clear` of this range can be done without reading a node."""
        if self.root and first < last:
            self._ready_to_clear(self.root, self.height, 0, first, last)

    def _ready_to_clear(self, ident: int, level: int, base: int, first: int, last: int) -> None:
        span = self.fanout << (self.bits * level)
        if first <= base and base + span <= last:
            self._table.mapped_below(ident)
            return
        node = self._table.get(ident)
        if level:
            step = span >> self.bits
            for index in range(max(0, first - base) // step, min(self.fanout, (last - base + step - 1) // step)):
                if node.kids[index]:
                    self._ready_to_clear(node.kids[index], level - 1, base + index * step, first, last)

    def clear(self, first: int, last: int) -> None:
        """Make holes of blocks ``first`` to ``last``. O(nodes at the edges and inner nodes between them that are mapped)."""
        number = first >> self.bits
        if number in self.owned and (last - 1) >> self.bits == number and last - first < self.fanout:
            # As `ready` promises: blocks of a leaf that is owned change without the nodes above it, which may not be in memory.
            self._clear_slots(self.owned[number], first & (self.fanout - 1), last - (number << self.bits))
        elif self.root and first < last:
            self.root = self._clear(self.root, self.height, 0, first, last)

    def _clear_slots(self, leaf: Leaf, low: int, high: int) -> None:
        window = leaf.vector[low:high]
        if window.any():
            self._table.touch(leaf)
            self.mapped_blocks -= (high - low) - self._table.usage.release_vector(window)
            window[:] = 0

    def _clear(self, ident: int, level: int, base: int, first: int, last: int) -> int:
        span = self.fanout << (self.bits * level)
        table = self._table
        if first <= base and base + span <= last:
            self.mapped_blocks -= table.mapped_below(ident)
            if level:  # in place: a batch that is being applied goes on with these dictionaries
                self.cache.clear()
                # Only what lies in the range: other leaves may be owned while the nodes above them are not in memory.
                for number in [n for n in self.owned if base <= n << self.bits < base + span]:
                    del self.owned[number]
            else:
                self.cache.pop(base >> self.bits, None)
                self.owned.pop(base >> self.bits, None)
            table.drop(ident)
            return 0
        ident = table.own(ident)
        node = table.get(ident)
        if level:
            step = span >> self.bits
            for index in range(max(0, first - base) // step, min(self.fanout, (last - base + step - 1) // step)):
                old = node.kids[index]
                if old:
                    new = self._clear(old, level - 1, base + index * step, first, last)
                    if new != old:
                        table.touch(node)
                        node.kids[index] = new
        else:
            self._clear_slots(node, max(0, first - base), min(self.fanout, last - base))
            number = base >> self.bits
            if self.cache.get(number) is not node.slots:  # the leaf may be a copy now
                self.cache.pop(number, None)
            if self.owned.get(number) is not node:
                self.owned.pop(number, None)
        return ident

    # Sharing.

    def become(self, other: ExtentMap) -> None:
        """Take over the content of ``other``, sharing all of it; what was here before is dropped. O(1)."""
        old, self.root = self.root, self._table.hold(other.root)
        self.height, self.mapped_blocks, self.family = other.height, other.mapped_blocks, other.family
        other.forget_owned()
        self.forget()
        self._table.drop(old)

    def drop(self) -> None:
        """Let go of the content."""
        self._table.drop(self.root)
        self.root, self.mapped_blocks = 0, 0
        self.forget()

    def leaves(self) -> Iterator[tuple[int, int]]:
        """All leaves in order: (leaf number, number of the node). Raises `Absent`."""
        stack: list[tuple[int, int, int]] = [(self.height, 0, self.root)]
        while stack:
            level, number, ident = stack.pop()
            if not ident:
                continue
            if level == 0:
                yield number, ident
            else:
                kids = self._table.get(ident).kids
                for index in range(self.fanout - 1, -1, -1):
                    if kids[index]:
                        stack.append((level - 1, (number << self.bits) | index, kids[index]))

    def _check(self) -> None:
        mapped = 0
        table = self._table
        for number, ident in self.leaves():
            leaf = table.get(ident)
            mapped += int(np.count_nonzero(leaf.vector))
            assert table.number[ident] == number and table.family[ident] == self.family, f"leaf {ident} has the wrong key"
            cached = self.cache.get(number, leaf.slots)
            assert cached is leaf.slots, f"cache of leaf {number} is stale"
            assert number not in self.cache or self in leaf.cached_in, f"leaf {number} does not know who remembers it"
            if number in self.owned:
                assert self.owned[number] is leaf, f"owned leaf {number} is stale"
                assert ident in table.dirty and leaf.epoch == table.epoch, f"owned leaf {number} is not dirty"
        assert mapped == self.mapped_blocks, f"mapped {self.mapped_blocks}, counted {mapped}"

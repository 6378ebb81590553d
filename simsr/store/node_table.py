"""The node table: every node of every map of a store by number; who holds it, where it is on disk, whether it is in memory.

Nodes themselves are read from map files when they are needed and let go of when memory is short (`MapMemory`); the table, about
forty bytes a node, stays. It makes three things cheap that a tree of pointers makes dear: counting who shares a node without
reading it (``refs``), moving a node without touching its parents, and finding every leaf that covers some block of a
family of volumes (`leaves_of`), which is how the cleaner mends all of them at once.

Reference counts: ``refs`` of a node counts the nodes and the volumes that hold it. A node may be changed in place by the volume whose path to
it has ``refs == 1`` throughout; otherwise the path is copied. Letting go of the last reference queues the node; `reap` takes
it apart later, a bit at a time.

Changes and checkpoints: what changed since a checkpoint began is ``dirty``. `freeze` hands the dirty nodes over to a checkpoint and begins
a new epoch. A frozen node is turned into bytes when its turn comes, or just before somebody changes it (`touch`), so nothing
is copied, nothing waits, and the checkpoint shows one moment. Nodes that are not clean are never let go of.

Invariants (`_check`): ``refs`` is what counting from the roots gives; ``mapped`` of a clean leaf is the number of its slots in use;
``live`` of `Usage` is what counting all leaves gives; the chains of `leaves_of` hold exactly the leaves.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from simsr.store.nodes import Node
from simsr.store.usage import Usage

if TYPE_CHECKING:
    from simsr.store.extent_map import ExtentMap

__all__ = ["NodeTable", "MapMemory", "Absent", "COLUMNS", "NO_LEAF", "MAP_MEMORY_BYTES"]

NO_LEAF = 0xFFFFFFFF
"""``number`` of a node that is not a leaf; ``family`` is 0 for a row that is no node."""

COLUMNS = (
    ("refs", "I"), ("mapped", "I"), ("family", "I"), ("number", "I"), ("file", "I"), ("offset", "Q"), ("length", "H"), ("crc", "I"),
)  # fmt: skip
_ROW_BYTES = 34 + 8 + 4  # the columns, the chains, the number in a list of free ones
_HEADS_MIN = 1 << 10
MAP_MEMORY_BYTES = 256 << 20


class Absent(Exception):
    """A node that is needed is not in memory: page it in (`NodeTable.page_job`) and try again. Nothing was changed."""

    def __init__(self, ident: int) -> None:
        super().__init__(ident)
        self.ident = ident


class MapMemory:
    """The memory that the maps of all stores of a process share. Tables let go of clean nodes to stay within ``limit_bytes``."""

    def __init__(self, limit_bytes: int = MAP_MEMORY_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.tables: list[NodeTable] = []

    @property
    def used_bytes(self) -> int:
        return sum(table.memory_bytes for table in self.tables)

    def shrink(self, looks_max: int) -> bool:
        """Look at up to ``looks_max`` nodes of the largest table and let go of some; whether there is too much still."""
        if self.used_bytes > self.limit_bytes and self.tables:
            max(self.tables, key=lambda table: table.resident_bytes).evict(looks_max, self.limit_bytes)
        return self.used_bytes > self.limit_bytes


class NodeTable:
    """All nodes of one store. Number 0 is no node.

    Nodes:    `get`, `make`, `own`, `touch`, `drop`, `hold`
    Upkeep:   `reap`, `evict`, `adopt` (what was read from disk)
    Finding:  `leaves_of`
    """

    def __init__(self, fanout_bits: int, usage: Usage, memory: MapMemory | None = None) -> None:
        self.bits, self.fanout = fanout_bits, 1 << fanout_bits
        self.usage = usage
        self.memory = memory or MapMemory()
        self.memory.tables.append(self)
        for name, code in COLUMNS:
            setattr(self, name, array(code, [0]))
        self._next, self._before = array("I", [0]), array("I", [0])  # chains of leaves with the same hash
        self._heads = array("I", bytes(4 * _HEADS_MIN))
        self._leaves = 0
        self._free = array("I")
        self._limbo = array("I")  # given up while a checkpoint is under way: not used again before it ends
        self.resident: dict[int, Node] = {}
        self.resident_bytes = 0
        self._clock: OrderedDict[int, None] = OrderedDict()  # the nodes in memory, in the order in which `evict` looks at them
        self.epoch = 1
        self.dirty: dict[int, Node] = {}
        self.dirty_bytes = 0
        self.changed: set[int] = set()  # rows that differ from the last checkpoint's, besides those of dirty nodes
        self.frozen: dict[int, Node] = {}  # of the checkpoint under way: not yet bytes
        self.encoded: dict[int, Node] = {}  # of the checkpoint under way: bytes, but nowhere durable yet
        self.on_frozen: Callable[[Node], None] | None = None  # makes a frozen node bytes
        self.late_files: set[int] = set()  # map files that the checkpoint under way needs for nodes given up since it began
        self.on_change: Callable[[Iterable[int]], None] | None = None  # told before rows change
        self.dropped: deque[int] = deque()
        self.pinned: Counter[int] = Counter()  # of ``refs``, those that end with the process
        self._outdated: list[dict] = []
        self.owning: set[ExtentMap] = set()  # maps that remember leaves as theirs
        self.nodes_at_home: Counter[int] = Counter()
        self.bytes_at_home: Counter[int] = Counter()
        self.fetch_now: Callable[[int], None] | None = None  # pages in one node, here and now
        self._may_wait = 0
        self.evicted = self.paged_in = 0

    @property
    def memory_bytes(self) -> int:
        return self.resident_bytes + len(self.refs) * _ROW_BYTES

    @property
    def rows(self) -> int:
        return len(self.refs)

    # Nodes.

    def get(self, ident: int) -> Node:
        """The node ``ident``. Raises `Absent` if it is not in memory."""
        node = self.resident.get(ident)
        if node is None:
            if not self._may_wait:
                raise Absent(ident)
            self.fetch_now(ident)
            node = self.resident[ident]
        node.used = True
        return node

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In this context `get` reads what is not in memory, and nothing is let go of."""
        self._may_wait += 1
        try:
            yield
        finally:
            self._may_wait -= 1

    def _note(self, ids: Iterable[int]) -> None:
        """Rows are about to change."""
        if self.on_change is not None:
            self.on_change(ids)
        self.changed.update(ids)

    def make(self, node: Node, family: int, number: int) -> int:
        """Give ``node`` a number and one holder; leaves are counted. O(1), a leaf O(fan-out)."""
        if self._free:
            ident = self._free.pop()
            self._note((ident,))
        else:
            ident = len(self.refs)
            for name, _ in COLUMNS:
                getattr(self, name).append(0)
            self._next.append(0)
            self._before.append(0)
            self._note((ident,))
        self.refs[ident] = 1
        self.family[ident] = family
        self.number[ident] = number if not node.height else NO_LEAF
        if not node.height:
            self._link(ident)
        node.ident, node.epoch = ident, self.epoch
        self.dirty[ident] = node
        self.dirty_bytes += node.size_bytes
        self._enter(node)
        return ident

    def _enter(self, node: Node) -> None:
        self.resident[node.ident] = node
        self.resident_bytes += node.size_bytes
        self._clock[node.ident] = None

    def hold(self, ident: int) -> int:
        """Add a holder; returns ``ident``. From now on the node, and all below it, is copied before a volume changes it. O(1)."""
        if ident:
            self._note((ident,))
            self.refs[ident] += 1
        return ident

    def pin(self, ident: int) -> None:
        """`hold` for a reader that lives no longer than the process: checkpoints do not count it. Ends with `unpin`."""
        self.hold(ident)
        if ident:
            self.pinned[ident] += 1

    def unpin(self, ident: int) -> None:
        if ident:
            self.pinned[ident] -= 1
            if not self.pinned[ident]:
                del self.pinned[ident]
        self.drop(ident)

    def own(self, ident: int) -> int:
        """The number of a node like ``ident`` with one holder, for a parent that holds ``ident``: itself, or a copy. It is in memory."""
        if self.refs[ident] == 1:
            return ident
        node = self.get(ident)
        self._note((ident,))
        self.refs[ident] -= 1
        if node.height:
            present = node.present
            self._note(present.tolist())
            np.frombuffer(self.refs, dtype=np.uint32)[present] += 1
        else:
            self.usage.count_leaf(node, +1)
        return self.make(node.copy(), self.family[ident], self.number[ident])

    def touch(self, node: Node) -> None:
        """To be called before a node is changed in place."""
        if node.epoch != self.epoch:
            ident = node.ident
            if ident in self.frozen:
                self.on_frozen(node)
            node.epoch = self.epoch
            self.dirty[ident] = node
            self.dirty_bytes += node.size_bytes

    def drop(self, ident: int) -> None:
        """Give back one reference. O(1); `reap` does the rest."""
        if ident:
            self._note((ident,))
            self.refs[ident] -= 1
            if not self.refs[ident]:
                self.dropped.append(ident)

    def mapped_below(self, ident: int) -> int:
        """How many blocks are mapped below a node. O(inner nodes below). Raises `Absent`."""
        if not ident:
            return 0
        if self.number[ident] != NO_LEAF:
            node = self.resident.get(ident)
            return self.mapped[ident] if node is None else int(np.count_nonzero(node.vector))
        return sum(self.mapped_below(kid) for kid in self.get(ident).present.tolist())

    # Taking apart.

    def empty_later(self, remembered: dict) -> dict:
        """Leave emptying ``remembered`` to `reap`; returns an empty one in its place."""
        if remembered:
            self._outdated.append(remembered)
        return {}

    def reap(self, nodes_max: int | None = None) -> int:
        """Take apart up to ``nodes_max`` dropped nodes; returns how many wait still. Raises `Absent` if the next one is not in memory."""
        self._outdated.clear()
        queue = self.dropped
        while queue and (nodes_max is None or nodes_max > 0):
            node = self.get(queue[0])
            queue.popleft()
            if nodes_max is not None:
                nodes_max -= 1
            if node.height:
                for kid in node.present.tolist():
                    self.drop(kid)
            else:
                self.usage.count_leaf(node, -1)
            self._give_up(node)
        return len(queue)

    def _give_up(self, node: Node) -> None:
        ident = node.ident
        if ident in self.frozen:
            self.on_frozen(node)
        self._note((ident,))
        if not node.height:
            self._unlink(ident)
            for extent_map in node.cached_in:
                extent_map.cache.pop(self.number[ident], None)
        if self.on_frozen is not None:
            self.late_files.add(self.file[ident])
        self._leave_home(ident)
        if self.dirty.pop(ident, None) is not None:
            self.dirty_bytes -= node.size_bytes
        self.encoded.pop(ident, None)
        del self.resident[ident], self._clock[ident]
        self.resident_bytes -= node.size_bytes
        self.family[ident] = self.number[ident] = self.mapped[ident] = 0
        (self._limbo if self.on_frozen is not None else self._free).append(ident)

    # On disk.

    def _leave_home(self, ident: int) -> None:
        file = self.file[ident]
        if file:
            self.nodes_at_home[file] -= 1
            self.bytes_at_home[file] -= self.length[ident]
            self.file[ident] = 0

    def came_home(self, file: int, ids: array, offsets: array, lengths: array, crcs: array, mapped: array) -> None:
        """Nodes were written to map file ``file``. O(nodes), in numpy."""
        which = np.frombuffer(ids, dtype=np.uint32)
        length, home = np.frombuffer(self.length, dtype=np.uint16), np.frombuffer(self.file, dtype=np.uint32)
        alive = np.ones(len(which), dtype=bool)
        if self._limbo:
            alive = ~np.isin(which, np.frombuffer(self._limbo, dtype=np.uint32))
            if not alive.all():
                self.late_files.add(file)
        which = which[alive]
        old = home[which]
        for name, count in zip(*np.unique(old[old != 0], return_counts=True)):
            self.nodes_at_home[int(name)] -= int(count)
            self.bytes_at_home[int(name)] -= int(length[which[old == name]].sum())
        home[which] = file
        np.frombuffer(self.offset, dtype=np.uint64)[which] = np.frombuffer(offsets, dtype=np.uint64)[alive]
        length[which] = np.frombuffer(lengths, dtype=np.uint16)[alive]
        np.frombuffer(self.crc, dtype=np.uint32)[which] = np.frombuffer(crcs, dtype=np.uint32)[alive]
        np.frombuffer(self.mapped, dtype=np.uint32)[which] = np.frombuffer(mapped, dtype=np.uint32)[alive]
        if len(which):
            self.nodes_at_home[file] += len(which)
            self.bytes_at_home[file] += int(length[which].sum())

    def forget_file(self, file: int) -> None:
        """A map file is gone."""
        self.nodes_at_home.pop(file, None)
        self.bytes_at_home.pop(file, None)

    def freeze(self) -> dict[int, Node]:
        """Begin a checkpoint: what is dirty becomes frozen, and a new epoch begins. O(maps that were written to)."""
        self.late_files = set()
        self.frozen, self.dirty, self.dirty_bytes = self.dirty, {}, 0
        self.epoch += 1
        for extent_map in self.owning:
            extent_map.owned = self.empty_later(extent_map.owned)
        self.owning.clear()
        return self.frozen

    def thaw(self, failed: Iterable[Node] = ()) -> None:
        """The checkpoint under way is over. ``failed``: nodes that it did not get to the disk after all."""
        for node in failed:
            if node.epoch != self.epoch and self.resident.get(node.ident) is node:
                node.epoch = self.epoch
                self.dirty[node.ident] = node
                self.dirty_bytes += node.size_bytes
        self.frozen, self.encoded, self.on_frozen, self.on_change = {}, {}, None, None
        self._free.extend(self._limbo)
        del self._limbo[:]
        self._outdated.clear()

    # Memory.

    def adopt(self, node: Node, ident: int) -> None:
        """Take in a node that was read from disk."""
        node.ident = ident
        self._enter(node)
        self.paged_in += 1

    def is_clean(self, ident: int) -> bool:
        return ident not in self.dirty and ident not in self.frozen and ident not in self.encoded

    def evict(self, looks_max: int, limit_bytes: int) -> None:
        """Let go of clean nodes that were not used since the last look, as long as the memory's limit is exceeded (clock algorithm).

        A node is looked at once at most, and what was just read counts as used. So whoever pages in one node after the other and
        tries again each time, which uses those it has, gets all it needs together, however little memory there is.
        """
        clock, resident = self._clock, self.resident
        for _ in range(0 if self._may_wait else min(looks_max, len(clock))):
            if self.memory.used_bytes <= limit_bytes:
                return
            ident = next(iter(clock))
            node = resident[ident]
            used, node.used = node.used, False
            if not node.height and node.cached_in:
                used = True
                for extent_map in node.cached_in:
                    extent_map.cache.pop(self.number[ident], None)
                node.cached_in.clear()
            if used or not self.is_clean(ident):
                clock.move_to_end(ident)
            else:
                del resident[ident], clock[ident]
                self.resident_bytes -= node.size_bytes
                self.evicted += 1

    # Finding leaves.

    def _hash(self, family: int, number: int) -> int:
        return (family * 0x9E3779B1 + number * 0x85EBCA6B >> 7) & (len(self._heads) - 1)

    def _link(self, ident: int) -> None:
        if self._leaves >= 2 * len(self._heads):
            self._rehash(4 * len(self._heads))  # which chains this one, too
            return
        self._leaves += 1
        where = self._hash(self.family[ident], self.number[ident])
        head = self._heads[where]
        self._next[ident], self._before[ident] = head, 0
        if head:
            self._before[head] = ident
        self._heads[where] = ident

    def _unlink(self, ident: int) -> None:
        self._leaves -= 1
        after, before = self._next[ident], self._before[ident]
        if before:
            self._next[before] = after
        else:
            self._heads[self._hash(self.family[ident], self.number[ident])] = after
        if after:
            self._before[after] = before

    def _rehash(self, heads: int) -> None:
        """Chain all leaves anew. O(nodes), in numpy."""
        self._heads = array("I", bytes(4 * heads))
        numbers = np.frombuffer(self.number, dtype=np.uint32)
        leaves = np.flatnonzero((numbers != NO_LEAF) & self.alive).astype(np.uint32)
        family = np.frombuffer(self.family, dtype=np.uint32)[leaves].astype(np.uint64)
        hashes = (family * 0x9E3779B1 + numbers[leaves].astype(np.uint64) * 0x85EBCA6B >> np.uint64(7)) & np.uint64(heads - 1)
        order = np.argsort(hashes, kind="stable")
        leaves, hashes = leaves[order], hashes[order]
        first = np.ones(len(leaves), dtype=bool)
        first[1:] = hashes[1:] != hashes[:-1]
        np.frombuffer(self._heads, dtype=np.uint32)[hashes[first].astype(np.intp)] = leaves[first]
        after, before = np.frombuffer(self._next, dtype=np.uint32), np.frombuffer(self._before, dtype=np.uint32)
        after[leaves] = before[leaves] = 0
        follows = np.flatnonzero(~first)
        after[leaves[follows - 1]] = leaves[follows]
        before[leaves[follows]] = leaves[follows - 1]
        self._leaves = len(leaves)

    def leaves_of(self, family: int, number: int) -> Iterator[int]:
        """All leaves, of whatever volume, that cover leaf ``number`` of the disks of a family. O(leaves with that hash)."""
        ident = self._heads[self._hash(family, number)]
        while ident:
            if self.number[ident] == number and self.family[ident] == family:
                yield ident
            ident = self._next[ident]

    # Loading.

    @property
    def alive(self) -> np.ndarray:
        """Which rows are nodes."""
        return np.frombuffer(self.family, dtype=np.uint32) != 0

    def load_rows(self, ids: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Set rows as a checkpoint has them. `loaded` ends loading."""
        if len(ids):
            more = int(ids.max()) + 1 - len(self.refs)
            if more > 0:
                for name, code in COLUMNS:
                    column = getattr(self, name)
                    column.frombytes(bytes(more * column.itemsize))
                for chain in (self._next, self._before):
                    chain.frombytes(bytes(more * 4))
        for name, _ in COLUMNS:
            values = columns[name]
            np.frombuffer(getattr(self, name), dtype=values.dtype)[ids] = values

    def loaded(self) -> None:
        """All rows are there: count, chain, and queue what had been dropped. O(nodes), in numpy."""
        alive = self.alive
        refs, file = np.frombuffer(self.refs, dtype=np.uint32), np.frombuffer(self.file, dtype=np.uint32)
        length = np.frombuffer(self.length, dtype=np.uint16)
        self._free = array("I", np.flatnonzero(~alive)[1:].astype(np.uint32).tobytes())
        self.dropped.extend(np.flatnonzero(alive & (refs == 0)).tolist())
        for name, count in zip(*np.unique(file[alive], return_counts=True)):
            self.nodes_at_home[int(name)] = int(count)
            self.bytes_at_home[int(name)] = int(length[alive & (file == name)].sum())
        heads = _HEADS_MIN
        while int(alive.sum()) >= 2 * heads:
            heads *= 4
        self._rehash(heads)

    # Insight.

    def statistics(self) -> dict[str, int]:
        return {
            "map_nodes": len(self.refs) - 1 - len(self._free) - len(self._limbo),
            "map_memory_bytes": self.memory_bytes,
            "map_nodes_in_memory": len(self.resident),
            "map_nodes_dirty": len(self.dirty),
            "map_nodes_paged_in": self.paged_in,
            "map_nodes_evicted": self.evicted,
            "nodes_to_reap": len(self.dropped),
        }

    def close(self) -> None:
        if self in self.memory.tables:
            self.memory.tables.remove(self)

    def _check(self, roots: list[int]) -> None:
        """Count everything anew from ``roots`` and compare. O(nodes), reads what is absent; for tests and `simsr check`."""
        refs: Counter[int] = Counter(root for root in roots if root)
        live: Counter[int] = Counter()
        stack, seen = [*refs, *self.dropped], set()
        while stack:
            ident = stack.pop()
            if ident in seen:
                continue
            seen.add(ident)
            node = self.get(ident)
            assert (self.number[ident] == NO_LEAF) == bool(node.height), f"node {ident} has the wrong height"
            if node.height:
                kids = node.present.tolist()
                refs.update(kids)
                stack.extend(kids)
            else:
                for entry in node.slots:
                    if entry:
                        live[(entry & 0xFFFFFFFF) >> self.usage.segment_shift] += 1
                mapped = int(np.count_nonzero(node.vector))
                assert not self.is_clean(ident) or self.mapped[ident] == mapped, f"leaf {ident} has {mapped} blocks"
                number, family = self.number[ident], self.family[ident]
                assert ident in set(self.leaves_of(family, number)), f"leaf {ident} is not in its chain"
        rows = set(np.flatnonzero(self.alive).tolist())
        assert rows == seen, f"nodes nobody holds: {rows - seen}; missing: {seen - rows}"
        for ident in seen:
            assert self.refs[ident] == refs[ident], f"node {ident}: refs {self.refs[ident]}, counted {refs[ident]}"
        for slot, count in enumerate(self.usage.live):
            assert count == live[slot], f"segment {slot}: live {count}, counted {live[slot]}"
        homes = Counter(self.file[ident] for ident in seen if self.file[ident])
        assert homes == +self.nodes_at_home, f"nodes at home {+self.nodes_at_home}, counted {homes}"
        assert self.resident_bytes == sum(node.size_bytes for node in self.resident.values())
        assert self.dirty_bytes == sum(node.size_bytes for node in self.dirty.values())

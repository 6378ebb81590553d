"""Walks over several maps at once: what differs between two volumes, and which volume shares what with others.

Nodes are shared only at the same position of the tree, so walking all trees in step, position by position, finds everything that
is shared by comparing numbers of nodes. Where two trees have the same node nothing below it is looked at. A tree that is lower than
another one is kid 0 of an imagined tree of the same height (`ExtentMap.grow` does it no differently).

One moment: a walk holds the roots as they are when it begins, so volumes may be written to, reverted and deleted meanwhile; the
nodes below a held root are copied before they change. Except by the cleaner: it moves a block and mends *all* leaves that name it, held
ones too, in one slice. So leaves are compared with each other in one slice, too, and their slots are never kept for the next one. In
this way a block that moves is neither a difference nor, for an instant, two blocks.

Walks are jobs of `Step`s, like checkpoints; a slice takes about 0.3 ms. What is not in memory is paged in, some nodes ahead.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simsr.store.checkpoint import Step
from simsr.store.layout import BLOCK
from simsr.store.paging import PageJob
from simsr.store.volume import Volume

if TYPE_CHECKING:
    from simsr.store.store import Store

__all__ = ["Walk", "Diff", "Survey", "VolumeSpace"]

_PAGES = 64  # nodes that one job reads
_LOOKS_A_SLICE = 256  # at nodes that may be let go of
_SLICE_COST = 200  # about in microseconds, as all costs here
_NODE_COST = 10
_VALUES_PER_COST = 24  # map entries that are sorted in a microsecond
_VALUES_A_SLICE = _VALUES_PER_COST * _SLICE_COST
_LEAVES_A_SLICE = 1024  # that are counted by the table alone
_INNERS_A_SLICE = 16
_MANY = -1  # the owner of what several volumes hold


class Walk:
    """What both walks have in common: they hold, they page, they pause."""

    def __init__(self, store: Store) -> None:
        self._store, self._table = store, store.table
        self._bits, self._fanout = store.table.bits, store.table.fanout
        self._spent = self._paged = 0
        self.done = False

    def work(self) -> Iterator[Step]:
        """All of it, in slices. To be closed if it is not run to its end. Raises `StoreDamaged`, OSError."""
        volumes = self._choose()
        for volume in volumes:
            if volume.map.owned:
                volume.map.forget_owned()
        roots = {volume.map.root for volume in volumes if volume.map.root}
        for root in roots:
            self._table.pin(root)
        try:
            yield from self._walk(volumes)
            yield from self._give_back()
            self.done = True
        finally:
            for root in roots:
                self._table.unpin(root)

    def _choose(self) -> list[Volume]:
        """The volumes whose maps are held."""
        raise NotImplementedError

    def _walk(self, volumes: list[Volume]) -> Iterator[Step]:
        raise NotImplementedError

    def _spend(self, cost: int) -> Iterator[Step]:
        """Pause, if this slice has gone on for long enough."""
        self._spent += cost
        if self._spent >= _SLICE_COST:
            self._spent = 0
            yield None

    def _give_back(self) -> Iterator[Step]:
        """Let go of as much as was paged in, if there is too much."""
        while self._paged > 0 and self._table.memory.shrink(_LOOKS_A_SLICE):
            self._paged -= _LOOKS_A_SLICE // 4
            yield None
        self._paged = 0

    def _page_in(self, needed: Iterable[int], ahead: Iterable[int] = ()) -> Iterator[Step]:
        """Bring ``needed`` into memory, where they are when this ends; with the first few of ``ahead``, if anything is to be read."""
        resident = self._table.resident
        absent = [ident for ident in needed if ident not in resident]
        if absent:
            yield from self._give_back()
        while absent := [ident for ident in needed if ident not in resident]:
            if len(absent) < _PAGES:
                absent += [ident for ident in ahead if ident and ident not in resident][: _PAGES - len(absent)]
            for first in range(0, len(absent), _PAGES):
                job = PageJob(self._table, self._store.maps, set(absent[first : first + _PAGES]))
                self._paged += _PAGES
                try:
                    yield job.run
                finally:
                    job.finish(shrink=False)
            self._spent = 0


class Diff(Walk):
    """What changed from volume ``old`` to volume ``new``. O(nodes that differ).

    ``ranges`` then is a sorted list of (offset, length, whether ``new`` has data there), in bytes: every block that is not the same
    block of the log in both, or a hole in both. Ranges that touch are of different kinds. If the sizes differ, all that one of them has
    more counts as changed. Volumes of different families share nothing, so all that either has differs.

    With ``start`` and ``end`` what is before and behind is left out, and not looked at; with ``ranges_max`` there are not more than so
    many, and ``next_offset`` says where the rest begins.
    """

    def __init__(
        self, store: Store, old: Volume, new: Volume, start: int = 0, ranges_max: int | None = None, end: int | None = None
    ) -> None:
        super().__init__(store)
        self._volumes = [old, new]
        self._start, self._ranges_max, self._end = start, ranges_max, end
        self.ranges: list[tuple[int, int, bool]] = []
        self.next_offset: int | None = None
        self.old_size_bytes = self.new_size_bytes = 0

    def _choose(self) -> list[Volume]:
        return self._volumes

    def _walk(self, volumes: list[Volume]) -> Iterator[Step]:
        old, new = (volume.map for volume in volumes)
        self.old_size_bytes, self.new_size_bytes = (volume.size_bytes for volume in volumes)
        self._smaller, self._larger = sorted((self.old_size_bytes, self.new_size_bytes))
        # The block in which the smaller one ends is changed in part, whatever the maps say. -1: there is no such block.
        self._edge = self._smaller // BLOCK if self._smaller < self._larger and self._smaller % BLOCK else -1
        self._edge_has_data = False
        heights = old.height, new.height
        stack = [(max(heights), 0, old.root, new.root)] if old.root or new.root else []
        while stack:
            level, number, *pair = stack[-1]
            span_bits = self._bits * (level + 1)
            if self._end is not None and (number << span_bits) * BLOCK >= self._end:
                break
            has_edge = self._edge >> span_bits == number
            if (pair[0] == pair[1] and not has_edge) or (number + 1 << span_bits) * BLOCK <= self._start:
                stack.pop()
                continue
            if any(ident and ident not in self._table.resident for ident in pair):
                ahead = (ident for task in stack[: -_PAGES - 1 : -1] for ident in task[2:])
                yield from self._page_in([ident for ident in pair if ident], ahead)
            stack.pop()
            if level:
                self._compare_inner(stack, level, number, pair, heights)
            else:
                self._compare_leaf(number, pair)
                if self._is_enough():
                    return
            yield from self._spend(_NODE_COST)
        self._fill(self._larger)
        self._is_enough()

    def _compare_inner(
        self, stack: list[tuple[int, int, int, int]], level: int, number: int, pair: list[int], heights: tuple[int, int]
    ) -> None:
        old, new = (self._kids(ident, level, height) for ident, height in zip(pair, heights))
        differ = old != new
        below = self._bits * level
        if self._edge >> (below + self._bits) == number:
            differ[(self._edge >> below) & (self._fanout - 1)] = True
        where = np.flatnonzero(differ)[::-1]
        self._spent += len(where) // 4
        for index, *kids in zip(where.tolist(), old[where].tolist(), new[where].tolist()):
            if kids[0] or kids[1]:
                stack.append((level - 1, number << self._bits | index, *kids))

    def _kids(self, ident: int, level: int, height: int) -> np.ndarray:
        if ident and level <= height:
            return np.frombuffer(self._table.get(ident).kids, dtype=np.uint32)
        kids = np.zeros(self._fanout, dtype=np.uint32)
        kids[0] = ident  # of the imagined tree above one that is lower
        return kids

    def _compare_leaf(self, number: int, pair: list[int]) -> None:
        old, new = (self._table.get(ident).vector if ident else np.zeros(self._fanout, dtype=np.uint64) for ident in pair)
        base = number << self._bits
        if self._edge >> self._bits == number:
            self._edge_has_data = bool(new[self._edge - base])
        where = np.flatnonzero(old != new)
        if not len(where):
            return
        data = new[where] != 0
        breaks = np.flatnonzero((where[1:] != where[:-1] + 1) | (data[1:] != data[:-1])) + 1
        firsts = np.concatenate((where[:1], where[breaks])).tolist()
        lasts = np.concatenate((where[breaks - 1], where[-1:])).tolist()
        kinds = [bool(data[0]), *data[breaks].tolist()]
        self._spent += len(firsts)
        for first, last, has_data in zip(firsts, lasts, kinds):
            self._add((base + first) * BLOCK, (base + last + 1) * BLOCK, has_data)

    def _add(self, begin: int, end: int, has_data: bool) -> None:
        """Add a range; they come in order."""
        begin, end = max(begin, self._start), min(end, self.new_size_bytes if has_data else self._larger)
        self._fill(begin)
        self._append(begin, end, has_data)

    def _fill(self, end: int) -> None:
        """Add what lies between the last range and ``end``, as far as only one of the volumes has it."""
        begin = max(self._smaller, self._covered)
        if begin < end and self._edge >= 0:
            edge_end = min((self._edge + 1) * BLOCK, end)
            has_data = self._edge_has_data and self.new_size_bytes == self._larger
            self._append(begin, edge_end, has_data)
            begin = max(begin, edge_end)
        self._append(begin, end, False)

    @property
    def _covered(self) -> int:
        return self.ranges[-1][0] + self.ranges[-1][1] if self.ranges else self._start

    def _append(self, begin: int, end: int, has_data: bool) -> None:
        end = end if self._end is None else min(end, self._end)
        if begin >= end:
            return
        if self.ranges and self.ranges[-1][2] == has_data and self._covered == begin:
            begin = self.ranges.pop()[0]
        self.ranges.append((begin, end - begin, has_data))

    def _is_enough(self) -> bool:
        """Whether there are more ranges than wanted; then the rest is left out."""
        if self._ranges_max is None or len(self.ranges) <= self._ranges_max:
            return False
        self.next_offset = self.ranges[self._ranges_max][0]
        del self.ranges[self._ranges_max :]
        return True


@dataclass
class VolumeSpace:
    """What a volume takes. ``exclusive_blocks``: those that no other volume holds, which deleting it would free."""

    ident: int
    meta: dict
    size_bytes: int
    referenced_blocks: int
    exclusive_blocks: int = 0


class Survey(Walk):
    """Who holds what, exactly. O(inner nodes + leaves where volumes differ); other leaves are not read, only counted.

    For each node, or block, at a position one thing has to be known: whether one volume holds it, and which, or several do. So
    next to the numbers of nodes goes an array of their owners, `_MANY` for several. A node below a single parent belongs to whom
    the parent does; below several parents it belongs to many.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.volumes: list[VolumeSpace] = []
        self.distinct_blocks = self.shared_blocks = 0

    def _choose(self) -> list[Volume]:
        return list(self._store.volumes.values())

    def _walk(self, volumes: list[Volume]) -> Iterator[Step]:
        families: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for index, volume in enumerate(volumes):
            m = volume.map
            self.volumes.append(VolumeSpace(volume.ident, volume.meta, volume.size_bytes, m.mapped_blocks))
            if m.root:
                families.setdefault(m.family, {}).setdefault(m.height, []).append((m.root, index))
        self._exclusive = np.zeros(len(volumes), dtype=np.int64)
        yield None
        for heights in families.values():
            self._joining = {height: self._grouped(*np.array(roots).T) for height, roots in heights.items()}
            yield from self._walk_family()
        for space, blocks in zip(self.volumes, self._exclusive.tolist()):
            space.exclusive_blocks = blocks

    @staticmethod
    def _grouped(idents: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each number of a node once, with its owner."""
        values, owners, _ = _classes(idents.astype(np.uint32).reshape(-1, 1), owners)
        return values, owners

    def _walk_family(self) -> Iterator[Step]:
        """``stack``: nodes that stand at one position, and whether it is the leftmost one, where trees of less height join in."""
        top = max(self._joining)
        stack = [(top, True, *self._joining.pop(top))]
        while stack:
            level, leftmost, idents, owners = stack.pop()
            leftmost = leftmost and bool(self._joining)
            if not len(idents) and not leftmost:
                continue
            if len(idents) == 1 and not leftmost:
                yield from self._count(level, idents, owners)
            elif level:
                yield from self._merge_inner(stack, level, leftmost, idents, owners)
            else:
                yield from self._merge_leaves(idents, owners, (ident for task in stack[:-_PAGES:-1] for ident in task[2].tolist()))
            yield from self._spend(2 * _NODE_COST)

    def _merge_inner(
        self, stack: list[tuple[int, bool, np.ndarray, np.ndarray]], level: int, leftmost: bool, idents: np.ndarray, owners: np.ndarray
    ) -> Iterator[Step]:
        parts = []
        for first in range(0, len(idents), _PAGES):
            part = idents[first : first + _PAGES].tolist()
            yield from self._page_in(part, (ident for task in stack[:-_PAGES:-1] for ident in task[2].tolist()))
            parts.append(b"".join([self._table.get(ident).kids for ident in part]))
            yield from self._spend(len(part))
        kids = np.frombuffer(b"".join(parts), dtype=np.uint32).reshape(len(idents), self._fanout)
        if leftmost:
            join = self._joining.pop(level - 1, (array("I"), array("I")))
            first_kids = np.concatenate((kids[:, 0], np.array(join[0], dtype=np.uint32)))
            first_owners = np.concatenate((owners, np.array(join[1], dtype=np.int64)))
            stack.append((level - 1, True, *self._grouped(first_kids, first_owners)))
            kids = kids[:, 1:]
        columns = max(1, _VALUES_A_SLICE // max(1, len(idents)))
        for first in range(0, kids.shape[1], columns):
            part = kids[:, first : first + columns]
            values, whose, sizes = _classes(part, owners)
            alone = np.repeat(sizes == 1, sizes)
            yield from self._spend(_NODE_COST + part.size // _VALUES_PER_COST)
            yield from self._count(level - 1, values[alone], whose[alone])
            ends = np.cumsum(sizes)
            several = sizes > 1
            self._spent += int(several.sum())
            for begin, end in zip((ends - sizes)[several].tolist(), ends[several].tolist()):
                stack.append((level - 1, False, values[begin:end], whose[begin:end]))

    def _merge_leaves(self, idents: np.ndarray, owners: np.ndarray, ahead: Iterator[int]) -> Iterator[Step]:
        wanted = idents.tolist()
        yield from self._page_in(wanted, ahead)
        # All of them at once, and by value: see the top of this file.
        rows = b"".join([self._table.get(ident).slots for ident in wanted])
        slots = np.frombuffer(rows, dtype=np.uint64).reshape(len(wanted), self._fanout)
        columns = max(1, _VALUES_A_SLICE // len(wanted))
        for first in range(0, self._fanout, columns):
            part = slots[:, first : first + columns]
            values, whose, _ = _classes(part, owners)
            self._tally(np.ones(len(values), dtype=np.int64), whose)
            yield from self._spend(2 * _NODE_COST + part.size // _VALUES_PER_COST)

    def _tally(self, blocks: np.ndarray, owners: np.ndarray) -> None:
        total, single = int(blocks.sum()), owners != _MANY
        mine = blocks[single]
        np.add.at(self._exclusive, owners[single], mine)
        self.distinct_blocks += total
        self.shared_blocks += total - int(mine.sum())

    def _count(self, level: int, idents: np.ndarray, owners: np.ndarray) -> Iterator[Step]:
        """Count what is mapped below nodes that have their positions for themselves."""
        stack = [(level, idents, owners)]
        while stack:
            level, idents, owners = stack.pop()
            limit = _INNERS_A_SLICE if level else _LEAVES_A_SLICE
            if len(idents) > limit:
                stack.append((level, idents[limit:], owners[limit:]))
                idents, owners = idents[:limit], owners[:limit]
            if not len(idents):
                continue
            if level:
                part = idents.tolist()
                ahead = stack[-1][1][:_PAGES].tolist() if stack and stack[-1][0] == level else ()
                yield from self._page_in(part, ahead)
                kids = [self._table.get(ident).present for ident in part]
                stack.append((level - 1, np.concatenate(kids), np.repeat(owners, [len(some) for some in kids])))
                yield from self._spend(_NODE_COST * len(part) // 2)
            else:
                yield from self._count_leaves(idents, owners)

    def _count_leaves(self, idents: np.ndarray, owners: np.ndarray) -> Iterator[Step]:
        table = self._table
        blocks = np.frombuffer(table.mapped, dtype=np.uint32)[idents].astype(np.int64)
        # For nodes that are not clean the table does not know. What a held leaf maps stays the same, so there may be pauses.
        unclean = [(at, ident) for at, ident in enumerate(idents.tolist()) if not table.is_clean(ident)]
        yield from self._spend(_NODE_COST + len(idents) // 6)
        for at, ident in unclean:
            blocks[at] = table.mapped_below(ident)
            yield from self._spend(2)
        self._tally(blocks, owners)


def _classes(matrix: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different values, but 0, of each column of ``matrix``, whose rows belong to ``owners``: (values, column by column; owner of each;
    how many each column has). The columns may come in another order."""
    if not len(matrix):
        return matrix.reshape(0), owners, owners
    alike = (matrix == matrix[0]).all(axis=0)
    common = matrix[0][alike & (matrix[0] != 0)]
    rest = matrix[:, ~alike]
    common_owner = owners[0] if len(owners) == 1 else _MANY
    common_owners = np.full(len(common), common_owner, dtype=np.int64)
    ones = np.ones(len(common), dtype=np.int64)
    if not rest.shape[1]:
        return common, common_owners, ones
    rest = np.ascontiguousarray(rest.T)
    order = np.argsort(rest, axis=1, kind="stable")
    ordered = np.take_along_axis(rest, order, axis=1)
    changes = ordered[:, 1:] != ordered[:, :-1]
    first = ordered != 0
    first[:, 1:] &= changes
    single = first.copy()
    single[:, :-1] &= changes
    whose = np.where(single, owners[order], _MANY)[first]
    return (
        np.concatenate((common, ordered[first])), np.concatenate((common_owners, whose)), np.concatenate((ones, first.sum(axis=1))),
    )  # fmt: skip

"""Who holds a map node: the volumes, and the range of blocks that it covers in them. Needed when one is damaged, to say what is lost.

The maps of all volumes together are one graph without circles. It is walked once from all roots, every node once however many
volumes share it, and only towards what is looked for: the table knows which leaf number a leaf has, but not where an inner node
stands, so for one of those all inner nodes of its family are looked at.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from simsr.errors import StoreDamaged
from simsr.store.checkpoint import Step
from simsr.store.node_table import NO_LEAF
from simsr.store.nodes import Node
from simsr.store.paging import PageJob

if TYPE_CHECKING:
    from simsr.store.store import Store

__all__ = ["Held", "Holders", "node_at"]

_VOLUMES_A_SLICE = 64


@dataclass
class Held:
    """A node: the numbers of the volumes that hold it, and the blocks that it covers in each of them."""

    volumes: list[int] = field(default_factory=list)
    block: int = 0
    blocks: int = 0


def node_at(store: Store, ident: int) -> Generator[Step, None, Node | None]:
    """The node, read if need be; None if it cannot be read."""
    node = store.table.resident.get(ident)
    if node is None:
        job = PageJob(store.table, store.maps, [ident])

        def run() -> None:
            try:
                job.run()
            except (StoreDamaged, OSError):  # `finish` takes over what was read, which is nothing
                pass

        try:
            yield run
        finally:
            job.finish(shrink=False)
        node = store.table.resident.get(ident)
    return node


class Holders:
    """Looks for the holders of ``targets``; `work` does it, ``found`` has an entry for each."""

    def __init__(self, store: Store, targets: Iterable[int]) -> None:
        self._store, self._table = store, store.table
        targets = list(targets)
        self.found = {ident: Held() for ident in targets}
        self._bits = {ident: 1 << index for index, ident in enumerate(targets)}
        self._masks: dict[int, int] = {}
        self._numbers: dict[int, list[int]] = {}  # family -> the leaf numbers to go to
        self._deep: set[int] = set()  # families in which an inner node is looked for
        table = self._table
        for ident in targets:
            family, number = table.family[ident], table.number[ident]
            self._numbers.setdefault(family, [])
            if number == NO_LEAF:
                self._deep.add(family)
            else:
                self._numbers[family].append(number)
                self.found[ident].block, self.found[ident].blocks = number << table.bits, table.fanout
        for numbers in self._numbers.values():
            numbers.sort()

    def work(self) -> Generator[Step, None, None]:
        """Walk. O(nodes on the way), read if need be."""
        for index, volume in enumerate(list(self._store.volumes.values())):
            map_ = volume.map
            if map_.root and map_.family in self._numbers:
                mask = yield from self._reach(map_.family, map_.root, map_.height, 0)
                for ident, bit in self._bits.items():
                    if mask & bit:
                        self.found[ident].volumes.append(volume.ident)
            if index % _VOLUMES_A_SLICE == _VOLUMES_A_SLICE - 1:
                yield None

    def _wanted(self, family: int, first: int, count: int) -> bool:
        numbers = self._numbers[family]
        at = bisect_left(numbers, first)
        return at < len(numbers) and numbers[at] < first + count

    def _reach(self, family: int, ident: int, level: int, base: int) -> Generator[Step, None, int]:
        """Which targets are at or below a node, as a mask."""
        mask = self._masks.get(ident)
        if mask is not None:
            return mask
        table, mask = self._table, self._bits.get(ident, 0)
        if mask:
            held = self.found[ident]
            held.block, held.blocks = base << table.bits, table.fanout << (table.bits * level)
        node = (yield from node_at(self._store, ident)) if level and not mask else None
        if node is not None and node.height:
            span = 1 << (table.bits * (level - 1))
            for index in np.flatnonzero(np.frombuffer(node.kids, dtype=np.uint32)).tolist():
                kid, first = node.kids[index], base + index * span
                if level == 1:
                    mask |= self._bits.get(kid, 0)
                elif kid and (family in self._deep or self._wanted(family, first, span)):
                    mask |= yield from self._reach(family, kid, level - 1, first)
            table.memory.shrink(64)
        self._masks[ident] = mask
        return mask

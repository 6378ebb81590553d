"""What the tests of checkpoints look at: nodes, map files, table files, super blocks."""

from __future__ import annotations

from store_kit import (
    content,
    put,
)  # fmt: skip

from simsr.store.layout import Super
from simsr.store.memory import MemoryDirectory
from simsr.store.nodes import Node
from simsr.store.store import Store


def nodes_of(store: Store) -> dict[int, Node]:
    found, stack = {}, [volume.map.root for volume in store.volumes.values() if volume.map.root]
    with store.table.waiting():
        while stack:
            ident = stack.pop()
            if ident not in found:
                node = found[ident] = store.table.get(ident)
                if node.height:
                    stack.extend(node.present.tolist())
    return found


def map_files(directory: MemoryDirectory) -> dict[int, int]:
    """Generation -> size of each map file."""
    return {int(name[4:]): len(data) for name, data in directory.images() if name.startswith("map-")}


def table_sizes(directory: MemoryDirectory) -> dict[int, int]:
    return {int(name[6:]): len(data) for name, data in directory.images() if name.startswith("table-")}


def supers(directory: MemoryDirectory) -> dict[str, Super]:
    return {name: Super.unpack(data) for name, data in directory.images() if name.startswith("super")}


def newest(store: Store) -> int:
    return store.statistics()["checkpoint_generation"]


def fill(volume, first_tag: int, blocks: int = 64) -> None:
    put(volume, 0, b"".join(content(first_tag + index) for index in range(blocks)))

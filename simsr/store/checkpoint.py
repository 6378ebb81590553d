"""Checkpoints: the maps and the list of volumes, on disk, so that recovery replays only the tail of the log.

A checkpoint is a file ``map-<generation>`` with the nodes that changed since the last one, children before parents, and
at its end the root table; nodes that did not change stay where an earlier checkpoint put them. Every reference to a node
carries the checksum of its bytes. The super block that names the root table is written after all this is synced, into the
slot of the two that does not hold the last one.

The work is split so that it never stalls I/O: `begin` freezes all maps (one reference each), ``job.run()`` does the rest
in a worker thread on nodes that nobody can change any more, `finish` puts the results in place.

When more than half of what the map files hold is garbage, the next checkpoint writes all nodes anew and the old files go.
"""

from __future__ import annotations

import errno
import json
import re
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from crc32c import crc32c

from simsr.errors import NoSpace, StoreDamaged
from simsr.store.extent_map import Inner, Leaf, Node, Usage
from simsr.store.files import Directory, File
from simsr.store.layout import Geometry, NodeRef, Super
from simsr.store.log import FlushJob, Position
from simsr.store.segments import Segment

__all__ = ["CheckpointJob", "NodeLoader", "map_name", "super_name", "read_supers", "sync_supers", "map_files"]

_DENSE, _SPARSE, _INNER = 1, 2, 3
_HEAD = struct.Struct("<BxHI")
_KID = struct.Struct("<HxxIQII")
_MAP_NAME = re.compile(r"map-(\d{12})")
_REWRITE_MIN_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20


def map_name(generation: int) -> str:
    return f"map-{generation:012d}"


def super_name(generation: int) -> str:
    return f"super.{generation & 1}"


def map_files(directory: Directory) -> list[int]:
    """The generations of the map files that are there."""
    return [int(match[1]) for name in directory.names() if (match := _MAP_NAME.fullmatch(name))]


def write_super(directory: Directory, generation: int, data: bytes) -> None:
    """Write a super block, durably, into the slot of ``generation``."""
    name = super_name(generation)
    file = directory.open(name) if name in directory.names() else directory.create(name, len(data))
    try:
        file.pwritev([data], 0)
        file.datasync()
    finally:
        file.close()
    directory.sync()


def read_supers(directory: Directory) -> list[Super | int]:
    """The valid super blocks, newest first; for one of another format, its version."""
    found: list[Super | int] = []
    for name in ("super.0", "super.1"):
        if name in directory.names():
            file = directory.open(name)
            data = bytearray(file.size_bytes)
            file.pread(memoryview(data), 0)
            file.close()
            block = Super.unpack(bytes(data))
            if block is not None:
                found.append(block)
    return sorted(found, key=lambda block: block.generation if isinstance(block, Super) else 1 << 64, reverse=True)


def sync_supers(directory: Directory) -> None:
    """Make the super blocks durable as they are. Until then nothing that an older one needs may be changed."""
    for name in ("super.0", "super.1"):
        if name in directory.names():
            file = directory.open(name)
            try:
                file.datasync()
            finally:
                file.close()
    directory.sync()


def encode_node(node: Node, home_of) -> bytes:
    if isinstance(node, Inner):
        kids = [(index, home_of(kid)) for index, kid in enumerate(node.kids) if kid is not None]
        return _HEAD.pack(_INNER, 0, len(kids)) + b"".join(
            _KID.pack(index, home.file, home.offset, home.length, home.crc) for index, home in kids
        )
    used = np.flatnonzero(node.vector)
    if len(used) * 10 < len(node.slots) * 8:
        return _HEAD.pack(_SPARSE, 0, len(used)) + used.astype("<u2").tobytes() + node.vector[used].astype("<u8").tobytes()
    return _HEAD.pack(_DENSE, 0, len(node.slots)) + node.vector.astype("<u8").tobytes()


@dataclass
class CheckpointJob:
    """One checkpoint under way. Made by `Store.begin_checkpoint`; `run` blocks and belongs in a worker thread."""

    directory: Directory
    flush: FlushJob | None
    position: Position
    uuid: bytes
    generation: int
    geometry: Geometry
    roots: list[tuple[Node | None, dict]]  # frozen root of each volume, and its line of the root table
    table: dict
    dead: list[Segment]
    rewrite_all: bool
    raise_if_stopped: Callable[[], None]
    homes: dict[int, tuple[Node, NodeRef]] = field(default_factory=dict)
    bytes_written: int = 0

    def run(self) -> None:
        """Sync the log, write the nodes, the root table and the super block. Raises OSError, `StoreStopped`.

        Raises `NoSpace` if there is no room for the map file: nothing refers to it yet, so nothing has happened then.
        """
        if self.flush is not None:
            self.flush.run()
        try:
            roots = self._write_maps()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if map_name(self.generation) in self.directory.names():
                self.directory.remove(map_name(self.generation))
            raise NoSpace(name=self.directory.path, reason="there is no room for a checkpoint") from error
        self.raise_if_stopped()  # if another flush has failed meanwhile, ours proves nothing
        p = self.position
        block = Super(
            self.uuid, self.generation, self.geometry, p.seq, p.log_index, p.record_offset, p.prev_crc, roots
        )  # fmt: skip
        write_super(self.directory, self.generation, block.pack())

    def _write_maps(self) -> NodeRef:
        file = self.directory.create(map_name(self.generation), 0)
        try:
            writer = _NodeWriter(file, self)
            for root, line in self.roots:
                if root is not None:
                    home = writer.write_tree(root)
                    line["root"] = [home.file, home.offset, home.length, home.crc]
            self.table["volumes"] = [line for _, line in self.roots]
            roots = writer.put(json.dumps(self.table, sort_keys=True, separators=(",", ":")).encode())
            writer.drain()
            self.bytes_written = writer.offset
            file.datasync()
        finally:
            file.close()
        self.directory.sync()
        return roots


class _NodeWriter:
    """Appends nodes to a map file, children first."""

    def __init__(self, file: File, job: CheckpointJob) -> None:
        self._file, self._job = file, job
        self.offset = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def put(self, data: bytes) -> NodeRef:
        ref = NodeRef(self._job.generation, self.offset + self._waiting_bytes, len(data), crc32c(data))
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= _PIECE_BYTES:
            self.drain()
        return ref

    def drain(self) -> None:
        if self._waiting:
            self._file.pwritev([b"".join(self._waiting)], self.offset)
            self.offset += self._waiting_bytes
            self._waiting, self._waiting_bytes = [], 0

    def _home_of(self, node: Node) -> NodeRef | None:
        entry = self._job.homes.get(id(node))
        if entry is not None:
            return entry[1]
        return None if self._job.rewrite_all else node.home

    def write_tree(self, root: Node) -> NodeRef:
        """Write what is not on disk yet below ``root``; returns where the root is. Does not recurse."""
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, kids_done = stack.pop()
            if self._home_of(node) is not None:
                continue
            if kids_done or isinstance(node, Leaf):
                self._job.homes[id(node)] = (node, self.put(encode_node(node, self._home_of)))
            else:
                stack.append((node, True))
                stack.extend((kid, False) for kid in node.kids if kid is not None)
        return self._home_of(root)


class NodeLoader:
    """Reads trees back, each node once, so what was shared is shared again. Counts what it loads in ``usage``."""

    def __init__(self, directory: Directory, geometry: Geometry, usage: Usage) -> None:
        self._directory, self._usage = directory, usage
        self._fanout = 1 << geometry.fanout_bits
        self._images: dict[int, memoryview] = {}
        self._nodes: dict[NodeRef, Node] = {}

    def fetch(self, ref: NodeRef) -> memoryview:
        """The bytes at ``ref``, verified."""
        if ref.file not in self._images:
            try:
                file = self._directory.open(map_name(ref.file))
            except FileNotFoundError:
                raise self._damage(ref, "the file is missing") from None
            image = memoryview(bytearray(file.size_bytes))
            file.pread(image, 0)
            file.close()
            self._images[ref.file] = image
        data = self._images[ref.file][ref.offset : ref.offset + ref.length]
        if len(data) != ref.length or crc32c(data) != ref.crc:
            raise self._damage(ref, "the checksum does not fit")
        return data

    def load(self, ref: NodeRef, height: int) -> Node:
        """Return the node at ``ref``, with one more holder."""
        node = self._nodes.get(ref)
        if node is not None:
            node.refs += 1
            return node
        node = self._decode(ref, self.fetch(ref), height)
        self._usage.came_home(node, ref)
        self._nodes[ref] = node
        return node

    def _decode(self, ref: NodeRef, data: memoryview, height: int) -> Node:
        kind, _, count = _HEAD.unpack_from(data)
        body = data[_HEAD.size :]
        if height and kind == _INNER:
            kids: list[Node | None] = [None] * self._fanout
            for index, file, offset, length, crc in _KID.iter_unpack(body):
                kids[index] = self.load(NodeRef(file, offset, length, crc), height - 1)
            return Inner(kids)
        if not height and kind in (_DENSE, _SPARSE):
            vector = np.zeros(self._fanout, dtype=np.uint64)
            if kind == _DENSE:
                vector[:] = np.frombuffer(body, dtype="<u8")
            else:
                vector[np.frombuffer(body[: 2 * count], dtype="<u2")] = np.frombuffer(body[2 * count :], dtype="<u8")
            leaf = Leaf(array("Q", vector.tobytes()))
            if len(vector):
                self._usage.reserve(int(((vector & 0xFFFFFFFF) >> self._usage.segment_shift).max()))
            self._usage.count_leaf(leaf, +1)
            return leaf
        raise self._damage(ref, f"a node of kind {kind} stands at height {height}")

    def _damage(self, ref: NodeRef, reason: str) -> StoreDamaged:
        return StoreDamaged(
            path=self._directory.path,
            reason=f"map node at offset {ref.offset} of {map_name(ref.file)} cannot be used: {reason}",
        )


def wants_rewrite(usage: Usage, bytes_in_files: int) -> bool:
    """Whether more than half of the map files is garbage."""
    return bytes_in_files > _REWRITE_MIN_BYTES and bytes_in_files > 2 * sum(usage.bytes_at_home.values())

"""Filling drafts (`simsr.sr.drafts`) beside the running load: the walks in slices, reads in worker threads, writes as those of a client.

An operation goes on when its client goes away; it ends early, with nothing changed, when the daemon stops, the SR is full or a block cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from simsr.daemon.engine import Disk
from simsr.daemon.host import Host, Mounted
from simsr.daemon.walks import Walks, run_in_host
from simsr.sr.drafts import Destruction, Draft, Graft
from simsr.sr.vdi import Vdi
from simsr.store.volume import Volume

__all__ = ["destroy_data", "compose"]

_BATCH_BYTES = 512 << 10
_RANGES_AT_ONCE = 1000
_Some = TypeVar("_Some", bound=Draft)


async def destroy_data(host: Host, walks: Walks, mounted: Mounted, vdi: Vdi) -> None:
    """Drop the data of a snapshot; nothing happens if that was done. Returns when it is durable."""
    if not vdi.has_data:
        return

    async def fill(draft: Destruction) -> None:
        target = _disk(mounted, draft.volume)
        window: int | None = 0
        while window is not None:
            walk = await walks.run(mounted, partial(draft.fingerprint, window))
            await _write(target, walk.parts)
            window = walk.next_window

    await _carry_out(host, mounted, vdi, lambda: Destruction(mounted.repository, vdi), fill)


async def compose(host: Host, walks: Walks, mounted: Mounted, vdi: Vdi, parent: Vdi) -> None:
    """Lay the blocks of ``vdi`` over the content of ``parent``. Returns when it is durable."""

    async def fill(draft: Graft) -> None:
        source, target = _disk(mounted, vdi.volume), _disk(mounted, draft.volume)
        start: int | None = 0
        while start is not None:
            diff = await walks.run(mounted, partial(draft.difference, start, _RANGES_AT_ONCE))
            await _copy(source, target, [(offset, length) for offset, length, has_data in diff.ranges if has_data])
            start = diff.next_offset

    await _carry_out(host, mounted, vdi, lambda: Graft(mounted.repository, vdi, parent), fill)


async def _carry_out(
    host: Host, mounted: Mounted, vdi: Vdi, begin: Callable[[], _Some], fill: Callable[[_Some], object]
) -> None:
    async def job() -> None:
        draft = await host.when_unused(vdi, begin)
        try:
            await fill(draft)
            draft.finish()
        finally:
            draft.abandon()
            mounted.engine.wake()
        await mounted.engine.flush()

    await run_in_host(host, mounted, job)


def _disk(mounted: Mounted, volume: Volume) -> Disk:
    return Disk(mounted.engine, volume, lambda: None)


async def _write(target: Disk, parts: list[tuple[int, bytes | memoryview]]) -> None:
    batch = [(offset, len(data), memoryview(data)) for offset, data in parts]
    done = target.write(batch)
    if done < len(batch):
        await target.write_rest(batch, done)
    await trio.lowlevel.checkpoint()


async def _copy(source: Disk, target: Disk, ranges: list[tuple[int, int]]) -> None:
    """Copy ranges, some of them at once."""
    pieces: list[tuple[int, memoryview]] = []
    size = 0
    for offset, length in ranges:
        while length:
            part = min(length, _BATCH_BYTES - size)
            pieces.append((offset, memoryview(bytearray(part))))
            offset, length, size = offset + part, length - part, size + part
            if size == _BATCH_BYTES:
                await _copy_pieces(source, target, pieces)
                pieces, size = [], 0
    if pieces:
        await _copy_pieces(source, target, pieces)


async def _copy_pieces(source: Disk, target: Disk, pieces: list[tuple[int, memoryview]]) -> None:
    for error in await source.read_cold(pieces):
        if error is not None:
            raise error
    await _write(target, [(offset, view) for offset, view in pieces])

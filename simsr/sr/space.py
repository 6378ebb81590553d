"""The size of an SR: what a limit means for the store, and where the bytes are.

A limit is what the SR may take on the host's disk. It becomes a number of segments; a hundredth is left for the maps. A small SR gets
small segments, so that there are enough of them for the cleaner to work with.
"""

from __future__ import annotations

from simsr.errors import BadSize
from simsr.store.layout import BLOCK, Geometry
from simsr.store.log import KEEP_FOR_WRITES
from simsr.store.store import Store

__all__ = ["check_limit", "geometry_for", "cap_for", "describe_space", "LIMIT_MIN_BYTES"]

LIMIT_MIN_BYTES = 32 << 20
_SEGMENT_MIN_BYTES, _SEGMENT_MAX_BYTES = 1 << 20, 32 << 20
_SEGMENTS_WANTED = 256
_MAPS_PART = 100  # one in so many bytes is for the maps


def check_limit(size_bytes: int) -> int:
    """Return ``size_bytes``. Raises `BadSize` if an SR cannot be so small."""
    if not LIMIT_MIN_BYTES <= size_bytes < 1 << 60:
        raise BadSize(size=size_bytes, reason=f"an SR has at least {LIMIT_MIN_BYTES} bytes")
    return size_bytes


def geometry_for(limit_bytes: int | None) -> Geometry:
    """The geometry of a store that may take ``limit_bytes``: about 256 segments, of 1 to 32 MiB."""
    if limit_bytes is None:
        return Geometry()
    segment_bytes = _SEGMENT_MAX_BYTES
    while segment_bytes > _SEGMENT_MIN_BYTES and segment_bytes * _SEGMENTS_WANTED > limit_bytes:
        segment_bytes //= 2
    blocks = segment_bytes // BLOCK
    return Geometry(segment_blocks=blocks, record_blocks=blocks // 64)


def cap_for(limit_bytes: int | None, geometry: Geometry) -> int | None:
    """How many segments fit into ``limit_bytes``."""
    if limit_bytes is None:
        return None
    return (limit_bytes - limit_bytes // _MAPS_PART) // geometry.segment_bytes


def describe_space(store: Store) -> dict[str, int]:
    """Where the bytes of an SR are. ``live`` is an upper bound where snapshots share blocks (`simsr sr space` counts exactly)."""
    pool, cleaner = store.pool, store.cleaner
    segment_bytes = store.geometry.segment_bytes
    live = cleaner.live_blocks * BLOCK
    in_use = pool.count - len(pool.spares)
    may_be_made = None if pool.cap_segments is None else max(0, pool.cap_segments - pool.count) * segment_bytes
    growth = store.directory.free_bytes() if may_be_made is None else may_be_made
    reserved = min(KEEP_FOR_WRITES + 1, len(pool.spares)) * segment_bytes
    garbage = max(0, in_use * pool.data_blocks * BLOCK - live)
    return {
        "live_bytes": live,
        "garbage_bytes": garbage,
        "reserved_bytes": reserved,
        "reclaimable_bytes": garbage,
        "free_bytes": len(pool.spares) * segment_bytes - reserved + growth,
        "map_bytes": store.map_bytes,
        "segment_bytes": pool.count * segment_bytes,
    }

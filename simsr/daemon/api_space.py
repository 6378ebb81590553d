"""The part of the control API that compares maps: what changed between two VDIs, and who holds how much of an SR.

Both are walks (`simsr.store.walk`), carried out beside the running load: what blocks in a worker thread, the rest a fraction of a
millisecond at a time. One walk at a time in the daemon, so that many that are asked for do not add up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import trio
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from simsr.daemon.api_parts import Reference, timed
from simsr.daemon.host import Host
from simsr.daemon.walks import Walks
from simsr.errors import BadRequest

__all__ = ["space_router"]

RANGES_MAX = 100_000
_RANGES_DEFAULT = 10_000
_ENCODE_AT_ONCE = 256  # items of an answer, in one slice


class RangeOut(BaseModel):
    offset: int = Field(description="bytes")
    length: int = Field(description="bytes")
    data: bool = Field(description="whether the other VDI has data there; if not, it is a hole there or has ended")


class DiffOut(BaseModel):
    vdi: str
    other: str
    size_bytes: int = Field(description="of the VDI")
    other_size_bytes: int
    ranges: list[RangeOut] = Field(description="sorted; those that touch differ in kind")
    next_offset: int | None = Field(description="where the rest begins, if there were too many; null: that was all")


class VdiSpaceOut(BaseModel):
    uuid: str
    name: str
    is_a_snapshot: bool
    virtual_bytes: int
    referenced_bytes: int = Field(description="what it refers to, shared or not")
    exclusive_bytes: int = Field(description="what no other VDI refers to: deleting it frees that")


class SpaceOut(BaseModel):
    uuid: str
    name: str
    distinct_bytes: int = Field(description="everything that any VDI refers to, once")
    shared_bytes: int = Field(description="the part of it that two or more VDIs refer to")
    vdis: list[VdiSpaceOut]


async def _encoded(answer: dict[str, Any], key: str, items: list[Any], line: Callable[[Any], dict]) -> Response:
    """``answer`` with the list ``items`` under ``key``, as JSON, made in slices: it may be long."""
    parts = [json.dumps(answer)[:-1].encode(), f', "{key}": ['.encode()]
    for first in range(0, len(items), _ENCODE_AT_ONCE):
        text = json.dumps([line(item) for item in items[first : first + _ENCODE_AT_ONCE]])
        parts += [b", " if first else b"", text[1:-1].encode()]
        await trio.lowlevel.checkpoint()
    return Response(b"".join([*parts, b"]}"]), media_type="application/json")


def space_router(host: Host, walks: Walks) -> APIRouter:
    """The routes, for one host."""
    router = APIRouter()

    @router.get("/v1/vdis/{vdi}/diff/{other}", response_model=DiffOut)
    async def diff_vdis(
        vdi: Reference,
        other: Reference,
        start: Annotated[int, Query(ge=0, description="bytes; what is before is left out")] = 0,
        limit: Annotated[int, Query(ge=1, le=RANGES_MAX, description="ranges, at most")] = _RANGES_DEFAULT,
    ) -> Response:
        """What has changed from a VDI to another one of the SR, as both are now."""
        began = trio.current_time()
        (mounted, old), (_, new) = host.find_vdi(vdi), host.find_vdi(other)
        if old.sr != new.sr:
            raise BadRequest(what=f"a diff of {old.uuid} and {new.uuid}", reason="they are in different SRs, which share nothing")
        diff = await walks.run(mounted, lambda: mounted.repository.diff(old, new, start, limit))
        answer = {
            "vdi": old.uuid, "other": new.uuid, "size_bytes": diff.old_size_bytes, "other_size_bytes": diff.new_size_bytes,
            "next_offset": diff.next_offset,
        }  # fmt: skip
        keys = ("offset", "length", "data")
        return timed(await _encoded(answer, "ranges", diff.ranges, lambda one: dict(zip(keys, one))), began)

    @router.get("/v1/srs/{sr}/space", response_model=SpaceOut)
    async def show_space(sr: Reference) -> Response:
        """Who holds how much of an SR, exactly."""
        began = trio.current_time()
        mounted = host.find_sr(sr)
        repository = mounted.repository
        survey = await walks.run(mounted, repository.survey)
        answer = repository.describe_survey(survey)
        return timed(await _encoded(answer, "vdis", repository.vdis_of(survey), repository.describe_volume_space), began)

    return router

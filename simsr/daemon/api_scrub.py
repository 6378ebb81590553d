"""The part of the control API that is about scrubs: start, watch, stop (`simsr.daemon.scrubbing`)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from simsr.daemon.api_parts import Body, Reference
from simsr.daemon.host import Host
from simsr.daemon.scrubbing import RATE_BYTES_S, Scrubbing

__all__ = ["scrub_router"]


class ScrubStart(Body):
    rate_bytes_s: Annotated[int, Field(ge=1 << 16, le=1 << 50)] = Field(RATE_BYTES_S, description="bytes a second, at most")


class DamageOut(BaseModel):
    kind: str = Field(description="block, node (of the map: everything below it) or file")
    vdi: str | None
    name: str
    offset: int
    length: int
    where: str


class ScrubOut(BaseModel):
    state: str = Field(description="never, running, done, stopped or failed")
    reason: str
    rate_bytes_s: int
    began_time: str | None
    ended_time: str | None
    bytes_done: int
    bytes_total: int = Field(description="an estimate while it runs")
    nodes: int
    blocks: int
    damaged_nodes: int
    damaged_blocks: int
    clean: bool = Field(description="it has come to its end and found no damage")
    damage: list[DamageOut] = Field(description="complete when it is done")


def scrub_router(host: Host) -> APIRouter:
    """The routes, for one host."""
    router, scrubbing = APIRouter(), Scrubbing(host)

    @router.post("/v1/srs/{sr}/scrub", response_model=ScrubOut, status_code=202)
    async def start_scrub(sr: Reference, body: ScrubStart | None = None) -> dict:
        """Begin to verify everything that is in use of an SR."""
        return await scrubbing.start(host.find_sr(sr), (body or ScrubStart()).rate_bytes_s)

    @router.get("/v1/srs/{sr}/scrub", response_model=ScrubOut)
    async def show_scrub(sr: Reference) -> dict:
        """How far the last scrub is, or how it ended."""
        return scrubbing.status(host.find_sr(sr))

    @router.delete("/v1/srs/{sr}/scrub", response_model=ScrubOut)
    async def stop_scrub(sr: Reference) -> dict:
        """Stop the scrub; no error if none is under way."""
        return await scrubbing.stop(host.find_sr(sr))

    return router

"""The part of the control API that says on which terms a VDI is served over NBD."""

from __future__ import annotations

from typing import Annotated

import trio
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from simsr.daemon.api_parts import Body, Reference, timed
from simsr.daemon.host import Host
from simsr.sr.nbd_terms import NbdTerms

__all__ = ["nbd_router"]

Rule = Annotated[str, Field(max_length=256)]
Limit = Annotated[int, Field(ge=0, le=1 << 53)]


class NbdUpdate(Body):
    allow: list[Rule] | None = Field(None, max_length=64, description="uid:N, addr:ADDRESS[/BITS] or cn:NAME; empty: everybody")
    connections_max: Limit | None = Field(None, description="0: no limit")
    bytes_s: Limit | None = Field(None, description="read and written, a second; 0: no limit")
    requests_s: Limit | None = Field(None, description="a second; 0: no limit")
    durability: str | None = Field(None, max_length=32, description="auto, flush or each-write")


class NbdOut(BaseModel):
    allow: list[str]
    connections_max: int
    bytes_s: int
    requests_s: int
    durability: str


def nbd_router(host: Host) -> APIRouter:
    """The routes, for one host."""
    router = APIRouter()

    @router.get("/v1/vdis/{vdi}/nbd", response_model=NbdOut)
    async def show_terms(vdi: Reference) -> dict:
        """On which terms a VDI is served over NBD."""
        return NbdTerms.of(host.find_vdi(vdi)[1].volume.meta).as_meta()

    @router.patch("/v1/vdis/{vdi}/nbd", response_model=NbdOut)
    async def change_terms(vdi: Reference, body: NbdUpdate, response: Response) -> dict:
        """Change some of them; clients that are connected follow, or are cut off if they are not allowed any more."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        given = {key: value for key, value in body.model_dump().items() if value is not None}
        if "allow" in given:
            given["allow"] = tuple(given["allow"])
        mounted.repository.set_nbd_terms(found, **given)
        host.nbd_exports.terms_changed(found)
        await mounted.engine.flush()
        timed(response, began)
        return NbdTerms.of(found.volume.meta).as_meta()

    return router

"""The part of the control API that only xapi asks for: changed block tracking, epochs of disks that forget."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from typing import Annotated, Literal

import trio
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from simsr.daemon import threads
from simsr.daemon.api_parts import Body, Reference, timed
from simsr.daemon.drafting import compose, destroy_data
from simsr.daemon.host import Host
from simsr.daemon.walks import Walks
from simsr.errors import BadRequest, NoChangedBlocks
from simsr.sr.vdi import Vdi
from simsr.store.units import UNIT_BYTES

__all__ = ["xapi_router"]


class Epoch(Body):
    phase: Literal["begin", "end"] = Field(description="begin: a VM is about to start with it; end: the VM has stopped")


class Cbt(Body):
    enabled: bool


class Compose(Body):
    parent: Annotated[str, Field(min_length=1, max_length=4096, description="a VDI of the same SR, not larger, that nobody is attached to")]


class ChangedBlocksOut(BaseModel):
    granularity_bytes: int = Field(description="of the disk for each bit: 65536")
    size_bytes: int = Field(description="of the newer VDI")
    bitmap: str = Field(description="base64; most significant bit first; 1: something in these 64 KiB has changed")


def xapi_router(host: Host, walks: Walks, vdi_out: type[BaseModel], describe: Callable[[Host, Vdi], dict]) -> APIRouter:
    """The routes, for one host. ``describe`` gives what a ``vdi_out`` holds."""
    router = APIRouter()

    @router.post("/v1/vdis/{vdi}/epoch", response_model=vdi_out)
    async def change_epoch(vdi: Reference, body: Epoch, response: Response) -> dict:
        """A VM starts or stops: with on_boot=reset, starting takes the disk back to its base. Nothing happens otherwise."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        if body.phase == "begin" and await host.when_unused(found, lambda: mounted.repository.begin_epoch(found)):
            await mounted.engine.flush()
            mounted.engine.wake()
        timed(response, began)
        return describe(host, found)

    @router.post("/v1/vdis/{vdi}/cbt", response_model=vdi_out)
    async def set_cbt(vdi: Reference, body: Cbt, response: Response) -> dict:
        """Begin or end tracking changed blocks of a disk; no error if it is so already."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        mounted.repository.set_cbt(found, body.enabled)
        await mounted.engine.flush()
        timed(response, began)
        return describe(host, found)

    @router.post("/v1/vdis/{vdi}/data_destroy", response_model=vdi_out)
    async def destroy(vdi: Reference, response: Response) -> dict:
        """Drop the data of a snapshot with CBT; what changed from and to it can be asked for ever after. No error if it is done already."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        await destroy_data(host, walks, mounted, found)
        timed(response, began)
        return describe(host, found)

    @router.post("/v1/vdis/{vdi}/compose", response_model=vdi_out)
    async def compose_vdi(vdi: Reference, body: Compose, response: Response) -> dict:
        """Lay the blocks that a disk has data in over the content of a parent; the disk stays what it is, and so does the parent."""
        began = trio.current_time()
        (mounted, found), (_, parent) = host.find_vdi(vdi), host.find_vdi(body.parent)
        if found.sr != parent.sr:
            raise BadRequest(what=f"a composition of {found.uuid} and {parent.uuid}", reason="they are in different SRs")
        await compose(host, walks, mounted, found, parent)
        timed(response, began)
        return describe(host, found)

    @router.get("/v1/vdis/{vdi}/changed_blocks/{other}", response_model=ChangedBlocksOut)
    async def list_changed_blocks(vdi: Reference, other: Reference) -> Response:
        """Which 64 KiB of a disk, or of a snapshot of it, are not what they were in an earlier snapshot."""
        began = trio.current_time()
        (mounted, old), (_, new) = host.find_vdi(vdi), host.find_vdi(other)
        if old.sr != new.sr:
            raise NoChangedBlocks(old=old.uuid, new=new.uuid, reason="they are in different SRs")
        walk = await walks.run(mounted, lambda: mounted.repository.changed_blocks(old, new))
        head = json.dumps({"granularity_bytes": UNIT_BYTES, "size_bytes": walk.new_size_bytes})[:-1].encode()

        def encode() -> bytes:
            return b"".join((head, b', "bitmap": "', b64encode(walk.bitmap), b'"}'))

        return timed(Response(await threads.run_sync(encode), media_type="application/json"), began)

    return router

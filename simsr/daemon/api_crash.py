"""The part of the control API for exploring crash states: record a disk's writes, list the states that a crash could leave, make one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from simsr.daemon.api_parts import Body, Reference
from simsr.daemon.host import Host

__all__ = ["crash_router"]


class CrashLogBegin(Body):
    each_write: bool = Field(False, description="writes count as stable when they are answered, without a flush")


class StatesAsk(Body):
    states: Annotated[int, Field(ge=1, le=100_000, description="at most so many")] = 200
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    sector_bytes: Annotated[int, Field(ge=512, le=1 << 20, multiple_of=512, description="written whole or not at all")] = 512


class CrashLogOut(BaseModel):
    vdi: str
    base: str = Field(description="uuid of the snapshot that the log begins with")
    each_write: bool
    recording: bool
    writes: int
    flushes: int
    bytes: int
    failure: str | None = Field(description="why the log is not whole, if it is not")


class StateOut(BaseModel):
    state: str = Field(description="its name")
    cut: int = Field(description="how many writes and flushes had been answered when the crash came")


def crash_router(host: Host, vdi_out: type[BaseModel], describe: Callable[..., dict[str, Any]]) -> APIRouter:
    """``vdi_out`` and ``describe``: how a VDI is answered."""
    router, exploring = APIRouter(), host.exploring

    @router.post("/v1/vdis/{vdi}/crash-log", status_code=201, response_model=CrashLogOut)
    async def begin_log(vdi: Reference, body: CrashLogBegin | None = None) -> dict:
        """Record every write and flush of a disk from now on, over a snapshot."""
        log = await exploring.begin(*host.find_vdi(vdi), (body or CrashLogBegin()).each_write)
        return log.describe()

    @router.get("/v1/vdis/{vdi}/crash-log", response_model=CrashLogOut)
    async def show_log(vdi: Reference) -> dict:
        """The log of a disk."""
        return exploring.find(host.find_vdi(vdi)[1]).describe()

    @router.post("/v1/vdis/{vdi}/crash-log/end", response_model=CrashLogOut)
    async def end_log(vdi: Reference) -> dict:
        """Record no more; log and snapshot stay."""
        return (await exploring.end(host.find_vdi(vdi)[1])).describe()

    @router.delete("/v1/vdis/{vdi}/crash-log", status_code=204)
    async def delete_log(vdi: Reference) -> None:
        """Record no more, delete log and snapshot."""
        await exploring.delete(*host.find_vdi(vdi))

    @router.post("/v1/vdis/{vdi}/crash-log/states", response_model=list[StateOut])
    async def list_states(vdi: Reference, body: StatesAsk | None = None) -> list[dict]:
        """States with different content that a crash could have left; the same ones for the same log and seed."""
        asked = body or StatesAsk()
        return await exploring.states(*host.find_vdi(vdi), asked.states, asked.seed, asked.sector_bytes)

    @router.post("/v1/vdis/{vdi}/crash-log/states/{state}", status_code=201, response_model=vdi_out)
    async def make_state(vdi: Reference, state: Reference) -> dict:
        """Make the disk that a crash in that state leaves: a clone of the snapshot with some of the writes."""
        mounted, found = host.find_vdi(vdi)
        return describe(host, await exploring.make(mounted, found, state, f"crash-{state}"))

    return router

"""The part of the control API about FUSE mounts (docs/fuse.md)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from simsr.daemon.api_parts import Body
from simsr.daemon.host import Host

__all__ = ["mounts_router"]

Directory = Annotated[str, Field(min_length=1, max_length=4096, description="absolute path, as the daemon sees it")]


class MountBody(Body):
    path: Directory
    cache: str = Field("direct", description="direct: nothing is cached by the kernel; writeback: reads and writes are", max_length=20)
    shared: bool = Field(False, description="the daemon's group may read and write, too")


class UnmountBody(Body):
    path: Directory
    lazy: bool = Field(False, description="also if it is in use: open files fail from then on")


class MountOut(BaseModel):
    path: str
    cache: str
    shared: bool
    open_files: int
    requests_total: int = Field(description="reads and writes since it was mounted")
    waits_total: int = Field(description="requests that had to wait for a disk or a flush")
    waiting: int = Field(description="requests that wait now")


def mounts_router(host: Host) -> APIRouter:
    """The routes, for one host."""
    router = APIRouter()

    @router.get("/v1/mounts", response_model=list[MountOut])
    async def list_mounts() -> list[dict]:
        """Where the VDIs are mounted."""
        return host.mounts.describe()

    @router.post("/v1/mounts", response_model=MountOut, status_code=201)
    async def mount(body: MountBody) -> dict:
        """Show all VDIs as files below an empty directory."""
        return (await host.mounts.mount(body.path, body.cache, body.shared)).describe()

    @router.post("/v1/mounts/unmount", status_code=204)
    async def unmount(body: UnmountBody) -> None:
        """Unmount."""
        await host.mounts.unmount(body.path, body.lazy)

    return router

"""The part of the control API that tells what SRs can be like."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from simsr.daemon.api_parts import Reference
from simsr.personalities import find_personality, personality_names

__all__ = ["personality_router"]


class FormatOut(BaseModel):
    clones: bool
    reverts: bool
    size_unit_bytes: int
    size_min_bytes: int
    size_max_bytes: int


class PersonalityOut(BaseModel):
    name: str
    description: str
    driver: str | None
    capabilities: list[str]
    formats: dict[str, FormatOut]
    thick: bool
    allocation_unit_bytes: int
    chain_max: int | None
    read_only: bool
    snapshots_die: bool
    attach: str
    content_type: str


def personality_router() -> APIRouter:
    """The routes that list and show personalities."""
    router = APIRouter()

    @router.get("/v1/personalities", response_model=list[PersonalityOut])
    async def list_personalities() -> list[dict]:
        """The types of SR that an SR can be like."""
        return [find_personality(name).describe() for name in personality_names()]

    @router.get("/v1/personalities/{personality}", response_model=PersonalityOut)
    async def show_personality(personality: Reference) -> dict:
        """One of them."""
        return find_personality(personality).describe()

    return router

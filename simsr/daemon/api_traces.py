"""The part of the control API for traces: recording what is asked of a VDI, and replaying a trace on one.

Both last as long as the request that began them: who hangs up ends them. To end one and still get the rest, DELETE it; the answer to the
first request then comes to its end by itself.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import trio
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from scenarios.schema import Replay
from simsr.daemon.api_parts import Body, Reference
from simsr.daemon.host import Host
from simsr.daemon.load import DEPTH_MAX
from simsr.daemon.recording import Recording
from simsr.daemon.replays import Running

__all__ = ["traces_router", "TRACE_TYPE"]

TRACE_TYPE = "application/vnd.simsr.trace"
_TELL_S = 0.5

Seconds = Annotated[float, Field(gt=0, le=1e9)]


class RecordStart(Body):
    seconds: Seconds | None = None


class ReplayStart(Body):
    trace: Annotated[str, Field(max_length=4096, pattern="^/", description="a file of the daemon's host")]
    format: Annotated[str, Field(max_length=32)] | None = None
    device: Annotated[str, Field(max_length=4096)] | None = Field(None, description="which disk of a trace with several")
    speed: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    start_s: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    loop: bool = False
    fit: Literal["wrap", "scale", "skip"] = "wrap"
    paced: bool = Field(True, description="in the trace's time; otherwise as fast as the disk takes it")
    depth: Annotated[int, Field(ge=1, le=DEPTH_MAX)] = DEPTH_MAX
    in_use: bool = Field(False, description="even if somebody uses the VDI")
    seconds: Seconds | None = None


class RecordingOut(BaseModel):
    vdi: str
    requests: int
    lost: int = Field(description="of these are not in the trace, because they came faster than they were fetched")
    waiting_bytes: int
    age_s: float


class ReplayOut(BaseModel):
    replay: int = Field(description="its number")
    vdi: str
    issued: int
    answered: int = Field(description="without an error")
    in_flight: int
    bytes: int
    skipped: int = Field(description="requests that do not fit the disk")
    rounds: int
    errors: dict[str, int]
    first_error: str | None
    problem: str | None = Field(description="what is wrong with the trace")
    seconds: float
    paced: bool
    is_over: bool
    lag_p50_ns: int
    lag_p99_ns: int
    lag_max_ns: int
    latency_p50_ns: int
    latency_p99_ns: int
    latency_max_ns: int


def traces_router(host: Host) -> APIRouter:
    """The routes, for one host."""
    router, theatre, replays = APIRouter(), host.theatre, host.replays

    @router.post("/v1/vdis/{vdi}/record", include_in_schema=False)
    async def record(vdi: Reference, body: RecordStart | None = None) -> StreamingResponse:
        """Record what is asked of a VDI: the answer is the trace, as it comes."""
        recording = theatre.begin_recording(host.find_vdi(vdi)[1], body.seconds if body else None)
        return _Held(_recorded(host, recording), TRACE_TYPE, lambda: theatre.end_recording(recording))

    @router.get("/v1/vdis/{vdi}/record", response_model=RecordingOut)
    async def show_recording(vdi: Reference) -> dict:
        """How far the recording of a VDI is."""
        return theatre.recording_of(host.find_vdi(vdi)[1]).statistics()

    @router.delete("/v1/vdis/{vdi}/record", response_model=RecordingOut)
    async def stop_recording(vdi: Reference) -> dict:
        """End the recording of a VDI; whoever fetches it gets the rest."""
        recording = theatre.recording_of(host.find_vdi(vdi)[1])
        theatre.end_recording(recording)
        return recording.statistics()

    @router.post("/v1/vdis/{vdi}/replay", include_in_schema=False)
    async def replay(vdi: Reference, body: ReplayStart) -> StreamingResponse:
        """Replay a trace on a VDI: the answer has a line of JSON now and then, the last one when it is over."""
        spec = Replay(
            **{"as": "workload"}, trace=body.trace, format=body.format, device=body.device, speed=body.speed, start=f"{body.start_s}s",
            loop=body.loop, fit=body.fit, on="disk",
        )  # fmt: skip
        running = await replays.start(host.find_vdi(vdi)[1], spec, body.in_use, body.paced, body.depth, body.seconds)
        return _Held(_told(running), "application/x-ndjson", running.load.stop)

    @router.get("/v1/replays", response_model=list[ReplayOut])
    async def list_replays() -> list[dict]:
        """The replays that run now."""
        return [_described(running) for running in replays.running.values()]

    @router.delete("/v1/replays/{replay}", response_model=ReplayOut)
    async def stop_replay(replay: int) -> dict:
        """End a replay; whoever began it gets its last line."""
        running = replays.find(replay)
        running.load.stop()
        return _described(running)

    return router


class _Held(StreamingResponse):
    """An answer that something lasts as long as; ``end`` is called when it is over, however, even if it has not begun."""

    def __init__(self, content: Any, media_type: str, end: Any) -> None:
        super().__init__(content, media_type=media_type)
        self._end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _recorded(host: Host, recording: Recording):
    async for chunk in recording.chunks():
        if recording.is_over:
            host.theatre.end_recording(recording)
        yield chunk


async def _told(running: Running):
    while not running.load.is_over:
        yield _line(running)
        with trio.move_on_after(_TELL_S):
            await running.load.over.wait()
    yield _line(running)


def _line(running: Running) -> str:
    return json.dumps(_described(running)) + "\n"


def _described(running: Running) -> dict[str, Any]:
    return {"replay": running.number, "vdi": running.vdi, **running.load.statistics()}

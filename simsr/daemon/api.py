"""The control API: HTTP and JSON over the control socket. OpenAPI at /openapi.json.

Thin: checks the shape of a request, finds what it names, calls the model, makes it durable, describes the result. Every
answer to a change carries ``Server-Timing: store;dur=<ms>``: the time the change took, until it was durable.
"""

from __future__ import annotations

import json
import logging
import os
import re
from time import monotonic
from typing import Annotated, Any

import trio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from simsr import __version__
from simsr.daemon.answers import error_answer
from simsr.daemon.api_crash import crash_router
from simsr.daemon.api_history import history_router
from simsr.daemon.api_mounts import mounts_router
from simsr.daemon.api_metrics import metrics_router
from simsr.daemon.api_nbd import nbd_router
from simsr.daemon.api_parts import Body, Reference, timed
from simsr.daemon.api_personality import personality_router
from simsr.daemon.api_scenario import ControlGate, scenario_router
from simsr.daemon.api_scrub import scrub_router
from simsr.daemon.api_space import space_router
from simsr.daemon.api_traces import traces_router
from simsr.daemon.api_xapi import xapi_router
from simsr.daemon.host import Host, Mounted
from simsr.daemon.listeners import nbd_uri
from simsr.daemon.walks import Walks
from simsr.errors import BadRequest, NotFound, SimsrError, SrExists
from simsr.sr.repository import SM_CONFIG_MAX, TEXT_MAX, check_sm_config
from simsr.sr.space import LIMIT_MIN_BYTES
from simsr.sr.vdi import Vdi

__all__ = ["make_app"]

log = logging.getLogger("simsr.api")

Text = Annotated[str, Field(max_length=4096)]  # a limit makes pydantic refuse lone surrogates, too
Label = Annotated[str, Field(max_length=TEXT_MAX)]
ConfigText = Annotated[str, Field(max_length=SM_CONFIG_MAX)]
SizeBytes = Annotated[int, Field(gt=0, description="bytes; rounded up to a multiple of 512", examples=[1 << 30])]


LimitBytes = Annotated[
    int, Field(ge=LIMIT_MIN_BYTES, lt=1 << 60, description="what the SR may take on the host's disk; without it: what there is")
]


class SrCreate(Body):
    name: Label
    uuid: Annotated[Text, Field(min_length=1)] | None = None
    description: Label = ""
    sm_config: dict[str, str] = {}
    limit_bytes: LimitBytes | None = None
    personality: Text = Field("sim", description="the type of SR that this one is like; see /v1/personalities")


class SrResize(Body):
    limit_bytes: LimitBytes


class SrUpdate(Body):
    name: Label | None = None
    description: Label | None = None
    sm_config: dict[str, str] | None = None
    verify_reads: bool | None = None
    tips_max: Annotated[int, Field(description="tips that a disk keeps; 0: none")] | None = None
    tips_hours: Annotated[int, Field(description="for how long they are kept; 0: not at all")] | None = None
    expose_tips: Annotated[bool, Field(description="list tips with the snapshots")] | None = None


class VdiCreate(Body):
    size_bytes: SizeBytes
    sr: Text | None = None
    name: Label = ""
    description: Label = ""
    uuid: Text | None = None
    type: Text = "user"
    sharable: bool = False
    read_only: bool = False
    sm_config: dict[str, str] = {}


class VdiUpdate(Body):
    name: Label | None = None
    description: Label | None = None
    sm_config: dict[str, str] | None = None
    sm_config_merge: dict[ConfigText, ConfigText | None] | None = Field(None, description="keys to set, or to remove where null; others stay")
    managed: bool | None = None
    read_only: bool | None = None
    sharable: bool | None = None
    on_boot: Annotated[str, Field(pattern="^(persist|reset)$", description="reset: every start of a VM goes back to the content of now")] | None = None


class Resize(Body):
    size_bytes: SizeBytes


class Attach(Body):
    client: Annotated[str, Field(min_length=1, max_length=256)]
    writable: bool
    exclusive: bool = Field(True, description="false: others who say so, too, may attach for writing; they see to it that one writes at a time")


class Detach(Body):
    client: Annotated[str, Field(min_length=1, max_length=256)]


class SrOut(BaseModel):
    uuid: str
    name: str
    description: str
    sm_config: dict[str, str]
    path: str
    limit_bytes: int | None
    personality: str
    verify_reads: bool = Field(description="whether reads from memory are verified (in hot segments once); those from the disk always are")
    tips_max: int
    tips_hours: int
    expose_tips: bool
    tip_count: int
    physical_size_bytes: int
    physical_utilisation_bytes: int
    virtual_allocation_bytes: int
    vdi_count: int = Field(description="all VDIs, snapshots included")
    snapshot_count: int
    space: dict[str, int]
    statistics: dict[str, Any]


class AttachmentOut(BaseModel):
    client: str
    writable: bool
    kind: str


class VdiOut(BaseModel):
    uuid: str
    location: str
    sr: str
    name: str
    description: str
    type: str
    size_bytes: int
    physical_utilisation_bytes: int
    is_a_snapshot: bool
    is_a_tip: bool = Field(description="what a disk was when it was reverted, kept for a time; looks like a snapshot")
    snapshot_of: str | None
    family: str = Field(description="uuid of the VDI that it descends from, by snapshots and clones; maybe its own")
    snapshot_time: str | None
    created_time: str
    read_only: bool
    sharable: bool
    managed: bool
    on_boot: str = Field(description="persist, or reset: a start of a VM takes it back to its base")
    cbt_enabled: bool = Field(description="whether changed blocks are tracked")
    sm_config: dict[str, str]
    attached: list[AttachmentOut]
    nbd_uri: str
    nbd_socket: str


class AttachOut(BaseModel):
    nbd_uri: str
    nbd_socket: str
    export_name: str
    size_bytes: int


class DaemonOut(BaseModel):
    version: str
    pid: int
    root: str
    control_socket: str | None
    https: str | None = Field(description="where the control API is served over TLS, if it is")
    nbd_socket: str
    nbd_tcp: str | None
    nbd_tls: str = Field(description="off, on or require; on a TCP address that is not loopback it is always required")
    uptime_s: float
    sr_count: int
    vdi_count: int
    failed_srs: dict[str, str] = Field(description="path of an SR that could not be opened, and why")
    statistics: dict[str, Any]


class _PathAsSent:
    """Routes by the path before it is decoded, so that a slash (%2F) in a name does not divide it. `Reference` decodes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        await self._app(scope, receive, send)


def make_app(host: Host, control_socket: str | None, nbd_tcp: str | None, https: str | None = None) -> FastAPI:
    """The application that serves ``host``."""
    app = FastAPI(title="simsrd", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(ControlGate, host=host)
    app.add_middleware(_PathAsSent)
    _add_error_handlers(app)
    _add_daemon_routes(app, host, control_socket, nbd_tcp, https)
    _add_sr_routes(app, host)
    _add_vdi_routes(app, host)
    app.include_router(nbd_router(host))
    app.include_router(scrub_router(host))
    app.include_router(scenario_router(host))
    app.include_router(crash_router(host, VdiOut, _describe_vdi))
    app.include_router(traces_router(host))
    app.include_router(metrics_router(host))
    walks = Walks(host)
    app.include_router(space_router(host, walks))
    app.include_router(history_router(host, walks, VdiOut, _describe_vdi))
    app.include_router(xapi_router(host, walks, VdiOut, _describe_vdi))
    app.include_router(personality_router())
    app.include_router(mounts_router(host))
    app.openapi()  # built here, not by the first request, which would stall everything else
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SimsrError)
    async def simsr_error(request: Request, error: SimsrError) -> JSONResponse:
        return error_answer(error)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # What is no JSON has the position of the mistake, a number, for a name.
        where = ".".join(part for part in first["loc"] if part != "body" and isinstance(part, str)) or "the request body"
        value = first["input"] if first["type"] not in ("missing", "extra_forbidden") else None
        shown = f" {value!r:.100}" if isinstance(value, str | int | float) else ""
        # pydantic speaks of inputs, which no reader knows.
        reason = re.sub(r"^(Input|String|Value|List) should ", "it must ", first["msg"].removeprefix("Value error, "))
        return error_answer(BadRequest(what=where + shown, reason=reason))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return error_answer(NotFound(kind="API path", name=request.url.path))
        answer = error_answer(BadRequest(what="the request", reason=str(error.detail)), error.status_code)
        answer.headers.update(error.headers or {})  # which methods are allowed
        return answer

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_answer(SimsrError(reason=f"an internal error ({type(error).__name__}); the daemon's log has more"))


def _given(body: BaseModel) -> dict[str, Any]:
    return {key: value for key, value in body.model_dump().items() if value is not None}


def _changes(body: VdiUpdate, vdi: Vdi) -> dict[str, Any]:
    """What to change, with the merged sm_config: who merges here, in one step, loses nothing that another sets meanwhile."""
    changes = _given(body)
    if (merge := changes.pop("sm_config_merge", None)) is not None:
        merged = {**changes.get("sm_config", vdi.meta["sm_config"]), **merge}
        changes["sm_config"] = {key: value for key, value in merged.items() if value is not None}
    return changes


def _add_daemon_routes(app: FastAPI, host: Host, control_socket: str | None, nbd_tcp: str | None, https: str | None) -> None:
    @app.get("/v1/daemon", response_model=DaemonOut)
    async def daemon() -> dict:
        """What this daemon is and does."""
        return {
            "version": __version__, "pid": os.getpid(), "root": host.root, "control_socket": control_socket,
            "https": https, "nbd_socket": host.nbd_socket, "nbd_tcp": nbd_tcp, "nbd_tls": host.nbd.tls_mode,
            "uptime_s": monotonic() - host.started,
            "sr_count": len(host.mounted), "vdi_count": sum(len(m.repository.vdis) for m in host.mounted.values()),
            "failed_srs": host.failed, "statistics": host.statistics(),
        }  # fmt: skip


def _add_sr_routes(app: FastAPI, host: Host) -> None:
    def describe(mounted: Mounted) -> dict:
        return mounted.repository.describe()

    @app.get("/v1/srs", response_model=list[SrOut])
    async def list_srs() -> list[dict]:
        """All SRs."""
        return [describe(mounted) for mounted in host.mounted.values()]

    @app.post("/v1/srs", response_model=SrOut, status_code=201)
    async def create_sr(body: SrCreate, response: Response) -> dict:
        """Make an SR."""
        began = trio.current_time()
        sm_config = check_sm_config(body.sm_config)
        mounted = await host.create_sr(body.name, body.uuid, body.description, sm_config, body.limit_bytes, body.personality)
        timed(response, began)
        return describe(mounted)

    @app.get("/v1/srs/{sr}", response_model=SrOut)
    async def show_sr(sr: Reference) -> dict:
        """One SR."""
        return describe(host.find_sr(sr))

    @app.patch("/v1/srs/{sr}", response_model=SrOut)
    async def update_sr(sr: Reference, body: SrUpdate, response: Response) -> dict:
        """Change name, description or sm_config of an SR."""
        began = trio.current_time()
        mounted = host.find_sr(sr)
        if any(other is not mounted and other.repository.name == body.name for other in host.mounted.values()):
            raise SrExists(name=body.name)
        mounted.repository.update_self(**_given(body))
        await mounted.engine.flush()
        timed(response, began)
        return describe(mounted)

    @app.post("/v1/srs/{sr}/resize", response_model=SrOut)
    async def resize_sr(sr: Reference, body: SrResize, response: Response) -> dict:
        """Change the size limit of an SR."""
        began = trio.current_time()
        mounted = host.find_sr(sr)
        mounted.repository.resize_self(body.limit_bytes)
        mounted.engine.wake()
        await mounted.engine.flush()
        timed(response, began)
        return describe(mounted)

    @app.delete("/v1/srs/{sr}", status_code=204)
    async def delete_sr(sr: Reference, response: Response) -> None:
        """Delete an SR without VDIs."""
        began = trio.current_time()
        await host.delete_sr(sr)
        timed(response, began)


def _describe_vdi(host: Host, vdi: Vdi) -> dict:
    return {**vdi.describe(), "nbd_uri": nbd_uri(host, vdi), "nbd_socket": host.socket_of(vdi)}


def _add_vdi_routes(app: FastAPI, host: Host) -> None:
    @app.get("/v1/vdis", response_model=list[VdiOut])
    async def list_vdis(sr: str | None = None, tips: bool | None = None) -> Response:
        """All VDIs, snapshots included, of one SR or of all; with tips if asked for, or if the SR is set so."""
        wanted = [host.find_sr(sr)] if sr is not None else host.mounted.values()
        lines = [_describe_vdi(host, vdi) for mounted in wanted for vdi in host.listed(mounted, tips)]
        return Response(json.dumps(lines), media_type="application/json")

    @app.post("/v1/vdis", response_model=VdiOut, status_code=201)
    async def create_vdi(body: VdiCreate, response: Response) -> dict:
        """Make an empty disk."""
        began = trio.current_time()
        mounted = host.find_sr(body.sr)
        host.refuse_known(body.uuid)
        vdi = mounted.repository.create(**body.model_dump(exclude={"sr"}))
        host.added(vdi)
        await mounted.engine.flush()
        timed(response, began)
        return _describe_vdi(host, vdi)

    @app.get("/v1/vdis/{vdi}", response_model=VdiOut)
    async def show_vdi(vdi: Reference) -> dict:
        """One VDI."""
        return _describe_vdi(host, host.find_vdi(vdi)[1])

    @app.patch("/v1/vdis/{vdi}", response_model=VdiOut)
    async def update_vdi(vdi: Reference, body: VdiUpdate, response: Response) -> dict:
        """Change the metadata of a VDI."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        await host.when_unused(found, lambda: mounted.repository.update(found, **_changes(body, found)))
        await mounted.engine.flush()
        timed(response, began)
        return _describe_vdi(host, found)

    @app.delete("/v1/vdis/{vdi}", status_code=204)
    async def delete_vdi(vdi: Reference, response: Response) -> None:
        """Delete a VDI that nobody is attached to."""
        began = trio.current_time()
        await host.delete_vdi(*host.find_vdi(vdi))
        timed(response, began)

    @app.post("/v1/vdis/{vdi}/resize", response_model=VdiOut)
    async def resize_vdi(vdi: Reference, body: Resize, response: Response) -> dict:
        """Grow a disk."""
        began = trio.current_time()
        mounted, found = host.find_vdi(vdi)
        mounted.repository.resize(found, body.size_bytes)
        await mounted.engine.flush()
        timed(response, began)
        return _describe_vdi(host, found)

    @app.post("/v1/vdis/{vdi}/attach", response_model=AttachOut)
    async def attach_vdi(vdi: Reference, body: Attach) -> dict:
        """Attach for a host; the same client again changes nothing."""
        mounted, found = host.find_vdi(vdi)
        host.attach_host(mounted, found, body.client, body.writable, body.exclusive)
        return {
            "nbd_uri": nbd_uri(host, found), "nbd_socket": host.socket_of(found), "export_name": found.uuid,
            "size_bytes": found.size_bytes,
        }  # fmt: skip

    @app.post("/v1/vdis/{vdi}/detach", status_code=204)
    async def detach_vdi(vdi: Reference, body: Detach) -> None:
        """End what attach began; no error if nothing is attached."""
        mounted, found = host.find_vdi(vdi)
        host.detach_host(mounted, found, body.client)

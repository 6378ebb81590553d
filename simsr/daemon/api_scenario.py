"""The part of the control API for scenarios and faults, and the gate that operations pass while one is in force."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import trio
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simsr.daemon import threads
from simsr.daemon.answers import error_answer
from simsr.daemon.api_parts import Body
from simsr.daemon.host import Host
from simsr.daemon.scenario_text import check_text, library_plans, library_text
from simsr.errors import Ambiguous, NotFound, SimsrError
from simsr.sr.vdi import Vdi

__all__ = ["scenario_router", "ControlGate"]

log = logging.getLogger("simsr.scenario")

TEXT_MAX = 1 << 20
_WATCH_S = 0.5


class ScenarioText(Body):
    text: Annotated[str, Field(max_length=TEXT_MAX, description="the scenario, as TOML")]
    source: Annotated[str, Field(max_length=4096)] = "the request"
    directory: Annotated[str, Field(max_length=4096, pattern="^/")] | None = Field(
        None, description="where relative names of traces begin"
    )


class ScenarioStart(ScenarioText):
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    step: Literal["before-log", "after-log", "after-swap", "before-ack"] | None = Field(
        None, description='where kill_daemon = "at-step" kills'
    )
    ends: bool = Field(True, description="false: rules that cut the power or kill the daemon are left out")


class FaultAdd(Body):
    rule: dict[str, Any] = Field(description="match, trigger, action... as in a [[rule]]")
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class Heal(Body):
    vdis: list[Annotated[str, Field(max_length=4096)]] | None = Field(None, description="only these; default: all")
    permanent: bool = Field(False, description="write the damage into the store, so that it stays")


class PlanOut(BaseModel):
    name: str
    about: str
    seed: int
    profiles: list[str]
    rules: list[dict[str, Any]] = Field(description="name, match, trigger, action")
    phases: list[dict[str, Any]] = Field(description="name, for, until, repeat, rules, begins_s")
    expect: list[str]


class CheckOut(PlanOut):
    clients: dict[str, list[dict[str, str]]] = Field(description="what tapdisk, qemu, kernel and fuse could not carry or bear")


class TextOut(BaseModel):
    name: str
    text: str


class RuleOut(BaseModel):
    rule: str
    action: str = Field(description="what it does; several actions are joined with +")
    in_force: bool
    matched: int = Field(description="requests that it looked at")
    hits: int = Field(description="times that it fired")


class ExpectationOut(BaseModel):
    that: str
    verdict: Literal["met", "broken", "not evaluated"]
    found: list[dict[str, str]] = Field(description="what was measured so far: what, value")
    reason: str = Field(description="why it was not evaluated")


class ReportOut(BaseModel):
    """Times in seconds from the beginning, latencies in seconds. One entry of a list in ``timeline`` is one stretch of ``bucket_s``."""

    scenario: str
    about: str
    seed: int
    began: str
    is_running: bool
    duration_s: float
    verdict: Literal["met", "broken", "not evaluated", ""] = Field(description="of all expectations together; empty: there are none")
    expectations: list[ExpectationOut]
    requests: int
    errors: int
    disconnects: int
    power_cuts: int
    phases: list[dict[str, Any]] = Field(description="name, begins_s, ends_s")
    events: list[dict[str, Any]] = Field(description="at_s, what, name")
    left_out: int = Field(description="phases and events beyond the first thousand")
    operations: list[dict[str, Any]] = Field(description="latencies of each operation, then (phase) of each phase it was met in")
    hangs: dict[str, Any]
    gaps: list[dict[str, Any]] = Field(description="the longest time in which requests waited at a disk and none was answered")
    flushed_writes: dict[str, int]
    replay_lag: dict[str, Any] | None
    rules: list[RuleOut]
    disks: list[dict[str, Any]]
    timeline: dict[str, Any]
    latency: dict[str, Any] = Field(description="cells: [stretch, row, requests]; row r begins at shortest_s * ratio**r")


class ScenarioOut(BaseModel):
    scenario: str
    seed: int
    decided: int = Field(description="requests decided on so far")
    timeline: dict[str, Any]
    rules: list[RuleOut]
    events: list[str]
    limits: list[dict[str, Any]]
    pools: list[dict[str, Any]]
    paths: dict[str, Any]
    disks: list[dict[str, Any]]
    age_s: float
    is_over: bool = Field(description="whether the last phase has ended")
    hung: int = Field(description="requests that hang now")
    under_way: int = Field(description="requests that wait now, those that hang included")
    power_cuts: int
    replays: list[dict[str, Any]] = Field(description="loads: requests issued, errors, lag_p50_ns, lag_p99_ns, lag_max_ns")
    warnings: list[str] = Field(description="when it was begun: what the clients that were there could not carry or bear; disks that were not there")
    notes: list[dict[str, Any]] = Field(description="the last phases and events: at_s, what, name")
    expectations: list[ExpectationOut]


class InForceOut(BaseModel):
    rule: str | None = Field(description="its name; null: all")
    in_force_after: int = Field(description="the number of the last request decided before")
    under_way: int = Field(description="of a rule that lets requests hang: those from before it that are not answered after 5 s")
    warnings: list[str] = Field(description="what the clients that are there now could not carry or bear; disks that are not there")


class HealedOut(BaseModel):
    healed: list[str] = Field(description="uuids")
    permanent: bool


class DecisionOut(BaseModel):
    at_ns: int
    rule: str
    disk: str
    op: str
    number: int
    u: float | None
    places: list[int]
    actions: str


def scenario_router(host: Host) -> APIRouter:
    """The routes, for one host."""
    router, theatre = APIRouter(), host.theatre

    @router.get("/v1/scenarios", response_model=list[PlanOut])
    async def list_library() -> list[dict]:
        """The scenarios and profiles that come with simsr."""
        return await threads.run_sync(library_plans)

    @router.get("/v1/scenarios/{name}", response_model=TextOut)
    async def show_of_library(name: str) -> dict:
        """The text of one of them."""
        return {"name": name, "text": library_text(name)}

    @router.post("/v1/scenario/check", response_model=CheckOut)
    async def check_scenario(body: ScenarioText) -> dict:
        """Read a scenario without putting it in force: what is wrong with it, and what each kind of client would make of it."""
        return await threads.run_sync(check_text, body.text, body.source, body.directory)

    @router.post("/v1/scenario", status_code=201, response_model=ScenarioOut)
    async def start_scenario(body: ScenarioStart) -> dict:
        """Put a scenario in force; answered when it is."""
        play = await theatre.start(body.text, body.source, body.directory, body.seed, body.step, body.ends)
        return play.statistics()

    @router.get("/v1/scenario", response_model=ScenarioOut)
    async def scenario_status() -> dict:
        """The scenario in force: phase, hits of each rule, disks."""
        return theatre.playing.statistics()

    @router.delete("/v1/scenario", response_model=ScenarioOut)
    async def stop_scenario() -> dict:
        """End the scenario; answered when nothing of it is in force any more."""
        return await theatre.stop_and_keep()

    @router.get("/v1/scenario/report", response_model=ReportOut)
    async def report() -> dict:
        """What has happened in the scenario that runs, or in the last one that has: expectations, latencies, timeline."""
        return await theatre.report()

    @router.get("/v1/scenario/decisions", response_model=list[DecisionOut])
    async def decisions() -> list[dict]:
        """The last decisions, the oldest first."""
        return [decision._asdict() for decision in theatre.playing.engine.decisions]

    @router.post("/v1/scenario/hold", include_in_schema=False)
    async def hold(request: Request) -> StreamingResponse:
        """Stay connected while the scenario runs: when this connection ends, nobody hangs any more (rules with ``persist`` excepted)."""
        play = theatre.playing

        async def lines():
            ended = False
            try:
                while theatre.play is play and not play.engine.is_over:
                    yield f"{play.engine.phase or ''}\n"
                    await trio.sleep(_WATCH_S)
                ended = True
            finally:
                if not ended:
                    log.warning("who started scenario %s is gone; what hangs is let go", play.engine.scenario.name)
                    play.dead_man()

        return StreamingResponse(lines(), media_type="text/plain")

    @router.get("/v1/faults", response_model=list[RuleOut])
    async def list_faults() -> list[dict]:
        """The rules in force, with how often they matched and fired."""
        return [line for line in theatre.playing.statistics()["rules"] if line["in_force"]] if theatre.play else []

    @router.post("/v1/faults", status_code=201, response_model=InForceOut)
    async def add_fault(body: FaultAdd) -> dict:
        """Put one rule in force; answered when it is."""
        return await theatre.add_rule(body.rule, body.name)

    @router.delete("/v1/faults/{name}", response_model=InForceOut)
    async def remove_fault(name: str) -> dict:
        """Take a rule out of force and let go what hangs because of it."""
        return theatre.remove_rule(unquote(name))

    @router.post("/v1/faults-reset", response_model=InForceOut)
    async def reset_faults() -> dict:
        """End all rules and phases, heal all damage, let everybody go on."""
        return theatre.reset()

    @router.post("/v1/faults-heal", response_model=HealedOut)
    async def heal(body: Heal | None = None) -> dict:
        """Take the damage away, or make it permanent."""
        named = None if body is None or body.vdis is None else [host.find_vdi(name)[1] for name in body.vdis]
        there = [vdi for vdi in host.all_vdis() if not vdi.is_a_snapshot] if named is None else named
        return await theatre.playing.heal(there, body is not None and body.permanent)

    return router


_ON_VDI = re.compile(r"/v1/vdis/([^/]+)/(snapshot|clone|revert|undo|redo|resize|attach|detach)")


class ControlGate:
    """Lets operations of the control plane meet the scenario in force: they are late, fail, hang, or kill the daemon at a step.

    An operation on a group meets it once for each of its disks, in their order. What only asks what would be (``dry_run``), or cannot be
    understood, meets nothing.
    """

    def __init__(self, app: ASGIApp, host: Host) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._host.theatre.play is None:
            await self._app(scope, receive, send)
            return
        before_answer: list[Callable[[], None]] = []
        try:
            found, receive = await self._operation(scope, receive)
            if found is not None:
                op, vdis = found
                for vdi in vdis:
                    before_answer.append(await self._host.theatre.before(op, vdi, vdis=self._count(vdi.sr)))
        except SimsrError as error:
            await error_answer(error)(scope, receive, send)
            return

        async def send_answer(message: Message) -> None:
            for act in before_answer:
                act()
            await send(message)

        await self._app(scope, receive, send_answer)

    def _count(self, sr: str) -> int:
        return sum(1 for vdi in self._host.all_vdis() if vdi.sr == sr)

    async def _operation(self, scope: Scope, receive: Receive) -> tuple[tuple[str, list[Vdi]] | None, Receive]:
        """(operation, the disks it is for) of a request, or None, and what gives its body to whoever comes next."""
        method, path = scope["method"], scope["raw_path"].decode("ascii", "replace").partition("?")[0]
        if method == "GET" and path == "/v1/vdis" and (sr := QueryParams(scope["query_string"]).get("sr")):
            return next((("scan", [vdi]) for vdi in self._host.all_vdis() if vdi.sr == sr), None), receive
        if method == "DELETE" and (match := re.fullmatch(r"/v1/vdis/([^/]+)", path)):
            return _for_all("delete", [self._find(unquote(match[1]))]), receive
        if method != "POST":
            return None, receive
        if path == "/v1/snapshots":
            body, receive = await _body(receive)
            names = (body or {}).get("vdis")
            known = isinstance(names, list) and all(isinstance(name, str) for name in names)
            return (_for_all("snapshot", [self._find(name) for name in names]) if known else None), receive
        if (match := _ON_VDI.fullmatch(path)) is None:
            return None, receive
        vdi = self._find(unquote(match[1]))
        if vdi is None:
            return None, receive
        if match[2] not in ("revert", "undo", "redo"):
            return (match[2], [vdi]), receive
        body, receive = await _body(receive)
        return (None if body is None or body.get("dry_run") is True else ("revert", self._reverted(vdi, match[2], body))), receive

    def _find(self, name: str) -> Vdi | None:
        """None if there is none, or not only one. What to answer then is for the operation to say: a request that is repeated may name what went
        with the first one."""
        try:
            return self._host.find_vdi(name)[1]
        except (NotFound, Ambiguous):
            return None

    def _reverted(self, vdi: Vdi, mode: str, body: dict[str, Any]) -> list[Vdi]:
        """The disks that a revert, undo or redo is for: not the snapshot that it names."""
        repository = self._host.mounted[vdi.sr].repository
        try:
            if body.get("group") is True:
                found = repository.wishes.group(vdi) if mode == "revert" else repository.history.undo_wishes(vdi, mode, True)
                return [wish.disk for wish in found]
            return [self._host.find_vdi(str(body.get("target") or vdi.snapshot_of or vdi.uuid))[1] if mode == "revert" else vdi]
        except SimsrError:  # what is wrong with it is said by whoever carries it out
            return [vdi]


def _for_all(op: str, vdis: list[Vdi | None]) -> tuple[str, list[Vdi]] | None:
    return None if None in vdis else (op, vdis)


async def _body(receive: Receive) -> tuple[dict[str, Any] | None, Receive]:
    """The JSON object that a request brings ({} without a body, None if it is none), and what receives it once more."""
    messages: list[Message] = []
    parts: list[bytes] = []
    while sum(map(len, parts)) <= TEXT_MAX:
        message = await receive()
        messages.append(message)
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    try:
        body = json.loads(b"".join(parts) or b"{}")
    except (ValueError, RecursionError):
        body = None
    return (body if isinstance(body, dict) else None), again

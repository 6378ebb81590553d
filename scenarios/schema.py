"""The tables of a scenario file, as pydantic models: what may be written, in which form, and what it means.

This is the one description of the format. The loader validates with it, `json_schema` makes of it what editors want, and
docs/scenarios.md is held against it by a test. Values are converted while they are read: durations to nanoseconds, sizes to
bytes, latencies to compiled expressions. What is impossible in combination is found by `scenarios.checks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from scenarios import fields as f
from scenarios.suggest import closest

__all__ = ["Scenario", "Profile", "Phase", "Rule", "Match", "Trigger", "Action", "Share", "Expect", "TABLES", "json_schema"]

Name = Annotated[str, Field(min_length=1, max_length=100)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Command = Annotated[str, Field(min_length=1, max_length=65536, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=1 << 62, strict=True)]


class Table(BaseModel):
    """A table of the file. Unknown keys are errors, with a guess at what was meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            names = {field.alias or name for name, field in cls.model_fields.items()}
            for key in (key for key in data if key not in names):
                raise PydanticCustomError(
                    "unknown_key", "the key {key} is not known", {"key": repr(key), "hint": _hint(str(key), names, cls)}
                )
        return data


def _hint(key: str, names: set[str], table: type[Table]) -> str:
    if near := closest(key, names):
        return f"Did you mean {near!r}?"
    for other, title in TABLES.items():
        if other is not table and key.replace("-", "_") in {field.alias or name for name, field in other.model_fields.items()}:
            return f"{key!r} belongs into {title}."
    return f"There are: {', '.join(sorted(names))}."


class Match(Table):
    """Which requests a rule looks at. Everything that is given must hold."""

    vdi: f.Globs = Field((), description="names or uuids of disks, with * and ?; default: every disk")
    op: f.Ops = Field((), description="operations; default: what the action is for")
    range: f.ByteRange = Field(None, description="where on the disk the request must touch: 1GiB..2GiB, 25%..30%")
    size: f.SizeRange = Field(None, description="length of the request: 4KiB..64KiB (both included), 64KiB.. or one size")
    fua: bool | None = Field(None, strict=True, description="whether the write asks to be stable when answered (FUA)")
    path: Name | None = Field(None, description="the storage path that the request takes")
    client: f.Clients = Field((), description="tapdisk, qemu, kernel, fuse")


class After(Table):
    """A moment: an event, or the nth request of an operation, counted from the beginning of the phase."""

    event: f.Event = Field(None, description="event:NAME")
    op: f.Ops = Field((), description="operations that count")
    nth: Count = Field(1, description="how many of them")
    vdi: f.Globs = Field((), description="disks that count; default: every disk")


class Trigger(Table):
    """Which of the matching requests the rule fires at. Everything that is given must hold."""

    p: f.Chance = Field(None, description="chance for each request: 0.01 or 1%")
    every: Count | None = Field(None, description="each nth request")
    nth: f.Counts = Field((), description="the nth request, or a list of numbers")
    times: Count | None = Field(None, description="at most so many times")
    skip: f.Skip = Field(None, description="not the first: a number of requests, or a size such as 100MiB")
    when: f.Event = Field(None, description="only after an event: event:pool-full")
    after: After | None = Field(None, description="only from the nth request of an operation on, that one included")
    state: f.Names = Field((), description="only in these states of the disk; every disk begins in 'start'")
    goto: Name | None = Field(None, description="the state of the disk after the rule fired")
    bad_blocks: f.BadBlocks = Field(None, description="share of blocks that are bad, or a list of block numbers")
    block: f.BlockSize = Field(4096, description="size of these blocks")
    grows: f.Grows = Field(None, description="how the share grows: x1.5 per 60s")
    bits: f.Chance = Field(None, description="chance that a byte at rest has a flipped bit")
    per: Literal["byte-at-rest"] | None = Field(None, description="what 'bits' is for; may be left out")


class Torn(Table):
    """A write of which only some sectors are done."""

    sector: f.BlockSize = Field(512, description="a sector is written whole or not at all; 512B if not given")
    keep: Literal["prefix", "suffix", "any"] = Field("prefix", description="which sectors are written")


class Misdirect(Table):
    """A request that goes to the wrong place."""

    by: f.Distance = Field(description="how far away, up or down: 64KiB or uniform(4KiB, 1MiB)")


class PowerCut(Table):
    """What a power cut leaves of the writes since the last flush."""

    keep: f.Keep = Field("none", description="none, all, prefix, p=0.5, or a list of write numbers")
    torn: f.SectorSize = Field(None, description="the last write that is kept may be torn at this sector size")
    scope: Name = Field("disk", description="disk, host, or group:NAME")
    order: Literal["completion", "any"] = Field("completion", description="in which order writes reached the medium")


class Replay(Table):
    """A recorded trace, as a load or as the source of service times."""

    trace: Name = Field(description="the file")
    format: Name | None = Field(None, description="its format; default: found out")
    as_: Literal["workload", "latency"] = Field(alias="as", description="requests to make, or service times to give")
    speed: float = Field(1.0, gt=0, le=1e6, description="2.0: twice as fast (workload)")
    start: f.Duration = Field(0, description="where in the trace to begin")
    loop: bool = Field(False, strict=True, description="begin again at the end")
    fit: Literal["wrap", "scale", "skip"] = Field("wrap", description="offsets beyond the disk (workload)")
    on: Literal["scratch", "disk"] = Field("scratch", description="where a workload writes: a scratch disk, or the disk")
    bucket: f.Buckets = Field(("op", "size"), description="what must be alike: op, size, depth (latency)")
    device: Name | None = Field(None, description="which disk of a trace with several")


class Action(Table):
    """What happens. Several actions of one rule happen together."""

    delay: f.DelayText = Field(
        None, description="a latency; with + added to the disk's, with * multiplying it, else in its place"
    )
    rate: f.Rate = Field(None, description="bytes a second: 30MB/s")
    iops: Count | None = Field(None, description="requests a second")
    iops_size: f.BlockSize = Field(None, description="larger requests count as several of this size")
    burst: f.BurstText = Field(None, description="on top of the rate: 200MB, or 200MB for 5s")
    depth: Count | None = Field(None, description="requests in service at a time")
    group: f.Names = Field((), description="share rate, iops and depth under this name; kill_daemon: only if these disks, or disks of these groups, are meant")
    error: f.Error = Field(None, description="answer with an error: EIO, ENOSPC, ESHUTDOWN...")
    fault: Annotated[int, Field(ge=1, le=9999, strict=True)] | None = Field(
        None, description="control operations: fail with this fault of SMAPIv1, before anything is done"
    )
    error_as: Literal["error", "hang", "disconnect"] | None = Field(None, description="deliver errors in another way")
    hang: f.HangText = Field(None, description="until-released (or true), until-phase-end, or a duration")
    disconnect: bool = Field(False, strict=True, description="drop the connection")
    path: Name | None = Field(None, description="down, up, flap (of the path in match), or a path's name with 'state'")
    state: f.PathState = Field(None, description="optimized, non-optimized, standby, down: for 'path'")
    up: f.Duration = Field(None, description="flap: how long up")
    down: f.Duration = Field(None, description="flap: how long down")
    inflight: Literal["finish", "hang", "error"] = Field("finish", description="path: what happens to requests under way")
    release: Literal["hang"] | None = Field(None, description="let everything go on that hangs")
    full: f.Full = Field(None, description="true: writes get ENOSPC; now: the pool is full; metadata: its metadata are")
    grow: f.Bytes = Field(None, description="more room for the pool")
    readonly: bool = Field(False, strict=True, description="writes get EPERM")
    torn: f.tabled(Torn, "sector") = Field(None, description="only a part of the write is done: true, 512B or {sector, keep}")
    lose: f.Lose = Field(None, description="acknowledged but not done; with a duration, readers see it after that")
    flip: Annotated[int, Field(ge=1, le=4096, strict=True)] | None = Field(None, description="flip so many bits")
    misdirect: f.tabled(Misdirect, "by") = Field(None, description="to or from another place: {by = ...}")
    stale: bool = Field(False, strict=True, description="a read sees what was there before the last write")
    heal_on_write: bool = Field(False, strict=True, description="bad_blocks: writing makes a block good")
    power_cut: f.tabled(PowerCut, "keep") = Field(None, description="lose what is not flushed")
    power: Literal["on"] | None = Field(None, description="power is back")
    drain: f.Latency = Field(None, description="how long closing and detaching take")
    replay: Replay | None = Field(None, description="replay a trace")
    kill_daemon: f.KillStep = Field(None, description="at-step, or the name of a step: the daemon dies there")
    event: f.EventName = Field(None, description="raise an event that 'when' and 'until' can wait for")


class Rule(Table):
    """Match + trigger + action."""

    name: Name | None = Field(None, description="for counters and logs; made up if not given")
    match: Match = Field(Match(), description="which requests")
    trigger: Trigger = Field(Trigger(), description="which of them")
    action: Action = Field(description="what happens")
    sticks_to: Literal["device", "data"] | None = Field(
        None, description="what a revert does to the damage: device: nothing, data: it goes back with the data"
    )
    persist: bool = Field(False, strict=True, description="goes on when the client that set it is gone")


class Share(Table):
    """Limits that all disks of a group share."""

    group: Name = Field(description="the name under which they are shared")
    bytes: f.Rate = Field(None, description="bytes a second: 30MB/s")
    burst: f.BurstText = Field(None, description="on top of that: 200MB, or 200MB for 5s")
    iops: Count | None = Field(None, description="requests a second")
    iops_size: f.BlockSize = Field(None, description="larger requests count as several of this size")
    depth: Count | None = Field(None, description="requests in service at a time")
    fairness: Literal["none"] = Field("none", description="first come, first served")


class LatencyTable(Table):
    """Latency of each operation; 'all' is for those that are not given."""

    all: f.Latency = None
    read: f.Latency = None
    write: f.Latency = None
    flush: f.Latency = None
    trim: f.Latency = None
    zero: f.Latency = None
    extents: f.Latency = None
    open: f.Latency = None
    close: f.Latency = None


class ControlTable(Table):
    """How long operations of the control plane take."""

    all: f.Latency = None
    attach: f.Latency = None
    detach: f.Latency = None
    snapshot: f.Latency = None
    revert: f.Latency = None
    clone: f.Latency = None
    delete: f.Latency = None
    resize: f.Latency = None
    scan: f.Latency = None


class WhenFull(Table):
    """As dm-thin: writes that need room wait for it, then fail; or fail at once."""

    mode: Literal["queue", "error"] = Field("queue", description="queue or error")
    timeout: f.Duration = Field(60_000_000_000, description="how long they wait")
    then: f.Error = Field("ENOSPC", description="and what they get then")


class MetadataFull(Table):
    """As dm-thin: the pool can be read but not written."""

    mode: Literal["read-only"] = Field("read-only", description="read-only: writes get EIO")
    needs_check: bool = Field(False, strict=True, description="growing the pool does not bring it back")


class Profile(Table):
    """What the disks are like when nothing is wrong."""

    about: str = Field("", description="one sentence")
    base: Name | None = Field(None, description="a profile of the library to start from")
    vdi: f.Globs = Field((), description="which disks; default: every disk")
    latency: LatencyTable = Field(LatencyTable(), description="how long requests take: latency.read = ..., latency.all = ...")
    control: ControlTable = Field(
        ControlTable(), description="how long operations take: control.snapshot = ..., control.all = ..."
    )
    rate: f.Rate = Field(None, description="bytes a second of each disk")
    iops: Count | None = Field(None, description="requests a second of each disk")
    iops_size: f.BlockSize = Field(None, description="larger requests count as several of this size")
    burst: f.BurstText = Field(None, description="on top of the rate: 200MB, or 200MB for 5s")
    depth: Count | None = Field(None, description="requests in service at a time, of each disk")
    share: Share | None = Field(None, description="limits shared by all disks of a group")
    paths: dict[Name, f.PathState] = Field({}, description="storage paths and their states")
    capacity: f.Bytes = Field(None, description="size of the thin pool that the disks live in")
    low_water: f.Bytes = Field(None, description="raise event:pool-low when less is free, once")
    when_full: WhenFull = Field(WhenFull(), description="what happens to writes when the pool is full")
    metadata_full: MetadataFull = Field(MetadataFull(), description="what happens when its metadata are")
    durability: Literal["flush", "each-write"] | None = Field(
        None, description="when a write survives a power cut; default: as the client takes it"
    )


class Phase(Table):
    """A stretch of the timeline."""

    name: Name | None = Field(None, description="for people and logs")
    for_: f.Duration = Field(None, alias="for", description="how long")
    until: f.tabled(After, "event") = Field(None, description="event:NAME, or {op, nth}: until the nth request")
    repeat: f.Repeat = Field(1, description="how often, or 'each step of revert'")
    profile: Name | None = Field(None, description="the profile of all disks during the phase")
    rule: tuple[Rule, ...] = Field((), description="rules in force during the phase: [[phase.rule]]")


class Expect(Table):
    """What must be true in the end."""

    that: Annotated[str, Field(min_length=1, max_length=300)] = Field(description="an expression: client.errors == 0")


class Explore(Table):
    """For the exploration of crash states."""

    size: f.Bytes = Field(64 << 20, description="of the disk; 64MiB if not given")
    prepare: Command | None = Field(None, description="a command before the load; what it writes is there in every state")
    load: Command | None = Field(
        None, description="the command whose writes are explored; or --workload; else what the library's power-cut does to an ext4"
    )
    sector: f.SectorSize = Field(512, description="is written whole or not at all; 512B if not given")
    states: int = Field(200, ge=1, le=100_000, strict=True, description="how many states to look at")
    recover: Command | None = Field(None, description="a command on each state, before it is checked: what a guest does when it starts")
    check: Command = Field(description="a command; {device} is the disk, a file, and {uri} the same over NBD")


class Scenario(Table):
    """A scenario file."""

    simsr: Literal[1] = Field(description="version of the format")
    name: Slug = Field(description="short: small letters, digits, - . _")
    about: str = Field("", description="one sentence")
    seed: int = Field(0, ge=0, lt=1 << 63, strict=True, description="the same seed gives the same faults")
    error_as: Literal["error", "hang", "disconnect"] = Field("error", description="how errors reach the client")
    profile: dict[Name, Profile] = Field({}, description="what disks are like: [profile.NAME]")
    phase: tuple[Phase, ...] = Field((), description="what happens when, in order: [[phase]]")
    rule: tuple[Rule, ...] = Field((), description="rules in force all the time: [[rule]]")
    expect: tuple[Expect, ...] = Field((), description="what must be true in the end: [[expect]]")
    explore: Explore | None = Field(None, description="for exploring crash states: [explore]")


TABLES: dict[type[Table], str] = {
    Scenario: "the top of the file",
    Profile: "[profile.NAME]",
    LatencyTable: "latency of a profile",
    ControlTable: "control of a profile",
    Share: "share of a profile",
    WhenFull: "when_full of a profile",
    MetadataFull: "metadata_full of a profile",
    Phase: "[[phase]]",
    Rule: "[[rule]] or [[phase.rule]]",
    Match: "match",
    Trigger: "trigger",
    After: "after (of a trigger) or until (of a phase)",
    Action: "action",
    Torn: "torn",
    Misdirect: "misdirect",
    PowerCut: "power_cut",
    Replay: "replay",
    Expect: "[[expect]]",
    Explore: "[explore]",
}
"""Every table of the format and where it stands, for hints and for the documentation."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the format, for editors."""
    schema = Scenario.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "simsr scenario"}

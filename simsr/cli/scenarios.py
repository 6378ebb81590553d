"""``simsr scenario`` and ``simsr fault``: make disks slow, wrong or absent, and see what has happened.

Reading a scenario (`check`, `plan`) needs no daemon. `run` stays while the scenario runs, unless it is told not to: when it ends for
whatever reason, nobody hangs any more.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from simsr.cli.client import Client
from simsr.cli.disks import For
from simsr.cli.failures import FileFailure
from simsr.cli.output import complain, print_fields, print_json, print_table, say
from simsr.cli.report_file import check_expectations, page_file, print_expectations, print_report
from simsr.cli.repositories import Json
from simsr.errors import BadRequest, BadScenario

__all__ = ["scenario_commands", "fault_commands", "read_scenario"]

POLL_S = 0.5

TEXT_MAX = 1 << 20  # the daemon takes no more

scenario_commands = typer.Typer(help="Check, run, watch and stop scenarios.")
fault_commands = typer.Typer(help="Add and remove single faults while disks are in use.")

File = Annotated[str, typer.Argument(metavar="FILE", help="A scenario file, or a name of 'simsr scenario list'.")]


def read_scenario(file: str) -> dict[str, Any]:
    """What the API takes: text, source, directory. Raises `FileFailure`, `BadScenario`."""
    if os.sep not in file and not os.path.exists(file) and not file.endswith(".toml"):
        from simsr.daemon.scenario_text import library_text

        return {"text": library_text(file), "source": file, "directory": os.getcwd()}
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(TEXT_MAX + 1)
        if len(text) > TEXT_MAX:  # a disk image, by mistake
            raise BadScenario(source=file, where="its text", reason=f"it is longer than {TEXT_MAX} characters")
    except OSError as error:
        raise FileFailure(action="read", path=file, reason=error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise BadScenario(source=file, where="its text", reason="it is not UTF-8") from None
    return {"text": text, "source": file, "directory": os.path.dirname(os.path.abspath(file))}


@scenario_commands.command("check")
def check(context: typer.Context, file: File, as_json: Json = False) -> None:
    """Say whether a scenario makes sense, and what each kind of client would make of it.

    Exit status 40 if it does not; warnings for clients do not count.
    """
    from simsr.daemon.scenario_text import check_text

    found = check_text(**read_scenario(file))
    if as_json:
        return print_json(found)
    say(f"{file}: {found['name']} is good.")
    for client, problems in found["clients"].items():
        for problem in problems:
            hint = f" {problem['hint']}" if problem["hint"] else ""
            complain(f"{problem['level']} for {client}: {problem['where']}: {problem['reason']}.{hint}")


@scenario_commands.command("plan")
def plan(context: typer.Context, file: File, as_json: Json = False) -> None:
    """Show the timeline of a scenario as a table."""
    from simsr.daemon.scenario_text import plan_of

    found = plan_of(**read_scenario(file))
    if as_json:
        return print_json(found)
    print_fields(
        [("name", found["name"]), ("about", found["about"]), ("seed", found["seed"]), ("profiles", ", ".join(found["profiles"]))]
    )
    rows = [("", "always", "", rule["name"], _words(rule)) for rule in found["rules"]]
    for phase in found["phases"]:
        length = " ".join(filter(None, (phase["for"], f"until {phase['until']}" if phase["until"] else "")))
        length += f" x{phase['repeat']}" if isinstance(phase["repeat"], int) and phase["repeat"] != 1 else ""
        length += f", each step of {phase['repeat']}" if isinstance(phase["repeat"], str) else ""
        head = (_at(phase["begins_s"]), phase["name"], length or "to the end")
        rules = phase["rules"] or [None]
        for number, rule in enumerate(rules):
            cells = head if number == 0 else ("", "", "")
            rows.append((*cells, rule["name"] if rule else "", _words(rule) if rule else "as the profile is"))
    print()
    print_table(("AT", "PHASE", "FOR", "RULE", "WHAT"), rows)
    for line in found["expect"]:
        say(f"expects: {line}")


def _at(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:g}s"


def _words(rule: dict[str, Any]) -> str:
    parts = []
    for part in ("match", "trigger", "action"):
        words = [f"{key}={_word(value)}" for key, value in rule[part].items()]
        if words:
            parts.append(f"{part} {' '.join(words)}")
    return "; ".join(parts)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_word, value))
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}={_word(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


@scenario_commands.command("list")
def list_library(context: typer.Context, as_json: Json = False) -> None:
    """List the scenarios and profiles that come with simsr."""
    from simsr.daemon.scenario_text import library_plans

    found = library_plans()
    if as_json:
        return print_json(found)
    print_table(("NAME", "WHAT"), [(one["name"], one["about"]) for one in found])


@scenario_commands.command("schema")
def schema(context: typer.Context) -> None:
    """Print the JSON Schema of scenario files, for editors."""
    from simsr.daemon.scenario_text import json_schema

    print_json(json_schema())


@scenario_commands.command("run")
def run(
    context: typer.Context,
    file: File,
    seed: Annotated[Optional[int], typer.Option("--seed", metavar="N", help="Instead of the seed of the file.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Come back when it is in force; it then runs by itself.")] = False,
    for_s: For = None,
    step: Annotated[Optional[str], typer.Option("--step", metavar="STEP", help="Where kill_daemon at-step kills.")] = None,
    out: Annotated[Optional[str], typer.Option("--report", metavar="FILE", help="Write a page about the run in the end.")] = None,
    as_json: Json = False,
) -> None:
    """Put a scenario in force on the disks of the daemon, and stop it when its phases are over.

    Without --detach the command stays and tells which phase it is in; Ctrl-C stops the scenario. Exit status 1 if it does not go as expected.
    """
    client: Client = context.obj.client
    if detach and out is not None:
        raise BadRequest(what="--report with --detach", reason="the run goes on when the command has ended")
    if detach and for_s is not None:
        raise BadRequest(what="--for with --detach", reason="nobody would be there to stop it; 'simsr scenario stop' does")
    with page_file(out) as write:
        _run(client, {**read_scenario(file), "seed": seed, "step": step}, detach, for_s, out and write, as_json)


def _run(
    client: Client, body: dict[str, Any], detach: bool, for_s: float | None, write: Callable[[dict[str, Any]], None] | None, as_json: bool
) -> None:
    started = client.post("/v1/scenario", body)
    _warn(started)
    if detach:
        return print_json(started) if as_json else say(f"{started['scenario']} is in force, seed {started['seed']}.")
    if not as_json:
        say(f"{started['scenario']} is in force, seed {started['seed']}; Ctrl-C stops it.")
    ended: Any = None
    try:
        with client.stream("POST", "/v1/scenario/hold") as phases:
            _follow(phases, for_s, quiet=as_json)
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            ended = client.delete("/v1/scenario")
            if write is not None:
                write(client.get("/v1/scenario/report"))
    print_json(ended) if as_json else _print_status(ended)
    check_expectations(ended)


def _warn(answer: dict[str, Any]) -> None:
    for warning in answer["warnings"]:
        complain(f"warning: {warning}")
    if answer.get("under_way"):
        complain(f"warning: {answer['under_way']} requests that came before the rule are still being answered")


def _follow(phases: Any, for_s: float | None, quiet: bool) -> None:
    began, last = time.monotonic(), None
    for phase in phases:
        if phase != last and phase and not quiet:
            say(f"{time.monotonic() - began:7.1f} s  {phase}")
            sys.stdout.flush()
        last = phase
        if for_s is not None and time.monotonic() - began >= for_s:
            return


@scenario_commands.command("status")
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show what is in force, how often each rule has hit, and what lies on the disks."""
    client: Client = context.obj.client
    found = client.get("/v1/scenario")
    print_json(found) if as_json else _print_status(found)


def _print_status(found: dict[str, Any]) -> None:
    timeline = found["timeline"]
    print_fields(
        [
            ("scenario", found["scenario"]),
            ("seed", found["seed"]),
            ("phase", timeline.get("phase") or ("over" if found["is_over"] else "")),
            ("age", f"{found['age_s']:.1f} s"),
            ("requests decided", found["decided"]),
            ("hanging now", found["hung"]),
            ("power cuts", found["power_cuts"]),
            ("events", ", ".join(found["events"])),
        ]
    )
    if found["rules"]:
        print()
        rows = [(rule["rule"], rule["matched"], rule["hits"], "yes" if rule["in_force"] else "no") for rule in found["rules"]]
        print_table(("RULE", "MATCHED", "HITS", "IN FORCE"), rows, right="MATCHED HITS")
    if found["disks"]:
        print()
        rows = [
            (disk["vdi"], sum(disk["requests"].values()), disk["overlay"]["data"]["bytes"] + disk["overlay"]["device"]["bytes"])
            for disk in found["disks"]
        ]
        print_table(("VDI", "REQUESTS", "DAMAGED_BYTES"), rows, right="REQUESTS DAMAGED_BYTES")
    print_expectations(found["expectations"])


@scenario_commands.command("report")
def report(
    context: typer.Context,
    out: Annotated[Optional[str], typer.Option("--out", metavar="FILE", help="Write it as a page: FILE.html.")] = None,
    as_json: Json = False,
) -> None:
    """Show what has happened in the scenario that runs, or in the last one: expectations, latencies; with --out a page with pictures."""
    client: Client = context.obj.client
    with page_file(out) as write:
        found = client.get("/v1/scenario/report")
        write(found)
    if as_json:
        print_json(found)
    elif out is None:
        print_report(found)
    else:
        say(f"The report of {found['scenario']} is in {out}.")


@scenario_commands.command("stop")
def stop(context: typer.Context, as_json: Json = False) -> None:
    """End the scenario; when this comes back nothing of it is in force any more."""
    client: Client = context.obj.client
    ended = client.delete("/v1/scenario")
    print_json(ended) if as_json else _print_status(ended)


# Faults.


@fault_commands.command("add")
def add(
    context: typer.Context,
    vdi: Annotated[Optional[list[str]], typer.Option("--vdi", metavar="VDI", help="Uuid or name, * for any; again for more.")] = None,
    op: Annotated[Optional[list[str]], typer.Option("--op", metavar="OP", help="read, write, flush, snapshot...; again for more.")] = None,
    area: Annotated[Optional[str], typer.Option("--range", metavar="A..B", help="Where on the disk: 1GiB..2GiB, 25%..30%.")] = None,
    p: Annotated[Optional[str], typer.Option("--p", metavar="P", help="Chance for each request: 0.01 or 1%.")] = None,
    every: Annotated[Optional[int], typer.Option("--every", metavar="N", help="Each Nth request.")] = None,
    nth: Annotated[Optional[int], typer.Option("--nth", metavar="N", help="The Nth request.")] = None,
    times: Annotated[Optional[int], typer.Option("--times", metavar="N", help="At most N times.")] = None,
    delay: Annotated[Optional[str], typer.Option("--delay", metavar="LATENCY", help="3ms, '+ exp(mean=5ms)', '* 2'...")] = None,
    error: Annotated[Optional[str], typer.Option("--error", metavar="ERRNO", help="EIO, ENOSPC, ...")] = None,
    hang: Annotated[Optional[str], typer.Option("--hang", metavar="HOW", help="until-released, or a time such as 70s.")] = None,
    rate: Annotated[Optional[str], typer.Option("--rate", metavar="RATE", help="30MB/s")] = None,
    iops: Annotated[Optional[int], typer.Option("--iops", metavar="N", help="Requests a second.")] = None,
    disconnect: Annotated[bool, typer.Option("--disconnect", help="Drop the connection.")] = False,
    rule: Annotated[
        Optional[str], typer.Option("--rule", metavar="TOML", help="The rest of a rule: 'action = { torn = true }'.")
    ] = None,
    name: Annotated[Optional[str], typer.Option("--name", metavar="N", help="To remove it by; made up if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Put one rule in force on the running daemon and print its name.

    When this comes back every request from then on meets the rule.
    """
    match = {"vdi": vdi or None, "op": op or None, "range": area}
    trigger = {"p": p, "every": every, "nth": nth, "times": times}
    action = {
        "delay": delay, "error": error, "hang": hang, "rate": rate, "iops": iops, "disconnect": disconnect or None,
    }  # fmt: skip
    body = _merged(rule, {"match": match, "trigger": trigger, "action": action})
    client: Client = context.obj.client
    answer = client.post("/v1/faults", {"rule": body, "name": name})
    _warn(answer)
    print_json(answer) if as_json else print(answer["rule"])


def _merged(text: str | None, given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rule that TOML and options make together. Raises `BadScenario`."""
    body: dict[str, Any] = {}
    if text is not None:
        import tomllib

        try:
            body = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BadScenario(source="--rule", where="its text", reason=f"not TOML: {error}") from None
    for part, values in given.items():
        values = {key: value for key, value in values.items() if value is not None}
        inner = body.get(part, {})
        if not isinstance(inner, dict):
            raise BadScenario(source="--rule", where=part, reason="must be a table")
        if values or part in body or part == "action":
            body[part] = {**inner, **values}
    return body


@fault_commands.command("list")
def list_faults(context: typer.Context, as_json: Json = False) -> None:
    """List the rules in force."""
    client: Client = context.obj.client
    found = client.get("/v1/faults")
    if as_json:
        return print_json(found)
    print_table(("RULE", "MATCHED", "HITS"), [(one["rule"], one["matched"], one["hits"]) for one in found], right="MATCHED HITS")


@fault_commands.command("remove")
def remove(context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="As 'fault list' shows it.")]) -> None:
    """Take a rule out of force; what hangs because of it goes on."""
    client: Client = context.obj.client
    client.delete(client.path_of("faults", name))
    say(f"{name} is no longer in force.")


@fault_commands.command("reset")
def reset(context: typer.Context) -> None:
    """End all rules and phases, heal all damage, let everybody go on."""
    client: Client = context.obj.client
    client.post("/v1/faults-reset", {})
    say("No fault is in force any more.")


@fault_commands.command("heal")
def heal(
    context: typer.Context,
    vdis: Annotated[Optional[list[str]], typer.Argument(metavar="[VDI]...", help="Default: all.")] = None,
    permanent: Annotated[
        bool, typer.Option("--permanent", "--make-permanent", help="Write the damage into the disks, so that it stays, before it is forgotten.")
    ] = False,
) -> None:
    """Take the damage away from disks: torn, lost, misdirected and rotten data, bad blocks."""
    client: Client = context.obj.client
    answer = client.post("/v1/faults-heal", {"vdis": vdis or None, "permanent": permanent})
    what = "are as they looked, for good" if permanent else "show again what was written"
    say(f"{len(answer['healed'])} disks {what}.")

"""A driver for tests: SimSR behind a wrapper that notes each call and, when told to, answers something else.

The wrapper is an executable of its own, which also shows that xapi runs any driver. ``plan.json`` beside it has for a command the
list of what its next calls get: null is SimSR's answer, a number is a fault, text is the answer's value, {"signal": 9} and
{"exit": 1} end the process, {"raw": "..."} is printed as it is, {"sleep": 1} delays SimSR's answer. Every call is a line in ``calls.jsonl``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xapi_kit import SIMSR_PLUGIN, World

_TEXT = r"""#!/usr/bin/python3
import fcntl, json, os, re, subprocess, sys, time
HERE = os.path.dirname(os.path.abspath(__file__))
DROPPED, ADDED, REAL = %(dropped)r, %(added)r, %(real)r
request = sys.argv[-1]
command = re.search("<methodName>(.*?)</methodName>", request).group(1)
with open(os.path.join(HERE, "lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(os.path.join(HERE, "calls.jsonl"), "a") as calls:
        calls.write(json.dumps({"command": command, "argc": len(sys.argv), "environment": dict(os.environ), "request": request,
                                "stdin": sys.stdin.read()}) + "\n")
    path = os.path.join(HERE, "plan.json")
    plan = json.load(open(path)) if os.path.exists(path) else {}
    step = plan.get(command, [])[:1]
    plan[command] = plan.get(command, [])[1:]
    with open(path, "w") as file:
        json.dump(plan, file)
step = step[0] if step else None
def answer(text):
    sys.stdout.write(text)
    sys.exit(0)
if isinstance(step, int):
    answer("<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>%%d</int></value></member><member>"
           "<name>faultString</name><value>as planned</value></member></struct></value></fault></methodResponse>" %% step)
if isinstance(step, str):
    answer("<methodResponse><params><param>%%s</param></params></methodResponse>" %% step)
if isinstance(step, dict) and "sleep" in step:
    time.sleep(step["sleep"])
elif isinstance(step, dict):
    if "raw" in step:
        answer(step["raw"])
    sys.stdout.write("said before")
    sys.stderr.write("complained before")
    sys.stdout.flush()
    sys.stderr.flush()
    if "signal" in step:
        os.kill(os.getpid(), step["signal"])
    sys.exit(step["exit"])
done = subprocess.run([REAL, request], stdout=subprocess.PIPE).stdout.decode()
if command == "sr_get_driver_info":
    for name in DROPPED:
        done = done.replace("<value><string>%%s</string></value>" %% name, "")
    for name in ADDED:
        done = done.replace("<value><string>VDI_CREATE</string></value>", "<value>%%s</value><value>VDI_CREATE</value>" %% name)
sys.stdout.write(done)
"""


def wrapped(*, without: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> str:
    """Return the text of a driver like SimSR, with these capabilities taken away or added."""
    return _TEXT % {"dropped": list(without), "added": list(added), "real": str(SIMSR_PLUGIN)}


class Plan:
    """What the wrapped drivers of a world do next, and what they were asked."""

    def __init__(self, world: World) -> None:
        self._folder = world.folder / "sm"

    def set(self, **steps: list[Any]) -> None:
        """Plan for the commands named; the plan there was is gone."""
        (self._folder / "plan.json").write_text(json.dumps(steps))

    def forget_calls(self) -> None:
        (self._folder / "calls.jsonl").write_text("")

    def calls(self) -> list[dict[str, Any]]:
        path: Path = self._folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def commands(self) -> list[str]:
        return [call["command"] for call in self.calls()]

"""A driver for tests: SimSR behind a wrapper that notes each call and, when told to, answers something else.

The wrapper is an executable of its own, which also shows that xapi runs any driver. ``plan.json`` beside it has for a command the
list of what its next calls get: null is SimSR's answer, a number is a fault, text is the answer's value, {"signal": 9} and
{"exit": 1} end the process, {"raw": "..."} is printed as it is. Before SimSR's answer, {"hold": true} waits for `Plan.release`, {"together": 4}
until so many calls wait, {"kill": "simsrd"} or "xapi" kills that server; {"kill_after": ...} does it once SimSR has done its work.
Every call is a line in ``calls.txt``. Without a plan the wrapper costs next to nothing: it becomes SimSR.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from xapi_kit import SIMSR_PLUGIN, World

_TEXT = r"""#!/usr/bin/python3 -IS
import os, sys
HERE = os.path.dirname(os.path.abspath(__file__))
DROPPED, ADDED, REAL = %(dropped)r, %(added)r, %(real)r
request = sys.argv[-1]
command = request.partition("<methodName>")[2].partition("<")[0]
calls = os.open(os.path.join(HERE, "calls.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
line = {"command": command, "argc": len(sys.argv), "environment": dict(os.environ), "request": request, "stdin": sys.stdin.read()}
os.write(calls, (repr(line) + "\n").encode())
os.close(calls)
path = os.path.join(HERE, "plan.json")
if not os.path.exists(path) and command != "sr_get_driver_info":
    os.execv(REAL, [REAL, request])
import fcntl, json, subprocess, time
with open(os.path.join(HERE, "lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    plan = json.load(open(path)) if os.path.exists(path) else {}
    step = plan.get(command, [])[:1]
    plan[command] = plan.get(command, [])[1:]
    with open(path + ".new", "w") as file:
        json.dump(plan, file)
    os.rename(path + ".new", path) if any(plan.values()) else os.path.exists(path) and os.unlink(path)
step = step[0] if step else None
def answer(text):
    sys.stdout.write(text)
    sys.exit(0)
def kill(name):
    pid = int(open(os.path.join(HERE, "..", name + ".pid")).read())
    os.kill(pid, 9)
if isinstance(step, int):
    answer("<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>%%d</int></value></member><member>"
           "<name>faultString</name><value>as planned</value></member></struct></value></fault></methodResponse>" %% step)
if isinstance(step, str):
    answer("<methodResponse><params><param>%%s</param></params></methodResponse>" %% step)
step = step or {}
if "raw" in step:
    answer(step["raw"])
if "signal" in step or "exit" in step:
    sys.stdout.write("said before")
    sys.stderr.write("complained before")
    sys.stdout.flush()
    sys.stderr.flush()
    if "signal" in step:
        os.kill(os.getpid(), step["signal"])
    sys.exit(step["exit"])
def wait_until(true):
    give_up = time.monotonic() + 120
    while not true():
        if time.monotonic() > give_up:
            sys.exit(1)
        time.sleep(0.02)
if "hold" in step:
    wait_until(lambda: os.path.exists(os.path.join(HERE, "released")))
if "kill" in step:
    kill(step["kill"])
if "together" in step:
    open(os.path.join(HERE, "waits.%%d" %% os.getpid()), "w").close()
    wait_until(lambda: sum(name.startswith("waits.") for name in os.listdir(HERE)) >= step["together"])
done = subprocess.run([REAL, request], stdout=subprocess.PIPE).stdout.decode()
if "kill_after" in step:
    kill(step["kill_after"])
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
        (self._folder / "released").unlink(missing_ok=True)
        path = self._folder / "plan.json"
        if steps:
            path.write_text(json.dumps(steps))
        else:
            path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let those go on that were told to "hold", and all that will be until the next plan."""
        (self._folder / "released").touch()

    def forget_calls(self) -> None:
        (self._folder / "calls.txt").write_text("")

    def calls(self) -> list[dict[str, Any]]:
        """What the drivers were asked, in order. Complete lines only: one may be being written."""
        text = (self._folder / "calls.txt").read_text()
        return [ast.literal_eval(line) for line in text.split("\n")[:-1]]

    def commands(self) -> list[str]:
        return [call["command"] for call in self.calls()]

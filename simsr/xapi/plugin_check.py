"""Checking a SMAPIv1 plug-in against the checklist: every point in turn, each ok, not ok with the reason, or not checked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import trio

from simsr.errors import SimsrError
from simsr.xapi.failure import Unimplemented, XenError
from simsr.xapi.plugin_points import POINTS, NotChecked, Point, Subjects
from simsr.xapi.plugin_trial import Trial, Wrong, fault_number, on_trial

__all__ = ["Finding", "check_plugin"]


@dataclass(frozen=True)
class Finding:
    """What a point came to. ``ok`` is None if it was not checked; ``reason`` says why, or what is wrong."""

    number: str
    text: str
    ok: bool | None
    reason: str

    def describe(self) -> dict[str, Any]:
        """It, as JSON has it."""
        return asdict(self)


def check_plugin(
    path: str, daemon_socket: str, report: Callable[[Finding], None] = lambda _: None, points: Sequence[Point] = POINTS
) -> list[Finding]:
    """Run ``points`` on the plug-in at ``path``, which is told to use the simsrd at ``daemon_socket``.

    ``report`` hears of each as it is known. Takes about a hundred processes of the plug-in, and leaves an SR with some disks behind.
    """
    with tempfile.TemporaryDirectory(prefix="simsr-", dir="/tmp") as folder:
        return trio.run(_check, path, folder, daemon_socket, report, points)


async def _check(
    path: str, folder: str, daemon_socket: str, report: Callable[[Finding], None], points: Sequence[Point]
) -> list[Finding]:
    findings = []
    async with on_trial(path, folder, daemon_socket) as trial:
        subjects = Subjects(trial)
        for point in points:
            finding = await _judge(point, trial, subjects)
            report(finding)
            findings.append(finding)
    return findings


async def _judge(point: Point, trial: Trial, subjects: Subjects) -> Finding:
    missing = [name for name in point.needs if not trial.can(name)]
    if missing:
        reason = "its capabilities are not known, see above" if trial.capabilities is None else f"it does not advertise {', '.join(missing)}"
        return Finding(point.number, point.text, None, reason)
    try:
        reason = await point.check(subjects)
        return Finding(point.number, point.text, None if reason else True, reason or "")
    except NotChecked as error:
        return Finding(point.number, point.text, None, str(error))
    except Unimplemented as error:
        return Finding(point.number, point.text, False, f"fault 38: {error}")
    except XenError as error:
        reason = "fault 38" if fault_number(error) == 38 else " ".join(str(error).split())[:500]
        return Finding(point.number, point.text, False, reason)
    except (Wrong, SimsrError) as error:
        return Finding(point.number, point.text, False, str(error))

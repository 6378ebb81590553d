"""The one hierarchy of errors that simsr reports to its users.

The docstring of a class is its message template; keyword arguments fill it in and stay available as
``details``. Class attributes say how each face of simsr shows the error: the exit status of the command line,
the errno of an NBD reply, the fault number of a SMAPIv1 answer (``spec: sm's error table``), the XenAPI code and
the HTTP status. ``hint`` tells the reader what to do next; who raises an error may know better than its class.

Fault 38 means "not supported, nothing was touched" and only that: xapi answers it by destroying the disk and
cloning the snapshot, so no run-time failure may ever carry it.
"""

from __future__ import annotations

import errno

__all__ = [
    "SimsrError",
    "BadRequest",
    "BadSize",
    "NotFound",
    "Ambiguous",
    "WhichSr",
    "SrExists",
    "SrNotEmpty",
    "SrInUse",
    "VdiExists",
    "VdiInUse",
    "VdiReadOnly",
    "NotASnapshot",
    "SnapshotOfOther",
    "ShrinkRefused",
    "AmbiguousTip",
    "TipExpired",
    "NothingToUndo",
    "GroupChanged",
    "AmbiguousGroup",
    "NoTip",
    "NoVmSnapshots",
    "WouldLose",
    "Unsupported",
    "NoSpace",
    "WrongKind",
    "NoCbt",
    "NoChangedBlocks",
    "CbtSizes",
    "NotAllowed",
    "TooLarge",
    "StoreError",
    "StoreDamaged",
    "StoreFormat",
    "StoreLocked",
    "StoreStopped",
    "BlockDamaged",
    "DaemonUnreachable",
    "BadScenario",
    "BadTrace",
    "ScenarioRunning",
    "DaemonStopping",
    "NoScenario",
    "InjectedFault",
    "CannotExplore",
    "RecordingRunning",
    "ReplayUnfaithful",
    "UnknownPersonality",
    "SnapshotChainTooLong",
    "InstallRefused",
    "MountFailed",
    "MountBusy",
]


class SimsrError(Exception):
    """simsr failed: {reason}"""

    exit_code = 1
    nbd_errno = errno.EIO
    sm_fault = 202
    xenapi_code = "SR_BACKEND_FAILURE_202"
    http_status = 500
    hint = ""

    def __init__(self, *, hint: str = "", **details: object) -> None:
        self.details = details
        self.hint = hint or self.hint
        message = " ".join((type(self).__doc__ or "").split())
        super().__init__(message.format(**details))

    @property
    def code(self) -> str:
        """The class name, which is the stable name of the error in JSON answers."""
        return type(self).__name__


class BadRequest(SimsrError):
    """{what} is not valid: {reason}"""

    exit_code = 2
    nbd_errno = errno.EINVAL
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 400


class BadSize(BadRequest):
    """size {size!r} is not valid: {reason}"""

    sm_fault = 79
    xenapi_code = "SR_BACKEND_FAILURE_79"
    hint = "Give a size such as 10GiB, 512MiB or a number of bytes."


class NotFound(SimsrError):
    """no {kind} is called {name!r}"""

    exit_code = 10
    nbd_errno = errno.ENOENT
    sm_fault = 144
    xenapi_code = "VDI_MISSING"
    http_status = 404
    hint = "List what there is with 'simsr vdi list' or 'simsr sr list'."

    def __init__(self, **details: object) -> None:
        super().__init__(**details)
        self.hint = _WHERE_TO_LOOK.get(str(details.get("kind")), self.hint)


_WHERE_TO_LOOK = {
    "API path": "docs/api.md and /openapi.json list what there is.",
    "mount": "List what there is with 'simsr mounts'.",
    "replay": "List what there is with GET /v1/replays.",
    "rule in force": "List what there is with 'simsr fault list'.",
}


class Ambiguous(SimsrError):
    """{name!r} can mean more than one {kind}: {candidates}"""

    exit_code = 11
    nbd_errno = errno.ENOENT
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 409
    hint = "Use the uuid, or more of it."


class WhichSr(Ambiguous):
    """there is more than one SR: {candidates}"""

    exit_code = 23
    hint = "Name the one that is meant, with --sr."


class SrExists(SimsrError):
    """SR {name!r} exists already"""

    exit_code = 12
    nbd_errno = errno.EEXIST
    sm_fault = 42
    xenapi_code = "SR_BACKEND_FAILURE_42"
    http_status = 409
    hint = "Choose another name or uuid, or use the SR that is there."


class SrNotEmpty(SimsrError):
    """SR {name!r} still holds {count} VDIs"""

    exit_code = 13
    nbd_errno = errno.EBUSY
    sm_fault = 39
    xenapi_code = "SR_NOT_EMPTY"
    http_status = 409
    hint = "Delete its VDIs first."


class SrInUse(SimsrError):
    """SR {name!r} is in use: {by}"""

    exit_code = 14
    nbd_errno = errno.EBUSY
    sm_fault = 16
    xenapi_code = "SR_DEVICE_IN_USE"
    http_status = 409
    hint = "Detach its VDIs first."


class VdiExists(SimsrError):
    """VDI {uuid} exists already"""

    exit_code = 15
    nbd_errno = errno.EEXIST
    sm_fault = 43
    xenapi_code = "SR_BACKEND_FAILURE_43"
    http_status = 409
    hint = "Leave the uuid out to get a fresh one."


class VdiInUse(SimsrError):
    """cannot {operation} VDI {uuid}: attached by {by}"""

    exit_code = 16
    nbd_errno = errno.EBUSY
    sm_fault = 24
    xenapi_code = "VDI_IN_USE"
    http_status = 409
    hint = "Detach it (disconnect its NBD clients) and try again."


class VdiReadOnly(SimsrError):
    """VDI {uuid} is read-only"""

    exit_code = 17
    nbd_errno = errno.EPERM
    sm_fault = 46
    xenapi_code = "SR_BACKEND_FAILURE_46"
    http_status = 409
    hint = "Clone it to get a disk that can be written."


class NotASnapshot(SimsrError):
    """VDI {uuid} is not a snapshot"""

    exit_code = 18
    nbd_errno = errno.EINVAL
    sm_fault = 1
    xenapi_code = "REVERT_ONLY_ALLOWED_ON_SNAPSHOT"
    http_status = 409
    hint = "Name the snapshot to go back to; the disk is the one it was taken of."


class SnapshotOfOther(SimsrError):
    """VDI {snapshot} is a snapshot of {origin}, not of {target}"""

    exit_code = 19
    nbd_errno = errno.EINVAL
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 409
    hint = "Revert the disk that the snapshot was taken of, or clone the snapshot."


class ShrinkRefused(BadSize):
    """cannot shrink VDI {uuid} from {old_bytes} to {size} bytes"""

    exit_code = 20
    http_status = 409
    hint = "Disks only grow. Create a smaller disk and copy what you need."


class AmbiguousTip(Ambiguous):
    """{name} has more than one tip: {candidates}"""

    exit_code = 60
    hint = "Name the tip to follow; 'simsr tree' shows what each hangs from."


class AmbiguousGroup(Ambiguous):
    """VM {name} has more than one group of snapshots: {candidates}"""

    exit_code = 39
    hint = "Name one snapshot of the group that is meant, with --group."


class NoTip(NotFound):
    """{name} has no tip to follow"""

    exit_code = 57
    hint = "'simsr tree' shows the tips, and which node each hangs from."


class NoVmSnapshots(NotFound):
    """no snapshots of VM {name} are known"""

    exit_code = 58
    hint = "xapi's plug-in says of which VM it takes snapshots; by hand: 'simsr snapshot DISK... --group vm:UUID'."


class TipExpired(SimsrError):
    """what {operation} of VDI {uuid} would go back to is not kept any more"""

    exit_code = 61
    nbd_errno = errno.ENOENT
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 410
    hint = "Tips are kept for a time and up to a number that 'simsr sr set' says; 'simsr tip pin' keeps one for good."


class NothingToUndo(SimsrError):
    """there is nothing to {operation} for VDI {uuid}"""

    exit_code = 62
    nbd_errno = errno.ENOENT
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 409
    hint = "'simsr tree' shows what was done last; only reverts can be undone, and only an undo redone."


class GroupChanged(SimsrError):
    """the group cannot be changed as one: {reason}"""

    exit_code = 63
    nbd_errno = errno.EBUSY
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 409
    hint = "Look at the disks again ('simsr tree'), then repeat it, or change them one by one."


class WouldLose(SimsrError):
    """{operation} of VDI {uuid} would lose {what}"""

    exit_code = 59
    nbd_errno = errno.EPERM
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 409
    hint = "See what with --dry-run; then say --yes."


class Unsupported(SimsrError):
    """{operation} is not supported: {reason}"""

    exit_code = 21
    nbd_errno = errno.ENOTSUP
    sm_fault = 38
    xenapi_code = "SR_OPERATION_NOT_SUPPORTED"
    http_status = 501


class NoSpace(SimsrError):
    """SR {name!r} has no space left: {reason}"""

    exit_code = 22
    nbd_errno = errno.ENOSPC
    sm_fault = 44
    xenapi_code = "SR_BACKEND_FAILURE_44"
    http_status = 507
    hint = "Delete VDIs or snapshots, or give the host's file system more room."


class WrongKind(SimsrError):
    """cannot {operation} VDI {uuid}: it is {kind}"""

    exit_code = 50
    nbd_errno = errno.EPERM
    sm_fault = 66
    xenapi_code = "VDI_INCOMPATIBLE_TYPE"
    http_status = 409
    hint = "'simsr vdi show' tells what it is; choose a VDI of another kind, or change that first."


class NoCbt(SimsrError):
    """cannot {operation} VDI {uuid}: changed blocks are not tracked for it"""

    exit_code = 51
    nbd_errno = errno.EINVAL
    sm_fault = 460
    xenapi_code = "VDI_NO_CBT_METADATA"
    http_status = 409
    hint = "Enable CBT on the disk first; the snapshots made after that have it, too."


class NoChangedBlocks(SimsrError):
    """changed blocks from VDI {old} to VDI {new} cannot be listed: {reason}"""

    exit_code = 52
    nbd_errno = errno.EINVAL
    sm_fault = 460
    xenapi_code = "SR_BACKEND_FAILURE_460"
    http_status = 409
    hint = "Name a snapshot of the disk, made while CBT was enabled, and then a later one or the disk itself; or copy everything."


class CbtSizes(NoChangedBlocks):
    """changed blocks from VDI {old} to VDI {new} cannot be listed: {reason}"""

    exit_code = 53
    sm_fault = 459
    xenapi_code = "SR_BACKEND_FAILURE_459"
    hint = "The disk was made smaller by a revert. Copy everything once, and go on from there."


class NotAllowed(SimsrError):
    """the request is not allowed: {reason}"""

    exit_code = 54
    nbd_errno = errno.EPERM
    sm_fault = 47
    xenapi_code = "SR_BACKEND_FAILURE_47"
    http_status = 401
    hint = "Send 'Authorization: Bearer TOKEN' with the token in the file that simsrd was given as --token-file."


class TooLarge(BadRequest):
    """{what} is too large: {reason}"""

    http_status = 413


class StoreError(SimsrError):
    """store {path}: {reason}"""

    exit_code = 30
    sm_fault = 200
    xenapi_code = "SR_BACKEND_FAILURE_200"


class StoreDamaged(StoreError):
    """store {path} is damaged: {reason}"""

    exit_code = 31
    hint = "Nothing was changed. Restore the file from a copy; later data is still in the segments after it."


class StoreFormat(StoreError):
    """store {path}: {reason}"""

    exit_code = 32
    hint = "Use the simsr version that wrote it, or create a new SR."


class StoreLocked(StoreError):
    """store {path} is in use by another process"""

    exit_code = 33
    sm_fault = 37
    xenapi_code = "SR_BACKEND_FAILURE_37"
    http_status = 409
    hint = "Stop the other simsrd, or give this one another --root."


class StoreStopped(StoreError):
    """store {path} has stopped after an I/O error: {reason}"""

    exit_code = 34
    hint = "See to the disk below it, then restart simsrd; everything flushed before the error is safe."


class BlockDamaged(StoreError):
    """store {path}: block at byte {offset_bytes} of volume {volume} fails its checksum
    (segment {segment}, offset {segment_offset})"""

    exit_code = 35


class DaemonUnreachable(SimsrError):
    """simsrd cannot be reached at {socket}: {reason}"""

    exit_code = 4
    sm_fault = 47
    xenapi_code = "SR_BACKEND_FAILURE_47"
    http_status = 503
    hint = "Start it with 'simsrd --root DIR', or name its socket in SIMSR_SOCKET."


class BadScenario(BadRequest):
    """scenario {source}, {where}: {reason}"""

    exit_code = 40


class ScenarioRunning(SimsrError):
    """scenario {name!r} is running"""

    exit_code = 42
    http_status = 409
    hint = "End it first: 'simsr scenario stop'."


class DaemonStopping(SimsrError):
    """{what} is not begun: the daemon is stopping"""

    exit_code = 56
    http_status = 503
    hint = "Ask again when it has been started again."


class NoScenario(SimsrError):
    """no scenario is running in {where}"""

    exit_code = 43
    http_status = 409
    hint = "Start one with 'simsr scenario run FILE', or add a single rule with 'simsr fault add'."


class InjectedFault(SimsrError):
    """{operation} of VDI {name} failed as the scenario wants it: {reason}"""

    exit_code = 47
    http_status = 409
    hint = "See 'simsr scenario status'; 'simsr fault reset' ends all faults."

    def __init__(self, *, number: int = errno.EIO, fault: int = 0, **details: object) -> None:
        super().__init__(**details)
        self.nbd_errno = number
        self.sm_fault = fault or _SM_FAULT_OF.get(number, 200)
        self.xenapi_code = f"SR_BACKEND_FAILURE_{self.sm_fault}"


_SM_FAULT_OF = {errno.ENOSPC: 44, errno.EBUSY: 24, errno.ENOENT: 144, errno.ETIMEDOUT: 47, errno.ESHUTDOWN: 47, errno.EINVAL: 1}
"""The fault of SMAPIv1 that says what an errno says; never 38, which would have xapi clone the disk."""


class BadTrace(BadRequest):
    """trace {source}, {where}: {reason}"""

    exit_code = 41
    hint = "Name the right format, or repair or cut the trace there."


class CannotExplore(SimsrError):
    """cannot explore crash states of {what}: {reason}"""

    exit_code = 55
    http_status = 409


class RecordingRunning(SimsrError):
    """VDI {name} is being recorded already"""

    exit_code = 48
    http_status = 409
    hint = "End that first: Ctrl-C where 'simsr record' runs."


class ReplayUnfaithful(SimsrError):
    """the replay of {trace} was not like the trace: {reason}"""

    exit_code = 49
    http_status = 409
    hint = "Replay it slower (--speed), or allow more lag (--max-lag); what failed is in the daemon's log."


class UnknownPersonality(BadRequest):
    """there is no personality {name!r} of SRs"""

    exit_code = 44
    sm_fault = 91
    xenapi_code = "SR_BACKEND_FAILURE_91"


class SnapshotChainTooLong(SimsrError):
    """cannot {operation} VDI {uuid}: its chain has {length} images already, and SRs like {personality} take no more"""

    exit_code = 45
    nbd_errno = errno.ENOSPC
    sm_fault = 109
    xenapi_code = "SR_BACKEND_FAILURE_109"
    http_status = 409
    hint = "Delete snapshots that are not needed; chains of images that nobody else uses are merged."


class InstallRefused(SimsrError):
    """cannot {action} {path}: {reason}"""

    exit_code = 46
    http_status = 409


class MountFailed(SimsrError):
    """cannot mount at {path}: {reason}"""

    exit_code = 36
    sm_fault = 1
    xenapi_code = "SR_BACKEND_FAILURE_1"
    http_status = 409
    hint = "Give an empty directory that exists, on a host where FUSE works (/dev/fuse, fusermount3)."


class MountBusy(SimsrError):
    """cannot unmount {path}: it is in use"""

    exit_code = 37
    nbd_errno = errno.EBUSY
    sm_fault = 24
    xenapi_code = "VDI_IN_USE"
    http_status = 409
    hint = "Close the files and leave the directories below it, or unmount it with --lazy: open files fail then."

"""SMAPIv1: the two documents, and the process between them, exactly as xapi has it.

Theory. One command is one process: argv is the path of the plug-in and the whole request; the environment is two variables;
standard output is the answer; the exit status is 0 even for a fault. Nothing here knows what a command means; the answer comes
back as a tree from which `unit`, `vdi_info`, `attach_info`, `text` or `driver_info` take what xapi would take and no more.

The parser follows xapi, not XML-RPC at large: elements with attributes match nothing, there is no base64 or double, a boolean is
true unless it is ``0``, the unit is ``<nil/>`` and not an empty string.
"""

from __future__ import annotations

import re
import signal
import subprocess
from dataclasses import dataclass, field
from typing import Any

import trio

from simsr.xapi.failure import Unimplemented, XenError, internal_error
from simsr.xapi.wire import escape_markup
from simsr.xapi.xml_tree import Element, NotXml, parse

__all__ = [
    "ENVIRONMENT", "AttachInfo", "DriverInfo", "Plugin", "write_request", "read_answer", "unit", "vdi_info", "attach_info",
    "text", "driver_info", "failed_process",
]  # fmt: skip

ENVIRONMENT = {"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "ORIGINATOR": "SM"}
ARGUMENT_MAX_BYTES = 128 * 1024 - 1  # Linux: MAX_ARG_STRLEN, with the terminating NUL
STDERR_KEPT = 4000
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


# The request.


def write_request(command: str, members: dict[str, Any]) -> str:
    """Return the methodCall for ``command``: one struct, no declaration, no blanks, control characters dropped."""
    struct = "".join(f"<member><name>{key}</name>{_short(value)}</member>" for key, value in members.items())
    return (
        f"<methodCall><methodName>{command}</methodName><params><param><value><struct>{struct}</struct></value></param></params>"
        "</methodCall>"
    )


def _short(value: str | list[str] | dict[str, str]) -> str:
    if isinstance(value, dict):
        members = "".join(f"<member><name>{_text(key)}</name>{_short(item)}</member>" for key, item in value.items())
        return f"<value><struct>{members}</struct></value>" if members else "<value><struct/></value>"
    if isinstance(value, list):
        items = "".join(map(_short, value))
        return f"<value><array><data>{items}</data></array></value>" if items else "<value><array><data/></array></value>"
    return f"<value>{_text(value)}</value>" if value else "<value/>"


def _text(text: str) -> str:
    return escape_markup(_CONTROL.sub("", text))


# The answer.


class _Shape(Exception):
    """The answer is XML of the wrong shape; the argument says where."""


def read_answer(stdout: bytes, stderr: str = "", *, sr: str = "", vdi: str = "") -> Element:
    """Return the value element of the answer. Raises what the plug-in's fault means, `Unimplemented` for 38.

    ``sr`` and ``vdi`` are the references that the command was about, for the errors that name them.
    """
    try:
        root = parse(stdout)
    except (NotXml, IndexError) as error:
        raise XenError("SR_BACKEND_FAILURE", str(error), stdout.decode(errors="replace"), stderr) from None
    try:
        body = _only(root, "methodResponse")
        if body.tag == "fault":
            number, reason = _fault(body)
        else:
            parameters = [child for child in _plain(body, "params").children if not child.has_attributes]
            if len(parameters) != 1:
                raise _Shape
            return _only(parameters[0], "param")
    except _Shape:
        raise internal_error("Unexpected response from SM plugin") from None
    if number == 38:
        raise Unimplemented(reason)
    raise _MEANINGS[number](sr, vdi) if number in _MEANINGS else XenError(f"SR_BACKEND_FAILURE_{number}", "", reason, stderr)


_MEANINGS = {
    39: lambda sr, vdi: XenError("SR_NOT_EMPTY"),
    24: lambda sr, vdi: XenError("VDI_IN_USE"),
    16: lambda sr, vdi: XenError("SR_DEVICE_IN_USE"),
    144: lambda sr, vdi: XenError("VDI_MISSING", sr, vdi),
}


def _plain(element: Element, tag: str) -> Element:
    if element.tag != tag or element.has_attributes:
        raise _Shape(f"expected <{tag}>, found <{element.tag}>")
    return element


def _only(element: Element, tag: str) -> Element:
    """Return the only child of ``element``, which must be a ``tag``."""
    if len(_plain(element, tag).children) != 1:
        raise _Shape(f"<{tag}> does not hold one element")
    return element.children[0]


def _fault(fault: Element) -> tuple[int, str]:
    members = _struct(_only(fault, "fault"))
    try:
        number, reason = members["faultCode"], members["faultString"]
    except KeyError:
        raise _Shape("a fault without faultCode or faultString") from None
    typed = _only(number, "value")
    if typed.tag not in ("int", "i4"):
        raise _Shape("faultCode is no int")
    try:
        return int(typed.text), _string(reason)
    except ValueError:
        raise _Shape("faultCode is no number") from None


def _string(value: Element) -> str:
    _plain(value, "value")
    if not value.children:
        return value.text
    typed = _plain(_only(value, "value"), "string")
    if typed.children:
        raise _Shape("<string> holds elements")
    return typed.text


def _struct(value: Element) -> dict[str, Element]:
    members = {}
    for member in _plain(_only(value, "value"), "struct").children:
        if _plain(member, "member") and [child.tag for child in member.children] != ["name", "value"]:
            raise _Shape("<member> does not hold name and value")
        members[_plain(member.children[0], "name").text] = member.children[1]
    return members


def _array(value: Element) -> list[Element]:
    return _plain(_only(_only(value, "value"), "array"), "data").children


def unit(value: Element) -> None:
    """The answer of a command that returns nothing must be nil."""
    if value.tag != "value" or [child.tag for child in value.children] != ["nil"]:
        raise internal_error("Unexpected response from SM plugin")


def text(value: Element) -> str:
    """Return an answer that is a string."""
    try:
        return _string(value)
    except _Shape:
        raise internal_error("Unexpected response from SM plugin") from None


def _parse_failure(value: Element, reason: str) -> XenError:
    return XenError("SR_BACKEND_FAILURE", "", f"XML parse failure: {_show(value)[:2000]}", reason)


def _show(element: Element) -> str:
    inner = element.text + "".join(map(_show, element.children))
    return f"<{element.tag}>{inner}</{element.tag}>" if inner else f"<{element.tag}/>"


def vdi_info(value: Element) -> tuple[str, str]:
    """Return (uuid, location) of an answer that describes a VDI; all its members must be strings."""
    try:
        members = {name: _string(item) for name, item in _struct(value).items()}
    except _Shape as error:
        raise _parse_failure(value, str(error)) from None
    for name in ("uuid", "location"):
        if name not in members:
            raise _parse_failure(value, f"<struct> missing field: {name}")
    return members["uuid"], members["location"]


@dataclass(frozen=True)
class AttachInfo:
    """Where an attached VDI's data is. ``params`` is a path in dom0, None if there is none."""

    params_nbd: str
    params: str | None = None
    o_direct: bool = True
    o_direct_reason: str = ""
    xenstore_data: dict[str, str] = field(default_factory=dict)


def attach_info(value: Element) -> AttachInfo:
    """Return the answer to vdi_attach. A member of the wrong type counts as absent, except ``params_nbd``."""
    try:
        members = _struct(value)
    except _Shape as error:
        raise _parse_failure(value, str(error)) from None
    if "params_nbd" not in members:
        raise _parse_failure(value, "<struct> missing field: params_nbd")
    try:
        params_nbd = _string(members["params_nbd"])
    except _Shape as error:
        raise _parse_failure(value, str(error)) from None
    found: dict[str, Any] = {}
    for name, read in (("params", _string), ("o_direct", _boolean), ("o_direct_reason", _string), ("xenstore_data", _strings)):
        try:
            found[name] = read(members[name])
        except (KeyError, _Shape):
            continue
    return AttachInfo(params_nbd, **found)


def _boolean(value: Element) -> bool:
    return _plain(_only(value, "value"), "boolean").text.strip() != "0"


def _strings(value: Element) -> dict[str, str]:
    return {name: _string(item) for name, item in _struct(value).items()}


@dataclass(frozen=True)
class DriverInfo:
    """The answer to sr_get_driver_info. ``features`` maps names to versions."""

    name: str
    description: str
    vendor: str
    copyright: str
    driver_version: str
    required_api_version: str
    features: dict[str, int]
    configuration: dict[str, str]


KNOWN_FEATURES = frozenset(
    "SR_PROBE SR_UPDATE SR_ATTACH SR_DETACH SR_SCAN SR_CREATE SR_DELETE SR_SUPPORTS_LOCAL_CACHING SR_METADATA SR_TRIM"
    " SR_MULTIPATH SR_CACHING SR_STATS VDI_CREATE VDI_DELETE VDI_ATTACH VDI_DETACH VDI_ACTIVATE VDI_DEACTIVATE"
    " VDI_ACTIVATE_READONLY VDI_SNAPSHOT VDI_CLONE VDI_REVERT VDI_RESIZE VDI_RESIZE_ONLINE VDI_UPDATE VDI_INTRODUCE"
    " VDI_GENERATE_CONFIG VDI_ATTACH_OFFLINE VDI_MIRROR VDI_MIRROR_IN VDI_COMPOSE VDI_RESET_ON_BOOT VDI_CONFIG_CBT LARGE_VDI"
    " THIN_PROVISIONING VDI_READ_CACHING".split()
)


def driver_info(value: Element) -> DriverInfo:
    """Return what a plug-in says about itself; raises INTERNAL_ERROR if a member is missing."""
    try:
        members = _struct(value)
        words = "name description vendor copyright driver_version required_api_version"
        strings = {name: _string(members[name]) for name in words.split()}
        capabilities = [_string(item) for item in _array(members["capabilities"])]
        described = [_strings(item) for item in _array(members["configuration"])]
        configuration = {entry["key"]: entry["description"] for entry in described}
    except (_Shape, KeyError) as error:
        raise internal_error(f"sr_get_driver_info: {type(error).__name__} {error}") from None
    features = dict(map(_feature, capabilities))
    return DriverInfo(**strings, features={k: v for k, v in features.items() if k in KNOWN_FEATURES}, configuration=configuration)


def _feature(capability: str) -> tuple[str, int]:
    name, _, version = capability.partition("/")
    return name, max(1, int(version)) if re.fullmatch(r"[0-9]{1,9}", version) else 1


# The process.


def failed_process(returncode: int, stdout: str, stderr: str) -> XenError:
    """Return the error for a plug-in that did not end with status 0."""
    if returncode > 0:
        return XenError("SR_BACKEND_FAILURE", "non-zero exit", stdout, stderr)
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = str(-returncode)
    return XenError("SR_BACKEND_FAILURE", f"received signal: {name}", stdout, stderr)


@dataclass(frozen=True)
class Plugin:
    """One plug-in executable."""

    path: str

    async def execute(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run the executable as xapi does, and return what it said. Raises `XenError` if there is no running it."""
        try:
            return await trio.run_process(
                [self.path, *arguments],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        except OSError as error:
            raise XenError("SR_BACKEND_FAILURE", "non-zero exit", "", f"{self.path}: {error.strerror or error}") from None

    async def run(self, command: str, members: dict[str, Any]) -> Element:
        """Run one command and return the value in its answer.

        A command once begun runs to its end, whoever loses patience: a process killed half-way could leave half of a change.
        """
        request = write_request(command, members)
        if len(request.encode()) > ARGUMENT_MAX_BYTES:
            raise XenError("SR_BACKEND_FAILURE", "non-zero exit", "", "the request is too long for an argument of a process")
        with trio.CancelScope(shield=True):
            done = await self.execute(request)
        said = done.stderr.decode(errors="replace")[-STDERR_KEPT:]
        if done.returncode:
            raise failed_process(done.returncode, done.stdout.decode(errors="replace"), said)
        return read_answer(done.stdout, said, sr=members.get("sr_ref", ""), vdi=members.get("vdi_ref", ""))

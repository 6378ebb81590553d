"""The checklist finds what is wrong with a plug-in, and nothing else. The plug-ins are SimSR with something spoilt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from daemon_tools import Simsrd
from xapi_kit import SIMSR_PLUGIN, short_directory

from simsr.xapi.plugin_check import check_plugin
from simsr.xapi.plugin_points import POINTS
from simsr.xapi.plugin_source import source_problem

MAIN = '\nif __name__ == "__main__":\n'


@pytest.fixture(scope="module")
def daemon():
    folder = short_directory()
    with Simsrd(folder / "r") as simsrd:
        yield simsrd
    shutil.rmtree(folder)


def spoilt(folder: Path, text: str) -> str:
    """SimSR with ``text`` in front of its start."""
    plugin = SIMSR_PLUGIN.read_text()
    assert plugin.count(MAIN) == 1
    path = folder / "SpoiltSR"
    path.write_text(plugin.replace(MAIN, f"\n{text}\n{MAIN}"))
    path.chmod(0o755)
    return str(path)


def findings(path: str, daemon: Simsrd, *names: str):
    """{name of the check: finding} of those checks, or all."""
    points = [point for point in POINTS if not names or point.check.__name__ in names]
    assert not names or len(points) == len(names)
    found = check_plugin(path, daemon.socket, points=points)
    return {point.check.__name__: finding for point, finding in zip(points, found, strict=True)}


def wrong(found) -> dict[str, str]:
    return {name: finding.reason for name, finding in found.items() if finding.ok is False}


SPOILT_IN_MANY_WAYS = """
real_answer, real_call, real_arg = answer, XenApi.call, Request.arg
COMMAND = []

def answer(argv):
    try:
        COMMAND.append(Request(argv).command)
    except SmFault:
        sys.exit(1)
    if COMMAND[-1] == "sr_detach":
        os._exit(3)
    if COMMAND[-1] == "vdi_frobnicate":
        return encode(xmlrpc.client.dumps(xmlrpc.client.Fault(143, "what?"), methodresponse=True))
    document = real_answer(argv)
    if COMMAND[-1] == "vdi_clone":
        document = document.replace(b"</struct>", b"<member><name>size</name><value><int>1</int></value></member></struct>")
    if COMMAND[-1] == "sr_update":
        document = document.replace(b"<nil/>", b"<string></string>")
    if COMMAND[-1] == "vdi_revert" and b"<fault>" not in document and not Request(argv).arg(0).startswith("OpaqueRef:"):
        return encode(xmlrpc.client.dumps(xmlrpc.client.Fault(38, "done, but not"), methodresponse=True))
    if COMMAND[-1] == "vdi_revert" and b">144<" in document:
        document = document.replace(b">144<", b">38<")
    return document

def call(self, method, *parameters):
    if (COMMAND[-1], method) in [("vdi_revert", "VDI.remove_from_other_config"), ("vdi_delete", "VDI.db_forget")]:
        return ""
    if COMMAND[-1] == "sr_scan" and method == "VDI.get_all_records_where":
        rows = real_call(self, method, *parameters)
        for ref, row in rows.items():
            real_call(self, "VDI.set_sm_config", ref, {})
        return rows
    return real_call(self, method, *parameters)

XenApi.call = call
"""


def test_defects_are_found_where_they_are(daemon, tmp_path):
    found = findings(
        spoilt(tmp_path, SPOILT_IN_MANY_WAYS), daemon, "found", "garbage", "make_sr", "unknown", "sr_update", "create", "location",
        "attach", "snapshot", "clone", "revert", "content_id", "revert_by_uuid", "revert_refusals", "scan", "sm_config", "delete",
        "detach", "processes",
    )  # fmt: skip
    reasons = wrong(found)
    expected = {
        "garbage": "non-zero exit",
        "unknown": "it is fault 143",
        "sr_update": "Unexpected response from SM plugin",
        "clone": "XML parse failure",
        "content_id": "content_id is still there",
        "revert_by_uuid": "fault 38",
        "revert_refusals": "a disk that is not there: fault 38, for which xapi destroys the disk",
        "scan": "a second scan calls VDI.set_sm_config",
        "sm_config": "changed or went",
        "delete": "its row is still there",
        "detach": "non-zero exit",
        "processes": "exit status 1",
    }
    expected.pop("sm_config")  # it needs a scan that was right
    assert reasons.keys() == expected.keys(), reasons
    for name, text in expected.items():
        assert text in reasons[name], f"{name}: {reasons[name]}"
    assert found["sm_config"].ok is None and "there is no scanned" in found["sm_config"].reason
    assert found["revert"].ok and found["snapshot"].ok and found["attach"].ok


def test_keys_of_hosts_that_are_lost(daemon, tmp_path):
    text = """
real_synchronise = synchronise

def synchronise(api, ref, row, vdi):
    for key in row["sm_config"]:
        api.call("VDI.remove_from_sm_config", ref, key)
    real_synchronise(api, ref, row, vdi)
"""
    found = findings(spoilt(tmp_path, text), daemon, "found", "make_sr", "create", "scan", "sm_config")
    assert wrong(found).keys() == {"sm_config"} and "host_OpaqueRef" in found["sm_config"].reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("del CONFIGURATION\ndef sr_get_driver_info(call):\n    return {'name': 'x'}\nCOMMANDS['sr_get_driver_info'] = sr_get_driver_info",
         {"found": "sr_get_driver_info: KeyError"}),
        ("print('hello')\nos.write(1, b'hello')",
         {"found": "not well-formed", "processes": "sr_get_driver_info: standard output is not one XML document"}),
        ("introduce = lambda *_, **more: NULL_REF", {"create": "it must be introduced before"}),
        ("real_info = vdi_info\nvdi_info = lambda vdi: dict(real_info(vdi), location='elsewhere')", {"create": "but location elsewhere"}),
        ("real = vdi_attach\nCOMMANDS['vdi_attach'] = lambda call: dict(real(call), params_nbd='nbd:/tmp/x')",
         {"attach": "which xapi cannot read"}),
        ("import signal\nreal = vdi_create\nCOMMANDS['vdi_create'] = lambda call: os.kill(os.getpid(), signal.SIGKILL)",
         {"create": "SIGKILL", "processes": "vdi_create: ended by signal 9"}),
    ],
    ids=["driver info", "stdout", "introduce", "location", "params_nbd", "signal"],
)  # fmt: skip
def test_one_defect_each(daemon, tmp_path, text, expected):
    """Of the checks up to the first attachment."""
    names = {"found", "make_sr", "create", "attach", "processes", *expected}
    found = findings(spoilt(tmp_path, text), daemon, *names)
    assert wrong(found).keys() == expected.keys(), wrong(found)
    for name, reason in expected.items():
        assert reason in found[name].reason
    if "create" in expected or "found" in expected:
        assert found["attach"].ok is None and "there is no" in found["attach"].reason, "what it needs is missing"
    if "found" in expected:
        assert found["create"].ok is None and "not known" in found["create"].reason, "nobody can say that it does not advertise it"


def test_fault_38_after_a_change(daemon, tmp_path):
    """A driver without the feature that is asked all the same, and does it before it says no."""
    text = """
CAPABILITIES.remove("VDI_REVERT")
real = vdi_revert

def vdi_revert(call):
    real(call)
    raise SmFault(38, "not supported, now that it is done")

COMMANDS["vdi_revert"] = vdi_revert
"""
    found = findings(spoilt(tmp_path, text), daemon, "found", "make_sr", "create", "attach", "snapshot", "no_revert", "revert")
    assert wrong(found) == {"no_revert": "the disk's data changed all the same"}
    assert found["revert"].ok is None and "does not advertise VDI_REVERT" in found["revert"].reason


def test_what_is_advertised_besides(daemon, tmp_path):
    """Disks that do not forget, a bitmap with its bits the other way round, blocks that are not told after a revert."""
    text = """
import base64
COMMANDS["vdi_epoch_begin"] = vdi_epoch_end
real = vdi_list_changed_blocks

def vdi_list_changed_blocks(call):
    bitmap = base64.b64decode(real(call))
    return base64.b64encode(bytes(int("{:08b}".format(byte)[::-1], 2) for byte in bitmap)).decode()

COMMANDS["vdi_list_changed_blocks"] = vdi_list_changed_blocks
"""
    names = ("found", "observed", "last_argument", "make_sr", "create", "reset_on_boot", "changed_blocks", "revert_and_cbt")
    found = findings(spoilt(tmp_path, text), daemon, *names)
    assert wrong(found).keys() == {"reset_on_boot", "changed_blocks"}
    assert "Pattern verification failed" in found["reset_on_boot"].reason and "the bitmap is 0200010000" in found["changed_blocks"].reason
    assert found["revert_and_cbt"].ok is None and found["observed"].ok
    text = "import dataclasses\nreal = answer\nanswer = lambda argv: real([] if 'runpy' in sys.modules else argv[:2])"
    found = findings(spoilt(tmp_path, text), daemon, "found", "observed", "last_argument", "python")
    assert wrong(found).keys() == {"observed", "last_argument", "python"} and "imports dataclasses" in found["python"].reason


@pytest.mark.parametrize(
    ("text", "problem"),
    [("import dataclasses", "it imports dataclasses, which Python 3.6 does not have"), ("if (n := 1): pass", "Python 3.6 cannot read it"), ("import trio", "it imports trio, which is not of the standard library"),
     ("from importlib.metadata import version", "importlib.metadata"), ("import asyncio\nasyncio.run(f())", "asyncio.run"),
     ("import XenAPI, json", ""), ("x = f'{y}'", "")],
)  # fmt: skip
def test_python_of_a_plugin(tmp_path, text, problem):
    path = tmp_path / "XSR"
    path.write_text(f"#!/usr/bin/python3\n{text}\n")
    assert problem in source_problem(str(path))[0] and bool(problem) == bool(source_problem(str(path))[0])
    path.write_bytes(b"\x7fELF\0")
    assert source_problem(str(path)) == ("", False)

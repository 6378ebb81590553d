"""The processes of the SMAPIv3 plug-in: the tree, the calling convention, hostile parameters, a broken simsrd."""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import tomllib
import types
from pathlib import Path

import pytest

from smapi_kit import SR_UUID
from v3_kit import DATAPATH, TREE, VOLUME, ScriptError, call, finish, script, start

KEY = "2614d96b-112f-4d48-aaf2-1c0860b3ea91"
TOP = Path(__file__).parents[2]
SPECIFIED = {  # the interface's methods that xapi calls
    "volume": "Plugin.Query Plugin.diagnostics SR.probe SR.create SR.attach SR.detach SR.destroy SR.stat SR.ls SR.set_name "
    "SR.set_description Volume.create Volume.snapshot Volume.clone Volume.destroy Volume.revert Volume.stat Volume.set "
    "Volume.unset Volume.set_name Volume.set_description Volume.resize Volume.compare Volume.similar_content "
    "Volume.enable_cbt Volume.disable_cbt Volume.data_destroy Volume.list_changed_blocks Volume.compose",
    "datapath": "Plugin.Query Datapath.open Datapath.attach Datapath.activate Datapath.activate_readonly "
    "Datapath.deactivate Datapath.detach Datapath.close",
}


def scripts(folder):
    return {path.name: path for path in folder.iterdir() if path.suffix != ".py" and path.is_file()}


def failure(process, stdin):
    with pytest.raises(ScriptError) as caught:
        finish(process, stdin)
    return caught.value


@pytest.fixture
def silent_syslog(monkeypatch):
    lines = []
    module = types.SimpleNamespace(LOG_LOCAL2=1, LOG_INFO=2, openlog=lambda *_: None, syslog=lambda _, line: lines.append(line))
    monkeypatch.setitem(sys.modules, "syslog", module)
    return lines


def test_the_tree_has_the_methods():
    for kind, folder in (("volume", VOLUME), ("datapath", DATAPATH)):
        assert set(SPECIFIED[kind].split()) <= scripts(folder).keys()
        lowered = [name.lower() for name in scripts(folder)]
        assert len(set(lowered)) == len(lowered), "xapi-storage-script does not tell names apart by case"


def test_all_scripts_are_the_same_few_lines_and_executable():
    paths = [*scripts(VOLUME).values(), *scripts(DATAPATH).values()]
    (text,) = {path.read_text() for path in paths}
    assert len(text.splitlines()) < 12 and text.startswith("#!/usr/bin/python3\n")
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o111 == 0o111, path


def test_every_method_has_its_script_and_every_script_its_method(monkeypatch):
    monkeypatch.syspath_prepend(str(VOLUME))
    import simsr_common
    import simsr_storage  # noqa: F401

    made = {name for name in simsr_common.METHODS if name != "Datapath.Query"}
    assert made == scripts(VOLUME).keys() | scripts(DATAPATH).keys()


def test_the_package_takes_all_files_along():
    patterns = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["simsr.smapi"]
    taken = {path for pattern in patterns for path in (TOP / "simsr" / "smapi").glob(pattern)}
    assert {path for path in TREE.rglob("*") if path.is_file() and "__pycache__" not in path.parts} <= taken


def test_python_3_6_is_enough(tmp_path):
    pytest.importorskip("vermin")
    stub = tmp_path / "stub.py"
    stub.write_text((VOLUME / "SR.ls").read_text())
    done = subprocess.run([sys.executable, "-c", "import sys, vermin; sys.exit(vermin.main())", "-t=3.6-", "--violations",
                           "--no-tips", str(stub), *map(str, VOLUME.glob("*.py"))], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


def test_query():
    answer = call("Plugin.Query")
    texts = ("plugin", "name", "description", "vendor", "copyright", "version", "required_api_version")
    assert answer.keys() == {*texts, "features", "configuration", "required_cluster_stack"}
    assert all(type(answer[key]) is str and answer[key] for key in texts)
    assert answer["required_api_version"] == "5.0" and VOLUME.name == "org.xen.xapi.storage." + answer["plugin"]
    assert answer["plugin"] == answer["plugin"].lower() and answer["required_cluster_stack"] == []
    assert {"VDI_REVERT", "THIN_PROVISIONING", "LARGE_VDI", "VDI_RESIZE_ONLINE", "VDI_CONFIG_CBT"} <= set(answer["features"])
    assert all(type(text) is str for item in answer["configuration"].items() for text in item)
    assert type(call("Plugin.diagnostics")) is str


def test_a_copy_of_the_tree_needs_nothing_else(tmp_path):
    shutil.copytree(TREE, tmp_path / "root", ignore=shutil.ignore_patterns("__pycache__"))
    for part in (VOLUME, DATAPATH):
        folder = tmp_path / "root" / part.relative_to(TREE)
        command = [str(folder / "Plugin.Query"), "--json"]
        process = subprocess.Popen(command, env={"PATH": "/usr/bin:/bin"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, cwd="/")
        assert finish(process, b'{"dbg": ""}')["required_api_version"] == "5.0"


def test_under_the_observer(tmp_path):
    """With observability on, xapi-storage-script runs ``python3 -m observer SCRIPT --json``."""
    (tmp_path / "observer.py").write_text(
        "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    command = ["/usr/bin/python3", "-m", "observer", str(VOLUME / "Plugin.Query"), "--json"]
    process = start(command, PYTHONPATH=f"{VOLUME}:{tmp_path}", TRACEPARENT="00-1-2-01", OBSERVER_CONFIG_DIR="/none")
    assert finish(process, b'{"dbg": ""}')["plugin"] == "simsr"


def test_a_script_without_its_method(tmp_path):
    shutil.copytree(TREE, tmp_path / "root")
    folder = tmp_path / "root" / VOLUME.relative_to(TREE)
    shutil.copy(folder / "SR.ls", folder / "Volume.explode")
    assert failure(start([str(folder / "Volume.explode"), "--json"]), b"{}").code == "UNIMPLEMENTED_IN_SM_BACKEND"


@pytest.mark.parametrize("stdin", [
    b"", b"x", b"\xff\xfe", b"null", b"[]", b"5", b'"SR.stat"', b"{}", b'{"sr": null}', b'{"sr": ["x"]}', b'{"sr": "\\ud800"}',
    b"[" * 100000, b'{"sr": ' * 100000, b'{"sr": "' + b"x" * (1 << 21) + b'"}', b'{"sr": 1' + b"0" * 5000 + b"}"])
def test_parameters_that_are_none(stdin):
    process = start([*script("SR.stat"), "--json"])
    error = failure(process, stdin)
    assert error.code == "SR_BACKEND_FAILURE_143" and len(error.text) < 1000, error


def test_arguments_that_are_none():
    assert failure(start([*script("SR.stat"), "--help"]), b"{}").code == "SR_BACKEND_FAILURE_143"


def test_members_that_are_not_known_are_ignored():
    with pytest.raises(ScriptError) as caught:
        call("SR.probe", configuration={"socket": "/nobody", "other": "x"}, later={"x": [None]})
    assert caught.value.code == "SR_BACKEND_FAILURE_47"


def test_deep_members_that_are_not_known_do_no_harm():
    process = start([*script("Plugin.Query"), "--json"])
    assert finish(process, b'{"dbg": "", "x": ' + b"[" * 900 + b"]" * 900 + b"}")["plugin"] == "simsr"


@contextlib.contextmanager
def answering(path, answer):
    """A server at ``path`` that reads a request and answers each with these bytes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("answer, number", [
    (b"", 47), (b"nonsense\r\n\r\n", 47), (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n[", 47),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n<a>", 47), (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}", 202),
    (b'HTTP/1.1 507 No\r\nConnection: close\r\n\r\n{"error": {"sm_fault": 44, "message": "full"}}', 44)])
def test_a_simsrd_that_answers_nonsense(folder, answer, number):
    path = str(folder / "control.sock")
    with answering(path, answer), pytest.raises(ScriptError) as caught:
        call("SR.attach", configuration={"sr_uuid": SR_UUID, "socket": path})
    assert caught.value.code == f"SR_BACKEND_FAILURE_{number}", caught.value


def test_unsupported_and_only_that_lets_xapi_clone(folder):
    body = json.dumps({"error": {"code": "Unsupported", "sm_fault": 38, "message": "no"}}).encode()
    path = str(folder / "control.sock")
    with answering(path, b"HTTP/1.1 501 No\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)):
        with pytest.raises(ScriptError) as caught:
            call("SR.attach", configuration={"sr_uuid": SR_UUID, "socket": path})
    assert (caught.value.code, caught.value.params) == ("UNIMPLEMENTED_IN_SM_BACKEND", ["no"])


@pytest.mark.parametrize("path", ["/a:b/x.sock", "/a b/x.sock"])
def test_an_address_that_xapi_cannot_read_is_refused(folder, path):
    body = json.dumps({"uuid": KEY, "sr": SR_UUID, "nbd_socket": path}).encode()
    uri = f"nbd+simsr:///{SR_UUID}/{KEY}?socket={folder}/control.sock"
    with answering(f"{folder}/control.sock", b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)):
        with pytest.raises(ScriptError) as caught:
            call("Datapath.attach", uri=uri, domain="5")
    assert caught.value.code == "SR_BACKEND_FAILURE_46" and path in caught.value.text and "--root" in caught.value.text


def test_the_log_names_the_call_and_no_secrets(silent_syslog, monkeypatch):
    monkeypatch.syspath_prepend(str(VOLUME))
    import io

    import simsr_common
    import simsr_storage  # noqa: F401

    text = json.dumps({"dbg": "OpaqueRef:t", "configuration": {"socket": "/nobody", "password": "s3cret"}})
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    with pytest.raises(simsr_common.Failure):
        simsr_common.perform("SR.probe", ["--json"])
    assert any(re.search(r"SR\.probe .*dbg=OpaqueRef:t", line) for line in silent_syslog)
    assert "s3cret" not in "".join(silent_syslog)


def test_the_page_names_every_method_and_key():
    page = (TOP / "docs" / "smapiv3.md").read_text()
    names = scripts(VOLUME).keys() | scripts(DATAPATH).keys() | call("Plugin.Query")["configuration"].keys()
    assert not [name for name in names if f"`{name}`" not in page]


def test_nobody_reads_the_answer():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run([*script("Plugin.Query"), "--json"], input=b'{"dbg": ""}', stdout=output, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"Traceback" not in done.stderr

"""The process around every command: arguments, exit status, standard output, hostile requests, absent partners."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid

import pytest

import smapi_wire
from smapi_fake_daemon import FakeDaemon, daemon_error
from smapi_fakes import serving
from smapi_kit import ENVIRONMENT, HOST_REF, PLUGIN, SR_UUID, Caller, plugin_argv, read_plugin, run_plugin, start_plugin

VDI_COMMANDS = {
    "vdi_delete": [], "vdi_attach": ["true"], "vdi_detach": [], "vdi_activate": ["true"], "vdi_deactivate": [],
    "vdi_snapshot": [], "vdi_clone": [], "vdi_resize": ["2097152"], "vdi_update": [], "vdi_epoch_begin": [],
    "vdi_epoch_end": [], "vdi_revert": [str(uuid.uuid4())], "vdi_resize_online": ["2097152"],
    "vdi_compose": [str(uuid.uuid4())], "vdi_generate_config": [], "vdi_attach_from_config": ["true"],
    "vdi_detach_from_config": [], "vdi_enable_cbt": [], "vdi_disable_cbt": [], "vdi_data_destroy": [],
    "vdi_list_changed_blocks": [str(uuid.uuid4())],
}
SR_COMMANDS = {
    "sr_probe": [], "sr_create": ["0"], "sr_delete": [], "sr_attach": [], "sr_detach": [], "sr_scan": [],
    "sr_update": [], "vdi_create": ["1048576", "", "", "", "false", "19700101T00:00:00Z", "", "false"],
}

DEADLINES_S = ("0.3", "3", "30")  # until what is asked before the one that hangs is answered in time

DRIVER_INFO = smapi_wire.request("sr_get_driver_info", {
    "host_ref": "OpaqueRef:NULL", "command": "sr_get_driver_info", "args": [], "device_config": {}})


def refusal(document, number=143, **options):
    with pytest.raises(smapi_wire.Fault) as caught:
        run_plugin(document, **options)
    assert caught.value.number == number, caught.value
    return caught.value.text


def test_driver_info():
    info = run_plugin(DRIVER_INFO)
    for member in ("name", "description", "vendor", "copyright", "driver_version", "required_api_version"):
        assert type(info[member]) is str and info[member]
    assert info["required_api_version"] == "1.0"
    assert info["capabilities"] == [
        "SR_PROBE", "SR_UPDATE", "VDI_CREATE", "VDI_DELETE", "VDI_ATTACH", "VDI_DETACH", "VDI_ACTIVATE",
        "VDI_DEACTIVATE", "VDI_UPDATE", "VDI_INTRODUCE", "VDI_SNAPSHOT", "VDI_CLONE", "VDI_REVERT", "VDI_RESIZE",
        "VDI_RESIZE_ONLINE", "VDI_RESET_ON_BOOT/2", "VDI_CONFIG_CBT", "LARGE_VDI", "THIN_PROVISIONING"]
    assert all(set(entry) == {"key", "description"} for entry in info["configuration"])
    assert "socket" in [entry["key"] for entry in info["configuration"]]


def test_a_file_beside_the_plugin_takes_revert_away(folder, alone):
    copy = folder / "SimSR"
    copy.write_bytes(PLUGIN.read_bytes())
    copy.chmod(0o755)
    argv = plugin_argv(copy)
    assert "VDI_REVERT" in run_plugin(DRIVER_INFO, argv=argv)["capabilities"]
    (folder / "SimSR.no-revert").touch()
    assert "VDI_REVERT" not in run_plugin(DRIVER_INFO, argv=argv)["capabilities"]
    refusal(alone.document("vdi_revert", [str(uuid.uuid4())], vdi=str(uuid.uuid4())), 38, argv=argv)


def test_plugin_is_executable_and_named_for_xapi():
    assert os.access(PLUGIN, os.X_OK) and PLUGIN.name.endswith("SR")
    assert PLUGIN.read_text().splitlines()[0] == "#!/usr/bin/python3"


def test_python_3_6_is_enough():
    pytest.importorskip("vermin")
    done = subprocess.run([sys.executable, "-c", "import sys, vermin; sys.exit(vermin.main())", "-t=3.6-",
                           "--violations", "--no-tips", str(PLUGIN)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


def test_unknown_command_is_not_implemented():
    for command in ("vdi_merge", "sr_explode", "__init__", "vdi_revert2"):
        refusal(smapi_wire.request(command, {"command": command}), 38)


@pytest.mark.parametrize("document", [
    b"", b"x", b"-h", b"<methodCall>", b"<a/>", b"\xff\xfe\x00"[:2], b"<methodCall/>",
    b"<methodCall><methodName>sr_scan</methodName></methodCall>",
    b"<methodCall><methodName>sr_scan</methodName><params/></methodCall>",
    b"<methodCall><methodName>sr_scan</methodName><params><param><value>x</value></param></params></methodCall>",
    b"<methodCall><methodName>sr_scan</methodName><params><param><value><struct/></value></param>"
    b"<param><value><struct/></value></param></params></methodCall>",
    b"<methodResponse><params><param><value><struct/></value></param></params></methodResponse>",
    b"<methodCall><methodName>sr_scan</methodName><params><param><value><int>x</int></value></param></params>"
    b"</methodCall>",
    b"<methodCall><methodName>sr_scan</methodName><params><param><value><array></array></value></param></params>"
    b"</methodCall>",
    b"<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>1</int></value></member>"
    b"<member><name>faultString</name><value>x</value></member></struct></value></fault></methodResponse>",
])
def test_what_is_no_request(document):
    refusal(document)


def test_no_argument_at_all():
    process = subprocess.Popen(plugin_argv(), env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    with pytest.raises(smapi_wire.Fault) as caught:
        read_plugin(process)
    assert caught.value.number == 143


@pytest.mark.parametrize("members", [
    {"args": "not an array"}, {"args": [["nested"]]}, {"args": [{}]}, {"device_config": "x"},
    {"device_config": {"socket": []}}, {"sr_uuid": []}, {"sr_uuid": None}, {"command": "sr_attach"}, {"host_ref": {}},
    {"command": ""}, {"sr_ref": ["x"]}, {"session_ref": {}}, {"subtask_of": []}, {"vdi_ref": {}}, {"vdi_allow_caching": []},
    {"driver_params": "x"}, {"sr_sm_config": {"key": []}},
])
def test_members_of_the_wrong_type(alone, members):
    sent = {"command": "sr_detach", "args": [], "sr_uuid": SR_UUID, "host_ref": HOST_REF,
            "device_config": alone.device_config}
    sent.update(members)
    refusal(smapi_wire.request("sr_detach", {key: item for key, item in sent.items() if item is not None}))


def test_unknown_members_and_a_missing_command_member_are_fine(alone):
    assert run_plugin(smapi_wire.request("sr_update", {
        "sr_uuid": SR_UUID, "device_config": alone.device_config, "new_in_2030": {"deep": [{"x": "y"}]},
    })) is smapi_wire.NIL


def test_odd_names_through_a_process(alone, daemon):
    """The environment says nothing about an encoding; names are bytes of UTF-8 all the same, and control characters are dropped."""
    name = "Grüße, 世界 \U0001f600 <&>\"' \x7f\x85\ufffd ]]> %s \\"
    answer = run_plugin(alone.document("vdi_create", ["1048576", name + "\x00\x07", " \t" + name]))
    vdi = daemon.vdis[smapi_wire.check_vdi_info(answer)]
    assert (vdi["name"], vdi["description"]) == (name, " \t" + name)


def test_bytes_that_are_no_text(alone, daemon):
    document = alone.document("vdi_create", ["1048576", "NAME"]).replace(b"NAME", b"\xff\xfe")
    refusal(document)
    assert daemon.requests == []


ENTITIES = b"".join(b'<!ENTITY e%d "%s">' % (level, b"&e%d;" % (level - 1) * 10) for level in range(1, 12))


@pytest.mark.parametrize("document", [
    b'<!DOCTYPE bomb [<!ENTITY e0 "x">' + ENTITIES + b"]><methodCall><methodName>&e11;</methodName></methodCall>",
    b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><methodCall/>',
    b'<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><methodCall><methodName>&f;</methodName></methodCall>',
    b"<a>" * 40000,
    b"<value><array><data>" * 6000,
    b"<methodCall><methodName>sr_scan</methodName><params><param>" + b"<value><array><data>" * 2000
    + b"</data></array></value>" * 2000 + b"</param></params></methodCall>",
    b"<methodCall><methodName>sr_scan</methodName><params><param><value><int>" + b"9" * 100000
    + b"</int></value></param></params></methodCall>",
    b"<methodCall><methodName>sr_scan\xc3\x28</methodName><params/></methodCall>",
    b"<methodCall><methodName>sr_scan&#0;</methodName><params/></methodCall>",
    b"<methodCall><methodName>sr_scan\x01</methodName><params/></methodCall>",
    b"<?xml version='1.0' encoding='utf-7'?><methodCall/>",
])
def test_hostile_documents(document):
    text = refusal(document)
    assert "root:" not in text and len(text) < 2000


def test_nested_and_huge_values_of_known_members(alone):
    deep = (b"<value><array><data>" * 2000 + b"</data></array></value>" * 2000)
    refusal(alone.document("sr_update").replace(b"<value><array><data/></array></value>", deep))
    unknown = b"<struct><member><name>unknown</name>" + deep + b"</member>"
    assert run_plugin(alone.document("sr_update").replace(b"<struct>", unknown, 1)) is smapi_wire.NIL
    document = alone.document("vdi_create", ["1048576", "ü" * 51_200, ""])
    assert len(document) > 100 * 1024
    smapi_wire.check_vdi_info(run_plugin(document))


@pytest.mark.parametrize("command, args", [*VDI_COMMANDS.items(), *SR_COMMANDS.items()])
def test_daemon_away_is_fault_47(folder, command, args):
    alone = Caller(in_process=True, socket=str(folder / "nobody.sock"), standalone="true")
    vdi = str(uuid.uuid4()) if command in VDI_COMMANDS else None
    fault = alone.fault(command, args, vdi=vdi)
    assert fault.number == 47
    assert str(folder / "nobody.sock") in fault.text and "[opterr=" in fault.text


def test_daemon_gone_but_its_socket_left_is_fault_47(folder):
    with serving(FakeDaemon(), folder / "control.sock"):
        pass
    assert (folder / "control.sock").exists()
    assert Caller(socket=str(folder / "control.sock"), standalone="true").fault("sr_attach").number == 47


def test_content_type_needs_nobody(folder):
    assert Caller(socket=str(folder / "nobody.sock")).call("sr_content_type") == ""


@pytest.mark.parametrize("answer", [
    (200, b"this is not JSON"), (500, b"<html>broken</html>"), (200, b"\xff\xfe"), None])
def test_what_is_not_simsrd(alone, daemon, answer):
    daemon.failures["GET", "/v1/srs"] = answer
    assert alone.fault("sr_attach").number == 47


@pytest.mark.parametrize("status, body, number", [
    (500, b'{"detail": "Internal Server Error"}', 202),
    (404, b'{"detail": "Not Found"}', 202),
    (405, b"[]", 202),
    (500, b'{"error": {"code": "X", "message": "m"}}', 202),
    (500, b'{"error": {"code": "X", "message": "m", "sm_fault": "44"}}', 202),
    (507, b'{"error": {"code": "NoSpace", "message": "m", "sm_fault": 44}}', 44),
    (500, b'{"error": {"code": "StoreStopped", "message": "m", "sm_fault": 200}}', 200),
    (500, b'{"error": {"code": "Future", "message": "m", "sm_fault": 9999}}', 9999),
])
def test_failures_of_the_daemon_keep_their_number(alone, daemon, status, body, number):
    daemon.failures["POST", "/v1/vdis"] = status, body
    assert alone.fault("vdi_create", ["1048576"]).number == number


def test_fault_text_has_message_and_hint(alone, daemon):
    daemon.failures["POST", "/v1/vdis"] = daemon_error(507, "NoSpace", 44, "full <&\x01\ud800>", "Delete.")
    assert alone.fault("vdi_create", ["1048576"]).text == "There is not enough space [opterr=full <&??>. Delete.]"


@pytest.mark.parametrize("key", [("GET", "/v1/srs"), ("POST", "/v1/vdis")])
def test_deadline_when_the_daemon_hangs(alone, daemon, key):
    daemon.before[key] = daemon.hang
    for alone.device_config["deadline_s"] in DEADLINES_S:
        fault = alone.fault("vdi_create", ["1048576"])
        assert fault.number == 47 and "in time" in fault.text
        if daemon.hung.is_set():
            break
    assert daemon.hung.is_set()


def test_deadline_when_xapi_hangs(pool, xapi):
    xapi.before["VDI.db_introduce"] = xapi.hang
    for pool.device_config["deadline_s"] in DEADLINES_S:
        number = pool.fault("vdi_create", ["1048576"]).number
        if xapi.hung.is_set():
            break
    assert number == 154


def test_deadline_holds_for_clearing_up_as_well(pool, xapi, daemon):
    for command in ("SR.set_virtual_allocation", "SR.set_physical_size", "SR.set_physical_utilisation"):
        xapi.before[command] = xapi.hang
    for pool.device_config["deadline_s"] in DEADLINES_S:
        with contextlib.suppress(smapi_wire.Fault):
            smapi_wire.check_vdi_info(pool.call("vdi_create", ["1048576"]))
            break
    else:
        raise AssertionError("the disk was made, and what came behind failed it")


def test_stray_prints_do_not_reach_the_answer(folder):
    """Whatever a future import prints, by Python or by C, the answer stays one document."""
    noisy = folder / "SimSR"
    lines = PLUGIN.read_text().splitlines(keepends=True)
    start = lines.index("def sr_content_type(call):\n") + 1
    lines.insert(start, "    print('stray'); os.system('echo stray'); os.write(1, b'stray')\n")
    noisy.write_text("".join(lines))
    noisy.chmod(0o755)
    process = start_plugin(smapi_wire.request("sr_content_type", {"command": "sr_content_type"}),
                           argv=plugin_argv(noisy))
    output, errors = process.communicate(timeout=120)
    assert smapi_wire.parse_answer(output) == ""
    assert errors.count(b"stray") == 3
    assert process.returncode == 0


@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "0<&- 2>&-", "1>&-", "1>/dev/full"])
def test_closed_descriptors(alone, closed):
    """Exit status 0 whatever is closed, and the answer if anybody can read it."""
    document = alone.document("sr_update")
    done = subprocess.run(["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *plugin_argv(), document], env=ENVIRONMENT,
                          stdout=subprocess.PIPE, timeout=120, check=True)
    if "1>" in closed:
        assert done.stdout == b""
    else:
        assert smapi_wire.parse_answer(done.stdout) is smapi_wire.NIL


def test_nobody_reads_the_answer():
    process = start_plugin(DRIVER_INFO)
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_a_fault(alone, daemon, number):
    """The exit status is 0 also then, and what was begun in this host is cleared up (test_smapi_devices.py)."""
    daemon.before["GET", "/v1/srs"] = daemon.hang
    process = start_plugin(alone.document("sr_attach"))
    assert daemon.hung.wait(timeout=120)
    process.send_signal(number)
    with pytest.raises(smapi_wire.Fault) as caught:
        read_plugin(process)
    assert caught.value.number == 202 and "sr_attach was ended by a signal" in caught.value.text


def test_under_the_observer(folder):
    """xapi may start the plug-in as `python3 -m observer PLUGIN XML`."""
    (folder / "observer.py").write_text(
        "import runpy, sys\nsys.argv[0] = sys.argv[1]\nrunpy.run_path(sys.argv[1], run_name='__main__')\n")
    interpreter = os.environ.get("SIMSR_PLUGIN_PYTHON", "/usr/bin/python3")
    process = subprocess.Popen([interpreter, "-m", "observer", str(PLUGIN), DRIVER_INFO], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(ENVIRONMENT, PYTHONPATH=str(folder), OBSERVER_CONFIG_DIR=f"'{folder}'"))
    assert "VDI_REVERT" in read_plugin(process)["capabilities"]


def test_through_a_symlink(folder):
    (folder / "SimSR").symlink_to(PLUGIN)
    assert run_plugin(DRIVER_INFO, argv=plugin_argv(folder / "SimSR"))["required_api_version"] == "1.0"


def test_many_at_once(alone, daemon):
    documents = [alone.document("vdi_create", ["1048576", f"disk {number}"]) for number in range(12)]
    processes = [start_plugin(document) for document in documents]
    uuids = {smapi_wire.check_vdi_info(read_plugin(process)) for process in processes}
    assert uuids == set(daemon.vdis) and len(uuids) == 12


def test_nothing_unneeded_is_imported():
    """Start-up time is paid by every storage command of every VM."""
    code = ("import sys; sys.argv = ['SimSR', sys.argv[2]]; import runpy; runpy.run_path(%r, run_name='__main__');"
            "print(' '.join(sys.modules), file=sys.__stderr__)") % str(PLUGIN)
    interpreter = os.environ.get("SIMSR_PLUGIN_PYTHON", "/usr/bin/python3")
    done = subprocess.run([interpreter, "-c", code, "x", DRIVER_INFO], env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120, check=True)
    loaded = set(done.stderr.decode().split())
    assert "xmlrpc.client" in loaded
    assert not loaded & {"difflib", "subprocess", "threading", "traceback", "asyncio", "logging", "urllib.request", "tempfile",
                         "fcntl"}


def test_plugin_is_one_file_of_the_standard_library():
    imports = {line.split()[1].split(".")[0] for line in PLUGIN.read_text().splitlines()
               if line.strip().startswith(("import ", "from "))}
    assert imports <= set(sys.stdlib_module_names)
    assert "simsr" not in imports

"""XML-RPC and JSON-RPC on unix socket and TCP, sessions, and requests from people who mean no good."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import xmlrpc.client

import httpx
import pytest
import XenAPI
from xapi_kit import NULL, ROOT, World, failure

from simsr.xapi.server import BODY_MAX_BYTES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    password = tmp_path_factory.mktemp("secret") / "password"
    password.write_text("open sesame\n")
    world = World("--tcp", "127.0.0.1:0", "--password-file", str(password))
    yield world
    world.close()


@pytest.fixture
def post(world):
    """Send bytes to the unix socket and return the answer."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=world.xapi.socket), base_url="http://x", timeout=120) as client:
        yield lambda path, content: client.post(path, content=content, headers={"Content-Type": "text/xml"})


def call(method: str, *values: str) -> bytes:
    params = "".join(f"<param><value>{value}</value></param>" for value in values)
    return f"<methodCall><methodName>{method}</methodName><params>{params}</params></methodCall>".encode()


def value_of(response: httpx.Response):
    assert response.status_code == 200, response.text
    [answer], _ = xmlrpc.client.loads(response.content)
    return answer


# XML-RPC.


def test_both_spellings_of_a_method_and_both_paths(world, post):
    session = world.session._session
    for path, method in (("/", "VM.get_all"), ("/RPC2", "VM_get_all"), ("/", "VM_metrics_get_all"), ("/", "VM_metrics.get_all")):
        assert value_of(post(path, call(method, session)))["Status"] == "Success"


def test_types_on_the_wire(world, post):
    """Integers are text, booleans 0/1, times dateTime.iso8601, void an empty string, strings without tags."""
    session, x = world.session._session, world.x
    body = post("/", call("VM.get_record", session, world.template)).text
    assert "<name>VCPUs_max</name><value>1</value>" in body
    assert "<name>is_a_template</name><value><boolean>1</boolean></value>" in body
    assert "<name>snapshot_time</name><value><dateTime.iso8601>19700101T00:00:00Z</dateTime.iso8601></value>" in body
    assert "<name>HVM_shadow_multiplier</name><value><double>1.0</double></value>" in body
    assert "<name>snapshots</name><value><array><data></data></array></value>" in body
    vm = x.VM.clone(world.template, "types")
    assert "<name>Value</name><value/>" in post("/", call("VM.set_name_label", session, vm, "a &lt; b")).text
    assert x.VM.get_name_label(vm) == "a < b"
    counts = post(
        "/", call("event.from", session, "<array><data><value>pool</value></data></array>", "", "<double>0</double>")
    ).text
    assert "<name>pool</name><value><i4>1</i4></value>" in counts


@pytest.mark.parametrize(
    ("sent", "stored"),
    [("<boolean>1</boolean>", True), ("true", True), ("<string>false</string>", False), ("0", False)],
)
def test_lenient_booleans(world, post, sent, stored):
    vm = world.x.VM.clone(world.template, "booleans")
    assert value_of(post("/", call("VM.set_is_a_template", world.session._session, vm, sent)))["Status"] == "Success"
    assert world.x.VM.get_is_a_template(vm) is stored


@pytest.mark.parametrize("sent", ["<int>7</int>", "<i4>7</i4>", "7", "<string>7</string>"])
def test_lenient_integers(world, post, sent):
    vm = world.x.VM.clone(world.template, "integers")
    post("/", call("VM.set_VCPUs_max", world.session._session, vm, sent))
    assert world.x.VM.get_VCPUs_max(vm) == "7"


def test_errors_of_the_catalogue(world):
    x = world.x
    vm = x.VM.clone(world.template, "errors")
    uuid = "11111111-2222-4333-8444-555555555555"
    assert failure(x.VM.get_by_uuid, uuid) == ["UUID_INVALID", "VM", uuid]
    assert failure(x.VDI.get_record, "OpaqueRef:x") == ["HANDLE_INVALID", "VDI", "OpaqueRef:x"]
    assert failure(x.VM.nonsense) == ["MESSAGE_METHOD_UNKNOWN", "VM.nonsense"]
    assert failure(x.Async.VM.nonsense)[0] == "MESSAGE_METHOD_UNKNOWN"
    assert failure(x.VM.start, vm) == ["MESSAGE_PARAMETER_COUNT_MISMATCH", "VM.start", "3", "1"]
    x.VM.add_to_other_config(vm, "k", "v")
    assert failure(x.VM.add_to_other_config, vm, "k", "v") == ["MAP_DUPLICATE_KEY", "VM", "other_config", vm, "k"]
    x.VM.remove_from_other_config(vm, "absent")
    assert failure(x.VM.set_VCPUs_max, vm, "many") == ["FIELD_TYPE_ERROR", "VCPUs_max"]
    assert failure(x.VM.set_domain_type, vm, "quantum")[:3] == ["VALUE_NOT_SUPPORTED", "domain_type", "quantum"]
    assert failure(x.VM.set_uuid, vm, uuid)[0] == "MESSAGE_METHOD_UNKNOWN"
    assert failure(x.pool.set_default_SR, x.pool.get_all()[0], "OpaqueRef:x") == ["HANDLE_INVALID", "SR", "OpaqueRef:x"]


def test_tags_and_sets(world):
    vm = world.x.VM.clone(world.template, "tags")
    for tag in ("b", "a", "b"):
        world.x.VM.add_tags(vm, tag)
    world.x.VM.remove_tags(vm, "a")
    assert world.x.VM.get_tags(vm) == ["b"]


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ('field "name_label" = "q1"', {"q1"}),
        ('field "name_label" = "q1" or field "name_label" = "q2"', {"q1", "q2"}),
        ('(field "is_a_template"="true") and (not (field "name_label" = "q1"))', {"q2", "Other install media"}),
        ("field 'name_label' = 'q\\'3'", set()),
        ('true and field "name__label" = "q2"', {"q2"}),
    ],
)
def test_get_all_records_where(world, expression, found):
    if not world.x.VM.get_by_name_label("q1"):
        for name in ("q1", "q2"):
            world.x.VM.clone(world.template, name)
    records = world.x.VM.get_all_records_where(expression).values()
    named = {record["name_label"] for record in records if record["name_label"] in ("q1", "q2", "Other install media")}
    assert named == found


@pytest.mark.parametrize(
    "expression",
    ["", "field", 'field "nonsense" = "x"', 'field "uuid" = ', '"a" = "b" "c"', "(" * 5000, "not " * 5000 + "true", "x"],
)
def test_queries_that_make_no_sense(world, expression):
    assert failure(world.x.VM.get_all_records_where, expression)[:2] == ["VALUE_NOT_SUPPORTED", "expr"]


# Sessions.


def test_wrong_session_and_the_stock_clients_answer_to_it(world):
    session = world.xapi.session()
    stale = session._session
    session.xenapi.session.logout()
    session.login_with_password("root", "open sesame")
    session._session = stale
    assert session.xenapi.VM.get_all(), "it logs in again and repeats the call"
    assert session._session != stale
    session.logout()
    session("close")()


@pytest.mark.parametrize("session", ["", "OpaqueRef:NULL", "OpaqueRef:x", "x" * 10_000])
def test_wrong_session_on_the_wire(post, session):
    answer = value_of(post("/", call("VM.get_all", session)))
    assert answer["ErrorDescription"] == ["SESSION_INVALID", session[:200]]


def test_credentials(world):
    uri = f"http://{world.xapi.tcp}"
    for user, password in (("root", "wrong"), ("root", ""), ("nobody", "open sesame")):
        session = XenAPI.Session(uri)
        assert failure(session.login_with_password, user, password) == [
            "SESSION_AUTHENTICATION_FAILED",
            user,
            "Authentication failure",
        ]
        session("close")()
    session = XenAPI.Session(uri)
    session.login_with_password("root", "open sesame", "1.0", "a test")
    assert session.xenapi.session.get_auth_user_name(session._session) == "root"
    assert session.xenapi.session.get_this_host(session._session) == world.host
    assert session.xenapi.host.get_all()
    session.logout()
    session("close")()


def test_a_session_can_ask_about_itself_only(world):
    other = world.xapi.session()
    x = world.x
    assert failure(x.session.get_record, other._session) == ["HANDLE_INVALID", "session", other._session]
    assert failure(x.session.get_all)[0] == "MESSAGE_METHOD_UNKNOWN"
    x.session.add_to_other_config(world.session._session, "_sm_session", NULL)
    assert failure(x.VDI.db_forget, NULL) == ["PERMISSION_DENIED", ""], "no client makes itself a plug-in by a mark"
    assert not [event for event in x.event_from(["*", "session"], "", 0.0)["events"] if event["class"] == "session"]
    other.logout()
    other("close")()


def test_tcp_needs_a_password_and_loopback(tmp_path):
    command = [sys.executable, "-m", "simsr.cli.main", "xapi", "serve", "--root", str(tmp_path)]
    (tmp_path / "password").write_text("x")
    for options, said in (
        (["--tcp", "127.0.0.1:0"], "--password-file"),
        (["--tcp", "0.0.0.0:0", "--password-file", str(tmp_path / "password")], "loopback"),
        (["--sm-dir", "/nonexistent"], "no such directory"),
        (["--socket", str(tmp_path / "password")], "something else is there"),
        (["--socket", "/tmp/" + "x" * 120], "107 bytes"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_sockets_and_files_are_private(world):
    for name in ("xapi", "xapi.db"):
        assert (world.folder / "xapi" / name).stat().st_mode & 0o077 == 0, name


def test_no_secrets_in_log_or_arguments(world):
    """Passwords and sessions of clients, right and wrong ones, and the sessions lent to plug-ins."""
    sr = world.sr("secrets", size=32 * 2**20)
    lent = XenAPI.Session(f"http://{world.xapi.tcp}")
    assert failure(lent.login_with_password, "root", "a wrong secret")[0] == "SESSION_AUTHENTICATION_FAILED"
    assert failure(world.x.VM.get_record, "OpaqueRef:x")[0] == "HANDLE_INVALID"
    assert failure(world.x.SR.create, world.host, world.device_config(password="p4ss"), "x", "x", "", "sim", "", False, {})
    said = world.xapi_log() + "".join(
        (world.folder.joinpath("/proc", str(world.xapi.process.pid), name)).read_text() for name in ("cmdline", "environ")
    )
    for secret in ("open sesame", "a wrong secret", "p4ss", world.session._session):
        assert secret not in said
    lent("close")()
    world.x.PBD.unplug(world.x.SR.get_PBDs(sr)[0])
    world.x.SR.forget(sr)


def test_two_servers_for_one_root(world):
    command = [sys.executable, "-m", "simsr.cli.main", "xapi", "serve", "--root", str(world.folder / "xapi")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "another" in done.stderr
    done = subprocess.run([*command[:-1], ""], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "--root '' is not valid: it is empty" in done.stderr
    assert world.x.VM.get_all()


# JSON-RPC.


def rpc(post, **request):
    response = post("/jsonrpc", json.dumps(request).encode())
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    return response.json()


def test_json_rpc_1(world, post):
    session = rpc(post, method="session.login_with_password", params=["root", ""], id=1)["result"]
    answer = rpc(post, method="VM.get_record", params=[session, world.template], id="two")
    assert answer["id"] == "two" and answer["error"] is None
    record = answer["result"]
    assert (record["VCPUs_max"], record["is_a_template"], record["snapshot_time"]) == (1, True, "19700101T00:00:00Z")
    answer = rpc(post, method="VM.get_uuid", params=[session, "OpaqueRef:x"], id=3)
    assert answer == {"result": "", "error": ["HANDLE_INVALID", "VM", "OpaqueRef:x"], "id": 3}


def test_json_rpc_2(world, post):
    session = rpc(post, jsonrpc="2.0", method="session.login_with_password", params=["root", ""], id=1)["result"]
    vm = rpc(post, jsonrpc="2.0", method="VM.clone", params=[session, world.template, "json"], id=2)["result"]
    for number in (3, "4", 5.0):
        assert rpc(post, jsonrpc="2.0", method="VM.set_VCPUs_max", params=[session, vm, number], id=3)["result"] == ""
    assert rpc(post, jsonrpc="2.0", method="VM.get_VCPUs_max", params=[session, vm], id=4) == {
        "jsonrpc": "2.0",
        "result": 5,
        "id": 4,
    }
    answer = rpc(post, jsonrpc="2.0", method="VM.get_uuid", params=[session, "OpaqueRef:x"], id=5)
    assert answer == {"jsonrpc": "2.0", "error": {"code": 1, "message": "HANDLE_INVALID", "data": ["VM", "OpaqueRef:x"]}, "id": 5}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"method": 1, "id": 1}', b'{"method": "VM.get_all", "params": {}, "id": 1}', b'{"method": "VM.get_all"}',
     b"[" * 100_000, b'{"jsonrpc": "3.0", "method": "VM.get_all", "params": [], "id": 1}', b"\xff\xfe\xfd"],
)  # fmt: skip
def test_what_is_no_json_rpc(post, body):
    response = post("/jsonrpc", body)
    assert response.status_code == 400 and "Traceback" not in response.text


def test_lone_surrogates_are_refused(world, post):
    session = world.session._session
    vm = world.x.VM.clone(world.template, "surrogate")
    body = b'{"method": "VM.set_name_label", "params": ["%s", "%s", "\\ud800"], "id": 1}' % (session.encode(), vm.encode())
    assert post("/jsonrpc", body).json()["error"] == ["FIELD_TYPE_ERROR", "name_label"]


# Hostile requests.

BOMB = b"""<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaaaaaaaaaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;&c;&c;"><!ENTITY e "&d;&d;&d;&d;&d;&d;&d;&d;&d;&d;">]>
<methodCall><methodName>VM.get_all</methodName><params><param><value>&e;&e;&e;&e;&e;&e;&e;&e;</value></param></params></methodCall>"""
FILE = b'<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]><methodCall><methodName>&f;</methodName></methodCall>'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (BOMB, "document type"),
        (FILE, "document type"),
        (b"<value>" * 200_000, "nested"),
        (b"<methodCall><methodName>x</methodName><params>" + b"<param><value><array><data>" * 500 + b"</x>", "nested"),
        (b"", "not XML"),
        (b"<methodCall/>", "methodCall"),
        (b"<a/>", "methodCall"),
        (b"\x00\x01", "not XML"),
        (b'<?xml version="1.0" encoding="nonsense"?><methodCall/>', "not XML"),
        (call("VM.get_all", "<base64>AAAA</base64>"), "base64"),
        (call("VM.get_all", "<int>x</int>"), "int"),
        (call("VM.get_all", "<int>" + "9" * 10_000 + "</int>"), "int"),
        (call("VM.get_all", "<struct><member><name>a</name></member></struct>"), "member"),
        (call("VM.get_all", "<array/>"), "array"),
    ],
)
def test_what_is_no_call_gets_a_fault(post, body, said):
    response = post("/", body)
    assert response.status_code == 200
    with pytest.raises(xmlrpc.client.Fault, match=said) as caught:
        xmlrpc.client.loads(response.content)
    assert caught.value.faultCode == 400 and len(caught.value.faultString) < 500


def test_huge_strings(world, post):
    session = world.session._session
    vm = world.x.VM.clone(world.template, "huge")
    huge = "x" * (8 * 2**20)
    world.x.VM.set_name_description(vm, huge)
    assert world.x.VM.get_name_description(vm) == huge
    world.x.VM.set_name_description(vm, "")
    assert post("/", b" " * (BODY_MAX_BYTES + 1)).status_code == 413
    answer = value_of(post("/", call(huge[:1_000_000], session)))
    assert answer["ErrorDescription"] == ["MESSAGE_METHOD_UNKNOWN", huge[:200]]


def test_huge_body_without_a_length(world):
    connection = http.client.HTTPConnection(*world.xapi.tcp.split(":"))
    connection.putrequest("POST", "/")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"%x\r\n%s\r\n" % (2**20, b"x" * 2**20)
    try:
        for _ in range(BODY_MAX_BYTES // 2**20 + 2):
            connection.send(chunk)
        assert connection.getresponse().status == 413
    except OSError:
        pass  # the server may hang up before it has read everything
    finally:
        connection.close()
    assert world.x.VM.get_all()


def test_too_long_for_an_argument_of_a_process(world):
    """128 KiB is what Linux lets one argument have, and xapi passes the request as one."""
    description = failure(world.x.SR.probe, world.host, {"socket": "/" + "x" * 200_000}, "sim", {})
    assert description[0] == "SR_BACKEND_FAILURE" and "too long" in description[3]


@pytest.mark.parametrize("text", ["<&>\"'", "]]>", "a\n\tb", "Grüße 世界 \U0001f600", " leading", "a\x7fb"])
def test_odd_text_comes_back(world, text):
    vm = world.x.VM.clone(world.template, "odd text")
    world.x.VM.set_other_config(vm, {text: text})
    assert world.x.VM.get_other_config(vm) == {text: text}


def test_other_requests(world, post):
    with httpx.Client(transport=httpx.HTTPTransport(uds=world.xapi.socket), base_url="http://x") as client:
        assert client.get("/").status_code == 405
        assert client.get("/rrd_updates").status_code == 404
        assert client.post("/export").status_code == 404


def test_garbage_on_the_socket(world):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(world.xapi.socket)
        sock.sendall(b"\x00" * 1000 + b"\r\n\r\n")
        sock.recv(1000)
    assert world.x.VM.get_all()


def test_many_clients_may_knock_at_once(world):
    """A unix socket refuses those that find its queue full, instead of letting them wait."""
    with open("/proc/sys/net/core/somaxconn") as file:
        number = min(400, int(file.read()))
    clients = [socket.socket(socket.AF_UNIX) for _ in range(number)]
    try:
        for client in clients:
            client.setblocking(False)
            client.connect(world.xapi.socket)
    finally:
        for client in clients:
            client.close()

"""The control API and requests as people and programs really send them: odd names, wrong types, no JSON, no HTTP."""

from __future__ import annotations

import json
import re
import socket
from urllib.parse import quote

import pytest
from api_daemon import MIB, Api, Unchanged, api, check_error  # noqa: F401 (one of them is a fixture)

# Names in paths.

NAMES = [
    "with space", "a/b", "/", "//x//", "../../etc/passwd", "a/snapshot", "ä漢字🙂", "100%", "%2F", "%2e", "a?b=c", "a#b", "a&b+c",
    "'\"\\", "{vdi}", "\n\t\x7f", "x" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_percent_encoded(api, name):
    made = api.vdi(name=name)
    path = "/v1/vdis/" + quote(name, safe="")
    assert api.ok("GET", path) == made
    assert api.ok("POST", path + "/resize", {"size_bytes": 2 * MIB})["uuid"] == made["uuid"]
    assert api.ok("POST", path + "/snapshot", {"name": name + " snapshot"}, status=201)["snapshot_of"] == made["uuid"]
    assert api.ok("POST", "/v1/vdis/" + quote(name + " snapshot", safe="") + "/revert")["vdi"]["uuid"] == made["uuid"]
    assert api.ok("PATCH", path, {"description": "found"})["description"] == "found"
    api.ok("DELETE", path, status=204)
    api.error("NotFound", "GET", path)


def test_prefixes_and_ambiguous_names(api):
    one = api.vdi(uuid="abcd1111-0000-4000-8000-000000000001", name="twin")
    two = api.vdi(uuid="abcd2222-0000-4000-8000-000000000002", name="twin")
    for reference, meant in (("abcd1", one), ("ABCD2222-0", two), (one["uuid"].upper(), one)):
        assert api.show(reference)["uuid"] == meant["uuid"]
    for reference in ("abcd", "twin"):
        found = api.error("Ambiguous", "GET", f"/v1/vdis/{reference}")
        assert one["uuid"] in found["message"] and two["uuid"] in found["details"]["candidates"]
        api.error("Ambiguous", "DELETE", f"/v1/vdis/{reference}")
    for reference in ("abc", "abcd3", "tw"):
        api.error("NotFound", "GET", f"/v1/vdis/{reference}")
    called = api.vdi(name="abcd")
    assert api.show("abcd")["uuid"] == called["uuid"]
    for vdi in (one, two, called):
        api.delete(vdi)


# Requests that are wrong.


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v2/vdis", "/v1/vdi", "/v1/daemon/", "/v1/daemon/x", "//v1/daemon", "/v1/vdis/x/y", "/v1/vdis/", "/v1/srs/"],
)
def test_paths_that_do_not_exist(api, path):
    assert api.error("NotFound", "GET", path)["details"]["kind"] == "API path"


@pytest.mark.parametrize("path", ["/v1/vdis/%00", "/v1/vdis/%FF", "/v1/vdis/sr", "/v1/srs/" + "x" * 5000])
def test_things_that_do_not_exist(api, path):
    assert api.error("NotFound", "GET", path)["details"]["kind"] in ("SR", "VDI")


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("PUT", "/v1/srs", {"GET", "POST"}), ("DELETE", "/v1/vdis", {"GET", "POST"}), ("POST", "/v1/daemon", {"GET"}),
        ("HEAD", "/v1/daemon", {"GET"}), ("OPTIONS", "/v1/srs", {"GET", "POST"}),
        ("POST", "/v1/vdis/x", {"GET", "PATCH", "DELETE"}),
        ("PUT", "/v1/vdis/x/revert", {"POST"}), ("TRACE", "/v1/srs/x", {"GET", "PATCH", "DELETE"}),
    ],
)  # fmt: skip
def test_methods_that_a_path_does_not_have(api, method, path, allowed):
    response = api.send(method, path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) & allowed
    if method != "HEAD":
        check_error(response, "BadRequest", 405)


JSON = {"content-type": "application/json"}
NOT_JSON = [b"{", b"", b"size_bytes=512", b"\xff\xfe{}", b'{"size_bytes": 5', b"{'size_bytes': 5}", b"[" * 100000, b"{}{}", b"\0"]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_bodies_that_are_no_json(api, content):
    with Unchanged(api):
        assert "body" in api.error("BadRequest", "POST", "/v1/vdis", content=content, headers=JSON)["message"]


def test_values_that_do_not_fit_are_named_with_the_rule_in_plain_words(api):
    with Unchanged(api):
        for path, body, message in (
            ("/v1/srs", {"name": "tiny", "limit_bytes": 1}, "limit_bytes 1 is not valid: it must be greater than or equal to 33554432"),
            ("/v1/srs", {"name": 5}, "name 5 is not valid: it must be a valid string"),
            ("/v1/srs", {"name": "a", "size": 5}, "size is not valid: Extra inputs are not permitted"),
            ("/v1/srs", {"limit_bytes": 1 << 30}, "name is not valid: Field required"),
        ):
            assert api.error("BadRequest", "POST", path, body)["message"] == message


@pytest.mark.parametrize("content", [b"[]", b"1", b"true", b'"x"', b'[{"size_bytes": 512}]', b"null"])
def test_bodies_that_are_no_objects(api, content):
    with Unchanged(api):
        api.error("BadRequest", "POST", "/v1/vdis", content=content, headers=JSON)


def test_a_form_is_no_json(api):
    with Unchanged(api):
        api.error("BadRequest", "POST", "/v1/vdis", data={"size_bytes": "512"})
        api.error("BadRequest", "POST", "/v1/vdis", content=b'{"size_bytes": 512}', headers={"content-type": "text/plain"})


def test_a_huge_body(api):
    content = b'{"size_bytes": 512, "name": "' + b"x" * 10_000_000 + b'"}'
    with Unchanged(api):
        response = api.send("POST", "/v1/vdis", content=content, headers=JSON)
        assert response.status_code in (400, 413) and len(response.content) < 1000
        check_error(response, "TooLarge", response.status_code)


WRONG = {
    "string": ["5", "[]", "{}", "true", "1.5", r'"\ud800"'],
    "integer": [
        '"512"', "512.0", "5.12e2", "NaN", "Infinity", "-Infinity", "true", "0", "-1", "[]", "9" * 5000, "9" * 400,
        "-" + "9" * 400,
    ],
    "boolean": ["1", "0", '"true"', "[]", "NaN"],
    "object": ["[]", '"a"', '{"a": 1}', '{"a": null}', '{"a": {}}', r'{"\ud800": "b"}', r'{"a": "\udfff"}'],
    "array": ["5", "{}", '"a"', "[]", "[1, 2]", '["a"]', '["a", null]', r'["a", "\ud800"]'],
}  # as JSON, because Python's own types cannot say all of it
RIGHT = {("sm_config_merge", '{"a": null}'), ("expected", '{"a": 1}'), ("allow", "[]"), ("tips_max", "0"), ("tips_hours", "0"), ("live_ms", "0")}
RIGHT |= {(name, "0") for name in ("connections_max", "bytes_s", "requests_s", "seed")}


def test_every_field_of_every_body_is_checked(api):
    """All wrong values of all fields of all routes, from the OpenAPI document: a clear refusal, and nothing happens."""
    document = api.ok("GET", "/openapi.json")
    disk = api.vdi(name="fields")
    snapshot = api.snapshot(disk)
    good = {"name": "x", "size_bytes": 4 * MIB, "client": "c", "writable": False, "limit_bytes": 64 * MIB, "phase": "end", "enabled": True, "path": "/x", "vdis": ["a", "b"], "parent": "x"}
    tried = 0
    with Unchanged(api):
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if "requestBody" not in operation or path.startswith(("/v1/scenario", "/v1/fault", "/v1/heal")):
                    continue  # scenarios are texts with errors of their own (test_scenarios.py)
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                schema = [choice for choice in schema.get("anyOf", [schema]) if "$ref" in choice][0]
                schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
                where = path.replace("{sr}", "sr").replace("{vdi}", (snapshot if "revert" in path else disk)["uuid"])
                given = {field: json.dumps(good[field]) for field in schema.get("required", ())}
                for field in [*schema.get("required", ()), "colour", "Name", ""]:
                    body = {**given, field: '"x"'}
                    if field in given:
                        del body[field]
                    tried += refused(api, method, where, body, field)
                for field, kind in schema["properties"].items():
                    kinds = [kind["type"]] if "type" in kind else [choice["type"] for choice in kind["anyOf"]]
                    for wrong in [*WRONG[kinds[0]], *([] if "null" in kinds else ["null"])]:
                        if (field, wrong) not in RIGHT:
                            tried += refused(api, method, where, {**given, field: wrong}, field)
    assert tried > 250


def refused(api: Api, method: str, path: str, body: dict[str, str], field: str) -> bool:
    content = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in body.items()) + "}"
    response = api.send(method.upper(), path, content=content.encode(), headers=JSON)
    assert response.status_code == 400, f"{method} {path} {content[:200]}: {response.status_code} {response.text[:300]}"
    error = response.json()["error"]
    assert error["code"] in ("BadRequest", "BadSize")
    if "9" * 400 not in content:
        assert field in error["message"] or "uuid" in error["message"], f"{content}: {error['message']}"
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"\r\n", b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/vdis/\xc3\xa4 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET " + b"/x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/daemon HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000,
    ],
    ids=["nothing", "empty line", "garbage", "tls", "raw utf-8", "long path", "half a body", "length", "headers"],
)  # fmt: skip
def test_what_is_no_http_harms_nobody(api, sent):
    with Unchanged(api), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(api.simsrd.socket)
        sock.settimeout(0.3)
        try:
            sock.sendall(sent)
            answer = sock.recv(100)
        except (TimeoutError, ConnectionError):
            answer = b""
        assert not answer or re.match(rb"HTTP/1.1 4\d\d", answer), answer

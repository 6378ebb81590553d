"""What the tests of the control API stand on: one daemon for all of them, a strict HTTP client, and a raw NBD client.

The NBD client is a few lines of its own, so that these tests know exactly when it connects, and how it goes.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest
from daemon_tools import LIMIT_BYTES, Simsrd, running_simsrd

from simsr import errors

BLOCK = 4096
MIB = 1 << 20
ERROR_KEYS = {"code", "message", "hint", "exit_code", "sm_fault", "xenapi_code", "details"}


class Api:
    """Requests to a daemon whose answers are checked: `ok` wants success, `error` wants a certain error."""

    def __init__(self, simsrd: Simsrd) -> None:
        self.simsrd = simsrd
        self._client = httpx.Client(transport=httpx.HTTPTransport(uds=simsrd.socket), base_url="http://simsrd", timeout=120)

    def close(self) -> None:
        self._client.close()

    def send(self, method: str, path: str, body: object = None, **how: object) -> httpx.Response:
        if body is not None:
            how["json"] = body
        return self._client.request(method, path, **how)

    def ok(self, method: str, path: str, body: object = None, status: int = 200, **how: object):
        response = self.send(method, path, body, **how)
        assert response.status_code == status, f"{method} {path}: {response.status_code} {response.text[:500]}"
        if status == 204:
            assert response.content == b""
            return None
        assert response.headers["content-type"] == "application/json"
        return response.json()

    def error(self, code: str, method: str, path: str, body: object = None, status: int | None = None, **how: object) -> dict:
        return check_error(self.send(method, path, body, **how), code, status)

    # Short cuts.

    def sr(self, name: str = "sr", **fields: object) -> dict:
        return self.ok("POST", "/v1/srs", {"name": name, "limit_bytes": LIMIT_BYTES, **fields}, 201)

    def vdi(self, size_bytes: int = MIB, **fields: object) -> dict:
        return self.ok("POST", "/v1/vdis", {"size_bytes": size_bytes, **fields}, 201)

    def show(self, vdi: dict | str) -> dict:
        return self.ok("GET", f"/v1/vdis/{vdi if isinstance(vdi, str) else vdi['uuid']}")

    def act(self, vdi: dict, operation: str, status: int = 200, **body: object):
        return self.ok("POST", f"/v1/vdis/{vdi['uuid']}/{operation}", body, status)

    def snapshot(self, vdi: dict, **body: object) -> dict:
        return self.act(vdi, "snapshot", 201, **body)

    def delete(self, vdi: dict) -> None:
        self.ok("DELETE", f"/v1/vdis/{vdi['uuid']}", status=204)

    def everything(self) -> tuple[list, list]:
        """All SRs, without what changes by itself, and all VDIs."""
        srs = self.ok("GET", "/v1/srs")
        for sr in srs:
            for key in ("statistics", "space", "physical_size_bytes", "physical_utilisation_bytes"):
                del sr[key]
        return srs, self.ok("GET", "/v1/vdis")


class Unchanged:
    """``with Unchanged(api):`` all SRs and VDIs are the same afterwards."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def __enter__(self) -> None:
        self.before = self.api.everything()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            assert self.api.everything() == self.before


def check_error(response: httpx.Response, code: str, status: int | None = None) -> dict:
    """``response`` is error ``code`` in its full form; returns what is under "error"."""
    assert response.headers["content-type"] == "application/json", response.text[:500]
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == ERROR_KEYS
    assert error["code"] == code, error
    cls = getattr(errors, code)
    assert response.status_code == (status or cls.http_status)
    assert (error["exit_code"], error["sm_fault"], error["xenapi_code"]) == (cls.exit_code, cls.sm_fault, cls.xenapi_code)
    hint = "docs/api.md and /openapi.json list what there is." if error["details"].get("kind") == "API path" else cls.hint
    assert error["hint"] == hint and error["message"] and "Traceback" not in error["message"]
    json.dumps(error["details"], allow_nan=False)
    return error


class Nbd:
    """One NBD connection with simple replies, in transmission when made."""

    def __init__(self, path: str, export: str = "whatever") -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(120)
            self.sock.connect(path)
            assert self._receive(18)[:16] == b"NBDMAGICIHAVEOPT"
            name = export.encode()
            self.sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
            self.size_bytes, self.flags = struct.unpack(">QH", self._receive(10))
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Nbd:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise ConnectionResetError(f"the daemon hung up after {len(data)} of {count} bytes")
            data += piece
        return data

    def _command(self, command: int, offset: int, length: int, payload: bytes = b"", answer_bytes: int = 0) -> bytes:
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, 77, offset, length) + payload)
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        assert (magic, error, cookie) == (0x67446698, 0, 77)
        return self._receive(answer_bytes)

    def read(self, offset: int, length: int) -> bytes:
        return self._command(0, offset, length, answer_bytes=length)

    def write(self, offset: int, data: bytes) -> None:
        self._command(1, offset, len(data), data)

    def flush(self) -> None:
        self._command(3, 0, 0)

    def close(self, politely: bool = True) -> None:
        """End the connection, with NBD_CMD_DISC or by hanging up."""
        if politely:
            self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 78, 0, 0))
        self.sock.close()


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """A daemon with one SR, "sr", shared by the tests of a module; each works on VDIs of its own."""
    with running_simsrd() as simsrd, closing(Api(simsrd)) as shared:
        shared.sr("sr")
        yield shared


@pytest.fixture
def alone(daemon: Simsrd) -> Iterator[Api]:
    """A daemon for one test, without any SR."""
    with closing(Api(daemon)) as api:
        yield api

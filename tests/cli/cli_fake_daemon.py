"""A stand-in for simsrd: the HTTP API on a unix socket over a model in memory.

It knows what the command line needs to be tested with: objects, names, the errors of the real hierarchy. A VDI is a
sparse file in ``disks``, so that an NBD server may serve it. ``requests`` records what arrived; ``refuse`` makes a
request fail a number of times.
"""

from __future__ import annotations

import copy
import json
import socketserver
import threading
import uuid
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from simsr.errors import Ambiguous, BadRequest, NotASnapshot, NotFound, ShrinkRefused, SimsrError, SrNotEmpty

NOW = "2026-11-21T03:40:20Z"


class FakeDaemon:
    """Start with `start`, end with `stop`; `socket` is the path of the control socket."""

    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "control.sock")
        self.nbd_socket = str(directory / "nbd.sock")
        self.disks = directory / "disks"
        self.disks.mkdir()
        self.srs: dict[str, dict[str, Any]] = {}
        self.vdis: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.refusals: list[tuple[str, SimsrError]] = []
        self.raw_answer: bytes | None = None
        self._server = _Server(self.socket, _handler_for(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop serving; doing it twice is once."""
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def refuse(self, method: str, error: SimsrError, times: int = 1) -> None:
        """Answer the next ``times`` requests of ``method`` with ``error``."""
        self.refusals += [(method, error)] * times

    def add_sr(self, name: str, **fields: Any) -> dict[str, Any]:
        chosen = fields.pop("uuid", None) or str(uuid.uuid4())
        self.srs[chosen] = {
            "uuid": chosen,
            "name": name,
            "description": "",
            "path": f"/srv/simsr/{chosen}",
            "sm_config": {},
            "physical_size_bytes": 100 * 2**30,
            "physical_utilisation_bytes": 3 * 2**29,
            "statistics": {"log": {"segments": 3}, "flushes": 7},
            **fields,
        }
        return self.sr(chosen)

    def add_vdi(self, size_bytes: int, sr: str, **fields: Any) -> dict[str, Any]:
        chosen = fields.pop("uuid", None) or str(uuid.uuid4())
        self.vdis[chosen] = {
            "uuid": chosen,
            "location": chosen,
            "sr": sr,
            "name": "",
            "description": "",
            "type": "user",
            "size_bytes": -(-size_bytes // 512) * 512,
            "physical_utilisation_bytes": 4096,
            "is_a_snapshot": False,
            "snapshot_of": None,
            "snapshot_time": None,
            "created_time": NOW,
            "read_only": False,
            "sharable": False,
            "managed": True,
            "sm_config": {},
            "attached": [],
            "nbd_uri": f"nbd+unix:///{chosen}?socket={self.nbd_socket}",
            "nbd_socket": f"/run/simsr/nbd/{chosen}.sock",
            **{key: value for key, value in fields.items() if value is not None},
        }
        with open(self.disks / chosen, "wb") as disk:
            disk.truncate(self.vdis[chosen]["size_bytes"])
        return self.vdis[chosen]

    def sr(self, name: str) -> dict[str, Any]:
        found = _resolve("SR", self.srs, name)
        own = [vdi for vdi in self.vdis.values() if vdi["sr"] == found["uuid"]]
        return {
            **found,
            "virtual_allocation_bytes": sum(vdi["size_bytes"] for vdi in own),
            "vdi_count": len(own),
            "snapshot_count": sum(vdi["is_a_snapshot"] for vdi in own),
            "limit_bytes": None,
            "personality": "sim",
            "verify_reads": True,
            "tips_max": 8,
            "tips_hours": 24,
            "expose_tips": False,
            "tip_count": 0,
            "space": {f"{name}_bytes": 4096 for name in ("live", "garbage", "reclaimable", "reserved", "free", "map", "segment")},
        }

    def answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        """Return status and answer to a request; raise a `SimsrError` to refuse it."""
        self.requests.append((method, target, copy.deepcopy(body)))
        if self.refusals and self.refusals[0][0] == method:
            raise self.refusals.pop(0)[1]
        parts = urlsplit(target)
        words = [unquote(word) for word in parts.path.split("/")[2:]]
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        handler = getattr(self, "_".join(["do", method, words[0], *words[2:], "one" if len(words) > 1 else "all"]))
        result: tuple[int, Any] = handler(*words[1:2], body=body, query=query)
        return result

    def do_GET_srs_all(self, **_: Any) -> tuple[int, Any]:
        return 200, [self.sr(name) for name in self.srs]

    def do_POST_srs_all(self, body: Any, **_: Any) -> tuple[int, Any]:
        return 201, self.add_sr(**body)

    def do_GET_srs_one(self, name: str, **_: Any) -> tuple[int, Any]:
        return 200, self.sr(name)

    def do_GET_srs_space_one(self, name: str, **_: Any) -> tuple[int, Any]:
        found = self.sr(name)
        return 200, {"uuid": found["uuid"], "name": found["name"], "distinct_bytes": 8192, "shared_bytes": 512, "vdis": []}

    def do_DELETE_srs_one(self, name: str, **_: Any) -> tuple[int, Any]:
        found = self.sr(name)
        if found["vdi_count"]:
            raise SrNotEmpty(name=found["name"], count=found["vdi_count"])
        del self.srs[found["uuid"]]
        return 204, None

    def do_GET_vdis_all(self, query: dict[str, str], **_: Any) -> tuple[int, Any]:
        wanted = self.sr(query["sr"])["uuid"] if "sr" in query else None
        return 200, [vdi for vdi in self.vdis.values() if wanted in (None, vdi["sr"])]

    def do_POST_vdis_all(self, body: Any, **_: Any) -> tuple[int, Any]:
        if "sr" in body:
            sr = self.sr(body.pop("sr"))
        elif len(self.srs) == 1:
            sr = self.sr(next(iter(self.srs)))
        else:
            raise BadRequest(what="sr", reason=f"there are {len(self.srs)} SRs")
        return 201, self.add_vdi(body.pop("size_bytes"), sr["uuid"], **body)

    def do_GET_vdis_one(self, name: str, **_: Any) -> tuple[int, Any]:
        return 200, _resolve("VDI", self.vdis, name)

    def do_DELETE_vdis_one(self, name: str, **_: Any) -> tuple[int, Any]:
        del self.vdis[_resolve("VDI", self.vdis, name)["uuid"]]
        return 204, None

    def do_POST_vdis_resize_one(self, name: str, body: Any, **_: Any) -> tuple[int, Any]:
        vdi = _resolve("VDI", self.vdis, name)
        if body["size_bytes"] < vdi["size_bytes"]:
            raise ShrinkRefused(uuid=vdi["uuid"], old_bytes=vdi["size_bytes"], size=body["size_bytes"])
        vdi["size_bytes"] = body["size_bytes"]
        return 200, vdi

    def do_POST_vdis_snapshot_one(self, name: str, body: Any, **_: Any) -> tuple[int, Any]:
        vdi = _resolve("VDI", self.vdis, name)
        link = {"is_a_snapshot": True, "snapshot_of": vdi["uuid"], "snapshot_time": NOW, "read_only": True}
        return 201, self.add_vdi(vdi["size_bytes"], vdi["sr"], **link, **body)

    def do_POST_vdis_clone_one(self, name: str, body: Any, **_: Any) -> tuple[int, Any]:
        vdi = _resolve("VDI", self.vdis, name)
        return 201, self.add_vdi(vdi["size_bytes"], vdi["sr"], **body)

    def do_POST_vdis_revert_one(self, name: str, **_: Any) -> tuple[int, Any]:
        snapshot = _resolve("VDI", self.vdis, name)
        if not snapshot["is_a_snapshot"]:
            raise NotASnapshot(uuid=snapshot["uuid"])
        vdi = _resolve("VDI", self.vdis, snapshot["snapshot_of"])
        size_changed = vdi["size_bytes"] != snapshot["size_bytes"]
        vdi["size_bytes"] = snapshot["size_bytes"]
        return 200, {"vdi": vdi, "changed": vdi["name"] != "unchanged", "size_changed": size_changed}


def _resolve(kind: str, objects: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    found = [one for one in objects.values() if one["uuid"] == name]
    found = found or [one for one in objects.values() if one["name"] == name]
    found = found or [one for one in objects.values() if len(name) >= 4 and one["uuid"].startswith(name)]
    if not found:
        raise NotFound(kind=kind, name=name)
    if len(found) > 1:
        raise Ambiguous(kind=kind, name=name, candidates=", ".join(one["uuid"] for one in found))
    return found[0]


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def _handler_for(daemon: FakeDaemon) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if daemon.raw_answer is not None:
                self.wfile.write(daemon.raw_answer)
                self.close_connection = True
                return
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, answer = daemon.answer(self.command, self.path, json.loads(content) if content else None)
            except SimsrError as error:
                status, answer = error.http_status, {"error": _error_body(error)}
            body = b"" if status == 204 else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_DELETE = do_GET

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _error_body(error: SimsrError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": str(error),
        "hint": error.hint,
        "exit_code": error.exit_code,
        "sm_fault": error.sm_fault,
        "xenapi_code": error.xenapi_code,
        "details": {key: str(value) for key, value in error.details.items()},
    }

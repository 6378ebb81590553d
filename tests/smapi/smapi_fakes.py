"""Stand-ins for simsrd and for xapi, each on a unix socket in a thread, each with its state in plain dicts.

Both record what they were asked, and can be told to fail, to answer nonsense or not to answer at all. They are models
to test the plug-in against: the daemon follows the HTTP API, xapi checks the types of every argument it is given.
"""

import http.server
import json
import re
import socketserver
import threading
import urllib.parse
import uuid as uuid_module
import xmlrpc.client
from contextlib import contextmanager

NULL_REF = "OpaqueRef:NULL"


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands every request to ``model.handle`` and writes what that returns: (status, bytes), or None for no answer."""

    protocol_version = "HTTP/1.1"
    model = None

    def do_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.model.handle(self.command, self.path, self.headers, body)
        if answer is None:
            self.close_connection = True
            return
        status, data = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = do_any

    def log_message(self, *_):
        pass


@contextmanager
def serving(model, path):
    """Serve `model` on the unix socket `path`."""
    handler = type("ModelHandler", (Handler,), {"model": model})
    with UnixServer(str(path), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield model
        finally:
            model.released.set()
            server.shutdown()
            thread.join()


class Refused(Exception):
    """What a fake answers instead of a result."""


class Model:
    """What both fakes share: a record of requests, prepared failures, a way not to answer."""

    def __init__(self):
        self.lock = threading.Lock()
        self.failures = {}
        self.before = {}
        self.hung = threading.Event()
        self.released = threading.Event()

    def hang(self):
        """To be raised from or called in a prepared action: keep the client waiting until the test is over."""
        self.hung.set()
        self.released.wait()
        raise Refused(None)

    def interfere(self, key):
        """Do what the test has prepared for requests called `key`."""
        action = self.before.pop(key, None)
        if action:
            action()
        if key in self.failures:
            failure = self.failures[key]
            if callable(failure):
                failure()
            raise Refused(failure)


def daemon_error(status, code, number, message, hint=""):
    return status, {"error": {"code": code, "message": message, "hint": hint, "exit_code": 1, "sm_fault": number,
                              "xenapi_code": "", "details": {}}}


class FakeDaemon(Model):
    """simsrd's HTTP API over dicts. `failures` maps ("POST", "/v1/vdis/{vdi}/revert") to (status, body) or raw bytes."""

    def __init__(self, nbd_folder="/run/simsr/nbd"):
        super().__init__()
        self.nbd_folder = nbd_folder
        self.srs = {}
        self.vdis = {}
        self.requests = []

    def writes(self):
        """The requests that change something."""
        return [entry for entry in self.requests if entry[0] != "GET"]

    def add_sr(self, uuid, name="an SR"):
        self.srs[uuid] = {
            "uuid": uuid, "name": name, "description": "", "path": "", "sm_config": {}, "statistics": {},
            "physical_size_bytes": 2**40, "physical_utilisation_bytes": 8192, "snapshot_count": 0,
        }
        return uuid

    def add_vdi(self, sr, **fields):
        uuid = fields.pop("uuid", None) or str(uuid_module.uuid4())
        self.vdis[uuid] = dict({
            "uuid": uuid, "location": uuid, "sr": sr, "name": "", "description": "", "type": "user",
            "size_bytes": 2**20, "physical_utilisation_bytes": 4096, "is_a_snapshot": False, "snapshot_of": None,
            "snapshot_time": None, "created_time": "2026-11-21T03:00:00Z", "read_only": False, "sharable": False,
            "managed": True, "sm_config": {}, "attached": [], "nbd_uri": "",
            "nbd_socket": f"{self.nbd_folder}/{uuid}.sock",
        }, **fields)
        return uuid

    def add_snapshot(self, of, **fields):
        disk = self.vdis[of]
        return self.add_vdi(disk["sr"], **dict({
            "is_a_snapshot": True, "snapshot_of": of, "snapshot_time": "2026-11-21T03:40:20Z", "name": disk["name"],
            "size_bytes": disk["size_bytes"],
        }, **fields))

    def sr_view(self, sr):
        vdis = [vdi for vdi in self.vdis.values() if vdi["sr"] == sr["uuid"]]
        return dict(sr, vdi_count=len(vdis), virtual_allocation_bytes=sum(vdi["size_bytes"] for vdi in vdis))

    def find(self, kind, objects, name):
        """By uuid, unique prefix or name, as simsrd does."""
        name = urllib.parse.unquote(name)
        if name in objects:
            return objects[name]
        found = [item for item in objects.values() if item["name"] == name or (
            len(name) >= 4 and item["uuid"].startswith(name))]
        if len(found) != 1:
            raise Refused(daemon_error(404, "NotFound", 144, f"no {kind} is called '{name}'", "List what there is."))
        return found[0]

    def handle(self, method, target, headers, body):
        path, _, query = target.partition("?")
        document = json.loads(body) if body else None
        template = re.sub(r"^/v1/(srs|vdis)/[^/]+", lambda match: f"/v1/{match[1]}/{{{match[1][:-1]}}}", path)
        try:
            with self.lock:
                self.requests.append((method, target, document))
            self.interfere((method, template))
            with self.lock:
                status, answer = self.route(method, template, path.split("/"), query, document)
        except Refused as refusal:
            failure = refusal.args[0]
            if failure is None or isinstance(failure[1], bytes):
                return failure
            status, answer = failure
        return status, b"" if answer is None else json.dumps(answer).encode()

    def route(self, method, template, parts, query, body):
        if template == "/v1/srs":
            if method == "GET":
                return 200, [self.sr_view(sr) for sr in self.srs.values()]
            return self.create_sr(body)
        if template == "/v1/srs/{sr}":
            sr = self.find("SR", self.srs, parts[3])
            if method == "DELETE":
                if self.sr_view(sr)["vdi_count"]:
                    return daemon_error(409, "SrNotEmpty", 39, "SR 'x' still holds 1 VDIs")
                del self.srs[sr["uuid"]]
                return 204, None
            return 200, self.sr_view(sr)
        if template == "/v1/vdis":
            if method == "GET":
                sr = self.find("SR", self.srs, urllib.parse.parse_qs(query)["sr"][0])
                return 200, [vdi for vdi in self.vdis.values() if vdi["sr"] == sr["uuid"]]
            return self.create_vdi(body)
        vdi = self.find("VDI", self.vdis, parts[3])
        action = {
            ("GET", "/v1/vdis/{vdi}"): self.show, ("PATCH", "/v1/vdis/{vdi}"): self.change,
            ("DELETE", "/v1/vdis/{vdi}"): self.delete, ("POST", "/v1/vdis/{vdi}/resize"): self.resize,
            ("POST", "/v1/vdis/{vdi}/snapshot"): self.snapshot, ("POST", "/v1/vdis/{vdi}/clone"): self.clone,
            ("POST", "/v1/vdis/{vdi}/revert"): self.revert, ("POST", "/v1/vdis/{vdi}/attach"): self.attach,
            ("POST", "/v1/vdis/{vdi}/detach"): self.detach,
        }[method, template]
        return action(vdi, body)

    def create_sr(self, body):
        if body["uuid"] in self.srs or any(sr["name"] == body["name"] for sr in self.srs.values()):
            return daemon_error(409, "SrExists", 42, f"SR '{body['name']}' exists already")
        self.add_sr(body["uuid"], body["name"])
        self.srs[body["uuid"]]["description"] = body["description"]
        return 201, self.sr_view(self.srs[body["uuid"]])

    def create_vdi(self, body):
        sr = self.find("SR", self.srs, body.pop("sr"))
        if body.get("uuid") in self.vdis:
            return daemon_error(409, "VdiExists", 43, f"VDI {body['uuid']} exists already")
        body["size_bytes"] = -(-body["size_bytes"] // 512) * 512
        return 201, self.vdis[self.add_vdi(sr["uuid"], **body)]

    def show(self, vdi, _):
        return 200, vdi

    def change(self, vdi, body):
        vdi.update(body)
        return 200, vdi

    def delete(self, vdi, _):
        self.refuse_if_attached(vdi, "delete")
        del self.vdis[vdi["uuid"]]
        return 204, None

    def refuse_if_attached(self, vdi, operation):
        if any(entry["writable"] for entry in vdi["attached"]):
            raise Refused(daemon_error(409, "VdiInUse", 24, f"cannot {operation} VDI {vdi['uuid']}: attached by x"))

    def resize(self, vdi, body):
        if body["size_bytes"] < vdi["size_bytes"]:
            return daemon_error(409, "ShrinkRefused", 79, f"cannot shrink VDI {vdi['uuid']}", "Disks only grow.")
        vdi["size_bytes"] = body["size_bytes"]
        return 200, vdi

    def snapshot(self, vdi, body):
        vdi["physical_utilisation_bytes"] = 512
        return 201, self.vdis[self.add_snapshot(vdi["uuid"], **body)]

    def clone(self, vdi, body):
        return 201, self.vdis[self.add_vdi(vdi["sr"], **dict(body, size_bytes=vdi["size_bytes"]))]

    def revert(self, snapshot, body):
        disk = self.find("VDI", self.vdis, body.get("target") or snapshot["snapshot_of"])
        if not snapshot["is_a_snapshot"]:
            return daemon_error(409, "NotASnapshot", 1, f"VDI {snapshot['uuid']} is not a snapshot")
        if snapshot["snapshot_of"] != disk["uuid"]:
            return daemon_error(409, "SnapshotOfOther", 1, "it is a snapshot of another disk")
        self.refuse_if_attached(disk, "revert")
        size_changed = disk["size_bytes"] != snapshot["size_bytes"]
        disk["size_bytes"] = snapshot["size_bytes"]
        disk["physical_utilisation_bytes"] = 1024
        return 200, {"vdi": disk, "changed": True, "size_changed": size_changed}

    def attach(self, vdi, body):
        if body["writable"] and vdi["read_only"]:
            return daemon_error(409, "VdiReadOnly", 46, f"VDI {vdi['uuid']} is read-only")
        self.detach(vdi, body)
        vdi["attached"].append({"client": body["client"], "writable": body["writable"], "kind": "attach"})
        return 200, {"nbd_uri": "", "nbd_socket": vdi["nbd_socket"], "export_name": vdi["uuid"],
                     "size_bytes": vdi["size_bytes"]}

    def detach(self, vdi, body):
        vdi["attached"] = [entry for entry in vdi["attached"] if entry["client"] != body["client"]]
        return 204, None


def is_ref(item):
    return isinstance(item, str) and item.startswith("OpaqueRef:")


def is_digits(item):
    return isinstance(item, str) and re.fullmatch("[0-9]+", item) is not None


def is_map(item):
    return isinstance(item, dict) and all(isinstance(part, str) for part in item.values())


def is_bool(item):
    return isinstance(item, bool)


def is_text(item):
    return isinstance(item, str)


def is_time(item):
    return isinstance(item, xmlrpc.client.DateTime) and re.fullmatch(r"\d{8}T\d\d:\d\d:\d\dZ", item.value) is not None


def is_uuid(item):
    return isinstance(item, str) and str(uuid_module.UUID(item)) == item


INTRODUCE = [
    ("uuid", is_uuid), ("name_label", is_text), ("name_description", is_text), ("SR", is_ref), ("type", is_text),
    ("sharable", is_bool), ("read_only", is_bool), ("other_config", is_map), ("location", is_text),
    ("xenstore_data", is_map), ("sm_config", is_map), ("managed", is_bool), ("virtual_size", is_digits),
    ("physical_utilisation", is_digits), ("metadata_of_pool", is_ref), ("is_a_snapshot", is_bool),
    ("snapshot_time", is_time), ("snapshot_of", is_ref), ("cbt_enabled", is_bool),
]

SETTERS = {
    "virtual_size": is_digits, "physical_utilisation": is_digits, "read_only": is_bool, "snapshot_of": is_ref,
    "virtual_allocation": is_digits, "physical_size": is_digits,
}


class FakeXapi(Model):
    """XenAPI for the SM back end: two tables, one session. `failures` maps a method to [CODE, parameter...]."""

    def __init__(self):
        super().__init__()
        self.session_ref = new_ref()
        self.tables = {"SR": {}, "VDI": {}}
        self.calls = []
        self.headers = []
        self.garbage = {}

    def add(self, table, **fields):
        ref = new_ref()
        self.tables[table][ref] = fields
        return ref

    def add_vdi(self, sr_ref, uuid, **fields):
        return self.add("VDI", **dict({
            "uuid": uuid, "location": uuid, "SR": sr_ref, "name_label": "", "name_description": "", "read_only": False,
            "virtual_size": str(2**20), "physical_utilisation": "4096", "sm_config": {}, "other_config": {},
            "is_a_snapshot": False, "snapshot_of": NULL_REF,
        }, **fields))

    def methods(self):
        return [method for method, _ in self.calls]

    def writes(self):
        return [method for method in self.methods() if not re.search(r"\.get_", method)]

    def handle(self, method, target, headers, body):
        assert (method, target, headers["Content-Type"]) == ("POST", "/", "text/xml")
        parameters, name = xmlrpc.client.loads(body)
        with self.lock:
            self.calls.append((name, parameters[1:]))
            self.headers.append(dict(headers))
        if name in self.garbage:
            return self.garbage[name]
        try:
            self.interfere(name)
            with self.lock:
                answer = {"Status": "Success", "Value": self.call(name, *parameters)}
        except Refused as refusal:
            if refusal.args[0] is None:
                return None
            answer = {"Status": "Failure", "ErrorDescription": refusal.args[0]}
        return 200, xmlrpc.client.dumps((answer,), methodresponse=True).encode()

    def call(self, name, session_ref, *parameters):
        if session_ref != self.session_ref:
            raise Refused(["SESSION_INVALID", session_ref])
        table, _, action = name.partition(".")
        if name == "VDI.db_introduce":
            return self.introduce(*parameters)
        if name == "message.create":
            return new_ref()
        if action == "get_by_uuid":
            found = [ref for ref, row in self.tables[table].items() if row["uuid"] == parameters[0]]
            if not found:
                raise Refused(["UUID_INVALID", table, parameters[0]])
            return found[0]
        if action == "get_all_records_where":
            sr_ref = re.fullmatch('field "SR" = "(OpaqueRef:[^"]+)"', parameters[0])[1]
            return {ref: row for ref, row in self.tables[table].items() if row["SR"] == sr_ref}
        row = self.tables[table].get(parameters[0])
        if row is None:
            raise Refused(["HANDLE_INVALID", table, parameters[0]])
        return self.on_row(table, row, action, *parameters)

    def on_row(self, table, row, action, ref, *values):
        if action == "db_forget":
            del self.tables[table][ref]
            return ""
        verb, _, field = action.partition("_")
        if verb == "get":
            return row[field]
        if verb == "set":
            assert SETTERS[field](values[0]), f"{table}.{action}: {values[0]!r}"
            row[field] = values[0]
            return ""
        verb, field = re.fullmatch("(add_to|remove_from)_(.*)", action).groups()
        if verb == "remove_from":
            row[field].pop(values[0], None)
            return ""
        if values[0] in row[field]:
            raise Refused(["MAP_DUPLICATE_KEY", table, field, ref, values[0]])
        row[field][values[0]] = values[1]
        return ""

    def introduce(self, *values):
        assert len(values) == len(INTRODUCE), f"db_introduce got {len(values)} arguments"
        for (field, right), item in zip(INTRODUCE, values):
            assert right(item), f"db_introduce: {field} is {item!r}"
        row = dict(zip((field for field, _ in INTRODUCE), values))
        if any((other["SR"], other["location"]) == (row["SR"], row["location"]) for other in self.tables["VDI"].values()):
            raise Refused(["LOCATION_NOT_UNIQUE", row["SR"], row["location"]])
        return self.add("VDI", **row)


def new_ref():
    return "OpaqueRef:" + str(uuid_module.uuid4())

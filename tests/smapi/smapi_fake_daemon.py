"""A stand-in for simsrd: its HTTP API over dicts, to test the plug-in without the daemon."""

import json
import re
import urllib.parse
import uuid as uuid_module

from smapi_fakes import Model, Refused


def daemon_error(status, code, number, message, hint=""):
    return status, {"error": {"code": code, "message": message, "hint": hint, "exit_code": 1, "sm_fault": number,
                              "xenapi_code": "", "details": {}}}


class FakeDaemon(Model):
    """`failures` maps requests such as ("POST", "/v1/vdis/{vdi}/revert") to (status, document or bytes)."""

    def __init__(self, nbd_folder="/run/simsr/nbd"):
        super().__init__()
        self.nbd_folder = nbd_folder
        self.srs = {}
        self.vdis = {}
        self.requests = []
        self.failed_srs = {}
        self.bitmap = "gAA="
        self.exclusive = False

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
            "managed": True, "sm_config": {}, "attached": [], "nbd_uri": "", "on_boot": "persist", "cbt_enabled": False,
            "nbd_socket": f"{self.nbd_folder}/{uuid}.sock",
        }, **fields)
        return uuid

    def add_snapshot(self, of, **fields):
        disk = self.vdis[of]
        return self.add_vdi(disk["sr"], **dict({
            "is_a_snapshot": True, "snapshot_of": of, "snapshot_time": "2026-11-21T03:40:20Z", "name": disk["name"],
            "size_bytes": disk["size_bytes"], "read_only": True,
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
        if len(found) > 1:
            raise Refused(daemon_error(409, "Ambiguous", 1, f"'{name}' can mean more than one {kind}"))
        if not found:
            raise Refused(daemon_error(404, "NotFound", 144, f"no {kind} is called '{name}'", "List what there is."))
        return found[0]

    def handle(self, method, target, headers, body):
        stopped = self.stopped()
        if stopped == "gone":
            return None
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
        if stopped:
            return None
        return status, b"" if answer is None else json.dumps(answer).encode()

    def route(self, method, template, parts, query, body):
        if template == "/v1/daemon":
            return 200, {"version": "fake", "failed_srs": self.failed_srs}
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
            ("POST", "/v1/vdis/{vdi}/detach"): self.detach, ("POST", "/v1/vdis/{vdi}/epoch"): self.epoch,
            ("POST", "/v1/vdis/{vdi}/cbt"): self.cbt, ("POST", "/v1/vdis/{vdi}/compose"): self.compose,
            ("POST", "/v1/vdis/{vdi}/data_destroy"): self.data_destroy,
            ("GET", "/v1/vdis/{vdi}/changed_blocks/" + parts[-1]): self.changed_blocks,
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

    def epoch(self, vdi, body):
        assert vdi["on_boot"] == "reset" and body["phase"] in ("begin", "end")
        self.refuse_if_attached(vdi, "reset")
        return 200, vdi

    def cbt(self, vdi, body):
        vdi["cbt_enabled"] = body["enabled"]
        return 200, vdi

    def compose(self, vdi, body):
        vdi["physical_utilisation_bytes"] += self.vdis[body["parent"]]["physical_utilisation_bytes"]
        return 200, vdi

    def data_destroy(self, vdi, _):
        if not vdi["cbt_enabled"]:
            return daemon_error(409, "NoChangedBlocks", 460, "it has no changed block tracking")
        vdi.update(type="cbt_metadata", physical_utilisation_bytes=0)
        return 200, vdi

    def changed_blocks(self, vdi, _):
        return 200, {"granularity_bytes": 65536, "size_bytes": vdi["size_bytes"], "bitmap": self.bitmap}

    def attach(self, vdi, body):
        if body["writable"] and vdi["read_only"]:
            return daemon_error(409, "VdiReadOnly", 46, f"VDI {vdi['uuid']} is read-only")
        if self.exclusive and any(entry["client"] != body["client"] for entry in vdi["attached"]):
            return daemon_error(409, "VdiInUse", 24, f"cannot attach VDI {vdi['uuid']}: attached by another")
        self.detach(vdi, body)
        vdi["attached"].append({"client": body["client"], "writable": body["writable"], "kind": "attach"})
        return 200, {"nbd_uri": "", "nbd_socket": vdi["nbd_socket"], "export_name": vdi["uuid"],
                     "size_bytes": vdi["size_bytes"]}

    def detach(self, vdi, body):
        vdi["attached"] = [entry for entry in vdi["attached"] if entry["client"] != body["client"]]
        return 204, None

"""An SR whose plug-in reaches simsrd and xapi through proxies: every command, prepared, run with a fault, and looked at afterwards.

The plug-in's code runs in this process, which costs a few milliseconds and not a hundred; its requests and answers are the documents
that a process would get and print. That a process does the same is tested for some commands by the caller.
"""

from __future__ import annotations

import subprocess
import types
import uuid as uuid_module
import xmlrpc.client
from collections.abc import Callable
from typing import Any

import httpx
import XenAPI
from fault_proxy import Proxy
from wrapped_driver import Plan
from xapi_kit import MIB, NULL, SIMSR_PLUGIN, World

from simsr.xapi import smapiv1

DISK_BYTES = MIB
Prepared = tuple[list[str], dict[str, Any]]
"""Arguments and further members of a request."""


class Lab:
    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.x = world, world.x
        self.sr = world.sr("faults", "odd", size=64 * MIB)
        self.x.SR.scan(self.sr)
        request = plan.calls()[-1]["request"]
        self.session = request.partition("<name>session_ref</name><value>")[2].partition("<")[0]
        self.sr_uuid = self.x.SR.get_uuid(self.sr)
        self.daemon = Proxy(str(world.folder / "faulty-simsrd"), lambda: world.simsrd.socket)
        self.xapi = Proxy(str(world.folder / "faulty-xapi"), lambda: world.xapi.socket)
        self.plugin = types.ModuleType("simsr_plugin")
        self.plugin.__file__ = str(SIMSR_PLUGIN)
        exec(compile(SIMSR_PLUGIN.read_text(), str(SIMSR_PLUGIN), "exec"), self.plugin.__dict__)
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=world.simsrd.socket), base_url="http://simsrd")

    def close(self) -> None:
        self.http.close()
        self.daemon.close()
        self.xapi.close()

    # Commands.

    def request(self, command: str, args: list[str] = (), **members: Any) -> str:
        """Return the document of a command. ``vdi`` is the uuid of the VDI it is about; ``sr_uuid`` of another SR can be given."""
        config = {"SRmaster": "true", "socket": self.daemon.path, "xapi_socket": self.xapi.path}
        given = {"host_ref": self.world.host, "args": list(args), "device_config": config, "session_ref": self.session,
                 "sr_ref": self.sr, "sr_uuid": self.sr_uuid, "subtask_of": "OpaqueRef:task", **members}  # fmt: skip
        if vdi := given.pop("vdi", None):
            given |= {"vdi_ref": self.ref(vdi) or f"OpaqueRef:{vdi}", "vdi_location": vdi, "vdi_uuid": vdi, "vdi_on_boot": "persist",
                      "vdi_allow_caching": "false"}  # fmt: skip
        return smapiv1.write_request(command, given)

    def run(self, command: str, args: list[str] = (), **members: Any) -> int:
        """Run a command in this process; return the number of its fault, 0 if there was none."""
        return self.read(self.plugin.answer(["SimSR", self.request(command, args, **members)]))

    def run_process(self, command: str, args: list[str] = (), **members: Any) -> int:
        """The same as a process of its own, with xapi's environment."""
        return self.run_request(self.request(command, args, **members))

    def run_request(self, request: str) -> int:
        """Run a process for a request. The exit status is 0 whatever happens, and nothing is on standard error."""
        done = subprocess.run([str(SIMSR_PLUGIN), request], env=smapiv1.ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        return self.read(done.stdout)

    def read(self, answer: bytes) -> int:
        """Return the fault's number in an answer that xapi can read, 0 if it is none."""
        try:
            xmlrpc.client.loads(answer)
        except xmlrpc.client.Fault as fault:
            assert "opterr=" in fault.faultString and "Traceback" not in fault.faultString, fault
            assert self.session not in fault.faultString, "the session is a secret"
            return fault.faultCode
        smapiv1.read_answer(answer)
        return 0

    def ref(self, uuid: str) -> str | None:
        try:
            return self.x.VDI.get_by_uuid(uuid)
        except XenAPI.Failure:
            return None

    # VDIs, made without the plug-in.

    def vdi(self, name: str = "disk", *, row: bool = True) -> str:
        answer = self.http.post("/v1/vdis", json={"sr": self.sr_uuid, "name": name, "size_bytes": DISK_BYTES})
        assert answer.status_code == 201, answer.text
        return self._with_row(answer.json(), row)

    def post(self, vdi: str, action: str, body: dict | None = None, *, row: bool = True) -> str:
        answer = self.http.post(f"/v1/vdis/{vdi}/{action}", json=body or {})
        assert answer.status_code < 300, answer.text
        return self._with_row(answer.json(), row) if action in ("snapshot", "clone") else vdi

    def _with_row(self, vdi: dict[str, Any], row: bool) -> str:
        if row:
            parent = self.ref(vdi["snapshot_of"]) if vdi["snapshot_of"] else None
            given = [vdi["uuid"], vdi["name"], "", self.sr, "user", False, False, {}, vdi["uuid"], {}, {}, True,
                     str(vdi["size_bytes"]), str(vdi["physical_utilisation_bytes"]), NULL, vdi["is_a_snapshot"],
                     xmlrpc.client.DateTime("20261121T00:00:00Z"), parent or NULL, False]  # fmt: skip
            self.as_plugin("VDI.db_introduce", *given)
        return vdi["uuid"]

    def as_plugin(self, method: str, *arguments: Any) -> Any:
        """Make a XenAPI call over the session that xapi lends to plug-ins."""
        cls, _, name = method.partition(".")
        mine, self.world.session._session = self.world.session._session, self.session
        try:
            return getattr(getattr(self.x, cls), name)(*arguments)
        finally:
            self.world.session._session = mine

    def clear(self) -> None:
        """Take away all VDIs, here and there."""
        self.daemon.revive()
        self.xapi.revive()
        vdis = self.http.get(f"/v1/vdis?sr={self.sr_uuid}").json()
        for vdi in sorted(vdis, key=lambda vdi: not vdi["is_a_snapshot"]):
            for client in {entry["client"] for entry in vdi["attached"]}:
                self.http.post(f"/v1/vdis/{vdi['uuid']}/detach", json={"client": client})
            assert self.http.delete(f"/v1/vdis/{vdi['uuid']}").status_code in (200, 204)
        for ref in self.x.SR.get_VDIs(self.sr):
            self.x.VDI.forget(ref)

    # What there is.

    def state(self) -> list[tuple]:
        """Describe what simsrd has, without what differs from run to run."""
        vdis = self.http.get(f"/v1/vdis?sr={self.sr_uuid}").json()
        kept = "size_bytes is_a_snapshot read_only type on_boot cbt_enabled managed name description".split()
        names = {vdi["uuid"]: vdi["name"] for vdi in vdis}
        return sorted((*(str(vdi[key]) for key in kept), names.get(vdi["snapshot_of"], ""), len(vdi["attached"])) for vdi in vdis)

    def database_agrees(self) -> None:
        """Fail unless xapi's rows are simsrd's VDIs."""
        vdis = {vdi["uuid"]: vdi for vdi in self.http.get(f"/v1/vdis?sr={self.sr_uuid}").json()}
        records = self.x.VDI.get_all_records_where(f'field "SR" = "{self.sr}"')
        rows = {record["uuid"]: record for record in records.values()}
        assert set(rows) == set(vdis)
        for uuid, row in rows.items():
            vdi = vdis[uuid]
            assert row["location"] == uuid
            assert (row["virtual_size"], row["is_a_snapshot"]) == (str(vdi["size_bytes"]), vdi["is_a_snapshot"]), uuid
            assert row["physical_utilisation"] == str(vdi["physical_utilisation_bytes"]), uuid
            if vdi["snapshot_of"] in vdis:
                assert records[row["snapshot_of"]]["uuid"] == vdi["snapshot_of"]
        [space] = [sr for sr in self.http.get("/v1/srs").json() if sr["uuid"] == self.sr_uuid]
        assert self.x.SR.get_virtual_allocation(self.sr) == str(space["virtual_allocation_bytes"])


# Every command, with what has to be there for it.


def on_a_disk(*args: str, **members: Any) -> Callable[[Lab], Prepared]:
    return lambda lab: (list(args), {"vdi": lab.vdi(), **members})


def attached(lab: Lab) -> Prepared:
    disk = lab.vdi()
    lab.post(disk, "attach", {"client": f"sm:{lab.world.host}", "writable": True})
    return [], {"vdi": disk}


def introducible(lab: Lab) -> Prepared:
    disk = lab.vdi(row=False)
    return [], {"vdi_location": disk, "new_uuid": disk, "vdi_sm_config": {}}


def renamed(lab: Lab) -> Prepared:
    disk = lab.vdi()
    lab.x.VDI.forget(lab.ref(disk))
    lab.as_plugin("VDI.db_introduce", disk, "renamed", "anew", lab.sr, "user", False, False, {}, disk, {}, {}, True, str(DISK_BYTES),
                  "0", NULL, False, xmlrpc.client.DateTime("19700101T00:00:00Z"), NULL, False)  # fmt: skip
    return [], {"vdi": disk}


def revertible(lab: Lab) -> Prepared:
    """The disk has grown since the snapshot, so that a revert changes rows and not only data."""
    disk = lab.vdi()
    snapshot = lab.post(disk, "snapshot", {"name": "snapshot"})
    lab.http.post(f"/v1/vdis/{disk}/resize", json={"size_bytes": 2 * DISK_BYTES})
    lab.as_plugin("VDI.set_virtual_size", lab.ref(disk), str(2 * DISK_BYTES))
    return [lab.ref(disk)], {"vdi": snapshot}


def with_an_orphan(lab: Lab) -> Prepared:
    """A scan has a row to make, one to remove, one to change and a link to set."""
    disk = lab.vdi("kept")
    lab.post(disk, "snapshot", {"name": "snapshot"}, row=False)
    lab.vdi("new", row=False)
    lab.as_plugin("VDI.set_virtual_size", lab.ref(disk), "1")
    gone = str(uuid_module.uuid4())
    lab.as_plugin("VDI.db_introduce", gone, "gone", "", lab.sr, "user", False, False, {}, gone, {}, {}, True, str(DISK_BYTES), "0", NULL,
                  False, xmlrpc.client.DateTime("19700101T00:00:00Z"), NULL, False)  # fmt: skip
    return [], {}


def tracked(lab: Lab) -> tuple[str, str]:
    disk = lab.vdi()
    lab.post(disk, "cbt", {"enabled": True})
    return disk, lab.post(disk, "snapshot", {"name": "snapshot"})


def composed(lab: Lab) -> Prepared:
    return [lab.ref(lab.vdi("parent"))], {"vdi": lab.vdi("child")}


CREATE_ARGS = [str(DISK_BYTES), "made", "", "", "false", "19700101T00:00:00Z", "", "false"]

CASES: dict[str, Callable[[Lab], Prepared]] = {
    "sr_probe": lambda lab: ([], {}),
    "sr_attach": with_an_orphan,
    "sr_detach": attached,
    "sr_scan": with_an_orphan,
    "sr_update": lambda lab: ([], {}),
    "vdi_create": lambda lab: (CREATE_ARGS, {"vdi_type": "user", "vdi_sm_config": {}}),
    "vdi_introduce": introducible,
    "vdi_delete": on_a_disk(),
    "vdi_attach": on_a_disk("true"),
    "vdi_detach": attached,
    "vdi_activate": on_a_disk("true"),
    "vdi_deactivate": on_a_disk(),
    "vdi_snapshot": on_a_disk(driver_params={}),
    "vdi_clone": on_a_disk(driver_params={}),
    "vdi_resize": on_a_disk(str(2 * DISK_BYTES)),
    "vdi_resize_online": on_a_disk(str(2 * DISK_BYTES)),
    "vdi_update": renamed,
    "vdi_epoch_begin": on_a_disk(),
    "vdi_epoch_end": on_a_disk(),
    "vdi_revert": revertible,
    "vdi_compose": composed,
    "vdi_generate_config": on_a_disk(),
    "vdi_attach_from_config": on_a_disk("true"),
    "vdi_detach_from_config": attached,
    "vdi_enable_cbt": on_a_disk(),
    "vdi_disable_cbt": lambda lab: ([], {"vdi": tracked(lab)[0]}),
    "vdi_data_destroy": lambda lab: ([], {"vdi": tracked(lab)[1]}),
    "vdi_list_changed_blocks": lambda lab: (lambda pair: ([lab.ref(pair[0])], {"vdi": pair[1]}))(tracked(lab)),
}
"""All commands but those that ask nobody (``sr_get_driver_info``, ``sr_content_type``) and those on whole SRs, which are tested apart."""

ASK_NOBODY = {"sr_get_driver_info", "sr_content_type"}
DO_WITHOUT_XAPI = {"vdi_deactivate", "vdi_detach_from_config"}
"""What must succeed when a host goes down: the activation key that stays is in force no more, and the next host removes it."""
WHOLE_SR = {"sr_create", "sr_delete"}

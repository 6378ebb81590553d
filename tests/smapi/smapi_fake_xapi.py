"""A stand-in for xapi: the XenAPI calls of an SM back end over two tables, strict about the types of arguments."""

import re
import uuid as uuid_module
import xmlrpc.client

from smapi_fakes import Model, Refused

NULL_REF = "OpaqueRef:NULL"


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
    "virtual_allocation": is_digits, "physical_size": is_digits, "cbt_enabled": is_bool,
}


class FakeXapi(Model):
    """`failures` maps a method to the error it fails with, [CODE, parameter...]; `garbage` to (status, bytes)."""

    def __init__(self):
        super().__init__()
        self.session_ref = new_ref()
        self.tables = {name: {} for name in ("SR", "VDI", "VBD", "VM", "host", "host_metrics")}
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
            "is_a_snapshot": False, "snapshot_of": NULL_REF, "cbt_enabled": False, "VBDs": [],
        }, **fields))

    def add_host(self, live=True):
        return self.add("host", metrics=self.add("host_metrics", live=live))

    def add_vbd(self, vdi_ref, power_state="Halted", is_control_domain=False):
        vm = self.add("VM", uuid=str(uuid_module.uuid4()), power_state=power_state, is_control_domain=is_control_domain)
        self.tables["VDI"][vdi_ref]["VBDs"].append(self.add("VBD", VM=vm, VDI=vdi_ref))
        return vm

    def methods(self):
        return [method for method, _ in self.calls]

    def writes(self):
        return [method for method in self.methods() if not re.search(r"\.get_", method)]

    def handle(self, method, target, headers, body):
        assert (method, target, headers["Content-Type"]) == ("POST", "/", "text/xml")
        parameters, name = xmlrpc.client.loads(body)
        stopped = self.stopped()
        is_invalid = stopped and self.fails_how == "invalid"  # the server is there, the session has ended
        if stopped == "gone" and not is_invalid:
            return None
        with self.lock:
            self.calls.append((name, parameters[1:]))
            self.headers.append(dict(headers))
        if name in self.garbage:
            return self.garbage[name]
        try:
            if is_invalid:
                raise Refused(["SESSION_INVALID", parameters[0]])
            self.interfere(name)
            with self.lock:
                answer = {"Status": "Success", "Value": self.call(name, *parameters)}
        except Refused as refusal:
            if refusal.args[0] is None:
                return None
            answer = {"Status": "Failure", "ErrorDescription": refusal.args[0]}
        if stopped == "done":
            return None
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
        if action == "get_record":
            return row
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
        taken = [(other["SR"], other["location"]) for other in self.tables["VDI"].values()]
        if (row["SR"], row["location"]) in taken:
            raise Refused(["LOCATION_NOT_UNIQUE", row["SR"], row["location"]])
        return self.add("VDI", VBDs=[], **row)


def new_ref():
    return "OpaqueRef:" + str(uuid_module.uuid4())

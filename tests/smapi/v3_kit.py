"""Runs the SMAPIv3 scripts as xapi-storage-script does, and takes their answers as strictly.

A call is a process with the one argument --json, the parameters as one JSON object on standard input, and the environment
of the caller. The shapes checked here are those of the interface's records: no member more, no null for what is absent.
"""

import json
import os
import subprocess

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nbd

from smapi_kit import SR_UUID

TREE = Path(__file__).parents[2] / "simsr" / "smapi" / "v3"
VOLUME = TREE / "volume" / "org.xen.xapi.storage.simsr"
DATAPATH = TREE / "datapath" / "nbd+simsr"

SCHEME = "nbd+simsr"

VOLUME_RECORD = {
    "key": str, "uuid": str, "name": str, "description": str, "read_write": bool, "sharable": bool, "virtual_size": int,
    "physical_utilisation": int, "uri": list, "keys": dict, "volume_type": str, "cbt_enabled": bool,
}
SR_STAT = {
    "sr": str, "name": str, "uuid": str, "description": str, "free_space": int, "total_space": int, "datasources": list,
    "clustered": bool, "health": list,
}


class ScriptError(Exception):
    """The error object of a script that failed."""

    def __init__(self, answer):
        assert answer.keys() == {"code", "params", "backtrace"} and type(answer["code"]) is str
        assert all(type(text) is str for text in answer["params"])
        trace = answer["backtrace"]
        assert trace.keys() == {"error", "files", "lines"} and type(trace["error"]) is str
        assert all(type(path) is str for path in trace["files"]) and all(type(line) is int for line in trace["lines"])
        assert len(trace["files"]) == len(trace["lines"])
        super().__init__(answer["code"], *answer["params"])
        self.code, self.params = answer["code"], answer["params"]
        self.text = "".join(self.params)
        assert "Traceback" not in self.text


def script(name, tree=None):
    folder = tree or (DATAPATH if name.startswith("Datapath.") else VOLUME)
    interpreter = os.environ.get("SIMSR_PLUGIN_PYTHON")
    return [interpreter, str(folder / name)] if interpreter else [str(folder / name)]


def start(command, **environment):
    return subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process, stdin):
    """Send the parameters (bytes) and return the result, or raise what the script answered instead."""
    output, errors = process.communicate(stdin, timeout=120)
    assert errors == b"", errors.decode()
    answer = json.loads(output.decode("ascii"))
    if process.returncode:
        raise ScriptError(answer)
    return answer


def call(method, tree=None, **parameters):
    stdin = json.dumps({"dbg": "OpaqueRef:trace", **parameters}).encode()
    return finish(start([*script(method, tree), "--json"]), stdin)


def checked(record, shape):
    assert {key: type(value) for key, value in record.items()} == shape, record
    return record


def checked_volume(record):
    checked(record, VOLUME_RECORD)
    assert all(type(text) is str for item in record["keys"].items() for text in item)
    assert all(type(uri) is str and uri.partition(":")[0] == DATAPATH.name for uri in record["uri"]) and record["uri"]
    assert record["volume_type"] in ("Data", "CBT_Metadata", "Data_and_CBT_Metadata")
    return record


class Volumes:
    """Calls about the volumes of one SR."""

    def __init__(self, socket, uuid=SR_UUID):
        self.configuration = call("SR.create", uuid=uuid, configuration={"socket": socket}, name="my SR", description="")
        self.sr = call("SR.attach", configuration=self.configuration)

    def call(self, method, **parameters):
        return call(method, sr=self.sr, **parameters)

    def create(self, size=1 << 20, name="disk", **parameters):
        return checked_volume(self.call("Volume.create", **{
            "name": name, "description": "", "size": size, "sharable": False, **parameters}))

    def snapshot(self, volume):
        return checked_volume(self.call("Volume.snapshot", key=volume["key"]))

    def stat(self, volume):
        return checked_volume(self.call("Volume.stat", key=volume["key"]))

    def ls(self):
        return {volume["key"]: checked_volume(volume) for volume in self.call("SR.ls")}


def nbd_io(volume, *commands):
    """Do what qemu-io does with ``read|write [-z] [-P PATTERN] OFFSET LENGTH``, but at once, past the datapath and without a process."""
    (uri,) = volume["uri"]
    root = os.path.dirname(parse_qs(urlsplit(uri).query)["socket"][0])
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///{volume['key']}?socket={root}/nbd.sock")
    for command in commands:
        verb, *options, offset, length = command.split()
        offset, length = (int(text.replace("k", "")) * (1024 if "k" in text else 1) for text in (offset, length))
        pattern = bytes([int(options[1], 0) if options[:1] == ["-P"] else 0]) * length
        if verb == "read":
            assert handle.pread(length, offset) == pattern, command
        elif options == ["-z"]:
            handle.zero(length, offset)
        else:
            handle.pwrite(pattern, offset)
    handle.flush()
    handle.shutdown()


def qemu_io(volume, *commands, domain="5"):
    """Open, attach and activate as xapi does, run qemu-io on the NBD address of the answer, undo all."""
    (uri,) = volume["uri"]
    implementations = dict(call("Datapath.attach", uri=uri, domain=domain)["implementations"])
    path, export = implementations["Nbd"]["uri"].removeprefix("nbd:unix:").split(":exportname=")
    assert call("Datapath.activate", uri=uri, domain=domain) is None
    arguments = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *arguments, f"nbd+unix:///{export}?socket={path}"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert call("Datapath.deactivate", uri=uri, domain=domain) is None
    assert call("Datapath.detach", uri=uri, domain=domain) is None
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr



"""``simsr xe`` against the real thing: a session as a script would have it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
from xapi_kit import MIB, ROOT

from simsr.cli.main import main
from simsr.cli.xe import Arguments
from simsr.errors import BadRequest


@pytest.fixture
def xe(upstream, capfd):
    """Run ``simsr xe`` in this process and return its output; with ``status`` given, its complaints."""

    def run(*words: str, status: int = 0) -> str:
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as ended:
                main(["xe", "--xapi", upstream.xapi.socket, *words])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        assert ended.value.code == status, err
        return err if status else out.rstrip("\n")

    return run


def test_the_life_of_a_disk(xe, upstream):
    sr = xe("sr-create", "name-label=cli", "type=sim", f"device-config:socket={upstream.simsrd.socket}",
            f"device-config:xapi_socket={upstream.xapi.socket}")  # fmt: skip
    disk = xe("vdi-create", f"sr-uuid={sr}", "name-label=root", "virtual-size=4MiB", "other-config:owner=me")
    assert xe("vdi-param-get", f"uuid={disk}", "param-name=virtual-size") == str(4 * MIB)
    assert xe("vdi-param-get", f"uuid={disk}", "param-name=other-config", "param-key=owner") == "me"
    ref = upstream.x.VDI.get_by_uuid(disk)
    upstream.fill(ref, 0x11)
    snapshot = xe("vdi-snapshot", f"uuid={disk}")
    upstream.fill(ref, 0x22)
    assert xe("vdi-revert", f"uuid={snapshot}") == ""
    upstream.holds(ref, 0x11)
    assert set(xe("vdi-list", f"sr-uuid={sr}", "--minimal").split(",")) == {disk, snapshot}
    assert "REVERT_ONLY_ALLOWED_ON_SNAPSHOT" in xe("vdi-revert", f"uuid={disk}", status=1)
    xe("vdi-resize", f"uuid={disk}", "disk-size=8MiB")
    clone = xe("vdi-clone", f"uuid={snapshot}", "new-name-label=copy")
    for uuid in (disk, snapshot, clone):
        xe("vdi-destroy", f"uuid={uuid}")
    pbd = xe("pbd-list", f"sr-uuid={sr}", "--minimal")
    xe("pbd-unplug", f"uuid={pbd}")
    xe("sr-destroy", f"uuid={sr}")
    assert sr not in xe("sr-list", "params=uuid")


def test_the_life_of_a_vm_as_cloudstacks_script_reads_it(xe, upstream, native_sr):
    vm = xe("vm-install", "template=Other install media", "new-name-label=i-2-3-VM")
    disk = upstream.vdi(native_sr)
    xe("vbd-create", f"vm-uuid={vm}", f"vdi-uuid={upstream.uuid(disk)}", "device=0")
    listed = xe("vbd-list", f"vm-uuid={vm}")
    assert re.search(r"^ *vdi-uuid \( RO\): " + upstream.uuid(disk) + "$", listed, re.M), listed
    assert re.match(r"uuid \( RO\) +: [0-9a-f-]{36}\n +vm-uuid \( RO\): ", listed)
    assert len({line.index(": ") for line in listed.splitlines() if line}) == 1
    xe("vm-start", "vm=i-2-3-VM")
    snapshot = xe("vm-snapshot", "vm=i-2-3-VM", "new-name-label=s1")
    assert xe("snapshot-list", "name-label=s1", "--minimal") == snapshot
    assert xe("vm-list", "name-label=i-2-3-VM", "params=power-state", "--minimal") == "running"
    xe("vm-shutdown", "force=true", "vm=i-2-3-VM")
    assert xe("vm-param-get", "param-name=power-state", f"uuid={vm}") == "halted"
    assert xe("snapshot-revert", f"snapshot-uuid={snapshot}") == ""
    assert xe("snapshot-revert", f"uuid={snapshot}") == ""
    xe("vm-destroy", f"uuid={vm}")
    xe("snapshot-uninstall", f"snapshot-uuid={snapshot}", "--force")
    assert xe("vm-list", "name-label=i-2-3-VM", "--minimal") == ""


def test_parameters(xe, upstream):
    vm = xe("vm-install", "template=Other install media", "new-name-label=parameters")
    xe("vm-param-set", f"uuid={vm}", "name-description=what it is for", "other-config:key=value")
    listed = xe("vm-param-list", f"uuid={vm}")
    assert re.search(r"name-description \( RW\): what it is for$", listed, re.M)
    assert re.search(r"other-config \(MRW\): .*key: value", listed)
    xe("vm-param-remove", f"uuid={vm}", "param-name=other-config", "param-key=key")
    assert "no such key" in xe("vm-param-get", f"uuid={vm}", "param-name=other-config", "param-key=key", status=2)
    assert xe("vm-list", "name-description=what it is for", "--minimal") == vm


def test_parameters_that_are_references_sets_and_maps(xe, upstream, native_sr):
    x = upstream.x
    pool, sr = xe("pool-list", "--minimal"), x.SR.get_uuid(native_sr)
    xe("pool-param-set", f"uuid={pool}", f"default-SR={sr}")
    assert xe("pool-list", "params=default-SR", "--minimal") == sr
    assert re.search(rf"default-SR \( RW\): {sr}$", xe("pool-list"), re.M)
    assert "must be the uuid of an object" in xe("pool-param-set", f"uuid={pool}", "default-SR=elsewhere", status=2)
    xe("pool-param-set", f"uuid={pool}", "default-SR=")
    assert xe("pool-param-get", f"uuid={pool}", "param-name=default-SR") == "<not in database>"
    vm = xe("vm-install", "template=Other install media", "new-name-label=sets and maps", "--minimal")
    xe("vm-param-add", f"uuid={vm}", "param-name=tags", "param-key=first")
    xe("vm-param-add", f"uuid={vm}", "param-name=tags", "param-key=second")
    xe("vm-param-add", f"uuid={vm}", "param-name=platform", "a=1", "b=2")
    assert xe("vm-param-get", f"uuid={vm}", "param-name=tags") == "first; second"
    assert xe("vm-param-get", f"uuid={vm}", "param-name=platform") == "a: 1; b: 2"
    xe("vm-param-remove", f"uuid={vm}", "param-name=tags", "param-key=first")
    assert xe("vm-param-get", f"uuid={vm}", "param-name=tags") == "second"
    assert "is missing" in xe("vm-param-add", f"uuid={vm}", "param-name=tags", status=2)
    listed = xe("vm-param-list", f"uuid={vm}")
    assert re.search(r" metrics \( RO\): [0-9a-f-]{36}$", listed, re.M) and re.search(r" PV-args \( RW\): ?$", listed, re.M)


def test_a_snapshot_with_the_name_of_its_vm(xe, upstream):
    vm = xe("vm-install", "template=Other install media", "new-name-label=twin")
    snapshot = xe("vm-snapshot", "vm=twin", "new-name-label=twin", "--minimal")
    xe("vm-start", "vm=twin")
    assert xe("vm-list", "power-state=running", "name-label=twin", "--minimal") == vm
    xe("vm-shutdown", "vm=twin", "--force")
    xe("snapshot-destroy", f"uuid={snapshot}")
    copy = xe("vm-clone", "vm=Other install media", "new-name-label=a template by name")
    assert xe("template-list", "name-label=a template by name", "--minimal") == copy


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["vm-lst"], 2, "did you mean vm-list?"),
        (["vm-start"], 2, "vm= or uuid= is missing"),
        (["vm-start", "vm=nobody"], 10, "no VM is called 'nobody'\nHint: 'simsr xe vm-list'"),
        (["vm-start", "uuid=parameters"], 10, "no VM is called"),
        (["vm-start", "parameters"], 2, "not of the form key=value"),
        (["host-list", "params=nonsense"], 2, "no such field"),
        (["vdi-create", "name-label=x"], 2, "sr-uuid"),
        (["sr-create", "name-label=x", "type=none"], 1, "SR_UNKNOWN_DRIVER none"),
        (["sr-list", "params=uuid", "nonsense=1"], 2, "no such field"),
        (["vm-start", "vm=i", "nonsense=1"], 10, "no VM"),
    ],
)
def test_mistakes(xe, words, status, said):
    answer = xe(*words, status=status)
    assert said in answer and "Traceback" not in answer


def test_arguments_that_nobody_asked_for():
    arguments = Arguments.parse(["uuid=1", "extra=2"])
    assert arguments.need("uuid") == "1"
    with pytest.raises(BadRequest, match="extra"):
        arguments.finish()


def test_nobody_at_the_socket():
    command = [sys.executable, "-m", "simsr.cli.main", "xe", "--xapi", "/nonexistent", "vm-list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 4 and "cannot be reached at /nonexistent" in done.stderr

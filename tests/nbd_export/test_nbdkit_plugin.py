"""The plug-in for nbdkit against a real daemon: what passes through it is what the daemon serves itself."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import nbd
import pytest
from daemon_tools import Simsrd, running_simsrd
from interop_tools import run
from nbd_wire import KIB, MIB

TOP = Path(__file__).parents[2]
PLUGIN = str(TOP / "nbd_export" / "nbdkit_plugin.py")
PAGE = (TOP / "docs" / "nbdkit.md").read_text()


def nbdkit(simsrd: Simsrd, *parameters: str, options: tuple[str, ...] = ()) -> list[str]:
    return ["nbdkit", *options, "python", PLUGIN, f"socket={simsrd.nbd_socket}", *parameters]


@pytest.fixture
def connect(shared, make_vdi):  # make_vdi: its disks go after the connections
    """``connect("export=...")``: libnbd, connected to an nbdkit of its own that runs the plug-in."""
    handles = []

    def connecting(*parameters: str, name: str = "", options: tuple[str, ...] = ()) -> nbd.NBD:
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.set_export_name(name)
        handle.set_strict_mode(0)
        command = nbdkit(shared, *parameters, options=("-s", "--exit-with-parent", *options))
        handle.connect_command(command)
        handles.append(handle)
        return handle

    yield connecting
    for handle in handles:
        if handle.aio_is_ready():
            handle.shutdown()


def described(text: str) -> dict:
    """What ``nbdinfo --json`` says of an export; the plug-in has an address of its own, and only one context."""
    (export,) = json.loads(text)["exports"]
    assert "base:allocation" in export.pop("contexts")
    return {key: value for key, value in export.items() if key not in ("uri", "export-name")}


def through(simsrd: Simsrd, command: str, *parameters: str, options: tuple[str, ...] = ()) -> str:
    """What a shell command says that is run on the plug-in's socket."""
    return run(*nbdkit(simsrd, *parameters, options=("-U", "-", *options)), "--run", command)


# --- What is passed on -------------------------------------------------------------------------------------------


def test_an_export_is_described_as_the_daemon_describes_it(shared, disk):
    run("qemu-io", "-f", "raw", "-c", "write 1M 2M", disk["nbd_uri"])
    said = described(through(shared, 'nbdinfo --json "$uri"', f"export={disk['uuid']}"))
    assert said == described(run("nbdinfo", "--json", disk["nbd_uri"]))
    extents = json.loads(through(shared, 'nbdinfo --map --json "$uri"', f"export={disk['uuid']}"))
    assert extents == json.loads(run("nbdinfo", "--map", "--json", disk["nbd_uri"])) and len(extents) == 3


def test_a_snapshot_is_read_only(shared, disk):
    snapshot = shared.post(f"/v1/vdis/{disk['uuid']}/snapshot")
    said = json.loads(through(shared, 'nbdinfo --json "$uri"', f"export={snapshot['uuid']}"))["exports"][0]
    assert said["is_read_only"] is True


def test_images_pass_both_ways(shared, disk, image, folder):
    through(shared, f'nbdcopy {image} "$uri"', f"export={disk['uuid']}")
    assert run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), disk["nbd_uri"]) == "Images are identical.\n"
    through(shared, f'nbdcopy "$uri" {folder}/out', f"export={disk['uuid']}")
    assert Path(folder, "out").read_bytes() == image.read_bytes()


def test_commands_and_flags_reach_the_disk(connect, disk):
    handle = connect(f"export={disk['uuid']}")
    assert handle.get_size() == 32 * MIB and handle.can_multi_conn() and handle.can_fua() and handle.can_fast_zero()
    handle.pwrite(b"a" * MIB, 0)
    handle.pwrite(b"b" * MIB, MIB, nbd.CMD_FLAG_FUA)
    handle.zero(64 * KIB, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    handle.zero(64 * KIB, 64 * KIB, nbd.CMD_FLAG_FAST_ZERO)
    handle.trim(64 * KIB, 128 * KIB, nbd.CMD_FLAG_FUA)
    handle.cache(MIB, 0)
    handle.flush()
    direct = nbd.NBD()
    direct.connect_uri(disk["nbd_uri"])
    data = direct.pread(2 * MIB, 0)
    assert data == bytes(192 * KIB) + b"a" * (MIB - 192 * KIB) + b"b" * MIB == handle.pread(2 * MIB, 0)
    direct.pwrite(b"c" * 512, 12345)
    assert handle.pread(514, 12344) == b"\0" + b"c" * 512 + b"\0"
    direct.shutdown()


def test_requests_larger_than_the_daemon_takes(connect, make_vdi):
    handle = connect(f"export={make_vdi(64 * MIB)['uuid']}")
    data = random.Random(64).randbytes(MIB) * 40
    handle.pwrite(data, 5 * MIB)
    assert handle.pread(len(data), 5 * MIB) == data


def test_many_requests_at_once(connect, disk, seeds):
    handle = connect(f"export={disk['uuid']}", "connections=4")
    for seed in seeds(1):
        rng = random.Random(seed)
        content = bytearray(32 * MIB)
        places = rng.sample(range(32 * MIB // (64 * KIB)), 200)
        buffers = {}
        for place in places:
            piece = rng.randbytes(rng.randrange(1, 64 * KIB))
            content[place * 64 * KIB : place * 64 * KIB + len(piece)] = piece
            buffers[handle.aio_pwrite(nbd.Buffer.from_bytearray(piece), place * 64 * KIB)] = piece
        complete(handle, buffers)
        reads = {place: nbd.Buffer(64 * KIB) for place in places}
        complete(handle, {handle.aio_pread(buffer, place * 64 * KIB): buffer for place, buffer in reads.items()})
        for place, buffer in reads.items():
            assert buffer.to_bytearray() == content[place * 64 * KIB : (place + 1) * 64 * KIB]


def complete(handle: nbd.NBD, cookies) -> None:
    waiting = set(cookies)
    while waiting:
        handle.poll(-1)
        waiting -= {cookie for cookie in waiting if handle.aio_command_completed(cookie)}


def test_requests_run_in_parallel(shared):
    assert re.search(r"^thread_model=parallel$", run(*nbdkit(shared), "--dump-plugin"), re.MULTILINE)


def test_a_client_has_so_many_connections_and_leaves_none(shared, disk, connect):
    handle = connect(f"export={disk['uuid']}", "connections=3")
    assert len(shared.get(f"/v1/vdis/{disk['uuid']}")["attached"]) == 3
    handle.shutdown()
    snapshot = shared.post(f"/v1/vdis/{disk['uuid']}/snapshot")
    shared.post(f"/v1/vdis/{snapshot['uuid']}/revert")  # which waits a moment for clients that are leaving


def test_a_full_sr_is_enospc(shared, connect):
    shared.post("/v1/srs", name="small", limit_bytes=128 * MIB)
    disk = shared.post("/v1/vdis", size_bytes=256 * MIB, sr="small")
    handle = connect(f"export={disk['uuid']}")
    data = random.Random(1).randbytes(8 * MIB)
    with pytest.raises(nbd.Error) as caught:
        for offset in range(0, 256 * MIB, len(data)):
            handle.pwrite(data, offset)
    assert caught.value.errnum == errno.ENOSPC
    handle.flush()
    handle.shutdown()
    shared.delete(f"/v1/vdis/{disk['uuid']}")
    shared.delete("/v1/srs/small")


# --- Which disks -------------------------------------------------------------------------------------------------


def test_clients_choose_among_all_disks_or_those_of_an_sr(shared, make_vdi):
    first, second = make_vdi(MIB, "first"), make_vdi(2 * MIB, "second")
    sr = shared.post("/v1/srs", name="other / SR")
    third = shared.post("/v1/vdis", size_bytes=3 * MIB, sr=sr["uuid"], name="third")
    listing = 'nbdinfo --list --json "nbd+unix:///?socket=$unixsocket"'
    size = 'nbdinfo --size "nbd+unix:///{}?socket=$unixsocket"'

    def listed(*parameters: str) -> set[str]:
        return {export["export-name"] for export in json.loads(through(shared, listing, *parameters))["exports"]}

    assert {first["uuid"], second["uuid"], third["uuid"]} <= listed()
    assert listed("sr=other / SR") == {third["uuid"]}
    assert listed(f"export={first['uuid']}") == {first["uuid"]}
    for name in ("second", second["uuid"]):
        assert through(shared, size.format(name)) == f"{2 * MIB}\n"
    for name in ("third", third["uuid"], ""):
        assert through(shared, size.format(name), f"sr={sr['uuid']}") == f"{3 * MIB}\n"
    for name, parameters in (("nobody", ()), ("second", (f"sr={sr['uuid']}",))):
        run(*nbdkit(shared, *parameters, options=("-U", "-")), "--run", size.format(name), status=1)
    shared.delete(f"/v1/vdis/{third['uuid']}")
    shared.delete(f"/v1/srs/{sr['uuid']}")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (("exprt=x",), "did you mean export="), (("colour=red",), "there are socket="), (("export=",), "export= is empty"),
        (("export=a", "export=b"), "given twice"), (("socket=",), "twice"), (("control=/x",), "sr= only"),
        (("connections=0",), "1 to 16"), (("connections=17",), "1 to 16"), (("connections=x",), "1 to 16"),
        (("connections=²",), "1 to 16"), (("sr=nobody",), "nobody"), (("sr=nobody", "control=/x"), "/x"),
        (("export=nobody",), "nobody"), (("sr=x", "control=/" + "x" * 120), "longer than"),
    ],
)  # fmt: skip
def test_parameters_that_are_no_good(shared, folder, parameters, said):
    command = nbdkit(shared, *parameters, options=("-U", f"{folder}/s"))  # with "-" it would leave a directory in /tmp when it fails
    done = subprocess.run([*command, "--run", "true"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("nbdkit: error: simsr: "), done.stderr


def test_no_simsrd(folder):
    command = ["nbdkit", "-U", f"{folder}/s", "python", PLUGIN, f"socket={folder}/none", "--run", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"{folder}/none" in done.stderr and "Traceback" not in done.stderr


# --- The end of simsrd -------------------------------------------------------------------------------------------


def test_no_flush_succeeds_over_what_was_lost():
    with running_simsrd() as simsrd:
        disk = simsrd.create_sr() and simsrd.create_vdi(8 * MIB, "d")
        handle = nbd.NBD()
        handle.connect_command(nbdkit(simsrd, "export=d", options=("-s", "--exit-with-parent")))
        handle.pwrite(b"x" * 4096, 0)
        simsrd.stop(signal.SIGKILL)
        simsrd.start()
        for _ in range(6):  # more than there are connections
            with pytest.raises(nbd.Error):
                handle.flush()
        handle.shutdown()
        assert through(simsrd, 'nbdinfo --size "$uri"', f"export={disk['uuid']}") == f"{8 * MIB}\n"


# --- The page ----------------------------------------------------------------------------------------------------


def lines_of_the_page() -> list[str]:
    section = PAGE.split("\n## Three useful lines\n")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)\n```", section, re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_useful_lines(shared, disk, number):
    lines = lines_of_the_page()
    assert len(lines) == 3
    environment = {**os.environ, "plugin": PLUGIN, "socket": shared.nbd_socket, "disk": disk["uuid"]}
    done = subprocess.run(["bash", "-c", lines[number]], env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert ("Run completed", "No space left on device", "wrote 1048576/1048576")[number] in said
    assert (number == 1) == ("failed" in said), said
    map_ = json.loads(run("nbdinfo", "--map", "--json", disk["nbd_uri"]))
    assert [(extent["length"], extent["type"]) for extent in map_] == [(32 * MIB, 3)], "the disk was written to"


def test_the_page_names_the_parameters():
    source = Path(PLUGIN).read_text()
    names = re.findall(r'^    "(\w+)": ', source.split("PARAMETERS = {")[1].split("}")[0], re.MULTILINE)
    assert len(names) == 5
    assert all(f"| `{name}` |" in PAGE for name in names)

"""How a daemon starts, refuses to start, is found by systemd, and ends."""

from __future__ import annotations

import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from daemon_tools import Simsrd, running_simsrd, simsrd_command
from memory_limits import may_lock
from nbd_wire import FUA, MIB, READ, WRITE, WireClient

from simsr.daemon.listeners import split_address
from simsr.errors import BadRequest


def run(*arguments: str, timeout_s: float = 120, **options) -> subprocess.CompletedProcess:
    """Run a simsrd that is expected to end by itself."""
    return subprocess.run(
        simsrd_command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, **options
    )


def refused(*arguments: str, **options) -> str:
    """What a simsrd says that refuses to start: an error in words, not a traceback, and a status that is not 0."""
    done = run(*arguments, **options)
    assert done.returncode not in (0, 1) or "Permission" in done.stderr, f"status {done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr and "ready" not in done.stdout
    return done.stderr


@pytest.fixture
def simsrd(root):
    """A daemon that the test starts itself."""
    simsrd = Simsrd(root)
    yield simsrd
    simsrd.end()


# --- Arguments ---------------------------------------------------------------------------------------------------


def test_version():
    done = run("--version")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert (done.returncode, done.stdout) == (0, f"simsrd {project['project']['version']}\n")


def test_help():
    done = run("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("--root", "--socket", "--nbd-socket", "--nbd-tcp"))


@pytest.mark.parametrize("arguments", [[], ["--root", "x", "--log-level", "loud"]], ids=" ".join)
def test_wrong_arguments(arguments, folder):
    assert "usage: simsrd" in refused(*arguments, cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("address", ["0.0.0.0:10809", "[::]:10809"])
def test_plain_tcp_is_for_loopback_only(root, address):
    said = refused("--root", root, "--nbd-tcp", address)
    assert address in said and "loopback" in said


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", ":10809", "127.0.0.1:99999", "localhost:nbd", ""])
def test_addresses_that_are_none(address):
    with pytest.raises(BadRequest, match="HOST:PORT"):
        split_address("--nbd-tcp", address)


def test_a_tcp_port_that_is_taken(root):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refused("--root", root, "--nbd-tcp", address)
        assert address in said and "Errno" not in said


def test_a_socket_path_that_is_too_long(root, folder):
    path = f"{folder}/{'x' * 100}.sock"
    said = refused("--root", root, "--nbd-socket", path)
    assert path in said and "107 bytes" in said


def test_a_root_that_is_too_long_for_its_sockets(folder):
    assert "107 bytes" in refused("--root", f"{folder}/{'x' * 100}")


def test_a_root_that_cannot_be_made():
    done = run("--root", "/dev/null/root")
    assert (done.returncode, done.stderr) == (1, "simsrd: cannot use /dev/null/root: Not a directory\n")


def test_a_root_without_a_name():
    """Of a shell variable that is not set; it would mean the directory that one happens to be in."""
    assert refused("--root", "").startswith("simsrd: --root '' is not valid")


@pytest.mark.parametrize("package", ["simsr.daemon", "simsr.xapi"])
def test_ctrl_c_while_everything_is_being_imported(package):
    finder = "import runpy, signal, sys\nclass Finder:\n    find_spec = lambda self, name, *_: signal.raise_signal(signal.SIGINT) if name == 'trio' else None"
    script = f"{finder}\nsys.meta_path.insert(0, Finder())\nrunpy.run_module('{package}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_socket_in_a_directory_that_is_not_there(root, folder):
    assert f"{folder}/missing/s" in refused("--root", root, "--socket", f"{folder}/missing/s")


def test_a_socket_path_where_something_else_is(root, folder):
    path = Path(folder, "precious")
    path.write_text("precious")
    assert str(path) in refused("--root", root, "--socket", str(path))
    assert path.read_text() == "precious"


@pytest.mark.parametrize("option", ["--socket", "--nbd-socket"])
def test_a_socket_that_another_process_serves(root, folder, option):
    path = f"{folder}/theirs"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen()
        assert path in refused("--root", root, option, path)
        with socket.socket(socket.AF_UNIX) as still:
            still.connect(path)


def test_a_root_that_is_a_file(root):
    Path(root).write_text("")
    done = run("--root", root)
    assert done.returncode and root in done.stderr and "Traceback" not in done.stderr


# --- One daemon for a root ---------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_root_is_refused(daemon):
    daemon.create_sr()
    vdi = daemon.create_vdi(MIB)
    said = refused("--root", daemon.root)
    assert daemon.root in said and "another process" in said and "Hint:" in said
    assert daemon.get("/v1/daemon")["pid"] == daemon.pid, "the first one has lost its control socket"
    with WireClient.connect(daemon.nbd_socket, vdi["uuid"]) as client:
        assert client.read(0, 512) == bytes(512)
    with WireClient.connect(vdi["nbd_socket"]) as client:
        assert client.read(0, 512) == bytes(512)


def test_sockets_are_for_their_owner_only(daemon):
    daemon.create_sr()
    vdi = daemon.create_vdi(MIB)
    for path in (daemon.socket, daemon.nbd_socket, vdi["nbd_socket"]):
        mode = os.stat(path).st_mode
        assert stat.S_ISSOCK(mode) and not mode & 0o077, f"{path} has mode {mode:o}"
    for path in (daemon.root, f"{daemon.root}/sr", *Path(daemon.root, "sr").rglob("*")):
        assert not os.stat(path).st_mode & 0o077, f"{path} can be read by others"


# --- Ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_stop_leaves_nothing_to_replay(simsrd, number):
    simsrd.start().create_sr()
    vdi = simsrd.create_vdi(MIB, "disk")
    with WireClient.connect(vdi["nbd_socket"]) as client:
        for n in range(50):
            client.write(n * 4096, bytes([n + 1]) * 4096)
    simsrd.stop_cleanly(number)
    for path in (simsrd.socket, simsrd.nbd_socket):
        assert not os.path.lexists(path), f"{path} was left behind"
    simsrd.start()
    statistics = simsrd.get("/v1/srs")[0]["statistics"]
    # The checkpoint's own flush leaves a mark behind it in the log, which changes nothing.
    assert statistics["records_replayed"] <= 1 and not statistics["records_dropped"]
    with WireClient.connect(vdi["nbd_socket"]) as client:
        assert client.read(49 * 4096, 4096) == bytes([50]) * 4096
    simsrd.stop_cleanly()


def test_a_stop_while_clients_are_busy(simsrd):
    simsrd.start().create_sr()
    vdi = simsrd.create_vdi(8 * MIB)
    ended = []
    busy = threading.Barrier(5)

    def load() -> None:
        with WireClient.connect(vdi["nbd_socket"]) as client:
            busy.wait(120)
            try:
                while True:
                    for n in range(64):
                        client.send(WRITE, n * 4096, payload=b"x" * 4096, flags=n % 7 == 0 and FUA)
                    while client.reader.waiting:
                        client.receive()
            except OSError:
                ended.append(True)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    busy.wait(120)
    written = simsrd.get("/v1/daemon")["statistics"]["nbd"]["requests_total"]
    while simsrd.get("/v1/daemon")["statistics"]["nbd"]["requests_total"] < written + 5000:
        time.sleep(0.02)
    simsrd.stop_cleanly()
    for thread in threads:
        thread.join(120)
    assert len(ended) == 4


def test_a_stop_with_idle_and_stubborn_clients(simsrd):
    """Connections in every phase, and one that takes no answers; HTTP connections that stay open."""
    simsrd.start().create_sr()
    vdi = simsrd.create_vdi(8 * MIB)
    stubborn = WireClient.connect(vdi["nbd_socket"])
    stubborn.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            stubborn.send(READ, 0, 8 * MIB)
    in_handshake = socket.socket(socket.AF_UNIX)
    in_handshake.connect(simsrd.nbd_socket)
    silent_http = socket.socket(socket.AF_UNIX)
    silent_http.connect(simsrd.socket)
    silent_http.sendall(b"GET /v1/daemon HTTP/1.1\r\n")
    idle = WireClient.connect(simsrd.nbd_socket, vdi["uuid"])
    simsrd.stop_cleanly()
    for sock in (stubborn.sock, in_handshake, silent_http, idle.sock):
        sock.close()


def test_a_stop_right_after_the_start(simsrd):
    for _ in range(2):
        simsrd.start().stop_cleanly()


def test_killed_and_started_again(simsrd):
    simsrd.start().create_sr()
    vdi = simsrd.create_vdi(MIB)
    with WireClient.connect(vdi["nbd_socket"]) as client:
        client.write(4096, b"k" * 4096)
    simsrd.kill()
    assert os.path.lexists(simsrd.socket), "a daemon that was killed cannot have cleaned up"
    simsrd.start()
    assert simsrd.get("/v1/srs")[0]["statistics"]["records_replayed"] > 0
    with WireClient.connect(vdi["nbd_socket"]) as client:
        assert client.read(4096, 4096) == b"k" * 4096
    simsrd.stop_cleanly()


# --- What is found at the start ----------------------------------------------------------------------------------


def test_leftovers_of_a_crash_are_swept_up(simsrd):
    simsrd.start().create_sr()
    gone = simsrd.create_vdi(MIB)
    simsrd.kill()
    for name in (".new-11111111-2222-3333-4444-555555555555", ".deleted-99999999-2222-3333-4444-555555555555"):
        os.mkdir(f"{simsrd.root}/sr/{name}")
        Path(simsrd.root, "sr", name, "seg-00000001").write_bytes(bytes(1000))
    stale = Path(simsrd.root, "nbd", "aaaaaaaa-2222-3333-4444-555555555555.sock")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    simsrd.start()
    assert len(os.listdir(f"{simsrd.root}/sr")) == 1
    assert os.listdir(f"{simsrd.root}/nbd") == [os.path.basename(gone["nbd_socket"])]
    simsrd.delete(f"/v1/vdis/{gone['uuid']}")
    assert os.listdir(f"{simsrd.root}/nbd") == []
    simsrd.stop_cleanly()


def _spoil_super_blocks(path: Path) -> Path:
    for file in path.glob("super.*"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    return path


def _lose_a_segment(path: Path) -> Path:
    in_use = [file for file in path.glob("seg-*") if b"x" * 4096 in file.read_bytes()]
    assert in_use
    in_use[0].unlink()
    return path


def _empty(path: Path) -> Path:
    shutil.rmtree(path)
    path.mkdir()
    return path


def _another_format(path: Path) -> Path:
    for file in path.glob("super.*"):
        file.write_bytes(file.read_bytes()[:100])
    return path


def _a_stray_file(path: Path) -> Path:
    shutil.rmtree(path)
    path = path.with_name("notes.txt")
    path.write_text("left here by somebody")
    return path


def test_bad_srs_do_not_keep_the_others_from_being_served(simsrd):
    simsrd.start()
    good = simsrd.create_sr("good")
    kept = simsrd.create_vdi(MIB, "kept")
    spoilers = [_spoil_super_blocks, _lose_a_segment, _empty, _another_format, _a_stray_file]
    paths, lost = [], []
    for number, _ in enumerate(spoilers):
        paths.append(Path(simsrd.create_sr(f"bad {number}")["path"]))
        lost.append(simsrd.create_vdi(MIB, f"lost {number}", sr=f"bad {number}"))
        with WireClient.connect(lost[-1]["nbd_socket"]) as client:
            client.write(0, b"x" * 8192)
    simsrd.stop_cleanly()
    bad = {str(spoil(path)) for spoil, path in zip(spoilers, paths)}
    simsrd.start()
    failed = simsrd.get("/v1/daemon")["failed_srs"]
    assert set(failed) == bad and all(failed.values()), failed
    assert [sr["uuid"] for sr in simsrd.get("/v1/srs")] == [good["uuid"]]
    with WireClient.connect(kept["nbd_socket"]) as client:
        client.write(0, b"y" * 512)
    for vdi in lost:
        assert simsrd.api.get(f"/v1/vdis/{vdi['uuid']}").status_code == 404
    assert all(path in simsrd.log for path in bad)
    assert simsrd.stop() == 0
    assert all(os.path.exists(path) for path in bad), "a bad SR was removed"


# --- SRs that come and go ----------------------------------------------------------------------------------------


def test_srs_can_be_deleted_as_soon_as_they_are_made(daemon):
    """The daemon makes spare segment files in the background just then."""
    for n in range(4):
        sr = daemon.create_sr(f"sr {n}")
        time.sleep(0.02 * n)
        daemon.delete(f"/v1/srs/{sr['uuid']}")
        assert os.listdir(f"{daemon.root}/sr") == []
    assert daemon.get("/v1/srs") == []


def test_srs_that_come_and_go_leave_no_descriptors_behind(daemon):
    daemon.create_sr("stays")
    vdi = daemon.create_vdi(MIB)
    before, gone = daemon.fds("socket:"), []
    for n in range(3):
        sr = daemon.create_sr(f"sr {n}")
        gone.append(sr["uuid"])
        assert daemon.fds(gone[-1])
        disk = daemon.create_vdi(MIB, sr=sr["uuid"])
        daemon.delete(f"/v1/vdis/{disk['uuid']}")
        daemon.delete(f"/v1/srs/{sr['uuid']}")
    deadline = time.monotonic() + 120
    while daemon.fds("socket:") > before or any(map(daemon.fds, gone)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert daemon.get(f"/v1/vdis/{vdi['uuid']}")["uuid"] == vdi["uuid"]


# --- The rest ----------------------------------------------------------------------------------------------------


def test_openapi_is_served(daemon):
    document = daemon.get("/openapi.json")
    assert document["info"]["title"] == "simsrd"
    assert {"/v1/daemon", "/v1/srs", "/v1/vdis", "/v1/vdis/{vdi}/snapshot", "/v1/vdis/{vdi}/revert"} <= set(document["paths"])


def test_what_the_daemon_says_of_itself(daemon):
    status = daemon.get("/v1/daemon")
    assert status["pid"] == daemon.pid and status["root"] == daemon.root
    assert status["control_socket"] == daemon.socket and status["nbd_socket"] == daemon.nbd_socket
    assert status["nbd_tcp"] is None and status["failed_srs"] == {} and (status["sr_count"], status["vdi_count"]) == (0, 0)


def test_more_connections_than_the_soft_limit_of_descriptors(root):
    """Shells have a soft limit of 1024; the daemon raises it to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    command = f"ulimit -Sn 64; exec {sys.executable} -m simsr.daemon.main --root {root}"
    process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    sockets = []
    try:
        assert select.select([process.stdout], [], [], 120)[0] and b"ready" in process.stdout.readline()
        for _ in range(100):
            sock = socket.socket(socket.AF_UNIX)
            sockets.append(sock)
            sock.settimeout(120)
            sock.connect(f"{root}/nbd.sock")
            assert sock.recv(18)
    finally:
        for sock in sockets:
            sock.close()
        process.terminate()
        assert process.wait(120) == 0
        process.stdout.close()


def test_two_daemons_side_by_side():
    with running_simsrd() as two:
        two.create_sr("a")
        with running_simsrd() as one:
            one.create_sr("a")
            assert one.get("/v1/srs")[0]["uuid"] != two.get("/v1/srs")[0]["uuid"]
        assert len(two.get("/v1/srs")) == 1


def test_the_log_names_no_bug_after_all_this(daemon):
    daemon.create_sr()
    for path in ("/v1/nothing", "/v1/vdis/none", "/"):
        assert daemon.api.get(path).status_code == 404
    assert daemon.api.post("/v1/vdis", content=b"{").status_code == 400
    assert not re.search("Traceback", daemon.log)


# --- What is read much -------------------------------------------------------------------------------------------


def locked_kib(simsrd: Simsrd) -> int:
    return int(re.search(r"VmLck:\s+(\d+) kB", Path(f"/proc/{simsrd.pid}/status").read_text())[1])


@pytest.mark.parametrize(("option", "kept"), [("0", False), ("33MiB", True)])
def test_hot_memory(option, kept):
    if kept and not may_lock(33 * MIB):
        pytest.skip("may not lock 33 MiB (ulimit -l)")
    with running_simsrd("--hot-memory", option) as simsrd:
        simsrd.post("/v1/srs", name="main")
        vdi = simsrd.post("/v1/vdis", name="disk", size_bytes=4 * MIB)
        bench = ["qemu-img", "bench", "-f", "raw", "-s", "65536", "-d", "8"]
        subprocess.run([*bench, "-w", "-c", "64", "--pattern=7", vdi["nbd_uri"]], check=True, capture_output=True, timeout=60)
        subprocess.run([*bench, "-c", "2000", vdi["nbd_uri"]], check=True, capture_output=True, timeout=60)
        (statistics,) = simsrd.get("/v1/daemon")["statistics"]["srs"].values()
        assert statistics["hot_bytes"] == (32 * MIB if kept else 0) and locked_kib(simsrd) == (32 << 10 if kept else 0)
        compare = ["qemu-io", "-f", "raw", "-r", "-c", "read -P 7 0 4M", vdi["nbd_uri"]]
        assert "read 4194304/4194304" in subprocess.run(compare, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("size", ["-1", "much", "1.5"])
def test_hot_memory_that_is_no_size(root, size):
    assert "size" in refused("--root", str(root), f"--hot-memory={size}")

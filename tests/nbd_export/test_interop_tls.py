"""TLS between other people's clients and a real daemon, on an address that is not loopback."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys

import nbd
import pytest
from daemon_tools import Simsrd, running_simsrd, simsrd_command
from interop_tools import run
from nbd_wire import MIB, MODERN, WireClient, go
from tls_kit import certificates, client_context

from nbd_export import constants as c
from simsr.daemon.main import _nbd_options, _parser
from simsr.errors import BadRequest


@pytest.fixture(scope="module")
def pki():
    with certificates() as directory:
        yield directory


@pytest.fixture(scope="module")
def shared(pki):
    """A daemon for everybody on the network who has a certificate, and for this machine with TLS or without."""
    with running_simsrd("--nbd-tcp", "0.0.0.0:0", "--nbd-tls-dir", pki, "--tls-verify-peer") as simsrd:
        simsrd.create_sr()
        yield simsrd


class Remote:
    """How clients find a disk over TCP."""

    def __init__(self, shared: Simsrd, pki: str) -> None:
        self.pki, self.port = pki, int(shared.get("/v1/daemon")["nbd_tcp"].rpartition(":")[2])

    def uri(self, disk: dict, client: str = "alice") -> str:
        return f"nbds://localhost:{self.port}/{disk['uuid']}?tls-certificates={self.pki}/clients/{client}"

    def plain(self, disk: dict) -> str:
        return f"nbd://localhost:{self.port}/{disk['uuid']}"

    def qemu(self, disk: dict, client: str = "alice") -> tuple[list[str], str]:
        """(arguments, image)"""
        credentials = f"tls-creds-x509,id=tls,endpoint=client,dir={self.pki}/clients/{client}"
        image = f"driver=nbd,host=localhost,port={self.port},export={disk['uuid']},tls-creds=tls"
        return ["--object", credentials, "--image-opts"], image


@pytest.fixture
def remote(shared, pki) -> Remote:
    return Remote(shared, pki)


def test_the_daemon_says_so(shared, pki):
    said = shared.get("/v1/daemon")
    assert said["nbd_tls"] == "on" and said["nbd_tcp"].startswith("0.0.0.0:")


def test_nbdinfo(remote, disk):
    (export,) = json.loads(run("nbdinfo", "--json", remote.uri(disk)))["exports"]
    assert export["export-size"] == 32 * MIB
    run("nbdinfo", "--is", "tls", remote.uri(disk))
    assert disk["uuid"] in run("nbdinfo", "--list", remote.uri({"uuid": ""}))


def test_nbdinfo_on_a_unix_socket_with_tls_and_without(shared, remote, disk):
    part = f"?socket={shared.nbd_socket}"
    run("nbdinfo", "--is", "tls", f"nbds+unix:///{disk['uuid']}{part}&tls-certificates={remote.pki}/clients/bob&tls-hostname=localhost")
    run("nbdinfo", "--size", f"nbd+unix:///{disk['uuid']}{part}")


def test_without_tls_or_a_certificate_nobody_gets_in(remote, disk, pki):
    run("nbdinfo", "--size", remote.plain(disk), status=1)
    run("qemu-img", "info", f"nbd://localhost:{remote.port}/{disk['uuid']}", status=1)
    only_ca = f"nbds://localhost:{remote.port}/{disk['uuid']}?tls-certificates={pki}/nothing"
    os.makedirs(f"{pki}/nothing", exist_ok=True)
    run("cp", f"{pki}/ca-cert.pem", f"{pki}/nothing/")
    run("nbdinfo", "--size", only_ca, status=1)
    run("nbdinfo", "--size", remote.uri(disk).replace(f"{pki}/clients", f"{pki}/other/clients"), status=1)


def test_nbdcopy_from_disk_to_disk(remote, make_vdi, image, folder):
    first, second = make_vdi(32 * MIB), make_vdi(32 * MIB)
    run("nbdcopy", "--connections=4", "--requests=32", str(image), remote.uri(first))
    run("nbdcopy", remote.uri(first), remote.uri(second, "bob"))
    run("nbdcopy", remote.uri(second), f"{folder}/back")
    run("cmp", str(image), f"{folder}/back")
    assert os.stat(f"{folder}/back").st_blocks * 512 < 16 * MIB, "holes came back as data"


def test_qemu_img(remote, make_vdi, image, folder):
    first, second = make_vdi(32 * MIB), make_vdi(32 * MIB)
    options, source = remote.qemu(first)
    _, target = remote.qemu(second)
    credentials, run_options = options[:2], ["-n", "--target-image-opts"]
    run("qemu-img", "convert", *credentials, *run_options, "-f", "raw", str(image), source)
    run("qemu-img", "convert", *options, *run_options, source, target)
    assert "identical" in run("qemu-img", "compare", *options, source, target)
    mapped = json.loads(run("qemu-img", "map", "--output=json", *options, source))
    local = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", first["nbd_uri"]))
    assert [(one["start"], one["length"], one["data"]) for one in mapped] == [(one["start"], one["length"], one["data"]) for one in local]
    assert any(not one["data"] for one in mapped) and any(one["data"] for one in mapped)
    run("qemu-img", "convert", *options, "-O", "qcow2", target, f"{folder}/copy.qcow2")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(image), f"{folder}/copy.qcow2")


def test_qemu_io_with_flushes(remote, disk):
    options, image = remote.qemu(disk)
    said = run("qemu-io", *options, "-c", "write -P 7 1M 3M", "-c", "write -f -P 8 5M 512", "-c", "flush", "-c", "read -P 7 1M 3M", image)
    assert "failed" not in said
    run("qemu-io", *options, "-c", "read -P 8 5M 512", "-c", "discard 0 4M", "-c", "read -P 0 0 4M", image)


def test_disks_of_one_client(shared, remote, disk):
    answer = shared.api.patch(f"/v1/vdis/{disk['uuid']}/nbd", json={"allow": ["cn:alice"]})
    assert answer.is_success
    assert run("nbdinfo", "--size", remote.uri(disk)).strip() == str(32 * MIB)
    assert disk["uuid"] in run("nbdinfo", "--list", remote.uri({"uuid": ""}, "alice"))
    run("nbdinfo", "--size", remote.uri(disk, "bob"), status=1)
    handle = nbd.NBD()
    with pytest.raises(nbd.Error, match="not permitted|EPERM|Operation"):
        handle.connect_uri(remote.uri(disk, "bob"))
    with pytest.raises(AssertionError, match="0x80000002"):  # NBD_REP_ERR_POLICY, whatever libnbd makes of it
        WireClient.connect(disk["nbd_socket"])


def test_hostile_clients_cost_nobody_else_anything(shared, remote, disk):
    """Half of a handshake, garbage as TLS, and a flood of both, while somebody works."""
    with WireClient.connect(disk["nbd_socket"]) as worker:
        stuck = []
        for n in range(60):
            sock = socket.create_connection(("127.0.0.1", remote.port))
            sock.settimeout(120)
            sock.recv(18, socket.MSG_WAITALL)
            sock.sendall(MODERN + b"IHAVEOPT" + struct.pack(">II", c.NBD_OPT_STARTTLS, 0))
            if n % 3:
                sock.recv(20, socket.MSG_WAITALL)
                sock.sendall(b"\x16\x03\x01\x40\x00" if n % 3 == 1 else os.urandom(5000))
            else:
                sock.sendall(go(disk["uuid"]))
            stuck.append(sock)
            worker.write(n * 4096, bytes([n]) * 4096)
            assert worker.read(n * 4096, 4096) == bytes([n]) * 4096
        run("nbdinfo", "--size", remote.uri(disk))
        for sock in stuck:
            sock.close()
        worker.disconnect()
    shared.wait_for_connections(0)


def test_a_client_of_python(remote, disk, pki):
    """The whole conversation with a TLS library that is neither ours nor GnuTLS's wrapper in libnbd."""
    with socket.create_connection(("127.0.0.1", remote.port)) as sock:
        sock.settimeout(120)
        sock.recv(18, socket.MSG_WAITALL)
        sock.sendall(MODERN + b"IHAVEOPT" + struct.pack(">II", c.NBD_OPT_STARTTLS, 0))
        assert len(sock.recv(20, socket.MSG_WAITALL)) == 20
        with client_context(pki, "alice").wrap_socket(sock, server_hostname="localhost") as inside:
            inside.sendall(go(disk["uuid"]))
            said = b""
            while not said.endswith(struct.pack(">III", c.NBD_OPT_GO, c.NBD_REP_ACK, 0)):
                said += inside.recv(4096)
            client = WireClient(inside)
            client.write(12345, b"python" * 100_000)
            assert client.read(12345, 600_000) == b"python" * 100_000


# --- Options of simsrd --------------------------------------------------------------------------------------------


def test_require_is_for_unix_sockets_too(pki):
    with running_simsrd("--nbd-tls-dir", pki, "--tls", "require") as simsrd:
        simsrd.create_sr()
        disk = simsrd.create_vdi(MIB)
        assert disk["nbd_uri"].startswith("nbds+unix://")
        for path in (simsrd.nbd_socket, disk["nbd_socket"]):
            with pytest.raises(AssertionError, match=f"{c.NBD_REP_ERR_TLS_REQD:#x}"):
                WireClient.connect(path, disk["uuid"])
        run("nbdinfo", "--size", f"{disk['nbd_uri']}&tls-certificates={pki}&tls-hostname=localhost")


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--tls", "require"], "certificates"), (["--tls-verify-peer"], "--nbd-tls-dir"), (["--nbd-tls-dir", "/nonexistent"], "tls-setup"),
     (["--nbd-connections", "-1"], "negative"), (["--tls", "on"], "certificates")],
)  # fmt: skip
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(BadRequest, match=said):
        _nbd_options(_parser().parse_args(["--root", "/nonexistent", *options]))


def test_without_tls_the_network_is_not_served(pki, folder):
    options = ["--nbd-tcp", "0.0.0.0:0", "--tls", "off", "--nbd-tls-dir", pki]
    command = simsrd_command("--root", f"{folder}/r", *options)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "give --nbd-tls-dir" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_exit_with_parent(folder):
    """Whoever started it is killed and cannot stop it; it stops by itself, cleanly."""
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)\n"
        "print(child.pid, child.stdout.readline().decode(), flush=True)\n"
        "time.sleep(1000)\n"
    )
    command = simsrd_command("--root", f"{folder}/r", "--exit-with-parent")
    with subprocess.Popen([sys.executable, "-c", parent, *command], stdout=subprocess.PIPE, text=True) as process:
        child, _, said = process.stdout.readline().partition(" ")
        assert said.startswith("simsrd: ready")
        watched = os.pidfd_open(int(child))
        try:
            process.kill()
            assert select.select([watched], [], [], 120)[0], "simsrd goes on without its parent"
        finally:
            os.close(watched)
    assert not os.path.exists(f"{folder}/r/control.sock"), "it did not stop in order"

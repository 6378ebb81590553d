"""TLS: with certificates, wrong ones and none; against clients, and those in between, that try to get around it."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
import stat
import struct
import subprocess
from pathlib import Path

import pytest
import trio
from daemon_tools import short_directory
from fake_disks import LARGE_BYTES, SIZE_BYTES, TIMEOUT_S, Client, FakeDisk, FakeDisks, pattern, until
from nbd_wire import FLUSH, FUA, KIB, MIB, MODERN, READ, WRITE, export_name, go, option, set_meta_context
from tls_kit import certificates, client_context, connect_tls, dial, hang_up_all, starttls

from nbd_export import connection as connection_module
from nbd_export import constants as c
from nbd_export.server import NbdServer, listen_tcp, listen_unix
from nbd_export.tls import server_context
from simsr.cli.tls_setup import tls_setup
from simsr.errors import BadRequest, SimsrError

STYLES = pytest.mark.parametrize(
    "style", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"]
)


@pytest.fixture(scope="module")
def pki():
    with certificates() as directory:
        yield directory


class TlsRig:
    """A server with the disk "disk" on three sockets: TLS offered, TLS required, and TLS with certificates of clients."""

    def __init__(self, nursery, folder: str, pki: str) -> None:
        self.disks = FakeDisks()
        self.disk = self.disks.add("disk", FakeDisk())
        self.listeners = []
        for name, verify, required in (("offered", False, False), ("required", False, True), ("verified", True, True)):
            server = NbdServer(self.disks, server_context(pki, verify), tls_required=required)
            listener = listen_unix(f"{folder}/{name}")
            self.listeners.append(listener)
            setattr(self, name, f"{folder}/{name}")
            setattr(self, name + "_server", server)
            nursery.start_soon(server.serve, listener)


@pytest.fixture
async def closed():
    yield
    hang_up_all()


@pytest.fixture
async def tls(nursery, pki, caplog, closed):
    with short_directory() as folder:
        rig = TlsRig(nursery, folder, pki)
        yield rig
        for listener in rig.listeners:
            listener.close()
    bugs = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not bugs, bugs


async def gone(stream: trio.abc.Stream) -> bytes:
    """What still comes until the server closes."""
    said = b""
    with trio.fail_after(TIMEOUT_S):
        try:
            while data := await stream.receive_some(65536):
                said += data
        except trio.BrokenResourceError:
            pass
    return said


async def answers(client: Client, count: int) -> list[tuple[int, int, bytes]]:
    """(option, type, payload) of the next replies."""
    found = []
    for _ in range(count):
        _, number, kind, length = struct.unpack(">QIII", await client.exactly(20))
        found.append((number, kind, await client.exactly(length)))
    return found


async def begin(client: Client, name: str = "disk", style: dict | None = None, meta: tuple[str, ...] = ()) -> Client:
    """Haggle and go, inside TLS."""
    chosen = {"structured": c.NBD_OPT_STRUCTURED_REPLY, "extended": c.NBD_OPT_EXTENDED_HEADERS}
    for key in style or {}:
        await client.stream.send_all(option(chosen[key]))
        assert await client._acknowledged()
    if meta:
        await client.stream.send_all(set_meta_context(name, *meta))
        assert await client._acknowledged()
    await client.stream.send_all(go(name))
    assert await client._acknowledged()
    return client


# --- It works ----------------------------------------------------------------------------------------------------


@STYLES
@pytest.mark.parametrize("where", ["offered", "required", "verified"])
async def test_reads_and_writes(tls, pki, style, where):
    client = await begin(await connect_tls(getattr(tls, where), client_context(pki, "alice"), **style), "large", style)
    ranges = [(0, 1), (777, 16 * KIB), (511, 300 * KIB), (4096, 3 * MIB), (1, c.MAX_REQUEST_BYTES)]
    for offset, length in ranges:
        assert (await client.call(READ, offset, length)).data == pattern(offset, length)
    for offset, length in ranges:
        data = pattern(LARGE_BYTES - length, length)
        assert not (await client.call(WRITE, offset, payload=data, flags=FUA)).error
        assert (await client.call(READ, offset, length)).data == data
    cookies = await client.send_batch(*[(READ, n * 512, 512) for n in range(500)], (FLUSH,))
    assert not any(reply.error for reply in await client.replies(cookies))


@STYLES
async def test_what_is_lent_is_encrypted_whole(tls, pki, style):
    tls.disk.lends = True
    client = await begin(await connect_tls(tls.required, client_context(pki, "alice"), **style), style=style)
    assert (await client.call(READ, 4 * KIB, 256 * KIB)).data == pattern(4 * KIB, 256 * KIB)
    assert any(what[0] == "lend" for what in tls.disk.log)


async def test_a_plain_client_where_tls_is_only_offered(tls):
    client = await Client.connect(tls.offered, "disk")
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096)
    client.close()


async def test_replies_of_many_tasks_to_a_client_that_reads_slowly(tls, pki):
    """What was encrypted must leave in that order, whoever sent it and however often the socket was full."""
    disk = tls.disks.add("slow", FakeDisk(LARGE_BYTES))
    disk.cold = [range(n * MIB, n * MIB + 4096) for n in range(0, 40, 3)]
    style = {"structured": True}
    client = await begin(await connect_tls(tls.required, client_context(pki), **style), "slow", style)
    cookies = []
    for n in range(40):
        cookies += await client.send_batch((READ, n * MIB, MIB), (WRITE, LARGE_BYTES - 8, 0, b"dead", FUA), (READ, n * MIB, 4096))
    await trio.sleep(0.3)
    for index, reply in enumerate(await client.replies(cookies)):
        assert not reply.error
        if index % 3 != 1:
            assert reply.data == pattern(index // 3 * MIB, len(reply.data))


async def test_bytes_that_come_one_by_one(tls, pki):
    """However the ciphertext is cut, the same is read out of it."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    machine = client_context(pki).wrap_bio(incoming, outgoing, server_hostname="localhost")
    stream = await starttls(tls.required)
    with trio.fail_after(TIMEOUT_S):
        while True:
            try:
                machine.do_handshake()
                break
            except ssl.SSLWantReadError:
                for byte in outgoing.read():
                    await stream.send_all(bytes([byte]))
                incoming.write(await stream.receive_some(65536))
        machine.write(option(c.NBD_OPT_LIST))
        for byte in outgoing.read():
            await stream.send_all(bytes([byte]))
        said = b""
        while b"disk" not in said:
            incoming.write(await stream.receive_some(65536))
            try:
                said += machine.read(65536)
            except ssl.SSLWantReadError:
                pass
    await stream.aclose()


async def test_the_client_is_known_by_its_certificate(tls, pki):
    tls.disks.refusals["disk"] = lambda peer: "" if peer.subject == "alice" and peer.uid == os.getuid() else f"not for {peer}"
    assert await begin(await connect_tls(tls.verified, client_context(pki, "alice")))
    bob = await connect_tls(tls.verified, client_context(pki, "bob"))
    await bob.stream.send_all(option(c.NBD_OPT_LIST) + go("disk"))
    found = await answers(bob, 2)
    assert found[0] == (c.NBD_OPT_LIST, c.NBD_REP_ACK, b""), "it was listed"
    assert found[1][1] == c.NBD_REP_ERR_POLICY and b"bob" in found[1][2]


# --- No way around -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 4, 6, 7, 8, 9, 10, 11, 99])
async def test_without_tls_nothing_is_answered_where_it_is_required(tls, number):
    stream = await dial(tls.required)
    client = Client(stream, False)
    await client.exactly(18)
    data = go("disk")[16:] if number in (6, 7) else b""
    await stream.send_all(MODERN + option(number, data) + option(c.NBD_OPT_ABORT))
    found = await answers(client, 2)
    assert [kind for _, kind, _ in found] == [c.NBD_REP_ERR_TLS_REQD, c.NBD_REP_ACK]
    assert await gone(stream) == b"" and not tls.disk.attached


async def test_export_name_without_tls_is_hung_up_on(tls):
    stream = await dial(tls.required)
    await stream.send_all(MODERN + export_name(b"disk"))
    assert len(await gone(stream)) == 18 and not tls.disk.attached


@pytest.mark.parametrize("extra", [option(c.NBD_OPT_LIST), go("disk"), b"\x16", b"IHAVEOPT"])
async def test_what_is_said_in_the_clear_behind_starttls_ends_it(tls, extra):
    """Who sits in between could put words into the mouth of a client that is about to be authenticated."""
    stream = await dial(tls.offered)
    client = Client(stream, False)
    await client.exactly(18)
    await stream.send_all(MODERN + option(c.NBD_OPT_STARTTLS) + extra)
    said = await gone(stream)
    assert len(said) == 20 and not tls.disk.attached, "more than the acknowledgement was answered"


async def test_what_is_said_in_the_clear_after_the_acknowledgement_ends_it(tls):
    stream = await starttls(tls.offered)
    await stream.send_all(go("disk"))
    said = await gone(stream)
    assert b"disk" not in said and not tls.disk.attached


async def test_what_was_negotiated_before_tls_is_forgotten(tls, pki):
    before = option(c.NBD_OPT_STRUCTURED_REPLY) + set_meta_context("disk", c.BASE_ALLOCATION)
    stream = trio.SSLStream(await starttls(tls.offered, before), client_context(pki), server_hostname="localhost")
    client = Client(stream, False)
    await stream.send_all(set_meta_context("disk", c.BASE_ALLOCATION))
    assert [kind for _, kind, _ in await answers(client, 1)] == [c.NBD_REP_ERR_INVALID]
    await begin(client)
    assert (await client.call(READ, 0, 512)).data == pattern(0, 512), "which is a simple reply, or the reader would have complained"


async def test_extended_headers_before_tls_are_forgotten(tls, pki):
    stream = trio.SSLStream(
        await starttls(tls.offered, option(c.NBD_OPT_EXTENDED_HEADERS)), client_context(pki), server_hostname="localhost"
    )
    client = Client(stream, False)
    await begin(client)
    assert (await client.call(READ, 0, 512)).data == pattern(0, 512)


async def test_tls_within_tls_is_refused(tls, pki):
    client = await connect_tls(tls.offered, client_context(pki))
    await client.stream.send_all(option(c.NBD_OPT_STARTTLS) + option(c.NBD_OPT_LIST))
    found = await answers(client, 3)
    assert found[0][:2] == (c.NBD_OPT_STARTTLS, c.NBD_REP_ERR_INVALID) and found[2][1] == c.NBD_REP_ACK


@pytest.mark.parametrize(
    ("flags", "data", "kind"), [(b"\0\0\0\3", b"x", c.NBD_REP_ERR_INVALID), (b"\0\0\0\2", b"", c.NBD_REP_ERR_UNSUP)]
)
async def test_starttls_that_is_wrong(tls, flags, data, kind):
    stream = await dial(tls.offered)
    client = Client(stream, False)
    await client.exactly(18)
    await stream.send_all(flags + option(c.NBD_OPT_STARTTLS, data) + go("disk"))
    assert (await answers(client, 1))[0][:2] == (c.NBD_OPT_STARTTLS, kind)
    assert await client._acknowledged(), "the option after it is not understood any more"
    await stream.aclose()


# --- Hostile in the TLS handshake ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"", b"\x16", b"\x16\x03\x01\xff\xff" + b"A" * 70_000, bytes(5000), b"GET / HTTP/1.1\r\n\r\n", b"\x15\x03\x03\0\2\2\x28"],
    ids=["nothing", "a byte", "a long record", "zeros", "http", "an alert"],
)  # fmt: skip
async def test_no_client_hello(tls, said):
    stream = await starttls(tls.offered)
    await stream.send_all(said)
    await stream.send_eof()
    await gone(stream)
    await until(lambda: tls.offered_server.connections == 0)
    assert not tls.disk.attached


async def test_a_client_that_says_nothing_in_the_tls_handshake(tls, monkeypatch):
    monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT_S", 0.2)
    stream = await starttls(tls.offered)
    assert await gone(stream) == b""
    await until(lambda: tls.offered_server.connections == 0)


async def test_a_client_that_goes_in_the_middle_of_a_request(tls, pki):
    client = await begin(await connect_tls(tls.offered, client_context(pki)))
    await client.stream.send_all(client.expect(WRITE, 0, payload=bytes(MIB))[1][:-1])
    client.stream.transport_stream.socket.close()
    await until(lambda: tls.disk.detached == 1)


async def test_garbage_between_records(tls, pki):
    client = await begin(await connect_tls(tls.offered, client_context(pki)))
    await client.stream.transport_stream.send_all(b"garbage that is no record" * 10)
    await until(lambda: tls.disk.detached == 1)


async def test_the_server_says_goodbye(tls, pki):
    client = await begin(await connect_tls(tls.offered, client_context(pki)))
    client.stream._https_compatible = False  # then an end without goodbye is an error
    await client.send(c.NBD_CMD_DISC)
    with trio.fail_after(TIMEOUT_S):
        assert await client.stream.receive_some(10) == b""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_versions(tls, pki, version):
    context = client_context(pki)
    context.minimum_version = context.maximum_version = version
    client = await begin(await connect_tls(tls.offered, context))
    assert (await client.call(READ, 0, 512)).data == pattern(0, 512)


async def test_old_versions_are_refused(tls, pki):
    context = client_context(pki)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(trio.BrokenResourceError):
        await connect_tls(tls.offered, context)
    assert not tls.disk.attached


# --- Certificates of clients --------------------------------------------------------------------------------------


async def refused(path: str, context: ssl.SSLContext) -> None:
    """The client does not get in. With TLS 1.3 it learns so only after its own handshake."""
    with pytest.raises((trio.BrokenResourceError, AssertionError)):
        await begin(await connect_tls(path, context))


async def test_certificates_that_are_not_good_enough(tls, pki):
    other = os.path.join(pki, "other")
    await refused(tls.verified, client_context(pki))
    await refused(tls.verified, client_context(other, "alice", authority=pki))
    server_as_client = client_context(pki)
    server_as_client.load_cert_chain(f"{pki}/server-cert.pem", f"{pki}/server-key.pem")
    await refused(tls.verified, server_as_client)
    assert not tls.disk.attached
    assert await begin(await connect_tls(tls.verified, client_context(pki, "bob")))


async def test_a_client_refuses_a_server_that_it_does_not_know(tls, pki):
    await refused(tls.offered, client_context(pki, authority=os.path.join(pki, "other")))


async def test_a_revoked_certificate(pki, nursery, folder, closed):
    directory = f"{folder}/pki"
    shutil.copytree(pki, directory)
    database = f"{folder}/ca"
    os.mkdir(database)
    configuration = f"[ca]\ndefault_ca=d\n[d]\ndatabase={database}/index\ndefault_md=sha256\ndefault_crl_days=30\n"
    with open(f"{database}/conf", "w") as file:
        file.write(configuration)
    open(f"{database}/index", "w").close()
    sign = ["openssl", "ca", "-config", f"{database}/conf", "-cert", f"{pki}/ca-cert.pem", "-keyfile", f"{pki}/ca-key.pem"]
    for more in (["-revoke", f"{pki}/clients/bob/client-cert.pem"], ["-gencrl", "-out", f"{directory}/ca-crl.pem"]):
        subprocess.run([*sign, *more], check=True, capture_output=True)
    disks = FakeDisks()
    disks.add("disk", FakeDisk())
    with listen_unix(f"{folder}/nbd") as listener:
        nursery.start_soon(NbdServer(disks, server_context(directory, True)).serve, listener)
        assert await begin(await connect_tls(f"{folder}/nbd", client_context(pki, "alice")))
        await refused(f"{folder}/nbd", client_context(pki, "bob"))


# --- What the server is given -------------------------------------------------------------------------------------


async def test_on_other_than_loopback_addresses_tls_is_required(nursery, pki, caplog):
    disks = FakeDisks()
    disk = disks.add("disk", FakeDisk())
    with listen_tcp("0.0.0.0", 0) as listener:
        nursery.start_soon(NbdServer(disks, server_context(pki, False)).serve, listener)
        stream = await trio.open_tcp_stream("127.0.0.1", listener.getsockname()[1])
        client = Client(stream, False)
        await client.exactly(18)
        await stream.send_all(MODERN + go("disk"))
        assert (await answers(client, 1))[0][1] == c.NBD_REP_ERR_TLS_REQD
        await stream.send_all(option(c.NBD_OPT_STARTTLS))
        assert await client._acknowledged()
        client.stream = trio.SSLStream(stream, client_context(pki), server_hostname="localhost")
        await begin(client)
        assert (await client.call(READ, 0, SIZE_BYTES)).data == pattern(0, SIZE_BYTES)
        assert disk.attached == 1
        await stream.aclose()


def broken(pki: str, folder: str, name: str) -> str:
    directory = f"{folder}/broken"
    shutil.copytree(pki, directory)
    if name == "no directory":
        shutil.rmtree(directory)
    elif name == "no key":
        os.unlink(f"{directory}/server-key.pem")
    elif name == "a key that everybody may read":
        os.chmod(f"{directory}/server-key.pem", 0o644)
    elif name == "a key of another certificate":
        shutil.copyfile(f"{pki}/ca-key.pem", f"{directory}/server-key.pem")
    elif name == "no authority":
        os.unlink(f"{directory}/ca-cert.pem")
    elif name == "an authority that is none":
        with open(f"{directory}/ca-cert.pem", "w") as file:
            file.write("nothing to see here")
    elif name == "a key with a password":
        key = f"{directory}/server-key.pem"
        subprocess.run(["openssl", "ec", "-in", key, "-aes128", "-passout", "pass:1234", "-out", key], check=True, capture_output=True)
    return directory


@pytest.mark.parametrize(
    ("name", "said"),
    [("no directory", "server-key.pem.*tls-setup"), ("no key", "server-key.pem"), ("a key that everybody may read", "0600"),
     ("a key of another certificate", "cannot be used"), ("no authority", "tls-setup"), ("an authority that is none", "cannot be used"),
     ("a key with a password", "cannot be used")],
)  # fmt: skip
def test_certificates_that_cannot_be_used(pki, folder, name, said):
    with pytest.raises(BadRequest, match=said):
        server_context(broken(pki, folder, name), True)


# --- simsr tls-setup ----------------------------------------------------------------------------------------------


def test_tls_setup_adds_clients_and_keeps_what_is_there(pki, folder, capsys):
    directory = f"{folder}/pki"
    shutil.copytree(pki, directory)
    kept = [Path(directory, name) for name in ("ca-cert.pem", "server-key.pem", "clients/alice/client-cert.pem")]
    before = [path.read_text() for path in kept]
    tls_setup(directory, None, ["carol", "alice"])
    assert capsys.readouterr().out.startswith("made clients/carol\n")
    assert [path.read_text() for path in kept] == before
    keys = ["ca-key.pem", "server-key.pem", "clients/carol/client-key.pem"]
    assert {stat.S_IMODE(os.stat(f"{directory}/{key}").st_mode) for key in keys} == {0o600}
    said = subprocess.run(
        ["openssl", "verify", "-purpose", "sslclient", "-CAfile", "ca-cert.pem", "clients/carol/client-cert.pem"],
        cwd=directory, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.endswith("OK\n"), said.stderr


@pytest.mark.parametrize(
    ("names", "clients", "said"),
    [(None, ["../x"], "client name"), (None, [""], "client name"), (None, ["a/b"], "client name"), (None, ["carol", "."], "client name"),
     (["two words"], None, "neither a host name"), (["localhost"], None, "exists already")],
)  # fmt: skip
def test_tls_setup_refuses(pki, names, clients, said):
    with pytest.raises(SimsrError, match=said):
        tls_setup(pki, names, clients)
    assert sorted(os.listdir(f"{pki}/clients")) == ["alice", "bob"]
    assert sorted(os.listdir(pki)) == ["ca-cert.pem", "ca-key.pem", "clients", "other", "server-cert.pem", "server-key.pem"]


def test_tls_setup_without_the_key_of_the_authority(pki, folder):
    directory = f"{folder}/pki"
    shutil.copytree(pki, directory)
    os.unlink(f"{directory}/ca-key.pem")
    with pytest.raises(SimsrError, match="cannot make the certificate .*ca-key.pem"):
        tls_setup(directory, None, ["carol"])
    assert os.listdir(f"{directory}/clients/carol") == []

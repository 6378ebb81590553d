"""Clients that mean harm, or are broken, against a real daemon: each ends itself and nobody else, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from nbd_wire import (
    FLUSH,
    MIB,
    MODERN,
    READ,
    TRIM,
    WRITE,
    ZEROES,
    WireClient,
    export_name,
    go,
    option,
    request,
    shake_hands_bytes,
)

from nbd_export import constants as c

DEADLINE_S = 120
NOISE_ROUNDS = 300


@pytest.fixture
def disk(make_vdi) -> dict:
    return make_vdi(16 * MIB)


@pytest.fixture(autouse=True)
def unharmed(shared) -> Iterator[None]:
    """After every test: a good client is served, all connections are gone, and so are sockets and memory."""
    shared.wait_for_connections(0)
    fds, rss = shared.fds("socket:"), shared.rss_bytes()
    yield
    vdi = shared.create_vdi(MIB)
    with WireClient.connect(shared.nbd_socket, vdi["uuid"], timeout_s=DEADLINE_S) as good:
        good.write(4096, b"good" * 1024)
        good.flush()
        assert good.read(4096, 4096) == b"good" * 1024
        good.disconnect()
    shared.wait_for_connections(0)
    shared.delete(f"/v1/vdis/{vdi['uuid']}")
    deadline = time.monotonic() + DEADLINE_S
    while shared.fds("socket:") > fds + 8:  # HTTP connections stay for a few seconds
        assert time.monotonic() < deadline, f"more than {fds} sockets are open"
        time.sleep(0.05)
    assert shared.rss_bytes() < rss + 100 * MIB, f"{shared.rss_bytes() - rss >> 20} MiB more than before"


def raw(path: str) -> socket.socket:
    """A socket after the greeting."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE_S)
    sock.connect(path)
    assert WireClient._exactly(sock, 18)[:16] == b"NBDMAGICIHAVEOPT"
    return sock


def ends(sock: socket.socket) -> bytes:
    """What still comes before the server closes."""
    said = bytearray()
    try:
        while data := sock.recv(1 << 20):
            said += data
    except ConnectionResetError:
        pass
    sock.close()
    return bytes(said)


def send_what_it_takes(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except OSError:
        pass


# --- Before transmission -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [b"\xff\xff\xff\xff", MODERN + b"IHAVEOPX" + bytes(8), MODERN + bytes(16),
     MODERN + b"IHAVEOPT" + b"\0\0\0\x63\xff\xff\xff\xff",
     MODERN + b"IHAVEOPT" + struct.pack(">II", c.NBD_OPT_GO, 0xFFFFFFFF), MODERN + export_name(b"nobody"),
     MODERN + export_name(b"\xff" * 300), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", MODERN + option(c.NBD_OPT_LIST) * 100],
)  # fmt: skip
def test_nonsense_in_the_handshake_closes_the_connection(shared, disk, said):
    sock = raw(shared.nbd_socket)
    send_what_it_takes(sock, said)
    ends(sock)


def test_a_name_that_is_none_can_be_corrected(shared, disk):
    sock = raw(shared.nbd_socket)
    for name in ("nobody", "x" * 4000, "", "../../etc/passwd", "a\0b", "%s%n"):
        sock.sendall((MODERN if name == "nobody" else b"") + go(name))
        _, number, kind, length = struct.unpack(">QIII", WireClient._exactly(sock, 20))
        text = WireClient._exactly(sock, length)
        if kind == c.NBD_REP_INFO:  # the only disk there is goes by ""
            assert name == ""
            break
        assert kind & c.NBD_REP_FLAG_ERROR and text
    sock.close()


def test_options_without_end_are_cut_off(shared, disk):
    sock = raw(shared.nbd_socket)
    send_what_it_takes(sock, MODERN + option(77) * 100_000)
    ends(sock)


def test_a_handshake_that_stops_at_every_byte(shared, disk):
    said = shake_hands_bytes(disk["uuid"], structured=True, meta=("base:allocation",)) + request(READ, 1, 0, 512)
    for stop in range(0, len(said), 3):
        with raw(shared.nbd_socket) as sock:
            sock.sendall(said[:stop])
            if stop % 2:
                sock.shutdown(socket.SHUT_WR)


# --- In transmission ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [bytes(28), b"\xff" * 28, request(READ, 1)[::-1], request(WRITE, 1, 0, 0xFFFFFFFF), request(WRITE, 1, 0, 33 * MIB),
     struct.pack(">I", c.NBD_EXTENDED_REQUEST_MAGIC) + bytes(28),
     struct.pack(">IIQ", c.NBD_SIMPLE_REPLY_MAGIC, 0, 1) + bytes(12)],
)  # fmt: skip
def test_what_is_no_request_closes_the_connection(shared, disk, said):
    client = WireClient.connect(disk["nbd_socket"], timeout_s=DEADLINE_S)
    client.write(0, b"before")
    send_what_it_takes(client.sock, said)
    assert ends(client.sock) == b""


def test_requests_that_ask_for_too_much_are_refused_and_the_connection_goes_on(disk):
    with WireClient.connect(disk["nbd_socket"], structured=True, timeout_s=DEADLINE_S) as client:
        for command in (READ, TRIM, ZEROES, c.NBD_CMD_CACHE, c.NBD_CMD_BLOCK_STATUS, 17, 65535):
            for offset, length in [(0, 0xFFFFFFFF), (2**64 - 1, 1), (2**64 - 1, 0xFFFFFFFF), (16 * MIB, 1), (2**63, 2**31)]:
                reply = client.call(command, offset, length, flags=random.Random(offset).choice([0, 1, 0xFFFF]))
                assert reply.error in (c.NBD_EINVAL, c.NBD_ENOSPC), (command, offset, length, reply)
        client.write(0, b"still here")
        assert client.read(0, 10) == b"still here"


@pytest.mark.parametrize("structured", [False, True])
def test_random_bytes_and_broken_requests(shared, disk, structured):
    """Valid streams with bytes flipped, doubled or missing. Whatever happens, it is answered well-formed or closed."""
    rng = random.Random(structured)
    for number in range(NOISE_ROUNDS):
        stream = bytearray()
        for cookie in range(rng.randint(1, 30)):
            command = rng.choice([READ, WRITE, FLUSH, TRIM, ZEROES, 5, 7, 9])
            payload = rng.randbytes(rng.choice([0, 1, 512, 4096])) if command == WRITE else b""
            length = 0 if command == WRITE else rng.choice([0, 1, 4096, 2**31])
            offset = rng.choice([0, 4096, 8191, 16 * MIB - 1, 2**64 - 1])
            stream += request(command, cookie, offset, length, payload, rng.choice([0, 0, 0, 1, 0xFFFF]))
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(stream))
            how = rng.randrange(3)
            if how == 0:
                stream[at] ^= 1 << rng.randrange(8)
            elif how == 1:
                del stream[at : at + rng.randint(1, 40)]
            else:
                stream[at:at] = stream[: rng.randint(1, 40)]
            stream = stream or bytearray(b"x")
        said = shake_hands_bytes(disk["uuid"], structured=structured) + stream if number % 2 else stream
        if number % 10 == 0:
            said = bytearray(rng.randbytes(rng.randint(1, 5000)))
        with raw(shared.nbd_socket) as sock:
            send_what_it_takes(sock, said)
            if rng.random() < 0.5:
                try:
                    sock.shutdown(socket.SHUT_WR)
                    ends(sock)
                except OSError:
                    pass


def test_half_closed_sockets(shared, disk):
    """The client has said all it wanted and waits for its answers; the server must answer and then close."""
    with WireClient.connect(disk["nbd_socket"], timeout_s=DEADLINE_S) as client:
        cookies = [client.send(WRITE, n * 4096, payload=b"h" * 4096, flags=c.NBD_CMD_FLAG_FUA) for n in range(20)]
        cookies += [client.send(READ, 0, 8 * MIB), client.send(FLUSH)]
        client.sock.shutdown(socket.SHUT_WR)
        assert not any(client.reply(cookie).error for cookie in cookies)
        assert client.sock.recv(1) == b""


def test_a_client_that_closes_its_receiving_side(shared, disk):
    client = WireClient.connect(disk["nbd_socket"], timeout_s=DEADLINE_S)
    client.sock.shutdown(socket.SHUT_RD)
    for n in range(50):
        try:
            client.send(READ, 0, MIB)
        except OSError:
            break
    client.sock.close()


@contextmanager
def clients_that_never_read(path: str, count: int, ask) -> Iterator[None]:
    """Clients that send until nothing more is taken (or they have sent a lot), and never read an answer."""
    clients = [WireClient.connect(path, timeout_s=DEADLINE_S) for _ in range(count)]
    try:
        for client in clients:
            client.sock.settimeout(0.2)
            try:
                for cookie in range(5000):
                    client.sock.sendall(ask(cookie))
            except OSError:
                pass
        yield
    finally:
        for client in clients:
            client.sock.close()


@pytest.mark.parametrize(
    "ask",
    [lambda n: request(READ, n, 0, 8 * MIB), lambda n: request(READ, n, 0, 4096) * 50, lambda n: request(77, n) * 100,
     lambda n: request(WRITE, n, 0, payload=b"w" * 4096, flags=c.NBD_CMD_FLAG_FUA), lambda n: request(FLUSH, n) * 100,
     lambda n: request(c.NBD_CMD_CACHE, n, 0, 16 * MIB)],
    ids=["long reads", "short reads", "errors", "fua", "flush", "cache"],
)  # fmt: skip
def test_clients_that_never_read_cost_little_and_delay_nobody(shared, disk, make_vdi, ask):
    other = make_vdi(8 * MIB)
    with WireClient.connect(disk["nbd_socket"], timeout_s=DEADLINE_S) as client:
        client.write(0, random.Random(1).randbytes(8 * MIB))
    before = shared.rss_bytes()
    count = 4
    with clients_that_never_read(disk["nbd_socket"], count, ask):
        with WireClient.connect(other["nbd_socket"], timeout_s=DEADLINE_S) as good:
            for n in range(200):
                good.write(n * 4096, bytes([n]) * 4096)
                assert good.read(n * 4096, 4096) == bytes([n]) * 4096
            good.flush()
        grown = shared.rss_bytes() - before
        assert grown < count * 48 * MIB, f"{grown >> 20} MiB for {count} clients that do not read"


def test_a_thousand_idle_and_a_thousand_rude_connections(shared, disk, make_vdi):
    other = make_vdi(8 * MIB)
    good = WireClient.connect(other["nbd_socket"], timeout_s=DEADLINE_S)
    good.write(0, b"g" * MIB)
    before, fds = shared.rss_bytes(), shared.fds("socket:")
    working, errors = threading.Event(), []

    def work() -> None:
        try:
            while not working.is_set():
                assert good.read(0, MIB) == b"g" * MIB
                good.write(MIB, b"w" * 65536)
                good.flush()
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    rng = random.Random(1000)
    idle: list[socket.socket] = []
    try:
        for n in range(1000):
            sock = raw(shared.nbd_socket)
            idle.append(sock)
            if n % 3 == 1:
                sock.sendall(shake_hands_bytes(disk["uuid"]))
            elif n % 3 == 2:
                sock.sendall(MODERN + option(c.NBD_OPT_LIST)[: rng.randrange(16)])
        for n in range(1000):
            with raw(shared.nbd_socket) as rude:
                said = shake_hands_bytes(disk["uuid"]) if n % 2 else b""
                send_what_it_takes(rude, said + rng.randbytes(rng.randint(28, 3000)))
        assert shared.connections() > 333, "connections in transmission may stay as long as they like"
        assert worker.is_alive() and not errors
        grown = shared.rss_bytes() - before
        assert grown < 150 * MIB, f"{grown >> 20} MiB for 1000 idle connections"
    finally:
        for sock in idle:
            sock.close()
        working.set()
        worker.join(DEADLINE_S)
        good.sock.close()
    assert not errors
    shared.wait_for_connections(0)
    deadline = time.monotonic() + DEADLINE_S
    while shared.fds("socket:") > fds + 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert shared.fds("socket:") <= fds + 4
    assert shared.rss_bytes() - before < 60 * MIB, "memory is not given back"


def test_a_disk_in_use_by_a_hung_client_is_free_when_that_closes(shared, make_vdi):
    """The client's replies fill its socket, so its connection hangs in send; closing must end it all the same."""
    disk = make_vdi(8 * MIB)
    with clients_that_never_read(disk["nbd_socket"], 1, lambda n: request(READ, n, 0, 8 * MIB)):
        response = shared.api.delete(f"/v1/vdis/{disk['uuid']}")
        assert response.status_code == 409 and response.json()["error"]["code"] == "VdiInUse"
    shared.delete(f"/v1/vdis/{disk['uuid']}")


def test_zeroing_a_disk_that_is_far_larger_than_the_space_for_it(shared, make_vdi):
    """4 GiB in one request, beginning and ending within a block that holds data."""
    disk = make_vdi(1 << 40)
    with WireClient.connect(disk["nbd_socket"], structured=True, timeout_s=DEADLINE_S) as client:
        end = (1 << 32) - 4096 + 1000
        client.write(0, b"x" * 8192)
        client.write(end // 4096 * 4096, b"y" * 4096)
        assert not client.call(ZEROES, 512, end - 512).error
        assert client.read(0, 8192) == b"x" * 512 + bytes(8192 - 512)
        assert client.read(end - 100, 200) == bytes(100) + b"y" * 100
        assert not client.call(TRIM, 0, (1 << 32) - 1).error
        assert client.read(0, 4096) == bytes(4096), "its first 512 bytes held data"
        assert client.read(end - 100, 200) == bytes(100) + b"y" * 100, "a block that is trimmed in part stays"


def test_the_control_socket_is_not_impressed_either(shared):
    rng = random.Random(5)
    half = b"POST /v1/vdis HTTP/1.1\r\nContent-Length: 99\r\n\r\n"
    for said in (bytes(1000), rng.randbytes(5000), b"GET /" + b"x" * 100_000, half):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(shared.socket)
            send_what_it_takes(sock, said)
    idle = []
    for _ in range(3):
        idle.append(socket.socket(socket.AF_UNIX))
        idle[-1].connect(shared.socket)
    assert shared.get("/v1/daemon")["pid"] == shared.pid
    for sock in idle:
        sock.close()
    assert os.path.exists(shared.socket)

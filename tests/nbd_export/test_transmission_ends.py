"""How connections and servers end: well, in the middle of something, or of a client that is out of its mind."""

from __future__ import annotations

import logging
import socket
import struct

import pytest
import trio
from fake_disks import SIZE_BYTES, TIMEOUT_S, Client, pattern, until
from nbd_wire import CACHE, DISC, FLUSH, FUA, KIB, MIB, READ, WRITE, request, shake_hands_bytes

from nbd_export import constants as c
from nbd_export import server as server_module
from nbd_export.server import NbdServer, listen_tcp

# --- The end of a connection -------------------------------------------------------------------------------------


async def test_disc_finishes_what_is_pending(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(MIB, 2 * MIB)], trio.Event(), trio.Event()
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"x", FUA), (READ, MIB, 512), (CACHE, 0, 512), (READ, 4096, 512))
    await client.stream.send_all(request(DISC, 0))
    assert (await client.reply(cookies[3])).data == pattern(4096, 512)
    assert await client.silent() and not disk.detached
    disk.gate.set()
    disk.flush_gate.set()
    assert not any(reply.error for reply in await client.replies(cookies[:3]))
    assert await client.at_end()
    await until(lambda: disk.detached == 1)


async def test_what_follows_disc_is_ignored(rig):
    client = await rig.connect()
    before = bytes(rig.disk.content[:10])
    await client.stream.send_all(request(DISC, 0) + request(WRITE, 1, 0, payload=b"later") + b"garbage" * 10)
    assert await client.at_end()
    assert bytes(rig.disk.content[:10]) == before


async def test_a_client_that_closes_its_sending_side_gets_its_answers(rig):
    disk = rig.disk
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"x", FUA), (READ, 0, 1))
    await client.stream.send_eof()
    assert (await client.reply(cookies[1])).data == b"x"
    disk.flush_gate.set()
    assert not (await client.reply(cookies[0])).error
    assert await client.at_end()


@pytest.mark.parametrize("tail", [request(READ, 1, 0, 4096)[:13], request(WRITE, 1, 0, payload=bytes(MIB))[:-1], b"\x25"])
async def test_a_client_that_closes_in_the_middle_of_a_request(rig, tail):
    client = await rig.connect()
    await client.stream.send_all(tail)
    client.close()
    await until(lambda: rig.disk.detached == 1 and rig.server.connections == 0)
    other = await rig.connect()
    assert (await other.call(READ, 0, 100)).error == 0


async def test_a_client_that_closes_while_its_requests_wait(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(0, MIB)], trio.Event(), trio.Event()
    client = await rig.connect()
    await client.send_batch((READ, 0, 4096), (WRITE, 0, 0, b"x" * 4096, FUA), (CACHE, 0, 4096), (READ, 2 * MIB, 2 * MIB))
    await until(lambda: disk.flushes and disk.cold_now)
    client.close()
    disk.gate.set()
    disk.flush_gate.set()
    await until(lambda: disk.detached == 1 and rig.server.connections == 0)


async def test_a_client_that_takes_no_answers_delays_nobody(rig):
    greedy = await rig.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(greedy.send_batch, *[(READ, 0, SIZE_BYTES) for _ in range(50)])
        other = await rig.connect()
        for n in range(50):
            assert (await other.call(READ, n * 4096, 4096)).data == pattern(n * 4096, 4096)
            assert not (await other.call(WRITE, n * 4096, payload=bytes([n]) * 4096)).error
        nursery.cancel_scope.cancel()
    greedy.close()
    await until(lambda: rig.server.connections == 1)


async def test_two_connections_see_each_others_writes(rig):
    first, second = await rig.connect(), await rig.connect(structured=True)
    for n in range(1, 20):
        assert not (await first.call(WRITE, n * 100, payload=bytes([n]) * 100)).error
        assert (await second.call(READ, n * 100, 100)).data == bytes([n]) * 100
        assert not (await second.call(WRITE, n * 100, payload=bytes([n + 100]) * 50)).error
        assert (await first.call(READ, n * 100, 100)).data == bytes([n + 100]) * 50 + bytes([n]) * 50
    assert rig.disk.attached == 2
    second.close()
    await until(lambda: rig.disk.detached == 1)
    assert not (await first.call(FLUSH)).error


async def test_a_flush_of_one_connection_covers_what_another_was_told_is_written(rig):
    """NBD_FLAG_CAN_MULTI_CONN promises this."""
    first, second = await rig.connect(), await rig.connect()
    assert not (await first.call(WRITE, 0, payload=b"x")).error
    assert not (await second.call(FLUSH)).error
    assert rig.disk.durable


async def test_requests_that_come_with_the_last_option(rig):
    tail = request(WRITE, 1, 0, payload=b"early") + request(READ, 2, 0, 5)
    client = await rig.connect(tail=tail[:40])
    client.reader.expect(WRITE, 1, 0, 5)
    client.reader.expect(READ, 2, 0, 5)
    await client.stream.send_all(tail[40:])
    assert not (await client.reply(1)).error and (await client.reply(2)).data == b"early"


@pytest.mark.parametrize("garbage", [b"\0" * 28, b"GET / HTTP/1.0\r\n\r\n" * 3, request(WRITE, 1, 0, c.MAX_REQUEST_BYTES + 1)])
async def test_garbage_ends_the_connection_and_no_other(rig, garbage):
    client, other = await rig.connect(), await rig.connect()
    await client.stream.send_all(garbage)
    assert await client.at_end()
    assert (await other.call(READ, 0, 10)).data == pattern(0, 10)
    await until(lambda: rig.server.connections == 1 and rig.disk.detached == 1)


async def test_garbage_with_requests_that_wait(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(0, MIB)], trio.Event(), trio.Event()
    client = await rig.connect()
    await client.send_batch((READ, 0, 4096), (WRITE, 0, 0, b"x", FUA))
    await until(lambda: disk.flushes and disk.cold_now)
    await client.stream.send_all(b"garbage" * 4)
    assert await client.at_end()
    await until(lambda: disk.detached == 1)


# --- The end of the server ---------------------------------------------------------------------------------------


async def test_a_server_that_is_cancelled_closes_its_connections(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(0, MIB)], trio.Event(), trio.Event()
    server = NbdServer(rig.disks)
    path = rig.path + "2"
    listener = server_module.listen_unix(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        idle, busy = await Client.connect(path, "disk"), await Client.connect(path, "disk")
        await busy.send_batch((READ, 0, 4096), (WRITE, MIB, 0, b"x", FUA))
        await until(lambda: disk.flushes and disk.cold_now)
        nursery.cancel_scope.cancel()
    assert server.connections == 0 and disk.detached == 2 and not disk.cold_now
    assert await idle.at_end() and await busy.at_end()
    idle.close(), busy.close(), listener.close()


@pytest.mark.parametrize("how", ["broken pipe", "garbage"])
async def test_a_connection_that_breaks_while_the_server_is_cancelled(rig, how):
    """The error of the one connection and the cancellation of the others arrive in one group; the error must stay inside."""
    disk = rig.disk
    disk.cold, disk.gate = [range(MIB, 2 * MIB)], trio.Event()
    server = NbdServer(rig.disks)
    path = rig.path + "2"
    listener = server_module.listen_unix(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        client = await Client.connect(path, "disk")
        await client.send(READ, MIB, 512)
        await until(lambda: disk.cold_now)
        real_write = disk.write

        def last_write(batch):
            nursery.cancel_scope.cancel()
            if how == "broken pipe":
                client.close()
            return real_write(batch)

        disk.write = last_write
        tail = b"" if how == "broken pipe" else bytes(28)
        many = b"".join(request(WRITE, 1000 + n, 0, payload=b"y") for n in range(256))
        await client.stream.send_all(many + tail)
        await trio.sleep(TIMEOUT_S)
    assert nursery.cancel_scope.cancel_called, "the last write never came"
    assert server.connections == 0
    client.close(), listener.close()


async def test_a_bug_in_a_disk_ends_its_connection_only(rig, caplog):
    other = await rig.connect()
    rig.disk.failures[0] = ZeroDivisionError("a bug")
    client = await rig.connect()
    await client.send(READ, 0, 4096)
    assert await client.at_end()
    assert (await other.call(READ, 4096, 10)).data == pattern(4096, 10)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR]
    caplog.clear()


async def test_a_handshake_that_takes_too_long_is_ended(autojump_clock, rig):
    sock = trio.socket.socket(socket.AF_UNIX)
    with sock:
        await sock.connect(rig.path)
        with trio.fail_after(TIMEOUT_S):
            received = b""
            while data := await sock.recv(100):
                received += data
        assert received[:8] == b"NBDMAGIC"
    await until(lambda: rig.server.connections == 0)


async def test_no_client_keeps_the_server_to_itself(rig, nursery):
    """A socket that takes whatever it is given never makes its connection wait; others must get their turn all the same."""

    class Bottomless(socket.socket):
        def send(self, data, flags=0):
            return len(data)

    ours, theirs = socket.socketpair()
    turns = 0
    turn_of_read = []
    real_read = rig.disk.read

    def read(batch):
        turn_of_read.extend([turns] * (sum(len(view) for _, view in batch) // (64 * KIB)))
        return real_read(batch)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    rig.disk.read = read
    nursery.start_soon(count_turns)
    nursery.start_soon(rig.server._accepted, Bottomless(fileno=ours.detach()), 1, "disk", False)
    with theirs:
        theirs.sendall(shake_hands_bytes("disk", structured=True))
        theirs.sendall(b"".join(request(READ, n, 0, 4 * MIB) for n in range(250)))
        await until(lambda: len(turn_of_read) >= 250 * 64)
    most = max(turn_of_read.count(turn) for turn in set(turn_of_read))
    assert most < 250 * 64 / 4, f"{most * 64} KiB were read without a turn for anybody else"


async def test_tcp_on_loopback_only(rig, nursery):
    listener = listen_tcp("127.0.0.1", 0)
    nursery.start_soon(rig.server.serve, listener)
    host, port = listener.getsockname()
    stream = await trio.open_tcp_stream(host, port)
    client = Client(stream, False)
    await client.exactly(18)
    await stream.send_all(b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
    assert int.from_bytes((await client.exactly(10))[:8], "big") == SIZE_BYTES
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096)
    await stream.aclose()
    listener.close()
    for address in ("0.0.0.0", "::"):
        with listen_tcp(address, 0) as public, pytest.raises(ValueError, match="without TLS"):
            await rig.server.serve(public)

"""What a connection sends through: replies of several tasks, whole and in order, also when one of them is cut short."""

from __future__ import annotations

import socket

import trio
import trio.testing

from nbd_export.channel import Channel


class Slow:
    """A socket that takes five bytes of everything, and then no more for a while."""

    def __init__(self) -> None:
        self.sent = b""

    def recv_into(self, view: memoryview) -> int:
        raise BlockingIOError

    def send(self, data: bytes | memoryview) -> int:
        self.sent += bytes(data[:5])
        return min(5, len(data))


def channel_over(sock: socket.socket | Slow, room: trio.Event) -> Channel:
    channel = Channel(sock)
    channel.writable = room.wait
    return channel


async def test_what_several_tasks_send_is_not_mixed():
    sock, room = Slow(), trio.Event()
    channel = channel_over(sock, room)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, b"first reply")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(channel.send, b"second one")
        await trio.testing.wait_all_tasks_blocked()
        assert channel.post(b"third") is False
        assert sock.sent == b"first"
        room.set()
    assert sock.sent == b"first replysecond onethird" and not channel.unsent


async def test_behind_a_reply_that_was_cut_short_nothing_is_sent():
    """It would pass for the rest of that reply (found by the simulation: a connection that a scenario drops, and a read that ends then)."""
    sock, room = Slow(), trio.Event()
    channel = channel_over(sock, room)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, b"first reply")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with trio.move_on_after(0.01) as scope:
        await channel.send(b"second one")
    assert scope.cancelled_caught and channel.post(b"third") is False
    assert sock.sent == b"first"

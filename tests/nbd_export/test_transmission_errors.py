"""Requests that cannot be carried out: each gets its own error, and the connection goes on."""

from __future__ import annotations

import errno

import pytest
from fake_disks import SIZE_BYTES, FakeDisk, pattern
from nbd_wire import CACHE, DF, FAST_ZERO, FLUSH, FUA, KIB, MIB, NO_HOLE, READ, REQ_ONE, STATUS, TRIM, WRITE, ZEROES

from nbd_export import constants as c
from simsr.errors import BlockDamaged, NoSpace, StoreStopped

STYLES = pytest.mark.parametrize(
    "style", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"]
)


@STYLES
@pytest.mark.parametrize(
    ("command", "beyond"),
    [(READ, c.NBD_EINVAL), (WRITE, c.NBD_ENOSPC), (ZEROES, c.NBD_ENOSPC), (TRIM, c.NBD_EINVAL), (CACHE, c.NBD_EINVAL)],
)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE_BYTES, 1), (SIZE_BYTES - 1, 2), (SIZE_BYTES - 100, 4096), (2**64 - 1, 1), (2**64 - 4096, 4096), (2**63, 4096),
     (2**64 - 1, 32 * MIB)],
)  # fmt: skip
async def test_out_of_range(rig, style, command, beyond, offset, length):
    client = await rig.connect(**style)
    payload = bytes(length) if command == WRITE else b""
    assert (await client.call(command, offset, length, payload)).error == beyond
    assert (await client.call(READ, 0, 16)).data == pattern(0, 16)
    assert not [entry for entry in rig.disk.log if entry[0] in ("write", "zero")]


@STYLES
@pytest.mark.parametrize("command", [4242, 8, 65535])
async def test_unknown_commands(rig, style, command):
    client = await rig.connect(**style)
    cookies = await client.send_batch((command, 0, 4096), (READ, 0, 4096))
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_EINVAL, 0]


@STYLES
@pytest.mark.parametrize("length", [4096, 2 * MIB])
@pytest.mark.parametrize("flags", [1 << 15, 1 << 6, FUA | 1 << 9, c.NBD_CMD_FLAG_PAYLOAD_LEN])
async def test_unknown_flags_are_answered_once(rig, style, flags, length):
    client = await rig.connect(**style, meta=(c.BASE_ALLOCATION,) if style else ())
    commands = [READ, WRITE, TRIM, ZEROES, CACHE, FLUSH] + [STATUS] * bool(style)
    with_payload = [WRITE]
    if "extended" in style and flags == c.NBD_CMD_FLAG_PAYLOAD_LEN:  # a write may have that flag, and others bring a payload, too
        commands.remove(WRITE)
        with_payload = commands
    cookies = await client.send_batch(*[(n, 0, length, b"z" * length if n in with_payload else b"", flags) for n in commands])
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_EINVAL] * len(commands)
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096), "a write with unknown flags was carried out"


async def test_flags_of_other_commands_are_refused(rig):
    client = await rig.connect(structured=True, meta=(c.BASE_ALLOCATION,))
    wrong = [(WRITE, DF), (READ, NO_HOLE), (READ, REQ_ONE), (TRIM, FAST_ZERO), (STATUS, NO_HOLE), (FLUSH, REQ_ONE)]
    for command, flags in wrong:
        reply = await client.call(command, 0, 0 if command == FLUSH else 16, bytes(16) if command == WRITE else b"", flags)
        assert reply.error == c.NBD_EINVAL, f"command {command} with flags {flags}"


@STYLES
@pytest.mark.parametrize("length", [1, 4096, 2 * MIB])
async def test_a_read_only_disk(rig, style, length):
    disk = rig.disks.add("snap", FakeDisk(read_only=True))
    client = await rig.connect("snap", **style)
    for command in (WRITE, ZEROES, TRIM):
        cookies = await client.send_batch(
            (command, 0, length, b"w" * length if command == WRITE else b""),
            (command, 0, length, b"w" * length if command == WRITE else b"", FUA),
        )
        assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_EPERM, c.NBD_EPERM]
    assert (await client.call(READ, 0, length)).data == pattern(0, length)
    assert not (await client.call(FLUSH)).error and not (await client.call(CACHE, 0, length)).error
    assert bytes(disk.content[:length]) == pattern(0, length)


@pytest.mark.parametrize("command", [WRITE, ZEROES, TRIM])
async def test_changes_of_length_nothing(rig, command):
    client = await rig.connect()
    for offset in (0, 1, 4096, SIZE_BYTES):
        assert not (await client.call(command, offset, 0)).error
    assert bytes(rig.disk.content) == pattern(0, SIZE_BYTES)


@pytest.mark.parametrize(
    ("failure", "error"),
    [(NoSpace(name="sr", reason="full"), c.NBD_ENOSPC), (StoreStopped(path="sr", reason="EIO"), c.NBD_EIO),
     (OSError(errno.ENOSPC, "no space"), c.NBD_ENOSPC), (OSError(errno.EIO, "I/O error"), c.NBD_EIO),
     (OSError(errno.EBUSY, "busy"), c.NBD_EIO), (OSError("no errno at all"), c.NBD_EIO),
     (BlockDamaged(path="sr", volume=1, offset_bytes=0, segment=1, segment_offset=0), c.NBD_EIO)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)  # fmt: skip
@pytest.mark.parametrize("command", [WRITE, ZEROES, TRIM, READ])
async def test_what_the_disk_raises_becomes_the_error_of_that_request(rig, failure, error, command):
    rig.disk.failures[8192 + 5] = failure
    client = await rig.connect()
    payload = b"q" * 4096 if command == WRITE else b""
    cookies = await client.send_batch(*[(command, n * 4096, 4096, payload) for n in range(5)])
    assert [reply.error for reply in await client.replies(cookies)] == [0, 0, error, 0, 0]
    del rig.disk.failures[8192 + 5]
    assert not (await client.call(command, 8192, 4096, payload)).error


async def test_writes_after_a_failed_one_in_the_same_batch_are_done_in_order(rig):
    rig.disk.failures[8192] = OSError(errno.EIO, "I/O error")
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"1" * 99), (WRITE, 8192, 0, b"2"), (WRITE, 0, 0, b"3" * 9), (READ, 0, 99))
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [0, c.NBD_EIO, 0, 0]
    assert replies[3].data == b"3" * 9 + b"1" * 90


@pytest.mark.parametrize("place", [0, 700 * KIB, 3 * MIB - 1])
async def test_a_long_write_that_fails_in_one_place_is_answered_once_with_the_error(rig, place):
    rig.disk.failures[place] = NoSpace(name="sr", reason="full")
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"w" * (3 * MIB)), (WRITE, 3 * MIB, 0, b"v" * MIB, FUA))
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_ENOSPC, 0]
    rig.disk.failures.clear()
    assert not (await client.call(WRITE, 0, payload=b"u" * (3 * MIB))).error
    assert bytes(rig.disk.content[: 3 * MIB]) == b"u" * (3 * MIB)


@pytest.mark.parametrize(
    ("name", "wire"),
    [("EPERM", 1), ("EROFS", 1), ("EACCES", 1), ("EIO", 5), ("ENOMEM", 12), ("EINVAL", 22), ("ENOSPC", 28),
     ("EDQUOT", 28), ("EFBIG", 28), ("EOVERFLOW", 75), ("ENOTSUP", 95), ("ESHUTDOWN", 108), ("ETIMEDOUT", 5),
     ("ENOENT", 5)],
)  # fmt: skip
def test_wire_errors(name, wire):
    assert c.wire_error(getattr(errno, name)) == wire


def test_wire_errors_are_those_of_the_protocol():
    assert set(c.WIRE_ERRORS.values()) == {0, 1, 5, 12, 22, 28, 75, 95, 108}

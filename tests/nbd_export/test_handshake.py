"""The handshake against hand-written bytes, against every way of cutting them, and against hostile clients."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbd_export import constants as c
from nbd_export.handshake import ExportInfo, Handshake, Negotiated, Phase, transmission_flags

DISK = ExportInfo(name="disk", size_bytes=0x40000000, read_only=False, description="scratch")
SNAP = ExportInfo(name="snap", size_bytes=0x200, read_only=True)
SECRET = ExportInfo(name="secret", size_bytes=0x200, read_only=True, refusal="not for you")
STRICT = ExportInfo(name="strict", size_bytes=0x1000, read_only=False, min_block_bytes=4096)


class FewExports:
    """Exports by canonical name, plus the alias "by-name" of the first one."""

    def __init__(self, *exports: ExportInfo) -> None:
        self.by_name = {export.name: export for export in exports}
        self.asked: list[str] = []

    def find(self, name: str) -> ExportInfo | None:
        self.asked.append(name)
        if name == "":
            return next(iter(self.by_name.values())) if len(self.by_name) == 1 else None
        if name == "by-name":
            return next(iter(self.by_name.values()), None)
        return self.by_name.get(name)

    def names(self) -> list[str]:
        return [name for name, export in self.by_name.items() if not export.refusal]

    def contexts(self, name: str) -> list[str]:
        return [f"simsr:changed/{SNAP.name}"] if name == DISK.name else []

    def has_context(self, name: str, context: str) -> bool:
        return context in self.contexts(name)


def shake(**kwargs) -> Handshake:
    return Handshake(FewExports(DISK, SNAP, STRICT, SECRET), **kwargs)


def fixed() -> Handshake:
    return shake(fixed_export="disk")


# --- Bytes, written with as little help as can be read -----------------------------------------------------------

MODERN = b"\0\0\0\3"
"""Client flags FIXED_NEWSTYLE | NO_ZEROES."""


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def reply(number: int, reply_type: int, data: bytes = b"") -> bytes:
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", number, reply_type, len(data)) + data


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def info_data(name: bytes, *requests: int) -> bytes:
    return string(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def meta_data(name: bytes, *queries: bytes) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def parse_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return (option, type, payload) of each reply; fails on anything but complete replies."""
    replies, at = [], 0
    while at < len(data):
        magic, number, reply_type, length_bytes = struct.unpack_from(">QIII", data, at)
        at += 20 + length_bytes
        assert magic == c.NBD_REP_MAGIC and at <= len(data)
        replies.append((number, reply_type, data[at - length_bytes : at]))
    return replies


def error_of(handshake: Handshake, data: bytes) -> tuple[int, str]:
    """Feed one option that must be answered by one error; return its type and message."""
    [(_, reply_type, payload)] = parse_replies(handshake.receive(data))
    assert reply_type & c.NBD_REP_FLAG_ERROR
    return reply_type, payload.decode()


ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_SIZE_REQD, ERR_TOO_BIG = (
    0x80000001, 0x80000002, 0x80000003, 0x80000006, 0x80000008, 0x80000009,
)  # fmt: skip

DISK_FLAGS = 0x0D6D  # HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN CACHE FAST_ZERO
SNAP_FLAGS = 0x0507  # HAS_FLAGS READ_ONLY FLUSH MULTI_CONN CACHE
DF = 0x0080

DISK_SIZE = bytes.fromhex("0000000040000000")
DISK_INFO_EXPORT = bytes.fromhex("0000" "0000000040000000" "0d6d")
DISK_INFO_EXPORT_DF = bytes.fromhex("0000" "0000000040000000" "0ded")
SNAP_INFO_EXPORT = bytes.fromhex("0000" "0000000000000200" "0507")
BLOCK_SIZES = bytes.fromhex("0003" "00000001" "00001000" "02000000")
STRICT_BLOCK_SIZES = bytes.fromhex("0003" "00001000" "00001000" "02000000")
STRICT_INFO_EXPORT = bytes.fromhex("0000" "0000000000001000" "0d6d")


# --- Greeting and client flags -----------------------------------------------------------------------------------


def test_greeting_is_fixed_newstyle_with_no_zeroes():
    assert shake().greeting() == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_known_client_flags_are_accepted(flags):
    handshake = shake()
    assert handshake.receive(struct.pack(">I", flags)) == b""
    assert handshake.phase is Phase.OPTION_HEADER


@pytest.mark.parametrize("flags", [4, 7, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_close(flags):
    handshake = shake()
    assert handshake.receive(struct.pack(">I", flags) + option(c.NBD_OPT_LIST)) == b""
    assert handshake.closed and handshake.result is None


DEPTH, CHANGED = b"\0\0\0\0qemu:allocation-depth", b"\0\0\0\0simsr:changed/snap"

SNAP_INFO_EXPORT_DF = SNAP_INFO_EXPORT[:10] + bytes.fromhex("0587")
LISTED = b"".join(reply(3, 2, string(name)) for name in (b"disk", b"snap", b"strict"))

# --- Options by hand: (what the client sends after its flags, what it gets, how it ends) --------------------------

OPTIONS = {
    "go": (
        option(7, info_data(b"disk")),
        reply(7, 3, DISK_INFO_EXPORT) + reply(7, 3, BLOCK_SIZES) + reply(7, 1),
        Negotiated(DISK, False, {}, True, DISK_FLAGS),
    ),
    "go by an alias, everything asked": (
        option(7, info_data(b"by-name", 1, 2, 3, 0, 99)),
        reply(7, 3, DISK_INFO_EXPORT)
        + reply(7, 3, b"\0\1disk")
        + reply(7, 3, b"\0\2scratch")
        + reply(7, 3, BLOCK_SIZES)
        + reply(7, 1),
        Negotiated(DISK, False, {}, True, DISK_FLAGS),
    ),
    "go to a snapshot, which has no description": (
        option(7, info_data(b"snap", 2)),
        reply(7, 3, SNAP_INFO_EXPORT) + reply(7, 3, BLOCK_SIZES) + reply(7, 1),
        Negotiated(SNAP, False, {}, True, SNAP_FLAGS),
    ),
    "info goes on": (
        option(6, info_data(b"snap", 1)),
        reply(6, 3, SNAP_INFO_EXPORT) + reply(6, 3, b"\0\1snap") + reply(6, 3, BLOCK_SIZES) + reply(6, 1),
        None,
    ),
    "structured replies turn on DF": (
        option(8) + option(8) + option(7, info_data(b"disk")),
        reply(8, 1) * 2 + reply(7, 3, DISK_INFO_EXPORT_DF) + reply(7, 3, BLOCK_SIZES) + reply(7, 1),
        Negotiated(DISK, True, {}, True, DISK_FLAGS | DF),
    ),
    "go to an unknown name, then to a known one": (
        option(7, info_data(b"nope")) + option(7, info_data(b"disk")),
        reply(7, ERR_UNKNOWN, b"there is no export 'nope'")
        + reply(7, 3, DISK_INFO_EXPORT)
        + reply(7, 3, BLOCK_SIZES)
        + reply(7, 1),
        Negotiated(DISK, False, {}, True, DISK_FLAGS),
    ),
    "no default export where there are many": (
        option(6, info_data(b"")),
        reply(6, ERR_UNKNOWN, b"there is no default export; ask for one by its name"),
        None,
    ),
    "block sizes required": (
        option(7, info_data(b"strict")) + option(7, info_data(b"strict", 3)),
        reply(7, 3, STRICT_BLOCK_SIZES)
        + reply(7, ERR_SIZE_REQD, b"this export needs clients that ask for its block sizes")
        + reply(7, 3, STRICT_INFO_EXPORT)
        + reply(7, 3, STRICT_BLOCK_SIZES)
        + reply(7, 1),
        Negotiated(STRICT, False, {}, True, DISK_FLAGS),
    ),
    "export name": (
        option(1, b"snap"),
        bytes.fromhex("0000000000000200" "0507"),
        Negotiated(SNAP, False, {}, True, SNAP_FLAGS),
    ),
    "export name after structured replies": (
        option(8) + option(1, b"disk"),
        reply(8, 1) + DISK_SIZE + b"\x0d\xed",
        Negotiated(DISK, True, {}, True, DISK_FLAGS | DF),
    ),
    "list": (
        option(3),
        reply(3, 2, b"\0\0\0\4disk") + reply(3, 2, b"\0\0\0\4snap") + reply(3, 2, b"\0\0\0\6strict") + reply(3, 1),
        None,
    ),
    "list with data": (
        option(3, b"x"),
        reply(3, ERR_INVALID, b"option LIST takes no data, but has 1 bytes"),
        None,
    ),
    "structured reply with data": (
        option(8, b"abc"),
        reply(8, ERR_INVALID, b"option STRUCTURED_REPLY takes no data, but has 3 bytes"),
        None,
    ),
    "starttls, peek export, nonsense": (
        option(5) + option(4, b"disk") + option(0xFFFFFFFF, bytes(1000)) + option(0),
        reply(5, ERR_UNSUP, b"this server has no TLS")
        + reply(4, ERR_UNSUP, b"option 4 is not supported")
        + reply(0xFFFFFFFF, ERR_UNSUP, b"option 4294967295 is not supported")
        + reply(0, ERR_UNSUP, b"option 0 is not supported"),
        None,
    ),
    "list metadata contexts: all, namespace, leaf, unknown": (
        option(9, meta_data(b"disk"))
        + option(9, meta_data(b"disk", b"base:"))
        + option(9, meta_data(b"disk", b"qemu:", b"base:allocation", b"base:"))
        + option(9, meta_data(b"disk", b"qemu:dirty-bitmap:x", b"base:nothing", b"base", b"")),
        reply(9, 4, b"\0\0\0\0base:allocation") + reply(9, 4, DEPTH) + reply(9, 4, CHANGED) + reply(9, 1)
        + reply(9, 4, b"\0\0\0\0base:allocation") + reply(9, 1)
        + reply(9, 4, b"\0\0\0\0base:allocation") + reply(9, 4, DEPTH) + reply(9, 1)
        + reply(9, 1),
        None,
    ),
    "extended headers, and no way back": (
        option(11) + option(8) + option(11) + option(7, info_data(b"disk")),
        reply(11, 1) + reply(8, 0x8000000A, b"extended headers have been negotiated, which leave no other replies") + reply(11, 1)
        + reply(7, 3, DISK_INFO_EXPORT_DF) + reply(7, 3, BLOCK_SIZES) + reply(7, 1),
        Negotiated(DISK, False, {}, True, DISK_FLAGS | DF, extended_headers=True),
    ),
    "extended headers after structured replies": (
        option(8) + option(11) + option(7, info_data(b"snap")),
        reply(8, 1) + reply(11, 1) + reply(7, 3, SNAP_INFO_EXPORT_DF) + reply(7, 3, BLOCK_SIZES) + reply(7, 1),
        Negotiated(SNAP, True, {}, True, SNAP_FLAGS | DF, extended_headers=True),
    ),
    "extended headers with data": (
        option(11, b"?"), reply(11, ERR_INVALID, b"option EXTENDED_HEADERS takes no data, but has 1 bytes"), None,
    ),
    "extended headers offer to choose among contexts, where there are some": (
        option(11) + option(10, meta_data(b"disk", b"simsr:changed/snap", b"simsr:changed/other")) + option(6, info_data(b"snap"))
        + option(7, info_data(b"disk")),
        reply(11, 1) + reply(10, 4, b"\0\0\0\x10simsr:changed/snap") + reply(10, 1)
        + reply(6, 3, SNAP_INFO_EXPORT_DF) + reply(6, 3, BLOCK_SIZES) + reply(6, 1)
        + reply(7, 3, DISK_INFO_EXPORT[:10] + b"\x1d\xed") + reply(7, 3, BLOCK_SIZES) + reply(7, 1),
        Negotiated(DISK, False, {"simsr:changed/snap": 16}, True, DISK_FLAGS | DF | 1 << 12, extended_headers=True),
    ),
    "an export that is refused": (
        option(3) + option(6, info_data(b"secret")) + option(9, meta_data(b"secret")) + option(7, info_data(b"secret")),
        LISTED + reply(3, 1) + b"".join(reply(number, ERR_POLICY, b"not for you") for number in (6, 9, 7)),
        None,
    ),
    "list metadata contexts of snapshots, by their beginning": (
        option(9, meta_data(b"disk", b"simsr:")) + option(9, meta_data(b"disk", b"simsr:changed/"))
        + option(9, meta_data(b"snap", b"simsr:")) + option(9, meta_data(b"disk", b"simsr")),
        (reply(9, 4, CHANGED) + reply(9, 1)) * 2 + reply(9, 1) * 2,
        None,
    ),
    "metadata contexts selected": (
        option(8) + option(10, meta_data(b"disk", b"base:allocation", b"base:allocation"))
        + option(7, info_data(b"disk")),
        reply(8, 1) + reply(10, 4, b"\0\0\0\1base:allocation") + reply(10, 1)
        + reply(7, 3, DISK_INFO_EXPORT_DF) + reply(7, 3, BLOCK_SIZES) + reply(7, 1),
        Negotiated(DISK, True, {"base:allocation": 1}, True, DISK_FLAGS | DF),
    ),
    "metadata contexts: SET knows no wildcard and replaces": (
        option(8) + option(10, meta_data(b"disk", b"base:allocation")) + option(10, meta_data(b"disk", b"base:"))
        + option(1, b"disk"),
        reply(8, 1) + reply(10, 4, b"\0\0\0\1base:allocation") + reply(10, 1) * 2 + DISK_SIZE + b"\x0d\xed",
        Negotiated(DISK, True, {}, True, DISK_FLAGS | DF),
    ),
    "metadata contexts belong to their export": (
        option(8) + option(10, meta_data(b"disk", b"base:allocation")) + option(1, b"snap"),
        reply(8, 1) + reply(10, 4, b"\0\0\0\1base:allocation") + reply(10, 1)
        + bytes.fromhex("0000000000000200" "0587"),
        Negotiated(SNAP, True, {}, True, SNAP_FLAGS | DF),
    ),
    "metadata contexts know an export by all its names": (
        option(8) + option(10, meta_data(b"by-name", b"base:allocation")) + option(6, info_data(b"snap"))
        + option(1, b"disk"),
        reply(8, 1) + reply(10, 4, b"\0\0\0\1base:allocation") + reply(10, 1)
        + reply(6, 3, bytes.fromhex("0000" "0000000000000200" "0587")) + reply(6, 3, BLOCK_SIZES) + reply(6, 1)
        + DISK_SIZE + b"\x0d\xed",
        Negotiated(DISK, True, {"base:allocation": 1}, True, DISK_FLAGS | DF),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name):
    sent, expected, result = OPTIONS[name]
    handshake = shake()
    assert handshake.receive(MODERN + sent) == expected
    assert handshake.result == result
    assert handshake.phase is (Phase.TRANSMISSION if result else Phase.OPTION_HEADER)
    assert handshake.leftover == b"" and not handshake.closed


def test_block_sizes_are_required_where_payloads_must_be_small():
    small = ExportInfo("small", 1 << 30, False, max_block_bytes=1 << 20)
    handshake = Handshake(FewExports(small))
    handshake.receive(MODERN)
    out = handshake.receive(option(7, info_data(b"small")))
    assert [kind for _, kind, _ in parse_replies(out)] == [c.NBD_REP_INFO, ERR_SIZE_REQD]
    # EXPORT_NAME knows no block sizes; its client is let in and gets errors for requests that do not fit.
    handshake.receive(option(1, b"small"))
    assert handshake.result is not None


def test_transmission_flags_match_the_ones_written_by_hand():
    assert transmission_flags(DISK, False) == DISK_FLAGS
    assert transmission_flags(DISK, True) == DISK_FLAGS | c.NBD_FLAG_SEND_DF
    assert transmission_flags(SNAP, False) == SNAP_FLAGS
    writing = (c.NBD_FLAG_SEND_FUA, c.NBD_FLAG_SEND_TRIM, c.NBD_FLAG_SEND_WRITE_ZEROES, c.NBD_FLAG_SEND_FAST_ZERO)
    assert not any(SNAP_FLAGS & flag for flag in writing) and all(DISK_FLAGS & flag for flag in writing)


# --- Endings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"goodbye"])
def test_abort_is_acknowledged_and_closes(data):
    handshake = shake()
    assert handshake.receive(MODERN + option(2, data) + option(3)) == reply(2, 1)
    assert handshake.closed and handshake.result is None and handshake.leftover == b""
    assert handshake.receive(option(3)) == b""


@pytest.mark.parametrize("name", [b"nope", b"", b"disk\0", b"\xff\xfe", b"d" * 5000])
def test_export_name_that_cannot_be_served_closes_without_a_reply(name):
    handshake = shake()
    assert handshake.receive(MODERN + option(1, name)) == b""
    assert handshake.closed and handshake.result is None


def test_export_name_is_padded_for_clients_without_no_zeroes():
    handshake = shake()
    assert handshake.receive(b"\0\0\0\1" + option(1, b"disk")) == DISK_SIZE + b"\x0d\x6d" + bytes(124)
    assert handshake.result is not None and not handshake.result.no_zeroes


def test_go_is_never_padded():
    assert shake().receive(b"\0\0\0\1" + option(7, info_data(b"disk"))).endswith(reply(7, 1))


def test_what_follows_belongs_to_transmission():
    handshake = shake()
    handshake.receive(MODERN + option(7, info_data(b"disk")) + b"first")
    assert handshake.leftover == b"first"
    assert handshake.receive(b" second") == b""
    assert handshake.leftover == b"first second"
    assert handshake.statistics()["buffered_bytes"] == 0


def test_empty_name_is_the_only_export():
    handshake = Handshake(FewExports(SNAP))
    handshake.receive(MODERN + option(7, info_data(b"")))
    assert handshake.result is not None and handshake.result.export == SNAP


# --- The socket of one VDI ----------------------------------------------------------------------------------------


def test_tapdisk_byte_for_byte():
    """datapath.md 6.2: name of 15 bytes with its NUL, whatever the server offers; 10 bytes back, in one piece."""
    exports = FewExports(DISK, SNAP)
    handshake = Handshake(exports, fixed_export="disk")
    assert handshake.greeting() == bytes.fromhex("4e42444d41474943" "49484156454f5054" "0003")
    assert handshake.receive(bytes.fromhex("00000003")) == b""
    assert handshake.receive(bytes.fromhex("49484156454f5054" "00000001" "0000000f")) == b""
    assert handshake.receive(b"tapdisk_client\0") == bytes.fromhex("0000000040000000" "0d6d")
    assert handshake.result == Negotiated(DISK, False, {}, True, DISK_FLAGS, is_tapdisk=True)
    assert exports.asked == ["disk"]


def test_tapdisk_on_the_common_socket_is_turned_away():
    exports = FewExports(DISK, SNAP)
    handshake = Handshake(exports)
    assert handshake.receive(MODERN + option(1, b"tapdisk_client\0")) == b""
    assert handshake.closed
    assert exports.asked == []


def test_names_with_a_nul_are_unknown_on_the_common_socket():
    handshake = shake()
    handshake.receive(MODERN)
    reply_type, message = error_of(handshake, option(7, info_data(b"disk\0")))
    assert reply_type == ERR_UNKNOWN and "\0" not in message


@pytest.mark.parametrize("name", [b"", b"disk", b"snap", b"\xff\xff", b"tapdisk_client\0"])
def test_fixed_export_ignores_the_name(name):
    for ending in (option(1, name), option(7, info_data(name))):
        handshake = fixed()
        handshake.receive(MODERN + option(8) + option(10, meta_data(b"other", b"base:allocation")) + ending)
        assert handshake.result is not None and handshake.result.export == DISK
        assert handshake.result.meta_contexts == {"base:allocation": 1}


def test_fixed_export_lists_itself_only():
    assert fixed().receive(MODERN + option(3)) == reply(3, 2, b"\0\0\0\4disk") + reply(3, 1)


def test_fixed_export_that_is_gone():
    def gone() -> Handshake:
        return shake(fixed_export="deleted")

    assert gone().receive(MODERN + option(3)) == reply(3, 1)
    assert gone().receive(MODERN + option(7, info_data(b"x"))) == reply(7, ERR_UNKNOWN, b"there is no export 'deleted'")
    handshake = gone()
    assert handshake.receive(MODERN + option(1, b"x")) == b"" and handshake.closed


# --- LIST --------------------------------------------------------------------------------------------------------


class ManyExports(FewExports):
    def __init__(self, count: int, name_bytes: int = 36) -> None:
        super().__init__()
        self.count, self.name_bytes, self.listed = count, name_bytes, 0

    def names(self):
        for number in range(self.count):
            self.listed += 1
            yield f"{number:0{self.name_bytes}}"


def test_list_can_be_forbidden():
    handshake = shake(allow_list=False)
    handshake.receive(MODERN)
    assert error_of(handshake, option(3))[0] == ERR_POLICY


def test_list_of_100_000_exports():
    out = Handshake(ManyExports(100_000)).receive(MODERN + option(3))
    assert len(out) == 100_000 * (20 + 4 + 36) + 20
    assert out.endswith(reply(3, 2, b"\0\0\0\x24" + b"%036d" % 99_999) + reply(3, 1))


def test_lists_of_one_connection_are_bounded():
    exports = ManyExports(20_000, name_bytes=1000)
    handshake = Handshake(exports)
    out = handshake.receive(MODERN + option(3) * 5)
    assert len(out) < c.MAX_LIST_REPLY_BYTES + 1000
    assert [kind for _, kind, _ in parse_replies(out) if kind != c.NBD_REP_SERVER] == [1] + [ERR_TOO_BIG] * 4
    assert exports.listed < 40_000, "names are still collected after the budget is spent"


def test_listed_exports_may_be_asked_about():
    """qemu-nbd --list asks for INFO and metadata contexts of each, on the connection that listed them."""
    handshake = Handshake(ManyExports(1000))
    handshake.receive(MODERN + option(3))
    for _ in range(2 * 1000):
        handshake.receive(option(6, info_data(b"by-name")))
    assert not handshake.closed
    handshake.receive(option(3) * (4 * 1000))
    assert handshake.closed, "a second LIST has raised the limit again"


# --- Options that are wrong inside, and what must not be kept ------------------------------------------------------

U32 = struct.Struct(">I").pack

BROKEN = {
    "info without data": (option(6), ERR_INVALID),
    "info with half a length": (option(6, b"\0\0"), ERR_INVALID),
    "info name longer than the option": (option(6, U32(100) + b"disk\0\0"), ERR_INVALID),
    "info name of 4 GiB": (option(6, U32(0xFFFFFFFF) + b"disk\0\0"), ERR_INVALID),
    "info without count": (option(6, string(b"disk")), ERR_INVALID),
    "info with half a count": (option(6, string(b"disk") + b"\0"), ERR_INVALID),
    "info with too few requests": (option(6, string(b"disk") + b"\0\2\0\0"), ERR_INVALID),
    "info with too many requests": (option(6, string(b"disk") + b"\0\1\0\0\0\0"), ERR_INVALID),
    "info with half a request": (option(6, string(b"disk") + b"\0\1\0"), ERR_INVALID),
    "info name beyond 4096": (option(6, info_data(b"d" * 4097)), ERR_INVALID),
    "info name of 4096 is only unknown": (option(6, info_data(b"d" * 4096)), ERR_UNKNOWN),
    "info name not UTF-8": (option(6, info_data(b"\xc3\x28")), ERR_INVALID),
    "go like info": (option(7, U32(5) + b"disk\0\0"), ERR_INVALID),
    "list-meta without data": (option(9), ERR_INVALID),
    "list-meta without count": (option(9, string(b"disk")), ERR_INVALID),
    "list-meta of an unknown export": (option(9, meta_data(b"nope")), ERR_UNKNOWN),
    "list-meta with a missing query": (option(9, string(b"disk") + U32(2) + string(b"base:")), ERR_INVALID),
    "list-meta query longer than the option": (option(9, string(b"disk") + U32(1) + U32(9) + b"base:"), ERR_INVALID),
    "list-meta query beyond 4096": (option(9, meta_data(b"disk", b"q" * 4097)), ERR_INVALID),
    "list-meta with bytes to spare": (option(9, meta_data(b"disk", b"base:") + b"!"), ERR_INVALID),
    "list-meta with 2**32 - 1 queries": (option(9, string(b"disk") + U32(0xFFFFFFFF)), ERR_TOO_BIG),
    "list-meta with 65 queries": (option(9, meta_data(b"disk", *[b"base:"] * 65)), ERR_TOO_BIG),
    "set-meta before structured replies": (option(10, meta_data(b"disk", b"base:allocation")), ERR_INVALID),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_option_is_refused_and_haggling_goes_on(name):
    sent, expected = BROKEN[name]
    handshake = shake()
    handshake.receive(MODERN)
    reply_type, message = error_of(handshake, sent)
    assert reply_type == expected and message
    handshake.receive(option(7, info_data(b"disk")))
    assert handshake.result is not None


@pytest.mark.parametrize(
    "failing",
    [
        option(10, meta_data(b"nope", b"base:allocation")),
        option(10, b"\0"),
        option(10, meta_data(b"disk")),
        option(10, meta_data(b"disk", *[b"base:allocation"] * 65)),
    ],
)
def test_set_meta_context_replaces_even_when_it_fails(failing):
    handshake = shake()
    handshake.receive(MODERN + option(8) + option(10, meta_data(b"disk", b"base:allocation")) + failing)
    handshake.receive(option(7, info_data(b"disk")))
    assert handshake.result is not None and handshake.result.meta_contexts == {}


def test_error_messages_fit_a_string_of_the_protocol():
    handshake = shake()
    handshake.receive(MODERN)
    _, message = error_of(handshake, option(6, info_data("\N{COMBINING CEDILLA}".encode() * 2048)))
    assert 4000 < len(message.encode()) <= 4096


def test_descriptions_are_made_fit_for_the_wire():
    odd = ExportInfo("odd", 512, False, description="a\0b\ud800" + "\N{EURO SIGN}" * 100)
    out = Handshake(FewExports(odd)).receive(MODERN + option(6, info_data(b"odd", 2)))
    [description] = [payload[2:] for _, _, payload in parse_replies(out) if payload[:2] == b"\0\2"]
    assert description.decode() == "a\N{REPLACEMENT CHARACTER}b?" + "\N{EURO SIGN}" * 83


# --- Streams that cannot be trusted any more -----------------------------------------------------------------------


@pytest.mark.parametrize("magic", [b"IHAVEOPt", b"NBDMAGIC", bytes(8), bytes.fromhex("0003e889045565a9")])
def test_bad_option_magic_closes(magic):
    handshake = shake()
    assert handshake.receive(MODERN + option(8) + magic + option(3)[8:]) == reply(8, 1)
    assert handshake.closed


@pytest.mark.parametrize("length_bytes", [c.MAX_OPTION_BYTES + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [3, 7, 9, 12345])
def test_oversized_option_is_refused_before_its_data_comes(number, length_bytes):
    handshake = shake()
    handshake.receive(MODERN)
    assert error_of(handshake, b"IHAVEOPT" + struct.pack(">II", number, length_bytes))[0] == ERR_TOO_BIG
    assert handshake.closed
    assert handshake.receive(bytes(1 << 20)) == b""
    assert handshake.statistics()["buffered_bytes"] == 0


def test_oversized_export_name_closes_without_a_reply():
    handshake = shake()
    assert handshake.receive(MODERN + b"IHAVEOPT" + struct.pack(">II", 1, c.MAX_OPTION_BYTES + 1)) == b""
    assert handshake.closed


def test_largest_option_is_buffered_and_no_more():
    handshake = shake()
    handshake.receive(MODERN + b"IHAVEOPT" + struct.pack(">II", 77, c.MAX_OPTION_BYTES))
    handshake.receive(bytes(c.MAX_OPTION_BYTES - 1))
    assert handshake.statistics()["buffered_bytes"] == c.MAX_OPTION_BYTES - 1
    assert parse_replies(handshake.receive(b"\0"))[0][:2] == (77, ERR_UNSUP)
    assert handshake.statistics()["buffered_bytes"] == 0


def test_endless_haggling_closes():
    handshake = shake()
    out = handshake.receive(MODERN + option(8) * (c.MAX_OPTIONS + 10))
    assert out == reply(8, 1) * c.MAX_OPTIONS
    assert handshake.closed
    assert handshake.statistics()["options_seen"] == c.MAX_OPTIONS + 1


# --- However the bytes are cut ------------------------------------------------------------------------------------


def outcome(make, pieces) -> tuple:
    handshake = make()
    out = b"".join(handshake.receive(piece) for piece in pieces)
    return out, handshake.result, handshake.leftover, handshake.phase, handshake.statistics()


STREAMS = {name: (shake, MODERN + sent + (b"\x25\x60" if end else b"")) for name, (sent, _, end) in OPTIONS.items()}
STREAMS |= {name: (shake, MODERN + sent + option(2) + b"late") for name, (sent, _) in BROKEN.items() if len(sent) < 500}
STREAMS |= {
    "tapdisk": (fixed, MODERN + option(1, b"tapdisk_client\0") + bytes(28)),
    "padded": (shake, b"\0\0\0\1" + option(1, b"disk")),
    "export name unknown": (shake, MODERN + option(1, b"nope") + bytes(28)),
    "unknown client flags": (shake, b"\0\0\1\3" + option(3)),
    "bad magic": (shake, MODERN + option(8) + b"GET / HTTP/1.1\r\n\r\n"),
    "oversized": (shake, MODERN + b"IHAVEOPT" + struct.pack(">II", 3, 1 << 31) + b"tail"),
    "cut short": (shake, MODERN + option(7, info_data(b"disk"))[:-3]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_split_gives_the_same(name):
    make, stream = STREAMS[name]
    whole = outcome(make, [stream])
    assert outcome(make, [stream[i : i + 1] for i in range(len(stream))]) == whole
    assert outcome(make, [memoryview(stream)[i : i + 7] for i in range(0, len(stream), 7)]) == whole
    for cut in range(len(stream) + 1):
        assert outcome(make, [stream[:cut], b"", stream[cut:]]) == whole


# --- Hostile clients ----------------------------------------------------------------------------------------------

NAMES = st.sampled_from([b"", b"disk", b"snap", b"strict", b"by-name", b"nope", b"tapdisk_client\0"]) | st.binary(
    max_size=20
)
QUERIES = st.lists(st.sampled_from([b"base:", b"base:allocation", b"qemu:", b""]) | st.binary(max_size=9), max_size=70)
DATA = st.one_of(
    st.just(b""),
    st.binary(max_size=64),
    NAMES,
    st.builds(lambda name, requests: info_data(name, *requests), NAMES, st.lists(st.integers(0, 5), max_size=6)),
    st.builds(lambda name, queries: meta_data(name, *queries), NAMES, QUERIES),
)
NUMBERS = st.integers(0, 12) | st.integers(0, 0xFFFFFFFF)
OPTION_LISTS = st.lists(st.tuples(NUMBERS, DATA), max_size=70)


def check_bounds(handshake: Handshake, received_bytes: int) -> None:
    buffered_bytes = handshake.statistics()["buffered_bytes"]
    assert isinstance(buffered_bytes, int) and buffered_bytes < c.MAX_OPTION_BYTES + 16
    assert buffered_bytes + len(handshake.leftover) <= received_bytes
    assert handshake.closed <= (handshake.result is None)
    assert (handshake.result is not None) == (handshake.phase is Phase.TRANSMISSION)


@settings(max_examples=300, deadline=None)
@given(flags=st.sampled_from([b"", MODERN, b"\0\0\0\1"]), junk=st.binary(max_size=2000), is_fixed=st.booleans())
@example(flags=MODERN, junk=b"IHAVEOPT" + b"\xff" * 8, is_fixed=False)
def test_arbitrary_bytes_never_raise(flags, junk, is_fixed):
    handshake = fixed() if is_fixed else shake()
    handshake.receive(flags + junk)
    check_bounds(handshake, len(flags + junk))


@settings(max_examples=300, deadline=None)
@given(options=OPTION_LISTS, is_fixed=st.booleans())
def test_every_option_gets_exactly_one_final_reply(options, is_fixed):
    """Up to the option that ends the handshake; replies name their option and come in order."""
    handshake = fixed() if is_fixed else shake()
    handshake.receive(MODERN)
    for number, data in options:
        out = handshake.receive(option(number, data))
        check_bounds(handshake, 16 + len(data))
        if handshake.statistics()["options_seen"] > c.MAX_OPTIONS and handshake.closed:
            assert out == b""
        elif number == c.NBD_OPT_EXPORT_NAME:
            assert len(out) == (10 if handshake.result else 0) and (handshake.closed or handshake.result)
        else:
            *infos, (_, final, _) = replies = parse_replies(out)
            assert all(replied == number for replied, _, _ in replies)
            assert all(kind in (2, 3, 4) for _, kind, _ in infos)
            assert final == c.NBD_REP_ACK or final & c.NBD_REP_FLAG_ERROR
        if handshake.closed or handshake.result:
            break


@settings(max_examples=300, deadline=None)
@given(options=OPTION_LISTS, data=st.data())
def test_damaged_streams_never_raise_and_never_depend_on_their_cuts(options, data):
    stream = bytearray(MODERN + b"".join(option(*each) for each in options))
    for _ in range(data.draw(st.integers(0, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    stream = bytes(stream[: data.draw(st.integers(0, len(stream)))])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = list(zip([0, *cuts], [*cuts, len(stream)], strict=True))
    assert outcome(shake, [stream[a:b] for a, b in edges]) == outcome(shake, [stream])


# --- Constants ----------------------------------------------------------------------------------------------------


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


# --- TLS ---------------------------------------------------------------------------------------------------------


def test_starttls_stops_and_secured_goes_on():
    handshake = shake(tls_offered=True)
    said = handshake.receive(MODERN + option(8) + option(5))
    assert said == reply(8, 1) + reply(5, 1) and handshake.phase is Phase.STARTTLS and handshake.leftover == b""
    handshake.secured(FewExports(SNAP))
    assert handshake.receive(option(5)) == reply(5, ERR_INVALID, b"TLS has been negotiated already")
    assert handshake.receive(option(7, info_data(b"disk")))[12:16] == struct.pack(">I", ERR_UNKNOWN), "the exports from before are told"
    handshake.receive(option(7, info_data(b"")))
    assert handshake.result == Negotiated(SNAP, False, {}, True, SNAP_FLAGS), "structured replies outlived the change to TLS"
    assert handshake.statistics()["tls"] is True


def test_what_follows_starttls_is_left_over_and_not_looked_at():
    handshake = shake(tls_offered=True)
    assert handshake.receive(MODERN + option(5) + option(3)) == reply(5, 1)
    assert handshake.leftover == option(3)


@pytest.mark.parametrize("number", [1, 3, 4, 6, 7, 8, 9, 10, 11, 77])
def test_without_tls_where_it_is_required(number):
    handshake = shake(tls_offered=True, tls_required=True)
    said = handshake.receive(MODERN + option(number, b"disk") + option(2))
    if number == c.NBD_OPT_EXPORT_NAME:
        assert said == b""
    else:
        assert [(n, kind) for n, kind, _ in parse_replies(said)] == [(number, 0x80000005), (2, 1)]
    assert handshake.closed and handshake.result is None


def test_extended_headers_and_export_name_do_not_go_together():
    handshake = shake()
    assert handshake.receive(MODERN + option(11) + option(1, b"disk")) == reply(11, 1)
    assert handshake.closed and handshake.result is None

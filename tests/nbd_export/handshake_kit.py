"""What the tests of the handshake share: a few exports, messages written with as little help as can be read, and conversations.

`OPTIONS` are conversations that go well or on, `BROKEN` single options that must be refused.
"""

from __future__ import annotations

import struct

from nbd_export import constants as c
from nbd_export.handshake import ExportInfo, Handshake, Negotiated

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

# --- Options that are wrong inside ------------------------------------------------------------------------------------

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

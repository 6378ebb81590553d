"""What is inside the data of the handshake's options: strings, lists of requests, lists of queries.

Clients choose every length in here. Each function checks the lengths it finds against what is there and raises
`Refused` with the reply that the option deserves; `nbd_export.handshake` alone catches it. Nothing is allocated that
is larger than the option itself, which `nbd_export.handshake` has bounded before.
"""

from __future__ import annotations

import struct

from nbd_export import constants as c

__all__ = [
    "Refused",
    "decode_name",
    "parse_info_requests",
    "parse_meta_context",
    "parse_name",
    "require_no_data",
    "wire_string",
]

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class Refused(Exception):
    """Answer the option with this error reply and go on with the next option."""

    def __init__(self, reply_type: int, message: str) -> None:
        super().__init__(message)
        self.reply_type = reply_type


def require_no_data(option_name: str, data: bytes) -> None:
    if data:
        raise Refused(c.NBD_REP_ERR_INVALID, f"option {option_name} takes no data, but has {len(data)} bytes")


def parse_name(data: bytes) -> tuple[bytes, bytes]:
    """Return the export name that starts the data of INFO, GO and the metadata options, and the rest."""
    return _split_string(data, "export name")


def parse_info_requests(data: bytes) -> frozenset[int]:
    """Return the information types that INFO or GO asks for; those that do not exist are ours to ignore."""
    if len(data) < _U16.size:
        raise Refused(c.NBD_REP_ERR_INVALID, "the number of information requests is missing")
    (count,) = _U16.unpack_from(data)
    if len(data) != _U16.size * (1 + count):
        raise Refused(c.NBD_REP_ERR_INVALID, f"{count} information requests do not fit the option's length")
    return frozenset(struct.unpack_from(f">{count}H", data, _U16.size))


def parse_meta_context(data: bytes) -> tuple[bytes, frozenset[bytes]]:
    """Return the export name and the queries of a LIST_ or SET_META_CONTEXT.

    What a query means is not looked at: those of unknown namespaces are to be ignored, and all others compare equal to
    the name of a context or do not.
    """
    name, rest = parse_name(data)
    if len(rest) < _U32.size:
        raise Refused(c.NBD_REP_ERR_INVALID, "the number of queries is missing")
    (count,) = _U32.unpack_from(rest)
    rest = rest[_U32.size :]
    if count > c.MAX_META_QUERIES:
        raise Refused(c.NBD_REP_ERR_TOO_BIG, f"at most {c.MAX_META_QUERIES} queries are allowed")
    queries = set()
    for _ in range(count):
        query, rest = _split_string(rest, "query")
        queries.add(query)
    if rest:
        raise Refused(c.NBD_REP_ERR_INVALID, f"{len(rest)} bytes follow the last query")
    return name, frozenset(queries)


def decode_name(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise Refused(c.NBD_REP_ERR_INVALID, "the export name is not UTF-8") from None


def wire_string(text: str, limit_bytes: int) -> bytes:
    """Return ``text`` as the protocol wants strings: UTF-8 without NUL, cut to ``limit_bytes`` between characters."""
    encoded = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace")
    if len(encoded) <= limit_bytes:
        return encoded
    return encoded[:limit_bytes].decode(errors="ignore").encode()


def _split_string(data: bytes, what: str) -> tuple[bytes, bytes]:
    """Return the string that starts ``data``, behind its 32-bit length, and the rest."""
    if len(data) < _U32.size:
        raise Refused(c.NBD_REP_ERR_INVALID, f"the length of the {what} is missing")
    (length_bytes,) = _U32.unpack_from(data)
    if length_bytes > len(data) - _U32.size:
        raise Refused(c.NBD_REP_ERR_INVALID, f"the {what} is longer than the option")
    if length_bytes > c.MAX_NAME_BYTES:
        raise Refused(c.NBD_REP_ERR_INVALID, f"the {what} is longer than {c.MAX_NAME_BYTES} bytes")
    end = _U32.size + length_bytes
    return data[_U32.size : end], data[end:]

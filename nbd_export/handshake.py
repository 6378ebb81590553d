"""The first half of an NBD connection: from the greeting to the choice of an export. No I/O in here.

Theory of operation
-------------------
The server greets; the client answers with 32 bits of flags; then it sends options, one after another, until one of
them ends the haggling: GO or EXPORT_NAME (an export is chosen, transmission begins) or ABORT. Every option is a header
of 16 bytes that says how much data follows, and every option but EXPORT_NAME is answered with one or more replies.

`Handshake` is that conversation without a socket. The caller sends what `greeting` and `receive` return and feeds
`receive` with what the client says, cut anywhere. Inside, the state is the pair (phase, bytes needed): as soon as that
many bytes are there, the phase's row of `_STEPS` consumes them and names the next pair. So no step ever sees an
incomplete message, and how the bytes were cut cannot be noticed. Options are rows of `_OPTIONS`; what has no row is
answered with ERR_UNSUP, its data skipped.

    CLIENT_FLAGS --> OPTION_HEADER <--> OPTION_DATA --> TRANSMISSION   GO, EXPORT_NAME: `result` is set
          |                |     ^           |    +---> STARTTLS       the caller changes to TLS, then calls `secured`
          |                |     +-----------|----------+
          +----------------+-----------------+--------> CLOSED         ABORT, or the client broke the protocol

Two ways to say no. An option that is wrong but whose end is known gets an error reply, and haggling goes on. The
connection is closed where the stream cannot be trusted any more (bad magic, unknown client flags, oversized option),
where the protocol has no room for an error reply (EXPORT_NAME), and where a client never comes to an end.

With TLS required every option but STARTTLS and ABORT is answered with ERR_TLS_REQD until `secured`. Whatever was negotiated before STARTTLS is
forgotten by then, because anybody on the way may have said it; bytes that came behind STARTTLS in the clear are handed out as `leftover`, and
the caller must not go on with them.

Selected metadata contexts belong to the export that they were selected for. It is remembered by its canonical name, so
a selection survives a client that asks once by uuid and once by name, and does not survive a name that has meanwhile
become another export's.

Invariants
----------
* Whatever the bytes, nothing is raised, as long as `Exports` raises nothing.
* At most ``MAX_OPTION_BYTES`` plus a header are kept between two calls, and nothing once `closed`.
* The bytes returned in total, the phase and the result depend on the bytes received only, not on how they were cut.
* Replies are complete. The answer to EXPORT_NAME is never cut: tapdisk reads its 10 bytes with a single ``recv``.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from nbd_export import constants as c
from nbd_export._option_data import (
    Refused,
    decode_name,
    parse_info_requests,
    parse_meta_context,
    parse_name,
    require_no_data,
    wire_string,
)

__all__ = ["ExportInfo", "Exports", "Handshake", "Negotiated", "Phase", "transmission_flags"]

_GREETING = struct.Struct(">QQH")
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_EXPORT_NAME_REPLY = struct.Struct(">QH")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

_KNOWN_CLIENT_FLAGS = c.NBD_FLAG_C_FIXED_NEWSTYLE | c.NBD_FLAG_C_NO_ZEROES
_COMMON_CONTEXTS = (c.BASE_ALLOCATION, c.QEMU_ALLOCATION_DEPTH)
"""The metadata contexts that every export has. Namespaces are matched by the query rules of ``base:``."""

_FIRST_OTHER_CONTEXT = 16  # ids of those that come and go

TAPDISK_NAME = b"tapdisk_client\0"
"""The export name by which tapdisk's NBD client is known (spec: datapath 6.2)."""


@dataclass(frozen=True)
class ExportInfo:
    """What a client learns about an export. ``name`` is the canonical one, whatever it was asked for by. ``refusal``: why this client must not
    have it; nothing else is told then."""

    name: str
    size_bytes: int
    read_only: bool
    description: str = ""
    min_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    max_block_bytes: int = c.MAX_REQUEST_BYTES
    refusal: str = ""

    @property
    def has_default_block_sizes(self) -> bool:
        """Whether a client that knows nothing of block sizes can use the export."""
        return self.min_block_bytes == 1 and self.max_block_bytes >= c.MAX_REQUEST_BYTES


class Exports(Protocol):
    """The exports that a client is offered. No method may raise or wait."""

    def find(self, name: str) -> ExportInfo | None:
        """Return the export that goes by ``name``. ``""`` is the default export: the only one there is, else None."""

    def names(self) -> Iterable[str]:
        """Return the canonical names of all exports that are not refused to the client."""

    def contexts(self, name: str) -> Iterable[str]:
        """Return the names of the metadata contexts that the export of that canonical name has beyond those that all have."""

    def has_context(self, name: str, context: str) -> bool:
        """Return whether the export has that context, also by a name that `contexts` does not list."""


@dataclass(frozen=True)
class Negotiated:
    """How a handshake ended that led to transmission. ``meta_contexts`` maps names to the ids used on the wire."""

    export: ExportInfo
    structured_replies: bool
    meta_contexts: dict[str, int]
    no_zeroes: bool
    transmission_flags: int
    extended_headers: bool = False
    is_tapdisk: bool = False


class Phase(enum.Enum):
    """Where the conversation stands; see the drawing at the top of the module."""

    CLIENT_FLAGS = "client flags"
    OPTION_HEADER = "option header"
    OPTION_DATA = "option data"
    STARTTLS = "TLS handshake"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


def transmission_flags(export: ExportInfo, in_chunks: bool, status_payload: bool = False) -> int:
    """Return the 16 bits that tell a client what it may ask of ``export``.

    A read-only export keeps FLUSH and CACHE, which write nothing, and loses whatever only makes sense with writes.
    MULTI_CONN holds for both: all connections to an export look at the same disk, with no cache in between.
    """
    flags = c.NBD_FLAG_HAS_FLAGS | c.NBD_FLAG_SEND_FLUSH | c.NBD_FLAG_SEND_CACHE | c.NBD_FLAG_CAN_MULTI_CONN
    if export.read_only:
        flags |= c.NBD_FLAG_READ_ONLY
    else:
        flags |= c.NBD_FLAG_SEND_FUA | c.NBD_FLAG_SEND_TRIM | c.NBD_FLAG_SEND_WRITE_ZEROES | c.NBD_FLAG_SEND_FAST_ZERO
    if in_chunks:
        flags |= c.NBD_FLAG_SEND_DF
    if status_payload:
        flags |= c.NBD_FLAG_BLOCK_STATUS_PAYLOAD
    return flags


class Handshake:
    """One connection's handshake.

    Drive it: `greeting`, `receive`. Look at it: `phase`, `closed`, `result`, `leftover`, `statistics`.

    With ``fixed_export`` the socket belongs to that one export: names are not even looked at, and LIST tells of
    no other. tapdisk needs this, for it always asks for ``tapdisk_client\\0``. Without ``allow_list`` LIST is refused.
    """

    def __init__(
        self, exports: Exports, *, fixed_export: str | None = None, allow_list: bool = True, tls_offered: bool = False,
        tls_required: bool = False,
    ) -> None:  # fmt: skip
        self.result: Negotiated | None = None
        """Set when transmission begins."""
        self.leftover = b""
        """What came after the handshake and belongs to transmission already; in phase STARTTLS what must not be there."""

        self._exports = exports
        self._fixed_export = fixed_export
        self._allow_list = allow_list
        self._tls_offered, self._tls_required = tls_offered, tls_required
        self._secured = self._can_haggle = False

        self._phase = Phase.CLIENT_FLAGS
        self._needed_bytes = _CLIENT_FLAGS.size
        self._buffer = bytearray()
        self._out: list[bytes] = []

        self._no_zeroes = False
        self._forget()
        self._option = 0
        self._options_seen = 0
        self._options_allowed = c.MAX_OPTIONS
        self._list_budget_bytes = c.MAX_LIST_REPLY_BYTES

    def _forget(self) -> None:
        """Begin with nothing negotiated."""
        self._structured_replies = self._extended_headers = False
        self._meta_contexts: dict[str, int] = {}
        self._meta_export_name: str | None = None

    # --- What the caller uses -----------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def closed(self) -> bool:
        """True when it is over without transmission: send what was returned, then close the connection."""
        return self._phase is Phase.CLOSED

    def greeting(self) -> bytes:
        """Return what the server says first. It goes out before anything is received."""
        return _GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, c.NBD_FLAG_FIXED_NEWSTYLE | c.NBD_FLAG_NO_ZEROES)

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take what the client sent and return what to send back, which may be nothing.

        Once `result` is set, further bytes are added to `leftover`; once `closed`, they are dropped.
        """
        self._buffer += data
        at = 0
        while (step := self._STEPS.get(self._phase)) and len(self._buffer) - at >= self._needed_bytes:
            message = bytes(self._buffer[at : at + self._needed_bytes])
            at += self._needed_bytes
            step(self, message)
        del self._buffer[:at]
        if self._phase in (Phase.TRANSMISSION, Phase.STARTTLS):
            self.leftover += bytes(self._buffer)
        if self._phase not in self._STEPS:
            self._buffer.clear()
        out = b"".join(self._out)
        self._out.clear()
        return out

    def secured(self, exports: Exports) -> None:
        """Go on, inside TLS now, with ``exports``: more may be known of the client than before."""
        self._secured, self._exports = True, exports
        self._forget()
        self._expect(Phase.OPTION_HEADER, _OPTION.size)

    def statistics(self) -> dict[str, object]:
        """Return where the handshake stands, for logs and the daemon's list of clients."""
        return {
            "phase": self._phase.value,
            "options_seen": self._options_seen,
            "buffered_bytes": len(self._buffer),
            "structured_replies": self._structured_replies,
            "extended_headers": self._extended_headers,
            "tls": self._secured,
        }

    # --- Steps: one per phase that waits for bytes --------------------------------------------------------------

    def _expect(self, phase: Phase, needed_bytes: int) -> None:
        self._phase, self._needed_bytes = phase, needed_bytes

    def _close(self) -> None:
        self._expect(Phase.CLOSED, 0)

    def _take_client_flags(self, message: bytes) -> None:
        (flags,) = _CLIENT_FLAGS.unpack(message)
        if flags & ~_KNOWN_CLIENT_FLAGS:
            self._close()
            return
        # Options are taken from clients without FIXED_NEWSTYLE as well: they send none but EXPORT_NAME anyway.
        self._no_zeroes = bool(flags & c.NBD_FLAG_C_NO_ZEROES)
        self._can_haggle = bool(flags & c.NBD_FLAG_C_FIXED_NEWSTYLE)
        self._expect(Phase.OPTION_HEADER, _OPTION.size)

    def _take_option_header(self, message: bytes) -> None:
        magic, self._option, length_bytes = _OPTION.unpack(message)
        self._options_seen += 1
        if magic != c.IHAVEOPT or self._options_seen > self._options_allowed:
            self._close()
        elif length_bytes > c.MAX_OPTION_BYTES:
            if self._option != c.NBD_OPT_EXPORT_NAME:  # which has no error reply
                self._reply_error(c.NBD_REP_ERR_TOO_BIG, f"option data is limited to {c.MAX_OPTION_BYTES} bytes")
            self._close()
        else:
            self._expect(Phase.OPTION_DATA, length_bytes)

    def _take_option_data(self, message: bytes) -> None:
        # Back to the next option unless the handler says otherwise.
        self._expect(Phase.OPTION_HEADER, _OPTION.size)
        handler = self._OPTIONS.get(self._option)
        if self._must_have_tls:
            if self._option == c.NBD_OPT_EXPORT_NAME:  # which has no error reply
                self._close()
            else:
                self._reply_error(c.NBD_REP_ERR_TLS_REQD, "this server wants TLS; begin with STARTTLS")
            return
        if handler is None:
            self._reply_error(c.NBD_REP_ERR_UNSUP, f"option {self._option} is not supported")
            return
        try:
            handler(self, message)
        except Refused as refused:
            self._reply_error(refused.reply_type, str(refused))

    @property
    def _must_have_tls(self) -> bool:
        return self._tls_required and not self._secured and self._option not in (c.NBD_OPT_STARTTLS, c.NBD_OPT_ABORT)

    # --- Options ------------------------------------------------------------------------------------------------

    def _export_name(self, data: bytes) -> None:
        if self._extended_headers:  # which the protocol does not let go together
            self._close()
            return
        try:
            export = self._find(data)
        except Refused:
            self._close()
            return
        reply = _EXPORT_NAME_REPLY.pack(export.size_bytes, self._flags_of(export))
        self._out.append(reply if self._no_zeroes else reply + bytes(c.EXPORT_NAME_ZEROES_BYTES))
        self._begin_transmission(export, is_tapdisk=data == TAPDISK_NAME)

    def _starttls(self, data: bytes) -> None:
        if not self._tls_offered or not self._can_haggle:
            raise Refused(c.NBD_REP_ERR_UNSUP, "this server has no TLS")
        require_no_data("STARTTLS", data)
        if self._secured:
            raise Refused(c.NBD_REP_ERR_INVALID, "TLS has been negotiated already")
        self._reply(c.NBD_REP_ACK)
        self._expect(Phase.STARTTLS, 0)

    def _abort(self, data: bytes) -> None:
        self._reply(c.NBD_REP_ACK)
        self._close()

    def _list(self, data: bytes) -> None:
        require_no_data("LIST", data)
        if not self._allow_list:
            raise Refused(c.NBD_REP_ERR_POLICY, "this server does not list its exports")
        replies = []
        for name in self._visible_names():
            encoded = wire_string(name, c.MAX_NAME_BYTES)
            replies.append(
                _REPLY.pack(c.NBD_REP_MAGIC, c.NBD_OPT_LIST, c.NBD_REP_SERVER, _U32.size + len(encoded))
                + _U32.pack(len(encoded))
                + encoded
            )
            self._list_budget_bytes -= len(replies[-1])
            if self._list_budget_bytes <= 0:
                raise Refused(c.NBD_REP_ERR_TOO_BIG, "too much to list; ask for an export by its name")
        self._out += replies
        self._reply(c.NBD_REP_ACK)
        # Granted once, or each LIST would earn the next.
        if self._options_allowed == c.MAX_OPTIONS:
            self._options_allowed += c.MAX_OPTIONS_PER_LISTED_EXPORT * len(replies)

    def _structured_reply(self, data: bytes) -> None:
        require_no_data("STRUCTURED_REPLY", data)
        if self._extended_headers:
            raise Refused(c.NBD_REP_ERR_EXT_HEADER_REQD, "extended headers have been negotiated, which leave no other replies")
        self._structured_replies = True
        self._reply(c.NBD_REP_ACK)

    def _take_extended_headers(self, data: bytes) -> None:
        require_no_data("EXTENDED_HEADERS", data)
        self._extended_headers = True
        self._reply(c.NBD_REP_ACK)

    def _info(self, data: bytes) -> None:
        self._describe(data)

    def _go(self, data: bytes) -> None:
        self._begin_transmission(self._describe(data))

    def _describe(self, data: bytes) -> ExportInfo:
        """Answer INFO or GO, which differ in nothing but in what comes after success. Return the export."""
        name, rest = parse_name(data)
        requests = parse_info_requests(rest)
        export = self._find(name)
        block_size = _INFO_BLOCK_SIZE.pack(
            c.NBD_INFO_BLOCK_SIZE, export.min_block_bytes, export.preferred_block_bytes, export.max_block_bytes
        )
        if c.NBD_INFO_BLOCK_SIZE not in requests and not export.has_default_block_sizes:
            self._reply(c.NBD_REP_INFO, block_size)
            raise Refused(c.NBD_REP_ERR_BLOCK_SIZE_REQD, "this export needs clients that ask for its block sizes")
        self._reply(c.NBD_REP_INFO, _INFO_EXPORT.pack(c.NBD_INFO_EXPORT, export.size_bytes, self._flags_of(export)))
        if c.NBD_INFO_NAME in requests:
            self._reply(c.NBD_REP_INFO, _U16.pack(c.NBD_INFO_NAME) + wire_string(export.name, c.MAX_NAME_BYTES))
        if c.NBD_INFO_DESCRIPTION in requests and export.description:
            description = wire_string(export.description, c.MAX_DESCRIPTION_BYTES)
            self._reply(c.NBD_REP_INFO, _U16.pack(c.NBD_INFO_DESCRIPTION) + description)
        self._reply(c.NBD_REP_INFO, block_size)
        self._reply(c.NBD_REP_ACK)
        return export

    def _list_meta_context(self, data: bytes) -> None:
        name, queries = parse_meta_context(data)
        export = self._find(name)
        for context in (*_COMMON_CONTEXTS, *self._exports.contexts(export.name)):
            # Without a query all are meant, and a query that ends in a colon or a slash means all that begin like it.
            encoded = context.encode()
            if not queries or encoded in queries or any(q[-1:] in (b":", b"/") and encoded.startswith(q) for q in queries):
                self._reply(c.NBD_REP_META_CONTEXT, _U32.pack(0) + encoded)
                self._list_budget_bytes -= len(self._out[-1])
                if self._list_budget_bytes <= 0:
                    raise Refused(c.NBD_REP_ERR_TOO_BIG, "too much to list; ask for a metadata context by its name")
        self._reply(c.NBD_REP_ACK)

    def _set_meta_context(self, data: bytes) -> None:
        # A selection replaces the one before even if it fails.
        self._meta_contexts, self._meta_export_name = {}, None
        if not self._structured_replies and not self._extended_headers:
            raise Refused(c.NBD_REP_ERR_INVALID, "structured replies must be negotiated before metadata contexts")
        name, queries = parse_meta_context(data)
        export = self._find(name)
        wanted = {query.decode(errors="replace") for query in queries}
        selected = {context: ident for ident, context in enumerate(_COMMON_CONTEXTS, 1) if context in wanted}
        for context in sorted(wanted - selected.keys()):
            if self._exports.has_context(export.name, context):
                selected[context] = _FIRST_OTHER_CONTEXT + len(selected)
        for context, ident in selected.items():
            self._reply(c.NBD_REP_META_CONTEXT, _U32.pack(ident) + context.encode())
        self._reply(c.NBD_REP_ACK)
        self._meta_contexts, self._meta_export_name = selected, export.name

    # --- Helpers of the options ---------------------------------------------------------------------------------

    def _begin_transmission(self, export: ExportInfo, is_tapdisk: bool = False) -> None:
        self.result = Negotiated(
            export=export,
            structured_replies=self._structured_replies,
            meta_contexts=self._contexts_of(export),
            no_zeroes=self._no_zeroes,
            transmission_flags=self._flags_of(export),
            extended_headers=self._extended_headers,
            is_tapdisk=is_tapdisk,
        )
        self._expect(Phase.TRANSMISSION, 0)

    def _contexts_of(self, export: ExportInfo) -> dict[str, int]:
        return self._meta_contexts if self._meta_export_name == export.name else {}

    def _flags_of(self, export: ExportInfo) -> int:
        status_payload = self._extended_headers and bool(self._contexts_of(export))
        return transmission_flags(export, self._structured_replies or self._extended_headers, status_payload)

    def _find(self, name: bytes) -> ExportInfo:
        """Return the export that the client means by ``name``, or refuse."""
        if self._fixed_export is not None:
            export, asked_for = self._exports.find(self._fixed_export), self._fixed_export
        else:
            asked_for = decode_name(name)
            # A name with a NUL is no name; layers below us may treat NUL as they like and are not asked.
            export = None if "\0" in asked_for else self._exports.find(asked_for)
        if export is None:
            missing = f"export {asked_for!r}" if asked_for else "default export; ask for one by its name"
            raise Refused(c.NBD_REP_ERR_UNKNOWN, f"there is no {missing}")
        if export.refusal:
            raise Refused(c.NBD_REP_ERR_POLICY, export.refusal)
        return export

    def _visible_names(self) -> Iterable[str]:
        if self._fixed_export is None:
            return self._exports.names()
        export = self._exports.find(self._fixed_export)
        return [] if export is None or export.refusal else [export.name]

    def _reply(self, reply_type: int, payload: bytes = b"") -> None:
        self._out.append(_REPLY.pack(c.NBD_REP_MAGIC, self._option, reply_type, len(payload)) + payload)

    def _reply_error(self, reply_type: int, message: str) -> None:
        self._reply(reply_type, wire_string(message, c.MAX_NAME_BYTES))

    # --- The tables ---------------------------------------------------------------------------------------------

    _STEPS: dict[Phase, Callable[[Handshake, bytes], None]] = {
        Phase.CLIENT_FLAGS: _take_client_flags,
        Phase.OPTION_HEADER: _take_option_header,
        Phase.OPTION_DATA: _take_option_data,
    }

    _OPTIONS: dict[int, Callable[[Handshake, bytes], None]] = {
        c.NBD_OPT_EXPORT_NAME: _export_name,
        c.NBD_OPT_ABORT: _abort,
        c.NBD_OPT_LIST: _list,
        c.NBD_OPT_STARTTLS: _starttls,
        c.NBD_OPT_INFO: _info,
        c.NBD_OPT_GO: _go,
        c.NBD_OPT_STRUCTURED_REPLY: _structured_reply,
        c.NBD_OPT_LIST_META_CONTEXT: _list_meta_context,
        c.NBD_OPT_SET_META_CONTEXT: _set_meta_context,
        c.NBD_OPT_EXTENDED_HEADERS: _take_extended_headers,
    }

"""The numbers of the NBD protocol, and the limits that we set ourselves.

Names are those of the protocol document (NetworkBlockDevice/nbd, doc/proto.md), so that one search finds a thing
there and here. All are plain ints: the transmission loop compares them hundreds of thousands of times a second.

Invariant: every limit bounds something that a client chooses; its comment says who else draws the line where.
"""

from __future__ import annotations

import errno

# --- Magics -----------------------------------------------------------------------------------------------------

NBDMAGIC = 0x4E42444D41474943  # "NBDMAGIC", the first eight bytes of every greeting
IHAVEOPT = 0x49484156454F5054  # "IHAVEOPT", newstyle: in the greeting and before every option
NBD_REP_MAGIC = 0x0003E889045565A9  # before every reply to an option
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
NBD_EXTENDED_REQUEST_MAGIC = 0x21E41C71
NBD_EXTENDED_REPLY_MAGIC = 0x6E8A278C

# --- Handshake --------------------------------------------------------------------------------------------------

NBD_FLAG_FIXED_NEWSTYLE = 1 << 0  # handshake flags: what the server offers
NBD_FLAG_NO_ZEROES = 1 << 1

NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0  # client flags: what the client takes up
NBD_FLAG_C_NO_ZEROES = 1 << 1

EXPORT_NAME_ZEROES_BYTES = 124  # after the reply to EXPORT_NAME, unless NO_ZEROES was agreed

NBD_OPT_EXPORT_NAME = 1
NBD_OPT_ABORT = 2
NBD_OPT_LIST = 3
NBD_OPT_PEEK_EXPORT = 4  # withdrawn
NBD_OPT_STARTTLS = 5
NBD_OPT_INFO = 6
NBD_OPT_GO = 7
NBD_OPT_STRUCTURED_REPLY = 8
NBD_OPT_LIST_META_CONTEXT = 9
NBD_OPT_SET_META_CONTEXT = 10
NBD_OPT_EXTENDED_HEADERS = 11

NBD_REP_ACK = 1
NBD_REP_SERVER = 2
NBD_REP_INFO = 3
NBD_REP_META_CONTEXT = 4
NBD_REP_FLAG_ERROR = 1 << 31
NBD_REP_ERR_UNSUP = NBD_REP_FLAG_ERROR | 1
NBD_REP_ERR_POLICY = NBD_REP_FLAG_ERROR | 2
NBD_REP_ERR_INVALID = NBD_REP_FLAG_ERROR | 3
NBD_REP_ERR_PLATFORM = NBD_REP_FLAG_ERROR | 4
NBD_REP_ERR_TLS_REQD = NBD_REP_FLAG_ERROR | 5
NBD_REP_ERR_UNKNOWN = NBD_REP_FLAG_ERROR | 6
NBD_REP_ERR_SHUTDOWN = NBD_REP_FLAG_ERROR | 7
NBD_REP_ERR_BLOCK_SIZE_REQD = NBD_REP_FLAG_ERROR | 8
NBD_REP_ERR_TOO_BIG = NBD_REP_FLAG_ERROR | 9
NBD_REP_ERR_EXT_HEADER_REQD = NBD_REP_FLAG_ERROR | 10

NBD_INFO_EXPORT = 0
NBD_INFO_NAME = 1
NBD_INFO_DESCRIPTION = 2
NBD_INFO_BLOCK_SIZE = 3

# --- Transmission -----------------------------------------------------------------------------------------------

NBD_FLAG_HAS_FLAGS = 1 << 0  # transmission flags: what an export can do
NBD_FLAG_READ_ONLY = 1 << 1
NBD_FLAG_SEND_FLUSH = 1 << 2
NBD_FLAG_SEND_FUA = 1 << 3
NBD_FLAG_ROTATIONAL = 1 << 4
NBD_FLAG_SEND_TRIM = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6
NBD_FLAG_SEND_DF = 1 << 7
NBD_FLAG_CAN_MULTI_CONN = 1 << 8
NBD_FLAG_SEND_RESIZE = 1 << 9
NBD_FLAG_SEND_CACHE = 1 << 10
NBD_FLAG_SEND_FAST_ZERO = 1 << 11
NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12

NBD_CMD_READ = 0
NBD_CMD_WRITE = 1
NBD_CMD_DISC = 2
NBD_CMD_FLUSH = 3
NBD_CMD_TRIM = 4
NBD_CMD_CACHE = 5
NBD_CMD_WRITE_ZEROES = 6
NBD_CMD_BLOCK_STATUS = 7
NBD_CMD_RESIZE = 8

NBD_CMD_FLAG_FUA = 1 << 0
NBD_CMD_FLAG_NO_HOLE = 1 << 1
NBD_CMD_FLAG_DF = 1 << 2
NBD_CMD_FLAG_REQ_ONE = 1 << 3
NBD_CMD_FLAG_FAST_ZERO = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5

NBD_REPLY_FLAG_DONE = 1 << 0

NBD_REPLY_TYPE_NONE = 0
NBD_REPLY_TYPE_OFFSET_DATA = 1
NBD_REPLY_TYPE_OFFSET_HOLE = 2
NBD_REPLY_TYPE_BLOCK_STATUS = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6
NBD_REPLY_TYPE_ERROR = (1 << 15) | 1
NBD_REPLY_TYPE_ERROR_OFFSET = (1 << 15) | 2

BASE_ALLOCATION = "base:allocation"
NBD_STATE_HOLE = 1 << 0
NBD_STATE_ZERO = 1 << 1
QEMU_ALLOCATION_DEPTH = "qemu:allocation-depth"
STATE_CHANGED = 1 << 0  # in "qemu:dirty-bitmap:", and in our own contexts: differs from the snapshot

# --- Errors -----------------------------------------------------------------------------------------------------

NBD_SUCCESS = 0
NBD_EPERM = 1
NBD_EIO = 5
NBD_ENOMEM = 12
NBD_EINVAL = 22
NBD_ENOSPC = 28
NBD_EOVERFLOW = 75
NBD_ENOTSUP = 95
NBD_ESHUTDOWN = 108

WIRE_ERRORS = {
    0: NBD_SUCCESS,
    errno.EPERM: NBD_EPERM,
    errno.EACCES: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.EIO: NBD_EIO,
    errno.ENOMEM: NBD_ENOMEM,
    errno.EINVAL: NBD_EINVAL,
    errno.ENOSPC: NBD_ENOSPC,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
    errno.EOVERFLOW: NBD_EOVERFLOW,
    errno.ENOTSUP: NBD_ENOTSUP,
    errno.ESHUTDOWN: NBD_ESHUTDOWN,
}
"""What each errno of ours is called on the wire. The protocol knows eight errors and no others."""


def wire_error(errno_value: int) -> int:
    """Return the NBD error that stands for ``errno_value``.

    Whatever the protocol has no number for becomes EIO: an error that we cannot name is the server's failure, and
    EINVAL, which qemu falls back to, would blame the client's request.
    """
    return WIRE_ERRORS.get(errno_value, NBD_EIO)


# --- Limits -----------------------------------------------------------------------------------------------------

CLEAR_AT_ONCE_BYTES = 1 << 30
"""With extended headers one request may zero or trim a whole disk; after so much others get their turn."""

PREFETCH_MAX_BYTES = 1 << 32
"""The most that one CACHE brings into memory: what it could ask for with 32 bits. It is only a hint."""

MAX_REQUEST_BYTES = 32 << 20
"""The longest READ or WRITE payload. The protocol document asks for at least this much where nothing else was agreed;
qemu has the same limit, nbdkit and libnbd 64 MiB; dom0's nbd-client asks for 512 KiB at most."""

MAX_NAME_BYTES = 4096
"""The longest string on the wire: export names, queries, error texts. The protocol document says 4096, so does qemu."""

MAX_DESCRIPTION_BYTES = 256
"""Descriptions of exports are cut to this, the length that the protocol document recommends for strings: a client that
asks for a description in each of thousands of INFO options gets no 4 KiB for every 24 bytes it sends."""

MAX_OPTION_BYTES = 64 << 10
"""The most data of one option, thus the most that a connection buffers before transmission. The longest that honest
clients send is a name (4 KiB) and a few queries; nbdkit stops at a few KiB."""

MAX_OPTIONS = 64
"""Options before one of them must be GO or EXPORT_NAME. nbdkit allows 32; honest clients send about ten."""

MAX_OPTIONS_PER_LISTED_EXPORT = 4
"""Further options for every export that LIST named: ``qemu-nbd --list`` follows with INFO and LIST_META_CONTEXT for
each of them on the same connection. nbdkit raises its limit in the same way."""

MAX_META_QUERIES = 64
"""Queries in one LIST_META_CONTEXT or SET_META_CONTEXT. qemu's client sends two."""

MAX_LIST_REPLY_BYTES = MAX_REQUEST_BYTES
"""What all LIST options of one connection may be answered with, taken together: no more memory than one READ costs,
and room for half a million exports that are named by a uuid. No other server is known to draw this line."""

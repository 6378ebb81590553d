"""The handshake against hand-written bytes: every option, every ending, the socket of one disk, TLS."""

from __future__ import annotations

import struct

import pytest
from handshake_kit import (
    DISK, DISK_FLAGS, DISK_SIZE, ERR_INVALID, ERR_SIZE_REQD, ERR_UNKNOWN, MODERN, OPTIONS, SNAP, SNAP_FLAGS, FewExports,
    error_of, fixed, info_data, meta_data, option, parse_replies, reply, shake,
)  # fmt: skip

from nbd_export import constants as c
from nbd_export.handshake import ExportInfo, Handshake, Negotiated, Phase, transmission_flags

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


# --- Options by hand --------------------------------------------------------------------------------------------------


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

"""The handshake with clients that are wrong, greedy or hostile, and however their bytes are cut."""

from __future__ import annotations

import struct

import pytest
from handshake_kit import (
    BROKEN, ERR_POLICY, ERR_TOO_BIG, ERR_UNSUP, MODERN, OPTIONS, FewExports, error_of, fixed, info_data, meta_data, option,
    parse_replies, reply, shake,
)  # fmt: skip
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbd_export import constants as c
from nbd_export.handshake import ExportInfo, Handshake, Phase

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

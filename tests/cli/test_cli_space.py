"""``simsr diff``, ``simsr sr space``, ``simsr vdi show --space``: against answers that are made up, and against a real daemon."""

from __future__ import annotations

import json
import subprocess

import pytest
from daemon_tools import Simsrd

from simsr.cli import space

MIB = 2**20
SR = "5b4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404"
OLD = "d15c0001-7b7e-4a53-9a7b-5d0a6e1f6606"
NEW = "d15c0002-7b7e-4a53-9a7b-5d0a6e1f6606"


# With answers that are made up.


@pytest.fixture
def pair(daemon):
    """Two disks; the fake daemon answers as ``daemon.ranges`` and ``daemon.space`` say."""
    daemon.add_sr("main", uuid=SR)
    daemon.add_vdi(MIB, SR, uuid=OLD, name="old")
    daemon.add_vdi(MIB, SR, uuid=NEW, name="new\x1b[31m")
    daemon.ranges = []
    real = daemon.answer

    def answer(method, target, body):
        path, _, query = target.partition("?")
        wanted = dict(part.split("=") for part in query.split("&")) if query else {}
        if path == f"/v1/vdis/{OLD}/diff/{NEW}":
            daemon.requests.append((method, target, body))
            left = [one for one in daemon.ranges if one["offset"] >= int(wanted.get("start", 0))]
            limit = int(wanted["limit"])
            following = left[limit]["offset"] if len(left) > limit else None
            return 200, {
                "vdi": OLD, "other": NEW, "size_bytes": MIB, "other_size_bytes": MIB, "ranges": left[:limit], "next_offset": following,
            }  # fmt: skip
        if path in (f"/v1/srs/{SR}/space", "/v1/srs/main/space"):
            return 200, daemon.space
        return real(method, target, body)

    daemon.answer = answer
    daemon.space = {
        "uuid": SR, "name": "main", "distinct_bytes": 3 * MIB, "shared_bytes": MIB,
        "vdis": [
            {"uuid": OLD, "name": "old", "is_a_snapshot": False, "virtual_bytes": 10 * MIB, "referenced_bytes": 2 * MIB,
             "exclusive_bytes": MIB},
            {"uuid": NEW, "name": "", "is_a_snapshot": True, "virtual_bytes": 2**40, "referenced_bytes": 2 * MIB, "exclusive_bytes": 0},
        ],
    }  # fmt: skip
    return daemon


def one(offset: int, length: int, data: bool = True) -> dict:
    return {"offset": offset, "length": length, "data": data}


def test_a_diff_is_a_table_with_a_total(simsr, pair):
    pair.ranges = [one(4096, 4096), one(8192, 12288, False), one(500 * MIB, 3 * MIB)]
    done = simsr("diff", "old", NEW[:8])
    assert (done.status, done.err) == (0, "")
    assert done.lines == [
        "   OFFSET  LENGTH  KIND",
        "     4096   4 KiB  data",
        "     8192  12 KiB  hole",
        "524288000   3 MiB  data",
        "total: 3 MiB (3162112 bytes) in 3 ranges, 3 MiB data, 12 KiB holes",
    ]


def test_a_diff_of_what_is_the_same(simsr, pair):
    done = simsr("diff", OLD, NEW)
    assert (done.status, done.lines[-1]) == (0, "total: 0 B (0 bytes) in 0 ranges, 0 B data, 0 B holes")


def test_a_diff_in_several_answers_is_one(simsr, pair, monkeypatch):
    monkeypatch.setattr(space, "RANGES_AT_ONCE", 10)
    pair.ranges = [one(number * 8192, 4096) for number in range(35)]
    assert simsr("diff", "old", NEW).lines[-1] == "total: 140 KiB (143360 bytes) in 35 ranges, 140 KiB data, 0 B holes"
    assert [target for _, target, _ in pair.requests if "diff" in target] == [
        f"/v1/vdis/{OLD}/diff/{NEW}?limit=10", *(f"/v1/vdis/{OLD}/diff/{NEW}?limit=10&start={n * 8192}" for n in (10, 20, 30)),
    ]  # fmt: skip
    assert json.loads(simsr("diff", "old", NEW, "--json").out) == {
        "vdi": OLD, "other": NEW, "size_bytes": MIB, "other_size_bytes": MIB, "ranges": pair.ranges, "next_offset": None,
    }  # fmt: skip


def test_a_diff_with_one_that_is_not_there(simsr, pair):
    for words in (["diff", "old", "other"], ["diff", "other", "old"]):
        done = simsr(*words)
        assert (done.status, done.out) == (10, "") and "no VDI is called 'other'" in done.err
    assert simsr("diff", "old").status == 2


@pytest.mark.parametrize("words", [["main"], []])
def test_space_is_a_table_with_totals(simsr, pair, words):
    done = simsr("sr", "space", *words)
    assert (done.status, done.err) == (0, "")
    assert done.lines == [
        "UUID                                  NAME  VIRTUAL  REFERENCED  EXCLUSIVE",
        f"{OLD}  old    10 MiB       2 MiB      1 MiB",
        f"{NEW}  -       1 TiB       2 MiB        0 B",
        "distinct:  3 MiB (3145728 bytes)",
        "shared:    1 MiB (1048576 bytes)",
    ]
    assert json.loads(simsr("sr", "space", *words, "--json").out) == pair.space


def test_space_of_which_sr(simsr, daemon):
    assert simsr("sr", "space").status == 10
    daemon.add_sr("a"), daemon.add_sr("b")
    done = simsr("sr", "space")
    assert done.status == 2 and "there are 2 SRs (a, b)" in done.err


def test_show_with_space(simsr, pair):
    assert "exclusive:    1 MiB (1048576 bytes), freed by deleting it" in simsr("vdi", "show", "old", "--space").lines
    assert "exclusive" not in simsr("vdi", "show", "old").out
    assert json.loads(simsr("vdi", "show", "old", "--space", "--json").out) == {**pair.vdis[OLD], "exclusive_bytes": MIB}
    assert json.loads(simsr("vdi", "show", "old", "--json").out) == pair.vdis[OLD]


def test_show_with_space_of_one_that_has_just_gone(simsr, pair):
    pair.space["vdis"].pop(0)
    done = simsr("vdi", "show", "old", "--space")
    assert (done.status, done.out) == (10, "") and OLD in done.err


def test_names_cannot_steer_the_terminal(simsr, pair):
    pair.space["vdis"][0]["name"] = "x\x1b[31m"
    assert "\x1b" not in simsr("sr", "space").out


# With a real daemon.


def test_all_of_it_for_real(simsr, short_directory, monkeypatch):
    monkeypatch.setenv("SIMSR_SOCKET", str(short_directory / "root" / "control.sock"))
    with Simsrd(short_directory / "root") as real:
        simsr("sr", "create", "main", "--size", "1GiB")
        [disk] = simsr("vdi", "create", "--size", "64MiB", "--name", "disk").lines
        [uri] = simsr("vdi", "uri", "disk").lines

        def write(*commands: str) -> None:
            options = [word for command in commands for word in ("-c", command)]
            subprocess.run(["qemu-io", "-f", "raw", *options, uri], check=True, capture_output=True)

        write("write -P 1 0 4M", "flush")
        simsr("snapshot", "disk", "--name", "before")
        write("write -P 2 1M 64k", "write -z 2M 4k", "write -P 3 40M 4k", "flush")
        assert simsr("diff", "before", "disk").lines == [
            "  OFFSET  LENGTH  KIND",
            " 1048576  64 KiB  data",
            " 2097152   4 KiB  hole",
            "41943040   4 KiB  data",
            "total: 72 KiB (73728 bytes) in 3 ranges, 68 KiB data, 4 KiB holes",
        ]
        ranges = json.loads(simsr("diff", "disk", "before", "--json").out)["ranges"]
        assert ranges == [one(MIB, 65536), one(2 * MIB, 4096), one(40 * MIB, 4096, False)]
        shown = json.loads(simsr("vdi", "show", "disk", "--space", "--json").out)
        assert shown["exclusive_bytes"] == 68 * 1024
        assert "exclusive:    68 KiB (69632 bytes), freed by deleting it" in simsr("vdi", "show", disk, "--space").lines
        lines = simsr("sr", "space").lines
        assert [line.split()[1:2] + line.split()[-4:] for line in lines[1:3]] == [
            ["disk", "4", "MiB", "68", "KiB"], ["before", "4", "MiB", "68", "KiB"],
        ]  # fmt: skip
        assert lines[3:] == [f"distinct:  4.1 MiB ({4 * MIB + 69632} bytes)", f"shared:    3.9 MiB ({4 * MIB - 69632} bytes)"]
        assert real.stop() == 0

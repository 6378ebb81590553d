"""Every trace format on a small sample as its tools write it, made here; round trips; and what malformed input is told."""

import io
import json
import shutil
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.traces import FORMATS, HEAD_BYTES, Info, Record, convert, detect, format_of, read
from scenarios.traces.own import Recorder, read_info
from scenarios.traces.records import LINE_BYTES_MAX, in_order, statistics
from simsr.errors import BadTrace

US, MS = 1000, 10**6

FIO2 = """fio version 2 iolog
/dev/sdb add
/dev/sdb open
/dev/sdb read 1048576 4096
/dev/sdb wait 150 0
/dev/sdb write 8192 65536
/dev/sdb sync 0 0
/dev/sdb datasync
/dev/sdb wait 50 0
/dev/sdb trim 0 1048576
/dev/sdb close
"""
FIO3 = """fio version 3 iolog
0 /tmp/a add
18 /tmp/a open
21 /tmp/a read 0 4096
57 /tmp/b write 45056 4096
395 /tmp/a datasync 0 0
1238 /tmp/a trim 4096 8192
1361 /tmp/a close
"""
BLKPARSE = """
  8,16   1        1     0.000000000  4162  Q  WS 2048 + 8 [dd]
  8,16   1        2     0.000000900  4162  G  WS 2048 + 8 [dd]
  8,16   1        3     0.000001200  4162  P   N [dd]
  8,16   1        4     0.000001500  4162  U   N [dd] 1
  8,16   1        5     0.000002000  4162  D  WS 2048 + 8 [dd]
  8,16   0        1     0.000100000     0  D   R 4096 + 16 [swapper/0]
  8,16   0        2     0.000502000     0  C  WS 2048 + 8 [0]
  8,16   0        3     0.000900000     0  C   R 4096 + 16 [5]
  8,16   0        4     0.001000000   211  D FWFS 512 + 8 [jbd2/sdb]
  8,16   0        5     0.001500000     0  C FWFS 512 + 8 [0]
  8,16   0        6     0.002000000   211  D  FN [kworker/0:1H]
  8,16   0        7     0.002000100   211  A  WM 100 + 8 <- (8,17) 80
  8,16   0        8     0.003000000     0  C  FN 0 [0]
  8,16   0        9     0.004000000    77  D  DS 8192 + 2048 [fstrim]
  8,16   0       10     0.004000100    77  m   N cfq77S workload slice
  8,16   0       11     0.005000000    77  D  WS 9 + 1 [never done]
CPU0 (8,16):
 Reads Queued:           1,        8KiB\t Writes Queued:           3,       12KiB
Total (8,16):
Throughput (R/W): 0KiB/s / 0KiB/s
Events (8,16): 16 entries
Skips: 0 forward (0 -   0.0%)
"""
MSR = """128166372003061629,hm,1,Read,383496192,32768,413
128166372016382155,hm,1,Write,2822144000,4096,561
128166372010000000,hm,0,Write,512,1024,7000
"""
ALIBABA = """419,W,8792731648,16384,1577808144360767
725,R,59110326272,360448,1577808144360813
419,R,0,4096,1577808144370813
"""
SPC = """0,20941264,8192,W,0.551706
0,20939840,8192,w,0.554041
1,3436288,15872,r,1.011732
"""
V1 = struct.Struct("<IIIHHQQ")
V2 = struct.Struct("<HHIIIQQQ")
VSCSI1 = b"".join(
    V1.pack(*row)
    for row in [(1, 4096, 1, 0x28, 0x0102, 2048, 5_000_000), (2, 8192, 2, 0x2A, 0x0102, 4096, 5_000_100), (3, 0, 0, 0x00, 0x0102, 0, 5_000_150), (4, 0, 0, 0x35, 0x0102, 0, 5_000_200)]
)  # fmt: skip
VSCSI2 = b"".join(
    V2.pack(*row)
    for row in [(0x28, 0x0201, 1, 4096, 1, 2048, 5_000_000, 300), (0x8A, 0x0201, 2, 8192, 2, 4096, 5_000_100, 1500), (0x42, 0x0201, 3, 512, 1, 8, 5_000_300, 20)]
)  # fmt: skip
READ, WRITE, FLUSH, SYNC, NOTIFY, DISCARD, FUA = (1 << 16 + bit for bit in (0, 1, 2, 3, 10, 13, 15))


def blk(time, action, sector=0, length=0, error=0, extra=b"", device=8 << 20 | 16, order="<"):
    return (
        struct.pack(order + "IIQQIIIIIHH", 0x65617407, 1, time, sector, length, action, 42, device, 0, error, len(extra))
        + extra
    )


def blktrace(order="<"):
    return b"".join(
        blk(*row, order=order)
        for row in [
            (1000, NOTIFY | 0, 0, 0, 0, b"process\0"),
            (2000, 1 | WRITE | SYNC, 2048, 4096),
            (3000, 7 | WRITE | SYNC, 2048, 4096),
            (10_000, 7 | READ, 4096, 8192),
            (53_000, 8 | WRITE | SYNC, 2048, 4096, 0, b"cdb"),
            (90_000, 8 | READ, 4096, 8192, 5),
            (100_000, 7 | WRITE | FLUSH | FUA, 512, 4096),
            (150_000, 8 | WRITE | FLUSH | FUA, 512, 4096),
            (200_000, 7 | FLUSH, 0, 0),
            (300_000, 8 | FLUSH, 0, 0),
            (400_000, 7 | WRITE | DISCARD, 8192, 1 << 20),
        ]
    )


OWN_HEAD = b'simsr-trace 1 {"device_bytes": 1073741824, "block_bytes": 512, "clock": "relative", "anonymised": "none", "device": "d"}\n'
OWN = OWN_HEAD + b"".join(
    struct.pack("<QQIBBHQQ", *row)
    for row in [
        (0, 4096, 512, 0, 0, 0, 250_000, 0),
        (7, 0, 1024, 1, 1, 28, 90, 3),
        (9, 0, 0, 2, 0, 0, (1 << 64) - 1, (1 << 64) - 1),
    ]
)

R = Record
BLK_DEVICE = "8,16"
SAMPLES = {
    "fio2": (
        FIO2.encode(),
        [
            R(0, "read", 1 << 20, 4096), R(150 * US, "write", 8192, 65536), R(150 * US, "flush"), R(150 * US, "flush"),
            R(200 * US, "trim", 0, 1 << 20),
        ],
        "/dev/sdb",
    ),
    "fio3": (
        FIO3.encode(),
        [R(21 * US, "read", 0, 4096, device="/tmp/a"), R(57 * US, "write", 45056, 4096, device="/tmp/b"), R(395 * US, "flush", device="/tmp/a"), R(1238 * US, "trim", 4096, 8192, device="/tmp/a")],
        None,
    ),
    "blkparse": (
        BLKPARSE.encode(),
        [
            R(2 * US, "write", 2048 * 512, 4096, 500 * US), R(100 * US, "read", 4096 * 512, 8192, 800 * US, 5),
            R(1000 * US, "flush"), R(1000 * US, "write", 512 * 512, 4096, 500 * US, 0, True), R(2000 * US, "flush", 0, 0, 1000 * US),
            R(4000 * US, "trim", 8192 * 512, 1 << 20), R(5000 * US, "write", 9 * 512, 512),
        ],
        BLK_DEVICE,
    ),
    "blktrace": (
        blktrace(),
        [
            R(1 * US, "write", 2048 * 512, 4096, 50 * US), R(8 * US, "read", 4096 * 512, 8192, 80 * US, 5), R(98 * US, "flush"),
            R(98 * US, "write", 512 * 512, 4096, 50 * US, 0, True), R(198 * US, "flush", 0, 0, 100 * US), R(398 * US, "trim", 8192 * 512, 1 << 20),
        ],
        BLK_DEVICE,
    ),
    "msr": (
        MSR.encode(),
        [R(0, "read", 383496192, 32768, 41300, device="hm.1"), R(693837100, "write", 512, 1024, 700000, device="hm.0"), R(1332052600, "write", 2822144000, 4096, 56100, device="hm.1")],
        None,
    ),
    "alibaba": (
        ALIBABA.encode(),
        [R(0, "write", 8792731648, 16384, device="419"), R(46 * US, "read", 59110326272, 360448, device="725"), R(10046 * US, "read", 0, 4096, device="419")],
        None,
    ),
    "spc": (
        SPC.encode(),
        [R(0, "write", 20941264 * 512, 8192, device="0"), R(2335 * US, "write", 20939840 * 512, 8192, device="0"), R(460026 * US, "read", 3436288 * 512, 15872, device="1")],
        None,
    ),
    "vscsi1": (VSCSI1, [R(0, "read", 1 << 20, 4096), R(100 * US, "write", 2 << 20, 8192), R(200 * US, "flush")], ""),
    "vscsi2": (VSCSI2, [R(0, "read", 1 << 20, 4096, 300 * US), R(100 * US, "write", 2 << 20, 8192, 1500 * US), R(300 * US, "trim", 4096, 512, 20 * US)], ""),
    "simsr": (OWN, [R(0, "read", 4096, 512, 250_000, 0, False, 0), R(7, "write", 0, 1024, 90, 28, True, 3), R(9, "flush")], "d"),
}  # fmt: skip


def records(data, format, **more):
    return list(read(io.BytesIO(data), format, "t", **more))


def test_every_format_has_a_sample():
    assert set(SAMPLES) == set(FORMATS)


@pytest.mark.parametrize("name", SAMPLES)
class TestSamples:
    def test_read(self, name):
        data, expected, device = SAMPLES[name]
        if device is not None:
            expected = [record._replace(device=device) for record in expected]
        assert records(data, name) == expected

    def test_detected(self, name):
        assert detect(SAMPLES[name][0][:HEAD_BYTES].lstrip(b"\n")) == name

    def test_one_device(self, name):
        data, expected, device = SAMPLES[name]
        devices = {record.device for record in records(data, name)}
        for one in devices:
            assert {record.device for record in records(data, name, device=one)} == {one}
        with pytest.raises(BadTrace, match="'nobody' is none of them"):
            records(data, name, device="nobody")

    def test_written_and_read_again(self, name):
        first = records(SAMPLES[name][0], name)
        out = io.BytesIO()
        done = convert(first, name, out)
        again = records(out.getvalue(), name)
        assert done.written == len(again) == len(first) - done.skipped and done.skipped == 0
        assert [record._replace(issue_ns=record.issue_ns - again[0].issue_ns) for record in again] == [
            record._replace(issue_ns=record.issue_ns - first[0].issue_ns) for record in first
        ]

    def test_cut_short_anywhere_it_says_where_or_has_read_a_part(self, name):
        data = SAMPLES[name][0]
        for end in range(0, len(data), 7):
            try:
                records(data[:end], name)
            except BadTrace as error:
                assert error.details["where"] and error.details["reason"] and error.details["source"] == "t"

    def test_damaged_anywhere_it_is_a_bad_trace_or_another_trace(self, name):
        data = SAMPLES[name][0]
        for at in range(0, len(data), 5):
            for byte in (0, 0xFF, ord("-")):
                try:
                    found = records(data[:at] + bytes([byte]) + data[at + 1 :], name)
                except BadTrace:
                    continue
                for other in FORMATS:
                    assert sum(convert(found, other, io.BytesIO())) == len(found)

    def test_nothing_else_is_taken_for_it(self, name):
        for other, (data, _, _) in SAMPLES.items():
            if other != name and not {other, name} <= {"vscsi1", "vscsi2"}:
                with pytest.raises(BadTrace):
                    records(data, name)


def test_big_endian_blktrace():
    assert records(blktrace(">"), "blktrace") == records(blktrace(), "blktrace")


def test_blktrace_of_several_cpus():
    """Requests complete on other CPUs than they were issued on."""
    first = b"".join(blk(time, 7 | READ, time, 4096) for time in range(1000, 2000, 100))
    second = b"".join(blk(time + 50, 8 | READ, time, 4096) for time in range(1000, 2000, 100))
    found = list(read([io.BytesIO(first), io.BytesIO(second)], "blktrace"))
    assert len(found) == 10 and {record.latency_ns for record in found} == {50}
    with pytest.raises(BadTrace, match="one file, not 2"):
        list(read([io.BytesIO(first), io.BytesIO(second)], "msr"))
    with pytest.raises(BadTrace, match=r"t \(file 2\), byte 48"):
        list(read([io.BytesIO(first), io.BytesIO(first[:50])], "blktrace", "t"))


def test_an_fsync_without_data_is_one_flush():
    """As blkparse prints it: its issue without a place, its end with sector 0."""
    text = "8,0 3 1 0.000001000 9 D FWS [kworker]\n8,0 3 2 0.000005000 9 C FWS 0 [0]\n8,0 3 3 0.000006000 9 D FWS 8 + 8 [x]\n"
    found = [(one.op, one.length, one.latency_ns) for one in records(text.encode(), "blkparse")]
    assert found == [("flush", 0, 4000), ("flush", 0, None), ("write", 4096, None)]


def test_block_traces_without_issues_take_the_queueing():
    text = "8,0 0 1 0.000001000 1 Q R 8 + 8 [x]\n8,0 0 2 0.000005000 0 C R 8 + 8 [0]\n"
    assert records(text.encode(), "blkparse") == [R(0, "read", 4096, 4096, 4000, device="8,0")]


def test_requests_for_the_same_place_complete_in_order():
    text = "".join(f"8,0 0 {n} 0.00000{n}000 1 D R 8 + 8 [x]\n" for n in (1, 2)) + "".join(
        f"8,0 0 {n} 0.00000{n}500 0 C R 8 + 8 [0]\n" for n in (3, 5)
    )
    assert [record.latency_ns for record in records(text.encode(), "blkparse")] == [2500, 3500]


@pytest.mark.skipif(not shutil.which("fio"), reason="fio is not installed")
def test_a_log_that_fio_wrote(tmp_path):
    command = [
        "fio",
        "--name=x",
        "--ioengine=sync",
        "--rw=randrw",
        "--size=64k",
        "--bs=4k",
        "--fsync=4",
        f"--filename={tmp_path}/data",
    ]
    subprocess.run([*command, f"--write_iolog={tmp_path}/log"], check=True, capture_output=True)
    data = (tmp_path / "log").read_bytes()
    found = records(data, detect(data[:HEAD_BYTES]))
    moved = [record for record in found if record.op in ("read", "write")]
    assert sorted(record.offset for record in moved) == list(range(0, 65536, 4096))
    assert any(record.op == "flush" for record in found) and found[-1].issue_ns < 60 * 10**9


@pytest.mark.skipif(not shutil.which("fio"), reason="fio is not installed")
@pytest.mark.parametrize("version", [2, 3])
def test_fio_takes_our_logs(tmp_path, version):
    data = tmp_path / "data"
    data.write_bytes(bytes(1 << 20))
    found = [Record(number * MS, ("read", "write")[number % 2], number * 8192, 4096, device=str(data)) for number in range(20)]
    with (tmp_path / "log").open("wb") as out:
        assert convert([*found, Record(20 * MS, "flush", device=str(data))], f"fio{version}", out).skipped == 0
    command = [
        "fio",
        "--name=x",
        "--ioengine=sync",
        f"--read_iolog={tmp_path}/log",
        "--replay_no_stall=1",
        "--output-format=json",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert (job["read"]["total_ios"], job["write"]["total_ios"]) == (10, 10)


@pytest.mark.skipif(not shutil.which("blkparse"), reason="blkparse is not installed")
def test_blkparse_and_we_agree(tmp_path):
    """The real blkparse reads our binary trace, and we read its text: the same requests."""
    found = [Record(0, "flush", device="8,16"), Record(0, "write", 8192, 4096, 100 * US, device="8,16")]
    for number in range(1, 20):
        op = ("read", "write", "flush", "trim")[number % 4]
        where = (0, 0) if op == "flush" else (number * 4096, 4096)
        found.append(Record(number * MS, op, *where, 300 * US, 5 if number == 9 else 0, number % 8 == 1, None, "8,16"))
    with (tmp_path / "t.blktrace.0").open("wb") as out:
        convert(found, "blktrace", out)
    done = subprocess.run(["blkparse", "-i", "t"], check=True, capture_output=True, cwd=tmp_path)
    assert records(done.stdout, detect(done.stdout[:HEAD_BYTES])) == found


BAD = [
    ("fio2", b"", "line 0", "empty"),
    ("fio2", b"fio version 3 iolog\n", "line 1", "is not 'fio version 2 iolog'"),
    ("fio2", b"fio version 2 iolog\nf read 0\n", "line 2", "FILE ACTION OFFSET LENGTH"),
    ("fio2", b"fio version 2 iolog\nf scan 0 1\n", "line 2", "operation 'scan' is not one of"),
    ("fio3", b"fio version 3 iolog\nx f read 0 1\n", "line 2", "time 'x'"),
    ("fio3", b"fio version 3 iolog\n\n1 f read -1 1\n", "line 3", "offset '-1' is not a number"),
    ("fio3", b"fio version 3 iolog\n1 f wait 1 1\n", "line 2", "operation 'wait'"),
    ("fio3", b"fio version 3 iolog\n1 f read 99999999999999999999 1\n", "line 2", "below 2**63"),
    ("msr", b"128166372003061629,hm,1,Read,383496192,32768\n", "line 1", "6 fields, where MSR has 7"),
    ("msr", b"1,hm,1,Erase,1,1,1\n", "line 1", "'Erase' is not one of read, write"),
    ("msr", b"1,hm,1,Read,1,1,1\n\n1,hm,1,Read,0x10,1,1\n", "line 3", "offset '0x10'"),
    ("msr", "1,hm,1,Read,١,1,1\n".encode(), "line 1", "offset"),
    ("alibaba", b"1,R,0,4096\n", "line 1", "4 fields, where Alibaba has 5"),
    ("alibaba", b"1,X,0,4096,1\n", "line 1", "operation 'X'"),
    ("spc", b"0,1,512,r,1.x\n", "line 1", "timestamp '1.x' is not a number of seconds"),
    ("spc", b"0,1,512,r,-1\n", "line 1", "timestamp"),
    ("spc", b"0,1,512,r\n", "line 1", "4 fields"),
    ("spc", b"\xff\xfe\n", "line 1", "UTF-8"),
    ("msr", b"x" * LINE_BYTES_MAX, "line 1", "longer than"),
    ("blkparse", b"hello\n", "line 1", "is not an event of blkparse"),
    ("blkparse", b"8,0 0 1 0.0 1 D\n", "line 1", "lacks a part"),
    ("blkparse", b"8,0 0 1 0.1 1 D R 99999999999999999999 + 8 [x]\n", "line 1", "sector"),
    ("blktrace", b"x" * 48, "byte 0", "magic"),
    ("blktrace", blk(1, 7 | READ)[:47], "byte 0", "47 of 48"),
    ("blktrace", blk(1, 7 | READ) + blk(2, 7 | READ, extra=b"abc")[:-1], "byte 48", "cut short"),
    ("blktrace", blk(1, 7 | READ, 1 << 60, 1), "byte 0", "beyond any disk"),
    ("vscsi1", VSCSI1[:40], "byte 32", "8 of 32"),
    ("vscsi2", VSCSI2 + V2.pack(0x28, 0x0101, 1, 1, 1, 1, 1, 1), "byte 120", "version 1 is not 2"),
    ("vscsi2", V2.pack(0x28, 0x0201, 1, 1, 1, 1 << 60, 1, 1), "byte 0", "out of all bounds"),
    ("simsr", b"", "line 1", "head"),
    ("simsr", b"simsr-trace 1 {\n", "line 1", "head"),
    ("simsr", b"simsr-trace 1 []\n", "line 1", "head"),
    ("simsr", b'simsr-trace 1 {"device_bytes": "x"}\n', "line 1", "wrong kind"),
    ("simsr", b'simsr-trace 1 {"size": 1}\n', "line 1", "head"),
    ("simsr", OWN[:-1], "byte 80", "39 of 40"),
    ("simsr", OWN_HEAD + struct.pack("<QQIBBHQQ", 0, 0, 0, 9, 0, 0, 0, 0), "record 1", "operation 9"),
    ("simsr", OWN_HEAD + struct.pack("<QQIBBHQQ", 0, 0, 0, 0, 2, 0, 0, 0), "record 1", "flags 2"),
]


@pytest.mark.parametrize("format, data, where, says", BAD)
def test_malformed(format, data, where, says):
    with pytest.raises(BadTrace) as caught:
        records(data, format)
    assert caught.value.details["where"] == where and says in caught.value.details["reason"]
    assert str(caught.value).startswith(f"trace t, {where}: ") and caught.value.hint


@pytest.mark.parametrize("name, says", [("msrc", "did you mean 'msr'?"), ("qcow2", "there are simsr, fio3")])
def test_formats_that_are_none(name, says):
    with pytest.raises(BadTrace) as caught:
        format_of(name)
    assert says in str(caught.value)


@pytest.mark.parametrize("head", [b"", b"hello\n", bytes(4096), b"\xff" * 100])
def test_what_is_no_trace(head):
    with pytest.raises(BadTrace, match="no format known"):
        detect(head)


times = st.integers(0, 10**6).map(lambda time: time * US)
plain = st.builds(
    Record,
    times,
    st.sampled_from(["read", "write"]),
    st.integers(0, 1 << 30).map(lambda sector: sector * 512),
    st.integers(1, 2048).map(lambda sectors: sectors * 512),
    times,
    st.just(0),
    st.just(False),
    st.none(),
    st.just(""),
)


@given(st.lists(plain, min_size=1, max_size=30), st.sampled_from(sorted(FORMATS)))
@settings(derandomize=True, database=None, max_examples=300, deadline=None)
def test_what_all_can_hold_survives_every_format(found, name):
    """Reads and writes in whole sectors and microseconds: only latency is lost, where the format has none."""
    found = [record._replace(issue_ns=record.issue_ns - min(other.issue_ns for other in found)) for record in found]
    found.sort(key=lambda record: record.issue_ns)
    out = io.BytesIO()
    assert convert(found, name, out).skipped == 0
    again = records(out.getvalue(), name)
    if name in ("blkparse", "blktrace"):
        # completions of the same place at once cannot be told apart: the times are the same, to whom they belong is not
        assert sorted(record.issue_ns for record in again) == [record.issue_ns for record in found]
        if len({(record.op, record.offset) for record in found}) < len(found):
            return
    keeps = "latency" in FORMATS[name].keeps
    assert [record[:5] for record in again] == [record[:5] if keeps else (*record[:4], None) for record in found]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_we_write_is_known_again_whatever_the_device_is_called(name):
    out = io.BytesIO()
    convert([Record(0, "read", 0, 4096, 1000, device="5b4d0c8e-a disk"), Record(1, "read", 0, 4096, 1000, device="7")], name, out)
    assert detect(out.getvalue()) == name and len(records(out.getvalue(), name)) == (1 if name == "simsr" else 2)


anything = st.builds(
    Record,
    st.integers(0, 1 << 50),
    st.sampled_from(["read", "write", "flush", "trim", "zero"]),
    st.integers(0, 1 << 50),
    st.integers(0, 1 << 31),
    st.none() | st.integers(0, 1 << 40),
    st.integers(0, 200),
    st.booleans(),
    st.none() | st.integers(0, 4096),
    st.just(""),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50),
)


@given(st.lists(anything, max_size=20))
@settings(derandomize=True, database=None, max_examples=100, deadline=None)
def test_our_own_keeps_everything(found):
    found.sort(key=lambda record: record.issue_ns)
    out = io.BytesIO()
    assert convert(found, "simsr", out, Info(1 << 40, 4096, "utc", "names")).skipped == 0
    assert records(out.getvalue(), "simsr") == found
    assert read_info(io.BytesIO(out.getvalue()), "t") == (Info(1 << 40, 4096, "utc", "names"), "")


@given(st.lists(anything, max_size=20), st.sampled_from(sorted(FORMATS)))
@settings(derandomize=True, database=None, max_examples=200, deadline=None)
def test_what_a_format_cannot_hold_is_counted(found, name):
    found.sort(key=lambda record: record.issue_ns)
    out = io.BytesIO()
    done = convert(found, name, out)
    assert done.written + done.skipped == len(found)
    assert len(records(out.getvalue(), name) if out.getvalue() else []) == done.written


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_name_of_a_device_spoils_a_trace(name):
    out = io.BytesIO()
    convert([Record(0, "read", 0, 512, 1000, device="a,b\nc d"), Record(1000, "read", 0, 512, 1000, device=" ")], name, out)
    assert records(out.getvalue(), name)[0][1:4] == ("read", 0, 512)


def test_a_recording_that_is_not_finished():
    out = io.BytesIO()
    recorder = Recorder(out, Info(512), "d")
    for number in range(5):
        recorder.add(Record(number, "read", 0, 512, 10))
    assert recorder.count == 5
    found = []
    with pytest.raises(BadTrace, match="the last record has 30 of 40"):
        for record in read(io.BytesIO(out.getvalue()[:-10]), "simsr"):
            found.append(record)


def test_nearly_sorted_becomes_sorted():
    found = [Record(time, "read") for time in (5, 1, 3, 2, 9, 7, 8)]
    assert [record.issue_ns for record in in_order(found)] == [1, 2, 3, 5, 7, 8, 9]
    assert [record.issue_ns for record in in_order(found, window=1)] == [1, 3, 2, 5, 7, 8, 9]


def test_statistics():
    assert statistics(records(MSR.encode(), "msr")) == {
        "requests": 3, "read": 1, "write": 2, "flush": 0, "trim": 0, "zero": 0, "with_latency": 3, "duration_ns": 1332052600,
        "end_bytes": 2822144000 + 4096,
    }  # fmt: skip

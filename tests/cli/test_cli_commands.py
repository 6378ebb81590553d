"""Every command that is one call of the API: what it sends, what it prints, how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest

from simsr.cli.libvirt import disk_element
from simsr.cli.tree import draw
from simsr.errors import SimsrError, VdiInUse

DISK = "d15c0001-7b7e-4a53-9a7b-5d0a6e1f6606"
SNAPSHOT = "5a9b0002-1c9d-4b11-8f1e-9e2d3c4b9909"


@pytest.fixture
def sr(daemon):
    return daemon.add_sr("main", uuid="5b4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404")


@pytest.fixture
def disk(daemon, sr):
    return daemon.add_vdi(10 * 2**30, sr["uuid"], uuid=DISK, name="root")


@pytest.fixture
def snapshot(daemon, disk):
    link = {"is_a_snapshot": True, "snapshot_of": DISK, "snapshot_time": "2026-11-21T04:00:00Z"}
    return daemon.add_vdi(10 * 2**30, disk["sr"], uuid=SNAPSHOT, name="before upgrade", **link)


# --- SRs -------------------------------------------------------------------------------------------------------------


def test_sr_create_prints_the_uuid_and_nothing_else(simsr, daemon):
    done = simsr("sr", "create", "main")
    assert (done.status, done.err) == (0, "")
    assert done.lines == list(daemon.srs)


def test_sr_list_is_a_table_with_numbers_to_the_right(simsr, daemon, sr, disk, snapshot):
    daemon.add_sr("a rather long name", uuid="0f4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404")
    done = simsr("sr", "list")
    assert done.status == 0
    assert done.lines == [
        "UUID                                  NAME                VDIS  SNAPSHOTS  VIRTUAL     USED     SIZE  LIKE",
        "5b4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404  main                   2          1   20 GiB  1.5 GiB  100 GiB  sim",
        "0f4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404  a rather long name     0          0      0 B  1.5 GiB  100 GiB  sim",
    ]


def test_sr_list_json_is_the_answer_of_the_api(simsr, daemon, sr):
    assert json.loads(simsr("sr", "list", "--json").out) == [daemon.sr("main")]


@pytest.mark.parametrize("words", [["main"], ["5b4d1f0e"], []])
def test_sr_status_names_the_sr_in_any_way(simsr, sr, words):
    done = simsr("sr", "status", *words)
    assert done.status == 0
    assert "name:          main" in done.lines
    assert "used:          1.5 GiB (1610612736 bytes)" in done.lines
    assert "live:          8 KiB (8192 bytes)" in done.lines and "shared:        512 B (512 bytes)" in done.lines
    assert "log.segments:  3" in done.lines


def test_sr_status_json_is_an_object(simsr, daemon, sr):
    expected = daemon.sr("main")
    expected["space"] |= {"live_bytes": 8192, "shared_bytes": 512}
    assert json.loads(simsr("sr", "status", "--json").out) == expected


def test_sr_status_without_a_name_needs_exactly_one_sr(simsr, daemon):
    done = simsr("sr", "status")
    assert (done.status, done.out) == (10, "")
    assert done.err == "simsr: there is no SR yet\nHint: Create one with 'simsr sr create NAME'.\n"
    daemon.add_sr("one")
    daemon.add_sr("two")
    done = simsr("sr", "status")
    assert done.status == 2
    assert "there are 2 SRs (one, two); say which one" in done.err


def test_sr_delete(simsr, daemon, sr):
    done = simsr("sr", "delete", "main")
    assert (done.status, done.lines) == (0, ["SR 5b4d1f0e-3a52-4b8d-a4a3-2d1c6f7e4404 (main) is deleted."])
    assert not daemon.srs


def test_sr_delete_of_one_that_is_not_empty(simsr, sr, disk):
    done = simsr("sr", "delete", "main")
    assert (done.status, done.out) == (13, "")
    assert done.err == "simsr: SR 'main' still holds 1 VDIs\nHint: Delete its VDIs first.\n"


# --- VDIs ------------------------------------------------------------------------------------------------------------


def test_vdi_create_prints_the_uuid_and_nothing_else(simsr, daemon, sr):
    done = simsr("vdi", "create", "--size", "10GiB", "--name", "root", "--sr", "main")
    assert (done.status, done.err) == (0, "")
    [vdi] = daemon.vdis.values()
    assert done.lines == [vdi["uuid"]]
    assert (vdi["name"], vdi["size_bytes"], vdi["sr"]) == ("root", 10 * 2**30, sr["uuid"])


def test_vdi_create_leaves_out_what_was_not_said(simsr, daemon, sr):
    simsr("vdi", "create", "--size", "512")
    assert ("POST", "/v1/vdis", {"size_bytes": 512}) in daemon.requests


@pytest.mark.parametrize("size", ["x", "0", "-1", "1.0001KiB", ""])
def test_a_size_that_is_none_is_a_usage_error(simsr, daemon, sr, size):
    done = simsr("vdi", "create", f"--size={size}")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("simsr: size ")
    assert done.err.splitlines()[1] == "Hint: Give a size such as 10GiB, 512MiB or a number of bytes."
    assert not daemon.vdis


def test_vdi_list_shows_each_snapshot_behind_its_disk(simsr, daemon, disk):
    daemon.add_vdi(512, disk["sr"], uuid="0a000001-0000-4000-8000-000000000000", attached=[_client("vm1", True)])
    link = {"is_a_snapshot": True, "snapshot_of": DISK, "snapshot_time": "2026-11-21T04:00:00Z"}
    daemon.add_vdi(2**20, disk["sr"], uuid=SNAPSHOT, name="before", **link)
    orphan = {"is_a_snapshot": True, "snapshot_of": "11111111-1111-4111-8111-111111111111"}
    daemon.add_vdi(2**20, disk["sr"], uuid="0c000001-0000-4000-8000-000000000000", **orphan)
    done = simsr("vdi", "list")
    assert done.lines == [
        "UUID                                  NAME      SIZE   USED  SNAPSHOT-OF                           CREATED               ATTACHED",
        "d15c0001-7b7e-4a53-9a7b-5d0a6e1f6606  root    10 GiB  4 KiB  -                                     2026-11-21T03:40:20Z  -",
        "5a9b0002-1c9d-4b11-8f1e-9e2d3c4b9909  before   1 MiB  4 KiB  root                                  2026-11-21T04:00:00Z  -",
        "0a000001-0000-4000-8000-000000000000  -        512 B  4 KiB  -                                     2026-11-21T03:40:20Z  vm1 rw",
        "0c000001-0000-4000-8000-000000000000  -        1 MiB  4 KiB  11111111-1111-4111-8111-111111111111  2026-11-21T03:40:20Z  -",
    ]


def test_vdi_list_of_one_sr(simsr, daemon, disk):
    other = daemon.add_sr("other")
    vdi = daemon.add_vdi(512, other["uuid"])
    assert [one["uuid"] for one in json.loads(simsr("vdi", "list", "--sr", "other", "--json").out)] == [vdi["uuid"]]


def test_vdi_list_of_nothing(simsr, sr):
    assert simsr("vdi", "list").lines == ["UUID  NAME  SIZE  USED  SNAPSHOT-OF  CREATED  ATTACHED"]
    assert json.loads(simsr("vdi", "list", "--json").out) == []


@pytest.mark.parametrize("name", [DISK, "d15c", "root"])
def test_vdi_show_names_the_vdi_in_any_way(simsr, daemon, disk, name):
    assert json.loads(simsr("vdi", "show", name, "--json").out) == daemon.vdis[DISK]
    lines = simsr("vdi", "show", name).lines
    assert f"uuid:         {DISK}" in lines or f"uuid:      {DISK}" in lines
    assert any(line.split(":", 1)[1].strip() == "10 GiB (10737418240 bytes)" for line in lines)


def test_vdi_show_of_a_snapshot(simsr, snapshot):
    lines = simsr("vdi", "show", "before upgrade").lines
    assert f"snapshot of:  {DISK}" in lines
    assert "taken:        2026-11-21T04:00:00Z" in lines


def test_vdi_resize(simsr, disk):
    done = simsr("vdi", "resize", "root", "20GiB")
    assert done.lines == [f"VDI {DISK} (root) has 20 GiB (21474836480 bytes) now."]
    assert disk["size_bytes"] == 20 * 2**30


def test_vdi_resize_does_not_shrink(simsr, disk):
    done = simsr("vdi", "resize", "root", "1GiB")
    assert (done.status, done.out) == (20, "")
    assert done.err.splitlines() == [
        f"simsr: cannot shrink VDI {DISK} from 10737418240 to 1073741824 bytes",
        "Hint: Disks only grow. Create a smaller disk and copy what you need.",
    ]


def test_vdi_delete(simsr, daemon, snapshot):
    assert simsr("vdi", "delete", "before upgrade").lines == [f"Snapshot {SNAPSHOT} (before upgrade) is deleted."]
    assert simsr("vdi", "delete", "d15c").lines == [f"VDI {DISK} (root) is deleted."]
    assert not daemon.vdis


def test_a_vdi_as_a_disk_of_libvirt(simsr, disk):
    element = ElementTree.fromstring(simsr("vdi", "libvirt-xml", "root", "--target", "sdb").out)
    assert (element.tag, element.attrib) == ("disk", {"type": "network", "device": "disk"})
    source, target = element.find("source"), element.find("target")
    assert source.attrib == {"protocol": "nbd", "name": disk["uuid"]}
    (host,) = source
    assert host.attrib == {"transport": "unix", "socket": parse_qs(urlsplit(disk["nbd_uri"]).query)["socket"][0]}
    assert target.attrib == {"dev": "sdb", "bus": "scsi"} and element.find("readonly") is None
    assert disk["uuid"].startswith(element.findtext("serial")) and len(element.findtext("serial")) == 20


@pytest.mark.parametrize("uri, tls, host", [
    ("nbd://[::1]:10810/x%2Fy", None, {"name": "::1", "port": "10810"}),
    ("nbds://example.org/x%2Fy", "yes", {"name": "example.org", "port": "10809"})])
def test_a_vdi_of_a_distant_daemon_as_a_disk_of_libvirt(disk, uri, tls, host):
    element = disk_element({**disk, "nbd_uri": uri, "read_only": True, "sharable": True}, "vdaa")
    source = element.find("source")
    assert source.get("name") == "x/y" and source.get("tls") == tls and source.find("host").attrib == host
    assert element.find("target").get("bus") == "virtio"
    assert element.find("readonly") is not None and element.find("shareable") is not None


@pytest.mark.parametrize("target", ["", "vd", "vdA", "nvme0", "vda1", "vda\n"])
def test_a_target_that_is_no_device(simsr, disk, target):
    done = simsr("vdi", "libvirt-xml", "root", "--target", target)
    assert done.status == 2 and "vda" in done.err and done.out == ""


def test_vdi_uri_prints_the_uri_and_nothing_else(simsr, disk):
    assert simsr("vdi", "uri", "root").lines == [disk["nbd_uri"]]


def test_snapshot_and_clone_print_the_new_uuid(simsr, daemon, disk):
    [snapshot] = simsr("snapshot", "root", "--name", "clean").lines
    [clone] = simsr("clone", snapshot).lines
    assert daemon.vdis[snapshot]["snapshot_of"] == DISK
    assert daemon.vdis[snapshot]["name"] == "clean"
    assert not daemon.vdis[clone]["is_a_snapshot"]


def test_revert(simsr, daemon, disk, snapshot):
    disk["size_bytes"] *= 2
    done = simsr("revert", "before upgrade")
    expected = f"VDI {DISK} (root) is reverted to before upgrade. Its size is 10 GiB (10737418240 bytes) again."
    assert (done.status, done.lines) == (0, [expected])
    assert json.loads(simsr("revert", SNAPSHOT, "--json").out)["vdi"]["uuid"] == DISK


def test_revert_that_changes_nothing_says_so(simsr, disk, snapshot):
    disk["name"] = "unchanged"
    assert "nothing to revert" in simsr("revert", SNAPSHOT).out


def test_revert_of_a_disk(simsr, disk):
    done = simsr("revert", "root")
    assert done.status == 18
    assert done.err.startswith(f"simsr: VDI {DISK} is not a snapshot\nHint: Name the snapshot")


# --- names and errors ------------------------------------------------------------------------------------------------


def test_an_unknown_name(simsr, sr):
    done = simsr("vdi", "show", "nosuch")
    assert (done.status, done.out) == (10, "")
    assert done.err.startswith("simsr: no VDI is called 'nosuch'\nHint: List what there is")


def test_an_empty_name_is_no_listing(simsr, disk):
    assert simsr("vdi", "show", "").status == 10
    assert simsr("sr", "status", "").status == 10
    assert simsr("vdi", "delete", "").status == 10


def test_an_ambiguous_name(simsr, daemon, disk):
    daemon.add_vdi(512, disk["sr"], name="root")
    done = simsr("vdi", "delete", "root")
    assert done.status == 11
    assert "'root' can mean more than one VDI" in done.err
    assert len(daemon.vdis) == 2


@pytest.mark.parametrize("name", ["a/b", "50%", "ü ?#&", ".", "..", "a\nb", "--x"])
def test_strange_names_reach_the_daemon_as_they_are(simsr, daemon, sr, name):
    vdi = daemon.add_vdi(512, sr["uuid"], name=name)
    assert json.loads(simsr("vdi", "show", "--json", "--", name).out)["uuid"] == vdi["uuid"]


def test_a_name_that_is_not_utf8_is_refused(simsr, daemon, sr):
    done = simsr("vdi", "create", "--size", "1M", "--name", "a\udcff")
    assert done.status == 2
    assert "it is not UTF-8" in done.err
    assert not daemon.vdis


def test_control_characters_do_not_reach_the_terminal(simsr, daemon, sr):
    daemon.add_vdi(512, sr["uuid"], name="evil\x1b[2Jname\n")
    out = simsr("vdi", "list").out
    assert "evil\\x1b[2Jname\\n" in out
    assert "\x1b" not in out


def test_wide_names_keep_the_columns(simsr, daemon, sr):
    daemon.add_vdi(512, sr["uuid"], name="磁盘")
    header, line = simsr("vdi", "list").lines
    assert line.index("512 B") == header.index("SIZE") - 1 - 2  # two of the name's four cells are no characters


def test_the_error_of_the_daemon_is_shown_as_it_is(simsr, daemon, disk):
    daemon.refuse("DELETE", VdiInUse(operation="delete", uuid=DISK, by="vm1"))
    done = simsr("vdi", "delete", "root")
    assert (done.status, done.out) == (16, "")
    assert done.err.splitlines() == [
        f"simsr: cannot delete VDI {DISK}: attached by vm1",
        "Hint: Detach it (disconnect its NBD clients) and try again.",
    ]


def test_an_error_without_a_hint_is_one_line(simsr, daemon, sr):
    daemon.refuse("GET", SimsrError(reason="of the weather"))
    done = simsr("sr", "list")
    assert (done.status, done.err) == (1, "simsr: simsr failed: of the weather\n")


# --- daemon and command line -----------------------------------------------------------------------------------------


def test_a_daemon_that_is_not_there(simsr, tmp_path):
    done = simsr("--socket", str(tmp_path / "none"), "sr", "list")
    assert (done.status, done.out) == (4, "")
    assert done.err.splitlines() == [
        f"simsr: simsrd cannot be reached at {tmp_path}/none: there is no such socket",
        "Hint: Start it with 'simsrd --root DIR', or name its socket in SIMSR_SOCKET.",
    ]


def test_a_socket_nobody_listens_on(simsr, daemon):
    daemon.stop()
    done = simsr("sr", "list")
    assert done.status == 4
    assert "nobody listens on it" in done.err


def test_a_socket_path_that_is_too_long(simsr):
    path = "/tmp/" + "x" * 200
    done = simsr("--socket", path, "sr", "list")
    assert done.status == 4
    assert done.err.startswith(f"simsr: simsrd cannot be reached at {path}: AF_UNIX path too long\n")


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"boo\r\n\r\n"],
    ids=["closed", "short", "no JSON", "no HTTP"],
)
def test_an_answer_that_is_none(simsr, daemon, answer):
    daemon.raw_answer = answer
    done = simsr("sr", "list")
    assert done.status == 4
    assert done.err.startswith("simsr: simsrd cannot be reached at")


def test_an_error_body_of_another_shape(simsr, daemon):
    daemon.raw_answer = b'HTTP/1.1 500 Oops\r\nContent-Length: 15\r\n\r\n{"detail":"no"}'
    done = simsr("sr", "list")
    assert (done.status, done.err) == (1, "simsr: simsrd answered GET /v1/srs with status 500\n")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["vdi", "lst"], "no such command: lst", "Did you mean list? Try 'simsr vdi --help'."),
        (["frobnicate"], "no such command: frobnicate", "Try 'simsr --help'."),
        (["vdi", "create", "--sise", "1G"], "no such option: --sise", "Did you mean --size? Try 'simsr vdi create --help'."),
        (["vdi", "create"], "missing option '--size'", "Try 'simsr vdi create --help'."),
        (["vdi", "show"], "missing argument 'VDI'", "Try 'simsr vdi show --help'."),
        (["run", "--size", "1G"], "no command to run; write it behind --", "Try 'simsr run --help'."),
    ],
)
def test_wrong_usage(simsr, words, message, hint):
    done = simsr(*words)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"simsr: {message}\nHint: {hint}\n"


@pytest.mark.parametrize("command", [["record", "root", "FILE"], ["replay", "FILE", "--vdi", "root"], ["scenario", "run", "hdd-7200"]])
@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "2e9", "", "1m"])
def test_a_time_that_is_none_is_a_usage_error(simsr, daemon, tmp_path, command, seconds):
    done = simsr(*[str(tmp_path / word) if word == "FILE" else word for word in command], f"--for={seconds}")
    assert (done.status, done.out, daemon.requests) == (2, "", [])
    assert done.err.startswith(f"simsr: --for '{seconds}' is not valid: it must be a number of seconds, more than 0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["scenario", "run", "hdd-7200", "--detach", "--for", "5"], 2, "--for with --detach is not valid: nobody would be there to stop it"),
        (["mount", ""], 2, "the directory '' is not valid: it is empty"),
        (["umount", ""], 2, "the directory '' is not valid: it is empty"),
        (["smapi", "check", "--plugin", ""], 1, "cannot check '': there is no such file"),
        (["xe", ""], 2, "xe command '' is not valid"),
        (["replay", "file", "--vdi", "root", "--start", ""], 2, "the time '' is not valid: it must be a duration"),
    ],
)
def test_what_is_empty_or_without_effect_is_refused_by_its_name(simsr, daemon, words, status, message):
    """Nothing in quotes is mostly a shell variable that is not set; it must not mean the directory that one happens to be in."""
    done = simsr(*words)
    assert (done.status, done.out, daemon.requests) == (status, "", [])
    assert message in done.err.splitlines()[0]


@pytest.mark.parametrize(
    ("output", "status", "says"), [(">/dev/full", 1, "simsr: cannot write standard output: No space left on device\nHint: "), (">&-", 0, "")]
)
def test_an_output_that_takes_nothing(output, status, says):
    command = f"{sys.executable} -m simsr.cli.main personality list {output}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status and done.stderr.startswith(says) and done.stderr.count("\n") == (2 if says else 0)


@pytest.mark.parametrize("words", [["fault", "remove", "\udcff"], ["fault", "add", "--vdi", "a\udcff", "--error", "EIO"]])
def test_arguments_that_are_not_utf_8(simsr, daemon, words):
    done = simsr(*words)
    assert (done.status, done.out, daemon.requests) == (2, "", []) and done.err.startswith("simsr: an argument is not UTF-8: '")


def test_files_that_cannot_be_used_are_named(simsr, tmp_path, monkeypatch):
    def refuse(root, *_):
        raise PermissionError(13, "Permission denied", root)

    monkeypatch.setattr("simsr.smapi.install.Installation", refuse)
    done = simsr("smapi", "install", "--root", str(tmp_path))
    assert (done.status, done.err) == (1, f"simsr: cannot use {tmp_path}: Permission denied\n")


INTERRUPTED_IMPORT = """
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from simsr.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("module", "statuses"), [("typer", [-signal.SIGINT]), ("httpcore", [130])])
def test_ctrl_c_in_the_middle_of_an_import(daemon, disk, tmp_path, module, statuses):
    """Python can lose it there, or leave half a module to what asks the daemon to end the recording."""
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module, "record", "root", str(tmp_path / "trace")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in statuses and done.stderr == ""


def test_a_name_that_is_none_does_not_fill_the_screen(simsr, daemon):
    err = simsr("vdi", "show", "x" * 5000).err
    assert len(err) < 300 and err.startswith("simsr: no VDI is called 'xxx") and "xxx'\nHint: " in err


@pytest.mark.parametrize("words", [[], ["vdi"], ["sr"]])
def test_a_command_without_its_verb_shows_help_on_standard_error(simsr, words):
    done = simsr(*words)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("Usage: simsr")


def test_help_and_version(simsr):
    assert simsr("--help").status == 0
    assert simsr("--version").out == "simsr 0.1.0\n"


@pytest.mark.parametrize("words", [["--help"], ["vdi", "lst"], ["--socket", "/nowhere", "sr", "list"]])
def test_what_needs_no_daemon_starts_without_the_large_libraries(words):
    script = (
        "import sys\nfrom simsr.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print('loaded:', *sorted({'httpx', 'rich', 'trio', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_a_traceback_only_for_those_who_ask(simsr, daemon):
    assert "Traceback" not in simsr("vdi", "show", "x").err
    done = simsr("--debug", "vdi", "show", "x")
    assert "Traceback" in done.err
    assert done.status == 10


def test_a_bug_is_reported_without_a_traceback(simsr, daemon, monkeypatch):
    monkeypatch.setattr("simsr.cli.client.Client.get", lambda *_: 1 / 0)
    done = simsr("sr", "list")
    assert done.status == 1
    assert done.err.startswith("simsr: internal error: ZeroDivisionError: division by zero\nHint: ")


def test_output_into_a_closed_pipe_ends_quietly(start_simsr, daemon, sr):
    for _ in range(2000):
        daemon.add_vdi(512, sr["uuid"])
    child = start_simsr("vdi", "list")
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(120) == 1


def _client(name: str, writable: bool) -> dict[str, object]:
    return {"client": name, "writable": writable, "kind": "attach"}


# --- The tree --------------------------------------------------------------------------------------------------------


def drawn_tree(monkeypatch, capsys, columns):
    """The lines of a tree of three nodes at a terminal that is so wide; None: not at a terminal."""
    node = {"size_bytes": 2**30, "used_bytes": 65536, "time": "2026-11-21T04:00:00Z", "consistency": None}
    nodes = [
        {**node, "id": 1, "parent": None, "kind": "snapshot", "uuid": SNAPSHOT, "name": "before upgrade"},
        {**node, "id": 2, "parent": 1, "kind": "tip", "consistency": "clean", "uuid": f"{SNAPSHOT[:8]}{DISK[8:]}", "name": "tip@04:00:00"},
        {**node, "id": 3, "parent": 1, "kind": "head", "time": None, "uuid": DISK, "name": "root"},
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: columns is not None, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    draw({"nodes": nodes, "dirty": False}, boxes=False)
    same = capsys.readouterr().out.splitlines()
    nodes[1]["uuid"] = "77777777" + DISK[8:]
    draw({"nodes": nodes, "dirty": False}, boxes=False)
    assert same and (columns is None or columns > 110 or same[1].endswith(SNAPSHOT)), "beginnings that are equal name nobody"
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [None, 200, 100, 80, 60, 40])
def test_a_tree_fits_the_terminal_if_it_can(monkeypatch, capsys, columns):
    lines = drawn_tree(monkeypatch, capsys, columns)
    assert len(lines) == 4 and lines[3].startswith("`- * root")
    widest, whole = max(map(len, lines)), columns is None or columns == 200
    assert widest <= (columns or 200) or columns == 40, "narrower than that it cannot be"
    assert (SNAPSHOT in lines[1]) == whole and SNAPSHOT[:8] in lines[1]
    assert ("2026-11-21T04:00:00Z" in lines[1]) == (whole or columns >= 80) and "04:00:00" in lines[1]
    assert ("1 GiB" in lines[1]) == (columns not in (60, 40))

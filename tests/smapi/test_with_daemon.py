"""The plug-in against the real simsrd: what the fakes promise holds, and the data is what the commands say."""

import base64
import re
import shutil
import socket
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from daemon_tools import Simsrd
from smapi_fake_xapi import new_ref
from smapi_kit import SR_UUID, Caller, read_plugin, start_plugin
from smapi_wire import NIL, check_attach, check_vdi_info

MIB = 2**20
OTHER_SR = "99999999-3a52-4b8d-a4a3-2d1c6f7e4404"

needs_qemu_io = pytest.mark.skipif(not shutil.which("qemu-io"), reason="qemu-io is not installed")


@pytest.fixture
def simsrd(folder):
    """A daemon of the test's own, to be killed or spoilt."""
    daemon = Simsrd(folder / "root")
    try:
        yield daemon.start()
        assert daemon.stop() == 0
    finally:
        daemon.end()


@pytest.fixture
def own(simsrd):
    """A caller without xapi and with a daemon of its own, whose SR exists."""
    caller = Caller(socket=simsrd.socket, standalone="true")
    assert caller.call("sr_create", ["0"]) is NIL
    return caller


def create(caller, size=MIB, name="disk", **members):
    return check_vdi_info(caller.call("vdi_create", [str(size), name, "", "", "false", "", "", "false"], **members))


def qemu_io(caller, vdi, *commands, **members):
    """Attach as xapi would, run qemu-io on what the answer names, detach."""
    path, export = check_attach(caller.call("vdi_attach", ["true"], vdi=vdi, **members))
    arguments = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *arguments, f"nbd+unix:///{export}?socket={path}"],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=120)
    caller.call("vdi_detach", vdi=vdi, **members)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout


def connect_as_tapdisk(path):
    """Do tapdisk's handshake and return (socket, size of the disk in bytes)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    assert sock.recv(18, socket.MSG_WAITALL)[:16] == b"NBDMAGICIHAVEOPT"
    sock.sendall(struct.pack(">I", 3))  # FIXED_NEWSTYLE, NO_ZEROES
    sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 15) + b"tapdisk_client\0")
    size_bytes, _ = struct.unpack(">QH", sock.recv(10, socket.MSG_WAITALL))
    return sock, size_bytes


@needs_qemu_io
def test_revert_brings_the_data_back_and_keeps_the_uuid(real):
    disk = create(real, 4 * MIB)
    qemu_io(real, disk, "write -P 0x11 0 1M", "flush")
    snapshot = check_vdi_info(real.call("vdi_snapshot", vdi=disk, driver_params={}))
    for pattern in ("0x22", "0x33"):
        qemu_io(real, disk, f"write -P {pattern} 0 4M")
        assert real.call("vdi_revert", [disk], vdi=snapshot) is NIL
        qemu_io(real, disk, "read -P 0x11 0 1M", "read -P 0 1M 3M")
    assert real.call("vdi_activate", ["true"], vdi=disk) is NIL


@needs_qemu_io
def test_clone_of_a_snapshot_is_another_disk(real):
    disk = create(real)
    qemu_io(real, disk, "write -P 0x11 0 64k")
    snapshot = check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    clone = check_vdi_info(real.call("vdi_clone", vdi=snapshot))
    qemu_io(real, clone, "read -P 0x11 0 64k", "write -P 0x22 0 64k")
    qemu_io(real, disk, "read -P 0x11 0 64k")
    assert real.call("vdi_delete", vdi=disk) is NIL
    assert real.fault("vdi_revert", [disk], vdi=snapshot).number == 144
    qemu_io(real, clone, "read -P 0x22 0 64k")


@needs_qemu_io
def test_what_was_answered_outlives_a_killed_daemon(own, simsrd):
    disk = create(own)
    qemu_io(own, disk, "write -P 0x11 0 64k", "flush")
    snapshot = check_vdi_info(own.call("vdi_snapshot", vdi=disk))
    qemu_io(own, disk, "write -P 0x22 0 64k")
    own.call("vdi_revert", [disk], vdi=snapshot)
    simsrd.kill()
    assert own.fault("sr_attach").number == 47
    simsrd.start()
    assert own.call("sr_attach") is NIL
    qemu_io(own, disk, "read -P 0x11 0 64k")


def test_life_of_a_vm_and_its_replay(real):
    disk = create(real)
    for command, args in [("vdi_epoch_begin", []), ("vdi_attach", ["true"]), ("vdi_activate", ["true"]),
                          ("vdi_deactivate", []), ("vdi_detach", []), ("vdi_epoch_end", [])]:
        first = real.call(command, args, vdi=disk)
        assert real.call(command, args, vdi=disk) == first, command


def test_in_use(real):
    disk = create(real)
    snapshot = check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    check_attach(real.call("vdi_attach", ["true"], vdi=disk))
    assert real.fault("vdi_revert", [disk], vdi=snapshot).number == 24
    assert real.fault("vdi_delete", vdi=disk).number == 24
    check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    assert real.call("vdi_detach", vdi=disk) is NIL
    assert real.call("vdi_revert", [disk], vdi=snapshot) is NIL


def test_a_connection_holds_the_disk(real):
    disk = create(real)
    snapshot = check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    path, _ = check_attach(real.call("vdi_attach", ["true"], vdi=disk))
    sock, size_bytes = connect_as_tapdisk(path)
    assert size_bytes == MIB
    assert real.fault("sr_detach").number == 16
    assert real.call("vdi_detach", vdi=disk) is NIL
    assert real.fault("vdi_revert", [disk], vdi=snapshot).number == 24
    sock.close()
    assert real.call("vdi_revert", [disk], vdi=snapshot) is NIL


def test_disk_can_be_renamed_while_attached(real_pool, xapi):
    disk = create(real_pool)
    real_pool.call("vdi_attach", ["true"], vdi=disk)
    next(iter(xapi.tables["VDI"].values()))["name_label"] = "renamed"
    assert real_pool.call("vdi_update", vdi=disk) is NIL
    xapi.tables["VDI"].clear()
    real_pool.call("sr_scan")
    assert next(iter(xapi.tables["VDI"].values()))["name_label"] == "renamed"


@pytest.mark.parametrize("real_pool", ["0"], indirect=True, ids=["large-sr"])  # a small SR has small records
@pytest.mark.parametrize("field", ["name_label", "name_description"])
def test_texts_as_long_as_an_argument_can_be(real_pool, xapi, field):
    """xapi itself has no limit, and sends vdi_update after every snapshot: with less, a disk could not have one any more."""
    text = "ü" * 51_200
    texts = [text, ""] if field == "name_label" else ["", text]
    disk = check_vdi_info(real_pool.call("vdi_create", [str(MIB), *texts]))
    ref, row = next(iter(xapi.tables["VDI"].items()))
    assert row[field] == text
    snapshot = check_vdi_info(real_pool.call("vdi_snapshot", vdi=disk, vdi_ref=ref))
    assert real_pool.call("vdi_update", vdi=snapshot) is NIL
    assert real_pool.call("vdi_revert", [disk], vdi=snapshot) is NIL
    xapi.tables["VDI"].clear()
    real_pool.call("sr_scan")
    assert [row[field] for row in xapi.tables["VDI"].values()] == [text] * 2


def test_vm_moves_to_another_host(real_pool, xapi):
    """Both have the disk attached for a moment; the activation key says which of them has it in use."""
    disk = create(real_pool)
    here, there = {"host_ref": xapi.add_host()}, {"host_ref": xapi.add_host()}
    real_pool.device_config["activate_wait_s"] = "0.05"
    check_attach(real_pool.call("vdi_attach", ["true"], vdi=disk, **here))
    assert real_pool.call("vdi_activate", ["true"], vdi=disk, **here) is NIL
    check_attach(real_pool.call("vdi_attach", ["true"], vdi=disk, **there))
    assert real_pool.fault("vdi_activate", ["true"], vdi=disk, **there).number == 46
    assert real_pool.call("vdi_deactivate", vdi=disk, **here) is NIL
    assert real_pool.call("vdi_activate", ["true"], vdi=disk, **there) is NIL
    assert real_pool.call("vdi_detach", vdi=disk, **here) is NIL
    assert real_pool.fault("vdi_delete", vdi=disk).number == 24


def test_without_xapi_nobody_shares_a_disk_for_writing(real):
    disk = create(real)
    check_attach(real.call("vdi_attach", ["true"], vdi=disk))
    assert real.fault("vdi_attach", ["true"], vdi=disk, host_ref=new_ref()).number == 24


def test_sr_that_cannot_be_opened(own, simsrd):
    disk = create(own)
    simsrd.stop()
    for path in Path(simsrd.root, "sr", SR_UUID).iterdir():
        with path.open("r+b") as file:
            file.write(b"\xee" * 4096)
    simsrd.start()
    for command, args, vdi in [("sr_attach", [], None), ("sr_delete", [], None), ("vdi_attach", ["true"], disk)]:
        assert own.fault(command, args, vdi=vdi).number == 47, command


def test_snapshot_can_be_attached_for_reading_only(real):
    snapshot = check_vdi_info(real.call("vdi_snapshot", vdi=create(real)))
    assert real.fault("vdi_attach", ["true"], vdi=snapshot).number == 46
    path, _ = check_attach(real.call("vdi_attach", ["false"], vdi=snapshot))
    assert path.endswith(".sock")


def test_sizes(real):
    disk = create(real, 1000)
    assert real.call("vdi_resize", [str(8 * 2**40)], vdi=disk)["uuid"] == disk
    assert real.fault("vdi_resize", [str(MIB)], vdi=disk).number == 79
    assert real.fault("vdi_create", ["9223372036854775807"]).number == 79


def test_faults_of_the_daemon(real):
    disk, other = create(real), create(real)
    missing = str(uuid.uuid4())
    for command, args in [("vdi_delete", []), ("vdi_attach", ["true"]), ("vdi_snapshot", []), ("vdi_revert", [disk])]:
        assert real.fault(command, args, vdi=missing).number == 144, command
    snapshot = check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    assert real.fault("vdi_revert", [missing], vdi=snapshot).number == 144
    assert real.fault("vdi_revert", [other], vdi=snapshot).number == 1
    assert real.fault("vdi_revert", [disk], vdi=other).number == 1
    assert real.fault("vdi_create", [str(MIB)], vdi_uuid=disk).number == 43
    assert real.fault("vdi_create", [str(MIB)], sr_uuid=OTHER_SR).number == 47
    assert real.fault("sr_attach", sr_uuid=OTHER_SR).number == 47


def test_sr_from_create_to_delete(real):
    real.members["sr_uuid"] = str(uuid.uuid4())
    assert real.call("sr_create", ["0"]) is NIL
    assert real.members["sr_uuid"] in real.call("sr_probe", sr_uuid=None)
    disk = create(real, vdi_uuid=str(uuid.uuid4()))
    assert real.fault("sr_create", ["0"]).number == 42
    assert real.fault("sr_delete").number == 39
    for command in ("sr_attach", "sr_scan", "sr_update", "sr_detach", "sr_detach"):
        assert real.call(command) is NIL
    assert real.call("vdi_delete", vdi=disk) is NIL
    assert real.call("sr_delete") is NIL
    assert real.call("sr_delete") is NIL
    assert real.members["sr_uuid"] not in real.call("sr_probe", sr_uuid=None)


def test_odd_names_come_back_from_xapi_and_the_daemon(real_pool, xapi):
    name = "Grüße, 世界 \U0001f600 <&>\"' %2F ]]>"
    disk = create(real_pool, name=name)
    row = next(row for row in xapi.tables["VDI"].values() if row["uuid"] == disk)
    assert (row["name_label"], row["virtual_size"]) == (name, str(MIB))
    row["name_label"] = "renamed " + name
    assert real_pool.call("vdi_update", vdi=disk) is NIL


def test_database_follows(real_pool, xapi):
    disk = create(real_pool)
    snapshot = check_vdi_info(real_pool.call("vdi_snapshot", vdi=disk))
    rows = {row["uuid"]: (ref, row) for ref, row in xapi.tables["VDI"].items()}
    assert rows[snapshot][1]["is_a_snapshot"] is True and rows[snapshot][1]["snapshot_of"] == rows[disk][0]
    real_pool.call("vdi_resize", [str(2 * MIB)], vdi=disk)
    assert rows[disk][1]["virtual_size"] == str(2 * MIB)
    real_pool.call("vdi_revert", [rows[disk][0]], vdi=snapshot)
    assert rows[disk][1]["virtual_size"] == str(MIB)
    real_pool.call("vdi_delete", vdi=snapshot)
    assert [row["uuid"] for row in xapi.tables["VDI"].values()] == [disk]
    sizes = xapi.tables["SR"][xapi.sr_ref]
    assert sizes["virtual_allocation"] == str(MIB) and int(sizes["physical_size"]) > 0


def test_scan_rebuilds_a_lost_database(real_pool, xapi):
    disk = create(real_pool, name="kept")
    snapshot = check_vdi_info(real_pool.call("vdi_snapshot", vdi=disk))
    xapi.tables["VDI"].clear()
    gone = xapi.add_vdi(xapi.sr_ref, str(uuid.uuid4()))
    assert real_pool.call("sr_attach") is NIL
    assert gone not in xapi.tables["VDI"]
    rows = {row["uuid"]: (ref, row) for ref, row in xapi.tables["VDI"].items()}
    assert set(rows) == {disk, snapshot}
    assert rows[disk][1]["name_label"] == "kept"
    assert rows[snapshot][1]["snapshot_of"] == rows[disk][0]
    assert re.fullmatch(r"20\d{6}T\d\d:\d\d:\d\dZ", rows[snapshot][1]["snapshot_time"].value)
    writes = len(xapi.writes())
    assert real_pool.call("sr_scan") is NIL
    assert len(xapi.writes()) == writes + 3


# --- What xapi asks for that others do not ---

@needs_qemu_io
def test_disk_that_is_reset_on_boot(real):
    """Each VM starts with the disk as it was when on_boot was set; setting it back keeps what is there."""
    disk = create(real)
    qemu_io(real, disk, "write -P 0x11 0 64k")
    for _ in range(2):
        assert real.call("vdi_epoch_begin", vdi=disk, vdi_on_boot="reset") is NIL
        qemu_io(real, disk, "read -P 0x11 0 64k", "write -P 0x22 0 64k", vdi_on_boot="reset")
        assert real.call("vdi_epoch_end", vdi=disk, vdi_on_boot="reset") is NIL
    for _ in range(2):
        assert real.call("vdi_epoch_begin", vdi=disk, vdi_on_boot="persist") is NIL
        qemu_io(real, disk, "read -P 0x22 0 64k", vdi_on_boot="persist")


@needs_qemu_io
def test_first_write_to_a_disk_just_set_to_reset_is_forgotten(real):
    """Though it is dom0's, which has no epoch before it."""
    disk = create(real)
    qemu_io(real, disk, "write -P 0x11 0 64k")
    qemu_io(real, disk, "write -P 0x22 0 64k", vdi_on_boot="reset")
    assert real.call("vdi_epoch_begin", vdi=disk, vdi_on_boot="reset") is NIL
    qemu_io(real, disk, "read -P 0x11 0 64k", vdi_on_boot="reset")


def test_epoch_cannot_begin_while_the_disk_is_written(real):
    disk = create(real)
    check_attach(real.call("vdi_attach", ["true"], vdi=disk, vdi_on_boot="reset"))
    assert real.fault("vdi_epoch_begin", vdi=disk, vdi_on_boot="reset").number == 24
    assert real.call("vdi_detach", vdi=disk, vdi_on_boot="reset") is NIL


@needs_qemu_io
def test_changed_blocks_are_exact_across_a_revert(real):
    disk = create(real, 2 * MIB)  # 32 blocks of 64 KiB, so 4 bytes
    qemu_io(real, disk, "write -P 0x11 0 64k")
    assert real.fault("vdi_list_changed_blocks", [disk], vdi=disk).number == 460
    assert real.call("vdi_enable_cbt", vdi=disk) is NIL
    first = check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    qemu_io(real, disk, "write -P 0x22 64k 64k", "write -P 0x22 1M 1")
    second = check_vdi_info(real.call("vdi_snapshot", vdi=disk))

    def changed(old, new):
        return base64.b64decode(real.call("vdi_list_changed_blocks", [new], vdi=old)).hex()

    assert changed(first, second) == changed(first, disk) == "40008000"
    assert changed(second, disk) == "00000000"
    assert real.call("vdi_revert", [disk], vdi=first) is NIL
    assert changed(first, disk) == "00000000" and changed(second, disk) == "40008000"
    qemu_io(real, disk, "write -P 0x33 2031616 64k")
    assert changed(first, disk) == "00000001" and changed(second, disk) == "40008001"
    assert real.fault("vdi_list_changed_blocks", [first], vdi=second).number == 460
    assert real.call("vdi_disable_cbt", vdi=disk) is NIL
    assert real.fault("vdi_list_changed_blocks", [disk], vdi=first).number == 460


@needs_qemu_io
def test_changed_blocks_outlive_the_data(real):
    disk = create(real, 2 * MIB)
    assert real.call("vdi_enable_cbt", vdi=disk) is NIL
    qemu_io(real, disk, "write -P 0x11 0 64k")
    first = check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    qemu_io(real, disk, "write -P 0x22 64k 64k")
    second = check_vdi_info(real.call("vdi_snapshot", vdi=disk))
    for _ in range(2):
        assert real.call("vdi_data_destroy", vdi=first) is NIL
    assert real.fault("vdi_attach", ["false"], vdi=first).number == 66
    assert real.fault("vdi_revert", [disk], vdi=first).number == 66
    assert real.fault("vdi_data_destroy", vdi=disk).number == 66
    qemu_io(real, disk, "write -P 0x33 2031616 64k")
    answer = real.call("vdi_list_changed_blocks", [disk], vdi=first)
    assert base64.b64decode(answer).hex() == "40000001"
    assert base64.b64decode(real.call("vdi_list_changed_blocks", [second], vdi=first)).hex() == "40000000"


@needs_qemu_io
def test_compose_lays_a_disk_over_another(real):
    base, leaf = create(real), create(real)
    qemu_io(real, base, "write -P 0x11 0 128k")
    qemu_io(real, leaf, "write -P 0x22 64k 64k")
    assert real.call("vdi_compose", [base], vdi=leaf) is NIL
    qemu_io(real, leaf, "read -P 0x11 0 64k", "read -P 0x22 64k 64k", "read -P 0 128k 64k")
    qemu_io(real, base, "read -P 0x11 0 128k")


def test_database_follows_data_destroy_and_compose(real_pool, xapi):
    disk, parent = create(real_pool), create(real_pool)
    real_pool.call("vdi_enable_cbt", vdi=disk)
    snapshot = check_vdi_info(real_pool.call("vdi_snapshot", vdi=disk))
    rows = {row["uuid"]: (ref, row) for ref, row in xapi.tables["VDI"].items()}
    assert real_pool.call("vdi_data_destroy", vdi=snapshot, vdi_ref=rows[snapshot][0]) is NIL
    real_pool.call("vdi_disable_cbt", vdi=disk)
    assert real_pool.call("vdi_compose", [rows[parent][0]], vdi=disk, vdi_ref=rows[disk][0]) is NIL
    assert real_pool.call("sr_scan") is NIL
    assert {row["uuid"] for row in xapi.tables["VDI"].values()} == {disk, parent, snapshot}


def test_database_follows_changed_block_tracking(real_pool, xapi):
    """xapi sets cbt_enabled of the disk itself; a snapshot is introduced with it, and a scan repairs both."""
    disk = create(real_pool)
    assert real_pool.call("vdi_enable_cbt", vdi=disk) is NIL
    snapshot = check_vdi_info(real_pool.call("vdi_snapshot", vdi=disk))
    clone = check_vdi_info(real_pool.call("vdi_clone", vdi=snapshot))
    rows = {row["uuid"]: row for row in xapi.tables["VDI"].values()}
    assert [rows[vdi]["cbt_enabled"] for vdi in (disk, snapshot, clone)] == [False, True, False]
    rows[snapshot]["cbt_enabled"] = False
    assert real_pool.call("sr_scan") is NIL
    assert [rows[vdi]["cbt_enabled"] for vdi in (disk, snapshot, clone)] == [True, True, False]


def test_many_at_once(real):
    documents = [real.document("vdi_create", [str(MIB), f"disk {number}"]) for number in range(12)]
    processes = [start_plugin(document) for document in documents]
    assert len({check_vdi_info(read_plugin(process)) for process in processes}) == 12

"""What each command does to simsrd and answers, without xapi (device_config:standalone=true)."""

import uuid
import xml.etree.ElementTree as ElementTree

import pytest

from smapi_fake_daemon import daemon_error
from smapi_fakes import serving
from smapi_kit import HOST_REF, SR_UUID
from smapi_wire import NIL, check_attach, check_vdi_info

A_REF = "OpaqueRef:0be1d0d3-2f6e-4b36-8a2c-66a7f93c7707"
CREATE = ["10737418240", "root disk", "", "", "false", "19700101T00:00:00Z", "", "false"]
OTHER_SR = "99999999-3a52-4b8d-a4a3-2d1c6f7e4404"
ODD_NAMES = ["Grüße, 世界 \U0001f600", "<&>\"'", "a\nb\tc", "  x  ", "%2F../..?sr=*#", "]]>", "{}%s%d", "\x7f\x85"]


@pytest.fixture
def disk(daemon):
    return daemon.add_vdi(SR_UUID, name="a disk")


@pytest.fixture
def snapshot(daemon, disk):
    return daemon.add_snapshot(disk)


# --- SR ---

def test_sr_create(alone, daemon):
    daemon.srs.clear()
    assert alone.call("sr_create", ["0"]) is NIL
    assert daemon.srs[SR_UUID]["name"] == "sr-" + SR_UUID


def test_sr_create_again_is_fine_while_it_is_empty(alone, daemon):
    assert alone.call("sr_create", ["1099511627776"]) is NIL
    assert daemon.writes() == []
    daemon.add_vdi(SR_UUID)
    assert alone.fault("sr_create", ["0"]).number == 42


def test_sr_create_of_a_size_that_is_no_number(alone):
    assert alone.fault("sr_create", ["lots"]).number == 1


def test_sr_delete(alone, daemon, disk):
    assert alone.fault("sr_delete").number == 39
    alone.call("vdi_delete", vdi=disk)
    assert alone.call("sr_delete") is NIL
    assert daemon.srs == {}
    assert alone.call("sr_delete") is NIL


def test_sr_attach_and_detach_can_be_repeated(alone):
    for command in ("sr_attach", "sr_attach", "sr_detach", "sr_detach"):
        assert alone.call(command) is NIL


def test_sr_that_simsrd_has_not(alone, daemon):
    daemon.srs.clear()
    daemon.add_sr(OTHER_SR, name=SR_UUID)
    for command, args in (("sr_attach", []), ("sr_scan", []), ("sr_update", []), ("vdi_create", CREATE)):
        assert alone.fault(command, args).number == 47, command
    assert alone.call("sr_detach") is NIL
    assert daemon.writes() == []


def test_sr_detach_releases_what_a_crash_left_attached(alone, daemon, disk):
    alone.call("vdi_attach", ["true"], vdi=disk)
    daemon.vdis[disk]["attached"].append({"client": "another host", "writable": False, "kind": "attach"})
    assert alone.call("sr_detach") is NIL
    assert [entry["client"] for entry in daemon.vdis[disk]["attached"]] == ["another host"]


def test_sr_detach_while_a_disk_is_really_in_use(alone, daemon, disk):
    alone.call("vdi_attach", ["true"], vdi=disk)
    daemon.vdis[disk]["attached"].append({"client": "nbd 1", "writable": True, "kind": "nbd"})
    assert alone.fault("sr_detach").number == 16
    assert len(daemon.vdis[disk]["attached"]) == 2


def test_sr_probe(alone, daemon):
    daemon.add_sr(OTHER_SR, name="<a> & 'b'")
    document = ElementTree.fromstring(alone.call("sr_probe", sr_uuid=None, sr_sm_config={}))
    assert document.tag == "SRlist"
    assert [entry.tag for entry in document] == ["SR", "SR"]
    assert {entry.find("UUID").text: entry.find("name_label").text for entry in document} == {
        SR_UUID: "an SR", OTHER_SR: "<a> & 'b'"}


def test_sr_probe_without_any_sr(alone, daemon):
    daemon.srs.clear()
    assert list(ElementTree.fromstring(alone.call("sr_probe", sr_uuid=None))) == []


def test_sr_scan_update_and_content_type(alone, daemon, disk):
    assert alone.call("sr_scan") is NIL
    assert alone.call("sr_update") is NIL
    assert alone.call("sr_content_type") == ""
    assert daemon.writes() == []


# --- VDI: create, introduce, delete ---

def test_vdi_create_as_in_the_worked_example(alone, daemon):
    uuid_ = check_vdi_info(alone.call("vdi_create", CREATE, vdi_type="user", vdi_sm_config={}))
    vdi = daemon.vdis[uuid_]
    assert (vdi["size_bytes"], vdi["name"], vdi["type"], vdi["sr"]) == (10737418240, "root disk", "user", SR_UUID)
    assert vdi["read_only"] is False


def test_vdi_create_with_everything(alone, daemon):
    wanted = "D15C0001-7B7E-4A53-9A7B-5D0A6E1F6606"
    args = ["1000", "n", "about it", "", "false", "", "", "true"]
    answer = alone.call("vdi_create", args, vdi_uuid=wanted, vdi_type="metadata", vdi_sm_config={"type": "raw"})
    assert check_vdi_info(answer) == wanted.lower()
    vdi = daemon.vdis[wanted.lower()]
    assert (vdi["description"], vdi["type"], vdi["sm_config"], vdi["read_only"]) == (
        "about it", "metadata", {"type": "raw"}, True)
    assert alone.fault("vdi_create", args, vdi_uuid=wanted).number == 43


def test_vdi_create_with_the_least(alone, daemon):
    vdi = daemon.vdis[check_vdi_info(alone.call("vdi_create", ["512"]))]
    assert (vdi["name"], vdi["description"], vdi["type"], vdi["sm_config"]) == ("", "", "user", {})


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_arrive_unchanged(alone, daemon, name):
    vdi = daemon.vdis[check_vdi_info(alone.call("vdi_create", ["512", name, name]))]
    assert (vdi["name"], vdi["description"]) == (name, name)


@pytest.mark.parametrize("size, number", [
    ("0", 79), ("99999999999999999999", 79), ("-1", 1), ("1e9", 1), ("", 1), (" 512", 1), ("512\n", 1), ("0x200", 1),
    ("\u0665\u0661\u0662", 1), ("1_000", 1)])
def test_sizes_that_are_none(alone, daemon, disk, size, number):
    assert alone.fault("vdi_create", [size]).number == number
    assert alone.fault("vdi_resize", [size], vdi=disk).number == number
    assert daemon.requests == []


@pytest.mark.parametrize("args, members, number", [
    ([], {}, 1),
    (["512", "", "", "", "maybe"], {}, 1),
    (["512", "", "", "", "true", "yesterday"], {}, 1),
    (["512", "", "", "", "false", "", "", "TRUE"], {}, 1),
    (["512"], {"vdi_type": "floppy"}, 66),
    (["512"], {"vdi_uuid": "../../etc"}, 1),
    (["512"], {"vdi_sm_config": "x"}, 143),
])
def test_vdi_create_with_nonsense(alone, daemon, args, members, number):
    assert alone.fault("vdi_create", args, **members).number == number
    assert daemon.requests == []


def test_vdi_introduce(alone, disk):
    assert check_vdi_info(alone.call("vdi_introduce", vdi_location=disk, new_uuid=disk, vdi_sm_config={})) == disk


def test_vdi_introduce_needs_uuid_equal_to_location_and_a_vdi(alone, disk):
    other = str(uuid.uuid4())
    assert alone.fault("vdi_introduce", vdi_location=disk, new_uuid=other).number == 1
    assert alone.fault("vdi_introduce", vdi_location=other, new_uuid=other).number == 144
    assert alone.fault("vdi_introduce", vdi_location="disk.vhd", new_uuid=other).number == 1


def test_vdi_delete(alone, daemon, disk):
    assert alone.call("vdi_delete", vdi=disk) is NIL
    assert disk not in daemon.vdis
    assert alone.fault("vdi_delete", vdi=disk).number == 144


def test_vdi_delete_while_attached(alone, disk):
    alone.call("vdi_attach", ["true"], vdi=disk)
    assert alone.fault("vdi_delete", vdi=disk).number == 24


# --- VDI: use ---

def test_attach_answer(alone, daemon, disk):
    answer = alone.call("vdi_attach", ["true"], vdi=disk)
    assert check_attach(answer) == (f"/run/simsr/nbd/{disk}.sock", disk)
    assert answer["o_direct"] is True and "params" not in answer and answer["xenstore_data"] == {}
    assert daemon.vdis[disk]["attached"] == [{"client": "sm:" + HOST_REF, "writable": True, "kind": "attach"}]


def test_attach_read_only(alone, daemon, snapshot):
    check_attach(alone.call("vdi_attach", ["false"], vdi=snapshot))
    assert daemon.vdis[snapshot]["attached"][0]["writable"] is False


def test_life_of_a_vm_and_its_replay(alone, daemon, disk):
    """The order of section 11, each step twice: after a crash of the toolstack it is replayed."""
    for command, args in [("vdi_epoch_begin", []), ("vdi_attach", ["true"]), ("vdi_activate", ["true"]),
                          ("vdi_deactivate", []), ("vdi_detach", []), ("vdi_epoch_end", [])]:
        first = alone.call(command, args, vdi=disk)
        assert alone.call(command, args, vdi=disk) == first
        assert first is NIL or command == "vdi_attach"
        assert len(daemon.vdis[disk]["attached"]) == (1 if command in ("vdi_attach", "vdi_activate", "vdi_deactivate")
                                                     else 0)


def test_attach_refused_by_the_daemon(alone, daemon, disk):
    daemon.vdis[disk]["read_only"] = True
    assert alone.fault("vdi_attach", ["true"], vdi=disk).number == 46


@pytest.mark.parametrize("args", [[], ["yes"], [""]])
def test_attach_must_say_how(alone, disk, args):
    assert alone.fault("vdi_attach", args, vdi=disk).number == 1


def test_attach_with_a_socket_path_that_xapi_cannot_read(alone, daemon, disk):
    daemon.vdis[disk]["nbd_socket"] = "/run/a:b/x.sock"
    assert alone.fault("vdi_attach", ["true"], vdi=disk).number == 46
    assert daemon.writes() == []


# --- VDI: on_boot ---

def test_epochs_of_an_ordinary_disk_are_nothing(alone, daemon, disk):
    for command in ("vdi_epoch_begin", "vdi_epoch_end"):
        assert alone.call(command, vdi=disk) is NIL
        assert alone.call(command, vdi=disk, vdi_on_boot=None) is NIL
    assert daemon.writes() == []


def test_epochs_of_a_disk_that_is_reset_on_boot(alone, daemon, disk):
    for command in ("vdi_epoch_begin", "vdi_epoch_begin", "vdi_epoch_end"):
        assert alone.call(command, vdi=disk, vdi_on_boot="reset") is NIL
    epoch = f"/v1/vdis/{disk}/epoch"
    assert daemon.writes() == [
        ("PATCH", f"/v1/vdis/{disk}", {"on_boot": "reset"}), ("POST", epoch, {"phase": "begin"}),
        ("POST", epoch, {"phase": "begin"}), ("POST", epoch, {"phase": "end"})]
    assert alone.fault("vdi_epoch_begin", vdi=disk, vdi_on_boot="sometimes").number == 1


@pytest.mark.parametrize("on_boot, before", [("reset", "persist"), ("persist", "reset")])
def test_on_boot_is_known_before_anything_can_be_written(alone, daemon, disk, on_boot, before):
    """xapi tells of VDI.set_on_boot with the next command only; a disk of dom0 has no epoch before its first write."""
    daemon.vdis[disk]["on_boot"] = before
    for _ in range(2):
        alone.call("vdi_attach", ["true"], vdi=disk, vdi_on_boot=on_boot)
    assert [entry[2] for entry in daemon.writes()] == [
        {"on_boot": on_boot}, *[{"client": "sm:" + HOST_REF, "writable": True, "exclusive": True}] * 2]


def test_on_boot_is_not_touched_by_readers_and_by_what_does_not_say(alone, daemon, disk):
    alone.call("vdi_attach", ["false"], vdi=disk, vdi_on_boot="reset")
    alone.call("vdi_attach", ["true"], vdi=disk, vdi_on_boot=None)
    assert daemon.vdis[disk]["on_boot"] == "persist"


# --- VDI: copies, size, names ---

def test_snapshot_and_clone(alone, daemon, disk):
    snapshot = check_vdi_info(alone.call("vdi_snapshot", vdi=disk, driver_params={"epochhint": str(uuid.uuid4())}))
    clone = check_vdi_info(alone.call("vdi_clone", vdi=snapshot, driver_params={}))
    assert len({disk, snapshot, clone}) == 3
    assert (daemon.vdis[snapshot]["is_a_snapshot"], daemon.vdis[snapshot]["snapshot_of"]) == (True, disk)
    assert daemon.vdis[clone]["is_a_snapshot"] is False


def test_resize(alone, daemon, disk):
    assert check_vdi_info(alone.call("vdi_resize", [str(2**43)], vdi=disk)) == disk
    assert daemon.vdis[disk]["size_bytes"] == 2**43
    assert alone.fault("vdi_resize", ["512"], vdi=disk).number == 79


def test_resize_online_is_resize(alone, daemon, disk):
    assert check_vdi_info(alone.call("vdi_resize_online", [str(2**22)], vdi=disk)) == disk
    assert daemon.vdis[disk]["size_bytes"] == 2**22
    assert alone.fault("vdi_resize_online", ["512"], vdi=disk).number == 79


def test_update_without_xapi_changes_nothing(alone, daemon, disk):
    assert alone.call("vdi_update", vdi=disk) is NIL
    assert daemon.writes() == []


# --- VDI: changed blocks, compose ---

@pytest.mark.parametrize("command, enabled", [("vdi_enable_cbt", True), ("vdi_disable_cbt", False)])
def test_changed_block_tracking_is_switched(alone, daemon, disk, command, enabled):
    daemon.vdis[disk]["cbt_enabled"] = not enabled
    for _ in range(2):
        assert alone.call(command, vdi=disk) is NIL
    assert daemon.writes() == [("POST", f"/v1/vdis/{disk}/cbt", {"enabled": enabled})] * 2


@pytest.mark.parametrize("bitmap, answer", [("gAA=", "gAAAAA=="), ("", ""), ("////", "////AA=="), ("AAECAw==", "AAECAw==")])
def test_changed_blocks_come_in_words_of_32_bits(alone, daemon, disk, snapshot, bitmap, answer):
    daemon.bitmap = bitmap
    assert alone.call("vdi_list_changed_blocks", [disk], vdi=snapshot) == answer
    assert ("GET", f"/v1/vdis/{snapshot}/changed_blocks/{disk}", None) in daemon.requests


@pytest.mark.parametrize("failure, number", [
    (daemon_error(409, "NoChangedBlocks", 460, "not the same family"), 460),
    ((200, {"granularity_bytes": 4096, "size_bytes": 1, "bitmap": "gA=="}), 460),
    ((200, {"granularity_bytes": 65536, "size_bytes": 1, "bitmap": "g"}), 460)])
def test_changed_blocks_that_cannot_be_told(alone, daemon, disk, snapshot, failure, number):
    daemon.failures["GET", f"/v1/vdis/{{vdi}}/changed_blocks/{disk}"] = failure
    assert alone.fault("vdi_list_changed_blocks", [disk], vdi=snapshot).number == number


def test_data_destroy(alone, daemon, disk, snapshot):
    assert alone.fault("vdi_data_destroy", vdi=snapshot).number == 460
    daemon.vdis[snapshot]["cbt_enabled"] = True
    assert alone.call("vdi_data_destroy", vdi=snapshot) is NIL
    assert daemon.vdis[snapshot]["type"] == "cbt_metadata"


def test_compose(alone, daemon, disk):
    parent = daemon.add_vdi(SR_UUID)
    assert alone.call("vdi_compose", [parent], vdi=disk) is NIL
    assert daemon.writes() == [("POST", f"/v1/vdis/{disk}/compose", {"parent": parent})]


@pytest.mark.parametrize("command", ["vdi_compose", "vdi_list_changed_blocks"])
@pytest.mark.parametrize("args, number", [([], 1), (["x"], 1), ([A_REF], 1), (["OpaqueRef:NULL"], 1), ([str(uuid.uuid4())], 144)])
def test_second_vdi_that_cannot_be_named(alone, daemon, disk, command, args, number):
    assert alone.fault(command, args, vdi=disk).number == number
    assert daemon.writes() == []


# --- What every VDI command has in common ---

VDI_COMMANDS = [("vdi_delete", []), ("vdi_attach", ["true"]), ("vdi_detach", []), ("vdi_activate", ["true"]),
                ("vdi_deactivate", []), ("vdi_snapshot", []), ("vdi_clone", []), ("vdi_resize", ["2097152"]),
                ("vdi_update", []), ("vdi_epoch_begin", []), ("vdi_epoch_end", []), ("vdi_revert", [str(uuid.uuid4())]),
                ("vdi_resize_online", ["2097152"]), ("vdi_compose", [str(uuid.uuid4())]), ("vdi_generate_config", []),
                ("vdi_attach_from_config", ["true"]), ("vdi_detach_from_config", []), ("vdi_enable_cbt", []),
                ("vdi_disable_cbt", []), ("vdi_data_destroy", []), ("vdi_list_changed_blocks", [str(uuid.uuid4())])]


@pytest.mark.parametrize("command, args", VDI_COMMANDS)
def test_vdi_that_simsrd_has_not(alone, daemon, disk, command, args):
    """Also if other VDIs have that uuid as their name, and if it is a VDI of another SR."""
    missing, name, names = (str(uuid.uuid4()) for _ in range(3))
    for taken in (name, names, names):
        daemon.add_vdi(SR_UUID, name=taken)
    elsewhere = daemon.add_vdi(daemon.add_sr(OTHER_SR))
    for vdi in (missing, name, names, elsewhere):
        fault = alone.fault(command, args, vdi=vdi)
        assert fault.number == 144 and vdi in fault.text
    assert daemon.writes() == []


@pytest.mark.parametrize("command, args", [*VDI_COMMANDS, ("sr_attach", []), ("sr_scan", []), ("sr_delete", []),
                                           ("sr_create", ["0"]), ("vdi_create", CREATE)])
def test_sr_that_simsrd_could_not_open_is_neither_missing_nor_deleted(alone, daemon, command, args):
    daemon.srs.clear()
    daemon.failed_srs["/srv/simsr/sr/" + SR_UUID] = "segment 7 is damaged"
    fault = alone.fault(command, args, vdi=str(uuid.uuid4()) if (command, args) in VDI_COMMANDS else None)
    assert fault.number == 47 and "segment 7 is damaged" in fault.text
    assert daemon.writes() == []


@pytest.mark.parametrize("command, args", VDI_COMMANDS)
def test_vdi_named_badly(alone, daemon, disk, command, args):
    assert alone.fault(command, args).number == 143
    assert alone.fault(command, args, vdi="a disk").number == 1
    assert alone.fault(command, args, vdi=disk, vdi_location=str(uuid.uuid4())).number == 1
    assert daemon.writes() == []


@pytest.mark.parametrize("given", ["vdi_uuid", "vdi_location"])
def test_uuid_or_location_alone_will_do(alone, disk, given):
    assert alone.call("vdi_activate", ["true"], **{given: disk.upper()}) is NIL


@pytest.mark.parametrize("command, args", [
    ("sr_scan", []), ("vdi_create", CREATE), ("vdi_delete", []), ("vdi_snapshot", []), ("vdi_clone", []),
    ("vdi_resize", ["2097152"]), ("vdi_compose", []), ("vdi_enable_cbt", []), ("vdi_disable_cbt", []),
    ("vdi_data_destroy", []), ("vdi_list_changed_blocks", []), ("vdi_revert", []), ("sr_delete", [])])
def test_commands_for_the_master_on_another_host(alone, daemon, disk, command, args):
    alone.device_config["SRmaster"] = "false"
    assert alone.fault(command, args, vdi=None if command == "vdi_create" else disk).number == 58
    assert daemon.requests == []


# --- device_config ---

@pytest.mark.parametrize("key, text", [
    ("socket", ""), ("socket", "control.sock"), ("socket", "/" + "x" * 200), ("standalone", "yes"),
    ("standalone", ""), ("revert", "false"), ("SRmaster", "1"), ("deadline_s", "0"), ("deadline_s", "-1"),
    ("deadline_s", "ten"), ("deadline_s", "99999"), ("deadline_s", "nan"), ("xapi_socket", "xapi"),
    ("sokcet", "/x"), ("Socket", "/x"), ("SOCKET", "/x"), ("stand_alone", "true"), ("srmaster", "true"),
    ("reverts", "off"), ("deadline", "5"), ("attach", "vhd"), ("attach", ""), ("atach", "nbd"), ("run_dir", "run"),
    ("program_path", "bin:/bin"), ("program_path", ""), ("activate_wait_s", "-1"), ("revert-compat", "xenserver"),
    ("revert-compat", ""), ("revert-compat", "none,cloudstack"), ("revert_compat", "cloudstack"), ("token_file", "/x"),
    ("fingerprint", "00"), ("cacert", "/x"), ("nbd_address", "127.0.0.1:10809"), ("url", "https://host"),
])
def test_wrong_device_config(alone, daemon, key, text):
    alone.device_config[key] = text
    fault = alone.fault("sr_attach")
    assert fault.number == 91 and key in fault.text
    assert daemon.requests == []


def test_keys_of_others_are_ignored(alone):
    alone.device_config.update({"location": "x", "multipathed": "true", "type": "y"})
    assert alone.call("sr_attach") is NIL


def test_socket_path_beyond_ascii(folder, alone, daemon):
    with serving(daemon, folder / "bücher.sock"):
        alone.device_config["socket"] = str(folder / "bücher.sock")
        assert alone.call("sr_attach") is NIL


# --- vdi_revert ---

def test_revert(alone, daemon, disk, snapshot):
    daemon.vdis[disk]["size_bytes"] *= 2
    before = dict(daemon.vdis[snapshot])
    for _ in range(2):
        assert alone.call("vdi_revert", [disk], vdi=snapshot) is NIL
        assert daemon.vdis[disk]["size_bytes"] == daemon.vdis[snapshot]["size_bytes"]
    assert daemon.vdis[snapshot] == before
    assert daemon.writes() == [("POST", f"/v1/vdis/{snapshot}/revert", {"target": disk})] * 2


def test_revert_switched_off_touches_nothing(alone, daemon, disk, snapshot):
    alone.device_config["revert"] = "off"
    assert alone.fault("vdi_revert", [disk], vdi=snapshot).number == 38
    assert daemon.requests == []


@pytest.mark.parametrize("args", [[], [""], ["x"], ["OpaqueRef:NULL"], [A_REF]])
def test_revert_of_what_cannot_be_named_without_xapi(alone, daemon, snapshot, args):
    assert alone.fault("vdi_revert", args, vdi=snapshot).number == 1
    assert daemon.writes() == []


def test_revert_says_what_to_do_about_a_ref_without_xapi(alone, snapshot):
    fault = alone.fault("vdi_revert", [A_REF], vdi=snapshot)
    assert "without XenAPI" in fault.text and "uuid" in fault.text


def test_revert_that_makes_no_sense(alone, daemon, disk, snapshot):
    other = daemon.add_vdi(SR_UUID)
    assert alone.fault("vdi_revert", [snapshot], vdi=snapshot).number == 1
    assert alone.fault("vdi_revert", [disk], vdi=other).number == 1
    assert alone.fault("vdi_revert", [other], vdi=snapshot).number == 1
    assert alone.fault("vdi_revert", [str(uuid.uuid4())], vdi=snapshot).number == 144
    elsewhere = daemon.add_vdi(daemon.add_sr(OTHER_SR))
    assert alone.fault("vdi_revert", [elsewhere], vdi=snapshot).number == 144


def test_revert_of_a_disk_in_use(alone, disk, snapshot):
    alone.call("vdi_attach", ["true"], vdi=disk)
    assert alone.fault("vdi_revert", [disk], vdi=snapshot).number == 24


@pytest.mark.parametrize("failure, number", [
    (daemon_error(507, "NoSpace", 44, "full"), 44),
    (daemon_error(500, "StoreStopped", 200, "I/O error"), 200),
    (daemon_error(501, "Unsupported", 38, "not for this disk"), 38),
    ((404, b'{"detail": "Not Found"}'), 202),
    ((500, b"oops"), 47),
])
def test_revert_that_fails_in_the_daemon(alone, daemon, disk, snapshot, failure, number):
    """Only simsrd's own "not supported" may be 38: anything else would make xapi destroy the disk."""
    daemon.failures["POST", "/v1/vdis/{vdi}/revert"] = failure
    assert alone.fault("vdi_revert", [disk], vdi=snapshot).number == number

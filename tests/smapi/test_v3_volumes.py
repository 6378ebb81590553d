"""The SMAPIv3 plug-in against a real simsrd: SRs and volumes."""

import base64
import json
import re
import uuid

import httpx
import pytest

from daemon_tools import running_simsrd
from smapi_kit import SR_UUID
from v3_kit import SR_STAT, ScriptError, Volumes, call, checked, finish, nbd_io, script, start

MIB = 1 << 20
OTHER_SR = "99999999-3a52-4b8d-a4a3-2d1c6f7e4404"


@pytest.fixture(scope="module")
def socket():
    with running_simsrd() as daemon:
        yield daemon.socket


@pytest.fixture(scope="module")
def volumes(socket):
    return Volumes(socket)


@pytest.fixture(scope="module")
def api(socket):
    """Other programs that use the same daemon."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://simsrd") as client:
        yield client


def refusal(method, **parameters):
    with pytest.raises(ScriptError) as caught:
        call(method, **parameters)
    return caught.value


def refused(volumes, number, method, **parameters):
    error = refusal(method, sr=volumes.sr, **parameters)
    assert error.code == f"SR_BACKEND_FAILURE_{number}", error
    assert error.params[0] == error.params[2] == "" and error.params[1]
    return error.text


# --- SR ----------------------------------------------------------------------------------------------------------


def test_an_sr_from_create_to_destroy(socket):
    given = {"socket": socket, "kept": "as it is"}
    first = call("SR.create", uuid=OTHER_SR, configuration=given, name="short", description="of life")
    assert first == {**given, "sr_uuid": OTHER_SR}
    assert call("SR.create", uuid=OTHER_SR, configuration=given, name="short", description="of life") == first
    sr = call("SR.attach", configuration=first)
    assert type(sr) is str and call("SR.attach", configuration=first) == sr
    stat = checked(call("SR.stat", sr=sr), SR_STAT)
    assert (stat["sr"], stat["uuid"], stat["name"], stat["description"]) == (sr, OTHER_SR, "short", "of life")
    assert stat["health"] == ["Healthy", ""] and stat["clustered"] is False and 0 < stat["free_space"] <= stat["total_space"]
    assert call("SR.set_name", sr=sr, new_name="long") is None
    assert call("SR.set_description", sr=sr, new_description="Grüße, 世界") is None
    stat = call("SR.stat", sr=sr)
    assert (stat["name"], stat["description"]) == ("long", "Grüße, 世界")
    assert call("SR.ls", sr=sr) == []
    for method in ("SR.detach", "SR.detach", "SR.destroy", "SR.destroy"):
        assert call(method, sr=sr) is None
    assert refusal("SR.stat", sr=sr).code == refusal("SR.attach", configuration=first).code == "SR_BACKEND_FAILURE_47"


def test_probe_lists_what_can_be_attached(volumes, socket):
    found = [result for result in call("SR.probe", configuration={"socket": socket})
             if result["configuration"]["sr_uuid"] == SR_UUID]
    (result,) = found
    assert result.keys() == {"configuration", "complete", "sr", "extra_info"} and result["complete"] is True
    assert checked(result["sr"], SR_STAT)["sr"] == volumes.sr == call("SR.attach", configuration=result["configuration"])
    (again,) = call("SR.probe", configuration={"socket": socket, "sr_uuid": SR_UUID})
    assert again["configuration"] == result["configuration"]
    assert call("SR.probe", configuration={"socket": socket, "sr_uuid": str(uuid.uuid4())}) == []


def test_an_sr_whose_name_is_taken_gets_another(volumes, socket):
    configuration = call("SR.create", uuid=OTHER_SR, configuration={"socket": socket}, name="my SR", description="")
    sr = call("SR.attach", configuration=configuration)
    assert call("SR.stat", sr=sr)["name"] == "my SR (99999999)"
    assert call("SR.set_name", sr=sr, new_name="mine") is None
    assert call("SR.set_name", sr=sr, new_name="my SR") is None
    assert call("SR.stat", sr=sr)["name"] == "my SR (99999999)"
    call("SR.destroy", sr=sr)


def test_an_sr_that_holds_volumes_is_neither_made_again_nor_destroyed(volumes, socket):
    volumes.create()
    made = refusal("SR.create", uuid=SR_UUID, configuration={"socket": socket}, name="x", description="")
    assert made.code == "SR_BACKEND_FAILURE_42" and SR_UUID in made.text
    refused(volumes, 39, "SR.destroy")


@pytest.mark.parametrize("configuration, number", [
    ({}, 90), ({"sr_uuid": "x"}, 1), ({"sr_uuid": SR_UUID, "socket": "relative"}, 91),
    ({"sr_uuid": SR_UUID, "socket": "/" + "x" * 107}, 91), ({"sr_uuid": SR_UUID, "socket": "/nobody/there"}, 47),
    ({"sr_uuid": 5}, 143), ([], 143), (None, 143)])
def test_configuration_that_is_no_good(configuration, number):
    assert refusal("SR.attach", configuration=configuration).code == f"SR_BACKEND_FAILURE_{number}"


# --- Volumes -----------------------------------------------------------------------------------------------------


def test_a_volume_from_create_to_destroy(volumes):
    made = volumes.create(1000, "Grüße <&>\"' %2F", description="d", sharable=True)
    assert (made["name"], made["description"], made["sharable"], made["read_write"]) == ("Grüße <&>\"' %2F", "d", True, True)
    assert made["virtual_size"] == 1024 and made["key"] == made["uuid"] and made["keys"] == {"vdi-type": "user"}
    assert volumes.stat(made) == made == volumes.ls()[made["key"]]
    assert volumes.call("Volume.resize", key=made["key"], new_size=MIB) is None
    assert volumes.call("Volume.set_name", key=made["key"], new_name="") is None
    assert volumes.call("Volume.set_description", key=made["key"], new_description="e") is None
    assert volumes.stat(made) == {**made, "virtual_size": MIB, "name": "", "description": "e"}
    assert "bytes. Disks only grow." in refused(volumes, 79, "Volume.resize", key=made["key"], new_size=512)
    for _ in range(2):
        assert volumes.call("Volume.destroy", key=made["key"]) is None
    assert made["key"] not in volumes.ls()
    refused(volumes, 144, "Volume.stat", key=made["key"])


@pytest.mark.parametrize("size, number", [(0, 79), (-1, 79), (1 << 62, 79), ("5", 143), (1.5, 143), (True, 143), (None, 143)])
def test_sizes_that_are_none(volumes, size, number):
    refused(volumes, number, "Volume.create", name="", description="", size=size, sharable=False)


def test_keys_are_kept_with_the_volume(volumes):
    made = volumes.create()
    odd = "äöü \U0001f600\n\"'"
    for key, value in (("vdi-type", "system"), ("_sm_config_a", ""), (odd, odd), ("", "empty")):
        assert volumes.call("Volume.set", key=made["key"], k=key, v=value) is None
    assert volumes.stat(made)["keys"] == {"vdi-type": "system", "_sm_config_a": "", odd: odd, "": "empty"}
    for key in (odd, "", "never there"):
        assert volumes.call("Volume.unset", key=made["key"], k=key) is None
    assert volumes.stat(made)["keys"] == {"vdi-type": "system", "_sm_config_a": ""}
    refused(volumes, 1, "Volume.set", key=made["key"], k="large", v="x" * 65536)


def test_keys_set_at_once_are_all_there(volumes):
    made = volumes.create()
    names = [f"key{number}" for number in range(8)]
    processes = [start([*script("Volume.set"), "--json"]) for _ in names]
    for name, process in zip(names, processes):  # each has begun and waits for its parameters
        process.stdin.write(json.dumps({"dbg": "", "sr": volumes.sr, "key": made["key"], "k": name, "v": name}).encode())
        process.stdin.close()
        process.stdin = None
    assert [finish(process, None) for process in processes] == [None] * 8
    assert volumes.stat(made)["keys"] == {"vdi-type": "user", **{name: name for name in names}}


def test_what_a_snapshot_says_of_itself(volumes):
    disk = volumes.create(name="disk")
    for key in ("vdi-type", "tag", "content_id", "clone-on-boot"):
        volumes.call("Volume.set", key=disk["key"], k=key, v="old")
    snapshot = volumes.snapshot(disk)
    assert snapshot["read_write"] is False and snapshot["virtual_size"] == MIB and snapshot["name"] == "disk"
    assert re.fullmatch(r"20\d{6}T\d\d:\d\d:\d\dZ", snapshot["keys"]["snapshot_time"])
    assert snapshot["keys"] == {"vdi-type": "old", "tag": "old", "is_a_snapshot": "true", "snapshot_of": disk["key"],
                                "snapshot_time": snapshot["keys"]["snapshot_time"]}
    volumes.call("Volume.set", key=snapshot["key"], k="snapshot_time", v="20200101T00:00:00Z")
    volumes.call("Volume.set", key=snapshot["key"], k="is_a_snapshot", v="true")
    assert volumes.stat(snapshot)["keys"]["snapshot_time"] == "20200101T00:00:00Z"
    clone = volumes.call("Volume.clone", key=snapshot["key"])
    assert clone["read_write"] is True and clone["keys"] == {"vdi-type": "old", "tag": "old"}


def test_snapshots_that_others_took_are_seen_as_such(volumes, api):
    disk = volumes.create()
    taken = api.post(f"/v1/vdis/{disk['key']}/snapshot", json={"name": "by hand"}).json()
    seen = volumes.ls()[taken["uuid"]]
    assert seen["name"] == "by hand" and seen["keys"]["snapshot_of"] == disk["key"] and not seen["read_write"]


@pytest.mark.parametrize("method, parameters", [
    ("Volume.stat", {}), ("Volume.snapshot", {}), ("Volume.clone", {}), ("Volume.set", {"k": "a", "v": "b"}),
    ("Volume.unset", {"k": "a"}), ("Volume.resize", {"new_size": 5}), ("Volume.set_name", {"new_name": ""}),
    ("Volume.set_description", {"new_description": ""}), ("Volume.revert", {"snapshot": SR_UUID}),
    ("Volume.compare", {"key2": SR_UUID}), ("Volume.similar_content", {})])
def test_a_volume_that_is_not_there(volumes, method, parameters):
    assert OTHER_SR in refused(volumes, 144, method, key=OTHER_SR, **parameters)


def test_keys_are_whole_uuids_in_this_sr(volumes, socket, api):
    disk = volumes.create(name="named")
    for key in ("named", disk["key"][:8], "../srs", "", "x\x00"):
        refused(volumes, 144, "Volume.stat", key=key)
    assert volumes.call("Volume.stat", key=disk["key"].upper())["key"] == disk["key"]
    ghost = str(uuid.uuid4())
    api.patch(f"/v1/vdis/{disk['key']}", json={"name": ghost})
    refused(volumes, 144, "Volume.stat", key=ghost)
    other = Volumes(socket, OTHER_SR)
    assert SR_UUID in refused(other, 144, "Volume.stat", key=disk["key"])
    assert other.call("Volume.destroy", key=disk["key"]) is None and disk["key"] in volumes.ls()
    other.call("SR.destroy")


def test_destroy_takes_the_clone_that_was_booted_from_with_it(volumes):
    disk = volumes.create()
    temporary = volumes.call("Volume.clone", key=disk["key"])
    volumes.call("Volume.set", key=disk["key"], k="clone-on-boot", v=temporary["key"])
    for _ in range(2):  # xapi asks twice, see the specification
        assert volumes.call("Volume.destroy", key=disk["key"]) is None
    assert not {disk["key"], temporary["key"]} & volumes.ls().keys()


# --- Revert ------------------------------------------------------------------------------------------------------


def test_revert_brings_content_and_size_back_and_leaves_everything_else(volumes):
    disk = volumes.create(4 * MIB)
    nbd_io(disk, "write -P 0x11 0 1024k")
    snapshot = volumes.snapshot(disk)
    for key, value in (("content_id", "c"), ("tag", "t")):
        volumes.call("Volume.set", key=disk["key"], k=key, v=value)
    volumes.call("Volume.resize", key=disk["key"], new_size=8 * MIB)
    volumes.call("Volume.set_name", key=disk["key"], new_name="renamed")
    before, kept = volumes.stat(disk), volumes.stat(snapshot)
    for pattern in ("0x22", "0x33"):
        nbd_io(disk, f"write -P {pattern} 0 4096k")
        assert volumes.call("Volume.revert", snapshot=snapshot["key"], key=disk["key"]) is None
        nbd_io(disk, "read -P 0x11 0 1024k", "read -P 0 1024k 3072k")
        after = volumes.stat(disk)
        assert after == {**before, "virtual_size": 4 * MIB, "physical_utilisation": after["physical_utilisation"]}
        assert volumes.stat(snapshot) == kept


def test_revert_that_cannot_be_is_refused_and_never_as_unimplemented(volumes):
    disk, other = volumes.create(), volumes.create()
    snapshot = volumes.snapshot(disk)
    refused(volumes, 1, "Volume.revert", snapshot=snapshot["key"], key=other["key"])
    refused(volumes, 1, "Volume.revert", snapshot=disk["key"], key=disk["key"])
    refused(volumes, 144, "Volume.revert", snapshot=OTHER_SR, key=disk["key"])
    (uri,) = disk["uri"]
    call("Datapath.activate", uri=uri, domain="7")
    refused(volumes, 24, "Volume.revert", snapshot=snapshot["key"], key=disk["key"])
    refused(volumes, 24, "Volume.destroy", key=disk["key"])
    call("Datapath.deactivate", uri=uri, domain="7")
    assert volumes.call("Volume.revert", snapshot=snapshot["key"], key=disk["key"]) is None


# --- Comparing ---------------------------------------------------------------------------------------------------


def test_compare_tells_where_volumes_differ(volumes):
    disk = volumes.create(4 * MIB)
    snapshot = volumes.snapshot(disk)
    assert volumes.call("Volume.compare", key=disk["key"], key2=snapshot["key"]) == {"blocksize": 512, "ranges": []}
    nbd_io(disk, "write -P 1 1024k 64k", "write -P 2 1088k 4k", "write -z 2048k 4k", "write -P 3 3072k 8k")
    expected = {"blocksize": 512, "ranges": [[2048, 136], [6144, 16]]}
    assert volumes.call("Volume.compare", key=disk["key"], key2=snapshot["key"]) == expected
    assert volumes.call("Volume.compare", key=snapshot["key"], key2=disk["key"]) == expected
    assert volumes.call("Volume.compare", key=disk["key"], key2=OTHER_SR) == {"blocksize": 512, "ranges": [[0, 8192]]}


def test_similar_content_is_the_family_nearest_first(volumes):
    disk, stranger = volumes.create(), volumes.create()
    snapshot = volumes.snapshot(disk)
    clones = sorted(volumes.call("Volume.clone", key=snapshot["key"])["key"] for _ in range(3))
    assert volumes.call("Volume.similar_content", key=disk["key"]) == [snapshot["key"], *clones]
    assert volumes.call("Volume.similar_content", key=snapshot["key"]) == [disk["key"], *clones]
    assert volumes.call("Volume.similar_content", key=stranger["key"]) == []


# --- Changed blocks ----------------------------------------------------------------------------------------------


def bits(answer):
    """The numbers of the blocks that the answer says have changed."""
    assert answer.keys() == {"granularity", "bitmap"} and answer["granularity"] == 65536
    raw = base64.b64decode(answer["bitmap"], validate=True)
    return {8 * index + bit for index, byte in enumerate(raw) for bit in range(8) if byte & 0x80 >> bit}


def test_changed_blocks_also_across_a_revert(volumes):
    disk = volumes.create(4 * MIB)
    assert volumes.call("Volume.enable_cbt", key=disk["key"]) is None
    assert volumes.stat(disk)["cbt_enabled"] is True
    first = volumes.snapshot(disk)
    assert first["cbt_enabled"] is True
    nbd_io(disk, "write -P 1 0 1", "write -P 1 640k 64k", "write -P 1 4095k 1k")
    second = volumes.snapshot(disk)

    def changed(key, key2, offset=0, length=-1):
        return bits(volumes.call("Volume.list_changed_blocks", key=key["key"], key2=key2["key"], offset=offset, length=length))

    assert changed(first, second) == changed(first, disk) == {0, 10, 63}
    for offset, length, expected in [(65536, -1, {9, 62}), (65535, 1, {0}), (65536, 9 * 65536, set()), (655360, 1 << 40, {0, 53}),
                                     (4 * MIB, -1, set()), (1 << 50, 5, set()), (0, 0, set())]:
        assert changed(first, second, offset, length) == expected, (offset, length)
    volumes.call("Volume.revert", snapshot=first["key"], key=disk["key"])
    assert changed(first, disk) == set() and changed(second, disk) == {0, 10, 63}
    refused(volumes, 460, "Volume.list_changed_blocks", key=second["key"], key2=first["key"], offset=0, length=-1)
    refused(volumes, 1, "Volume.list_changed_blocks", key=first["key"], key2=disk["key"], offset=-1, length=-1)
    assert volumes.call("Volume.disable_cbt", key=disk["key"]) is None
    assert volumes.stat(disk)["cbt_enabled"] is False


def test_a_backup_that_keeps_only_what_tells_changes(volumes):
    disk = volumes.create(MIB)
    refused(volumes, 66, "Volume.data_destroy", key=disk["key"])
    volumes.call("Volume.enable_cbt", key=disk["key"])
    nbd_io(disk, "write -P 1 0 1024k")
    snapshot = volumes.snapshot(disk)
    volumes.call("Volume.set", key=snapshot["key"], k="vdi-type", v="user")
    for _ in range(2):
        assert volumes.call("Volume.data_destroy", key=snapshot["key"]) is None
    after = volumes.stat(snapshot)
    assert after["volume_type"] == "CBT_Metadata" and after["keys"]["vdi-type"] == "cbt_metadata" and after["cbt_enabled"]
    nbd_io(disk, "write -P 2 128k 64k")
    changed = volumes.call("Volume.list_changed_blocks", key=snapshot["key"], key2=disk["key"], offset=0, length=-1)
    assert bits(changed) == {2}
    assert volumes.call("Volume.revert", snapshot=volumes.snapshot(disk)["key"], key=disk["key"]) is None
    refused(volumes, 66, "Volume.revert", snapshot=snapshot["key"], key=disk["key"])


def test_compose_lays_a_mirror_over_its_base(volumes):
    base, mirror = volumes.create(MIB), volumes.create(MIB)
    nbd_io(base, "write -P 1 0 1024k")
    nbd_io(mirror, "write -P 2 256k 64k")
    assert volumes.call("Volume.compose", key=mirror["key"], key2=base["key"]) is None
    nbd_io(mirror, "read -P 1 0 256k", "read -P 2 256k 64k", "read -P 1 320k 704k")
    assert base["key"] not in volumes.ls()
    refused(volumes, 144, "Volume.compose", key=mirror["key"], key2=base["key"])
    refused(volumes, 66, "Volume.compose", key=mirror["key"], key2=mirror["key"])
    assert mirror["key"] in volumes.ls()


def test_what_reverts_leave_behind_is_not_seen_and_not_in_the_way(socket):
    volumes = Volumes(socket, OTHER_SR)
    disk = volumes.create(MIB)
    snapshot = volumes.snapshot(disk)
    nbd_io(disk, "write -P 1 0 64k")
    assert volumes.call("Volume.revert", snapshot=snapshot["key"], key=disk["key"]) is None
    assert volumes.ls().keys() == {disk["key"], snapshot["key"]}
    assert volumes.call("Volume.similar_content", key=disk["key"]) == [snapshot["key"]]
    for volume in (snapshot, disk):
        volumes.call("Volume.destroy", key=volume["key"])
    assert volumes.ls() == {} and volumes.call("SR.destroy") is None

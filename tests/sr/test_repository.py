"""Making, deleting, resizing and updating VDIs and the SR; what is refused, and that a refusal leaves nothing behind."""

import json

import pytest
from sr_kit import BLOCK, SR_UUID, WIDE, World, check, content, fill, photo, unchanged

from simsr.errors import BadRequest, BadSize, NoSpace, NotFound, ShrinkRefused, VdiExists, VdiInUse, VdiReadOnly
from simsr.sr.repository import SIZE_MAX_BYTES, SM_CONFIG_MAX, TEXT_MAX, check_uuid
from simsr.sr.vdi import VDI_TYPES

GOOD_TEXTS = ["", " ", "a/b", "../..", "ä漢字🙂", "\n\t\x01\x7f", "'\"\\{}%s", "x" * TEXT_MAX, "ä" * (TEXT_MAX // 2), "\uffff"]
BAD_TEXTS = ["\0", "a\0b", "\ud800", "a\udfff", "x" * (TEXT_MAX + 1), "\n" * (TEXT_MAX // 2 + 1), "ä" * (TEXT_MAX // 2 + 1)]
BAD_SM_CONFIGS = [
    {"key": "x" * SM_CONFIG_MAX}, {"x" * SM_CONFIG_MAX: "y"}, {f"{key:05}": "x" * 95 for key in range(SM_CONFIG_MAX // 100 + 1)},
    {"a\0": "b"}, {"a": "b\0"}, {"\ud800": "b"}, {"a": "\ud800"},
]  # fmt: skip
BAD_UUIDS = [
    "", " ", "x", "0" * 36, "0" * 32, SR_UUID + "0", SR_UUID[:-1], SR_UUID + "\n", SR_UUID.replace("-", "_"), "{" + SR_UUID + "}",
    SR_UUID[:-1] + "g", SR_UUID[:-1] + "０", "urn:uuid:" + SR_UUID, "../../../../../etc/passwd", "\0" * 36, "\ud800" * 36,
]  # fmt: skip


# Create.


def test_create_gives_an_empty_disk_with_all_its_fields(sr):
    vdi = sr.create(1 << 30, name="n", description="d", type="system", sm_config={"k": "v"})
    assert vdi.describe() == {
        "uuid": vdi.uuid, "location": vdi.uuid, "sr": SR_UUID, "name": "n", "description": "d", "type": "system",
        "size_bytes": 1 << 30, "physical_utilisation_bytes": 0, "is_a_snapshot": False, "is_a_tip": False, "snapshot_of": None,
        "snapshot_time": None, "created_time": "2026-11-21T00:00:01Z", "read_only": False, "sharable": False, "managed": True,
        "family": vdi.uuid, "on_boot": "persist", "cbt_enabled": False, "sm_config": {"k": "v"}, "attached": [],
    }  # fmt: skip
    assert sr.get(vdi.uuid) is vdi
    assert vdi.volume.read_bytes((1 << 30) - BLOCK, BLOCK) == bytes(BLOCK)
    check(sr)


@pytest.mark.parametrize("asked, given", [(1, 512), (511, 512), (512, 512), (513, 1024), (SIZE_MAX_BYTES, SIZE_MAX_BYTES)])
def test_create_rounds_up_to_sectors(sr, asked, given):
    assert sr.create(asked).size_bytes == given


@pytest.mark.parametrize("size_bytes", [0, -1, -(1 << 70), SIZE_MAX_BYTES + 1, 1 << 4000])
def test_create_refuses_sizes(sr, disk, size_bytes):
    with unchanged(sr), pytest.raises(BadSize):
        sr.create(size_bytes)


@pytest.mark.parametrize("type", sorted(VDI_TYPES))
def test_create_takes_every_type(sr, type):
    assert sr.create(512, type=type).describe()["type"] == type


@pytest.mark.parametrize("type", ["", "User", "user ", "user\0", "x" * 5000, "\ud800"])
def test_create_refuses_types(sr, type):
    with unchanged(sr), pytest.raises(BadRequest):
        sr.create(512, type=type)


def test_create_takes_a_uuid_in_any_case_but_only_once(sr):
    given = "ABCDEF00-1111-4222-8333-44445555666F"
    vdi = sr.create(512, uuid=given)
    assert vdi.uuid == given.lower()
    for again in (given, given.lower()):
        with unchanged(sr), pytest.raises(VdiExists):
            sr.create(512, uuid=again)
    sr.delete(vdi)
    assert sr.create(1024, uuid=given).size_bytes == 1024


@pytest.mark.parametrize("uuid", BAD_UUIDS)
def test_uuids_are_checked(sr, disk, uuid):
    with pytest.raises(BadRequest):
        check_uuid(uuid)
    snapshot = sr.snapshot(disk)
    for act in (
        lambda: sr.create(512, uuid=uuid), lambda: sr.snapshot(disk, uuid=uuid), lambda: sr.clone(disk, uuid=uuid),
        lambda: sr.revert(snapshot, uuid),
    ):  # fmt: skip
        with unchanged(sr), pytest.raises(BadRequest):
            act()


def test_uuids_of_one_sr_are_unique_over_all_operations(sr, disk):
    snapshot = sr.snapshot(disk)
    for taken in (disk.uuid, snapshot.uuid):
        for act in (sr.snapshot, sr.clone):
            with unchanged(sr), pytest.raises(VdiExists):
                act(disk, uuid=taken)


# Texts.


@pytest.mark.parametrize("field", ["name", "description"])
@pytest.mark.parametrize("text", GOOD_TEXTS)
def test_odd_texts_come_back_as_they_were(field, text):
    world = World(WIDE)
    sr = world.repository
    vdi = sr.create(512, **{field: text})
    made = [vdi.uuid, sr.snapshot(vdi, **{field: text}).uuid, sr.clone(vdi).uuid]
    sr.update(vdi, **{field: "between"})
    sr.update(vdi, **{field: text})
    for sr in (sr, world.kill(), world.reopen()):
        assert [sr.get(uuid).describe()[field] for uuid in made] == [text] * 3


@pytest.mark.parametrize("field", ["name", "description"])
@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_texts_are_refused_everywhere(sr, disk, field, text):
    bad = {field: text}
    for act in (
        lambda: sr.create(512, **bad), lambda: sr.snapshot(disk, **bad), lambda: sr.clone(disk, **bad),
        lambda: sr.update(disk, **bad), lambda: sr.update_self(**bad),
    ):  # fmt: skip
        with unchanged(sr), pytest.raises(BadRequest):
            act()


@pytest.mark.parametrize("sm_config", BAD_SM_CONFIGS)
def test_bad_sm_configs_are_refused_everywhere(sr, disk, sm_config):
    for act in (
        lambda: sr.create(512, sm_config=sm_config), lambda: sr.snapshot(disk, sm_config=sm_config),
        lambda: sr.clone(disk, sm_config=sm_config), lambda: sr.update(disk, sm_config=sm_config),
        lambda: sr.update_self(sm_config=sm_config),
    ):  # fmt: skip
        with unchanged(sr), pytest.raises(BadRequest):
            act()


@pytest.mark.parametrize("character", ["x", "\x01", "ä", "🙂", '"'])
def test_the_largest_metadata_fits_into_one_record(character):
    world = World(WIDE)
    width = len(json.dumps(character, ensure_ascii=False).encode()) - 2
    text = character * (TEXT_MAX // width)
    sm_config = {"k" * 768: character * ((SM_CONFIG_MAX - 768) // width)}
    vdi = world.repository.create(512, name=text, description=text, sm_config=sm_config)
    snapshot = world.repository.snapshot(vdi)
    for sr in (world.repository, world.kill(), world.reopen()):
        for uuid in (vdi.uuid, snapshot.uuid):
            found = sr.get(uuid).describe()
            assert (found["name"], found["description"], found["sm_config"]) == (text, text, sm_config)


def test_metadata_that_does_not_fit_into_a_record_is_refused(sr, disk):
    with unchanged(sr), pytest.raises(NoSpace):
        sr.create(512, sm_config={"a": "x" * 9000})
    with unchanged(sr), pytest.raises(NoSpace):
        sr.update(disk, sm_config={"a": "x" * 9000})


def test_sm_config_is_a_copy(sr, disk):
    mine = {"a": "1"}
    vdi = sr.create(512, sm_config=mine)
    sr.update(disk, sm_config=mine)
    copy = sr.clone(vdi)
    mine["a"] = "2"
    assert [v.describe()["sm_config"] for v in (vdi, disk, copy)] == [{"a": "1"}] * 3
    sr.update(vdi, sm_config={})
    assert copy.describe()["sm_config"] == {"a": "1"}


# Delete.


def test_delete_takes_one_vdi_and_no_other(world, sr, disk):
    snapshot, clone = sr.snapshot(disk), sr.clone(disk)
    kept = {vdi.uuid: (vdi.describe(), content(vdi)) for vdi in (snapshot, clone)}
    sr.delete(disk)
    sr.store.reap()
    for sr in (sr, world.kill(), world.reopen()):
        with pytest.raises(NotFound):
            sr.get(disk.uuid)
        assert {uuid: (vdi.describe(), content(vdi)) for uuid, vdi in sr.vdis.items()} == kept


def test_deleting_a_snapshot_leaves_the_disk_and_the_others(sr, disk):
    first, second = sr.snapshot(disk), sr.snapshot(disk)
    fill(disk, 2)
    before = photo(sr)
    sr.delete(first)
    sr.store.reap()
    del before[first.uuid]
    after = photo(sr)
    assert after.pop("")[0]["vdi_count"] == 2 and before.pop("") and after == before
    assert sr.revert(second).changed


def test_delete_frees_the_space(world, sr, disk):
    snapshot = sr.snapshot(disk)
    fill(disk, 2)
    live = sr.store.statistics()["live_bytes"]
    sr.delete(snapshot)
    sr.store.reap()
    assert sr.store.statistics()["live_bytes"] == live - 6 * BLOCK
    sr.delete(disk)
    sr.store.reap()
    assert sr.store.statistics()["live_bytes"] == 0
    check(sr)


def test_delete_refused_while_attached(sr, disk):
    sr.attach(disk, "k", "host 1", False, "attach")
    with unchanged(sr), pytest.raises(VdiInUse) as caught:
        sr.delete(disk)
    assert "host 1" in str(caught.value)
    sr.detach(disk, "k")
    sr.delete(disk)


def test_nothing_can_be_done_to_a_vdi_that_is_gone(world, sr, disk):
    """Whoever waits for a client to leave may find the VDI deleted meanwhile; a record about it would damn the log."""
    snapshot, other = sr.snapshot(disk), sr.create(512)
    sr.delete(disk)
    sr.delete(snapshot)
    for act in (
        lambda: sr.delete(disk), lambda: sr.delete(snapshot), lambda: sr.resize(disk, 1 << 20),
        lambda: sr.update(disk, name="x"),
        lambda: sr.snapshot(disk), lambda: sr.clone(snapshot), lambda: sr.revert(snapshot), lambda: sr.revert(disk),
    ):  # fmt: skip
        with unchanged(sr), pytest.raises(NotFound):
            act()
    sr.create(512, uuid=disk.uuid)
    with unchanged(sr), pytest.raises(NotFound):
        sr.delete(disk)
    assert set(world.kill().vdis) == {other.uuid, disk.uuid}


# Resize.


def test_resize_grows_with_zeros_and_keeps_the_content(world, sr, disk):
    old = content(disk)
    for size_bytes in (6 * BLOCK, 6 * BLOCK + 1, 64 * BLOCK, 1 << 40):
        sr.resize(disk, size_bytes)
        assert disk.size_bytes == -(-size_bytes // 512) * 512
        shown = min(disk.size_bytes, 8 * BLOCK)
        assert disk.volume.read_bytes(0, shown) == (old + bytes(2 * BLOCK))[:shown]
    assert world.kill().get(disk.uuid).size_bytes == 1 << 40


def test_resize_to_the_same_size_logs_nothing(sr, disk):
    with unchanged(sr):
        sr.resize(disk, disk.size_bytes)
        sr.resize(disk, disk.size_bytes - 511)


def test_resize_refuses_to_shrink(sr, disk):
    with unchanged(sr), pytest.raises(ShrinkRefused) as caught:
        sr.resize(disk, 5 * BLOCK)
    assert caught.value.details == {"uuid": disk.uuid, "old_bytes": 6 * BLOCK, "size": 5 * BLOCK}
    assert caught.value.sm_fault == 79


@pytest.mark.parametrize("size_bytes", [0, -1, SIZE_MAX_BYTES + 1])
def test_resize_refuses_sizes(sr, disk, size_bytes):
    with unchanged(sr), pytest.raises(BadSize):
        sr.resize(disk, size_bytes)


def test_resize_refuses_what_cannot_change(sr, disk):
    snapshot, locked = sr.snapshot(disk), sr.create(512, read_only=True)
    for vdi in (snapshot, locked):
        with unchanged(sr), pytest.raises(VdiReadOnly):
            sr.resize(vdi, 1 << 30)


def test_resize_while_attached(sr, disk):
    sr.attach(disk, "k", "host", True, "attach")
    sr.resize(disk, 1 << 20)
    assert disk.size_bytes == 1 << 20


# Update.


@pytest.mark.parametrize(
    "changes",
    [{"name": "n"}, {"description": "d"}, {"sm_config": {}}, {"managed": False}, {"read_only": True}, {"sharable": True},
     {"name": "n", "description": "d", "sm_config": {"x": "y"}, "managed": False, "read_only": True, "sharable": True}],
)  # fmt: skip
def test_update_changes_what_it_is_told_and_nothing_else(world, sr, disk, changes):
    before = photo(sr)
    sr.update(disk, **changes)
    before[disk.uuid][0].update(changes)
    assert photo(sr) == before
    assert photo(world.kill()) == before


def test_update_with_what_is_there_logs_nothing(sr, disk):
    with unchanged(sr):
        sr.update(disk)
        sr.update(disk, name="disk", description="first", sm_config={"a": "1"}, managed=True, read_only=False, sharable=False)
        sr.update_self()
        sr.update_self(name="sr", description="", sm_config={})


@pytest.mark.parametrize("field", ["uuid", "family", "snapshot_of", "snapshot_time", "created_time", "type", "colour"])
def test_update_leaves_the_identity_alone(sr, disk, field):
    with unchanged(sr), pytest.raises(BadRequest) as caught:
        sr.update(disk, name="new", **{field: None})
    assert field in str(caught.value)
    with unchanged(sr), pytest.raises(BadRequest):
        sr.update_self(**{field: None})


def test_update_to_read_only_needs_the_disk_unused(sr, disk):
    sr.attach(disk, "k", "host", False, "nbd")
    with unchanged(sr), pytest.raises(VdiInUse):
        sr.update(disk, read_only=True, name="new")
    sr.update(disk, name="new")
    sr.detach(disk, "k")
    sr.update(disk, read_only=True)
    assert disk.read_only
    sr.attach(disk, "k", "host", False, "nbd")
    sr.update(disk, read_only=True, name="newer")
    sr.update(disk, read_only=False)
    assert not disk.read_only


def test_a_snapshot_stays_read_only_whatever_its_flag_says(sr, disk):
    snapshot = sr.snapshot(disk)
    sr.update(snapshot, read_only=False, name="renamed")
    assert snapshot.read_only and snapshot.describe()["read_only"]


def test_update_cannot_take_back_what_two_writers_share(sr, disk):
    sr.update(disk, sharable=True)
    sr.attach(disk, "a", "a", True, "attach")
    sr.update(disk, sharable=False)
    sr.update(disk, sharable=True)
    sr.attach(disk, "b", "b", True, "attach")
    with unchanged(sr), pytest.raises(VdiInUse):
        sr.update(disk, sharable=False)
    sr.detach(disk, "a")
    sr.update(disk, sharable=False)
    with unchanged(sr), pytest.raises(VdiInUse):
        sr.attach(disk, "a", "a", True, "attach")


@pytest.mark.parametrize("first, second", [(True, True), (True, False), (False, True), (False, False)])
def test_hosts_that_agree_elsewhere_who_writes(sr, disk, first, second):
    sr.attach(disk, "a", "a", True, "attach", exclusive=first)
    if first or second:
        with unchanged(sr), pytest.raises(VdiInUse):
            sr.attach(disk, "b", "b", True, "attach", exclusive=second)
    else:
        sr.attach(disk, "b", "b", True, "attach", exclusive=False)
        assert [attachment.client for attachment in disk.attachments.values()] == ["a", "b"]


def test_update_self(world, sr):
    sr.update_self(name="new", description="d", sm_config={"a": "b"})
    for sr in (sr, world.kill(), world.reopen()):
        described = sr.describe()
        assert (described["name"], described["description"], described["sm_config"]) == ("new", "d", {"a": "b"})
        assert (sr.name, sr.uuid) == ("new", SR_UUID)
    with unchanged(sr), pytest.raises(BadRequest):
        sr.update_self(name="")

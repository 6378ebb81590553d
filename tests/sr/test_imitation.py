"""An SR that is like another type refuses, rounds, counts and deletes as that type does."""

from __future__ import annotations

import random

import pytest
from sr_kit import SR_UUID, WIDE, World, check, content, fill, unchanged

from simsr import errors
from simsr.personalities import PERSONALITIES, find_personality, personality_names
from simsr.sr.imitation import chain_of

MIB, GIB = 1 << 20, 1 << 30


def like(personality: str, limit_bytes: int | None = None):
    """An SR of that personality."""
    world = World(WIDE)
    meta = {"uuid": SR_UUID, "name": "sr", "description": "", "sm_config": {}, "personality": personality}
    world.repository.store.meta = meta | {"limit_bytes": limit_bytes}
    repository = world.repository = type(world.repository)(world.repository.store, world.now, world.new_uuid)
    assert repository.describe()["personality"] == personality
    return repository


def utilisation(vdi) -> int:
    return vdi.describe()["physical_utilisation_bytes"]


# The table.


@pytest.mark.parametrize("name", personality_names())
def test_every_personality_makes_sense(name):
    personality = find_personality(name)
    assert personality.name == name and personality.description and personality.formats
    assert len(set(personality.capabilities)) == len(personality.capabilities)
    assert personality.can_revert == (name.endswith("+revert") or name in ("sim", "array"))
    assert not personality.can_revert or "VDI_CLONE" in personality.capabilities, "xapi refuses a revert without VDI_CLONE"
    assert {"VDI_CLONE", "VDI_SNAPSHOT"} <= set(personality.capabilities) or not any(f.clones for f in personality.formats.values())
    for form in personality.formats.values():
        assert form.clones or not form.reverts
        assert 0 < form.size_min_bytes <= form.size_max_bytes and form.size_max_bytes % form.size_unit_bytes == 0
    assert personality.describe()["capabilities"] == list(personality.capabilities)


def test_capabilities_of_stock_drivers():
    """The lists of sm, spot by spot; VDI_REVERT is in none of them."""
    assert [name for name, p in PERSONALITIES.items() if p.can_revert] == ["sim", "array"]
    ext, nfs, lvm = (set(PERSONALITIES[name].capabilities) for name in ("ext", "nfs", "lvmoiscsi"))
    assert "SR_SUPPORTS_LOCAL_CACHING" in ext - nfs and "SR_CACHING" in nfs - ext and "SR_TRIM" in lvm - ext
    assert "THIN_PROVISIONING" in ext & nfs and "THIN_PROVISIONING" not in lvm
    assert not {"VDI_CLONE", "VDI_SNAPSHOT"} & set(PERSONALITIES["iso"].capabilities)
    assert set(PERSONALITIES["udev"].capabilities) == {"VDI_ATTACH", "VDI_DETACH", "VDI_INTRODUCE", "VDI_UPDATE", "SR_UPDATE"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("etx", "Did you mean ext?"), ("EXT", "Did you mean ext?"), ("lvmoiscsi+rev", "lvmoiscsi"), ("iso+revert", "Use iso:"),
     ("sim+revert", "Use sim:"), ("ext+revert+revert", "ext+revert"), ("", "personality list"), ("x" * 500, "personality list")],
)  # fmt: skip
def test_unknown_personalities_get_a_suggestion(name, hint):
    with pytest.raises(errors.UnknownPersonality) as caught:
        find_personality(name)
    assert hint in caught.value.hint and len(str(caught.value)) < 200


# Sizes and formats.


@pytest.mark.parametrize(
    ("personality", "sm_config", "asked", "given"),
    [("sim", {}, 1, 512), ("ext", {}, 1, 2 * MIB), ("ext", {}, 2 * MIB + 1, 4 * MIB), ("ext", {"type": "raw"}, 513, 1024),
     ("nfs", {"image-format": "qcow2"}, MIB + 1, MIB + 65536), ("lvm", {}, 5 * MIB, 8 * MIB), ("lvm", {"type": "raw"}, 1, 4 * MIB),
     ("array", {}, 1, MIB), ("iso", {}, 700, 1024), ("ext", {}, 2040 * GIB, 2040 * GIB)],
)  # fmt: skip
def test_sizes_are_rounded_up_as_the_format_has_it(personality, sm_config, asked, given):
    assert like(personality).create(asked, sm_config=sm_config).size_bytes == given


def test_sizes_and_formats_that_cannot_be():
    sr = like("ext")
    with unchanged(sr):
        with pytest.raises(errors.BadSize, match="vhd disk of an SR like ext has at most 2 TiB"):
            sr.create(2040 * GIB + 1)
        with pytest.raises(errors.BadRequest, match="'vmdk' is not valid: SRs like ext have vhd, qcow2, raw"):
            sr.create(MIB, sm_config={"image-format": "vmdk"})
    disk = sr.create(2 * MIB)
    with unchanged(sr), pytest.raises(errors.BadSize):
        sr.resize(disk, 2041 * GIB)
    sr.resize(disk, 2 * MIB + 1)
    assert disk.size_bytes == 4 * MIB
    sr.resize(disk, 3 * MIB)
    assert disk.size_bytes == 4 * MIB, "3 MiB are 4 MiB there, so this is no shrinking"
    assert like("ext").create(3000 * GIB, sm_config={"image-format": "qcow2"}).size_bytes == 3000 * GIB


# Space.


def test_thick_disks_take_their_whole_size():
    sr = like("lvm", 64 * MIB)
    disk = sr.create(40 * MIB)
    fill(disk, 1, range(3))
    own = sr.describe()
    assert (utilisation(disk), own["physical_utilisation_bytes"], own["physical_size_bytes"]) == (40 * MIB, 40 * MIB, 64 * MIB)
    with unchanged(sr), pytest.raises(errors.NoSpace, match="28 MiB in an SR like lvm; 24 MiB are free"):
        sr.create(28 * MIB)
    with unchanged(sr), pytest.raises(errors.NoSpace):
        sr.clone(disk)
    with unchanged(sr), pytest.raises(errors.NoSpace):
        sr.resize(disk, 65 * MIB)
    snapshot = sr.snapshot(disk)
    assert (utilisation(snapshot), utilisation(disk)) == (4 * MIB, 40 * MIB), "a snapshot is deflated"
    sr.resize(disk, 60 * MIB)
    with unchanged(sr), pytest.raises(errors.NoSpace, match="a snapshot"):
        sr.snapshot(disk)
    sr.delete(disk)
    assert sr.create(60 * MIB).size_bytes == 60 * MIB
    check(sr)


def test_thin_disks_take_what_is_written():
    sr = like("ext", 64 * MIB)
    disk = sr.create(600 * MIB)
    assert utilisation(disk) == 0
    fill(disk, 1, range(3))
    assert utilisation(disk) == 3 * 4096


# What a type cannot do.


def refused(sr, reason, operation, *arguments):
    with unchanged(sr), pytest.raises(errors.Unsupported, match=reason) as caught:
        operation(*arguments)
    assert caught.value.sm_fault == 38


def test_revert_is_there_or_not():
    for name in ("ext", "nfs", "lvmoiscsi"):
        sr = like(name)
        disk = sr.create(4 * MIB)
        snapshot = sr.snapshot(disk)
        fill(disk, 1, range(2))
        refused(sr, f"SRs like {name} have no VDI_REVERT", sr.revert, snapshot)
    for name in ("ext+revert", "lvmoiscsi+revert", "array", "sim"):
        sr = like(name)
        disk = sr.create(4 * MIB)
        before = content(disk)
        snapshot = sr.snapshot(disk)
        fill(disk, 1, range(2))
        assert sr.revert(snapshot).changed and content(disk) == before
        check(sr)


def test_revert_for_some_formats_only():
    sr = like("nfs+revert")
    disk = sr.create(4 * MIB, sm_config={"image-format": "qcow2"})
    snapshot = sr.snapshot(disk)
    fill(disk, 1, range(2))
    refused(sr, "like nfs\\+revert cannot do that with the format qcow2", sr.revert, snapshot)
    sr.update(snapshot, sm_config={})
    refused(sr, "format qcow2", sr.revert, snapshot)
    assert content(sr.clone(snapshot)) == content(snapshot), "so the clone path is open"
    raw = sr.create(4 * MIB, sm_config={"type": "raw"})
    refused(sr, "format raw", sr.snapshot, raw)
    refused(sr, "format raw", sr.clone, raw)


@pytest.mark.parametrize("name", ["iso", "udev", "hba"])
def test_types_without_clones(name):
    sr = like(name)
    disk = sr.create(MIB)
    refused(sr, "no VDI_SNAPSHOT", sr.snapshot, disk)
    refused(sr, "no VDI_CLONE", sr.clone, disk)
    refused(sr, "cannot", sr.resize, disk, 2 * MIB)


def test_library_is_read_only_for_hosts():
    sr = like("iso")
    image = sr.create(MIB)
    assert image.describe()["read_only"] and image.describe()["sharable"]
    assert not sr.imitation.export_read_only(image), "somebody has to fill it"
    with pytest.raises(errors.VdiReadOnly):
        sr.attach(image, "h", "host", True, "attach")
    sr.attach(image, "h", "host", False, "attach")
    assert sr.imitation.export_read_only(image)
    sr.detach(image, "h")
    assert not sr.imitation.export_read_only(image)


# Chains.


def length(sr, vdi) -> int:
    return len(chain_of(vdi, list(sr.vdis.values()))) + 1


def test_chain_is_too_long_at_30():
    sr = like("ext+revert")
    disk = sr.create(2 * MIB)
    snapshots = []
    for number in range(29):
        assert length(sr, disk) == number + 1
        snapshots.append(sr.snapshot(disk))
    with unchanged(sr):
        for operation in (sr.snapshot, sr.clone):
            with pytest.raises(errors.SnapshotChainTooLong, match="30 images") as caught:
                operation(disk)
            assert caught.value.sm_fault == 109
    assert length(sr, sr.clone(snapshots[-1])) == 30, "a clone of a snapshot makes no base"
    sr.delete(snapshots[3])
    assert length(sr, disk) == 29, "a base that one image is left on is merged"
    sr.snapshot(disk)
    fill(disk, 1, range(2))
    sr.revert(snapshots[0])
    assert length(sr, disk) == 2, "it stands beside that snapshot now"
    sr.snapshot(disk)
    check(sr)


def test_chain_of_a_disk_whose_snapshots_come_and_go_stays_short():
    sr = like("ext")
    disk = sr.create(2 * MIB)
    first = sr.snapshot(disk)
    for _ in range(100):
        sr.delete(sr.snapshot(disk))
    assert length(sr, disk) == 2 and len(disk.volume.meta["chain"]) <= 3
    generation = first
    for _ in range(40):
        clone = sr.clone(generation)
        sr.delete(generation)
        generation = sr.snapshot(clone)
        sr.delete(clone)
    assert length(sr, generation) == 2, "the first disk and its line part at one base"
    check(sr)


def test_chain_survives_and_other_types_have_none():
    world = World(WIDE)
    world.repository.store.meta = world.repository.store.meta | {"personality": "nfs"}
    sr = world.repository = type(world.repository)(world.repository.store, world.now, world.new_uuid)
    sr.update_self(description="so that it is in the log")
    uuid = sr.create(2 * MIB).uuid
    for _ in range(5):
        sr.snapshot(sr.get(uuid))
    sr = world.reopen()
    assert sr.personality == "nfs" and length(sr, sr.get(uuid)) == 6
    for name in ("sim", "array"):
        sr = like(name)
        disk = sr.create(MIB)
        for _ in range(40):
            sr.snapshot(disk)
        assert "chain" not in disk.volume.meta


# Arrays.


def test_deleting_a_disk_of_an_array_deletes_its_snapshots():
    sr = like("array")
    disk, other = sr.create(MIB), sr.create(MIB)
    snapshots = [sr.snapshot(disk) for _ in range(3)]
    clone = sr.clone(snapshots[0])
    kept = [sr.snapshot(other), sr.snapshot(clone)]
    sr.attach(snapshots[1], "n", "nbd client 1", False, "nbd")
    with unchanged(sr), pytest.raises(errors.VdiInUse):
        sr.delete(disk)
    sr.detach(snapshots[1], "n")
    sr.delete(snapshots[2])
    sr.delete(disk)
    assert set(sr.vdis) == {vdi.uuid for vdi in (other, clone, *kept)}
    check(sr)
    sr = like("sim")
    disk = sr.create(MIB)
    snapshot = sr.snapshot(disk)
    sr.delete(disk)
    assert list(sr.vdis) == [snapshot.uuid]


# Against a tree of images, kept the long way.


class Tree:
    """What a driver with files of VHD has: images and bases, each on another base or on none; bases with one image are merged."""

    def __init__(self) -> None:
        self.below: dict[object, object] = {}

    def snapshot(self, disk: str, copy: str) -> None:
        base = ("base", copy)
        self.below |= {base: self.below[disk], disk: base, copy: base}

    def beside(self, image: str, copy: str) -> None:
        self.below[copy] = self.below[image]

    def delete(self, image: str) -> None:
        del self.below[image]
        self.merge()

    def merge(self) -> None:
        while True:
            kids: dict[object, list] = {}
            for one, base in self.below.items():
                kids.setdefault(base, []).append(one)
            lone = [one for one in self.below if isinstance(one, tuple) and len(kids.get(one, ())) < 2]
            if not lone:
                return
            for kid in kids.get(lone[0], ()):
                self.below[kid] = self.below[lone[0]]
            del self.below[lone[0]]

    def length(self, image: object) -> int:
        count = 0
        while image is not None:
            image, count = self.below[image], count + 1
        return count


def test_chains_are_as_long_as_in_a_tree_of_images(seeds, note):
    for seed in seeds(8):
        rng = random.Random(seed)
        sr, tree = like("ext+revert"), Tree()
        sr.create(2 * MIB)
        tree.below = {uuid: None for uuid in sr.vdis}
        for step in range(120):
            vdi = rng.choice(list(sr.vdis.values()))
            action = rng.choices(("snapshot", "clone", "revert", "delete", "write"), (8, 3, 3, 4, 2))[0]
            with note(seed=seed, step=step, action=action):
                one_step(sr, tree, vdi, action, rng)
                assert {uuid: tree.length(uuid) for uuid in sr.vdis} == {uuid: length(sr, vdi) for uuid, vdi in sr.vdis.items()}
        check(sr)


def one_step(sr, tree: Tree, vdi, action: str, rng: random.Random) -> None:
    if action in ("snapshot", "clone"):
        if vdi.is_a_snapshot and action == "snapshot":
            return
        copy = getattr(sr, action)(vdi)
        (tree.beside if vdi.is_a_snapshot else tree.snapshot)(vdi.uuid, copy.uuid)
    elif action == "revert" and vdi.is_a_snapshot and vdi.snapshot_of in sr.vdis:
        if sr.revert(vdi).changed:
            tree.below[vdi.snapshot_of] = tree.below[vdi.uuid]
            tree.merge()
    elif action == "delete" and len(sr.vdis) > 2:
        sr.delete(vdi)
        tree.delete(vdi.uuid)
    elif action == "write" and not vdi.read_only:
        fill(vdi, rng.randrange(1 << 30), range(2))

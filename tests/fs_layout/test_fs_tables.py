"""The table of numbers, the list of mounts, and the tree over things that are not there: all without I/O."""

from __future__ import annotations

import random

import pytest
from fuse_server import UUIDS, FakeSource

from fs_layout.mounting import MountPoint, parse_mounts
from fs_layout.nodes import ROOT, ROOT_NUMBER, Nodes
from fs_layout.tree import Tree

A, B = ("vdi", "a"), ("vdi", "b")


def test_numbers_are_never_used_again():
    here = {A, B}
    nodes = Nodes(here.__contains__)
    first = nodes.number(A)
    assert nodes.number(A) == first != nodes.number(B) and nodes.key(first) == A
    nodes.remember(first)
    nodes.remember(first)
    assert nodes.known(A) == first and nodes.known(B) is None
    nodes.forget(first, 1)
    here.discard(A)
    assert nodes.key(first) == A  # the kernel still knows it
    nodes.forget(first, 1)
    with pytest.raises(KeyError):
        nodes.key(first)
    here.add(A)
    assert nodes.number(A) > first


def test_a_number_stays_while_its_file_does():
    nodes = Nodes(lambda key: True)
    number = nodes.number(A)
    nodes.remember(number)
    nodes.forget(number, 1)
    assert nodes.number(A) == number and nodes.known(A) is None


def test_a_renewed_number():
    nodes = Nodes(lambda key: True)
    old = nodes.number(A)
    nodes.remember(old)
    nodes.renew(A)
    new = nodes.number(A)
    assert new != old and nodes.key(old) == nodes.key(new) == A
    nodes.remember(new)
    nodes.forget(old, 1)
    with pytest.raises(KeyError):
        nodes.key(old)
    assert nodes.key(new) == A and nodes.known(A) == new


def test_the_root_stays():
    nodes = Nodes(lambda key: False)
    nodes.forget(ROOT_NUMBER, 100)
    nodes.renew(ROOT)
    assert nodes.key(ROOT_NUMBER) == ROOT and nodes.number(ROOT) == ROOT_NUMBER


def test_the_table_against_a_model(seeds):
    for seed in seeds(30):
        chance = random.Random(seed)
        here: set = set()
        nodes, counts, used = Nodes(here.__contains__), {}, set()
        for _ in range(300):
            key = ("vdi", str(chance.randrange(8)))
            match chance.randrange(4):
                case 0:
                    here.add(key)
                    number = nodes.number(key)
                    assert number in counts or number not in used or nodes.key(number) == key
                    used.add(number)
                    nodes.remember(number)
                    counts[number] = counts.get(number, 0) + 1
                case 1 if counts:
                    number = chance.choice(list(counts))
                    times = chance.randint(1, counts[number])
                    nodes.forget(number, times)
                    counts[number] -= times
                    if not counts[number]:
                        del counts[number]
                case 2:
                    here.discard(key)
                case 3:
                    nodes.renew(key)
            for number in counts:
                assert nodes.key(number)[0] == "vdi"
        assert len(nodes) <= len(used) + 1


def test_mounts_are_read_and_what_is_no_mount_is_left_out():
    text = (
        "22 1 0:20 / / rw - ext4 /dev/vda1 rw\n"
        "70 22 0:40 / /srv/a\\040b\\134c rw,nosuid shared:1 master:2 - fuse.simsr simsr rw,user_id=0\n"
        "71 22 0:41 / /srv rw - fuse.simsr simsr rw\n"
        "garbage\n - \n1 2 3\n"
    )
    assert parse_mounts(text) == [
        MountPoint("/", "ext4", "/dev/vda1", "0:20"), MountPoint("/srv/a b\\c", "fuse.simsr", "simsr", "0:40"),
        MountPoint("/srv", "fuse.simsr", "simsr", "0:41"),
    ]  # fmt: skip


def test_the_tree_finds_only_what_is_there():
    tree = Tree(FakeSource(""))
    disk = f"{UUIDS['good']}.raw".encode()
    assert tree.look_up(ROOT, b"sr") == ("sr", "sr") and tree.look_up(("sr", "sr"), disk) == ("vdi", UUIDS["good"])
    for parent, name in (
        (ROOT, b"none"), (ROOT, b"\xff"), (("sr", "sr"), b"none.raw"), (("sr", "sr"), disk.removesuffix(b".raw")), (("sr", "gone"), disk),
        (("snapshots", "sr"), disk), (("vdi", UUIDS["good"]), b"x"), (("by-name", "sr"), disk),
    ):  # fmt: skip
        assert tree.look_up(parent, name) is None, (parent, name)
    for key in (("sr", "gone"), ("vdi", "gone"), ("link", "gone"), ("vdi.json", "gone"), ("sr.json", "gone"), ("what", "")):
        assert not tree.exists(key) and tree.attributes(key) is None and not list(tree.children(key)) and tree.text(key) is None


def test_every_child_is_found_by_its_name_and_can_be_described():
    tree = Tree(FakeSource(""))
    seen = [ROOT]
    for key in seen:
        for name, child in tree.children(key):
            assert tree.look_up(key, name.encode()) == child and tree.attributes(child).mode
            seen.append(child)
    assert {kind for kind, _ in seen} == {
        "root", "status", "status.json", "status-sr", "sr.json", "status-vdi", "vdi.json", "sr", "by-name", "link", "snapshots", "vdi",
    }  # fmt: skip


def test_sharing_gives_the_group_what_the_owner_has():
    source = FakeSource("")
    modes = {shared: oct(Tree(source, shared).attributes(("vdi", UUIDS["good"])).mode & 0o777) for shared in (False, True)}
    assert modes == {False: "0o600", True: "0o660"}

"""On which terms a VDI is served: the rules that let clients in, limits, and what becomes of them."""

from __future__ import annotations

import random

import pytest
from sr_kit import World

from simsr.errors import BadRequest
from simsr.sr.nbd_terms import NbdTerms

ALICE = {"uid": None, "address": "192.0.2.7", "subject": "alice"}
LOCAL = {"uid": 1000, "address": None, "subject": None}
NOBODY = {"uid": None, "address": None, "subject": None}


@pytest.mark.parametrize(
    ("rules", "who", "admitted"),
    [
        ([], NOBODY, True), ([], ALICE, True),
        (["uid:1000"], LOCAL, True), (["uid:1001"], LOCAL, False), (["uid:1000"], ALICE, False), (["uid:0"], NOBODY, False),
        (["cn:alice"], ALICE, True), (["cn:Alice"], ALICE, False), (["cn:alic"], ALICE, False), (["cn:alice"], LOCAL, False),
        (["addr:192.0.2.7"], ALICE, True), (["addr:192.0.2.0/24"], ALICE, True), (["addr:192.0.2.8"], ALICE, False),
        (["addr:0.0.0.0/0"], LOCAL, False), (["addr:::/0"], ALICE, False),
        (["uid:5", "cn:bob", "addr:192.0.2.7"], ALICE, True), (["uid:5", "cn:bob"], ALICE, False),
        (["addr:127.0.0.1"], {**NOBODY, "address": "::ffff:127.0.0.1"}, True),
        (["addr:fe80::/10"], {**NOBODY, "address": "fe80::1%eth0"}, True),
        (["cn:None"], NOBODY, False), (["cn:a:b"], {**NOBODY, "subject": "a:b"}, True),
    ],
)  # fmt: skip
def test_rules(rules, who, admitted):
    assert NbdTerms().changed(allow=tuple(rules)).allows(**who) is admitted


@pytest.mark.parametrize(
    "rule",
    ["", "alice", "uid:", "uid:root", "uid:-1", "uid:4294967296", "uid:١", "cn:", "cn:a\nb", "cn:\ud800", "addr:", "addr:localhost",
     "addr:1.2.3", "addr:10.0.0.1/8", "addr:10.0.0.0/33", "UID:1", "cn:" + "x" * 300, "user:1", "addr:::1%lo/128x"],
)  # fmt: skip
def test_rules_that_are_none(rule):
    with pytest.raises(BadRequest, match="allow rule"):
        NbdTerms().changed(allow=(rule,))


@pytest.mark.parametrize(
    "wrong", [{"connections_max": -1}, {"bytes_s": -5}, {"requests_s": 1 << 60}, {"durability": "never"}, {"allow": ("uid:1",) * 65}]
)
def test_terms_that_are_refused(wrong):
    with pytest.raises(BadRequest):
        NbdTerms().changed(**wrong)


def test_rules_are_kept_in_one_form_and_once():
    assert NbdTerms().changed(allow=("uid:007", "uid:7", "addr:10.0.0.1", "addr:10.0.0.1/32")).allow == ("uid:7", "addr:10.0.0.1/32")


def test_terms_are_kept_with_the_disk():
    world = World()
    disk = world.repository.create(1 << 20)
    assert NbdTerms.of(disk.volume.meta) == NbdTerms()
    world.repository.set_nbd_terms(disk, allow=("cn:alice",), bytes_s=7)
    world.repository.set_nbd_terms(disk, durability="each-write")
    wanted = NbdTerms(allow=("cn:alice",), bytes_s=7, durability="each-write")
    world.repository.store.flush()
    world.cut(random.Random(1))
    assert NbdTerms.of(world.repository.vdis[disk.uuid].volume.meta) == wanted


def test_what_is_made_from_a_disk_is_for_the_same_clients():
    repository = World().repository
    disk, open_disk = repository.create(1 << 20), repository.create(1 << 20)
    repository.set_nbd_terms(disk, allow=("cn:alice",))
    snapshot = repository.snapshot(disk)
    assert NbdTerms.of(snapshot.volume.meta).allow == NbdTerms.of(repository.clone(snapshot).volume.meta).allow == ("cn:alice",)
    assert NbdTerms.of(repository.snapshot(open_disk).volume.meta) == NbdTerms()
    repository.set_nbd_terms(disk, allow=("cn:bob",))
    repository.revert(snapshot)
    assert NbdTerms.of(disk.volume.meta).allow == ("cn:bob",) and NbdTerms.of(snapshot.volume.meta).allow == ("cn:alice",)


def test_nothing_is_written_when_nothing_changes():
    repository = World().repository
    disk = repository.create(1 << 20)
    repository.set_nbd_terms(disk, bytes_s=5)
    before = repository.store.log.seq
    repository.set_nbd_terms(disk, bytes_s=5)
    assert repository.store.log.seq == before


def test_terms_of_a_newer_simsr():
    assert NbdTerms.of({"nbd": {"allow": ["cn:x"], "moon": "full"}}) == NbdTerms(allow=("cn:x",))

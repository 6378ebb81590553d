"""`resolve`: uuid before name before the beginning of a uuid, and nothing is guessed."""

from dataclasses import dataclass

import pytest

from simsr.errors import Ambiguous, NotFound
from simsr.sr.lookup import PREFIX_MIN, resolve


@dataclass
class Thing:
    uuid: str
    name: str = ""


A = Thing("aaaa1111-0000-4000-8000-000000000001", "disk")
B = Thing("aaaa2222-0000-4000-8000-000000000002", "disk")
C = Thing("cccc3333-0000-4000-8000-000000000003", "aaaa")
D = Thing("dddd4444-0000-4000-8000-000000000004", A.uuid)
E = Thing("eeee5555-0000-4000-8000-000000000005", "Ünï/ cödé\n")
F = Thing("ffff6666-0000-4000-8000-000000000006", "")
ALL = [A, B, C, D, E, F]


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        (A.uuid, A),
        (A.uuid.upper(), A),
        ("aaaa1", A),
        ("AAAA2", B),
        ("aaaa", C),
        ("cccc", C),
        ("dddd4444-", D),
        ("Ünï/ cödé\n", E),
        ("ffff", F),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_meant(reference, meant, order):
    assert resolve(reference, "VDI", ALL[::order]) is meant


@pytest.mark.parametrize(
    "reference",
    ["", "ccc", "nothing", "AAAA3", " cccc", "disk ", "DISK", "\0", "\ud800", "%", "aaaa*", A.uuid + "0", "x" * 5000],
)
def test_not_found(reference):
    with pytest.raises(NotFound) as caught:
        resolve(reference, "VDI", ALL)
    assert caught.value.details == {"kind": "VDI", "name": reference}


def test_empty_repository():
    with pytest.raises(NotFound):
        resolve("disk", "SR", [])


@pytest.mark.parametrize("reference", ["disk", "aaaa"])
def test_ambiguous_says_what_is_meant(reference):
    with pytest.raises(Ambiguous) as caught:
        resolve(reference, "VDI", [A, B])
    assert A.uuid in str(caught.value) and B.uuid in str(caught.value)


def test_ambiguous_shows_no_more_than_five():
    many = [Thing(f"aaaa{number:04}-0000-4000-8000-000000000000") for number in range(9)]
    with pytest.raises(Ambiguous) as caught:
        resolve("aaaa", "VDI", many)
    assert caught.value.details["candidates"] == ", ".join(thing.uuid for thing in many[:5]) + " ..."


def test_a_prefix_has_a_least_length():
    assert PREFIX_MIN == 4
    assert resolve("aaaa"[:4], "VDI", [A]) is A
    with pytest.raises(NotFound):
        resolve("aaa", "VDI", [A])


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_that_a_disk_shares_with_its_snapshots_means_the_disk(order):
    snapshots = [Thing("aaaa1111-0000-4000-8000-000000000007", "disk"), Thing("aaaa1111-0000-4000-8000-000000000008", "disk")]
    for snapshot in snapshots:
        snapshot.is_a_snapshot = True
    assert resolve("disk", "VDI", [A, *snapshots][::order]) is A
    for things in (snapshots, [A, B, *snapshots]):
        with pytest.raises(Ambiguous):
            resolve("disk", "VDI", things)

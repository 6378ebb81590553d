"""File names for hostile names: safe, unique, stable."""

from __future__ import annotations

import random
import uuid

from fs_layout.names import Namer, file_name

HOSTILE = [
    "", ".", "..", "...", ".simsr", "/", "a/b", "../../etc/passwd", "\0", "a\0b", "\n", "\x1b[31mred", "\udcff", "x\udc80y", "\u202egnp",
    "ü" * 500, "x" * 500, "😀" * 100, " ", "-rf", "a~b", "snapshots", "by-name", "\ufeff", "\u2028",
]  # fmt: skip


def new_uuid(chance):
    return str(uuid.UUID(int=chance.getrandbits(128)))


def is_safe(name):
    encoded = name.encode()  # which is strict
    return 0 < len(encoded) <= 255 - len(".raw") and not name.startswith(".") and "/" not in name and name.isprintable()


def test_plain_names_stay_as_they_are():
    for name in ("main", "with space", "-rf", "Grüße", "a~b", "x" * 200, "v1.2", "sr.raw"):
        assert file_name(name, "u") == name


def test_hostile_names_are_made_safe_and_say_whose_they_are():
    uuid = "5e9ac0b1-0000-4000-8000-000000000001"
    for name in HOSTILE:
        made = file_name(name, uuid)
        assert is_safe(made), (name, made)
        assert made == name or made.endswith(f"~{uuid}")


def test_a_name_cannot_pass_for_one_that_was_changed():
    victim, attacker = "5e9ac0b1-0000-4000-8000-000000000001", "5e9ac0b1-0000-4000-8000-000000000002"
    taken = file_name("a/b", victim)
    assert taken == f"a_b~{victim}"
    assert file_name(taken, attacker) == f"{taken}~{attacker}"


def test_names_in_a_directory_are_unique_and_stay(seeds):
    for seed in seeds(50):
        chance = random.Random(seed)
        pool = [*HOSTILE, "one", "one", "two", "three"]
        things: dict[str, str] = {}
        namer, before = Namer(), {}
        for _ in range(60):
            if things and chance.random() < 0.4:
                gone = chance.choice(list(things))
                del things[gone]
            else:
                ident = new_uuid(chance)
                # Sometimes a name that was made from another one.
                things[ident] = chance.choice([*pool, *before]) if before else chance.choice(pool)
            given = namer.assign(things.items())
            assert set(given.values()) == set(things) and len(given) == len(things)
            assert all(is_safe(name) for name in given), given
            for name, ident in given.items():
                if before.get(ident, (None, None))[0] == things[ident]:
                    assert before[ident][1] == name
            before = {ident: (things[ident], name) for name, ident in given.items()}
            pool[-1:] = [chance.choice(list(given))] if given else []


def test_the_first_keeps_the_name_and_a_rename_changes_it():
    namer = Namer()
    assert namer.assign([("u1", "one"), ("u2", "one")]) == {"one": "u1", "one~u2": "u2"}
    assert namer.assign([("u2", "one")]) == {"one~u2": "u2"}
    assert namer.assign([("u2", "one"), ("u3", "one")]) == {"one": "u3", "one~u2": "u2"}
    assert namer.assign([("u2", "other"), ("u3", "one")]) == {"one": "u3", "other": "u2"}

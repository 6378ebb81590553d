"""The overlay: the store stays pristine whatever happens, readers see the damage, and both ways out of it work.

`Store` uses the overlay as a face must. The oracle is two byte arrays: what was written, and what should be seen.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_kit import KIB, MIB, S, Store, ask, engine

from scenarios import overlay as overlay_module
from scenarios.overlay import Layer, Overlay
from scenarios.patches import Patches
from scenarios.request import Effect

SIZE = 64 * KIB


def effect(kind, value=None, sticks_to="data"):
    return (Effect(kind, "r", sticks_to, value),)


@pytest.fixture
def store():
    store = Store(SIZE, Overlay("disk"))
    store.write(0, bytes(range(256)) * (SIZE // 256))
    return store


OLD = bytes(range(256))
NEW = b"N" * 256


class TestEachFault:
    def test_lost(self, store):
        store.write(256, NEW, effect("lose"))
        assert store.read(256, 256) == OLD and bytes(store.data[256:512]) == NEW

    def test_lost_for_a_while(self, store):
        store.write(0, NEW, effect("lose", 5 * S), now=S)
        assert store.read(0, 256, now=5 * S - 1) == OLD and store.read(0, 256, now=5 * S) == NEW
        assert store.overlay.is_quiet

    def test_torn(self, store):
        store.write(0, NEW, effect("torn", ((0, 64), (128, 192))))
        assert store.read(0, 256) == NEW[:64] + OLD[64:128] + NEW[:64] + OLD[192:]

    def test_flipped_on_the_way_in(self, store):
        store.write(0, NEW, effect("flip", (0, 9, 2047)))
        seen = store.read(0, 256)
        assert [bit for bit in range(2048) if (seen[bit // 8] ^ NEW[bit // 8]) >> bit % 8 & 1] == [0, 9, 2047]
        assert bytes(store.data[:256]) == NEW

    def test_flipped_on_the_way_out_is_seen_once(self, store):
        assert store.read(0, 256, effect("flip", (8,))) == bytes([0, 0]) + OLD[2:]
        assert store.read(0, 256) == OLD and store.overlay.is_quiet

    def test_torn_and_flipped(self, store):
        store.write(0, NEW, effect("torn", ((0, 128),)) + effect("flip", (0, 8 * 200)))
        seen = store.read(0, 256)
        assert seen[0] == ord("N") ^ 1 and seen[1:128] == NEW[1:128] and seen[200] == OLD[200] ^ 1 and seen[201:] == OLD[201:]

    def test_what_the_device_does_lies_over_what_is_wrong_with_the_data(self, store):
        store.write(0, NEW, effect("flip", (0,), "device"))
        store.overlay.data.patches.put(0, b"data" * 32, "r")
        assert store.read(0, 128) == bytes([ord("N") ^ 1]) + b"ata" + b"data" * 31
        store.write(512, NEW, effect("torn", ((0, 128),), "device") + effect("flip", (8 * 200,), "device"))
        assert store.read(512, 256)[200] == OLD[200] ^ 1, "what is flipped is what the torn write has left"

    def test_writes_that_are_too_large_to_remember_are_never_damaged(self, store, monkeypatch):
        monkeypatch.setattr(overlay_module, "EFFECT_BYTES_MAX", 255)
        for kind, value in (("flip", (0,)), ("lose", None), ("torn", ((0, 128),)), ("misdirect", 1024)):
            store.write(0, NEW, effect(kind, value))
            assert store.read(0, 256) == NEW and store.read(1024, 256) == OLD and store.overlay.is_quiet

    def test_misdirected_write_is_two_faults(self, store):
        store.write(0, NEW, effect("misdirect", 1024))
        assert store.read(0, 256) == OLD and store.read(1024, 256) == NEW
        assert bytes(store.data[:256]) == NEW and bytes(store.data[1024:1280]) == OLD

    def test_misdirected_over_itself(self, store):
        store.write(0, NEW * 2, effect("misdirect", 256))
        assert store.read(0, 768) == OLD + NEW * 2

    def test_misdirected_read(self, store):
        store.write(512, NEW)
        assert store.read(0, 256, effect("misdirect", 512)) == NEW

    def test_stale_read(self, store):
        store.overlay.keep_history(True)
        store.write(0, NEW)
        store.write(128, b"M" * 256)
        assert store.read(0, 512, effect("stale")) == OLD[:128] + NEW[:128] + OLD[:128] + OLD[128:]
        assert store.read(0, 512) == NEW[:128] + b"M" * 256 + OLD[128:]

    def test_history_is_bounded_and_forgets_the_oldest(self, store, monkeypatch):
        monkeypatch.setattr(overlay_module, "HISTORY_BYTES_MAX", 1024)
        store.overlay.keep_history(True)
        for number in range(20):
            store.write(256 * number, NEW)
        assert store.overlay._history.size_bytes <= 1024
        assert store.read(0, 256, effect("stale")) == NEW and store.read(256 * 19, 256, effect("stale")) == OLD

    def test_history_ends_with_the_rule_and_with_what_cannot_be_kept(self, store, monkeypatch):
        store.overlay.keep_history(True)
        store.write(0, NEW)
        monkeypatch.setattr(overlay_module, "EFFECT_BYTES_MAX", 100)
        store.write(0, b"M" * 128)
        assert store.read(0, 256, effect("stale")) == b"M" * 128 + OLD[128:]
        store.overlay.keep_history(False)
        assert store.overlay.is_quiet and store.read(128, 128, effect("stale")) == NEW[:128]

    def test_a_good_write_heals(self, store):
        store.write(0, NEW, effect("lose"))
        store.write(64, b"x" * 64)
        assert store.read(0, 256) == OLD[:64] + b"x" * 64 + OLD[128:]
        store.write(0, NEW)
        assert store.read(0, 256) == NEW and store.overlay.is_quiet

    def test_zeros(self, store):
        before = [bytes(store.data[:256])]
        store.data[:256] = bytes(256)
        store.overlay.wrote(0, 256, 0, effect("lose"), before)
        assert store.read(0, 256) == OLD
        store.overlay.wrote(0, 1 << 40, 0)
        assert store.overlay.is_quiet

    def test_a_lost_write_over_a_lost_write_shows_what_was_seen_before(self, store):
        store.write(0, NEW, effect("lose"))
        store.write(0, b"M" * 256, effect("lose"))
        assert store.read(0, 256) == OLD


class TestWaysOut:
    def damage(self, store):
        store.write(0, NEW, effect("lose"))
        store.write(512, NEW, effect("torn", ((0, 128),), "device"))
        store.write(1024, NEW, effect("misdirect", 4096))

    def test_heal(self, store):
        self.damage(store)
        store.overlay.heal(0)
        assert store.read(0, SIZE) == bytes(store.data) and store.overlay.is_quiet

    def test_make_permanent(self, store):
        self.damage(store)
        seen = store.read(0, SIZE)
        for offset, data in store.overlay.permanent(0):
            store.data[offset : offset + len(data)] = data
        store.overlay.heal(0)
        assert store.read(0, SIZE) == seen == bytes(store.data)

    def test_what_has_passed_is_not_made_permanent(self, store):
        store.write(0, NEW, effect("lose", S))
        assert [offset for offset, _ in store.overlay.permanent(S - 1)] == [0] and store.overlay.permanent(S) == []


class TestRevert:
    @pytest.mark.parametrize("sticks_to", ["data", "device"])
    def test_damage_after_the_snapshot(self, store, sticks_to):
        store.snapshot("s")
        store.write(0, NEW, effect("torn", ((0, 128),), sticks_to))
        store.revert("s")
        assert store.read(0, 256) == OLD if sticks_to == "data" else store.overlay.device.patches

    @pytest.mark.parametrize("sticks_to", ["data", "device"])
    def test_damage_before_the_snapshot_comes_back_with_the_data(self, store, sticks_to):
        store.write(0, NEW, effect("lose", None, sticks_to))
        store.snapshot("s")
        store.write(0, b"M" * 256)
        assert store.read(0, 256) == b"M" * 256
        store.revert("s")
        assert store.read(0, 256) == (OLD if sticks_to == "data" else NEW), "the device was healed by the write, and stays so"

    def test_a_snapshot_is_not_changed_by_what_comes_later(self, store):
        store.snapshot("s")
        store.write(0, NEW, effect("lose"))
        store.snapshot("t")
        store.revert("s")
        assert store.read(0, 256) == OLD and store.overlay.is_quiet
        store.revert("t")
        assert store.read(0, 256) == OLD and bytes(store.data[:256]) == NEW
        store.overlay.forget("t")
        store.overlay.revert("t")
        assert store.read(0, 256) == NEW, "without the snapshot's layer there is no damage"

    def test_clones_take_the_damage_of_the_data_only(self, store):
        store.write(0, NEW, effect("lose"))
        store.write(256, NEW, effect("lose", None, "device"))
        store.snapshot("s")
        clone = Store(SIZE, store.overlay.clone("s", "clone"))
        clone.data[:] = store.data
        assert clone.read(0, 512) == OLD + NEW
        clone.write(0, b"M" * 256)
        assert store.read(0, 512) == OLD + OLD, "each has its own from now on"

    def test_a_rule_that_is_told_of_again_keeps_what_it_remembers(self, store):
        store.overlay.keep_history(True)
        store.write(0, NEW)
        store.overlay.keep_history(True)
        assert store.read(0, 256, effect("stale")) == OLD

    def test_stale_reads_do_not_look_past_a_revert(self, store):
        store.overlay.keep_history(True)
        store.snapshot("s")
        store.write(0, NEW)
        store.revert("s")
        assert store.read(0, 256, effect("stale")) == OLD


class TestBadBlocks:
    TEXT = (
        '[[rule]]\nname = "bad"\nmatch = { op = ["read"], range = "0..8MiB" }\n'
        'trigger = { bad_blocks = RATE }\naction = { error = "EIO", heal_on_write = true }\n'
    )

    def disk(self, rate="0.05", more="", size=16 * MIB, key=None, text=None):
        many = engine((text or self.TEXT).replace("RATE", rate) + more)
        return many.disk("d", size, key=key)

    def bad(self, one, at=0):
        return [block for block in range(one.size_bytes // 4096) if ask(one, "read", 4096 * block, at=at).error]

    def test_places_are_fixed_and_in_the_range(self):
        bad = self.bad(self.disk())
        assert 60 < len(bad) < 145 and max(bad) < 2048
        one = self.disk()
        order = list(range(4096))
        random.Random(1).shuffle(order)
        assert sorted(block for block in order if ask(one, "read", 4096 * block).error) == bad
        assert self.bad(self.disk(key="other")) != bad

    def test_large_reads_meet_them(self):
        one = self.disk()
        bad = self.bad(one)
        for first in range(0, 4096, 64):
            assert bool(ask(one, "read", 4096 * first, 64 * 4096).error) == any(first <= block < first + 64 for block in bad)

    def test_writing_heals(self):
        one = self.disk()
        first, second, *_ = self.bad(one)
        one.overlay.wrote(4096 * first, bytes(4096), 0)
        assert self.bad(one)[0] == second
        one.overlay.wrote(4096 * second + 100, bytes(1), 0)
        assert second not in self.bad(one), "a part will do: the drive puts the block elsewhere"
        one.overlay.wrote(0, 16 * MIB, 0)
        assert self.bad(one) == []

    def test_or_it_does_not(self):
        one = self.disk(text=self.TEXT.replace(", heal_on_write = true", ""))
        bad = self.bad(one)
        one.overlay.wrote(0, 16 * MIB, 0)
        assert self.bad(one) == bad

    def test_a_list(self):
        one = self.disk("[3, 1, 100000]")
        assert self.bad(one) == [1, 3]
        one.overlay.wrote(4096, bytes(4096), 0)
        assert self.bad(one) == [3]
        one.overlay.heal(0)
        assert self.bad(one) == []

    def test_all_of_a_range(self):
        assert self.bad(self.disk("1.0", text=self.TEXT.replace("0..8MiB", "8KiB..20KiB"))) == [2, 3, 4]

    def test_heal_heals_what_is_bad_by_then(self):
        one = self.disk(text=self.TEXT.replace("bad_blocks = RATE", 'bad_blocks = 0.02, grows = "x2 per 60s"'))
        at_first, later = self.bad(one), self.bad(one, 120 * S)
        assert set(at_first) < set(later) and 3 < len(later) / len(at_first) < 5
        one.overlay.heal(60 * S)
        assert self.bad(one, 60 * S) == []
        again = self.bad(one, 120 * S)
        assert set(again) < set(later) and 0.35 < len(again) / len(later) < 0.65
        assert len(self.bad(one, 10**6 * S)) + 60 > 2048 - len(at_first) * 2, "in the end everything else is bad"

    @pytest.mark.parametrize("sticks_to, healed_after", [("device", True), ("data", False)])
    def test_revert(self, sticks_to, healed_after):
        one = self.disk(text=self.TEXT + f'sticks_to = "{sticks_to}"\n')
        bad = self.bad(one)
        one.overlay.snapshot("s")
        one.overlay.wrote(4096 * bad[0], bytes(4096), 0)
        assert bad[0] not in self.bad(one)
        one.overlay.revert("s")
        assert (bad[0] not in self.bad(one)) is healed_after

    def test_only_the_device_of_a_clone_is_another(self):
        for sticks_to in ("device", "data"):
            one = self.disk(text=self.TEXT + f'sticks_to = "{sticks_to}"\n')
            one.overlay.snapshot("s")
            clone = one._engine.disk("clone", 16 * MIB)
            clone.overlay.data.become(one.overlay.clone("s", "clone").data)
            assert (self.bad(clone) == self.bad(one)) is (sticks_to == "data")


class TestRot:
    TEXT = '[[rule]]\nmatch = { op = "read" }\ntrigger = { bits = RATE, per = "byte-at-rest" }\naction = { flip = 1 }\n'

    def disk(self, rate="1e-5", size=16 * MIB):
        return engine(self.TEXT.replace("RATE", rate)).disk("d", size)

    def rotten(self, one, length=4096):
        """Bits flipped in reads of the whole disk."""
        found = []
        for offset in range(0, one.size_bytes, length):
            for effect in ask(one, "read", offset, length).effects:
                assert effect.kind == "flip" and effect.sticks_to == "data"
                found += [8 * offset + bit for bit in effect.value]
        return found

    def test_as_often_as_said(self):
        found = self.rotten(self.disk())
        assert 110 < len(found) < 220, "168 of 16 Mi bytes"

    @pytest.mark.parametrize("length", [512, 1000, 65536, 16 * MIB])
    def test_the_same_whatever_is_read(self, length):
        assert self.rotten(self.disk(), length) == self.rotten(self.disk())

    def test_rewriting_the_byte_heals_it_and_nothing_else(self):
        one = self.disk()
        bit, *others = self.rotten(one)
        one.overlay.wrote(bit // 8 + 1, bytes(1), 0)
        assert self.rotten(one)[0] == bit
        one.overlay.wrote(bit // 8, bytes(1), 0)
        assert self.rotten(one) == others

    def test_it_goes_back_with_the_data(self):
        one = self.disk()
        found = self.rotten(one)
        one.overlay.snapshot("s")
        one.overlay.wrote(0, one.size_bytes, 0)
        assert self.rotten(one) == []
        one.overlay.revert("s")
        assert self.rotten(one) == found

    def test_all_of_it_for_making_it_permanent(self):
        one = self.disk()
        assert one.overlay.rotten_bits(0) == self.rotten(one)
        one.overlay.heal(0)
        assert self.rotten(one) == [] == one.overlay.rotten_bits(0)


def test_rules_without_damage_leave_the_overlay_quiet():
    for sticks_to in ("data", "device"):
        damaged = Overlay("disk")
        damaged.layer(sticks_to).patches.put(0, b"x", "r")
        assert not damaged.is_quiet
    assert not engine(TestBadBlocks.TEXT.replace("RATE", "0.05")).disk("d", MIB).overlay.is_quiet, "blocks are healed by writes"
    assert engine('[[rule]]\naction = { delay = "1ms" }\n').disk("d", MIB).overlay.is_quiet
    assert not engine("[[rule]]\naction = { stale = true }\n").disk("d", MIB).overlay.is_quiet


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 30), st.booleans()), max_size=40))
@settings(derandomize=True, database=None, max_examples=300, deadline=None)
def test_patches_against_an_array(steps):
    """Putting and cutting pieces, held against one cell for each byte."""
    patches, cells = Patches(), [None] * 140
    for number, (offset, length, puts) in enumerate(steps):
        if puts:
            patches.put(offset, bytes([number]) * length, "r")
        else:
            patches.cut(offset, length)
        cells[offset : offset + length] = [number if puts else None] * length
        patches._check()
        view = bytearray(b"\xff" * 140)
        assert patches.show(0, memoryview(view), 0) == any(cell is not None for cell in cells)
        assert [None if byte == 255 else byte for byte in view] == cells
        part = bytearray(b"\xff" * 20)
        patches.show(offset, memoryview(part), 0)
        assert [None if byte == 255 else byte for byte in part] == cells[offset : offset + 20]
    copy = patches.copy()
    patches.clear()
    assert copy.size_bytes == sum(cell is not None for cell in cells) and not patches.size_bytes


def test_random_histories_against_a_model(seeds):
    """Any mixture of faults, snapshots, reverts: the store holds what was written, readers see what the model says."""
    for seed in seeds(40):
        rng = random.Random(seed)
        store = Store(4096, Overlay("d"))
        written, seen = bytearray(4096), bytearray(4096)
        snapshots = {}
        for step in range(60):
            kind = rng.choice(["good", "good", "lose", "torn", "misdirect", "flip", "snapshot", "revert", "heal"])
            offset, length = rng.randrange(4000), rng.randrange(1, 96)
            data = rng.randbytes(length)
            if kind == "snapshot":
                store.snapshot(str(step))
                snapshots[str(step)] = bytes(written), bytes(seen)
            elif kind == "revert":
                if snapshots:
                    name = rng.choice(sorted(snapshots))
                    store.revert(name)
                    written[:], seen[:] = snapshots[name]
            elif kind == "heal":
                store.overlay.heal(0)
                seen[:] = written
            else:
                value, shown = None, data
                old = bytes(seen[offset : offset + length])
                if kind == "torn":
                    cut = rng.randrange(1, length + 1)
                    value, shown = ((0, cut),), data[:cut] + old[cut:]
                elif kind == "flip":
                    bit = rng.randrange(8 * length)
                    value, shown = (bit,), bytearray(data)
                    shown[bit // 8] ^= 1 << bit % 8
                elif kind in ("lose", "misdirect"):
                    shown = old
                if kind == "misdirect":
                    value = rng.randrange(4096 - length)
                store.write(offset, data, () if kind == "good" else effect(kind, value))
                written[offset : offset + length] = data
                seen[offset : offset + length] = shown
                if kind == "misdirect":
                    seen[value : value + length] = data
            assert bytes(store.data) == written, (seed, step)
            assert store.read(0, 4096) == seen, (seed, step, kind)


def test_layers_keep_their_places_apart():
    layer = Layer("a")
    layer.healed["r"], layer.healed_rate["r"] = {1}, 0.25
    copy = layer.frozen()
    layer.healed["r"].add(2)
    layer.healed_rate["r"] = 0.5
    assert copy.healed == {"r": {1}} and copy.healed_rate == {"r": 0.25}
    layer.become(copy)
    assert layer.healed_rate == {"r": 0.25}, "what was healed before a snapshot is healed after a revert to it"

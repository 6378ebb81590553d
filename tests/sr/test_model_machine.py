"""The model against plain dicts: hypothesis invents histories, every state and every survivor of a crash is compared.

The oracle (`Oracle`) keeps, for each record of the log, what the SR must show if the log ends there. After the death of
the process all that was done must be there; after a power cut some prefix of the log that is not shorter than what was
flushed (docs/durability.md). A write that took several records may have survived in part, block by block.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from sr_kit import BLOCK, STYLES, World, check, content
from test_drafts import build

from simsr.errors import NoCbt, NotASnapshot, NotFound, ShrinkRefused, SnapshotOfOther, VdiInUse, VdiReadOnly, WrongKind
from simsr.sr import boot
from simsr.sr.drafts import Destruction

SIZES = st.integers(1, 12 * 8).map(lambda sectors: sectors * 512)
VDIS_MAX = 12


@dataclass(frozen=True)
class Held:
    """One VDI as it must be."""

    content: bytes
    meta: tuple  # sorted items of what `Vdi.describe` says, without what follows from the content and from attachments
    family: str
    base: bytes | None = None  # of a disk with on_boot=reset
    destroyed: bool = False  # its data; ``content`` is what it was
    undo: tuple = ()  # what takes back the last operations: (content or None if it stays, ((uuid, Held or None), ...) of snapshots)
    redo: tuple = ()

    def get(self, field: str):
        return dict(self.meta)[field]

    @property
    def writable(self) -> bool:
        return not (self.get("is_a_snapshot") or self.get("read_only"))

    def with_meta(self, **changes) -> Held:
        return replace(self, meta=freeze(dict(self.meta) | changes))

    def described(self) -> dict:
        blocks = range(0, len(self.content), BLOCK)
        mapped = sum(any(self.content[at : at + BLOCK]) for at in blocks) * BLOCK
        meta = dict(self.meta)
        read_only = meta["read_only"] or meta["is_a_snapshot"]
        return {**meta, "sm_config": dict(meta["sm_config"]), "read_only": read_only, "size_bytes": len(self.content),
                "physical_utilisation_bytes": mapped}  # fmt: skip


def freeze(meta: dict) -> tuple:
    return tuple(sorted({**meta, "sm_config": tuple(sorted(dict(meta["sm_config"]).items()))}.items()))


State = dict[str, Held]


class ModelMachine(RuleBasedStateMachine):
    """Rules are the operations; each brings the oracle up to date and remembers the state at the end of the log."""

    @initialize()
    def begin(self):
        self.world = World()
        self.state: State = {}
        self.attached: dict[str, dict[str, bool]] = {}
        self.history: list[tuple[int, State, Sequence[bytes]]] = [(self.log.seq, {}, ())]
        for tag in (1, 2):  # something to begin with, or most histories would be over before they get interesting
            disk = self.make(4 * BLOCK + tag * 512, f"disk {tag}", False)
            self.write_to(disk, tag, 3)
            self.descend_from(disk, True)
            self.write_to(disk, tag + 10, 1)

    @property
    def sr(self):
        return self.world.repository

    @property
    def log(self):
        return self.world.log

    def remember(self, between: Sequence[bytes] = ()):
        """Note the state at the end of the log; ``between``: what the one disk that changed held on the way here."""
        self.history.append((self.log.seq, dict(self.state), between))

    def pick(self, data, uuids, label):
        """One of ``uuids``, in an order that does not depend on their digits."""
        return data.draw(st.sampled_from([uuid for uuid in self.state if uuid in set(uuids)]), label=label)

    def any_vdi(self, data):
        return self.pick(data, self.state, "VDI")

    def refused(self, error, act):
        seq = self.log.seq
        with pytest.raises(error):
            act()
        assert self.log.seq == seq

    # VDIs.

    def added(self, vdi, held_content, family, **meta):
        described = vdi.describe()
        fixed = {key: described[key] for key in ("uuid", "location", "sr", "created_time", "snapshot_time")}
        defaults = {"managed": True, "sharable": False, "read_only": False, "is_a_snapshot": False, "is_a_tip": False, "snapshot_of": None,
                    "on_boot": "persist", "cbt_enabled": False}  # fmt: skip
        assert fixed["uuid"] == fixed["location"] == vdi.uuid not in self.state
        self.state[vdi.uuid] = Held(held_content, freeze({**defaults, **fixed, **meta}), family or vdi.uuid)
        self.remember()

    @precondition(lambda self: len(self.state) < VDIS_MAX)
    @rule(size_bytes=SIZES, name=st.text(max_size=5).filter(lambda text: "\0" not in text), flags=st.booleans())
    def create(self, size_bytes, name, flags):
        self.make(size_bytes, name, flags)

    def make(self, size_bytes, name, flags):
        meta = {"name": name, "description": name[::-1], "type": "system", "sharable": flags, "sm_config": {"n": name}}
        vdi = self.sr.create(size_bytes - 7, **meta)
        self.added(vdi, bytes(size_bytes), None, **meta)
        return vdi.uuid

    @precondition(lambda self: self.state and len(self.state) < VDIS_MAX)
    @rule(data=st.data(), is_snapshot=st.booleans())
    def descend(self, data, is_snapshot):
        self.descend_from(self.any_vdi(data), is_snapshot)

    def descend_from(self, source, is_snapshot):
        held = self.state[source]
        if held.destroyed:
            return self.refused(WrongKind, lambda: self.sr.snapshot(self.sr.get(source)))
        vdi = (self.sr.snapshot if is_snapshot else self.sr.clone)(self.sr.get(source))
        kept = {key: held.get(key) for key in ("name", "description", "type", "sm_config")}
        kept["cbt_enabled"] = is_snapshot and held.get("cbt_enabled")
        self.added(vdi, held.content, held.family, **kept, is_a_snapshot=is_snapshot, snapshot_of=source if is_snapshot else None)

    @precondition(lambda self: self.state)
    @rule(data=st.data())
    def delete(self, data):
        self.delete_any(data)

    def delete_any(self, data):
        uuid = self.any_vdi(data)
        if self.attached.get(uuid):
            return self.refused(VdiInUse, lambda: self.sr.delete(self.sr.get(uuid)))
        self.sr.delete(self.sr.get(uuid))
        del self.state[uuid]
        self.remember()

    @precondition(lambda self: self.state)
    @rule(data=st.data(), size_bytes=SIZES)
    def resize(self, data, size_bytes):
        uuid = self.any_vdi(data)
        held = self.state[uuid]
        act = lambda: self.sr.resize(self.sr.get(uuid), size_bytes)
        if not held.writable:
            self.refused(WrongKind if held.destroyed else VdiReadOnly, act)
        elif size_bytes < len(held.content):
            self.refused(ShrinkRefused, act)
        else:
            self.grow(uuid, size_bytes)

    def grow(self, uuid, size_bytes):
        self.sr.resize(self.sr.get(uuid), size_bytes)
        held = self.state[uuid]
        base = None if held.base is None else held.base.ljust(size_bytes, b"\0")
        self.state[uuid] = replace(held, content=held.content.ljust(size_bytes, b"\0"), base=base)
        self.remember()

    @precondition(lambda self: self.state)
    @rule(data=st.data(), text=st.text("abc/ä", max_size=3), flag=st.booleans(),
          field=st.sampled_from(["name", "description", "sm_config", "managed", "read_only", "sharable"]))  # fmt: skip
    def update(self, data, field, text, flag):
        uuid = self.any_vdi(data)
        held = self.state[uuid]
        value = text if field in ("name", "description") else {"k": text} if field == "sm_config" else flag
        act = lambda: self.sr.update(self.sr.get(uuid), **{field: value})
        users = self.attached.get(uuid, {})
        if field == "read_only" and flag and held.writable and users:
            return self.refused(VdiInUse, act)
        if field == "sharable" and not flag and len(users) > 1 and any(users.values()):
            return self.refused(VdiInUse, act)
        act()
        self.state[uuid] = held.with_meta(**{field: value})
        self.remember()

    # Content.

    def writable(self):
        return [uuid for uuid, held in self.state.items() if held.writable]

    def changed(self, uuid, offset, piece):
        held = self.state[uuid]
        self.state[uuid] = replace(held, content=held.content[:offset] + piece + held.content[offset + len(piece) :])

    @precondition(lambda self: self.writable())
    @rule(data=st.data(), tag=st.integers(0, 1 << 16), count=st.integers(1, 4))
    def write(self, data, tag, count):
        self.write_to(self.pick(data, self.writable(), "disk"), tag, count)

    def write_to(self, uuid, tag, count):
        size_bytes = len(self.state[uuid].content)
        rng = random.Random(tag)
        batch, between = [], []
        for _ in range(count):
            offset = rng.randrange(size_bytes)
            length = min(size_bytes - offset, rng.choice((1, 512, BLOCK, 2 * BLOCK, 11 * BLOCK)))
            if rng.random() < 0.7:
                offset &= -BLOCK
                length = min(size_bytes - offset, max(BLOCK, length & -BLOCK))
            piece = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
            batch.append((offset, length, memoryview(piece)))
            self.changed(uuid, offset, piece)
            between.append(self.state[uuid].content)
        assert self.sr.get(uuid).volume.write(batch) == count
        self.remember(between)

    @precondition(lambda self: self.writable())
    @rule(data=st.data(), aligned=st.booleans())
    def zero_or_discard(self, data, aligned):
        uuid = self.pick(data, self.writable(), "disk")
        size_bytes = len(self.state[uuid].content)
        offset = data.draw(st.integers(0, size_bytes - 1), label="offset") & (-BLOCK if aligned else -1)
        length = data.draw(st.integers(0, size_bytes - offset), label="length") & (-BLOCK if aligned else -1)
        assert self.sr.get(uuid).volume.write([(offset, length, None)]) == 1
        self.changed(uuid, offset, bytes(length))
        self.remember()

    # Revert.

    @precondition(lambda self: any(held.get("is_a_snapshot") for held in self.state.values()))
    @rule(data=st.data(), explicit=st.integers(0, 3), dirty=st.integers(0, 1 << 16), grow=st.integers(0, 3))
    def revert(self, data, explicit, dirty, grow):
        snapshot = self.pick(data, [uuid for uuid, held in self.state.items() if held.get("is_a_snapshot")], "snapshot")
        source = self.state[snapshot]
        target = self.any_vdi(data) if not explicit else source.get("snapshot_of")
        act = lambda: self.sr.revert(self.sr.get(snapshot), target if not explicit else None)
        if source.destroyed:
            return self.refused(WrongKind, act)
        if target not in self.state:
            return self.refused(NotFound, act)
        held = self.state[target]
        if target != source.get("snapshot_of") and (held.family != source.family or held.get("is_a_snapshot")):
            return self.refused(SnapshotOfOther, act)
        if self.attached.get(target):
            return self.refused(VdiInUse, act)
        if dirty and held.writable:
            if not grow:
                self.grow(target, len(held.content) + 3 * BLOCK + 512)
            self.write_to(target, dirty, 1)
            held = self.state[target]
        seq = self.log.seq
        done = act()
        assert done.vdi.uuid == target
        assert done.size_changed == (len(held.content) != len(source.content))
        assert done.changed or held.content == source.content
        moved_base = held.base is not None and not done.changed
        assert self.log.seq - seq == done.changed or (moved_base and self.log.seq - seq == 1)
        steps = {"undo": (*held.undo, (held.content, ())), "redo": ()} if done.changed else {}
        self.state[target] = replace(held, content=source.content, base=None if held.base is None else source.content, **steps)
        self.remember()
        again = self.log.seq
        assert not act().changed and self.log.seq == again

    @precondition(lambda self: self.writable())
    @rule(data=st.data())
    def revert_to_a_leaf(self, data):
        leaf = self.sr.get(self.pick(data, self.writable(), "disk"))
        self.refused(NotASnapshot, lambda: self.sr.revert(leaf))

    # Epochs and changed blocks.

    @precondition(lambda self: self.writable())
    @rule(data=st.data(), mode=st.sampled_from(["reset", "reset", "persist"]))
    def set_on_boot(self, data, mode):
        uuid = self.pick(data, self.writable(), "disk")
        held = self.state[uuid]
        act = lambda: self.sr.update(self.sr.get(uuid), on_boot=mode)
        if held.get("on_boot") == mode:
            seq = self.log.seq
            act()
            assert self.log.seq == seq
        elif held.get("cbt_enabled"):
            self.refused(WrongKind, act)
        elif self.attached.get(uuid):
            self.refused(VdiInUse, act)
        else:
            act()
            held = held.with_meta(on_boot=mode)
            self.state[uuid] = replace(held, base=held.content if mode == "reset" else None)
            self.remember()

    @precondition(lambda self: any(held.base is not None for held in self.state.values()))
    @rule(data=st.data(), tag=st.integers(0, 1 << 16))
    def begin_epoch(self, data, tag):
        uuid = self.pick(data, [uuid for uuid, held in self.state.items() if held.base is not None], "disk")
        act = lambda: self.sr.begin_epoch(self.sr.get(uuid))
        if self.attached.get(uuid):
            return self.refused(VdiInUse, act)
        if tag % 2 and self.state[uuid].writable:
            self.write_to(uuid, tag, 2)
        held = self.state[uuid]
        assert act() or held.content == held.base
        self.state[uuid] = replace(held, content=held.base)
        self.remember()

    @precondition(lambda self: self.state)
    @rule(data=st.data(), enabled=st.sampled_from([True, True, False]))
    def set_cbt(self, data, enabled):
        uuid = self.any_vdi(data)
        held = self.state[uuid]
        act = lambda: self.sr.set_cbt(self.sr.get(uuid), enabled)
        if held.get("cbt_enabled") != enabled and (held.get("is_a_snapshot") or held.base is not None):
            return self.refused(WrongKind, act)
        act()
        self.state[uuid] = held.with_meta(cbt_enabled=enabled)
        self.remember()

    @precondition(lambda self: any(held.get("is_a_snapshot") for held in self.state.values()))
    @rule(data=st.data())
    def destroy_data(self, data):
        uuid = self.pick(data, [uuid for uuid, held in self.state.items() if held.get("is_a_snapshot")], "snapshot")
        held, begin = self.state[uuid], lambda: Destruction(self.sr, self.sr.get(uuid))
        if held.destroyed or not held.get("cbt_enabled"):
            return self.refused(WrongKind if held.destroyed else NoCbt, begin)
        if self.attached.get(uuid):
            return self.refused(VdiInUse, begin)
        draft = begin()
        self.remember()
        build(draft, self.remember)
        self.remember()
        draft.finish()
        self.state[uuid] = replace(held.with_meta(type="cbt_metadata"), destroyed=True)
        self.remember()

    # Use.

    @precondition(lambda self: self.state)
    @rule(data=st.data(), client=st.sampled_from("xy"), writable=st.booleans())
    def attach(self, data, client, writable):
        uuid = self.any_vdi(data)
        held, users = self.state[uuid], self.attached.setdefault(uuid, {})
        act = lambda: self.sr.attach(self.sr.get(uuid), client, client, writable, "attach")
        others = [mode for other, mode in users.items() if other != client]
        if held.destroyed or (writable and not held.writable):
            self.refused(WrongKind if held.destroyed else VdiReadOnly, act)
        elif not held.get("sharable") and others and (writable or any(others)):
            self.refused(VdiInUse, act)
        else:
            act()
            users[client] = writable

    @precondition(lambda self: any(self.attached.values()))
    @rule(data=st.data())
    def detach(self, data):
        uuid = self.pick(data, [uuid for uuid, users in self.attached.items() if users], "VDI")
        client = data.draw(st.sampled_from(sorted(self.attached[uuid])), label="client")
        self.sr.detach(self.sr.get(uuid), client)
        del self.attached[uuid][client]

    # The store below.

    @rule(what=st.sampled_from(["flush", "flush", "checkpoint", "reap"]))
    def upkeep(self, what):
        getattr(self.sr.store, what)()
        self.remember()

    @rule(cleanly=st.booleans())
    def restart(self, cleanly):
        """Nothing is lost when the process ends, one way or the other."""
        seq = self.log.seq
        self.world.reopen() if cleanly else self.world.kill()
        assert self.log.seq - seq in (0, int(cleanly))  # the mark that the flush of a clean end leaves
        self.opened()

    @rule(seed=st.integers(0, 1 << 16), style=st.sampled_from(STYLES))
    def cut(self, seed, style):
        durable, last = self.log.durable_seq, self.log.seq
        self.world.cut(random.Random(seed), style)
        seq = self.log.seq
        assert durable <= seq <= last
        note(f"records up to {seq} of {last} survived, {durable} were durable")
        index = max(index for index, (end, *_) in enumerate(self.history) if end <= seq)
        end, state, _ = self.history[index]
        self.state = dict(state)
        if end < seq:
            self.part_of_a_write(*self.history[index + 1][1:])
        self.opened()

    def part_of_a_write(self, after: State, between: Sequence[bytes]):
        """The log ends within a write: each of its blocks is as it was at some point of it."""
        for uuid, held in self.state.items():
            if held.destroyed:
                continue
            now = content(self.sr.get(uuid))
            versions = [held.content] if after[uuid] == held else [held.content, *between, after[uuid].content]
            assert len(now) == len(held.content)
            for at in range(0, len(now), BLOCK):
                assert now[at : at + BLOCK] in [version[at : at + BLOCK] for version in versions]
            self.state[uuid] = replace(held, content=now)

    def opened(self):
        self.attached = {}
        self.history = [(self.log.seq, dict(self.state), ())]

    # What must hold after each step.

    @invariant()
    def agree(self):
        sr = self.sr
        check(sr)
        assert set(sr.vdis) == set(self.state)
        for uuid, held in self.state.items():
            vdi = sr.get(uuid)
            assert held.destroyed or content(vdi) == held.content, f"the content of {uuid} differs"
            bases = [sr.store.volumes[ident] for ident in boot.bases(vdi)]
            assert [base.read_bytes(0, base.size_bytes) for base in bases] == ([] if held.base is None else [held.base])
            described = vdi.describe()
            users = {a["client"]: a["writable"] for a in described.pop("attached")}
            assert users == self.attached.get(uuid, {})
            assert described.pop("family") == held.family
            wanted = held.described()
            if held.destroyed:
                del described["physical_utilisation_bytes"], wanted["physical_utilisation_bytes"]
            assert described == wanted


def test_model(request):
    effort = request.config.getoption("--effort")
    run_state_machine_as_test(
        ModelMachine,
        settings=settings(
            max_examples=max(1, round(150 * effort)), stateful_step_count=60, deadline=None, derandomize=True, database=None,
            print_blob=True, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip

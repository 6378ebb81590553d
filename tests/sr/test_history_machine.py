"""The model's state machine with the operations of histories: every mode, undo, redo, tips. The oracle is that of test_model_machine; what
takes an operation back is noted with the disk, so that it survives crashes as far as the log does.
"""

from __future__ import annotations

from dataclasses import replace

from history_kit import tips
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from sr_kit import content
from test_model_machine import ModelMachine, freeze

from simsr.errors import NothingToUndo, TipExpired, VdiInUse
from simsr.sr.history import Wish


class HistoryMachine(ModelMachine):
    """``shrunk``: disks whose entries may have gone because a node that they need was deleted, or a tip followed."""

    @initialize()
    def begin(self):
        super().begin()
        self.shrunk: set[str] = set()
        self.sr.update_self(tips_max=1000)
        self.remember()

    def snapshots(self):
        """Those that have data, and whose disk is there and is a disk."""
        found = [uuid for uuid, held in self.state.items() if held.get("is_a_snapshot") and not held.destroyed]
        return [uuid for uuid in found if self.disk_of(uuid) is not None]

    def disk_of(self, snapshot):
        disk = self.state[snapshot].get("snapshot_of")
        return disk if disk in self.state and not self.state[disk].get("is_a_snapshot") else None

    @precondition(lambda self: self.state)
    @rule(data=st.data())
    def delete(self, data):
        self.shrunk |= {uuid for uuid, held in self.state.items() if held.undo or held.redo}
        self.delete_any(data)

    @precondition(lambda self: self.snapshots())
    @rule(data=st.data(), mode=st.sampled_from(["reset", "reset", "commit"]), discard=st.booleans(), prune=st.integers(0, 4), tag=st.integers(0, 1 << 16))
    def operate(self, data, mode, discard, prune, tag):
        node = self.pick(data, self.snapshots(), "snapshot")
        disk = self.disk_of(node)
        if self.state[disk].writable and tag % 3:
            self.write_to(disk, tag, 1)
        held, source = self.state[disk], self.state[node]
        wish = self.sr.wishes.one(self.sr.get(node), mode, discard=discard, prune=not prune)
        act = lambda: self.sr.history.carry_out([wish])[0]
        if mode == "reset" and self.attached.get(disk) or (self.attached.get(node) and discard):
            return self.refused(VdiInUse, act)
        seq = self.log.seq
        try:
            done = act()
        except VdiInUse:  # a node that would have to change, or go
            assert any(self.attached.values()) and self.log.seq == seq
            return
        assert self.log.seq - seq <= 1
        if not done.changed:
            assert (held.content == source.content) and not done.removed
            if held.base is not None and mode == "reset":
                self.state[disk] = replace(held, base=source.content)
            self.remember()
            return
        going = {uuid for uuid in done.removed if uuid in self.state}
        assert all(self.state[uuid].get("is_a_snapshot") and self.state[uuid].get("snapshot_of") == disk for uuid in going)
        assert (node in going) == discard or (mode == "reset" and node in going and discard)
        back = tuple((uuid, self.state[uuid]) for uuid in going)
        new = held
        if mode == "reset":
            new = replace(held, content=source.content, base=None if held.base is None else source.content)
        elif not discard:
            back += ((node, source),)
            time, cbt = self.sr.get(node).describe()["snapshot_time"], source.get("cbt_enabled") or held.get("cbt_enabled")
            self.state[node] = replace(source.with_meta(snapshot_time=time, cbt_enabled=cbt), content=held.content)
        self.left(disk, held, done)
        for uuid in going:
            del self.state[uuid]
        step = (held.content if mode == "reset" else None, back)
        self.state[disk] = replace(new, undo=(*held.undo, step), redo=())
        self.remember()

    def left(self, disk, held, done):
        """What the head was is in the tip that was made for it."""
        if done.tip is not None:
            assert content(self.sr.tips[done.tip]) == held.content

    @precondition(lambda self: any(held.undo or held.redo for held in self.state.values()))
    @rule(data=st.data(), forward=st.booleans())
    def take_back(self, data, forward):
        this, other = ("redo", "undo") if forward else ("undo", "redo")
        able = [uuid for uuid, held in self.state.items() if getattr(held, this)]
        if not able:
            return
        disk = self.pick(data, able, "disk")
        held = self.state[disk]
        act = lambda: self.sr.history.carry_out([Wish(self.sr.get(disk), this)])[0]
        if self.attached.get(disk):
            return self.refused(VdiInUse, act)
        seq = self.log.seq
        try:
            done = act()
        except (NothingToUndo, TipExpired):
            assert disk in self.shrunk and self.log.seq == seq
            self.state[disk] = replace(held, **{this: ()})
            self.history[-1] = (self.history[-1][0], dict(self.state), self.history[-1][2])
            return
        except VdiInUse:
            assert any(self.attached.values()) and self.log.seq == seq
            return
        assert done.changed and self.log.seq == seq + 1
        *rest, (old, back) = getattr(held, this)
        inverse = (None if old is None else held.content, tuple((uuid, self.state.get(uuid)) for uuid, _ in back))
        self.left(disk, held, done)
        for uuid, then in back:
            if then is None:
                self.state.pop(uuid, None)
            elif uuid in self.sr.vdis or disk not in self.shrunk:
                self.state[uuid] = then
        if old is not None:
            held = replace(held, content=old, base=None if held.base is None else old)
        self.state[disk] = replace(held, **{this: tuple(rest), other: (*getattr(held, other), inverse)})
        self.remember()

    def live_tips(self):
        return [tip for uuid in self.state for tip in tips(self.sr, self.sr.get(uuid))]

    @precondition(lambda self: self.live_tips())
    @rule(data=st.data(), what=st.sampled_from(["follow", "follow", "pin", "delete"]))
    def use_tip(self, data, what):
        found = self.live_tips()
        tip = found[data.draw(st.integers(0, len(found) - 1), label="tip")]
        disk, was = tip.snapshot_of, content(tip)
        self.shrunk.add(disk)
        if what == "delete":
            self.sr.delete(tip)
        elif what == "pin":
            vdi = self.sr.pin(tip, name="pinned")
            meta = vdi.describe()
            for key in ("attached", "size_bytes", "physical_utilisation_bytes", "family"):
                del meta[key]
            self.state[vdi.uuid] = replace(self.state[disk], content=was, meta=freeze({**meta, "read_only": False}), base=None, undo=(), redo=())
        else:
            held = self.state[disk]
            act = lambda: self.sr.history.carry_out([self.sr.wishes.one(tip, "follow")])[0]
            if self.attached.get(disk):
                return self.refused(VdiInUse, act)
            self.left(disk, held, act())
            step = (held.content, ())
            self.state[disk] = replace(held, content=was, base=None if held.base is None else was, undo=(*held.undo, step), redo=())
        self.remember()

    @invariant()
    def nothing_is_lost(self):
        """Tips have a disk, and none is made for what a node holds already."""
        assert all(tip.snapshot_of in self.state for tip in self.sr.tips.values())


def test_history(request):
    effort = request.config.getoption("--effort")
    run_state_machine_as_test(
        HistoryMachine,
        settings=settings(
            max_examples=max(1, round(80 * effort)), stateful_step_count=50, deadline=None, derandomize=True, database=None,
            print_blob=True, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip

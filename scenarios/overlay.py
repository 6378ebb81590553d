"""Damage beside the data: what a disk shows instead of what is stored, so that faults never harm the store.

The store always holds what the client wrote. Torn, lost, misdirected and stale writes are pieces laid over it (a misdirected
write is two: the new data where they went, the old ones where they should have gone). `heal` takes the pieces away and
the disk is what it should be; `make_permanent` hands them out to be written into the store.

Damage lies in one of two layers. What a revert does to it is the difference: the *data* layer goes back with the data,
the *device* layer stays. A reader sees device over data over store.

Who carries out a write does, in this order: read what `before` asks for from the store; write to the store; call `wrote`.
Who carries out a read does: read from `source` of the store; call `show` with what was read. While `is_quiet`, a plan without
effects needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from scenarios.patches import Patches
from scenarios.request import Effect

if TYPE_CHECKING:
    from scenarios.media import Media

__all__ = ["Overlay", "Layer", "HISTORY_BYTES_MAX", "EFFECT_BYTES_MAX"]

HISTORY_BYTES_MAX = 64 << 20
"""Old data kept for stale reads; beyond it the oldest are forgotten and reads of them are not stale."""

EFFECT_BYTES_MAX = 32 << 20
"""Larger requests (zeroing can be gigabytes) are never damaged: the old data would have to be kept."""


class Layer:
    """One layer of damage. ``key`` is what places of bad blocks are drawn from."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.patches = Patches()
        self.healed: dict[str, set[int]] = {}
        self.healed_rate: dict[str, float] = {}

    def frozen(self) -> Layer:
        """A copy that later changes of this one do not reach. O(pieces)."""
        other = Layer(self.key)
        other.patches = self.patches.copy()
        other.healed = {rule: set(blocks) for rule, blocks in self.healed.items()}
        other.healed_rate = dict(self.healed_rate)
        return other

    def become(self, other: Layer) -> None:
        copy = other.frozen()
        self.key, self.patches, self.healed, self.healed_rate = copy.key, copy.patches, copy.healed, copy.healed_rate


class Overlay:
    """The damage of one disk."""

    def __init__(self, key: str = "") -> None:
        self.data, self.device = Layer(key), Layer(key)
        self.media: list[Media] = []
        self._keeps_history = False
        self._history = Patches()
        self._past: list[tuple[int, int]] = []
        self._snapshots: dict[str, Layer] = {}

    @property
    def is_quiet(self) -> bool:
        """Whether requests without effects need not come by here. Media faults ask to be told of writes."""
        return not (self.data.patches or self.device.patches or self.media or self._keeps_history)

    def layer(self, sticks_to: str) -> Layer:
        return self.device if sticks_to == "device" else self.data

    def keep_history(self, wanted: bool) -> None:
        """Whether old data are kept for stale reads."""
        if self._keeps_history and not wanted:
            self._forget_history()
        self._keeps_history = wanted

    def _forget_history(self) -> None:
        self._history.clear()
        self._past.clear()

    # Reading

    def source(self, offset: int, effects: Iterable[Effect] = ()) -> int:
        """Where in the store to read from."""
        for effect in effects:
            if effect.kind == "misdirect":
                return effect.value
        return offset

    def show(self, offset: int, view: memoryview, now: int, effects: Iterable[Effect] = ()) -> None:
        """Turn what was read at `source` into what the client sees, in place. ``view`` is of bytes and can be written."""
        at = self.source(offset, effects)
        self.data.patches.show(at, view, now)
        self.device.patches.show(at, view, now)
        for effect in effects:
            if effect.kind == "stale":
                self._history.show(at, view, now)
            elif effect.kind == "flip":
                _flip(view, effect.value)

    # Writing

    def before(self, offset: int, length: int, effects: Sequence[Effect] = ()) -> list[tuple[int, int]]:
        """The ranges (offset, length) that must be read from the store before it is written."""
        damaged = any(effect.kind in ("lose", "torn", "misdirect") for effect in effects)
        return [(offset, length)] if (damaged or self._keeps_history) and length <= EFFECT_BYTES_MAX else []

    def wrote(
        self,
        offset: int,
        data: bytes | memoryview | int,
        now: int,
        effects: Sequence[Effect] = (),
        before: Sequence[bytes] = (),
    ) -> None:
        """The store was written. ``data``: what, or how many zeros. ``before``: what was read as `before` asked for."""
        length = data if isinstance(data, int) else len(data)
        old = bytearray(before[0]) if before else None
        if old is not None:
            self.show(offset, memoryview(old), now)
            if self._keeps_history:
                self._remember(offset, bytes(old))
        else:
            self._history.cut(offset, length)
        for media in self.media:
            media.wrote(offset, length, now)
        self.data.patches.cut(offset, length)
        self.device.patches.cut(offset, length)
        if length > EFFECT_BYTES_MAX:
            return
        for effect in effects:
            self._damage(effect, offset, bytes(length) if isinstance(data, int) else data, old)

    def _damage(self, effect: Effect, offset: int, data: bytes | memoryview, old: bytearray | None) -> None:
        patches = self.layer(effect.sticks_to).patches
        kind, value, rule = effect.kind, effect.value, effect.rule
        if kind == "flip":
            spoilt = self._seen(offset, data)
            _flip(memoryview(spoilt), value)
            for byte in sorted({bit // 8 for bit in value}):
                patches.put(offset + byte, bytes(spoilt[byte : byte + 1]), rule)
        elif kind == "torn" and old is not None:
            at = 0
            for start, end in (*value, (len(data), len(data))):
                patches.put(offset + at, bytes(old[at:start]), rule)
                at = end
        elif kind == "lose" and old is not None:
            patches.put(offset, bytes(old), rule, value)
        elif kind == "misdirect" and old is not None:
            patches.put(offset, bytes(old), rule)
            patches.put(value, bytes(data), rule)

    def _seen(self, offset: int, data: bytes | memoryview) -> bytearray:
        """What a reader sees of data just written, with the damage of this very write so far."""
        seen = bytearray(data)
        self.data.patches.show(offset, memoryview(seen), 0)
        self.device.patches.show(offset, memoryview(seen), 0)
        return seen

    def _remember(self, offset: int, old: bytes) -> None:
        self._history.put(offset, old, "history")
        self._past.append((offset, len(old)))
        if self._history.size_bytes > HISTORY_BYTES_MAX:
            half = len(self._past) // 2 + 1
            for where in self._past[:half]:
                self._history.cut(*where)
            del self._past[:half]

    # Snapshots

    def snapshot(self, name: str) -> None:
        """A snapshot was taken: its data are damaged as the disk's are now."""
        self._snapshots[name] = self.data.frozen()

    def take_over(self, layer: Layer | None) -> None:
        """The disk has got the data of another, with the damage that sticks to them; None: they are undamaged."""
        self.data.become(layer or Layer(self.data.key))
        self._forget_history()

    def revert(self, name: str) -> None:
        """The disk went back to a snapshot. A snapshot from before there was an overlay is undamaged."""
        self.take_over(self._snapshots.get(name))

    def forget(self, name: str) -> None:
        """The snapshot was deleted."""
        self._snapshots.pop(name, None)

    def clone(self, name: str, key: str) -> Overlay:
        """The overlay of a disk cloned from the snapshot: the same damage of the data, a device of its own."""
        other = Overlay(key)
        other.data.become(self._snapshots.get(name) or Layer(self.data.key))
        return other

    # Undoing

    def heal(self, now: int) -> None:
        """Take away all damage of the disk. Its snapshots keep theirs; rules that are still in force may do more."""
        for layer in (self.data, self.device):
            layer.patches.clear()
        self._forget_history()
        for media in self.media:
            media.heal(now)

    def permanent(self, now: int) -> list[tuple[int, bytes]]:
        """What would have to be written to the store, as (offset, bytes), so that it holds what readers see.

        When that is done, `heal` makes the disk show the store again. Bad blocks are no data: they are healed by that.
        """
        merged = Patches()
        for layer in (self.data, self.device):
            for start, piece in layer.patches.all():
                if piece.until_ns is None or piece.until_ns > now:
                    merged.put(start, bytes(piece.data), piece.rule)
        return [(start, bytes(piece.data)) for start, piece in merged.all()]

    def rotten_bits(self, now: int) -> list[int]:
        """All bits flipped at rest, counted from the beginning of the disk: those a permanent heal must flip in the store."""
        return sorted({bit for media in self.media if media.flips for bit in media.everything(now)})

    def statistics(self) -> dict[str, Any]:
        return {
            name: {
                "pieces": len(layer.patches),
                "bytes": layer.patches.size_bytes,
                "healed_blocks": sum(map(len, layer.healed.values())),
            }
            for name, layer in (("data", self.data), ("device", self.device))
        }

    def _check(self) -> None:
        for patches in (self.data.patches, self.device.patches, self._history):
            patches._check()


def _flip(view: memoryview, bits: Iterable[int]) -> None:
    for bit in bits:
        view[bit // 8] ^= 1 << bit % 8

"""How much of everything is measured: the whole, and a little of it to see whether it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Scale", "Tell"]

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    """Sizes and counts. ``model_factor``: by how much the SR of the amplification is smaller than a real one."""

    small_bytes: int = GIB
    large_bytes: int = 16 * GIB
    sparse_bytes: int = 4 * TIB
    sparse_run_bytes: int = 512 * MIB
    repeats: int = 20
    kills: int = 3
    counts: tuple[int, ...] = (1, 100, 10_000)
    depths: tuple[int, ...] = (10, 100, 1000)
    chains: tuple[int, ...] = (8, 32, 128)
    depth_bytes: int = GIB
    rounds: int = 5
    seconds: float = 2.0
    checkpoint_seconds: float = 20.0
    model_factor: int = 32
    model_segments: int = 512
    model_turns: float = 6.0
    skewed_turns: float = 16.0  # the cold blocks take long to come to rest
    model_parts: tuple[float, ...] = (0.50, 0.70, 0.85)


FULL = Scale()
QUICK = Scale(
    small_bytes=8 * MIB, large_bytes=16 * MIB, sparse_bytes=GIB, sparse_run_bytes=MIB, repeats=1, kills=1, counts=(1, 5),
    depths=(3,), chains=(2,), depth_bytes=8 * MIB, rounds=1, seconds=0.2, checkpoint_seconds=1.0, model_factor=64, model_segments=64,
    model_turns=0.6, skewed_turns=0.6, model_parts=(0.50, 0.70),
)  # fmt: skip

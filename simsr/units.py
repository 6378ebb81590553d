"""Sizes as people write and read them. Inside simsr every size is a number of bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from simsr.errors import BadSize

__all__ = ["parse_size", "format_size", "BLOCK_BYTES"]

BLOCK_BYTES = 4096
"""The granularity of the extent map and of the checksums."""

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*(?:([kmgtp])(i?b)?|b)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes that ``text`` names.

    ``10GiB``, ``10G`` and ``10g`` are powers of 1024 (as qemu-img has it), ``10GB`` is a power of 1000, a bare
    number is bytes. Raises `BadSize` for anything else, for zero and for fractions of a byte.

    >>> parse_size("1.5KiB"), parse_size("2GB"), parse_size("512")
    (1536, 2000000000, 512)
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise BadSize(size=text, reason="not a number with a unit")
    number, unit, suffix = match.groups()
    base = 1000 if suffix and suffix.lower() == "b" else 1024
    size = Fraction(number) * base ** _POWERS[(unit or "").lower()]
    if size.denominator != 1:
        raise BadSize(size=text, reason="not a whole number of bytes")
    if size == 0:
        raise BadSize(size=text, reason="must be greater than zero")
    return int(size)


def format_size(size_bytes: int) -> str:
    """Return ``size_bytes`` as a person reads it, in powers of 1024.

    >>> format_size(1536), format_size(10 * 2**30), format_size(7)
    ('1.5 KiB', '10 GiB', '7 B')
    """
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"

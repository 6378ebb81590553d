"""The one error that the benchmark reports to its user."""

from __future__ import annotations

__all__ = ["BenchFailure"]


class BenchFailure(Exception):
    """The benchmark cannot go on; the message says what failed and what the program concerned had to say."""

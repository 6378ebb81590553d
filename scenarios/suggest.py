"""Guessing what somebody meant who wrote a word that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["closest", "did_you_mean"]


def closest(word: str, words: Iterable[str]) -> str | None:
    """The one of ``words`` that is most like ``word``, if any is."""
    plain = {_plain(known): known for known in sorted(words)}
    near = get_close_matches(_plain(word), plain, 1, 0.6)
    return plain[near[0]] if near else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A clause to end a sentence with: a guess, or all there is."""
    words = list(words)
    near = closest(word, words)
    return f"did you mean {near!r}?" if near else f"there are {', '.join(words)}"


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")

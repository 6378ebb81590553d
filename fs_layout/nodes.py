"""The numbers by which the kernel knows files and directories.

A number belongs to one thing for as long as the mount lives and is never used again. The kernel counts how often it was told a
number (`remember`) and says when it has forgotten (`forget`); a number is let go of when both the kernel and the SR have
done with it.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Key", "Nodes", "ROOT"]

Key = tuple[str, str]
"""(kind, uuid); the kinds are in `fs_layout.tree`"""

ROOT: Key = ("root", "")
ROOT_NUMBER = 1


class Nodes:
    """Number <-> key."""

    def __init__(self, exists: Callable[[Key], bool]) -> None:
        self._exists = exists
        self._keys: dict[int, Key] = {ROOT_NUMBER: ROOT}
        self._numbers: dict[Key, int] = {ROOT: ROOT_NUMBER}
        self._known: dict[int, int] = {}  # how often the kernel was told
        self._next = ROOT_NUMBER + 1

    def __len__(self) -> int:
        return len(self._keys)

    def number(self, key: Key) -> int:
        """The number of ``key``; a new one if it has none."""
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._next
            self._keys[number] = key
            self._next += 1
        return number

    def key(self, number: int) -> Key:
        """What a number means. Raises KeyError."""
        return self._keys[number]

    def known(self, key: Key) -> int | None:
        """The number of ``key`` if the kernel knows it."""
        number = self._numbers.get(key)
        return number if number in self._known else None

    def renew(self, key: Key) -> None:
        """Give ``key`` another number from now on. The old one still means it, for those who have it open."""
        if key != ROOT:
            self._numbers.pop(key, None)

    def remember(self, number: int) -> None:
        """The kernel was told ``number`` once more."""
        self._known[number] = self._known.get(number, 0) + 1

    def forget(self, number: int, times: int) -> None:
        """The kernel has forgotten ``number``, as told ``times`` times."""
        left = self._known.get(number, 0) - times
        if left > 0:
            self._known[number] = left
            return
        self._known.pop(number, None)
        key = self._keys.get(number)
        if key is None or key == ROOT:
            return
        current = self._numbers.get(key) == number
        if not current or not self._exists(key):
            del self._keys[number]
            if current:
                del self._numbers[key]

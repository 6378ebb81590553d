"""The little language of get_all_records_where: ``field "a" = "b"``, joined by and, or, not and parentheses; true and false.

An expression becomes a function from a record to bool. Values are compared as text, as they stand in XML-RPC.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from simsr.xapi.failure import XenError

__all__ = ["compile_query"]

Predicate = Callable[[dict[str, Any]], bool]
DEPTH_MAX = 50
_TOKEN = re.compile(r'\s*(?:(\(|\)|=|and\b|or\b|not\b|true\b|false\b|field\b)|"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\')')
_END = re.compile(r"\s*\Z")


def compile_query(expression: str) -> Predicate:
    """Return the predicate that ``expression`` describes."""
    parser = _Parser(_tokens(expression), expression)
    found = parser.alternative(0)
    if parser.rest:
        raise _bad(expression, "something follows its end")
    return found


def _bad(expression: str, reason: str) -> XenError:
    return XenError("VALUE_NOT_SUPPORTED", "expr", expression[:500], reason)


def _tokens(expression: str) -> list[tuple[str, str]]:
    """Return (kind, text) pairs; the kind of a quoted text is ``text``."""
    tokens, position = [], 0
    while not _END.match(expression, position):
        match = _TOKEN.match(expression, position)
        if not match:
            raise _bad(expression, f"not understood at character {position}")
        word, double, single = match.groups()
        text = double if double is not None else single
        tokens.append((word, word) if word else ("text", re.sub(r"\\(.)", r"\1", text)))
        position = match.end()
    return tokens


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]], expression: str) -> None:
        self.rest = tokens[::-1]
        self._expression = expression

    def _next(self, *kinds: str) -> str:
        if not self.rest or self.rest[-1][0] not in kinds:
            raise _bad(self._expression, f"{' or '.join(kinds)} is missing")
        return self.rest.pop()[1]

    def _is_next(self, kind: str) -> bool:
        if self.rest and self.rest[-1][0] == kind:
            self.rest.pop()
            return True
        return False

    def alternative(self, depth: int) -> Predicate:
        parts = [self._conjunction(depth)]
        while self._is_next("or"):
            parts.append(self._conjunction(depth))
        return parts[0] if len(parts) == 1 else lambda row: any(part(row) for part in parts)

    def _conjunction(self, depth: int) -> Predicate:
        parts = [self._term(depth)]
        while self._is_next("and"):
            parts.append(self._term(depth))
        return parts[0] if len(parts) == 1 else lambda row: all(part(row) for part in parts)

    def _term(self, depth: int) -> Predicate:
        if depth > DEPTH_MAX:
            raise _bad(self._expression, f"nested more than {DEPTH_MAX} deep")
        if self._is_next("("):
            inner = self.alternative(depth + 1)
            self._next(")")
            return inner
        if self._is_next("not"):
            negated = self._term(depth + 1)
            return lambda row: not negated(row)
        if self._is_next("true"):
            return lambda row: True
        if self._is_next("false"):
            return lambda row: False
        left = self._operand()
        self._next("=")
        right = self._operand()
        return lambda row: left(row) == right(row)

    def _operand(self) -> Callable[[dict[str, Any]], str]:
        if self._is_next("field"):
            name = self._next("text").replace("__", "_")

            def value(row: dict[str, Any]) -> str:
                if name not in row:
                    raise _bad(self._expression, f"there is no field {name!r}")
                found = row[name]
                return str(found).lower() if isinstance(found, bool) else str(found)

            return value
        text = self._next("text")
        return lambda row: text

"""On which terms a VDI is served over NBD: to whom, how fast, how durable. Kept in the VDI's metadata under ``nbd``.

A client is let in if ``allow`` is empty, or if one of its rules fits what is known of the client:

    uid:1000           the process that connected to a unix socket runs as that user
    addr:10.0.0.0/8    it comes from that address or network (TCP)
    cn:backup          its TLS certificate was verified and has that common name

Snapshots and clones take over the terms of the disk they are made of; otherwise a copy would be open to those whom the disk is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from ipaddress import IPv6Address, ip_address, ip_network

from simsr.errors import BadRequest

__all__ = ["NbdTerms", "DURABILITIES"]

DURABILITIES = ("auto", "flush", "each-write")
"""When an acknowledged write is durable: after a flush; at once; or at once for clients that are known never to flush (tapdisk)."""

_RULES_MAX = 64
_RULE_BYTES_MAX = 256
_NUMBER_MAX = 1 << 53  # which JSON keeps
_HINT = "give uid:NUMBER, addr:ADDRESS[/BITS] or cn:NAME"


@dataclass(frozen=True)
class NbdTerms:
    """``bytes_s``, ``requests_s`` (a second) and ``connections_max``: 0 means no limit."""

    allow: tuple[str, ...] = ()
    connections_max: int = 0
    bytes_s: int = 0
    requests_s: int = 0
    durability: str = "auto"

    @classmethod
    def of(cls, meta: Mapping) -> NbdTerms:
        """The terms in a VDI's metadata; of a newer simsr what this one knows."""
        known = {field.name for field in fields(cls)}
        kept = {key: value for key, value in meta.get("nbd", {}).items() if key in known}
        return cls(**{**kept, "allow": tuple(kept.get("allow", ()))})

    def changed(self, **changes: object) -> NbdTerms:
        """These terms with ``changes``. Raises `BadRequest`."""
        new = replace(self, **changes)
        if len(new.allow) > _RULES_MAX:
            raise BadRequest(what="allow", reason=f"it has more than {_RULES_MAX} rules")
        for key in ("connections_max", "bytes_s", "requests_s"):
            if not 0 <= getattr(new, key) <= _NUMBER_MAX:
                raise BadRequest(what=key, reason=f"it is not between 0 and {_NUMBER_MAX}")
        if new.durability not in DURABILITIES:
            raise BadRequest(what=f"durability {new.durability!r}", reason=f"it is none of {', '.join(DURABILITIES)}")
        return replace(new, allow=tuple(dict.fromkeys(map(_checked_rule, new.allow))))

    def as_meta(self) -> dict:
        """What goes into the metadata, and out in JSON."""
        return {**asdict(self), "allow": list(self.allow)}

    def allows(self, uid: int | None, address: str | None, subject: str | None) -> bool:
        """Whether a client of whom that is known may connect."""
        return not self.allow or any(_fits(rule, uid, address, subject) for rule in self.allow)


def _checked_rule(rule: str) -> str:
    kind, _, value = rule.partition(":")
    what = f"allow rule {rule[:80]!r}"
    if len(rule.encode(errors="replace")) > _RULE_BYTES_MAX or not value or not value.isprintable():
        raise BadRequest(what=what, reason=f"it is too long, empty or not printable; {_HINT}")
    if kind == "uid":
        if not (value.isascii() and value.isdigit() and int(value) < 1 << 32):
            raise BadRequest(what=what, reason=f"a user is named by its number; {_HINT}")
        return f"uid:{int(value)}"
    if kind == "addr":
        try:
            return f"addr:{ip_network(value)}"
        except ValueError as error:
            raise BadRequest(what=what, reason=f"{error}; {_HINT}") from None
    if kind != "cn":
        raise BadRequest(what=what, reason=_HINT)
    return rule


def _fits(rule: str, uid: int | None, address: str | None, subject: str | None) -> bool:
    kind, _, value = rule.partition(":")
    if kind == "uid":
        return uid is not None and uid == int(value)
    if kind == "cn":
        return subject is not None and subject == value
    if kind != "addr" or address is None:
        return False
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address) and found.ipv4_mapped:  # of a socket that takes both
        found = found.ipv4_mapped
    return found in ip_network(value)

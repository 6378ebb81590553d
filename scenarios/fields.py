"""The kinds of values in a scenario file: how each is written, checked and converted, and its JSON Schema.

Each name is a type for a field of `scenarios.schema`. A converter raises ValueError with a sentence; pydantic adds the place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainValidator, ValidationInfo, WithJsonSchema

from scenarios import latency_text, quantities
from scenarios.clients import CLIENTS, errno_of
from scenarios.request import OPS, STEPS
from scenarios.suggest import did_you_mean

PATH_STATES = ("optimized", "non-optimized", "standby", "down")
HANGS = ("until-released", "until-phase-end")

_TEXT = {"type": "string", "minLength": 1}
_SIZE = {"type": ["string", "integer"], "examples": ["4KiB", "30MB"]}
_DISTANCE = re.compile(r"\s*uniform\s*\(([^,()]+),([^,()]+)\)\s*")
_EVENT = re.compile(r"[a-z0-9][a-z0-9._-]*")


def _kind(convert: Callable[[Any], Any], schema: dict[str, Any]) -> Any:
    return Annotated[Any, PlainValidator(convert), WithJsonSchema(schema)]


def _one_or_more(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


def _text(value: Any, example: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text such as {example!r}")
    return value


def _list(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError("the list is empty; leave the key out instead")
    return values


def _words(value: Any) -> tuple[str, ...]:
    words = tuple(_list(value))
    if not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"{value!r} is not a name or a list of names")
    return words


def _known(what: str, words: tuple[str, ...]) -> Callable[[Any], tuple[str, ...]]:
    def convert(value: Any) -> tuple[str, ...]:
        found = _words(value)
        for word in found:
            if word not in words:
                raise ValueError(f"{word!r} is no {what}; {did_you_mean(word, words)}")
        if len(set(found)) < len(found):
            raise ValueError(f"{value!r} names something twice")
        return found

    return convert


def _choice(what: str, words: tuple[str, ...]) -> Callable[[Any], str]:
    known = _known(what, words)
    return lambda value: known(_text(value, words[0]))[0]


def _counts(value: Any) -> tuple[int, ...]:
    counts = _list(value)
    if not all(type(count) is int and 1 <= count < 1 << 62 for count in counts):
        raise ValueError(f"{value!r} is not a number from 1 on, or a list of them")
    return tuple(sorted(set(counts)))


def _skip(value: Any) -> tuple[str, int]:
    """("requests" or "bytes", how many)."""
    if type(value) is int and value >= 0:
        return "requests", value
    if isinstance(value, str):
        return "bytes", quantities.parse_bytes(value)
    raise ValueError(f"{value!r} is not a number of requests, or a size such as 100MiB")


def _event(value: Any) -> str:
    kind, colon, name = _text(value, "event:pool-full").partition(":")
    if kind != "event" or not _EVENT.fullmatch(name):
        raise ValueError(f"{value!r} is not an event such as event:pool-full")
    return name


def _event_name(value: Any) -> str:
    if not isinstance(value, str) or not _EVENT.fullmatch(value):
        raise ValueError(f"{value!r} is not a name such as operator-came (small letters, digits and -)")
    return value


def _bad_blocks(value: Any) -> float | frozenset[int]:
    if isinstance(value, list):
        if not value or not all(type(block) is int and 0 <= block < 1 << 52 for block in value):
            raise ValueError(f"{value!r} is not a list of block numbers")
        return frozenset(value)
    return quantities.parse_share(value)


def _block_size(value: Any) -> int:
    size_bytes = quantities.parse_bytes(value)
    if size_bytes < 512 or size_bytes > 1 << 26 or size_bytes & (size_bytes - 1):
        raise ValueError(f"{value!r} is not a power of two from 512B to 64MiB")
    return size_bytes


def _size_range(value: Any) -> tuple[int, int | None]:
    """(smallest, largest), both included."""
    found = quantities.parse_range(value)
    if isinstance(found.start, float) or isinstance(found.end, float):
        raise ValueError(f"{value!r}: sizes of requests are no shares of the disk")
    return found.start, found.end


def _byte_range(value: Any) -> quantities.Range:
    found = quantities.parse_range(_text(value, "1GiB..2GiB"))
    if found.start == found.end:
        raise ValueError(f"{value!r} is not a range such as 1GiB..2GiB or 25%..30%")
    return found


def _distance(value: Any) -> tuple[int, int]:
    """(least, most) bytes."""
    match = _DISTANCE.fullmatch(_text(value, "64KiB"))
    low, high = (quantities.parse_bytes(part.strip()) for part in (match.groups() if match else (value, value)))
    if not 512 <= low <= high or low % 512 or high % 512:
        raise ValueError(f"{value!r} is not a distance in sectors of 512 bytes, such as 64KiB or uniform(4KiB, 1MiB)")
    return low, high


def _keep(value: Any) -> str | float | tuple[int, ...]:
    if isinstance(value, list):
        return _counts(value)
    if value in ("none", "all", "prefix"):
        return value
    if isinstance(value, str) and value.startswith("p="):
        return quantities.parse_share(value[2:])
    raise ValueError(f"{value!r} is not none, all, prefix, p=0.5 or a list of numbers")


def _duration(value: Any) -> int:
    return quantities.parse_duration(_text(value, "12s"))


def _positive_duration(value: Any) -> int:
    duration_ns = _duration(value)
    if not duration_ns:
        raise ValueError(f"{value!r} must be longer than nothing")
    return duration_ns


def _latency(value: Any, info: ValidationInfo) -> latency_text.Latency:
    return latency_text.parse_latency(_text(value, "3ms"), (info.context or {}).get("traces"))


def _delay(value: Any, info: ValidationInfo) -> latency_text.Delay:
    return latency_text.parse_delay(_text(value, "3ms"), (info.context or {}).get("traces"))


def _rate(value: Any) -> int:
    rate = quantities.parse_rate(_text(value, "30MB/s"))
    if not rate:
        raise ValueError(f"{value!r} lets nothing through; use hang = true for that")
    return rate


def _positive_bytes(value: Any) -> int:
    size_bytes = quantities.parse_bytes(value)
    if not size_bytes:
        raise ValueError(f"{value!r} must be more than nothing")
    return size_bytes


def _error(value: Any) -> str:
    errno_of(_text(value, "EIO"))
    return value


def _hang(value: Any) -> str | int:
    if value is True:
        return HANGS[0]
    if value in HANGS:
        return value
    try:
        return _positive_duration(value)
    except ValueError:
        raise ValueError(f"{value!r} is not true, {HANGS[0]}, {HANGS[1]} or a duration such as 70s") from None


def _full(value: Any) -> str:
    if value is True:
        return "writes"
    if value in ("now", "metadata"):
        return value
    raise ValueError(f"{value!r} is not true, now or metadata")


def _lose(value: Any) -> int:
    """Nanoseconds until readers see it; 0: never."""
    return 0 if value is True else _positive_duration(value)


def _repeat(value: Any) -> int | str:
    """A number, or the operation whose steps are gone through."""
    if type(value) is int and 1 <= value <= 100_000:
        return value
    if isinstance(value, str) and value.startswith("each step of "):
        return _choice("operation", OPS)(value.removeprefix("each step of "))
    raise ValueError(f"{value!r} is not a number from 1 to 100000, or 'each step of revert'")


def tabled(table: type, key: str) -> Any:
    """A table that may be written as the value of its most important key, or as ``true``."""

    def convert(value: Any) -> Any:
        if value is True:
            return {}
        return {key: value} if isinstance(value, str | int | float | list) else value

    return Annotated[table | None, BeforeValidator(convert, json_schema_input_type=table | str | bool)]


Globs = _kind(_words, _one_or_more(_TEXT))
Names = _kind(_words, _one_or_more(_TEXT))
Ops = _kind(_known("operation", OPS), _one_or_more({"enum": list(OPS)}))
Clients = _kind(_known("client", tuple(CLIENTS)), _one_or_more({"enum": list(CLIENTS)}))
Buckets = _kind(_known("kind of bucket", ("op", "size", "depth")), _one_or_more({"enum": ["op", "size", "depth"]}))
ByteRange = _kind(_byte_range, {**_TEXT, "examples": ["1GiB..2GiB", "25%..30%"]})
SizeRange = _kind(_size_range, {**_SIZE, "examples": ["4KiB..64KiB"]})
Chance = _kind(quantities.parse_share, {"type": ["number", "string"], "examples": [0.01, "1%"]})
Counts = _kind(_counts, _one_or_more({"type": "integer", "minimum": 1}))
Skip = _kind(_skip, {**_SIZE, "examples": [100, "100MiB"]})
Event = _kind(_event, {**_TEXT, "pattern": "^event:"})
EventName = _kind(_event_name, _TEXT)
BadBlocks = _kind(_bad_blocks, {"type": ["number", "string", "array"], "examples": ["2e-5", [1000, 1001]]})
BlockSize = _kind(_block_size, _SIZE)
SectorSize = _kind(_block_size, _SIZE)
Bytes = _kind(_positive_bytes, _SIZE)
Grows = _kind(lambda value: quantities.parse_growth(_text(value, "x1.5 per 60s")), {**_TEXT, "examples": ["x1.5 per 60s"]})
Distance = _kind(_distance, {**_TEXT, "examples": ["uniform(4KiB, 1MiB)"]})
Keep = _kind(_keep, {"type": ["string", "array"], "examples": ["none", "p=0.5"]})
Duration = _kind(_duration, {**_TEXT, "examples": ["12s"]})
Latency = Annotated[Any, PlainValidator(_latency), WithJsonSchema({**_TEXT, "examples": ["lognormal(p50=250us, p99=4ms)"]})]
DelayText = Annotated[Any, PlainValidator(_delay), WithJsonSchema({**_TEXT, "examples": ["3ms", "+ 3ms", "* 2"]})]
Rate = _kind(_rate, {**_TEXT, "examples": ["30MB/s"]})
BurstText = _kind(lambda value: quantities.parse_burst(_text(value, "200MB")), {**_TEXT, "examples": ["200MB for 5s"]})
Error = _kind(_error, {**_TEXT, "pattern": "^E", "examples": ["EIO"]})
HangText = _kind(_hang, {"type": ["string", "boolean"], "examples": [True, *HANGS, "70s"]})
PathState = _kind(_choice("state of a path", PATH_STATES), {"enum": list(PATH_STATES)})
KillStep = _kind(_choice("step", ("at-step", *STEPS)), {"enum": ["at-step", *STEPS]})
Full = _kind(_full, {"enum": [True, "now", "metadata"]})
Lose = _kind(_lose, {"type": ["string", "boolean"], "examples": [True, "5s"]})
Repeat = _kind(_repeat, {"type": ["integer", "string"], "examples": [3, "each step of revert"]})

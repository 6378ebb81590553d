"""docs/scenarios.md is true: its examples load, its tables list every key, its features have the tests they name."""

import re
import tomllib
from pathlib import Path

import pytest
from scenario_kit import HEAD

from scenarios.clients import CLIENTS, NBD_ERRORS
from scenarios.engine import Engine
from scenarios.latency_text import FUNCTIONS, parse_latency
from scenarios.loader import load
from scenarios.quantities import (
    NS,
    parse_burst,
    parse_bytes,
    parse_duration,
    parse_growth,
    parse_range,
    parse_rate,
    parse_share,
)
from scenarios.request import OPS
from scenarios.schema import TABLES, ControlTable, LatencyTable
from scenarios.traces import FORMATS

HERE = Path(__file__).parent
DOCS = (HERE.parents[1] / "docs/scenarios.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)


class Times:
    def next(self, op, length, depth):
        return 1.0


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_load_and_run(text):
    whole = text if text.startswith("simsr") else HEAD + text
    tomllib.loads(whole)
    many = Engine(load(whole), replays=lambda rule, disk: Times())
    assert many.disk("guest-1", 1 << 40).applies or many.scenario.phase
    many.advance(10**15)


def section(title):
    return DOCS.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    "table", [table for table in TABLES if table not in (LatencyTable, ControlTable)], ids=lambda table: table.__name__
)
def test_tables_list_every_key(table):
    rows = "".join(
        f"| `{field.alias or name}`{' (required)' if field.is_required() else ''} | {field.description} |\n"
        for name, field in table.model_fields.items()
    )
    assert f"{(table.__doc__ or '').strip()}\n\n| key | meaning |\n|---|---|\n{rows}\n" in section("Tables") + "\n"


def test_operations_are_listed():
    assert set(re.findall(r"`(\w+)`", section("Tables").split("`latency` has the keys")[1])) >= set(OPS)


def test_latencies_are_listed():
    written = re.findall(r"^\| `([^`]+)` \|", section("Latencies"), re.MULTILINE)
    assert {text.partition("(")[0] for text in written} == {"3ms", *FUNCTIONS}
    for text in written:
        parse_latency(text, lambda *a: None)


def test_units():
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", section("Units"), re.MULTILINE))
    parsers = {
        "duration": parse_duration,
        "rate": parse_rate,
        "growth": parse_growth,
        "burst": parse_burst,
        "size": parse_bytes,
    }
    parsers |= {"share": parse_share, "range of the disk": parse_range, "range of sizes": parse_range}
    for kind, parse in parsers.items():
        for text in re.findall(r"`([^`]+)`", rows[kind]):
            assert parse(tomllib.loads(f"x = {text}")["x"]), text


def test_clients():
    for row in re.findall(r"^\| `(\w+)`.*? \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", section("What is refused"), re.MULTILINE):
        name, errors, sends, patience, dies = row
        client = CLIENTS[name]
        assert (errors == "any") == (client.errors is None) and ("good" in dies) == client.dies_of_errors
        assert patience == (f"{client.patience_ns // NS} s" if client.patience_ns else "never")
        assert ("extents" in client.ops) == (sends == "everything")
    assert NBD_ERRORS == set(re.findall(r"\bE[A-Z]{2,}\b", section("What is refused")))


def test_formats_are_listed():
    rows = section("Traces").split("\n\n")[1] if "| format" in section("Traces").split("\n\n")[1] else section("Traces")
    listed = {}
    for names, latency, kept in re.findall(r"^\| (`.*?) \| yes \| yes \| (.*?) \| (.*?) ?\|$", rows, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            listed[name] = (
                latency == "yes" or latency == f"only {name[-1]}",
                set(re.findall(r"\w+", kept.lower().replace("errors", "error"))),
            )
    assert listed == {name: ("latency" in format.keeps, set(format.keeps) - {"latency"}) for name, format in FORMATS.items()}


def test_features_name_tests_that_exist():
    named = re.findall(r"^\| [^|]+ \| `([\w/.:]+)` \|$", section("Features"), re.MULTILINE)
    assert len(named) == section("Features").count("\n| ") - 1 >= 31
    for name in named:
        path, _, name = name.partition("::")
        tests = (HERE.parent / path).read_text()
        holder, _, function = name.rpartition("::")
        assert f"def {function}(" in tests and (not holder or f"class {holder}:" in tests), name

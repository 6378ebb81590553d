"""docs/api.md and the OpenAPI document say the same as the daemon does."""

import re
from pathlib import Path

import pytest

from simsr import errors
from simsr.daemon.api import make_app
from simsr.daemon.host import Host

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def document():
    return make_app(Host("/nonexistent"), None, None).openapi()


def operations(document):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def resolved(document, schema):
    """``schema`` without references and without the "or null" of what may be left out."""
    if "anyOf" in schema:
        (schema,) = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
    if "$ref" in schema:
        found = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return found
    return schema


def body_of(document, operation):
    """{field: whether it must be given}."""
    if "requestBody" not in operation:
        return {}
    schema = resolved(document, operation["requestBody"]["content"]["application/json"]["schema"])
    assert schema["additionalProperties"] is False
    return {field: field in schema.get("required", ()) for field in schema["properties"]}


def success(operation):
    (status,) = [status for status in operation["responses"] if status.startswith("2")]
    return int(status)


def rows(heading):
    """The table after ``heading``, as lists of cells."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_routes(document):
    described = {}
    for request, _, fields, status in rows("Routes"):
        method, path = request.strip("`").split()
        named = [field.strip() for field in fields.split(",") if field.strip()]
        described[method, path] = ({field.strip("*"): field.startswith("**") for field in named}, int(status))
    real = {
        (method, path): (body_of(document, operation), success(operation)) for method, path, operation in operations(document)
    }
    assert described == real


def test_errors():
    described = {code: (int(status), int(exit_code), int(fault)) for code, status, exit_code, fault in rows("Errors")}
    classes = [getattr(errors, name) for name in errors.__all__]
    assert described == {cls.__name__: (cls.http_status, cls.exit_code, cls.sm_fault) for cls in classes}


def test_the_error_example_has_all_fields():
    assert set(re.findall(r'"(\w+)":', PAGE.split("```json")[1].split("```")[0])) >= {
        "error", "code", "message", "hint", "exit_code", "sm_fault", "xenapi_code", "details",
    }  # fmt: skip


def test_openapi_describes_every_answer(document):
    assert document["openapi"].startswith("3.") and document["info"]["title"] == "simsrd" and document["info"]["version"]
    names = []
    for method, path, operation in operations(document):
        names.append(operation["operationId"])
        where = f"{method} {path}"
        assert operation.get("description"), where
        in_path = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path" and p["required"]}
        assert in_path == set(re.findall(r"{(\w+)}", path)), where
        if success(operation) == 204:
            assert "content" not in operation["responses"]["204"], where
            continue
        schema = operation["responses"][str(success(operation))]["content"]["application/json"]["schema"]
        schema = resolved(document, schema["items"] if schema.get("type") == "array" else schema)
        assert schema["type"] == "object" and set(schema["required"]) == set(schema["properties"]), where
    assert len(names) == len(set(names)) == len(rows("Routes"))


def test_openapi_has_no_dangling_references(document):
    text = str(document)
    for reference in set(re.findall(r"#/[\w/-]+", text)):
        assert resolved(document, {"$ref": reference})
